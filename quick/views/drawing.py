"""Tensors -> pictures: samples, mistakes, confusion matrix, saliency.

Pictures are uint8 arrays `(H, W, 3)` in RGB. Small ones are enlarged without smoothing; names that no font can draw are
numbered, see fonts.py. The one colour scale is cividis, which colour-blind people see as others do (Nunez et al. 2018,
doi.org/10.1371/journal.pone.0199239).
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from quick.views.fonts import draw_text, drawable, length, shortened

CIVIDIS = ["00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "e1cc55", "fee838"]
BACKGROUND, TEXT = (255, 255, 255), (30, 30, 30)
TILE = 96  # pixels, about, of an enlarged picture's longer side
MOST_CLASSES = 100  # in a confusion matrix


# ---- tools -----------------------------------------------------------------------------------------------------------


def colours(values: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1], of any shape, as colours of the scale: uint8 with a last axis of 3."""
    anchors = np.array([[int(code[at : at + 2], 16) for at in (0, 2, 4)] for code in CIVIDIS])
    positions = np.linspace(0, 1, len(anchors))
    return np.stack([np.interp(values, positions, channel) for channel in anchors.T], -1).round().astype(np.uint8)


def stretch(values: np.ndarray) -> np.ndarray:
    """Numbers stretched to all of [0, 1]; 0 where they are all the same, and where they are no finite numbers."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
    return np.where(np.isfinite(values), (values - low) / (high - low if high > low else 1), 0)


def enlarged(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture enlarged without smoothing, by a whole number, to at most `side` pixels; large ones are reduced."""
    times = side // max(picture.shape[:2])
    if times >= 1:
        return picture.repeat(times, 0).repeat(times, 1)
    return np.asarray(Image.fromarray(picture).resize((side, max(1, side * picture.shape[0] // picture.shape[1]))))


def grid(pictures: Sequence[np.ndarray], captions: Sequence[str] = (), columns: int = 4, gap: int = 4) -> np.ndarray:
    """Pictures of one size side by side, each above its caption, which may have several lines.

    TensorBoard shows a picture 350 pixels wide: captions in four columns can still be read.
    """
    captions = captions or [""] * len(pictures)
    height, width = pictures[0].shape[:2]
    lines = max(caption.count("\n") + 1 if caption else 0 for caption in captions)
    columns = min(columns, len(pictures))
    step_x, step_y = width + gap, height + gap + 15 * lines
    canvas = Image.new("RGB", (columns * step_x + gap, math.ceil(len(pictures) / columns) * step_y + gap), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = gap + number % columns * step_x, gap + number // columns * step_y
        canvas.paste(Image.fromarray(picture), (x, y))
        for line, text in enumerate(caption.split("\n")):
            draw_text(draw, (x, y + height + 15 * line), shortened(text, width, 12), 12, TEXT)
    return np.asarray(canvas)


def arrays(images: Tensor) -> list[np.ndarray]:
    """The pictures of a uint8 tensor `(N, 3, H, W)`."""
    return list(images.permute(0, 2, 3, 1).cpu().numpy())


def note_picture(text: str) -> np.ndarray:
    """A small picture of one line of text."""
    canvas = Image.new("RGB", (round(length(text, 14)) + 20, 30), BACKGROUND)
    draw_text(ImageDraw.Draw(canvas), (10, 6), text, 14, TEXT)
    return np.asarray(canvas)


# ---- pictures and answers --------------------------------------------------------------------------------------------


def samples(images: Tensor, labels: Tensor, classes: Sequence[str]) -> np.ndarray:
    """uint8 images `(N, 3, H, W)`, each above its class; `labels` are int64 `(N,)`."""
    names = drawable(classes)
    return grid([enlarged(picture, TILE) for picture in arrays(images)], [names[label] for label in labels.tolist()])


def most_mistaken(probabilities: Tensor, labels: Tensor, count: int = 16) -> Tensor:
    """Which wrong answers were given with the most confidence: at most `count` indices, int64, most confident first.

    `probabilities` are float `(N, classes)`, `labels` int64 `(N,)`.
    """
    confidence, guesses = probabilities.max(1)
    wrong = (guesses != labels).nonzero().squeeze(1)
    return wrong[confidence[wrong].argsort(descending=True, stable=True)[:count]]


def mistakes(images: Tensor, labels: Tensor, probabilities: Tensor, classes: Sequence[str]) -> np.ndarray:
    """uint8 images `(N, 3, H, W)` with wrong answers: below each its true class, and the guess with its probability.

    `labels` are int64 `(N,)`, `probabilities` float `(N, classes)`.
    """
    classes, (confidence, guesses) = drawable(classes), probabilities.max(1)
    captions = [
        f"is {classes[label]}\n{share:.0%} {classes[guess]}"
        for label, guess, share in zip(labels.tolist(), guesses.tolist(), confidence.tolist(), strict=True)
    ]
    return grid([enlarged(picture, TILE) for picture in arrays(images)], captions)


def confusion_picture(counts: Tensor, classes: Sequence[str]) -> np.ndarray:
    """A confusion matrix as a heat map, from int64 counts `(classes, classes)`: rows are true classes, columns guesses.

    The colour is a count's share of its row. Of more than 100 classes it shows those with the most mistakes.
    """
    counts, classes = counts.cpu(), drawable(classes)
    if len(classes) > MOST_CLASSES:
        wrong = counts.sum(0) + counts.sum(1) - 2 * counts.diag()
        shown = wrong.argsort(descending=True, stable=True)[:MOST_CLASSES].sort().values
        counts, classes = counts[shown][:, shown], [classes[index] for index in shown.tolist()]
    if len(classes) <= 12:
        size, text_size = 44, 17
    elif len(classes) <= 20:
        size, text_size = 38, 13
    else:
        size, text_size = 22, 9
    names = [shortened(name, 130, text_size) for name in classes]
    margin = 40 + round(max(length(name, text_size) for name in names))
    side = margin + size * len(names) + 10
    canvas = Image.new("RGB", (side, side), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw_text(draw, (margin, 4), "taken for", 14, TEXT)
    draw_text(draw, (6, margin - 20), "truth", 14, TEXT)

    share = (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    fills = colours(share)
    for row, name in enumerate(names):
        y = margin + size * row
        draw_text(draw, (margin - 6, y + size // 2), name, text_size, TEXT, anchor="rm")
        column_name = Image.new("RGB", (margin - 30, size), BACKGROUND)
        draw_text(ImageDraw.Draw(column_name), (0, size // 2), name, text_size, TEXT, anchor="lm")
        canvas.paste(column_name.rotate(90, expand=True), (y, 24))  # the matrix is square: columns are where rows are
        for column in range(len(names)):
            x = margin + size * column
            draw.rectangle((x, y, x + size - 2, y + size - 2), tuple(fills[row, column].tolist()))
            if count := int(counts[row, column]):
                ink = (255, 255, 255) if share[row, column] < 0.6 else (0, 0, 0)
                draw_text(draw, (x + size // 2 - 1, y + size // 2), f"{count}", text_size, ink, anchor="mm")
    return np.asarray(canvas)


# ---- saliency --------------------------------------------------------------------------------------------------------


def salient(picture: np.ndarray, heat: Tensor) -> np.ndarray:
    """A picture `(H, W, 3)`, darkened where its heat, float `(H, W)` in [0, 1], is low."""
    weight = 0.15 + 0.85 * heat.sqrt().numpy()[..., None]
    return (picture * weight + 20 * (1 - weight)).round().clip(0, 255).astype(np.uint8)


def saliencies(
    images: Tensor, heats: Sequence[Tensor], labels: Tensor, probabilities: Tensor, classes: Sequence[str]
) -> np.ndarray:
    """uint8 images `(N, 3, H, W)`, each beside its saliency and above its answer, and above its class if that differs.

    `heats` are float `(H, W)`, `labels` int64 `(N,)`, `probabilities` float `(N, classes)`.
    """
    classes, captions, pairs = drawable(classes), [], []
    for guess, label in zip(probabilities.argmax(1).tolist(), labels.tolist(), strict=True):
        captions.append(classes[guess] if guess == label else f"{classes[guess]} (is {classes[label]})")
    for picture, heat in zip(arrays(images), heats, strict=True):
        pairs.append(np.concatenate([enlarged(picture, TILE), enlarged(salient(picture, heat), TILE)], 1))
    return grid(pairs, captions, columns=2)


def explained(picture: np.ndarray, heat: Tensor, top: Sequence[tuple[str, float]]) -> np.ndarray:
    """A picture `(H, W, 3)` as the network saw it, its saliency, and its top classes as bars.

    `heat` is float `(H, W)`; `top` are classes and their probabilities.
    """
    side, bar = 288, 34
    titles = {"as the network saw it": picture, "what it looked at": salient(picture, heat)}
    parts = {title: enlarged(part, side) for title, part in titles.items()}
    part_height, part_width = parts["what it looked at"].shape[:2]
    height, width = max(part_height, bar * len(top)) + 60, 2 * part_width + 360
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for number, (title, part) in enumerate(parts.items()):
        x = 20 + number * (part_width + 20)
        draw_text(draw, (x, 12), title, 16, TEXT)
        canvas.paste(Image.fromarray(part), (x, 40))
    left = 60 + 2 * part_width
    draw_text(draw, (left, 12), "what it says", 16, TEXT)
    names = drawable([name for name, _ in top])
    for number, (name, (_, share)) in enumerate(zip(names, top, strict=True)):
        y = 40 + number * bar
        draw.rectangle((left, y + 16, left + 270, y + 26), (228, 228, 228))
        draw.rectangle((left, y + 16, left + round(270 * share), y + 26), tuple(colours(np.array(0.15)).tolist()))
        draw_text(draw, (left, y), shortened(name, 210, 13), 13, TEXT)
        draw_text(draw, (left + 270, y), f"{share:.1%}", 13, TEXT, anchor="ra")
    return np.asarray(canvas)

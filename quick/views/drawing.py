"""Tensors -> pictures: samples, mistakes, confusion matrix, saliency.

Pictures are uint8 arrays `(H, W, 3)` in RGB. Small ones are enlarged without smoothing, and text is in the font that
comes with Pillow. The one colour scale is cividis, which colour-blind people see as others do (Nunez et al. 2018,
doi.org/10.1371/journal.pone.0199239).
"""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CIVIDIS = ["00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "e1cc55", "fee838"]
BACKGROUND, TEXT = (255, 255, 255), (30, 30, 30)
TILE = 96  # pixels, about, of an enlarged picture's longer side
MOST_CLASSES = 100  # in a confusion matrix


# ---- tools -----------------------------------------------------------------------------------------------------------


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font; `size` is in pixels."""
    return ImageFont.load_default(size)


def colours(values: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1], of any shape, as colours of the scale: uint8 with a last axis of 3."""
    anchors = np.array([[int(code[at : at + 2], 16) for at in (0, 2, 4)] for code in CIVIDIS])
    positions = np.linspace(0, 1, len(anchors))
    return np.stack([np.interp(values, positions, channel) for channel in anchors.T], -1).round().astype(np.uint8)


def stretch(values: np.ndarray) -> np.ndarray:
    """Numbers stretched to all of [0, 1]; 0 where they are all the same."""
    low, high = np.nanmin(values), np.nanmax(values)
    return np.nan_to_num((values - low) / (high - low if high > low else 1))


def enlarged(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture enlarged without smoothing, by a whole number, to at most `side` pixels; large ones are reduced."""
    times = side // max(picture.shape[:2])
    if times >= 1:
        return picture.repeat(times, 0).repeat(times, 1)
    return np.asarray(Image.fromarray(picture).resize((side, side * picture.shape[0] // picture.shape[1])))


def shortened(text: str, width: int, size: int) -> str:
    """The text, with an ellipsis for what `width` pixels cannot hold."""
    if font(size).getlength(text) <= width:
        return text
    while text and font(size).getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


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
            draw.text((x, y + height + 15 * line), shortened(text, width, 12), TEXT, font(12))
    return np.asarray(canvas)


def arrays(images: Tensor) -> list[np.ndarray]:
    """The pictures of a uint8 tensor `(N, 3, H, W)`."""
    return list(images.permute(0, 2, 3, 1).cpu().numpy())


def note_picture(text: str) -> np.ndarray:
    """A small picture of one line of text."""
    canvas = Image.new("RGB", (round(font(14).getlength(text)) + 20, 30), BACKGROUND)
    ImageDraw.Draw(canvas).text((10, 6), text, TEXT, font(14))
    return np.asarray(canvas)


# ---- pictures and answers --------------------------------------------------------------------------------------------


def samples(images: Tensor, labels: Tensor, classes: Sequence[str]) -> np.ndarray:
    """uint8 images `(N, 3, H, W)`, each above its class; `labels` are int64 `(N,)`."""
    return grid([enlarged(picture, TILE) for picture in arrays(images)], [classes[label] for label in labels.tolist()])


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
    confidence, guesses = probabilities.max(1)
    captions = [
        f"is {classes[label]}\n{share:.0%} {classes[guess]}"
        for label, guess, share in zip(labels.tolist(), guesses.tolist(), confidence.tolist(), strict=True)
    ]
    return grid([enlarged(picture, TILE) for picture in arrays(images)], captions)


def confusion_picture(counts: Tensor, classes: Sequence[str]) -> np.ndarray:
    """A confusion matrix as a heat map, from int64 counts `(classes, classes)`: rows are true classes, columns guesses.

    The colour is a count's share of its row. Of more than 100 classes it shows those with the most mistakes.
    """
    counts = counts.cpu()
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
    margin = 40 + round(max(font(text_size).getlength(name) for name in names))
    side = margin + size * len(names) + 10
    canvas = Image.new("RGB", (side, side), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, 4), "taken for", TEXT, font(14))
    draw.text((6, margin - 20), "truth", TEXT, font(14))

    share = (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    fills = colours(share)
    for row, name in enumerate(names):
        y = margin + size * row
        draw.text((margin - 6, y + size // 2), name, TEXT, font(text_size), anchor="rm")
        column_name = Image.new("RGB", (margin - 30, size), BACKGROUND)
        ImageDraw.Draw(column_name).text((0, size // 2), name, TEXT, font(text_size), anchor="lm")
        canvas.paste(column_name.rotate(90, expand=True), (y, 24))  # the matrix is square: columns are where rows are
        for column in range(len(names)):
            x = margin + size * column
            draw.rectangle((x, y, x + size - 2, y + size - 2), tuple(fills[row, column].tolist()))
            if count := int(counts[row, column]):
                ink = (255, 255, 255) if share[row, column] < 0.6 else (0, 0, 0)
                draw.text((x + size // 2 - 1, y + size // 2), f"{count}", ink, font(text_size), anchor="mm")
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
    captions, pairs = [], []
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
        draw.text((x, 12), title, TEXT, font(16))
        canvas.paste(Image.fromarray(part), (x, 40))
    left = 60 + 2 * part_width
    draw.text((left, 12), "what it says", TEXT, font(16))
    for number, (name, share) in enumerate(top):
        y = 40 + number * bar
        draw.rectangle((left, y + 16, left + 270, y + 26), (228, 228, 228))
        draw.rectangle((left, y + 16, left + round(270 * share), y + 26), tuple(colours(np.array(0.15)).tolist()))
        draw.text((left, y), shortened(name, 210, 13), TEXT, font(13))
        draw.text((left + 270, y), f"{share:.1%}", TEXT, font(13), anchor="ra")
    return np.asarray(canvas)

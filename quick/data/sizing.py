"""A picture of any size becomes a square: its middle is cut out, or it is padded or squashed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from quick.checkpoints import FITS, INTERPOLATIONS
from quick.errors import DataError

# Grey beside a padded picture: normalisation makes about 0 of it, with which convolutions pad. (The mean of a set is
# known only when all its pictures are read.)
PADDING = 128


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
) -> Image.Image:
    """The middle of a picture, antialiased: `side` pixels of its shorter side and at most `width` of the longer one.

    All of a picture that is to be padded or squashed.

    Only what is kept is computed, at the very pixels that torchvision's `Resize` and `CenterCrop` would give. An image
    that was decoded at a fraction of its `size` has the picture in the box `content`.
    """
    size, (left, top, right, bottom) = size or image.size, content or (0, 0, *image.size)
    side, resampling = sizing.side, Image.Resampling[sizing.interpolation.upper()]
    whole = sizing.resized(size)
    if sizing.fit != "crop":
        return image.resize(whole, resampling, (left, top, right, bottom))
    long = min(max(whole), width)
    kept = (long, side) if size[0] >= size[1] else (side, long)
    # The square in the middle of what is kept is the one in the middle of the whole.
    x, y = (round((full - side) / 2) - round((part - side) / 2) for full, part in zip(whole, kept, strict=True))
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

"""Kinds of pixels: palettes, transparency, CMYK, 16 bits, floats. All become 8-bit RGB."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image


class Values(NamedTuple):
    """What the pixels of a picture hold that are wider than 8 bits."""

    lowest: float
    highest: float
    whole: bool  # they are integers


def plain(image: Image.Image, levels: tuple[float, float] | None) -> tuple[Image.Image, Values | None]:
    """Any kind of picture as one that can be resized: L, RGB, or with transparency La, RGBa (multiplied by it).

    And what pixels held that are wider than 8 bits.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return narrow(image, levels)
    if image.has_transparency_data:
        grey = image.mode in ("1", "L", "LA", "La")
        for mode in ("LA", "La") if grey else ("RGBA", "RGBa"):
            image = image if image.mode in (mode, "La", "RGBa") else image.convert(mode)
    elif image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return image, None


def narrow(image: Image.Image, levels: tuple[float, float] | None) -> tuple[Image.Image, Values | None]:
    """A grey picture of 16 or 32 bits a pixel, or of floats, in 8 bits; and what it held."""
    pixels, values = np.asarray(image), None
    is_float = pixels.dtype.kind == "f"
    finite = pixels[np.isfinite(pixels)] if is_float else pixels
    if finite.size:
        values = Values(float(finite.min()), float(finite.max()), not is_float)
    if levels is None:
        is_16_bit = values is None or (values.whole and values.lowest >= 0 and values.highest <= 65535)
        levels = (0, 65535) if is_16_bit else levels_of([values])
    low, high = levels
    grey = np.empty(pixels.shape, np.uint8)
    rows = max(1, 2**22 // pixels.shape[1])  # at a time: a picture can be large
    with np.errstate(all="ignore"):  # floats can be infinite, or no number, which becomes black
        for start in range(0, len(pixels), rows):
            part = pixels[start : start + rows].astype(np.float32) * (255 / (high - low))
            part += 0.5 - low * 255 / (high - low)
            grey[start : start + rows] = np.nan_to_num(part.clip(0, 255), copy=False)
    return Image.fromarray(grey), values


def levels_of(values: Sequence[Values]) -> tuple[float, float]:
    """Which values of pixels wider than 8 bits become 0 and 255, the same for a whole set of pictures.

    Integers: 0 and the largest number of 8, 10, 12, 14, 16 or more bits, as cameras have them. Floats and negative
    numbers: 0 and 1, or 0 and 255, if they fill at least half of that, else the set's lowest and highest.
    """
    low, high = min(part.lowest for part in values), max(part.highest for part in values)
    if low >= 0 and all(part.whole for part in values):
        bits = max(8, int(high).bit_length())
        return 0.0, 2.0 ** (bits + bits % 2 if bits < 16 else bits) - 1
    for most in (1.0, 255.0):
        if low >= 0 and most / 2 <= high <= most:
            return 0.0, most
    return low, high if high > low else low + 1


def opaque(pixels: np.ndarray) -> np.ndarray:
    """The pixels of a plain picture, uint8 `(H, W, 3)`, on white; on black if nothing of it is to be seen on white.

    They come as uint8 `(H, W)`, or `(H, W, channels)`: 3, or 2 or 4 with transparency, by which they are multiplied.
    """
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    if pixels.shape[2] in (2, 4):
        alpha = pixels[..., -1:]
        colour = np.minimum(pixels[..., :-1], alpha)  # bicubic resizing can overshoot
        pixels = colour + (255 - alpha)
        if pixels.min() > 247 and alpha.min() < 128 <= alpha.max():  # a white sign on nothing
            pixels = colour
    return np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels

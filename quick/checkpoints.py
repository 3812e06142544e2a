"""Checkpoints as files: written whole or not at all, and checked before anything of them is used."""

import io
import math
import os
import pickle
import pickletools
import re
import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

from quick.errors import CheckpointError

FORMAT = 2  # grows when an older reader could misread a newer file
CONTENT = {
    "format": int,
    "model": dict,  # name, and options for model.create
    "classes": list,
    "image_size": int,
    "resize": int,
    "interpolation": str,
    "mean": list,
    "std": list,
    "state_dict": dict,
    "epoch": int,
    "metrics": dict,
    "config": dict,
}
INTERPOLATIONS = ("bilinear", "bicubic")
LOSSES = ("cross_entropy", "mse", "l1")
TTA = ("none", "mirror", "shift")
LARGEST_SIDE, LARGEST_WIDTH, MOST_OUTPUTS = 4096, 64, 10**6  # what a file may ask for: bounds time and memory
LARGEST_PICKLE = 2**22  # bytes of a checkpoint's values other than tensors
CHECKSUM_BYTES = 8  # of a file's comment: CRC-32 in hexadecimal digits
NEEDED = re.compile(r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_(tensor_v2|parameter)")


def to_bytes(checkpoint: dict) -> memoryview:
    """A checkpoint as the bytes of a file: torch's zip archive, whose comment is a checksum of all bytes before it.

    The checksums inside of the archive cover only the weights, and torch.load looks at none of them.
    """
    file = io.BytesIO()  # written to a path, torch.save would hide the OSError of a full disk
    torch.save(checkpoint, file)
    with file.getbuffer() as content:
        content[-2:] = CHECKSUM_BYTES.to_bytes(2, "little")  # a zip file ends with its comment's length, so far 0
        checksum = zlib.crc32(content)
    file.seek(0, io.SEEK_END)
    file.write(b"%08x" % checksum)
    return file.getbuffer()


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all: aside, flushed to the disk, then renamed.

    Raises OSError when the disk refuses; then the file that was at `path` before is still there.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def read(path: str | Path, device: torch.device | str = "cpu") -> dict:
    """The content of a checkpoint, checked key by key; its tensors are on `device`.

    No code from the file runs (`weights_only=True`). Raises CheckpointError for a file that is missing, damaged, or of
    another kind or format.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        checkpoint = None
        if zipfile.is_zipfile(path):
            check_bytes(path)
            checkpoint = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(checkpoint, dict) or "format" not in checkpoint:
            error = "not a whole checkpoint of train.py"
        elif checkpoint["format"] not in range(1, FORMAT + 1):
            error = f"checkpoint format {checkpoint['format']!r:.40}; this version reads 1 to {FORMAT}"
        else:
            if checkpoint["format"] == 1:  # whose pictures were never resized further than to `image_size`
                checkpoint = {"resize": checkpoint.get("image_size"), "interpolation": "bilinear"} | checkpoint
            error = wrong_content(checkpoint)
    except OSError as problem:
        error = f"cannot be read: {problem.strerror or problem}"
    except pickle.UnpicklingError:
        error = "the file holds Python objects, which could run code; it was not loaded"
    except Exception:  # torch raises many kinds for damaged files
        error = "the file is damaged or cut short"
    if error:
        raise CheckpointError(f"{path}: {error}")
    return checkpoint


def check_bytes(path: Path) -> None:
    """Raise an error unless all bytes are as they were written, and reading them takes about as much memory as the file
    is large. UnpicklingError: the file is for objects that are neither tensors nor plain values."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("compressed")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("larger inside than outside")
        if not archive.comment and archive.testzip() is not None:  # earlier versions wrote no checksum of the whole
            raise ValueError("altered")
        if archive.comment:
            left, checksum = size - CHECKSUM_BYTES, 0
            while part := file.read(min(left, 2**20)):
                left, checksum = left - len(part), zlib.crc32(part, checksum)
            if archive.comment != b"%08x" % checksum:
                raise ValueError("altered")
        [values] = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if values.file_size > LARGEST_PICKLE:
            raise ValueError("too many values")
        # weights_only=True allows more than what a checkpoint needs, for example a bytearray of any size.
        for operation, name, _ in pickletools.genops(archive.read(values)):
            names = "GLOBAL" in operation.name or operation.name in ("INST", "OBJ", "NEWOBJ", "EXT1", "EXT2", "EXT4")
            if names and not NEEDED.fullmatch(str(name)):
                raise pickle.UnpicklingError(str(name))


def wrong_content(checkpoint: dict) -> str | None:
    """What is wrong with the content of a checkpoint, in words; None when nothing is."""
    for key, kind in CONTENT.items():
        if not isinstance(checkpoint.get(key), kind):
            return f"the checkpoint's {key!r} is missing or not of type {kind.__name__}"
    name, options = checkpoint["model"].get("name"), checkpoint["model"].get("options")
    if not (isinstance(name, str) and isinstance(options, dict) and is_state_dict(checkpoint["state_dict"])):
        return "the checkpoint's 'model' or 'state_dict' holds something else"
    if not all(map(is_plain, [checkpoint["metrics"], checkpoint["config"], options])):
        return "the checkpoint's options, metrics or config are not plain values"
    if not all(isinstance(name, str) and name.isprintable() for name in checkpoint["classes"]):
        return "the checkpoint's class names are not all printable"
    numbers = [*checkpoint["mean"], *checkpoint["std"]]
    if (
        len(checkpoint["mean"]) != 3
        or len(checkpoint["std"]) != 3
        or not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
        or min(checkpoint["std"]) <= 0
        or not 1 <= checkpoint["image_size"] <= checkpoint["resize"] <= LARGEST_SIDE
        or checkpoint["interpolation"] not in INTERPOLATIONS
        or checkpoint["config"].get("loss", LOSSES[0]) not in LOSSES
        or checkpoint["config"].get("tta", TTA[0]) not in TTA
        or not all(1 <= options.get(key, 1) <= MOST_OUTPUTS for key in ("append", "classes"))
        or not 1 <= options.get("image_size", 1) <= LARGEST_SIDE
        or not 0 < options.get("width", 1) <= LARGEST_WIDTH
    ):
        return "the checkpoint's classes, sizes, options, mean, std or config hold impossible values"
    return None


def is_state_dict(values: dict) -> bool:
    """Whether these are tensors by name, each with all of its numbers in the file: a view could repeat one for ever."""
    return all(
        isinstance(name, str)
        and type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and not (value.is_quantized or value.is_meta)
        and value.nbytes <= value.untyped_storage().nbytes()
        for name, value in values.items()
    )


def is_plain(values: dict) -> bool:
    """Whether these are numbers, strings or short lists of numbers, by name."""
    return all(
        isinstance(name, str)
        and isinstance(value, bool | int | float | str | list | tuple)
        and not (isinstance(value, list | tuple) and not all(isinstance(part, int | float) for part in value))
        for name, value in values.items()
    )

"""Checkpoints as files: written whole or not at all, and checked before anything of them is used."""

import contextlib
import io
import math
import os
import pickle
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

from quick.archives import CHECKSUM_BYTES, LARGEST_PICKLE, LEGACY, check_archive, check_legacy, kind_of
from quick.choices import FITS, INTERPOLATIONS, LOSSES, TTA
from quick.errors import CheckpointError, composed, out_of_memory, printable

FORMAT = 3  # grows when an older reader could misread a newer file
CONTENT = {
    "format": int,
    "model": dict,  # name, and options for model.create
    "classes": list,
    "image_size": int,
    "resize": int,
    "interpolation": str,
    "fit": str,
    "mean": list,
    "std": list,
    "state_dict": dict,
    "epoch": int,
    "metrics": dict,
    "config": dict,
}
LARGEST_SIDE, LARGEST_WIDTH, MOST_OUTPUTS = 4096, 64, 10**6  # what a file may ask for: bounds time and memory
LARGEST_NAMES = 3 * LARGEST_PICKLE // 4  # of all classes, in bytes: what else there is needs the rest
LONGEST_NAME = 1000  # characters of the name of a class, weight, option, metric or setting
LONGEST_TEXT, LONGEST_LIST, MOST_VALUES = 4096, 16, 1000  # of options, metrics and settings
OURS = "give one that train.py wrote, such as logs/RUN/best.pt"
OR_WEIGHTS = ", or weights alone: torch.save(network.state_dict(), FILE)"


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

    Raises OSError, with this path, when the disk refuses; then the file that was at `path` before is still there.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # not the file aside
        raise
    finally:
        with contextlib.suppress(OSError):  # a name too long for the system cannot even be looked for
            aside.unlink(missing_ok=True)


def read(path: str | Path) -> dict:
    """The content of a checkpoint, checked key by key; its tensors are on the CPU.

    No code from the file runs (`weights_only=True`). Raises CheckpointError for a file that is missing, damaged, or of
    another kind or format.
    """
    return checked(path, contents(path))


def contents(path: str | Path, weights: bool = False) -> object:
    """What torch.save wrote into a file, with its tensors on the CPU; no code from the file runs.

    With `weights` it may be a state_dict, also as torch.save wrote it before PyTorch 1.6, without sums. Raises
    CheckpointError for a file that is missing, damaged or of another kind.
    """
    path, ours = Path(path), OURS + OR_WEIGHTS * weights
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint{'; it is a folder' if path.is_dir() else ''}")
    try:
        with path.open("rb") as file:  # one file throughout, whatever gets its name meanwhile
            kind = kind_of(file)
            if kind and not (weights and kind == LEGACY):
                error = f"not a whole checkpoint of train.py but {kind}; {ours}"
            else:
                check_legacy(file) if kind else check_archive(file)
                file.seek(0)
                content = torch.load(file, map_location="cpu", weights_only=True)
                error = None if are_bare(content) else f"a dict in it has attributes, which is none of ours; {ours}"
    except OSError as problem:
        error = f"cannot be read: {problem.strerror or problem}"
    except pickle.UnpicklingError as problem:
        what = f"Python objects ({problem!s:.80})"
        error = f"the file holds {what}, which could run code; it was not loaded; {ours}"
    except Exception as problem:  # torch raises many kinds for damaged files
        if out_of_memory(problem):
            raise
        error = "the file is damaged or cut short"
    if error:
        raise CheckpointError(f"{path}: {error}")
    return content


def checked(path: str | Path, content: object) -> dict:
    """The `content` of the file `path` as a checkpoint of today, all of it checked; raises CheckpointError."""
    if error := foreign_content(content):
        raise CheckpointError(f"{path}: {error}")
    checkpoint = content
    if checkpoint["format"] == 1:  # whose pictures were never resized further than to `image_size`
        checkpoint = {"resize": checkpoint.get("image_size"), "interpolation": "bilinear"} | checkpoint
    checkpoint = {"levels": None, "fit": "crop"} | checkpoint  # which formats 1 and 2 have not
    try:
        error = wrong_content(checkpoint)
    except Exception as problem:  # a stranger's values can be anything
        if out_of_memory(problem):
            raise
        error = "the file is damaged or cut short"
    if error:
        raise CheckpointError(f"{path}: {error}")
    return checkpoint | {"classes": [composed(name) for name in checkpoint["classes"]]}  # as of folders


def foreign_content(content: object) -> str | None:
    """What a file of torch.save holds that train.py has not written, in words; None when it may have."""
    if isinstance(content, dict) and "format" in content:
        number = content["format"]
        if isinstance(number, int) and 1 <= number <= FORMAT:
            return None
        number = f" {number}" if isinstance(number, int) else " of another program"
        return f"checkpoint format{number}; this version reads 1 to {FORMAT}"
    what = f"a {type(content).__name__}"
    if isinstance(content, dict):
        names = [key[:40] for key in content if isinstance(key, str)]
        what = f"a checkpoint of another program, with {', '.join(names[:5]) or 'no names in it'}"
        if content and all(isinstance(value, Tensor) for value in content.values()):
            what = "weights alone (a state_dict), without network, classes and sizes"
    return f"not a whole checkpoint of train.py but {what}; {OURS}"


def are_bare(content: object) -> bool:
    """Whether no dict in it has attributes: torch gives an OrderedDict those that a file names, also in the place of
    its methods, so that `items()` could tell less than there is. A state_dict has `_metadata`, versions of layers."""
    seen, to_see = set(), [content]
    while to_see:
        part = to_see.pop()
        if not isinstance(part, dict | list | tuple) or id(part) in seen:
            continue
        seen.add(id(part))
        to_see += [*dict.keys(part), *dict.values(part)] if isinstance(part, dict) else part
        attributes = getattr(part, "__dict__", {})
        metadata = attributes.get("_metadata", {})
        if attributes.keys() - {"_metadata"} or not isinstance(metadata, dict):
            return False
        if not all(isinstance(name, str) and type(of) is dict and is_plain(of) for name, of in dict.items(metadata)):
            return False
        to_see.append(metadata)
    return True


def wrong_content(checkpoint: dict) -> str | None:
    """What is wrong with the content of a checkpoint, in words; None when nothing is."""
    for key, kind in CONTENT.items():
        if not isinstance(checkpoint.get(key), kind):
            return f"the checkpoint's {key!r} is missing or not of type {kind.__name__}"
    name, options = checkpoint["model"].get("name"), checkpoint["model"].get("options")
    if not (is_name(name) and isinstance(options, dict) and is_state_dict(checkpoint["state_dict"])):
        return "the checkpoint's 'model' or 'state_dict' holds something else"
    if not all(map(is_plain, [checkpoint["metrics"], checkpoint["config"], options])):
        return "the checkpoint's options, metrics or config are not plain values"
    if error := wrong_classes(checkpoint["classes"]):
        return error
    levels = checkpoint["levels"]  # of pixels wider than 8 bits: None, or what became black and white
    are_two = isinstance(levels, list) and len(levels) == 2 and is_plain({"levels": levels})
    if levels is not None and not (are_two and levels[0] < levels[1]):
        return "the checkpoint's levels are not two numbers, the lower one first"
    numbers = [*checkpoint["mean"], *checkpoint["std"], *(levels or [])]
    if (
        len(checkpoint["mean"]) != 3
        or len(checkpoint["std"]) != 3
        or not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
        or min(checkpoint["std"]) <= 0
        or not 1 <= checkpoint["image_size"] <= checkpoint["resize"] <= LARGEST_SIDE
        or checkpoint["interpolation"] not in INTERPOLATIONS
        or checkpoint["fit"] not in FITS
        or (checkpoint["fit"] != "crop" and checkpoint["resize"] > checkpoint["image_size"])
        or checkpoint["config"].get("loss", LOSSES[0]) not in LOSSES
        or checkpoint["config"].get("tta", TTA[0]) not in TTA
        or not all(1 <= options.get(key, 1) <= MOST_OUTPUTS for key in ("append", "classes"))
        or not 1 <= options.get("image_size", 1) <= LARGEST_SIDE
        or not 0 < options.get("width", 1) <= LARGEST_WIDTH
    ):
        return "the checkpoint's classes, sizes, options, mean, std, levels or config hold impossible values"
    return None


def wrong_classes(names: list) -> str | None:
    """What is wrong with the names of classes, in words; None when nothing is."""
    if not all(isinstance(name, str) for name in names):
        return "the class names are not all text"
    if long := next((name for name in names if len(name) > LONGEST_NAME), None):
        return f"the class name {long[:20]}... has {len(long):,} characters; {LONGEST_NAME:,} are the most"
    if sum(len(name.encode(errors="replace")) + 10 for name in names) > LARGEST_NAMES:
        return f"the {len(names):,} class names are too long together"
    if any(printable(name) != name for name in names):
        return "the class names are not all printable"
    return None


def is_state_dict(values: dict) -> bool:
    """Whether these are tensors by name, each with all of its numbers in the file: a view could repeat one for ever."""
    return all(
        is_name(name)
        and type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and not (value.is_quantized or value.is_meta)
        and value.nbytes <= value.untyped_storage().nbytes()
        for name, value in values.items()
    )


def is_plain(values: dict) -> bool:
    """Whether these are not too many numbers, strings or short lists of numbers, by name."""

    def is_short(value: object) -> bool:
        if isinstance(value, list | tuple):
            return len(value) <= LONGEST_LIST and all(isinstance(part, int | float) for part in value)
        return isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= LONGEST_TEXT)

    return len(values) <= MOST_VALUES and all(is_name(name) and is_short(value) for name, value in values.items())


def is_name(value: object) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_NAME

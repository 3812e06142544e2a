"""The pictures that a user asks about: files, folders, patterns, standard input."""

import contextlib
import functools
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from quick.cli import is_folder
from quick.data.tree import identity, list_pictures
from quick.errors import DataError


def find_pictures(names: Sequence[str], into: str | None = None) -> Iterator[str]:
    """The pictures to classify, in the order given: folders are searched, `-` is standard input.

    A pattern such as `*.png` that the shell left, as those of Windows do, stands for the files that match. Names that
    lead nowhere stay: who reads them says why. Pictures in the folder `into` are copies of ours, and are left out where
    a folder above it is searched; `into` itself is no question.
    """
    copies = identity(into) if into and is_folder(into) else None
    for name in names:
        if is_folder(name):
            if copies and identity(name) == copies:
                continue
            inside = []
            with contextlib.suppress(OSError):  # a folder that cannot be read
                inside = list_pictures(Path(name))
                inside = without_copies(inside, name, copies) if copies else inside
            yield from inside or [name]
        elif not os.path.lexists(name) and (matches := sorted(glob.glob(name))):  # noqa: PTH207 - names stay as given
            yield from find_pictures(matches, into)
        else:
            yield name


def without_copies(paths: list[str], folder: str, copies: object) -> list[str]:
    """The paths, found in a folder, that are not in the folder of this identity; all if the folder itself is in it."""

    @functools.cache
    def is_in(place: str) -> bool:
        real = Path(place).resolve()
        return any(identity(str(above)) == copies for above in (real, *real.parents))

    return paths if is_in(folder) else [path for path in paths if not is_in(os.path.dirname(path))]  # noqa: PTH120


def why_unreadable(name: str, error: str) -> str:
    """Why a name leads to no picture, in words; `error` is what reading it as a file said."""
    if name.lower().startswith(("http://", "https://")):
        return "an address on the web; download the picture first"
    if is_folder(name):
        return "no pictures in this folder" if os.access(name, os.R_OK | os.X_OK) else "this folder cannot be read"
    return error


def is_same_folder(data: str, config: dict, checkpoint: Path) -> bool:
    """Whether `data` is the folder that the run of a checkpoint with this `config` was trained on.

    A relative name counts from where the training was started, which is told by the place of logs/RUN/best.pt; if that
    was moved, from the working folder. The config may hold anything, as strangers' checkpoints do.
    """
    trained_on = config.get("data")
    if not isinstance(trained_on, str):
        return False
    for start in starts(config, checkpoint):
        try:
            if Path(start, trained_on).is_dir():
                return Path(start, trained_on).samefile(data)
        except (OSError, ValueError):
            pass
    return False


def labels_of_run(data: str, config: dict, checkpoint: Path) -> str:
    """The table of labels of the run of a checkpoint with this `config`, which was trained on the folder `data`.

    It is found again as that folder is; empty if the run had none. Raises DataError where it is gone.
    """
    labels = config.get("labels")
    if not isinstance(labels, str) or not labels:
        return ""
    for start in [*starts(config, checkpoint), Path(data)]:
        with contextlib.suppress(OSError, ValueError):
            if Path(start, labels).is_file():
                return str(Path(start, labels))
    raise DataError(f"{data}: the run had the labels of {labels}, which is gone; add --labels FILE")


def starts(config: dict, checkpoint: Path) -> list[Path]:
    """From which folders the names in a run's config may count: where it was started, and the working folder."""
    log_dir, around = config.get("log_dir"), checkpoint.absolute().parents
    if not isinstance(log_dir, str) or len(around) < 2 or Path(log_dir).is_absolute():
        return [Path()]
    return [*(start for start in around[1:] if Path(start, log_dir) == around[1]), Path()]

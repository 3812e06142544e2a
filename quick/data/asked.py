"""The pictures that a user asks about: files, folders, patterns, standard input."""

import contextlib
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from quick.data.tree import list_pictures


def find_pictures(names: Sequence[str]) -> Iterator[str]:
    """The pictures to classify, in the order given: folders are searched, `-` is standard input.

    A pattern such as `*.png` that the shell left, as those of Windows do, stands for the files that match. Names that
    lead nowhere stay: who reads them says why.
    """
    for name in names:
        if is_folder(name):
            inside = []
            with contextlib.suppress(OSError):  # a folder that cannot be read
                inside = list_pictures(Path(name))
            yield from inside or [name]
        elif not os.path.lexists(name) and (matches := sorted(glob.glob(name))):  # noqa: PTH207 - names stay as given
            yield from find_pictures(matches)
        else:
            yield name


def why_unreadable(name: str, error: str) -> str:
    """Why a name leads to no picture, in words; `error` is what reading it as a file said."""
    if name.lower().startswith(("http://", "https://")):
        return "an address on the web; download the picture first"
    if is_folder(name):
        return "no pictures in this folder" if os.access(name, os.R_OK | os.X_OK) else "this folder cannot be read"
    return error


def is_folder(name: str) -> bool:
    """Whether this is a folder; False also for names that the system refuses, such as very long ones."""
    return name != "-" and os.path.isdir(name)  # noqa: PTH112 - Path's raises an error


def is_same_folder(data: str, config: dict, checkpoint: Path) -> bool:
    """Whether `data` is the folder that the run of a checkpoint with this `config` was trained on.

    A relative name counts from where the training was started, which is told by the place of logs/RUN/best.pt; if that
    was moved, from the working folder. The config may hold anything, as strangers' checkpoints do.
    """
    trained_on, log_dir = config.get("data"), config.get("log_dir")
    if not isinstance(trained_on, str):
        return False
    around, starts = checkpoint.absolute().parents, [Path()]
    if isinstance(log_dir, str) and len(around) > 1 and not Path(log_dir).is_absolute():
        starts = [start for start in around[1:] if Path(start, log_dir) == around[1]] + starts
    for start in starts:
        try:
            if Path(start, trained_on).is_dir():
                return Path(start, trained_on).samefile(data)
        except (OSError, ValueError):
            pass
    return False

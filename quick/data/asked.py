"""The pictures that a user asks about: files, folders, patterns, standard input."""

import contextlib
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from quick.data.tree import list_pictures

STANDARD_INPUT = "-"


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
    return name != STANDARD_INPUT and os.path.isdir(name)  # noqa: PTH112 - Path's raises an error


def is_same_folder(data: str, other: object) -> bool:
    """Whether two paths lead to one folder; `other` may be anything, as strangers' checkpoints hold it."""
    try:
        return isinstance(other, str) and Path(other).samefile(data)
    except (OSError, ValueError):
        return False

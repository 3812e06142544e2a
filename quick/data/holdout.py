"""Which pictures of a folder are held out of training: their names alone decide."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from quick.cli import log
from quick.data.tree import start_of
from quick.errors import LimitError, composed


def held_out(names: Sequence[str], classes: Sequence[str], fraction: float, root: str | Path) -> list[bool]:
    """Which pictures are held out: those of which the name has a hash below the fraction.

    Nothing else decides, so no picture moves to the other side when others come or go; what share of a small class is
    held out is then a matter of luck. `names` and `classes` are those of the pictures. Says in one line where none of a
    class is held out; raises LimitError where none at all is, or where all of a class are.
    """
    hashes = [hash_fraction(name) for name in names]
    lowest, highest = {}, {}
    for name, value in zip(classes, hashes, strict=True):
        lowest[name] = min(value, lowest.get(name, 1))
        highest[name] = max(value, highest.get(name, 0))
    if len(names) == len(highest):
        what = "one picture a class; put at least two into each, one of which is held out"
        raise LimitError(f"{root}: {what} (or raise --limit)")
    first, last = min(lowest.values()), min(highest.values())

    def hint(above: float, how: str) -> str:
        shares = [share / 100 for share in range(1, 100) if above < share / 100 <= last]
        nearest = min(shares, key=lambda share: abs(share - fraction), default=0)
        return f"--val-fraction {nearest} holds out {how}" if nearest else ""

    of_each = hint(max(lowest.values()), "some of each class")
    add = "put more pictures into each class"
    if not first < fraction <= last:
        emptied = min(highest, key=highest.get)
        what = "no picture" if fraction <= first else f"all pictures of class '{emptied}'"
        advice = of_each or hint(first, "some") or add
        raise LimitError(f"{root}: by the files' names, a share of {fraction:g} holds out {what}; {advice}")
    if without := sorted(name for name, value in lowest.items() if value >= fraction):
        more = f" (and of {len(without) - 1} more)" if len(without) > 1 else ""
        what = f"no picture of class '{without[0]}'{more}"
        log.warning(f"{root}: by the files' names, {what} is held out; {of_each or add}")
    return [value < fraction for value in hashes]


def names_below(root: str | Path, paths: Iterable[str]) -> list[str]:
    """The names of files below a folder, with `/` between folders, in composed Unicode: the same on every machine."""
    start = len(start_of(Path(root)))
    return [composed(path[start:].replace(os.sep, "/")) for path in paths]


def hash_fraction(name: str) -> float:
    """A number in [0, 1) from a file's name."""
    digest = hashlib.md5(name.encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()
    return int.from_bytes(digest[:6]) / 2**48

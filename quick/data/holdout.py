"""Which pictures of a folder are held out of training: their names alone decide, for a fraction and for folds."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from quick.cli import log
from quick.data.tree import start_of
from quick.errors import ConfigError, LimitError, composed


class Fold(NamedTuple):
    """One of the equal parts of a set that are held out in turn, as cross-validation does."""

    number: int  # from 1
    of: int


Share = float | Fold  # of the pictures, to hold out; 0: none was given


def share_of(val_fraction: float = 0.0, fold: int = 0, folds: int = 0) -> Share:
    """What these settings hold out, each of them 0 where it is not given; raises ConfigError where they disagree."""
    if not (fold or folds):
        return val_fraction
    if not folds:
        raise ConfigError(f"--fold {fold}: of how many? add --folds and their number")
    if folds < 2:
        raise ConfigError(f"--folds {folds}: one fold would hold out all pictures; give at least 2")
    if not fold:
        raise ConfigError(f"--folds {folds}: which of them is held out? add --fold and a number from 1 to {folds}")
    if not 1 <= fold <= folds:
        raise ConfigError(f"--fold {fold}: --folds {folds} has those from 1 to {folds}")
    if val_fraction:
        other = f"--val-fraction {val_fraction:g} holds out others"
        raise ConfigError(f"--fold {fold}: {other}; add --val-fraction 0, or --fold 0 --folds 0")
    return Fold(fold, folds)


def told_by(config: dict) -> dict:
    """What a checkpoint's config, which can say anything, tells of the pictures that were held out, for `share_of`."""
    told = {name: config.get(name, 0) for name in ("val_fraction", "fold", "folds")}
    are_numbers = all(type(value) in (int, float) and 0 <= value < 2**31 for value in told.values())
    if not (are_numbers and told["val_fraction"] < 1 and isinstance(told["fold"] + told["folds"], int)):
        return {}
    try:
        share_of(**told)
    except ConfigError:
        return {}
    return told


def as_flags(share: Share) -> str:
    """The share as it is typed."""
    return f"--fold {share.number} --folds {share.of}" if isinstance(share, Fold) else f"--val-fraction {share:g}"


def bounds(share: Share) -> tuple[float, float]:
    """From which number in [0, 1) to below which one the share lies; the first of five folds is a fraction of 0.2."""
    return ((share.number - 1) / share.of, share.number / share.of) if isinstance(share, Fold) else (0.0, share)


def held_out(names: Sequence[str], classes: Sequence[str], share: Share, root: str | Path) -> list[bool]:
    """Which pictures are held out: those of which the name has a hash in the share.

    Nothing else decides, so no picture moves to the other side when others come or go; what share of a small class is
    held out is then a matter of luck. `names` and `classes` are those of the pictures. Says in one line where none of a
    class is held out; raises LimitError where none at all is, or where all of a class are.
    """
    start, end = bounds(share)
    hashes, by_class = [hash_fraction(name) for name in names], defaultdict(list)
    for name, value in zip(classes, hashes, strict=True):
        by_class[name].append(value)
    if len(names) == len(by_class):
        what = "one picture a class; put at least two into each, one of which is held out"
        raise LimitError(f"{root}: {what} (or raise --limit)")
    if isinstance(share, Fold) and share.of > len(names):
        raise LimitError(f"{root}: --folds {share.of}: that is more than its {len(names):,} pictures")
    counts = {name: sum(start <= value < end for value in values) for name, values in sorted(by_class.items())}
    emptied = [name for name, count in counts.items() if count == len(by_class[name])]
    without = [name for name, count in counts.items() if not count]
    add = "put more pictures into each class"
    if emptied or len(without) == len(counts):
        who = f"fold {share.number} of {share.of}" if isinstance(share, Fold) else f"a share of {share:g}"
        what = f"all pictures of class '{emptied[0]}'" if emptied else "no picture"
        better = advice(by_class, share) or advice(by_class, share, of_each=False) or add
        raise LimitError(f"{root}: by the files' names, {who} holds out {what}; {better}")
    if without:
        more = f" (and of {len(without) - 1} more)" if len(without) > 1 else ""
        what = f"no picture of class '{without[0]}'{more}"
        log.warning(f"{root}: by the files' names, {what} is held out; {advice(by_class, share) or add}")
    return [start <= value < end for value in hashes]


def advice(by_class: dict[str, list[float]], share: Share, of_each: bool = True) -> str:
    """Another share, in words, that holds out some of each class, or else some at all; empty if there is none.

    It holds out not all of any class. `by_class` are the hashes of the pictures.
    """
    if isinstance(share, Fold):
        for count in range(min(share.of - 1, *map(len, by_class.values())), 1, -1):
            if all(len({int(value * count) for value in values}) == count for values in by_class.values()):
                return f"each of --folds {count} has some of each class"
        return ""
    above, last = (max if of_each else min)(map(min, by_class.values())), min(map(max, by_class.values()))
    shares = [number / 100 for number in range(1, 100) if above < number / 100 <= last]
    nearest = min(shares, key=lambda other: abs(other - share), default=0)
    return f"--val-fraction {nearest} holds out some{' of each class' if of_each else ''}" if nearest else ""


def names_below(root: str | Path, paths: Iterable[str]) -> list[str]:
    """The names of files below a folder, with `/` between folders, in composed Unicode: the same on every machine."""
    start = len(start_of(Path(root)))
    return [composed(path[start:].replace(os.sep, "/")) for path in paths]


def hash_fraction(name: str) -> float:
    """A number in [0, 1) from a file's name."""
    digest = hashlib.md5(name.encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()
    return int.from_bytes(digest[:6]) / 2**48

"""Which pictures a run trains and looks at: a list in its folder, and digests by which a resumed run finds them again.

Digests are of the names below the data folder, the sizes of the files in bytes, the classes and the order. So the
folder may move to another place, disk or machine. A file whose content changed, but neither its name nor its size, is
not noticed: to read all files again would take as long as an epoch.
"""

import csv
import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quick.answers import NAME_ERRORS, csv_line, safe_cell
from quick.data.pictures import Pictures
from quick.data.tree import start_of
from quick.errors import composed
from quick.run.history import History

PICTURES = "pictures.csv"
MOST_NAMED = 3  # files of a kind in an error message


@dataclass
class Manifest:
    """The pictures of a run."""

    digests: dict[str, str]  # by split: train, val, test
    table: bytes  # pictures.csv: a line for each file; empty for sets that are not made of files


def make_manifest(data: str, sets: Sequence[Pictures]) -> Manifest:
    """The manifest of these sets of the folder `data`. Sets without files are known by their labels and order."""
    digests, lines = {}, []
    start = len(start_of(Path(data)))
    for pictures in sets:
        classes, labels = "\n".join(map(composed, pictures.classes)), pictures.labels.cpu()
        digest = hashlib.sha256(classes.encode("utf-8", "surrogatepass") + labels.numpy().tobytes())
        if pictures.paths is None:
            digest.update(b"" if pictures.rows is None else pictures.rows.cpu().numpy().tobytes())
        else:
            lines = lines or [csv_line(("split", "class", "file", "bytes"))]
            heads = [csv_line((pictures.split, safe_cell(name), "")).rstrip("\n") for name in pictures.classes]
            for path, label in zip(map(os.fsdecode, pictures.paths.tolist()), labels.tolist(), strict=True):
                name, size = path[start:].replace(os.sep, "/"), file_size(path)
                lines.append(heads[label] + csv_line((safe_cell(name), str(size))))
                digest.update(f"{composed(name)}\0{size}\n".encode("utf-8", "surrogatepass"))
        digests[pictures.split] = digest.hexdigest()
    return Manifest(digests, "".join(lines).encode("utf-8", NAME_ERRORS))


def other_pictures(found: Manifest, digests: dict[str, str], folder: Path) -> str | None:
    """In words, how these pictures differ from those with the `digests` of a run; None if they are the same.

    The list in the run's `folder` tells which files differ; without it only the sets are named.
    """
    splits = dict.fromkeys([*digests, *found.digests])
    others = [split for split in splits if digests.get(split) != found.digests.get(split)]
    if not others:
        return None
    try:
        before = read_table((folder / PICTURES).read_bytes())
    except (OSError, ValueError, csv.Error):
        before = {}
    details = f": {compare(before, read_table(found.table))}" if before and found.table else ""
    return f"not the {' and '.join(others)} pictures that the run had{details}"


def taken_otherwise(history: History, fraction: float, sets: Sequence[Pictures]) -> str | None:
    """In words, what of these sets the earlier versions, whose runs have no digests, took otherwise; None for nothing.

    `fraction` is --val-fraction.
    """
    train_set, chooses, *others = sets
    if len(history) and history.split != chooses.split:
        return f"an earlier version chose the best epoch by the {history.split} pictures, not by {chooses.split}"
    if fraction and others and train_set.paths is not None:  # drawn from the seed, where now the names decide
        return "an earlier version held out other pictures"
    if train_set.levels:
        return "an earlier version read pixels wider than 8 bits otherwise"
    return None


def compare(before: dict[str, tuple], now: dict[str, tuple]) -> str:
    """How two lists of files differ, in words: which files are gone, new, or others."""
    kinds = {"gone": sorted(before.keys() - now.keys()), "new": sorted(now.keys() - before.keys())}
    both = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    for place, kind in enumerate(("now in another set", "now in another class", "now of another size")):
        kinds[kind] = [name for name in both if before[name][place] != now[name][place]]
    found = []
    for kind, names in kinds.items():
        if names:
            more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
            found.append(f"{len(names)} {kind} ({', '.join(names[:MOST_NAMED])}{more})")
    return ", ".join(found) or "they are in another order"


def read_table(content: bytes) -> dict[str, tuple[str, str, str]]:
    """Split, class and bytes of each file of a pictures.csv, by its name; raises ValueError and csv.Error."""
    rows = list(csv.reader(io.StringIO(content.decode("utf-8", NAME_ERRORS), newline="")))[1:]
    return {composed(name): (split, composed(of_class), size) for split, of_class, name, size in rows}


def file_size(path: str) -> int:
    """The size of a file in bytes; 0 if it has gone since it was read."""
    try:
        return os.stat(path).st_size  # noqa: PTH116 - of a hundred thousand files; a Path would take three times as long
    except OSError:
        return 0

"""Classes from a table: which of its rows names which picture of a folder."""

import csv
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from quick.checkpoints import wrong_classes
from quick.cli import log, read_text
from quick.data.decoding import ENDINGS
from quick.data.tree import Folder, Place, path_to, start_of
from quick.errors import DataError, composed, in_short, printable

LARGEST_TABLE = 2**28  # bytes
# What the columns are called, in small letters and digits alone; the first line that has any decides.
FILES = (
    "file files filename filenames filepath filepaths path paths image images imageid imageids imagename imagefile "
    "imagepath imagefilename img imgid imgname imgpath picture pictures photo photos 文件 文件名 图片 路径",
    "id ids",
)
LABELS = (
    "label labels 标签",
    "class classes classname classlabel labelname category categories categoryname target targets breed species "
    "diagnosis dx kind type variety 类 类别",
    "classid labelid categoryid targetid breedid speciesid y",
)


class Row(NamedTuple):
    line: int  # where it ends in the file, from 1
    name: str  # of a file, with `/` between folders, in composed Unicode
    label: str


class Labelled(NamedTuple):
    """What a table says of a folder."""

    tree: dict[Place, Folder]  # the pictures that have a row, with their classes, and the folders down to them
    left_out: Counter[str]  # what is no picture in the folder, in words, and how often
    unmatched: tuple[str, ...]  # each picture without a row and each row without a picture, in words


def label_pictures(tree: dict[Place, Folder], root: Path, labels: str | Path) -> Labelled:
    """The classes of pictures below the root by the table `labels`; its name counts from here, or else from the root.

    A row may name its file from the root, from the table's folder, from here or from a folder above the root; or by its
    last folders or its name alone, if there is only one such file; also without the ending. Says in one line what does
    not match. Raises DataError for a table that cannot be used, and where rows disagree.
    """
    table = find_table(labels, root)
    header, rows = read_table(table)
    names = Names(tree, root, bases=[root, table.parent, Path(), *root.absolute().parents])
    if header and (header.name.lower().endswith(ENDINGS) or names.find(header.name)):
        what = f"line {header.line} names the picture {header.name!r:.80}, where the names of the columns should stand"
        raise DataError(f"{table}: {what}; write the line file,label above it")
    first, again, missing = {}, [], []
    for row in rows:
        found = names.find(row.name)
        if len(found) > 1:
            what = f"line {row.line}: {row.name!r:.80} may be {names.below(found[0])} or {names.below(found[1])}"
            raise DataError(f"{table}: {what}; write its folders and ending, as they are below {root}")
        if not found:
            missing.append(row)
        elif (before := first.setdefault(found[0], row)) is not row:
            if before.label != row.label:
                what = f"lines {before.line} and {row.line} give {names.below(found[0])} two labels"
                raise DataError(f"{table}: {what}, {before.label!r:.80} and {row.label!r:.80}; delete one of them")
            again.append(row)
    if not first:
        what = f"none of its {len(rows):,} rows names a picture in {root}"
        raise DataError(f"{table}: {what}, line {rows[0].line} for one: {rows[0].name!r:.80}")
    if error := wrong_classes(sorted({row.label for row in first.values()})):
        raise DataError(f"{table}: {error}")
    unlabelled = [path for path in names.paths if path not in first]
    kinds = {
        "pictures without a row": [names.below(path) for path in unlabelled],
        "rows without a picture": [f"line {row.line}, {row.name}" for row in missing],
        "rows that repeat another": [f"line {row.line}" for row in again],
    }
    if lines := [f"{what}: {len(found):,} (first {found[0]})" for what, found in kinds.items() if found]:
        log.warning(f"{table}: {'; '.join(lines)}")
    unmatched = [f"{path}: no row in {table}" for path in unlabelled]
    unmatched += [f"{table}: line {row.line}: no picture {row.name}" for row in missing]
    left_out = sum((folder.left_out for folder in tree.values()), Counter())
    if table.resolve().is_relative_to(root.resolve()):
        left_out -= Counter({table.suffix.lower(): 1})
    return Labelled(labelled_tree(tree, root, first), left_out, tuple(unmatched))


def labelled_tree(tree: dict[Place, Folder], root: Path, rows: dict[str, Row]) -> dict[Place, Folder]:
    """The folders in which pictures are that have a row by their path, with these alone, and the folders above them."""
    classes, above = {}, set()
    for place, folder in tree.items():
        paths = ((name, path_to(root, place, name)) for name in folder.pictures)
        if found := {name: rows[path].label for name, path in paths if path in rows}:
            classes[place] = found
            above |= {place[:depth] for depth in range(len(place) + 1)}
    found = {place: classes.get(place, {}) for place in tree if place in above}
    return {place: tree[place]._replace(pictures=[*of], left_out=Counter(), classes=of) for place, of in found.items()}


class Names:
    """The pictures of a folder, by all that a row may call them."""

    def __init__(self, tree: dict[Place, Folder], root: Path, bases: Sequence[Path]):
        self.start = len(start_of(root))
        # Not Path.resolve(), after which the names of links are others; the second join adds a separator at the end.
        self.top, *self.bases = (os.path.join(os.path.abspath(path), "") for path in (root, *bases))  # noqa: PTH100, PTH118
        self.paths = [path_to(root, place, name) for place, folder in tree.items() for name in folder.pictures]
        # By the name below the root, and behind a `/` by each end of it: with its ending, and without.
        self.whole, self.bare = defaultdict(list), defaultdict(list)
        for path in self.paths:
            name = lower_ending(self.below(path))
            for names, key in ((self.whole, name), (self.bare, name.rpartition(".")[0])):
                names[key].append(path)
                parts = key.split("/")
                for first in range(len(parts)):
                    names[f"/{'/'.join(parts[first:])}"].append(path)

    def below(self, path: str) -> str:
        """The name of a picture below the root, with `/` between folders, in composed Unicode."""
        return composed(path[self.start :].replace(os.sep, "/"))

    def find(self, name: str) -> list[str]:
        """The paths of the pictures that this name may mean."""
        for names, key in ((self.whole, lower_ending(name)), (self.bare, name)):
            for base in self.bases:
                path = os.path.normpath(os.path.join(base, key))  # noqa: PTH118 - a Path would take longer to make
                if path.startswith(self.top) and (found := names.get(path[len(self.top) :].replace(os.sep, "/"))):
                    return self.exact(found, name)
            if found := names.get(f"/{key.lstrip('/')}"):
                return self.exact(found, name)
        return []

    def exact(self, found: list[str], name: str) -> list[str]:
        """Of several pictures the one that is called so to the letter, if there is one."""
        return [path for path in found if self.below(path).endswith(name)] or found if len(found) > 1 else found


def lower_ending(name: str) -> str:
    """The name of a file with its ending in small letters: tables may have `1.jpg` for `1.JPG`."""
    stem, ending = os.path.splitext(name)  # noqa: PTH122 - a Path would take longer to make
    return stem + ending.lower()


# ---- the table -------------------------------------------------------------------------------------------------------


def find_table(labels: str | Path, root: Path) -> Path:
    """The file of this name, from here or from the root; raises DataError."""
    found = next((path for path in (Path(labels), root / labels) if path.is_file()), None)
    if not found:
        hint = "it is a folder" if Path(labels).is_dir() else f"neither here nor in {root}"
        raise DataError(f"--labels {labels}: no such table, {hint}")
    if found.stat().st_size > LARGEST_TABLE:
        raise DataError(f"--labels {found}: above {LARGEST_TABLE:,} bytes, no table of labels")
    return found


def read_table(path: Path) -> tuple[Row | None, list[Row]]:
    """The rows of a table, and its header where that may be a row, because its columns have other names than ours.

    Cells are separated by commas, semicolons or tabs. Raises DataError.
    """
    try:
        text = read_text(path)
    except ValueError as error:  # its encoding
        raise DataError(f"{path}: {error}") from error
    try:
        tables = {separator: read_rows(text, separator) for separator in ",;\t"}
        heads = {separator: next(rows, (1, [])) for separator, rows in tables.items()}
        known = {separator: found for separator, (_, head) in heads.items() if (found := columns(head, path))}
        if not known:
            head = heads[","][1]
            what = f"has no columns for file and label: {in_short(head)}" if head else "nothing is in it"
            raise DataError(f"{path}: {what}; its first line should be file,label")
        separator = next((one for one, (_, _, named) in known.items() if named), next(iter(known)))
        (of_file, of_label, named), (first, head) = known[separator], heads[separator]
        rows = [make_row(line, cells, of_file, of_label, len(head), path) for line, cells in tables[separator]]
    except csv.Error as error:
        raise DataError(f"{path}: not a table: {error}") from error
    if not rows:
        raise DataError(f"{path}: no rows below its header")
    return None if named else make_row(first, head, of_file, of_label, len(head), path), rows


def read_rows(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The cells of each row that is not empty, with its line; raises csv.Error."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    for row in reader:
        cells = [cell.strip() for cell in row]
        if any(cells):
            yield reader.line_num, cells


def make_row(line: int, cells: list[str], of_file: int, of_label: int, width: int, path: Path) -> Row:
    """A row with its two cells; raises DataError where one is missing, or where there are too many."""
    if len(cells) <= max(of_file, of_label) or any(cells[width:]):
        more = "; in quotes, a name may have the separator in it" if len(cells) > width else ""
        raise DataError(f"{path}: line {line}: the header has {width} cells, this row {len(cells)}{more}")
    name, label = composed(cells[of_file].replace("\\", "/").removeprefix("./")), composed(cells[of_label])
    if not (name and label):
        raise DataError(f"{path}: line {line}: no {'label' if name else 'file'} in it; fill it in, or delete the row")
    if printable(name + label) != name + label:
        raise DataError(
            f"{path}: line {line}: control characters in {(name if printable(name) != name else label)!r:.80}"
        )
    return Row(line, name, label)


def columns(head: list[str], path: Path) -> tuple[int, int, bool] | None:
    """Which columns are the file and the label, and whether their names say so; else two columns are these, in order.

    None where it cannot be told; raises DataError where several columns may be one of them.
    """
    words = [re.sub(r"[\W_]", "", cell.casefold()) for cell in head]
    filled = [place for place, word in enumerate(words) if word]
    found = []
    for known in (FILES, LABELS):
        places = ([place for place in filled if words[place] in line.split()] for line in known)
        found.append(next(filter(None, places), []))
    if len(filled) == 2 and sorted(map(len, found)) == [0, 1]:  # the other one is left
        found = [of or [place for place in filled if [place] not in found] for of in found]
    if [len(of) for of in found] == [1, 1]:
        return found[0][0], found[1][0], True
    for what, of in zip(("file", "label"), found, strict=True):
        if len(of) > 1:
            raise DataError(f"{path}: {' and '.join(head[place] for place in of)} may be the column {what}; rename one")
    return (*filled, False) if len(filled) == 2 else None

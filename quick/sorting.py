"""Pictures sorted by what the network says about them: copied into a folder for each class, with a table.

Nothing is moved, overwritten or deleted. A copy appears whole or not at all, under its picture's name, or `name-2.jpg`
where another picture has that. What is there already is not copied again, so the same command goes on after a stop.
"""

import contextlib
import csv
import errno
import io
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from quick.answers import NAME_ERRORS, UNSURE, Answer, csv_line, locked, report_error, safe_cell
from quick.asking import TABLE
from quick.checkpoints import write_file
from quick.cli import progress_bar
from quick.errors import CheckpointError, composed, in_short
from quick.values import bad_folder

COLUMNS = ["file", "copy", "class", "probability", "error"]
ASIDE = ".sorting.tmp"  # what a copy is called until it is whole
OF_ONE_NAME = {errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ}  # errors that other pictures need not have
NEW, OLD, NONE = "copied", "there already", "not copied"

Rows = dict[tuple[str, str], list[str]]  # of the table, by file and copy


def sort_pictures(folder: Path, answers: Iterable[Answer], count: int, classes: Sequence[str]) -> int:
    """Copy the pictures of `count` answers to the folders of their classes, or labels; returns the exit status.

    The table gets a row for each, also if this is stopped; rows of earlier calls stay, unless they tell of the same
    copies. Raises CheckpointError if one of the network's `classes` cannot be a folder, DataError while another process
    sorts into this one, OSError where the disk refuses or something else is in the way.
    """
    check_classes(classes)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / TABLE), progress_bar("sorting", count, "files") as bar:
        rows, sums, places = read_table(folder / TABLE), Counter(), Counter()
        clear(folder, [*classes, UNSURE])
        try:
            for answer in answers:
                row, is_new = sort_picture(answer, folder)
                if row[1]:
                    rows.pop((row[0], ""), None)  # of an earlier call, for which it had no answer
                    places[answer.label or answer.top[0][0]] += 1
                rows[row[0], row[1]] = row
                sums[NEW if is_new else OLD if row[1] else NONE] += 1
                bar.update()
        except BaseException:
            with contextlib.suppress(OSError):  # a full disk is named already
                write_table(folder / TABLE, rows)
            raise
        write_table(folder / TABLE, rows)
    parts = [f"{name} {number:,}" for name, number in places.most_common()] or ["nothing"]
    print("; ".join([in_short(parts), *(f"{sums[what]:,} {what}" for what in (NEW, OLD, NONE) if sums[what])]))
    print(folder / TABLE)
    return int(sums[NONE] > 0)


def check_classes(classes: Sequence[str]) -> None:
    """Raise CheckpointError if these cannot all be folders beside the table: a stranger's file may say anything."""
    taken = dict.fromkeys((TABLE, f"{TABLE}.lock"), f"the table is {TABLE}")
    for name in classes:
        key = composed(composed(name).casefold())  # as systems compare that know no capital letters
        if not name or name[0] == "." or bad_folder(name):
            raise CheckpointError(f"--into: class {name!r:.80} cannot be a folder on every system; use --csv FILE")
        if key in taken:
            raise CheckpointError(f"--into: class '{name}' cannot be a folder: {taken[key]}; use --csv FILE")
        taken[key] = f"to some systems '{name}' is the same"


def clear(folder: Path, names: Sequence[str]) -> None:
    """Remove what a killed process left in folders of copies; raises FileExistsError for what is no folder."""
    for name in names:
        if (place := folder / name).is_dir():
            (place / ASIDE).unlink(missing_ok=True)
        elif os.path.lexists(place):
            raise FileExistsError(errno.EEXIST, "pictures are to go there, but it is no folder", str(place))


def sort_picture(answer: Answer, folder: Path) -> tuple[list[str], bool]:
    """Copy the picture of an answer; returns its row of the table, and whether the copy is new."""
    source, error, copy, name, share, is_new = Path(answer.name), answer.error, "", "", "", False
    if answer.top is not None:
        name, share = answer.top[0][0], f"{answer.top[0][1]:.6f}"
        place = folder / (answer.label or name)
        try:
            content, status = source.read_bytes(), source.stat()
            place.mkdir(exist_ok=True)
            path, is_new = add_copy(content, place / source.name, (status.st_atime_ns, status.st_mtime_ns))
            copy = f"{place.name}/{path.name}"
        except OSError as problem:
            if problem.filename not in (None, str(source)) and problem.errno not in OF_ONE_NAME:
                raise
            error = f"it cannot be copied: {problem.strerror}"
    if error:
        report_error(answer.name, error)
    return [*map(safe_cell, (answer.name, copy, name)), share, safe_cell(error)], is_new


def add_copy(content: bytes, wanted: Path, times: tuple[int, int]) -> tuple[Path, bool]:
    """The path of a file with this content, the wanted one or a numbered one, and whether it was written now.

    `times`, of access and change, are those of the picture in nanoseconds. Raises OSError.
    """
    for number in itertools.count(1):
        path = wanted if number == 1 else wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}")
        if holds(path, content):
            return path, False
        if not os.path.lexists(path):
            with contextlib.suppress(FileExistsError):  # of a program that put one there meanwhile
                write_new(path, content, times)
                return path, True


def holds(path: Path, content: bytes) -> bool:
    """Whether this is a file with that content."""
    try:
        return path.stat().st_size == len(content) and path.is_file() and path.read_bytes() == content
    except OSError:
        return False


def write_new(path: Path, content: bytes, times: tuple[int, int]) -> None:
    """Write a file whole or not at all, with its times; raises FileExistsError if there is one, OSError."""
    aside = path.with_name(ASIDE)
    try:
        with aside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # some disks keep no times
            os.utime(aside, ns=times)
        give_name(aside, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # not the file aside
        raise
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def give_name(aside: Path, path: Path) -> None:
    """Let a file have this name, unless another has it: then raises FileExistsError."""
    if os.name != "nt":  # Windows' rename refuses that itself
        try:
            return path.hardlink_to(aside)
        except FileExistsError:
            raise
        except (OSError, NotImplementedError):  # some disks have no links, such as memory sticks
            pass
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    aside.rename(path)


# ---- the table -------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> Rows:
    """The rows of the table of earlier calls, none if there is no table; raises FileExistsError for another file."""
    if not os.path.lexists(path):
        return {}
    header, rows = [], []
    with contextlib.suppress(ValueError, csv.Error):
        if path.is_file():  # to read a pipe would never end
            text = path.read_bytes().decode("utf-8", NAME_ERRORS).removeprefix("\ufeff")  # which spreadsheets add
            header, *rows = csv.reader(io.StringIO(text, newline=""))
    if header != COLUMNS:
        raise FileExistsError(errno.EEXIST, "a table is to go there, but it holds something else", str(path))
    return {(row[0], row[1]): row for row in rows if len(row) == len(COLUMNS)}


def write_table(path: Path, rows: Rows) -> None:
    """Write the table, unless it is there as it should be; raises OSError."""
    content = "".join(map(csv_line, [COLUMNS, *rows.values()])).encode("utf-8", NAME_ERRORS)
    if not holds(path, content):
        write_file(path, content)

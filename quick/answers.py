"""Answers about pictures: printed as text, JSON or CSV, or in a table that goes on after a stop.

Where a table is being made, each process keeps its answers in a journal beside it: `answers.csv.0.jsonl` for the first
process. The first line of a journal says which table it belongs to, the others hold an answer each. After a stop the
same command reads all journals, however many processes wrote them, and asks only about the other pictures.
"""

import csv
import errno
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from quick.checkpoints import write_file
from quick.cli import log, progress_bar
from quick.errors import DataError, printable
from quick.processes import ALONE, Group

FSYNC_EVERY = 1000  # answers, after which a journal is forced to the disk; each line is flushed to the system


class Answer(NamedTuple):
    """What the network says about a picture, or why it could not be read."""

    name: str
    top: list[tuple[str, float]] | None  # classes and their probabilities, highest first; None: it could not be read
    picture: np.ndarray  # uint8 (side, side, 3), as the network sees it; black if it could not be read
    error: str = ""


# ---- what is printed -------------------------------------------------------------------------------------------------


def print_answers(answers: Iterable[Answer], top_k: int, form: str) -> int:
    """Print answers with `top_k` classes each as `text`, `json` lines or `csv`; returns the exit status.

    Pictures that could not be read are named on standard error; the status is then 1.
    """
    status = 0
    if form == "csv":
        print(csv_line(table_header(top_k)), end="")
    for answer in answers:
        if answer.top is None:
            status = 1
            report_error(answer.name, answer.error)
        elif form == "csv":
            print(csv_line(table_row(answer)), end="")
        elif form == "json":
            classes = [{"class": name, "probability": round(share, 6)} for name, share in answer.top]
            found = {"file": answer.name, "classes": classes}
            text = json.dumps(found, ensure_ascii=False)
            print(text if text.isprintable() else json.dumps(found))
        else:
            print("  ".join([printable(answer.name), *(f"{name} {share:.1%}" for name, share in answer.top)]))
    return status


def print_evaluation(result: dict, classes: list[str], metrics: Iterable[str]) -> None:
    """Print the scores, then a line for each class with its accuracy and what its pictures were taken for.

    `metrics` are the names of all that `result` has beside the loss.
    """
    scores = [f"loss {result['loss']:.4f}", f"accuracy {result['accuracy']:.2%}"]
    scores += [f"{name} {result[name]:.4f}" for name in metrics if name != "accuracy"]
    print("  ".join([*scores, f"{result['pictures']:,} test pictures\n"]))
    width = max(map(len, [*classes, "class"]))
    cell = max(5, len(str(max(map(max, result["confusion"])))) + 1)
    numbers = "".join(f"{index:>{cell}}" for index in range(len(classes)))
    print(f"   {'class':{width}}  accuracy  {numbers}   <- taken for")
    for index, (name, row) in enumerate(zip(classes, result["confusion"], strict=True)):
        share = f"{result['classes'][name]:.1%}" if name in result["classes"] else "-"
        print(f"{index:>2} {name:{width}}  {share:>8}  {''.join(f'{count:>{cell}}' for count in row)}")


def report_error(name: str, error: str) -> None:
    log.warning(printable(f"predict.py: {name}: {error}"))


def table_header(top_k: int) -> list[str]:
    return ["file"] + [f"{column}_{rank}" for rank in range(1, top_k + 1) for column in ("class", "probability")]


def table_row(answer: Answer) -> list[str]:
    row = [safe_cell(answer.name)]
    for name, share in answer.top:
        row += [safe_cell(name), f"{share:.6f}"]
    return row


def safe_cell(text: str) -> str:
    """Text for a table. What a spreadsheet would take for a formula gets an apostrophe in front, which makes it text.

    Names of strangers' files could otherwise run commands (owasp.org/www-community/attacks/CSV_Injection).
    """
    text = printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) and text != "-" else text


def csv_line(cells: Sequence[str]) -> str:
    """Cells as a line of a CSV file, with its newline."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


# ---- a table that goes on after a stop -------------------------------------------------------------------------------


def write_table(
    path: Path,
    names: Sequence[str],
    top_k: int,
    answer: Callable[[Sequence[str]], Iterable[Answer]],
    settings: str,
    group: Group = ALONE,
) -> int:
    """Write a CSV file with an answer about each of these pictures; returns the exit status.

    `answer` gives an answer about each of some names, in order. The processes of a group share the work. Journals that
    are of other names or `settings` are deleted. Raises DataError if answers of another process do not arrive here,
    FileExistsError if a file is in the way of a journal.
    """
    digest = hashlib.sha256(repr((settings, list(names))).encode()).hexdigest()
    done = group.from_rank0(lambda: set(read_journals(path, digest, len(names))))
    if done:
        log.info(f"{path}: {len(done):,} of {len(names):,} files are done already")
    shard = [index for index in range(len(names)) if index not in done][group.rank :: group.size]

    journal = path.with_name(f"{path.name}.{group.rank}.jsonl")
    if not journal.exists() or journal.stat().st_size == 0:
        write_file(journal, (json.dumps({"table": digest}) + "\n").encode())
    with journal.open("a", encoding="utf-8", buffering=1) as file, progress_bar("reading", len(shard), "files") as bar:
        answers = answer([names[index] for index in shard])
        for count, (index, found) in enumerate(zip(shard, answers, strict=True), 1):
            if found.top is None:
                entry = {"place": index, "error": found.error}
            else:
                entry = {"place": index, "row": csv_line(table_row(found))}
            file.write(json.dumps(entry) + "\n")
            if count % FSYNC_EVERY == 0:
                os.fsync(file.fileno())
            bar.update()
    group.wait()

    status = finish_table(path, names, top_k, digest) if group.rank == 0 else 0
    return 0 if group.size > 1 else status  # torchrun would take 1 for a failure, and start all processes again


def finish_table(path: Path, names: Sequence[str], top_k: int, digest: str) -> int:
    """Write the table from its journals, name what could not be read, delete the journals; returns the exit status."""
    entries = read_journals(path, digest, len(names))
    if missing := [index for index in range(len(names)) if index not in entries]:
        raise DataError(
            f"{names[missing[0]]}: its answer was written on another machine; "
            f"{path.absolute().parent} must be on a shared disk"
        )
    lines, errors = [csv_line(table_header(top_k))], 0
    for index, name in enumerate(names):
        if "row" in entries[index]:
            lines.append(entries[index]["row"])
        else:
            errors += 1
            report_error(name, entries[index]["error"])
    write_file(path, "".join(lines).encode())
    for journal in find_journals(path):
        journal.unlink()
    print(path)
    return int(errors > 0)


def find_journals(path: Path) -> list[Path]:
    """The files beside a table that are named as its journals."""
    name = re.compile(re.escape(path.name) + r"\.\d+\.jsonl")
    return sorted(file for file in path.absolute().parent.iterdir() if name.fullmatch(file.name))


def read_journals(path: Path, digest: str, count: int) -> dict[int, dict]:
    """The entries of all journals of a table of `count` pictures, by the picture's place.

    Deletes journals of another table. Raises FileExistsError for a file that is no journal.
    """
    entries = {}
    for journal in find_journals(path):
        with journal.open("rb") as file:
            first = file.readline()
        table = parse_line(first).get("table")
        if first and not isinstance(table, str):
            raise FileExistsError(errno.EEXIST, "answers are to go there, but it holds something else", str(journal))
        if table == digest:
            entries |= read_journal(journal, count)
        else:
            log.info(f"{journal}: of another table, done anew")
            journal.unlink()
    return entries


def read_journal(journal: Path, count: int) -> dict[int, dict]:
    """The entries of one journal. Cuts off a damaged end, so that the next line can be appended."""
    entries = {}
    with journal.open("rb") as file:
        whole = len(file.readline())  # bytes; the first line is not an entry
        for line in file:
            entry = parse_line(line)
            if entry.get("place") not in range(count) or not isinstance(entry.get("row", entry.get("error")), str):
                break  # a process that was killed, or a machine that lost its power, left a part of a line
            entries[entry["place"]] = entry
            whole += len(line)
    if whole < journal.stat().st_size:
        os.truncate(journal, whole)
    return entries


def parse_line(line: bytes) -> dict:
    """The JSON object of a whole line; empty if the line is cut short or is something else."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else {}
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}

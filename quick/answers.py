"""Answers about pictures: printed as text, JSON or CSV, or in a table that goes on after a stop.

Where a table is being made, each process keeps its answers in a journal beside it: `answers.csv.0.jsonl` for the first
process. The first line of a journal says which table it belongs to, the others hold an answer each. After a stop the
same command reads all journals, however many processes wrote them, and asks only about the other pictures.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from quick.checkpoints import write_file
from quick.cli import log, progress_bar
from quick.errors import CheckpointError, DataError, printable
from quick.processes import ALONE, LOCK_SECONDS, Group

FORMULA = re.compile(r"'*\s*[=+\-@\uff1d\uff0b\uff0d\uff20\t\r\n]")  # how cells begin that spreadsheets compute
NAME_ERRORS = sys.getfilesystemencodeerrors()  # how bytes of names that are no text come in and go out
UNSURE = "unsure"  # what is said in the place of a class that is not probable enough
FSYNC_EVERY = 1000  # answers, after which a journal is forced to the disk; each line is flushed to the system


class Answer(NamedTuple):
    """What the network says about a picture, or why it could not be read."""

    name: str
    top: list[tuple[str, float]] | None  # classes and their probabilities, highest first; None: there is no answer
    picture: np.ndarray  # uint8 (side, side, 3), as the network sees it; black if it could not be read
    error: str = ""  # why there is no answer, or no explanation of it
    label: str | None = None  # with --sure: the first class, or UNSURE


def labelled(answer: Answer, sure: float) -> Answer:
    """The answer with its label: UNSURE if the first class's probability, as tables have it, is below `sure`."""
    if answer.top is None:
        return answer
    name, share = answer.top[0]
    return answer._replace(label=name if round(share, 6) >= sure else UNSURE)


def check_unsure(classes: Sequence[str]) -> None:
    """Raise CheckpointError if a class has the name that is said where none is probable enough."""
    if strange := [name for name in classes if name.casefold() == UNSURE]:
        raise CheckpointError(f"--sure: the network has a class '{strange[0]}' itself; leave the flag out")


# ---- what is printed -------------------------------------------------------------------------------------------------


def print_answers(answers: Iterable[Answer], top_k: int, form: str, labels: bool = False) -> int:
    """Print answers with `top_k` classes each as `text`, `json` lines or `csv`; returns the exit status.

    With `labels` they have some, which tables get a column for.

    JSON and CSV name the very files: in CSV a name that is no text stands in its own bytes. Only on a terminal what
    could steer it is escaped. What went wrong is said on standard error, and in JSON; the status is then 1.
    """
    status, on_terminal = 0, bool(sys.stdout) and sys.stdout.isatty()
    if form == "csv" and not on_terminal and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors=NAME_ERRORS, newline="\n")  # as write_table writes it

    def print_row(cells: Sequence[str]) -> None:
        line = csv_line(cells)
        print(f"{printable(line[:-1])}\n" if on_terminal else line, end="")

    if form == "csv":
        print_row(table_header(top_k, labels))
    for answer in answers:
        if answer.error:
            status = 1
            report_error(answer.name, answer.error)
        if form == "json":
            found = {"file": answer.name} | ({} if answer.label is None else {"answer": answer.label})
            if answer.top is not None:
                found["classes"] = [{"class": name, "probability": round(share, 6)} for name, share in answer.top]
            print(json_line(found | ({"error": answer.error} if answer.error else {})))
        elif answer.top is None:
            continue
        elif form == "csv":
            print_row(table_row(answer))
        else:
            unsure = f"{UNSURE}: " if answer.label == UNSURE else ""
            shares = "  ".join(f"{name} {share:.1%}" for name, share in answer.top)
            print(f"{printable(answer.name)}  {unsure}{shares}")
    return status


def report_error(name: str, error: str) -> None:
    log.warning(printable(f"predict.py: {name}: {error}"))


def table_header(top_k: int, labels: bool = False) -> list[str]:
    columns = [f"{column}_{rank}" for rank in range(1, top_k + 1) for column in ("class", "probability")]
    return ["file", *(["answer"] if labels else []), *columns]


def table_row(answer: Answer) -> list[str]:
    row = [safe_cell(text) for text in (answer.name, answer.label) if text is not None]
    for name, share in answer.top:
        row += [safe_cell(name), f"{share:.6f}"]
    return row


def safe_cell(text: str) -> str:
    """Text for a table. What a spreadsheet would take for a formula gets an apostrophe in front, which makes it text.

    Names of strangers' files could otherwise run commands (owasp.org/www-community/attacks/CSV_Injection). So does what
    already has apostrophes before a formula: of each cell that FORMULA matches, the first apostrophe is ours.
    """
    return f"'{text}" if FORMULA.match(text) and text != "-" else text


def csv_line(cells: Sequence[str]) -> str:
    """Cells as a line of a CSV file (RFC 4180), with its newline."""
    doubled = (cell.replace('"', '""') for cell in cells)
    return ",".join(f'"{cell}"' if re.search('[",\r\n]', cell) else cell for cell in doubled) + "\n"


def json_line(values: dict) -> str:
    """The values as JSON (RFC 8259): in ASCII if standard output is not in UTF-8, or a terminal could be steered."""
    text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    is_utf8 = (getattr(sys.stdout, "encoding", None) or "utf-8").lower() in ("utf-8", "utf8")
    return text if is_utf8 and printable(text) == text else json.dumps(values)


# ---- a table that goes on after a stop -------------------------------------------------------------------------------


def write_table(
    path: Path,
    names: Sequence[str],
    top_k: int,
    answer: Callable[[Sequence[str]], Iterable[Answer]],
    settings: str,
    group: Group = ALONE,
    labels: bool = False,
) -> int:
    """Write a CSV file with an answer about each of these pictures; returns the exit status.

    `answer` gives an answer about each of some names, in order, with `labels` each with a label. The processes of a
    group share the work. Journals that are of other names or `settings` are deleted. Raises DataError while another
    process writes the table, and if answers of another process do not arrive here; FileExistsError if a file is in the
    way of a journal.
    """
    with contextlib.ExitStack() as stack:
        if group.rank == 0:
            stack.enter_context(locked(path))
        digest = group.from_rank0(lambda: digest_of(settings, names))
        done = group.from_rank0(lambda: set(read_journals(path, digest, len(names))))
        if done:
            log.info(f"{path}: {len(done):,} of {len(names):,} files are done already")
        shard = [index for index in range(len(names)) if index not in done][group.rank :: group.size]

        journal = path.with_name(f"{path.name}.{group.rank}.jsonl")
        if not journal.exists() or journal.stat().st_size == 0:
            write_file(journal, (json.dumps({"table": digest}) + "\n").encode())
        found = answer([names[index] for index in shard])
        with progress_bar("reading", len(shard), "files") as bar:
            add_to_journal(journal, zip(shard, found, strict=True), bar.update)
        group.wait()
        status = finish_table(path, names, table_header(top_k, labels), digest) if group.rank == 0 else 0
    return 0 if group.size > 1 else status  # torchrun would take 1 for a failure, and start all processes again


def digest_of(settings: str, names: Sequence[str]) -> str:
    """By what a table is known: settings, and the files' names, sizes in bytes and times of their last change."""
    digest = hashlib.sha256(repr(settings).encode())
    for name in names:
        try:
            state = os.stat(name)  # noqa: PTH116 - of very many files; a Path would take three times as long
        except (OSError, ValueError):
            state = None  # it can come later
        digest.update(repr((name, state and (state.st_size, state.st_mtime_ns))).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from writing this table meanwhile; raises DataError when one does already, OSError."""
    from filelock import FileLock, Timeout  # most calls do without it

    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise DataError(f"{path}: another process is writing this table") from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file; there the lock itself removes it
            Path(lock.lock_file).unlink()
        lock.release()


def add_to_journal(journal: Path, answers: Iterable[tuple[int, Answer]], update: Callable[[], object]) -> None:
    """Append an entry for each of these places and answers, as soon as it is there; raises OSError."""
    file = journal.open("a", encoding="utf-8", buffering=1)
    try:
        for count, (index, found) in enumerate(answers, 1):
            entry = {"place": index}
            if found.top is not None:
                entry["row"] = csv_line(table_row(found))
            if found.error:
                entry["error"] = found.error
            file.write(json.dumps(entry) + "\n")
            if count % FSYNC_EVERY == 0:
                os.fsync(file.fileno())
            update()
    except OSError as error:
        error.filename = error.filename or str(journal)
        raise
    finally:
        with contextlib.suppress(OSError):  # a full disk has been named already
            file.close()


def finish_table(path: Path, names: Sequence[str], header: Sequence[str], digest: str) -> int:
    """Write the table from its journals, name what went wrong, delete the journals; returns the exit status."""
    entries = read_journals(path, digest, len(names))
    if missing := [index for index in range(len(names)) if index not in entries]:
        raise DataError(
            f"{names[missing[0]]}: its answer was written on another machine; "
            f"{path.absolute().parent} must be on a shared disk"
        )
    ordered = [(name, entries[index]) for index, name in enumerate(names)]
    errors = [(name, entry["error"]) for name, entry in ordered if "error" in entry]
    for name, error in errors:
        report_error(name, error)
    rows = [csv_line(header), *(entry["row"] for _, entry in ordered if "row" in entry)]
    write_file(path, "".join(rows).encode("utf-8", NAME_ERRORS))
    for journal in find_journals(path):
        journal.unlink()
    print(path)
    return int(len(errors) > 0)


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
            texts = [entry[key] for key in ("row", "error") if key in entry]
            if entry.get("place") not in range(count) or not texts or not all(isinstance(text, str) for text in texts):
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

"""Answers as text, JSON and CSV, and the table that goes on after a stop: without a network."""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from filelock import FileLock

from quick import answers
from quick.answers import Answer
from quick.errors import CheckpointError, DataError, printable

NAMES = [f"{number}.png" for number in range(7)]
HEADER = "file,class_1,probability_1"


class Teller:
    """Answers "cat" with a probability that depends on the name; can't read 5.png; stops before name `stop_at`."""

    def __init__(self, stop_at: str = ""):
        self.stop_at, self.asked = stop_at, []

    def __call__(self, names: Sequence[str]) -> Iterator[Answer]:
        for name in names:
            if name == self.stop_at:
                raise KeyboardInterrupt
            self.asked.append(name)
            yield answer(name)


def answer(name: str) -> Answer:
    top, error = [("cat", ord(name[0]) / 128)], ""
    if name == "5.png":
        top, error = None, "not a picture"
    return Answer(name, top, np.zeros((2, 2, 3), np.uint8), error)


def write(path: Path, teller: Teller, *, names: Sequence[str] = NAMES, settings: str = "a") -> int:
    return answers.write_table(path, names, 1, teller, settings)


def journals(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.jsonl"))


@pytest.fixture
def table(tmp_path) -> Path:
    """A table that was stopped after four of seven pictures."""
    path = tmp_path / "out.csv"
    with pytest.raises(KeyboardInterrupt):
        write(path, Teller(stop_at="4.png"))
    assert journals(tmp_path) == ["out.csv.0.jsonl"] and not path.exists()
    return path


def expect_whole(path: Path, output, names: Sequence[str] = NAMES) -> None:
    """The table is there with all that can be read, what can't be read is named, and the journals are gone."""
    good = [name for name in names if name != "5.png"]
    assert path.read_text().splitlines() == [HEADER, *(f"{name},cat,{ord(name[0]) / 128:.6f}" for name in good)]
    assert output.out == f"{path}\n" and output.err.endswith("predict.py: 5.png: not a picture\n")
    assert not journals(path.parent)


# ---- what is printed ----


def test_answers_are_printed_in_three_forms(capsys):
    two = [Answer("a.png", [("cat", 0.75), ("dog", 0.25)], None), Answer("b\x1b.png", None, None, "not a\npicture")]
    for form, expected in {
        "text": ["a.png  cat 75.0%  dog 25.0%"],
        "csv": ["file,class_1,probability_1,class_2,probability_2", "a.png,cat,0.750000,dog,0.250000"],
    }.items():
        assert answers.print_answers(two, 2, form) == 1
        output = capsys.readouterr()
        assert output.out.splitlines() == expected and output.err == "predict.py: b\\x1b.png: not a\\npicture\n"
    assert answers.print_answers(two[:1], 2, "json") == 0
    classes = [{"class": "cat", "probability": 0.75}, {"class": "dog", "probability": 0.25}]
    assert json.loads(capsys.readouterr().out) == {"file": "a.png", "classes": classes}


def test_labels_say_what_is_unsure_in_three_forms(capsys):
    tops = [[("cat", 0.9), ("dog", 0.1)], [("cat", 0.8999994), ("dog", 0.1)], None]
    found = [answers.labelled(Answer(f"{number}.png", top, None), 0.9) for number, top in enumerate(tops)]
    for form, expected in {
        "text": ["0.png  cat 90.0%  dog 10.0%", "1.png  unsure: cat 90.0%  dog 10.0%"],
        "csv": [
            "file,answer,class_1,probability_1,class_2,probability_2",
            "0.png,cat,cat,0.900000,dog,0.100000",
            "1.png,unsure,cat,0.899999,dog,0.100000",
        ],
    }.items():
        answers.print_answers(found, 2, form, labels=True)
        assert capsys.readouterr().out.splitlines() == expected
    answers.print_answers(found, 2, "json", labels=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("answer") for line in lines] == ["cat", "unsure", None]
    assert lines[1]["classes"][0] == {"class": "cat", "probability": 0.899999}  # the number decides that is told
    rounded = torch.tensor(0.9).item()  # 0.89999998: a float32
    assert answers.labelled(Answer("a.png", [("cat", rounded)], None), 0.9).label == "cat"
    with pytest.raises(CheckpointError, match="--sure: the network has a class 'Unsure' itself; leave the flag out"):
        answers.check_unsure(["cat", "Unsure"])


def test_cells_steer_no_spreadsheet():
    row = answers.table_row(Answer("=1+1.png", [("@red", 0.5), ('e,"f', 0.25)], None))
    assert row == ["'=1+1.png", "'@red", "0.500000", 'e,"f', "0.250000"]
    assert next(csv.reader([answers.csv_line(row)])) == row
    assert [answers.safe_cell(text) for text in ("-", "-a", "+a", "a-", "\uff1da")] == [
        "-",
        "'-a",
        "'+a",
        "a-",
        "'\uff1da",
    ]


NAMES_OF_ALL_KINDS = [
    *("plain.png", "=1.png", "'=1.png", "''=1.png", "'quoted'.png", "\t=1.png", " -1.png", "@.png", "-"),
    *("a\nb.png", "a\r.png", 'com,ma "quote".png', " space .png", "a\x07\x1b[2J.png", "a\x85b.png", "a\u2028b.png"),
    *(
        "Screenshot 1.23\u202fPM.png",
        "می\u200cرود.png",
        "cafe\u0301.png",
        "caf\u00e9.png",
        "猫.png",
        "\U0001f468\u200d\U0001f469.png",
    ),
    *("caf\udce9.png", "\udcff\udc80.png", "\u202egnp.exe"),
]


def test_a_cell_stands_for_one_name_alone():
    cells = [answers.safe_cell(name) for name in NAMES_OF_ALL_KINDS]
    back = [cell[1:] if cell[0] == "'" and answers.FORMULA.match(cell) else cell for cell in cells]
    assert back == NAMES_OF_ALL_KINDS and len(set(cells)) == len(cells)


def test_a_table_names_the_very_files(tmp_path):
    write(tmp_path / "out.csv", Teller(), names=NAMES_OF_ALL_KINDS)
    with (tmp_path / "out.csv").open(encoding="utf-8", errors=sys.getfilesystemencodeerrors(), newline="") as file:
        cells = [row[0] for row in csv.reader(file)][1:]
    assert cells == [answers.safe_cell(name) for name in NAMES_OF_ALL_KINDS]


@pytest.mark.skipif(sys.platform == "win32", reason="names of other bytes")
@pytest.mark.parametrize(
    ("form", "encoding"),
    [
        ("json", "cp1252"),
        *(pytest.param(form, "utf-8", marks=pytest.mark.expensive) for form in ("csv", "json")),
        *(
            pytest.param(*how, marks=pytest.mark.expensive)
            for how in (("json", "ascii"), ("csv", "ascii"), ("csv", "cp1252"))
        ),
    ],
)
def test_a_pipe_gets_the_very_names_whatever_the_encoding_of_the_terminal(form, encoding):
    code = f"""
from quick import answers, cli
found = [answers.Answer(name, [("猫", 0.5)], None) for name in {NAMES_OF_ALL_KINDS!a}]
cli.exit_script(cli.run_script("a.py", lambda _: answers.print_answers(found, 1, "{form}")))"""
    environment = dict(os.environ) | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    text = done.stdout.decode("utf-8", "surrogateescape")
    if form == "json":
        answers_found = [json.loads(line) for line in text.split("\n")[:-1]]
        assert [found["file"] for found in answers_found] == NAMES_OF_ALL_KINDS
        assert {found["classes"][0]["class"] for found in answers_found} == {"猫"} and printable(text) == text.replace(
            "\n", "\\n"
        )
    else:
        rows = list(csv.reader(io.StringIO(text, newline="")))[1:]
        assert [row[:2] for row in rows] == [[answers.safe_cell(name), "猫"] for name in NAMES_OF_ALL_KINDS]


def test_a_terminal_gets_a_table_that_cannot_steer_it(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    answers.print_answers([answer(name) for name in NAMES_OF_ALL_KINDS], 1, "csv")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(NAMES_OF_ALL_KINDS) and all(printable(line) == line for line in lines)


# ---- the table ----


def test_a_table_of_which_nothing_was_done(tmp_path, capsys):
    teller = Teller()
    assert write(tmp_path / "out.csv", teller) == 1 and teller.asked == NAMES
    expect_whole(tmp_path / "out.csv", capsys.readouterr())
    assert write(tmp_path / "good.csv", Teller(), names=NAMES[:5]) == 0


def test_a_stopped_table_goes_on(table, capsys):
    teller = Teller()
    assert write(table, teller) == 1 and teller.asked == ["4.png", "5.png", "6.png"]
    output = capsys.readouterr()
    assert f"{table}: 4 of 7 files are done already\n" in output.err
    expect_whole(table, output)


def test_a_table_goes_on_in_another_number_of_processes(table, capsys):
    first, *_ = Path(f"{table}.0.jsonl").read_text().splitlines()
    entry = json.dumps({"place": 4, "row": answers.csv_line(answers.table_row(answer("4.png")))})
    Path(f"{table}.1.jsonl").write_text(f"{first}\n{entry}\n")
    teller = Teller()
    assert write(table, teller) == 1 and teller.asked == ["5.png", "6.png"]
    expect_whole(table, capsys.readouterr())


def test_every_answer_is_in_the_file_at_once(tmp_path):
    """A process that is killed loses no answer that it has: nothing waits in memory."""
    journal = tmp_path / "out.csv.0.jsonl"

    def teller(names: Sequence[str]) -> Iterator[Answer]:
        for count, name in enumerate(names):
            assert journal.read_bytes().count(b"\n") == 1 + count
            yield answer(name)

    write(tmp_path / "out.csv", teller)


@pytest.mark.parametrize(
    ("end", "done"),
    [
        (b'{"place": 4, "row": "4.pn', 4),  # a process was killed while it wrote
        (b"\0" * 100, 4),  # a machine lost its power
        (b"\xff\n", 4),
        (b'{"place": 7, "row": "a"}\n', 4),  # beyond the end
        (b'{"place": 4, "row": 7}\n{"place": 5, "error": "not a picture"}\n', 4),
        (b'{"place": 5, "error": "not a picture"}\n{"place": 6, "row": "6.png', 5),
    ],
)
def test_a_damaged_end_is_cut_off(end, done, table, capsys):
    journal = table.parent / "out.csv.0.jsonl"
    with journal.open("ab") as file:
        file.write(end)
    teller = Teller()
    with pytest.raises(KeyboardInterrupt):
        write(table, Teller(stop_at="4.png"))
    assert len(journal.read_text().splitlines()) == 1 + done  # so that the next line begins on a line of its own
    assert write(table, teller) == 1 and len(teller.asked) == 7 - done
    expect_whole(table, capsys.readouterr())


@pytest.mark.parametrize("change", ["names", "settings"])
def test_journals_of_another_table_are_not_used(change, table, capsys):
    names = ["0b.png", *NAMES] if change == "names" else NAMES
    teller = Teller()
    assert write(table, teller, names=names, settings="b" if change == "settings" else "a") == 1
    output = capsys.readouterr()
    assert teller.asked == names and f"{table}.0.jsonl: of another table, done anew" in output.err
    expect_whole(table, output, names)


def test_a_picture_that_changed_meanwhile_is_asked_about_again(tmp_path):
    names = [str(tmp_path / name) for name in ("1.png", "2.png")]
    for name in names:
        Path(name).write_bytes(b"a")
    for new in ("bb", "cc", None):  # another size, another time, gone
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "out.csv", Teller(names[1]), names=names)
        if new is None:
            Path(names[0]).unlink()
        else:
            Path(names[0]).write_bytes(new.encode())
            os.utime(names[0], (1, ord(new[0])))
        teller = Teller()
        write(tmp_path / "out.csv", teller, names=names)
        assert teller.asked == names


@pytest.mark.parametrize("content", [b"mine", b"mine\n", b'{"mine": 1}\n', b'["table"]\n', b'{"table": 1}\n'])
def test_a_file_of_ones_own_is_not_overwritten(content, tmp_path):
    (tmp_path / "out.csv.3.jsonl").write_bytes(content)
    with pytest.raises(FileExistsError, match="answers are to go there, but it holds something else"):
        write(tmp_path / "out.csv", Teller())
    assert (tmp_path / "out.csv.3.jsonl").read_bytes() == content and len(list(tmp_path.iterdir())) == 1


def test_a_table_has_one_writer_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "LOCK_SECONDS", 0)
    with FileLock(tmp_path / "out.csv.lock"), pytest.raises(DataError, match="another process is writing this table"):
        write(tmp_path / "out.csv", Teller())
    assert not journals(tmp_path)
    assert write(tmp_path / "out.csv", Teller()) == 1  # it has ended, or was killed
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def test_an_answer_without_its_explanation_is_an_answer_and_an_error(tmp_path, capsys):
    found = answer("a.png")._replace(error="no room for its explanation")
    assert answers.print_answers([found], 1, "text") == 1
    output = capsys.readouterr()
    assert output.out == "a.png  cat 75.8%\n" and output.err == "predict.py: a.png: no room for its explanation\n"
    assert answers.write_table(tmp_path / "out.csv", ["a.png"], 1, lambda _: [found], "") == 1
    assert (tmp_path / "out.csv").read_text().splitlines() == [HEADER, "a.png,cat,0.757812"]
    assert capsys.readouterr().err == "predict.py: a.png: no room for its explanation\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    real = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, mode="r", *how, **more: real("/dev/full" if mode == "a" else path, mode, *how, **more),
    )
    with pytest.raises(OSError, match="No space left") as error:
        write(tmp_path / "out.csv", Teller())
    assert error.value.filename == str(tmp_path / "out.csv.0.jsonl")


def test_files_with_other_names_are_left_alone(tmp_path):
    others = ["out.csv.old.jsonl", "out.csv.0.jsonl.txt", "xout.csv.0.jsonl", "out_csv.0.jsonl"]
    for name in others:
        (tmp_path / name).write_text("mine")
    write(tmp_path / "out.csv", Teller())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "out.csv"])


def test_an_empty_journal_is_no_hindrance(tmp_path, capsys):
    (tmp_path / "out.csv.0.jsonl").touch()  # of a process that was killed before its first line
    assert write(tmp_path / "out.csv", Teller()) == 1
    expect_whole(tmp_path / "out.csv", capsys.readouterr())


def test_answers_on_another_machine_are_missed(table):
    digest = json.loads(Path(f"{table}.0.jsonl").read_text().splitlines()[0])["table"]
    with pytest.raises(DataError, match=r"4.png: its answer was written on another machine; .* must be on a shared"):
        answers.finish_table(table, NAMES, 1, digest)
    assert not table.exists() and journals(table.parent)

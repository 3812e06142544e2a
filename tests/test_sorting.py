"""Pictures copied into a folder for each class, with a table: without a network."""

import csv
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from quick import sorting
from quick.answers import Answer, labelled, locked
from quick.errors import CheckpointError, DataError

CLASSES = ["cat", "dog"]


def answers(*names: object, stop_at: object = None, sure: float | None = None) -> Iterator[Answer]:
    """Answers that are "dog" for names with a d in them, with a probability of 0.9, 0.6 with an f."""
    for path in map(Path, names):
        if path == stop_at:
            raise KeyboardInterrupt
        top = [("dog" if "d" in path.name else "cat", 0.6 if "f" in path.name else 0.9)]
        answer = Answer(str(path), top, None) if path.exists() else Answer(str(path), None, None, "No such file")
        yield answer if sure is None else labelled(answer, sure)


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """Where three pictures are, two of one name."""
    monkeypatch.chdir(tmp_path)
    for name in ("a/d.png", "b/d.png", "b/f.jpg"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(name)
    os.utime("a/d.png", ns=(10**18, 10**18))
    return tmp_path


PICTURES = [Path("a/d.png"), Path("b/d.png"), Path("b/f.jpg")]


def sort(*names: object, folder: str = "out", classes: list[str] = CLASSES, **how: object) -> int:
    names = names or PICTURES
    return sorting.sort_pictures(Path(folder), answers(*names, **how), len(names), classes)


def contents(folder: str = "out") -> dict[str, str]:
    """What is in a folder, hidden files too, but for the table."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != "sorted.csv"]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def table(folder: str = "out") -> list[list[str]]:
    header, *rows = csv.reader(Path(folder, "sorted.csv").read_text().splitlines())
    assert header == ["file", "copy", "class", "probability", "error"]
    return rows


ALL = {"dog/d.png": "a/d.png", "dog/d-2.png": "b/d.png", "unsure/f.jpg": "b/f.jpg"}


def test_each_picture_arrives_in_the_folder_of_its_class_and_the_same_call_changes_nothing(desk, capsys):
    assert sort("a/d.png", "b/d.png", "b/f.jpg", "gone.png", folder="new/out", sure=0.8) == 1
    assert contents("new/out") == ALL and Path("new/out/dog/d.png").stat().st_mtime_ns == 10**18
    assert table("new/out") == [
        ["a/d.png", "dog/d.png", "dog", "0.900000", ""],
        ["b/d.png", "dog/d-2.png", "dog", "0.900000", ""],
        ["b/f.jpg", "unsure/f.jpg", "cat", "0.600000", ""],
        ["gone.png", "", "", "", "No such file"],
    ]
    output = capsys.readouterr()
    assert output.err == "predict.py: gone.png: No such file\n"
    assert output.out == f"dog 2, unsure 1; 3 copied; 1 not copied\n{Path('new/out/sorted.csv')}\n"
    before = {path: path.stat() for path in Path("new/out").rglob("*")}
    assert sort("a/d.png", "b/d.png", "b/f.jpg", "gone.png", folder="new/out", sure=0.8) == 1
    now = {path: path.stat() for path in Path("new/out").rglob("*") if path.is_file()}
    assert all(now[path].st_mtime_ns == before[path].st_mtime_ns for path in now) and len(now) == 4
    assert "3 there already; 1 not copied" in capsys.readouterr().out


def test_rows_of_earlier_calls_stay_as_their_copies_do(desk):
    sort("b/f.jpg", "c.jpg")
    Path("c.jpg").write_text("c")
    assert sort("c.jpg", "a/d.png") == 0
    assert [row[:2] for row in table()] == [["b/f.jpg", "cat/f.jpg"], ["c.jpg", "cat/c.jpg"], ["a/d.png", "dog/d.png"]]


def test_nothing_of_ones_own_is_overwritten(desk):
    Path("out/dog").mkdir(parents=True)
    Path("out/dog/d.png").write_text("mine")
    Path("out/dog/d-2.png").symlink_to("nowhere") if os.name != "nt" else Path("out/dog/d-2.png").mkdir()
    assert sort("a/d.png") == 0 and table()[0][1] == "dog/d-3.png"
    assert Path("out/dog/d.png").read_text() == "mine" and Path("out/dog/d-3.png").read_text() == "a/d.png"


@pytest.mark.parametrize("place", ["out", "out/cat", "out/sorted.csv"])
def test_what_is_in_the_way_is_named_before_anything_is_copied(place, desk):
    Path(place).parent.mkdir(exist_ok=True)
    Path(place).write_text("mine")
    with pytest.raises(FileExistsError) as error:
        sort()
    assert error.value.filename == str(Path(place)) and not Path("out/dog").exists()
    assert Path(place).read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes that are files")
def test_a_pipe_in_the_place_of_the_table_is_named_and_not_read(desk):
    Path("out").mkdir()
    os.mkfifo("out/sorted.csv")
    with pytest.raises(FileExistsError, match="it holds something else"):
        sort()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/b", "a\\b", "c:", "con", "Aux.txt", "a.", "a ", "a?", ".ssh", "x" * 201]
)
def test_a_class_that_is_no_folder_everywhere_is_refused(name, desk):
    with pytest.raises(CheckpointError, match=r"--into: class '.*cannot be a folder on every system") as error:
        sort(classes=["cat", name])
    assert not Path("out").exists() and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("classes", "reason"),
    [
        (["Cat", "cat"], "class 'cat' cannot be a folder: to some systems 'Cat' is the same"),
        (["caf\xe9", "cafe\u0301"], "to some systems 'caf\xe9' is the same"),
        (["Sorted.csv"], "class 'Sorted.csv' cannot be a folder: the table is sorted.csv"),
        (["sorted.csv.lock"], "class 'sorted.csv.lock' cannot be a folder: the table is sorted.csv"),
    ],
)
def test_classes_that_would_share_a_name_are_refused(classes, reason, desk):
    with pytest.raises(CheckpointError, match=reason):
        sort(classes=classes)


def test_a_stopped_sorting_leaves_whole_copies_and_their_table_and_goes_on(desk):
    with pytest.raises(KeyboardInterrupt):
        sort(stop_at=Path("b/f.jpg"))
    assert contents() == {"dog/d.png": "a/d.png", "dog/d-2.png": "b/d.png"} and len(table()) == 2
    Path("out/cat").mkdir()
    Path("out/cat/.sorting.tmp").write_text("half, of a process that was killed")
    assert sort() == 0
    assert sorted(contents()) == ["cat/f.jpg", "dog/d-2.png", "dog/d.png"] and len(table()) == 3


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_named_and_leaves_nothing_half(desk, monkeypatch):
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        sort()
    assert error.value.filename == str(Path("out/dog/d.png")) and contents() == {}


def test_a_name_that_the_disk_cannot_hold_costs_no_other_its_copy(desk, capsys):
    Path("out/dog").mkdir(parents=True)
    long = Path(f"{'d' * 251}.png")  # the next number makes it too long
    long.write_text("new")
    Path("out/dog", long).write_text("mine")
    assert sort(long, "b/d.png") == 1
    assert contents() == {f"dog/{long}": "mine", "dog/d.png": "b/d.png"}
    assert [row[4].partition(": ")[0] for row in table()] == ["it cannot be copied", ""]
    assert "it cannot be copied: " in capsys.readouterr().err


def test_a_disk_without_links_gets_its_copies_too(desk, monkeypatch):
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    assert sort(sure=0.8) == 0 and contents() == ALL


def test_one_process_at_a_time_sorts_into_a_folder(desk, monkeypatch):
    monkeypatch.setattr("quick.answers.LOCK_SECONDS", 0)
    Path("out").mkdir()
    with locked(Path("out/sorted.csv")), pytest.raises(DataError, match="another process is writing this table"):
        sort()


def test_names_steer_no_spreadsheet(desk):
    Path("=d.png").write_text("x")
    sort("=d.png")
    sort("=d.png")
    assert table() == [["'=d.png", "dog/=d.png", "dog", "0.900000", ""]]


def test_a_table_that_a_spreadsheet_saved_is_ours_still(desk):
    sort("a/d.png")
    text = Path("out/sorted.csv").read_text()
    Path("out/sorted.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    sort("b/f.jpg")
    assert [row[0] for row in table()] == ["a/d.png", "b/f.jpg"]

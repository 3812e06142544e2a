"""Classes from a table: which row names which picture, what a table may look like, and what is wrong with one."""

import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from conftest import noisy

import datasets
import predict
import train
from quick.data import labels
from quick.data.holdout import names_below
from quick.data.listing import find_files
from quick.data.tree import Folder
from quick.errors import ConfigError, DataError

PICTURES = ["cat/1.jpg", "cat/2.JPG", "more/3.png", "4.jpg"]


def folder(root: Path, *names: str) -> Path:
    """Files of these names. Nothing is in them: to be listed takes no content."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def table(root: Path, *lines: str, name: str = "labels.csv") -> Path:
    (root / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root / name


def whole(root: Path, path: str | Path) -> dict[str, str]:
    """The class of each picture by its name below the root."""
    files = find_files(root, ["whole"], 0.0, path)["whole"].files
    return dict(zip(names_below(root, [path for path, _ in files]), [name for _, name in files], strict=True))


def error(root: Path, path: str | Path, splits: tuple = ()) -> str:
    with pytest.raises(DataError) as found:
        find_files(root, splits, 0.0, path)
    assert "\n" not in str(found.value)
    return str(found.value)


# ---- which picture a row names ----


@pytest.mark.parametrize(
    "names",
    [
        ["cat/1.jpg", "cat/2.JPG", "more/3.png", "4.jpg"],
        ["1.jpg", "2.jpg", "3.png", "4.jpg"],
        ["1", "2", "3", "4"],
        ["cat/1", "./cat/2", "3", "4"],
        ["cat\\1.jpg", "cat\\2.jpg", "more\\3.png", "4.jpg"],
        ["photos/cat/1.jpg", "photos/cat/2.jpg", "photos/more/3", "photos/4"],
        ["{root}/cat/1.jpg", "{root}/cat/2.JPG", "{root}/more/3", "{root}/4"],
    ],
)
def test_a_row_names_its_file_in_many_ways(names, tmp_path, capsys):
    root = folder(tmp_path / "photos", *PICTURES)
    rows = [f"{name.format(root=root)},{label}" for name, label in zip(names, "abab", strict=True)]
    assert whole(root, table(root, "file,label", *rows)) == dict(zip(PICTURES, "abab", strict=True))
    assert capsys.readouterr().err == ""


def test_names_may_count_from_the_folder_of_the_table(tmp_path):
    root = folder(tmp_path / "photos" / "train", "1.jpg", "x/2.jpg")
    path = table(tmp_path / "photos", "file,label", "train/1.jpg,a", "train/x/2.jpg,b", "test/1.jpg,b")
    assert whole(root, path) == {"1.jpg": "a", "x/2.jpg": "b"}


def test_a_name_that_two_files_may_have_is_refused_unless_it_is_exact(tmp_path):
    root = folder(tmp_path, "x/1.jpg", "y/1.jpg", "z.jpg", "z.png", "1.png")
    assert "line 2: '1.jpg' may be x/1.jpg or y/1.jpg" in error(root, table(root, "file,label", "1.jpg,a", "z.png,b"))
    assert "line 3: 'z' may be z.jpg or z.png" in error(root, table(root, "file,label", "x/1.jpg,a", "z,b"))
    rows = ["x/1.jpg,a", "y/1,b", "z.jpg,a", "z.png,b", "1,c"]
    assert list(whole(root, table(root, "id,label", *rows)).values()) == ["c", "a", "b", "a", "b"]
    folder(root, "u.jpg", "u.JPG")
    if len({path.name for path in root.glob("u.*")}) == 2:  # else the system takes them for one
        assert whole(root, table(root, "id,label", "u.jpg,a", "u.JPG,b")) == {"u.JPG": "b", "u.jpg": "a"}


def test_a_row_with_another_folder_is_no_row_of_a_picture(tmp_path, capsys):
    root = folder(tmp_path, "cat/1.jpg", "2.jpg")
    path = table(root, "file,label", "dog/1.jpg,a", "val/2.jpg,a", "cat/1.jpg,b", "../2.jpg,b")
    assert whole(root, path) == {"cat/1.jpg": "b"}
    assert "rows without a picture: 3 (first line 2, dog/1.jpg)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["/home/me/{}/scan/1.jpg", "me/{}/scan/1", "{}/scan/1.jpg", "{}/scan/1", "{}/1.jpg"])
def test_many_pictures_whose_names_end_alike_are_told_apart_at_once(name, monkeypatch):
    """With a look at each of them for each row, some thousands would take minutes."""
    tree = {("all", str(number), "scan"): Folder(["1.jpg"], Counter(), False) for number in range(300)}
    names = labels.Names(tree, Path("photos"), bases=[Path("photos")])
    looks = []
    monkeypatch.setattr(labels.Names, "below", lambda self, path: looks.append(path) or path)
    found = [names.find(name.format(number)) for number in range(300)]
    path = [str(Path("photos", "all", str(number), "scan", "1.jpg")) for number in range(300)]
    assert found == ([[one] for one in path] if name.startswith("{}/scan") else [[]] * 300)
    assert len(looks) <= 300


def test_names_and_labels_are_compared_in_composed_unicode(tmp_path):
    apart = unicodedata.normalize("NFD", "café")
    root = folder(tmp_path, f"{apart}.jpg", "图 1.jpg")
    path = table(root, "文件,标签", f"café,{apart}", "图 1.jpg,猫")
    assert list(whole(root, path).values()) == ["café", "猫"]


# ---- what a table looks like ----


@pytest.mark.parametrize(
    "lines",
    [
        ["file,label", "1.jpg,a", "2.jpg,b"],
        ["\ufefffile;label", "1.jpg;a", "", "2.jpg;b", ";"],
        ["file\tlabel\tnote", "1.jpg\ta\tx", "2.jpg\tb"],
        ['"file","label"', '"1.jpg","a"', '"2.jpg" , b,,'],
        ["image_id,lesion_id,dx,age", "1,x,a,7", "2,y,b,8"],
        ["label,filename,id", "a,1.jpg,17", "b,2.jpg,18"],
        [",breed,id", "0,a,1", "1,b,2"],
        ["kind,picture no", "a,1", "b,2"],
        ["number;what it is", "1;a", "2;b"],
        ["class id,filepaths,labels,data set", "0,1.jpg,a,train", "1,2.jpg,b,test"],
    ],
)
def test_columns_are_known_by_their_names_or_by_their_order(lines, tmp_path):
    root = folder(tmp_path, "1.jpg", "2.jpg")
    assert whole(root, table(root, *lines)) == {"1.jpg": "a", "2.jpg": "b"}


def test_a_table_of_windows_in_utf_16_is_read_and_latin_1_is_refused(tmp_path):
    root = folder(tmp_path, "1.jpg", "2.jpg")
    (root / "labels.csv").write_text("file,label\r\n1.jpg,é\r\n2.jpg,b\r\n", encoding="utf-16")
    assert whole(root, "labels.csv") == {"1.jpg": "é", "2.jpg": "b"}
    (root / "labels.csv").write_text("file,label\n1.jpg,é\n2.jpg,b\n", encoding="latin-1")
    assert error(root, "labels.csv") == f"{root / 'labels.csv'}: its encoding is not UTF-8; save it anew as UTF-8"


WRONG = {
    "nothing is in it; its first line should be file,label": [""],
    "no rows below its header": ["file,label"],
    "has no columns for file and label: a, b, c": ["a,b,c", "1,2,3"],
    "has no columns for file and label: file": ["file", "1.jpg"],
    "line 1 names the picture '1.jpg', where the names of the columns should stand": ["1.jpg,a", "2.jpg,b"],
    "line 1 names the picture '1', where": ["1,a", "2,b"],
    "labels and label may be the column label; rename one": ["file,labels,label", "1.jpg,a,b"],
    "image and filename may be the column file; rename one": ["image,filename", "1.jpg,a", "2.jpg,b"],
    "line 3: the header has 2 cells, this row 1": ["file,label", "1.jpg,a", "2.jpg"],
    "line 2: the header has 2 cells, this row 3; in quotes, a name": ["file,label", "1,5.jpg,a"],
    "line 2: no label in it; fill it in": ["file,label", "1.jpg, ", "2.jpg,b"],
    "line 3: no file in it": ["file,label", "1.jpg,a", ",b"],
    "lines 2 and 4 give 1.jpg two labels, 'a' and 'b'; delete one": ["file,label", "1.jpg,a", "2.jpg,b", "1,b"],
    "none of its 2 rows names a picture": ["file,label", "7.jpg,a", "8.jpg,b"],
    "one class alone, 'a'; a classifier needs at least 2": ["file,label", "1.jpg,a", "2.jpg,a"],
    r"line 2: control characters in 'a\x1b[2J'": ["file,label", "1.jpg,a\x1b[2J", "2.jpg,b"],
    r"line 4: control characters in '2.jpg,b\n3.jpg'": ["file,label", '"1.jpg",a', '"2.jpg,b', '3.jpg",b'],
    "the class name aaaaaaaaaaaaaaaaaaaa... has 2,000 characters": ["file,label", f"1.jpg,{'a' * 2000}", "2.jpg,b"],
    "not a table: field larger than field limit": ["file,label", f"1.jpg,{'a' * 200000}", "2.jpg,b"],
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_table_is_one_line(what, tmp_path):
    root = folder(tmp_path, "1.jpg", "2.jpg")
    path = table(root, *WRONG[what])
    found = error(root, path)
    assert found.startswith(f"{path}: {what}") or f": {what}" in found


def test_a_table_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    root = folder(tmp_path / "photos", "1.jpg", "2.jpg")
    monkeypatch.chdir(tmp_path)
    assert error(root, "x.csv") == f"--labels x.csv: no such table, neither here nor in {root}"
    assert error(root, "photos") == "--labels photos: no such table, it is a folder"
    monkeypatch.setattr(labels, "LARGEST_TABLE", 10)
    table(root, "file,label", "1,a")
    assert "above 10 bytes, no table of labels" in error(root, "labels.csv")


def test_a_table_counts_from_here_or_else_from_the_folder(tmp_path, monkeypatch):
    root = folder(tmp_path / "photos", "1.jpg")
    monkeypatch.chdir(tmp_path)
    table(root, "file,label", "1,inside")
    assert whole(Path("photos"), "labels.csv") == {"1.jpg": "inside"}
    table(tmp_path, "file,label", "1,here")
    assert whole(Path("photos"), "labels.csv") == {"1.jpg": "here"}
    monkeypatch.chdir(folder(root, "x/1.jpg"))
    assert whole(Path("../photos"), "labels.csv") == {"1.jpg": "inside"}
    assert [path for path, _ in find_files(Path(), ["whole"], 0.0, "labels.csv")["whole"].files] == ["1.jpg"]


# ---- what becomes of the folder ----


def splits_of(root: Path) -> dict[str, set[str]]:
    found = find_files(root, (), 0.0, "labels.csv")
    return {split: set(names_below(root, [path for path, _ in listing.files])) for split, listing in found.items()}


def test_class_folders_do_not_count(tmp_path, capsys):
    names = [f"{place}/{number}.jpg" for place in ("cat", "dog") for number in range(10)]
    root = folder(tmp_path, *names)
    table(root, "file,label", *(f"{name},{'odd' if int(name[4]) % 2 else 'even'}" for name in names))
    train_listing, val_listing = find_files(root, (), 0.0, "labels.csv").values()
    assert train_listing.classes == val_listing.classes == ["even", "odd"]
    by_folders = find_files(root, (), 0.0)
    held = [{path for path, _ in files} for files in (val_listing.files, by_folders["test"].files)]
    assert held[0] == held[1] and 0 < len(held[0]) < 20  # the names alone decide
    assert capsys.readouterr().err == f"{root}: left out: .csv\n"  # by folders; a table is no surprise


def test_split_folders_split_what_a_table_labels(tmp_path):
    root = folder(tmp_path, *(f"{split}/{number}.jpg" for split in ("train", "test") for number in range(20)))
    table(root, "id,label", *(f"train/{number},{'ab'[number % 2]}" for number in range(20)))  # Kaggle's form
    found = splits_of(root)
    assert found.keys() == {"train", "test"} and all(name.startswith("train/") for of in found.values() for name in of)
    rows = [f"{split}/{number},{'ab'[number % 2]}" for split in ("train", "test") for number in range(20)]
    table(root, "id,label", *rows)
    found = splits_of(root)
    assert {len(found["train"]), len(found["test"])} == {20} and all(name.startswith("test/") for name in found["test"])
    (root / "test").rename(root / "val")
    table(root, "id,label", *(row.replace("test", "val") for row in rows))
    assert [listing.split for listing in find_files(root, (), 0.0, "labels.csv").values()] == ["train", "val"]


def test_labels_in_splits_and_outside_are_refused(tmp_path):
    root = folder(tmp_path, "train/1.jpg", "train/2.jpg", "extra/3.jpg", "4.jpg")
    table(root, "id,label", "1,a", "2,b", "3,a")
    assert "train looks like a split, and" in error(root, "labels.csv") and "3.jpg" in error(root, "labels.csv")
    table(root, "id,label", "1,a", "2,b", "4,a")
    assert "4.jpg is beside it; move or rename one" in error(root, "labels.csv")
    (root / "train").rename(root / "test")
    table(root, "id,label", "1,a", "2,b")
    assert "it labels pictures of test, none in a folder train/" in error(root, "labels.csv")
    assert whole(root, "labels.csv") == {"test/1.jpg": "a", "test/2.jpg": "b"}


def test_what_does_not_match_is_one_line_and_the_doctor_lists_it(tmp_path, capsys):
    root = tmp_path / "photos"
    for number in range(30):
        (root / "x").mkdir(parents=True, exist_ok=True)
        noisy((40, 40, 40) if number % 2 else (200, 200, 200), number, (8, 8)).save(root / "x" / f"{number:02}.png")
    rows = [f"{number:02},{'ab'[number % 2]}" for number in range(28)]
    path = table(root, "id,label", *rows, "00,a", *(f"gone{number},a" for number in range(25)))
    assert datasets.cli(["--data", str(root), "--labels", "labels.csv", "--image-size", "8"]) == 0
    shown = capsys.readouterr()
    assert shown.err == (
        f"{path}: pictures without a row: 2 (first x/28.png); rows without a picture: 25 (first line 31, gone0); "
        "rows that repeat another: 1 (first line 30)\n"
    )
    lines = [line for line in shown.out.splitlines() if line.startswith("labels")]
    assert lines[0] == f"labels    {root / 'x' / '28.png'}: no row in {path}" and len(lines) == 21
    assert lines[2] == f"labels    {path}: line 31: no picture gone0" and lines[-1] == "labels    7 more"
    with pytest.raises(DataError, match=r"28.png: no row in .*labels.csv \(and 26 more bad files\)"):
        datasets.load(str(root), labels="labels.csv", strict=True)


def test_built_in_data_take_no_labels():
    with pytest.raises(ConfigError, match=r"--labels x\.csv: shapes has labels of its own"):
        datasets.load("shapes", labels="x.csv")


# ---- runs ----


def test_a_run_trains_resumes_and_is_evaluated_by_its_table(tmp_path, capsys, monkeypatch):
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(24):
        noisy((40, 40, 220) if number % 2 else (220, 40, 40), number, (8, 8)).save(root / f"{number:02}.png")
    rows = [f"{number:02}.png,{'red/warm' if number % 2 == 0 else 'blue'}" for number in range(24)]
    table(root, "file,label", *rows)
    monkeypatch.chdir(tmp_path)
    flags = "--image-size 8 --batch-size 8 --no-whiten --no-views --device cpu --quiet".split()
    flags = ["--data", "photos", "--labels", "labels.csv", "--run-name", "a", *flags]
    assert train.cli([*flags, "--epochs", "1"]) == 0
    best = str(tmp_path / "logs" / "a" / "best.pt")
    listed = (tmp_path / "logs" / "a" / "pictures.csv").read_text().splitlines()
    held = sum(line.startswith("val,") for line in listed)
    assert 0 < held < 24 and len(listed) == 25 and listed[-1].split(",")[1] in ("red/warm", "blue")

    (tmp_path / "elsewhere").mkdir()  # the run knows its table, wherever one asks from
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    assert predict.cli(["--evaluate", str(root), "--checkpoint", best]) == 0
    assert capsys.readouterr().err == f"{root}: {held} val pictures\n"
    other = tmp_path / "other"
    shutil.copytree(root, other, ignore=shutil.ignore_patterns("*.csv"))
    path = table(tmp_path, "file;label", *(row.replace(",", ";") for row in rows), name="other.csv")
    assert predict.cli(["--evaluate", str(other), "--labels", str(path), "--checkpoint", best]) == 0
    assert capsys.readouterr().err == f"{other}: all 24 pictures\n"
    assert predict.cli(["--evaluate", str(other), "--checkpoint", best]) == 1
    assert "or a table of them with --labels FILE" in capsys.readouterr().err
    assert predict.cli([str(other), "--labels", str(path), "--checkpoint", best]) == 2

    # A resumed run finds its table where it is now, and other labels are named.
    monkeypatch.chdir(tmp_path)
    table(root, "file,label", *rows[:-1], "23.png,red/warm")
    assert train.cli(["--resume", "a", "--epochs", "2"]) == 1
    assert "1 now in another class (23.png)" in capsys.readouterr().err
    (root / "labels.csv").unlink()
    assert train.cli(["--resume", "a", "--epochs", "2"]) == 1
    assert "--labels labels.csv: no such table" in capsys.readouterr().err
    assert predict.cli(["--evaluate", "photos", "--checkpoint", best]) == 1
    assert "the run had the labels of labels.csv, which is gone; add --labels FILE" in capsys.readouterr().err
    assert train.cli(["--resume", "a", "--labels", "", "--epochs", "2"]) == 2
    assert "--labels: the run has 'labels.csv'" in capsys.readouterr().err
    assert train.cli(["--resume", "a", "--labels", "other.csv", "--epochs", "2", "--quiet"]) == 0

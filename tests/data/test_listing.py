"""Which files of a folder are found, in which split and class; what is held out; what is left out."""

import errno
import os
import random
import re
import shutil
import socket
import unicodedata
from pathlib import Path

import pytest
from conftest import noisy

import datasets
import predict
import train
from quick.data import tree
from quick.data.holdout import hash_fraction, held_out, names_below
from quick.data.listing import find_files
from quick.data.tree import list_pictures
from quick.errors import DataError, LimitError
from quick.run.settings import Config

LINKS = pytest.mark.skipif(os.name == "nt", reason="Windows lets few users make links")


def touch(root: Path, *names: str) -> Path:
    """Files of these relative names. Nothing is in them: to be listed takes no content."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def some(root: Path, *folders: str, count: int = 3) -> Path:
    """A few picture files in each of these folders."""
    return touch(root, *(f"{folder}/{number}.jpg" for folder in folders for number in range(count)))


def found(root: Path, *splits: str, fraction: float = 0.0) -> dict[str, set[str]]:
    """The names of the files below the root, by split."""
    listings = find_files(root, splits, fraction)
    return {split: set(names_below(root, [path for path, _ in listing.files])) for split, listing in listings.items()}


def classes(root: Path, *splits: str) -> list[str]:
    return next(iter(find_files(root, splits, 0.5).values())).classes


# ---- splits ----


@pytest.mark.parametrize(
    ("train_name", "test_name"),
    [
        ("train", "test"),
        ("Training", "Testing"),
        ("TRAIN", "Test"),
        ("training_set", "test_set"),
        ("Training Set", "Test Set"),
        ("trainset", "testset"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("asl_alphabet_train/asl_alphabet_train", "asl_alphabet_test/asl_alphabet_test"),
        ("train-images", "test-images"),
        ("train2017", "val2017"),
        ("train", "valid"),
        ("train_data", "validation_data"),
        ("train", "dev"),
        ("训练集", "测试集"),
    ],
)
def test_common_names_of_splits_are_splits(tmp_path, train_name, test_name):
    some(tmp_path, *(f"{split}/{name}" for split in (train_name, test_name) for name in ("cat", "dog")))
    split_sets = found(tmp_path, "train", "test")
    assert {name.rsplit("/", 2)[0] for name in split_sets["train"]} == {train_name}
    assert {name.rsplit("/", 2)[0] for name in split_sets["test"]} == {test_name}
    assert classes(tmp_path) == ["cat", "dog"]


@pytest.mark.parametrize(
    "names",
    [
        ("bus", "car", "train"),
        ("train", "test", "bus"),
        ("valid", "invalid"),
        ("training shoes", "test tubes"),
        ("positive test", "negative test"),
        ("train station", "bus station"),
    ],
)
def test_a_class_may_be_called_like_a_split(tmp_path, names):
    assert classes(some(tmp_path, *names, count=9)) == sorted(names)


def test_a_class_in_a_split_may_be_called_like_a_split(tmp_path):
    some(tmp_path, *(f"{split}/{name}" for split in ("train", "test") for name in ("bus", "train", "test")))
    assert classes(tmp_path, "train") == ["bus", "test", "train"]


def test_what_may_be_split_or_class_is_told(tmp_path, capsys):
    some(tmp_path, "train/2019", "train/2020", "bus")
    with pytest.raises(DataError, match="train/ looks like a split, bus/ beside it like a class; move or rename one"):
        find_files(tmp_path, ["train"], 0.2)
    some(tmp_path, "test/2019")
    assert len(found(tmp_path)["train"]) == 6 and "left out: pictures in bus" in capsys.readouterr().err
    some(tmp_path, "Training/2019")
    with pytest.raises(
        DataError, match=r"(train/ and Training/|Training/ and train/) would both be the train pictures"
    ):
        find_files(tmp_path, ["train"], 0.2)


def test_splits_without_class_folders_are_told(tmp_path):
    some(tmp_path, "train", "test")  # as Kaggle's dogs and cats
    what = "train: no class folders with pictures in it, and its name is that of a split; .* add --labels FILE"
    with pytest.raises(DataError, match=what):
        find_files(tmp_path, (), 0.0)
    shutil.rmtree(tmp_path / "train")
    some(tmp_path, "train_image", count=2)
    touch(tmp_path, "train_label/0.txt")
    with pytest.raises(DataError, match="put train_image/ and train_label/ into a folder train/"):
        find_files(tmp_path, (), 0.0)


def test_val_chooses_and_test_is_looked_at_once(tmp_path):
    for place in ("train", "val", "test"):
        some(tmp_path, f"{place}/cat", f"{place}/dog")
    assert list(found(tmp_path)) == ["train", "val", "test"]
    assert found(tmp_path, "test")["test"] == {
        f"test/{name}/{number}.jpg" for name in ("cat", "dog") for number in range(3)
    }
    with pytest.raises(LimitError, match=r"--val-fraction 0.2: .*val is the validation set already"):
        find_files(tmp_path, (), 0.2)


def test_val_alone_is_val_until_training_gives_one(tmp_path):
    some(tmp_path, "train/cat", "train/dog", "val/cat", "val/dog")
    listings = find_files(tmp_path, (), 0.0)
    assert [listing.split for listing in listings.values()] == ["train", "val"]
    assert [listing.split for listing in find_files(tmp_path, (), 0.3).values()] == ["train", "test"]


def test_train_alone_gives_its_own_validation_set(tmp_path):
    some(tmp_path / "a", "train/cat", "train/dog", count=20)
    some(tmp_path / "b", "cat", "dog", count=20)
    names = {f"train/{name}" for name in found(tmp_path / "b")["test"]}
    assert found(tmp_path / "a")["test"] == names and names


def test_the_whole_of_a_folder(tmp_path):
    some(tmp_path, "cat", "dog")
    assert len(found(tmp_path, "whole")["whole"]) == 6
    some(tmp_path / "a", "train/cat", "train/dog")
    assert len(found(tmp_path / "a", "whole")["whole"]) == 6
    some(tmp_path / "a", "val/cat")
    assert len(found(tmp_path / "a", "whole")["whole"]) == 3 and classes(tmp_path / "a", "whole") == ["cat"]
    some(tmp_path / "a", "test/dog")
    assert classes(tmp_path / "a", "whole") == ["dog"]
    assert [
        find_files(path, ["whole"], 0.2)["whole"].split for path in (tmp_path / "a", tmp_path / "b") if path.exists()
    ] == ["test"]


def test_training_chooses_on_val_and_tests_once(tmp_path, capsys):
    for place, count in (("train", 10), ("val", 5), ("test", 3)):
        for number in range(count):
            for name, colour in (("red", (220, 40, 30)), ("blue", (30, 60, 220))):
                (tmp_path / "data" / place / name).mkdir(parents=True, exist_ok=True)
                noisy(colour, number).save(tmp_path / "data" / place / name / f"{number}.png")
    flags = "--epochs 2 --batch-size 10 --device cpu --no-views --run-name a --log-dir".split()
    assert train.cli(["--data", str(tmp_path / "data"), *flags, str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "20 train, 10 val, 6 test pictures" in said.err and ", val accuracy " in said.out


def test_broken_folders_are_named(tmp_path):
    for data in ("nowhere", ""):
        with pytest.raises(DataError, match=f"no data '{data}'"):
            datasets.load(data)
    with pytest.raises(DataError, match="no class folders with pictures; a classifier needs at least 2"):
        datasets.load(str(tmp_path))
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="no folder train/ in it"):
        datasets.load(str(tmp_path))
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="train: no class folders with pictures in it"):
        datasets.load(str(tmp_path))
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(DataError, match=r"cat: no pictures in it"):
        datasets.load(str(tmp_path))
    touch(tmp_path, "train/cat/notes.txt")
    with pytest.raises(DataError, match=r"cat: no pictures in it; left out: \.txt"):
        datasets.load(str(tmp_path))
    touch(tmp_path, "train/cat/1.png")
    with pytest.raises(DataError, match="one class alone, 'cat'; a classifier needs at least 2"):
        datasets.load(str(tmp_path))
    touch(tmp_path, "train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/dog/1.png", "test/cow/1.png")
    with pytest.raises(DataError, match=r"test: class 'cow' is not in .*train, which has: cat, dog"):
        datasets.load(str(tmp_path))


# ---- what is held out ----


def test_adding_pictures_never_moves_one():
    draw = random.Random(0)
    for _ in range(300):
        names = [f"{name}/{draw.random()}.jpg" for name in ("cat", "dog") for _ in range(draw.randint(1, 12))]
        draw.shuffle(names)
        sides, tried = {}, 0
        for count in range(1, len(names) + 1):
            part = names[:count]
            try:
                is_out = held_out(part, [name[:3] for name in part], 0.3, "photos")
            except LimitError:
                continue
            tried += 1
            for name, side in zip(part, is_out, strict=True):
                assert sides.setdefault(name, side) == side
        assert tried or len(names) < 20


def test_names_decide_in_splits_too(tmp_path, colour_folder):
    shutil.copytree(colour_folder, tmp_path / "a")
    config = Config(data=str(tmp_path / "a"), val_fraction=0.3, image_size=32, interpolation="bilinear", fit="crop")

    def sides() -> list[set[str]]:
        sets = datasets.load_sets(config)
        assert [pictures.split for pictures in sets] == ["train", "val", "test"]
        return [set(names_below(config.data, map(os.fsdecode, pictures.paths))) for pictures in sets]

    first = sides()
    assert 6 <= len(first[1]) <= 30 and not first[0] & first[1]
    for number in range(5):
        noisy((200, 40, 30), number).save(tmp_path / "a" / "train" / "red" / f"a new one {number}.png")
    again = sides()
    assert first[0] <= again[0] and first[1] <= again[1] and len(again[0] | again[1]) == 65


def test_a_folder_keeps_its_split_wherever_it_is(tmp_path, monkeypatch):
    some(tmp_path / "a", "red", "blue", count=40)
    held = found(tmp_path / "a")["test"]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    monkeypatch.chdir(tmp_path / "b")
    assert found(tmp_path / "b")["test"] == found(Path())["test"] == held and 6 <= len(held) <= 28
    assert held < found(tmp_path / "a", fraction=0.6)["test"]
    assert found(tmp_path / "a")["train"] | held == set(names_below(tmp_path / "a", list_pictures(tmp_path / "a")))


def test_the_split_is_the_same_however_a_system_writes_names(tmp_path):
    forms = [unicodedata.normalize(form, f"{tmp_path}/grün/é.png") for form in ("NFC", "NFD")]  # NFD: macOS
    [first], [second] = (names_below(tmp_path, [form]) for form in forms)
    assert forms[0] != forms[1] and first == second == forms[0][len(str(tmp_path)) + 1 :]
    assert 0 <= hash_fraction(first) < 1 and len({hash_fraction(str(number)) for number in range(1000)}) == 1000
    assert 0 <= hash_fraction("\ud83d.png") < 1  # half of a letter, which Windows allows in names


def test_one_class_alone_may_be_the_folder_to_give(tmp_path):
    some(tmp_path, "archive/photos/train/cat", "archive/photos/train/dog", "archive/photos/test/cat")
    inner = re.escape(str(tmp_path / "archive" / "photos"))
    with pytest.raises(DataError, match=f"one class alone, 'archive'; .* classes are in {inner}, give that folder"):
        find_files(tmp_path, (), 0.0)
    assert list(find_files(tmp_path / "archive" / "photos", (), 0.0)) == ["train", "test"]


def test_a_flat_test_folder_is_named_with_what_to_do(tmp_path):
    some(tmp_path, "train/cat", "train/dog", "test")
    for splits in ((), ["whole"]):
        what = f"{re.escape(str(tmp_path / 'test'))}: .*; sort its pictures into folders of their classes"
        with pytest.raises(DataError, match=what):
            find_files(tmp_path, splits, 0.0)


def test_an_unreadable_class_or_split_is_no_class_less(tmp_path, monkeypatch):
    some(tmp_path, "train/cat", "train/dog", "train/emu", "val/cat", "val/dog", "val/emu")
    secret, identity = "", tree.identity

    def read_as_another_user(path: str) -> object:
        if path == str(tmp_path / secret):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return identity(path)

    monkeypatch.setattr(tree, "identity", read_as_another_user)
    for secret in ("train/emu", "val"):
        name = secret[-3:]
        with pytest.raises(DataError, match=rf"{name}: no .*; left out: {name}. \(Permission denied\)"):
            find_files(tmp_path, (), 0.0)


def test_classes_that_are_not_measured_are_told(tmp_path, capsys):
    some(tmp_path, "train/cat", "train/dog", "train/emu", "val/cat")
    assert find_files(tmp_path, (), 0.0)["test"].classes == ["cat", "dog", "emu"]
    assert capsys.readouterr().err.endswith("val: no pictures of these classes, which are not measured: dog, emu\n")
    some(tmp_path, "val/dog", "val/emu")
    find_files(tmp_path, (), 0.0)
    assert not capsys.readouterr().err


def test_of_thousands_of_classes_a_message_names_some(tmp_path):
    some(tmp_path, *(f"train/{number:03}" for number in range(200)), "val/images", count=1)
    with pytest.raises(DataError, match=r"class 'images' is not in .*008, 009 and 190 more$"):
        find_files(tmp_path, (), 0.0)


def test_a_share_that_leaves_a_side_empty_is_told_with_one_that_does_not():
    names = [f"{name}/{number}.jpg" for name in ("cat", "dog") for number in range(5)]
    of_class = [name[:3] for name in names]
    for fraction, what in ((0.001, "holds out no picture"), (0.999, "holds out all pictures of class")):
        with pytest.raises(LimitError, match=what) as error:
            held_out(names, of_class, fraction, "photos")
        better = float(str(error.value).split("--val-fraction ")[1].split()[0])
        is_out = held_out(names, of_class, better, "photos")
        for name in ("cat", "dog"):
            assert {side for side, of in zip(is_out, of_class, strict=True) if of == name} == {True, False}
    with pytest.raises(LimitError, match="one picture a class; put at least two into each, one of which is held out"):
        held_out(["cat/1.jpg", "dog/1.jpg"], ["cat", "dog"], 0.2, "photos")


def test_no_share_is_advised_that_holds_out_none_of_a_class_either(capsys):
    names = sorted([f"{number}.jpg" for number in range(40)], key=hash_fraction)
    of_class = ["cat"] * 20 + ["dog"] * 20  # each dog's hash is above each cat's
    share = (hash_fraction(names[9]) + hash_fraction(names[10])) / 2
    assert sum(held_out(names, of_class, share, "photos")) == 10
    assert capsys.readouterr().err.endswith("'dog' is held out; put more pictures into each class\n")


def test_a_class_of_which_none_is_held_out_is_named_once(capsys):
    names = [f"cat/{number}.jpg" for number in range(50)] + ["dog/1.jpg"]
    assert hash_fraction("dog/1.jpg") > 0.1
    assert any(held_out(names, [name[:3] for name in names], 0.1, "photos"))
    assert capsys.readouterr().err.count("no picture of class 'dog' is held out; ") == 1


# ---- names ----


def test_a_class_has_one_name_in_every_form_of_unicode(tmp_path):
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    some(tmp_path, f"train/{composed}", "train/tea", f"test/{apart}", "test/tea")
    some(tmp_path, f"train/{apart}/more", count=5)
    train_listing, test_listing = find_files(tmp_path, ("train", "test"), 0.0).values()
    assert train_listing.classes == test_listing.classes == [composed, "tea"]
    assert {name for _, name in test_listing.files} == {composed, "tea"} and len(train_listing.files) == 11


def test_names_of_every_script_are_classes(tmp_path):
    names = ["می‌خواهم", "क्‍ष", "👩‍👩‍👧", "a\u00a0b", "猫", "IMG\u202f5"]  # ZWNJ, ZWJ, no-break spaces
    assert classes(some(tmp_path, *names, count=9)) == sorted(names)


@pytest.mark.parametrize("name", ["dog\x1b[2J", "dog\u202e"])
def test_class_names_with_control_characters_are_refused(tmp_path, name):
    some(tmp_path, "cat", name)
    with pytest.raises(DataError, match=r"class 'dog\\(x1b\[2J|u202e)' has control characters in its name"):
        datasets.load(str(tmp_path))


def test_label_files_of_every_editor_are_read(tmp_path):
    some(tmp_path, "a_image", count=4)
    labels = tmp_path / "a_label"
    labels.mkdir()
    for number, content in enumerate((b"\xef\xbb\xbfcat\r\n", "cat".encode("utf-16"), b"dog", "👩‍👧".encode())):
        (labels / f"{number}.txt").write_bytes(content)
    assert classes(tmp_path, "whole") == ["cat", "dog", "👩‍👧"]


# ---- links, pipes, and what is left out ----


@LINKS
def test_folders_behind_links_are_searched(tmp_path):
    some(tmp_path / "elsewhere", "red", "blue")
    some(tmp_path / "data", "train/red", "train/blue", "test/red")
    for colour in ("red", "blue"):
        (tmp_path / "data" / "train" / colour / "more").symlink_to(tmp_path / "elsewhere" / colour)
    (tmp_path / "data" / "train" / "green").symlink_to(tmp_path / "elsewhere" / "red")  # which is red already
    listing = find_files(tmp_path / "data", ["train"], 0.0)["train"]
    assert listing.classes == ["blue", "green", "red"]
    assert len(listing.files) == 12


@LINKS
def test_links_in_circles_end(tmp_path, capsys):
    some(tmp_path / "photos", "cat", "dog", count=10)
    cat = tmp_path / "photos" / "cat"
    for name, target in (("again", "../cat"), ("twice", "../cat"), ("other", "../dog"), ("up", ".."), ("top", "../..")):
        (cat / name).symlink_to(target, target_is_directory=True)
    (tmp_path / "photos" / "dog" / "back").symlink_to("../cat/other/back", target_is_directory=True)
    (tmp_path / "other").mkdir()
    touch(tmp_path, "other/1.jpg")
    names = found(tmp_path / "photos")
    assert len(names["train"] | names["test"]) == 20 and not names["train"] & names["test"]
    assert all(name.count("/") == 1 for name in names["train"] | names["test"])
    assert len(list_pictures(tmp_path / "photos")) == 20
    assert "left out: " in capsys.readouterr().err


@LINKS
def test_a_file_of_two_names_is_one_picture(tmp_path, capsys):
    some(tmp_path, "cat", "dog", count=10)
    (tmp_path / "cat" / "0 link.jpg").symlink_to("5.jpg")  # its name comes first, but the file's own name stays
    os.link(tmp_path / "cat" / "1.jpg", tmp_path / "dog" / "second.jpg")
    names = found(tmp_path)
    assert {"cat/5.jpg", "cat/1.jpg"} < names["train"] | names["test"] and len(names["train"] | names["test"]) == 20
    assert "second names of files (2)" in capsys.readouterr().err


@LINKS
def test_splits_that_are_links_to_each_other_share_nothing(tmp_path):
    some(tmp_path, "train/cat", "train/dog", "val/cat", "val/dog")
    (tmp_path / "test").symlink_to("val")
    assert [listing.split for listing in find_files(tmp_path, (), 0.0).values()] == ["train", "val"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes that have names")
def test_pipes_and_devices_are_no_pictures(tmp_path, capsys):
    some(tmp_path, "cat", "dog", count=9)
    os.mkfifo(tmp_path / "cat" / "a.jpg")
    (tmp_path / "cat" / "b.jpg").symlink_to("/dev/zero")
    (tmp_path / "cat" / "c.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "cat" / "d.jpg").symlink_to("d.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "cat" / "e.jpg"))
        names = found(tmp_path)
    assert len(names["train"] | names["test"]) == 18
    assert "left out: pipes or devices (3), broken links (2)" in capsys.readouterr().err


def test_what_is_left_out_is_counted_in_one_line(tmp_path, capsys):
    some(tmp_path, "cat", "dog", "__MACOSX/cat", "cat/@eaDir", "dog/.ipynb_checkpoints", count=9)
    touch(tmp_path, "cat/notes.txt", "dog/list.TXT", "cat/clip.mp4", "cat/.hidden.jpg", "loose.jpg", "README")
    touch(tmp_path, "cat/.DS_Store", "cat/Thumbs.db", "cat/1.jpg.explained.png")
    names = found(tmp_path)
    assert len(names["train"] | names["test"]) == 18
    [line] = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    for what in (".txt (2)", ".mp4", "hidden files", "other files", ".explained.png", "beside the class folders"):
        assert what in line
    for folder in ("__MACOSX", "@eaDir", ".ipynb_checkpoints"):
        assert folder + os.sep in line
    assert "DS_Store" not in line and "Thumbs" not in line and line.startswith(f"{tmp_path}: left out: ")
    (tmp_path / "cat").rename(tmp_path.with_name("plain"))
    list_pictures(tmp_path.with_name("plain"))
    assert capsys.readouterr().err.count("left out") == 1


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a folder that cannot be read")
def test_folders_that_cannot_be_read_are_named(tmp_path, capsys):
    some(tmp_path, "cat", "dog", "cat/secret", count=9)
    (tmp_path / "cat" / "secret").chmod(0)
    names = found(tmp_path)
    assert len(names["train"] | names["test"]) == 18 and "secret/ (Permission denied)" in capsys.readouterr().err


def test_val_serves_as_test_and_hidden_files_are_left_out(tmp_path):
    for place in ("train/a", "train/b", "val/a", "val/b"):
        touch(tmp_path, f"{place}/one.PNG", f"{place}/.hidden.png", f"{place}/notes.txt")
    listings = find_files(tmp_path, ("train", "test"), 0.0)
    assert [len(listing.files) for listing in listings.values()] == [2, 2]


def test_every_usual_ending_is_found(tmp_path):
    endings = "jpg JPEG Jpe jfif png PNG bmp gif webp tif TIFF avif jp2 heic HEIF".split()
    touch(tmp_path, *(f"{name}/{number}.{ending}" for name in ("cat", "dog") for number, ending in enumerate(endings)))
    touch(tmp_path, "cat/jpg", "cat/a.jpg.txt", "cat/b.svg")
    assert len(list_pictures(tmp_path)) == 2 * len(endings)


def test_nothing_that_we_write_is_read_as_data(tmp_path, colour_folder, colour_run):
    photos = tmp_path / "photos"
    shutil.copytree(colour_folder / "train", photos)
    before = found(photos)
    assert predict.cli([str(photos / "red"), "--show", "--checkpoint", str(colour_run / "best.pt")]) == 0
    flags = "--epochs 1 --batch-size 20 --device cpu --limit 30 --embedding --run-name a --log-dir"
    assert train.cli(["--data", str(photos), *flags.split(), str(photos / "logs")]) == 0
    datasets.main(["--data", str(photos), "--log-dir", str(photos / "samples")])
    assert list((photos / "red").glob("*.explained.png")) and list(photos.glob("logs/a/**/*.png"))
    assert found(photos) == before
    assert len(list_pictures(photos)) == 60

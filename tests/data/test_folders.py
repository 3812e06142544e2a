"""Reading folders of pictures: right labels, bad files."""

import zlib

import pytest
import torch
from conftest import COLOURS, noisy

import datasets
import predict
import train
from quick.data.pictures import Pictures, denormalize
from quick.errors import DataError


def make(root, names: list[str], start: int = 0) -> None:
    """Picture files of these relative names; the colour is that of the class in the name."""
    for number, name in enumerate(names, start):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        colour = next((COLOURS[colour] for colour in COLOURS if colour in name), (128, 128, 128))
        kind = {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF"}.get(name.rsplit(".", 1)[1].lower())
        noisy(colour, number, (40, 32)).save(root / name, kind or name.rsplit(".", 1)[1].upper())


def rightly_coloured(pictures: Pictures) -> bool:
    colours = torch.tensor([COLOURS[name] for name in pictures.classes])
    batches = pictures.batches(50)
    images = torch.cat([denormalize(batch.images, pictures.mean, pictures.std) for batch in batches])
    return bool((images.float().mean((2, 3)).argmax(1) == colours.argmax(1)[pictures.labels]).all())


# ---- labels ----


def test_a_folder_gives_pictures_with_their_labels(colour_folder):
    train_set, test_set = datasets.load(str(colour_folder))
    assert (len(train_set), len(test_set)) == (60, 18)
    assert train_set.classes == sorted(COLOURS)
    for image, label in zip(train_set.store.images, train_set.labels, strict=True):
        colour = image.float().mean((1, 2))
        assert colour.argmax() == torch.tensor(COLOURS[train_set.classes[label]]).argmax()


def test_a_folders_order_is_mixed_and_fixed(colour_folder):
    first, again = (datasets.load(str(colour_folder))[0].labels.tolist() for _ in range(2))
    assert first == again
    assert first != sorted(first) and len(set(first[:10])) == 3


def test_a_folder_without_splits_trains_and_evaluates(tmp_path, capsys):
    make(tmp_path / "data", [f"{colour}/{number}.png" for colour in ("red", "blue") for number in range(20)])
    flags = "--epochs 8 --batch-size 8 --device cpu --no-views --run-name a --val-fraction 0.3 --log-dir".split()
    assert train.cli(["--data", str(tmp_path / "data"), *flags, str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "(chosen on the val pictures)" in out and " val loss " in out
    assert predict.cli(["--evaluate", str(tmp_path / "data"), "--checkpoint", str(tmp_path / "a" / "best.pt")]) == 0
    held_out = len(datasets.load(str(tmp_path / "data"), val_fraction=0.3)[1])
    assert f"{held_out} val pictures" in capsys.readouterr().out.splitlines()[0]


def test_labels_apart_from_pictures(tmp_path):
    for split, numbers in (("train", range(6)), ("val", range(2))):
        for colour in ("red", "blue"):
            make(tmp_path, [f"{split}/{colour}s_image/{number}.jpg" for number in numbers])
            (tmp_path / split / f"{colour}s_label").mkdir()
            for number in numbers:
                (tmp_path / split / f"{colour}s_label" / f"{number}.txt").write_text(f"{colour}\n")
    train_set, test_set = datasets.load(str(tmp_path))
    assert train_set.classes == ["blue", "red"] and (len(train_set), len(test_set)) == (12, 4)
    assert rightly_coloured(train_set) and rightly_coloured(test_set)


def test_pictures_of_the_same_stem_share_a_label(tmp_path):
    make(
        tmp_path,
        ["train/a_image/red.png", "train/a_image/red.jpg", "train/blue/1.png", "test/red/1.png", "test/blue/1.png"],
    )
    (tmp_path / "train" / "a_label").mkdir()
    (tmp_path / "train" / "a_label" / "red.txt").write_text("red")
    assert torch.bincount(datasets.load(str(tmp_path))[0].labels).tolist() == [1, 2]


def test_what_is_wrong_with_labels_is_named(tmp_path, capsys):
    make(tmp_path, [f"train/a_image/red{number}.png" for number in range(4)])
    make(tmp_path, [f"train/blue/{number}.png" for number in range(2)])  # both layouts, side by side
    make(tmp_path, ["test/red/1.png", "test/blue/1.png"])
    labels = tmp_path / "train" / "a_label"
    labels.mkdir()
    for name, content in (("red0", b"red"), ("red1", b""), ("red2", b"\xff\xfd"), ("red9", b"red")):
        (labels / f"{name}.txt").write_bytes(content)
    train_set, _ = datasets.load(str(tmp_path))
    assert len(train_set) == 3
    lines = sorted(line.removeprefix(f"left out: {tmp_path}/train/") for line in capsys.readouterr().err.splitlines())
    assert lines[0] == "a_image/red1.png: its label file holds no class name"
    assert lines[1].startswith("a_image/red2.png: no label: ") and lines[2].startswith("a_image/red3.png: no label: ")
    assert lines[3:] == ["a_label/red9.txt: label without a picture"]


def test_every_ending_and_name(tmp_path):
    odd = ["a.jpg", "b.JPEG", "c.Png", "d.bmp", "e.gif", "f.webp", "g.tif", "h.TIFF", "ä 猫 .png", "deep/er/i.png"]
    make(tmp_path, [f"train/red/{name}" for name in odd] + [f"train/blue 猫/{name}" for name in odd])
    make(tmp_path, ["test/red/1.png", "test/blue 猫/1.png", "train/red/.hidden.png", "train/red/.dir/1.png"])
    (tmp_path / "train" / "red" / "notes.txt").write_text("no picture")
    (tmp_path / "train" / ".cache").mkdir()
    train_set, test_set = datasets.load(str(tmp_path))
    assert (len(train_set), len(test_set)) == (20, 2) and train_set.classes == ["blue 猫", "red"]  # ---- bad files ----


@pytest.fixture
def spoiled(tmp_path):
    """A folder of 12 good pictures and, in training, four bad ones."""
    make(
        tmp_path,
        [f"{split}/{colour}/{n}.png" for split in ("train", "test") for colour in ("red", "blue") for n in "123"],
    )
    red = tmp_path / "train" / "red"
    (red / "empty.png").write_bytes(b"")
    (red / "text.jpg").write_text("hello")
    (red / "cut.png").write_bytes((red / "1.png").read_bytes()[:900])
    header = (red / "1.png").read_bytes()[:16] + (30000).to_bytes(4) * 2 + (red / "1.png").read_bytes()[24:29]
    (red / "bomb.png").write_bytes(header + zlib.crc32(header[12:]).to_bytes(4) + (red / "1.png").read_bytes()[33:])
    return tmp_path


@pytest.mark.parametrize("memory_share", [0.4, 0.0])
def test_bad_files_are_named_and_left_out(spoiled, memory_share, capsys):
    train_set, test_set = datasets.load(str(spoiled), memory_share=memory_share)
    assert (len(train_set), len(test_set)) == (6, 6) and rightly_coloured(train_set)
    lines = sorted(
        line.removeprefix(f"left out: {spoiled}/train/red/") for line in capsys.readouterr().err.splitlines()
    )
    assert lines[1].startswith("cut.png: ") and lines[2:] == [
        "empty.png: empty file",
        "text.jpg: not a picture that Pillow can read",
    ]
    assert lines[0].startswith("bomb.png: ") and "exceeds limit" in lines[0]


def test_strict_stops_at_bad_files(spoiled, tmp_path, capsys):
    assert train.cli(["--data", str(spoiled), "--strict", "--epochs", "1", "--log-dir", str(tmp_path / "logs")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "(and 3 more bad files)" in error and not (tmp_path / "logs").exists()


def test_classes_without_pictures_are_named(spoiled):
    for path in (spoiled / "train" / "blue").iterdir():
        path.write_text("hello")
    with pytest.raises(DataError, match="class 'blue' has no readable training pictures"):
        datasets.load(str(spoiled))


def test_a_test_set_without_readable_pictures_is_named(spoiled):
    for path in (spoiled / "test").glob("*/*.png"):
        path.write_text("hello")
    with pytest.raises(DataError, match="no readable test pictures"):
        datasets.load(str(spoiled))


def test_many_bad_files_are_summed_up(tmp_path, capsys):
    make(
        tmp_path,
        [f"{split}/{colour}/{n}.png" for split in ("train", "test") for colour in ("red", "blue") for n in "123"],
    )
    for number in range(30):
        (tmp_path / "train" / "red" / f"bad{number}.png").write_text("hello")
    datasets.load(str(tmp_path))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21 and lines[-1] == "left out: 10 more files"


def test_names_of_bad_files_do_not_steer_the_terminal(tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(3):
            noisy((90, 90, 90), number).save(tmp_path / name / f"{number}.png")
    (tmp_path / "cat" / "x\x1b[2J.png").write_bytes(b"")
    datasets.load(str(tmp_path))
    assert r"x\x1b[2J.png: " in (err := capsys.readouterr().err) and err.replace("\n", "").isprintable()

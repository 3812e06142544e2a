"""Folders of pictures: their layouts, their bad files, and the way of those that do not fit into memory."""

import os
import shutil
import unicodedata
import zlib

import numpy as np
import pytest
import torch
from conftest import COLOURS, noisy
from PIL import Image

import datasets
import predict
import train
from datasets import Augment, DataError


def make(root, names: list[str], start: int = 0) -> None:
    """Picture files of these relative names; the colour is that of the class in the name."""
    for number, name in enumerate(names, start):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        colour = next((COLOURS[colour] for colour in COLOURS if colour in name), (128, 128, 128))
        kind = {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF"}.get(name.rsplit(".", 1)[1].lower())
        noisy(colour, number, (40, 32)).save(root / name, kind or name.rsplit(".", 1)[1].upper())


def names(pictures: datasets.Pictures, root) -> set[str]:
    return {str(path.relative_to(root)) for path in map(datasets.Path, map(datasets.os.fsdecode, pictures.paths))}


def rightly_coloured(pictures: datasets.Pictures) -> bool:
    colours = torch.tensor([COLOURS[name] for name in pictures.classes])
    images = torch.cat([datasets.denormalize(x, pictures.mean, pictures.std) for x, _ in pictures.batches(50)])
    return bool((images.float().mean((2, 3)).argmax(1) == colours.argmax(1)[pictures.labels]).all())


# ---- layouts ----


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
    for name, content in (("red0", b"red"), ("red1", b""), ("red2", b"\xff\xfe"), ("red9", b"red")):
        (labels / f"{name}.txt").write_bytes(content)
    train_set, _ = datasets.load(str(tmp_path))
    assert len(train_set) == 3
    lines = sorted(line.removeprefix(f"left out: {tmp_path}/train/") for line in capsys.readouterr().err.splitlines())
    assert lines[0] == "a_image/red1.png: its label file holds no class name"
    assert lines[1].startswith("a_image/red2.png: no label: ") and lines[2].startswith("a_image/red3.png: no label: ")
    assert lines[3:] == ["a_label/red9.txt: label without a picture"]


def test_a_folder_without_splits_keeps_its_split_when_files_are_added(tmp_path):
    make(tmp_path, [f"{colour}/{number}.png" for colour in ("red", "blue") for number in range(40)])
    train_set, val_set = datasets.load(str(tmp_path))
    assert val_set.split == "val" and len(train_set) + len(val_set) == 80 and 6 <= len(val_set) <= 28
    first = names(train_set, tmp_path), names(val_set, tmp_path)
    assert not first[0] & first[1] and rightly_coloured(train_set)
    make(tmp_path, [f"red/new{number}.png" for number in range(20)], start=100)
    train_set, val_set = datasets.load(str(tmp_path))
    assert first[0] <= names(train_set, tmp_path) and first[1] <= names(val_set, tmp_path)
    shutil.copytree(tmp_path, tmp_path.with_name("elsewhere"))
    moved = datasets.load(str(tmp_path.with_name("elsewhere")))[1]
    assert names(moved, tmp_path.with_name("elsewhere")) == names(val_set, tmp_path)
    assert len(datasets.load(str(tmp_path), val_fraction=0.6)[1]) > len(val_set) * 2


def test_the_split_is_the_same_however_a_system_writes_names(tmp_path):
    forms = [unicodedata.normalize(form, f"{tmp_path}/grün/é.png") for form in ("NFC", "NFD")]  # NFD: macOS
    assert forms[0] != forms[1] and len({datasets.place_of(path, tmp_path) for path in forms}) == 1


def test_single_pictures_cannot_be_split(tmp_path):
    make(tmp_path, ["red/1.png", "blue/1.png"])
    with pytest.raises(DataError, match="one picture a class; put at least two into each, one of which is held out"):
        datasets.load(str(tmp_path))


def test_small_classes_without_splits_have_pictures_on_both_sides(tmp_path):
    make(tmp_path, [f"{colour}/{number}.png" for colour in COLOURS for number in range(2)])
    for fraction in (0.01, 0.99):
        sets = datasets.load(str(tmp_path), val_fraction=fraction)
        assert all(torch.bincount(pictures.labels).tolist() == [1, 1, 1] for pictures in sets)


def test_a_folder_without_splits_trains_and_evaluates(tmp_path, capsys):
    make(tmp_path / "data", [f"{colour}/{number}.png" for colour in ("red", "blue") for number in range(20)])
    flags = "--epochs 8 --batch-size 8 --device cpu --no-views --run-name a --val-fraction 0.3 --log-dir".split()
    assert train.cli(["--data", str(tmp_path / "data"), *flags, str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "(chosen on the val pictures)" in out and " val loss " in out
    assert predict.cli(["--evaluate", str(tmp_path / "data"), "--checkpoint", str(tmp_path / "a" / "best.pt")]) == 0
    held_out = len(datasets.load(str(tmp_path / "data"), val_fraction=0.3)[1])
    assert f"{held_out} test pictures" in capsys.readouterr().out.splitlines()[0]


def test_every_ending_and_name(tmp_path):
    odd = ["a.jpg", "b.JPEG", "c.Png", "d.bmp", "e.gif", "f.webp", "g.tif", "h.TIFF", "ä 猫 .png", "deep/er/i.png"]
    make(tmp_path, [f"train/red/{name}" for name in odd] + [f"train/blue 猫/{name}" for name in odd])
    make(tmp_path, ["test/red/1.png", "test/blue 猫/1.png", "train/red/.hidden.png", "train/red/.dir/1.png"])
    (tmp_path / "train" / "red" / "notes.txt").write_text("no picture")
    (tmp_path / "train" / ".cache").mkdir()
    train_set, test_set = datasets.load(str(tmp_path))
    assert (len(train_set), len(test_set)) == (20, 2) and train_set.classes == ["blue 猫", "red"]


@pytest.mark.skipif(os.name == "nt", reason="Windows lets few users make links")
def test_folders_behind_links_are_searched(tmp_path):
    make(tmp_path / "elsewhere", ["red/1.png", "blue/1.png"])
    make(tmp_path / "data", ["train/red/0.png", "train/blue/0.png", "test/red/0.png"])
    for colour in ("red", "blue"):
        (tmp_path / "data" / "train" / colour / "more").symlink_to(tmp_path / "elsewhere" / colour)
    assert torch.bincount(datasets.load(str(tmp_path / "data"))[0].labels).tolist() == [2, 2]


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    for kind in ("gif", "webp", "png", "tif"):
        frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], duration=100, lossless=True)
        picture, _ = datasets.read_picture(tmp_path / f"a.{kind}", datasets.Sizing(32))
        assert np.abs(picture[16, 16].astype(int) - (255, 0, 0)).max() <= 2, kind


# ---- bad files ----


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


# ---- shapes of pictures, and streaming ----


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of 46 JPEG photographs of all shapes: wide, tall, square, small and large."""
    root, random = tmp_path_factory.mktemp("photographs"), np.random.RandomState(0)
    for split, count in (("train", 17), ("test", 6)):
        for name in ("red", "blue"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                size = [(90, 60), (60, 90), (50, 50), (200, 41), (20, 25)][number % 5]
                pixels = random.randint(0, 256, (5, 5, 3)).astype(np.uint8)
                image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
                image.save(root / split / name / f"{number}.jpg", quality=95)
    return root


AUGMENT = Augment(flip=True, crop=2, cutout=8, jitter=0.3, resized_crop=0.4)


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_are_those_from_memory(photographs, workers):
    kept, _ = datasets.load(str(photographs))
    streamed, streamed_test = datasets.load(str(photographs), memory_share=0, workers=workers)
    assert isinstance(streamed, datasets.Streamed) and not isinstance(kept, datasets.Streamed)
    assert isinstance(streamed_test, datasets.Streamed) and streamed.images.numel() == 0
    assert (kept.mean, kept.std, kept.file_sizes) == (streamed.mean, streamed.std, streamed.file_sizes)
    for epoch in (1, 2, 3):
        how = {"shuffle": True, "augment": AUGMENT, "seed": 4, "epoch": epoch}
        pairs = zip(kept.batches(8, **how), streamed.batches(8, **how), strict=True)
        for (images, labels), (same_images, same_labels) in pairs:
            assert torch.equal(images, same_images) and torch.equal(labels, same_labels)
        next(streamed.batches(8, shuffle=True))  # an epoch that is left early does no harm


def test_the_mean_is_of_what_is_used_of_long_pictures(photographs):
    train_set, _ = datasets.load(str(photographs))
    assert train_set.extent.min() < train_set.images.shape[3]
    used = [image[..., :extent].flatten(1) for image, extent in zip(train_set.images, train_set.extent, strict=True)]
    pixels = torch.cat(used, 1).double() / 255
    assert train_set.mean == pytest.approx(pixels.mean(1).tolist(), abs=1e-4)
    assert train_set.std == pytest.approx(pixels.std(1, correction=0).tolist(), abs=1e-4)


def test_streamed_runs_end_with_the_same_bits(photographs, tmp_path):
    from conftest import same_weights

    for name, share in (("kept", "0.4"), ("streamed", "0")):
        flags = f"--epochs 2 --batch-size 8 --device cpu --no-views --memory-share {share} --run-name {name} --log-dir"
        assert train.cli(["--data", str(photographs), "--val-fraction", "0.3", *flags.split(), str(tmp_path)]) == 0
    assert same_weights(tmp_path / "kept" / "epoch_002.pt", tmp_path / "streamed" / "epoch_002.pt")


def test_training_sees_all_of_a_long_picture_and_evaluation_its_centre(tmp_path):
    ramp = Image.fromarray(np.tile(np.arange(0, 200, 2, dtype=np.uint8), (50, 1)))  # 100 x 50, darker to the left
    for split in ("train", "test"):
        for name, image in (("wide", ramp), ("tall", ramp.transpose(Image.Transpose.ROTATE_90))):
            (tmp_path / split / name).mkdir(parents=True)
            image.save(tmp_path / split / name / "1.png")
    train_set, test_set = datasets.load(str(tmp_path), mean=(0, 0, 0), std=(1, 1, 1))
    assert train_set.images.shape == (2, 3, 32, 64) and test_set.images.shape == (2, 3, 32, 32)
    wide, tall = train_set.classes.index("wide"), train_set.classes.index("tall")
    seen = {wide: [], tall: []}
    for epoch in range(40):
        images, labels = next(train_set.batches(2, augment=Augment(), epoch=epoch))
        for image, label in zip(255 * images, labels.tolist(), strict=True):
            along = image[0].mean(0 if label == wide else 1)
            assert abs(abs(along[-1] - along[0]) - 31 * 200 / 64) < 4  # turned upright: the ramp runs along its side
            seen[label].append(float(along.mean()))
    for places in seen.values():
        assert min(places) < 65 and max(places) > 130
    centre, _ = next(test_set.batches(2))
    assert (255 * centre).mean((1, 2, 3)).tolist() == pytest.approx([99, 99], abs=2)
    plain, _ = next(train_set.batches(2))
    assert (255 * plain).mean((1, 2, 3)).tolist() == pytest.approx([99, 99], abs=3)


def test_a_file_that_vanishes_while_streaming_is_named(photographs, tmp_path):
    shutil.copytree(photographs, tmp_path / "p")
    train_set, _ = datasets.load(str(tmp_path / "p"), memory_share=0, workers=0)
    (tmp_path / "p" / "train" / "red" / "3.jpg").unlink()
    with pytest.raises(DataError, match=r"3\.jpg: No such file or directory"):
        list(train_set.batches(8))


def test_memory_decides_what_is_streamed(photographs, monkeypatch):
    monkeypatch.setattr(datasets, "free_memory", lambda _: 34 * 32 * 64 * 3 / 0.4)
    assert not isinstance(datasets.load(str(photographs))[0], datasets.Streamed)
    monkeypatch.setattr(datasets, "free_memory", lambda _: 34 * 32 * 64 * 3 / 0.4 - 10)
    assert isinstance(datasets.load(str(photographs))[0], datasets.Streamed)
    assert datasets.describe(datasets.load(str(photographs), memory_share=0)).count("streamed from the files") == 1


def test_free_memory_is_plausible():
    free = datasets.free_memory(torch.device("cpu"))
    assert 2**20 < free < 2**50
    if hasattr(os, "sysconf"):
        built_in = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert built_in / 500 < free <= built_in


def test_copies_of_training_pictures_in_the_test_set_are_found(colour_folder, tmp_path):
    shutil.copytree(colour_folder, tmp_path / "c")
    for number, path in enumerate((tmp_path / "c" / "test").glob("*/*.png")):
        noisy((128, 128, 128), 900 + number).save(path)
    assert datasets.duplicates(*datasets.load(str(tmp_path / "c"))) == []
    copy = tmp_path / "c" / "test" / "red" / "copy.png"
    shutil.copy(tmp_path / "c" / "train" / "blue" / "07.png", copy)
    pairs = datasets.duplicates(*datasets.load(str(tmp_path / "c")))
    assert pairs == [(str(copy), str(tmp_path / "c" / "train" / "blue" / "07.png"))]


def test_class_names_with_control_characters_are_refused(tmp_path):
    for name in ("cat", "dog\x1b[2J"):
        (tmp_path / name).mkdir()
        for number in range(3):
            noisy((90, 90, 90), number).save(tmp_path / name / f"{number}.png")
    with pytest.raises(datasets.DataError, match=r"class 'dog\\x1b\[2J' has control characters in its name"):
        datasets.load(str(tmp_path))


def test_names_of_bad_files_do_not_steer_the_terminal(tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(3):
            noisy((90, 90, 90), number).save(tmp_path / name / f"{number}.png")
    (tmp_path / "cat" / "x\x1b[2J.png").write_bytes(b"")
    datasets.load(str(tmp_path))
    assert r"x\x1b[2J.png: " in (err := capsys.readouterr().err) and err[:-1].isprintable()

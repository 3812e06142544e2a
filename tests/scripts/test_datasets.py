"""`load()`, and the doctor as a command."""

import io
import shutil

import numpy as np
import pytest
import torch
from conftest import noisy
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import datasets
from quick.cli import quoted
from quick.data import doctor
from quick.data.augment import Augment
from quick.data.pictures import denormalize
from quick.errors import DataError, LimitError
from quick.run.settings import Config
from quick.views import drawing

# ---- load ----


def test_limit_takes_even_classes(colour_folder):
    train_set, test_set = datasets.load(str(colour_folder), limit=6)
    assert torch.bincount(train_set.labels).tolist() == torch.bincount(test_set.labels).tolist() == [2, 2, 2]
    with pytest.raises(LimitError, match="limit 2 is below the number of classes, 3"):
        datasets.load(str(colour_folder), limit=2)


def test_pictures_of_another_size_are_resized(colour_folder):
    assert datasets.load(str(colour_folder), image_size=16)[0].store.images.shape == (60, 3, 16, 16)
    assert datasets.load("shapes", image_size=24, limit=10)[0].store.images.shape == (10, 3, 24, 24)


def test_given_mean_and_std_are_kept(colour_folder):
    train_set, test_set = datasets.load(str(colour_folder), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    assert train_set.mean == test_set.mean == (0.5, 0.4, 0.3) and test_set.std == (0.2, 0.2, 0.1)


def test_all_sets_are_normalised_by_the_first(tmp_path):
    for split, brightness in (("train", 60), ("test", 200)):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            noisy((brightness,) * 3, 0).save(tmp_path / split / name / "1.png")
    train_set, test_set = datasets.load(str(tmp_path))
    assert test_set.mean == train_set.mean == pytest.approx((60 / 255,) * 3, abs=0.01)
    assert test_set.std == train_set.std and next(test_set.batches(2)).images.min() > 3


def test_every_setting_of_the_data_is_heeded(colour_folder):
    how = {"image_size": 20, "resize": 30, "interpolation": "bicubic", "fit": "crop", "limit": 12}
    how |= {"mean": (0.1, 0.2, 0.3), "std": (0.2, 0.3, 0.4)}
    found = datasets.load_sets(Config(data=str(colour_folder), **how))
    for pictures, expected in zip(found, datasets.load(str(colour_folder), **how), strict=True):
        assert torch.equal(pictures.store.images, expected.store.images)
        assert torch.equal(pictures.labels, expected.labels)
        assert (pictures.mean, pictures.std) == (expected.mean, expected.std)
    plain = datasets.load(str(colour_folder), **how | {"resize": 20})[0]
    assert not torch.equal(found[0].store.images, plain.store.images)


def test_copies_of_training_pictures_in_the_test_set_are_found(colour_folder, tmp_path):
    shutil.copytree(colour_folder, tmp_path / "c")
    for number, path in enumerate((tmp_path / "c" / "test").glob("*/*.png")):
        noisy((128, 128, 128), 900 + number).save(path)
    assert doctor.duplicates(*datasets.load(str(tmp_path / "c"))) == []
    copy = tmp_path / "c" / "test" / "red" / "copy.png"
    shutil.copy(tmp_path / "c" / "train" / "blue" / "07.png", copy)
    pairs = doctor.duplicates(*datasets.load(str(tmp_path / "c")))
    assert pairs == [(str(copy), str(tmp_path / "c" / "train" / "blue" / "07.png"))]


@pytest.mark.parametrize(("share", "fit"), [(0.4, "crop"), (0, "crop"), (0.4, "pad")])
def test_pictures_with_nothing_on_them_are_counted(share, fit, tmp_path, capsys):
    random = np.random.RandomState(0)
    for split, count in (("train", 20), ("test", 5)):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (50, 40), [(3, 2, 3), (250, 251, 250), (200, 30, 30), (3, 2, 3)][number % 4])
                if number >= 12:
                    image = Image.fromarray(random.randint(0, 256, (40, 50, 3), dtype=np.uint8))
                image.save(tmp_path / split / name / f"{number:02}.png")
    sets = datasets.load(str(tmp_path), memory_share=share, workers=0, fit=fit)
    assert "most train" not in capsys.readouterr().err
    lines = [line.partition(", first ") for line in datasets.describe(sets).splitlines() if line.startswith("flat")]
    found = {line.removeprefix("flat      "): path for line, _, path in lines}
    counts = {"nearly black": (12, 6), "nearly white": (6, 2), "of one colour": (6, 2)}
    assert set(found) == {
        f"{count} {split} pictures are {what}"
        for what, of_sets in counts.items()
        for split, count in zip(("train", "test"), of_sets, strict=True)
    }
    assert found["6 train pictures are nearly white"].endswith(("01.png", "05.png", "09.png"))


def test_a_set_of_which_most_is_empty_is_named_when_it_is_read(tmp_path, capsys):
    for name, level in (("a", 0), ("b", 4)):
        (tmp_path / name).mkdir()
        for number in range(9):
            Image.new("L", (40, 40), level).save(tmp_path / name / f"{number}.png")
    datasets.load(str(tmp_path))
    said = capsys.readouterr().err
    assert "most train pictures are nearly black, " in said and "python datasets.py" in said


# ---- the script ----


def test_the_script_describes_a_folder(colour_folder, capsys):
    datasets.main(["--data", str(colour_folder)])
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["class", "train", "test"]
    assert out.splitlines()[4].split() == ["total", "60", "18"]
    assert "files     32 x 32 pixels" in out and "bad       0 files" in out and "memory    0.2 MB" in out
    assert "copies    18 test pictures are in train too, first " in out
    mean = datasets.load(str(colour_folder))[0].mean
    assert f"mean = [{mean[0]:.4f}, {mean[1]:.4f}, {mean[2]:.4f}]" in out


def test_the_script_counts_what_is_held_out_once(colour_folder, capsys):
    datasets.main(["--data", str(colour_folder), "--val-fraction", "0.2"])
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["class", "train", "val", "test"]
    assert out.splitlines()[4].split() == ["total", "51", "9", "18"]  # by the files' names
    assert "memory    0.2 MB" in out and "copies    0 val pictures are in train too\n" in out
    datasets.main("--data shapes --limit 50 --val-fraction 0.2".split())
    out = capsys.readouterr().out
    assert "memory    0.3 MB" in out and "copies    0 val pictures are in train too\n" in out


def test_the_script_shows_samples_in_tensorboard(colour_folder, tmp_path, capsys):
    datasets.main(["--data", str(colour_folder), "--log-dir", str(tmp_path)])
    *_, command, address = capsys.readouterr().out.splitlines()
    assert (command, address) == (f"next: tensorboard --logdir {quoted(tmp_path)}", "then open http://localhost:6006")
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == ["samples/1 before augmentation", "samples/2 after augmentation"]
    before = Image.open(io.BytesIO(events.Images("samples/1 before augmentation")[0].encoded_image_string))
    picture = datasets.load(str(colour_folder))[0].store.images[0].permute(1, 2, 0)
    assert np.array_equal(np.asarray(before)[4:100, 4:100][::3, ::3], picture)


def test_the_script_shows_the_augmentation_of_a_config(colour_folder, tmp_path):
    def pages(name: str, content: str, *flags: str) -> list[bytes]:
        (tmp_path / "config.toml").write_text(f"data = {str(colour_folder)!r}\n{content}")
        datasets.main(["--config", str(tmp_path / "config.toml"), "--log-dir", str(tmp_path / name), *flags])
        events = EventAccumulator(str(tmp_path / name)).Reload()
        return [events.Images(tag)[0].encoded_image_string for tag in events.Tags()["images"]]

    before, after = pages("nothing", "")
    assert before == after
    before_cutout, cutout = pages("cutout", "cutout = 20")
    assert before_cutout == before != cutout
    assert pages("flag", "cutout = 20", "--cutout", "0") == [before, before]


def test_the_samples_are_those_of_the_first_epoch(colour_folder, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(drawing, "samples", lambda images, *_: shown.append(images) or np.zeros((8, 8, 3), np.uint8))
    flags = ["--cutout", "12", "--no-flip", "--crop", "0"]
    datasets.main(["--data", str(colour_folder), "--log-dir", str(tmp_path), *flags])
    train_set = datasets.load(str(colour_folder))[0]
    batch = next(train_set.batches(16, augment=Augment(cutout=12), epoch=1))
    assert torch.equal(shown[1], denormalize(batch.images, train_set.mean, train_set.std))


def test_splits_that_do_not_exist_are_named(tmp_path):
    for name in ("red", "blue"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(b"")
    for data, message in (
        ("shapes", "shapes has the splits train and test, not val"),
        (str(tmp_path), "only these two"),
    ):
        with pytest.raises(DataError, match=message):
            datasets.load(data, splits=["val"])


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        ("--data nowhere", 1, "no data 'nowhere'"),
        (f"--data {__file__}", 1, "where a folder of pictures is wanted; if it is an archive, unpack it first"),
        ("--data shapes --limit 5", 2, "--limit 5 is below the number of classes, 10"),
        ("--data shapes --limit -1", 2, "--limit: -1 is not at least 0"),
        ("--data shapes --jitter nan", 2, "--jitter: nan is not a finite number"),
        ("--data shapes --crop x", 2, "invalid int value"),
        ("--data shapes --crop 33", 2, "--crop and --cutout can be at most the image size, 32 pixels"),
        ("--data shapes --limit 10 --log-dir /dev/null/x", 1, "/dev/null/x: Not a directory"),
    ],
)
def test_the_script_names_mistakes(flags, status, message, capsys):
    assert datasets.cli(flags.split()) == status
    error = capsys.readouterr().err
    assert message in error and error.startswith("datasets.py: ") and error.count("\n") == 1

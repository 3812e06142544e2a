"""Kinds of pixels: transparency, palettes, and those wider than 8 bits, which have one scale for a whole set."""

import io
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import as_bytes, in_two_processes
from PIL import Image

import datasets
import model
import predict
import train
from quick.data.decoding import decode, read_picture
from quick.data.pixels import Values, levels_of
from quick.data.sizing import Sizing
from quick.data.stores import Streamed
from quick.processes import Group


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "PA", "La", "RGBa"])
def test_a_picture_of_any_mode_is_resized_as_its_colours_are(mode):
    """Opaque ones; as torchvision's transforms of the picture in RGB."""
    transforms = pytest.importorskip("torchvision.transforms.v2")
    colours = Image.fromarray(np.random.RandomState(0).randint(0, 256, (60, 90, 3), dtype=np.uint8))
    image = colours.convert("RGBA").convert("RGBa") if mode == "RGBa" else colours
    image = colours.convert("LA").convert("La") if mode == "La" else image if mode == "RGBa" else image.convert(mode)
    plain = image.convert({"La": "LA", "RGBa": "RGBA", "PA": "RGBA"}.get(mode, mode)).convert("RGB")
    expected = np.asarray(transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32)])(plain))
    assert np.abs(read_picture(image, Sizing(32))[0].astype(int) - expected).max() <= 1


def test_half_transparent_pixels_let_white_shine_through():
    pixels = np.random.RandomState(0).randint(0, 256, (60, 60, 4), dtype=np.uint8)
    image, white = Image.fromarray(pixels), Image.new("RGBA", (60, 60), "white")
    expected, _ = read_picture(Image.alpha_composite(white, image).convert("RGB"), Sizing(20))
    assert np.abs(read_picture(image, Sizing(20))[0].astype(int) - expected).max() <= 2
    grey = image.convert("LA")
    assert (
        np.abs(
            read_picture(grey, Sizing(60))[0]
            - np.asarray(Image.alpha_composite(white, grey.convert("RGBA")))[..., :3].astype(int)
        ).max()
        <= 2
    )


def test_white_signs_on_a_transparent_ground_can_be_seen():
    sign = Image.new("LA", (40, 40), (255, 0))
    sign.paste((255, 255), (10, 10, 30, 30))
    picture, _ = read_picture(io.BytesIO(as_bytes(sign)), Sizing(40))
    assert (picture[20, 20] == 255).all() and (picture[2, 2] == 0).all()
    black = Image.new("LA", (40, 40), (0, 0))
    black.paste((0, 255), (10, 10, 30, 30))
    picture, _ = read_picture(io.BytesIO(as_bytes(black)), Sizing(40))
    assert (picture[20, 20] == 0).all() and (picture[2, 2] == 255).all()


# ---- pixels wider than 8 bits ----


def wide_picture(dtype: str, most: float, kind: str = "TIFF") -> bytes:
    """A ramp from 0 to `most`, 32 x 32."""
    return as_bytes(Image.fromarray(np.linspace(0, most, 1024).reshape(32, 32).astype(dtype)), kind)


@pytest.mark.parametrize(
    ("dtype", "most", "kind", "levels"),
    [
        ("uint16", 65535, "PNG", None),
        ("uint16", 4095, "PNG", (0, 4095)),
        (">u2", 1023, "TIFF", (0, 1023)),
        ("int32", 65535, "TIFF", None),
        ("int32", 2**31 - 1, "TIFF", None),
        ("int32", 255, "TIFF", (0, 255)),
        ("float32", 1, "TIFF", None),
        ("float32", 255, "TIFF", None),
        ("float32", 60, "TIFF", (0, 60)),
    ],
)
def test_wide_pixels_become_bytes_by_their_levels(dtype, most, kind, levels):
    picture, _, values = decode(io.BytesIO(wide_picture(dtype, most, kind)), Sizing(32, levels=levels))
    expected = np.linspace(0, 255, 1024).reshape(32, 32, 1)
    assert np.abs(picture - expected).max() <= (2 if most < 1024 else 1)
    assert values == (0, pytest.approx(most), dtype != "float32")


def test_what_lies_beyond_the_levels_is_black_or_white_and_no_number_is_black():
    pixels = np.full((32, 32), 5, np.float32)
    pixels[0, :5] = np.nan, np.inf, -np.inf, -900, 3e38
    picture, _, values = decode(Image.fromarray(pixels), Sizing(32, levels=(0, 10)))
    assert picture[0, :6, 0].tolist() == [0, 255, 0, 0, 255, 128]
    assert values.lowest == -900 and values.highest == pytest.approx(3e38)
    assert decode(Image.fromarray(np.full((32, 32), np.nan, np.float32)), Sizing(32))[2] is None


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        ([(0, 17, True), (3, 250, True)], (0, 255)),
        ([(0, 300, True)], (0, 1023)),
        ([(0, 3000, True), (0, 4095, True)], (0, 4095)),
        ([(0, 40_000, True)], (0, 65535)),
        ([(0, 2**31 - 1, True)], (0, 2**31 - 1)),
        ([(-5, 300, True)], (-5, 300)),
        ([(0.1, 0.9, False), (0.2, 0.3, False)], (0, 1)),
        ([(0.1, 0.9, False), (0, 254.0, False)], (0, 255)),
        ([(0.1, 37.5, False), (-3, 300, False)], (-3, 300)),
        ([(0.01, 0.04, False)], (0.01, 0.04)),
        ([(10, 60, False)], (10, 60)),
        ([(280, 280, False)], (280, 281)),
    ],
)
def test_the_levels_of_a_set_are_those_of_its_camera(values, levels):
    assert levels_of([Values(*of_picture) for of_picture in values]) == levels


# ---- sets of them ----


def camera_folder(root: Path, kind: str = "png", dtype: str = "uint16", most: float = 4095) -> Path:
    """Pictures of 12 bits in 16, or of others: two classes that differ in brightness alone."""
    random = np.random.RandomState(0)
    for split, count in (("train", 12), ("test", 6)):
        for name, level in (("dark", 0.3), ("light", 0.6)):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = (level + random.normal(0, 0.05, (30, 36))).clip(0, 1) * most
                if split == "train" and not number:
                    pixels[0, 0] = most
                Image.fromarray(pixels.astype(dtype)).save(root / split / name / f"{number}.{kind}")
    return root


KINDS = {
    "12 bits": ("png", "uint16", 4095, (0, 4095)),
    "fractions": ("tif", "float32", 0.99, (0, 1)),
    "degrees": ("tif", "float32", 60, None),
    "colours": ("png", "uint8", 255, None),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.4, 0])
def test_a_set_has_one_scale(kind, share, tmp_path):
    *how, levels = KINDS[kind]
    sets = datasets.load(str(camera_folder(tmp_path, *how)), memory_share=share, workers=0)
    assert all(isinstance(pictures.store, Streamed) == (not share) for pictures in sets)
    if kind == "degrees":
        levels = sets[0].levels
        assert levels[0] < 60 * 0.3 and levels[1] == 60
    assert [pictures.levels for pictures in sets] == [levels] * 2
    shown = torch.cat([pictures.preview(torch.arange(len(pictures)))[1] for pictures in sets]).float().mean((1, 2, 3))
    labels = torch.cat([pictures.labels for pictures in sets]).bool()
    assert shown[labels].min() > shown[~labels].max() + 50
    assert kind == "degrees" or abs(sets[0].mean[0] - 0.45) < 0.02
    for pictures in sets:
        for number in (0, 7):
            picture, _ = read_picture(os.fsdecode(pictures.paths[number]), Sizing(32, levels=levels))
            same = pictures.preview(torch.tensor([number]))[1][0].permute(1, 2, 0).numpy()
            assert np.abs(picture.astype(int) - same).max() <= 1 and (picture != same).mean() < 0.03  # roundings


def test_levels_can_be_given_or_left_to_the_type(tmp_path):
    camera_folder(tmp_path)
    given, of_type = (datasets.load(str(tmp_path), levels=levels)[0] for levels in ((0, 8191), ()))
    assert given.levels == (0, 8191) and given.mean[0] == pytest.approx(0.45 / 2, abs=0.01)
    assert of_type.levels is None and of_type.mean[0] == pytest.approx(0.45 / 16, abs=0.01)


def test_values_far_beyond_the_levels_of_training_are_told(tmp_path, capsys):
    datasets.load(str(camera_folder(tmp_path / "same", most=1023)))
    assert "beyond" not in capsys.readouterr().err
    camera_folder(tmp_path / "other", most=16383)
    shutil.move(tmp_path / "other" / "test", tmp_path / "same" / "val")  # 14 bits instead of 10
    shutil.rmtree(tmp_path / "same" / "test")
    assert [pictures.levels for pictures in datasets.load(str(tmp_path / "same"))] == [(0, 1023)] * 2
    told = capsys.readouterr().err
    assert re.search(r"most val pictures .* values \d+ to \d+, far beyond the levels 0 to 1023", told)
    assert "most train" not in told


def read_in_a_group(group: Group, folder: Path) -> list:
    train_set, _ = datasets.load(str(folder / "pictures"), group=group)
    return [train_set.levels, train_set.mean, train_set.store.images]


@pytest.mark.expensive
def test_the_processes_of_a_group_find_one_scale(processes, tmp_path):
    alone, _ = datasets.load(str(camera_folder(tmp_path / "pictures", "tif", "float32", 60)))
    for levels, mean, images in in_two_processes(processes, read_in_a_group, tmp_path):
        assert (levels, mean) == (alone.levels, alone.mean) and torch.equal(images, alone.store.images)


def test_a_network_gets_the_scale_that_it_was_trained_with(tmp_path, capsys):
    root = camera_folder(tmp_path / "pictures")
    flags = "--epochs 6 --batch-size 8 --no-flip --crop 0 --no-views --device cpu --run-name".split()
    calls = ["--data", str(root), "--log-dir", str(tmp_path), *flags]
    assert train.cli([*calls, "first"]) == 0
    best = tmp_path / "first" / "best.pt"
    network, checkpoint = model.load(best)
    assert checkpoint["levels"] == [0, 4095] and checkpoint["config"]["levels"] == [0, 4095]
    assert predict.sizing(checkpoint).levels == (0, 4095)
    other = camera_folder(tmp_path / "other", most=3000)  # whose own scale happens to be the same
    result = predict.evaluate(str(other), "", network, checkpoint, tmp_path / "best.pt")
    names = sorted((other / "test").glob("*/*.png"))
    answers = [predict.classify(name, (network, checkpoint))[0][0] == name.parent.name for name in names]
    assert result["pictures"] == len(names) and result[
        "test_accuracy" if "test_accuracy" in result else "accuracy"
    ] == np.mean(answers)
    assert train.cli([*calls, "second", "--epochs", "1", "--weights", str(best)]) == 0
    assert model.load(tmp_path / "second" / "best.pt")[1]["levels"] == [0, 4095]
    assert train.cli(["--resume", str(tmp_path / "first"), "--epochs", "7"]) == 0
    capsys.readouterr()
    assert model.cli(["--checkpoint", str(best)]) == 0
    assert "values of wide pixels from 0 to 4095" in capsys.readouterr().out


def test_a_network_of_ordinary_pictures_gets_the_types_full_range(run, tmp_path):
    """Also in an evaluation: what is found there must not depend on the other pictures."""
    _, checkpoint = model.load(run / "best.pt")
    assert checkpoint["levels"] is None
    camera_folder(tmp_path)
    [test_set] = datasets.load(str(tmp_path), splits=["test"], levels=checkpoint["levels"] or ())
    picture, _ = read_picture(os.fsdecode(test_set.paths[0]), predict.sizing(checkpoint))
    assert np.array_equal(picture, test_set.preview(torch.tensor([0]))[1][0].permute(1, 2, 0)) and picture.max() < 16

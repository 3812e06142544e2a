"""Names of every script in pictures: drawn with a font that has their letters, or numbered and listed."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noisy
from PIL import Image, features

import model
import predict
import train
from quick.views import drawing, fonts

SCRIPTS = {
    "Latin": ["garçon", "ñandú"],
    "Cyrillic": ["кошка", "собака"],
    "Chinese": ["猫", "狗"],
    "Japanese": ["ねこ", "いぬ"],
    "Korean": ["고양이", "강아지"],
    "Arabic": ["قطة", "كلب"],
    "Hebrew": ["חתול", "כלב"],
    "Hindi": ["बिल्ली", "कुत्ता"],
    "Thai": ["แมว", "สุนัข"],
    "emoji": ["🐱", "👩‍🚀"],
}


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    yield
    fonts.FOUND.clear()
    fonts.font_files.cache_clear()


@pytest.fixture
def without_fonts(monkeypatch):
    monkeypatch.setattr(fonts, "font_folders", list)
    fonts.FOUND.clear()
    fonts.font_files.cache_clear()


def is_drawn(name: str) -> bool:
    """Whether a caption shows the name by letters of its own: neither boxes nor nothing."""
    missing = [drawing.note_picture(letter * len(name)) for letter in ("\U0010ffff", " ")]
    picture = drawing.note_picture(name)
    return all(picture.shape != other.shape or (picture != other).any() for other in missing)


@pytest.mark.parametrize("script", SCRIPTS)
def test_names_are_told_apart_by_letters_or_numbers(script):
    counts = torch.tensor([[5, 1], [2, 7]])
    names = SCRIPTS[script]
    pictures = [drawing.confusion_picture(counts, some) for some in (names, names[::-1], ["ant", "bee"])]
    for one, other in ((0, 1), (0, 2)):
        assert pictures[one].shape != pictures[other].shape or (pictures[one] != pictures[other]).any()
    numbered = fonts.legend(names)
    for number, (name, shown) in enumerate(zip(names, fonts.drawable(names), strict=True)):
        if shown == name:
            assert is_drawn(name)
        else:
            assert numbered[f"#{number}"] == name and shown.startswith(f"#{number} ") and shown.isascii()


def test_ascii_names_start_no_search(monkeypatch):
    monkeypatch.setattr(fonts, "font_files", None)
    drawing.confusion_picture(torch.eye(2).long(), ["cat", "a dog … 100 % (±)"[:12]])
    assert fonts.legend(["cat", "dog"]) == {} and not fonts.FOUND


def test_without_fonts_names_are_numbered(without_fonts):
    assert fonts.drawable(["cat", "猫", "a 狗 b", "é"]) == ["cat", "#1 U+732B", "#2 a U+72D7 b", "#3 U+00E9"]
    assert fonts.legend(["cat", "猫"]) == {"#1": "猫"}


def test_without_raqm_scripts_that_are_put_together_are_numbered(monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: False)
    assert all(shown.startswith("#") for shown in fonts.drawable([*SCRIPTS["Arabic"], *SCRIPTS["Hindi"], "חתול"]))


def system_font(letter: str) -> Path:
    fonts.find_fonts(letter)
    return fonts.FOUND.get(letter) or pytest.skip(f"no font here has {letter}")


def test_the_letters_decide_not_the_files_name(tmp_path, monkeypatch):
    """Of files that look like fonts, one is none, one has other letters, and the last one has ours."""
    cyrillic = system_font("ж")
    (tmp_path / "a sans.ttf").write_bytes(b"no font")
    (tmp_path / "b.txt").write_bytes(cyrillic.read_bytes())
    (tmp_path / "z bold italic.TTF").write_bytes(cyrillic.read_bytes())
    monkeypatch.setattr(fonts, "font_folders", lambda: [tmp_path, tmp_path / "not there"])
    fonts.FOUND.clear()
    fonts.font_files.cache_clear()
    assert fonts.drawable(["жук", "猫"]) == ["жук", "#1 U+732B"]
    assert fonts.FOUND["ж"] == tmp_path / "z bold italic.TTF" and fonts.FOUND["猫"] is None
    # A caption of letters of two fonts has both in their places.
    parts = fonts.runs("is жук")
    assert [path for _, path in parts] == [fonts.FOUND["ж"]]  # which has the Latin letters too
    assert drawing.note_picture("is жук").std() > 5


def test_what_has_no_shape_is_no_box():
    system_font("ж")
    assert fonts.drawable(["ж\u200d\ufe0f"]) == ["ж\u200d\ufe0f"]
    assert np.array_equal(drawing.note_picture("ж\ufe0f"), drawing.note_picture("ж"))


@pytest.mark.parametrize("name", ["W" * 100_000, "猫" * 100_000, "a" * 100_000, ""])
def test_names_of_any_length_are_shortened_at_once(name):
    start = time.monotonic()
    names = [name, *(f"{name[:1000]}{number}" for number in range(999))]
    picture = drawing.confusion_picture(torch.ones(1000, 1000).long(), names)
    assert max(picture.shape) < 2600
    assert fonts.length(fonts.shortened(fonts.drawable([name])[0], 96, 12), 12) <= 96
    assert time.monotonic() - start < 10


def test_a_run_and_an_explanation_tell_what_the_numbers_mean(tmp_path, without_fonts, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name, colour in (("猫", (200, 0, 0)), ("狗|", (0, 0, 200))):
        for number in range(10):
            path = tmp_path / "data" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noisy(colour, number).save(path)
    flags = "--epochs 1 --device cpu --no-whiten --batch-size 4 --run-name a".split()
    assert train.cli(["--data", str(tmp_path / "data"), "--log-dir", str(tmp_path), *flags]) == 0
    assert "no font for the names of some classes: pictures number them" in capsys.readouterr().err
    events = EventAccumulator(str(tmp_path / "a"), size_guidance={"tensors": 0}).Reload()
    text = events.Tensors("classes/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| &#35;0 | 狗&#124; |" in text and "| &#35;1 | 猫 |" in text

    noisy((200, 0, 0), 1).save(tmp_path / "x.png")
    assert predict.cli([str(tmp_path / "x.png"), "--checkpoint", str(tmp_path / "a" / "best.pt"), "--show"]) == 0
    said = capsys.readouterr().err
    assert "x.explained.png, #0 " in said and "猫" in said and "狗|" in said
    assert Image.open(tmp_path / "x.explained.png").size[0] > 500


def test_own_checkpoints_may_have_any_name():
    picture = np.zeros((1, 1, 3), np.uint8)
    shown = drawing.explained(picture, torch.ones(1, 1), [("", 0.5), ("a\u202eb\x1b", 0.3), ("\ud800", 0.2)])
    assert shown.ndim == 3 and model.NETWORKS

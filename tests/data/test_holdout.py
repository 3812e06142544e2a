"""Folds: each picture is held out once; what cannot be one is a line."""

import random

import pytest
import torch

from quick.data.holdout import Fold, held_out, share_of, told_by
from quick.data.pictures import Pictures
from quick.data.stores import InMemory
from quick.errors import ConfigError, LimitError


def test_folds_hold_out_each_picture_once(capsys):
    draw = random.Random(0)
    names = [f"{name}/{draw.random()}.jpg" for name in ("cat", "dog") for _ in range(80)]
    classes = [name[:3] for name in names]
    for count in (2, 3, 5, 7):
        sides = [held_out(names, classes, Fold(number, count), "photos") for number in range(1, count + 1)]
        assert [sum(of_picture) for of_picture in zip(*sides, strict=True)] == [1] * len(names)
        fewer = [side for side, name in zip(sides[1], names, strict=True) if not name.endswith("0.jpg")]
        some = [name for name in names if not name.endswith("0.jpg")]
        assert fewer == held_out(some, [name[:3] for name in some], Fold(2, count), "photos")
    assert held_out(names, classes, Fold(1, 5), "photos") == held_out(names, classes, 0.2, "photos")
    assert not capsys.readouterr().err


def test_folds_of_built_in_pictures_take_turns_in_every_class():
    labels = torch.arange(230) % 4
    pictures = Pictures(InMemory(torch.zeros(230, 3, 1, 1, dtype=torch.uint8)), labels, list("abcd"), "train")
    pairs = [pictures.hold_out(Fold(number, 3), seed=0) for number in (1, 2, 3)]
    assert sorted(torch.cat([val.rows for _, val in pairs]).tolist()) == list(range(230))
    for rest, val in pairs:
        assert sorted([*rest.rows.tolist(), *val.rows.tolist()]) == list(range(230))
        counts = torch.bincount(val.labels)
        assert {*counts.tolist()} <= {19, 20}
    for fold, fraction in ((Fold(1, 5), 0.2), (Fold(1, 10), 0.1)):
        assert torch.equal(pictures.hold_out(fold, seed=3)[1].rows, pictures.hold_out(fraction, seed=3)[1].rows)
    with pytest.raises(LimitError, match="--fold 100 --folds 200 of 230 pictures leaves too few on one side; "):
        pictures.hold_out(Fold(100, 200), seed=0)


WRONG = [
    ({"fold": 2}, "--fold 2: of how many? add --folds and their number"),
    ({"folds": 5}, "--folds 5: which of them is held out? add --fold and a number from 1 to 5"),
    ({"fold": 6, "folds": 5}, "--fold 6: --folds 5 has those from 1 to 5"),
    ({"fold": -1, "folds": 5}, "--fold -1: --folds 5 has those from 1 to 5"),
    ({"fold": 1, "folds": 1}, "--folds 1: one fold would hold out all pictures; give at least 2"),
    (
        {"fold": 1, "folds": 5, "val_fraction": 0.2},
        "--fold 1: --val-fraction 0.2 holds out others; add --val-fraction 0, or --fold 0 --folds 0",
    ),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_settings_that_are_no_fold_are_told(settings, message):
    with pytest.raises(ConfigError) as error:
        share_of(**settings)
    assert str(error.value) == message
    assert told_by(settings) == {}


def test_a_fold_that_leaves_a_side_empty_is_told_with_how_many_folds_do_not(capsys):
    names = [f"{name}/{number}.jpg" for name in ("cat", "dog") for number in range(8)]
    classes = [name[:3] for name in names]
    with pytest.raises(LimitError, match=r"photos: --folds 17: that is more than its 16 pictures$"):
        held_out(names, classes, Fold(3, 17), "photos")
    told = []
    for number in range(1, 17):
        try:
            held_out(names, classes, Fold(number, 16), "photos")
        except LimitError as error:
            told.append(str(error))
    start, advice = "photos: by the files' names, fold ", " of 16 holds out no picture; each of --folds "
    assert told and all(line.startswith(start) and advice in line for line in told)
    lacking = capsys.readouterr().err.splitlines()
    assert lacking and all(" is held out; each of --folds " in line for line in lacking)
    count = int(told[0].partition(advice)[2].split()[0])
    for number in range(1, count + 1):
        is_out = held_out(names, classes, Fold(number, count), "photos")
        assert all({*is_out[place : place + 8]} == {True, False} for place in (0, 8))
    assert not capsys.readouterr().err
    with pytest.raises(LimitError, match=r"fold \d of 2 holds out all pictures of class 'dog'; put more pictures "):
        for number in (1, 2):
            held_out([*names[:8], "dog/0.jpg"], [*classes[:8], "dog"], Fold(number, 2), "photos")


def test_what_a_strange_checkpoint_says_of_folds_is_taken_only_if_it_can_be():
    assert told_by({"val_fraction": 0.2}) == {"val_fraction": 0.2, "fold": 0, "folds": 0}
    assert told_by({"fold": 2, "folds": 5, "val_fraction": 0.0}) == {"val_fraction": 0.0, "fold": 2, "folds": 5}
    assert told_by({}) == {"val_fraction": 0, "fold": 0, "folds": 0}  # of an earlier version
    for strange in ("2", [2], True, 2.0, float("nan"), -3, 10**5000):
        assert told_by({"fold": strange, "folds": 5}) == told_by({"fold": 1, "folds": strange}) == {}
    for strange in ("0.2", 1.0, -0.1, float("nan"), 5, [0.2]):
        assert told_by({"val_fraction": strange}) == {}

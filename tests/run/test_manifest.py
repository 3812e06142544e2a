"""The list of a run's pictures: the same on every machine, and it names what has changed since."""

import csv
import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from conftest import noisy

import datasets
from quick.data.pictures import Pictures
from quick.processes import ALONE
from quick.run.history import History
from quick.run.manifest import make_manifest, other_pictures, taken_otherwise

NAMES = ["train/café/a,b.png", 'train/café/"c".png', "train/=1+1/d.png", "train/café/e.png", "test/café/f.png"]


def sets_of(root: Path, form: str = "NFC") -> list[Pictures]:
    """A training set of four pictures and a test set of one, whose files need not exist."""
    paths = [os.fsencode(root / unicodedata.normalize(form, name)) for name in NAMES]
    classes = ["=1+1", unicodedata.normalize(form, "café")]
    train_set = Pictures(None, torch.tensor([1, 1, 0, 1]), classes, "train", paths=np.array(paths[:4]))
    return [train_set, Pictures(None, torch.tensor([1]), classes, "test", paths=np.array(paths[4:]))]


def test_the_list_names_each_file_with_its_set_class_and_size(tmp_path):
    for number, name in enumerate(NAMES):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * number)
    table = make_manifest(str(tmp_path), sets_of(tmp_path)).table.decode()
    rows = list(csv.reader(table.splitlines()))
    assert rows[0] == ["split", "class", "file", "bytes"] and [row[2] for row in rows[1:]] == NAMES
    assert [row[0] for row in rows[1:]] == ["train"] * 4 + ["test"] and [row[3] for row in rows[1:]] == list("01234")
    assert [row[1] for row in rows[1:]] == ["café", "café", "'=1+1", "café", "café"]  # no formula for a spreadsheet


def test_pictures_are_the_same_in_another_place_and_another_unicode_form(tmp_path):
    here = make_manifest("here", sets_of(Path("here")))
    there = make_manifest(f"{tmp_path}/", sets_of(tmp_path, "NFD"))
    assert here.digests == there.digests and other_pictures(there, here.digests, tmp_path) is None
    above = make_manifest(".", sets_of(Path()))
    assert above.digests == here.digests and above.table == here.table


def test_names_that_are_no_text_stand_in_their_own_bytes():
    pictures = Pictures(None, torch.tensor([0]), ["a"], "train", paths=np.array([b"data/train/a/\xff.png"]))
    assert b"train,a,train/a/\xff.png,0\n" in make_manifest("data", [pictures]).table


def test_each_change_is_named(tmp_path):
    before = make_manifest("data", sets_of(Path("data")))
    (tmp_path / "pictures.csv").write_bytes(before.table)

    def change(**changes: object) -> str:
        train_set, test_set = sets_of(Path("data"))
        for name, value in changes.items():
            setattr(train_set, name, value)
        return other_pictures(make_manifest("data", [train_set, test_set]), before.digests, tmp_path)

    paths = sets_of(Path("data"))[0].paths
    assert change() is None
    assert change(labels=torch.tensor([1, 1, 1, 1])) == (
        "not the train pictures that the run had: 1 now in another class (train/=1+1/d.png)"
    )
    assert change(paths=paths[[1, 0, 2, 3]]).endswith(": they are in another order")
    assert change(paths=paths[:3], labels=torch.tensor([1, 1, 0])).endswith(": 1 gone (train/café/e.png)")
    assert change(split="val") == (
        "not the train and val pictures that the run had: 4 now in another set "
        '(train/=1+1/d.png, train/café/"c".png, train/café/a,b.png and 1 more)'
    )


def test_a_file_of_another_size_is_named(tmp_path):
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    before = make_manifest(str(tmp_path), sets_of(tmp_path))
    (tmp_path / "pictures.csv").write_bytes(before.table)
    (tmp_path / NAMES[4]).write_bytes(b"xx")
    after = make_manifest(str(tmp_path), sets_of(tmp_path))
    assert other_pictures(after, before.digests, tmp_path) == (
        "not the test pictures that the run had: 1 now of another size (test/café/f.png)"
    )


def test_what_is_held_out_counts_and_so_do_sets_without_files():
    train_set, _ = datasets.load("shapes", limit=200)
    first, second, again = (make_manifest("shapes", train_set.hold_out(0.2, seed)) for seed in (0, 1, 0))
    assert first.digests == again.digests and first.digests.keys() == {"train", "val"} and not first.table
    assert first.digests["train"] != second.digests["train"] and first.digests["val"] != second.digests["val"]
    assert other_pictures(second, first.digests, Path()) == "not the train and val pictures that the run had"


def test_what_earlier_versions_took_otherwise_is_named():
    train_set, test_set = sets_of(Path("data"))
    val_set, drawn = replace(test_set, split="val"), replace(train_set, paths=None)
    begun, wide = History([{"test_accuracy": 0.5}]), replace(train_set, levels=(0, 1023))
    assert taken_otherwise(begun, 0, [train_set, test_set]) is None
    assert taken_otherwise(History(), 0, [train_set, val_set]) is None
    assert "by the test pictures, not by val" in taken_otherwise(begun, 0, [train_set, val_set, test_set])
    assert "held out other" in taken_otherwise(History(), 0.2, [train_set, val_set, test_set])
    assert taken_otherwise(History(), 0.2, [drawn, val_set, test_set]) is None  # of CIFAR-10
    assert "wider than 8 bits" in taken_otherwise(begun, 0, [wide, test_set])


def test_a_bad_file_that_can_be_read_now_is_new(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(6):
            noisy((30, 60, 220), number).save(tmp_path / name / f"{number}.png")
    good = (tmp_path / "a" / "3.png").read_bytes()
    (tmp_path / "a" / "3.png").write_bytes(b"nothing")
    before = make_manifest(str(tmp_path), datasets.load(str(tmp_path), group=ALONE))
    (tmp_path / "pictures.csv").write_bytes(before.table)
    (tmp_path / "a" / "3.png").write_bytes(good)
    after = make_manifest(str(tmp_path), datasets.load(str(tmp_path), group=ALONE))
    assert "1 new (a/3.png)" in other_pictures(after, before.digests, tmp_path)

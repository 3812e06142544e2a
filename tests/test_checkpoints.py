"""Checkpoints as files: written whole or not at all, and damaged or strange ones named with the reason."""

import math
import os
import pickle
import signal
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, same_weights, save
from samples import a_checkpoint
from torch import nn

import datasets
import model
from quick import checkpoints
from quick.errors import CheckpointError
from quick.nets.losses import score
from quick.run.evaluation import outputs_of_set

FORMAT_1 = ROOT / "tests" / "files" / "format_1.pt"  # of `train.py --config configs/shapes.toml --image-size 8`


@pytest.fixture
def checkpoint() -> dict:
    """The content of a checkpoint of an untrained network."""
    torch.manual_seed(0)
    return a_checkpoint(model.create("cifar_quick", {"classes": 3}), classes=3)


# ---- writing ----


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else a crash of the machine could leave an empty file in the place of a whole one."""
    seen, fsync = [], os.fsync

    def noted(number: int) -> None:
        fsync(number)
        seen.append((os.fstat(number).st_size, (tmp_path / "a").read_bytes()))

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", noted)
    checkpoints.write_file(tmp_path / "a", b"whole")
    assert seen == [(5, b"old")] and (tmp_path / "a").read_bytes() == b"whole"


def test_saving_replaces_a_file_whole_or_not_at_all(checkpoint, tmp_path):
    resource = pytest.importorskip("resource", reason="Windows cannot limit the size of files")
    path = tmp_path / "a.pt"
    save(path, checkpoint)
    whole, content = path.read_bytes(), checkpoints.to_bytes(checkpoint)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as good as a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoints.write_file(path, content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_same_weights_tells_networks_apart(checkpoint, tmp_path):
    save(tmp_path / "a.pt", checkpoint)
    other = {name: value + 1 for name, value in checkpoint["state_dict"].items()}
    save(tmp_path / "b.pt", checkpoint | {"state_dict": other})
    assert same_weights(tmp_path / "a.pt", tmp_path / "a.pt")
    assert not same_weights(tmp_path / "a.pt", tmp_path / "b.pt")


# ---- reading ----


def test_what_was_written_is_read(checkpoint, tmp_path):
    save(tmp_path / "a.pt", checkpoint | {"metrics": {"test_accuracy": 0.5}, "training": {"step": 3}})
    content = checkpoints.read(tmp_path / "a.pt")
    assert content["metrics"] == {"test_accuracy": 0.5} and content["training"] == {"step": 3}
    assert all(torch.equal(content["state_dict"][key], value) for key, value in checkpoint["state_dict"].items())
    assert model.read is checkpoints.read  # where README has it


class Large:
    """Thirty bytes that become two thousand million."""

    def __reduce__(self):
        return (bytearray, (2 * 10**9,))


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def damage(kind: str, path: Path, checkpoint: dict) -> None:
    """Make `path` one of the files that must not load."""
    if kind == "text":
        path.write_text("format = 1")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(checkpoint))
    elif kind == "code":
        torch.save(checkpoint | {"metrics": Evil()}, path)
    elif kind == "module":
        torch.save(nn.Linear(2, 2), path)
    elif kind == "other zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("hello.txt", "hello")
    elif kind == "truncated":
        torch.save(checkpoint, path)
        path.write_bytes(path.read_bytes()[:-5000])
    elif kind == "tensor":
        torch.save(torch.rand(3), path)
    elif kind == "state_dict":
        torch.save(checkpoint["state_dict"], path)
    elif kind.startswith("without "):
        torch.save({key: value for key, value in checkpoint.items() if key != kind.removeprefix("without ")}, path)
    elif kind == "format 3":
        torch.save(checkpoint | {"format": 3}, path)
    elif kind == "nameless model":
        torch.save(checkpoint | {"model": {}}, path)
    elif kind == "no tensors":
        torch.save(checkpoint | {"state_dict": {"head.weight": 3}}, path)
    elif kind == "numbered weights":
        torch.save(checkpoint | {"state_dict": {3: torch.zeros(1)}}, path)
    elif kind == "wrong type":
        torch.save(checkpoint | {"classes": "abc"}, path)
    elif kind == "other network":
        torch.save(checkpoint | {"model": {"name": "lenet", "options": {}}}, path)
    elif kind == "other options":
        torch.save(checkpoint | {"model": {"name": "cifar_quick", "options": {"colour": 1}}}, path)
    elif kind == "other shapes":
        torch.save(checkpoint | {"model": {"name": "cifar_quick", "options": {"classes": 4}}}, path)
    elif kind == "bad values":
        torch.save(checkpoint | {"std": [0.0, 1.0, 1.0]}, path)
    elif kind == "bad resize":
        torch.save(checkpoint | {"resize": 31}, path)
    elif kind == "bad interpolation":
        torch.save(checkpoint | {"interpolation": "nearest"}, path)
    elif kind == "too few classes":
        torch.save(checkpoint | {"classes": ["a", "b"]}, path)
    elif kind == "other size":
        torch.save(checkpoint | {"image_size": 16}, path)
    elif kind == "prefixed":
        prefixed = {f"module.{name}": value for name, value in checkpoint["state_dict"].items()}
        torch.save(checkpoint | {"state_dict": prefixed}, path)
    elif kind == "flipped":
        save(path, checkpoint)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif kind == "flipped, no checksum":
        torch.save(checkpoint, path)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif kind == "compressed":  # a few kilobytes that become gigabytes
        save(path, checkpoint)
        with zipfile.ZipFile(path) as plain:
            parts = {entry.filename: plain.read(entry) for entry in plain.infolist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in parts.items():
                file.writestr(name, content)
    elif kind == "overlapping":  # a few kilobytes that are read a thousand times
        torch.save(checkpoint, path)
        with zipfile.ZipFile(path, "a") as file:
            file.filelist += 1000 * [max(file.filelist, key=lambda entry: entry.file_size)]
            file.comment = b""  # writes the list of entries anew
    elif kind == "many values":
        save(path, checkpoint | {"metrics": {"a": [0.5] * 2_000_000}})
    elif kind in STRANGE:
        save(path, checkpoint | STRANGE[kind](checkpoint["state_dict"]))


STRANGE = {  # what a stranger may put into a checkpoint, by what it is
    "a view of one number": lambda weights: {
        "state_dict": weights | {"head.weight": torch.zeros(1).expand(10**6, 10**6)}
    },
    "a sparse tensor": lambda weights: {"state_dict": weights | {"head.bias": torch.zeros(10**4).to_sparse()}},
    "a bytearray of any size": lambda _: {"metrics": {"a": Large()}},
    "not finite": lambda weights: {"state_dict": weights | {"head.bias": torch.full((3,), math.nan)}},
    "a million times as wide": lambda _: {"model": {"name": "fast", "options": {"classes": 3, "width": 1e6}}},
    "a thousand million classes": lambda _: {"model": {"name": "cifar_quick", "options": {"classes": 10**9}}},
    "appended to a thousand million": lambda _: {"model": {"name": "fast", "options": {"append": 10**9}}},
    "a huge picture": lambda _: {"image_size": 10**6, "resize": 10**6},
    "a huge network": lambda _: {"model": {"name": "cifar_quick", "options": {"classes": 3, "image_size": 10**6}}},
    "a long number": lambda _: {"format": 10**5000},
    "an options' list": lambda _: {"model": {"name": "cifar_quick", "options": {"classes": [3]}}},
    "nested metrics": lambda _: {"metrics": {"a": {"b": 1}}},
    "classes that steer terminals": lambda _: {"classes": ["a", "b\x1b[2J", "c"]},
    "a weight's name that does": lambda weights: {"state_dict": weights | {"\x1b[2Jx": torch.zeros(1)}},
}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "no such checkpoint"),
        ("folder", "no such checkpoint"),
        ("text", "not a whole checkpoint of train.py"),
        ("empty", "not a whole checkpoint of train.py"),
        ("pickle", "not a whole checkpoint of train.py"),
        ("tensor", "not a whole checkpoint of train.py"),
        ("state_dict", "not a whole checkpoint of train.py"),
        ("truncated", "not a whole checkpoint of train.py"),
        ("other zip", "damaged"),
        ("code", "could run code; it was not loaded"),
        ("module", "could run code; it was not loaded"),
        ("without classes", "'classes' is missing"),
        ("without state_dict", "'state_dict' is missing"),
        ("nameless model", "'model' or 'state_dict' holds something else"),
        ("no tensors", "'model' or 'state_dict' holds something else"),
        ("numbered weights", "'model' or 'state_dict' holds something else"),
        ("wrong type", "'classes' is missing or not of type list"),
        ("format 3", "checkpoint format 3; this version reads 1 to 2"),
        ("other network", "no network 'lenet'"),
        ("other options", "unexpected keyword argument 'colour'"),
        ("other shapes", "wrong shape: head.weight [3, 64] in place of [4, 64], head.bias"),
        ("bad values", "impossible values"),
        ("bad resize", "impossible values"),
        ("bad interpolation", "impossible values"),
        ("too few classes", "2 classes, but 3 outputs"),
        ("other size", "do not fit"),
        ("prefixed", "unexpected: module.stage1.conv.weight"),
        ("flipped", "damaged or cut short"),
        ("flipped, no checksum", "damaged or cut short"),
        ("compressed", "damaged or cut short"),
        ("overlapping", "damaged or cut short"),
        ("many values", "damaged or cut short"),
        ("a view of one number", "'state_dict' holds something else"),
        ("a sparse tensor", "could run code; it was not loaded"),
        ("a bytearray of any size", "could run code; it was not loaded"),
        ("not finite", "answers are not finite numbers"),
        ("a million times as wide", "impossible values"),
        ("a thousand million classes", "impossible values"),
        ("appended to a thousand million", "impossible values"),
        ("a huge picture", "impossible values"),
        ("a huge network", "impossible values"),
        ("a long number", "it was not loaded"),
        ("an options' list", "damaged or cut short"),
        ("nested metrics", "options, metrics or config are not plain values"),
        ("classes that steer terminals", "class names are not all printable"),
        ("a weight's name that does", r"unexpected: \x1b[2Jx"),
    ],
)
def test_files_that_must_not_load_are_named_with_the_reason(kind, reason, checkpoint, tmp_path, capsys):
    path = tmp_path / "file.pt"
    damage(kind, path, checkpoint)
    with pytest.raises(CheckpointError, match=r"file\.pt: ") as caught:
        model.load(path)
    assert reason in str(caught.value) and str(caught.value).isprintable()
    assert "code ran" not in capsys.readouterr().out


def test_no_flipped_byte_goes_unnoticed(tmp_path):
    save(tmp_path / "a.pt", checkpoints.read(FORMAT_1))
    content, path = (tmp_path / "a.pt").read_bytes(), tmp_path / "b.pt"
    for at in [*range(0, len(content), 997), *range(len(content) - 100, len(content))]:
        path.write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
        with pytest.raises(CheckpointError, match=r"b\.pt: "):
            model.load(path)


def test_checkpoints_of_format_1_still_answer_as_they_did():
    network, checkpoint = model.load(FORMAT_1)
    assert checkpoint["format"] == 1 and (checkpoint["resize"], checkpoint["interpolation"]) == (8, "bilinear")
    sizing = {name: checkpoint[name] for name in ("image_size", "resize", "interpolation", "mean", "std")}
    [test_set] = datasets.load("shapes", splits=["test"], **sizing)
    accuracy = score(*outputs_of_set(network, test_set, classes=10))["accuracy"]
    assert accuracy == pytest.approx(checkpoint["metrics"]["test_accuracy"], abs=0.002) and accuracy > 0.39

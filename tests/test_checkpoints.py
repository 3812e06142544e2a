"""Checkpoints as files: written whole or not at all, and damaged or strange ones named with the reason."""

import io
import math
import os
import pickle
import signal
import struct
import time
import warnings
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import ROOT, same_weights, save
from samples import a_checkpoint
from torch import nn

import datasets
import model
import predict
import train
from quick import checkpoints
from quick.checkpoints import FORMAT
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


def doubled(depth: int) -> list:
    """2 ** depth references in a few bytes: lists of the same list twice."""
    return [doubled(depth - 1)] * 2 if depth else []


def with_attributes(content: dict, **attributes: object) -> OrderedDict:
    made = OrderedDict(content)
    vars(made).update(attributes)
    return made


def hiding(content: dict) -> OrderedDict:
    """A dict whose `items()` gives none."""
    return with_attributes(content, items=OrderedDict)


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
    elif kind == "a later format":
        torch.save(checkpoint | {"format": FORMAT + 1}, path)
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
    elif kind == "bad fit":
        torch.save(checkpoint | {"fit": "stretch"}, path)
    elif kind == "resized and padded":
        torch.save(checkpoint | {"fit": "pad", "resize": 40}, path)
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
    "a format of many lists": lambda _: {"format": doubled(60)},
    "levels of many lists": lambda _: {"levels": [doubled(60), doubled(60)]},
    "a dict that hides its items": lambda weights: {"metrics": hiding({"a": {"b": 1}})},
    "weights that hide": lambda weights: {"state_dict": hiding(weights | {"head.bias": torch.zeros(1).expand(10**6)})},
    "versions that are none": lambda weights: {"state_dict": with_attributes(weights, _metadata=3)},
    "metrics of many lists": lambda _: {"metrics": {"a": doubled(60)}},
    "one long list under many names": lambda _: {"metrics": dict.fromkeys(map(str, range(999)), [1] * 100_000)},
    "one long text under many names": lambda _: {"config": dict.fromkeys(map(str, range(999)), "x" * 10**6)},
    "too many metrics": lambda _: {"metrics": dict.fromkeys(map(str, range(10_000)), 1)},
    "a long class name": lambda _: {"classes": ["a", "b", "x" * 1001]},
    "one long class name many times": lambda _: {"classes": ["x" * 1000] * 4000},
    "a long network's name": lambda _: {"model": {"name": "x" * 10**6, "options": {}}},
    "a weight's long name": lambda weights: {"state_dict": weights | {"x" * 10**6: torch.zeros(1)}},
    "a number of 200 bytes": lambda _: {"epoch": 2**1500},
    "whole numbers as weights": lambda weights: {"state_dict": weights | {"head.bias": torch.zeros(3).long()}},
    "whole numbers as averages": lambda weights: {
        "state_dict": weights | {"stage1.norm.running_mean": torch.zeros(32).long()}
    },
    "complex weights": lambda weights: {"state_dict": weights | {"head.bias": torch.zeros(3, dtype=torch.cfloat)}},
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
    "levels upside down": lambda _: {"levels": [4095.0, 0.0]},
    "three levels": lambda _: {"levels": [0.0, 1.0, 2.0]},
    "endless levels": lambda _: {"levels": [0.0, float("inf")]},
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
        ("other zip", "but a zip archive of other things"),
        ("code", "could run code; it was not loaded"),
        ("module", "could run code; it was not loaded"),
        ("without classes", "'classes' is missing"),
        ("without state_dict", "'state_dict' is missing"),
        ("nameless model", "'model' or 'state_dict' holds something else"),
        ("no tensors", "'model' or 'state_dict' holds something else"),
        ("numbered weights", "'model' or 'state_dict' holds something else"),
        ("wrong type", "'classes' is missing or not of type list"),
        ("a later format", f"checkpoint format {FORMAT + 1}; this version reads 1 to {FORMAT}"),
        ("other network", "no network 'lenet'"),
        ("other options", "unexpected keyword argument 'colour'"),
        ("other shapes", "wrong shape: head.weight [3, 64] in place of [4, 64], head.bias"),
        ("bad values", "impossible values"),
        ("bad resize", "impossible values"),
        ("bad interpolation", "impossible values"),
        ("bad fit", "impossible values"),
        ("resized and padded", "impossible values"),
        ("too few classes", "2 classes, but 3 outputs"),
        ("other size", "do not fit"),
        ("prefixed", "unexpected: module.stage1.conv.weight"),
        ("flipped", "damaged or cut short"),
        ("flipped, no checksum", "damaged or cut short"),
        ("compressed", "damaged or cut short"),
        ("overlapping", "damaged or cut short"),
        ("many values", "damaged or cut short"),
        ("a format of many lists", "checkpoint format of another program"),
        ("levels of many lists", "levels are not two numbers"),
        ("a dict that hides its items", "a dict in it has attributes"),
        ("weights that hide", "a dict in it has attributes"),
        ("versions that are none", "a dict in it has attributes"),
        ("metrics of many lists", "options, metrics or config are not plain values"),
        ("one long list under many names", "options, metrics or config are not plain values"),
        ("one long text under many names", "options, metrics or config are not plain values"),
        ("too many metrics", "options, metrics or config are not plain values"),
        ("a long class name", "the class name xxxxxxxxxxxxxxxxxxxx... has 1,001 characters; 1,000 are the most"),
        ("one long class name many times", "the 4,000 class names are too long together"),
        ("a long network's name", "'model' or 'state_dict' holds something else"),
        ("a weight's long name", "'model' or 'state_dict' holds something else"),
        ("a number of 200 bytes", "damaged or cut short"),
        ("whole numbers as weights", "wrong type: head.bias torch.int64"),
        ("whole numbers as averages", "wrong type: stage1.norm.running_mean torch.int64"),
        ("complex weights", "wrong type: head.bias torch.complex64"),
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
        ("levels upside down", "levels are not two numbers, the lower one first"),
        ("three levels", "levels are not two numbers, the lower one first"),
        ("endless levels", "impossible values"),
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


# ---- archives that seem smaller than they are ----


def parts_of(checkpoint: dict) -> dict[str, bytes]:
    """The records of a checkpoint's archive by name."""
    with zipfile.ZipFile(io.BytesIO(checkpoints.to_bytes(checkpoint))) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def signed(content: bytes) -> bytes:
    """An archive with the checksum of all its bytes."""
    content = content[:-2] + (8).to_bytes(2, "little")
    return content + b"%08x" % zlib.crc32(content)


def packed(parts: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return signed(file.getvalue())


def two_directories(parts: dict[str, bytes], values: bytes) -> bytes:
    """Two zip64 directories, that of other `values` behind the locator, the other where Python looks for it."""
    file, directories = io.BytesIO(), {"first": b"", "second": b""}

    def add(name: str, content: bytes, *into: str) -> None:
        place, facts = file.tell(), (zlib.crc32(content), len(content), len(content), len(name))
        header = struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, 0, 0, 0, 33, *facts, 0)
        file.write(header + name.encode() + content)
        for key in into:
            entry = struct.pack("<IHHHHHHIIIHHHHHII", 0x02014B50, 20, 20, 0, 0, 0, 33, *facts, 0, 0, 0, 0, 0, place)
            directories[key] += entry + name.encode()

    add("archive/data.pkl", values, "first")
    for name, content in parts.items():
        add(name, content, *(["second"] if name == "archive/data.pkl" else ["first", "second"]))
    places = {}
    for key, directory in directories.items():
        start = file.tell()
        file.write(directory)
        places[key] = file.tell()
        counts = (len(parts), len(parts), len(directory), start)
        file.write(struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, *counts))
    file.write(struct.pack("<IIQI", 0x07064B50, 0, places["first"], 1))
    file.write(struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
    return signed(file.getvalue())


def bomb(kind: str, checkpoint: dict) -> bytes:
    """A small file whose reading could take very long or very much memory."""
    parts, name = parts_of(checkpoint), "archive/data.pkl"
    values, large = parts[name], b"\x80\x02cbuiltins\nbytearray\nJ" + struct.pack("<i", 10**9) + b"\x85R."
    if kind == "a name in capital letters":  # which torch, but not Python, takes for the same
        return packed({key: content for key, content in parts.items() if key != name} | {"archive/data.PKL": large})
    if kind == "values in a folder inside":
        others = {key: content for key, content in parts.items() if key != name}
        return packed(others | {"archive/data.PKL": large, "archive/x/data.pkl": values})
    if kind == "two directories":
        return two_directories(parts, large)
    if kind == "a second prefix":
        return packed(parts | {"other/data/0": b"x"})
    if kind == "a name twice":
        with warnings.catch_warnings(action="ignore"):
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w") as archive:
                for key, content in [*parts.items(), (name, large)]:
                    archive.writestr(key, content)
        return signed(file.getvalue())
    if kind == "a record under many names":  # data/aaaa is data/aAaa, too
        return packed(parts | {"archive/data/" + "a" * 20: b"x" * 10**6})
    if kind == "a name that ends early":
        return signed(packed(parts).replace(b"archive/version", b"archive/versio\0")[:-8])
    if kind == "a million lists":
        return packed(parts | {name: b"\x80\x02(" + b"]" * 10**6 + b"l."})
    if kind == "tuples of tuples as a key":
        return packed(parts | {name: b"\x80\x02})" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(40)) + b"Ns."})
    if kind == "a million sets":
        return packed(parts | {name: b"\x80\x02(" + b"\x8f" * 10**6 + b"l."})
    if kind == "a million values":
        return packed(parts | {name: b"\x80\x02(" + b"\x88" * (10**6 + 10) + b"l."})
    if kind == "a tensor beyond its numbers":
        content = torch.zeros(4)
        parts = parts_of(checkpoint | {"state_dict": {"a": content}})
        assert parts[name].count(b"QK\x00K\x04\x85") == 1
        return packed(parts | {name: parts[name].replace(b"QK\x00K\x04\x85", b"QK\x00J\x00\xe1\xf5\x05\x85")})
    if kind == "bytes before it":  # which Python skips
        return signed(b"x" * 100 + packed(parts)[:-10] + b"\0\0")
    raise ValueError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        "a name in capital letters",
        "values in a folder inside",
        "two directories",
        "a second prefix",
        "a name twice",
        "a record under many names",
        "a name that ends early",
        "a million lists",
        "tuples of tuples as a key",
        "a million sets",
        "a million values",
        "a tensor beyond its numbers",
        "bytes before it",
    ],
)
def test_a_small_file_takes_little_memory_and_time(kind, checkpoint, tmp_path):
    resource = pytest.importorskip("resource", reason="Windows does not tell the memory of a process")
    path = tmp_path / "file.pt"
    path.write_bytes(bomb(kind, checkpoint))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(CheckpointError, match=r"damaged or cut short|could run code"):
        checkpoints.read(path)
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB; on macOS bytes


def test_large_pictures_cost_nothing_when_a_checkpoint_is_loaded(tmp_path):
    network = model.create("fast", {"classes": 2, "width": 0.1})
    path, content = tmp_path / "a.pt", a_checkpoint(network, "fast", classes=2, width=0.1)
    save(path, content | {"image_size": 4096, "resize": 4096})
    start = time.process_time()
    model.load(path)
    assert time.process_time() - start < 5


def test_without_memory_nothing_is_called_damaged(checkpoint, tmp_path, monkeypatch):
    save(tmp_path / "a.pt", checkpoint)

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError):
        model.load(tmp_path / "a.pt")


def test_a_file_that_is_replaced_while_it_is_read_is_read_as_it_was(checkpoint, tmp_path, monkeypatch):
    load, path = torch.load, tmp_path / "a.pt"
    save(path, checkpoint)

    def replaced(*inputs, **options):
        save(path, checkpoint | {"epoch": 7})
        return load(*inputs, **options)

    if os.name != "nt":  # which replaces no open file
        monkeypatch.setattr(torch, "load", replaced)
    assert checkpoints.read(path)["epoch"] == 1


# ---- other people's files ----


def pickled(*modules_and_names: str) -> bytes:
    """A pickle that calls these, as other projects' files do."""
    return b"\x80\x02" + b"".join(b"c%b\n)R" % text.replace(".", "\n", 1).encode() for text in modules_and_names) + b"."


def zipped(**parts: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return file.getvalue()


def torch_file(content: object, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def with_objects(name: str) -> bytes:
    """An archive of torch.save whose pickle asks for an object of this class."""
    module, _, kind = name.rpartition(".")
    values = b"\x80\x02c%b\n%b\n)\x81}b." % (module.encode(), kind.encode())
    return zipped(**{"archive/data.pkl": values, "archive/version": b"3\n"})


def scripted() -> bytes:
    with warnings.catch_warnings(action="ignore"):
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), file)
    return file.getvalue()


WEIGHTS = {"conv.weight": torch.zeros(2), "conv.bias": torch.zeros(2)}
SAFETENSORS = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
FOREIGN = {
    "timm.pth": (torch_file(WEIGHTS), "weights alone (a state_dict), without network, classes and sizes"),
    "timm_train.pth.tar": (
        torch_file({"epoch": 3, "arch": "resnet50", "state_dict": WEIGHTS}),
        "a checkpoint of another program, with epoch, arch, state_dict",
    ),
    "lightning.ckpt": (
        torch_file({"epoch": 3, "pytorch-lightning_version": "2.5", "state_dict": WEIGHTS}),
        "a checkpoint of another program, with epoch, pytorch-lightning_version, state_dict",
    ),
    "torchvision.pth": (torch_file(WEIGHTS, legacy=True), "a file of torch.save as it was before PyTorch 1.6"),
    "yolo11n-cls.pt": (with_objects("ultralytics.nn.tasks.ClassificationModel"), "ultralytics.nn.tasks.Classification"),
    "fastai.pkl": (with_objects("fastai.learner.Learner"), "(fastai.learner.Learner), which could run code"),
    "module.pt": (torch_file(nn.Linear(2, 2)), "(torch.nn.modules.linear.Linear), which could run code"),
    "best_accuracy.pth": (with_objects("numpy.core.multiarray.scalar"), "(numpy.core.multiarray.scalar)"),
    "sklearn.pkl": (pickle.dumps({"a": Evil()}), "a Python pickle, which could run code"),
    "keras.h5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file, as Keras writes"),
    "network.keras": (zipped(**{"config.json": b"{}", "model.weights.h5": b"\x89HDF"}), "a Keras file"),
    "a.safetensors": (struct.pack("<Q", len(SAFETENSORS)) + SAFETENSORS + bytes(4), "a safetensors file"),
    "scripted.pt": (scripted(), "a TorchScript file"),
    "a.onnx": (b"\x08\x0a\x12\x07pytorch\x1a\x062.14.1" + bytes(100), "an ONNX file"),
    "weights.npz": (zipped(**{"arr_0.npy": b"\x93NUMPY"}), "a file of NumPy"),
    "page.pt": (b"\xef\xbb\xbf\n <!doctype HTML><html>", "a web page (download the file itself)"),
    "error.pt": (b'<?xml version="1.0"?><Error>', "a web page (download the file itself)"),
    "pointer.pt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a pointer of Git LFS"),
    "cat.jpg": (b"\xff\xd8\xff\xe0" + bytes(100), "a picture"),
    "weights.tar.gz": (b"\x1f\x8b\x08" + bytes(100), "a gzip archive"),
    "cut.pt": (torch_file(WEIGHTS)[:-200], "one that was cut short: its end is missing"),
}

STATE_DICTS = [FOREIGN[name][1] for name in ("timm.pth", "timm_train.pth.tar", "lightning.ckpt", "torchvision.pth")]


@pytest.mark.parametrize("name", FOREIGN)
def test_other_programs_files_are_named_in_every_script(name, tmp_path, capsys):
    content, reason = FOREIGN[name]
    path = tmp_path / name
    path.write_bytes(content)
    calls = [
        (predict.cli, ["x.png", "--checkpoint", str(path), "--device", "cpu"]),
        (model.cli, ["--checkpoint", str(path)]),
        (train.cli, ["--data", "shapes", "--limit", "20", "--weights", str(path), "--device", "cpu"]),
    ]
    for call, flags in calls:
        assert call(flags) == 1
        out, err = capsys.readouterr()
        assert err.count("\n") == 1 and f"{path}: " in err and not out
        if call is train.cli and reason in STATE_DICTS:  # a network could start from these
            assert "weights alone (a state_dict), but not of cifar_quick: no head.weight; it has conv.weight, " in err
        else:
            assert reason in err and "give one that train.py wrote, such as logs/RUN/best.pt" in err


def test_legacy_files_take_no_more_than_they_have(tmp_path):
    """Their storages are as large as a pickle says, and made before their content is read."""
    path, content = tmp_path / "a.pth", torch_file({"a.weight": torch.zeros(300)}, legacy=True)
    path.write_bytes(content)
    assert checkpoints.contents(path, weights=True)["a.weight"].shape == (300,)
    count = b"M" + struct.pack("<H", 300)  # BININT2
    assert content.count(count) > 1
    for changed in (
        content.replace(count, b"J" + struct.pack("<i", 2**31 - 1), 1),  # 8 GB
        content.replace(count, b"\x8a\x08" + struct.pack("<q", 2**62), 1),
        content.replace(count, b"J" + struct.pack("<i", -300), 1),
        content.replace(b"storage", b"modules"),
        content.replace(b"FloatStorage", b"DummyStorage"),
        content[:14] + b"0\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19" + content[14:],  # a second mark
        content[:-100],
        content[:200],
    ):
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"a\.pth: the file is damaged or cut short"):
            checkpoints.contents(path, weights=True)
    path.write_bytes(torch_file({"a": Evil()}, legacy=True))
    with pytest.raises(CheckpointError, match="could run code; it was not loaded"):
        checkpoints.contents(path, weights=True)


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.expensive)])
def test_what_export_wrote_is_no_checkpoint(suffix, checkpoint, tmp_path):
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
    save(tmp_path / "a.pt", checkpoint)
    assert model.cli(["--checkpoint", str(tmp_path / "a.pt"), "--export", str(tmp_path / f"b{suffix}")]) == 0
    kind = {".pt2": "a file of torch.export or --export", ".onnx": "an ONNX file"}[suffix]
    with pytest.raises(CheckpointError, match=kind):
        checkpoints.read(tmp_path / f"b{suffix}")


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
    assert (checkpoint["levels"], checkpoint["fit"]) == (None, "crop")
    sizing = {name: checkpoint[name] for name in ("image_size", "resize", "interpolation", "mean", "std")}
    [test_set] = datasets.load("shapes", splits=["test"], **sizing)
    accuracy = score(*outputs_of_set(network, test_set, classes=10))["accuracy"]
    assert accuracy == pytest.approx(checkpoint["metrics"]["test_accuracy"], abs=0.002) and accuracy > 0.39

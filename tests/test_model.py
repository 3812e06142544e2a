import importlib.util
import json
import math
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, same_weights, save
from torch import nn

import datasets
import model
from model import CheckpointError

FORMAT_1 = ROOT / "tests" / "files" / "format_1.pt"  # of `train.py --config configs/shapes.toml --image-size 8`


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return model.create("cifar_quick", {"classes": 3})


@pytest.fixture
def checkpoint(network) -> dict:
    return {
        "format": 2,
        "model": {"name": "cifar_quick", "options": {"classes": 3}},
        "classes": ["a", "b", "c"],
        "image_size": 32,
        "resize": 32,
        "interpolation": "bilinear",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
        "state_dict": network.state_dict(),
        "epoch": 1,
        "metrics": {},
        "config": {},
    }


# ---- the network ----


def test_settings_that_a_network_does_not_have_are_refused_and_others_left_to_it():
    assert model.network_options("cifar_quick", 5, 16, activation="auto", batch_norm=False) == {
        **{"classes": 5, "image_size": 16, "batch_norm": False, "activation": "silu"}
    }
    assert model.network_options("resnet18", 5, 16, 7, stem="small", batch_norm=True, activation="relu") == {
        **{"classes": 5, "image_size": 16, "stem": "small", "append": 7}
    }
    with pytest.raises(model.NetworkError, match=r"^--no-batch-norm: resnet18 has no such option; add --batch-norm$"):
        model.network_options("resnet18", 5, 16, batch_norm=False)


def test_whitening_filters_make_the_first_layers_outputs_uncorrelated():
    pictures = datasets.shapes("train", 300)
    images, _ = next(pictures.batches(300))
    network = model.CifarQuick()
    model.whiten(network, images)
    outputs = torch.nn.functional.conv2d(images, network.stage1.conv.weight).transpose(0, 1).flatten(1)
    assert torch.allclose(outputs[:16], -outputs[16:], atol=1e-4)
    products = outputs[:16] @ outputs[:16].T / outputs.shape[1]
    assert torch.allclose(products, torch.eye(16), atol=0.05)
    filters = network.stage1.conv.weight[:16].flatten(1)  # of the two signs, the same one on every machine
    assert (filters.gather(1, filters.abs().argmax(1, keepdim=True)) > 0).all()
    with pytest.raises(model.NetworkError, match="--whiten: this network does not begin with a convolution"):
        model.whiten(nn.Linear(3, 3), images)


def test_test_time_augmentation_is_the_mean_of_its_views(network):
    images, labels = torch.rand(5, 3, 32, 32), torch.arange(5)
    network.eval()
    with torch.no_grad():
        both = lambda images: (network(images) + network(images.flip(3))) / 2  # noqa: E731
        moved = torch.from_numpy(np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), "reflect"))
        shifted = (both(moved[:, :, :32, :32]) + both(moved[:, :, 2:, 2:])) / 2
        wanted = {"none": network(images), "mirror": both(images), "shift": both(images) / 2 + shifted / 2}
    for tta in model.TTA:
        logits, _ = model.outputs(network, [(images, labels)], tta)
        assert torch.allclose(logits, wanted[tta], atol=1e-6)


def test_the_plain_network_is_the_tutorials():
    plain = model.create("cifar_quick", {"batch_norm": False, "activation": "none"})
    assert [type(layer) for layer in plain.modules() if not list(layer.children())] == [
        *[nn.Conv2d, nn.MaxPool2d] * 3,
        *[nn.Flatten, nn.Linear, nn.Linear],
    ]
    assert sum(p.numel() for p in plain.parameters()) == 145_578
    assert plain(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_normalisation_and_activation_are_there_by_default(network):
    layers = [type(layer) for layer in network.modules()]
    assert layers.count(nn.BatchNorm2d) == 3 and layers.count(nn.BatchNorm1d) == 1 and layers.count(nn.SiLU) == 4
    assert all(layer.bias is None for layer in network.modules() if isinstance(layer, nn.Conv2d))


@pytest.mark.parametrize("activation", model.ACTIVATIONS)
@pytest.mark.parametrize("image_size", [8, 32, 50])
def test_any_size_from_eight_and_every_activation(image_size, activation):
    network = model.create("cifar_quick", {"classes": 4, "image_size": image_size, "activation": activation})
    assert network(torch.rand(2, 3, image_size, image_size)).shape == (2, 4)


@pytest.mark.parametrize(("image_size", "width"), [(8, 0.1), (32, 1.0), (50, 2.0)])
def test_fast_takes_any_size_and_width(image_size, width):
    options = model.network_options("fast", 4, image_size, width=width)
    network = model.create("fast", options)
    assert network(torch.rand(2, 3, image_size, image_size)).shape == (2, 4)
    assert network.layer3.conv.weight.shape == (round(128 * width), round(32 * width), 3, 3)
    with pytest.raises(model.NetworkError, match=r"--width 2\.0: cifar_quick has no such option; add --width 1\.0"):
        model.network_options("cifar_quick", 4, 32, width=2.0)


def test_the_averages_of_fast_follow_quickly():
    network, images = model.create("fast", {"image_size": 8}).train(), torch.rand(20, 3, 8, 8)
    network(images)
    norm, conv, pool = network.layer1.norm, network.layer1.conv, network.layer1.pool
    assert torch.allclose(norm.running_mean, 0.4 * pool(conv(images)).mean((0, 2, 3)), atol=1e-6)


def test_networks_that_cannot_be():
    with pytest.raises(model.NetworkError, match="fast halves a picture three times: --image-size 7 is below 8"):
        model.create("fast", {"image_size": 7})
    with pytest.raises(model.NetworkError, match="--image-size 7 is below 8"):
        model.create("cifar_quick", {"image_size": 7})
    with pytest.raises(model.NetworkError, match=r"no network 'lenet'; python model\.py --list has all"):
        model.create("lenet", {})
    with pytest.raises(model.NetworkError, match=r"did you mean resnet18\?"):
        model.create("resnet_18", {})


class Hopeless(nn.Module):
    def __init__(self, classes: int = 10, image_size: int = 32):
        super().__init__()

    def forward(self, images):
        raise RuntimeError("for no size")


def test_a_network_that_no_size_would_help_says_why(monkeypatch):
    monkeypatch.setitem(model.NETWORKS, "hopeless", Hopeless)
    with pytest.raises(model.NetworkError, match="hopeless cannot train on 2 pictures of 32 x 32 pixels a step"):
        model.check("hopeless", {"classes": 2, "image_size": 32})


class Untraceable(model.CifarQuick):
    def forward(self, images):
        if torch.jit.is_tracing():
            raise RuntimeError("not\nhere")
        return super().forward(images)


def test_a_graph_that_cannot_be_drawn_is_named(tmp_path, capsys):
    from torch.utils.tensorboard import SummaryWriter

    network = Untraceable().train()
    with SummaryWriter(tmp_path) as writer:
        model.write_graph(writer, network, torch.zeros(1, 3, 32, 32))
    assert capsys.readouterr().err == "no graph in TensorBoard: not here\n" and network.training


def test_the_table_counts_parameters_and_multiply_adds(capsys):
    model.main(["--no-batch-norm", "--activation", "none"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["1", "stage1.conv", "32", "x", "32", "x", "32", "2,432", "2,457,600"]
    assert lines[-1].split() == ["total", "145,578", "12,354,176"]
    assert len(lines) == 11 and lines[-2].split()[:2] == ["head", "head"]


@pytest.mark.parametrize(
    ("name", "multiply_adds"), [("resnet18", 1_814_073_344), ("vit_b_32", 4_410_000_000), ("swin_t", 4_500_000_000)]
)
def test_the_tables_lines_add_up_for_every_kind_of_network(name, multiply_adds, capsys):
    """The multiply-adds at 224 pixels are those of the papers (ViT's and Swin's are given there in round numbers)."""
    assert model.cli(["--model", name, "--image-size", "224", "--classes", "1000"]) == 0
    _, *lines, total = [line.split() for line in capsys.readouterr().out.splitlines()]
    for column in (-1, -2):
        assert sum(int(line[column].replace(",", "")) for line in lines) == int(total[column].replace(",", ""))
    assert int(total[-1].replace(",", "")) == pytest.approx(multiply_adds, rel=0.02)


def test_without_torchvision_its_networks_are_refused(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert model.cli(["--model", "resnet18"]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("model.py: torchvision, which has this network, cannot be imported") and error.count("\n") == 1
    )
    assert model.cli([]) == 0


def test_the_script_writes_the_graph(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model.main(["--log-dir", str(tmp_path)])
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["graph"]
    assert f"tensorboard --logdir {tmp_path}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--image-size 4", "--image-size 4 is below 8"),
        ("--image-size 0", "must be at least 1"),
        ("--classes 0", "must be at least 1"),
        ("--classes x", "invalid int value: 'x'"),
        ("--model lenet", "no network 'lenet'"),
        ("--model resnet_18", "did you mean resnet18?"),
        ("--model alexnet", "cannot train on pictures of 32 x 32 pixels"),
        ("--model vgg11 --stem small", "vgg11 does not begin with a stride-2 convolution"),
        ("--stem small", "--stem small: cifar_quick has no such option; add --stem standard"),
        ("--model resnet18 --activation gelu", "--activation gelu: resnet18 has no such option; add --activation auto"),
        ("--model maxvit_t --image-size 224 --stem small", "--stem small: maxvit_t is built for"),
        ("--export nowhere/a.pt2 --checkpoint a.pt", "there is no folder nowhere"),
        ("--modell x", "unknown flag --modell; did you mean --model?"),
        ("--export a.pt2", "give --checkpoint FILE too"),
        ("--export a.txt --checkpoint a.pt", "must end in .pt2 or .onnx"),
    ],
)
def test_the_script_names_mistakes_in_one_line(flags, reason, capsys):
    status = model.cli(flags.split())
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("model.py: ") and error.count("\n") == 1 and reason in error


def test_the_list_has_every_network(capsys):
    assert model.cli(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [*model.NETWORKS, *model.torchvision_names()]
    assert "vgg16" in model.torchvision_names() and len(lines) > 80
    assert next(line for line in lines if line.startswith("vgg16 ")).split()[1] == "138,357,544"
    assert lines[1].split()[1] == "145,770"


# ---- losses and outputs ----


def test_losses_are_means_per_picture():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    one_hot = torch.eye(2)
    cross_entropy = -(logits.log_softmax(1) * one_hot).sum(1).mean()
    assert torch.isclose(model.loss_function(logits, labels), cross_entropy)
    assert torch.isclose(model.loss_function(logits, labels, "mse"), (logits - one_hot).square().mean())
    assert torch.isclose(model.loss_function(logits, labels, "l1"), (logits - one_hot).abs().mean())


@pytest.mark.parametrize("kind", model.LOSSES)
def test_label_smoothing_shares_a_part_of_the_label(kind):
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    target = nn.functional.one_hot(labels, 4) * 0.8 + 0.05
    expected = {
        "cross_entropy": -(logits.log_softmax(1) * target).sum(1).mean(),
        "mse": (logits - target).square().mean(),
        "l1": (logits - target).abs().mean(),
    }[kind]
    assert torch.isclose(model.loss_function(logits, labels, kind, 0.2), expected)


def test_outputs_are_those_of_eval_mode(network):
    batches = [(torch.rand(4, 3, 32, 32), torch.arange(4) % 3), (torch.rand(1, 3, 32, 32), torch.tensor([2]))]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    logits, labels = model.outputs(network.train(), batches)
    assert network.training  # as it was before
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with torch.no_grad():
        expected = torch.cat([network.eval()(images) for images, _ in batches])
    assert torch.allclose(logits, expected) and labels.tolist() == [0, 1, 2, 0, 2]
    assert not logits.requires_grad  # which would keep all that was computed


@pytest.mark.parametrize("kind", model.LOSSES)
def test_probabilities_are_shares_of_one(kind):
    shares = model.probabilities(torch.tensor([[0.9, 0.1, -0.2], [-1.0, -2.0, -3.0]]), kind)
    assert torch.allclose(shares.sum(1), torch.ones(2)) and (shares >= 0).all() and shares[0].argmax() == 0
    if kind != "cross_entropy":
        assert shares[1].argmax() == 0  # the guess stays where no logit is positive
        assert torch.allclose(shares[0], torch.tensor([0.9, 0.1, 0.0]), atol=1e-6)


# ---- checkpoints ----


def test_a_saved_network_answers_the_same(network, checkpoint, tmp_path):
    images = torch.rand(4, 3, 32, 32)
    network.train()(images)  # moves the batch statistics, which must be saved too
    save(tmp_path / "a.pt", checkpoint)
    loaded, content = model.load(tmp_path / "a.pt")
    assert not loaded.training and content["classes"] == ["a", "b", "c"]
    with torch.no_grad():
        assert torch.equal(loaded(images), network.eval()(images))
    assert not list(tmp_path.glob(".*"))


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else a crash of the machine could leave an empty file in the place of a whole one."""
    seen, fsync = [], os.fsync

    def noted(number: int) -> None:
        fsync(number)
        seen.append((os.fstat(number).st_size, (tmp_path / "a").read_bytes()))

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", noted)
    model.write(tmp_path / "a", b"whole")
    assert seen == [(5, b"old")] and (tmp_path / "a").read_bytes() == b"whole"


def test_weights_of_half_precision_are_computed_with_in_float32(network, checkpoint, tmp_path):
    weights = {name: of.half() if of.is_floating_point() else of for name, of in checkpoint["state_dict"].items()}
    save(tmp_path / "a.pt", checkpoint | {"state_dict": weights})
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model.load(tmp_path / "a.pt")[0](images), network.eval()(images), atol=0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot limit the size of files")
def test_saving_replaces_a_file_whole_or_not_at_all(checkpoint, tmp_path):
    path = tmp_path / "a.pt"
    save(path, checkpoint)
    whole = path.read_bytes()

    code = (
        "import pathlib, resource, signal, sys, torch, model\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"  # as good as a full disk
        "try:\n"
        "    model.write(path, model.packed(torch.load(path, weights_only=True)))\n"
        "except OSError as error:\n"
        "    sys.exit(error.strerror)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert result.stderr.strip() == "File too large"
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


class Large:
    """Thirty bytes that become two thousand million."""

    def __reduce__(self):
        return (bytearray, (2 * 10**9,))


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def damage(kind: str, path, checkpoint: dict) -> None:
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
    save(tmp_path / "a.pt", model.read(FORMAT_1))
    content, path = (tmp_path / "a.pt").read_bytes(), tmp_path / "b.pt"
    for at in [*range(0, len(content), 997), *range(len(content) - 100, len(content))]:
        path.write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
        with pytest.raises(CheckpointError, match=r"b\.pt: "):
            model.load(path)


def test_checkpoints_of_format_1_still_answer_as_they_did():
    network, checkpoint = model.load(FORMAT_1)
    assert checkpoint["format"] == 1 and (checkpoint["resize"], checkpoint["interpolation"]) == (8, "bilinear")
    how = {name: checkpoint[name] for name in ("image_size", "resize", "interpolation", "mean", "std")}
    [test_set] = datasets.load("shapes", splits=["test"], **how)
    accuracy = model.score(*model.outputs(network, test_set.batches(250)))["accuracy"]
    assert accuracy == pytest.approx(checkpoint["metrics"]["test_accuracy"], abs=0.002) and accuracy > 0.39


def test_what_a_file_holds(capsys):
    assert model.cli(["--checkpoint", str(FORMAT_1)]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = [
        "format 1",
        "cifar_quick (classes 10, image_size 8, batch_norm True, activation relu), 84,330 parameters",
    ]
    expected += [
        "10: arrow, circle",
        "8 x 8 pixels, bilinear",
        "0.4948, 0.4969, 0.4979",
        "0.2768, 0.2765, 0.2755",
        "20",
    ]
    assert all(what in line for what, line in zip(expected, lines, strict=False))
    assert "    test_accuracy = 0.397" in lines and "    lr = 0.1" in lines
    assert model.cli(["--checkpoint", "nothing.pt"]) == 1
    assert capsys.readouterr().err == "model.py: nothing.pt: no such checkpoint\n"


# ---- for other programs ----


def exported(checkpoint, tmp_path, name, capsys):
    """Export a checkpoint by the command line; returns its pictures in [0, 1], their logits, and the new file."""
    save(tmp_path / "a.pt", checkpoint)
    path = tmp_path / name
    assert model.cli(["--checkpoint", str(tmp_path / "a.pt"), "--export", str(path)]) == 0
    assert "gives the network's own answers" in capsys.readouterr().out
    images = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        logits = model.load(tmp_path / "a.pt")[0](datasets.normalize(images * 255, [0.5] * 3, [0.2] * 3))
    return images, logits, path


def test_export_takes_any_batch_of_plain_pictures(checkpoint, tmp_path, capsys):
    images, logits, path = exported(checkpoint, tmp_path, "a.pt2", capsys)
    facts = {"facts": ""}
    program = torch.export.load(path, extra_files=facts)
    assert torch.allclose(program.module()(images), logits, atol=1e-4)
    assert torch.allclose(program.module()(images[:1]), logits[:1], atol=1e-4)
    assert json.loads(facts["facts"])["classes"] == ["a", "b", "c"]


def test_export_to_onnx(checkpoint, tmp_path, capsys):
    onnx = pytest.importorskip("onnx", reason="needs `pip install onnx onnxscript`")
    pytest.importorskip("onnxscript", reason="needs `pip install onnx onnxscript`")
    from onnx.reference import ReferenceEvaluator

    images, logits, path = exported(checkpoint, tmp_path, "a.onnx", capsys)
    [answer] = ReferenceEvaluator(onnx.load(path)).run(["logits"], {"images": images.numpy()})
    assert torch.allclose(torch.from_numpy(answer), logits, atol=1e-4)


def test_onnx_without_its_packages_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status = model.cli(["--checkpoint", str(FORMAT_1), "--export", "a.onnx"])
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and "`pip install onnx onnxscript`" in error


class Moody(model.CifarQuick):
    """Cannot be exported: what it does depends on what it sees."""

    def forward(self, images):
        return super().forward(images) * (2 if images.mean().item() > 0 else 1)


class Fickle(model.CifarQuick):
    """Can be exported, but what comes out answers otherwise."""

    def forward(self, images):
        return super().forward(images) + (0 if torch.compiler.is_exporting() else 1)


@pytest.mark.parametrize("odd", [Moody, Fickle])
def test_a_failed_export_leaves_no_file(odd, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(model.NETWORKS, "cifar_quick", odd)
    save(tmp_path / "a.pt", checkpoint)
    assert model.cli(["--checkpoint", str(tmp_path / "a.pt"), "--export", str(tmp_path / "b.pt2")]) == 1
    error = capsys.readouterr().err
    assert "b.pt2 was not written, the export failed: " in error and error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_same_weights_tells_networks_apart(checkpoint, tmp_path):
    save(tmp_path / "a.pt", checkpoint)
    other = {name: value + 1 for name, value in checkpoint["state_dict"].items()}
    save(tmp_path / "b.pt", checkpoint | {"state_dict": other})
    assert same_weights(tmp_path / "a.pt", tmp_path / "a.pt")
    assert not same_weights(tmp_path / "a.pt", tmp_path / "b.pt")

"""Runs that begin with trained weights: what is filled in from them, what is frozen, and what is refused."""

import re
import tomllib
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, same_weights

import model
import train
from quick.checkpoints import read
from quick.run.config import resolve
from quick.run.settings import Config

QUICK = "--data shapes --limit 200 --epochs 1 --device cpu --run-name a --no-views".split()


def train_from(tmp_path, *flags: object) -> dict:
    """A quick run on shapes; returns its best checkpoint."""
    assert train.cli([*QUICK, "--log-dir", str(tmp_path), *map(str, flags)]) == 0
    return torch.load(tmp_path / "a" / "best.pt", weights_only=True)


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """An ImageNet weights file for the smallest network of all, where torch looks for it; the network's own weights."""
    from torchvision import models

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    torch.manual_seed(0)
    state_dict = models.squeezenet1_1().state_dict()
    (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(state_dict, tmp_path / "torch" / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    return state_dict


# ---- what the weights bring along ----


def resolved(*flags: str) -> Config:
    """The config of a new run with these flags and pretrained weights."""
    config, _, _ = train.parse_train([*flags])
    return resolve(config, model.pretrained(config.weights, config.model))


def test_imagenet_weights_bring_their_pictures_sizes(imagenet):
    flags = ["--model", "squeezenet1_1", "--weights", "imagenet"]
    config = resolved(*flags)
    assert (config.image_size, config.resize, config.interpolation) == (224, 256, "bilinear")
    assert config.mean == (0.485, 0.456, 0.406) and config.std == (0.229, 0.224, 0.225)
    config = resolved(*flags, "--image-size", "64")
    assert (config.image_size, config.resize) == (64, 64)
    config = resolved(*flags, *"--image-size 64 --resize 72 --interpolation bicubic --mean 0 0 0 --std 1 1 1".split())
    assert (config.image_size, config.resize, config.interpolation) == (64, 72, "bicubic")
    assert (config.mean, config.std) == ((0, 0, 0), (1, 1, 1))


def test_what_weights_bring_is_in_the_checkpoint_and_used_to_predict(imagenet, tmp_path, colour_folder):
    run = ["--data", colour_folder, "--limit", 12, "--model", "squeezenet1_1", "--weights", "imagenet"]
    checkpoint = train_from(tmp_path, *run, "--batch-size", 4)
    assert (checkpoint["image_size"], checkpoint["resize"], checkpoint["interpolation"]) == (224, 256, "bilinear")
    assert checkpoint["mean"] == [0.485, 0.456, 0.406]
    stored = tomllib.loads((tmp_path / "a" / "config.toml").read_text())
    assert (stored["image_size"], stored["resize"], stored["weights"]) == (224, 256, "imagenet")


def test_checkpoints_bring_theirs(run):
    config = resolved("--weights", str(run / "best.pt"))
    assert list(config.mean) == read(run / "best.pt")["mean"] and config.image_size == 32


# ---- the head ----


def unchanged(before: dict, after: dict) -> set[str]:
    return {key for key in after if key in before and torch.equal(before[key], after[key])}


def test_the_head_is_kept_for_the_same_classes_and_new_for_others(run):
    old = read(run / "best.pt")
    config, _, _ = train.parse_train(["--weights", str(run / "best.pt")])
    for classes, head, kept in (
        (old["classes"], "auto", True),
        (old["classes"], "replace", False),
        (["a", "b"], "auto", False),
        (["a"] * 10, "auto", False),
    ):
        config = replace(config, head=head, image_size=32)
        options = model.config_options(config, len(classes), old)
        names = model.head_keys(config.model, options)
        network = model.build(config, options, names, classes, old)
        same = unchanged(old["state_dict"], network.state_dict()) if len(classes) == 10 else set()
        assert names == ["head.weight", "head.bias"]
        assert ({"head.weight", "head.bias"} <= same) is kept
        own = network.state_dict()
        assert all(torch.equal(own[key], value) for key, value in old["state_dict"].items() if key not in names)


def test_an_appended_layer_stands_behind_all_that_was_there(run, tmp_path, capsys):
    old = torch.load(run / "best.pt", weights_only=True)["state_dict"]
    checkpoint = train_from(tmp_path, "--weights", run / "best.pt", "--head", "append", "--freeze", "all")
    new = checkpoint["state_dict"]
    assert checkpoint["model"]["options"]["append"] == 10
    assert all(torch.equal(new[f"network.{key}"], value) for key, value in old.items())
    assert set(new) - {f"network.{key}" for key in old} == {"head.weight", "head.bias"}
    network, _ = model.load(tmp_path / "a" / "best.pt")
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    # and can be stood on again, with a new last layer
    again = train_from(tmp_path, "--weights", tmp_path / "a" / "best.pt", "--head", "replace", "--run-name", "b")
    assert again["model"]["options"]["append"] == 10
    flags = [*QUICK, "--log-dir", str(tmp_path), "--weights", str(tmp_path / "a" / "best.pt"), "--head", "append"]
    assert train.cli([*flags, "--run-name", "c"]) == 2
    assert "has an appended layer already; add --head replace" in capsys.readouterr().err


def test_the_tutorials_appended_layer_on_a_network_of_torchvision(imagenet, tmp_path):
    flags = "--model squeezenet1_1 --weights imagenet --image-size 32 --head append --freeze all".split()
    checkpoint = train_from(tmp_path, *flags)
    assert checkpoint["state_dict"]["head.weight"].shape == (10, 1000)
    assert all(torch.equal(checkpoint["state_dict"][f"network.{key}"], value) for key, value in imagenet.items())


# ---- what is frozen ----


@pytest.mark.parametrize(("freeze", "stages"), [("1", ["stage1"]), ("3", ["stage1", "stage2", "stage3"])])
def test_frozen_stages_keep_weights_and_statistics(run, tmp_path, freeze, stages, capsys):
    old = torch.load(run / "best.pt", weights_only=True)["state_dict"]
    new = train_from(tmp_path, "--weights", run / "best.pt", "--freeze", freeze, "--epochs", 2)["state_dict"]
    frozen = {key for key in old if key.split(".")[0] in stages}
    assert unchanged(old, new) == frozen and any("running_mean" in key for key in frozen)
    assert "of them trained" in capsys.readouterr().err


# ---- whole runs ----


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param("--stem small --model resnet18 --image-size 16", marks=pytest.mark.expensive),
        pytest.param("--model mobilenet_v3_small", marks=pytest.mark.expensive),
    ],
)
def test_networks_of_torchvision_train_and_repeat(flags, tmp_path):
    small = ["--limit", 20, "--batch-size", 10, *flags.split()]
    first = train_from(tmp_path, *small)
    assert first["model"]["name"] == first["config"]["model"]
    assert train.cli(["--config", str(tmp_path / "a" / "config.toml"), "--log-dir", str(tmp_path / "again")]) == 0
    [again] = (tmp_path / "again").iterdir()
    assert same_weights(tmp_path / "a" / "best.pt", again / "best.pt")


def test_the_two_stages_of_the_photos_config(imagenet, tmp_path, colour_folder, monkeypatch):
    """The commands in its head, for a smaller network; in the second stage the last layer is the first one's."""
    monkeypatch.chdir(tmp_path)
    head = (ROOT / "configs" / "photos.toml").read_text(encoding="utf-8")
    first, second = re.findall(r"(?m)^#   (?:python train.py|\.\.\.) (.+)", head)
    first = first.replace("configs", str(ROOT / "configs")).replace("--data photos", f"--data {colour_folder}")
    first += " --model squeezenet1_1 --image-size 32 --limit 12 --epochs 1 --device cpu --no-views"
    assert train.cli(first.split()) == 0
    second = re.sub("--lr [0-9.]+", "--lr 1e-30", second).replace("--epochs 5", "--epochs 1")
    assert train.cli(f"{first} {second}".split()) == 0
    old, new = (read(tmp_path / "logs" / name / "best.pt") for name in ("photos", "photos2"))
    assert unchanged(imagenet, old["state_dict"]) == set(imagenet) - {"classifier.1.weight", "classifier.1.bias"}
    assert all(torch.allclose(value, new["state_dict"][key]) for key, value in old["state_dict"].items())
    assert new["config"]["freeze"] == "0" and new["mean"] == [0.485, 0.456, 0.406]


@pytest.mark.expensive
def test_the_vgg16_config_trains_the_head_of_vgg16(tmp_path, monkeypatch):
    """The config as it is, but for the data: 528 MB of weights (other ones here) are loaded, and saved again."""
    from torchvision import models

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    path = tmp_path / "torch" / "hub" / "checkpoints" / "vgg16-397923af.pth"
    path.parent.mkdir(parents=True)
    with torch.device("meta"):
        original = models.vgg16().state_dict()
    original = {name: torch.full(weight.shape, 1e-3 * place) for place, (name, weight) in enumerate(original.items())}
    torch.save(original, path)
    flags = ["--config", str(ROOT / "configs" / "vgg16.toml"), "--limit", "20", "--epochs", "1"]
    assert train.cli([*flags, *QUICK[:2], *QUICK[6:], "--log-dir", str(tmp_path)]) == 0
    path.unlink()
    (tmp_path / "a" / "epoch_001.pt").unlink()
    new = torch.load(tmp_path / "a" / "best.pt", weights_only=True)["state_dict"]
    assert unchanged(original, new) == set(original) - {"classifier.6.weight", "classifier.6.bias"}
    assert new["classifier.6.weight"].shape == (10, 4096)
    (tmp_path / "a" / "best.pt").unlink()


# ---- mistakes ----


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        ("--model resnet_18", 2, "--model: no network 'resnet_18'; python model.py --list has all; did you mean"),
        ("--model alexnet", 2, "alexnet cannot train on pictures of 32 x 32 pixels (Given input size"),
        (
            "--model resnet18 --batch-size 1",
            2,
            "cannot train on pictures of 32 x 32 pixels (Expected more than 1 value",
        ),
        (
            "--model resnet18 --activation gelu",
            2,
            "--activation gelu: resnet18 has no such option; add --activation auto",
        ),
        ("--stem small", 2, "--stem small: cifar_quick has no such option; add --stem standard"),
        ("--model vgg11 --stem small", 2, "vgg11 does not begin with a stride-2 convolution; use --stem standard"),
        ("--weights imagenet", 2, "there are none for cifar_quick; take a network of torchvision"),
        ("--weights nowhere.pt", 1, "nowhere.pt: no such checkpoint"),
        ("--weights RUN --model resnet18", 2, "it holds cifar_quick, not resnet18; add --model cifar_quick"),
        ("--weights RUN --activation gelu", 2, "that network was trained otherwise; add --activation silu"),
        ("--weights RUN --no-batch-norm", 2, "that network was trained otherwise; add --batch-norm"),
        ("--weights RUN --image-size 16", 1, "(trained on 32 x 32 pixels): its weights do not fit the network: wrong"),
        ("--weights RUN --resize 31", 2, "--resize 31 is below the image size, 32 pixels"),
        ("--head append", 2, "an untrained cifar_quick has no outputs to append to; add --weights FILE"),
        ("--head behead", 2, "--head: 'behead' is not one of auto, replace, append"),
        ("--freeze 1", 2, "--freeze 1: untrained stages would stay random; add --weights"),
        ("--freeze most --weights RUN", 2, "--freeze: 'most' is neither a number of stages nor all"),
        ("--freeze 00 --weights RUN", 2, "--freeze: '00' is neither a number of stages nor all"),
        ("--freeze 5 --weights RUN", 2, "--freeze 5: there are 4 stages before the head"),
        ("--freeze all --weights RUN --backbone-lr 0.1", 2, "--backbone-lr: with --freeze all nothing but the head"),
    ],
)
def test_what_cannot_be_is_one_line(flags, status, message, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = train.cli([*QUICK, *flags.replace("RUN", str(run / "best.pt")).split()])
    error = capsys.readouterr().err
    assert found == status and message in error and error.count("\n") == 1 and error.startswith("train.py: ")
    assert not list(tmp_path.iterdir())

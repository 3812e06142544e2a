"""model.py: our own networks, creating and loading networks by name, and the command line."""

import importlib.util
import sys

import pytest
import torch
from conftest import ROOT, save
from samples import a_checkpoint
from torch import nn

import model
from quick.errors import CheckpointError, NetworkError
from quick.nets.activations import ACTIVATIONS
from quick.run.settings import Config

FORMAT_1 = ROOT / "tests" / "files" / "format_1.pt"  # of `train.py --config configs/shapes.toml --image-size 8`


# ---- our own networks ----


def test_the_plain_network_is_the_tutorials():
    plain = model.create("cifar_quick", {"batch_norm": False, "activation": "none"})
    assert [type(layer) for layer in plain.modules() if not list(layer.children())] == [
        *[nn.Conv2d, nn.MaxPool2d] * 3,
        *[nn.Flatten, nn.Linear, nn.Linear],
    ]
    assert sum(p.numel() for p in plain.parameters()) == 145_578
    assert plain(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_normalisation_and_activation_are_there_by_default():
    network = model.create("cifar_quick", {"classes": 3})
    layers = [type(layer) for layer in network.modules()]
    assert layers.count(nn.BatchNorm2d) == 3 and layers.count(nn.BatchNorm1d) == 1 and layers.count(nn.SiLU) == 4
    assert all(layer.bias is None for layer in network.modules() if isinstance(layer, nn.Conv2d))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("image_size", [8, 32, 50])
def test_any_size_from_eight_and_every_activation(image_size, activation):
    network = model.create("cifar_quick", {"classes": 4, "image_size": image_size, "activation": activation})
    assert network(torch.rand(2, 3, image_size, image_size)).shape == (2, 4)


@pytest.mark.parametrize(("image_size", "width"), [(8, 0.1), (32, 1.0), (50, 2.0)])
def test_fast_takes_any_size_and_width(image_size, width):
    options = model.config_options(Config(model="fast", image_size=image_size, width=width), 4)
    network = model.create("fast", options)
    assert network(torch.rand(2, 3, image_size, image_size)).shape == (2, 4)
    assert network.layer3.conv.weight.shape == (round(128 * width), round(32 * width), 3, 3)
    with pytest.raises(NetworkError, match=r"--width 2\.0: cifar_quick has no such option; add --width 1\.0"):
        model.config_options(Config(model="cifar_quick", width=2.0), 4)


def test_the_averages_of_fast_follow_quickly():
    network, images = model.create("fast", {"image_size": 8}).train(), torch.rand(20, 3, 8, 8)
    network(images)
    norm, conv, pool = network.layer1.norm, network.layer1.conv, network.layer1.pool
    assert torch.allclose(norm.running_mean, 0.4 * pool(conv(images)).mean((0, 2, 3)), atol=1e-6)


# ---- networks by name ----


def test_settings_that_a_network_does_not_have_are_refused_and_others_left_to_it():
    assert model.config_options(Config(model="cifar_quick", image_size=16, batch_norm=False), 5) == {
        **{"classes": 5, "image_size": 16, "batch_norm": False, "activation": "silu"}
    }
    config = Config(model="resnet18", image_size=16, stem="small", activation="relu", weights="x", head="append")
    assert model.config_options(config, 5, {"model": {"options": {}}, "classes": list("abcdefg")}) == {
        **{"classes": 5, "image_size": 16, "stem": "small", "append": 7}
    }
    with pytest.raises(NetworkError, match=r"^--no-batch-norm: resnet18 has no such option; add --batch-norm$"):
        model.config_options(Config(model="resnet18", batch_norm=False), 5)


def test_networks_that_cannot_be():
    with pytest.raises(NetworkError, match="fast halves a picture three times: --image-size 7 is below 8"):
        model.create("fast", {"image_size": 7})
    with pytest.raises(NetworkError, match="--image-size 7 is below 8"):
        model.create("cifar_quick", {"image_size": 7})
    with pytest.raises(NetworkError, match=r"no network 'lenet'; python model\.py --list has all"):
        model.create("lenet", {})
    with pytest.raises(NetworkError, match=r"did you mean resnet18\?"):
        model.create("resnet_18", {})


def test_weights_of_another_network_are_refused():
    assert model.pretrained(str(FORMAT_1), "cifar_quick")["image_size"] == 8
    with pytest.raises(NetworkError, match=r"format_1\.pt: it holds cifar_quick, not fast; add --model cifar_quick$"):
        model.pretrained(str(FORMAT_1), "fast")
    with pytest.raises(NetworkError, match="--weights imagenet: there are none for cifar_quick"):
        model.pretrained("imagenet", "cifar_quick")
    with pytest.raises(CheckpointError, match=r"nothing\.pt: no such checkpoint"):
        model.pretrained("nothing.pt", "fast")


# ---- loading ----


def test_a_saved_network_answers_the_same(tmp_path):
    network, images = model.create("cifar_quick", {"classes": 3}), torch.rand(4, 3, 32, 32)
    network.train()(images)  # moves the batch statistics, which must be saved too
    save(tmp_path / "a.pt", a_checkpoint(network, classes=3))
    loaded, content = model.load(tmp_path / "a.pt")
    assert not loaded.training and content["classes"] == ["class 0", "class 1", "class 2"]
    with torch.no_grad():
        assert torch.equal(loaded(images), network.eval()(images))
    assert not list(tmp_path.glob(".*"))


def test_weights_of_half_precision_are_computed_with_in_float32(tmp_path):
    network, images = model.create("cifar_quick", {"classes": 3}), torch.rand(4, 3, 32, 32)
    checkpoint = a_checkpoint(network, classes=3)
    weights = {key: value.half() if value.is_floating_point() else value for key, value in network.state_dict().items()}
    save(tmp_path / "a.pt", checkpoint | {"state_dict": weights})
    with torch.no_grad():
        assert torch.allclose(model.load(tmp_path / "a.pt")[0](images), network.eval()(images), atol=0.01)


# ---- the command line ----


def test_the_script_prints_the_table_of_a_network(capsys):
    assert model.cli(["--no-batch-norm", "--activation", "none", "--image-size", "0", "--classes", "10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["stage", "layer", "output", "parameters", "multiply-adds"]
    assert lines[-1].split() == ["total", "145,578", "12,354,176"] and lines[-2].split()[:2] == ["head", "head"]


def test_a_config_file_gives_the_flags_their_defaults(tmp_path, capsys):
    (tmp_path / "a.toml").write_text('model = "fast"\nwidth = 0.5\nimage_size = 16\n')
    assert model.cli(["--config", str(tmp_path / "a.toml"), "--width", "0.25"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:7] == ["1", "layer1.conv", "8", "x", "16", "x", "16"]


def test_without_torchvision_its_networks_are_refused(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert model.cli(["--model", "resnet18"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("model.py: torchvision, which has this network, cannot be imported")
    assert error.count("\n") == 1
    assert model.cli([]) == 0


def test_a_torchvision_for_another_pytorch_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "torchvision").mkdir()
    code = 'raise RuntimeError("operator torchvision::nms does not exist")\n'
    (tmp_path / "torchvision" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    assert model.cli(["--model", "resnet18"]) == 2
    error = capsys.readouterr().err
    assert "does not exist" in error and "both by one command of pip" in error and error.count("\n") == 1


def test_the_script_writes_the_graph(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model.main(["--log-dir", str(tmp_path)])
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["graph"]
    assert f"\nnext: tensorboard --logdir {tmp_path}\nthen open http://" in capsys.readouterr().out


def test_the_script_lists_the_networks(capsys):
    assert model.cli(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["network", "parameters"] and [line.split()[0] for line in lines[1:3]] == [
        *model.NETWORKS
    ]


def test_the_script_tells_what_a_file_holds(capsys):
    assert model.cli(["--checkpoint", str(FORMAT_1)]) == 0
    assert f"{FORMAT_1}, " in capsys.readouterr().out.splitlines()[0]
    assert model.cli(["--checkpoint", "nothing.pt"]) == 1
    assert capsys.readouterr().err == "model.py: nothing.pt: no such checkpoint\n"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--image-size 4", "--image-size 4 is below 8"),
        ("--image-size -1", "--image-size: -1 is not at least 0"),
        ("--classes 0", "must be at least 1"),
        ("--classes x", "invalid int value: 'x'"),
        ("--width 0", "--width: 0.0 is not above 0"),
        ("--model lenet", "no network 'lenet'"),
        ("--model resnet_18", "did you mean resnet18?"),
        ("--model alexnet", "cannot train on pictures of 32 x 32 pixels"),
        ("--model vgg11 --stem small", "vgg11 does not begin with a stride-2 convolution"),
        ("--stem small", "--stem small: cifar_quick has no such option; add --stem standard"),
        ("--model resnet18 --activation gelu", "--activation gelu: resnet18 has no such option; add --activation auto"),
        ("--model maxvit_t --image-size 224 --stem small", "--stem small: maxvit_t is built for"),
        ("--checkpoint best.pt --model fast", "--model does nothing with --checkpoint; leave it out"),
        ("--checkpoint best.pt --classes 7", "--classes does nothing with --checkpoint"),
        ("--checkpoint best.pt --no-batch-norm", "--no-batch-norm does nothing with --checkpoint"),
        ("--checkpoint best.pt --config configs/fast.toml", "--config does nothing with --checkpoint"),
        ("--list --log-dir logs", "--log-dir does nothing with --list"),
        ("--list --checkpoint best.pt", "--checkpoint does nothing with --list"),
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


def test_onnx_without_its_packages_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status = model.cli(["--checkpoint", str(FORMAT_1), "--export", "a.onnx"])
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and "`pip install onnx onnxscript`" in error


class Moody(model.CifarQuick):
    """Cannot be exported: what it does depends on what it sees."""

    def forward(self, images):
        return super().forward(images) * (2 if images.mean().item() > 0 else 1)


def test_a_failed_export_is_named_in_one_line_and_leaves_no_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(model.NETWORKS, "cifar_quick", Moody)
    save(tmp_path / "a.pt", a_checkpoint(Moody(classes=3), classes=3))
    assert model.cli(["--checkpoint", str(tmp_path / "a.pt"), "--export", str(tmp_path / "b.pt2")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("model.py: ") and error.count("\n") == 1
    assert "b.pt2 was not written, the export failed: " in error
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]

"""Torchvision's networks and their ImageNet weights."""

import inspect
import re
import typing
import urllib.error

import pytest
import torch

import model
from model import Uninitialised
from quick.errors import CheckpointError, NetworkError
from quick.nets.pretrained import STEMS, imagenet_checkpoint
from quick.nets.transfer import transfer_weights

TORCHVISION = pytest.importorskip("torchvision.models")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder for torch's downloads; returns a function that puts a network's ImageNet weights file there."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True)

    def put(name: str, state_dict: object):
        file = TORCHVISION.get_model_weights(name).DEFAULT.url.rpartition("/")[2]
        path = tmp_path / "torch" / "hub" / "checkpoints" / file
        torch.save(state_dict, path)
        return path

    return put


def test_the_small_stem_keeps_the_resolution():
    seen = {}
    for stem in STEMS:
        network = model.create("resnet18", {"classes": 10, "image_size": 32, "stem": stem}).eval()
        network.layer1.register_forward_hook(lambda _, __, output, stem=stem: seen.update({stem: output.shape[2:]}))
        assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert seen == {"standard": (8, 8), "small": (32, 32)}
    assert sum(p.numel() for p in network.parameters()) == 11_173_962  # as many as kuangliu/pytorch-cifar's ResNet18


@pytest.mark.parametrize("name", ["vgg11", "convnext_tiny", "vit_b_32", "alexnet", "maxvit_t"])
def test_networks_without_such_a_stem_say_so(name):
    reason = "is built for the sizes" if name == "maxvit_t" else "does not begin with"
    with Uninitialised(), pytest.raises(NetworkError, match=f"--stem small: {name} {reason}"):
        model.create(name, {"stem": "small", "image_size": 224})


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mnasnet0_5"])
def test_imagenet_weights_load_from_where_torch_keeps_them(name, hub):
    torch.manual_seed(0)
    original = TORCHVISION.get_model(name).eval()
    path = hub(name, original.state_dict())
    trained = model.pretrained("imagenet", name)
    path.unlink()
    assert (trained["image_size"], trained["resize"], trained["interpolation"]) == (224, 256, "bilinear")
    assert trained["mean"] == [0.485, 0.456, 0.406] and trained["std"] == [0.229, 0.224, 0.225]
    assert len(trained["classes"]) == 1000 and trained["classes"][0] == "tench"

    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = original(images)
    network = model.create(name, {"classes": 1000, "image_size": 64})
    transfer_weights(network, trained["state_dict"], (), "imagenet")
    with torch.no_grad():
        assert torch.equal(network.eval()(images), expected)


def test_the_published_densenets_have_older_names(hub):
    original = TORCHVISION.densenet121().eval()
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): value
        for key, value in original.state_dict().items()
        if "num_batches_tracked" not in key  # which did not exist then either
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    hub("densenet121", old)
    network = model.create("densenet121", {"classes": 1000})
    transfer_weights(network, imagenet_checkpoint("densenet121")["state_dict"], (), "imagenet")
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network.eval()(images), original(images))


def test_weights_that_cannot_be_had(hub, monkeypatch):
    def unreachable(url, *_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(CheckpointError, match=r"alexnet.*could not be downloaded \(no route to host\); put it at"):
        imagenet_checkpoint("alexnet")
    path = hub("alexnet", {})
    path.write_bytes(b"not the weights")
    with pytest.raises(CheckpointError, match="damaged or not alexnet's weights; delete it"):
        imagenet_checkpoint("alexnet")


def test_imagenet_files_cannot_run_code(hub, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("code ran",)

    hub("alexnet", Evil())
    with pytest.raises(CheckpointError, match="damaged or not alexnet's weights"):
        imagenet_checkpoint("alexnet")
    assert "code ran" not in capsys.readouterr().out


def test_the_signature_that_networks_are_built_by():
    """Which arguments a torchvision network gets depends on its constructor; if these are renamed, sizes are lost."""
    expected = {"vit_b_16": "image_size", "maxvit_t": "input_size", "inception_v3": "transform_input"}
    for name, parameter in expected.items():
        kind = typing.get_type_hints(TORCHVISION.get_model_builder(name))["return"]
        assert parameter in inspect.signature(kind).parameters

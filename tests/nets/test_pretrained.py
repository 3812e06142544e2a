"""Torchvision's networks and their ImageNet weights."""

import argparse
import hashlib
import inspect
import re
import typing
from pathlib import Path

import pytest
import torch
from servers import serving

import model
from model import Uninitialised
from quick.choices import STEMS
from quick.errors import CheckpointError, NetworkError
from quick.nets.pretrained import imagenet_checkpoint, torchvision_names
from quick.nets.transfer import transfer_weights
from quick.run.config import resolve
from quick.run.settings import Config

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


@pytest.fixture
def server(hub, monkeypatch):
    """A server that has SqueezeNet's weights where torchvision says that they are: `url` gives one of its addresses."""
    path = hub("squeezenet1_1", TORCHVISION.squeezenet1_1().state_dict())
    content, weights = path.read_bytes(), TORCHVISION.get_model_weights("squeezenet1_1").DEFAULT
    path.unlink()
    name = f"squeezenet1_1-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    with serving(content, name, monkeypatch) as running:
        running.use = lambda behaviour: monkeypatch.setattr(weights.value, "url", running.url(behaviour))
        running.folder, running.name = path.parent, name
        yield running


def test_a_download_of_weights_goes_on_where_it_was_cut(server):
    server.use("cut")
    with pytest.raises(CheckpointError, match=r"the connection ended after 4,\d+,\d+ bytes"):
        imagenet_checkpoint("squeezenet1_1")
    server.use("good")
    imagenet_checkpoint("squeezenet1_1")
    starts = [start for _, start in server.asked]
    assert len(starts) > 2 and starts[0] == 0 and starts == sorted(set(starts))
    assert (server.folder / server.name).read_bytes() == server.content
    imagenet_checkpoint("squeezenet1_1")
    assert len(server.asked) == len(starts)  # it is there now


@pytest.mark.parametrize("part", [b"x" * 1000, None])
def test_a_part_of_weights_is_gone_on_with_or_discarded(server, part):
    """A wrong part, and a whole one that was never given its name: that needs no server."""
    server.use("good")
    (server.folder / f"{server.name}.part").write_bytes(part or server.content)
    imagenet_checkpoint("squeezenet1_1")
    assert [start for _, start in server.asked] == ([1000, 0] if part else [])


@pytest.mark.parametrize(
    ("behaviour", "why"),
    [("corrupt", "serves other bytes"), ("html", "serves 18 bytes instead of 4,8"), ("404", "Not Found")],
)
def test_where_weights_cannot_be_had_the_folder_is_named(behaviour, why, server):
    server.use(behaviour)
    with pytest.raises(CheckpointError) as caught:
        imagenet_checkpoint("squeezenet1_1")
    error = str(caught.value)
    assert "squeezenet1_1's ImageNet weights could not be downloaded (127.0.0.1" in error and why in error
    assert f"put {server.name} (from {server.url(behaviour)}) into {server.folder}, or give --weights a file" in error
    assert "\n" not in error and not list(server.folder.glob("*.pth"))


def test_without_a_network_and_with_a_damaged_file(hub, monkeypatch, tmp_path):
    weights = TORCHVISION.get_model_weights("alexnet").DEFAULT
    monkeypatch.setattr(weights.value, "url", "http://127.0.0.1:9/alexnet-owt-7be5be79.pth")
    with pytest.raises(CheckpointError, match=r"could not be downloaded \(127.0.0.1:9: Connection refused\). Ways out"):
        imagenet_checkpoint("alexnet")
    path = hub("alexnet", {})
    path.write_bytes(b"not the weights")
    with pytest.raises(CheckpointError, match="damaged or not alexnet's weights; delete it"):
        imagenet_checkpoint("alexnet")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"file.*: (File exists|Not a directory)"):
        imagenet_checkpoint("alexnet")


def test_every_published_file_has_its_sum_in_its_name_and_its_size_said():
    for name in torchvision_names():
        weights = TORCHVISION.get_model_weights(name).DEFAULT
        assert re.fullmatch(r"[0-9a-f]{8,}", Path(weights.url).stem.rpartition("-")[2]) and weights.meta["_file_size"]


# ---- files of other programs ----


@pytest.fixture(scope="module")
def published():
    """A small network's state_dict, as torchvision has it."""
    torch.manual_seed(0)
    return TORCHVISION.shufflenet_v2_x0_5().state_dict()


def renamed(state_dict: dict, prefix: str) -> dict:
    """The state_dict of a network inside of another, with the versions of its layers."""
    network = torch.nn.Module()
    inner = model.create_empty("shufflenet_v2_x0_5", {"classes": 1000})
    inner.load_state_dict(state_dict, assign=True)
    place = network
    for part in prefix.split(".")[:-2]:
        place.add_module(part, torch.nn.Module())
        place = place.get_submodule(part)
    place.add_module(prefix.split(".")[-2], inner)
    return network.state_dict()


FORMS = {
    "bare": lambda weights: weights,
    "state_dict": lambda weights: {"epoch": 9, "arch": "x", "state_dict": renamed(weights, "module."), "best": 0.7},
    "model": lambda weights: {"model": weights, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
    "net": lambda weights: {"net": renamed(weights, "_orig_mod."), "acc": 93.0},
    "model_state_dict": lambda weights: {"model_state_dict": renamed(weights, "module._orig_mod.")},
    "a dict of today": lambda weights: dict(weights),
}


@pytest.mark.parametrize(("form", "legacy"), [*((form, False) for form in FORMS), ("bare", True), ("net", True)])
def test_a_plain_state_dict_is_taken_in_every_form(form, legacy, published, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(FORMS[form](published), path, _use_new_zipfile_serialization=not legacy)
    found = model.pretrained(str(path), "shufflenet_v2_x0_5")
    assert (found["image_size"], found["resize"], found["mean"][0]) == (224, 256, 0.485) and len(
        found["classes"]
    ) == 1000
    network = model.create("shufflenet_v2_x0_5", {"classes": 1000})
    transfer_weights(network, found["state_dict"], (), "it")
    assert all(torch.equal(value, published[key]) for key, value in network.state_dict().items())


def test_versions_of_layers_follow_their_names(tmp_path):
    """MNASNet refuses weights without a version."""
    path = tmp_path / "a.pth"
    state_dict = TORCHVISION.mnasnet0_5().state_dict()
    for form in (state_dict, dict(state_dict)):
        torch.save(form, path)
        found = model.pretrained(str(path), "mnasnet0_5")
        transfer_weights(model.create("mnasnet0_5", {"classes": 1000}), found["state_dict"], (), "it")


def test_without_imagenets_classes_nothing_is_known_of_the_pictures(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(model.create("shufflenet_v2_x0_5", {"classes": 7}).state_dict(), path)
    found = model.pretrained(str(path), "shufflenet_v2_x0_5")
    assert found.keys() == {"model", "classes", "state_dict"} and len(found["classes"]) == 7
    config = resolve(Config(model="shufflenet_v2_x0_5", weights=str(path)), found)
    assert (config.image_size, config.resize, config.mean) == (32, 32, ())
    options = model.config_options(config, 7, found)
    head = model.head_keys(config.model, options)
    network = model.build(config, options, head, [str(number) for number in range(7)], found)
    own = network.state_dict()
    assert all(torch.equal(own[key], value) == (key not in head) for key, value in found["state_dict"].items())


def test_our_own_networks_take_weights_alone_too(run, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(model.read(run / "best.pt")["state_dict"], path)
    found = model.pretrained(str(path), "cifar_quick")
    assert found["model"] == {"name": "cifar_quick", "options": {"classes": 10}}


def test_a_file_by_its_published_name_brings_its_own_sizes(tmp_path):
    path = tmp_path / "resnet50-0676ba61.pth"  # the older weights, with 256 pixels; the newer ones have 232
    with torch.device("meta"):
        shapes = TORCHVISION.resnet50().state_dict()
    torch.save({key: torch.zeros(value.shape) for key, value in shapes.items() if "fc" in key}, path)
    assert model.pretrained(str(path), "resnet50")["resize"] == 256
    path = path.rename(tmp_path / "other.pth")
    assert model.pretrained(str(path), "resnet50")["resize"] == 232


def test_what_does_not_fit_is_named(published, tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"state_dict": published}, path)
    with pytest.raises(CheckpointError, match=r"but not of vgg11: no classifier.6.weight; it has conv1.0.weight, "):
        model.pretrained(str(path), "vgg11")
    config = Config(model="shufflenet_v2_x1_0", weights=str(path), image_size=32)
    found = model.pretrained(str(path), config.model)
    options = model.config_options(config, 2, found)
    with pytest.raises(CheckpointError, match=r"a.pth .*: its weights do not fit the network: wrong shape: stage2.0"):
        model.build(config, options, model.head_keys(config.model, options), ["a", "b"], found)
    torch.save({"epoch": 3, "weights": [1]}, path)
    with pytest.raises(CheckpointError, match=r"another program, with epoch, weights; give .*, or weights alone"):
        model.pretrained(str(path), "resnet18")
    torch.save({"model": published, "args": argparse.Namespace(lr=1)}, path)
    with pytest.raises(CheckpointError, match=r"argparse.Namespace\), which could run code; .*, or weights alone"):
        model.pretrained(str(path), "shufflenet_v2_x0_5")


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

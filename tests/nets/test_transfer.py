"""Trained weights in new networks, what is frozen, and the head that trains alone."""

import re
import typing

import pytest
import torch
from conftest import save
from samples import a_checkpoint
from torch import nn

import model
from model import Uninitialised
from quick.errors import CheckpointError, NetworkError
from quick.nets.checking import check_network
from quick.nets.losses import split_outputs
from quick.nets.pretrained import torchvision_names
from quick.nets.transfer import HeadOnly, freeze, stages, train_mode, transfer_weights

SIZES = {"alexnet": 63, "inception_v3": 299, "maxvit_t": 224}  # in pixels, of those that need more than 32
SLOW = ["vgg11", "alexnet", "maxvit_t", "vit_b_16", "inception_v3", "swin_v2_t", "convnext_tiny", "densenet121"]
TORCHVISION = pytest.importorskip("torchvision.models")


def family(name: str) -> str:
    """Networks of one family share their class; Swin's second version differs too much to stand for the first."""
    kind = typing.get_type_hints(TORCHVISION.get_model_builder(name))["return"].__name__
    return kind + "v2" * name.startswith("swin_v2_")


def smallest_of_each_family() -> list[str]:
    size = {name: TORCHVISION.get_model_weights(name).DEFAULT.meta["num_params"] for name in torchvision_names()}
    smallest = {}
    for name in sorted(size, key=size.get, reverse=True):
        smallest[family(name)] = name
    return sorted(smallest.values())


def pytest_generate_tests(metafunc):
    if "any_name" in metafunc.fixturenames:
        sample = [name for name in smallest_of_each_family() if name not in SLOW]
        metafunc.parametrize("any_name", torchvision_names() if metafunc.config.getoption("--all") else sample)


def options_of(name: str, classes: int) -> dict:
    """Options with which the network works: pictures of the size in SIZES, of 32 pixels, or of what it asks for."""
    options = {"classes": classes, "image_size": SIZES.get(name, 32), "stem": "standard"}
    try:
        check_network(model.create_empty, name, options)
    except NetworkError as error:
        options["image_size"] = int(re.search(r"add --image-size (\d+)", str(error))[1])
        check_network(model.create_empty, name, options)
    return options


# ---- every network ----


def test_every_network_gets_a_new_head_answers_and_comes_back(any_name, tmp_path):
    options = options_of(any_name, 7)
    torch.manual_seed(0)
    with_thousand = model.create(any_name, options | {"classes": 1000})
    network, head = model.create(any_name, options), model.head_keys(any_name, options)
    transfer_weights(network, with_thousand.state_dict(), head, "test")
    old = with_thousand.state_dict()
    assert all(torch.equal(value, old[key]) for key, value in network.state_dict().items() if key not in head)
    del with_thousand, old

    images = torch.rand(1, 3, options["image_size"], options["image_size"])
    with torch.no_grad():
        logits = network.eval()(images)
        assert logits.shape == (1, 7) and logits.isfinite().all()
        head_only = HeadOnly(network, head, options["image_size"])
        assert torch.allclose(head_only(images), logits, atol=1e-5)
    assert stages(network, head).keys() == dict(network.named_parameters()).keys()
    freeze(network, head, None)
    last_layer = head[-1].rpartition(".")[0]
    trains = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trains == {key for key in head if key.startswith(f"{last_layer}.")}

    save(tmp_path / "a.pt", a_checkpoint(network, any_name, **options))
    del network
    loaded, _ = model.load(tmp_path / "a.pt")
    (tmp_path / "a.pt").unlink()  # some have a gigabyte
    with torch.no_grad():
        assert torch.equal(loaded(images), logits)


def test_the_sample_has_all_families():
    sample = smallest_of_each_family()
    assert {"vgg11", "resnet18", "vit_b_16", "swin_t", "swin_v2_t", "squeezenet1_1", "inception_v3"} <= set(sample)
    assert len(sample) >= 18


# ---- trained weights ----


def test_what_does_not_fit_is_named_and_changes_nothing():
    network = model.create("cifar_quick", {"classes": 3})
    weights = network.state_dict()
    wrong = {key: value for key, value in weights.items() if not key.startswith("stage1")}
    wrong |= {"head.weight": torch.zeros(3, 65), "module.a": torch.zeros(1), "stage2.norm.weight": torch.zeros(1)}
    before = {key: value.clone() for key, value in weights.items()}
    with pytest.raises(CheckpointError) as caught:
        transfer_weights(network, wrong, (), "file.pt")
    assert str(caught.value) == (
        "file.pt: its weights do not fit the network: "
        "missing: stage1.conv.weight, stage1.norm.weight, stage1.norm.bias and 2 more; unexpected: module.a; "
        "wrong shape: stage2.norm.weight [1] in place of [32], head.weight [3, 65] in place of [3, 64]"
    )
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


# ---- stages ----


@pytest.mark.parametrize(
    ("name", "first_weights"),
    [
        ("cifar_quick", ["stage1.conv", "stage2.conv", "stage3.conv", "hidden.linear"]),
        ("resnet18", ["conv1", "layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1", "layer4.0.conv1"]),
        ("alexnet", [*(f"features.{n}" for n in (0, 3, 6, 8, 10)), "classifier.1", "classifier.4"]),
    ],
)
def test_stages_go_through_the_network_in_order(name, first_weights):
    options = {"classes": 10, "image_size": 64}
    with Uninitialised():
        network = model.create(name, options)
    head = model.head_keys(name, options)
    stage_of, first = stages(network, head), {}
    for key, stage in stage_of.items():
        first.setdefault(stage, key.rpartition(".")[0])
    assert [stage_of[key] for key in head] == [0] * len(head) and 0 in stage_of.values()
    assert [first[stage] for stage in sorted(first)[1:]] == first_weights
    norms = [key for key in stage_of if "norm" in key or "bn1" in key]
    for key in norms:  # a normalisation belongs to the convolution before it
        before = list(stage_of)[list(stage_of).index(key) - 1]
        assert stage_of[key] == stage_of[before]


@pytest.mark.parametrize("name", ["cifar_quick", "vgg16_bn", "vit_b_32", "resnet18"])
def test_an_appended_head_leaves_the_stages_as_they_were(name):
    options, found = {"classes": 10, "image_size": 32}, []
    for append in ({}, {"append": 1000}):
        with Uninitialised():
            network = model.create(name, options | append)
        found.append(stages(network, model.head_keys(name, options | append)))
    plain, appended = found
    last = max(plain.values())
    for key, stage in plain.items():
        assert appended[f"network.{key}"] == (stage or last + 1)


def test_the_class_token_is_frozen_with_the_first_stage():
    options = {"classes": 10, "image_size": 32}
    with Uninitialised():
        network = model.create("vit_b_32", options)
    stage_of = stages(network, model.head_keys("vit_b_32", options))
    assert {stage_of[key] for key in ("class_token", "encoder.pos_embedding", "conv_proj.weight")} == {1}
    assert stage_of["encoder.layers.encoder_layer_0.ln_1.weight"] == 2 and max(stage_of.values()) == 13


# ---- freezing ----


def test_more_stages_than_there_are():
    network = model.CifarQuick()
    with pytest.raises(NetworkError, match="--freeze 5: there are 4 stages before the head"):
        freeze(network, ["head.weight", "head.bias"], 5)


@pytest.mark.parametrize(("count", "moves"), [(0, 4), (1, 3), (3, 1), (4, 0), (None, 0)])
def test_frozen_batch_statistics_stay(count, moves):
    network = model.CifarQuick()
    freeze(network, ["head.weight", "head.bias"], count)
    train_mode(network)
    norms = [layer for layer in network.modules() if hasattr(layer, "running_mean")]
    before = [layer.running_mean.clone() for layer in norms]
    network(torch.rand(4, 3, 32, 32)).sum().backward()
    moved = [not torch.equal(layer.running_mean, old) for layer, old in zip(norms, before, strict=True)]
    assert moved == [False] * (4 - moves) + [True] * moves
    assert [layer.weight.grad is not None for layer in norms] == moved


def test_frozen_dropout_is_off():
    with Uninitialised():
        network = model.create("vgg11", {"classes": 2, "image_size": 32})
    head = model.head_keys("vgg11", {"classes": 2, "image_size": 32})
    dropouts = [layer for layer in network.modules() if isinstance(layer, nn.Dropout)]
    for count, training in ((0, [True, True]), (8, [True, True]), (9, [False, True]), (None, [False, False])):
        freeze(network, head, count)
        train_mode(network)
        assert [layer.training for layer in dropouts] == training, count


def test_a_head_that_trains_alone_leaves_the_rest_without_gradients():
    network = model.create("googlenet", {"classes": 3, "image_size": 32})
    head = model.head_keys("googlenet", {"classes": 3, "image_size": 32})
    freeze(network, head, None)
    head_only = HeadOnly(network, head, 32)
    train_mode(head_only)
    features = head_only.features(torch.rand(2, 3, 32, 32))
    assert features.shape == (2, 1024) and not features.requires_grad and not network.training
    head_only(torch.rand(2, 3, 32, 32)).sum().backward()
    assert network.fc.weight.grad is not None and network.conv1.conv.weight.grad is None


@pytest.mark.parametrize("name", ["cifar_quick", "squeezenet1_1", "googlenet"])
def test_the_head_runs_once_a_step_and_trains_in_lower_precision(name):
    """Else autocast of PyTorch 2.10 would go on with weights that have no gradients."""
    options = {"classes": 3, "image_size": 32}
    network, head = model.create(name, options), model.head_keys(name, options)
    freeze(network, head, None)
    head_only, seen = HeadOnly(network, head, 32), []
    head_only.head.register_forward_hook(lambda *_: seen.append(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert head_only.features(torch.rand(2, 3, 32, 32)).dtype == torch.bfloat16 and not seen
        head_only(torch.rand(2, 3, 32, 32)).sum().backward()
    assert len(seen) == 1 and all(network.get_parameter(key).grad is not None for key in head[-2:])


# ---- auxiliary classifiers ----


@pytest.mark.parametrize(
    ("name", "side"), [("googlenet", 32), pytest.param("inception_v3", 75, marks=pytest.mark.expensive)]
)
def test_an_appended_head_leaves_auxiliary_classifiers_out(name, side, tmp_path):
    """All weights get gradients; files of earlier versions, and published weights, have auxiliary classifiers still."""
    options = {"classes": 3, "image_size": side, "stem": "standard"}
    torch.manual_seed(0)
    whole = model.create(name, options | {"classes": 5})
    network = model.create(name, options | {"append": 5})
    assert not [key for key in network.state_dict() if "aux" in key.lower()]
    transfer_weights(network.network, whole.state_dict(), [], "test")
    network.train()(torch.rand(2, 3, side, side)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert network.eval()(torch.rand(1, 3, side, side)).shape == (1, 3)

    earlier = {f"network.{key}": value for key, value in whole.state_dict().items()} | network.state_dict()
    assert len(earlier) > len(network.state_dict())
    save(tmp_path / "a.pt", a_checkpoint(network, name, **options, append=5) | {"state_dict": earlier})
    images = torch.rand(1, 3, side, side)
    with torch.no_grad():
        assert torch.equal(model.load(tmp_path / "a.pt")[0](images), network(images))
    damaged = {key: value for key, value in earlier.items() if "conv" not in key}
    save(tmp_path / "a.pt", a_checkpoint(network, name, **options, append=5) | {"state_dict": damaged})
    with pytest.raises(CheckpointError, match="missing: "):
        model.load(tmp_path / "a.pt")


@pytest.mark.parametrize("count", [1, 14, None])
def test_frozen_stages_before_auxiliary_classifiers_leave_all_others_gradients(count):
    options = {"classes": 3, "image_size": 32}
    network, head = model.create("googlenet", options), model.head_keys("googlenet", options)
    freeze(network, head, count)
    trainable = HeadOnly(network, head, 32) if count is None else network
    train_mode(trainable)
    outputs = split_outputs(trainable(torch.rand(2, 3, 32, 32)))
    assert len(outputs) == (1 if count is None else 3)
    sum(output.sum() for output in outputs).backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in network.parameters())


class GoesOn(model.CifarQuick):
    """Does more behind its head than a Sequential would."""

    def forward(self, images):
        return super().forward(images) + 1


def test_a_network_that_goes_on_behind_its_head_says_so():
    with pytest.raises(NetworkError, match="--freeze all: this network goes on behind its last layer"):
        HeadOnly(GoesOn(), ["head.weight", "head.bias"], 32)

"""Torchvision's networks, trained weights in them, what is frozen, and the head that trains alone."""

import inspect
import re
import typing
import urllib.error

import pytest
import torch
from conftest import save
from torch import nn

import model

TORCHVISION = pytest.importorskip("torchvision.models")


def family(name: str) -> str:
    """Networks of one family share their class; Swin's second version differs too much to stand for the first."""
    kind = typing.get_type_hints(TORCHVISION.get_model_builder(name))["return"].__name__
    return kind + "v2" * ("_v2_" in name)


def smallest_of_each_family() -> list[str]:
    size = {name: TORCHVISION.get_model_weights(name).DEFAULT.meta["num_params"] for name in model.torchvision_names()}
    best = {}
    for name in sorted(size, key=size.get, reverse=True):
        best[family(name)] = name
    return sorted(best.values())


def pytest_generate_tests(metafunc):
    if "any_name" in metafunc.fixturenames:
        whole = metafunc.config.getoption("all_networks")
        sample = [name for name in smallest_of_each_family() if name != "vgg11"]  # AlexNet with 500 MB of weights
        metafunc.parametrize("any_name", model.torchvision_names() if whole else sample)


def options_of(name: str, classes: int, image_size: int = 32) -> dict:
    """Options with which the network works: of this size, or of the smallest that it takes."""
    options = {"classes": classes, "image_size": image_size, "stem": "standard"}
    try:
        model.check(name, options)
    except model.NetworkError as error:
        options["image_size"] = int(re.search(r"add --image-size (\d+)", str(error))[1])
        model.check(name, options)
    return options


def a_checkpoint(name: str, options: dict, network: nn.Module) -> dict:
    side, classes = options["image_size"], [f"class {number}" for number in range(options["classes"])]
    checkpoint = {"format": model.FORMAT, "model": {"name": name, "options": options}, "classes": classes}
    checkpoint |= {"image_size": side, "resize": side, "interpolation": "bilinear", "mean": [0.0] * 3, "std": [1.0] * 3}
    return checkpoint | {"state_dict": network.state_dict(), "epoch": 1, "metrics": {}, "config": {}}


# ---- every network ----


def test_every_network_gets_a_new_head_answers_and_comes_back(any_name, tmp_path):
    options = options_of(any_name, 7)
    torch.manual_seed(0)
    with_thousand = model.create(any_name, options | {"classes": 1000})
    network, head = model.create(any_name, options), model.head_keys(any_name, options)
    model.transfer(network, with_thousand.state_dict(), head, "test")
    old = with_thousand.state_dict()
    assert all(torch.equal(value, old[key]) for key, value in network.state_dict().items() if key not in head)
    del with_thousand, old

    images = torch.rand(1, 3, options["image_size"], options["image_size"])
    with torch.no_grad():
        logits = network.eval()(images)
        assert logits.shape == (1, 7) and logits.isfinite().all()
        head_only = model.HeadOnly(network, head, options["image_size"])
        assert torch.allclose(head_only(images), logits, atol=1e-5)
    assert model.stages(network, head).keys() == dict(network.named_parameters()).keys()
    model.freeze(network, head, None)
    last_layer = head[-1].rpartition(".")[0]
    trains = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trains == {key for key in head if key.startswith(f"{last_layer}.")}

    save(tmp_path / "a.pt", a_checkpoint(any_name, options, network))
    del network
    loaded, _ = model.load(tmp_path / "a.pt")
    (tmp_path / "a.pt").unlink()  # some have a gigabyte
    with torch.no_grad():
        assert torch.equal(loaded(images), logits)


def test_the_sample_has_all_families():
    sample = smallest_of_each_family()
    assert {"vgg11", "resnet18", "vit_b_16", "swin_t", "swin_v2_t", "squeezenet1_1", "inception_v3"} <= set(sample)
    assert len(sample) >= 18


@pytest.mark.parametrize(
    ("name", "too_small", "wanted"),
    [
        ("alexnet", 32, 63),
        ("inception_v3", 75, 299),
        ("vit_b_16", 40, 64),
        ("squeezenet1_0", 10, 21),
        ("vgg16", 16, 32),
    ],
)
def test_networks_say_which_size_they_need(name, too_small, wanted):
    options = {"classes": 10, "image_size": too_small}
    with pytest.raises(
        model.NetworkError, match=f"pictures of {too_small} x {too_small} .* add --image-size {wanted}$"
    ):
        model.check(name, options)
    model.check(name, options | {"image_size": wanted})
    if name == "inception_v3":  # its auxiliary classifier alone needs so much
        model.check(name, options, training=False)


def test_the_small_stem_keeps_the_resolution():
    seen = {}
    for stem in model.STEMS:
        network = model.create("resnet18", {"classes": 10, "image_size": 32, "stem": stem}).eval()
        network.layer1.register_forward_hook(lambda _, __, output, stem=stem: seen.update({stem: output.shape[2:]}))
        assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert seen == {"standard": (8, 8), "small": (32, 32)}
    assert sum(p.numel() for p in network.parameters()) == 11_173_962  # as many as kuangliu/pytorch-cifar's ResNet18


@pytest.mark.parametrize("name", ["vgg11", "convnext_tiny", "vit_b_32", "alexnet", "maxvit_t"])
def test_networks_without_such_a_stem_say_so(name):
    reason = "is built for the sizes" if name == "maxvit_t" else "does not begin with"
    with model.Uninitialised(), pytest.raises(model.NetworkError, match=f"--stem small: {name} {reason}"):
        model.create(name, {"stem": "small", "image_size": 224})


def test_auxiliary_outputs_come_after_the_logits():
    network = model.create("googlenet", {"classes": 5, "image_size": 32})
    images = torch.rand(2, 3, 32, 32)
    logits, *auxiliary = model.answers(network.train()(images))
    assert logits.shape == (2, 5) and [other.shape for other in auxiliary] == [(2, 5), (2, 5)]
    assert len(model.answers(network.eval()(images))) == 1
    assert len(model.answers(model.create("resnet18", {})(images))) == 1


@pytest.mark.parametrize("name", ["vit_b_32", "googlenet", "swin_v2_t"])
def test_graphs_of_torchvisions_networks_can_be_drawn(name, tmp_path, capsys):
    from torch.utils.tensorboard import SummaryWriter

    network = model.create(name, {"classes": 3, "image_size": 32})
    with SummaryWriter(tmp_path) as writer:
        model.write_graph(writer, network, torch.zeros(1, 3, 32, 32))
    assert "no graph" not in capsys.readouterr().err


# ---- trained weights ----


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
    model.transfer(network, trained["state_dict"], (), "imagenet")
    with torch.no_grad():
        assert torch.equal(network.eval()(images), expected)


def test_the_published_densenets_have_older_names(hub):
    original = TORCHVISION.densenet121().eval()
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): value
        for key, value in original.state_dict().items()
        if "num_batches_tracked" not in key  # which is younger too
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    hub("densenet121", old)
    network = model.create("densenet121", {"classes": 1000})
    model.transfer(network, model.pretrained("imagenet", "densenet121")["state_dict"], (), "imagenet")
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network.eval()(images), original(images))


def test_weights_that_cannot_be_had(hub, monkeypatch):
    def unreachable(url, *_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(
        model.CheckpointError, match=r"alexnet.*could not be downloaded \(no route to host\); put it at"
    ):
        model.pretrained("imagenet", "alexnet")
    path = hub("alexnet", {})
    path.write_bytes(b"not the weights")
    with pytest.raises(model.CheckpointError, match="damaged or not alexnet's weights; delete it"):
        model.pretrained("imagenet", "alexnet")
    with pytest.raises(model.NetworkError, match="there are none for cifar_quick"):
        model.pretrained("imagenet", "cifar_quick")


def test_imagenet_files_cannot_run_code(hub, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("code ran",)

    hub("alexnet", Evil())
    with pytest.raises(model.CheckpointError, match="damaged or not alexnet's weights"):
        model.pretrained("imagenet", "alexnet")
    assert "code ran" not in capsys.readouterr().out


def test_what_does_not_fit_is_named():
    network = model.create("cifar_quick", {"classes": 3})
    weights = network.state_dict()
    wrong = {key: value for key, value in weights.items() if not key.startswith("stage1")}
    wrong |= {"head.weight": torch.zeros(3, 65), "module.a": torch.zeros(1), "stage2.norm.weight": torch.zeros(1)}
    before = {key: value.clone() for key, value in weights.items()}
    with pytest.raises(model.CheckpointError) as caught:
        model.transfer(network, wrong, (), "file.pt")
    assert str(caught.value) == (
        "file.pt: its weights do not fit the network: "
        "missing: stage1.conv.weight, stage1.norm.weight, stage1.norm.bias and 2 more; unexpected: module.a; "
        "wrong shape: stage2.norm.weight [1] in place of [32], head.weight [3, 65] in place of [3, 64]"
    )
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


# ---- freezing ----


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
    with model.Uninitialised():
        network = model.create(name, options)
    head = model.head_keys(name, options)
    stage_of, first = model.stages(network, head), {}
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
    options, counted = {"classes": 10, "image_size": 32}, []
    for append in ({}, {"append": 1000}):
        with model.Uninitialised():
            network = model.create(name, options | append)
        counted.append(model.stages(network, model.head_keys(name, options | append)))
    plain, appended = counted
    last = max(plain.values())
    for key, stage in plain.items():
        assert appended[f"network.{key}"] == (stage or last + 1)


def test_the_class_token_is_frozen_with_the_first_stage():
    options = {"classes": 10, "image_size": 32}
    with model.Uninitialised():
        network = model.create("vit_b_32", options)
    stage_of = model.stages(network, model.head_keys("vit_b_32", options))
    assert {stage_of[key] for key in ("class_token", "encoder.pos_embedding", "conv_proj.weight")} == {1}
    assert stage_of["encoder.layers.encoder_layer_0.ln_1.weight"] == 2 and max(stage_of.values()) == 13


def test_more_stages_than_there_are():
    network = model.CifarQuick()
    with pytest.raises(model.NetworkError, match="--freeze 5: there are 4 stages before the head"):
        model.freeze(network, ["head.weight", "head.bias"], 5)


@pytest.mark.parametrize(("count", "moves"), [(0, 4), (1, 3), (3, 1), (4, 0), (None, 0)])
def test_frozen_batch_statistics_rest(count, moves):
    network = model.CifarQuick()
    model.freeze(network, ["head.weight", "head.bias"], count)
    model.train_mode(network)
    norms = [layer for layer in network.modules() if hasattr(layer, "running_mean")]
    before = [layer.running_mean.clone() for layer in norms]
    network(torch.rand(4, 3, 32, 32)).sum().backward()
    moved = [not torch.equal(layer.running_mean, old) for layer, old in zip(norms, before, strict=True)]
    assert moved == [False] * (4 - moves) + [True] * moves
    assert [layer.weight.grad is not None for layer in norms] == moved


def test_frozen_dropout_rests():
    network = model.create("vgg11", {"classes": 2, "image_size": 32})
    head = model.head_keys("vgg11", {"classes": 2, "image_size": 32})
    dropouts = [layer for layer in network.modules() if isinstance(layer, nn.Dropout)]
    for count, training in ((0, [True, True]), (8, [True, True]), (9, [False, True]), (None, [False, False])):
        model.freeze(network, head, count)
        model.train_mode(network)
        assert [layer.training for layer in dropouts] == training, count


def test_a_head_that_trains_alone_leaves_the_rest_without_gradients():
    network = model.create("googlenet", {"classes": 3, "image_size": 32})
    head = model.head_keys("googlenet", {"classes": 3, "image_size": 32})
    model.freeze(network, head, None)
    head_only = model.HeadOnly(network, head, 32)
    model.train_mode(head_only)
    features = head_only.features(torch.rand(2, 3, 32, 32))
    assert features.shape == (2, 1024) and not features.requires_grad and not network.training
    head_only(torch.rand(2, 3, 32, 32)).sum().backward()
    assert network.fc.weight.grad is not None and network.conv1.conv.weight.grad is None


class GoesOn(model.CifarQuick):
    """Does more behind its head than a Sequential would."""

    def forward(self, images):
        return super().forward(images) + 1


def test_a_network_that_goes_on_behind_its_head_says_so():
    with pytest.raises(model.NetworkError, match="--freeze all: this network goes on behind its last layer"):
        model.HeadOnly(GoesOn(), ["head.weight", "head.bias"], 32)


def test_the_signature_that_networks_are_built_by():
    """Which arguments a torchvision network gets depends on its constructor; if these are renamed, sizes are lost."""
    expected = {"vit_b_16": "image_size", "maxvit_t": "input_size", "inception_v3": "transform_input"}
    for name, parameter in expected.items():
        kind = typing.get_type_hints(TORCHVISION.get_model_builder(name))["return"]
        assert parameter in inspect.signature(kind).parameters

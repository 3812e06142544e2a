"""One step of each optimizer, and which weights have which learning rate."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from samples import a_batch, a_state

import model
from quick.errors import ConfigError
from quick.nets import losses
from quick.processes import Group
from quick.run.optimizers import OPTIMIZERS, Muon, orthogonal
from quick.run.rules import check_together, complete
from quick.run.settings import Config
from train import lr_share, parse_train, train_step


@pytest.fixture
def network() -> model.CifarQuick:
    torch.manual_seed(0)
    return model.CifarQuick(classes=2, image_size=8)


@pytest.fixture
def batch():
    return a_batch(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))


def test_a_step_is_nesterov_sgd_with_decay_of_weights_alone(network, batch):
    config = Config(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    loss = losses.loss_function(network(batch.images), batch.labels)
    gradients = dict(zip(before, torch.autograd.grad(loss, network.parameters()), strict=True))
    for layer in network.modules():
        if hasattr(layer, "reset_running_stats"):
            layer.reset_running_stats()
    train_step(a_state(network, config), batch, config)
    for name, value in network.named_parameters():
        gradient = gradients[name] + (0.01 * before[name] if value.ndim > 1 else 0)
        assert torch.allclose(value, before[name] - 0.1 * 1.9 * gradient, atol=1e-5), name


def test_the_backbone_has_a_rate_of_its_own():
    network = model.CifarQuick()
    config = Config(lr=0.1, backbone_lr=0.001, weight_decay=0.5)
    state = a_state(network, config, ["head.weight", "head.bias"])
    rates = {p: (g["lr"], g["weight_decay"]) for g in state.optimizer.param_groups for p in g["params"]}
    for name, parameter in network.named_parameters():
        rate = 0.1 if name.startswith("head.") else 0.001
        assert rates[parameter] == (rate, 0.5 if parameter.ndim > 1 else 0.0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_step_sets_the_rates_of_all_weights_by_the_schedule(network, batch, optimizer):
    config = Config(optimizer=optimizer, lr=0.1, backbone_lr=0.001, muon_lr=0.02, schedule="cosine")
    state = a_state(network, config, ["head.weight", "head.bias"], steps=4)
    highest = {0.1, 0.001, 0.02} if optimizer == "muon" else {0.1, 0.001}
    for step in range(4):
        train_step(state, batch, config)
        share = lr_share(config, 4, step)
        assert {group["highest_lr"] for group in state.optimizer.param_groups} == highest
        assert all(group["lr"] == group["highest_lr"] * share for group in state.optimizer.param_groups)


def test_frozen_weights_are_in_no_group(network):
    network.stage1.requires_grad_(False)
    state = a_state(network, Config())
    trained = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    wanted = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert set(trained) == set(wanted) and len(trained) == len(wanted) < len(list(network.parameters()))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_from_what_was_saved_of_the_optimizer(network, batch, optimizer):
    config = Config(optimizer=optimizer, lr=0.1, momentum=0.9, schedule="onecycle")
    states = [a_state(network, config), a_state(model.CifarQuick(classes=2, image_size=8), config)]
    for _ in range(3):
        train_step(states[0], batch, config)
    states[1].network.load_state_dict(network.state_dict())
    states[1].load_state_dict(copy.deepcopy(states[0].state_dict()))  # as a file would hold it
    for state in states:
        train_step(state, batch, config)
    for whole, continued in zip(network.parameters(), states[1].network.parameters(), strict=True):
        assert torch.equal(whole, continued)


def test_adamw_is_torchs_with_decay_of_weights_alone(network, batch):
    config = Config(optimizer="adamw", lr=0.01, weight_decay=0.1)
    state, other = a_state(network, config), copy.deepcopy(network)
    groups = [[p for p in other.parameters() if (p.ndim > 1) == decays] for decays in (True, False)]
    groups = [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for _ in range(3):
        train_step(state, batch, config)
        optimizer.zero_grad()
        losses.loss_function(other(batch.images), batch.labels).backward()
        optimizer.step()
    for ours, theirs in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


# ---- the rate that fits ----


@pytest.mark.parametrize(
    ("flags", "lr"),
    [
        ("", 0.1),
        ("--config configs/shapes.toml", 0.1),
        ("--model fast --optimizer muon", 0.1),
        ("--config configs/fast.toml", 0.05),
        ("--lr 0.3 --model vgg11", 0.3),
        ("--optimizer adamw", 0.001),
        ("--model resnet18", 0.1),
        ("--model vgg11", 0.01),
        ("--model vgg11_bn", 0.1),
        ("--model resnet18 --weights imagenet", 0.005),
        ("--model resnet18 --weights imagenet --freeze 2", 0.005),
        ("--model resnet18 --weights imagenet --freeze all", 0.01),
        ("--model resnet18 --weights imagenet --backbone-lr 1e-4", 0.01),
        ("--model resnet18 --weights imagenet --optimizer adamw", 0.0001),
        ("--model vgg11 --weights imagenet", 0.001),
        ("--config configs/vgg16.toml --model vgg11", 0.001),
        ("--weights best.pt", 0.03),
        ("--weights best.pt --freeze all", 0.1),
    ],
)
def test_without_a_rate_a_run_gets_one_that_fits(flags, lr, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = parse_train(flags.split())[0]
    options = model.config_options(replace(config, weights="none", head="replace"), 10)
    network = model.create_empty(config.model, options)
    pictures = SimpleNamespace(mean=(0.5,) * 3, std=(0.2,) * 3, levels=None)
    found = complete(config, pictures, network, own=config.model in model.NETWORKS)
    assert found.lr == lr and found.backbone_lr == config.backbone_lr


def test_an_optimizer_without_known_rates_wants_one(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "other", OPTIMIZERS["sgd"])
    with pytest.raises(ConfigError, match="--lr 0: no rate is known that fits other; add --lr and a number"):
        check_together(Config(optimizer="other"), Group(), ())
    check_together(Config(optimizer="other", lr=0.1), Group(), ())


# ---- Muon ----


def test_muon_remembers_gradients_and_shrinks_weights():
    weight = torch.nn.Parameter(torch.randn(8, 4))
    idle = torch.nn.Parameter(torch.ones(2, 2))  # no answer depends on it
    unused = torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [weight, idle], "lr": 0.1, "weight_decay": 0.5, "orthogonal": True}]
    groups.append({"params": [unused], "lr": 0.1, "weight_decay": 0.0, "orthogonal": False})
    optimizer = Muon(groups, momentum=0.9, nesterov=True, precision=torch.float32)
    gradients = torch.randn(3, 8, 4)
    expected, buffer = weight.detach().clone(), torch.zeros(8, 4)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        buffer = 0.9 * buffer + gradient
        [step] = orthogonal([gradient + 0.9 * buffer])
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * 2**0.5 * step
    assert torch.allclose(weight, expected, atol=1e-5) and torch.equal(idle, torch.ones(2, 2))


@pytest.mark.parametrize("shape", [(32, 3, 5, 5), (64, 32), (8, 200), (200, 8)])
def test_orthogonal_matrices_have_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).flatten(1)
    [found, of_zero] = orthogonal([1e-4 * matrix, torch.zeros(shape)])
    assert found.shape == matrix.shape and found.dtype == matrix.dtype
    assert of_zero.shape == shape and not of_zero.any()
    singular, before = torch.linalg.svdvals(found), torch.linalg.svdvals(matrix) / matrix.norm()
    assert singular[before > 0.03].min() > 0.6 and singular.max() < 1.25
    nearest, _, other = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(found.flatten(), (nearest @ other).flatten(), 0) > 0.97


@pytest.mark.parametrize("muon_decay", [0.0, 0.03])
def test_muon_makes_hidden_weights_steps_orthogonal_and_the_rest_as_sgd(batch, muon_decay):
    config = Config(lr=0.1, muon_lr=0.02, muon_decay=muon_decay, momentum=0.9, nesterov=True, weight_decay=0.01)
    head, found = model.head_keys("cifar_quick", {"image_size": 8}), {}
    for name in ("sgd", "muon"):
        torch.manual_seed(0)
        network = model.CifarQuick(classes=2, image_size=8)
        config = replace(config, optimizer=name)
        before = {key: value.detach().clone() for key, value in network.named_parameters()}
        train_step(a_state(network, config, head), batch, config)
        found[name] = {key: value.detach() - before[key] for key, value in network.named_parameters()}
    for key, step in found["muon"].items():
        if step.ndim == 1 or key in head:
            assert torch.equal(step, found["sgd"][key]), key
        else:
            shrunk = step + 0.02 * (muon_decay or 0.01) * before[key]
            singular = torch.linalg.svdvals(shrunk.flatten(1)) / 0.02 / max(1, len(step) / step[0].numel()) ** 0.5
            assert 0.8 < singular.max() < 1.3 and not torch.allclose(step, found["sgd"][key], atol=1e-4), key


def test_muon_skips_a_step_that_overflowed_in_fp16(network):
    config = Config(optimizer="muon", momentum=0.9)
    state = a_state(network, config)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    train_step(state, a_batch(torch.full((4, 3, 8, 8), 1e3), torch.tensor([0, 1, 0, 1])), config)
    assert all(torch.equal(value, before[name]) for name, value in network.named_parameters())
    assert state.scaler.get_scale() < 2.0**127

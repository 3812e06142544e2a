"""What training asks of a GPU, seen without one: few operators a step, none that waits, every tensor on the device.

PyTorch's fake tensors know shapes and devices, but have no values. A "cuda" device of theirs needs no GPU; only
gradients do, so that here a backward pass leaves gradients of the right shape.
"""

import itertools
from collections import Counter
from functools import partial

import pytest
import torch
from samples import a_state
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import model
from quick.data.pictures import Pictures
from quick.data.sizing import Sizing
from quick.data.stores import Enlarged, InMemory
from quick.nets.transfer import HeadOnly, freeze
from quick.processes import ALONE
from quick.run.evaluation import outputs_of_set
from quick.run.settings import Config
from quick.run.state import TrainState
from quick.run.stopping import StopVote
from quick.run.warming import warm_up
from quick.views.tensorboard import NoBoard
from train import parse_train, train_epoch, train_step

COUNT = 1200  # pictures

# Of the operators that PyTorch counts, those that only look at memory in another way, or reserve some.
FREE = set(
    "view t transpose slice select expand unsqueeze squeeze permute diagonal detach as_strided _unsafe_view split "
    "unbind alias unfold split_with_sizes empty empty_like empty_strided lift_fresh _record_function_enter_new "
    "_record_function_exit device".split()
)


class Launches(TorchDispatchMode):
    """Counts the operators that launch work, and those that wait for the device, such as copies from or to it."""

    def __init__(self) -> None:
        super().__init__()
        self.work, self.waits = Counter(), Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        result = operator(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)}
        self.work[name] += name not in FREE
        is_copy = name in ("_to_copy", "copy_") and len(devices) > 1
        self.waits[name] += is_copy or name in ("_local_scalar_dense", "nonzero")
        return result


@pytest.fixture
def fake_gpu(monkeypatch):
    """A device without values, on which nothing can wait for a number."""

    def backward(loss: torch.Tensor) -> None:
        for weight in weights_of(loss.grad_fn):
            weight.grad = torch.empty_like(weight)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *_, **__: None)  # it has no fake form
    with FakeTensorMode():
        yield torch.device("cuda")


def weights_of(node) -> list[torch.Tensor]:
    """The weights on which what this node of the graph computes depends."""
    found, todo = {}, [node]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found[node] = getattr(node, "variable", None)
            todo += [before for before, _ in node.next_functions]
    return [weight for weight in found.values() if weight is not None]


def a_run(flags: list[str], device: torch.device, store: object) -> tuple[TrainState, Config, Pictures]:
    config, _, _ = parse_train(["--lr", "0.1", *flags])
    labels = torch.zeros(COUNT, dtype=torch.int64, device=device)
    classes = [str(number) for number in range(10)]
    pictures = Pictures(store, labels, classes, "train", mean=(0.5,) * 3, std=(0.2,) * 3)
    options = model.config_options(config, 10, None)
    with device:
        network = model.create(config.model, options)
    for layer in network.modules():  # Module.to() cannot change fake weights
        if isinstance(layer, nn.Conv2d):
            layer.weight = nn.Parameter(layer.weight.contiguous(memory_format=torch.channels_last))
    state = a_state(network, config, model.head_keys(config.model, options), labels=labels)
    return state, config, pictures


def in_memory(device: torch.device, side: int = 32, width: int = 32) -> InMemory:
    """Black pictures on the device; where they are wider than high, half of them stood upright."""
    images = torch.zeros(COUNT, 3, side, width, dtype=torch.uint8)
    if side == width:
        return InMemory(images).to(device)
    return InMemory(images, torch.full((COUNT,), width), torch.arange(COUNT) % 2 == 0).to(device)


ALL_CHANGES = "--flip --flip-vertical --crop 2 --cutout 4 --jitter 0.2 --resized-crop 0.5 --rotate 10".split()


@pytest.mark.parametrize(
    ("flags", "most"),
    [
        ([], 45),
        pytest.param(["--config", "configs/fast.toml"], 135, marks=pytest.mark.expensive),
        pytest.param(ALL_CHANGES, 200, marks=pytest.mark.expensive),
    ],
)
def test_a_step_launches_few_operators_and_waits_for_nothing(flags, most, fake_gpu):
    state, config, pictures = a_run(flags, fake_gpu, in_memory(fake_gpu))
    batches = pictures.batches(config.batch_size, shuffle=True, augment=config, seed=0, epoch=1)
    train_step(state, next(batches), config)  # the epoch's order and random numbers go to the device
    with Launches() as launches:
        steps = [train_step(state, batch, config) for batch in batches]
    assert len(steps) > 1 and launches.waits.total() == 0
    assert launches.work.total() / len(steps) <= most, launches.work


@pytest.mark.expensive
@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        (ALL_CHANGES, "square"),
        (["--flip"], "wide"),
        (["--image-size", "64", "--model", "fast", "--optimizer", "adamw"], "enlarged"),
        (["--freeze", "2", "--accumulate", "2", "--clip-grad", "1", "--optimizer", "muon"], "square"),
        (["--freeze", "all", *ALL_CHANGES], "wide"),
        (["--freeze", "all", "--tta", "none"], "square"),
    ],
)
def test_all_that_training_needs_is_on_the_device(flags, kind, fake_gpu, monkeypatch):
    monkeypatch.setattr(torch, "allclose", lambda *_, **__: True)  # HeadOnly compares outputs, without values here
    stores = {"square": partial(in_memory, fake_gpu), "wide": partial(in_memory, fake_gpu, width=48)}
    store = stores[kind]() if kind in stores else Enlarged(in_memory(fake_gpu), Sizing(64))
    state, config, pictures = a_run(["--tta", "mirror", *flags], fake_gpu, store)  # shifts look at values
    if config.freeze != "0":
        head = model.head_keys(config.model, {"classes": 10, "image_size": 32})
        freeze(state.network, head, None if config.freeze == "all" else int(config.freeze))
    if config.freeze == "all":
        head_only = HeadOnly(state.network, head, 32)
        state.trainable = state.forward = state.eager = head_only
    for batch in pictures.batches(100, shuffle=True, augment=config, pieces=config.accumulate):
        loss, logits = train_step(state, batch, config)
        assert loss.device.type == logits.device.type == "cuda"
    logits, labels = outputs_of_set(state.trainable, pictures, classes=10, tta=config.tta)
    assert logits.shape == (COUNT, 10) and logits.device == labels.device


class Zeros(TorchFunctionMode):
    """Reads numbers from tensors without values: all are 0."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.item:
            return 0
        return [0.0] * len(args[0]) if func is torch.Tensor.tolist else func(*args, **(kwargs or {}))


@pytest.mark.expensive
def test_a_run_of_the_hardest_pictures_and_its_resumption_stay_on_the_device(fake_gpu, monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: None)
    for name in ("confusion_counts", "worst_pairs"):  # they count values
        monkeypatch.setattr(f"quick.run.state.{name}", lambda *_: [])
    whole = Pictures.order

    def order(self, *, keep: torch.Tensor | None = None, **settings) -> torch.Tensor:
        if keep is None:
            return whole(self, **settings)
        assert keep.device.type == "cuda" and keep.dtype == torch.bool and len(keep) == COUNT
        return torch.arange(COUNT // 2)

    monkeypatch.setattr(Pictures, "order", order)
    flags = ["--config", "configs/fast.toml", "--epochs", "4", "--tta", "mirror"]
    state, config, pictures = a_run(flags, fake_gpu, in_memory(fake_gpu))
    with Zeros():
        warm_up(state, pictures, config)
        for _ in range(3):  # the third is of the hardest
            metrics = train_epoch(state, pictures, config, NoBoard(), StopVote(ALONE, 0, 0))
            metrics |= {"test_loss": 0.0, "test_accuracy": 0.0}
            state.end_epoch(metrics, (None, None), pictures.classes)

        checkpoint = tree_map_only(torch.Tensor, torch.Tensor.cpu, state.state_dict())
        resumed, _, _ = a_run(flags, fake_gpu, pictures.store)
        resumed.load_state_dict(checkpoint)
        tensors = [resumed.confidence, *tree_leaves(list(resumed.optimizer.state.values()))]
        assert {tensor.device.type for tensor in tensors} == {"cuda"}
        train_epoch(resumed, pictures, config, NoBoard(), StopVote(ALONE, 0, 0))
        assert resumed.totals.confidence.device.type == "cuda"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("flags", [[], ["--config", "configs/fast.toml"], ALL_CHANGES])
def test_ten_steps_on_a_gpu_wait_for_nothing(flags):
    device = torch.device("cuda")
    state, config, pictures = a_run(flags, device, in_memory(device))
    batches = pictures.batches(config.batch_size, shuffle=True, augment=config, seed=0, epoch=1)
    train_step(state, next(batches), config)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in itertools.islice(batches, 10):
            train_step(state, batch, config)
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""The networks, what they are made of, how trained weights get into them, and how they are saved and loaded.

`python model.py` prints the network as a table, a line a layer; with `--log-dir` it draws it in TensorBoard. `--list`
names all networks, `--checkpoint FILE` tells what a file holds, and `--export` makes it readable elsewhere.
"""

import argparse
import contextlib
import importlib.util
import inspect
import io
import json
import math
import os
import pickle
import pickletools
import re
import sys
import typing
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from device import CallError, Group, Parser, Problem, command, end, flag, printable, reason, suggestion

if typing.TYPE_CHECKING:
    from datasets import Pictures

FORMAT = 2  # of a checkpoint; grows when an older reader could misread a newer file
CONTENT = {"format": int, "model": dict, "classes": list, "image_size": int, "resize": int, "interpolation": str}
CONTENT |= {"mean": list, "std": list, "state_dict": dict, "epoch": int, "metrics": dict, "config": dict}
LARGEST_SIDE, LARGEST_WIDTH, MOST_OUTPUTS = 4096, 64, 10**6  # what a file may ask for: bounds time and memory

ACTIVATIONS = {"none": lambda: None, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "sigmoid": nn.Sigmoid}
STEMS = ("standard", "small")
LOSSES = ("cross_entropy", "mse", "l1")
INTERPOLATIONS = ("bilinear", "bicubic")
TTA = ("none", "mirror", "shift")
CHECKSUM_BYTES = 8  # of a file's comment: CRC-32 in hexadecimal digits
LARGEST_PICKLE = 2**22  # bytes of a checkpoint's values other than tensors
NEEDED = re.compile(r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_(tensor_v2|parameter)")
AUXILIARY_WEIGHT = 0.3  # of the losses of auxiliary classifiers (Szegedy et al. 2014, arxiv.org/abs/1409.4842, part 5)


class CheckpointError(Problem):
    """A checkpoint that cannot be used; the message names the file and the reason."""


class NetworkError(CallError):
    """A network that cannot be: an unknown name, or options that do not work."""


class CifarQuick(nn.Module):
    """The CIFAR-quick layout: three stages of 5x5 convolution and 2x2 max pooling, then two linear layers.

    After `cifar10_quick` of Caffe (github.com/BVLC/caffe, examples/cifar10), with batch normalisation to choose.
    Takes float images `(N, 3, image_size, image_size)`, returns float logits `(N, classes)`.
    """

    def __init__(self, classes: int = 10, image_size: int = 32, batch_norm: bool = True, activation: str = "silu"):
        super().__init__()
        if image_size < 8:
            raise NetworkError(f"cifar_quick halves a picture three times: --image-size {image_size} is below 8")

        # Pooling comes first: normalisation and activation then have a quarter of the values to work on.
        def stage(channels_in: int, channels_out: int) -> nn.Sequential:
            conv = nn.Conv2d(channels_in, channels_out, 5, padding=2, bias=not batch_norm)
            norm = nn.BatchNorm2d(channels_out) if batch_norm else None
            return named(conv=conv, pool=nn.MaxPool2d(2), norm=norm, activation=ACTIVATIONS[activation]())

        self.stage1 = stage(3, 32)
        self.stage2 = stage(32, 32)
        self.stage3 = stage(32, 64)
        self.flatten = nn.Flatten()
        self.hidden = named(
            linear=nn.Linear(64 * (image_size // 8) ** 2, 64, bias=not batch_norm),
            norm=nn.BatchNorm1d(64) if batch_norm else None,
            activation=ACTIVATIONS[activation](),
        )
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stage3(self.stage2(self.stage1(images)))
        return self.head(self.hidden(self.flatten(features)))


def named(**layers: nn.Module | None) -> nn.Sequential:
    """The layers that are there, one after the other, each under its name."""
    return nn.Sequential(OrderedDict((name, layer) for name, layer in layers.items() if layer is not None))


class Fast(nn.Module):
    """The most accuracy a second: a 5x5 convolution, made for whitening, then five 3x3 convolutions.

    After airbench94 (Jordan 2024, arxiv.org/abs/2404.00498) at half its width. Its first two layers, which work on
    whole pictures and so take most of the time, are one here. Takes float images `(N, 3, image_size, image_size)`,
    returns float logits `(N, classes)`.
    """

    def __init__(self, classes: int = 10, image_size: int = 32, activation: str = "relu", width: float = 1.0):
        super().__init__()
        if image_size < 8:
            raise NetworkError(f"fast halves a picture three times: --image-size {image_size} is below 8")

        def layer(channels_in: int, channels_out: int, kernel: int = 3, pool: bool = False) -> nn.Sequential:
            return named(
                conv=nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False),
                pool=nn.MaxPool2d(2) if pool else None,
                norm=nn.BatchNorm2d(channels_out, momentum=0.4),  # few steps, so that means have to follow quickly
                activation=ACTIVATIONS[activation](),
            )

        small, middle, large = (max(1, round(width * channels)) for channels in (32, 128, 256))
        self.layer1 = layer(3, small, 5, pool=True)
        self.layer2 = layer(small, small)
        self.layer3 = layer(small, middle, pool=True)
        self.layer4 = layer(middle, middle)
        self.layer5 = layer(middle, large, pool=True)
        self.layer6 = layer(large, large)
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(large, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.layer4(self.layer3(self.layer2(self.layer1(images))))
        return self.head(self.flatten(self.pool(self.layer6(self.layer5(features)))))


NETWORKS = {"cifar_quick": CifarQuick, "fast": Fast}
SETTINGS = {"batch_norm": True, "activation": "auto", "stem": "standard", "width": 1.0}  # of some networks; defaults


class Appended(nn.Module):
    """A whole network with a Linear behind its outputs, as the tutorial does with the 1,000 outputs of VGG16."""

    def __init__(self, network: nn.Module, outputs: int, classes: int):
        super().__init__()
        self.network = network
        self.head = nn.Linear(outputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(answers(self.network(images))[0])


def create(name: str, options: dict) -> nn.Module:
    """A new network, of `NETWORKS` or of torchvision; `options` are its arguments, e.g. `{"classes": 10}`.

    Torchvision's take `classes`, `image_size` and `stem`. With `append` (a number) the network has so many outputs, and
    a Linear behind them gives the classes. Raises NetworkError for a network that is not there or options that do not
    work.
    """
    if "append" in options:
        inner = {key: value for key, value in options.items() if key != "append"} | {"classes": options["append"]}
        return Appended(create(name, inner), options["append"], options["classes"])
    if problem := unknown(name):
        raise NetworkError(problem)
    return NETWORKS[name](**options) if name in NETWORKS else from_torchvision(name, **options)


def network_options(name: str, classes: int, image_size: int, append: int = 0, **settings: object) -> dict:
    """The options for `create` out of all that a user can set (SETTINGS), e.g. `activation="gelu"`.

    Raises NetworkError for a setting that this network has not.
    """
    if name in NETWORKS:
        options = {key: of.default for key, of in inspect.signature(NETWORKS[name]).parameters.items()}
    else:
        options = {"classes": classes, "image_size": image_size, "stem": "standard"}
    for key, value in settings.items():
        if key in options and value != "auto":
            options[key] = value
        elif key not in options and value not in (SETTINGS[key], "relu"):  # relu was the default once
            wrong, right = flag(key, value), flag(key, SETTINGS[key])
            raise NetworkError(f"{wrong}: {name} has no such option; add {right}")
    return options | {"classes": classes, "image_size": image_size} | ({"append": append} if append else {})


@torch.no_grad()
def whiten(network: nn.Module, images: Tensor) -> None:
    """Start the first convolution as filters that whiten patches of float images `(N, 3, H, W)`.

    The filters are the principal components of its patches, scaled to the same variance, each beside its negative, so
    that pooling and activation lose neither end: a network learns from decorrelated inputs from the first step on (Page
    2019, myrtle.ai/learn/how-to-train-your-resnet-8-bag-of-tricks; Jordan 2024, arxiv.org/abs/2404.00498, section 3.2).
    Raises NetworkError for a network that does not begin with a convolution.
    """
    conv = next((layer for layer in network.modules() if isinstance(layer, nn.Conv2d)), None)
    if conv is None or conv.in_channels != 3:
        raise NetworkError("--whiten: this network does not begin with a convolution; add --no-whiten")
    padding = conv.padding if images.shape[3] < max(conv.kernel_size) else 0
    patches = F.unfold(images.cpu(), conv.kernel_size, padding=padding, stride=max(1, images.shape[3] // 32))
    patches = patches.transpose(1, 2).flatten(0, 1)
    variances, components = torch.linalg.eigh((patches.T @ patches / len(patches)).double())
    components *= components.gather(0, components.abs().argmax(0, keepdim=True)).sign()  # one of two that serve as well
    filters = (components / (variances.clamp(min=0) + 5e-4).sqrt()).T.flip(0)[: len(conv.weight) // 2]
    filters = torch.cat([filters, -filters]).view(-1, *conv.weight.shape[1:])
    conv.weight[: len(filters)] = filters.to(conv.weight)


def unknown(name: str) -> str | None:
    """Why there is no such network, in words; None when there is one."""
    if name in NETWORKS:
        return None
    known = [*NETWORKS, *torchvision_names()]
    return None if name in known else f"no network {name!r}; python model.py --list has all{suggestion(name, known)}"


# ---- torchvision's networks ----------------------------------------------------------------------------------------


def torchvision_models() -> ModuleType:
    """`torchvision.models`, imported when it is needed: it takes a while. Raises NetworkError where it is missing."""
    try:
        from torchvision import models
    except ImportError as error:
        raise NetworkError(f"torchvision, which has this network, cannot be imported ({error})") from error
    return models


def torchvision_names() -> list[str]:
    """The names of torchvision's classification networks."""
    models = torchvision_models()
    return models.list_models(module=models)


def from_torchvision(name: str, classes: int = 10, image_size: int = 32, stem: str = "standard") -> nn.Module:
    """One of torchvision's networks, initialised as its authors do. Raises NetworkError where `stem` does not fit."""
    builder = torchvision_models().get_model_builder(name)
    extra = {
        "image_size": image_size,  # vision transformers
        "input_size": (image_size, image_size),  # MaxViT
        "transform_input": True,  # Inception and GoogLeNet: their ImageNet weights want the pixels in another range
        "init_weights": True,
    }
    takes = inspect.signature(typing.get_type_hints(builder)["return"]).parameters
    network = builder(num_classes=classes, **{key: value for key, value in extra.items() if key in takes})
    if stem == "small":
        if "input_size" in takes:
            raise NetworkError(f"--stem small: {name} is built for the sizes that its own stem gives")
        use_small_stem(network, name)
    return network


def use_small_stem(network: nn.Module, name: str) -> None:
    """Make a network that begins as ResNet does (a stride-2 convolution, pooling) keep small pictures' resolution.

    The convolution becomes 3x3 with stride 1, the pooling goes: He et al. 2015 (arxiv.org/abs/1512.03385, part 4.2).
    """
    layers = ((place, layer) for place, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.MaxPool2d))
    place, first = next(layers)
    if first.stride != (2, 2):
        raise NetworkError(f"--stem small: {name} does not begin with a stride-2 convolution; use --stem standard")
    conv = nn.Conv2d(first.in_channels, first.out_channels, 3, padding=1, bias=first.bias is not None)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    network.set_submodule(place, conv)
    place, layer = next(layers)
    if isinstance(layer, nn.MaxPool2d):
        network.set_submodule(place, nn.Identity())


class Uninitialised(torch.overrides.TorchFunctionMode):
    """Networks made in this context have weights without memory and values ("meta"), until loaded ones replace them.

    Layers make their weights of `torch.empty`; whatever else a constructor computes is real.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if func is torch.empty else {}))


def check(name: str, options: dict, batch_size: int = 2, training: bool = True) -> None:
    """Raise NetworkError, with the size that would do, if a network cannot train on pictures of `image_size`.

    Without `training`: if it cannot evaluate them, as a frozen one does.
    """

    def problem(side: int) -> str | None:
        try:
            with Uninitialised():
                network = create(name, options | {"image_size": side}).to("meta")  # shapes alone, nothing is computed
            network.train(training)(torch.zeros(min(batch_size, 2), 3, side, side, device="meta"))
        except NetworkError:
            raise
        except Exception as error:  # each network has its own way to fail
            return reason(error, 100)
        return None

    bad = options["image_size"]
    if not (why := problem(bad)):
        return
    good = next((side for side in (64, 128, 224, 299, 384, 512) if side > bad and not problem(side)), None)
    if good is None:
        raise NetworkError(f"{name} cannot train on {batch_size} pictures of {bad} x {bad} pixels a step: {why}")
    failed = bad
    while good - failed > 1:  # what fails for want of pixels does so below one size
        middle = (failed + good) // 2
        failed, good = (middle, good) if problem(middle) else (failed, middle)
    raise NetworkError(f"{name} cannot train on pictures of {bad} x {bad} pixels ({why}); add --image-size {good}")


# ---- outputs and losses --------------------------------------------------------------------------------------------


def answers(output: Tensor | tuple) -> tuple[Tensor, ...]:
    """The logits, then those of the auxiliary classifiers that GoogLeNet and Inception have while they train."""
    return (output,) if isinstance(output, Tensor) else tuple(logits for logits in output if logits is not None)


def loss_function(logits: Tensor, labels: Tensor, kind: str = "cross_entropy", label_smoothing: float = 0.0) -> Tensor:
    """The mean loss per picture of logits `(N, classes)` against int64 labels `(N,)`, as a scalar tensor.

    `mse` and `l1` compare the logits with one-hot labels, as regressions do. Smoothing moves that share of each
    label's weight evenly to all classes (Szegedy et al. 2016, arxiv.org/abs/1512.00567, section 7).
    """
    if kind == "cross_entropy":
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    classes = logits.shape[1]
    one_hot = F.one_hot(labels, classes).to(logits.dtype) * (1 - label_smoothing) + label_smoothing / classes
    return {"mse": F.mse_loss, "l1": F.l1_loss}[kind](logits, one_hot)


@torch.inference_mode()
def outputs(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], tta: str = "none") -> tuple[Tensor, Tensor]:
    """The network's answers to all batches, in eval mode: float32 logits `(N, classes)` and int64 labels `(N,)`.

    With `tta` they are the mean of what it answers to several views of each picture, see `mean_of_views`. No pictures
    give `(0, 0)` logits.
    """
    training = network.training
    network.eval()
    pairs = [(mean_of_views(network, images, tta), labels) for images, labels in batches if len(images)]
    network.train(training)
    if not pairs:
        return torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64)
    return torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])


def outputs_of_all(
    network: nn.Module,
    pictures: "Pictures",
    group: Group,
    classes: int,
    tta: str = "none",
    check: typing.Callable[[], object] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """As `outputs`, for a whole set of datasets.py, of which each process of a group looks at a share; all get all.

    `check` is called before each batch.
    """
    at_once, places = pictures.evaluation_parts(group)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in pictures.batches(at_once, group=group):
            check()
            yield batch

    logits, _ = outputs(network, batches(), tta)
    logits = logits.to(pictures.labels.device).view(len(places), classes)
    return group.whole(logits, places, len(pictures)), pictures.labels


def mean_of_views(network: nn.Module, images: Tensor, tta: str = "none") -> Tensor:
    """Float32 logits `(N, classes)` of images `(N, 3, H, W)`, by test-time augmentation.

    `none` looks once. `mirror` takes the mean of a picture and its mirror image. `shift` takes half of that, and half
    of the same moved by a pixel up and left, or down and right, after airbench (Jordan 2024, arxiv.org/abs/2404.00498).
    """
    if tta == "none":
        return network(images).float()
    logits = (network(images).float() + network(images.flip(3)).float()) / 2
    if tta == "shift":
        padded, (height, width) = F.pad(images, (1,) * 4, "reflect"), images.shape[2:]
        moved = padded[:, :, 2:, 2:], padded[:, :, :height, :width]
        logits = logits / 2 + sum(mean_of_views(network, views, "mirror") for views in moved) / 4
    return logits


def probabilities(logits: Tensor, kind: str = "cross_entropy") -> Tensor:
    """Shares of 1 `(N, classes)` from logits of a network that was trained with this loss.

    With `mse` and `l1` the logits themselves estimate them.
    """
    if kind == "cross_entropy":
        return logits.softmax(1)
    above_all = logits == logits.amax(1, keepdim=True)  # the guess, also where no logit is positive
    return F.normalize(logits.clamp(min=0) + 1e-9 * above_all, p=1, dim=1)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share, of 1, of pictures whose label has the highest logit."""
    return (logits.argmax(1) == labels).sum().item() / len(labels)


METRICS = {"accuracy": accuracy}  # of logits (N, classes) and int64 labels (N,), beside the loss; each a curve


def score(logits: Tensor, labels: Tensor, kind: str = "cross_entropy") -> dict[str, float]:
    """The mean loss per picture, without label smoothing, as "loss", and all of METRICS by their names.

    Takes float logits `(N, classes)` and int64 labels `(N,)`; `kind` is one of LOSSES.
    """
    found = {name: metric(logits, labels) for name, metric in METRICS.items()}
    return {"loss": loss_function(logits, labels, kind).item()} | found


# ---- standing on trained networks ----------------------------------------------------------------------------------


def head_keys(name: str, options: dict) -> list[str]:
    """The names of the weights that make the outputs: those whose shapes depend on the number of classes.

    These are the last layer's, which come last, and those of auxiliary classifiers' last layers.
    """
    with Uninitialised():
        few, more = (create(name, options | {"classes": classes}).state_dict() for classes in (2, 3))
    return [key for key in few if few[key].shape != more[key].shape]


def pretrained(source: str, name: str) -> dict:
    """What training can start from, as a checkpoint: torchvision's best ImageNet weights, or the file `source`.

    Raises NetworkError where there are none for this network, CheckpointError for a file that cannot be used.
    """
    if source != "imagenet":
        checkpoint = read(source)
        if (held := checkpoint["model"]["name"]) != name:
            raise NetworkError(f"--weights {source}: it holds {held}, not {name}; add --model {held}")
        return checkpoint
    if name in NETWORKS:
        raise NetworkError(f"--weights imagenet: there are none for {name}; take a network of torchvision")
    weights = torchvision_models().get_model_weights(name).DEFAULT
    file = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    how = weights.transforms()
    try:
        state_dict = weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
        if not all(isinstance(value, Tensor) for value in state_dict.values()):
            raise ValueError("not a state_dict")
    except Exception as error:  # of the network, the disk, or a damaged file
        if file.exists():
            raise CheckpointError(f"{file}: damaged or not {name}'s weights; delete it to download it again") from error
        why = getattr(error, "reason", error)
        raise CheckpointError(f"{weights.url} could not be downloaded ({why}); put it at {file}") from error
    # The published DenseNets are older than their layers' names.
    old = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)")
    for key in [key for key in state_dict if old.search(key)]:
        state_dict[old.sub(r"\1\2", key)] = state_dict.pop(key)
    return {
        "model": {"name": name, "options": {"classes": 1000, "image_size": how.crop_size[0], "stem": "standard"}},
        "classes": weights.meta["categories"],
        "image_size": how.crop_size[0],
        "resize": how.resize_size[0],
        "interpolation": how.interpolation.value,
        "mean": how.mean,
        "std": how.std,
        "state_dict": state_dict,
    }


def transfer(network: nn.Module, state_dict: dict, new: Collection[str], source: str) -> None:
    """Put trained weights into a network, but for those named in `new`; raises CheckpointError if any do not fit."""
    own = network.state_dict()
    if misfit := misfits(own, state_dict, new):
        raise CheckpointError(f"{source}: its weights do not fit the network: {misfit}")
    content = OrderedDict(state_dict) | {key: own[key] for key in new}
    content._metadata = getattr(state_dict, "_metadata", None)  # versions of the layers, which some look at
    network.load_state_dict(content)


def misfits(wanted: dict, given: dict, new: Collection[str] = ()) -> str:
    """What is missing, unexpected or of another shape in a state_dict, by name; empty when all is well."""
    # Batch normalisations did not count their batches before PyTorch 0.4.1; nothing here uses the count.
    missing = [key for key in wanted if key not in given and key not in new and "num_batches_tracked" not in key]
    unexpected = [key for key in given if key not in wanted]
    wrong = [
        f"{key} {list(given[key].shape)} in place of {list(wanted[key].shape)}"
        for key in wanted
        if key in given and key not in new and given[key].shape != wanted[key].shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "wrong shape": wrong}
    return "; ".join(
        f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in found.items()
        if names
    )


def stages(network: nn.Module, head: Collection[str]) -> dict[str, int]:
    """The stage of every parameter by its name, in the order of the network, from 1; 0 for the head.

    Stages are the network's direct parts. Where these are fewer than four, the largest is unfolded into its own. A head
    that was appended leaves the stages as they were, with the old head as one more behind them.
    Normalisation belongs to the stage before it; parameters outside of all parts (ViT's class token) to the first.
    """
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters() if name not in head}

    def size(part: str) -> int:
        return sum(count for name, count in sizes.items() if name.startswith(f"{part}."))

    def inside(part: str) -> list[str]:
        children = (f"{part}.{name}".lstrip(".") for name, _ in network.get_submodule(part).named_children())
        return [child for child in children if size(child)]

    parts = inside("")
    while len(parts) < (5 if isinstance(network, Appended) else 4) and (
        folded := [part for part in parts if inside(part)]
    ):
        largest = max(folded, key=size)
        parts[parts.index(largest) : parts.index(largest) + 1] = inside(largest)
    found, number = dict.fromkeys(sizes, 1) | dict.fromkeys(head, 0), 0
    for part in parts:
        names = [name for name in sizes if name.startswith(f"{part}.")]
        number += number == 0 or any(network.get_parameter(name).ndim > 1 for name in names)
        found |= dict.fromkeys(names, number)
    return found


def freeze(network: nn.Module, head: list[str], count: int | None) -> None:
    """Make the first `count` stages (None: all but the last layer) keep their weights; NetworkError if there are fewer.

    With None, auxiliary classifiers are frozen whole: they serve the layers before them.
    """
    stage_of, last_layer = stages(network, head), head[-1].rpartition(".")[0]
    if count is not None and count > max(stage_of.values()):
        raise NetworkError(f"--freeze {count}: there are {max(stage_of.values())} stages before the head")
    for name, parameter in network.named_parameters():
        keeps = name.rpartition(".")[0] != last_layer if count is None else 0 < stage_of[name] <= count
        parameter.requires_grad_(not keeps)


def train_mode(network: nn.Module) -> None:
    """Training mode, but for what is frozen: dropout and the statistics of batch normalisation rest there too."""
    network.train()
    before_all_that_trains = True
    for module in network.modules():
        own = list(module.parameters())
        if any(parameter.requires_grad for parameter in own):
            before_all_that_trains &= bool(list(module.children()))
        elif own or (before_all_that_trains and not list(module.children())):
            module.eval()


class SumOfAll(torch.autograd.Function):
    """The sum of all processes' tensors, through which gradients flow back to all."""

    @staticmethod
    def forward(_, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_, gradient: Tensor) -> Tensor:
        return SumOfAll.forward(None, gradient)


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation by all processes' inputs, `(N, C, ...)` of any N in each.

    It computes what torch.nn.SyncBatchNorm does, which takes GPUs alone.
    """

    def _check_input_dim(self, _: Tensor) -> None:
        pass

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return super().forward(inputs)
        dims = [0, *range(2, inputs.ndim)]
        shape = [1, -1, *[1] * (inputs.ndim - 2)]
        values, channels = inputs.float(), inputs.shape[1]
        count = values.new_tensor([values.numel() / channels])
        total, count = SumOfAll.apply(torch.cat([values.sum(dims), count])).split([channels, 1])
        mean = total / count
        centred = values - mean.view(shape)
        variance = SumOfAll.apply(centred.square().sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance * count / (count - 1), share)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(shape) + self.bias.view(shape)).to(inputs.dtype)


def synchronise(network: nn.Module, device: torch.device) -> nn.Module:
    """The network, whose batch normalisation is by the pictures of all processes from now on; weights stay."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = SyncBatchNorm  # the same weights and buffers, under the same names
    return network


class HeadOnly(nn.Module):
    """A network of which the last layer alone trains: all before it runs in eval mode and without gradients.

    Raises NetworkError for a network that does more behind its last layer than the Sequential it stands in.
    """

    def __init__(self, network: nn.Module, head: list[str], image_size: int):
        super().__init__()
        place, _, last = head[-1].rpartition(".")[0].rpartition(".")
        parent = network.get_submodule(place)
        self.network, self.head = network, getattr(parent, last)
        layers = list(parent.named_children())
        behind = [layer for name, layer in layers[[name for name, _ in layers].index(last) :]]
        # A Sequential goes on behind the head (SqueezeNet averages its outputs over the picture there).
        self.tail = nn.Sequential(*(behind if isinstance(parent, nn.Sequential) else [self.head]), nn.Flatten())
        self.eval()
        image = torch.zeros(1, 3, image_size, image_size, device=self.head.weight.device)
        if not torch.allclose(self(image), network(image), atol=1e-4):
            raise NetworkError("--freeze all: this network goes on behind its last layer; freeze a number of stages")

    def train(self, mode: bool = True) -> "HeadOnly":
        super().train(mode)
        self.network.eval()
        self.tail.train(mode)
        return self

    def features(self, images: Tensor) -> Tensor:
        """What the head gets to see of images `(N, 3, H, W)`: float, of any shape `(N, ...)`."""
        seen = []
        with self.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])), torch.no_grad():
            self.network(images)
        return seen[0]

    def forward(self, images: Tensor) -> Tensor:
        return self.tail(self.features(images))


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def packed(checkpoint: dict) -> memoryview:
    """A checkpoint as the bytes of a file: torch's zip archive, whose comment is a checksum of all before it.

    The checksums inside cover the weights alone, and torch.load looks at none.
    """
    file = io.BytesIO()  # torch.save hides a full disk's OSError behind an error of its own
    torch.save(checkpoint, file)
    with file.getbuffer() as content:
        content[-2:] = CHECKSUM_BYTES.to_bytes(2, "little")  # the comment's length, so far 0
        checksum = zlib.crc32(content)
    file.seek(0, io.SEEK_END)
    file.write(b"%08x" % checksum)
    return file.getbuffer()


def write(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all: aside, flushed to disk, then renamed.

    Raises OSError when the disk refuses; what was at `path` before is then still there.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def load(path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """The network of a checkpoint, in eval mode on `device`, and the whole checkpoint.

    The file is read without running code from it (`weights_only=True`). Raises CheckpointError for a file that is
    missing, damaged, of another kind or format, or whose weights do not fit its network.
    """
    checkpoint = read(path, device)
    try:
        with Uninitialised():
            network = create(checkpoint["model"]["name"], checkpoint["model"]["options"]).eval()
        if misfit := misfits(network.state_dict(), checkpoint["state_dict"]):
            raise ValueError(misfit)
        network.load_state_dict(checkpoint["state_dict"], assign=True)  # these tensors become the weights, uncopied
        network.to(device, torch.float32)
        with torch.inference_mode():
            answer = network(torch.zeros(1, 3, checkpoint["image_size"], checkpoint["image_size"], device=device))
        if answer.shape != (1, len(checkpoint["classes"])):
            raise ValueError(f"{len(checkpoint['classes'])} classes, but {answer.shape[-1]} outputs")
        if not answer.isfinite().all():
            raise ValueError("its answers are not finite numbers")
    except Exception as error:  # a stranger's file can hold anything
        raise CheckpointError(f"{path}: its weights and its network do not fit: {reason(error, 400)}") from error
    return network, checkpoint


def read(path: str | Path, device: torch.device | str = "cpu") -> dict:
    """A checkpoint's content, checked key by key; raises CheckpointError as `load` does."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        checkpoint = None
        if zipfile.is_zipfile(path):
            check_bytes(path)
            checkpoint = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(checkpoint, dict) or "format" not in checkpoint:
            problem = "not a whole checkpoint of train.py"
        elif checkpoint["format"] not in range(1, FORMAT + 1):
            problem = f"checkpoint format {checkpoint['format']!r:.40}; this version reads 1 to {FORMAT}"
        else:
            if checkpoint["format"] == 1:  # pictures were never resized further than to `image_size`
                checkpoint = {"resize": checkpoint.get("image_size"), "interpolation": "bilinear"} | checkpoint
            problem = bad_content(checkpoint)
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
    except Exception as error:  # torch raises many kinds for damaged files
        problem = "the file is damaged or cut short"
        if isinstance(error, pickle.UnpicklingError):
            problem = "the file holds Python objects, which could run code; it was not loaded"
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    return checkpoint


def check_bytes(path: Path) -> None:
    """Raise an error unless all bytes are as they were written, and reading them takes about as much memory as the file
    is large: UnpicklingError if it is for objects that are neither tensors nor plain values."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("compressed")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("larger inside than outside")
        left, checksum = path.stat().st_size - CHECKSUM_BYTES, 0
        while archive.comment and (part := file.read(min(left, 2**20))):
            left, checksum = left - len(part), zlib.crc32(part, checksum)
        # Earlier versions wrote no checksum over the whole file.
        if archive.comment != b"%08x" % checksum if archive.comment else archive.testzip() is not None:
            raise ValueError("altered")
        [values] = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if values.file_size > LARGEST_PICKLE:
            raise ValueError("too many values")
        # weights_only=True allows more than what a checkpoint needs, a bytearray of any size for example.
        for operation, of, _ in pickletools.genops(archive.read(values)):
            named = "GLOBAL" in operation.name or operation.name in ("INST", "OBJ", "NEWOBJ", "EXT1", "EXT2", "EXT4")
            if named and not NEEDED.fullmatch(str(of)):
                raise pickle.UnpicklingError(f"{of}")


def bad_content(checkpoint: dict) -> str | None:
    """What is wrong with a checkpoint's content, in words; None when nothing is."""
    for key, kind in CONTENT.items():
        if not isinstance(checkpoint.get(key), kind):
            return f"the checkpoint's {key!r} is missing or not of type {kind.__name__}"
    name, options = (checkpoint["model"].get(key) for key in ("name", "options"))
    if not (isinstance(name, str) and isinstance(options, dict) and is_state_dict(checkpoint["state_dict"])):
        return "the checkpoint's 'model' or 'state_dict' holds something else"
    if not all(map(is_plain, [checkpoint["metrics"], checkpoint["config"], options])):
        return "the checkpoint's options, metrics or config are not plain values"
    if not all(isinstance(name, str) and name.isprintable() for name in checkpoint["classes"]):
        return "the checkpoint's class names are not all printable"
    numbers = [*checkpoint["mean"], *checkpoint["std"]]
    if (
        len(checkpoint["mean"]) != 3
        or len(checkpoint["std"]) != 3
        or not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
        or min(checkpoint["std"]) <= 0
        or not 1 <= checkpoint["image_size"] <= checkpoint["resize"] <= LARGEST_SIDE
        or checkpoint["interpolation"] not in INTERPOLATIONS
        or checkpoint["config"].get("loss", LOSSES[0]) not in LOSSES
        or checkpoint["config"].get("tta", TTA[0]) not in TTA
        or not all(1 <= options.get(key, 1) <= MOST_OUTPUTS for key in ("append", "classes"))
        or not 1 <= options.get("image_size", 1) <= LARGEST_SIDE
        or not 0 < options.get("width", 1) <= LARGEST_WIDTH
    ):
        return "the checkpoint's classes, sizes, options, mean, std or config hold impossible values"
    return None


def is_state_dict(values: dict) -> bool:
    """Whether these are tensors by name, each with all of its numbers in the file: a view could repeat one for ever."""
    return all(
        isinstance(name, str)
        and type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and not (value.is_quantized or value.is_meta)
        and value.nbytes <= value.untyped_storage().nbytes()
        for name, value in values.items()
    )


def is_plain(values: dict) -> bool:
    """Whether these are numbers, words, or short lists of them, by name."""
    return all(
        isinstance(name, str)
        and isinstance(value, bool | int | float | str | list | tuple)
        and not (isinstance(value, list | tuple) and not all(isinstance(part, int | float) for part in value))
        for name, value in values.items()
    )


# ---- looking at networks -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watched(
    layers: Iterable[tuple[str, nn.Module]], keep: typing.Callable[[Tensor | tuple], object]
) -> Iterator[dict[str, object]]:
    """What `keep` makes of the output of each of these layers, by name, the last one to work last; until the exit."""
    found = {}

    def watch(name: str) -> typing.Callable:
        def note(_: nn.Module, __: tuple, output: Tensor | tuple) -> None:
            found.pop(name, None)
            found[name] = keep(output)

        return note

    with contextlib.ExitStack() as hooks:
        for name, layer in layers:
            hooks.enter_context(layer.register_forward_hook(watch(name)))
        yield found


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Attention (ViT's) step by step: in one piece it can be neither counted nor traced."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def measure(network: nn.Module, image_size: int) -> tuple[dict[str, tuple], dict[str, int]]:
    """Output shape and multiply-adds, those of modules inside included, of every module that works on one picture."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    image = torch.zeros(1, 3, image_size, image_size, device=next(network.parameters()).device)
    counter, training = FlopCounterMode(display=False), network.training
    watching = watched(network.named_modules(), lambda output: tuple(answers(output)[0].shape[1:]))
    with watching as shapes, counter, torch.no_grad(), plain_attention(), sdpa_kernel(SDPBackend.MATH):
        network.eval()(image)
    network.train(training)
    flops = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    return shapes, {name: flops.get(name, 0) // 2 for name in shapes}


def table(network: nn.Module, image_size: int, head: Collection[str] = ()) -> str:
    """A line a layer: its stage, name, output shape of one picture, parameters, multiply-adds; totals at the end.

    Layers are modules without others inside, and those that do more than these: with weights or products of their own.
    """
    shapes, adds = measure(network, image_size)
    modules, stage_of = dict(network.named_modules()), stages(network, head)
    names = [name for name in shapes if not list(modules[name].children()) or list(modules[name].parameters(False))]

    def line_of(part: str) -> str:  # the innermost layer that it belongs to
        return max((name for name in ["", *names] if not name or f"{part}.".startswith(f"{name}.")), key=len)

    weights, own_adds = {name: [] for name in ["", *names]}, {name: adds[name] for name in ["", *names]}
    for key in stage_of:
        weights[line_of(key)].append(key)
    for name in filter(None, names):
        own_adds[line_of(name.rpartition(".")[0])] -= adds[name]
    width = max(len(name) for name in [*names, "(itself)"])
    lines = [f"{'stage':>5}  {'layer':{width}} {'output':>16} {'parameters':>12} {'multiply-adds':>15}"]
    for name in [*filter(None, names), ""]:
        count = sum(network.get_parameter(key).numel() for key in weights[name])
        if name or count or own_adds[name]:
            stage, size = min((stage_of[key] for key in weights[name]), default=""), " x ".join(map(str, shapes[name]))
            label = f"{'head' if stage == 0 else stage:>5}  {name or '(itself)':{width}}"
            lines.append(f"{label} {size:>16} {count:>12,} {own_adds[name]:>15,}")
    count = sum(p.numel() for p in network.parameters())
    lines.append(f"{'':5}  {'total':{width}} {'':16} {count:>12,} {adds['']:>15,}")
    return "\n".join(lines)


def listing() -> str:
    """All networks, a line each: parameters (with torchvision's 1,000 classes), and what their ImageNet weights are."""
    lines = [f"{'network':20} {'parameters':>12}   ImageNet weights"]
    for name, network in NETWORKS.items():
        lines.append(f"{name:20} {sum(p.numel() for p in network().parameters()):>12,}   none")
    for name in torchvision_names():
        weights = torchvision_models().get_model_weights(name).DEFAULT
        accuracy = weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
        what = f"{accuracy:.1f} % at {weights.transforms().crop_size[0]} pixels, {weights.meta['_file_size']:,.0f} MB"
        lines.append(f"{name:20} {weights.meta['num_params']:>12,}   {what}")
    return "\n".join(lines)


def describe(path: str | Path) -> str:
    """What a checkpoint holds, in lines; raises CheckpointError."""
    network, checkpoint = load(path)
    options = ", ".join(f"{key} {value}" for key, value in checkpoint["model"]["options"].items())
    count = sum(p.numel() for p in network.parameters())
    side, resize = checkpoint["image_size"], checkpoint["resize"]
    cut = f", the middle of {resize} pixels on the shorter side" if resize > side else ""
    rows = {
        "file": f"{path}, {Path(path).stat().st_size / 1e6:,.1f} MB, format {checkpoint['format']}",
        "network": f"{checkpoint['model']['name']} ({options}), {count:,} parameters",
        "classes": f"{len(checkpoint['classes'])}: {', '.join(checkpoint['classes'])}",
        "pictures": f"{side} x {side} pixels, {checkpoint['interpolation']}{cut}",
        "mean": ", ".join(f"{value:.4f}" for value in checkpoint["mean"]),
        "std": ", ".join(f"{value:.4f}" for value in checkpoint["std"]),
        "epoch": checkpoint["epoch"],
        "training": "can be resumed" if "training" in checkpoint else "left out, to classify pictures",
    }
    lines = [f"{name:9} {what}" for name, what in rows.items()]
    for name in ("metrics", "config"):
        lines += ["", name, *(f"    {key} = {json.dumps(value)}" for key, value in checkpoint[name].items())]
    return "\n".join(map(printable, lines))


def write_graph(writer, network: nn.Module, images: Tensor) -> None:
    """Draw the network in TensorBoard's Graphs page; a network that cannot be traced is named on standard error."""
    training = network.training
    try:
        with plain_attention(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer is deprecated, and TensorBoard's only one
            writer.add_graph(network.eval(), images)
    except Exception as error:
        print(f"no graph in TensorBoard: {reason(error)}", file=sys.stderr)
    network.train(training)


# ---- for other programs --------------------------------------------------------------------------------------------


class Exported(nn.Module):
    """A network with its normalisation: float pictures `(N, 3, H, W)` in [0, 1] -> logits `(N, classes)`."""

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


def export(source: str | Path, path: Path) -> None:
    """Write a checkpoint's network as `.pt2` (torch.export) or `.onnx`, for any batch size, normalisation inside.

    The file is kept only if it gives the network's own logits. Raises CheckpointError where that fails, OSError.
    """
    network, checkpoint = load(source)
    exported = Exported(network, checkpoint["mean"], checkpoint["std"]).eval()
    side = checkpoint["image_size"]
    facts = {key: checkpoint[key] for key in ("classes", "image_size", "resize", "interpolation")}
    pack = {".pt2": as_pt2, ".onnx": as_onnx}[path.suffix]
    try:
        # Where exporters fail, they print whole graphs to standard error.
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()):
            content, run = pack(exported, torch.rand(2, 3, side, side), json.dumps(facts))
            for count in (1, 3):
                images = torch.rand(count, 3, side, side)
                with torch.no_grad():
                    torch.testing.assert_close(run(images), exported(images), rtol=1e-3, atol=1e-4)
    except Exception as error:  # exporters raise all kinds for what they cannot trace
        raise CheckpointError(f"{source}: {path} was not written, the export failed: {reason(error, 300)}") from error
    write(path, content)


def as_pt2(network: nn.Module, images: Tensor, facts: str) -> tuple[bytes, typing.Callable[[Tensor], Tensor]]:
    """The bytes of a file for `torch.export.load`, and the function that it loads as; `facts` is in its extra files."""
    file = io.BytesIO()
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(
        torch.export.export(network, (images,), dynamic_shapes=shapes), file, extra_files={"facts": facts}
    )
    return file.getvalue(), torch.export.load(io.BytesIO(file.getvalue())).module()


def as_onnx(network: nn.Module, images: Tensor, facts: str) -> tuple[bytes, typing.Callable[[Tensor], Tensor]]:
    """The bytes of an ONNX file, with `facts` in its metadata, and the function that onnx's evaluator makes of them."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    shapes = ({0: torch.export.Dim("batch")},)
    names = {"input_names": ["images"], "output_names": ["logits"]}
    program = torch.onnx.export(network, (images,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    onnx.helper.set_model_props(proto := program.model_proto, {"facts": facts})
    evaluator = ReferenceEvaluator(proto)

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(evaluator.run(None, {"images": images.numpy()})[0])

    return proto.SerializeToString(), run


# ---- the script ----------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="cifar_quick", help="the network (default: cifar_quick)")
    parser.add_argument("--classes", type=int, default=10, help="default: 10")
    parser.add_argument("--image-size", type=int, default=32, help="side of a picture in pixels (default: 32)")
    parser.add_argument("--batch-norm", action=argparse.BooleanOptionalAction, default=True, help="of cifar_quick")
    parser.add_argument("--activation", default="auto", choices=["auto", *ACTIVATIONS], help="auto: the network's own")
    parser.add_argument("--stem", default="standard", choices=STEMS, help="of torchvision's networks")
    parser.add_argument("--width", type=float, default=1.0, help="of fast: times as many channels (default: 1)")
    parser.add_argument("--log-dir", help="also write the graph for TensorBoard into this folder")
    parser.add_argument("--list", action="store_true", help="name all networks")
    parser.add_argument("--checkpoint", metavar="FILE", help="tell what a checkpoint holds")
    parser.add_argument("--export", type=Path, metavar="OUT", help="write --checkpoint as .pt2 (torch.export) or .onnx")
    args = parser.parse_args(argv)
    for name in ("classes", "image_size"):
        if getattr(args, name) < 1:
            parser.error(f"{flag(name)} {getattr(args, name)}: must be at least 1")
    if args.export and not args.checkpoint:
        parser.error("--export: give --checkpoint FILE too")
    if args.export and args.export.suffix not in (".pt2", ".onnx"):
        parser.error(f"--export {args.export}: the file's name must end in .pt2 or .onnx")
    if args.export and not args.export.parent.is_dir():
        parser.error(f"--export {args.export}: there is no folder {args.export.parent}")
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if args.export and args.export.suffix == ".onnx" and missing:
        parser.error(f"--export {args.export}: first run `pip install {' '.join(missing)}`")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.list:
        print(listing())
        return
    if args.checkpoint:
        if not args.export:
            print(describe(args.checkpoint))
            return
        export(args.checkpoint, args.export)
        print(f"{args.export}: {args.export.stat().st_size / 1e6:,.1f} MB, gives the network's own answers")
        return
    if problem := unknown(args.model):
        raise NetworkError(problem)
    options = network_options(
        args.model, args.classes, args.image_size, **{name: getattr(args, name) for name in SETTINGS}
    )
    check(args.model, options)
    network = create(args.model, options)
    print(table(network, args.image_size, head_keys(args.model, options)))
    if args.log_dir:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(args.log_dir) as writer:
            write_graph(writer, network, torch.zeros(1, 3, args.image_size, args.image_size))
        print(f"tensorboard --logdir {args.log_dir}")


def cli(argv: list[str] | None = None) -> int:
    return command("model.py", main, argv)


if __name__ == "__main__":
    end(cli())

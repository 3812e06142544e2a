"""Torchvision's networks: their names, their ImageNet weights, a stem for small pictures."""

import inspect
import re
import sys
import typing
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from quick.errors import CheckpointError, NetworkError

STEMS = ("standard", "small")
OLD_DENSENET_KEY = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)")


def torchvision_models() -> ModuleType:
    """`torchvision.models`, imported when it is needed: that takes a while. Raises NetworkError where it is missing."""
    try:
        from torchvision import models
    except ImportError as error:
        raise NetworkError(f"torchvision, which has this network, cannot be imported ({error})") from error
    return models


def torchvision_names() -> list[str]:
    """The names of torchvision's networks for classification."""
    models = torchvision_models()
    return models.list_models(module=models)


def from_torchvision(name: str, classes: int = 10, image_size: int = 32, stem: str = "standard") -> nn.Module:
    """One of torchvision's networks, initialised as its authors do it.

    `image_size` is in pixels, `stem` one of STEMS. Raises NetworkError where `stem` does not fit.
    """
    builder = torchvision_models().get_model_builder(name)
    accepted = inspect.signature(typing.get_type_hints(builder)["return"]).parameters
    options = {
        "image_size": image_size,  # vision transformers
        "input_size": (image_size, image_size),  # MaxViT
        "transform_input": True,  # Inception and GoogLeNet: their ImageNet weights expect pixels in another range
        "init_weights": True,
    }
    network = builder(num_classes=classes, **{key: value for key, value in options.items() if key in accepted})
    if stem == "small":
        if "input_size" in accepted:
            raise NetworkError(f"--stem small: {name} is built for the sizes that its own stem gives")
        use_small_stem(network, name)
    return network


def use_small_stem(network: nn.Module, name: str) -> None:
    """Let a network keep the full resolution of small pictures.

    The first convolution becomes 3x3 with stride 1, and a pooling right behind it goes: He et al. 2015
    (arxiv.org/abs/1512.03385, section 4.2). Raises NetworkError where the first convolution has not stride 2.
    """
    layers = ((place, layer) for place, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.MaxPool2d))
    first_place, first = next(layers)
    if first.stride != (2, 2):
        raise NetworkError(f"--stem small: {name} does not begin with a stride-2 convolution; use --stem standard")
    conv = nn.Conv2d(first.in_channels, first.out_channels, 3, padding=1, bias=first.bias is not None)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    second_place, second = next(layers)
    network.set_submodule(first_place, conv)
    if isinstance(second, nn.MaxPool2d):
        network.set_submodule(second_place, nn.Identity())


def imagenet_checkpoint(name: str) -> dict:
    """Torchvision's best ImageNet weights for a network, with what was done to the pictures, as a checkpoint.

    They are downloaded into torch's own folder once. Raises CheckpointError where they can't be had.
    """
    weights = torchvision_models().get_model_weights(name).DEFAULT
    path = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    try:
        state_dict = weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
        if not all(isinstance(value, Tensor) for value in state_dict.values()):
            raise ValueError("not a state_dict")
    except Exception as error:  # of the network, the disk, or a damaged file
        if path.exists():
            raise CheckpointError(f"{path}: damaged or not {name}'s weights; delete it to download it again") from error
        why = getattr(error, "reason", error)  # of urllib's errors
        raise CheckpointError(f"{weights.url} could not be downloaded ({why}); put it at {path}") from error
    # DenseNets were published before their layers got the names of today.
    for key in [key for key in state_dict if OLD_DENSENET_KEY.search(key)]:
        state_dict[OLD_DENSENET_KEY.sub(r"\1\2", key)] = state_dict.pop(key)
    transforms = weights.transforms()
    image_size = transforms.crop_size[0]
    return {
        "model": {"name": name, "options": {"classes": 1000, "image_size": image_size, "stem": "standard"}},
        "classes": weights.meta["categories"],
        "image_size": image_size,
        "resize": transforms.resize_size[0],
        "interpolation": transforms.interpolation.value,
        "mean": transforms.mean,
        "std": transforms.std,
        "state_dict": state_dict,
    }

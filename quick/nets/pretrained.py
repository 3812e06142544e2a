"""Torchvision's networks: their names, their ImageNet weights, a stem for small pictures."""

import inspect
import re
import typing
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from quick.checkpoints import OR_WEIGHTS, checked, contents, foreign_content, is_state_dict
from quick.cli import log
from quick.downloads import NotDownloaded, download
from quick.errors import CheckpointError, NetworkError, in_short, out_of_memory
from quick.nets.transfer import AUXILIARY

WRAPPERS = ("state_dict", "model", "net", "model_state_dict")  # under which other programs save a state_dict
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
IMAGENET = {"image_size": 224, "resize": 256, "interpolation": "bilinear"}
IMAGENET |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
OLD_DENSENET_KEY = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)")


def torchvision_models() -> ModuleType:
    """`torchvision.models`, imported when it is needed: that takes a while.

    Raises NetworkError where it is missing, or was built for another PyTorch.
    """
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:
        ways = "install torch and torchvision anew, both by one command of pip, from the same index"
        raise NetworkError(f"torchvision, which has this network, cannot be imported ({error}): {ways}") from error
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
    if not path.exists():
        download_weights(path, name, weights.url, weights.meta["_file_size"])
    try:
        state_dict = weights.get_state_dict(progress=False, weights_only=True)
        if not all(isinstance(value, Tensor) for value in state_dict.values()):
            raise ValueError("not a state_dict")
    except Exception as error:  # of the disk, or a damaged file
        if out_of_memory(error):
            raise
        raise CheckpointError(f"{path}: damaged or not {name}'s weights; delete it to download it again") from error
    return as_checkpoint(name, state_dict, 1000, weights)


def download_weights(path: Path, name: str, url: str, size: float) -> None:
    """Download a file of torchvision, whose name ends in the first digits of its SHA-256; `size` is about its MiB.

    Of several processes that start at once, one does the work while the others wait. Raises CheckpointError.
    """
    from filelock import FileLock

    sizes = range(round((size - 0.1) * 2**20), round((size + 0.1) * 2**20))
    digest = path.stem.rpartition("-")[2]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.exists():  # another process may have done it meanwhile
                log.warning(f"{name}'s ImageNet weights are not in {path.parent}; downloading them ({size:.0f} MB)")
                download(path, [url], sizes, "sha256", digest)
    except NotDownloaded as reasons:
        raise CheckpointError(
            f"{name}'s ImageNet weights could not be downloaded ({reasons}). Ways out: put {path.name} (from {url}) "
            f"into {path.parent}, or give --weights a file of {name}'s weights"
        ) from reasons
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: {error.strerror or error}") from error


def file_checkpoint(path: str, name: str, head_keys: Callable[[str, dict], list[str]]) -> dict:
    """What training can start from in a file: a checkpoint of ours, or a state_dict of the network `name`.

    `head_keys` is that of model.py. A state_dict of 1,000 classes is taken for ImageNet's; of others neither classes
    nor sizes nor normalisation are known. Raises CheckpointError.
    """
    content = contents(path, weights=True)
    if isinstance(content, dict) and isinstance(content.get("format"), int):
        return checked(path, content)
    state_dict = state_dict_in(content)
    if state_dict is None:
        raise CheckpointError(f"{path}: {foreign_content(content)}{OR_WEIGHTS}")
    head = head_keys(name, {"classes": 10, "image_size": 224})
    if missing := [key for key in head if not AUXILIARY.match(key) and not getattr(state_dict.get(key), "ndim", 0)]:
        found = f"it has {in_short(list(state_dict), 3)}"
        raise CheckpointError(f"{path}: weights alone (a state_dict), but not of {name}: no {missing[0]}; {found}")
    classes, weights = len(state_dict[head[-1]]), None
    if classes == 1000 and name in torchvision_names():
        published = torchvision_models().get_model_weights(name)
        weights = next((one for one in published if one.url.endswith(f"/{Path(path).name}")), published.DEFAULT)
    return as_checkpoint(name, state_dict, classes, weights)


def state_dict_in(content: object) -> dict | None:
    """The state_dict in what torch.save has written, by the names of today; None where there is none."""
    places = [content, *(content.get(key) for key in WRAPPERS)] if isinstance(content, dict) else []
    state_dict = next((place for place in places if isinstance(place, dict) and place and is_state_dict(place)), None)
    while state_dict and (found := [start for start in PREFIXES if all(key.startswith(start) for key in state_dict)]):
        metadata = getattr(state_dict, "_metadata", {})  # by the names of layers, which end before the dot
        state_dict = OrderedDict((key.removeprefix(found[0]), value) for key, value in state_dict.items())
        state_dict._metadata = {f"{key}.".removeprefix(found[0])[:-1]: value for key, value in metadata.items()}
    return state_dict


def as_checkpoint(name: str, state_dict: dict, classes: int, weights: object) -> dict:
    """A state_dict as a checkpoint; `weights` are torchvision's facts about it, None where it is of another source."""
    # DenseNets were published before their layers got the names of today.
    for key in [key for key in state_dict if OLD_DENSENET_KEY.search(key)]:
        state_dict[OLD_DENSENET_KEY.sub(r"\1\2", key)] = state_dict.pop(key)
    checkpoint = {"model": {"name": name, "options": {"classes": classes}}, "state_dict": state_dict}
    checkpoint["classes"] = [""] * classes  # their names are not known
    if weights:
        transforms = weights.transforms()
        checkpoint |= {
            "classes": weights.meta["categories"],
            "image_size": transforms.crop_size[0],
            "resize": transforms.resize_size[0],
            "interpolation": transforms.interpolation.value,
            "mean": transforms.mean,
            "std": transforms.std,
        }
    elif classes == 1000:
        checkpoint |= IMAGENET
    return checkpoint

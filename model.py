"""The networks: how they are built, created by name, loaded from checkpoints, and shown.

`python model.py` prints the network as a table, a line for each layer; with `--log-dir` it also draws it in
TensorBoard. `--list` names all networks, `--checkpoint FILE` tells what a file holds, and `--export OUT` writes it for
other programs.
"""

from quick.cli import check_flags
from quick.run.flags import parse_model

if __name__ == "__main__":  # --help and wrong flags are answered before PyTorch is imported, which takes seconds
    check_flags("model.py", parse_model)

import inspect
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quick.checkpoints import MOST_OUTPUTS, read
from quick.cli import exit_script, flag, how_to_see, run_script
from quick.errors import CheckpointError, ConfigError, NetworkError, out_of_memory, reason, suggestion
from quick.nets.activations import ACTIVATIONS
from quick.nets.checking import check_loaded, check_network
from quick.nets.export import cannot_write, export
from quick.nets.pretrained import file_checkpoint, from_torchvision, imagenet_checkpoint, torchvision_names
from quick.nets.summary import describe, listing, table, write_graph
from quick.nets.transfer import Appended, drop_auxiliary, misfits, transfer_weights

if TYPE_CHECKING:
    from quick.run.settings import Config

OPTIONS = {"batch_norm": True, "activation": "auto", "stem": "standard", "width": 1.0}  # of some networks; defaults


class CifarQuick(nn.Module):
    """The CIFAR-quick layout: three stages of 5x5 convolution and 2x2 max pooling, then two linear layers.

    After `cifar10_quick` of Caffe (github.com/BVLC/caffe, examples/cifar10), with optional batch normalisation and a
    choice of activations. Takes float images `(N, 3, image_size, image_size)`, returns float logits `(N, classes)`.
    Raises NetworkError for an `image_size` below 8.
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
    """These layers in a Sequential, each under its name; those that are None are left out."""
    return nn.Sequential(OrderedDict((name, layer) for name, layer in layers.items() if layer is not None))


class Fast(nn.Module):
    """The most accuracy a second: a 5x5 convolution, made for whitening, then five 3x3 convolutions.

    After airbench94 (Jordan 2024, arxiv.org/abs/2404.00498), with 32, 128 and 256 channels in place of 64, 256 and 256;
    its first two layers, which work on whole pictures and so take most of the time, are one layer here. `width`
    multiplies the number of channels: 1.5 makes as much work as airbench94 is. Takes float images `(N, 3, image_size,
    image_size)`, returns float logits `(N, classes)`. Raises NetworkError for an `image_size` below 8.
    """

    def __init__(self, classes: int = 10, image_size: int = 32, activation: str = "relu", width: float = 1.0):
        super().__init__()
        if image_size < 8:
            raise NetworkError(f"fast halves a picture three times: --image-size {image_size} is below 8")

        def layer(channels_in: int, channels_out: int, kernel: int = 3, pool: bool = False) -> nn.Sequential:
            return named(
                conv=nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False),
                pool=nn.MaxPool2d(2) if pool else None,
                norm=nn.BatchNorm2d(channels_out, momentum=0.4),  # with few steps, the averages must follow quickly
                activation=ACTIVATIONS[activation](),
            )

        small, middle, large = (max(1, round(width * channels)) for channels in (32, 128, 256))
        self.layer1 = layer(3, small, 5, pool=True)
        self.layer2 = layer(small, small)
        self.layer3 = layer(small, middle, pool=True)
        self.layer4 = layer(middle, middle)
        self.layer5 = layer(middle, large, pool=True)
        self.layer6 = layer(large, large)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(large, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.layer6(self.layer5(self.layer4(self.layer3(self.layer2(self.layer1(images))))))
        # Not AdaptiveMaxPool2d, whose gradients GPUs add up one by one.
        return self.head(self.flatten(F.max_pool2d(features, features.shape[2:])))


NETWORKS = {"cifar_quick": CifarQuick, "fast": Fast}


# ---- creating networks -----------------------------------------------------------------------------------------------


def create(name: str, options: dict) -> nn.Module:
    """A new network, one of `NETWORKS` or of torchvision; `options` are its arguments, e.g. `{"classes": 10}`.

    Torchvision's take `classes`, `image_size` and `stem`. With `append` (a number) the network has that many outputs,
    and a linear layer behind them gives the classes. Raises NetworkError for an unknown name or options that do not
    work together.
    """
    if "append" in options:
        inner = {key: value for key, value in options.items() if key != "append"} | {"classes": options["append"]}
        return Appended(create(name, inner), options["append"], options["classes"])
    if error := unknown(name):
        raise NetworkError(error)
    return NETWORKS[name](**options) if name in NETWORKS else from_torchvision(name, **options)


def create_empty(name: str, options: dict) -> nn.Module:
    """Like `create`, but the weights have only shapes, no memory and no values, until loaded ones replace them."""
    with Uninitialised():
        return create(name, options)


class Uninitialised(torch.overrides.TorchFunctionMode):
    """Networks made in this context have weights without memory and values ("meta"), until loaded ones replace them.

    Layers make their weights with `torch.empty`; whatever else a constructor computes is real.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if func is torch.empty else {}))


def unknown(name: str) -> str | None:
    """Why there is no network of this name, in words; None when there is one."""
    if name in NETWORKS:
        return None
    known = [*NETWORKS, *torchvision_names()]
    return None if name in known else f"no network {name!r}; python model.py --list has all{suggestion(name, known)}"


def config_options(config: "Config", classes: int, pretrained: dict | None = None) -> dict:
    """The options for `create` that a config asks for; OPTIONS are those that only some networks have.

    Raises NetworkError for a setting that this network does not have, ConfigError for a second appended layer.
    """
    name, size = config.model, config.image_size or 32
    settings = {"batch_norm": config.batch_norm, "activation": config.activation}
    settings |= {"stem": config.stem, "width": config.width}
    options = {"classes": classes, "image_size": size, "stem": "standard"}  # of torchvision's networks
    if name in NETWORKS:
        options = {key: value.default for key, value in inspect.signature(NETWORKS[name]).parameters.items()}
        options |= {"classes": classes, "image_size": size}
    for key, value in settings.items():
        if key in options and value != "auto":
            options[key] = value
        elif key not in options and value not in (OPTIONS[key], "relu"):  # relu was the default once
            wrong, right = flag(key, value), flag(key, OPTIONS[key])
            raise NetworkError(f"{wrong}: {name} has no such option; add {right}")
    appended = pretrained["model"]["options"].get("append", 0) if pretrained else 0
    if config.head == "append":
        if appended:
            raise ConfigError(f"--head append: {config.weights} has an appended layer already; add --head replace")
        appended = len(pretrained["classes"]) if pretrained else 1000
    return options | {"append": appended} if appended else options


def head_keys(name: str, options: dict) -> list[str]:
    """The names of the head's weights, which are those whose shapes depend on the number of classes.

    The last layer's come last, after those of auxiliary classifiers.
    """
    two, three = (create_empty(name, options | {"classes": classes}).state_dict() for classes in (2, 3))
    return [key for key in two if two[key].shape != three[key].shape]


# ---- trained networks ------------------------------------------------------------------------------------------------


def load(path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """The network of a checkpoint, in eval mode and float32 on `device`, and the whole content of the file.

    The file is read without running code from it (`weights_only=True`). Raises CheckpointError for a file that is
    missing, damaged, of another kind or format, or whose weights do not fit its network.
    """
    checkpoint = read(path)
    try:
        network = create_empty(checkpoint["model"]["name"], checkpoint["model"]["options"]).eval()
        drop_auxiliary(checkpoint["state_dict"], network.state_dict())
        if misfit := misfits(network.state_dict(), checkpoint["state_dict"]):
            raise ValueError(misfit)
        network.load_state_dict(checkpoint["state_dict"], assign=True)  # these tensors become the weights, uncopied
        network.to(device, torch.float32)
        check_loaded(network, checkpoint["image_size"], len(checkpoint["classes"]))
    except Exception as error:  # a stranger's file can hold anything
        if out_of_memory(error):
            raise
        raise CheckpointError(f"{path}: its weights and its network do not fit: {reason(error, 400)}") from error
    return network, checkpoint


def build(config: "Config", options: dict, head: list[str], classes: list[str], pretrained: dict | None) -> nn.Module:
    """A new network with these options; with the weights of a `pretrained` checkpoint, but for a new head (--head).

    `head` names the head's weights. Raises NetworkError, and CheckpointError for weights that do not fit.
    """
    network = create(config.model, options)
    if not pretrained:
        return network
    body, new = network, head
    if config.head == "append":
        body, new = network.network, []
    elif config.head == "auto" and pretrained["classes"] == classes:
        new = []
    side = pretrained.get("image_size")  # a plain state_dict tells nothing of it
    source = f"{config.weights} (trained on {side} x {side} pixels)" if side else config.weights
    transfer_weights(body, pretrained["state_dict"], new, source)
    return network


def pretrained(source: str, name: str) -> dict:
    """What training can start from, as a checkpoint: torchvision's best ImageNet weights, or the file `source`.

    Raises NetworkError where there are none for this network, CheckpointError for a file that cannot be used.
    """
    if source == "imagenet":
        if name in NETWORKS:
            raise NetworkError(f"--weights imagenet: there are none for {name}; take a network of torchvision")
        return imagenet_checkpoint(name)
    checkpoint = file_checkpoint(source, name, head_keys)
    found = checkpoint["model"]["name"]
    if found != name:
        raise NetworkError(f"--weights {source}: it holds {found}, not {name}; add {flag('model', found)}")
    return checkpoint


# ---- the script ------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    config, args = parse_model(argv)
    image_size = config.image_size or 32
    if not 1 <= args.classes <= MOST_OUTPUTS:
        raise ConfigError(f"--classes {args.classes}: must be at least 1, at most {MOST_OUTPUTS}")
    if args.export and (error := cannot_write(args.export)):
        raise ConfigError(f"--export {args.export}: {error}")

    if args.list:
        print(listing(NETWORKS))
    elif args.export:
        checked = export(*load(args.checkpoint), args.checkpoint, args.export)
        answers = ", gives the network's own answers" if checked else ""
        print(f"{args.export}: {args.export.stat().st_size / 1e6:,.1f} MB{answers}")
    elif args.checkpoint is not None:
        print(describe(args.checkpoint, *load(args.checkpoint)))
    else:
        if error := unknown(config.model):
            raise NetworkError(error)
        options = config_options(config, args.classes)
        check_network(create_empty, config.model, options)
        network = create(config.model, options)
        print(table(network, image_size, head_keys(config.model, options)))
        if args.log_dir:
            from torch.utils.tensorboard import SummaryWriter

            with SummaryWriter(args.log_dir) as writer:
                write_graph(writer, network, torch.zeros(1, 3, image_size, image_size))
            print(how_to_see(args.log_dir))


def cli(argv: list[str] | None = None) -> int:
    return run_script("model.py", main, argv)


if __name__ == "__main__":
    exit_script(cli())

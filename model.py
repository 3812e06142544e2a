"""The networks, what they are made of, and how they are saved and loaded.

`python model.py` prints the network as a table, a line a layer; with `--log-dir` it draws it in TensorBoard.
"""

import argparse
import difflib
import io
import math
import os
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FORMAT = 1  # of a checkpoint; grows when an older reader could misread a newer file
CONTENT = {"format": int, "model": dict, "classes": list, "image_size": int, "mean": list, "std": list}
CONTENT |= {"state_dict": dict, "epoch": int, "metrics": dict, "config": dict}

ACTIVATIONS = {"none": lambda: None, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "sigmoid": nn.Sigmoid}
LOSSES = ("cross_entropy", "mse", "l1")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the reason."""


class NetworkError(ValueError):
    """A network that cannot be: an unknown name, or options that do not work."""


class CifarQuick(nn.Module):
    """The CIFAR-quick layout: three stages of 5x5 convolution and 2x2 max pooling, then two linear layers.

    After `cifar10_quick` of Caffe (github.com/BVLC/caffe, examples/cifar10), with batch normalisation to choose.
    Takes float images `(N, 3, image_size, image_size)`, returns float logits `(N, classes)`.
    """

    def __init__(self, classes: int = 10, image_size: int = 32, batch_norm: bool = True, activation: str = "relu"):
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


NETWORKS = {"cifar_quick": CifarQuick}


def create(name: str, options: dict) -> nn.Module:
    """A new network of `NETWORKS`; `options` are its constructor's arguments, e.g. `{"classes": 10}`.

    Raises NetworkError for a network that is not there or options that do not work.
    """
    if name not in NETWORKS:
        raise NetworkError(f"no network {name!r}; there are: {', '.join(NETWORKS)}{suggestion(name, NETWORKS)}")
    return NETWORKS[name](**options)


def suggestion(word: str, known: Iterable[str]) -> str:
    """What the user may have meant, as the end of an error message; nothing if nothing is close."""
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


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
def outputs(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The network's answers to all batches, in eval mode: float32 logits `(N, classes)` and int64 labels `(N,)`."""
    training = network.training
    network.eval()
    pairs = [(network(images).float(), labels) for images, labels in batches]
    network.train(training)
    return torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])


def probabilities(logits: Tensor, kind: str = "cross_entropy") -> Tensor:
    """Shares of 1 `(N, classes)` from logits of a network that was trained with this loss.

    With `mse` and `l1` the logits themselves estimate them.
    """
    if kind == "cross_entropy":
        return logits.softmax(1)
    above_all = logits == logits.amax(1, keepdim=True)  # the guess, also where no logit is positive
    return F.normalize(logits.clamp(min=0) + 1e-9 * above_all, p=1, dim=1)


def score(logits: Tensor, labels: Tensor, kind: str = "cross_entropy") -> tuple[float, float]:
    """The mean loss per picture, without label smoothing, and the accuracy as a fraction of 1."""
    correct = (logits.argmax(1) == labels).sum().item()
    return loss_function(logits, labels, kind).item(), correct / len(labels)


def save(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint so that a file called `path` is always whole: aside, flushed to disk, then renamed.

    Raises OSError when the disk refuses; what was at `path` before is then still there.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    content = io.BytesIO()  # torch.save hides a full disk's OSError behind an error of its own
    torch.save(checkpoint, content)
    try:
        with aside.open("wb") as file:
            file.write(content.getbuffer())
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
        # On "meta" nothing is allocated or initialised; the checkpoint's tensors become the parameters themselves.
        with torch.device("meta"):
            network = create(checkpoint["model"]["name"], checkpoint["model"]["options"]).eval()
        network.load_state_dict(checkpoint["state_dict"], assign=True)
        network.to(device, torch.float32)
        with torch.inference_mode():
            answer = network(torch.zeros(1, 3, checkpoint["image_size"], checkpoint["image_size"], device=device))
        if answer.shape != (1, len(checkpoint["classes"])):
            raise ValueError(f"{len(checkpoint['classes'])} classes, but {answer.shape[-1]} outputs")
    except Exception as error:  # a stranger's file can hold anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: its weights and its network do not fit: {reason}") from error
    return network, checkpoint


def read(path: str | Path, device: torch.device | str = "cpu") -> dict:
    """A checkpoint's content, checked key by key; raises CheckpointError as `load` does."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        is_zip = zipfile.is_zipfile(path)
        checkpoint = torch.load(path, map_location=device, weights_only=True) if is_zip else None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch raises many kinds for damaged files
        if "weights_only" in str(error) or "Weights only" in str(error):
            problem = "holds Python objects, which could run code; it was not loaded"
        else:
            problem = "is damaged or cut short"
        raise CheckpointError(f"{path}: the file {problem}") from error
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise CheckpointError(f"{path}: not a whole checkpoint of train.py")
    if checkpoint["format"] != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {checkpoint['format']!r}; this version reads {FORMAT}")
    for key, kind in CONTENT.items():
        if not isinstance(checkpoint.get(key), kind):
            raise CheckpointError(f"{path}: the checkpoint's {key!r} is missing or not of type {kind.__name__}")
    numbers = [*checkpoint["mean"], *checkpoint["std"]]
    if (
        len(checkpoint["mean"]) != 3
        or len(checkpoint["std"]) != 3
        or not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
        or min(checkpoint["std"]) <= 0
        or not all(isinstance(name, str) for name in checkpoint["classes"])
        or not 1 <= checkpoint["image_size"] <= 4096
        or checkpoint["config"].get("loss", LOSSES[0]) not in LOSSES
    ):
        raise CheckpointError(f"{path}: the checkpoint's classes, sizes, mean, std or config hold impossible values")
    return checkpoint


def table(network: nn.Module, image_size: int) -> str:
    """A line a layer: name, output shape of one picture, parameters, multiply-adds; the total in the last line."""
    from torch.utils.flop_counter import FlopCounterMode

    shapes, hooks, training = {}, [], network.training
    layers = {name: layer for name, layer in network.named_modules() if not list(layer.children())}
    for name, layer in layers.items():
        hook = lambda _, __, output, name=name: shapes.update({name: tuple(output.shape[1:])})  # noqa: E731
        hooks.append(layer.register_forward_hook(hook))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network.eval()(torch.zeros(1, 3, image_size, image_size, device=next(network.parameters()).device))
    network.train(training)
    for hook in hooks:
        hook.remove()
    flops = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}

    lines = [f"{'layer':20} {'output':>14} {'parameters':>12} {'multiply-adds':>14}"]
    for name, shape in shapes.items():
        count = sum(p.numel() for p in layers[name].parameters())
        size = " x ".join(map(str, shape))
        lines.append(f"{name:20} {size:>14} {count:>12,} {flops.get(name, 0) // 2:>14,}")
    count = sum(p.numel() for p in network.parameters())
    lines.append(f"{'total':20} {'':14} {count:>12,} {counter.get_total_flops() // 2:>14,}")
    return "\n".join(lines)


def write_graph(writer, network: nn.Module, images: Tensor) -> None:
    """Draw the network in TensorBoard's Graphs page; a network that cannot be traced is named on standard error."""
    training = network.training
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer is deprecated, and TensorBoard's only one
            writer.add_graph(network.eval(), images)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        print(f"no graph in TensorBoard: {reason}", file=sys.stderr)
    network.train(training)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A network as a table, a line a layer.", allow_abbrev=False)
    parser.add_argument("--model", default="cifar_quick", choices=NETWORKS, help="default: cifar_quick")
    parser.add_argument("--classes", type=int, default=10, help="default: 10")
    parser.add_argument("--image-size", type=int, default=32, help="side of a picture in pixels (default: 32)")
    parser.add_argument("--batch-norm", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--activation", default="relu", choices=ACTIVATIONS, help="default: relu")
    parser.add_argument("--log-dir", help="also write the graph for TensorBoard into this folder")
    parser.error = lambda message: parser.exit(2, f"model.py: {message}\n")
    args = parser.parse_args(argv)
    if args.classes < 1:
        parser.error(f"--classes {args.classes}: must be at least 1")
    options = {key: getattr(args, key) for key in ("classes", "image_size", "batch_norm", "activation")}
    try:
        network = create(args.model, options)
    except NetworkError as error:
        parser.error(str(error))
    print(table(network, args.image_size))
    if args.log_dir:
        from torch.utils.tensorboard import SummaryWriter

        try:
            with SummaryWriter(args.log_dir) as writer:
                write_graph(writer, network, torch.zeros(1, 3, args.image_size, args.image_size))
        except OSError as error:
            sys.exit(f"model.py: {args.log_dir}: {error.strerror}")
        print(f"tensorboard --logdir {args.log_dir}")


if __name__ == "__main__":
    sys.exit(main())

"""What people see of networks: the table of layers, the list of all, what a checkpoint holds, TensorBoard's graph."""

import contextlib
import json
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from quick.cli import log
from quick.errors import printable, reason
from quick.nets.losses import split_outputs
from quick.nets.pretrained import torchvision_models, torchvision_names
from quick.nets.transfer import stages


@contextlib.contextmanager
def watched(
    layers: Iterable[tuple[str, nn.Module]], keep: Callable[[Tensor | tuple], object]
) -> Iterator[dict[str, object]]:
    """Watch layers, given by name, until the exit: yields a dict from names to `keep(output)`, filled as they run.

    It is in the order in which they ran; of a layer that runs twice, the last time counts.
    """
    kept = {}

    def hook_of(name: str) -> Callable:
        def hook(_: nn.Module, __: tuple, output: Tensor | tuple) -> None:
            kept.pop(name, None)
            kept[name] = keep(output)

        return hook

    with contextlib.ExitStack() as hooks:
        for name, layer in layers:
            hooks.enter_context(layer.register_forward_hook(hook_of(name)))
        yield kept


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Within it, attention (ViT's) runs step by step: its fused form can be neither counted nor traced."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


# ---- the table of layers ---------------------------------------------------------------------------------------------


def measure(network: nn.Module, image_size: int) -> tuple[dict[str, tuple], dict[str, int]]:
    """The output's shape for one picture, and the multiply-adds, of each module that runs, by the module's name.

    A module's multiply-adds include those of the modules inside it.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    image = torch.zeros(1, 3, image_size, image_size, device=next(network.parameters()).device)
    counter, training = FlopCounterMode(display=False), network.training
    watching = watched(network.named_modules(), lambda output: tuple(split_outputs(output)[0].shape[1:]))
    with watching as shapes, counter, torch.no_grad(), plain_attention(), sdpa_kernel(SDPBackend.MATH):
        network.eval()(image)
    network.train(training)
    flops = {name.partition(".")[2]: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    return shapes, {name: flops.get(name, 0) // 2 for name in shapes}


def table(network: nn.Module, image_size: int, head: Collection[str] = ()) -> str:
    """A line for each layer: stage, name, output shape of one picture, parameters, multiply-adds; totals at the end.

    A layer is a module without others inside, or one that has weights of its own beside them. What modules around
    layers compute themselves is counted in the line of the innermost layer around it, or in "(itself)". `head` names
    the head's parameters.
    """
    shapes, multiply_adds = measure(network, image_size)
    modules, stage_of = dict(network.named_modules()), stages(network, head)
    layers = [name for name in shapes if not list(modules[name].children()) or list(modules[name].parameters(False))]
    layers = [*filter(None, layers), ""]  # the network itself comes last

    def layer_around(part: str) -> str:
        return max((name for name in layers if not name or f"{part}.".startswith(f"{name}.")), key=len)

    weights = {name: [] for name in layers}
    own_adds = {name: multiply_adds[name] for name in layers}
    for key in stage_of:
        weights[layer_around(key)].append(key)
    for name in layers[:-1]:
        own_adds[layer_around(name.rpartition(".")[0])] -= multiply_adds[name]

    width = max(len(name or "(itself)") for name in layers)
    lines = [f"{'stage':>5}  {'layer':{width}} {'output':>16} {'parameters':>12} {'multiply-adds':>15}"]
    for name in layers:
        count = sum(network.get_parameter(key).numel() for key in weights[name])
        if name or count or own_adds[name]:
            stage = min((stage_of[key] for key in weights[name]), default="")
            shape = " x ".join(map(str, shapes[name]))
            label = "head" if stage == 0 else stage
            lines.append(f"{label:>5}  {name or '(itself)':{width}} {shape:>16} {count:>12,} {own_adds[name]:>15,}")
    count = sum(parameter.numel() for parameter in network.parameters())
    lines.append(f"{'':5}  {'total':{width}} {'':16} {count:>12,} {multiply_adds['']:>15,}")
    return "\n".join(lines)


# ---- networks and checkpoints ----------------------------------------------------------------------------------------


def listing(networks: Mapping[str, Callable[[], nn.Module]]) -> str:
    """A line for each network, first our own (constructors by name), then torchvision's.

    It gives the number of parameters (of torchvision's with 1,000 classes), and tells of the ImageNet weights.
    """
    lines = [f"{'network':20} {'parameters':>12}   ImageNet weights"]
    for name, make in networks.items():
        lines.append(f"{name:20} {sum(parameter.numel() for parameter in make().parameters()):>12,}   none")
    for name in torchvision_names():
        weights = torchvision_models().get_model_weights(name).DEFAULT
        accuracy = weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
        what = f"{accuracy:.1f}% at {weights.transforms().crop_size[0]} pixels, {weights.meta['_file_size']:,.0f} MB"
        lines.append(f"{name:20} {weights.meta['num_params']:>12,}   {what}")
    return "\n".join(lines)


def describe(path: str | Path, network: nn.Module, checkpoint: dict) -> str:
    """What the checkpoint at `path` holds, in lines; takes what `model.load` returns for it."""
    options = ", ".join(f"{key} {value}" for key, value in checkpoint["model"]["options"].items())
    count = sum(parameter.numel() for parameter in network.parameters())
    side, resize = checkpoint["image_size"], checkpoint["resize"]
    cut = {"pad": ", padded with grey", "squash": ", squashed"}.get(checkpoint["fit"], "")
    cut = f", the middle of {resize} pixels on the shorter side" if resize > side else cut
    levels = "; values of wide pixels from {:g} to {:g}".format(*checkpoint["levels"]) if checkpoint["levels"] else ""
    rows = {
        "file": f"{path}, {Path(path).stat().st_size / 1e6:,.1f} MB, format {checkpoint['format']}",
        "network": f"{checkpoint['model']['name']} ({options}), {count:,} parameters",
        "classes": f"{len(checkpoint['classes'])}: {', '.join(checkpoint['classes'])}",
        "pictures": f"{side} x {side} pixels, {checkpoint['interpolation']}{cut}{levels}",
        "mean": ", ".join(f"{value:.4f}" for value in checkpoint["mean"]),
        "std": ", ".join(f"{value:.4f}" for value in checkpoint["std"]),
        "epoch": checkpoint["epoch"],
        "training": "can be resumed" if "training" in checkpoint else "left out, to classify pictures",
    }
    lines = [f"{name:9} {what}" for name, what in rows.items()]
    for name in ("metrics", "config"):
        values = {key: json.dumps(value, ensure_ascii=False) for key, value in checkpoint[name].items()}
        lines += ["", name, *(f"    {key} = {value}" for key, value in values.items())]
    return "\n".join(map(printable, lines))


def write_graph(writer, network: nn.Module, images: Tensor) -> None:
    """Draw the network on TensorBoard's Graphs page, traced with float images `(N, 3, H, W)`.

    `writer` is a SummaryWriter or has its `add_graph`. A network that cannot be traced is named on standard error.
    """
    training = network.training
    try:
        with plain_attention(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer is deprecated, and TensorBoard has no other
            # Traced here, since TensorBoard would trace three times more to compare.
            writer.add_graph(torch.jit.trace(network.eval(), images, check_trace=False), images)
    except Exception as error:  # each network has its own way to fail
        log.warning(f"no graph in TensorBoard: {reason(error)}")
    network.train(training)

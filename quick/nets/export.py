"""Networks for other programs: a checkpoint becomes a .pt2 or .onnx file, with its normalisation inside."""

import contextlib
import importlib.util
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from quick.checkpoints import write_file
from quick.cli import log
from quick.errors import CheckpointError, reason

SUFFIXES = (".pt2", ".onnx")


class Exported(nn.Module):
    """A network with its normalisation: float images `(N, 3, H, W)` in [0, 1] -> logits `(N, classes)`."""

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


def cannot_write(path: Path) -> str | None:
    """Why `export` could not write a file with this path, in words; None if it could."""
    if path.suffix not in SUFFIXES:
        return "the file's name must end in .pt2 or .onnx"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if path.suffix == ".onnx" and missing:
        return f"first run `pip install {' '.join(missing)}`"
    return None


def export(network: nn.Module, checkpoint: dict, source: str | Path, path: Path) -> bool:
    """Write a network as `.pt2` (torch.export) or `.onnx`, for batches of any size, with the normalisation inside.

    `network` and `checkpoint` are what `model.load` returns for the file `source`. The new file is kept only if it
    gives the network's own logits; where nothing here can run it, a warning says so, and False is returned. Raises
    CheckpointError where that fails, OSError where `path` cannot be written.
    """
    exported = Exported(network, checkpoint["mean"], checkpoint["std"]).eval()
    exported.to(memory_format=torch.contiguous_format)  # ExecuTorch takes no weights that lie as channels_last
    side = checkpoint["image_size"]
    names = ("classes", "image_size", "resize", "interpolation", "fit", "levels")
    facts = json.dumps({name: checkpoint[name] for name in names})
    convert = as_pt2 if path.suffix == ".pt2" else as_onnx
    try:
        # Exporters that fail print whole graphs to standard error.
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()):
            content, run, is_reliable = convert(exported, torch.rand(2, 3, side, side), facts)
            checked = gives_same(run, exported, side, is_reliable)
    except Exception as error:  # exporters raise all kinds of errors
        raise CheckpointError(f"{source}: {path} was not written, the export failed: {reason(error, 300)}") from error
    write_file(path, content)
    if not checked:
        log.warning(
            f"{path}: not compared with the network, whose pooling onnx cannot evaluate; to have that done, run `pip "
            "install onnxruntime` and export again"
        )
    return checked


def gives_same(run: Callable[[Tensor], Tensor], network: nn.Module, side: int, is_reliable: bool) -> bool:
    """Whether `run` gives the network's logits. Raises the error where it does not, if it `is_reliable`."""
    for count in (1, 3):
        images = torch.rand(count, 3, side, side)
        try:
            with torch.no_grad():
                torch.testing.assert_close(run(images), network(images), rtol=1e-3, atol=1e-4)
        except Exception:
            if is_reliable:
                raise
            return False
    return True


def as_pt2(network: nn.Module, images: Tensor, facts: str) -> tuple[bytes, Callable[[Tensor], Tensor], bool]:
    """The bytes of a file for `torch.export.load`, with `facts` in its extra files; its function, which is reliable."""
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"facts": facts})
    content = file.getvalue()
    return content, torch.export.load(io.BytesIO(content)).module(), True


def as_onnx(network: nn.Module, images: Tensor, facts: str) -> tuple[bytes, Callable[[Tensor], Tensor], bool]:
    """The bytes of an ONNX file, with `facts` in its metadata; a function that runs it; whether that is reliable.

    ONNX Runtime runs it where it is installed, else the slow evaluator of onnx. The latter gives some poolings with
    `ceil_mode` (GoogLeNet's) another size than PyTorch and ONNX Runtime do.
    """
    import onnx
    import onnx.reference

    program = torch.onnx.export(
        network,
        (images,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
    )
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {"facts": facts})
    content = proto.SerializeToString()
    if importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        evaluator, is_reliable = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]), True
    else:
        attributes = (attribute for node in proto.graph.node for attribute in node.attribute)
        is_reliable = not any(attribute.name == "ceil_mode" and attribute.i for attribute in attributes)
        evaluator = onnx.reference.ReferenceEvaluator(proto)

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(evaluator.run(None, {"images": images.numpy()})[0])

    return content, run, is_reliable

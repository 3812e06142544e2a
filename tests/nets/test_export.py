"""Networks for other programs."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from conftest import save
from samples import a_checkpoint
from torch import Tensor, nn

import model
from quick.errors import CheckpointError
from quick.nets.export import cannot_write, export


@pytest.fixture
def source(tmp_path) -> Path:
    """A checkpoint of an untrained network."""
    torch.manual_seed(0)
    network = model.CifarQuick(classes=3).to(memory_format=torch.channels_last)  # as it trains
    save(tmp_path / "a.pt", a_checkpoint(network, classes=3))
    return tmp_path / "a.pt"


def exported(source: Path, name: str, capsys) -> tuple[Tensor, Tensor, Path]:
    """Export a checkpoint by the command line; returns pictures in [0, 1], their logits, and the new file."""
    path = source.with_name(name)
    assert model.cli(["--checkpoint", str(source), "--export", str(path)]) == 0
    assert "gives the network's own answers" in capsys.readouterr().out
    images = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        logits = model.load(source)[0]((images - 0.5) / 0.2)  # by the checkpoint's mean and std
    return images, logits, path


def test_export_takes_any_batch_of_plain_pictures(source, capsys):
    images, logits, path = exported(source, "a.pt2", capsys)
    facts = {"facts": ""}
    program = torch.export.load(path, extra_files=facts)
    assert torch.allclose(program.module()(images), logits, atol=1e-4)
    assert torch.allclose(program.module()(images[:1]), logits[:1], atol=1e-4)
    assert all(value.is_contiguous() for value in program.state_dict.values())  # ExecuTorch takes no others
    facts = json.loads(facts["facts"])
    assert facts["classes"] == ["class 0", "class 1", "class 2"]
    assert (facts["image_size"], facts["resize"], facts["interpolation"], facts["fit"]) == (32, 32, "bilinear", "crop")


@pytest.mark.expensive
def test_export_to_onnx(source, capsys):
    onnx = pytest.importorskip("onnx", reason="needs `pip install onnx onnxscript`")
    pytest.importorskip("onnxscript", reason="needs `pip install onnx onnxscript`")
    from onnx.reference import ReferenceEvaluator

    images, logits, path = exported(source, "a.onnx", capsys)
    [answer] = ReferenceEvaluator(onnx.load(path)).run(["logits"], {"images": images.numpy()})
    assert torch.allclose(torch.from_numpy(answer), logits, atol=1e-4)


@pytest.mark.expensive
@pytest.mark.parametrize("runtime", [True, False])
def test_a_pooling_that_onnx_cannot_evaluate(runtime, tmp_path, monkeypatch, capsys):
    """ONNX Runtime says that the file is right; without it the file is kept, and a warning says what was not done."""
    for name in ("onnx", "onnxscript", *["onnxruntime"] * runtime):
        pytest.importorskip(name, reason="needs `pip install onnx onnxscript onnxruntime`")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: find(name) if runtime or name != "onnxruntime" else None
    )
    save(tmp_path / "a.pt", a_checkpoint(CeilPooled(classes=3), "ceil_pooled", classes=3))
    monkeypatch.setitem(model.NETWORKS, "ceil_pooled", CeilPooled)
    assert model.cli(["--checkpoint", str(tmp_path / "a.pt"), "--export", str(tmp_path / "a.onnx")]) == 0
    out, err = capsys.readouterr()
    assert ("gives the network's own answers" in out) is runtime and (tmp_path / "a.onnx").exists()
    assert (err == "") is runtime and (runtime or "a.onnx: not compared with the network, whose pooling onnx" in err)


@pytest.mark.expensive
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_that_onnx_evaluates_otherwise_or_slowly(name, tmp_path, capsys):
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed, reason="needs `pip install onnx onnxscript onnxruntime`")
    torch.manual_seed(0)
    options = {"classes": 3, "image_size": 75, "append": 4}
    network = model.create(name, options).train()
    for _ in range(10):  # averages with which the answers depend on the pictures
        network(torch.rand(8, 3, 75, 75) * 4 - 2)
    save(tmp_path / "a.pt", a_checkpoint(network, name, **options))
    assert model.cli(["--checkpoint", str(tmp_path / "a.pt"), "--export", str(tmp_path / "a.onnx")]) == 0
    out, err = capsys.readouterr()
    assert "gives the network's own answers" in out and not err


def test_files_that_cannot_be_written_are_named_beforehand(tmp_path, monkeypatch):
    assert cannot_write(tmp_path / "a.pt2") is None
    assert cannot_write(tmp_path / "a.txt") == "the file's name must end in .pt2 or .onnx"
    assert cannot_write(tmp_path / "b" / "a.pt2") == f"there is no folder {tmp_path / 'b'}"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cannot_write(tmp_path / "a.onnx") == "first run `pip install onnx onnxscript`"


class CeilPooled(model.CifarQuick):
    """Adds to its answer a pooling of GoogLeNet's, whose output onnx's evaluator takes for larger than it is."""

    def forward(self, images):
        pooled = nn.functional.max_pool2d(images[:, :, :4, :4], 3, stride=1, padding=1, ceil_mode=True)
        return super().forward(images) + pooled.mean((2, 3))


class Moody(model.CifarQuick):
    """Cannot be exported: what it does depends on what it sees."""

    def forward(self, images):
        return super().forward(images) * (2 if images.mean().item() > 0 else 1)


class Fickle(model.CifarQuick):
    """Can be exported, but what comes out answers otherwise."""

    def forward(self, images):
        return super().forward(images) + (0 if torch.compiler.is_exporting() else 1)


@pytest.mark.parametrize("odd", [Moody, Fickle])
def test_a_failed_export_leaves_no_file(odd, tmp_path):
    network = odd(classes=3).eval()
    with pytest.raises(CheckpointError) as caught:
        export(network, a_checkpoint(network, classes=3), "a.pt", tmp_path / "b.pt2")
    assert str(caught.value).startswith(f"a.pt: {tmp_path / 'b.pt2'} was not written, the export failed: ")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())

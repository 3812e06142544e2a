"""What a run leaves in its folder, and which folder a new run gets."""

import json

import pytest
import torch
from conftest import same_weights

import model
import train
from quick.checkpoints import CONTENT
from quick.errors import DataError
from quick.run import folder
from quick.run.checks import TRAINING
from quick.run.folder import RunFolder
from quick.run.history import History
from quick.run.settings import Config


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_run_folder(run):
    names = {path.name for path in run.iterdir() if not path.name.startswith("events.")}
    assert names == {"config.toml", "metrics.jsonl", "best.pt", "epoch_001.pt", "epoch_002.pt", "epoch_003.pt"}
    assert len(list(run.glob("events.out.tfevents.*"))) == 1


def test_metrics_have_a_line_an_epoch(run):
    lines = metrics(run)
    assert [line["epoch"] for line in lines] == [1, 2, 3] and [line["step"] for line in lines] == [16, 32, 48]
    for line in lines:
        assert list(line) == [
            *("epoch", "step", "train_loss", "train_accuracy", "lr", "epoch_seconds", "images_per_second"),
            *("test_loss", "test_accuracy", "test_balanced_accuracy", "test_f1"),
        ]
        assert 0 <= line["test_accuracy"] <= 1
        assert line["images_per_second"] == pytest.approx(1000 / line["epoch_seconds"])
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]


def test_a_run_whose_checkpoints_could_not_be_read_is_not_begun(tmp_path):
    for classes, reason in ((["x" * 2000], "has 2,000 characters"), (["x" * 900] * 9000, "9,000 class names are too")):
        with RunFolder() as run, pytest.raises(DataError, match=reason):
            run.open(Config(data="photos", log_dir=str(tmp_path)), {}, classes, state=None, manifest=None, job="")
    assert not list(tmp_path.iterdir())


def test_checkpoints_can_be_resumed_and_the_best_is_small(run):
    checkpoint = torch.load(run / "epoch_003.pt", weights_only=True)
    assert set(checkpoint) == {*CONTENT, "levels", "training"}
    parts = {"optimizer", "scaler", "step", "totals", "confidence", "history", "mistakes", "pictures", "sets"}
    assert set(checkpoint["training"]) == parts == TRAINING
    assert History.load(checkpoint["training"]["history"]) == History(metrics(run))
    assert checkpoint["training"]["step"] == 48 and checkpoint["training"]["pictures"] == 1000
    assert len(checkpoint["training"]["optimizer"]["state"]) == len(list(model.CifarQuick().parameters()))
    assert checkpoint["config"]["limit"] == 1000 and checkpoint["epoch"] == 3
    best = torch.load(run / "best.pt", weights_only=True)
    assert set(best) == {*CONTENT, "levels"}
    assert best["metrics"]["test_accuracy"] == max(line["test_accuracy"] for line in metrics(run))
    assert same_weights(run / "best.pt", run / f"epoch_{best['epoch']:03}.pt")


def test_two_runs_of_the_same_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(folder.time, "strftime", lambda _: "now")
    runs = [RunFolder() for _ in range(3)]
    for run in runs:
        run.create(Config(log_dir=str(tmp_path)))
    assert [run.path.name for run in runs] == ["now_cifar_quick", "now_cifar_quick_2", "now_cifar_quick_3"]


def test_an_existing_run_is_never_written_over(run, capsys):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    flags = ["--data", "shapes", "--limit", "20", "--device", "cpu", "--log-dir", str(run.parent)]
    assert train.cli([*flags, "--run-name", run.name]) == 2
    assert f"{run} exists already" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before

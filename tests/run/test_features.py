"""Training the head alone, on features that are computed once, or anew in every epoch where they must be."""

import json

import pytest
import torch

import datasets
import model
import train
from quick.nets import losses
from quick.run.evaluation import outputs_of_set

QUICK = "--data shapes --limit 200 --epochs 1 --device cpu --run-name a --no-views".split()


def train_head(weights, logs, *flags: object) -> dict:
    """A quick run that trains the head alone; returns its best checkpoint."""
    start = ["--weights", str(weights), "--freeze", "all", "--log-dir", str(logs)]
    assert train.cli([*QUICK, *start, *map(str, flags)]) == 0
    return torch.load(logs / "a" / "best.pt", weights_only=True)


def test_features_computed_once_train_the_same_head(run, tmp_path, capsys):
    flags = "--head replace --epochs 2 --no-flip --crop 0 --tta none --precision fp32".split()
    once = train_head(run / "best.pt", tmp_path / "1", *flags)
    assert "features computed once" in capsys.readouterr().err
    anew = train_head(run / "best.pt", tmp_path / "2", *flags, "--memory-share", 0)
    assert "computed again in every epoch" in capsys.readouterr().err
    old = torch.load(run / "best.pt", weights_only=True)["state_dict"]
    for checkpoint in (once, anew):
        new = checkpoint["state_dict"]
        assert {key for key in old if torch.equal(old[key], new[key])} == set(old) - {"head.weight", "head.bias"}
    for key in ("head.weight", "head.bias"):
        assert torch.allclose(once["state_dict"][key], anew["state_dict"][key], atol=1e-4)
    lines = [json.loads((tmp_path / part / "a" / "metrics.jsonl").read_text().splitlines()[-1]) for part in "12"]
    assert lines[0]["test_loss"] == pytest.approx(lines[1]["test_loss"], abs=1e-3)

    network, checkpoint = model.load(tmp_path / "1" / "a" / "best.pt")  # the whole network answers as the head did
    how = {name: checkpoint[name] for name in ("mean", "std")}
    [test_set] = datasets.load("shapes", limit=200, splits=["test"], **how)
    scores = losses.score(*outputs_of_set(network, test_set, classes=10))
    assert scores["accuracy"] == checkpoint["metrics"]["test_accuracy"]
    assert scores["loss"] == pytest.approx(checkpoint["metrics"]["test_loss"], abs=1e-4)


def test_augmented_pictures_go_through_the_frozen_part_each_time(run, tmp_path, capsys):
    train_head(run / "best.pt", tmp_path, "--flip", "--val-fraction", "0.2")
    assert "features" not in capsys.readouterr().err


def test_views_of_test_pictures_forbid_features_and_say_so(run, tmp_path, capsys):
    train_head(run / "best.pt", tmp_path, *"--no-flip --crop 0 --tta mirror".split())
    assert "--tta none would compute them once" in capsys.readouterr().err


def test_a_frozen_network_trains_its_head_on_single_pictures(run, tmp_path):
    train_head(run / "best.pt", tmp_path, *"--head replace --batch-size 1 --limit 20".split())

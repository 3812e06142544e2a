"""The whole story in one second: settings, data, network, one real training step, and the file that predicts."""

import json
import math

import torch

import datasets
import device
import model
import predict
import train


def test_one_real_step_is_learned_from_saved_and_asked(tmp_path):
    flags = "--data shapes --limit 20 --batch-size 20 --epochs 1 --device cpu --no-whiten --no-views --run-name a"
    assert train.main([*flags.split(), "--log-dir", str(tmp_path)]) == 0

    [metrics] = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert metrics["epoch"] == metrics["step"] == 1
    assert all(math.isfinite(metrics[name]) for name in ("train_loss", "test_loss", "lr"))
    assert 0 < metrics["train_loss"] < 10 and 0 <= metrics["test_accuracy"] <= 1

    network, checkpoint = model.load(tmp_path / "a" / "best.pt")
    device.seed(checkpoint["config"]["seed"])
    before = model.create(checkpoint["model"]["name"], checkpoint["model"]["options"])
    for name, weight in before.named_parameters():
        moved = (network.get_parameter(name) - weight).abs().max().item()
        assert 0 < moved < 1, name

    [test_set] = datasets.load("shapes", limit=20, splits=["test"])
    _, [picture, *_], _ = test_set.preview(torch.arange(1))
    answers = predict.classify(picture, (network, checkpoint), top_k=10)
    assert {name for name, _ in answers} == set(test_set.classes)
    assert math.isclose(sum(share for _, share in answers), 1, abs_tol=1e-5)

"""What the steps of an epoch add up to, and the pictures that an epoch with --hardest trains on."""

import json
import math

import pytest
import torch

import train
from quick.errors import TrainingError
from quick.processes import ALONE
from quick.run.settings import Config
from quick.run.state import EpochTotals, hardest


def test_the_totals_of_an_epoch_are_means_over_its_pictures():
    totals = EpochTotals(steps=3, step=2, seconds=2.0, lr=0.5)
    indices = torch.arange(4)
    steps = [(torch.tensor(1.0), 4, indices, 0.1), (torch.tensor(2.5), 4, indices, 0.1)]
    totals.add_losses(steps, epoch=1, group=ALONE)
    assert totals.loss_since_last_point() == pytest.approx(1.75)
    totals.step = 3
    totals.add_losses([(torch.tensor(4.0), 2, indices[:2], 0.1)], epoch=1, group=ALONE)
    totals.correct = 5
    assert totals.loss_since_last_point() == pytest.approx(4.0)  # of the two pictures since then
    assert totals.metrics() == {
        "train_loss": pytest.approx((4 + 10 + 8) / 10),
        "train_accuracy": 0.5,
        "lr": 0.5,
        "epoch_seconds": 2.0,
        "images_per_second": 5.0,
    }


def test_a_loss_that_is_not_finite_names_its_step_and_pictures():
    totals, indices = EpochTotals(steps=9, step=7), torch.arange(20)
    losses_and_rates = [(1.0, 0.3), (math.inf, 0.25), (1.0, 0.2)]
    steps = [(torch.tensor(loss), 20, indices, lr) for loss, lr in losses_and_rates]
    with pytest.raises(TrainingError) as error:
        totals.add_losses(steps, epoch=4, group=ALONE)
    numbers = ", ".join(map(str, range(16)))
    assert str(error.value) == (
        f"the loss is inf in epoch 4, step 6 (lr 0.25, training pictures number {numbers} and 4 more); "
        "try a lower --lr, or --clip-grad 1"
    )


def test_the_hardest_pictures_are_those_of_the_lowest_confidence():
    config, confidence = Config(epochs=4, hardest=0.3), torch.rand(50)
    assert hardest(confidence, config, epoch=2) is None  # the first half of the run has all
    keep = hardest(confidence, config, epoch=3)
    assert keep.sum() == 15 and confidence[keep].max() < confidence[~keep].min()


def test_the_second_half_trains_on_the_hardest_pictures(tmp_path):
    flags = "--data shapes --limit 200 --epochs 3 --batch-size 20 --hardest 0.3 --device cpu --no-views --run-name a"
    assert train.cli([*flags.split(), "--log-dir", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 23]
    checkpoints = [torch.load(tmp_path / "a" / f"epoch_{n:03}.pt", weights_only=True) for n in (2, 3)]
    before, after = (checkpoint["training"]["confidence"] for checkpoint in checkpoints)
    assert checkpoints[1]["training"]["step"] == 23 and checkpoints[1]["metrics"]["lr"] < 0.02
    seen = before != after  # in the last epoch
    assert abs(seen.sum().item() - 60) <= 1 and before[seen].max() <= before[~seen].min()
    assert before.min() > 0 and before.max() < 1

"""The finished epochs: which one is best, what ended a run, and how a checkpoint stores them."""

import json
import math

import pytest
import torch
from samples import a_checkpoint

from model import create
from quick.checkpoints import read, to_bytes
from quick.run.checks import is_history
from quick.run.history import History
from quick.run.settings import Config


def epochs(*scores: tuple[float, float], split: str = "test") -> list[dict]:
    """Epochs of these accuracies and losses."""
    return [
        {"epoch": number, f"{split}_accuracy": accuracy, f"{split}_loss": loss}
        for number, (accuracy, loss) in enumerate(scores, 1)
    ]


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([(0.3, 1), (0.5, 2), (0.4, 0.1)], 2),  # accuracy comes first
        ([(1, 0.6), (1, 0.2), (1, 0.3)], 2),  # then the loss: with few pictures, luck soon gives all of them
        ([(0.3, 1), (0.5, 0.7), (0.5, 0.7)], 3),  # then the longer training
        ([(0.5, 0.7)], 1),
    ],
)
def test_the_best_epoch_has_the_highest_accuracy_then_the_lowest_loss(scores, best, split):
    assert History(epochs(*scores, split=split)).best["epoch"] == best


def test_the_best_epoch_can_be_that_of_the_highest_f1_or_of_the_lowest_loss():
    found = epochs((0.9, 0.5), (0.8, 0.4), (0.7, 0.4), (0.7, 0.4))
    for metrics, f1 in zip(found, (0.1, 0.3, 0.3, 0.2), strict=True):
        metrics["test_f1"] = f1
    assert History(found, by="accuracy").best["epoch"] == 1
    assert History(found, by="f1").best["epoch"] == 3  # of equal ones that of the lower loss, then the later one
    assert History(found, by="loss").best["epoch"] == 2  # of equal ones that of the higher accuracy
    again = History.load(History(found).state_dict(), "loss")
    assert again.by == "loss" and again.best["epoch"] == 2
    config = Config(epochs=9, patience=3)
    assert [History(found, by=by).ended_by(config) for by in ("accuracy", "f1", "loss")] == ["patience", None, None]
    assert History(found, by="loss").ended_by(Config(epochs=9, patience=2)) == "patience"
    assert is_history(long_history(2).epochs) and not is_history(long_history(2).epochs, "f1")


def test_the_epochs_and_the_config_tell_what_ended_a_run():
    history = History(epochs((0.3, 1), (0.5, 0.9), (0.5, 0.9), (0.4, 0.8)))
    assert History().ended_by(Config(epochs=1, patience=1)) is None
    assert history.ended_by(Config(epochs=5)) is None
    assert history.ended_by(Config(epochs=4, patience=2)) == "epochs"
    assert history.ended_by(Config(epochs=5, patience=2)) == "patience"
    assert history.ended_by(Config(epochs=5, patience=3)) is None


def test_a_lower_loss_begins_the_patience_anew_and_an_equal_one_does_not():
    config = Config(epochs=10, patience=2)
    assert History(epochs((1, 0.5), (1, 0.4), (1, 0.3))).ended_by(config) is None
    assert History(epochs((1, 0.5), (1, 0.5), (1, 0.5))).ended_by(config) == "patience"  # a network that is dead
    assert History(epochs((1, 0.5), (0.9, 0.4), (0.9, 0.3))).ended_by(config) == "patience"


def test_what_an_earlier_version_chose_stays_until_an_epoch_is_better():
    """best.pt has its weights, and those of the equally accurate epochs after it may be gone (--keep)."""
    old = History.load(epochs((0.4, 1), (0.5, 0.7), (0.5, 0.6)))
    assert old.best["epoch"] == 2
    again = History.load(old.state_dict())
    again.epochs.append({"epoch": 4, "test_accuracy": 0.5, "test_loss": 0.8})
    assert again.best["epoch"] == 2
    again.epochs.append({"epoch": 5, "test_accuracy": 0.5, "test_loss": 0.65})
    assert again.best["epoch"] == 5


def long_history(count: int) -> History:
    names = "train_loss train_accuracy lr epoch_seconds images_per_second test_loss test_accuracy".split()
    return History(
        [
            {"epoch": epoch, "step": 10 * epoch} | {name: epoch / 7 + place for place, name in enumerate(names)}
            for epoch in range(1, count + 1)
        ]
    )


def test_a_long_history_comes_back_as_it_was(tmp_path):
    """Stored one by one, the numbers of 20,000 epochs are more than what a checkpoint may hold."""
    history = long_history(20_000)
    history.epochs[77]["test_top3"] = 0.1  # as the one test at a run's end adds to one epoch alone
    checkpoint = a_checkpoint(create("fast", {"classes": 2, "width": 0.1}), "fast", classes=2, width=0.1)
    (tmp_path / "a.pt").write_bytes(to_bytes(checkpoint | {"training": {"history": history.state_dict()}}))
    found = History.load(read(tmp_path / "a.pt")["training"]["history"])
    assert found == history and found.as_jsonl() == history.as_jsonl() and is_history(found.epochs)
    assert json.loads(found.as_jsonl().splitlines()[77]) == history.epochs[77]
    assert History.load(History().state_dict()) == History()


@pytest.mark.parametrize(
    "stored",
    [
        None,
        "x",
        {},
        {"columns": 3, "earlier": 0},
        {"columns": {"epoch": [1]}, "earlier": 0},
        {"columns": {"epoch": torch.ones(1)}, "earlier": 0},
        {"columns": {"epoch": torch.ones(1, 1, dtype=torch.int64)}, "earlier": 0},
        {"columns": {"epoch": torch.ones(1, dtype=torch.int64).expand(10**12)}, "earlier": 0},
        {"columns": {"epoch": torch.arange(2), "step": torch.arange(3)}, "earlier": 0},
        {"columns": {7: torch.arange(2)}, "earlier": 0},
        {"columns": {"epoch": torch.arange(2)}, "earlier": "x"},
        {"columns": {str(number): torch.arange(2) for number in range(1000)}, "earlier": 0},
    ],
)
def test_what_is_no_table_of_numbers_is_no_history(stored):
    with pytest.raises(ValueError, match=r"no history|no table"):
        History.load(stored)


def test_a_history_with_impossible_values_is_none():
    good = long_history(2).epochs
    assert is_history(good)
    for wrong in (math.inf, math.nan, 10**400, "x", [1] * 1000):
        assert not is_history([good[0], good[1] | {"test_loss": wrong}])

"""Whether a run can go on from what a checkpoint says of its training; the file may be a stranger's."""

import math
from dataclasses import fields

import torch
from torch import Tensor

from quick.checkpoints import LONGEST_TEXT, is_plain
from quick.errors import printable
from quick.run.history import History
from quick.run.settings import Config
from quick.run.state import EpochTotals

TRAINING = {"optimizer", "scaler", "step", "totals", "confidence", "history", "mistakes", "pictures", "sets"}
OTHER_VERSION = "is of another version, whose runs this one cannot resume"


def wrong_training(checkpoint: dict, config: Config) -> str | None:
    """Why training cannot go on from a checkpoint, in words; None when it can. It may be a stranger's."""
    training = checkpoint.get("training")
    if not isinstance(training, dict) or set(training) | {"sets"} != TRAINING:  # earlier versions had no digests
        return OTHER_VERSION
    digests = training.get("sets", {})
    if not isinstance(digests, dict) or not all(is_text(text) for pair in digests.items() for text in pair):
        return "has digests of its pictures that are no text"
    if config.model != checkpoint["model"]["name"]:
        return "has parts that do not belong together"
    try:
        history = History.load(training["history"], config.best)
    except ValueError:
        return "has a history with impossible values"
    if len(history) != checkpoint["epoch"]:
        return "has parts that do not belong together"
    if not is_history(history.epochs, config.best):
        return "has a history with impossible values"
    numbers, confidences = [training["step"], training["pictures"]], [training["confidence"]]
    if not all(type(number) is int for number in numbers):
        return "has totals of an epoch with impossible values"
    if (totals := training["totals"]) is not None:
        types = {key.name: key.type for key in fields(EpochTotals)}
        has_all = isinstance(totals, dict) and totals.keys() == types.keys()
        if not has_all or not all(isinstance(totals[name], kind) for name, kind in types.items()):
            return "has totals of an epoch with impossible values"
        if not (totals["step"] <= totals["steps"] and totals["logged_pictures"] <= totals["pictures"] > 0):
            return "has totals of an epoch with impossible values"
        numbers += [totals[name] for name, kind in types.items() if kind in (int, float)]
        confidences.append(totals["confidence"])
    if not all(isinstance(number, int | float) and 0 <= number < 2**62 for number in numbers):
        return "has totals of an epoch with impossible values"
    for values in confidences:
        if values is None and (config.hardest == 1 or not history.epochs):
            continue
        if not isinstance(values, Tensor) or values.shape != (training["pictures"],) or not values.is_floating_point():
            return "has no confidence in each of its pictures"
    mistakes = training["mistakes"]
    are_lines = isinstance(mistakes, list) and len(mistakes) <= 10
    if not are_lines or not all(is_text(text) and printable(text) == text for text in mistakes):
        return "has mistakes that are no text"
    if not isinstance(training["scaler"], dict) or not is_plain(training["scaler"]):
        return "has a scaler with impossible values"
    return None


def is_text(value: object) -> bool:
    """Whether this is a line that can be printed: three long names of classes, and what stands between them."""
    return isinstance(value, str) and len(value) <= LONGEST_TEXT


def is_history(epochs: object, by: str = "accuracy") -> bool:
    """Whether these are the metrics of epochs 1, 2, 3 ..., each with all that a run needs, in finite numbers.

    `by` names what chooses the best epoch.
    """
    try:
        numbers = ["epoch", "step", "lr", "train_loss", "train_accuracy"]
        if epochs:
            split = History(epochs).split
            numbers += [f"{split}_loss", f"{split}_accuracy", f"{split}_{by}"]
        for number, metrics in enumerate(epochs, 1):
            values = [metrics[name] for name in numbers]
            are_finite = all(isinstance(value, int | float) and math.isfinite(value) for value in values)
            if not (are_finite and is_plain(metrics) and metrics["epoch"] == number):
                return False
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError):
        return False
    return True


def check_momentum(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Raise ValueError unless all that is saved of the optimizer has the shapes of its weights."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for index, buffers in saved.items():
        if len(buffers) > 10:
            raise ValueError("its optimizer is another one")
        for value in buffers.values():
            if isinstance(value, Tensor):
                fits = value.shape in (weights[index].shape, ())
            else:
                fits = value is None or type(value) in (int, float)
            if not fits:
                raise ValueError("its momentum is not that of its weights")

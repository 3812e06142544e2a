"""Losses, probabilities, metrics and the confusion matrix: all that compares a network's outputs with the labels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

AUXILIARY_WEIGHT = 0.3  # of an auxiliary classifier's loss (Szegedy et al. 2014, arxiv.org/abs/1409.4842, part 5)


def split_outputs(output: Tensor | tuple) -> tuple[Tensor, ...]:
    """A network's output as a tuple: the logits `(N, classes)`, then those of auxiliary classifiers.

    GoogLeNet and Inception have auxiliary classifiers while they train; all other networks give only the logits.
    """
    return (output,) if isinstance(output, Tensor) else tuple(logits for logits in output if logits is not None)


def loss_function(logits: Tensor, labels: Tensor, kind: str = "cross_entropy", label_smoothing: float = 0.0) -> Tensor:
    """The mean loss per picture, as a scalar tensor, of float logits `(N, classes)` and int64 labels `(N,)`.

    `kind` is one of LOSSES; `mse` and `l1` compare the logits with one-hot labels, as a regression does. Label
    smoothing takes this share of each label's weight and gives it to all classes evenly (Szegedy et al. 2016,
    arxiv.org/abs/1512.00567, section 7). The loss is float32; for no pictures it is 0, with gradients of 0.
    """
    logits = logits.float()  # whatever the precision of the forward pass; the same in all processes of a group
    if not len(labels):
        return 0 * logits.sum()
    if kind == "cross_entropy":
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    classes = logits.shape[1]
    one_hot = F.one_hot(labels, classes).to(logits.dtype) * (1 - label_smoothing) + label_smoothing / classes
    return {"mse": F.mse_loss, "l1": F.l1_loss}[kind](logits, one_hot)


def probabilities(logits: Tensor, kind: str = "cross_entropy") -> Tensor:
    """Probabilities `(N, classes)` from float logits `(N, classes)` of a network that was trained with this loss.

    With `mse` and `l1` the logits estimate the probabilities themselves: negative ones count as 0, and each row is
    scaled to the sum 1.
    """
    if kind == "cross_entropy":
        return logits.softmax(1)
    highest = logits == logits.amax(1, keepdim=True)  # stays the highest, even where no logit is above 0
    return F.normalize(logits.clamp(min=0) + 1e-9 * highest, p=1, dim=1)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of pictures, from 0 to 1, whose label has the highest logit."""
    return (logits.argmax(1) == labels).sum().item() / len(labels)


METRICS = {"accuracy": accuracy}  # name: function of logits (N, classes) and int64 labels (N,); each gets its own curve


def score(logits: Tensor, labels: Tensor, kind: str = "cross_entropy") -> dict[str, float]:
    """The mean loss per picture (without label smoothing) as "loss", and all METRICS under their names.

    Takes float logits `(N, classes)` and int64 labels `(N,)`, N at least 1; `kind` is one of LOSSES.
    """
    metrics = {name: metric(logits, labels) for name, metric in METRICS.items()}
    return {"loss": loss_function(logits, labels, kind).item()} | metrics


def confusion_counts(probabilities: Tensor, labels: Tensor) -> Tensor:
    """The confusion matrix: int64 counts `(classes, classes)` on the CPU, a row for each true class.

    Takes probabilities or logits `(N, classes)` and int64 labels `(N,)`; the highest value of a row is the guess.
    """
    classes = probabilities.shape[1]
    pairs = labels * classes + probabilities.argmax(1)
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes).cpu()


def worst_pairs(counts: Tensor, classes: Sequence[str], most: int = 3) -> list[str]:
    """The most frequent mistakes of a confusion matrix, in words: "cat taken for dog 14 %" of the pictures of cats."""
    shares = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    shares.fill_diagonal_(0)
    highest, cells = shares.flatten().topk(min(most, shares.numel()))
    lines = []
    for share, cell in zip(highest.tolist(), cells.tolist(), strict=True):
        if share > 0:
            label, guess = divmod(cell, len(classes))
            lines.append(f"{classes[label]} taken for {classes[guess]} {100 * share:.0f} %")
    return lines

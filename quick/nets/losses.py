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


def loss_function(
    logits: Tensor,
    labels: Tensor,
    kind: str = "cross_entropy",
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """The mean loss per picture, as a scalar tensor, of float logits `(N, classes)` and int64 labels `(N,)`.

    `kind` is one of LOSSES; `mse` and `l1` compare the logits with one-hot labels, as a regression does. Label
    smoothing takes this share of each label's weight and gives it to all classes evenly (Szegedy et al. 2016,
    arxiv.org/abs/1512.00567, section 7). The loss is float32; for no pictures it is 0, with gradients of 0.

    With `class_weights`, float32 `(classes,)`, the loss of each picture, smoothing included, counts as often as the
    weight of its class says. The sum is divided by N, not by the sum of the weights: so the losses of a batch's parts,
    each times its share of the batch, add up to the loss of the batch.
    """
    logits = logits.float()  # whatever the precision of the forward pass; the same in all processes of a group
    if not len(labels):
        return 0 * logits.sum()
    reduction = "mean" if class_weights is None else "none"
    if kind == "cross_entropy":
        found = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction=reduction)
    else:
        classes = logits.shape[1]
        one_hot = F.one_hot(labels, classes).to(logits.dtype) * (1 - label_smoothing) + label_smoothing / classes
        found = {"mse": F.mse_loss, "l1": F.l1_loss}[kind](logits, one_hot, reduction=reduction)
    if class_weights is None:
        return found
    of_picture = found if found.ndim == 1 else found.mean(1)
    return (class_weights[labels] * of_picture).mean()


def balanced_weights(labels: Tensor, balance: float) -> Tensor | None:
    """The weight of each class in the training loss, float32 `(classes,)`, on the device of int64 labels `(N,)`.

    It is proportional to (mean count / count) ** balance, and its mean over the pictures is 1: with a `balance` of 1
    all classes weigh the same, with 0 all pictures do (None). A class without pictures has the weight 0.
    """
    if not balance:
        return None
    counts = torch.bincount(labels.cpu()).double()
    weights = torch.where(counts > 0, counts.clamp(min=1) ** -balance, 0)
    return (weights * counts.sum() / (weights * counts).sum()).float().to(labels.device)


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


def class_scores(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Recall, precision and F1 of each class, float64 `(classes,)` on the CPU, of logits `(N, classes)`, labels `(N,)`.

    Recall is the share of a class's pictures that were found, precision the share of the guesses of this class that
    were right (0 where there was none), F1 the harmonic mean of the two (van Rijsbergen 1979, chapter 7). All are NaN
    for a class without pictures.
    """
    classes, guess = logits.shape[1], logits.argmax(1)
    members = (labels[guess == labels], labels, guess)
    hits, pictures, guesses = (torch.bincount(of, minlength=classes).cpu().double() for of in members)
    recall, precision, f1 = hits / pictures, hits / guesses.clamp(min=1), 2 * hits / (pictures + guesses)
    scores = {"recall": recall, "precision": precision, "f1": f1}
    return {name: values.masked_fill(pictures == 0, torch.nan) for name, values in scores.items()}


def macro_f1(logits: Tensor, labels: Tensor) -> float:
    """The mean F1 of the classes that have pictures, from 0 to 1; each class counts the same, however large it is."""
    return class_scores(logits, labels)["f1"].nanmean().item()


def balanced_accuracy(logits: Tensor, labels: Tensor) -> float:
    """The mean recall of the classes that have pictures (Brodersen et al. 2010, doi.org/10.1109/ICPR.2010.764)."""
    return class_scores(logits, labels)["recall"].nanmean().item()


# Name: function of logits (N, classes) and int64 labels (N,). Each gets its own curve.
METRICS = {"accuracy": accuracy, "balanced_accuracy": balanced_accuracy, "f1": macro_f1}


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
    """The most frequent mistakes of a confusion matrix, in words: "cat taken for dog 14.3%" of the pictures of cats."""
    shares = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    shares.fill_diagonal_(0)
    highest, cells = shares.flatten().topk(min(most, shares.numel()))
    lines = []
    for share, cell in zip(highest.tolist(), cells.tolist(), strict=True):
        if share > 0:
            label, guess = divmod(cell, len(classes))
            lines.append(f"{classes[label]} taken for {classes[guess]} {share:.1%}")
    return lines

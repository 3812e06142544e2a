"""A network's answers to pictures, in eval mode: one look, or several by test-time augmentation; scores as a table."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quick.cli import progress_bar
from quick.data.pictures import Pictures
from quick.errors import padded, terminal_width
from quick.nets import losses
from quick.processes import ALONE, Group

UNSURE = 0.3  # by so little the highest probability is above the next: about a fifth of CIFAR-10's pictures
SHARES = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "f1": "macro F1"}  # printed as percentages


@torch.inference_mode()
def outputs(network: nn.Module, batches: Iterable[Tensor], tta: str = "none") -> Tensor:
    """The network's logits for all batches of float images `(N, 3, H, W)`, in eval mode: float32 `(N, classes)`.

    With `tta` they are the mean over several views of each picture, see `mean_of_views`. No pictures give `(0, 0)`.
    """
    training = network.training
    network.eval()
    try:
        logits = [mean_of_views(network, images, tta) for images in batches if len(images)]
    finally:
        network.train(training)
    return torch.cat(logits) if logits else torch.zeros(0, 0)


def outputs_of_set(
    network: nn.Module,
    pictures: Pictures,
    *,
    classes: int,
    group: Group = ALONE,
    tta: str = "none",
    check: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits `(N, classes)` and int64 labels `(N,)` of a whole set, each picture once.

    Each process of a group looks at its shard, and all get all logits. `check` is called before the network gets a
    batch.
    """
    indices, count = [], math.ceil(len(pictures) / (pictures.evaluation_batch * group.size))

    def images() -> Iterator[Tensor]:
        with progress_bar(pictures.split, count, "batches", delay=1) as bar:
            for batch in pictures.evaluation_batches(group):
                if check:
                    check()
                indices.append(batch.indices)
                yield batch.images
                bar.update()

    logits = outputs(network, images(), tta)
    indices = torch.cat(indices)
    logits = logits.to(pictures.labels.device).view(len(indices), classes)
    return group.assemble(logits, indices, len(pictures)), pictures.labels


def mean_of_views(network: nn.Module, images: Tensor, tta: str = "none") -> Tensor:
    """Float32 logits `(N, classes)` of images `(N, 3, H, W)`, by test-time augmentation.

    `none` looks once. `mirror` takes the mean over a picture and its mirror image. `shift` then looks again where it is
    unsure, at the picture moved by a pixel up and left, and down and right, and at the mirror images of these, which
    give half of the answer. The views are airbench's (Jordan 2024, arxiv.org/abs/2404.00498); to spare the sure
    pictures is after Hiverge 2025 (github.com/hiverge/cifar10-speedrun).
    """
    if tta == "none":
        return network(images).float()
    logits = (network(images).float() + network(images.flip(3)).float()) / 2
    if tta == "shift":
        first, *others = logits.softmax(1).topk(min(2, logits.shape[1])).values.unbind(1)
        unsure = (first - sum(others) < UNSURE).nonzero().squeeze(1)
        if len(unsure):
            if images.device.type == "cuda":  # cuDNN looks for a fast way at each new size, so there shall be few
                unsure = torch.cat([unsure, unsure[:1].expand(-len(unsure) % math.ceil(len(images) / 8))])
            padded, (height, width) = F.pad(images[unsure], (1,) * 4, "reflect"), images.shape[2:]
            moved = padded[:, :, 2:, 2:], padded[:, :, :height, :width]
            again = sum(mean_of_views(network, views, "mirror") for views in moved) / 2
            logits[unsure] = (logits[unsure] + again) / 2
    return logits


def scores_by_class(
    logits: Tensor, labels: Tensor, classes: Sequence[str]
) -> tuple[dict[str, dict[str, float | None]], dict[str, float]]:
    """Recall, precision and F1 of each class by its name, None for one without pictures; and the means of the others.

    Takes logits `(N, classes)` and int64 labels `(N,)`.
    """
    found = losses.class_scores(logits, labels)
    means = {kind: values.nanmean().item() for kind, values in found.items()}
    rows = zip(*(values.tolist() for values in found.values()), strict=True)
    rows = [[None if math.isnan(value) else value for value in row] for row in rows]
    return {name: dict(zip(found, row, strict=True)) for name, row in zip(classes, rows, strict=True)}, means


def sure_scores(logits: Tensor, labels: Tensor, loss: str, sure: float) -> dict[str, float | None]:
    """The share of pictures whose first class has at least the probability `sure`, and the accuracy of these.

    Takes logits `(N, classes)` and int64 labels `(N,)`; the accuracy is None if there are none.
    """
    shares, guesses = losses.probabilities(logits.cpu(), loss).max(1)
    is_sure = torch.tensor([round(share, 6) >= sure for share in shares.tolist()])  # as answers are told
    right = (guesses == labels.cpu())[is_sure].double()
    accuracy = right.mean().item() if len(right) else None
    return {"at_least": sure, "share": len(right) / len(labels), "accuracy": accuracy}


def print_evaluation(result: dict, classes: list[str], metrics: Iterable[str]) -> None:
    """Print the scores, then a line for each class: recall, precision, F1, and what its pictures were taken for.

    A class without pictures has none; the means, below, are those of the others. `metrics` are the names of all that
    `result` has beside the loss.
    """
    of = "" if result["split"] == "whole" else f"{result['split']} "
    scores = [f"loss {result['loss']:.4f}"]
    scores += [f"{label} {result[name]:.1%}" for name, label in SHARES.items()]
    scores += [f"{name} {result[name]:.4f}" for name in metrics if name not in SHARES]
    print("  ".join([*scores, f"{result['pictures']:,} {of}pictures"]))
    if sure := result.get("sure"):
        right = "" if sure["accuracy"] is None else f", {sure['accuracy']:.1%} of them right"
        print(f"sure, {sure['at_least']:.6g} or more: {sure['share']:.1%} of the pictures{right}")
    print()
    width = max(map(terminal_width, [*classes, "class", "mean"]))
    cell = max(5, len(str(max(map(max, result["confusion"])))) + 1)
    digits = max(2, len(str(len(classes) - 1)))
    numbers = "".join(f"{index:>{cell}}" for index in range(len(classes)))
    print(f"{'':{digits}} {'class':{width}}  recall  precision      F1  {numbers}   <- taken for")
    for index, (name, row) in enumerate(zip(classes, result["confusion"], strict=True)):
        row = "".join(f"{count:>{cell}}" for count in row)
        print(f"{index:>{digits}} {padded(name, width)}  {score_cells(result['classes'][name])}  {row}")
    print(f"{'':{digits}} {'mean':{width}}  {score_cells(result['means'])}")


def score_cells(scores: dict[str, float | None]) -> str:
    """Recall, precision and F1 as three cells of the table of `print_evaluation`."""
    cells = ("-" if share is None else f"{share:.1%}" for share in scores.values())
    return "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, (6, 9, 6), strict=True))

"""Which pictures a batch has, and which of them each process works on; an even choice of classes.

All of it is arithmetic on places: no picture is touched here.
"""

import itertools
import math

import torch
from torch import Tensor

from quick.errors import LimitError
from quick.processes import Group


def batch_slices(count: int, batch_size: int) -> list[slice]:
    """Cut an epoch of `count` pictures into batches.

    A single picture that is left over joins the batch before: batch normalisation cannot work on one picture.
    """
    left_over = 1 if batch_size > 1 and count % batch_size == 1 else 0
    steps = max(1, math.ceil((count - left_over) / batch_size))
    bounds = [*range(0, steps * batch_size, batch_size), count]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def shard(batch: slice, group: Group, pieces: int = 1) -> list[slice]:
    """This process's shard of a batch: a slice of the epoch for each of the `pieces` in which the batch is worked on.

    A piece or shard of one picture is avoided, as in `batch_slices`: instead, some processes get no pictures, but the
    first one always gets some. A batch of few pictures has fewer pieces.
    """
    size, slices = batch.stop - batch.start, []
    pieces = max(1, min(pieces, size // 2))
    for piece in range(pieces):
        start, stop = size * piece // pieces, size * (piece + 1) // pieces
        workers = max(1, min(group.size, (stop - start) // 2))
        first, last = (start + (stop - start) * min(rank, workers) // workers for rank in (group.rank, group.rank + 1))
        slices.append(slice(batch.start + first, batch.start + last))
    return slices


def balanced(labels: Tensor, classes: list[str], limit: int) -> Tensor:
    """Choose `limit` pictures with the classes as even as possible: the first of each class, in the order of the set.

    `labels` is int64 `(N,)`; the result has the indices of the chosen pictures, int64 `(limit,)` or all `(N,)`. Raises
    LimitError when `limit` is below the number of classes.
    """
    if limit < len(classes):
        raise LimitError(f"--limit {limit} is below the number of classes, {len(classes)}")
    by_class, counts = labels.argsort(stable=True), torch.bincount(labels, minlength=len(classes))
    rank = torch.empty_like(labels)  # of a picture within its class
    rank[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.argsort(rank, stable=True)[:limit].sort().values

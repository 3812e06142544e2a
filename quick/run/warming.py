"""cuDNN's search for the fastest way to compute each size of batch, done before the first epoch."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quick.data.batching import batch_slices, shard
from quick.data.pictures import Pictures, normalize
from quick.nets import losses
from quick.nets.transfer import train_mode
from quick.processes import Group
from quick.run.settings import Config
from quick.run.state import TrainState, epoch_pictures


def warm_up(state: TrainState, sets: Sequence[Pictures], config: Config) -> None:
    """Show the network black pictures in batches of all sizes that training and evaluation will have.

    Else the first epoch would search, and its time would say little. `sets` are the training and the held-out set.
    The precision is the caller's. Nothing that is saved changes: there are no steps, and batch normalisation gets its
    averages back.
    """
    train_set, held_out = sets
    train_mode(state.trainable)
    weights = [weight for weight in state.trainable.parameters() if weight.requires_grad]
    averages = [(buffer, buffer.clone()) for buffer in state.trainable.buffers()]
    counts = {epoch_pictures(len(train_set), config, epoch) for epoch in (1, config.epochs)}  # --hardest: fewer at last
    of_epochs = (shard_sizes(count, config.batch_size, state.group, config.accumulate) for count in counts)
    for size in itertools.chain.from_iterable(of_epochs):
        # In a group not `state.forward`, which adds up gradients; and compiled code takes no empty batches.
        forward = state.forward if size and state.group.size == 1 else state.trainable
        outputs = losses.split_outputs(forward(black(size, train_set)))
        torch.autograd.grad(sum(output.float().sum() for output in outputs), weights, allow_unused=True)
    for buffer, values in averages:
        buffer.copy_(values)

    most = held_out.evaluation_batch * state.group.size
    sizes = set(shard_sizes(len(held_out), most, state.group)) - {0}
    if config.tta == "shift":  # which looks again at whole eighths of a batch
        sizes |= {math.ceil(size / 8) * eighths for size in sizes for eighths in range(1, 9)}
    state.trainable.eval()
    with torch.inference_mode():
        for size in sorted(sizes):
            state.trainable(black(size, held_out))


def shard_sizes(count: int, batch_size: int, group: Group, pieces: int = 1) -> list[int]:
    """The sizes of this process's pieces of batches, once for each size of a batch that an epoch has.

    So all processes of a group have as many, of which some can be empty: they may have to wait for each other.
    """
    batches = {batch.stop - batch.start for batch in batch_slices(count, batch_size)}
    shards = (shard(slice(0, size), group, pieces) for size in sorted(batches, reverse=True))
    return [piece.stop - piece.start for of_batch in shards for piece in of_batch]


def black(count: int, pictures: Pictures) -> Tensor:
    """Black pictures as the network gets them: float32 `(count, 3, side, side)`."""
    images = torch.zeros(count, 3, pictures.side, pictures.side, dtype=torch.uint8, device=pictures.labels.device)
    return normalize(images, pictures.mean, pictures.std)

"""cuDNN's search for the fastest way to compute each size of batch, done before the first epoch."""

import itertools

import torch

from quick.data.batching import batch_slices, shard
from quick.data.pictures import Pictures, normalize
from quick.nets import losses
from quick.nets.transfer import train_mode
from quick.run.settings import Config
from quick.run.state import TrainState, epoch_pictures


def warm_up(state: TrainState, train_set: Pictures, config: Config) -> None:
    """Show the network black pictures in batches of all sizes that training will have.

    Without it the first epoch would do the search, and its time would say little about the others. (Evaluation is not
    timed.) The precision is the caller's. Nothing that is saved changes: there are no steps, and buffers, such as the
    averages of batch normalisation, get their values back.
    """
    train_mode(state.trainable)
    weights = [weight for weight in state.trainable.parameters() if weight.requires_grad]
    buffers = [
        (layer, name, buffer, buffer.clone())
        for layer in state.trainable.modules()
        for name, buffer in layer.named_buffers(recurse=False)
    ]
    counts = {epoch_pictures(len(train_set), config, epoch) for epoch in (1, config.epochs)}  # --hardest: fewer at last
    batches = {batch.stop - batch.start for count in counts for batch in batch_slices(count, config.batch_size)}
    shards = [shard(slice(0, size), state.group, config.accumulate) for size in sorted(batches, reverse=True)]
    # Each process of a group has as many pieces as the others, of which some can be empty: they wait for each other.
    for piece in itertools.chain(*shards):
        shape = piece.stop - piece.start, 3, train_set.side, train_set.side
        images = torch.zeros(shape, dtype=torch.uint8, device=state.device)
        # In a group not `state.forward`, which adds up gradients; and compiled code takes no empty batches.
        forward = state.forward if len(images) and state.group.size == 1 else state.trainable
        outputs = losses.split_outputs(forward(normalize(images, train_set.mean, train_set.std)))
        torch.autograd.grad(sum(output.float().sum() for output in outputs), weights, allow_unused=True)
    for layer, name, buffer, values in buffers:
        setattr(layer, name, buffer.copy_(values))

"""A set of pictures with labels, and the batches that training and evaluation take from it, on the device."""

import operator
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from quick.data.augment import Augment, augment_images, augments
from quick.data.batching import batch_slices, shard
from quick.data.holdout import Share, as_flags, bounds, held_out, names_below
from quick.data.stores import Enlarged, InMemory, Streamed
from quick.data.transforms import Draws
from quick.errors import LimitError
from quick.processes import ALONE, Group

BUILT_IN = ("cifar10", "shapes")  # sets that are no folders


class Batch(NamedTuple):
    """The pictures of a batch that one process works on, N of them, on the device."""

    images: Tensor  # float32 (N, 3, side, side), normalised
    labels: Tensor  # int64 (N,)
    indices: Tensor  # int64 (N,): the place of each picture in the set
    size: int  # of the whole batch, over all processes
    pieces: list[int]  # the sizes of the pieces in which the batch is worked on (--accumulate); they add up to N


@dataclass
class Pictures:
    """Labelled pictures; their pixels are in a store, which several sets can share."""

    store: InMemory | Streamed | Enlarged  # or another that has what quick/data/stores.py says
    labels: Tensor  # int64 (N,), on the device
    classes: list[str]
    split: str  # train, val, test, or whole: all of a folder without splits
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)  # a channel, of pixels in [0, 1]
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    rows: Tensor | None = None  # int64 (N,), on the device: where the store has them; None: all, in its order
    paths: np.ndarray | None = None  # of the files, as bytes
    file_sizes: tuple[tuple[int, int], ...] = ((32, 32),)  # smallest and largest (width, height)
    levels: tuple[float, float] | None = None  # of pixels wider than 8 bits: what became 0 and 255
    bad: list[tuple[str, str]] = field(default_factory=list)  # files that were left out, and why
    unmatched: tuple[str, ...] = ()  # pictures without a row in the table of labels, and rows without a picture

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """A picture, uint8 `(3, side, side)`, on the device and neither changed nor normalised, with its label.

        So PyTorch's own DataLoader, Subset and random_split take this set, too; with worker processes if it is on the
        CPU. Raises IndexError beyond the ends, TypeError for other indices, DataError for a file that is gone.
        """
        try:
            place = operator.index(index)
        except TypeError:
            what = f"one picture has a whole number, not {index!r:.80}; take(torch.tensor([3, 7])) makes a smaller set"
            raise TypeError(what) from None
        if not -len(self) <= place < len(self):
            raise IndexError(f"there is no picture {place}: the set has {len(self):,}")
        place %= len(self)
        row = torch.tensor([place], device=self.labels.device) if self.rows is None else self.rows[place : place + 1]
        [[image]] = self.store.read([row])
        return image, int(self.labels[place])

    @property
    def side(self) -> int:
        """Pixels a side of the pictures that the network gets."""
        return self.store.side

    @property
    def evaluation_batch(self) -> int:
        """How many pictures evaluation takes at a time, see `evaluation_batch`."""
        return evaluation_batch(self.side, self.labels.device)

    def order(self, *, shuffle: bool, seed: int = 0, epoch: int = 0, keep: Tensor | None = None) -> Tensor:
        """The indices of the pictures of an epoch in their order, int64 `(N,)`, on the CPU.

        With `keep`, bool `(N,)`, only the pictures that are true in it.
        """
        order = torch.arange(len(self.labels))
        if shuffle:
            number = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(number))
        return order if keep is None else order[keep.cpu()[order]]

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
        epoch: int = 0,
        keep: Tensor | None = None,
        skip: int = 0,
        group: Group = ALONE,
        pieces: int = 1,
    ) -> Iterator[Batch]:
        """Every picture once, in batches; in a group each process gets its shard of every batch.

        With `keep`, bool `(N,)`, only the pictures that are true in it. The first `skip` batches are left out. A batch
        may be worked on in several `pieces`; then the shard has this process's pictures of each piece in turn.

        The order depends only on (seed, epoch), the augmentation on these and on the picture's index in the set. Both
        are drawn on the CPU, so that they are the same on every device and for any number of processes.
        """
        order = self.order(shuffle=shuffle, seed=seed, epoch=epoch, keep=keep)
        batches = batch_slices(len(order), batch_size)[skip:]
        shards = [shard(batch, group, pieces) for batch in batches]
        order = torch.cat([order[:0], *(order[piece] for of_batch in shards for piece in of_batch)])
        counts = [[piece.stop - piece.start for piece in of_batch] for of_batch in shards]
        sizes = [sum(of_batch) for of_batch in counts]

        # Several small batches are made ready in one go. But interpolation rounds differently in larger batches, by a
        # hair, and what comes out must not depend on how many are made ready.
        interpolates = augment is not None and (augment.jitter or augment.resized_crop or augment.rotate)
        ahead = 0 if interpolates else self.store.ahead // self.side**2
        at_once = max(1, ahead // max([1, *sizes]))
        chunks = [sizes[first : first + at_once] for first in range(0, len(sizes), at_once)]
        chunk_sizes = [sum(chunk) for chunk in chunks]
        prepared = self.prepare(order, chunk_sizes, augment=augment, seed=seed, epoch=epoch)
        order, number = order.to(self.labels.device), 0
        for chunk, indices, images in zip(chunks, order.split(chunk_sizes), prepared, strict=True):
            labels = self.labels[indices]
            for parts in zip(images.split(chunk), labels.split(chunk), indices.split(chunk), strict=True):
                yield Batch(*parts, batches[number].stop - batches[number].start, counts[number])
                number += 1

    def evaluation_batches(self, group: Group = ALONE) -> Iterator[Batch]:
        """Every picture once over all processes, in order, as large batches without augmentation."""
        return self.batches(self.evaluation_batch * group.size, group=group)

    def prepare(
        self, order: Tensor, sizes: list[int], *, augment: Augment | None = None, seed: int = 0, epoch: int = 0
    ) -> Iterator[Tensor]:
        """What the network gets of the pictures with the indices in `order`, in batches of these sizes.

        `order` is int64 `(N,)`, on the CPU; each batch is float32 `(B, 3, side, side)`, changed and normalised.
        """
        device, squares_at, start = self.labels.device, None, 0
        if augment is not None and not (self.store.pixels and augments(augment)):
            augment = None
        if augment is not None:
            draws = Draws(len(self.labels), seed, epoch, order, device)
            squares_at = draws("square").split(sizes)
            fill = torch.tensor(self.mean, device=device).mul(255).round().byte().view(1, 3, 1, 1)
        mean, std = torch.tensor([self.mean, self.std], device=device)  # not for each batch: a GPU would be waited for
        rows = order.to(device) if self.rows is None else self.rows[order.to(device)]
        for size, images in zip(sizes, self.store.read(rows.split(sizes), squares_at), strict=True):
            if augment is not None and size:
                images = augment_images(images, augment, draws.at(start, start + size), fill)
            start += size
            yield normalize(images, mean, std) if self.store.pixels else images

    def preview(
        self, indices: Tensor, augment: Augment | None = None, seed: int = 0, epoch: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures with these indices: float as the network gets them, uint8 as people see them, and their labels.

        With `augment` they are changed as training on this set changes them in this epoch.
        """
        images = next(self.prepare(indices.cpu(), [len(indices)], augment=augment, seed=seed, epoch=epoch))
        return images, denormalize(images, self.mean, self.std), self.labels[indices.to(self.labels.device)]

    def take(self, indices: Tensor) -> "Pictures":
        """A set of the pictures with these indices, in this order; it shares the store, and no pixels are copied."""
        on_device = indices.to(self.labels.device)
        paths = None if self.paths is None else self.paths[indices.cpu().numpy()]
        rows = on_device if self.rows is None else self.rows[on_device]
        return replace(self, labels=self.labels[on_device], rows=rows, paths=paths)

    def hold_out(self, share: Share, seed: int, root: str | Path = "") -> list["Pictures"]:
        """Two sets: what remains for training, and for validation a `share` of every class: a fraction, or a Fold.

        Files are chosen by their names below `root`, as `quick.data.holdout` says; other pictures are drawn from the
        seed. Raises LimitError where one of the sets would have fewer than two pictures.
        """
        labels = self.labels.cpu()
        if self.paths is not None:
            classes = [self.classes[label] for label in labels.tolist()]
            names = names_below(root, map(os.fsdecode, self.paths.tolist()))
            is_out = torch.tensor(held_out(names, classes, share, root))
        else:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
            is_out, (start, end) = torch.zeros(len(self), dtype=torch.bool), bounds(share)
            for label in range(len(self.classes)):
                of_class = order[labels[order] == label]
                is_out[of_class[round(start * len(of_class)) : round(end * len(of_class))]] = True
        if min(is_out.sum(), (~is_out).sum()) < 2:
            what = f"{as_flags(share)} of {len(self)} pictures leaves too few on one side"
            raise LimitError(f"{what}; hold out another share, or take more pictures")
        rest, val = (self.take(part.nonzero().squeeze(1)) for part in (~is_out, is_out))
        return [rest, replace(val, split="val")]


def evaluation_batch(side: int, device: torch.device) -> int:
    """How many pictures of this side an evaluation without gradients takes at a time: on a CPU what its caches hold."""
    pixels, most = (2**20, 250) if device.type == "cpu" else (2**22, 2000)
    return max(1, min(most, pixels // side**2))


def normalize(images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """Images `(N, 3, H, W)` in 0..255 as float32, the way the network wants them: `(x / 255 - mean) / std`.

    On Apple GPUs channels come first in memory, as `memory_format` in device.py says; else last.
    """
    mean, std = (255 * torch.as_tensor(values, device=images.device) for values in (mean, std))
    if images.device.type == "mps":
        floats = images.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        return floats.sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1))
    if images.device.type == "cpu" and images.numel() > 2**20:
        # New memory: for large arrays NumPy asks the system for large pages, which takes a third of the time on Linux.
        shape = len(images), *images.shape[2:], 3
        floats = torch.from_numpy(np.empty(shape, np.float32)).permute(0, 3, 1, 2).copy_(images)
    else:
        floats = images.to(torch.float32, memory_format=torch.channels_last, copy=True)
    # (N, H, W * 3), a view of floats: long rows are worked on faster than 3 channels.
    rows = floats.permute(0, 2, 3, 1).flatten(2)
    rows.sub_(mean.repeat(images.shape[3])).div_(std.repeat(images.shape[3]))
    return floats


def denormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The way back from `normalize` to uint8 `(N, 3, H, W)`, for pictures of what the network sees."""
    mean, std = (255 * torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (mean, std))
    return (images * std + mean).round().clamp(0, 255).byte()


def histogram(images: Tensor) -> Tensor:
    """How often each channel of uint8 images `(N, 3, H, W)` has each value: int64 `(3, 256)`, on the CPU."""
    return torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).cpu()


def statistics(counts: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the channels behind a histogram `(3, 256)`, as fractions of 255, exactly."""
    values = torch.arange(256, dtype=torch.float64) / 255
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = (share * values).sum(1)
    std = (share * (values - mean.view(3, 1)).square()).sum(1).sqrt()
    return tuple(round(value, 4) for value in mean.tolist()), tuple(max(round(v, 4), 1e-3) for v in std.tolist())

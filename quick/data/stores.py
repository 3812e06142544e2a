"""Where the pixels of a set are kept: in memory, in memory but smaller, or in files that are decoded batch by batch.

All stores have the same four things. `side`: pixels a side of the squares that they give. `ahead`: how many pixels to
make ready in one go. `pixels`: whether they give pixels, which are still to be augmented and normalised.
`read(indices, squares_at)`: for each tensor of indices, int64 `(B,)`, a batch uint8 `(B, 3, side, side)` on the device.
Of pictures that are not square, `squares_at` says which square to take, float32 `(B,)` from 0 (left or top) to 1; None
stands for the centre.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from quick.data.decoding import Files
from quick.data.sizing import Sizing, resize_picture
from quick.data.streaming import decoder
from quick.errors import DataError

# Of small pictures in memory, many are made ready in one go: the calls take longer than the work, on GPUs most of all.
PIXELS_AHEAD = {"cpu": 2**18, "cuda": 2**24, "mps": 2**24}


@dataclass
class InMemory:
    """Pixels in the memory of one device, one byte each."""

    images: Tensor  # uint8 (N, 3, H, W), in memory with channels first or last; H is the side
    extent: Tensor | None = None  # int64 (N,): how many pixels of W a picture takes; None where all are square
    tall: Tensor | None = None  # bool (N,): these are taller than wide, and lie on their side

    pixels = True

    @property
    def ahead(self) -> int:
        return PIXELS_AHEAD[self.images.device.type]

    @property
    def side(self) -> int:
        return self.images.shape[2]

    @property
    def nbytes(self) -> int:
        return self.images.nbytes

    def to(self, device: torch.device) -> "InMemory":
        """The same store on another device, with channels last, which are quicker to crop and mirror."""
        images = self.images.to(device, memory_format=torch.channels_last)
        if self.extent is None:
            return InMemory(images)
        return InMemory(images, self.extent.to(device), self.tall.to(device))

    def read(self, indices: Sequence[Tensor], squares_at: Sequence[Tensor] | None = None) -> Iterator[Tensor]:
        for number, rows in enumerate(indices):
            if self.images.is_contiguous():
                images = self.images.index_select(0, rows)
            else:  # channels come last in memory: whole pictures are copied this way, too
                images = self.images.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
            if self.extent is not None:
                place = squares_at[number] if squares_at else None
                images = cut_squares(images, self.extent[rows], self.tall[rows], place)
            yield images


@dataclass
class Enlarged:
    """Small square pictures of which the network gets larger ones: kept small, and resized batch by batch."""

    small: InMemory
    sizing: Sizing

    pixels = True

    @property
    def ahead(self) -> int:
        return self.small.ahead

    @property
    def side(self) -> int:
        return self.sizing.side

    @property
    def nbytes(self) -> int:
        return self.small.nbytes

    def to(self, device: torch.device) -> "Enlarged":
        return Enlarged(self.small.to(device), self.sizing)

    def read(self, indices: Sequence[Tensor], squares_at: Sequence[Tensor] | None = None) -> Iterator[Tensor]:
        side, shorter, interpolation = self.sizing.side, self.sizing.shorter, self.sizing.interpolation
        first = round((shorter - side) / 2)
        for images in self.small.read(indices, squares_at):
            # On the CPU, bytes are resized as Pillow does it; other devices can resize only floats.
            images = images if images.device.type == "cpu" else images.float()
            images = F.interpolate(images, (shorter, shorter), mode=interpolation, antialias=True)
            images = images[:, :, first : first + side, first : first + side]
            yield images if images.dtype == torch.uint8 else images.round().clamp(0, 255).byte()


class BatchList(torch.utils.data.Sampler):
    """Tells a DataLoader which rows to decode; `batches` is set again for each epoch."""

    batches: Sequence[list[int]] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@dataclass
class Streamed:
    """Pictures that do not fit into memory: worker processes decode their files, batch by batch.

    The workers live as long as the store and make one epoch after the other, so only one can be in progress.
    """

    files: Files
    workers: int
    device: torch.device
    sampler: BatchList = field(default_factory=BatchList)

    pixels = True
    ahead = 0  # the workers make the batches ready
    nbytes = 0

    def __post_init__(self) -> None:
        self.loader = decoder(self.files, self.sampler, self.workers, self.device)

    def __reduce__(self) -> tuple:
        """Go to another process without the workers of this one."""
        return Streamed, (self.files, self.workers, self.device)

    @property
    def side(self) -> int:
        return self.files.side

    def read(self, indices: Sequence[Tensor], squares_at: Sequence[Tensor] | None = None) -> Iterator[Tensor]:
        """Raises DataError for a file that cannot be read (any more)."""
        if not indices:  # a run goes on behind the last step of an epoch
            return
        rows = torch.cat([*indices]).cpu().split([len(part) for part in indices])  # one copy from a GPU, not many
        batches = [part.tolist() for part in rows]
        if len(batches) == 1:  # workers would take longer to start
            decoded_batches = [self.files[batches[0]]]
        else:
            self.sampler.batches = batches
            decoded_batches = self.loader
        for number, decoded in enumerate(decoded_batches):
            if len(batches) > 1 and self.sampler.batches is not batches:
                raise RuntimeError("a streamed set was asked for another epoch while one was in progress")
            if decoded.bad:
                raise DataError("{}: {}".format(*decoded.bad[0]))
            # Copies to MPS that do not block can carry garbage (pytorch issue 139550).
            images, extent, tall = (
                tensor.to(self.device, non_blocking=self.device.type == "cuda")
                for tensor in (decoded.images.permute(0, 3, 1, 2), decoded.extent, decoded.tall)
            )
            if self.files.width > self.files.side:
                images = cut_squares(images, extent, tall, squares_at[number] if squares_at else None)
            yield images


def resized(store: InMemory, sizing: Sizing) -> InMemory | Enlarged:
    """The same square pictures in another size: smaller ones are made here, larger ones batch by batch."""
    if sizing.side == sizing.shorter == store.side:
        return store
    if sizing.side > store.side:
        return Enlarged(store, sizing)
    images = (Image.fromarray(image) for image in store.images.permute(0, 2, 3, 1).numpy())
    smaller = np.stack([resize_picture(image, sizing, sizing.side) for image in images])
    return InMemory(torch.from_numpy(smaller).permute(0, 3, 1, 2))


def cut_squares(images: Tensor, extent: Tensor, tall: Tensor, squares_at: Tensor | None) -> Tensor:
    """Cut one square out of each of `(N, 3, H, W)`, and stand tall ones up again: `(N, 3, H, H)`.

    `squares_at` is from 0 (left) to 1 (right); None stands for the centre.
    """
    side = images.shape[2]
    first = ((extent - side) / 2).round() if squares_at is None else squares_at * (extent - side + 1)
    first = first.long().clamp(max=images.shape[3] - side)
    pixels = images.permute(0, 2, 3, 1)
    if images.device.type == "cpu" and pixels.is_contiguous():  # rows of whole pixels are copied ten times as fast
        squares = np.empty((len(images), side, side, 3), np.uint8)
        wholes, parts = (array.view("V3")[..., 0] for array in (pixels.numpy(), squares))
        for part, whole, is_tall, start in zip(parts, wholes, tall.tolist(), first.tolist(), strict=True):
            square = whole[:, start : start + side]
            part[...] = square.T if is_tall else square
        return torch.from_numpy(squares).permute(0, 3, 1, 2)
    picture = torch.arange(len(images), device=images.device)
    images = images.unfold(3, side, 1)[picture, :, :, first]
    return torch.where(tall.view(-1, 1, 1, 1), images.transpose(2, 3), images)

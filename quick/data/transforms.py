"""What random changes do to a batch of pictures on its device, and the random numbers of each picture, by name."""

import math
import zlib
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Draws:
    """Random numbers for the pictures of an epoch, by name: `draws("crop_row")`.

    Each name has a number for every picture of the set, made on the CPU from (seed, epoch, name) when it is first asked
    for. So the numbers depend neither on the batch size, nor on the number of processes, nor on what else is drawn.
    """

    count: int  # pictures in the set
    seed: int
    epoch: int
    order: Tensor  # int64, on the CPU: the indices of the pictures that this process works on, in their order
    device: torch.device
    start: int = 0  # the pictures at hand are those in order[start:stop]
    stop: int | None = None
    made: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # on the device, for the whole order

    def at(self, start: int, stop: int) -> "Draws":
        """The same numbers, for the pictures in `order[start:stop]`."""
        return replace(self, start=start, stop=stop)

    def __call__(self, name: str) -> Tensor:
        """Uniform numbers in [0, 1), float32 `(N,)`, one for each picture at hand."""
        return self.numbers(name, self.epoch)

    def alternating(self, name: str) -> Tensor:
        """Like a call, but each picture keeps its number for the whole run; in odd epochs it moves by a half.

        Where pictures with a number below a half are mirrored, each picture is mirrored in every other epoch. This
        teaches more than to draw again (Jordan 2024, arxiv.org/abs/2404.00498, section 3.6).
        """
        return self.numbers(name, epoch=0, shift=self.epoch % 2 / 2)

    def numbers(self, name: str, epoch: int, shift: float = 0.0) -> Tensor:
        if (name, epoch) not in self.made:
            mix = np.random.SeedSequence((self.seed, epoch, zlib.crc32(name.encode())))
            generator = torch.Generator().manual_seed(int(mix.generate_state(1)[0]))
            of_set = (torch.rand(self.count, generator=generator) + shift) % 1
            self.made[name, epoch] = of_set[self.order].to(self.device)
        return self.made[name, epoch][self.start : self.stop]


def random_crop(
    images: Tensor,
    pixels: int,
    row: Tensor,
    column: Tensor,
    mirrored: Tensor | None = None,
    upside_down: Tensor | None = None,
) -> Tensor:
    """Shift images by up to `pixels` up or down and left or right, then mirror some.

    `row` and `column` `(N,)` are draws; `mirrored` and `upside_down`, bool `(N,)`, say of which to exchange left and
    right, and top and bottom. What moves in is reflected at the edge. One gathering of pixels does all, which is faster
    than to pad, crop and mirror one after the other.
    """
    count, _, height, width = images.shape

    def sources(draws: Tensor, side: int) -> Tensor:  # the row (or column) that each row of the result comes from
        source = (draws * (2 * pixels + 1)).long().view(-1, 1) - pixels + torch.arange(side, device=draws.device)
        return (side - 1 - (side - 1 - source.abs()).abs()).clamp(0, side - 1)

    rows, columns = sources(row, height), sources(column, width)
    if mirrored is not None:
        columns = torch.where(mirrored.view(-1, 1), columns.flip(1), columns)
    if upside_down is not None:
        rows = torch.where(upside_down.view(-1, 1), rows.flip(1), rows)
    rows = rows + height * torch.arange(count, device=rows.device).view(-1, 1)
    pixel_places = (width * rows.view(count, height, 1) + columns.view(count, 1, width)).flatten()
    moved = images.permute(0, 2, 3, 1).reshape(-1, 3).index_select(0, pixel_places)
    return moved.view(count, height, width, 3).permute(0, 3, 1, 2)


def cutout(images: Tensor, pixels: int, row: Tensor, column: Tensor, fill: Tensor) -> Tensor:
    """Fill a square of this side in each image with the colour `fill`; `row` and `column` `(N,)` are draws.

    Its centre may lie anywhere, so that it can reach over the edge (DeVries and Taylor 2017, arxiv.org/abs/1708.04552).
    """
    in_rows = band_mask(row, pixels, images.shape[2]).view(len(images), 1, -1, 1)
    in_columns = band_mask(column, pixels, images.shape[3]).view(len(images), 1, 1, -1)
    return torch.where(in_rows & in_columns, fill.to(images.dtype), images)


def band_mask(draws: Tensor, length: int, side: int) -> Tensor:
    """Which of `side` rows (or columns) a band of `length` covers, with its centre at the draw: bool `(N, side)`."""
    first = (draws * side).long() - length // 2
    place = torch.arange(side, device=draws.device) - first.view(-1, 1)
    return (place >= 0) & (place < length)


def jitter(images: Tensor, strength: float, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Multiply brightness, contrast and saturation by 1 +- `strength`: float32 images in 0..255."""
    brightness, contrast, saturation = (
        (1 + strength * (2 * draw - 1)).view(-1, 1, 1, 1) for draw in (brightness, contrast, saturation)
    )
    images = images.float() * brightness
    red, green, blue = images.split(1, 1)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R BT.601
    middle = grey.mean((2, 3), keepdim=True)
    images = middle + contrast * (grey + saturation * (images - grey) - middle)
    return images.clamp(0, 255)


def rotate(images: Tensor, degrees: Tensor, fill: Tensor) -> Tensor:
    """Turn square images about their middles by `degrees` `(N,)`, counter-clockwise: float32, in 0..255.

    Pixels are interpolated bilinearly; outside of an image is the colour `fill`. The size stays, so corners get lost.
    """
    angle = (degrees * (math.pi / 180)).view(-1, 1, 1)
    place = (2 * torch.arange(images.shape[2], device=images.device) + 1) / images.shape[2] - 1  # from -1 to 1
    x, y = place.view(1, 1, -1), place.view(1, -1, 1)
    grid = torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], 3)
    # Outside is 0: the colour is taken away before, and given back. (Apple GPUs have no other padding in PyTorch 2.10.)
    return F.grid_sample(images.float() - fill, grid, padding_mode="zeros", align_corners=False) + fill


def resized_crop(images: Tensor, least: float, *, area: Tensor, shape: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Enlarge a part of each square image to the whole: float32 images of the same size, in 0..255.

    The part has `least` to all of the area, and is 3:4 to 4:3 in shape: the pixels that torchvision's
    `RandomResizedCrop` gives, after Szegedy et al. 2014 (arxiv.org/abs/1409.4842). `area` and `shape` `(A, N)` are
    draws of several attempts, as some parts would be wider or higher than the image. The first that fits is taken, or
    the whole image if none does.
    """
    side = images.shape[2]
    area, shape = least + (1 - least) * area, (0.75 * (16 / 9) ** shape).sqrt()
    sides = torch.stack([area.sqrt() * shape, area.sqrt() / shape], 2).mul(side).round()  # width and height
    fits = (sides <= side).all(2) & (sides > 0).all(2)
    attempt = fits.int().argmax(0, keepdim=True)  # the first that fits, or 0
    sides = sides.gather(0, attempt.unsqueeze(2).expand(1, -1, 2)).squeeze(0)
    sides = torch.where(fits.any(0).unsqueeze(1), sides, float(side)).unsqueeze(2)
    first = (torch.stack([column, row], 1).unsqueeze(2) * (side - sides + 1)).floor().minimum(side - sides)
    # Of each column and row of the result, where its centre lies in the image, in pixels: (N, 2, side). At the part's
    # edge its outermost pixels go on. (PyTorch 2.10 cannot do this by a padding mode on Apple GPUs.)
    places = first + sides * (torch.arange(side, device=images.device) + 0.5) / side
    places = places.clamp(first + 0.5, first + sides - 0.5)
    x, y = (2 * places / side - 1).unbind(1)
    grid = torch.stack([x.unsqueeze(1).expand(-1, side, -1), y.unsqueeze(2).expand(-1, -1, side)], 3)
    return F.grid_sample(images.float(), grid, padding_mode="zeros", align_corners=False)

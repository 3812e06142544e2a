"""Where the pictures come from, and how they become batches on the device.

`python datasets.py --data cifar10` says what a data set holds; with `--log-dir` it shows samples in TensorBoard.
"""

import argparse
import math
import pickle
import struct
import sys
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

PICTURE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SHAPES = ["arrow", "circle", "cross", "heart", "hourglass", "moon", "ring", "square", "star", "triangle"]
DRAWS = 5  # random numbers a picture: flip, crop row and column, cutout row and column


class DataError(ValueError):
    """A data set that cannot be used; the message names the file or folder and what to do."""


class LimitError(DataError):
    """`limit` or `val_fraction` leaves too few pictures."""


# ---- pictures as batches -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augment:
    """Random changes of training pictures: mirroring, shifting by up to `crop` pixels, hiding a `cutout` square."""

    flip: bool = False
    crop: int = 0
    cutout: int = 0

    def __call__(self, images: Tensor, draws: Tensor, fill: Tensor) -> Tensor:
        """Changed copies of uint8 images `(N, 3, H, W)`; `draws` `(5, N)` uniform in [0, 1), `fill` `(1, 3, 1, 1)`."""
        _, _, height, width = images.shape
        flip, row, column, cutout_row, cutout_column = draws
        if self.crop:
            padded = F.pad(images, (self.crop,) * 4)
            windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # every place for the window, as a view
            shifts = 2 * self.crop + 1
            picture = torch.arange(len(images), device=images.device)
            images = windows[picture, :, (row * shifts).long(), (column * shifts).long()]
        if self.flip:
            images = torch.where((flip < 0.5).view(-1, 1, 1, 1), images.flip(3), images)
        if self.cutout:
            # The square's centre may lie anywhere, so that it can reach over the edge (DeVries and Taylor 2017,
            # arxiv.org/abs/1708.04552).
            in_rows = covered(cutout_row, self.cutout, height).view(-1, 1, height, 1)
            in_columns = covered(cutout_column, self.cutout, width).view(-1, 1, 1, width)
            images = torch.where(in_rows & in_columns, fill, images)
        return images


def covered(draws: Tensor, length: int, side: int) -> Tensor:
    """Which of `side` rows (or columns) a band of `length` covers whose centre is drawn: bool `(N, side)`."""
    first = (draws * side).long() - length // 2
    place = torch.arange(side, device=draws.device) - first.view(-1, 1)
    return (place >= 0) & (place < length)


@dataclass
class Pictures:
    """Pictures in memory on one device, and the batches that training and evaluation take from them."""

    images: Tensor  # uint8 (N, 3, H, W), channels last in memory
    labels: Tensor  # int64 (N,)
    classes: list[str]
    split: str  # train, val or test
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)  # a channel, of pixels in [0, 1]
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    file_sizes: tuple[tuple[int, int], ...] = ()  # (width, height) that the files have

    def __len__(self) -> int:
        return len(self.labels)

    def steps(self, batch_size: int) -> int:
        """How many batches an epoch has. A single left-over picture joins the batch before: alone it has no
        statistics for batch normalisation."""
        left_over = 1 if len(self) % batch_size == 1 < batch_size else 0
        return max(1, math.ceil((len(self) - left_over) / batch_size))

    def batches(
        self, batch_size: int, shuffle: bool = False, augment: Augment | None = None, seed: int = 0, epoch: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Every picture once, as normalised float images `(B, 3, H, W)` and int64 labels `(B,)` on the device.

        Order and augmentation depend on `(seed, epoch)` and the place in the epoch alone; they are drawn on the CPU,
        so that every device gets the same.
        """
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))
        order = torch.randperm(len(self), generator=generator) if shuffle else torch.arange(len(self))
        draws = torch.rand(DRAWS, len(self), generator=generator)
        order, draws = order.to(self.images.device), draws.to(self.images.device)
        fill = torch.tensor(self.mean, device=self.images.device).mul(255).round().byte().view(1, 3, 1, 1)
        stored = self.images.permute(0, 2, 3, 1)  # contiguous, so that picking copies whole pictures
        steps = self.steps(batch_size)
        for step in range(steps):
            chosen = slice(step * batch_size, len(self) if step == steps - 1 else (step + 1) * batch_size)
            images = stored.index_select(0, order[chosen]).permute(0, 3, 1, 2)
            if augment:
                images = augment(images, draws[:, chosen], fill)
            yield normalize(images, self.mean, self.std), self.labels[order[chosen]]

    def take(self, picks: Tensor) -> "Pictures":
        """The pictures at these places, in this order."""
        stored = self.images.permute(0, 2, 3, 1)[picks]
        return replace(self, images=stored.permute(0, 3, 1, 2), labels=self.labels[picks])

    def hold_out(self, fraction: float, seed: int) -> list["Pictures"]:
        """Two sets: what remains for training, and `fraction` of every class for validation, drawn from the seed."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator)
        held_out = torch.zeros(len(self), dtype=torch.bool)
        for label in range(len(self.classes)):
            of_class = order[self.labels.cpu()[order] == label]
            held_out[of_class[: round(fraction * len(of_class))]] = True
        if min(held_out.sum(), (~held_out).sum()) < 2:
            raise LimitError(f"--val-fraction {fraction} of {len(self)} pictures leaves too few on one side")
        places = [part.nonzero().squeeze(1).to(self.images.device) for part in (~held_out, held_out)]
        return [self.take(places[0]), replace(self.take(places[1]), split="val")]


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 images `(N, 3, H, W)` in 0..255 to float32 ones, as the network wants them: `(x / 255 - mean) / std`."""
    mean, std = (255 * torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (mean, std))
    floats = images.float().sub_(mean).div_(std)
    return floats.contiguous() if images.device.type == "mps" else floats  # channels_last is wrong on MPS


def denormalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """The way back from `normalize`, for pictures of what the network sees."""
    mean, std = (255 * torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (mean, std))
    return (images * std + mean).round().clamp(0, 255).byte()


def measure(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images `(N, 3, H, W)`, as fractions of 255, exactly."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).cpu().double() / channel.numel()
        means.append(float((share * values).sum()))
        stds.append(float((share * (values - means[-1]) ** 2).sum().sqrt()))
    return tuple(round(mean, 4) for mean in means), tuple(max(round(std, 4), 1e-3) for std in stds)


# ---- one picture ---------------------------------------------------------------------------------------------------


def read_picture(source: str | Path | BinaryIO, side: int) -> tuple[np.ndarray, tuple[int, int]]:
    """A picture file as uint8 `(side, side, 3)`: turned upright, in RGB, centre square; and its (width, height).

    Training and prediction both read pictures here, so that a network sees what it was trained on. Raises DataError
    with the reason for a file that is not a whole picture.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(source) as image:
            size = image.size
            image.draft("RGB", (2 * side, 2 * side))  # a large JPEG is decoded at a fraction of its size
            image = rgb(upright(image))
        if image.size != (side, side):
            short = min(image.size)
            left, top = (image.width - short) / 2, (image.height - short) / 2
            box = (left, top, left + short, top + short)
            image = image.resize((side, side), Image.Resampling.BILINEAR, box)  # antialiased, as PIL's filters are
    except UnidentifiedImageError as error:
        raise DataError("not a picture that Pillow can read") from error
    except Exception as error:  # damaged pictures raise many kinds
        raise DataError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error
    return np.asarray(image), size


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as the camera was held; as it is if its EXIF data is damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except (ValueError, SyntaxError, TypeError, KeyError, struct.error):
        return image


def rgb(image: Image.Image) -> Image.Image:
    """Any kind of picture in 8-bit RGB: transparent parts on white, 16-bit and float greys scaled, not clipped."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.nan_to_num(np.asarray(image, dtype=np.float32))
        low, high = (grey.min(), grey.max()) if image.mode == "F" else (0, 65535)
        image = Image.fromarray(((grey - low) / max(high - low, 1e-9) * 255).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---- the data sets -------------------------------------------------------------------------------------------------


def load(
    data: str = "cifar10",
    data_dir: str | Path = "data",
    image_size: int = 32,
    limit: int = 0,
    device: torch.device | str = "cpu",
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    splits: Sequence[str] = ("train", "test"),
) -> list[Pictures]:
    """The training and the test set of `cifar10`, `shapes`, or a folder `<split>/<class>/*`, on `device`.

    `limit` takes the first pictures of each split, classes balanced (0: all). Without `mean` and `std` both sets are
    normalised by those of the first, the training pictures. Raises DataError.
    """
    sets = []
    for split in splits:
        if data == "shapes":
            pictures = shapes(split)
        elif data == "cifar10":
            pictures = cifar10(Path(data_dir), split)
        elif Path(data).is_dir():
            pictures = folder(Path(data), split, image_size, limit)
        else:
            raise DataError(f"no data {data!r}: neither cifar10 nor shapes nor a folder of pictures")
        if limit:
            pictures = pictures.take(balanced(pictures.labels, pictures.classes, limit))
        sets.append(resized(pictures, image_size))
    if not mean or not std:
        mean, std = measure(sets[0].images)
    for pictures in sets:
        pictures.images = pictures.images.to(device, memory_format=torch.channels_last)
        pictures.labels = pictures.labels.to(device)
        pictures.mean, pictures.std = tuple(mean), tuple(std)
    return sets


def balanced(labels: Tensor, classes: list[str], limit: int) -> Tensor:
    """The places of the first `limit` pictures with all classes as even as they come, in their order."""
    if limit < len(classes):
        raise LimitError(f"--limit {limit} is below the number of classes, {len(classes)}")
    rank = torch.empty_like(labels)  # of a picture within its class
    for label in range(len(classes)):
        of_class = (labels == label).nonzero().squeeze(1)
        rank[of_class] = torch.arange(len(of_class))
    return torch.argsort(rank, stable=True)[:limit].sort().values


def resized(pictures: Pictures, side: int) -> Pictures:
    """The same pictures `side` pixels a side, resized as single pictures are."""
    if pictures.images.shape[2] == side:
        return pictures
    images = (Image.fromarray(image) for image in pictures.images.permute(0, 2, 3, 1).numpy())
    smaller = [np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)) for image in images]
    return replace(pictures, images=stack(smaller))


def stack(pictures: list[np.ndarray]) -> Tensor:
    """uint8 arrays `(H, W, 3)` as one tensor `(N, 3, H, W)`, channels last in memory."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def cifar10(data_dir: Path, split: str) -> Pictures:
    """CIFAR-10's training or test set, from `cifar-10-batches-py/` or the official archive under `data_dir`."""
    unpacked, archive = data_dir / "cifar-10-batches-py", data_dir / "cifar-10-python.tar.gz"
    if not unpacked.is_dir() and not archive.is_file():
        download_cifar10(data_dir)
    names = ["test_batch"] if split == "test" else [f"data_batch_{part}" for part in range(1, 6)]
    source = unpacked if unpacked.is_dir() else archive
    try:
        if source == unpacked:
            batches = [read_batch((unpacked / name).open("rb")) for name in names]
        else:
            with tarfile.open(archive) as tar:
                batches = [read_batch(tar.extractfile(f"cifar-10-batches-py/{name}")) for name in names]
    except Exception as error:  # damaged archives and pickles raise many kinds
        raise DataError(f"{source}: not CIFAR-10's Python version, or damaged: {error}") from error
    images, labels = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*batches, strict=True))
    return Pictures(images, labels, CIFAR10_CLASSES, split, file_sizes=((32, 32),))


def read_batch(file: BinaryIO) -> tuple[np.ndarray, np.ndarray]:
    """One of CIFAR-10's pickles: uint8 images `(10000, 3, 32, 32)` and int64 labels `(10000,)`."""
    with file:
        batch = ArraysOnly(file, encoding="latin1").load()
    images, labels = batch["data"].reshape(-1, 3, 32, 32), np.array(batch["labels"], dtype=np.int64)
    if images.dtype != np.uint8 or labels.shape != images.shape[:1] or not set(labels) <= set(range(10)):
        raise ValueError("pixels and labels do not fit")
    return images, labels


class ArraysOnly(pickle.Unpickler):
    """Reads pickled numpy arrays and plain values; refuses all else, since pickles can run code."""

    def find_class(self, module: str, name: str) -> object:
        allowed = {"numpy.ndarray", "numpy.dtype", "_codecs.encode"}
        allowed |= {"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"}
        if f"{module}.{name}" not in allowed:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no data")
        return super().find_class(module, name)


def download_cifar10(data_dir: Path) -> None:
    """Fetch and check the official archive with torchvision's loader."""
    from torchvision.datasets import CIFAR10  # seconds to import, and needed only here

    print(f"cifar10 is not in {data_dir}; downloading it (163 MB)", file=sys.stderr)
    try:
        CIFAR10(data_dir, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"CIFAR-10 could not be downloaded ({error}); put cifar-10-python.tar.gz into {data_dir}, "
            "name a folder of pictures with --data, or train on --data shapes"
        ) from error


def folder(root: Path, split: str, side: int, limit: int = 0) -> Pictures:
    """The pictures of `root/<split>/<class>/*`, `side` pixels a side; `val/` serves where there is no `test/`.

    Their order is mixed once and for all: in class order, unshuffled training would forget all but the last class.
    """
    from tqdm import tqdm

    part = root / "val" if split == "test" and not (root / "test").is_dir() else root / split
    if not part.is_dir():
        raise DataError(f"{root}: no folder {split}/ in it; wanted are train/<class>/* and test/<class>/*")
    classes = class_folders(root / "train" if (root / "train").is_dir() else part)
    paths, labels = [], []
    for name in class_folders(part):
        if name not in classes:
            raise DataError(f"{part / name}: no such class in {root / 'train'}, which has: {', '.join(classes)}")
        found = list_pictures(part / name)
        if not found:
            raise DataError(f"{part / name}: no pictures in it")
        paths += found
        labels += [classes.index(name)] * len(found)
    labels = torch.tensor(labels)
    picks = balanced(labels, classes, limit) if limit else torch.arange(len(labels))
    picks = picks[torch.randperm(len(picks), generator=torch.Generator().manual_seed(0))]
    images, sizes = [], set()
    for pick in tqdm(picks.tolist(), f"reading {part}", unit=" pictures", disable=not sys.stderr.isatty(), leave=False):
        try:
            image, size = read_picture(paths[pick], side)
        except DataError as error:
            raise DataError(f"{paths[pick]}: {error}") from error
        images.append(image)
        sizes.add(size)
    return Pictures(stack(images), labels[picks], classes, split, file_sizes=tuple(sizes))


def class_folders(part: Path) -> list[str]:
    """The classes of a split: the names of its folders; at least two."""
    classes = sorted(path.name for path in part.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < (2 if part.name == "train" else 1):
        raise DataError(f"{part}: {len(classes)} class folders in it; a classifier needs at least 2")
    return classes


def list_pictures(root: Path) -> list[Path]:
    """All picture files below a folder, by their endings, in the order of their names; hidden ones left out."""
    inside = (path for path in root.rglob("*") if path.suffix.lower() in PICTURE_ENDINGS and path.is_file())
    return sorted(path for path in inside if not any(part.startswith(".") for part in path.relative_to(root).parts))


def shapes(split: str, count: int = 0, side: int = 32) -> Pictures:
    """Drawn pictures of ten shapes (5,000 to train, 1,000 to test), which vary in all but the shape.

    Only a frozen random stream and arithmetic that IEEE 754 fixes to the bit (no sine, no power) are used, so that
    every machine draws the same pictures.
    """
    random = np.random.RandomState(["train", "test"].index(split))  # numpy never changes this stream (NEP 19)
    labels = random.permutation(np.arange(count or {"train": 5000, "test": 1000}[split]) % len(SHAPES))
    chunks = [draw_shapes(labels[start : start + 500], random, side) for start in range(0, len(labels), 500)]
    images = torch.from_numpy(np.concatenate(chunks)).permute(0, 3, 1, 2)
    return Pictures(images, torch.from_numpy(labels).long(), SHAPES, split, file_sizes=((side, side),))


def draw_shapes(labels: np.ndarray, random: np.random.RandomState, side: int) -> np.ndarray:
    """uint8 pictures `(N, side, side, 3)` of the shapes with these labels."""
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return low + (high - low) * random.random_sample((count, *shape))

    def place(size: np.ndarray, span: float) -> tuple[np.ndarray, np.ndarray]:
        """Every pixel (4 samples each) in the coordinates of a turned and shifted object of this size."""
        tangent = uniform(-1, 1, 1, 1)  # of half the angle, up to 90 degrees, without sine and cosine
        cosine, sine = (1 - tangent * tangent) / (1 + tangent * tangent), 2 * tangent / (1 + tangent * tangent)
        grid = (np.arange(2 * side) + 0.5) / side - 1
        x, y = grid - uniform(-span, span, 1, 1), grid[:, None] - uniform(-span, span, 1, 1)
        return (cosine * x + sine * y) / size, (cosine * y - sine * x) / size

    def paint(canvas: np.ndarray, inside: np.ndarray, colour: np.ndarray) -> np.ndarray:
        cover = inside.reshape(count, side, 2, side, 2).sum((2, 4), dtype=np.int64)[..., None] / 4
        return canvas + cover * (colour - canvas)

    back = uniform(0, 255, 1, 1, 3)
    slope = uniform(-40, 40, 1, 1, 3) * np.linspace(-1, 1, side)[:, None]
    canvas = back + (slope if random.randint(2) else slope.swapaxes(1, 2))
    for _ in range(2):  # clutter: bars of any colour behind the shape
        x, y = place(uniform(0.1, 0.4, 1, 1), 1.0)
        canvas = paint(canvas, (abs(x) < 1) & (abs(y) < 0.3), uniform(0, 255, 1, 1, 3))
    colour = back + np.where(back < 128, 1, -1) * uniform(60, 127, 1, 1, 3)  # told from the background
    upside_down = np.where(uniform(0, 1, 1, 1) < 0.5, -1, 1)
    x, y = place(upside_down * uniform(0.45, 0.75, 1, 1), 0.25)
    inside = np.zeros(x.shape, bool)
    for label in np.unique(labels):
        chosen = labels == label
        inside[chosen] = SHAPE_OF[SHAPES[label]](x[chosen], y[chosen])
    canvas = paint(canvas, inside, colour)
    noise = sum(random.random_sample(canvas.shape) for _ in range(3)) - 1.5
    return (canvas + uniform(5, 25, 1, 1, 1) * noise).clip(0, 255).astype(np.uint8)


def star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five lines make a pentagram: the star is where at most one of them is crossed."""
    normals = [(0.0, 1.0), (0.951, 0.309), (0.588, -0.809), (-0.588, -0.809), (-0.951, 0.309)]
    return sum((a * x + b * y < 0.36).astype(np.int64) for a, b in normals) >= 4


SHAPE_OF = {  # bool functions of x (to the right) and y (down), about within the unit circle
    "arrow": lambda x, y: (abs(y) < 0.25) & (abs(x) < 0.9) & (x < 0.2) | (x > 0.0) & (abs(y) < (1 - x) * 0.8),
    "circle": lambda x, y: x * x + y * y < 0.8,
    "cross": lambda x, y: (abs(x) < 0.28) & (abs(y) < 0.95) | (abs(y) < 0.28) & (abs(x) < 0.95),
    "heart": lambda x, y: x * x + (y + 0.7 * abs(x) - 0.2) * (y + 0.7 * abs(x) - 0.2) < 0.65,
    "hourglass": lambda x, y: (abs(x) < abs(y) * 0.8 + 0.05) & (abs(y) < 0.9),
    "moon": lambda x, y: (x * x + y * y < 0.9) & ((x - 0.45) * (x - 0.45) + y * y > 0.6),
    "ring": lambda x, y: (x * x + y * y < 0.9) & (x * x + y * y > 0.36),
    "square": lambda x, y: (abs(x) < 0.75) & (abs(y) < 0.75),
    "star": star,
    "triangle": lambda x, y: (y < 0.6) & (y > 1.75 * abs(x) - 0.95),
}


# ---- a look at the data --------------------------------------------------------------------------------------------


def describe(sets: list[Pictures]) -> str:
    """Pictures a class and split, their sizes, and the mean and std to paste into a config."""
    train_set = sets[0]
    width = max(len(name) for name in [*train_set.classes, "class"])
    lines = [f"{'class':{width}}" + "".join(f"{pictures.split:>10}" for pictures in sets)]
    counts = [torch.bincount(pictures.labels.cpu(), minlength=len(train_set.classes)).tolist() for pictures in sets]
    for name, *of_class in zip(train_set.classes, *counts, strict=True):
        lines.append(f"{name:{width}}" + "".join(f"{count:>10,}" for count in of_class))
    lines.append(f"{'total':{width}}" + "".join(f"{len(pictures):>10,}" for pictures in sets))
    sizes = sorted({size for pictures in sets for size in pictures.file_sizes}, key=np.prod)
    found = " to ".join(f"{width} x {height}" for width, height in dict.fromkeys((sizes[0], sizes[-1])))
    side = train_set.images.shape[2]
    lines.append(f"\nfiles hold {found} pixels; the network gets {side} x {side}")
    lines.append(f"mean = [{', '.join(f'{value:.4f}' for value in train_set.mean)}]")
    lines.append(f"std = [{', '.join(f'{value:.4f}' for value in train_set.std)}]")
    return "\n".join(lines)


def enlarge(images: Tensor, side: int = 96) -> Tensor:
    """uint8 images `(N, 3, H, W)` magnified without smoothing by the whole number that comes close to `side`."""
    times = max(1, side // images.shape[2])
    return images.repeat_interleave(times, 2).repeat_interleave(times, 3)


def write_samples(log_dir: str, train_set: Pictures, augment: Augment) -> None:
    """TensorBoard pages with 32 training pictures, before and after augmentation."""
    from torch.utils.tensorboard import SummaryWriter

    images = train_set.images[:32]
    fill = torch.tensor(train_set.mean).mul(255).round().byte().view(1, 3, 1, 1)
    draws = torch.rand(DRAWS, len(images), generator=torch.Generator().manual_seed(0))
    with SummaryWriter(log_dir) as writer:
        writer.add_images("samples/1 before augmentation", enlarge(images))
        writer.add_images("samples/2 after augmentation", enlarge(augment(images, draws, fill)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What a data set holds.", allow_abbrev=False)
    parser.add_argument("--data", default="cifar10", help="cifar10, shapes, or a picture folder (default: cifar10)")
    parser.add_argument("--data-dir", default="data", help="where downloads live (default: data)")
    parser.add_argument("--image-size", type=int, default=32, help="side of a picture in pixels (default: 32)")
    parser.add_argument("--limit", type=int, default=0, help="first N pictures a split, classes balanced (0: all)")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half the pictures")
    parser.add_argument("--crop", type=int, default=2, metavar="PIXELS", help="shift by up to PIXELS (default: 2)")
    parser.add_argument("--cutout", type=int, default=0, metavar="PIXELS", help="hide a square (default: 0)")
    parser.add_argument("--log-dir", help="also show samples, before and after augmentation, for TensorBoard here")
    parser.error = lambda message: parser.exit(2, f"datasets.py: {message}\n")
    args = parser.parse_args(argv)
    for name, least in (("image_size", 1), ("limit", 0), ("crop", 0), ("cutout", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    try:
        train_set, test_set = load(args.data, args.data_dir, args.image_size, args.limit)
    except LimitError as error:
        parser.error(str(error))
    except DataError as error:
        sys.exit(f"datasets.py: {error}")
    print(describe([train_set, test_set]))
    if args.log_dir:
        try:
            write_samples(args.log_dir, train_set, Augment(args.flip, args.crop, args.cutout))
        except OSError as error:
            sys.exit(f"datasets.py: {args.log_dir}: {error.strerror}")
        print(f"tensorboard --logdir {args.log_dir}")


if __name__ == "__main__":
    sys.exit(main())

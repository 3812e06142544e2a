"""Where pictures come from: `load()` makes sets of CIFAR-10, of drawn shapes or of a folder of yours.

`python datasets.py --data FOLDER` is the doctor of a data set: pictures a class, bad files, copies, mean and std. With
`--log-dir` it shows samples in TensorBoard, before and after the augmentation that train.py would do.
"""

import argparse
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quick.cli import Parser, exit_script, run_script
from quick.data.augment import Augment
from quick.data.cifar10 import cifar10
from quick.data.decoding import Sizing, read_picture
from quick.data.folders import find_files, read_files
from quick.data.pictures import Pictures, normalize
from quick.data.shapes import shapes
from quick.data.stores import Enlarged, resized
from quick.data.streaming import cores, free_memory
from quick.errors import DataError, printable
from quick.processes import ALONE, Group

if TYPE_CHECKING:
    from quick.run.settings import Config

__all__ = ["Augment", "load", "normalize", "read_picture"]  # for notebooks: `import datasets`

FLAGS = ("data", "data_dir", "data_url", "image_size", "resize", "interpolation", "limit", "val_fraction", "strict")
FLAGS += ("workers", "memory_share", *(key.name for key in fields(Augment)))


def load(
    data: str = "cifar10",
    data_dir: str | Path = "data",
    image_size: int = 32,
    limit: int = 0,
    device: torch.device | str = "cpu",
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    splits: Sequence[str] = ("train", "test"),
    data_url: str = "",
    val_fraction: float = 0.0,
    strict: bool = False,
    workers: int = -1,
    memory_share: float = 0.4,
    resize: int = 0,
    interpolation: str = "bilinear",
    group: Group = ALONE,
) -> list[Pictures]:
    """Load the sets of `cifar10`, `shapes`, or a folder of pictures: one for each of `splits`, in that order.

    Pictures become squares as `Sizing(image_size, resize, interpolation)` says. `limit` takes the first pictures of
    each split, with the classes as even as possible (0: all). All sets are normalised by `mean` and `std`, a number for
    each channel of pixels in [0, 1]; without them by those of the first set. CIFAR-10 is looked for under `data_dir`,
    and downloaded to it from its known mirrors, or from `data_url`, if it is not there.

    Of a folder without `train/`, `val_fraction` (0.2 if it is 0) is held out. Bad files are named on standard error and
    left out, or refused if `strict`. A folder is kept in memory if it takes at most `memory_share` of what is free, and
    else streamed by `workers` processes (-1: one a core). Each process of a group reads its shard of the files.

    Raises DataError for data that are missing or damaged, LimitError where `limit` is below the number of classes.
    """
    device, sizing = torch.device(device), Sizing(image_size, resize, interpolation)
    if data in ("cifar10", "shapes") and not set(splits) <= {"train", "test"}:
        raise DataError(f"{data} has the splits train and test, not {', '.join(splits)}")
    if data == "cifar10":
        sets = [cifar10(Path(data_dir), split, data_url, limit) for split in splits]
    elif data == "shapes":
        sets = [shapes(split, limit=limit) for split in splits]
    elif Path(data).is_dir():
        listings = group.from_rank0(lambda: find_files(Path(data), splits, val_fraction or 0.2))
        sets = [
            read_files(
                listings[split],
                sizing,
                limit=limit,
                device=device,
                workers=math.ceil(cores() / group.local_size) if workers < 0 else workers,
                memory_share=memory_share,
                strict=strict,
                group=group,
            )
            for split in splits
        ]
    else:
        raise DataError(f"no data {data!r}: neither cifar10 nor shapes nor a folder of pictures")
    for pictures in sets:
        if data in ("cifar10", "shapes"):  # 32 x 32 pixels, on the CPU
            if (image_size, resize or image_size) != (32, 32):
                pictures.store = resized(pictures.store, sizing)
            pictures.store, pictures.labels = pictures.store.to(device), pictures.labels.to(device)
        pictures.mean, pictures.std = tuple(mean) or sets[0].mean, tuple(std) or sets[0].std
    return sets


def load_sets(config: "Config", device: torch.device | str = "cpu", group: Group = ALONE) -> list[Pictures]:
    """The sets that a config asks for: training and test; with `val_fraction` training, validation and test.

    The validation set is held out of training, and a folder without `train/` has no other test set. Raises what `load`
    raises.
    """
    train_set, test_set = load(
        config.data,
        config.data_dir,
        config.image_size,
        config.limit,
        device=device,
        mean=config.mean,
        std=config.std,
        data_url=config.data_url,
        val_fraction=config.val_fraction,
        strict=config.strict,
        workers=config.workers,
        memory_share=config.memory_share,
        resize=config.resize,
        interpolation=config.interpolation,
        group=group,
    )
    if not config.val_fraction or test_set.split == "val":
        return [train_set, test_set]
    return [*train_set.hold_out(config.val_fraction, config.seed), test_set]


# ---- the doctor ------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    from quick.run.config import parse_config, resolve  # predicting does without it

    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--log-dir", help="also show samples, before and after augmentation, for TensorBoard here")
    config, _, args = parse_config(parser, argv, FLAGS)
    config = resolve(config, pretrained=None)
    sets = load_sets(config)
    print(describe(sets))
    if args.log_dir:
        write_samples(Path(args.log_dir), sets[0], config)
        print(f"tensorboard --logdir {args.log_dir}")


def describe(sets: list[Pictures]) -> str:
    """Pictures a class and split, sizes, memory, copies, and the mean and std to paste into a config."""
    classes = sets[0].classes
    width = max(len(name) for name in [*classes, "class"])
    lines = [f"{'class':{width}}" + "".join(f"{pictures.split:>10}" for pictures in sets)]
    counts = [torch.bincount(pictures.labels.cpu(), minlength=len(classes)).tolist() for pictures in sets]
    for name, *of_class in zip(classes, *counts, strict=True):
        lines.append(f"{name:{width}}" + "".join(f"{count:>10,}" for count in of_class))
    lines.append(f"{'total':{width}}" + "".join(f"{len(pictures):>10,}" for pictures in sets))

    sizes = sorted({size for pictures in sets for size in pictures.file_sizes}, key=math.prod)
    found = " to ".join(f"{width} x {height}" for width, height in dict.fromkeys((sizes[0], sizes[-1])))
    lines.append(f"\nfiles     {found} pixels; the network gets {sets[0].side} x {sets[0].side}")
    bad = {path for pictures in sets for path, _ in pictures.bad}  # a validation set shares training's list and store
    lines.append(f"bad       {len(bad)} files left out")
    taken = sum({id(pictures.store): pictures.store.nbytes for pictures in sets}.values())
    share = f"{taken / 1e6:,.1f} MB, {taken / (free_memory(sets[0].labels.device) + taken):.1%} of what is free"
    lines.append(f"memory    {share if taken else 'streamed from the files: they do not fit'}")
    for pictures in sets[1:]:
        copies = duplicates(sets[0], pictures)
        example = f", first {printable(' = '.join(copies[0]))}" if copies else ""
        lines.append(f"copies    {len(copies)} {pictures.split} pictures are in {sets[0].split} too{example}")
    lines.append("")

    for name, values in (("mean", sets[0].mean), ("std", sets[0].std)):
        lines.append(f"{name} = [{', '.join(f'{value:.4f}' for value in values)}]")
    return "\n".join(lines)


def duplicates(train_set: Pictures, test_set: Pictures) -> list[tuple[str, str]]:
    """Test pictures that are training pictures too, to the byte: pairs of file names, or of places in the sets."""

    def hashes(pictures: Pictures) -> Iterator[tuple[bytes, str]]:
        if pictures.paths is None:
            store = pictures.store.small if isinstance(pictures.store, Enlarged) else pictures.store
            rows = enumerate(range(len(pictures)) if pictures.rows is None else pictures.rows.tolist())
            named = ((f"number {place}", store.images[row].cpu().numpy().tobytes()) for place, row in rows)
        else:
            named = ((path, Path(path).read_bytes()) for path in map(os.fsdecode, pictures.paths))
        for name, content in named:
            yield hashlib.md5(content, usedforsecurity=False).digest(), name

    seen = dict(hashes(train_set))
    return [(name, seen[digest]) for digest, name in hashes(test_set) if digest in seen]


def write_samples(log_dir: Path, train_set: Pictures, config: "Config") -> None:
    """TensorBoard pages with 16 training pictures, before augmentation and as the first epoch would change them."""
    from quick.views.drawing import samples
    from quick.views.tensorboard import open_board

    indices = torch.arange(min(16, len(train_set)))
    with open_board(log_dir) as board:
        for name, augment in (("1 before", None), ("2 after", config)):
            _, images, labels = train_set.preview(indices, augment, seed=config.seed, epoch=1)
            picture = samples(images, labels, train_set.classes)
            board.add_image(f"samples/{name} augmentation", picture, dataformats="HWC")


def cli(argv: list[str] | None = None) -> int:
    return run_script("datasets.py", main, argv)


if __name__ == "__main__":
    exit_script(cli())

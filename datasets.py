"""Where pictures come from: `load()` makes sets of CIFAR-10, of drawn shapes or of a folder of yours.

`python datasets.py --data FOLDER` is the doctor of a data set: pictures a class, bad files, copies, mean and std. With
`--log-dir` it shows samples in TensorBoard, before and after the augmentation that train.py would do.
"""

from quick.cli import check_flags
from quick.run.flags import parse_datasets

if __name__ == "__main__":  # --help and wrong flags are answered before PyTorch is imported, which takes seconds
    check_flags("datasets.py", parse_datasets)

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quick.cli import exit_script, how_to_see, log, run_script
from quick.data.augment import Augment
from quick.data.cifar10 import cifar10
from quick.data.decoding import read_picture
from quick.data.doctor import describe
from quick.data.folders import read_files
from quick.data.holdout import share_of
from quick.data.listing import find_files
from quick.data.pictures import BUILT_IN, Pictures, normalize
from quick.data.shapes import shapes
from quick.data.sizing import Sizing
from quick.data.source import LOADED
from quick.data.stores import resized
from quick.data.streaming import Budget, cores
from quick.errors import ConfigError, DataError
from quick.processes import ALONE, Group
from quick.run.config import resolve

if TYPE_CHECKING:
    from quick.run.settings import Config

__all__ = ["Augment", "load", "normalize", "read_picture"]  # for notebooks: `import datasets`


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
    fit: str = "crop",
    levels: Sequence[float] | None = None,
    fold: int = 0,
    folds: int = 0,
    labels: str | Path = "",
    cache: bool = False,
    group: Group = ALONE,
) -> list[Pictures]:
    """Load the sets of `cifar10`, `shapes`, or a folder of pictures: one for each of `splits`, in that order.

    Splits are train, test, and of a folder that has them both beside train/ also val; "whole" is all of a folder that
    can be tested (`test/`, else `val/`, else every class); no splits stand for all that training needs.

    Pictures become squares as `Sizing(image_size, resize, interpolation, fit=fit)` says. `limit` takes the first of
    each split, classes as even as possible (0: all). All sets are normalised by `mean` and `std`, of each channel of
    pixels in [0, 1]; without them by the first set's. Of pixels wider than 8 bits the two `levels` become black and
    white: None finds them in the first set, () takes those of the type. CIFAR-10 is looked for in `data_dir`, else
    downloaded from known mirrors or `data_url`.

    Of a folder without `test/` and `val/`, `fold` of `folds` or about `val_fraction` (0.2 if all are 0) is held out.
    Bad files are named on standard error and left out, or refused if `strict`. A folder is kept in memory if it takes
    at most `memory_share` of what is free, else streamed by `workers` processes (-1: one a core), with `cache`
    decoded once and kept resized on the disk. Each process of a group reads its shard.

    A table of `labels` tells the classes of a folder's pictures, wherever they are in it; no class folders count then.

    Raises DataError for data that are missing or damaged, LimitError where `limit` is below the number of classes.
    """
    device, share = torch.device(device), share_of(val_fraction, fold, folds)
    sizing = Sizing(image_size, resize, interpolation, tuple(levels) if levels else None, fit).checked()
    if data in BUILT_IN:
        if labels:
            raise ConfigError(f"--labels {labels}: {data} has labels of its own; a table is for a folder of pictures")
        if not set(splits) <= {"train", "test"}:
            raise DataError(f"{data} has the splits train and test, not {', '.join(splits)}")
        if Path(data).is_dir():
            log.info(f"{data}: the built-in set, not the folder of that name here, which is ./{data}")
        splits = splits or ("train", "test")
    if data == "cifar10":
        sets = [cifar10(Path(data_dir), split, data_url, limit) for split in splits]
    elif data == "shapes":
        sets = [shapes(split, limit=limit) for split in splits]
    elif data and Path(data).is_dir():
        budget = Budget(device, memory_share, group)
        listings = group.from_rank0(lambda: find_files(Path(data), splits, share, labels))
        sets = []
        for split in splits or listings:
            pictures = read_files(
                listings[split],
                sizing,
                limit=limit,
                device=device,
                workers=math.ceil(cores() / group.local_size) if workers < 0 else workers,
                budget=budget,
                strict=strict,
                find_levels=levels is None and not sets,
                group=group,
                cache=Path(data) if cache else None,
            )
            sets.append(pictures)
            sizing = sizing._replace(levels=sets[0].levels)
    elif Path(data).is_file():
        raise DataError(f"{data}: a file, where a folder of pictures is wanted; if it is an archive, unpack it first")
    else:
        raise DataError(f"no data '{data}': neither cifar10 nor shapes nor a folder of pictures")
    for pictures in sets:
        if data in BUILT_IN:  # 32 x 32 pixels, on the CPU
            pictures.store = resized(pictures.store, sizing).to(device)
            pictures.labels = pictures.labels.to(device)
        pictures.mean, pictures.std = tuple(mean) or sets[0].mean, tuple(std) or sets[0].std
    return sets


def load_sets(config: "Config", device: torch.device | str = "cpu", group: Group = ALONE) -> list[Pictures]:
    """The sets that a config asks for: training, validation and test, or without one of these two.

    A fold or `val_fraction` of the training pictures becomes the validation set. Without it that is a folder's `val/`;
    a folder without splits has no test set. Raises what `load` raises.
    """
    settings = {name: getattr(config, name) for name in LOADED} | {"levels": config.levels or None}
    train_set, *others = load(**settings, mean=config.mean, std=config.std, splits=(), device=device, group=group)
    share = share_of(config.val_fraction, config.fold, config.folds)
    if not share or others[0].split == "val":
        return [train_set, *others]
    return [*train_set.hold_out(share, config.seed, Path(config.data)), *others]


# ---- the doctor ------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    config, args = parse_datasets(argv)
    config = resolve(config, pretrained=None)
    sets = load_sets(config)
    print(describe(sets))
    if args.log_dir:
        write_samples(Path(args.log_dir), sets[0], config)
        print(how_to_see(args.log_dir))


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

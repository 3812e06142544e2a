"""Settings that say which pictures a run takes, and how they become squares."""

from dataclasses import dataclass, fields

from quick.choices import FITS, INTERPOLATIONS
from quick.cli import USUAL, setting


def bad_levels(value: tuple) -> str | None:
    """Why these are no values for --levels, in words; None when they are."""
    return None if not value or value[0] < value[1] else f"{list(value)} are not two numbers, the lower one first"


@dataclass(frozen=True)
class Source:
    """Where pictures come from, what is held out, and what the network gets of them."""

    data: str = setting(USUAL, "cifar10", "pictures: cifar10, shapes, or a folder of yours", metavar="DATA")
    labels: str = setting(
        "data",
        "",
        "table (CSV: file,label) with the class of each picture in the folder of --data, wherever it is",
        means="folders are the classes",
        metavar="FILE",
    )
    data_dir: str = setting("data", "data", "folder for downloads", resumable=True, metavar="FOLDER")
    data_url: str = setting(
        "data", "", "address to download CIFAR-10 from", means="known mirrors", resumable=True, metavar="URL"
    )
    strict: bool = setting("data", False, "stop at bad files instead of leaving them out")
    image_size: int = setting(
        "data",
        0,
        "side of the square that the network gets",
        means="that of the weights, else 32",
        at_least=0,
        at_most=4096,
        auto=True,
        metavar="PIXELS",
    )
    resize: int = setting(
        "data",
        0,
        "shorter side of a picture before its middle is cut out",
        means="that of the weights, else --image-size",
        at_least=0,
        at_most=4096,
        auto=True,
        metavar="PIXELS",
    )
    interpolation: str = setting(
        "data",
        "auto",
        "how pictures are resized",
        means="as for the weights, else bilinear",
        choices=("auto", *INTERPOLATIONS),
        auto=True,
    )
    fit: str = setting(
        "data",
        "auto",
        "how pictures become squares: the middle cut out, padded with grey, or squashed",
        means="as for the weights, else crop",
        choices=("auto", *FITS),
        auto=True,
    )
    limit: int = setting(
        "data", 0, "take only so many pictures of each split, classes balanced: a quick try", means="all", at_least=0
    )
    val_fraction: float = setting(
        "data",
        0.0,
        "hold this share of training out, choose the best epoch on it, test once",
        means="none",
        at_least=0,
        below=1,
        metavar="SHARE",
    )
    fold: int = setting(
        "data", 0, "hold out the fold of this number, from 1 on, in place of a share", means="none", at_least=0
    )
    folds: int = setting(
        "data", 0, "number of equal parts of which each run can hold out another one", means="none", at_least=0
    )
    mean: tuple = setting(
        "data",
        (),
        "means of the three channels, of pixels in [0, 1]",
        means="those of the weights, else measured",
        auto=True,
    )
    std: tuple = setting(
        "data",
        (),
        "standard deviations of the three channels",
        means="those of the weights, else measured",
        above=0,
        auto=True,
    )
    levels: tuple = setting(
        "data",
        (),
        "values that become black and white, of pixels wider than 8 bits",
        means="those of the weights, else found",
        check=bad_levels,
        metavar=("LOW", "HIGH"),
        auto=True,
    )
    shuffle: bool = setting("data", True, "take the pictures in a new order in every epoch")


# The settings that `datasets.load` takes, some of them of the machine; the network has mean and std of its own.
LOADED = tuple(key.name for key in fields(Source) if key.name not in ("mean", "std", "shuffle"))
LOADED += ("workers", "memory_share", "cache")

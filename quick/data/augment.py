"""Random changes of training pictures: their settings, and which comes after which.

To add one, add a setting to `Augment` and some lines to `augment_images`, with draws under a name of your own.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from quick.cli import setting

if TYPE_CHECKING:
    from torch import Tensor

    from quick.data.transforms import Draws

ATTEMPTS = 10  # of resized_crop to find a part that fits, as many as torchvision's


@dataclass(frozen=True)
class Augment:
    """How training pictures are changed at random; each is a setting of train.py too."""

    flip: bool = setting("augmentation", False, "mirror half of the training pictures left to right")
    flip_vertical: bool = setting("augmentation", False, "mirror half of the training pictures top to bottom")
    crop: int = setting(
        "augmentation",
        0,
        "shift each training picture by up to so many pixels; its edge is reflected",
        means="none",
        at_least=0,
        metavar="PIXELS",
    )
    cutout: int = setting(
        "augmentation",
        0,
        "hide a square of this side in each training picture",
        means="none",
        at_least=0,
        metavar="PIXELS",
    )
    jitter: float = setting(
        "augmentation",
        0.0,
        "change brightness, contrast and saturation by up to this share",
        means="none",
        at_least=0,
        at_most=1,
        metavar="SHARE",
    )
    rotate: float = setting(
        "augmentation",
        0.0,
        "turn each training picture by up to this angle, either way; its corners get the mean colour",
        means="none",
        at_least=0,
        at_most=180,
        metavar="DEGREES",
    )
    resized_crop: float = setting(
        "augmentation",
        0.0,
        "enlarge a part of each training picture, at least this share of its area",
        means="none",
        at_least=0,
        at_most=1,
        metavar="SHARE",
    )


def augments(settings: Augment) -> bool:
    """Whether these settings, or those of a config that has them among others, change any picture."""
    return any(getattr(settings, key.name) != key.default for key in fields(Augment))


def augment_images(images: "Tensor", settings: Augment, draws: "Draws", fill: "Tensor") -> "Tensor":
    """Changed copies of uint8 images `(N, 3, H, W)`: uint8, or float32 in 0..255 where they were interpolated.

    `draws` gives uniform numbers in [0, 1) for these images by name; `fill`, uint8 `(1, 3, 1, 1)`, is the colour of
    what cutout hides and of what a rotation brings in.
    """
    import torch  # the settings above are flags too, and --help does not wait for PyTorch

    from quick.data import transforms

    if settings.resized_crop:
        images = transforms.resized_crop(
            images,
            settings.resized_crop,
            area=torch.stack([draws(f"part_area_{attempt}") for attempt in range(ATTEMPTS)]),
            shape=torch.stack([draws(f"part_shape_{attempt}") for attempt in range(ATTEMPTS)]),
            row=draws("part_row"),
            column=draws("part_column"),
        )
    if settings.crop or settings.flip or settings.flip_vertical:
        images = transforms.random_crop(
            images,
            settings.crop,
            draws("crop_row"),
            draws("crop_column"),
            mirrored=draws.alternating("flip") < 0.5 if settings.flip else None,
            upside_down=draws.alternating("flip_vertical") < 0.5 if settings.flip_vertical else None,
        )
    if settings.jitter:
        images = transforms.jitter(images, settings.jitter, draws("brightness"), draws("contrast"), draws("saturation"))
    if settings.rotate:
        images = transforms.rotate(images, settings.rotate * (2 * draws("rotate") - 1), fill)
    if settings.cutout:
        images = transforms.cutout(images, settings.cutout, draws("cutout_row"), draws("cutout_column"), fill)
    return images

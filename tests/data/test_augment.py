"""The random changes, by draws that the tests choose; and the draws."""

import numpy as np
import pytest
import torch

from quick.data.augment import Augment, augment_images, augments
from quick.data.transforms import Draws
from quick.run.settings import Config

FILL = torch.full((1, 3, 1, 1), 77, dtype=torch.uint8)


class Chosen:
    """Draws that are as the test says, 0.5 where it says nothing."""

    def __init__(self, **values: float | torch.Tensor):
        self.values = values
        self.asked = set()

    def __call__(self, name: str) -> torch.Tensor:
        self.asked.add(name)
        return torch.as_tensor(self.values.get(name, 0.5)).expand(self.values.get("count", 1))

    alternating = __call__


def changed(settings: Augment, images: torch.Tensor, **values: float | torch.Tensor) -> torch.Tensor:
    return augment_images(images, settings, Chosen(**values, count=len(images)), FILL)


def draws_of(count: int, seed: int = 0, epoch: int = 1) -> Draws:
    return Draws(count, seed, epoch, torch.arange(count), torch.device("cpu"))


# ---- draws ----


def test_draws_depend_on_seed_epoch_and_name_alone():
    first = draws_of(50)("crop_row")
    assert first.shape == (50,) and first.dtype == torch.float32 and first.min() >= 0 and first.max() < 1
    assert torch.equal(first, draws_of(50)("crop_row"))
    for other in (draws_of(50)("crop_column"), draws_of(50, seed=1)("crop_row"), draws_of(50, epoch=2)("crop_row")):
        assert not torch.equal(first, other)


def test_draws_belong_to_pictures_not_to_places():
    whole = draws_of(50)("grey")
    order = torch.randperm(50)
    mixed = Draws(50, 0, 1, order, torch.device("cpu"))
    assert torch.equal(mixed("grey"), whole[order])
    assert torch.equal(mixed.at(10, 20)("grey"), whole[order[10:20]])
    assert torch.equal(mixed.at(10, 20).alternating("grey"), draws_of(50).alternating("grey")[order[10:20]])


def test_alternating_draws_move_by_a_half_each_epoch():
    first, second, third = (draws_of(300, epoch=epoch).alternating("flip") for epoch in range(3))
    assert torch.equal(first, third)
    assert torch.allclose((first - second).abs(), torch.tensor(0.5), atol=1e-6)
    assert torch.equal(first < 0.5, second >= 0.5)
    assert not torch.equal(first, draws_of(300, seed=1, epoch=0).alternating("flip"))


def test_only_what_is_asked_for_is_drawn():
    draws = draws_of(4)
    augment_images(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), Augment(cutout=2), draws, FILL)
    assert {name for name, _ in draws.made} == {"cutout_row", "cutout_column"}


def test_settings_that_change_nothing_are_known():
    assert not augments(Augment()) and not augments(Config(epochs=3, batch_size=8))
    for settings in (
        Augment(flip=True),
        Augment(resized_crop=0.5),
        Config(crop=2),
        Config(jitter=0.1),
        Augment(rotate=5),
    ):
        assert augments(settings)


# ---- changes ----


def test_flip_mirrors_the_pictures_that_are_drawn():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    result = changed(Augment(flip=True), images, flip=torch.tensor([0.4, 0.6]))
    assert torch.equal(result[0], images[0].flip(2)) and torch.equal(result[1], images[1])


def test_flip_vertical_mirrors_the_other_way_by_draws_of_its_own():
    images = torch.arange(4 * 3 * 4 * 4, dtype=torch.uint8).view(4, 3, 4, 4)
    draws = {"flip": torch.tensor([0.4, 0.6, 0.4, 0.6]), "flip_vertical": torch.tensor([0.4, 0.4, 0.6, 0.6])}
    result = changed(Augment(flip_vertical=True), images, **draws)
    assert torch.equal(result, torch.cat([images[:2].flip(2), images[2:]]))
    both = changed(Augment(flip=True, flip_vertical=True), images, **draws)
    expected = [images[0].flip(1, 2), images[1].flip(1), images[2].flip(2), images[3]]
    assert torch.equal(both, torch.stack(expected)) and both.dtype == torch.uint8


@pytest.mark.parametrize(("row", "column"), [(0.0, 0.0), (0.99, 0.0), (0.5, 0.99)])
@pytest.mark.parametrize("mirrored", [False, True])
def test_crop_shifts_by_up_to_its_pixels(row, column, mirrored):
    images = torch.randint(1, 256, (3, 3, 6, 6), dtype=torch.uint8)
    result = changed(Augment(crop=2, flip=mirrored), images, crop_row=row, crop_column=column, flip=0.0)
    top, left = int(row * 5), int(column * 5)
    padded = torch.from_numpy(np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)), "reflect"))
    expected = padded[:, :, top : top + 6, left : left + 6]
    assert torch.equal(result, expected.flip(3) if mirrored else expected)


@pytest.mark.parametrize("crop", [1, 5, 6])
def test_a_crop_as_large_as_the_picture_stays_inside(crop):
    images = torch.randint(1, 256, (40, 3, 6, 6), dtype=torch.uint8)
    result = augment_images(images, Augment(crop=crop), draws_of(40), FILL)
    assert result.shape == images.shape and result.min() > 0


def test_cutout_hides_a_square_that_may_reach_over_the_edge():
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    middle = changed(Augment(cutout=4), images)
    assert (middle == 77).sum() == 3 * 16 and (middle[0, :, 2:6, 2:6] == 77).all()
    corner = changed(Augment(cutout=4), images, cutout_row=0.0, cutout_column=0.0)
    assert (corner == 77).sum() == 3 * 4 and (corner[0, :, :2, :2] == 77).all()


def test_jitter_multiplies_brightness_contrast_and_saturation():
    images = torch.tensor([100, 50, 200], dtype=torch.uint8).view(1, 3, 1, 1).repeat(1, 1, 2, 2)
    images[:, :, 0] //= 2

    def jittered(**values: float) -> torch.Tensor:
        return changed(Augment(jitter=0.5), images, **values)

    assert torch.allclose(jittered(), images.float(), atol=1e-3)
    assert torch.allclose(jittered(brightness=0.75), 1.25 * images.float(), atol=1e-3)
    assert jittered(contrast=0.0).std() < jittered().std() < jittered(contrast=1.0).std()
    luma = torch.tensor([0.299, 0.587, 0.114])
    greys = [(jittered(contrast=draw).mean((2, 3)) * luma).sum() for draw in (0.0, 0.5)]
    assert greys[0] == pytest.approx(greys[1].item(), abs=0.01)
    deviations = [jittered(saturation=draw).std(1).mean() for draw in (0.0, 0.5, 1.0)]
    assert deviations == sorted(deviations) and jittered(brightness=1.0, saturation=1.0).max() <= 255


@pytest.mark.parametrize("side", [20, 21])
def test_rotate_gives_torchvisions_pixels(side):
    """Where the original ends between two pixels, torchvision's own `fill` mixes it in twice, ours once."""
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    bilinear = functional.InterpolationMode.BILINEAR
    images, draws = torch.randint(0, 256, (12, 3, side, side), dtype=torch.uint8), draws_of(12)
    turned = augment_images(images, Augment(rotate=120), draws, FILL)
    angles = 120 * (2 * draws("rotate") - 1)
    assert angles.min() < -60 and angles.max() > 60 and turned.dtype == torch.float32
    for image, result, angle in zip(images, turned, angles.tolist(), strict=True):
        expected = functional.rotate(image.float() - 77, angle, bilinear) + 77
        assert torch.allclose(result, expected, atol=0.01)
        seen = functional.rotate(torch.ones_like(image).float(), angle, bilinear)
        ends = (seen > 0) & (seen < 1 - 1e-5)
        filled = functional.rotate(image.float(), angle, bilinear, fill=[77.0] * 3)
        assert torch.allclose(result[~ends], filled[~ends], atol=0.01) and ends.float().mean() < 0.3


def test_rotate_turns_by_the_draw_and_fills_the_corners():
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    result = changed(Augment(rotate=90), images, rotate=torch.tensor([0.0, 0.5, 1.0]))
    expected = torch.stack([images[0].rot90(-1, (1, 2)), images[1], images[2].rot90(1, (1, 2))])
    assert torch.allclose(result, expected.float(), atol=0.01)
    corner = changed(Augment(rotate=90), images, rotate=0.75)[:, :, 0, 0]
    assert torch.allclose(corner, torch.tensor(77.0), atol=1e-4)


def test_resized_crop_enlarges_a_part():
    ramp = torch.linspace(0, 255, 32).round().byte().expand(1, 3, 32, 32)
    whole = changed(Augment(resized_crop=1.0), ramp)
    assert torch.allclose(whole, ramp.float(), atol=1)
    left = changed(Augment(resized_crop=0.25), ramp, part_area_0=0.0, part_column=0.0)
    right = changed(Augment(resized_crop=0.25), ramp, part_area_0=0.0, part_column=0.999)
    assert left[..., 0].max() < 3 and left[..., -1].min() > 120 and left[..., -1].max() < 130
    assert right[..., 0].min() > 125 and right[..., -1].min() > 250


@pytest.mark.parametrize("least", [1.0, 0.9, 0.3, 0.08])
def test_parts_are_as_large_and_wide_as_torchvisions(least):
    transforms = pytest.importorskip("torchvision.transforms")
    torch.manual_seed(0)
    across = torch.arange(64.0).expand(1, 64, 64)
    places = torch.stack([across, across.mT, across], 1).expand(6000, 3, 64, 64)
    crops = augment_images(places, Augment(resized_crop=least), draws_of(6000), FILL)
    width = crops[:, 0, 32, -1] - crops[:, 0, 32, 0] + 1  # in pixels of the picture: the edges show whole ones
    height = crops[:, 1, -1, 32] - crops[:, 1, 0, 32] + 1
    theirs = transforms.RandomResizedCrop.get_params
    parts = [theirs(torch.zeros(3, 64, 64), (least, 1.0), (3 / 4, 4 / 3)) for _ in range(6000)]
    their_height, their_width = torch.tensor(parts)[:, 2:].float().unbind(1)

    def figures(width: torch.Tensor, height: torch.Tensor) -> list[float]:
        area, shape = width * height / 64**2, (width / height).log()
        found = (
            area.mean(),
            area.std(),
            area.min(),
            area.max(),
            (area > 0.999).float().mean(),
            shape.mean(),
            shape.std(),
        )
        return torch.stack(found).tolist()

    assert figures(width, height) == pytest.approx(figures(their_width, their_height), abs=0.02)
    left, top = crops[:, 0, 32, 0], crops[:, 1, 0, 32]
    for start, side in ((left, width), (top, height)):
        assert start.min() > -1e-3 and (start + side).max() < 64 + 1e-3
        inside = start[side < 63.5] / (64 - side[side < 63.5])
        assert not len(inside) or abs(inside.mean() - 0.5) < 0.02


def test_a_part_is_enlarged_to_torchvisions_pixels():
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    images, draws = torch.randint(0, 256, (40, 3, 20, 20), dtype=torch.uint8), draws_of(40)
    crops = augment_images(images, Augment(resized_crop=0.2), draws, FILL)
    for number, (image, crop) in enumerate(zip(images, crops, strict=True)):
        drawn = {name: float(values[number]) for (name, _), values in draws.made.items()}
        for attempt in range(10):
            area = 0.2 + 0.8 * drawn[f"part_area_{attempt}"]
            shape = (0.75 * (16 / 9) ** drawn[f"part_shape_{attempt}"]) ** 0.5
            width, height = round(20 * area**0.5 * shape), round(20 * area**0.5 / shape)
            if max(width, height) <= 20:
                break
        left, top = int(drawn["part_column"] * (21 - width)), int(drawn["part_row"] * (21 - height))
        expected = functional.resized_crop(image.float(), top, left, height, width, [20, 20], antialias=True)
        assert torch.allclose(crop, expected, atol=0.01)


def test_where_no_part_fits_the_whole_picture_is_taken():
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    too_wide = dict.fromkeys([f"part_shape_{attempt}" for attempt in range(10)], 0.999)
    assert torch.allclose(changed(Augment(resized_crop=1.0), images, **too_wide), images.float(), atol=1e-2)

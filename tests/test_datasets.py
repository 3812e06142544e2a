import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from conftest import COLOURS, ROOT, as_bytes, noisy
from PIL import Image

import datasets
from datasets import Augment, DataError


def squares(count: int, side: int = 8, classes: int = 2) -> datasets.Pictures:
    """Pictures whose first pixel tells their number."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, 3, side, side)
    labels = torch.arange(count) % classes
    return datasets.Pictures(images.contiguous(), labels, [f"class {k}" for k in range(classes)], "train")


def numbers(batches) -> list[int]:
    """The numbers of the pictures in all batches of `squares`, in their order."""
    return [round(255 * float(image[0, 0, 0])) for images, _ in batches for image in images]


# ---- batches ----


def test_shapes_are_the_same_pictures_on_every_machine():
    test_set = datasets.shapes("test")
    assert test_set.images.shape == (1000, 3, 32, 32) and test_set.images.dtype == torch.uint8
    pixels = test_set.images.permute(0, 2, 3, 1).contiguous().numpy().tobytes()
    assert hashlib.md5(pixels).hexdigest() == "b6d7ece18eb5c2ddface721f88130301"


def test_shapes_have_ten_even_classes_and_splits_of_their_own():
    train_set, test_set = datasets.load("shapes", limit=200)
    assert len(train_set.classes) == 10
    assert torch.bincount(train_set.labels).tolist() == [20] * 10
    assert len(datasets.shapes("train")) == 5000
    assert not torch.equal(train_set.images, test_set.images)


def test_no_single_pixel_gives_a_shape_away():
    pictures = datasets.shapes("train")
    pixels = pictures.images.permute(0, 2, 3, 1).reshape(len(pictures), -1).float()
    means = torch.stack([pixels[pictures.labels == label].mean(0) for label in range(10)])
    assert (means - pixels.mean(0)).abs().max() < 0.5 * pixels.std()
    guesses = torch.stack([(pixels - mean).square().sum(1) for mean in means], 1).argmin(1)
    assert (guesses == pictures.labels).float().mean() < 0.25


def test_every_picture_comes_once_an_epoch():
    for count, batch_size in ((10, 4), (9, 4), (8, 4), (3, 4), (1, 4), (5, 1)):
        pictures = squares(count)
        batches = list(pictures.batches(batch_size, shuffle=True))
        assert sorted(numbers(batches)) == list(range(count))
        assert len(batches) == len(datasets.cuts(len(pictures), batch_size))
        assert 1 in (count, batch_size) or min(len(labels) for _, labels in batches) > 1
        assert batch_size > 1 or len(batches) == count


def test_batches_are_normalised_floats_with_their_labels():
    images, labels = next(squares(6).batches(6))
    assert images.dtype == torch.float32 and images.shape == (6, 3, 8, 8) and labels.dtype == torch.int64
    assert labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert torch.allclose(images[3], torch.full((3, 8, 8), 3 / 255))


def test_the_order_depends_on_seed_and_epoch_alone():
    pictures = squares(50)

    def order(**how):
        return numbers(pictures.batches(7, shuffle=True, **how))

    assert order(seed=0, epoch=1) == order(seed=0, epoch=1)
    assert order(seed=0, epoch=1) != order(seed=0, epoch=2)
    assert order(seed=0, epoch=1) != order(seed=1, epoch=1) != order(seed=0, epoch=2)
    assert numbers(pictures.batches(7)) == list(range(50))


def test_mirrored_pictures_take_turns():
    pictures = datasets.shapes("train", 300)
    mirrored = []
    for epoch in range(4):
        images, _ = next(pictures.batches(300, augment=Augment(flip=True), epoch=epoch))
        plain, _ = next(pictures.batches(300))
        mirrored.append((images == plain.flip(3)).flatten(1).all(1))
        assert torch.equal(images[~mirrored[-1]], plain[~mirrored[-1]])
    assert 100 < mirrored[0].sum() < 200
    assert torch.equal(mirrored[0], mirrored[2]) and torch.equal(mirrored[0] ^ mirrored[1], torch.ones(300).bool())
    images, _ = next(
        pictures.batches(300, shuffle=True, augment=Augment(flip=True), epoch=1)
    )  # by picture, not by place
    order, _ = pictures.order(True, 0, 1)
    assert torch.equal((images == plain[order].flip(3)).flatten(1).all(1), mirrored[1][order])
    assert not torch.equal(pictures.turns(0, 1), pictures.turns(1, 1))


def test_batches_are_the_same_however_many_are_made_ready_at_once(monkeypatch):
    pictures, augment = datasets.shapes("train", 205), Augment(flip=True, crop=2, cutout=8, jitter=0.3)
    found = []
    for ahead in (1, 100, 1000):
        monkeypatch.setattr(datasets.Pictures, "ahead", ahead)
        found.append(list(pictures.batches(20, shuffle=True, augment=augment)))
    for batches in found[1:]:
        for (images, labels), (same, others) in zip(found[0], batches, strict=True):
            assert torch.equal(images, same) and torch.equal(labels, others)


def test_only_what_is_kept_comes_in_an_epoch():
    pictures = datasets.shapes("train", 100)
    keep = torch.arange(100) % 3 == 0
    order, _ = pictures.order(True, 0, 1, keep)
    assert sorted(order.tolist()) == list(range(0, 100, 3))
    batches = list(pictures.batches(10, shuffle=True, epoch=1, keep=keep))
    assert [len(labels) for _, labels in batches] == [10, 10, 10, 4]
    assert torch.equal(torch.cat([labels for _, labels in batches]), pictures.labels[order])


def test_augmentation_repeats_for_the_same_epoch():
    pictures = datasets.shapes("train", 40)
    augment = Augment(flip=True, crop=2, cutout=8)
    first, again, other = (next(pictures.batches(40, augment=augment, epoch=epoch))[0] for epoch in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_normalize_and_back():
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    floats = datasets.normalize(images, mean, std)
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(floats, expected.float(), atol=1e-5)
    assert torch.equal(datasets.denormalize(floats, mean, std), images)


def test_measured_mean_and_std_are_exact():
    images = torch.randint(0, 256, (7, 3, 5, 5), dtype=torch.uint8)
    mean, std = datasets.statistics(datasets.histogram(images))
    pixels = images.double().div(255).transpose(0, 1).reshape(3, -1)
    assert mean == pytest.approx(pixels.mean(1).tolist(), abs=1e-4)
    assert std == pytest.approx(pixels.std(1, correction=0).tolist(), abs=1e-4)


def test_a_set_without_contrast_has_no_zero_std():
    assert min(datasets.statistics(datasets.histogram(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)))[1]) > 0


def test_hold_out_takes_its_share_of_every_class():
    rest, held_out = squares(40, classes=4).hold_out(0.2, seed=0)
    assert (rest.split, held_out.split) == ("train", "val")
    assert torch.bincount(held_out.labels).tolist() == [2, 2, 2, 2]
    assert sorted(numbers(rest.batches(8)) + numbers(held_out.batches(8))) == list(range(40))
    assert held_out.images.tolist() == squares(40, classes=4).hold_out(0.2, seed=0)[1].images.tolist()
    assert held_out.images.tolist() != squares(40, classes=4).hold_out(0.2, seed=1)[1].images.tolist()


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_hold_out_leaves_pictures_on_both_sides(fraction):
    with pytest.raises(datasets.LimitError, match="leaves too few on one side"):
        squares(40, classes=4).hold_out(fraction, seed=0)


# ---- augmentation ----

FILL = torch.full((1, 3, 1, 1), 77, dtype=torch.uint8)


def drawn(count: int, **values: float) -> torch.Tensor:
    names = [
        "place",
        "flip",
        "row",
        "column",
        "cutout_row",
        "cutout_column",
        "area",
        "shape",
        "part_row",
        "part_column",
    ]
    names += ["brightness", "contrast", "saturation"]
    names += ["left", "for", "yours"]
    assert len(names) == datasets.DRAWS
    return torch.tensor([values.get(name, 0.5) for name in names]).view(-1, 1).expand(-1, count)


def test_flip_mirrors_the_pictures_that_are_drawn():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    draws = drawn(2).clone()
    draws[1] = torch.tensor([0.4, 0.6])
    changed = Augment(flip=True)(images, draws, FILL)
    assert torch.equal(changed[0], images[0].flip(2)) and torch.equal(changed[1], images[1])


@pytest.mark.parametrize(("row", "column"), [(0.0, 0.0), (0.99, 0.0), (0.5, 0.99)])
@pytest.mark.parametrize("mirrored", [False, True])
def test_crop_shifts_by_up_to_its_pixels(row, column, mirrored):
    images = torch.randint(1, 256, (3, 3, 6, 6), dtype=torch.uint8)
    draws = drawn(3, row=row, column=column).clone()
    draws[1] = 0.0
    changed = Augment(crop=2, flip=mirrored)(images, draws, FILL)
    top, left = int(row * 5), int(column * 5)
    padded = torch.from_numpy(np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)), "reflect"))
    expected = padded[:, :, top : top + 6, left : left + 6]
    assert torch.equal(changed, expected.flip(3) if mirrored else expected)


@pytest.mark.parametrize("crop", [1, 5, 6])
def test_a_crop_as_large_as_the_picture_stays_inside(crop):
    images = torch.randint(1, 256, (40, 3, 6, 6), dtype=torch.uint8)
    changed = Augment(crop=crop)(images, torch.rand(datasets.DRAWS, 40), FILL)
    assert changed.shape == images.shape and changed.min() > 0


def test_cutout_hides_a_square_that_may_reach_over_the_edge():
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    middle = Augment(cutout=4)(images, drawn(1), FILL)
    assert (middle == 77).sum() == 3 * 16 and (middle[0, :, 2:6, 2:6] == 77).all()
    corner = Augment(cutout=4)(images, drawn(1, cutout_row=0.0, cutout_column=0.0), FILL)
    assert (corner == 77).sum() == 3 * 4 and (corner[0, :, :2, :2] == 77).all()


def test_what_cutout_hides_has_the_mean_colour():
    pictures = squares(4)
    pictures.mean, pictures.std = (0.1, 0.5, 0.9), (0.25, 0.25, 0.25)
    images, _ = next(pictures.batches(4, augment=Augment(cutout=20)))  # all of each picture
    assert images.abs().max() < 0.6 / 255 / 0.25


def test_jitter_multiplies_brightness_contrast_and_saturation():
    images = torch.tensor([100, 50, 200], dtype=torch.uint8).view(1, 3, 1, 1).repeat(1, 1, 2, 2)
    images[:, :, 0] //= 2

    def changed(**draws):
        return Augment(jitter=0.5)(images, drawn(1, **draws), FILL)

    assert torch.allclose(changed(), images.float(), atol=1e-3)
    assert torch.allclose(changed(brightness=0.75), 1.25 * images.float(), atol=1e-3)
    assert changed(contrast=0.0).std() < changed().std() < changed(contrast=1.0).std()
    greys = [(changed(contrast=draw).mean((2, 3)) * torch.tensor([0.299, 0.587, 0.114])).sum() for draw in (0.0, 0.5)]
    assert greys[0] == pytest.approx(greys[1].item(), abs=0.01)
    spread = [changed(saturation=draw).std(1).mean() for draw in (0.0, 0.5, 1.0)]
    assert spread == sorted(spread) and changed(brightness=1.0, saturation=1.0).max() <= 255


def test_resized_crop_enlarges_a_part():
    ramp = torch.linspace(0, 255, 32).round().byte().expand(1, 3, 32, 32)
    whole = Augment(resized_crop=1.0)(ramp, drawn(1, shape=0.5), FILL)
    assert torch.allclose(whole, ramp.float(), atol=1)
    left = Augment(resized_crop=0.25)(ramp, drawn(1, area=0.0, shape=0.5, part_column=0.0), FILL)
    right = Augment(resized_crop=0.25)(ramp, drawn(1, area=0.0, shape=0.5, part_column=1.0), FILL)
    assert left[..., 0].max() < 3 and left[..., -1].min() > 120 and left[..., -1].max() < 130
    assert right[..., 0].min() > 125 and right[..., -1].min() > 250


def test_each_picture_has_its_own_draw():
    pictures = squares(200, side=8)
    pictures.images[:, :, :, 0] = 255  # a white column tells where the picture went
    images, _ = next(pictures.batches(200, augment=Augment(flip=True, crop=2)))
    places = (images[:, 0, 4] > 0.99).int().argmax(1)
    assert len(places.unique()) >= 4


# ---- pictures from files ----


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGB", (40, 40), (200, 100, 50)), (200, 100, 50)),
        (Image.new("L", (40, 40), 90), (90, 90, 90)),
        (Image.new("1", (40, 40), 1), (255, 255, 255)),
        (Image.new("I;16", (40, 40), 128 * 257), (128, 128, 128)),
        (Image.new("RGBA", (40, 40), (200, 100, 50, 0)), (255, 255, 255)),
        (Image.new("RGBA", (40, 40), (200, 100, 50, 255)), (200, 100, 50)),
        (Image.new("LA", (40, 40), (10, 0)), (255, 255, 255)),
        (Image.new("RGB", (40, 40), (200, 100, 50)).convert("P", palette=Image.Palette.ADAPTIVE), (200, 100, 50)),
        (Image.new("RGB", (1, 1), (200, 100, 50)), (200, 100, 50)),
        (Image.new("RGB", (8000, 3), (200, 100, 50)), (200, 100, 50)),
    ],
    ids=[
        "rgb",
        "grey",
        "bilevel",
        "grey16",
        "transparent",
        "opaque",
        "grey-alpha",
        "palette",
        "one-pixel",
        "8000-wide",
    ],
)
def test_every_kind_of_png_becomes_rgb(image, expected):
    picture, size = datasets.read_picture(io.BytesIO(as_bytes(image)), datasets.Sizing(32))
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8 and size == image.size
    assert np.abs(picture.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind):
    image = Image.new("CMYK", (50, 50), (0, 255, 255, 0))  # red
    picture, _ = datasets.read_picture(io.BytesIO(as_bytes(image, kind)), datasets.Sizing(32))
    assert np.abs(picture.astype(int) - (255, 0, 0)).max() <= 3


def test_a_transparent_colour_is_white():
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 100, 50)).save(file, "PNG", transparency=(200, 100, 50))
    assert (datasets.read_picture(file, datasets.Sizing(32))[0] == 255).all()


@pytest.mark.parametrize("side", [70, 200, 500])
def test_large_jpegs_lose_nothing_by_the_quick_way(side):
    pixels = np.random.RandomState(0).randint(0, 256, (35, 35, 3)).astype(np.uint8)
    file = io.BytesIO(as_bytes(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC), "JPEG"))
    whole, _ = datasets.read_picture(Image.open(file).convert("RGB"), datasets.Sizing(32))
    quick, _ = datasets.read_picture(file, datasets.Sizing(32))
    assert np.abs(quick.astype(int) - whole).mean() < 4


def test_float_greys_are_scaled_to_their_range():
    image = Image.fromarray(np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32))
    picture, _ = datasets.read_picture(io.BytesIO(as_bytes(image, "TIFF")), datasets.Sizing(32))
    assert picture.min() == 0 and picture.max() == 255


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (32, 32), "blue")
    image.paste("red", (0, 0, 32, 16))  # red above blue
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    image.save(file, "PNG", exif=exif)
    picture, _ = datasets.read_picture(file, datasets.Sizing(32))
    assert picture[5, 28].tolist() == [255, 0, 0] and picture[5, 3].tolist() == [0, 0, 255]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "turned"])
def test_jpegs_of_the_very_size_are_read_as_others_are(mode, tmp_path, monkeypatch):
    """These have a quick way, by their names as strings."""
    image, exif = noisy((200, 120, 40), 0), Image.Exif()
    image.paste("blue", (0, 0, 32, 10))
    exif[0x0112] = 6
    if mode == "turned":
        image.save(tmp_path / "a.jpg", exif=exif)
    else:
        image.convert(mode).save(tmp_path / "a.jpg")
    expected, _ = datasets.read_picture(tmp_path / "a.jpg", datasets.Sizing(32))
    monkeypatch.setattr(Image, "open", Image.open if mode != "RGB" else None)
    picture, size = datasets.read_picture(str(tmp_path / "a.jpg"), datasets.Sizing(32))
    assert size == (32, 32) and np.array_equal(picture, expected)


def test_a_damaged_exif_block_does_not_spoil_the_picture():
    file = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(file, "PNG", exif=b"nonsense")
    assert datasets.read_picture(file, datasets.Sizing(32))[0][0, 0].tolist() == [255, 0, 0]


def test_the_centre_square_is_taken_and_resized_smoothly():
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    picture, size = datasets.read_picture(io.BytesIO(as_bytes(image)), datasets.Sizing(32))
    assert size == (300, 100) and (picture[:, 1:-1] == (0, 0, 255)).all()
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (320, 160)))
    picture, _ = datasets.read_picture(io.BytesIO(as_bytes(stripes)), datasets.Sizing(32))
    assert np.abs(picture.astype(int) - 127).max() < 10  # aliasing would leave stripes


def photographs() -> list[Image.Image]:
    """A generated photograph, wide and tall, and three real ones where they are at hand."""
    pixels = np.random.RandomState(0).randint(0, 256, (30, 40, 3)).astype(np.uint8)
    wide = Image.fromarray(pixels).resize((400, 301), Image.Resampling.BICUBIC)
    real = sorted((ROOT / "data" / "ants_bees" / "val").glob("*/*.jpg"))[:3]
    return [wide, wide.transpose(Image.Transpose.ROTATE_90), *map(Image.open, real)]


@pytest.mark.parametrize(
    "name", ["vgg16", "efficientnet_b0", "efficientnet_b1", "swin_v2_t", "efficientnet_v2_s", "inception_v3"]
)
def test_pictures_are_prepared_as_imagenet_weights_want_them(name):
    models = pytest.importorskip("torchvision.models")
    transforms = models.get_model_weights(name).DEFAULT.transforms()
    how = datasets.Sizing(transforms.crop_size[0], transforms.resize_size[0], transforms.interpolation.value)
    for image in photographs():
        expected = transforms(image.convert("RGB"))
        picture, _ = datasets.read_picture(io.BytesIO(as_bytes(image.convert("RGB"))), how)
        batch = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None]
        difference = (datasets.normalize(batch, transforms.mean, transforms.std)[0] - expected).abs() * 0.229 * 255
        assert difference.max() < 2.5 and difference.mean() < 0.1  # of 255: roundings alone


def test_without_a_resize_nothing_of_the_shorter_side_is_lost():
    image = Image.new("RGB", (90, 60), "blue")
    image.paste("red", (0, 0, 90, 6))
    whole, _ = datasets.read_picture(io.BytesIO(as_bytes(image)), datasets.Sizing(20))
    middle, _ = datasets.read_picture(io.BytesIO(as_bytes(image)), datasets.Sizing(20, 30))
    assert whole[0, 10].tolist() == [255, 0, 0] and middle[0, 10].tolist() == [0, 0, 255]
    fits, _ = datasets.read_picture(io.BytesIO(as_bytes(image.crop((0, 4, 20, 24)))), datasets.Sizing(20, 30))
    assert fits[0, 10].tolist() == [0, 0, 255]  # also where the file has the side already


@pytest.mark.parametrize("how", [(64, 64, "bilinear"), (56, 64, "bicubic")])
def test_small_pictures_are_enlarged_batch_by_batch_as_single_ones_are(how):
    [shown] = datasets.load("shapes", image_size=how[0], resize=how[1], interpolation=how[2], limit=20, splits=["test"])
    [plain] = datasets.load("shapes", limit=20, splits=["test"])
    assert shown.images.shape[2] == 32 and shown.side == how[0]  # kept small
    assert shown.mean == plain.mean
    images, labels = next(shown.batches(20))
    assert images.shape == (20, 3, how[0], how[0]) and torch.equal(labels, plain.labels)
    images = datasets.denormalize(images, shown.mean, shown.std)
    for image, small in zip(images, plain.images, strict=True):
        file = io.BytesIO(as_bytes(Image.fromarray(small.permute(1, 2, 0).numpy())))
        picture, _ = datasets.read_picture(file, datasets.Sizing(*how))
        difference = np.abs(picture.astype(int) - image.permute(1, 2, 0).numpy())
        assert difference.max() <= 2
    augment = datasets.Augment(flip=True, crop=4, cutout=9)
    assert next(shown.batches(20, augment=augment))[0].shape == (20, 3, how[0], how[0])


def test_features_come_in_the_order_of_the_pictures():
    train_set, _ = datasets.load("shapes", limit=45)
    everything = torch.cat([images for images, _ in train_set.batches(10)])
    features = datasets.Features(everything.flatten(1), train_set.labels, train_set.classes, "train")
    assert features.evaluation_batch == 250 and len(list(features.batches(10))) == len(
        datasets.cuts(len(train_set), 10)
    )
    both = zip(train_set.batches(10, True, None, 3, 2), features.batches(10, True, None, 3, 2), strict=True)
    for (images, labels), (of_images, of_labels) in both:
        assert torch.equal(images.flatten(1), of_images) and torch.equal(labels, of_labels)


def test_evaluation_takes_fewer_large_pictures_at_a_time():
    assert [datasets.evaluation_batch(side) for side in (8, 32, 224, 4096)] == [250, 250, 20, 1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "not a picture"), (b"hello", "not a picture"), (as_bytes(noisy((9, 9, 9), 0))[:900], "truncated")],
)
def test_what_is_no_picture_is_refused_with_a_reason(content, reason):
    with pytest.raises(DataError, match=reason):
        datasets.read_picture(io.BytesIO(content), datasets.Sizing(32))


# ---- folders ----


def test_a_folder_gives_pictures_with_their_labels(colour_folder):
    train_set, test_set = datasets.load(str(colour_folder))
    assert (len(train_set), len(test_set)) == (60, 18)
    assert train_set.classes == sorted(COLOURS)
    for image, label in zip(train_set.images, train_set.labels, strict=True):
        colour = image.float().mean((1, 2))
        assert colour.argmax() == torch.tensor(COLOURS[train_set.classes[label]]).argmax()


def test_a_folders_order_is_mixed_and_fixed(colour_folder):
    first, again = (datasets.load(str(colour_folder))[0].labels.tolist() for _ in range(2))
    assert first == again
    assert first != sorted(first) and len(set(first[:10])) == 3


def test_limit_takes_even_classes(colour_folder):
    train_set, test_set = datasets.load(str(colour_folder), limit=6)
    assert torch.bincount(train_set.labels).tolist() == torch.bincount(test_set.labels).tolist() == [2, 2, 2]
    with pytest.raises(datasets.LimitError, match="limit 2 is below the number of classes, 3"):
        datasets.load(str(colour_folder), limit=2)


def test_limited_pictures_stay_in_their_order():
    assert datasets.balanced(torch.tensor([0, 0, 0, 1, 1]), ["a", "b"], 4).tolist() == [0, 1, 3, 4]


def test_pictures_of_another_size_are_resized(colour_folder):
    assert datasets.load(str(colour_folder), image_size=16)[0].images.shape == (60, 3, 16, 16)
    assert datasets.load("shapes", image_size=24, limit=10)[0].images.shape == (10, 3, 24, 24)


def test_given_mean_and_std_are_kept(colour_folder):
    train_set, test_set = datasets.load(str(colour_folder), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    assert train_set.mean == test_set.mean == (0.5, 0.4, 0.3) and test_set.std == (0.2, 0.2, 0.1)


def test_val_serves_as_test_and_hidden_files_are_left_out(tmp_path):
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / place).mkdir(parents=True)
        noisy((50, 50, 50), 0).save(tmp_path / place / "one.PNG")
        (tmp_path / place / ".hidden.png").write_bytes(b"no picture")
        (tmp_path / place / "notes.txt").write_text("no picture")
    train_set, test_set = datasets.load(str(tmp_path))
    assert (len(train_set), len(test_set), test_set.split) == (2, 2, "test")


def test_all_sets_are_normalised_by_the_first(tmp_path):
    for split, brightness in (("train", 60), ("test", 200)):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            noisy((brightness,) * 3, 0).save(tmp_path / split / name / "1.png")
    train_set, test_set = datasets.load(str(tmp_path))
    assert test_set.mean == train_set.mean == pytest.approx((60 / 255,) * 3, abs=0.01)
    assert test_set.std == train_set.std and next(test_set.batches(2))[0].min() > 3


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(DataError, match="no data 'nowhere'"):
        datasets.load("nowhere")
    with pytest.raises(DataError, match="no class folders with pictures; a classifier needs at least 2"):
        datasets.load(str(tmp_path))
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="no folder train/ in it"):
        datasets.load(str(tmp_path))
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="train: no class folders with pictures in it"):
        datasets.load(str(tmp_path))
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(DataError, match=r"cat: no pictures in it"):
        datasets.load(str(tmp_path))
    noisy((0, 0, 0), 0).save(tmp_path / "train" / "cat" / "1.png")
    with pytest.raises(DataError, match="one class alone, 'cat'; a classifier needs at least 2"):
        datasets.load(str(tmp_path))
    (tmp_path / "train" / "dog").mkdir()
    for name in ("cat", "dog"):
        noisy((0, 0, 0), 0).save(tmp_path / "train" / name / "1.png")
        (tmp_path / "test" / name).mkdir(parents=True)
        noisy((0, 0, 0), 0).save(tmp_path / "test" / name / "1.png")
    (tmp_path / "test" / "cow").mkdir()
    noisy((0, 0, 0), 0).save(tmp_path / "test" / "cow" / "1.png")
    with pytest.raises(DataError, match=r"test: class 'cow' is not in .*train, which has: cat, dog"):
        datasets.load(str(tmp_path))


# ---- CIFAR-10 ----


@pytest.fixture
def archive(tmp_path):
    """A folder with CIFAR-10's archive in small: the same files and pickles, 20 pictures each."""
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        for number, name in enumerate(
            ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
        ):
            pixels = np.random.RandomState(number).randint(0, 256, (20, 3072)).astype(np.uint8)
            content = pickle.dumps({"data": pixels, "labels": [k % 10 for k in range(20)]}, protocol=2)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return tmp_path


def test_cifar10_is_read_from_the_archive_and_from_its_folder(archive):
    packed = datasets.load("cifar10", archive)
    assert {path.name for path in archive.iterdir()} == {
        "cifar-10-batches-py",
        ".cifar10.lock",
        datasets.CIFAR10_ARCHIVE,
    }
    (archive / "cifar-10-python.tar.gz").unlink()
    unpacked = datasets.load("cifar10", archive)
    for one, other in zip(packed, unpacked, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    train_set, test_set = packed
    assert (len(train_set), len(test_set)) == (100, 20)
    first = np.random.RandomState(0).randint(0, 256, (20, 3072)).astype(np.uint8)[1].reshape(3, 32, 32)
    assert np.array_equal(train_set.images[1], first)
    assert train_set.classes[train_set.labels[1]] == "automobile"


def test_a_damaged_archive_is_named(archive):
    path = archive / "cifar-10-python.tar.gz"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz: damaged .*; delete it to download it again"):
        datasets.load("cifar10", archive)
    assert not (archive / "cifar-10-batches-py").exists()


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("code ran",))

    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match=r"builtins\.print, which is no data"):
        datasets.load("cifar10", tmp_path, splits=["test"], mean=(0, 0, 0), std=(1, 1, 1))


@pytest.mark.parametrize(
    "batch",
    [
        {"data": [1, 2, 3], "labels": [1]},
        {"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [0]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]},
        {"data": np.zeros((2, 3000), np.uint8), "labels": [0, 1]},
        {},
        7,
    ],
)
def test_batches_that_do_not_fit_are_refused(batch, tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(DataError, match="not CIFAR-10's Python version, or damaged"):
        datasets.load("cifar10", tmp_path, splits=["test"])


# ---- the script ----


def test_the_script_describes_a_folder(colour_folder, capsys):
    datasets.main(["--data", str(colour_folder)])
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["class", "train", "test"]
    assert out.splitlines()[4].split() == ["total", "60", "18"]
    assert "files     32 x 32 pixels" in out and "bad       0 files" in out and "memory    0.2 MB" in out
    assert "copies    18 test pictures are in train too, first " in out
    mean = datasets.load(str(colour_folder))[0].mean
    assert f"mean = [{mean[0]:.4f}, {mean[1]:.4f}, {mean[2]:.4f}]" in out


def test_the_script_shows_samples_in_tensorboard(colour_folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    datasets.main(["--data", str(colour_folder), "--log-dir", str(tmp_path)])
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == ["samples/1 before augmentation", "samples/2 after augmentation"]
    before = Image.open(io.BytesIO(events.Images("samples/1 before augmentation")[0].encoded_image_string))
    picture = datasets.load(str(colour_folder))[0].images[0].permute(1, 2, 0)
    assert np.array_equal(np.asarray(before)[4:100, 4:100][::3, ::3], picture)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        ("--data nowhere", 1, "no data 'nowhere'"),
        ("--data shapes --limit 5", 2, "--limit 5 is below the number of classes, 10"),
        ("--data shapes --limit -1", 2, "--limit -1: must be from 0 to inf"),
        ("--data shapes --jitter nan", 2, "--jitter: nan is not a finite number"),
        ("--data shapes --crop x", 2, "invalid int value"),
        ("--data shapes --crop 33", 2, "--crop and --cutout can be at most the image size, 32 pixels"),
        ("--data shapes --limit 10 --log-dir /dev/null/x", 1, "/dev/null/x: Not a directory"),
    ],
)
def test_the_script_names_mistakes(flags, status, message, capsys):
    assert datasets.cli(flags.split()) == status
    error = capsys.readouterr().err
    assert message in error and error.startswith("datasets.py: ") and error.count("\n") == 1

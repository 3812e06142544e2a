"""Stores: pictures that are not square, enlarged ones, and those that do not fit into memory."""

import io
import os
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import as_bytes, same_weights
from PIL import Image

import datasets
import train
from quick.data import streaming
from quick.data.augment import Augment
from quick.data.decoding import read_picture
from quick.data.pictures import denormalize
from quick.data.sizing import Sizing
from quick.data.stores import Enlarged, InMemory, Streamed
from quick.data.streaming import free_memory
from quick.errors import DataError
from quick.run.features import Features


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of 46 JPEG photographs of all shapes: wide, tall, square, small and large."""
    root, random = tmp_path_factory.mktemp("photographs"), np.random.RandomState(0)
    for split, count in (("train", 17), ("test", 6)):
        for name in ("red", "blue"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                size = [(90, 60), (60, 90), (50, 50), (200, 41), (20, 25)][number % 5]
                pixels = random.randint(0, 256, (5, 5, 3)).astype(np.uint8)
                image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
                image.save(root / split / name / f"{number}.jpg", quality=95)
    return root


AUGMENT = Augment(flip=True, crop=2, cutout=8, jitter=0.3, resized_crop=0.4)


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_are_those_from_memory(photographs, workers):
    kept, _ = datasets.load(str(photographs))
    streamed, streamed_test = datasets.load(str(photographs), memory_share=0, workers=workers)
    assert isinstance(kept.store, InMemory)
    assert isinstance(streamed.store, Streamed) and isinstance(streamed_test.store, Streamed)
    assert (kept.mean, kept.std, kept.file_sizes) == (streamed.mean, streamed.std, streamed.file_sizes)
    for epoch in (1, 2, 3):
        options = {"shuffle": True, "augment": AUGMENT, "seed": 4, "epoch": epoch}
        for batch, same in zip(kept.batches(8, **options), streamed.batches(8, **options), strict=True):
            assert torch.equal(batch.images, same.images) and torch.equal(batch.labels, same.labels)
            assert torch.equal(batch.indices, same.indices)
        shown, same = (pictures.preview(torch.tensor([5, 2]), AUGMENT, 4, epoch) for pictures in (kept, streamed))
        assert all(torch.equal(first, second) for first, second in zip(shown, same, strict=True))
        next(streamed.batches(8, shuffle=True))  # an epoch that is left early does no harm


@pytest.mark.parametrize("fit", ["pad", "squash"])
def test_pictures_that_are_not_cut_are_the_same_in_memory_and_streamed(photographs, fit):
    kept, _ = datasets.load(str(photographs), fit=fit)
    streamed, _ = datasets.load(str(photographs), fit=fit, memory_share=0, workers=0)
    assert kept.store.images.shape == (34, 3, 32, 32) and (kept.mean, kept.std) == (streamed.mean, streamed.std)
    for batch, same in zip(kept.batches(8, augment=AUGMENT), streamed.batches(8, augment=AUGMENT), strict=True):
        assert torch.equal(batch.images, same.images)
    for place in (0, 33):
        picture, _ = read_picture(os.fsdecode(kept.paths[place]), Sizing(32, fit=fit))
        assert np.array_equal(picture, kept[place][0].permute(1, 2, 0))
    for small, large in ((16, 16), (48, 48)):  # of squares it makes no difference
        [shown] = datasets.load("shapes", fit=fit, image_size=small, limit=20, splits=["test"])
        [cut] = datasets.load("shapes", image_size=large, limit=20, splits=["test"])
        assert torch.equal(next(shown.batches(20)).images, next(cut.batches(20)).images)


def test_what_no_sizing_can_be_is_one_line(photographs):
    for how, error in (
        ({"fit": "stretch"}, "fit 'stretch': must be one of crop, pad, squash"),
        ({"interpolation": "nearest"}, "interpolation 'nearest': must be one of bilinear, bicubic"),
        ({"fit": "pad", "resize": 40}, "resize 40: with fit 'pad' it must be 0"),
    ):
        with pytest.raises(DataError) as caught:
            datasets.load(str(photographs), **how)
        assert str(caught.value) == error


def test_pytorchs_dataloader_takes_a_set(photographs):
    train_set, _ = datasets.load(str(photographs))
    streamed, _ = datasets.load(str(photographs), memory_share=0, workers=0)
    centres = denormalize(next(train_set.batches(34)).images, train_set.mean, train_set.std)
    for pictures in (train_set, streamed):
        image, label = pictures[-1]
        assert image.dtype == torch.uint8 and image.shape == (3, 32, 32) and type(label) is int
        assert torch.equal(image, centres[33]) and label == train_set.labels[33]
        batches = list(torch.utils.data.DataLoader(pictures, 16))
        assert torch.equal(torch.cat([images for images, _ in batches]), centres)
        assert torch.equal(torch.cat([labels for _, labels in batches]), train_set.labels)
    assert torch.equal(train_set.take(torch.tensor([7, 3]))[1][0], centres[3])
    assert len([*train_set]) == 34  # a loop ends at the end
    rest, _ = torch.utils.data.random_split(train_set, [0.5, 0.5])
    assert torch.equal(rest[0][0], centres[rest.indices[0]])
    for place in (34, -35):
        with pytest.raises(IndexError, match=f"no picture {place}: the set has 34"):
            train_set[place]
    for index in (slice(1, 3), "a", 1.0, [2], None):
        with pytest.raises(TypeError, match="one picture has a whole number, not "):
            train_set[index]


@pytest.mark.parametrize("share", [0.4, 0])
def test_processes_of_pytorchs_dataloader_read_a_set(photographs, share):
    train_set, _ = datasets.load(str(photographs), memory_share=share, workers=0)
    images, labels = next(iter(torch.utils.data.DataLoader(train_set, 34, num_workers=1)))
    assert images.shape == (34, 3, 32, 32) and torch.equal(labels, train_set.labels)
    copy = pickle.loads(pickle.dumps(train_set))  # as Windows and macOS hand it to them
    assert torch.equal(copy[5][0], images[5])


def test_the_mean_is_of_what_is_used_of_long_pictures(photographs):
    train_set, _ = datasets.load(str(photographs))
    images, extents = train_set.store.images, train_set.store.extent
    assert extents.min() < images.shape[3]
    used = [image[..., :extent].flatten(1) for image, extent in zip(images, extents, strict=True)]
    pixels = torch.cat(used, 1).double() / 255
    assert train_set.mean == pytest.approx(pixels.mean(1).tolist(), abs=1e-4)
    assert train_set.std == pytest.approx(pixels.std(1, correction=0).tolist(), abs=1e-4)


def test_streamed_runs_end_with_the_same_bits(photographs, tmp_path):
    for name, share in (("kept", "0.4"), ("streamed", "0")):
        flags = f"--epochs 2 --batch-size 8 --device cpu --no-views --memory-share {share} --run-name {name} --log-dir"
        assert train.cli(["--data", str(photographs), "--val-fraction", "0.3", *flags.split(), str(tmp_path)]) == 0
    assert same_weights(tmp_path / "kept" / "epoch_002.pt", tmp_path / "streamed" / "epoch_002.pt")


def test_training_sees_all_of_a_long_picture_and_evaluation_its_centre(tmp_path):
    ramp = Image.fromarray(np.tile(np.arange(0, 200, 2, dtype=np.uint8), (50, 1)))  # 100 x 50, darker to the left
    for split in ("train", "test"):
        for name, image in (("wide", ramp), ("tall", ramp.transpose(Image.Transpose.ROTATE_90))):
            (tmp_path / split / name).mkdir(parents=True)
            image.save(tmp_path / split / name / "1.png")
    train_set, test_set = datasets.load(str(tmp_path), mean=(0, 0, 0), std=(1, 1, 1))
    assert train_set.store.images.shape == (2, 3, 32, 64) and test_set.store.images.shape == (2, 3, 32, 32)
    wide, tall = train_set.classes.index("wide"), train_set.classes.index("tall")
    seen = {wide: [], tall: []}
    for epoch in range(40):
        batch = next(train_set.batches(2, augment=Augment(flip=True), epoch=epoch))  # which keeps the mean
        for image, label in zip(255 * batch.images, batch.labels.tolist(), strict=True):
            along = image[0].mean(0 if label == wide else 1)
            assert abs(abs(along[-1] - along[0]) - 31 * 200 / 64) < 4  # turned upright: the ramp runs along its side
            seen[label].append(float(along.mean()))
    for places in seen.values():
        assert min(places) < 65 and max(places) > 130
    centre = next(test_set.batches(2)).images
    assert (255 * centre).mean((1, 2, 3)).tolist() == pytest.approx([99, 99], abs=2)
    plain = next(train_set.batches(2)).images
    assert (255 * plain).mean((1, 2, 3)).tolist() == pytest.approx([99, 99], abs=3)


def test_a_file_that_vanishes_while_streaming_is_named(photographs, tmp_path):
    shutil.copytree(photographs, tmp_path / "p")
    train_set, _ = datasets.load(str(tmp_path / "p"), memory_share=0, workers=0)
    (tmp_path / "p" / "train" / "red" / "3.jpg").unlink()
    with pytest.raises(DataError, match=r"3\.jpg: No such file or directory"):
        list(train_set.batches(8))


def test_sets_that_share_a_stream_take_turns(photographs):
    """Silently, the batches of one would be those of the other."""
    train_set, _ = datasets.load(str(photographs), memory_share=0, workers=0)
    rest, held_out = train_set.hold_out(0.5, seed=0)
    assert rest.store is held_out.store
    first = rest.batches(4)
    next(first)
    assert sum(len(batch.labels) for batch in held_out.batches(4)) == len(held_out)
    with pytest.raises(RuntimeError, match="another epoch while one was in progress"):
        next(first)
    assert sum(len(batch.labels) for batch in rest.batches(4)) == len(rest)


def test_memory_decides_what_is_streamed(photographs, monkeypatch):
    monkeypatch.setattr(streaming, "free_memory", lambda _: 34 * 32 * 64 * 3 / 0.4)
    assert isinstance(datasets.load(str(photographs))[0].store, InMemory)
    monkeypatch.setattr(streaming, "free_memory", lambda _: 34 * 32 * 64 * 3 / 0.4 - 10)
    assert isinstance(datasets.load(str(photographs))[0].store, Streamed)
    assert datasets.describe(datasets.load(str(photographs), memory_share=0)).count("streamed from the files") == 1


def test_free_memory_is_plausible():
    free = free_memory(torch.device("cpu"))
    assert 2**20 < free < 2**50
    if hasattr(os, "sysconf"):
        built_in = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert built_in / 500 < free <= built_in


@pytest.mark.parametrize("sizing", [Sizing(64, 64, "bilinear"), Sizing(56, 64, "bicubic")])
def test_small_pictures_are_enlarged_batch_by_batch_as_single_ones_are(sizing):
    options = {"image_size": sizing.side, "resize": sizing.resize, "interpolation": sizing.interpolation}
    [shown] = datasets.load("shapes", limit=20, splits=["test"], **options)
    [plain] = datasets.load("shapes", limit=20, splits=["test"])
    assert isinstance(shown.store, Enlarged) and shown.store.small.side == 32 and shown.side == sizing.side
    assert shown.mean == plain.mean
    batch = next(shown.batches(20))
    assert batch.images.shape == (20, 3, sizing.side, sizing.side) and torch.equal(batch.labels, plain.labels)
    images = denormalize(batch.images, shown.mean, shown.std)
    for image, small in zip(images, plain.store.images, strict=True):
        file = io.BytesIO(as_bytes(Image.fromarray(small.permute(1, 2, 0).numpy())))
        picture, _ = read_picture(file, sizing)
        difference = np.abs(picture.astype(int) - image.permute(1, 2, 0).numpy())
        assert difference.max() <= 2
    augment = Augment(flip=True, crop=4, cutout=9)
    assert next(shown.batches(20, augment=augment)).images.shape == batch.images.shape


@pytest.mark.parametrize(("side", "resize"), [(24, 0), (24, 32), (20, 28), (32, 40)])
def test_smaller_pictures_are_made_as_single_ones_are(side, resize):
    [shown] = datasets.load("shapes", image_size=side, resize=resize, limit=10, splits=["test"])
    [plain] = datasets.load("shapes", limit=10, splits=["test"])
    assert shown.store.images.shape == (10, 3, side, side)
    for image, small in zip(shown.store.images, plain.store.images, strict=True):
        picture, _ = read_picture(Image.fromarray(small.permute(1, 2, 0).numpy()), Sizing(side, resize))
        assert np.array_equal(picture, image.permute(1, 2, 0))


def test_features_come_in_the_order_of_the_pictures():
    train_set, _ = datasets.load("shapes", limit=45)
    everything = torch.cat([batch.images for batch in train_set.batches(10)]).flatten(1)
    features = replace(train_set, store=Features(everything))
    assert features.evaluation_batch == 250 and len(list(features.batches(10))) == 5
    options = {"shuffle": True, "seed": 3, "epoch": 2}
    for batch, of_features in zip(train_set.batches(10, **options), features.batches(10, **options), strict=True):
        assert torch.equal(batch.images.flatten(1), of_features.images)
        assert torch.equal(batch.labels, of_features.labels)

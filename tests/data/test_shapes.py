"""The drawn pictures."""

import hashlib

import pytest
import torch

from quick.data.shapes import shapes


@pytest.fixture(scope="module")
def train_set():
    return shapes("train")


def test_shapes_are_the_same_pictures_on_every_machine():
    images = shapes("test").store.images
    assert images.shape == (1000, 3, 32, 32) and images.dtype == torch.uint8
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy().tobytes()
    assert hashlib.md5(pixels).hexdigest() == "b6d7ece18eb5c2ddface721f88130301"


def test_a_limit_takes_the_first_of_each_class(train_set):
    few = shapes("train", limit=200)
    assert torch.bincount(few.labels).tolist() == [20] * 10
    first = torch.cat([(train_set.labels == label).nonzero()[:20, 0] for label in range(10)]).sort().values
    assert torch.equal(few.labels, train_set.labels[first])
    assert torch.equal(few.store.images, train_set.store.images[first])


def test_shapes_have_ten_classes_and_splits_of_their_own(train_set):
    assert len(train_set) == 5000 and len(train_set.classes) == 10
    assert torch.bincount(train_set.labels).tolist() == [500] * 10
    assert not torch.equal(train_set.store.images[:1000], shapes("test").store.images)


def test_no_single_pixel_gives_a_shape_away(train_set):
    pixels = train_set.store.images.permute(0, 2, 3, 1).reshape(len(train_set), -1).float()
    means = torch.stack([pixels[train_set.labels == label].mean(0) for label in range(10)])
    assert (means - pixels.mean(0)).abs().max() < 0.5 * pixels.std()
    guesses = torch.stack([(pixels - mean).square().sum(1) for mean in means], 1).argmin(1)
    assert (guesses == train_set.labels).float().mean() < 0.25

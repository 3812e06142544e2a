"""Batches: their order, pictures, labels and shards; sets that share a store; normalisation."""

import pytest
import torch

from quick.data.augment import Augment
from quick.data.batching import batch_slices
from quick.data.pictures import Pictures, denormalize, evaluation_batch, histogram, normalize, statistics
from quick.data.shapes import shapes
from quick.data.stores import InMemory
from quick.errors import LimitError
from quick.processes import Group


def numbered(count: int, side: int = 8, classes: int = 2) -> Pictures:
    """Pictures whose pixels tell their number."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, 3, side, side)
    labels = torch.arange(count) % classes
    return Pictures(InMemory(images.contiguous()), labels, [f"class {k}" for k in range(classes)], "train")


def numbers(batches) -> list[int]:
    """The numbers of the pictures in all batches of `numbered`, in their order."""
    return [round(255 * float(image[0, 0, 0])) for batch in batches for image in batch.images]


@pytest.fixture(scope="module")
def train_set() -> Pictures:
    return shapes("train", 300)


# ---- batches ----


def test_every_picture_comes_once_an_epoch():
    for count, batch_size in ((10, 4), (9, 4), (8, 4), (3, 4), (1, 4), (5, 1)):
        pictures = numbered(count)
        batches = list(pictures.batches(batch_size, shuffle=True))
        assert sorted(numbers(batches)) == list(range(count))
        assert len(batches) == len(batch_slices(len(pictures), batch_size))
        assert 1 in (count, batch_size) or min(len(batch.labels) for batch in batches) > 1
        assert batch_size > 1 or len(batches) == count


def test_batches_are_normalised_floats_with_their_labels():
    batch = next(numbered(6).batches(6))
    assert batch.images.dtype == torch.float32 and batch.images.shape == (6, 3, 8, 8)
    assert batch.labels.dtype == batch.indices.dtype == torch.int64
    assert batch.labels.tolist() == [0, 1, 0, 1, 0, 1] and batch.indices.tolist() == list(range(6))
    assert (batch.size, batch.pieces) == (6, [6])
    assert torch.allclose(batch.images[3], torch.full((3, 8, 8), 3 / 255))


def test_a_batch_knows_its_pictures():
    pictures = numbered(50)
    for batch in pictures.batches(7, shuffle=True, epoch=3):
        assert batch.indices.tolist() == numbers([batch])
        assert torch.equal(batch.labels, pictures.labels[batch.indices])
        assert batch.size == len(batch.labels) == sum(batch.pieces)


def test_the_order_depends_on_seed_and_epoch_alone():
    pictures = numbered(50)

    def order(**options: int) -> list[int]:
        return numbers(pictures.batches(7, shuffle=True, **options))

    assert order(seed=0, epoch=1) == order(seed=0, epoch=1)
    assert order(seed=0, epoch=1) != order(seed=0, epoch=2)
    assert order(seed=0, epoch=1) != order(seed=1, epoch=1) != order(seed=0, epoch=2)
    assert numbers(pictures.batches(7)) == list(range(50))
    assert order(seed=0, epoch=1) == pictures.order(shuffle=True, seed=0, epoch=1).tolist()


def test_skipped_batches_leave_the_others_as_they_are(train_set):
    options = {"shuffle": True, "augment": Augment(flip=True, crop=2), "epoch": 4}
    whole = list(train_set.batches(32, **options))
    rest = list(train_set.batches(32, **options, skip=3))
    assert len(rest) == len(whole) - 3 and list(train_set.batches(32, **options, skip=len(whole))) == []
    for batch, same in zip(whole[3:], rest, strict=True):
        assert torch.equal(batch.images, same.images) and torch.equal(batch.indices, same.indices)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("change", [{"crop": 2, "cutout": 8}, {"rotate": 30, "flip_vertical": True}])
def test_shards_are_parts_of_the_batch_of_a_process_alone(train_set, pieces, change):
    options = {"shuffle": True, "augment": Augment(flip=True, **change), "epoch": 2}
    alone = train_set.batches(50, **options, pieces=pieces)
    shards = [train_set.batches(50, **options, pieces=pieces, group=Group(rank=rank, size=3)) for rank in range(3)]
    for batch, *parts in zip(alone, *shards, strict=True):
        assert [part.size for part in parts] == [batch.size] * 3 == [50] * 3
        assert all(len(part.pieces) == pieces and sum(part.pieces) == len(part.labels) for part in parts)
        split = [zip(part.images.split(part.pieces), part.indices.split(part.pieces), strict=True) for part in parts]
        images, indices = zip(*(pair for of_piece in zip(*split, strict=True) for pair in of_piece), strict=True)
        assert torch.equal(torch.cat(indices), batch.indices) and torch.equal(torch.cat(images), batch.images)


def test_a_process_may_get_no_pictures_of_a_batch():
    group, augment = Group(rank=1, size=2), Augment(flip=True, jitter=0.3, resized_crop=0.5)
    sizes = [len(batch.labels) for batch in numbered(15).batches(4, group=group, augment=augment)]
    assert sizes == [2, 2, 2, 0]
    [batch] = numbered(3).batches(4, group=group, augment=augment)
    assert (len(batch.images), len(batch.indices), batch.size, batch.pieces) == (0, 0, 3, [0])


def test_evaluation_sees_each_picture_once_over_all_processes(train_set):
    [batch] = shapes("test", 3).evaluation_batches()
    assert batch.indices.tolist() == [0, 1, 2]
    sets = [list(train_set.evaluation_batches(Group(rank=rank, size=2))) for rank in range(2)]
    assert [[len(batch.labels) for batch in batches] for batches in sets] == [[150], [150]]
    indices = torch.cat([batch.indices for batches in sets for batch in batches])
    assert sorted(indices.tolist()) == list(range(300))


def test_evaluation_takes_fewer_large_pictures_at_a_time():
    expected = {"cpu": [250, 250, 20, 1], "cuda": [2000, 2000, 83, 1]}
    for device, batches in expected.items():
        assert [evaluation_batch(side, torch.device(device)) for side in (8, 32, 224, 4096)] == batches


def test_only_what_is_kept_comes_in_an_epoch():
    pictures = shapes("train", 100)
    keep = torch.arange(100) % 3 == 0
    order = pictures.order(shuffle=True, epoch=1, keep=keep)
    assert sorted(order.tolist()) == list(range(0, 100, 3))
    batches = list(pictures.batches(10, shuffle=True, epoch=1, keep=keep))
    assert [len(batch.labels) for batch in batches] == [10, 10, 10, 4]
    assert torch.equal(torch.cat([batch.labels for batch in batches]), pictures.labels[order])


# ---- augmented batches ----


def test_mirrored_pictures_take_turns(train_set):
    plain = next(train_set.batches(300)).images
    mirrored = []
    for epoch in range(4):
        images = next(train_set.batches(300, augment=Augment(flip=True), epoch=epoch)).images
        mirrored.append((images == plain.flip(3)).flatten(1).all(1))
        assert torch.equal(images[~mirrored[-1]], plain[~mirrored[-1]])
    assert 100 < mirrored[0].sum() < 200
    assert torch.equal(mirrored[0], mirrored[2]) and torch.equal(mirrored[0] ^ mirrored[1], torch.ones(300).bool())
    # It depends on the picture, not on its place in the epoch.
    images = next(train_set.batches(300, shuffle=True, augment=Augment(flip=True), epoch=1)).images
    order = train_set.order(shuffle=True, seed=0, epoch=1)
    assert torch.equal((images == plain[order].flip(3)).flatten(1).all(1), mirrored[1][order])


def test_batches_are_the_same_however_many_are_made_ready_at_once(monkeypatch):
    pictures, augment = shapes("train", 205), Augment(flip=True, crop=2, cutout=8, jitter=0.3, rotate=20)
    found = []
    for ahead in (0, 100, 1000):
        monkeypatch.setattr(InMemory, "ahead", ahead * 32**2)
        found.append(list(pictures.batches(20, shuffle=True, augment=augment)))
    for batches in found[1:]:
        for batch, same in zip(found[0], batches, strict=True):
            assert torch.equal(batch.images, same.images) and torch.equal(batch.labels, same.labels)


def test_seeds_and_epochs_have_orders_of_their_own():
    pictures = shapes("train", 40)
    first = pictures.order(shuffle=True, seed=0, epoch=1)
    assert torch.equal(first, pictures.order(shuffle=True, seed=0, epoch=1))
    for seed, epoch in ((1, 0), (1, 1), (0, 2)):
        assert not torch.equal(first, pictures.order(shuffle=True, seed=seed, epoch=epoch))


def test_augmentation_repeats_for_the_same_epoch():
    pictures = shapes("train", 40)
    augment = Augment(flip=True, crop=2, cutout=8)
    first, again, other = (next(pictures.batches(40, augment=augment, epoch=epoch)).images for epoch in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_each_picture_has_its_own_draw():
    pictures = numbered(200, side=8)
    pictures.store.images[:, :, :, 0] = 255  # a white column tells where the picture went
    images = next(pictures.batches(200, augment=Augment(flip=True, crop=2))).images
    places = (images[:, 0, 4] > 0.99).int().argmax(1)
    assert len(places.unique()) >= 4


def test_what_cutout_hides_has_the_mean_colour():
    pictures = numbered(4)
    pictures.mean, pictures.std = (0.1, 0.5, 0.9), (0.25, 0.25, 0.25)
    images = next(pictures.batches(4, augment=Augment(cutout=20))).images  # all of each picture
    assert images.abs().max() < 0.6 / 255 / 0.25


def test_settings_that_change_nothing_count_as_none(train_set):
    first, second = next(train_set.batches(20, augment=Augment())), next(train_set.batches(20))
    assert torch.equal(first.images, second.images)


def test_a_preview_shows_pictures_as_the_epoch_changes_them(train_set):
    augment = Augment(flip=True, crop=2, cutout=8)
    epoch = next(train_set.batches(300, shuffle=True, augment=augment, seed=5, epoch=2))
    chosen = torch.tensor([7, 3, 299])
    floats, images, labels = train_set.preview(chosen, augment, seed=5, epoch=2)
    places = [epoch.indices.tolist().index(index) for index in chosen.tolist()]
    assert torch.equal(floats, epoch.images[places]) and torch.equal(labels, epoch.labels[places])
    assert images.dtype == torch.uint8
    assert torch.equal(images, denormalize(floats, train_set.mean, train_set.std))
    _, images, _ = train_set.preview(chosen)
    assert torch.equal(images, train_set.store.images[chosen])


# ---- sets that share a store ----


def test_taken_pictures_keep_their_order_and_share_the_store():
    pictures = numbered(10)
    taken = pictures.take(torch.tensor([7, 2, 5]))
    assert numbers(taken.batches(3)) == [7, 2, 5] and taken.labels.tolist() == [1, 0, 1]
    assert next(taken.batches(3)).indices.tolist() == [0, 1, 2]
    again = taken.take(torch.tensor([2, 0]))
    assert numbers(again.batches(2)) == [5, 7] and again.store is pictures.store


def test_hold_out_takes_its_share_of_every_class():
    rest, held_out = numbered(40, classes=4).hold_out(0.2, seed=0)
    assert (rest.split, held_out.split) == ("train", "val")
    assert torch.bincount(held_out.labels).tolist() == [2, 2, 2, 2]
    assert sorted(numbers(rest.batches(8)) + numbers(held_out.batches(8))) == list(range(40))
    assert rest.store is held_out.store
    assert held_out.rows.tolist() == numbered(40, classes=4).hold_out(0.2, seed=0)[1].rows.tolist()
    assert held_out.rows.tolist() != numbered(40, classes=4).hold_out(0.2, seed=1)[1].rows.tolist()


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_hold_out_leaves_pictures_on_both_sides(fraction):
    with pytest.raises(LimitError, match="leaves too few on one side"):
        numbered(40, classes=4).hold_out(fraction, seed=0)


# ---- normalisation ----


def test_normalize_and_back():
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    floats = normalize(images, mean, std)
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(floats, expected.float(), atol=1e-5)
    assert torch.equal(denormalize(floats, mean, std), images)


def test_measured_mean_and_std_are_exact():
    images = torch.randint(0, 256, (7, 3, 5, 5), dtype=torch.uint8)
    mean, std = statistics(histogram(images))
    pixels = images.double().div(255).transpose(0, 1).reshape(3, -1)
    assert mean == pytest.approx(pixels.mean(1).tolist(), abs=1e-4)
    assert std == pytest.approx(pixels.std(1, correction=0).tolist(), abs=1e-4)


def test_a_set_without_contrast_has_no_zero_std():
    assert min(statistics(histogram(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)))[1]) > 0

"""Batches of an epoch, shards of processes and pieces."""

import pytest
import torch

from quick.data.batching import balanced, batch_slices, shard
from quick.errors import LimitError
from quick.processes import ALONE, Group


def test_batches_cover_an_epoch_and_leave_no_single_picture():
    for count, batch_size in ((10, 4), (9, 4), (8, 4), (3, 4), (1, 4), (5, 1), (782, 64)):
        slices = batch_slices(count, batch_size)
        assert [place for part in slices for place in range(part.start, part.stop)] == list(range(count))
        sizes = [part.stop - part.start for part in slices]
        assert max(sizes) <= batch_size + 1
        assert 1 in (count, batch_size) or min(sizes) > 1


@pytest.mark.parametrize("pieces", [1, 2, 3, 5])
@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8])
def test_shards_of_all_processes_make_up_the_batch(processes, pieces):
    for start, stop in ((0, 64), (64, 67), (10, 12), (5, 6), (3, 20), (0, 7), (10, 43)):
        groups = [Group(rank=rank, size=processes) for rank in range(processes)]
        shards = [shard(slice(start, stop), group, pieces) for group in groups]
        assert len({len(slices) for slices in shards}) == 1  # all work on the same number of pieces
        places = []
        for of_piece in zip(*shards, strict=True):
            sizes = [part.stop - part.start for part in of_piece]
            assert sizes[0] > 0 and (1 not in sizes or stop - start == 1)
            places += [place for part in of_piece for place in range(part.start, part.stop)]
        assert places == list(range(start, stop))


def test_a_process_alone_takes_the_batch_as_it_is():
    assert shard(slice(64, 128), ALONE) == [slice(64, 128)]
    assert shard(slice(64, 67), ALONE, pieces=4) == [slice(64, 67)]


def test_limited_pictures_stay_in_their_order():
    assert balanced(torch.tensor([0, 0, 0, 1, 1]), ["a", "b"], 4).tolist() == [0, 1, 3, 4]
    assert balanced(torch.tensor([2, 0, 2, 0, 2, 2]), ["a", "b", "c"], 3).tolist() == [0, 1, 2]
    assert balanced(torch.tensor([1, 0]), ["a", "b"], 9).tolist() == [0, 1]
    with pytest.raises(LimitError, match="limit 1 is below the number of classes, 2"):
        balanced(torch.tensor([0, 0, 0, 1, 1]), ["a", "b"], 1)

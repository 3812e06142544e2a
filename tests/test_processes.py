"""What the processes of a group tell each other."""

import os
from pathlib import Path

import pytest
import torch
from conftest import in_two_processes

from quick.errors import GroupError
from quick.processes import ALONE, Group


def speak(group: Group, _: Path) -> dict:
    """Use all that a group can do; returns what came out."""
    rank = group.rank
    weights = torch.full((2, 3, 2, 2), float(rank)).to(memory_format=torch.channels_last if rank else None)
    group.broadcast([weights])
    found = {
        "place": [group.rank, group.size, group.local_rank, group.local_size],
        "sum": group.all_reduce(torch.tensor([rank + 1, 10])),
        "all": group.all_gather(f"rank {rank}"),
        "rows": group.assemble(torch.tensor([[rank], [rank + 10]]), torch.tensor([rank, rank + 2]), 4),
        "first": group.from_rank0(lambda: f"rank {rank}"),
        "weights": weights,
        "delayed": [group.delayed_max(float(rank), -float(step + rank)) for step in range(3)],
    }
    group.wait()
    return found


def test_two_processes_tell_each_other_everything(processes, tmp_path):
    for rank, found in enumerate(in_two_processes(processes, speak, tmp_path)):
        assert found["place"] == [rank, 2, rank, 2]
        assert found["sum"].tolist() == [3, 20] and found["all"] == ["rank 0", "rank 1"]
        assert found["rows"].tolist() == [[0], [1], [10], [11]]
        assert found["first"] == "rank 0" and not found["weights"].any()
        assert found["delayed"] == [[0.0, 0.0], [1.0, 0.0], [1.0, -1.0]]  # those of the call before


def test_a_process_alone_talks_to_itself():
    tensor = torch.ones(3)
    assert ALONE.all_reduce(tensor) is tensor and ALONE.all_gather(5) == [5] and ALONE.from_rank0(lambda: 5) == 5
    assert ALONE.assemble(torch.tensor([[1], [2]]), torch.tensor([2, 0]), 3).tolist() == [[2], [0], [1]]
    assert ALONE.delayed_max(True, 0.5) == [True, 0.5]
    ALONE.broadcast([tensor])
    ALONE.wait()


def test_a_job_has_the_same_name_in_all_its_processes(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert ALONE.job() == ""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert ALONE.job() == "mine"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # as torchrun says without --rdzv-id
    assert str(os.getppid()) in ALONE.job()


def test_processes_that_do_not_find_each_other_say_so(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(GroupError, match=r"the 2 processes did not find each other: .*MASTER_PORT"), Group(timeout=1):
        pass

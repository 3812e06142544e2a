"""Training says it when other programs take its processor cores."""

import logging

import pytest
import torch

from quick.run import crowding
from quick.run.crowding import Crowding


@pytest.fixture
def machine(monkeypatch):
    """Seconds and interruptions of this process, to be set by a test."""
    state = {"seconds": 100.0, "interruptions": 5000, "threads": 2}
    monkeypatch.setattr(crowding.time, "perf_counter", lambda: state["seconds"])
    monkeypatch.setattr(crowding, "times_interrupted", lambda: state["interruptions"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: state["threads"])
    monkeypatch.setattr(crowding.sys, "platform", "linux")
    return state


def looks(found: Crowding, machine: dict, rates: list[int]) -> None:
    """Look after every five seconds, in which so many interruptions a second came."""
    for rate in rates:
        machine["seconds"] += 5
        machine["interruptions"] += 5 * rate
        found.tell()


def test_much_interrupted_training_says_so_once(machine, caplog):
    caplog.set_level(logging.INFO)
    found = Crowding(torch.device("cpu"))
    looks(found, machine, [5, 40, 10])
    assert not caplog.messages
    looks(found, machine, [300, 300])
    [line] = caplog.messages
    assert "other programs compute on the same cores" in line and "OMP_NUM_THREADS=1 in front" in line


@pytest.mark.parametrize(("device", "threads"), [("cpu", 1), ("cuda", 2)])
def test_where_threads_do_not_wait_for_each_other_nothing_is_said(device, threads, machine, caplog):
    caplog.set_level(logging.INFO)
    machine["threads"] = threads
    looks(Crowding(torch.device(device)), machine, [300, 300])
    assert not caplog.messages


def test_short_looks_are_not_judged(machine, caplog):
    caplog.set_level(logging.INFO)
    found = Crowding(torch.device("cpu"))
    machine["seconds"] += 0.1
    machine["interruptions"] += 100
    found.tell()
    assert not caplog.messages

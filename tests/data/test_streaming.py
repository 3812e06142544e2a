"""How much memory and how many cores there are for reading pictures, in a container too."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import datasets
from quick.data import streaming
from quick.data.decoding import Files
from quick.data.sizing import Sizing
from quick.data.streaming import Budget, cores, decoder, free_memory

CPU = torch.device("cpu")


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """The root of a machine with eight cores, of whose memory 1,000 kB are available."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return write(tmp_path, {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    1000 kB\n"})


CONTAINERS = {
    "none": ({}, 1000 * 1024, 8),
    "v2 without limits": (
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "max\n",
            "sys/fs/cgroup/memory.current": "5\n",
            "sys/fs/cgroup/cpu.max": "max 100000\n",
        },
        1000 * 1024,
        8,
    ),
    "v2": (
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "500000\n",
            "sys/fs/cgroup/memory.current": "300000\n",
            "sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 100000\nactive_file 7\n",
            "sys/fs/cgroup/cpu.max": "150000 100000\n",
        },
        300_000,
        2,
    ),
    "v2, limits of a group outside": (
        {
            "proc/self/cgroup": "0::/pods/mine/inner\n",
            "sys/fs/cgroup/pods/mine/memory.max": "500000\n",
            "sys/fs/cgroup/pods/mine/memory.current": "600000\n",
            "sys/fs/cgroup/pods/mine/inner/memory.max": "max\n",
            "sys/fs/cgroup/pods/mine/inner/memory.current": "6\n",
            "sys/fs/cgroup/pods/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/pods/mine/cpu.max": "max 100000\n",
        },
        0,
        3,
    ),
    "v1, whose name outside is not seen inside": (
        {
            "proc/self/cgroup": "9:name=systemd:/a\n4:memory:/docker/1a2b\n2:cpu,cpuacct:/docker/1a2b\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "500000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "100000\n",
            "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 50000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        450_000,
        4,
    ),
    "v1 without limits": (
        {
            "proc/self/cgroup": "4:memory:/\n1:cpu:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        1000 * 1024,
        8,
    ),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_a_container_may_use_counts(container, machine):
    files, memory, count = CONTAINERS[container]
    write(machine, files)
    assert free_memory(CPU, machine) == memory and cores(machine) == count


def test_the_cores_that_a_process_is_bound_to_count(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert cores(machine) == 1


def test_some_memory_is_free_on_every_system(tmp_path):
    assert free_memory(CPU) > 0 and free_memory(CPU, tmp_path) > 2**20 and cores() >= 1


def test_all_sets_together_take_no_more_than_their_share(colour_folder, monkeypatch):
    size = 32 * 32 * 3
    monkeypatch.setattr(streaming, "free_memory", lambda device: 2 * 70 * size)  # 60 training and 18 test pictures
    train_set, test_set = datasets.load(str(colour_folder), memory_share=0.5, workers=0)
    assert (train_set.store.nbytes, test_set.store.nbytes) == (60 * size, 0)
    train_set, test_set = datasets.load(str(colour_folder), memory_share=0.6, workers=0)
    assert (train_set.store.nbytes, test_set.store.nbytes) == (60 * size, 18 * size)


def test_pictures_on_another_device_are_in_the_machine_one_set_after_the_other(monkeypatch):
    free = {"cuda": 100, "cpu": 60}
    monkeypatch.setattr(streaming, "free_memory", lambda device: free[device.type])
    budget = Budget(torch.device("cuda"), 1.0)
    assert [budget.take(size) for size in (61, 60, 41, 40, 1)] == [False, True, False, True, False]


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="a signal that Windows has not")
def test_the_end_of_a_worker_interrupts_nothing(colour_folder):
    """PyTorch's handler would raise an error anywhere, also in the decoding of a picture, which then looks bad."""
    paths = np.array([os.fsencode(path) for path in sorted(colour_folder.glob("train/red/*"))])
    batches = iter(decoder(Files(paths, Sizing(8), 8), [[0], [1]], workers=1, device=CPU))
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL and len([*batches]) == 2


@pytest.mark.expensive
def test_a_program_that_streams_ends(colour_folder):
    """Ours end their workers themselves; a notebook or another program does not know of them."""
    code = f"""
import datasets
train_set, _ = datasets.load({str(colour_folder)!r}, memory_share=0, workers=2)
for batch in train_set.batches(4):
    pass
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

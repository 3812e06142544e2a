"""Worker processes that decode picture files, and how much memory and how many cores there are for it."""

import contextlib
import math
import multiprocessing.util
import os
import re
import signal
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from quick.data.decoding import Decoded, Files
from quick.data.sizing import Sizing
from quick.errors import DataError
from quick.processes import ALONE, Group

BATCH = 250  # pictures to classify that are in memory at a time
LARGEST_INPUT = 2**30  # bytes of a picture on standard input
MANY = 2000  # files to classify; from here on it pays to start processes that read them


class Loader(torch.utils.data.DataLoader):
    """A DataLoader that notices a killed worker where its batch is waited for, within 5 seconds.

    PyTorch's own signal handler would raise the error wherever this process is: in the decoding of a picture, which
    would be called a bad one, or in what ends the script.
    """

    def __iter__(self) -> Iterator[Decoded]:
        LOADERS.add(self)
        if not hasattr(signal, "SIGCHLD"):  # Windows
            return super().__iter__()
        before = signal.getsignal(signal.SIGCHLD)
        batches = super().__iter__()
        if signal.getsignal(signal.SIGCHLD) != before:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        return batches


LOADERS = weakref.WeakSet()  # that may have workers


def kill_workers() -> None:
    """End the workers at the end of this process, whether it is one of our scripts, a notebook or a program of yours.

    They leave a first SIGTERM to it, so that Python, which sends one then, would wait for ever.
    """
    for loader in LOADERS:
        for worker in getattr(loader._iterator, "_workers", ()):
            worker.kill()


multiprocessing.util.Finalize(None, kill_workers, exitpriority=1)  # before Python ends them; atexit may come too late


def decoder(files: Files, batches: Iterable[list[int]], workers: int, device: torch.device) -> Loader:
    """A loader that decodes one batch of rows of `files` after the other, in `workers` processes (0: in this one)."""
    return Loader(
        files,
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own, so that the network's random stream is the same without it
    )


def decode_files(names: Sequence[str], sizing: Sizing, group: Group = ALONE) -> Iterator[tuple[list[str], Decoded]]:
    """Names and the pictures read from these files, some at a time and in order; `-` is standard input.

    Processes of their own read many files, if there are cores that the network leaves them: on two cores they would
    only be in each other's way.
    """
    free = cores() // group.local_size - 2
    workers = free if len(names) >= MANY and "-" not in names and free >= 2 else 0
    # What workers hand over must fit into 64 MB of shared memory (Docker's default).
    size = max(1, min(BATCH, 2**23 // (sizing.side**2 * max(1, workers))))
    batches = [list(range(start, min(start + size, len(names)))) for start in range(0, len(names), size)]
    paths = [os.fsencode(name) for name in names]
    with contextlib.ExitStack() as stack:
        if "-" in names:
            file = Path(stack.enter_context(tempfile.TemporaryDirectory()), "standard input")
            content = sys.stdin.buffer.read(LARGEST_INPUT + 1) if sys.stdin else b""
            if len(content) > LARGEST_INPUT:
                raise DataError(f"-: standard input has more than {LARGEST_INPUT >> 20:,} MiB, which is no picture")
            file.write_bytes(content)
            paths = [os.fsencode(file) if path == b"-" else path for path in paths]
        files = Files(np.array(paths), sizing, sizing.side)
        for batch, decoded in zip(batches, decoder(files, batches, workers, torch.device("cpu")), strict=True):
            yield [names[index] for index in batch], decoded


def leave_signals_to_parent(_: int) -> None:
    """In a worker: leave signals to all processes (Ctrl-C, a closed terminal, SIGTERM) to the one that it works for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def cores(root: Path = Path("/")) -> int:
    """How many processor cores this process may use: those that it is bound to, or fewer where its container has less.

    `root` is where the system's files are.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in control_groups(root, "cpu"):
        times = numbers(folder / "cpu.max")  # quota and period in microseconds; cgroup v2
        times = times or [*numbers(folder / "cpu.cfs_quota_us"), *numbers(folder / "cpu.cfs_period_us")]  # v1
        if len(times) == 2 and min(times) > 0:  # else there is no quota
            count = min(count, math.ceil(times[0] / times[1]))
    return count


def free_memory(device: torch.device, root: Path = Path("/")) -> int:
    """How many bytes are free: on the device, or for the CPU in this machine, or in its container if that has less.

    `root` is where the system's files are.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: half of what is built in, or a modest guess
        pages = getattr(os, "sysconf", lambda _: 0)
        free = pages("SC_PHYS_PAGES") * pages("SC_PAGE_SIZE") // 2 or 4 * 2**30
    for folder in control_groups(root, "memory"):
        limit = numbers(folder / "memory.max") or numbers(folder / "memory.limit_in_bytes")  # cgroup v2, v1
        used = numbers(folder / "memory.current") or numbers(folder / "memory.usage_in_bytes")
        if limit and used:
            with contextlib.suppress(OSError):  # copies of files, which the system gives up before it kills anyone
                caches = re.findall(r"inactive_file (\d+)", (folder / "memory.stat").read_text())
                used[0] -= max(map(int, caches), default=0)
            free = min(free, limit[0] - used[0])
    return max(0, free)


def control_groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of Linux's control groups (cgroup v2 or v1) that this process is in, from its own to the outermost.

    A container may see its own group as the outermost, under whatever name it has outside.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:  # such as 0::/user.slice or 4:memory:/docker/1a2b
        _, controllers, path = line.split(":", 2)
        if controllers in ("", controller) or controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / (controller if controllers else "")
            group = mount / path.lstrip("/")
            inside = (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))
            yield from filter(Path.is_dir, inside)


def numbers(path: Path) -> list[int]:
    """The numbers in a small file of the system's; none where it has none, or is not there."""
    try:
        return [int(word) for word in path.read_text().split() if word.lstrip("-").isdecimal()]
    except OSError:
        return []


class Budget:
    """How many bytes the pictures of all sets together may take in this process: a `share` of what is free now.

    Pictures are collected in the machine's memory before they move to the device.
    """

    def __init__(self, device: torch.device, share: float, group: Group = ALONE):
        self.device, self.group = device, group
        self.on_device, self.in_machine = (share * free_memory(place) for place in (device, torch.device("cpu")))

    def take(self, size: int) -> bool:
        """Whether so many bytes are still left in all processes of the group; if so, they are taken."""
        on_machine = size * self.group.local_size
        fits = all(self.group.all_gather(size <= self.on_device and on_machine <= self.in_machine))
        if fits:
            self.on_device -= size
            self.in_machine -= 0 if self.device.type == "cuda" else on_machine  # others share the machine's
        return fits

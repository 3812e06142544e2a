"""Worker processes that decode picture files, and how much memory and how many cores there are for it."""

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from quick.data.decoding import Decoded, Files, Sizing
from quick.processes import ALONE, Group

BATCH = 250  # pictures to classify that are in memory at a time
MANY = 2000  # files to classify; from here on it pays to start processes that read them


def decoder(
    files: Files, batches: Iterable[list[int]], workers: int, device: torch.device
) -> "torch.utils.data.DataLoader[Decoded]":
    """A loader that decodes one batch of rows of `files` after the other, in `workers` processes (0: in this one)."""
    return torch.utils.data.DataLoader(
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
            file.write_bytes(sys.stdin.buffer.read() if sys.stdin else b"")
            paths = [os.fsencode(file) if path == b"-" else path for path in paths]
        files = Files(np.array(paths), sizing, sizing.side)
        for batch, decoded in zip(batches, decoder(files, batches, workers, torch.device("cpu")), strict=True):
            yield [names[index] for index in batch], decoded


def leave_signals_to_parent(_: int) -> None:
    """In a worker: leave Ctrl-C, and a SIGTERM to all processes, to the process that it works for, which ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(device: torch.device) -> int:
    """How many bytes are free: on the device, or for the CPU in this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: half of what is built in, or a modest guess
        pages = getattr(os, "sysconf", lambda _: 0)
        return pages("SC_PHYS_PAGES") * pages("SC_PAGE_SIZE") // 2 or 4 * 2**30

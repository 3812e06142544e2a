"""What several tests need of whole runs: to start, stop and resume them, and to compare what they leave."""

import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train

# 20 steps an epoch.
SMALL = "--data shapes --limit 200 --image-size 8 --batch-size 10 --epochs 3 --device cpu --precision fp32 --no-views"
VARIANTS = {
    "plain": "--hardest 0.5 --schedule cosine",
    "held out": "--val-fraction 0.2 --optimizer muon --balance 1",
    "photographs": "--jitter 0.3 --resized-crop 0.5 --rotate 20 --cutout 4 --no-whiten --best f1",
}
STILL = ["--lr", "1e-30", "--no-batch-norm"]  # all epochs are equally good
TIMES = {"epoch_seconds", "images_per_second"}  # what no run repeats


def start(logs: Path, name: str, *flags: str) -> int:
    """Start a small run; returns the exit status."""
    return train.cli([*SMALL.split(), "--log-dir", str(logs), "--run-name", name, *flags])


def resume(logs: Path, *flags: str) -> int:
    """Resume a run of these logs; returns the exit status."""
    return train.cli(["--resume", *flags, "--log-dir", str(logs)])


@functools.cache
def uninterrupted(variant: str) -> dict:
    """The contents of a run that nothing interrupted."""
    with tempfile.TemporaryDirectory() as logs:
        assert start(Path(logs), "run", *VARIANTS[variant].split()) == 0
        return contents(Path(logs, "run"))


def contents(run: Path) -> dict:
    """All that a finished run leaves, with TensorBoard's curves, but not its folder and its time limit."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {path.name: torch.load(path, weights_only=True) for path in run.glob("*.pt")}
    for checkpoint in found.values():
        for name in ("log_dir", "time_limit"):
            del checkpoint["config"][name]
    found["metrics"] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = set(events.Tags()["scalars"]) - {"memory_mib", *TIMES}
    return found | {tag: [[event.step, event.value] for event in events.Scalars(tag)] for tag in sorted(tags)}


def differences(first: object, second: object, place: str = "") -> list[str]:
    """Where the contents of two runs differ, except in the time they took."""
    if isinstance(first, torch.Tensor):  # metrics that an epoch does not have are NaN
        same = torch.equal(first.isnan(), second.isnan()) and torch.equal(first.nan_to_num(), second.nan_to_num())
        return [] if first.dtype == second.dtype and same else [place]
    if isinstance(first, dict) and first.keys() == second.keys():
        keys = [key for key in first if key not in TIMES]
        return [found for key in keys for found in differences(first[key], second[key], f"{place}.{key}")]
    if isinstance(first, list) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return [found for number, pair in pairs for found in differences(*pair, f"{place}.{number}")]
    return [] if first == second else [place]


def at_steps(patch: pytest.MonkeyPatch, plan: dict[int, Callable[[], object]]) -> None:
    """Call something at the beginning of training steps, which are counted over all runs of a test."""
    counts, step = [], train.train_step

    def counted(*inputs):
        counts.append(None)
        if len(counts) in plan:
            plan[len(counts)]()
        return step(*inputs)

    patch.setattr(train, "train_step", counted)


def send(*signals: int) -> Callable[[], None]:
    """A function that sends this process signals."""

    def call() -> None:
        for number in signals:
            os.kill(os.getpid(), number)

    return call

"""The files in the folder of a run: what they are called, and which of them are there."""

import contextlib
import re
from pathlib import Path

INTERRUPTED = "interrupted.pt"  # the checkpoint in the middle of an epoch
LOCK = "run.lock"


def epoch_file(epoch: int) -> str:
    return f"epoch_{epoch:03}.pt"


def epoch_files(folder: Path) -> dict[int, Path]:
    """The checkpoints of epochs in a folder of a run, by epoch."""
    return {epoch: path for path in folder.glob("epoch_*.pt") if (epoch := epoch_of(path.name))}


def epoch_of(name: str, otherwise: int = 0) -> int:
    """The epoch of which a file of this name is the checkpoint; `otherwise` for other files."""
    found = re.fullmatch(r"epoch_([0-9]{3,})\.pt", name)
    return int(found[1]) if found else otherwise


def job_line(job: str) -> str:
    """The first line of config.toml, by which processes that torchrun starts again find their run."""
    return f"# torchrun {job}\n" if job else ""


def is_empty(folder: Path) -> bool:
    """Whether nothing is in it but a lock, which a process leaves that is killed before it writes anything."""
    return {path.name for path in folder.iterdir()} <= {LOCK}


def remove(path: Path) -> None:
    """Remove a file, if it is there and nobody (a virus scanner, on Windows) has it open."""
    with contextlib.suppress(OSError):
        path.unlink()

"""Whether other programs compute on the processor cores that training uses."""

import multiprocessing
import sys
import time

import torch

from quick.cli import log

AT_MOST = 60  # times a second that the system takes a core away from this process: alone about 20, beside others 140
LEAST_SECONDS = 4  # between two looks


class Crowding:
    """Says once that other programs slow training down, by far more than the time that they take.

    The threads of a step wait for each other, so that one that has lost its core holds up all others, which use theirs
    only to wait. It looks at training on a Linux CPU with several threads alone.
    """

    def __init__(self, device: torch.device):
        self.is_told = device.type != "cpu" or torch.get_num_threads() == 1 or sys.platform != "linux"
        self.time, self.losses = time.perf_counter(), times_interrupted()

    def tell(self) -> None:
        """Look at what happened since the last look, and say it if it is much."""
        seconds = time.perf_counter() - self.time
        if self.is_told or seconds < LEAST_SECONDS or multiprocessing.active_children():  # they decode for us
            return
        losses = times_interrupted() - self.losses
        self.time, self.losses = self.time + seconds, self.losses + losses
        if losses > AT_MOST * seconds:
            self.is_told = True
            log.info(
                f"other programs compute on the same cores, which can slow {torch.get_num_threads()} threads down "
                "several times: end them, or start again with OMP_NUM_THREADS=1 in front of the command"
            )


def times_interrupted() -> int:
    """How often the system took a core away from a thread of this process; 0 where it does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw

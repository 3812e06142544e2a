"""Ctrl-C, SIGTERM, a closed terminal and the time limit: when a run shall stop, which all of its processes agree on."""

import contextlib
import os
import signal
import stat
import sys
import threading
import time
from pathlib import Path

from quick.errors import Interrupted
from quick.processes import Group

VOTE_SECONDS = 0.5  # between two votes of several processes
ECHO_SECONDS = 5  # under torchrun, a second signal within this time is the first one once more
SIGHUP = getattr(signal, "SIGHUP", None)  # Windows has none


class StopVote:
    """Whether the run should stop here; asked after each step, and before each batch of an evaluation.

    Inside of `with stop:` Ctrl-C, SIGTERM and SIGHUP, which comes when a terminal is closed or its connection is lost,
    are wishes to stop, and a second one, but SIGHUP, ends the program at once. Where SIGHUP is ignored, as nohup has
    it, it stays so. The time limit (`minutes` after `start`, which is a time.perf_counter()) is a wish too. The
    processes of a group vote about twice a second, and agree on the steps at which they vote: a vote at each step would
    take a tenth of the time of small steps.
    """

    def __init__(self, group: Group, minutes: float, start: float):
        self.group = group
        self.deadline = start + 60 * minutes if minutes else float("inf")
        self.signalled = 0.0  # when a signal came to this process; 0: none did
        self.by_signal = False  # what the vote found, over all processes
        self.by_time = False
        self.steps, self.next_vote = 0, 1
        self.trains = False  # whether a step has been done
        self.last_vote = (0, 0.0)  # step and time

    def __enter__(self) -> "StopVote":
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python delivers no signals
            numbers = [signal.SIGINT, signal.SIGTERM]
            if SIGHUP and signal.getsignal(SIGHUP) != signal.SIG_IGN:
                numbers.append(SIGHUP)
            self.handlers = {number: signal.signal(number, self.on_signal) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def on_signal(self, number: int, _: object) -> None:
        if number == SIGHUP:
            leave_terminal()
        if self.signalled:
            # A closed terminal often sends SIGHUP twice, by the shell and by the system; and torchrun sends a signal on
            # to processes that have got it already.
            if number == SIGHUP or ("RANK" in os.environ and time.monotonic() < self.signalled + ECHO_SECONDS):
                return
            raise KeyboardInterrupt
        self.signalled = time.monotonic()
        if self.group.rank == 0:
            # Not print(), in the middle of which the signal may have come; tee may have ended by the same Ctrl-C.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this step, with a checkpoint (once more: at once, without)\n")

    def asked(self) -> bool:
        """Whether to stop after this step, in all processes; each of them must ask equally often."""
        self.trains = True
        return self.vote()

    def check(self) -> None:
        """Raise Interrupted if the run should stop in the middle of this evaluation.

        The time limit counts only after a step: else a run whose evaluation takes longer than its limit would begin it
        again each time that it is resumed, and never get on.
        """
        if self.vote():
            raise Interrupted

    def vote(self) -> bool:
        self.steps += 1
        if self.by_signal or self.by_time:
            return True
        if self.steps < self.next_vote:
            return False
        (step, then), now = self.last_vote, time.perf_counter()
        self.last_vote = (self.steps, now)
        pause = VOTE_SECONDS * (self.steps - step) / max(1e-9, now - then)  # steps until the next vote
        is_over = self.trains and now > self.deadline
        by_signal, by_time, pause = self.group.delayed_max(bool(self.signalled), is_over, pause)
        self.next_vote = self.steps + (max(1, int(pause)) if self.group.size > 1 else 1)
        self.by_signal, self.by_time = bool(by_signal), bool(by_time)
        return self.by_signal or self.by_time


def leave_terminal() -> None:
    """Print nothing any more where output went to a terminal: it may be gone, and to print would fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # it is closed
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(nowhere, stream)
    os.close(nowhere)


def program_start() -> float:
    """When this program was started, as a time.perf_counter(): from a slow disk, imports alone can take half a minute.

    Where it is not train.py itself but calls it, as a notebook does, that is now.
    """
    now = time.perf_counter()
    if Path(getattr(sys.modules["__main__"], "__file__", None) or "").name != "train.py":
        return now
    try:  # Linux: after how many ticks since the machine was started this process was
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        age = 0.0
    return now - max(age, time.process_time())  # elsewhere at least what the imports computed

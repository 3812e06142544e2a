"""The folder of a run: who may write to it, which files it gets, and when.

Each file is written completely or not at all. The folder keeps a checkpoint for each epoch (or the newest `keep`),
best.pt, and interrupted.pt in the middle of an epoch.

Where the disk refuses a file, training goes on and the run fails at its end. After the next epoch the file is tried
again, except for an older epoch's own checkpoint.
"""

import contextlib
import errno
import itertools
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from quick.checkpoints import FORMAT, read, to_bytes, write_file, wrong_classes
from quick.cli import log, quoted
from quick.errors import CheckpointError, ConfigError, DataError, TrainingError
from quick.nets.losses import confusion_counts, worst_pairs
from quick.processes import LOCK_SECONDS
from quick.run.config import as_toml, to_plain
from quick.run.files import INTERRUPTED, LOCK, epoch_file, epoch_files, epoch_of, is_empty, job_line, remove
from quick.run.history import History
from quick.run.manifest import PICTURES, Manifest
from quick.run.settings import Config
from quick.run.state import TrainState
from quick.views.tensorboard import NoBoard, open_board

MOST_NAMED = 6  # files in the error of a run that could not save them


class RunFolder:
    """The folder of the run that this process trains. In a group only the first process opens it and writes."""

    def __init__(self):
        self.path: Path | None = None  # until it is made or found
        self.lock: FileLock | None = None
        self.board = NoBoard()  # TensorBoard's writer
        self.header = {}  # what all checkpoints of the run have in common
        self.digests = {}  # of its sets of pictures
        self.history = History()
        self.unsaved = {}  # names of files that could not be written, and why
        self.best: memoryview | None = None  # the content of best.pt, until it is written
        self.background = ThreadPoolExecutor(1)
        self.writing: Future | None = None  # what is done there

    # ---- opening and leaving ----

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """Let other processes have the folder, and tell a failed run what it can go on from."""
        self.background.shutdown()
        self.attempt("TensorBoard's events", self.board.flush)
        if self.lock:
            remove(self.path / LOCK)  # Windows removes no open file; there the lock itself removes it
            self.lock.release()
        if isinstance(error, KeyboardInterrupt) and self.header:
            error.add_note(f"python train.py --resume {quoted(self.path)}")
        elif isinstance(error, TrainingError) and self.header and not self.unsaved:
            files = epoch_files(self.path)
            error.add_note(f"last good checkpoint: {files[max(files)] if files else 'none yet'}")
        elif isinstance(error, Exception) and self.header and (self.path / "config.toml").exists() and not self.unsaved:
            error.add_note(f"once that is mended, python train.py --resume {quoted(self.path)} goes on")

    def reopen(self, path: Path) -> None:
        """Take the folder of an earlier run; raises ConfigError while another process trains it."""
        lock = FileLock(path / LOCK)
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise ConfigError(f"--resume {path}: another process is training this run") from None
        self.path, self.lock = path, lock
        for aside in path.glob(".*.tmp"):  # of a process that was killed while it wrote
            remove(aside)

    def create(self, config: Config) -> None:
        """Make the folder of a new run. A folder with something in it is left alone. Raises OSError."""
        name = config.run_name or f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{config.model}"
        Path(config.log_dir).mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            path = Path(config.log_dir) / (name if number == 1 else f"{name}_{number}")
            path.mkdir(exist_ok=True)
            lock = FileLock(path / LOCK)
            with contextlib.suppress(Timeout):  # another run, which started in the same second, has it
                lock.acquire(timeout=0)
                if is_empty(path):
                    self.path, self.lock = path, lock
                    return
                lock.release()
            if config.run_name:
                raise FileExistsError(errno.EEXIST, "another run has this folder", str(path))

    def open(
        self, config: Config, options: dict, classes: list[str], state: TrainState, manifest: Manifest, job: str
    ) -> None:
        """Open all that is written into the folder, which is made for a new run; raises OSError.

        `options` are the network's, `manifest` tells its pictures, and `job` is torchrun's name for the run.
        """
        if error := wrong_classes(classes):  # which no checkpoint could be read with
            raise DataError(f"{config.data}: {error}")
        is_new = self.path is None
        if is_new:
            self.create(config)
        self.header = {
            "format": FORMAT,
            "model": {"name": config.model, "options": options},
            "classes": classes,
            "image_size": config.image_size,
            "resize": config.resize,
            "interpolation": config.interpolation,
            "fit": config.fit,
            "mean": list(config.mean),
            "std": list(config.std),
            "levels": list(config.levels) or None,
            "config": to_plain(config),
        }
        self.history, self.digests = state.history, manifest.digests
        if manifest.table:
            write_file(self.path / PICTURES, manifest.table)
        write_file(self.path / "config.toml", (job_line(job) + as_toml(config)).encode())
        if is_new:
            self.board = open_board(self.path)
            return
        # Curves of steps that are done again are hidden.
        self.board = open_board(self.path, purge_step=state.step + 1 if state.step else 0)
        self.rebuild_best(state.history)
        write_file(self.path / "metrics.jsonl", state.history.as_jsonl())

    # ---- saving ----

    def save_epoch(self, state: TrainState, *, is_best: bool, keep: int, line: str) -> None:
        """Write what a finished epoch leaves, then print its `line`; the large files in the background.

        The epoch's own checkpoint is written last: if the process is killed before that, the resumed run repeats the
        epoch. best.pt is without what only resuming needs.
        """
        self.finish_writing()
        self.attempt("TensorBoard's events", self.board.flush)
        self.attempt("metrics.jsonl", lambda: write_file(self.path / "metrics.jsonl", state.history.as_jsonl()))
        if is_best:
            self.best = to_bytes(self.checkpoint_of(state))
        content, epoch = to_bytes(self.checkpoint_of(state, training=True)), len(state.history)
        self.writing = self.background.submit(self.write_epoch, content, epoch, keep, line)

    def write_epoch(self, content: memoryview, epoch: int, keep: int, line: str) -> None:
        """The part of save_epoch for the background: other processes need not wait for the disk."""
        from tqdm import tqdm

        self.save_best()
        if self.save(epoch_file(epoch), content):
            remove(self.path / INTERRUPTED)
            if keep and not self.best:  # an older checkpoint may be needed to build best.pt
                for old, path in epoch_files(self.path).items():
                    if old <= epoch - keep:
                        remove(path)
                self.unsaved = {name: why for name, why in self.unsaved.items() if epoch_of(name, epoch) > epoch - keep}
        if sys.stdout:  # else it is closed
            try:
                tqdm.write(line)  # above the bar of the epoch in progress
                sys.stdout.flush()
            except OSError as error:
                if error.errno != errno.EIO:  # a terminal that was closed; then SIGHUP follows
                    raise

    def save_interrupted(self, state: TrainState) -> None:
        """Save a run in the middle of an epoch, and print how to go on."""
        with contextlib.suppress(BrokenPipeError):  # the reader of the output may have ended by the same Ctrl-C
            self.finish_writing()
        self.save_best()
        saved = self.save(INTERRUPTED, to_bytes(self.checkpoint_of(state, training=True)))
        totals = state.totals
        where = "after its steps" if totals.step == totals.steps else f"step {totals.step}"
        how = "from there, to the same result" if saved else "from the checkpoint before"
        with contextlib.suppress(OSError):
            log.warning(f"train.py: interrupted in epoch {state.epoch}, {where}; this goes on {how}:")
            print(f"python train.py --resume {quoted(self.path)}", flush=True)

    def load_best(self, state: TrainState) -> dict | None:
        """Give the network the weights of the best epoch, in all processes; returns best.pt in the first one."""
        checkpoint = None
        if state.group.rank == 0:
            checkpoint = read(self.path / "best.pt")
            state.network.load_state_dict(checkpoint["state_dict"])
        state.group.broadcast(state.network.state_dict().values())
        return checkpoint

    def save_tested(
        self, state: TrainState, checkpoint: dict | None, metrics: dict, answers: tuple[Tensor, Tensor]
    ) -> None:
        """Add the test of the best epoch to the history, and in the first process to all that shows or saves it.

        `answers` are class probabilities `(N, classes)` and labels `(N,)` of the test set, `checkpoint` is best.pt. A
        run that is killed before the last epoch's checkpoint is written tests again; metrics.jsonl, which tells whether
        a run is finished, comes last.
        """
        best = state.history.best
        best |= metrics
        if state.group.rank:
            return
        state.mistakes = worst_pairs(confusion_counts(*answers), checkpoint["classes"])
        for name, value in metrics.items():
            self.board.add_scalar(f"{name.removeprefix('test_')}/test", value, best["step"])
        self.save("best.pt", to_bytes(checkpoint | {"metrics": best}))
        name = epoch_file(len(state.history))
        if name not in self.unsaved and (self.path / name).exists():
            last = read(self.path / name)
            last["training"] |= {"history": state.history.state_dict(), "mistakes": state.mistakes}
            self.save(name, to_bytes(last | {"metrics": state.history.epochs[-1]}))
        self.attempt("metrics.jsonl", lambda: write_file(self.path / "metrics.jsonl", state.history.as_jsonl()))

    def save_best(self) -> None:
        """Write best.pt, if it waits to be written."""
        if self.best and self.save("best.pt", self.best):
            self.best = None

    def save(self, name: str, content: memoryview) -> bool:
        """Write a file of the run; returns whether the disk took it."""
        return self.attempt(name, lambda: write_file(self.path / name, content))

    def attempt(self, name: str, write: Callable[[], None]) -> bool:
        """Write something; where the disk refuses, training goes on, and the run fails at its end."""
        try:
            write()
        except OSError as error:
            self.unsaved[name] = error.strerror or str(error)
            log.warning(f"train.py: {name} could not be saved ({self.unsaved[name]}); training goes on")
            return False
        self.unsaved.pop(name, None)
        return True

    def finish_writing(self) -> None:
        """Wait until the background has written everything; raises what it raised."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def check_best(self) -> None:
        """Raise TrainingError if best.pt could not be saved: a file of that name is another epoch's."""
        self.finish_writing()
        self.save_best()
        if self.path and not self.best and not (self.path / "best.pt").exists():  # somebody deleted it
            self.rebuild_best(self.history)
        if "best.pt" in self.unsaved:
            raise TrainingError(f"not saved: best.pt ({self.unsaved['best.pt']})")

    def check_saved(self) -> None:
        """Raise TrainingError when something could not be saved."""
        if names := sorted(self.unsaved, key=epoch_of):  # other files than those of epochs come first
            more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
            raise TrainingError(
                f"not saved: {', '.join(f'{name} ({self.unsaved[name]})' for name in names[:MOST_NAMED])}{more}"
            )

    def checkpoint_of(self, state: TrainState, training: bool = False) -> dict:
        """What predict.py needs of the network as it is now; with `training` also what resuming needs."""
        epochs = state.history.epochs
        now = {"state_dict": state.network.state_dict(), "epoch": len(epochs), "metrics": epochs[-1] if epochs else {}}
        return self.header | now | ({"training": state.state_dict() | {"sets": self.digests}} if training else {})

    def rebuild_best(self, history: History) -> None:
        """Build best.pt from its epoch's checkpoint, if the disk had no room for it, or it is gone."""
        epoch = history.best["epoch"] if history.epochs else 0
        try:
            held = read(self.path / "best.pt")["epoch"]
        except CheckpointError:
            held = 0
        if held == epoch:
            return
        if held > len(history) and not (self.path / epoch_file(epoch)).exists():
            return  # of an epoch that will be repeated, as the newest checkpoint is older; better than none
        try:
            checkpoint = read(self.path / epoch_file(epoch))
            without = {key: value for key, value in checkpoint.items() if key != "training"}
            self.best = to_bytes(without | {"metrics": history.best})
        except CheckpointError as error:
            log.warning(f"train.py: best.pt is not that of epoch {epoch}, and cannot be built again: {error}")
            self.unsaved["best.pt"] = f"its checkpoint, {epoch_file(epoch)}, is gone"
        self.save_best()

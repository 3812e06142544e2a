"""How a run begins: new, new from pretrained weights, resumed, or started again by torchrun."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from torch import nn

from quick.cli import flag, log, quoted
from quick.data.pictures import BUILT_IN, Pictures
from quick.errors import CheckpointError, ConfigError, DataError, reason, suggestion
from quick.processes import Group
from quick.run.checks import OTHER_VERSION, check_momentum, is_history, wrong_training
from quick.run.config import checked, read_config, resolve
from quick.run.files import INTERRUPTED, epoch_file, epoch_files, is_empty, job_line
from quick.run.folder import RunFolder
from quick.run.history import History
from quick.run.manifest import PICTURES, Manifest, make_manifest, other_pictures, taken_otherwise
from quick.run.rules import check_together
from quick.run.settings import Config
from quick.run.state import TrainState, run_steps

MOVABLE = ("data", "labels")  # by other names after they moved; the digests tell whether they are the same
KEYS = {key.name: key for key in fields(Config)}


@dataclass
class Start:
    """What a run begins with."""

    config: Config
    folder: Path | None = None  # of a resumed run
    checkpoint: dict | None = None  # of a resumed run, without its weights
    network: nn.Module | None = None  # of a resumed run, in the first process
    pretrained: dict | None = None  # the checkpoint that a new run starts from, in the first process
    job: str = ""  # torchrun's name for the run


def begin(
    run: RunFolder,
    config: Config,
    given: dict,
    resume: str | None,
    group: Group,
    *,
    load: Callable[[Path], tuple[nn.Module, dict]],
    pretrained: Callable[[str, str], dict],
    own_networks: Collection[str],
) -> Start:
    """Find out how the run begins; the first process decides for all.

    torchrun started it again: it goes on as if resumed. `--resume`: it goes on from its newest checkpoint, and the
    settings that were `given` change. `--weights`: a new run, from pretrained weights. None of these: a new run. `load`
    and `pretrained` are those of model.py. Raises ConfigError, CheckpointError, and what `pretrained` raises.
    """
    start = Start(config)
    if group.rank == 0:
        restarted = None
        if job := group.job():
            call = repr((job, config, given, resume)).encode()
            start.job = hashlib.md5(call, usedforsecurity=False).hexdigest()
            restarted = find_job(start.job, config.log_dir)
        if restarted:
            reopen(start, run, restarted, {}, load)
        elif resume is not None:
            reopen(start, run, find_run(resume, config.log_dir, given), given, load)
        else:
            check_folder(config)
        check_together(start.config, group, own_networks)
        if not start.checkpoint:
            if start.config.weights != "none":
                start.pretrained = pretrained(start.config.weights, start.config.model)
            start.config = resolve(start.config, start.pretrained)
    if group.size > 1:
        start.config, start.folder, start.checkpoint = group.from_rank0(
            lambda: (start.config, start.folder, start.checkpoint)
        )
    return start


def check_folder(config: Config) -> None:
    """Raise ConfigError where a new run could not be written, or if there is one of this name already."""
    folder = Path(config.log_dir, config.run_name)
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        what = "cannot be written to" if nearest.is_dir() else "is no folder"
        raise ConfigError(f"{flag('log_dir', config.log_dir)}: {nearest} {what}")
    if config.run_name and folder.exists() and not (folder.is_dir() and is_empty(folder)):
        hint = f"; --resume {quoted(folder)} goes on with it" if (folder / "config.toml").exists() else ""
        raise ConfigError(f"--run-name {config.run_name}: {folder} exists already{hint}")


# ---- finding a run ---------------------------------------------------------------------------------------------------


def find_run(name: str, log_dir: str, given: dict) -> Path:
    """The folder of the run of this name or path; without a name, of the newest unfinished one. Raises ConfigError."""
    folders = [path.parent for path in Path(log_dir).glob("*/config.toml")]
    if name:
        for folder in (Path(name), Path(log_dir, name)):
            if (folder / "config.toml").is_file():
                return folder
        known = suggestion(name, [folder.name for folder in folders])
        raise ConfigError(f"--resume {name}: no run there (its folder has a config.toml){known}")
    for folder in sorted(folders, key=last_written, reverse=True):
        if os.access(folder, os.W_OK) and is_unfinished(folder, given):  # not another user's
            return folder
    raise ConfigError(f"--resume: no unfinished run in {log_dir}; --resume RUN --epochs N makes a finished one longer")


def last_written(folder: Path) -> float:
    """When a run was last written to, in seconds."""
    files = [folder / name for name in ("config.toml", "metrics.jsonl", "best.pt", INTERRUPTED)]
    return max((path.stat().st_mtime for path in files if path.exists()), default=0.0)


def is_unfinished(folder: Path, given: dict) -> bool:
    """Whether the run there can go on, perhaps because of settings that are `given` now."""
    try:
        config = read_config(folder / "config.toml")
        epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    except FileNotFoundError:  # no epoch has ended
        return True
    except (ConfigError, OSError, ValueError):
        return False  # of another version, or damaged: it has to be named
    if not is_history(epochs, config.best) or (epochs and "ended" in epochs[-1]):  # the latter of an earlier version
        return False
    # A process that was killed may not have written the last epoch's checkpoint, and then does that epoch again.
    is_whole = (folder / epoch_file(len(epochs))).exists()
    ends = {name: value for name, value in given.items() if name in ("epochs", "patience")}
    history = History(epochs, by=config.best)
    return not is_whole or not history.ended_by(replace(config, **ends)) or awaits_test(folder, config, history)


def awaits_test(folder: Path, config: Config, history: History) -> bool:
    """Whether a run has chosen its best epoch on a validation set, and was killed before that was tested."""
    if history.split == "test" or "test_accuracy" in history.best:
        return False
    listed = folder / PICTURES  # of a folder of pictures, which may have no test set
    return config.data in BUILT_IN or (listed.exists() and b"\ntest," in listed.read_bytes())


def find_job(job: str, log_dir: str) -> Path | None:
    """The run that this torchrun began (or one with the same --rdzv-id and flags); None where there is none to go on.

    A restart of torchrun also goes on with a finished run, since other processes may still have to end with it.
    """
    is_restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    for path in sorted(Path(log_dir).glob("*/config.toml"), reverse=True):
        with contextlib.suppress(OSError):  # another user's, who lets nobody read it
            if path.read_bytes().startswith(job_line(job).encode()) and (is_restart or is_unfinished(path.parent, {})):
                return path.parent
    return None


# ---- going on with it ------------------------------------------------------------------------------------------------


def reopen(
    start: Start, run: RunFolder, folder: Path, given: dict, load: Callable[[Path], tuple[nn.Module, dict]]
) -> None:
    """Take the folder of an earlier run, its newest whole checkpoint, and its config with what is given now.

    Raises ConfigError while another process has the folder, and for changes that cannot be; CheckpointError for
    checkpoints that cannot be used; DataError where the folder of its pictures is gone.
    """
    run.reopen(folder)
    start.folder = folder
    start.network, checkpoint = newest_checkpoint(folder, load)
    config = read_config(folder / "config.toml")
    if checkpoint:
        start.checkpoint = {key: value for key, value in checkpoint.items() if key != "state_dict"}
        try:
            saved = Config(**checked(checkpoint["config"], called=str))
            error = wrong_training(checkpoint, saved)
        except (ConfigError, TypeError):  # it has other settings
            error = OTHER_VERSION
        if error:
            raise CheckpointError(f"{folder}: its checkpoint {error}; {new_run(folder)}")
        # Settings that can change were perhaps changed after that checkpoint was written.
        changes = {name: getattr(config, name) for name, key in KEYS.items() if key.metadata["resumable"]}
        config = replace(saved, **changes)
    if config.fit == "auto":  # of an earlier version
        config = replace(config, fit="crop")
    check_changes(config, given, folder, start.checkpoint)
    changes = {name: value for name, value in given.items() if KEYS[name].metadata["resumable"] or name in MOVABLE}
    start.config = replace(config, **changes | {"log_dir": str(folder.parent), "run_name": ""})
    if start.config.data not in BUILT_IN and not Path(start.config.data).is_dir():
        raise DataError(f"{folder}: there is no {start.config.data}; --data FOLDER names where its pictures are now")


def newest_checkpoint(
    folder: Path, load: Callable[[Path], tuple[nn.Module, dict]]
) -> tuple[nn.Module, dict] | tuple[None, None]:
    """The network and content of the newest whole checkpoint; None where no epoch has ended yet.

    Raises CheckpointError where checkpoints are there, and none can be used.
    """
    found = epoch_files(folder)
    newest = max(found, default=0)
    for path in [folder / INTERRUPTED, *(found[epoch] for epoch in sorted(found, reverse=True))]:
        if not path.exists():
            continue
        try:
            network, checkpoint = load(path)
        except CheckpointError as error:
            log.warning(f"train.py: {error}; trying the checkpoint before")
            continue
        if path.name != INTERRUPTED or checkpoint["epoch"] >= newest:  # else the epoch in progress has ended since
            return network, checkpoint
    metrics = folder / "metrics.jsonl"  # the first epoch's metrics are written before its checkpoint
    if found or (metrics.exists() and metrics.read_bytes().count(b"\n") > 1):
        raise CheckpointError(f"{folder}: none of its checkpoints can be resumed; {new_run(folder)}")
    return None, None


def new_run(folder: Path) -> str:
    """What to do where a run cannot be resumed, as the end of an error message."""
    best = folder / "best.pt"
    return f"--weights {quoted(best)} starts a new run from its weights" if best.exists() else "begin a new run"


def check_changes(config: Config, given: dict, folder: Path, checkpoint: dict | None) -> None:
    """Raise ConfigError for settings that were given and cannot change any more."""
    for name, value in given.items():
        key, had = KEYS[name], getattr(config, name)
        same = value == had or (key.metadata["auto"] and value == key.default)
        same |= (name == "run_name" and value == folder.name) or (name == "data" and value not in BUILT_IN)
        same |= name == "labels" and bool(value) == bool(had)  # both may have moved: the digests tell what they say
        if not same and not key.metadata["resumable"]:
            raise ConfigError(f"{flag(name)}: the run has {had!r}, which cannot change any more; {new_run(folder)}")
    epochs, done = given.get("epochs", config.epochs), checkpoint["epoch"] if checkpoint else 0
    if epochs < config.epochs and epochs <= done:
        raise ConfigError(f"--epochs {epochs}: the run has {done} epochs already")
    if "epochs" in given and checkpoint and "patience" not in given:
        history = History.load(checkpoint["training"]["history"], config.best)
        if epochs > done and history.ended_by(replace(config, epochs=epochs)) == "patience":
            raise ConfigError(f"--epochs {epochs}: the run was ended by --patience {config.patience}; add --patience 0")
    if config.epochs != epochs and config.hardest < 1 and checkpoint and checkpoint["training"]["totals"]:
        raise ConfigError("--epochs: --hardest pictures of an interrupted epoch depend on it; first go on without it")


def check_pictures(start: Start, config: Config, sets: Sequence[Pictures], group: Group) -> Manifest | None:
    """The manifest of these sets, in the first process; raises DataError where a resumed run had other pictures."""
    if group.rank:
        return None
    manifest, training = make_manifest(config.data, sets), start.checkpoint["training"] if start.checkpoint else {}
    if digests := training.get("sets"):
        if error := other_pictures(manifest, digests, start.folder):
            raise DataError(f"{config.data}: {error}; bring them back, or {new_run(start.folder)}")
    elif training and (error := taken_otherwise(History.load(training["history"]), config.val_fraction, sets)):
        raise DataError(f"{config.data}: {error}; {new_run(start.folder)}")
    return manifest


def restore(
    state: TrainState, start: Start, config: Config, train_set: Pictures, lr_share: Callable[[Config, int, int], float]
) -> None:
    """Bring a resumed run to where its checkpoint was made, and say where that is; count the steps of any run.

    `lr_share` is train.py's. Raises CheckpointError where the checkpoint does not fit, DataError where the number of
    pictures is another now: earlier versions knew no more of them.
    """
    checkpoint = start.checkpoint
    if start.folder and not checkpoint:
        log.info(f"{start.folder}: no checkpoint yet, starts anew")
    if checkpoint:
        training = checkpoint["training"]
        if train_set.classes != checkpoint["classes"] or len(train_set) != training["pictures"]:
            raise DataError(f"{config.data}: not the {training['pictures']} pictures that the run trained on")
        try:
            check_momentum(state.optimizer, training["optimizer"]["state"])
            state.load_state_dict(training)
        except Exception as error:  # a stranger's file can hold anything
            raise CheckpointError(f"{start.folder}: its training cannot go on: {reason(error)}") from error
        where = f"goes on in epoch {state.epoch}"
        if state.history.ended_by(config):
            where = "is finished"
        elif state.totals:
            is_complete = state.totals.step == state.totals.steps
            where += " with its evaluation" if is_complete else f" at step {state.totals.step}"
        log.info(f"{start.folder}: {where}")
    state.total_steps = run_steps(state.history, state.pictures, config)
    if checkpoint and checkpoint["config"]["epochs"] != config.epochs:
        lr = config.lr * lr_share(config, state.total_steps, state.step)
        log.info(
            f"{checkpoint['config']['epochs']} -> {config.epochs} epochs: the {config.schedule} schedule now spans all "
            f"of them, so that the learning rate goes on at {lr:.3g}; a run of {config.epochs} epochs from its start "
            "would end elsewhere"
        )

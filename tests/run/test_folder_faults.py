"""The run folder when the disk is full or gone: what was saved stays whole, and the run says what was not."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import save
from filelock import FileLock
from runs import STILL, VARIANTS, at_steps, contents, differences, resume, start, uninterrupted

import train
from quick.checkpoints import read
from quick.cli import quoted
from quick.errors import TrainingError
from quick.run.folder import RunFolder
from quick.run.state import TrainState


@pytest.fixture
def limit_files():
    """A function that sets the largest size of files, in bytes, as good as a full disk; None lifts the limit."""
    resource = pytest.importorskip("resource", reason="needs a limit of file sizes (not on Windows)")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before if size is None else (size, before[1]))

    yield limit
    limit(None)


# ---- a full disk ----


def test_a_full_disk_costs_no_more_than_what_it_had_no_room_for(limit_files, tmp_path, monkeypatch, capsys):
    write_epoch = RunFolder.write_epoch

    def then_lifted(*inputs):
        write_epoch(*inputs)
        limit_files(None)

    monkeypatch.setattr(RunFolder, "write_epoch", then_lifted)
    limit_files(20_000)
    assert start(tmp_path, "a", *VARIANTS["plain"].split()) == 1
    out, err = capsys.readouterr()
    for name in ("TensorBoard's events", "best.pt", "epoch_001.pt"):
        assert f"train.py: {name} could not be saved (File too large); training goes on\n" in err
    assert err.endswith("train.py: not saved: epoch_001.pt (File too large)\n") and "Traceback" not in err
    assert out.splitlines()[-2].startswith("next: tensorboard") and "epoch 3/3" in out
    names = {path.name for path in (tmp_path / "a").iterdir() if not path.name.startswith("events")}
    assert names == {"config.toml", "metrics.jsonl", "best.pt", "epoch_002.pt", "epoch_003.pt"}


def test_a_time_limit_on_a_full_disk_is_a_failed_run(limit_files, tmp_path, monkeypatch, capsys):
    at_steps(monkeypatch, {1: lambda: limit_files(20_000)})
    assert start(tmp_path, "a", *VARIANTS["plain"].split(), "--time-limit", "1e-9") == 1
    assert capsys.readouterr().err.endswith("train.py: not saved: interrupted.pt (File too large)\n")


def limit_epoch(patch: pytest.MonkeyPatch, epoch: int, limit_files) -> None:
    """Let the disk be full while an epoch is saved, the first time that it is."""
    save_epoch, waiting = RunFolder.save_epoch, [epoch]

    def limited(run: RunFolder, state: TrainState, **more):
        run.finish_writing()
        is_full = len(state.history) in waiting
        limit_files(20_000 if is_full else None)
        if is_full:
            waiting.clear()
        save_epoch(run, state, **more)

    patch.setattr(RunFolder, "save_epoch", limited)


def test_what_did_not_fit_is_written_later(limit_files, tmp_path, monkeypatch):
    """As before, but all that a later epoch can write is as if nothing had been."""
    limit_epoch(monkeypatch, 2, limit_files)
    assert start(tmp_path, "a", *VARIANTS["plain"].split()) == 1
    limit_files(None)
    expected = {name: what for name, what in uninterrupted("plain").items() if name != "epoch_002.pt"}
    assert not differences(expected, contents(tmp_path / "a"))


def test_a_best_epoch_that_did_not_fit_is_not_tested_by_another(limit_files, tmp_path, monkeypatch, capsys):
    end_epoch = TrainState.end_epoch

    def last_is_best(state: TrainState, metrics: dict, *more) -> bool:
        metrics["val_accuracy"] = metrics["epoch"] / 10
        return end_epoch(state, metrics, *more)

    monkeypatch.setattr(TrainState, "end_epoch", last_is_best)
    limit_epoch(monkeypatch, 3, limit_files)
    assert start(tmp_path, "a", *VARIANTS["held out"].split()) == 1
    limit_files(None)
    out, err = capsys.readouterr()
    assert err.endswith("train.py: not saved: best.pt (File too large)\n") and "test accuracy" not in out
    assert torch.load(tmp_path / "a" / "best.pt", weights_only=True)["epoch"] == 2
    assert resume(tmp_path) == 0
    best = torch.load(tmp_path / "a" / "best.pt", weights_only=True)
    assert best["epoch"] == 3 and "test_accuracy" in best["metrics"]


def test_a_small_disk_keeps_whole_files_alone(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to mount a small disk")
    try:
        assert start(disk, "a") == 1
        found = {path.name for path in (disk / "a").glob("*.pt")}
        assert found and "epoch_003.pt" not in found and not list((disk / "a").glob(".*.tmp"))
        for path in (disk / "a").glob("*.pt"):
            read(path)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---- a folder that others change ----


def test_a_folder_that_went_away_ends_the_run_with_a_message(tmp_path, monkeypatch, capsys):
    at_steps(monkeypatch, {30: lambda: (tmp_path / "a").rename(tmp_path / "b")})
    assert start(tmp_path, "a", *STILL) == 1
    assert {path.name for path in (tmp_path / "b").glob("*.pt")} == {"epoch_001.pt", "best.pt"}
    assert "best.pt (No such file or directory)" in capsys.readouterr().err.splitlines()[-1]


def test_an_error_names_only_some_of_a_thousand_files_and_best_pt_among_them():
    run = RunFolder()
    run.unsaved = {f"epoch_{epoch:03}.pt": "full" for epoch in range(1, 1001)} | {"best.pt": "full"}
    with pytest.raises(TrainingError, match=r"^not saved: best.pt \(full\), epoch_001.pt \(full\), .* and 995 more$"):
        run.check_saved()


def test_a_new_run_leaves_a_folder_that_another_has_just_made(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    with FileLock(tmp_path / "a" / "run.lock"):
        assert start(tmp_path, "a") == 1
    assert capsys.readouterr().err.endswith(f"train.py: {tmp_path / 'a'}: another run has this folder\n")


def test_an_empty_folder_of_that_name_is_used(tmp_path):
    (tmp_path / "a").mkdir()
    assert start(tmp_path, "a", "--epochs", "1") == 0
    assert start(tmp_path, "a", "--epochs", "1") == 2


@pytest.fixture
def read_only(tmp_path):
    """Makes a folder that no file can be written into; it may be filled before, by a function."""
    mounted = []

    def make(fill: Callable[[Path], object] = lambda _: None) -> Path:
        folder = tmp_path / "read only"
        folder.mkdir()
        if hasattr(os, "geteuid") and os.geteuid() == 0:  # whom permissions do not hinder
            mount = ["mount", "-t", "tmpfs", "tmpfs", str(folder)]
            if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
                pytest.skip("needs to mount a disk")
            mounted.append(folder)
            fill(folder)
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        else:
            fill(folder)
            for path in (folder, *folder.rglob("*")):
                path.chmod(0o555)
            if os.access(folder, os.W_OK):
                pytest.skip("needs a system whose permissions hold for folders")
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)
    for path in (tmp_path / "read only").rglob("*"):
        path.chmod(0o755)


@pytest.mark.parametrize("place", ["file", "below a file", "read only", "below read only"])
def test_a_log_folder_that_cannot_be_written_is_refused_before_pictures_are_read(place, tmp_path, read_only, capsys):
    (tmp_path / "a file").touch()
    folder, status = read_only() if "read only" in place else tmp_path / "a file", {}
    logs = folder / "logs" if "below" in place else folder
    said = "cannot be written to" if "read only" in place else "is no folder"
    for name in (["--run-name", "a"], []):
        status[str(name)] = train.cli(["--data", str(tmp_path / "nothing"), "--log-dir", str(logs), *name])
        assert capsys.readouterr().err == f"train.py: --log-dir {quoted(logs)}: {folder} {said}\n"
    assert {*status.values()} == {2}


@pytest.mark.parametrize("flags", [(), ("--epochs", "4")])
def test_a_read_only_run_is_not_resumed(flags, tmp_path, read_only, capsys):
    assert start(tmp_path, "a", "--epochs", "1") == 0
    folder = read_only(lambda folder: shutil.copytree(tmp_path / "a", folder / "a"))
    capsys.readouterr()
    assert resume(folder, "a", *flags) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"train.py: {folder / 'a' / 'run.lock'}: ") and error.count("\n") == 1


@pytest.mark.parametrize("name", ["config.toml", "epoch_001.pt", "metrics.jsonl", "best.pt"])
def test_a_file_that_is_deleted_while_it_runs_costs_no_more_than_itself(name, tmp_path, monkeypatch, capsys):
    expected = dict(uninterrupted("held out"))
    at_steps(monkeypatch, {40: lambda: (tmp_path / "a" / name).unlink()})  # in the third epoch
    assert start(tmp_path, "a", *VARIANTS["held out"].split()) == 0
    found = contents(tmp_path / "a")
    if name == "epoch_001.pt":
        del expected[name]
    assert not differences(expected, found) and "Traceback" not in capsys.readouterr().err
    assert (tmp_path / "a" / "config.toml").exists() == (name != "config.toml")


def test_settings_that_are_damaged_while_it_runs_are_named_when_it_is_resumed(tmp_path, monkeypatch, capsys):
    at_steps(monkeypatch, {50: lambda: (tmp_path / "a" / "config.toml").write_text("epochs = ")})
    assert start(tmp_path, "a", *VARIANTS["plain"].split()) == 0
    assert resume(tmp_path, "a", "--epochs", "4") == 2
    assert "config.toml: not a TOML file: " in capsys.readouterr().err


# ---- which checkpoints are kept ----


def test_keep_removes_only_what_the_run_wrote(tmp_path):
    assert start(tmp_path, "a", "--keep", "2", "--epochs", "1") == 0
    for name in ("epoch_009.pt", "notes.txt"):
        (tmp_path / "a" / name).write_text("mine")
    (tmp_path / "a" / "epoch_009.pt").rename(tmp_path / "a" / "my_epoch_009.pt")
    assert train.cli(["--resume", str(tmp_path / "a"), "--epochs", "4", "--keep", "1"]) == 0
    names = {path.name for path in (tmp_path / "a").iterdir() if not path.name.startswith("events")}
    assert names == {"config.toml", "metrics.jsonl", "best.pt", "epoch_004.pt", "notes.txt", "my_epoch_009.pt"}


def test_keep_leaves_what_best_can_be_made_of(tmp_path, monkeypatch):
    def in_the_way() -> None:
        (tmp_path / "a" / "best.pt").mkdir()  # which no file can replace

    at_steps(monkeypatch, {1: in_the_way})
    assert start(tmp_path, "a", "--keep", "1") == 1
    assert {path.name for path in (tmp_path / "a").glob("epoch*.pt")} == {f"epoch_00{n}.pt" for n in (1, 2, 3)}
    (tmp_path / "a" / "best.pt").rmdir()
    assert resume(tmp_path, "a") == 0 and read(tmp_path / "a" / "best.pt")["config"]["keep"] == 1


def test_best_is_made_anew_from_its_epochs_checkpoint(tmp_path, capsys):
    expected = uninterrupted("plain")
    assert start(tmp_path, "a", *VARIANTS["plain"].split()) == 0
    (tmp_path / "a" / "best.pt").unlink()
    assert resume(tmp_path, "a") == 0
    assert not differences(expected, contents(tmp_path / "a"))
    assert start(tmp_path, "b", *STILL) == 0
    (tmp_path / "b" / "best.pt").unlink()
    last = read(tmp_path / "b" / "epoch_003.pt")
    last["training"]["history"]["columns"]["test_loss"][0] -= 0.1  # so that the first epoch is the best
    save(tmp_path / "b" / "epoch_003.pt", last)
    for path in (tmp_path / "b").glob("epoch_00[12].pt"):
        path.unlink()
    capsys.readouterr()
    assert resume(tmp_path, "b") == 1  # and is not replaced by what is not the best
    out, err = capsys.readouterr()
    assert "best.pt is not that of epoch 1, and cannot be built again: " in err and "predict.py" not in out
    assert err.endswith("train.py: not saved: best.pt (its checkpoint, epoch_001.pt, is gone)\n")

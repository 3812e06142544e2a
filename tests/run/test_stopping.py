"""Ctrl-C, SIGTERM, the time limit and patience: a run ends where it shall, and what it did is saved."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from runs import STILL, VARIANTS, at_steps, contents, differences, resume, send, start, uninterrupted

import train
from quick.checkpoints import write_file
from quick.cli import exit_script
from quick.processes import Group
from quick.run import folder, stopping
from quick.run.config import read_config
from quick.run.history import History
from quick.run.stopping import StopVote


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock that goes on by a second with each training step, and stands still in between."""
    now = [0.0]

    def tick() -> None:
        now[0] += 1

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    at_steps(monkeypatch, dict.fromkeys(range(1, 1000), tick))
    return now


# ---- signals ----


def test_signals_are_given_back():
    numbers = [signal.SIGINT, signal.SIGTERM, *([stopping.SIGHUP] if stopping.SIGHUP else [])]
    before = [signal.getsignal(number) for number in numbers]
    with StopVote(Group(), 0, 0.0) as stop:
        assert [signal.getsignal(number) for number in numbers] == [stop.on_signal] * len(numbers)
        assert not stop.asked()
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows sends no SIGHUP")
def test_nohup_is_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopVote(Group(), 0, 0.0):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows sends no SIGHUP")
@pytest.mark.parametrize("first", ["SIGHUP", "SIGINT", "SIGTERM"])
def test_a_closed_terminal_never_stops_the_saving(first, monkeypatch):
    monkeypatch.setattr(stopping, "leave_terminal", lambda: None)
    with StopVote(Group(), 0, 0.0) as stop:
        os.kill(os.getpid(), getattr(signal, first))
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.asked() and stop.by_signal
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.expensive
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such terminals")
@pytest.mark.parametrize("flags", [[], ["--workers", "1", "--memory-share", "0"]])
def test_a_terminal_that_is_closed_ends_the_run_with_a_checkpoint(flags, tmp_path, colour_folder, capsys):
    import pty

    command = (
        "train.py --config configs/shapes.toml --lr 0.01 --no-views --epochs 1000 --batch-size 8 --device cpu".split()
    )
    command += ["--data", str(colour_folder), "--log-dir", str(tmp_path), *flags]
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, *command, "--run-name", "a"])
    seen = b""
    while b" 3/1000" not in seen:
        part = os.read(terminal, 1000)
        assert part, seen
        seen += part
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130
    step = torch.load(tmp_path / "a" / "interrupted.pt", weights_only=True)["training"]["step"]
    assert train.cli(["--resume", str(tmp_path / "a"), "--time-limit", "0.00001"]) == 0
    assert "goes on in epoch" in capsys.readouterr().err and step > 10


def test_what_torchrun_sends_on_is_the_same_signal(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    ended = []
    with StopVote(Group(), 0, 0.0) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        for later in (0, stopping.ECHO_SECONDS):
            stop.signalled -= later
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                ended.append(False)
            except KeyboardInterrupt:
                ended.append(True)
    assert stop.asked() and stop.by_signal and ended == [False, True]


def test_a_second_ctrl_c_stops_at_once_and_damages_nothing(tmp_path, monkeypatch, capsys):
    expected = uninterrupted("plain")
    at_steps(monkeypatch, {30: send(signal.SIGINT, signal.SIGINT)})
    assert start(tmp_path, "a", *VARIANTS["plain"].split()) == 130
    out, err = capsys.readouterr()
    assert out.endswith(f"python train.py --resume {tmp_path / 'a'}\n") and "Traceback" not in err
    assert {path.name for path in (tmp_path / "a").glob("*.pt")} == {"epoch_001.pt", "best.pt"}
    assert train.cli(["--resume", str(tmp_path / "a")]) == 0
    assert not differences(expected, contents(tmp_path / "a"))


def test_a_closed_output_ends_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as `>&-` and pythonw leave it
    assert start(tmp_path, "a", "--epochs", "1", "--limit", "40") == 0
    assert (tmp_path / "a" / "epoch_001.pt").exists()


def test_a_terminal_that_is_gone_costs_no_checkpoint(tmp_path, monkeypatch):
    def gone(*_):
        raise BrokenPipeError

    monkeypatch.setattr(stopping.os, "write", gone)
    at_steps(monkeypatch, {7: send(signal.SIGINT)})
    assert start(tmp_path, "a") == 130
    assert (tmp_path / "a" / "interrupted.pt").exists()


def as_the_command(flags: list[str], folder: Path) -> None:
    """Train as a terminal starts it: in a process group of its own, whose output goes into files."""
    multiprocessing.set_start_method(None, force=True)  # as usual, not by the server that this process comes from
    os.setsid()
    os.chdir(folder)
    torch.set_num_threads(1)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    exit_script(train.cli(flags))


def test_ctrl_c_reaches_the_processes_that_read_files_too(colour_folder, tmp_path, processes):
    flags = "--epochs 500 --batch-size 20 --device cpu --no-views --no-whiten --memory-share 0 --workers 2 --keep 1"
    flags = ["--data", str(colour_folder), *flags.split(), "--run-name", "a"]
    process = processes.Process(target=as_the_command, args=(flags, tmp_path))
    process.start()
    try:
        out, deadline = tmp_path / "out", time.monotonic() + 60
        while not (out.exists() and out.read_text().count("\n")) and time.monotonic() < deadline:
            time.sleep(0.05)
        first = out.read_text()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
        process.join(60)
    finally:
        process.kill()
    out, err = out.read_text(), (tmp_path / "err").read_text()
    assert first.startswith("epoch   1/500") and process.exitcode == 130 and "Traceback" not in err
    assert out.endswith(f"python train.py --resume {Path('logs') / 'a'}\n")
    assert "stopping after this step, with a checkpoint (once more: at once, without)" in err
    assert (tmp_path / "logs" / "a" / "interrupted.pt").exists()


def vanish(process, data: Path) -> None:
    (data / "train" / "red" / "03.png").unlink()


def spoil(process, data: Path) -> None:
    (data / "train" / "red" / "03.png").write_bytes(b"nothing")


def kill_a_worker(process, data: Path) -> None:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        pytest.skip("needs Linux, which lists the processes of a process")
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)


def stop_twice(process, data: Path) -> None:
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.005)


WAYS_OUT = {  # what happens, the exit status, and what is said
    "not finite": (None, 1, r"the loss is nan in epoch 1, .*; last good checkpoint: none yet"),
    "gone": (vanish, 1, r"red/03\.png: No such file or directory; once that is mended, python train\.py --resume "),
    "spoiled": (spoil, 1, r"red/03\.png: not a picture that Pillow can read; once that is mended, "),
    "a dead worker": (kill_a_worker, 1, r"a process that reads files was killed, .* or give fewer --workers; once "),
    "twice": (stop_twice, 130, "interrupted"),
}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.expensive] * (way != "gone")) for way in WAYS_OUT]
)
def test_every_way_out_ends_all_processes_in_one_line(way, colour_folder, tmp_path, processes):
    fault, status, message = WAYS_OUT[way]
    data = shutil.copytree(colour_folder, tmp_path / "data")
    flags = "--epochs 5000 --batch-size 20 --device cpu --no-views --no-whiten --memory-share 0 --workers 2 --keep 1"
    flags = ["--data", str(data), *flags.split(), "--run-name", "a", *(() if fault else ("--lr", "1e30"))]
    process = processes.Process(target=as_the_command, args=(flags, tmp_path))
    process.start()
    try:
        out, deadline = tmp_path / "out", time.monotonic() + 60
        while fault and not (out.exists() and out.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        if fault:
            fault(process, data)
        process.join(30)
        assert process.exitcode == status
        with pytest.raises(ProcessLookupError):  # none of its workers is left
            while time.monotonic() < deadline + 60:
                os.killpg(process.pid, 0)
                time.sleep(0.01)
    finally:
        process.kill()
    error = (tmp_path / "err").read_text()
    said = len(re.findall("^train.py: ", error, re.MULTILINE))
    assert 1 <= said <= 1 + (way == "twice") and "Traceback" not in error  # the first Ctrl-C may have begun to save
    assert re.search(f"^train.py: .*{message}", error, re.MULTILINE)


@pytest.mark.expensive
def test_ctrl_c_stops_the_command_itself(colour_folder, tmp_path):
    flags = "--epochs 500 --batch-size 20 --device cpu --no-views --no-whiten --memory-share 0 --workers 2 --keep 1"
    command = [sys.executable, str(ROOT / "train.py"), "--data", str(colour_folder), *flags.split(), "--run-name", "a"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **pipes)
    try:
        first = process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert first.startswith("epoch   1/500") and process.returncode == 130 and "Traceback" not in err
    assert out.endswith(f"python train.py --resume {Path('logs') / 'a'}\n")
    assert "stopping after this step, with a checkpoint (once more: at once, without)" in err
    assert (tmp_path / "logs" / "a" / "interrupted.pt").exists()


# ---- the time limit ----


@pytest.mark.parametrize("variant", ["plain", "held out"])
def test_a_run_that_its_time_limit_stopped_goes_on_to_the_same_result(variant, clock, tmp_path, capsys):
    expected = uninterrupted(variant)
    capsys.readouterr()
    steps = 16 if variant == "held out" else 20  # of an epoch
    command = f"python train.py --resume {tmp_path / 'a'}\n"

    # In the middle of the first epoch.
    assert start(tmp_path, "a", *VARIANTS[variant].split(), "--time-limit", str(6.5 / 60)) == 0
    out, err = capsys.readouterr()
    assert out == command and "interrupted in epoch 1, step 7; this goes on from there" in err
    assert {path.name for path in (tmp_path / "a").glob("*.pt")} == {"interrupted.pt"}

    # Between the last step of the second epoch and its evaluation.
    assert resume(tmp_path, "--time-limit", str((2 * steps - 7 - 0.5) / 60)) == 0
    out, err = capsys.readouterr()
    assert out.startswith("epoch 1/3") and out.endswith(command)
    assert "goes on in epoch 1 at step 7\n" in err and "interrupted in epoch 2, after its steps; " in err
    assert torch.load(tmp_path / "a" / "interrupted.pt", weights_only=True)["training"]["totals"]["step"] == steps

    assert resume(tmp_path, "--time-limit", "0") == 0
    assert "goes on in epoch 2 with its evaluation\n" in capsys.readouterr().err
    assert not differences(expected, contents(tmp_path / "a"))


def test_a_signal_that_comes_while_an_interrupted_run_is_saved_changes_nothing(tmp_path, monkeypatch):
    """torchrun and clusters send SIGTERM more than once; the second must not kill the saving."""
    handlers = []

    def noted(path: Path, content: bytes) -> None:
        if path.name == "interrupted.pt":
            handlers.append(signal.getsignal(signal.SIGTERM))
        write_file(path, content)

    monkeypatch.setattr(folder, "write_file", noted)
    at_steps(monkeypatch, {7: send(signal.SIGTERM)})
    assert start(tmp_path, "a", *VARIANTS["plain"].split()) == 130
    assert len(handlers) == 1 and handlers[0].__func__ is StopVote.on_signal


def test_time_that_was_not_over_changes_nothing(clock, tmp_path):
    assert start(tmp_path, "a", *VARIANTS["plain"].split(), "--time-limit", "2") == 0
    assert not differences(uninterrupted("plain"), contents(tmp_path / "a"))


@pytest.mark.parametrize(("way", "status"), [("signal", 130), ("time", 0)])
def test_an_interrupted_evaluation_is_done_again(way, status, clock, tmp_path, monkeypatch):
    expected = uninterrupted("plain")
    outputs = train.outputs_of_set

    def interrupted(*inputs, **settings):
        monkeypatch.setattr(train, "outputs_of_set", outputs)
        if way == "signal":
            send(signal.SIGINT)()
        else:
            clock[0] += 60
        return outputs(*inputs, **settings)

    monkeypatch.setattr(train, "outputs_of_set", interrupted)
    assert start(tmp_path, "a", *VARIANTS["plain"].split(), "--time-limit", "1") == status
    training = torch.load(tmp_path / "a" / "interrupted.pt", weights_only=True)["training"]
    assert training["totals"]["step"] == training["totals"]["steps"] == training["step"] == 20
    assert train.cli(["--resume", str(tmp_path / "a"), "--time-limit", "0"]) == 0
    assert not differences(expected, contents(tmp_path / "a"))


def test_an_evaluation_that_takes_longer_than_the_time_limit_does_not_keep_a_run_from_going_on(clock, tmp_path, capsys):
    assert start(tmp_path, "a", *VARIANTS["plain"].split(), "--time-limit", str(19.5 / 60)) == 0
    assert "interrupted in epoch 1, after its steps; " in capsys.readouterr().err
    assert resume(tmp_path, "--time-limit", "1e-9") == 0  # evaluates, and takes a step
    out, err = capsys.readouterr()
    assert out.startswith("epoch 1/3") and "interrupted in epoch 2, step 1; " in err
    assert resume(tmp_path, "--time-limit", "1e-9") == 0
    assert "interrupted in epoch 2, step 2; " in capsys.readouterr().err
    assert resume(tmp_path, "--time-limit", "0") == 0
    assert not differences(uninterrupted("plain"), contents(tmp_path / "a"))


@pytest.mark.expensive
def test_the_time_limit_counts_from_the_start_of_the_program(tmp_path):
    """The imports of a program take seconds, from a slow disk half a minute."""
    now = time.perf_counter()
    assert now <= stopping.program_start() < now + 1  # another program calls train.py
    code = (
        "import time; before = time.perf_counter(); import quick.run.stopping as s; print(s.program_start() - before)"
    )
    (tmp_path / "train.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, tmp_path / "train.py"]
    said = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert sys.platform != "linux" or -5 < float(said) < 0.02  # the clock of Linux counts in hundredths


# ---- patience ----


def test_patience_ends_a_run_that_gets_no_better(tmp_path, capsys):
    assert start(tmp_path, "a", *STILL, "--epochs", "9", "--patience", "2") == 0
    out, _ = capsys.readouterr()
    config = read_config(tmp_path / "a" / "config.toml")
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    ends = [History(lines[:count]).ended_by(config) for count in range(1, len(lines) + 1)]
    assert ends == [*[None] * (len(lines) - 1), "patience"] and len(lines) < 9
    best = max(lines, key=lambda line: line["test_accuracy"])["epoch"]
    assert best == 1 and len(lines) == best + 2 and f"ended after epoch {best + 2} of 9 by --patience 2\n" in out
    assert resume(tmp_path) == 2
    capsys.readouterr()
    assert resume(tmp_path, str(tmp_path / "a"), "--epochs", "20") == 2  # patience would end it again
    assert capsys.readouterr().err == ("train.py: --epochs 20: the run was ended by --patience 2; add --patience 0\n")
    assert train.cli(["--resume", str(tmp_path / "a"), "--patience", "4"]) == 0
    assert len(contents(tmp_path / "a")["metrics"]) == best + 4
    assert capsys.readouterr().out.count("by --patience 4\n") == 1


def test_the_last_epoch_ends_a_run_whatever_patience_says(tmp_path, capsys):
    assert start(tmp_path, "a", *STILL, "--epochs", "3", "--patience", "2") == 0
    assert "ended after" not in capsys.readouterr().out

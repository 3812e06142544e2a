"""What interruptions, full disks and bad numbers cost: nothing that was saved, and no difference in the result."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, same_weights, save
from filelock import FileLock

import datasets
import device
import model
import train

SMALL = "--data shapes --limit 200 --image-size 8 --batch-size 10 --epochs 3 --device cpu --precision fp32 --no-views"
VARIANTS = {
    "plain": "--hardest 0.5 --schedule cosine",
    "held out": "--val-fraction 0.2 --optimizer muon",
    "photographs": "--jitter 0.3 --resized-crop 0.5 --cutout 4 --no-whiten",
}
STILL = ["--lr", "1e-30", "--no-batch-norm"]  # all epochs are equally good, and so the first is the best
TIMES = {"epoch_seconds", "images_per_second", "clock"}  # what no run repeats


def differences(first, second, place="") -> list[str]:
    """Where two checkpoints' contents differ, but for what time they took."""
    if isinstance(first, torch.Tensor):
        return [] if torch.equal(first, second) else [place]
    if isinstance(first, dict) and first.keys() == second.keys():
        keys = [key for key in first if key not in TIMES]
        return [found for key in keys for found in differences(first[key], second[key], f"{place}.{key}")]
    if isinstance(first, list) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return [found for number, pair in pairs for found in differences(*pair, f"{place}.{number}")]
    return [] if first == second else [place]


def contents(run: Path) -> dict:
    """All that a finished run leaves, TensorBoard's curves included."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {path.name: torch.load(path, weights_only=True) for path in run.glob("*.pt")}
    for checkpoint in found.values():
        del checkpoint["config"]["log_dir"]
    found["metrics"] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = set(events.Tags()["scalars"]) - {"epoch_seconds", "images_per_second", "memory_mib"}
    return found | {tag: [[event.step, event.value] for event in events.Scalars(tag)] for tag in sorted(tags)}


def started(logs: Path, name: str, *flags: str) -> int:
    return train.cli([*SMALL.split(), "--log-dir", str(logs), "--run-name", name, *flags])


def resumed(logs: Path, *flags: str) -> int:
    return train.cli(["--resume", *flags, "--log-dir", str(logs)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """The contents of runs that nothing interrupted, by their variants."""
    logs = tmp_path_factory.mktemp("whole")
    for name, flags in VARIANTS.items():
        assert started(logs, name, *flags.split()) == 0
    return {name: contents(logs / name) for name in VARIANTS}


@pytest.fixture
def at_step(monkeypatch):
    """Calls something in the middle of training steps, counted over all of a test."""
    steps, plan, step = [], {}, train.Trainer.step

    def counted(*inputs):
        steps.append(None)
        plan.get(len(steps), lambda: None)()
        return step(*inputs)

    monkeypatch.setattr(train.Trainer, "step", counted)
    return plan


def send(*signals: int):
    return lambda: [os.kill(os.getpid(), number) for number in signals]


# ---- interrupted and resumed ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interrupted_run_goes_on_to_the_same_result(variant, whole, at_step, tmp_path, capsys):
    at_step.update({7: send(signal.SIGINT), 33: send(signal.SIGTERM), 40: send(signal.SIGINT)})
    assert started(tmp_path, "a", *VARIANTS[variant].split()) == 130
    out, err = capsys.readouterr()
    assert out == f"python train.py --resume {tmp_path / 'a'}\n" and "interrupted in epoch 1, step 7" in err
    assert {path.name for path in (tmp_path / "a").glob("*.pt")} == {"interrupted.pt"}
    status = [train.cli(["--resume", *([] if number else [str(tmp_path / "a")]), "--log-dir", str(tmp_path)])
              for number in range(3)]  # fmt: skip
    assert status == [130, 130, 0]
    assert not differences(whole[variant], contents(tmp_path / "a"))
    left = {path.name for path in (tmp_path / "a").iterdir() if not path.name.startswith("events")}
    assert left == {"config.toml", "metrics.jsonl", "best.pt", *(f"epoch_00{number}.pt" for number in (1, 2, 3))}


def test_an_interrupted_evaluation_is_done_again(whole, tmp_path, monkeypatch):
    outputs = model.outputs

    def interrupted(*inputs):
        monkeypatch.setattr(model, "outputs", outputs)
        send(signal.SIGINT)()
        return outputs(*inputs)

    monkeypatch.setattr(model, "outputs", interrupted)
    assert started(tmp_path, "a", *VARIANTS["plain"].split()) == 130
    assert torch.load(tmp_path / "a" / "interrupted.pt", weights_only=True)["training"]["unevaluated"]["step"] == 20
    assert train.cli(["--resume", str(tmp_path / "a")]) == 0
    assert not differences(whole["plain"], contents(tmp_path / "a"))


def test_dropout_and_streamed_files_go_on_exactly_too(colour_folder, at_step, tmp_path):
    flags = ["--data", str(colour_folder), "--model", "squeezenet1_1", "--image-size", "64", "--no-whiten"]
    flags += "--epochs 2 --batch-size 20 --device cpu --no-views --memory-share 0 --workers 2 --jitter 0.2".split()
    at_step[6 + 5] = send(signal.SIGINT)
    for name, status in (("whole", 0), ("cut", 130)):
        assert train.cli([*flags, "--log-dir", str(tmp_path), "--run-name", name]) == status
    assert (
        train.cli(["--resume", str(tmp_path / "cut"), "--workers", "0", "--keep", "2"]) == 0
    )  # settings that can change
    found = [contents(tmp_path / name) for name in ("whole", "cut")]
    for checkpoint in found[0].values(), found[1].values():
        for part in checkpoint:
            if isinstance(part, dict):
                assert (part["config"].pop("workers"), part["config"].pop("keep")) in {(2, 0), (0, 2), (2, 2)}
    assert not differences(*found)


def test_a_second_ctrl_c_stops_at_once_and_damages_nothing(whole, at_step, tmp_path, capsys):
    at_step[30] = send(signal.SIGINT, signal.SIGINT)
    assert started(tmp_path, "a", *VARIANTS["plain"].split()) == 130
    out, err = capsys.readouterr()
    assert out.endswith(f"python train.py --resume {tmp_path / 'a'}\n") and "Traceback" not in err
    assert {path.name for path in (tmp_path / "a").glob("*.pt")} == {"epoch_001.pt", "best.pt"}
    assert train.cli(["--resume", str(tmp_path / "a")]) == 0
    assert not differences(whole["plain"], contents(tmp_path / "a"))


def child(flags: list[str]) -> None:
    torch.set_num_threads(1)
    os._exit(train.cli(flags))


def test_killed_runs_go_on_to_the_same_result(tmp_path, request, processes):
    """Processes are really killed, at random moments of their life; `--kills 200` does it more often."""
    dice = random.Random(0)

    def lives(run: Path, seconds: float) -> bool:
        """Start or resume the run, kill it after these seconds; whether it had ended by then."""
        flags = ["--resume", str(run)]
        if not (run / "config.toml").exists():
            shutil.rmtree(run, ignore_errors=True)  # killed before there was anything in it
            flags = [*SMALL.split(), *VARIANTS["plain"].split(), "--log-dir", str(tmp_path), "--run-name", run.name]
        process = processes.Process(target=child, args=(flags,))
        process.start()
        process.join(seconds)
        ended = process.exitcode is not None
        if not ended:
            os.kill(process.pid, dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
            process.join(100)
        assert process.exitcode == 0 or not ended
        for path in run.glob("*.pt"):
            model.read(path)
        return ended

    assert lives(tmp_path / "first", 100)  # starts the server of processes too
    began, kills, run = time.monotonic(), request.config.getoption("kills"), tmp_path / "run"
    assert lives(tmp_path / "whole", 100)
    usual, expected = time.monotonic() - began, contents(tmp_path / "whole")
    while kills > 0 or run.exists():
        if not lives(run, 0.9 * usual * dice.random() if kills > 0 else 100):
            kills -= 1
            continue
        assert not differences(expected, contents(run)) and not list(run.glob(".*"))
        shutil.rmtree(run)


# ---- going on with other settings ----


def test_a_finished_run_can_be_made_longer(tmp_path, capsys):
    assert started(tmp_path, "a", "--epochs", "2", "--schedule", "onecycle") == 0
    assert resumed(tmp_path) == 2
    assert "no unfinished run" in capsys.readouterr().err
    assert resumed(tmp_path, "a") == 0  # says its result again
    out, err = capsys.readouterr()
    assert "a: is finished" in err and out.startswith("best: epoch ")
    assert resumed(tmp_path, "--epochs", "4") == 0
    out, err = capsys.readouterr()
    assert "a: goes on in epoch 3" in err and out.startswith("epoch 3/4  ")
    lines = contents(tmp_path / "a")["metrics"]
    assert [line["step"] for line in lines] == [20, 40, 60, 80]
    peak = train.read_config(tmp_path / "a" / "config.toml").lr
    assert "2 -> 4 epochs: the onecycle schedule now spans all of them, so that the learning rate goes on at" in err
    assert f"goes on at {peak * (1 - 0.5) / 0.8:.3g}; " in err
    assert lines[1]["lr"] < 0.1 * peak < lines[2]["lr"] and lines[3]["lr"] < 0.1 * peak
    assert resumed(tmp_path, "a", "--epochs", "3") == 2
    assert capsys.readouterr().err == "train.py: --epochs 3: the run has 4 epochs already\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lr 3", "--lr: the run has 0.1, which cannot change any more; --weights "),
        ("--seed 3", "--seed: the run has 0, "),
        ("--limit 100", "--limit: the run has 200, "),
        ("--run-name b", "--run-name: the run has '', "),
        ("--batch-norm --model fast", "--model: the run has 'cifar_quick', "),
        ("--epochs 1", "--epochs 1: the run has 2 epochs already"),
        ("--config x.toml", "--config x.toml: No such file or directory"),
        (f"--config {ROOT / 'configs' / 'fast.toml'}", "--config: a resumed run has its own"),
        ("--lr x", "argument --lr: invalid float value: 'x'"),
    ],
)
def test_what_would_break_the_meaning_is_refused_by_name(flags, message, two_epochs, capsys):
    status = train.cli(["--resume", str(two_epochs), *flags.split()])
    out, err = capsys.readouterr()
    assert status == 2 and f"train.py: {message}" in err and err.count("\n") == 1 and not out
    assert not (two_epochs / "run.lock").exists()


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory) -> Path:
    logs = tmp_path_factory.mktemp("logs")
    assert started(logs, "a", "--epochs", "2", "--lr", "0.1") == 0
    return logs / "a"


def test_a_run_without_a_name_or_folder_to_go_on_with_is_named(tmp_path, two_epochs, capsys):
    for name, message in (("aa", "no run there (its folder has a config.toml); did you mean a?"), ("zz", "no run")):
        assert train.cli(["--resume", name, "--log-dir", str(two_epochs.parent)]) == 2
        assert f"--resume {name}: {message}" in capsys.readouterr().err


def test_the_newest_unfinished_run_goes_on(tmp_path):
    for number, name in enumerate(("a", "c", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text("epochs = 1")
        os.utime(tmp_path / name / "config.toml", (1e9 + number, 1e9 + number))
    assert train.find_run("", str(tmp_path), {}) == tmp_path / "b"
    (tmp_path / "a" / "interrupted.pt").write_bytes(b"")
    assert train.find_run("", str(tmp_path), {}) == tmp_path / "a"


def test_other_pictures_are_noticed(colour_folder, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(colour_folder, data)
    flags = "--epochs 1 --batch-size 20 --device cpu --no-views --no-whiten --run-name a --log-dir".split()
    assert train.cli(["--data", str(data), *flags, str(tmp_path)]) == 0
    (data / "train" / "red" / "00.png").unlink()
    assert train.cli(["--resume", str(tmp_path / "a"), "--epochs", "2"]) == 1
    assert "not the 60 pictures that the run trained on" in capsys.readouterr().err


def test_other_classes_are_noticed(colour_folder, tmp_path, capsys):
    shutil.copytree(colour_folder, tmp_path / "data")
    flags = "--epochs 1 --batch-size 20 --device cpu --no-views --no-whiten --run-name a --log-dir".split()
    assert train.cli(["--data", str(tmp_path / "data"), *flags, str(tmp_path)]) == 0
    for split in ("train", "test"):
        (tmp_path / "data" / split / "red").rename(tmp_path / "data" / split / "a red")
    assert train.cli(["--resume", str(tmp_path / "a"), "--epochs", "2"]) == 1
    assert "not the 60 pictures that the run trained on" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over(tmp_path, whole, capsys):
    assert started(tmp_path, "a", *VARIANTS["plain"].split()) == 0
    newest = tmp_path / "a" / "epoch_003.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    capsys.readouterr()
    assert train.cli(["--resume", str(tmp_path / "a")]) == 0
    assert "epoch_003.pt: the file is damaged or cut short; trying the checkpoint before" in capsys.readouterr().err
    assert not differences(whole["plain"], contents(tmp_path / "a"))
    for path in (tmp_path / "a").glob("epoch*.pt"):
        path.write_bytes(b"no checkpoint")
    assert train.cli(["--resume", str(tmp_path / "a")]) == 1
    assert "none of its checkpoints can be resumed; --weights" in capsys.readouterr().err


def nested(depth: int) -> list:
    """A thousand million references, of a few bytes each ten."""
    return [nested(depth - 1)] * 10 if depth else []


FIGURES = dict.fromkeys(("train_loss", "train_accuracy", "test_loss", "test_accuracy"), 0.5) | {"lr": "x"}
STRANGE = {
    "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}},
    "optimizer ": {"state": {0: {"momentum_buffer": nested(9)}}},
    "history": [{"epoch": 1}, {"epoch": 2}],
    "history ": [],
    "history  ": [FIGURES | {"epoch": number, "step": number} for number in (1, 2)],
    "mistakes": ["\x1b]0;x"],
    "unevaluated": {"epoch": 1},
    "pictures": "200",
    "clock": None,
    "sums": {"correct": torch.zeros((), dtype=torch.int64), "step": "x"},
    "schedule": {"last_epoch": "x"},
    "confidence": 3,
}


def test_a_checkpoint_whose_training_state_was_changed_is_refused(two_epochs, tmp_path, capsys):
    for number, (key, value) in enumerate(STRANGE.items()):
        run = tmp_path / str(number)
        shutil.copytree(two_epochs, run)
        checkpoint = torch.load(run / "epoch_002.pt", weights_only=True)
        checkpoint["training"][key.strip()] = value
        save(run / "epoch_002.pt", checkpoint)
        assert train.cli(["--resume", str(run), "--epochs", "3"]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"train.py: {run}: its ") and "Traceback" not in error, key


def test_settings_given_when_it_went_on_are_kept_when_it_is_cut_again(tmp_path, at_step, capsys):
    assert started(tmp_path, "a", "--epochs", "2") == 0
    at_step[41] = send(signal.SIGINT, signal.SIGINT)
    assert resumed(tmp_path, "a", "--epochs", "4", "--keep", "1") == 130
    assert resumed(tmp_path) == 0  # the newest unfinished one
    assert "epoch 4/4" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "a").glob("epoch*.pt")} == {"epoch_004.pt"}


def test_a_process_killed_before_its_last_checkpoint_left_an_unfinished_run(tmp_path, whole):
    assert started(tmp_path, "a", *VARIANTS["plain"].split()) == 0
    (tmp_path / "a" / "epoch_003.pt").unlink()
    (tmp_path / "a" / "best.pt").unlink()  # is made anew
    assert resumed(tmp_path) == 0
    assert not differences(whole["plain"], contents(tmp_path / "a"))


def test_a_run_that_patience_ended_is_found_by_more_patience(tmp_path):
    assert started(tmp_path, "a", "--lr", "1e-30", "--epochs", "9", "--patience", "1") == 0
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.toml").write_text("epochs = 'x'")  # of another version
    (tmp_path / "c").mkdir()
    shutil.copy(tmp_path / "a" / "config.toml", tmp_path / "c")
    (tmp_path / "c" / "metrics.jsonl").write_text("5\n")  # damaged
    assert resumed(tmp_path) == resumed(tmp_path, "--patience", "1") == 2
    assert resumed(tmp_path, "--patience", "3", "--hardest", "1") == 0


def test_a_run_without_a_checkpoint_starts_anew(tmp_path, at_step, capsys, whole):
    at_step[3] = send(signal.SIGINT, signal.SIGINT)
    assert started(tmp_path, "a", *VARIANTS["plain"].split()) == 130
    assert resumed(tmp_path, "--epochs", "3") == 0
    assert "a: no checkpoint yet, starts anew" in capsys.readouterr().err
    assert not differences(whole["plain"], contents(tmp_path / "a"))


def test_best_is_made_anew_from_its_epochs_checkpoint(tmp_path, whole, capsys):
    assert started(tmp_path, "a", *VARIANTS["plain"].split()) == 0
    (tmp_path / "a" / "best.pt").unlink()
    assert resumed(tmp_path, "a") == 0
    assert not differences(whole["plain"], contents(tmp_path / "a"))
    assert started(tmp_path, "b", *STILL) == 0
    (tmp_path / "b" / "best.pt").unlink()
    for path in (tmp_path / "b").glob("epoch_00[12].pt"):
        path.unlink()
    capsys.readouterr()
    assert resumed(tmp_path, "b") == 1  # and is not replaced by what is not the best
    out, err = capsys.readouterr()
    assert "best.pt is not that of epoch 1, and cannot be made anew: " in err and "predict.py" not in out
    assert err.endswith("train.py: not saved: best.pt (its checkpoint, epoch_001.pt, is gone)\n")


def test_the_length_cannot_change_in_an_epoch_whose_pictures_hang_on_it(tmp_path, at_step, capsys):
    at_step[7] = send(signal.SIGINT)
    assert started(tmp_path, "a", "--hardest", "0.5") == 130
    assert resumed(tmp_path, "a", "--epochs", "2") == 2
    assert "--epochs: --hardest pictures of an interrupted epoch depend on it" in capsys.readouterr().err


@pytest.mark.parametrize("hardest", [1.0, 0.3])
@pytest.mark.parametrize(("done", "epochs"), [(0, 1), (0, 2), (0, 5), (3, 5), (2, 7), (6, 7), (7, 7)])
def test_all_steps_are_counted(hardest, done, epochs):
    config = train.Config(epochs=epochs, hardest=hardest, batch_size=10)
    counts = [len(datasets.cuts(train.kept(105, config, epoch), 10)) for epoch in range(1, epochs + 1)]
    history = [{"step": 1000}] * done
    assert train.all_steps(history, 105, config) == sum(counts[done:]) + (1000 if done else 0)


def test_an_empty_folder_of_that_name_is_used(tmp_path):
    (tmp_path / "a").mkdir()
    assert started(tmp_path, "a", "--epochs", "1") == 0
    assert started(tmp_path, "a", "--epochs", "1") == 2


def test_moved_pictures_and_moved_runs_go_on(colour_folder, tmp_path, at_step):
    shutil.copytree(colour_folder, tmp_path / "data")
    flags = "--epochs 2 --batch-size 20 --device cpu --no-views --no-whiten --run-name a --log-dir".split()
    at_step[4] = send(signal.SIGINT)
    assert train.cli(["--data", str(tmp_path / "data"), *flags, str(tmp_path / "logs")]) == 130
    (tmp_path / "data").rename(tmp_path / "moved data")
    (tmp_path / "logs" / "a").rename(tmp_path / "b")
    assert resumed(tmp_path, "b") == 1
    assert resumed(tmp_path, "b", "--data", str(tmp_path / "moved data"), "--image-size", "0") == 0


def test_a_terminal_that_is_gone_costs_no_checkpoint(tmp_path, at_step, monkeypatch):
    def gone(*_):
        raise BrokenPipeError

    monkeypatch.setattr(device.os, "write", gone)
    at_step[7] = send(signal.SIGINT)
    assert started(tmp_path, "a") == 130
    assert (tmp_path / "a" / "interrupted.pt").exists()


def test_a_trainer_goes_on_on_another_device(tmp_path, at_step):
    at_step[7] = send(signal.SIGINT)
    assert started(tmp_path, "a", "--hardest", "0.5") == 130
    state = torch.load(tmp_path / "a" / "interrupted.pt", weights_only=True)["training"]
    network = model.CifarQuick(image_size=8).to("meta")
    head, config = model.head_keys("cifar_quick", {"image_size": 8}), train.Config(momentum=0.9)
    trainer = train.make_trainer(network, config, 10, torch.device("meta"), torch.float32, head)
    trainer.load_state_dict(state)
    assert trainer.sums.correct.is_meta and trainer.sums.confidence.is_meta and trainer.confidence is None
    assert all(of["momentum_buffer"].is_meta for of in trainer.optimizer.state.values())


def test_the_scale_of_fp16_goes_on_too():
    trainers = [
        train.make_trainer(model.CifarQuick(image_size=8), train.Config(), 10, torch.device("cpu"), torch.float16)
        for _ in range(2)
    ]
    state = trainers[0].state_dict()
    state["scaler"]["scale"] = 8.0
    trainers[1].load_state_dict(state)
    assert trainers[1].scaler.get_scale() == 8


def test_a_run_of_an_earlier_version_can_be_started_from(two_epochs, tmp_path, capsys):
    shutil.copytree(two_epochs, tmp_path / "a")
    for path in (tmp_path / "a").glob("epoch*.pt"):
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["training"] = {name: checkpoint["training"][name] for name in ("optimizer", "schedule", "scaler")}
        torch.save(checkpoint, path)
    assert resumed(tmp_path, "a", "--epochs", "3") == 1
    error = capsys.readouterr().err
    best = tmp_path / "a" / "best.pt"
    assert error.endswith(
        f"another version, whose runs this one cannot resume; --weights {best} starts a new run from its weights\n"
    )
    assert started(tmp_path, "b", "--epochs", "1", "--weights", str(best)) == 0


# ---- two at once ----


def test_a_run_that_another_process_trains_is_refused(two_epochs, monkeypatch, capsys):
    monkeypatch.setattr(train, "LOCK_SECONDS", 0.1)
    with FileLock(two_epochs / "run.lock"):
        assert train.cli(["--resume", str(two_epochs), "--epochs", "3"]) == 2
        assert capsys.readouterr().err == f"train.py: --resume {two_epochs}: another process is training this run\n"


def test_a_new_run_leaves_a_folder_that_another_has_just_made(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    with FileLock(tmp_path / "a" / "run.lock"):
        assert started(tmp_path, "a") == 1
    assert capsys.readouterr().err.endswith(f"train.py: {tmp_path / 'a'}: another run has this folder\n")


# ---- the disk ----


def test_a_full_disk_costs_no_more_than_what_it_had_no_room_for(tmp_path, monkeypatch, capsys):
    resource = pytest.importorskip("resource", reason="needs a limit of file sizes (not on Windows)")
    before, write_epoch = resource.getrlimit(resource.RLIMIT_FSIZE), train.write_epoch

    def lifted(*inputs):
        write_epoch(*inputs)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(train, "write_epoch", lifted)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        assert started(tmp_path, "a", *VARIANTS["plain"].split()) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    out, err = capsys.readouterr()
    for name in ("TensorBoard's events", "best.pt", "epoch_001.pt"):
        assert f"train.py: {name} could not be saved (File too large); training goes on\n" in err
    assert err.endswith("train.py: not saved: epoch_001.pt (File too large)\n") and "Traceback" not in err
    assert out.splitlines()[-1].startswith("tensorboard") and "epoch 3/3" in out
    names = {path.name for path in (tmp_path / "a").iterdir() if not path.name.startswith("events")}
    assert names == {"config.toml", "metrics.jsonl", "best.pt", "epoch_002.pt", "epoch_003.pt"}


def test_what_did_not_fit_is_written_later(whole, tmp_path, monkeypatch):
    """As before, but all that a later epoch can write is as if nothing had been."""
    resource = pytest.importorskip("resource", reason="needs a limit of file sizes (not on Windows)")
    before, add_epoch = resource.getrlimit(resource.RLIMIT_FSIZE), train.add_epoch

    def limited(run, *inputs):
        is_best = add_epoch(run, *inputs)
        full = len(run.history) == 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]) if full else before)
        return is_best

    monkeypatch.setattr(train, "add_epoch", limited)
    try:
        assert started(tmp_path, "a", *VARIANTS["plain"].split()) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    expected = {name: what for name, what in whole["plain"].items() if name != "epoch_002.pt"}
    assert not differences(expected, contents(tmp_path / "a"))


def test_a_best_epoch_that_did_not_fit_is_not_tested_by_another(tmp_path, monkeypatch, capsys):
    resource = pytest.importorskip("resource", reason="needs a limit of file sizes (not on Windows)")
    before, add_epoch, full = resource.getrlimit(resource.RLIMIT_FSIZE), train.add_epoch, [20_000]

    def limited(run, trainer, metrics, *inputs):
        metrics["val_accuracy"] = metrics["epoch"] / 10  # the last is the best
        if len(run.history) == 2 and full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (full.pop(), before[1]))
        return add_epoch(run, trainer, metrics, *inputs)

    monkeypatch.setattr(train, "add_epoch", limited)
    try:
        assert started(tmp_path, "a", *VARIANTS["held out"].split()) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    out, err = capsys.readouterr()
    assert err.endswith("train.py: not saved: best.pt (File too large)\n") and "test accuracy" not in out
    assert torch.load(tmp_path / "a" / "best.pt", weights_only=True)["epoch"] == 2
    assert resumed(tmp_path) == 0
    best = torch.load(tmp_path / "a" / "best.pt", weights_only=True)
    assert best["epoch"] == 3 and "test_accuracy" in best["metrics"]


def test_a_small_disk_keeps_whole_files_alone(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to mount a small disk")
    try:
        assert started(disk, "a") == 1
        found = {path.name for path in (disk / "a").glob("*.pt")}
        assert found and "epoch_003.pt" not in found and not list((disk / "a").glob(".*.tmp"))
        for path in (disk / "a").glob("*.pt"):
            model.read(path)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_went_away_ends_the_run_with_a_message(tmp_path, at_step, capsys):
    at_step[30] = lambda: (tmp_path / "a").rename(tmp_path / "b")
    assert started(tmp_path, "a", *STILL) == 1
    assert {path.name for path in (tmp_path / "b").glob("*.pt")} == {"epoch_001.pt", "best.pt"}
    assert "epoch_002.pt (No such file or directory)" in capsys.readouterr().err.splitlines()[-1]


def test_keep_removes_only_what_the_run_wrote(tmp_path):
    assert started(tmp_path, "a", "--keep", "2", "--epochs", "1") == 0
    for name in ("epoch_009.pt", "notes.txt"):
        (tmp_path / "a" / name).write_text("mine")
    (tmp_path / "a" / "epoch_009.pt").rename(tmp_path / "a" / "my_epoch_009.pt")
    assert train.cli(["--resume", str(tmp_path / "a"), "--epochs", "4", "--keep", "1"]) == 0
    names = {path.name for path in (tmp_path / "a").iterdir() if not path.name.startswith("events")}
    assert names == {"config.toml", "metrics.jsonl", "best.pt", "epoch_004.pt", "notes.txt", "my_epoch_009.pt"}


def test_keep_leaves_what_best_can_be_made_of(tmp_path, at_step):
    at_step[1] = lambda: (tmp_path / "a" / "best.pt").mkdir()  # which no file can replace
    assert started(tmp_path, "a", "--keep", "1") == 1
    assert {path.name for path in (tmp_path / "a").glob("epoch*.pt")} == {f"epoch_00{n}.pt" for n in (1, 2, 3)}
    (tmp_path / "a" / "best.pt").rmdir()
    assert resumed(tmp_path, "a") == 0 and model.read(tmp_path / "a" / "best.pt")["config"]["keep"] == 1


# ---- numbers ----


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_found_again(epoch, tmp_path, monkeypatch, capsys):
    count, loss_function = [], model.loss_function

    def failing(*inputs):
        count.append(None)
        loss = loss_function(*inputs)
        return loss * math.nan if len(count) == 20 * epoch - 7 + epoch - 1 else loss

    monkeypatch.setattr(model, "loss_function", failing)
    assert started(tmp_path, "a") == 1
    out, err = capsys.readouterr()
    config = train.read_config(tmp_path / "a" / "config.toml")
    train_set, _ = datasets.load("shapes", limit=200)
    order, _ = train_set.order(True, 0, epoch)
    numbers = ", ".join(map(str, order[120:130].tolist()))
    last = tmp_path / "a" / "epoch_001.pt" if epoch == 2 else "none yet"
    assert f"the loss is nan in epoch {epoch}, step 13 (lr " in err
    assert f", training pictures number {numbers}); try a lower --lr, or --clip-grad 1" in err
    assert err.endswith(f"; last good checkpoint: {last}\n") and config.epochs == 3
    assert len(out.splitlines()) == epoch - 1
    if epoch == 2:
        assert torch.load(tmp_path / "a" / "best.pt", weights_only=True)["epoch"] == 1


def test_gradients_are_shortened():
    network, config = model.CifarQuick(classes=2, image_size=8), train.Config(lr=1.0, clip_grad=0.01)
    trainer = train.make_trainer(network, config, 10, torch.device("cpu"), torch.float32)
    before = torch.nn.utils.parameters_to_vector(network.parameters()).detach().clone()
    trainer.step(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]), config)
    after = torch.nn.utils.parameters_to_vector(network.parameters()).detach()
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3) and trainer.gradient_norm() > 0.1
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # as in fp16: they are unscaled first
    trainer.step(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]), config)
    again = torch.nn.utils.parameters_to_vector(network.parameters()).detach()
    assert (again - after).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_deterministic_runs_give_the_same_bits(tmp_path):
    on = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        for name in ("a", "b"):
            assert started(tmp_path, name, "--deterministic", "--device", on) == 0
            assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        device.tune(torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
    assert same_weights(tmp_path / "a" / "best.pt", tmp_path / "b" / "best.pt")


# ---- ending sooner ----


def test_patience_ends_a_run_that_gets_no_better(tmp_path, capsys):
    assert started(tmp_path, "a", *STILL, "--epochs", "9", "--patience", "2") == 0
    out, _ = capsys.readouterr()
    lines = contents(tmp_path / "a")["metrics"]
    assert [line.get("ended") for line in lines] == [*[None] * (len(lines) - 1), "patience"] and len(lines) < 9
    best = max(lines, key=lambda line: line["test_accuracy"])["epoch"]
    assert best == 1 and len(lines) == best + 2 and f"ended after epoch {best + 2} of 9 by --patience 2\n" in out
    assert resumed(tmp_path) == 2
    capsys.readouterr()
    assert train.cli(["--resume", str(tmp_path / "a"), "--patience", "4"]) == 0
    lines = contents(tmp_path / "a")["metrics"]
    assert len(lines) == best + 4 and [line.get("ended") for line in lines].count("patience") == 1


@pytest.fixture
def fast_clock(monkeypatch, at_step):
    """A clock that goes on by a second with each training step, and not in between."""
    now = [0.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])

    def tick():
        now[0] += 1

    at_step.update(dict.fromkeys(range(1, 1000), tick))
    return now


def test_a_time_limit_ends_the_run_and_fits_the_schedule(fast_clock, tmp_path, capsys):
    flags = ["--epochs", "100", "--time-limit", "1", "--schedule", "cosine", "--lr", "0.1"]
    assert started(tmp_path, "a", *flags) == 0
    lines = contents(tmp_path / "a")["metrics"]
    assert lines[-1]["ended"] == "time_limit" and lines[-1]["step"] == 57  # four seconds are left for the end
    assert lines[0]["lr"] == pytest.approx(0.05 * (1 + math.cos(math.pi * 18 / 56)), rel=1e-6)
    assert lines[-1]["lr"] < 1e-4  # the clock of the step before counts
    assert "ended after epoch 3 of 100 by --time-limit 1\n" in capsys.readouterr().out
    assert train.cli(["--resume", str(tmp_path / "a"), "--time-limit", "2"]) == 0
    assert contents(tmp_path / "a")["metrics"][-1]["step"] == 57 + 60


# ---- Ctrl-C as a terminal sends it ----


def test_ctrl_c_reaches_the_processes_that_read_files_too(colour_folder, tmp_path):
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

"""A run that was stopped or killed goes on to the same bits; what would break its meaning is refused by name."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, save
from filelock import FileLock
from runs import SMALL, VARIANTS, at_steps, contents, differences, resume, send, start, uninterrupted

import train
from quick.checkpoints import read
from quick.cli import quoted
from quick.run import folder
from quick.run.config import read_config
from quick.run.resume import find_run, new_run

COLOURS = "--epochs 2 --batch-size 20 --device cpu --no-views --no-whiten --run-name a --log-dir".split()


# ---- interrupted and resumed ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interrupted_run_goes_on_to_the_same_result(variant, tmp_path, monkeypatch, capsys):
    expected = uninterrupted(variant)
    capsys.readouterr()
    plan = {7: send(signal.SIGINT), 33: send(signal.SIGTERM), 40: send(signal.SIGINT)}
    at_steps(monkeypatch, plan)
    assert start(tmp_path, "a", *VARIANTS[variant].split()) == 130
    out, err = capsys.readouterr()
    assert out == f"python train.py --resume {tmp_path / 'a'}\n" and "interrupted in epoch 1, step 7" in err
    assert {path.name for path in (tmp_path / "a").glob("*.pt")} == {"interrupted.pt"}
    assert train.cli(["--resume", str(tmp_path / "a"), "--log-dir", str(tmp_path)]) == 130
    assert [resume(tmp_path) for _ in range(2)] == [130, 0]  # the newest unfinished run
    assert not differences(expected, contents(tmp_path / "a"))
    left = {path.name for path in (tmp_path / "a").iterdir() if not path.name.startswith("events")}
    assert left == {"config.toml", "metrics.jsonl", "best.pt", *(f"epoch_00{number}.pt" for number in (1, 2, 3))}


def test_dropout_streamed_files_and_unequal_classes_of_a_table_go_on_exactly_too(colour_folder, tmp_path, monkeypatch):
    names = [path.relative_to(colour_folder).as_posix() for path in colour_folder.rglob("*.png")]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["file,label", *(f"{name},{'red' if '/red/' in name else 'other'}" for name in names)]))
    flags = ["--data", str(colour_folder), "--model", "squeezenet1_1", "--image-size", "64", "--no-whiten"]
    flags += ["--labels", str(table), "--balance", "1"]
    flags += "--epochs 2 --batch-size 20 --device cpu --no-views --memory-share 0 --workers 2 --jitter 0.2".split()
    at_steps(monkeypatch, {6 + 5: send(signal.SIGINT)})
    for name, status in (("whole", 0), ("cut", 130)):
        assert train.cli([*flags, "--log-dir", str(tmp_path), "--run-name", name]) == status
    cut = str(tmp_path / "cut")
    assert train.cli(["--resume", cut, "--workers", "0", "--keep", "2"]) == 0  # settings that can change
    found = [contents(tmp_path / name) for name in ("whole", "cut")]
    for checkpoint in found[0].values(), found[1].values():
        for part in checkpoint:
            if isinstance(part, dict):
                assert (part["config"].pop("workers"), part["config"].pop("keep")) in {(2, 0), (0, 2), (2, 2)}
    assert not differences(*found)


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
            read(path)
        return ended

    expected = uninterrupted("plain")
    assert lives(tmp_path / "first", 100)  # starts the server of processes too
    began, kills, run = time.monotonic(), request.config.getoption("kills"), tmp_path / "run"
    assert lives(tmp_path / "whole", 100)
    usual = time.monotonic() - began
    assert not differences(expected, contents(tmp_path / "whole"))
    while kills > 0 or run.exists():
        if not lives(run, 0.9 * usual * dice.random() if kills > 0 else 100):
            kills -= 1
            continue
        assert not differences(expected, contents(run)) and not list(run.glob(".*"))
        shutil.rmtree(run)


def test_a_process_killed_before_its_last_checkpoint_left_an_unfinished_run(tmp_path):
    assert start(tmp_path, "a", *VARIANTS["plain"].split()) == 0
    (tmp_path / "a" / "epoch_003.pt").unlink()
    (tmp_path / "a" / "best.pt").unlink()  # is made anew
    assert resume(tmp_path) == 0
    assert not differences(uninterrupted("plain"), contents(tmp_path / "a"))


def test_an_interrupted_run_goes_on_without_its_epochs_checkpoints(tmp_path, monkeypatch, capsys):
    """A full disk, or a user who tidies up, can leave interrupted.pt alone: it has all that resuming needs."""
    at_steps(monkeypatch, {45: send(signal.SIGTERM)})  # in the third epoch
    assert start(tmp_path, "a", *VARIANTS["held out"].split()) == 130
    for epoch in (1, 2):
        (tmp_path / "a" / f"epoch_{epoch:03}.pt").unlink()
    (tmp_path / "a" / "epoch_mine.pt").write_bytes(b"a user's own file")
    capsys.readouterr()
    assert resume(tmp_path) == 0
    assert "goes on in epoch 3 at step 13\n" in capsys.readouterr().err
    (tmp_path / "a" / "epoch_mine.pt").unlink()
    assert not differences(uninterrupted("held out")["epoch_003.pt"], contents(tmp_path / "a")["epoch_003.pt"])


def test_a_run_without_a_checkpoint_starts_anew(tmp_path, monkeypatch, capsys):
    expected = uninterrupted("plain")
    at_steps(monkeypatch, {3: send(signal.SIGINT, signal.SIGINT)})
    assert start(tmp_path, "a", *VARIANTS["plain"].split()) == 130
    assert resume(tmp_path, "--epochs", "3") == 0
    assert "a: no checkpoint yet, starts anew" in capsys.readouterr().err
    assert not differences(expected, contents(tmp_path / "a"))


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
    assert start(tmp_path, "a", *VARIANTS["plain"].split()) == 0
    newest = tmp_path / "a" / "epoch_003.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    capsys.readouterr()
    assert train.cli(["--resume", str(tmp_path / "a")]) == 0
    assert "epoch_003.pt: the file is damaged or cut short; trying the checkpoint before" in capsys.readouterr().err
    assert not differences(uninterrupted("plain"), contents(tmp_path / "a"))
    for path in (tmp_path / "a").glob("epoch*.pt"):
        path.write_bytes(b"no checkpoint")
    assert train.cli(["--resume", str(tmp_path / "a")]) == 1
    assert "none of its checkpoints can be resumed; --weights" in capsys.readouterr().err


# ---- going on with other settings ----


def test_a_finished_run_can_be_made_longer(tmp_path, capsys):
    assert start(tmp_path, "a", "--epochs", "2", "--schedule", "onecycle") == 0
    assert resume(tmp_path) == 2
    assert "no unfinished run" in capsys.readouterr().err
    assert resume(tmp_path, "a") == 0  # says its result again
    out, err = capsys.readouterr()
    assert "a: is finished" in err and out.startswith("best: epoch ")
    assert resume(tmp_path, "--epochs", "4") == 0
    out, err = capsys.readouterr()
    assert "a: goes on in epoch 3" in err and out.startswith("epoch 3/4  ")
    lines = contents(tmp_path / "a")["metrics"]
    assert [line["step"] for line in lines] == [20, 40, 60, 80]
    peak = read_config(tmp_path / "a" / "config.toml").lr
    assert "2 -> 4 epochs: the onecycle schedule now spans all of them, so that the learning rate goes on at" in err
    assert f"goes on at {peak * (1 - 0.5) / 0.8:.3g}; " in err
    assert lines[1]["lr"] < 0.1 * peak < lines[2]["lr"] and lines[3]["lr"] < 0.1 * peak
    assert resume(tmp_path, "a", "--epochs", "3") == 2
    assert capsys.readouterr().err == "train.py: --epochs 3: the run has 4 epochs already\n"


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory) -> Path:
    logs = tmp_path_factory.mktemp("logs")
    assert start(logs, "a", "--epochs", "2", "--lr", "0.1") == 0
    return logs / "a"


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


def test_settings_given_when_it_went_on_are_kept_when_it_is_cut_again(tmp_path, monkeypatch, capsys):
    at_steps(monkeypatch, {41: send(signal.SIGINT, signal.SIGINT)})
    assert start(tmp_path, "a", "--epochs", "2") == 0
    assert resume(tmp_path, "a", "--epochs", "4", "--keep", "1") == 130
    assert resume(tmp_path) == 0  # the newest unfinished one
    assert "epoch 4/4" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "a").glob("epoch*.pt")} == {"epoch_004.pt"}


def test_the_length_cannot_change_in_an_epoch_whose_pictures_depend_on_it(tmp_path, monkeypatch, capsys):
    at_steps(monkeypatch, {7: send(signal.SIGINT)})
    assert start(tmp_path, "a", "--hardest", "0.5") == 130
    assert resume(tmp_path, "a", "--epochs", "2") == 2
    assert "--epochs: --hardest pictures of an interrupted epoch depend on it" in capsys.readouterr().err


# ---- finding a run ----


def test_a_run_without_a_name_or_folder_to_go_on_with_is_named(tmp_path, two_epochs, capsys):
    for name, message in (("aa", "no run there (its folder has a config.toml); did you mean a?"), ("zz", "no run")):
        assert train.cli(["--resume", name, "--log-dir", str(two_epochs.parent)]) == 2
        assert f"--resume {name}: {message}" in capsys.readouterr().err


def test_only_weights_that_are_there_are_named_for_a_new_run(tmp_path):
    assert new_run(tmp_path) == "begin a new run"
    (tmp_path / "best.pt").touch()
    assert new_run(tmp_path) == f"--weights {quoted(tmp_path / 'best.pt')} starts a new run from its weights"


def test_the_newest_unfinished_run_goes_on(tmp_path, monkeypatch):
    for number, name in enumerate(("a", "c", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text("epochs = 1")
        os.utime(tmp_path / name / "config.toml", (1e9 + number, 1e9 + number))
    assert find_run("", str(tmp_path), {}) == tmp_path / "b"
    (tmp_path / "a" / "interrupted.pt").write_bytes(b"")
    assert find_run("", str(tmp_path), {}) == tmp_path / "a"
    monkeypatch.setattr(os, "access", lambda path, _: path.name != "a")  # it is another user's
    assert find_run("", str(tmp_path), {}) == tmp_path / "b"


def test_a_run_that_patience_ended_is_found_by_more_patience(tmp_path):
    assert start(tmp_path, "a", "--lr", "1e-30", "--epochs", "9", "--patience", "1") == 0
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.toml").write_text("epochs = 'x'")  # of another version
    (tmp_path / "c").mkdir()
    shutil.copy(tmp_path / "a" / "config.toml", tmp_path / "c")
    (tmp_path / "c" / "metrics.jsonl").write_text("5\n")  # damaged
    assert resume(tmp_path) == resume(tmp_path, "--patience", "1") == 2
    assert resume(tmp_path, "--patience", "3", "--hardest", "1") == 0


# ---- pictures that changed or moved ----


def test_other_pictures_are_noticed(colour_folder, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(colour_folder, data)
    assert train.cli(["--data", str(data), *COLOURS, str(tmp_path), "--epochs", "1"]) == 0
    picture = data / "train" / "red" / "00.png"
    picture.rename(tmp_path / "00.png")
    assert train.cli(["--resume", str(tmp_path / "a"), "--epochs", "2"]) == 1
    assert capsys.readouterr().err.endswith(
        f"{data}: not the train pictures that the run had: 1 gone (train/red/00.png); bring them back, or --weights "
        f"{tmp_path / 'a' / 'best.pt'} starts a new run from its weights\n"
    )
    (tmp_path / "00.png").rename(picture)
    shutil.copy(picture, data / "test" / "red" / "new.png")
    (tmp_path / "a" / "pictures.csv").unlink()  # then the files cannot be named
    assert train.cli(["--resume", str(tmp_path / "a"), "--epochs", "2"]) == 1
    assert f"{data}: not the test pictures that the run had; bring them back, or " in capsys.readouterr().err
    (data / "test" / "red" / "new.png").unlink()
    assert train.cli(["--resume", str(tmp_path / "a"), "--epochs", "2"]) == 0
    assert (tmp_path / "a" / "pictures.csv").exists()


def test_other_classes_are_noticed(colour_folder, tmp_path, capsys):
    shutil.copytree(colour_folder, tmp_path / "data")
    assert train.cli(["--data", str(tmp_path / "data"), *COLOURS, str(tmp_path), "--epochs", "1"]) == 0
    for split in ("train", "test"):
        (tmp_path / "data" / split / "red").rename(tmp_path / "data" / split / "a red")
    assert train.cli(["--resume", str(tmp_path / "a"), "--epochs", "2"]) == 1
    error = capsys.readouterr().err
    assert "not the train and test pictures that the run had: 26 gone (test/red/00.png, test/red/01.png, " in error
    assert " and 23 more), 26 new (test/a red/00.png, " in error


def test_a_run_of_an_earlier_version_knows_only_how_many_pictures_it_had(colour_folder, tmp_path, capsys):
    shutil.copytree(colour_folder, tmp_path / "data")
    assert train.cli(["--data", str(tmp_path / "data"), *COLOURS, str(tmp_path), "--epochs", "1"]) == 0
    checkpoint = torch.load(tmp_path / "a" / "epoch_001.pt", weights_only=True)
    del checkpoint["training"]["sets"]
    save(tmp_path / "a" / "epoch_001.pt", checkpoint)
    picture = tmp_path / "data" / "train" / "red" / "00.png"
    picture.rename(picture.with_name("zz.png"))
    assert train.cli(["--resume", str(tmp_path / "a"), "--epochs", "2"]) == 0
    assert "sets" in torch.load(tmp_path / "a" / "epoch_002.pt", weights_only=True)["training"]
    picture.with_name("zz.png").unlink()
    (tmp_path / "a" / "epoch_002.pt").unlink()
    assert train.cli(["--resume", str(tmp_path / "a"), "--epochs", "2"]) == 1
    assert "not the 60 pictures that the run trained on" in capsys.readouterr().err
    shutil.copytree(tmp_path / "data" / "test", tmp_path / "data" / "val")  # which that version did not look at
    assert train.cli(["--resume", str(tmp_path / "a"), "--epochs", "2"]) == 1
    assert "chose the best epoch by the test pictures, not by val; --weights " in capsys.readouterr().err


def test_a_run_of_an_earlier_version_goes_on_with_the_middle_of_its_pictures(colour_folder, tmp_path, capsys):
    assert train.cli(["--data", str(colour_folder), *COLOURS, str(tmp_path), "--epochs", "1"]) == 0
    checkpoint = torch.load(tmp_path / "a" / "epoch_001.pt", weights_only=True)
    del checkpoint["fit"], checkpoint["config"]["fit"]
    save(tmp_path / "a" / "epoch_001.pt", checkpoint)
    config = tmp_path / "a" / "config.toml"
    config.write_text(config.read_text().replace('fit = "crop"\n', ""))
    assert train.cli(["--resume", str(tmp_path / "a"), "--epochs", "2", "--fit", "pad"]) == 2
    assert "--fit: the run has 'crop', which cannot change any more" in capsys.readouterr().err
    assert train.cli(["--resume", str(tmp_path / "a"), "--epochs", "2"]) == 0
    assert torch.load(tmp_path / "a" / "epoch_002.pt", weights_only=True)["fit"] == "crop"
    assert 'fit = "crop"\n' in config.read_text()


def test_moved_pictures_and_moved_runs_go_on(colour_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(colour_folder, tmp_path / "data")
    at_steps(monkeypatch, {4: send(signal.SIGINT)})
    assert train.cli(["--data", str(tmp_path / "data"), *COLOURS, str(tmp_path / "logs")]) == 130
    (tmp_path / "data").rename(tmp_path / "moved data")
    (tmp_path / "logs" / "a").rename(tmp_path / "b")
    for flags, place in ((), tmp_path / "data"), (("--data", "nowhere"), "nowhere"):
        assert resume(tmp_path, "b", *flags) == 1
        error = f"train.py: {tmp_path / 'b'}: there is no {place}; --data FOLDER names where its pictures are now\n"
        assert capsys.readouterr().err.endswith(error)
    assert resume(tmp_path, "b", "--data", "cifar10") == 2
    assert "cannot change any more; --weights " in capsys.readouterr().err
    assert resume(tmp_path, "b", "--data", str(tmp_path / "moved data"), "--image-size", "0") == 0


# ---- checkpoints of strangers and of earlier versions ----


def nested(depth: int) -> list:
    """A thousand million references, of a few bytes each ten."""
    return [nested(depth - 1)] * 10 if depth else []


FIGURES = dict.fromkeys(("train_loss", "train_accuracy", "test_loss", "test_accuracy"), 0.5) | {"lr": "x"}
TOTALS = {"steps": 20, "step": 7, "pictures": 70, "loss": 1.0, "logged_loss": 0.0, "logged_pictures": 0}
TOTALS |= {"correct": 7, "lr": 0.1, "seconds": 1.0, "confidence": None}
STRANGE = {
    "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}},
    "optimizer ": {"state": {0: {"momentum_buffer": nested(9)}}},
    "history": [{"epoch": 1}, {"epoch": 2}],
    "history ": [],
    "history  ": [FIGURES | {"epoch": number, "step": number} for number in (1, 2)],
    "history   ": "ab",
    "mistakes": ["\x1b]0;x"],
    "pictures": "200",
    "step": "x",
    "totals": {"step": 1},
    "totals ": TOTALS | {"step": "x"},
    "totals  ": TOTALS | {"correct": torch.zeros((), dtype=torch.int64)},
    "totals   ": TOTALS | {"confidence": 3},
    "clock": None,  # of an earlier version
    "confidence": 3,
    "confidence ": torch.zeros(3),
    "confidence  ": torch.zeros(200, dtype=torch.cfloat),
    "step ": -5,
    "step  ": 2**62,
    "totals    ": TOTALS | {"step": 7.5},
    "totals     ": TOTALS | {"loss": float("nan")},
    "totals      ": [1],
    "totals       ": torch.zeros(3),
    "scaler": {"scale": nested(9)},
    "mistakes ": ["cat taken for dog 14.3%"] * 1000,
    "mistakes  ": ["x" * 10**5],
    "history    ": {"columns": {"epoch": torch.ones(1, dtype=torch.int64).expand(2)}, "earlier": 0},
    "history     ": {"columns": {"epoch": torch.arange(1, 3)}, "earlier": 0},
    "sets": {"train": nested(9)},
}


def test_a_checkpoint_whose_training_state_was_changed_is_refused(two_epochs, tmp_path, capsys):
    for number, (key, value) in enumerate(STRANGE.items()):
        run = tmp_path / str(number)
        shutil.copytree(two_epochs, run)
        checkpoint = torch.load(run / "epoch_002.pt", weights_only=True)
        checkpoint["training"][key.strip()] = value
        save(run / "epoch_002.pt", checkpoint)
        assert train.cli(["--resume", str(run), "--epochs", "3"]) == 1, key
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"train.py: {run}: its ") and "Traceback" not in error, key


def test_a_checkpoint_without_the_confidence_that_hardest_needs_is_refused(tmp_path, capsys):
    assert start(tmp_path, "a", "--hardest", "0.5") == 0
    (tmp_path / "a" / "epoch_003.pt").unlink()
    checkpoint = torch.load(tmp_path / "a" / "epoch_002.pt", weights_only=True)
    checkpoint["training"]["confidence"] = None
    save(tmp_path / "a" / "epoch_002.pt", checkpoint)
    assert resume(tmp_path) == 1
    assert "a: its checkpoint has no confidence in each of its pictures; --weights " in capsys.readouterr().err


@pytest.mark.parametrize("change", ["training", "config", "value"])
def test_a_run_of_an_earlier_version_can_be_started_from(change, two_epochs, tmp_path, capsys):
    shutil.copytree(two_epochs, tmp_path / "a")
    for path in (tmp_path / "a").glob("epoch*.pt"):
        checkpoint = torch.load(path, weights_only=True)
        if change == "training":
            training = {name: checkpoint["training"][name] for name in ("optimizer", "scaler")}
            checkpoint["training"] = training | {"schedule": {}}
        else:
            checkpoint["config"] |= {"colour": True} if change == "config" else {"schedule": "by_clock"}
        torch.save(checkpoint, path)
    assert resume(tmp_path, "a", "--epochs", "3") == 1
    error = capsys.readouterr().err
    best = tmp_path / "a" / "best.pt"
    assert error.endswith(
        f"another version, whose runs this one cannot resume; --weights {best} starts a new run from its weights\n"
    )
    assert start(tmp_path, "b", "--epochs", "1", "--weights", str(best)) == 0


# ---- two at once ----


def test_a_run_that_another_process_trains_is_refused(two_epochs, monkeypatch, capsys):
    monkeypatch.setattr(folder, "LOCK_SECONDS", 0.1)
    with FileLock(two_epochs / "run.lock"):
        assert train.cli(["--resume", str(two_epochs), "--epochs", "3"]) == 2
        assert capsys.readouterr().err == f"train.py: --resume {two_epochs}: another process is training this run\n"

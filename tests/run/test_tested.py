"""The test of the best epoch, if a validation set chose it: done once, and the same wherever it is shown."""

import json
from pathlib import Path

import pytest
import torch
from conftest import noisy
from runs import VARIANTS, contents, differences, resume, start, uninterrupted

import train
from quick.nets.losses import METRICS
from quick.run import folder
from quick.run.folder import RunFolder
from quick.run.history import History

HELD_OUT = VARIANTS["held out"].split()


def evaluated_sets(patch: pytest.MonkeyPatch) -> list[str]:
    """The names of the sets that are evaluated from now on."""
    evaluate, seen = train.evaluate, []

    def counted(state, network, pictures, *more):
        seen.append(pictures.split)
        return evaluate(state, network, pictures, *more)

    patch.setattr(train, "evaluate", counted)
    return seen


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_is_the_same_wherever_it_is(tmp_path, monkeypatch, capsys):
    seen = evaluated_sets(monkeypatch)
    assert start(tmp_path, "a", *HELD_OUT) == 0
    assert seen == ["val"] * 3 + ["test"]
    out = capsys.readouterr().out
    [tested] = [line for line in lines_of(tmp_path / "a") if "test_accuracy" in line]
    found = contents(tmp_path / "a")
    assert f"best: epoch {tested['epoch']}, " in out and f"test accuracy {tested['test_accuracy']:.1%}\n" in out
    assert tested == found["best.pt"]["metrics"]
    assert History.load(found["epoch_003.pt"]["training"]["history"]).epochs == found["metrics"]
    assert found["epoch_003.pt"]["metrics"] == found["metrics"][-1]
    for name in ("loss", *METRICS):
        [[step, value]] = found[f"{name}/test"]
        assert step == tested["step"] and value == pytest.approx(tested[f"test_{name}"])
    said = [line for line in out.splitlines() if line.startswith(("best", "most"))]

    assert resume(tmp_path) == 2  # it is finished
    assert resume(tmp_path, "a") == 0 and seen.count("test") == 1  # and says its result again
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith(("best", "most"))] == said
    assert not differences(found, contents(tmp_path / "a"))
    (tmp_path / "a" / "best.pt").unlink()  # is made anew, with the result of its test
    assert resume(tmp_path, "a") == 0 and seen.count("test") == 1
    best = torch.load(tmp_path / "a" / "best.pt", weights_only=True)
    assert best["metrics"] == tested


@pytest.mark.parametrize("name", ["test", "best.pt", "metrics.jsonl", "epoch_003.pt"])
def test_a_run_that_was_killed_before_it_was_saved_is_tested_again(name, tmp_path, monkeypatch):
    """Killed in the test itself, or before one of the files that have its result is written."""
    save_tested, write = RunFolder.save_tested, folder.write_file

    def killed(*_):
        raise KeyboardInterrupt

    def dying(run, *inputs):
        if name == "test":
            killed()
        monkeypatch.setattr(
            folder, "write_file", lambda path, *what: killed() if path.name == name else write(path, *what)
        )
        save_tested(run, *inputs)

    monkeypatch.setattr(RunFolder, "save_tested", dying)
    assert start(tmp_path, "a", *HELD_OUT) == 130
    monkeypatch.undo()
    assert resume(tmp_path) == 0  # an unfinished run
    expected, found = uninterrupted("held out"), contents(tmp_path / "a")
    for tag in (f"{name}/test" for name in ("loss", *METRICS)):  # TensorBoard may have it twice
        expected, found = expected | {tag: expected[tag][-1]}, found | {tag: found[tag][-1]}
    assert not differences(expected, found)


def test_a_longer_run_keeps_the_test_of_an_earlier_best_epoch(tmp_path, monkeypatch):
    seen, end_epoch = evaluated_sets(monkeypatch), train.TrainState.end_epoch

    def better_and_better(state, metrics, *more):
        metrics["val_accuracy"] = min(4, metrics["epoch"]) / 10
        return end_epoch(state, metrics, *more)

    monkeypatch.setattr(train.TrainState, "end_epoch", better_and_better)
    assert start(tmp_path, "a", *HELD_OUT) == 0
    assert resume(tmp_path, "--epochs", "5") == 0
    tested = [line["epoch"] for line in lines_of(tmp_path / "a") if "test_accuracy" in line]
    assert tested[0] == 3 and len(tested) == 2 and seen.count("test") == 2
    assert resume(tmp_path, "--epochs", "6", "--patience", "1") == 0
    assert len(lines_of(tmp_path / "a")) >= 5


def test_a_run_on_class_folders_has_no_test_to_wait_for(tmp_path):
    for name, colour in (("blue", (30, 60, 220)), ("red", (220, 40, 30))):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(10):
            noisy(colour, number).save(tmp_path / "data" / name / f"{number}.png")
    flags = ["--data", str(tmp_path / "data"), "--epochs", "1", "--device", "cpu", "--no-views", "--no-whiten"]
    assert train.cli([*flags, "--val-fraction", "0.3", "--log-dir", str(tmp_path / "logs")]) == 0
    assert resume(tmp_path / "logs") == 2

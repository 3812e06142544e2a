import dataclasses
import importlib.util
import json
import sys
from types import ModuleType

import pytest
import torch
from conftest import ROOT

import datasets
import model
import train
from quick.run.flags import parse_train
from quick.run.optimizers import fitting_lr

SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))


def imported(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def found(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_says_how_it_is_run(name):
    assert f"`python benchmarks/{name}.py" in imported(name).__doc__


def test_the_other_sides_learn(colour_folder):
    race = imported("race")
    sets = datasets.load(str(colour_folder))
    [*_, (seconds, accuracy)] = race.Race(sets, torch.device("cpu"), torch.float32).run(
        0, 12, (8, 16, 16), batch_size=20
    )
    assert seconds > 0 and accuracy > 0.8
    curve = race.tutorial(sets, 0, 2)
    assert len(curve) == 2 and curve[1][0] > curve[0][0] > 0


@pytest.mark.expensive
def test_one_process_of_a_group_measures_both_sides(monkeypatch, capsys):
    scaling = imported("scaling")
    monkeypatch.setattr(scaling, "PICTURES", 200)
    scaling.side(1, ["--batch-size", "50", "--device", "cpu"])
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 4 and found["ours"][0] > 0 and found["bare"][0] > 0


def test_the_picture_of_a_race_names_every_side(tmp_path):
    picture = imported("picture")
    curves = {"ours & theirs": [[[6, 0.6], [12, 0.7]], [[8, 0.7], [16, 0.8]]], "others": [[[100, 0.65]]]}
    drawn = picture.draw(json.loads(json.dumps(curves)))
    assert "ours &amp; theirs: 75.0% in 14 s" in drawn and "others: 65.0% in 100 s" in drawn
    assert drawn.count("<circle") == 3


def test_the_changes_lead_from_the_courses_recipe_to_the_default():
    course = imported("course")
    flags = ["--config", course.CONFIG, *(flag for _, added, _ in course.STEPS for flag in added.split())]
    reached, default = parse_train(flags)[0], parse_train(["--optimizer", "muon"])[0]
    # What the default leaves open is decided by the pictures and the network, and then the same, but for a hair.
    left_open = {"mean": reached.mean, "std": reached.std, "lr": fitting_lr(model.CifarQuick(), default, own=True)}
    left_open["activation"] = model.config_options(default, 10)["activation"]
    assert reached == dataclasses.replace(default, **left_open)


@pytest.mark.expensive
def test_the_changes_are_measured_and_results_that_are_there_are_taken(monkeypatch, tmp_path, capsys):
    course = imported("course")
    monkeypatch.setattr(course, "STEPS", [course.STEPS[0], course.STEPS[3]])
    monkeypatch.setattr(sys, "argv", ["course.py", *"--data shapes --epochs 1 --limit 60 --quiet".split()])
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--log-dir", str(tmp_path)])
    course.main()
    first = capsys.readouterr().out
    monkeypatch.setattr(train, "cli", None)
    course.main()
    table = capsys.readouterr().out.partition("| change")[2]
    assert table.count("% |") == 2 and table in first
    sys.argv += ["--lr", "0.05"]
    with pytest.raises(SystemExit):
        course.main()
    assert "other flags" in capsys.readouterr().err

import importlib.util
import json
from types import ModuleType

import pytest
import torch
from conftest import ROOT

import datasets

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

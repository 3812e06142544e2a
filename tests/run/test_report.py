"""What train.py prints: lines, progress bar and notes; and TensorBoard's curves, which have the same figures."""

import io
import json
import re
import sys

import pytest
import torch
import tqdm
from conftest import COLOURS, noisy

import datasets
import model
import train
from quick.cli import quoted
from quick.nets import losses
from quick.run.config import read_config
from quick.run.evaluation import outputs_of_set
from quick.run.state import TrainState

QUICK = "--data shapes --limit 200 --epochs 1 --device cpu --no-views --run-name a --log-dir".split()


def events(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()


def test_what_is_printed(tmp_path, capsys):
    assert train.cli([*QUICK, str(tmp_path / "my logs"), *"--epochs 2 --precision fp32".split()]) == 0
    said = capsys.readouterr()
    first = "shapes: 200 train, 200 test pictures; cifar_quick: 145,770 parameters; cpu, fp32"
    assert said.err.splitlines()[0] == first
    out = said.out.splitlines()
    assert len(out) == 7 and all(len(line) <= 100 for line in out[:2])
    assert out[0].startswith("epoch 1/2  train loss ") and out[0].endswith("  <- best")
    assert out[2].startswith("best: epoch ") and out[2].endswith("(chosen on the test pictures)")
    best = tmp_path / "my logs" / "a" / "best.pt"
    assert re.fullmatch(r"most mistaken: (\w+ taken for \w+ \d+\.\d%(, )?){3}", out[3])
    assert out[4] == f"next: python predict.py YOUR_PICTURE --checkpoint {quoted(best)}" and best.exists()
    assert out[5] == f"next: tensorboard --logdir {quoted(tmp_path / 'my logs')}"
    assert out[6] == "then open http://localhost:6006"


def test_a_folder_of_unequal_classes_is_told_and_the_scores_that_count_classes_the_same(tmp_path, capsys):
    for split, counts in (("train", (14, 3)), ("test", (9, 2))):
        for (name, colour), count in zip(COLOURS.items(), counts, strict=False):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(count):
                noisy(colour, number).save(tmp_path / "data" / split / name / f"{number}.png")
    said = "blue has 14 train pictures, green 3: always answering blue would get 81.8% of the test pictures right"
    flags = f"--data {tmp_path / 'data'} --epochs 1 --lr 1e-9 --no-views --device cpu --log-dir {tmp_path}".split()
    assert train.cli(flags) == 0
    found = capsys.readouterr()
    assert "only 11 test pictures: one more or less moves the accuracy by 9.1% (docs/recipes.md, Cross-" in found.err
    assert f"{said}; --balance 1 lets all classes count the same\n" in found.err
    [metrics] = [json.loads(path.read_text()) for path in tmp_path.glob("*/metrics.jsonl")]
    balanced, f1 = metrics["test_balanced_accuracy"], metrics["test_f1"]
    assert metrics["test_accuracy"] in (pytest.approx(9 / 11), pytest.approx(2 / 11)) and balanced == 0.5
    assert f"\neach class counted the same: balanced accuracy 50.0%, macro F1 {f1:.1%}\n" in found.out
    datasets.main(["--data", str(tmp_path / "data")])
    assert f"\nbalance   {said}; --balance 1 lets " in capsys.readouterr().out
    assert train.cli([*flags, "--run-name", "b", "--balance", "1", "--best", "f1"]) == 0
    found = capsys.readouterr()
    assert f"{said}; with --balance 1.0 small classes weigh more\n" in found.err
    best = torch.load(tmp_path / "b" / "best.pt", weights_only=True)
    assert f"best: epoch 1 by macro F1 {best['metrics']['test_f1']:.1%}, test accuracy" in found.out
    assert train.cli(["--resume", str(tmp_path / "b"), "--best", "loss"]) == 2
    assert "--best: the run has 'f1', which cannot change any more" in capsys.readouterr().err


def test_mistakes_are_those_of_the_best_epoch(tmp_path, monkeypatch, capsys):
    end_epoch = TrainState.end_epoch

    def first_is_best(state, metrics, *more):
        metrics["test_accuracy"] = 1 / metrics["epoch"]
        return end_epoch(state, metrics, *more)

    monkeypatch.setattr(TrainState, "end_epoch", first_is_best)
    assert train.cli([*QUICK, str(tmp_path), "--epochs", "2", "--precision", "fp32"]) == 0
    found = []
    for name in ("best", "epoch_002"):
        network, checkpoint = model.load(tmp_path / "a" / f"{name}.pt")
        [test_set] = datasets.load("shapes", limit=200, splits=["test"])
        answers = outputs_of_set(network, test_set, classes=10, tta=checkpoint["config"]["tta"])
        pairs = losses.worst_pairs(losses.confusion_counts(*answers), test_set.classes)
        found.append(f"most mistaken: {', '.join(pairs)}")
    assert found[0] in capsys.readouterr().out.splitlines() and found[0] != found[1]


# ---- the bar, and TensorBoard's curves ----


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class EveryStep(tqdm.tqdm):
    """A bar that is drawn at every step, however fast they are."""

    def __init__(self, *inputs: object, **settings: object):
        super().__init__(*inputs, mininterval=0, **settings)


def test_bar_line_file_and_tensorboard_have_the_same_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(tqdm, "tqdm", EveryStep)
    assert train.LOG_STEPS == 100
    monkeypatch.setattr(train, "LOG_STEPS", 20)
    assert train.cli([*QUICK, str(tmp_path), *"--epochs 2 --batch-size 4 --schedule onecycle".split()]) == 0
    accumulator = events(tmp_path / "a")
    curve = {event.step: event.value for event in accumulator.Scalars("loss/train")}
    assert [*curve] == [20, 40, 50, 70, 90, 100]
    rates = {event.step: event.value for event in accumulator.Scalars("lr")}
    config = read_config(tmp_path / "a" / "config.toml")
    for step, lr in rates.items():
        assert lr == pytest.approx(config.lr * train.lr_share(config, 100, step - 1))
    on_bar = re.findall(r"epoch 1/2: [^\r]*, loss ([0-9.]+), run 0:00:\d\d left", terminal.getvalue())
    assert on_bar and float(on_bar[0]) == pytest.approx(curve[20], abs=6e-4)
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    for text, line in zip(capsys.readouterr().out.splitlines(), lines, strict=False):
        printed = [float(number) for number in re.findall(r"(?:loss|acc) ([0-9.]+)", text)]
        values = [line["train_loss"], 100 * line["train_accuracy"], line["test_loss"], 100 * line["test_accuracy"]]
        assert printed == [round(value, 3 - 2 * (place % 2)) for place, value in enumerate(values)]
        assert curve[line["step"]] == pytest.approx(line["train_loss"], abs=1e-4)
        assert line["lr"] == pytest.approx(rates[line["step"]])


def test_a_quiet_run_says_nothing_but_its_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TQDM_DISABLE", "")
    assert train.cli([*QUICK, str(tmp_path), "--quiet"]) == 0
    assert terminal.getvalue() == "" and capsys.readouterr().out.startswith("epoch 1/1")
    assert train.cli([*QUICK, str(tmp_path), "--quiet", "--data", "nowhere", "--run-name", "b"]) == 1
    assert terminal.getvalue().startswith("train.py: no data 'nowhere'")


def test_tensorboard_gets_all_tags_at_the_same_steps(run):
    accumulator = events(run)
    tags = accumulator.Tags()
    scalars = {"loss/train", "loss/test", "accuracy/train", "accuracy/test", "lr", "images_per_second"}
    scalars |= {"epoch_seconds", "gradient_norm", "memory_mib", "f1/test", "balanced_accuracy/test"}
    assert set(tags["scalars"]) == scalars and tags["graph"]
    for tag in scalars:
        assert [event.step for event in accumulator.Scalars(tag)] == [16, 32, 48]
    values = [event.value for event in accumulator.Scalars("accuracy/test")]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert values == pytest.approx([line["test_accuracy"] for line in lines])


def test_hparams_are_in_the_same_run(run):
    content = events(run).summary_metadata
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(content)
    assert len(list(run.parent.iterdir())) == 1

"""train.py: one step, the learning rate, exact figures, the recipe, and what repeats a run."""

import json
import math
import tomllib

import pytest
import torch
from conftest import ROOT, same_weights
from samples import a_batch, a_state

import datasets
import model
import train
from quick.checkpoints import LOSSES
from quick.data.augment import Augment
from quick.nets import losses
from quick.run.evaluation import mean_of_views, outputs_of_set
from quick.run.settings import Config
from quick.run.state import TrainState

QUICK = "--data shapes --limit 200 --epochs 1 --device cpu --no-views".split()


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_learns(colour_run):
    assert metrics(colour_run)[-1]["test_accuracy"] == 1.0


# ---- one step ----


@pytest.mark.parametrize("balance", [0, 1])
def test_a_batch_in_pieces_is_the_same_step(balance):
    images, labels, found = torch.rand(7, 3, 8, 8), torch.arange(7) // 5, []
    for pieces in (1, 3):
        torch.manual_seed(0)
        network = model.CifarQuick(classes=2, image_size=8, batch_norm=False)
        config = Config(lr=0.1, accumulate=pieces, balance=balance)
        state = a_state(network, config, labels=labels)
        assert balance == 0 or state.class_weights.tolist() == pytest.approx([0.7, 1.75])
        loss, logits = train.train_step(state, a_batch(images, labels, pieces), config)
        found.append([loss, logits, *network.parameters()])
    for whole, in_pieces in zip(*found, strict=True):
        assert torch.allclose(whole, in_pieces, atol=1e-6)


def test_auxiliary_classifiers_train_with_their_share_of_the_loss():
    config = Config(model="googlenet", lr=0.1)
    torch.manual_seed(0)
    network = model.create("googlenet", {"classes": 3, "image_size": 32})
    for layer in network.modules():  # so that the gradient can be taken a second time
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    logits, second, first = network.train()(images)
    of_each = [losses.loss_function(answer, labels) for answer in (logits, second, first)]
    total = of_each[0] + 0.3 * of_each[1] + 0.3 * of_each[2]
    names = ["fc.weight", "aux1.fc2.weight", "aux2.fc2.weight", "conv1.conv.weight"]
    weights = [network.get_parameter(name) for name in names]
    expected = [w.detach() - 0.1 * g for w, g in zip(weights, torch.autograd.grad(total, weights), strict=True)]
    loss, answer = train.train_step(a_state(network, config), a_batch(images, labels), config)
    assert loss.item() == pytest.approx(of_each[0].item(), abs=1e-5) and torch.allclose(answer, logits, atol=1e-5)
    for name, weight in zip(names, expected, strict=True):
        assert torch.allclose(network.get_parameter(name), weight, atol=1e-5), name


def test_training_goes_through_the_batches_of_each_epoch_and_draws_anew_at_each_step(tmp_path, monkeypatch):
    steps, seeds, train_step = [], [], train.train_step

    def noted(state, batch, config):
        steps.append((batch.images.clone(), batch.labels, batch.indices))
        seeds.append(torch.initial_seed())
        return train_step(state, batch, config)

    monkeypatch.setattr(train, "train_step", noted)
    flags = "--data shapes --limit 20 --epochs 2 --batch-size 4 --flip --crop 3 --cutout 8 --seed 5 --device cpu"
    assert train.cli([*flags.split(), "--no-views", "--log-dir", str(tmp_path)]) == 0
    train_set, _ = datasets.load("shapes", limit=20)
    how = {"shuffle": True, "augment": Augment(flip=True, crop=3, cutout=8), "seed": 5}
    expected = [batch for epoch in (1, 2) for batch in train_set.batches(4, epoch=epoch, **how)]
    for found, wanted in zip(steps, expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(found, wanted[:3], strict=True))
    assert len(set(seeds)) == len(seeds) == 10


def test_a_batch_that_leaves_one_picture_over_trains(tmp_path):
    flags = "--data shapes --limit 20 --batch-size 19 --epochs 1 --device cpu --no-views --run-name a --log-dir".split()
    assert train.cli([*flags, str(tmp_path)]) == 0
    assert metrics(tmp_path / "a")[0]["step"] == 1


# ---- the learning rate ----


def test_onecycle_climbs_and_falls_to_nearly_nothing():
    config = Config(schedule="onecycle")
    shares = [train.lr_share(config, 1000, step) for step in range(1000)]
    peak = shares.index(max(shares))
    assert 0.98 < max(shares) <= 1 and 190 <= peak <= 201
    assert 0 < shares[0] < 0.01 and 0 < shares[-1] < 0.01
    assert all(0 < train.lr_share(config, steps, step) <= 1 for steps in (1, 2, 3, 7) for step in range(steps))


def test_cosine_and_constant():
    cosine = [train.lr_share(Config(schedule="cosine"), 4, step) for step in range(5)]
    assert cosine == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0])
    assert train.lr_share(Config(schedule="constant"), 4, 3) == 1


def test_a_warm_up_is_a_straight_line_to_the_highest_rate():
    cosine = [train.lr_share(Config(schedule="cosine"), 40, step) for step in range(40)]
    for schedule, later in (("constant", [1] * 40), ("cosine", cosine)):
        config = Config(schedule=schedule, epochs=10, warmup=2)
        shares = [train.lr_share(config, 50, step) for step in range(50)]
        assert shares[:11] == pytest.approx([step / 11 for step in range(1, 12)])
        assert shares[10:] == pytest.approx(later)
    half = Config(schedule="constant", epochs=1, warmup=0.5)
    assert all(0 < train.lr_share(half, steps, step) <= 1 for steps in (1, 2, 3, 7) for step in range(steps))


# ---- exact figures ----


def test_test_figures_are_exact_means_in_eval_mode(run):
    network, checkpoint = model.load(run / "epoch_003.pt")
    [test_set] = datasets.load("shapes", limit=1000, mean=checkpoint["mean"], std=checkpoint["std"], splits=["test"])
    images, labels, *_ = next(test_set.batches(1000))
    with torch.no_grad():
        logits = mean_of_views(network, images, checkpoint["config"]["tta"])
    assert checkpoint["metrics"]["test_accuracy"] == (logits.argmax(1) == labels).sum().item() / 1000
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert checkpoint["metrics"]["test_loss"] == pytest.approx(expected, abs=1e-5)


def test_training_figures_are_exact_means_too(tmp_path):
    flags = "--lr 1e-30 --no-batch-norm --no-flip --crop 0 --label-smoothing 0 --precision fp32 --run-name a".split()
    assert train.cli([*QUICK, *flags, "--log-dir", str(tmp_path)]) == 0  # 200 pictures: the last batch has 8
    network, checkpoint = model.load(tmp_path / "a" / "epoch_001.pt")
    train_set, _ = datasets.load("shapes", limit=200)
    scores = losses.score(*outputs_of_set(network, train_set, classes=10))
    assert checkpoint["metrics"]["train_loss"] == pytest.approx(scores["loss"], rel=1e-4)
    assert checkpoint["metrics"]["train_accuracy"] == pytest.approx(scores["accuracy"], abs=0.006)


def test_labels_are_smoothed_in_training_alone(tmp_path):
    flags = [*QUICK, *"--epochs 2 --lr 1e-30 --no-flip --crop 0 --log-dir".split(), str(tmp_path), "--run-name"]
    assert train.cli([*flags, "plain", "--label-smoothing", "0"]) == 0
    assert train.cli([*flags, "smooth", "--label-smoothing", "0.5"]) == 0
    plain, smooth = (metrics(tmp_path / name)[-1] for name in ("plain", "smooth"))
    assert plain["train_loss"] != smooth["train_loss"] and plain["test_loss"] == smooth["test_loss"]


# ---- held-out pictures ----


def test_held_out_pictures_choose_the_epoch_and_the_test_comes_last(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = "--data shapes --limit 200 --epochs 2 --val-fraction 0.2 --device cpu --no-views --run-name a --log-dir"
    assert train.cli([*flags.split(), str(tmp_path)]) == 0
    lines, best = metrics(tmp_path / "a"), torch.load(tmp_path / "a" / "best.pt", weights_only=True)
    assert all("val_accuracy" in line for line in lines)
    assert [line["epoch"] for line in lines if "test_accuracy" in line] == [best["epoch"]]
    assert best["metrics"]["val_accuracy"] == max(line["val_accuracy"] for line in lines)
    out = capsys.readouterr().out
    assert f"test accuracy {best['metrics']['test_accuracy']:.1%}" in out and "chosen on" not in out
    curve = EventAccumulator(str(tmp_path / "a")).Reload().Scalars("accuracy/test")
    assert [event.step for event in curve] == [best["metrics"]["step"]]


def test_it_is_the_best_epochs_network_that_is_tested(tmp_path, monkeypatch):
    end_epoch = TrainState.end_epoch

    def first_is_best(state, metrics, *more):
        metrics["val_accuracy"] = 1 / metrics["epoch"]
        return end_epoch(state, metrics, *more)

    monkeypatch.setattr(TrainState, "end_epoch", first_is_best)
    flags = "--data shapes --limit 200 --epochs 2 --val-fraction 0.2 --device cpu --precision fp32 --no-views"
    assert train.cli([*flags.split(), "--run-name", "a", "--log-dir", str(tmp_path)]) == 0
    network, best = model.load(tmp_path / "a" / "best.pt")
    [test_set] = datasets.load("shapes", limit=200, splits=["test"], mean=best["mean"], std=best["std"])
    scores = losses.score(*outputs_of_set(network, test_set, classes=10, tta=best["config"]["tta"]))
    assert best["epoch"] == 1 and best["metrics"]["test_loss"] == pytest.approx(scores["loss"], rel=1e-4)


# ---- the recipe ----


@pytest.mark.parametrize(
    ("loss", "precision"),
    [
        *((loss, "fp32") for loss in LOSSES),
        ("cross_entropy", "bf16"),
        pytest.param("mse", "bf16", marks=pytest.mark.expensive),
        pytest.param("l1", "bf16", marks=pytest.mark.expensive),
    ],
)
def test_every_loss_and_precision_trains(colour_folder, tmp_path, loss, precision):
    flags = f"--epochs 8 --batch-size 20 --device cpu --no-views --loss {loss} --precision {precision} --run-name a"
    assert train.cli(["--data", str(colour_folder), "--log-dir", str(tmp_path), *flags.split()]) == 0
    assert max(line["test_accuracy"] for line in metrics(tmp_path / "a")) > 0.6


def test_every_recipe_option_changes_the_result_and_is_remembered(tmp_path, colour_folder):
    flags = ["--data", str(colour_folder), *"--epochs 1 --batch-size 20 --device cpu --no-views".split()]
    options = {"plain": "--no-whiten --tta none", "white": "--whiten --tta none", "tta": "--no-whiten --tta shift"}
    options["muon"] = "--no-whiten --tta none --optimizer muon"
    for name, more in options.items():
        assert train.cli([*flags, "--log-dir", str(tmp_path), "--run-name", name, *more.split()]) == 0
    for name in ("white", "muon"):
        assert not same_weights(tmp_path / "plain" / "epoch_001.pt", tmp_path / name / "epoch_001.pt")
    assert same_weights(tmp_path / "plain" / "epoch_001.pt", tmp_path / "tta" / "epoch_001.pt")
    plain, tta = (metrics(tmp_path / name)[0]["test_loss"] for name in ("plain", "tta"))
    assert plain != tta


@pytest.mark.parametrize("name", ["cifar_quick", "tutorial", "shapes", "ants_bees", "fast"])
def test_the_configs_train(name, tmp_path):
    flags = ["--config", str(ROOT / "configs" / f"{name}.toml"), *QUICK, "--limit", "20"]
    assert train.cli([*flags, "--log-dir", str(tmp_path), "--run-name", "a"]) == 0
    stored = tomllib.loads((tmp_path / "a" / "config.toml").read_text())
    assert stored["batch_norm"] is (name != "tutorial") and stored["shuffle"] is (name != "tutorial")
    assert (stored["mean"] == [0, 0, 0]) is (name == "tutorial")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_trains(tmp_path):
    flags = "--data shapes --limit 1000 --epochs 3 --device cuda --run-name a --log-dir".split()
    assert train.cli([*flags, str(tmp_path)]) == 0


# ---- repeating ----


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path):
    for name, flags in (("a", []), ("b", []), ("c", ["--seed", "1"])):
        assert train.cli([*QUICK, "--log-dir", str(tmp_path), "--run-name", name, *flags]) == 0
    assert same_weights(tmp_path / "a" / "best.pt", tmp_path / "b" / "best.pt")
    assert not same_weights(tmp_path / "a" / "best.pt", tmp_path / "c" / "best.pt")


def test_the_runs_config_repeats_the_run(tmp_path):
    logs = ["--log-dir", str(tmp_path)]
    odd = "--crop 3 --lr 0.03 --schedule cosine --cutout 5 --weight-decay 1e-5 --batch-size 50".split()
    assert train.cli([*QUICK, *odd, *logs, "--run-name", "first"]) == 0
    assert train.cli(["--config", str(tmp_path / "first" / "config.toml"), *logs, "--run-name", "second"]) == 0
    assert same_weights(tmp_path / "first" / "best.pt", tmp_path / "second" / "best.pt")
    assert (tmp_path / "first" / "config.toml").read_text() == (tmp_path / "second" / "config.toml").read_text()


# ---- runs that fail ----


def test_a_log_folder_that_is_a_file_is_refused_before_pictures_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("")
    assert train.cli([*QUICK, "--log-dir", "a file"]) == 2
    assert capsys.readouterr().err == "train.py: --log-dir 'a file': a file is no folder\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nowhere"], "no data 'nowhere'"),
        (["--lr", "1e30", "--no-batch-norm"], "the loss is nan in epoch 1, step"),
        (["--lr", "1e30", "--limit", "20"], "the test loss is nan"),
    ],
)
def test_a_run_that_fails_ends_in_one_line_and_status_1(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.cli([*QUICK, *flags]) == 1
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("train.py: ") and message in error[-1] and len(error) <= 2
    assert not list(tmp_path.glob("logs/*/*.pt"))

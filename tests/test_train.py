import io
import json
import math
import re
import sys
import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, same_weights
from PIL import Image

import datasets
import model
import train
import views

QUICK = "--data shapes --limit 200 --epochs 1 --device cpu --no-views".split()


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0}).Reload()


# ---- what a run does and leaves ----


def test_it_learns(colour_run):
    assert metrics(colour_run)[-1]["test_accuracy"] == 1.0


def test_the_run_folder(run):
    names = {path.name for path in run.iterdir() if not path.name.startswith("events.")}
    assert names == {"config.toml", "metrics.jsonl", "best.pt", "epoch_001.pt", "epoch_002.pt", "epoch_003.pt"}
    assert len(list(run.glob("events.out.tfevents.*"))) == 1


def test_metrics_have_a_line_an_epoch(run):
    lines = metrics(run)
    assert [line["epoch"] for line in lines] == [1, 2, 3] and [line["step"] for line in lines] == [16, 32, 48]
    for line in lines:
        assert list(line) == [
            *("epoch", "step", "train_loss", "train_accuracy", "lr", "epoch_seconds", "images_per_second"),
            *("test_loss", "test_accuracy"),
        ]
        assert 0 <= line["test_accuracy"] <= 1
        assert line["images_per_second"] == pytest.approx(1000 / line["epoch_seconds"])
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]


def test_checkpoints_can_be_resumed_and_the_best_is_small(run):
    checkpoint = torch.load(run / "epoch_003.pt", weights_only=True)
    assert set(checkpoint) == {*model.CONTENT, "training"}
    parts = {"optimizer", "schedule", "scaler", "confidence", "sums", "clock", *train.RESUMED}
    assert set(checkpoint["training"]) == parts and checkpoint["training"]["history"] == metrics(run)
    assert len(checkpoint["training"]["optimizer"]["state"]) == len(list(model.CifarQuick().parameters()))
    assert checkpoint["config"]["limit"] == 1000 and checkpoint["epoch"] == 3
    best = torch.load(run / "best.pt", weights_only=True)
    assert set(best) == set(model.CONTENT)
    assert best["metrics"]["test_accuracy"] == max(line["test_accuracy"] for line in metrics(run))
    assert same_weights(run / "best.pt", run / f"epoch_{best['epoch']:03}.pt")


def test_test_figures_are_exact_means_in_eval_mode(run):
    network, checkpoint = model.load(run / "epoch_003.pt")
    [test_set] = datasets.load("shapes", limit=1000, mean=checkpoint["mean"], std=checkpoint["std"], splits=["test"])
    images, labels = next(test_set.batches(1000))
    with torch.no_grad():
        logits = model.mean_of_views(network, images, checkpoint["config"]["tta"])
    assert checkpoint["metrics"]["test_accuracy"] == (logits.argmax(1) == labels).sum().item() / 1000
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert checkpoint["metrics"]["test_loss"] == pytest.approx(expected, abs=1e-5)


def test_training_figures_are_exact_means_too(tmp_path):
    flags = "--lr 1e-30 --no-batch-norm --no-flip --crop 0 --label-smoothing 0 --precision fp32 --run-name a".split()
    assert train.cli([*QUICK, *flags, "--log-dir", str(tmp_path)]) == 0  # 200 pictures: the last batch has 8
    network, checkpoint = model.load(tmp_path / "a" / "epoch_001.pt")
    train_set, _ = datasets.load("shapes", limit=200)
    scores = model.score(*model.outputs(network, train_set.batches(50)))
    assert checkpoint["metrics"]["train_loss"] == pytest.approx(scores["loss"], rel=1e-4)
    assert checkpoint["metrics"]["train_accuracy"] == pytest.approx(scores["accuracy"], abs=0.006)


def test_mistakes_are_those_of_the_best_epoch(tmp_path, monkeypatch, capsys):
    add_epoch = train.add_epoch

    def first_is_best(run, trainer, metrics, *more):
        metrics["test_accuracy"] = 1 / metrics["epoch"]
        return add_epoch(run, trainer, metrics, *more)

    monkeypatch.setattr(train, "add_epoch", first_is_best)
    assert train.cli([*QUICK, "--epochs", "2", "--log-dir", str(tmp_path), "--run-name", "a"]) == 0
    found = []
    for name in ("best", "epoch_002"):
        network, checkpoint = model.load(tmp_path / "a" / f"{name}.pt")
        [test_set] = datasets.load("shapes", limit=200, splits=["test"])
        pairs = views.count_pairs(*model.outputs(network, test_set.batches(50), checkpoint["config"]["tta"]))
        found.append(f"most mistaken: {', '.join(views.worst_pairs(pairs, test_set.classes))}")
    assert found[0] in capsys.readouterr().out.splitlines() and found[0] != found[1]


def test_every_setting_of_the_data_is_heeded(colour_folder):
    how = {"image_size": 20, "resize": 30, "interpolation": "bicubic", "limit": 12}
    how |= {"mean": (0.1, 0.2, 0.3), "std": (0.2, 0.3, 0.4)}
    found = train.load_data(train.Config(data=str(colour_folder), **how), torch.device("cpu"))
    for pictures, expected in zip(found, datasets.load(str(colour_folder), **how), strict=True):
        assert torch.equal(pictures.images, expected.images) and torch.equal(pictures.labels, expected.labels)
        assert (pictures.mean, pictures.std) == (expected.mean, expected.std)
    plain = datasets.load(str(colour_folder), **how | {"resize": 20})[0]
    assert not torch.equal(found[0].images, plain.images)


def test_tensorboard_gets_all_tags_at_the_same_steps(run):
    accumulator = events(run)
    tags = accumulator.Tags()
    scalars = {"loss/train", "loss/test", "accuracy/train", "accuracy/test", "lr", "images_per_second"}
    scalars |= {"epoch_seconds", "gradient_norm", "memory_mib"}
    assert set(tags["scalars"]) == scalars and tags["graph"]
    for tag in scalars:
        assert [event.step for event in accumulator.Scalars(tag)] == [16, 32, 48]
    values = [event.value for event in accumulator.Scalars("accuracy/test")]
    assert values == pytest.approx([line["test_accuracy"] for line in metrics(run)])


def test_samples_are_augmented_training_pictures(run):
    picture = Image.open(io.BytesIO(events(run).Images("samples")[0].encoded_image_string))
    first = np.asarray(picture)[4:100, 4:100][::3, ::3].astype(int)
    checkpoint = torch.load(run / "best.pt", weights_only=True)
    config = train.Config(**checkpoint["config"])
    train_set, _ = datasets.load("shapes", limit=1000)
    augment = train.augmentation(config)
    images, _ = next(train_set.take(torch.arange(16)).batches(16, augment=augment, seed=config.seed, epoch=0))
    expected = datasets.denormalize(images[:1], train_set.mean, train_set.std)[0].permute(1, 2, 0)
    assert picture.size[0] >= 4 * 96 and np.abs(first - expected.numpy()).max() <= 1


def test_hparams_are_in_the_same_run(run):
    content = events(run).summary_metadata
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(content)
    assert len(list(run.parent.iterdir())) == 1


def test_what_is_printed(tmp_path, capsys):
    assert train.cli([*QUICK, "--epochs", "2", "--log-dir", str(tmp_path / "my logs"), "--run-name", "a"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 6 and all(len(line) <= 100 for line in out[:2])
    assert out[0].startswith("epoch 1/2  train loss ") and out[0].endswith("  <- best")
    assert out[2].startswith("best: epoch ") and out[2].endswith("(chosen on the test pictures)")
    best = tmp_path / "my logs" / "a" / "best.pt"
    assert re.fullmatch(r"most mistaken: (\w+ taken for \w+ \d+ %(, )?){3}", out[3])
    assert out[4] == f'python predict.py YOUR_PICTURE --checkpoint "{best}"' and best.exists()
    assert out[5] == f'tensorboard --logdir "{tmp_path / "my logs"}"'


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_line_file_and_tensorboard_have_the_same_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    flags = "--data shapes --limit 480 --batch-size 2 --epochs 2 --device cpu --no-views --run-name a --log-dir".split()
    assert train.cli([*flags, str(tmp_path)]) == 0
    curve = {event.step: event.value for event in events(tmp_path / "a").Scalars("loss/train")}
    assert [*curve] == [100, 200, 240, 340, 440, 480]
    on_bar = re.findall(r"epoch 1/2: [^\r]*, loss ([0-9.]+), run 0:00:\d\d left", terminal.getvalue())
    assert on_bar and float(on_bar[0]) == pytest.approx(curve[100], abs=6e-4)
    for text, line in zip(capsys.readouterr().out.splitlines(), metrics(tmp_path / "a"), strict=False):
        printed = [float(number) for number in re.findall(r"(?:loss|acc) ([0-9.]+)", text)]
        values = [line["train_loss"], 100 * line["train_accuracy"], line["test_loss"], 100 * line["test_accuracy"]]
        assert printed == [round(value, 3 - 2 * (place % 2)) for place, value in enumerate(values)]
        assert curve[line["step"]] == pytest.approx(line["train_loss"], abs=1e-4)


def test_a_quiet_run_says_nothing_but_its_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TQDM_DISABLE", "")
    assert train.cli([*QUICK, "--quiet", "--log-dir", str(tmp_path)]) == 0
    assert terminal.getvalue() == "" and capsys.readouterr().out.startswith("epoch 1/1")
    assert train.cli([*QUICK, "--quiet", "--data", "nowhere", "--log-dir", str(tmp_path)]) == 1
    assert terminal.getvalue().startswith("train.py: no data 'nowhere'")


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


def test_every_setting_survives_the_config_file(tmp_path):
    config = train.Config(data='a "b" \\ ü 😀', mean=(0.1, 0.2, 0.3), std=(1.0, 1e-7, 1.0), lr=1e-5, compile=True)
    (tmp_path / "c.toml").write_text(train.as_toml(config), encoding="utf-8")
    assert train.read_config(tmp_path / "c.toml") == config


def test_two_runs_of_the_same_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(train.time, "strftime", lambda _: "now")
    runs = [train.Run() for _ in range(3)]
    for run in runs:
        train.open_folder(run, train.Config(log_dir=str(tmp_path)), {}, 0)
    assert [run.folder.name for run in runs] == ["now_cifar_quick", "now_cifar_quick_2", "now_cifar_quick_3"]


# ---- the recipe ----


@pytest.mark.parametrize("loss", model.LOSSES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_loss_and_precision_trains(colour_folder, tmp_path, loss, precision):
    flags = (
        f"--epochs 8 --batch-size 20 --device cpu --no-views --loss {loss} --precision {precision} --run-name a".split()
    )
    assert train.cli(["--data", str(colour_folder), "--log-dir", str(tmp_path), *flags]) == 0
    assert max(line["test_accuracy"] for line in metrics(tmp_path / "a")) > 0.6


def test_a_batch_that_leaves_one_picture_over_trains(tmp_path):
    flags = "--data shapes --limit 21 --batch-size 10 --epochs 1 --device cpu --no-views --run-name a --log-dir".split()
    assert train.cli([*flags, str(tmp_path)]) == 0
    assert metrics(tmp_path / "a")[0]["step"] == 2


def test_onecycle_climbs_and_falls_to_nearly_nothing():
    config = train.Config(schedule="onecycle")
    shares = [train.learning_rate(config, 1000, step) for step in range(1000)]
    peak = shares.index(max(shares))
    assert 0.98 < max(shares) <= 1 and 190 <= peak <= 201
    assert 0 < shares[0] < 0.01 and 0 < shares[-1] < 0.01
    assert all(0 < train.learning_rate(config, steps, step) <= 1 for steps in (1, 2, 3, 7) for step in range(steps))


def test_cosine_and_constant():
    cosine = [train.learning_rate(train.Config(schedule="cosine"), 4, step) for step in range(5)]
    assert cosine == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0])
    assert train.learning_rate(train.Config(schedule="constant"), 4, 3) == 1


def test_a_step_is_nesterov_sgd_with_decay_of_weights_alone():
    network = model.CifarQuick(classes=2, image_size=8)
    config = train.Config(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    device = torch.device("cpu")
    trainer = train.make_trainer(network, config, 10, device, torch.float32)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    loss = model.loss_function(network(images), labels)
    gradients = dict(zip(before, torch.autograd.grad(loss, network.parameters()), strict=True))
    for layer in network.modules():
        if hasattr(layer, "reset_running_stats"):
            layer.reset_running_stats()
    trainer.step(images, labels, config)
    for name, value in network.named_parameters():
        gradient = gradients[name] + (0.01 * before[name] if value.ndim > 1 else 0)
        assert torch.allclose(value, before[name] - 0.1 * 1.9 * gradient, atol=1e-5), name


def test_a_batch_in_pieces_is_the_same_step():
    images, labels, found = torch.rand(7, 3, 8, 8), torch.arange(7) % 2, []
    for pieces in (1, 3):
        torch.manual_seed(0)
        network = model.CifarQuick(classes=2, image_size=8, batch_norm=False)
        config = train.Config(lr=0.1, accumulate=pieces)
        trainer = train.make_trainer(network, config, 10, torch.device("cpu"), torch.float32)
        loss, logits = trainer.step(images, labels, config)
        found.append([loss, logits, *network.parameters()])
    for whole, in_pieces in zip(*found, strict=True):
        assert torch.allclose(whole, in_pieces, atol=1e-6)


def test_training_goes_through_the_batches_of_each_epoch_and_draws_anew_at_each_step(tmp_path, monkeypatch):
    steps, seeds, step = [], [], train.Trainer.step

    def noted(trainer, images, labels, *more):
        steps.append((images.clone(), labels))
        seeds.append(torch.initial_seed())
        return step(trainer, images, labels, *more)

    monkeypatch.setattr(train.Trainer, "step", noted)
    flags = "--data shapes --limit 50 --epochs 2 --batch-size 10 --flip --crop 3 --cutout 8 --seed 5 --device cpu"
    assert train.cli([*flags.split(), "--no-views", "--log-dir", str(tmp_path)]) == 0
    train_set, _ = datasets.load("shapes", limit=50)
    augment = datasets.Augment(flip=True, crop=3, cutout=8)
    expected = [batch for epoch in (1, 2) for batch in train_set.batches(10, True, augment, 5, epoch)]
    for (images, labels), (of_images, of_labels) in zip(steps, expected, strict=True):
        assert torch.equal(images, of_images) and torch.equal(labels, of_labels)
    assert len(set(seeds)) == len(seeds) == 10


def test_muon_remembers_gradients_and_shrinks_weights():
    weight = torch.nn.Parameter(torch.randn(8, 4))
    idle = torch.nn.Parameter(torch.ones(2, 2))  # no answer hangs on it
    groups = [{"params": [weight, idle], "lr": 0.1, "weight_decay": 0.5, "orthogonal": True}]
    optimizer = train.Muon(groups, 0.1, 0.9, nesterov=True, precision=torch.float32)
    gradients = torch.randn(3, 8, 4)
    expected, buffer = weight.detach().clone(), torch.zeros(8, 4)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        buffer = 0.9 * buffer + gradient
        step = train.orthogonal(gradient + 0.9 * buffer)
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * 2**0.5 * step
    assert torch.allclose(weight, expected, atol=1e-5) and torch.equal(idle, torch.ones(2, 2))


@pytest.mark.parametrize("shape", [(32, 3, 5, 5), (64, 32), (8, 200), (200, 8)])
def test_orthogonal_matrices_have_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).flatten(1)
    found = train.orthogonal(1e-4 * matrix)
    assert found.shape == matrix.shape and found.dtype == matrix.dtype
    singular, before = torch.linalg.svdvals(found), torch.linalg.svdvals(matrix) / matrix.norm()
    assert singular[before > 0.03].min() > 0.6 and singular.max() < 1.25
    nearest, _, other = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(found.flatten(), (nearest @ other).flatten(), 0) > 0.97


def test_muon_makes_hidden_weights_steps_orthogonal_and_the_rest_as_sgd():
    config = train.Config(lr=0.1, muon_lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.01)
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    found = {}
    for name in ("sgd", "muon"):
        torch.manual_seed(0)
        network = model.CifarQuick(classes=2, image_size=8)
        head = model.head_keys("cifar_quick", {"image_size": 8})
        config = replace(config, optimizer=name)
        trainer = train.make_trainer(network, config, 10, torch.device("cpu"), torch.float32, head)
        before = {key: value.detach().clone() for key, value in network.named_parameters()}
        trainer.step(images, labels, config)
        found[name] = {key: value.detach() - before[key] for key, value in network.named_parameters()}
        assert trainer.schedule.get_last_lr()[0] < 0.1 or config.schedule == "constant"
    for key, step in found["muon"].items():
        if step.ndim == 1 or key in head:
            assert torch.equal(step, found["sgd"][key]), key
        else:
            shrunk = step + 0.02 * 0.01 * before[key]
            singular = torch.linalg.svdvals(shrunk.flatten(1)) / 0.02 / max(1, len(step) / step[0].numel()) ** 0.5
            assert 0.8 < singular.max() < 1.3 and not torch.allclose(step, found["sgd"][key], atol=1e-4), key


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_muon_skips_a_step_that_overflowed_in_fp16():
    network, config = model.CifarQuick(classes=2, image_size=8), train.Config(optimizer="muon", momentum=0.9)
    trainer = train.make_trainer(network, config, 10, torch.device("cpu"), torch.float32)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    trainer.step(torch.full((4, 3, 8, 8), 1e3), torch.tensor([0, 1, 0, 1]), config)
    assert all(torch.equal(value, before[name]) for name, value in network.named_parameters())
    assert trainer.scaler.get_scale() < 2.0**127


def test_every_recipe_option_changes_the_result_and_is_remembered(tmp_path, colour_folder):
    flags = ["--data", str(colour_folder), *"--epochs 2 --batch-size 20 --device cpu --no-views".split()]
    options = {"plain": "--no-whiten --tta none", "white": "--whiten --tta none", "tta": "--no-whiten --tta shift"}
    options["muon"] = "--no-whiten --tta none --optimizer muon"
    for name, more in options.items():
        assert train.cli([*flags, "--log-dir", str(tmp_path), "--run-name", name, *more.split()]) == 0
    for name in ("white", "muon"):
        assert not same_weights(tmp_path / "plain" / "epoch_002.pt", tmp_path / name / "epoch_002.pt")
    assert same_weights(tmp_path / "plain" / "epoch_002.pt", tmp_path / "tta" / "epoch_002.pt")
    losses = [metrics(tmp_path / name)[0]["test_loss"] for name in ("plain", "tta")]
    assert losses[0] != losses[1]


def test_labels_are_smoothed_in_training_alone(tmp_path):
    flags = [*QUICK, *"--epochs 2 --lr 1e-30 --no-flip --crop 0 --log-dir".split(), str(tmp_path), "--run-name"]
    assert train.cli([*flags, "plain", "--label-smoothing", "0"]) == 0
    assert train.cli([*flags, "smooth", "--label-smoothing", "0.5"]) == 0
    plain, smooth = (metrics(tmp_path / name)[-1] for name in ("plain", "smooth"))
    assert plain["train_loss"] != smooth["train_loss"] and plain["test_loss"] == smooth["test_loss"]


def test_the_first_of_equal_epochs_is_the_best():
    history = [{"epoch": epoch, "test_accuracy": share} for epoch, share in ((1, 0.3), (2, 0.5), (3, 0.5))]
    assert train.best_of(history)["epoch"] == 2


def test_the_second_half_trains_on_the_hardest_pictures(tmp_path, capsys):
    flags = "--data shapes --limit 500 --epochs 3 --batch-size 50 --hardest 0.3 --device cpu --no-views --run-name a"
    assert train.cli([*flags.split(), "--log-dir", str(tmp_path)]) == 0
    assert [line["step"] for line in metrics(tmp_path / "a")] == [10, 20, 23]
    checkpoints = [torch.load(tmp_path / "a" / f"epoch_{n:03}.pt", weights_only=True) for n in (2, 3)]
    before, after = (checkpoint["training"]["confidence"] for checkpoint in checkpoints)
    assert checkpoints[1]["training"]["schedule"]["last_epoch"] == 23 and checkpoints[1]["metrics"]["lr"] < 0.02
    seen = before != after  # in the last epoch
    assert abs(seen.sum().item() - 150) <= 1 and before[seen].max() <= before[~seen].min()
    assert before.min() > 0 and before.max() < 1


def test_held_out_pictures_choose_the_epoch_and_the_test_comes_last(tmp_path, capsys):
    flags = "--data shapes --limit 200 --epochs 2 --val-fraction 0.2 --device cpu --no-views --run-name a --log-dir"
    assert train.cli([*flags.split(), str(tmp_path)]) == 0
    lines, best = metrics(tmp_path / "a"), torch.load(tmp_path / "a" / "best.pt", weights_only=True)
    assert all("val_accuracy" in line and "test_accuracy" not in line for line in lines)
    assert best["metrics"]["val_accuracy"] == max(line["val_accuracy"] for line in lines)
    out = capsys.readouterr().out
    assert f"test accuracy {best['metrics']['test_accuracy']:.1%}" in out and "chosen on" not in out
    assert [event.step for event in events(tmp_path / "a").Scalars("accuracy/test")] == [best["metrics"]["step"]]


def test_it_is_the_best_epochs_network_that_is_tested(tmp_path, monkeypatch):
    add_epoch = train.add_epoch

    def first_is_best(run, trainer, metrics, *more):
        metrics["val_accuracy"] = 1 / metrics["epoch"]
        return add_epoch(run, trainer, metrics, *more)

    monkeypatch.setattr(train, "add_epoch", first_is_best)
    flags = "--data shapes --limit 200 --epochs 2 --val-fraction 0.2 --device cpu --precision fp32 --run-name a"
    assert train.cli([*flags.split(), "--log-dir", str(tmp_path)]) == 0
    network, best = model.load(tmp_path / "a" / "best.pt")
    [test_set] = datasets.load("shapes", limit=200, splits=["test"], mean=best["mean"], std=best["std"])
    scores = model.score(*model.outputs(network, test_set.batches(100), best["config"]["tta"]))
    assert best["epoch"] == 1 and best["metrics"]["test_loss"] == pytest.approx(scores["loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["cifar_quick", "tutorial", "shapes", "ants_bees", "fast"])
def test_the_configs_train(name, tmp_path):
    flags = ["--config", str(ROOT / "configs" / f"{name}.toml"), *QUICK, "--log-dir", str(tmp_path), "--run-name", "a"]
    assert train.cli(flags) == 0
    stored = tomllib.loads((tmp_path / "a" / "config.toml").read_text())
    assert stored["batch_norm"] is (name != "tutorial") and stored["shuffle"] is (name != "tutorial")
    assert (stored["mean"] == [0, 0, 0]) is (name == "tutorial")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_trains(tmp_path):
    flags = "--data shapes --limit 1000 --epochs 3 --device cuda --run-name a --log-dir".split()
    assert train.cli([*flags, str(tmp_path)]) == 0


# ---- mistakes: one line, an exit status, nothing left behind ----

MISTAKES = [
    ("--epochs -1", "--epochs: -1 is not at least 1"),
    ("--epochs 0", "--epochs: 0 is not at least 1"),
    ("--epochs 1.5", "argument --epochs: invalid int value: '1.5'"),
    ("--lr nan", "--lr: nan is not a finite number"),
    ("--lr inf", "--lr: inf is not a finite number"),
    ("--lr 0", "--lr: 0.0 is not above 0"),
    ("--batch-size 0", "--batch-size: 0 is not at least 1"),
    ("--batch-size 1", "add --no-batch-norm"),
    ("--momentum 1", "--momentum: 1.0 is not below 1"),
    ("--momentum 0", "--nesterov needs --momentum above 0"),
    ("--label-smoothing 1", "--label-smoothing: 1.0 is not below 1"),
    ("--limit 9 --data shapes", "--limit 9 is below the number of classes, 10"),
    ("--mean 0 0 0", "--mean and --std: give both or neither"),
    ("--mean 0 0 0 --std 1 0 1", "--std: 0.0 is not above 0"),
    ("--mean 0 0", "argument --mean: expected 3 arguments"),
    ("--seed 99999999999999999999", "--seed: 99999999999999999999 is not at most 9223372036854775807"),
    ("--crop 33", "--crop and --cutout can be at most the image size, 32 pixels"),
    ("--val-fraction 0.01 --limit 20 --data shapes", "--val-fraction 0.01 of 20 pictures leaves too few"),
    ("--loss hinge", "argument --loss: invalid choice: 'hinge'"),
    ("--schedule", "argument --schedule: expected one argument"),
    ("--epoch 3", "unknown flag --epoch; did you mean --epochs?"),
    ("--weigth-decay=3", "unknown flag --weigth-decay=3; did you mean --weight-decay?"),
    ("--frobnicate", "unknown flag --frobnicate"),
    ("shapes", "unknown flag shapes"),
    ("--device cuda:99", "no device 'cuda:99' here; this machine has: "),
    ("--precision fp16 --device cpu", "fp16 does not train well on cpu"),
    ("--image-size 4 --data shapes", "--image-size 4 is below 8"),
    ("--run-name ../x", "--run-name: '../x' cannot be a folder's name on every system, without a path"),
    *(
        (f"--run-name {name}", f"{name!r:.80} cannot be a folder's name on every system, without a path")
        for name in (
            "..",
            ".",
            "/x",
            "a/b",
            "a\\b",
            "c:",
            "con",
            "Aux.txt",
            "COM1",
            "lpt9.log",
            "a.",
            "a" * 300,
        )
    ),
    ("--run-name x\x1b", r"--run-name: 'x\x1b' has characters that cannot be printed"),
    ("--data caf\udce9", r"--data: 'caf\udce9' has characters that cannot be printed"),
    ("--clip-grad -1", "--clip-grad: -1.0 is not at least 0"),
    ("--patience -1", "--patience: -1 is not at least 0"),
    ("--time-limit -1", "--time-limit: -1.0 is not at least 0"),
    ("--keep -1", "--keep: -1 is not at least 0"),
    ("--resume", "--resume: no unfinished run in logs; --resume RUN --epochs N makes a finished one longer"),
    ("--resume x", "--resume x: no run there (its folder has a config.toml)"),
    ("--config nowhere.toml", "--config nowhere.toml: No such file or directory"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES)
def test_a_wrong_call_ends_in_one_line_and_status_2(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status = train.cli(flags.split())
    output = capsys.readouterr()
    assert status == 2 and message in output.err and output.err.count("\n") == 1 and not output.out
    assert output.err.startswith("train.py: ") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch = 3", "unknown key 'epoch'; did you mean epochs?"),
        ("colour = 3", "unknown key 'colour'"),
        ("epochs = 'three'", "epochs: 'three' is not of type int"),
        ("epochs = true", "epochs: True is not of type int"),
        ("flip = 1", "flip: 1 is not of type bool"),
        ("lr = '0.1'", "lr: '0.1' is not of type float"),
        ("epochs = -1", "epochs: -1 is not at least 1"),
        ("loss = 'cross-entropy'", "loss: 'cross-entropy' is not one of cross_entropy, mse, l1; did you mean"),
        ("mean = [0, 0]", "mean: [0, 0] is not one number for each of the three channels"),
        ("mean = [0, 0, 'x']", "mean: 'x' is not a finite number"),
        ("lr = nan", "lr: nan is not a finite number"),
        ("lr = 1" + 400 * "0", "lr: 1000000"),
        ("[recipe]\nlr = 1", "unknown key 'recipe'"),
        ("lr 3", "not a TOML file"),
        ("run_name = '../x'", "run_name: '../x' cannot be a folder's name"),
        ("lr = " + 5000 * "1", "not a TOML file"),
        ("mean = " + 100_000 * "[", "not a TOML file"),
        ('"\\u001b[2J" = 1', r"unknown key '\x1b[2J'"),
    ],
)
def test_a_wrong_config_file_is_named_with_its_key(content, message, tmp_path, capsys):
    path = tmp_path / "my.toml"
    path.write_text(content)
    status = train.cli(["--config", str(path)])
    error = capsys.readouterr().err
    assert status == 2 and f"train.py: {path}: {message}" in error and error.count("\n") == 1


def test_flags_overrule_the_config_file(tmp_path):
    (tmp_path / "my.toml").write_text("lr = 1\nepochs = 7\nflip = true")
    config = train.parse(["--config", str(tmp_path / "my.toml"), "--epochs", "3", "--no-flip"])[0]
    assert (config.lr, config.epochs, config.flip) == (1, 3, False)


def test_help_shows_groups_and_the_configs_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", str(ROOT / "configs" / "tutorial.toml"), "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "at its highest (default: 0.01)" in text
    for group in ("data:", "network:", "recipe:", "machine:", "run:"):
        assert f" {group} " in text
    assert all(f"--{name.replace('_', '-')}" in text for name in train.Config.__dataclass_fields__)


def test_an_existing_run_is_never_written_over(run, capsys):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert train.cli([*QUICK, "--log-dir", str(run.parent), "--run-name", run.name]) == 2
    assert f"{run} exists already" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nowhere"], "no data 'nowhere'"),
        (["--log-dir", "a file"], "a file: "),
        (["--lr", "1e30", "--no-batch-norm"], "the loss is nan in epoch 1, step"),
        (["--lr", "1e30", "--limit", "20"], "the test loss is nan"),
    ],
)
def test_a_run_that_fails_ends_in_one_line_and_status_1(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("")
    assert train.cli([*QUICK, *flags]) == 1
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("train.py: ") and message in error[-1] and len(error) <= 2
    assert not list(tmp_path.glob("logs/*/*.pt"))

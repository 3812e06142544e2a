"""Settings together: each value of each setting meets each value of every other one in some short run.

Such a choice of runs is a covering array (Cohen et al. 1997, doi.org/10.1109/32.605761): most faults of combinations
are those of two settings. A few of the runs are always made, `--all` makes all of them, and `.ci/floor --all` makes
them on the oldest versions.
"""

import itertools
import json
import math
import random
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import noisy, save
from runs import at_steps, contents, differences, send
from samples import a_checkpoint
from test_groups import group
from torch import nn

import model
import train
from quick.cli import flag
from quick.errors import CallError
from quick.nets.transfer import stages
from quick.processes import Group
from quick.run.config import resolve
from quick.run.rules import check_together
from quick.run.settings import Config

FEW = 6  # of the runs, which cover most pairs
EPOCHS = 2
CUDA = torch.cuda.is_available()
FIXED = {"epochs": EPOCHS, "device": "cuda" if CUDA else "cpu", "deterministic": CUDA, "workers": 0}
TOGETHER = {  # by setting, or by what several settings are about
    "model": [
        {"model": "cifar_quick", "image_size": 8},
        {"model": "cifar_quick", "image_size": 10, "batch_norm": False, "resize": 12},
        {"model": "fast", "image_size": 8, "width": 0.25},
        {"model": "squeezenet1_1", "image_size": 32},
        {"model": "shufflenet_v2_x0_5", "image_size": 16, "stem": "small"},
    ],
    "activation": ["auto", "gelu"],
    "memory": [{"memory_share": 0.4}, {"memory_share": 0.0}],
    "interpolation": ["auto", "bicubic"],
    "fit": ["auto", "pad", "squash"],
    "weights": ["none", "same classes", "other classes"],
    "head": ["auto", "replace", "append"],
    "freeze": ["0", "1", "all"],
    "optimizer": ["sgd", "muon", "adamw"],
    "momentum": [{"momentum": 0.0}, {"momentum": 0.9}, {"momentum": 0.8, "nesterov": True}],
    "lr": [0.0, 0.02],
    "backbone_lr": [0.0, 0.001],
    "weight_decay": [0.0, 0.01],
    "schedule": ["constant", "onecycle", "cosine"],
    "warmup": [0.0, 0.6],
    "precision": ["fp32", "bf16", *["fp16"] * CUDA],
    "augmentation": [
        {},
        {"flip": True, "crop": 2},
        {"flip_vertical": True, "rotate": 30.0},
        {"resized_crop": 0.5, "jitter": 0.3, "cutout": 3},
    ],
    "batch_size": [4, 7, 64],
    "accumulate": [1, 3],
    "sync_bn": [False, True],
    "hardest": [1.0, 0.5],
    "balance": [0.0, 0.7],
    "best": ["accuracy", "f1", "loss"],
    "loss": [{"loss": "cross_entropy"}, {"loss": "mse"}, {"loss": "l1"}, {"label_smoothing": 0.2}],
    "clip_grad": [0.0, 0.5],
    "tta": ["none", "mirror", "shift"],
    "whiten": [False, True],
    "held out": [{}, {"val_fraction": 0.3}, {"fold": 2, "folds": 4}],
    "shuffle": [True, False],
    "labels": ["", "labels.csv"],
    "views": [{"views": False}, {"views": True, "histograms": True, "embedding": True}],
}


# In two processes, with the auxiliary classifiers of GoogLeNet, whose weights an appended head would leave without use.
IN_GROUPS = {
    "model": [
        {"model": "cifar_quick", "image_size": 8},
        {"model": "fast", "image_size": 8, "width": 0.25},
        {"model": "googlenet", "image_size": 32},
    ],
    "batch_size": [6, 7],  # with which a process has a picture for each piece, or the last batch has too few
    **{name: TOGETHER[name] for name in ("weights", "head", "freeze", "optimizer", "accumulate", "sync_bn", "hardest")},
    **{name: TOGETHER[name] for name in ("memory", "clip_grad", "held out", "balance")},
    "precision": ["fp32", "bf16"],
    "augmentation": [{}, {"flip": True, "jitter": 0.3}],
    "tta": ["none", "mirror"],
    "lr": [0.02],  # with the rate that fits it, GoogLeNet does not learn from so few pictures
    "views": [{"views": False}],
}


# ---- which runs to make ----


def covering_array(factors: dict[str, Sequence], allowed: Callable[[Config], bool], tries: int = 60) -> list[Config]:
    """Configs in which all pairs of values of two factors occur that an allowed config can have.

    Greedy: each is the best of some random ones around a pair that is still missing. So the first ones cover most.
    """
    dice, configs = random.Random(0), []
    names = list(factors)
    places = {name: range(len(values)) for name, values in factors.items()}
    missing = {
        ((one, a), (other, b)): None  # a dict is a set in order
        for one, other in itertools.combinations(names, 2)
        for a, b in itertools.product(places[one], places[other])
    }
    while missing:
        pair, found = next(iter(missing)), []
        for _ in range(tries):
            row = {name: dice.choice(places[name]) for name in names} | dict(pair)
            config = config_of({name: factors[name][place] for name, place in row.items()})
            if allowed(config):
                found.append((config, [new for new in itertools.combinations(row.items(), 2) if new in missing]))
        best, covered = max(found, key=lambda candidate: len(candidate[1]), default=(None, [pair]))
        configs += [best] if best else []  # else no config with this pair is allowed
        for new in covered:
            del missing[new]
    return configs


def config_of(row: dict[str, object]) -> Config:
    values = dict(FIXED)
    for name, value in row.items():
        values |= value if isinstance(value, dict) else {name: value}
    return Config(**values)


def origin(config: Config) -> dict | None:
    """The checkpoint that a run starts from, without its weights."""
    if config.weights == "none":
        return None
    classes = {"same classes": ["blue", "green", "red"], "other classes": ["cat", "dog"]}[config.weights]
    activation = config.activation if config.model in model.NETWORKS else "auto"
    options = model.config_options(replace(config, head="auto", activation=activation), len(classes))
    checkpoint = a_checkpoint(nn.Module(), config.model, **options)
    return checkpoint | {"classes": classes, "resize": config.resize or config.image_size}


def refusal(config: Config, size: int = 1) -> str:
    """What so many processes say against a config, as they do before they read any picture; empty if they train."""
    try:
        check_together(config, Group(size=size), model.NETWORKS)
        pretrained = origin(config)
        model.config_options(resolve(config, pretrained), 3, pretrained)
    except CallError as error:
        return str(error)
    return ""


REFUSED = {}  # a config for each way to be refused


def is_allowed(config: Config) -> bool:
    error = refusal(config)
    if error:
        networks = "|".join({value["model"] for value in TOGETHER["model"]})
        REFUSED.setdefault(re.sub(rf"[\d.]+|{networks}", "#", error), (config, error))
    return not error


CONFIGS = covering_array(TOGETHER, is_allowed)
KNOWN = {
    "model": IN_GROUPS["model"][-1],
    "batch_size": 6,
    "head": "append",
    "accumulate": 3,
    "views": TOGETHER["views"][0],
    "lr": 0.02,
}
GROUPED = [config_of(KNOWN), *covering_array(IN_GROUPS, lambda config: not refusal(config, 2), tries=20)]


# ---- making them ----


@pytest.fixture(scope="module")
def few_colours(tmp_path_factory) -> Path:
    """Three classes of tiny pictures: 11 to train on, 5 to test on."""
    root = tmp_path_factory.mktemp("few")
    colours = {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (220, 40, 30)}
    for split, counts in (("train", (4, 4, 3)), ("test", (2, 2, 1))):
        for (name, colour), count in zip(colours.items(), counts, strict=True):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                noisy(colour, number, (14, 12)).save(root / split / name / f"{number}.png")
    names = [path.relative_to(root).as_posix() for path in root.glob("*/*/*.png")]
    rows = ["file,label", *(f"{name},{name.split('/')[1]}" for name in names)]
    (root / "labels.csv").write_text("\n".join(rows), encoding="utf-8")
    return root


def flags_of(config: Config, data: Path, folder: Path) -> list[str]:
    """The config as it is typed on a command line; the weights that it starts from are written into the folder."""
    flags = ["--data", str(data), "--log-dir", str(folder), "--run-name", "run"]
    values = {name: getattr(config, name) for name in config.__dataclass_fields__}
    for name, value in values.items():
        if name == "weights" and value != "none":
            checkpoint = origin(config)
            torch.manual_seed(1)
            network = model.create(config.model, checkpoint["model"]["options"])
            save(folder / "origin.pt", checkpoint | {"state_dict": network.state_dict()})
            flags += ["--weights", str(folder / "origin.pt")]
        elif value != Config.__dataclass_fields__[name].default or name == "workers":
            flags += flag(name, value).split()
    return [*flags, *([] if config.whiten else ["--no-whiten"]), "--schedule", config.schedule, "--tta", config.tta]


def check_metrics(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    numbers = [value for line in lines for name, value in line.items() if "loss" in name or "accuracy" in name]
    assert len(lines) >= EPOCHS and numbers and all(map(math.isfinite, numbers))


def frozen_weights(config: Config, network: nn.Module, head: list[str]) -> set[str]:
    """The parameters that must stay as they are."""
    stage_of, last_layer = stages(network, head), head[-1].rpartition(".")[0]
    if config.freeze == "all":
        return {name for name in stage_of if name.rpartition(".")[0] != last_layer}
    return {name for name, stage in stage_of.items() if stage and str(stage) == config.freeze}


def last_weights(run: Path) -> dict:
    weights = torch.load(run / f"epoch_{EPOCHS:03}.pt", weights_only=True, map_location="cpu")["state_dict"]
    assert all(value.isfinite().all() for value in weights.values())
    return weights


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=[] if n < FEW else pytest.mark.expensive) for n in range(len(CONFIGS))]
)
def test_settings_work_together(number, few_colours, tmp_path, monkeypatch):
    config = CONFIGS[number]
    flags, begun, make = flags_of(config, few_colours, tmp_path), [], train.make_network

    def spy(*inputs):
        network, options, head = make(*inputs)
        first = model.create(config.model, options)
        first.load_state_dict(network.state_dict())
        begun.append((first, head))
        return network, options, head

    monkeypatch.setattr(train, "make_network", spy)
    assert train.cli(flags) == 0, flags
    check_metrics(tmp_path / "run")
    (network, head), after = begun[0], last_weights(tmp_path / "run")
    before, frozen = network.state_dict(), frozen_weights(config, network, head)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    layers = {name.rpartition(".")[0] for name in frozen}  # with their averages, if they are batch normalisation
    assert {name for name in moved if name.rpartition(".")[0] in layers} == set(), "frozen, but changed"
    matrices = {name for name, weight in network.named_parameters() if weight.ndim > 1}  # others may not matter
    if config.precision != "fp16":  # which leaves out the first steps, until it knows how far it can scale the loss
        assert matrices - frozen - moved == set(), "trained, but unchanged"

    if number % 3 == 0:  # these are stopped as well
        whole = contents(tmp_path / "run")
        (tmp_path / "run").rename(tmp_path / "whole")
        at_steps(monkeypatch, {2: send(signal.SIGINT)})
        assert train.cli(flags) == 130
        assert train.cli(["--resume", str(tmp_path / "run")]) == 0
        assert not differences(whole, contents(tmp_path / "run")), flags


def test_what_cannot_go_together_is_one_line(few_colours, tmp_path, capsys):
    flags = {error.split()[0] for _, error in REFUSED.values()}
    assert flags == {"--freeze", "--head", "--backbone-lr:", "--activation", "--warmup:", "--resize"}
    for number, (config, error) in enumerate(REFUSED.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        shown = error.replace(f"--weights {config.weights}", f"--weights {folder / 'origin.pt'}")
        assert train.cli(flags_of(config, few_colours, folder)) == 2
        assert capsys.readouterr().err == f"train.py: {shown}\n" and not (folder / "run").exists()


@pytest.mark.expensive
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs PyTorch with torch.distributed")
def test_settings_work_together_in_a_group(processes, few_colours, tmp_path):
    """Two processes make all of these runs, one after the other; all begin with weights whose frozen ones stay."""
    plan = {}
    for number, config in enumerate(GROUPED):
        (tmp_path / str(number)).mkdir()
        flags = flags_of(replace(config, device="cpu"), few_colours, tmp_path / str(number))
        plan[str(number)] = {"script": "train", "argv": flags}
    found, _ = group(processes, 2, plan, tmp_path / "plan")
    for name, config in zip(plan, GROUPED, strict=True):
        first, second = (of_rank[name] for of_rank in found)
        assert [first[0], second[0]] == [0, 0], (plan[name]["argv"], first, second)
        run = tmp_path / name / "run"
        check_metrics(run)
        after = last_weights(run)
        network, checkpoint = model.load(run / "best.pt")
        head = model.head_keys(config.model, checkpoint["model"]["options"])
        frozen = frozen_weights(config, network, head) if config.freeze != "0" else set()
        before = torch.load(tmp_path / name / "origin.pt", weights_only=True)["state_dict"] if frozen else {}
        for key in frozen - set(head):
            assert torch.equal(after[key], before[key.removeprefix("network.")]), key

"""Train a picture classifier: configuration -> device -> data -> network -> epochs -> run folder.

`python train.py --epochs 10` trains CIFAR-quick on CIFAR-10; read `main()` first, it tells the whole story.
"""

import argparse
import contextlib
import datetime
import errno
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import Field, asdict, dataclass, field, fields, replace
from operator import itemgetter
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

import datasets
import model
import views
from device import (
    CallError,
    Group,
    Interrupted,
    Interrupts,
    Parser,
    Problem,
    add_flag,
    autocast,
    bar,
    command,
    end,
    flag,
    memory_format,
    memory_used,
    pick,
    pick_precision,
    problem,
    reason,
    seed,
    setting,
    suggestion,
    tune,
)
from model import ACTIVATIONS, INTERPOLATIONS, LOSSES, NETWORKS, STEMS, TTA

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "cifar_quick.toml"
LOG_STEPS = 100  # between two points of the training curves
VOTE_SECONDS = 0.5  # between two votes of several processes
WRAPPED = []  # networks in groups, for good: PyTorch 2.10 can wait for itself when it frees one
SEEN = torch.finfo(torch.float32).tiny  # the least confidence that is noted: 0 stands for what was not seen yet
INTERRUPTED = "interrupted.pt"  # the checkpoint in the middle of an epoch
LOCK, LOCK_SECONDS = "run.lock", 6  # workers of a killed process notice that within 5 seconds
RESOLVED = {"image_size", "resize", "interpolation", "activation", "mean", "std"}  # where "auto" becomes a value
GROUPS = ("data", "augmentation", "network", "recipe", "machine", "run")  # of settings
LATER = {"data_dir", "data_url", "epochs"}  # and settings of the machine and the run can change in a resumed run
RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9\xb9\xb2\xb3]|conin\$|conout\$)([. ].*)?", re.IGNORECASE)


class ConfigError(CallError):
    """A setting that cannot be; the message names the file or flag, the key and the value."""


class TrainingError(Problem):
    """Training cannot go on."""


# ---- optimizers ------------------------------------------------------------------------------------------------------


class Muon(torch.optim.SGD):
    """SGD that makes the step of every weight in groups with `orthogonal=True` more like an orthogonal matrix.

    After Jordan et al. 2024 (kellerjordan.github.io/posts/muon): a convolution's step, seen as `(outputs, all else)`,
    keeps its directions, but their lengths come closer to each other. torch.optim.Muon takes matrices alone.
    """

    def __init__(self, groups: list[dict], *settings: float, precision: torch.dtype, **more: bool):
        super().__init__(groups, *settings, **more)
        self.precision = torch.bfloat16 if precision == torch.bfloat16 else torch.float32  # of the products
        self._step_supports_amp_scaling = False  # GradScaler shall unscale the gradients and skip what overflowed

    @torch.no_grad()
    def step(self) -> None:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            for weight in group["params"] if group["orthogonal"] else ():
                if weight.grad is None:
                    continue
                if self.state[weight].get("momentum_buffer") is None:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
                buffer = self.state[weight]["momentum_buffer"]
                buffer.mul_(group["momentum"]).add_(weight.grad)
                update = weight.grad.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
                update = orthogonal(update.flatten(1).to(self.precision)).to(weight).view_as(weight)
                lr = group["lr"] * max(1, len(weight) / weight[0].numel()) ** 0.5  # tall matrices have longer columns
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-lr)


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix on the way to the nearest (semi-)orthogonal one, by Newton-Schulz steps on its singular values.

    Three steps bring those above 0.03 of the matrix's norm to between 0.6 and 1.2, and let smaller ones grow about 40
    times, which serves as well as exact ones; the polynomial is that of the page named in Muon.
    """
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(3):
        square = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    return wide if len(matrix) <= matrix.shape[1] else wide.T


def sgd(groups: list[dict], config: "Config", _: torch.dtype, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, config.lr, config.momentum, nesterov=config.nesterov, fused=fused)


def muon(groups: list[dict], config: "Config", precision: torch.dtype, fused: bool) -> torch.optim.Optimizer:
    return Muon(groups, config.lr, config.momentum, nesterov=config.nesterov, fused=fused, precision=precision)


# Each is made of groups of weights, which have their own "lr" and "weight_decay", of the config, the precision of the
# forward pass, and whether the device can update all weights in one go (`fused`).
OPTIMIZERS = {"sgd": sgd, "muon": muon}


# ---- configuration ---------------------------------------------------------------------------------------------------


def bad_freeze(value: str) -> str | None:
    return (
        None
        if value == "all" or re.fullmatch("0|[1-9][0-9]*", value, re.ASCII)
        else f"{value!r} is neither a number of stages nor all"
    )


def bad_folder(value: str) -> str | None:
    """Why no folder can have this name: it would lie elsewhere, or Windows has no such names; None when one can."""
    usable = not set(value) & set('<>:"/\\|?*') and len(value.encode()) <= 200
    if not value or (usable and value[-1] not in ". " and not RESERVED.fullmatch(value)):
        return None
    return f"{value!r:.80} cannot be a folder's name on every system, without a path"


@dataclass(frozen=True)
class Config(datasets.Augment):
    """Every setting of a run, those of Augment too: a key of the config files, and a flag of the same name."""

    data: str = setting("data", "cifar10", "cifar10, shapes, or a folder of pictures")
    data_dir: str = setting("data", "data", "where downloads live")
    data_url: str = setting("data", "", "download CIFAR-10 from here, not from its known mirrors")
    strict: bool = setting("data", False, "stop at bad files in place of leaving them out")
    image_size: int = setting(
        "data",
        0,
        "side of the network's pictures, in pixels; 0: as --weights had it, else 32",
        at_least=0,
        at_most=4096,
    )
    resize: int = setting(
        "data",
        0,
        "pixels of the shorter side before the middle is cut out; 0: like image_size",
        at_least=0,
        at_most=4096,
    )
    interpolation: str = setting(
        "data", "auto", "how pictures are resized; auto: as --weights had it", choices=("auto", *INTERPOLATIONS)
    )
    limit: int = setting("data", 0, "take the first N pictures a split, classes balanced: a quick try", at_least=0)
    val_fraction: float = setting(
        "data", 0.0, "hold this share of training out, choose the best epoch on it, test once", at_least=0, below=1
    )
    mean: tuple = setting("data", (), "of the three channels, pixels in [0, 1]; () is that of --weights, else measured")
    std: tuple = setting("data", (), "like mean", above=0)
    shuffle: bool = setting("data", True, "a new order every epoch")

    model: str = setting("network", "cifar_quick", "the network: `python model.py --list`", check=model.unknown)
    batch_norm: bool = setting("network", True, "of cifar_quick: batch normalisation in every stage")
    sync_bn: bool = setting(
        "network", False, "normalise by all processes' pictures; else each by its own, and the first keeps averages"
    )
    activation: str = setting(
        "network", "auto", "of our own networks; auto: what each does best with", choices=("auto", *ACTIVATIONS)
    )
    width: float = setting("network", 1.0, "of fast: times as many channels", above=0, at_most=64)
    whiten: bool = setting("network", False, "without --weights: the first convolution starts as whitening filters")
    stem: str = setting("network", "standard", "small: ResNets and the like keep small pictures' size", choices=STEMS)
    weights: str = setting("network", "none", "start from: none, imagenet, or a checkpoint")
    head: str = setting(
        "network",
        "auto",
        "replace the last layer, or append one behind it; auto: replace, unless --weights has the same classes",
        choices=("auto", "replace", "append"),
    )
    freeze: str = setting("network", "0", "the first N stages stay as they are, or all but the head", check=bad_freeze)

    epochs: int = setting("recipe", 10, "passes over the training pictures", at_least=1)
    batch_size: int = setting("recipe", 64, "pictures a step, over all processes", at_least=1)
    accumulate: int = setting(
        "recipe", 1, "pieces in which each batch is worked on, one after the other, in less memory", at_least=1
    )
    optimizer: str = setting("recipe", "sgd", "muon: SGD, hidden layers' weights by --muon-lr", choices=OPTIMIZERS)
    lr: float = setting("recipe", 0.01, "learning rate, at its highest", above=0)
    muon_lr: float = setting("recipe", 0.05, "the same for Muon's orthogonal steps", above=0)
    backbone_lr: float = setting("recipe", 0.0, "the same for all but the head; 0: like lr", at_least=0)
    schedule: str = setting("recipe", "constant", "of the learning rate", choices=("constant", "onecycle", "cosine"))
    momentum: float = setting("recipe", 0.0, "of SGD", at_least=0, below=1)
    nesterov: bool = setting("recipe", False, "Nesterov's momentum")
    weight_decay: float = setting("recipe", 0.0, "of weight matrices; biases and normalisation have none", at_least=0)
    loss: str = setting("recipe", "cross_entropy", "mse and l1 are against one-hot labels", choices=LOSSES)
    label_smoothing: float = setting("recipe", 0.0, "share of a label given to all classes", at_least=0, below=1)
    hardest: float = setting(
        "recipe",
        1.0,
        "share of the pictures, the hardest, that the second half of the run trains on",
        above=0,
        at_most=1,
    )
    clip_grad: float = setting("recipe", 0.0, "shorten gradients that are longer than this; 0: never", at_least=0)
    tta: str = setting(
        "recipe", "none", "test-time augmentation: look at mirror images, or also at shifted ones", choices=TTA
    )

    seed: int = setting("recipe", 0, "of initialisation, order and augmentation", at_least=0, at_most=2**63 - 1)

    device: str = setting("machine", "auto", "auto, cpu, cuda, cuda:1 or mps")
    precision: str = setting("machine", "auto", "of the forward pass", choices=("auto", "fp32", "bf16", "fp16"))
    workers: int = setting("machine", -1, "processes that read picture files; -1: one a core", at_least=-1)
    memory_share: float = setting(
        "machine", 0.4, "share of free memory that pictures may take; more are streamed", at_least=0, at_most=1
    )
    timeout: float = setting("machine", 600.0, "seconds that processes wait for each other", above=0, at_most=10**6)
    compile: bool = setting("machine", False, "torch.compile: slow to start, faster on GPUs")
    deterministic: bool = setting("machine", False, "the same bits each time, on GPUs too; slower there")

    log_dir: str = setting("run", "logs", "where run folders live")
    views: bool = setting("run", True, "pictures and a PR curve a class in TensorBoard, beside the scalars")
    view_every: int = setting("run", 0, "epochs between two sets of pictures; 0: ten times in the run", at_least=0)
    histograms: bool = setting("run", False, "views: how weights and gradients are distributed")
    embedding: bool = setting("run", False, "views: 1,000 test pictures in the projector, by the last hidden layer")
    quiet: bool = setting("run", False, "neither progress bars nor notes; problems are named all the same")
    run_name: str = setting("run", "", "the run's folder; date, time and network if not given", check=bad_folder)
    keep: int = setting("run", 0, "checkpoints to keep beside best.pt, the newest; 0: all", at_least=0)
    patience: int = setting("run", 0, "stop when the best epoch is so many epochs ago; 0: never", at_least=0)
    time_limit: float = setting(
        "run", 0.0, "end in less than so many minutes, the schedule with it; 0: no limit", at_least=0, metavar="MINUTES"
    )


def settings() -> list[Field]:
    """The keys of Config, in the order of `--help` and of config files."""
    return sorted(fields(Config), key=lambda key: GROUPS.index(key.metadata["group"]))


def parse(argv: list[str] | None) -> tuple[Config, dict, str | None]:
    """The config file's settings, overruled by the flags; the flags alone; and what `--resume` names (None without).

    Raises CallError for a wrong one.
    """
    first = Parser(add_help=False)
    first.add_argument("--config", type=Path, help=f"TOML file with other defaults than {DEFAULT_CONFIG.name}'s")
    first.add_argument(
        "--resume", nargs="?", const="", metavar="RUN", help="go on with this run, or the newest unfinished one"
    )
    parser = Parser(
        description=__doc__,
        usage="python train.py [--config FILE | --resume [RUN]] [--KEY VALUE ...]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        parents=[first],
    )
    try:
        config = read_config(first.parse_known_args(argv)[0].config or DEFAULT_CONFIG)
        groups = {name: parser.add_argument_group(name) for name in GROUPS}
        for key in settings():
            add_flag(groups[key.metadata["group"]], key, getattr(config, key.name))
        not_given = argparse.Namespace(**dict.fromkeys(Config.__dataclass_fields__))
        args = parser.parse_args(argv, not_given)
        given = {name: value for name in Config.__dataclass_fields__ if (value := getattr(args, name)) is not None}
        given = checked(given, flag)
        if args.resume is not None and args.config:
            raise ConfigError("--config: a resumed run has its own; give --resume without it")
        if args.resume is None:
            config = replace(config, **given)
            check_together(config)
    except ConfigError as error:
        parser.error(str(error))
    return config, given, args.resume


def read_config(path: Path) -> Config:
    """A TOML file's settings on top of Config's own defaults; raises ConfigError."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, or too deep
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
    for name in content:
        if name not in Config.__dataclass_fields__:
            raise ConfigError(f"{path}: unknown key {name!r}{suggestion(name, Config.__dataclass_fields__)}")
    return Config(**checked(content, lambda name: f"{path}: {name}"))


def checked(values: dict, called: Callable[[str], str]) -> dict:
    """These values for a Config; raises ConfigError for an impossible one, by the name that the user `called` it."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if type(values.get("freeze")) is int:  # `freeze = 2` is what one writes into a file
        values["freeze"] = str(values["freeze"])
    for key in fields(Config):
        if key.name in values and (trouble := problem(key, values[key.name])):
            raise ConfigError(f"{called(key.name)}: {trouble}")
    return values


def check_together(config: Config) -> None:
    """Raises ConfigError for settings that are right alone and wrong together."""
    if bool(config.mean) != bool(config.std):
        raise ConfigError("--mean and --std: give both or neither")
    if config.nesterov and not config.momentum:
        raise ConfigError("--nesterov needs --momentum above 0; add --no-nesterov")
    if config.model in NETWORKS and config.head == "append" and config.weights == "none":
        raise ConfigError(f"--head append: an untrained {config.model} has no outputs to append to; add --weights FILE")
    if config.freeze != "0" and config.weights == "none":
        raise ConfigError(f"--freeze {config.freeze}: untrained stages would stay random; add --weights")
    if config.freeze == "all" and config.backbone_lr:
        raise ConfigError("--backbone-lr: with --freeze all nothing but the head trains; add --backbone-lr 0")
    if config.model == "cifar_quick" and config.batch_norm and config.batch_size == 1 and config.freeze != "all":
        raise ConfigError("--batch-size 1: batch normalisation needs at least 2 pictures; add --no-batch-norm")


def resolve(config: Config) -> tuple[Config, dict | None]:
    """Fill in what depends on the weights to start from; also returns these, in the form of a checkpoint.

    Raises ConfigError for settings that do not fit them, and what `model.pretrained` raises.
    """
    pretrained = None if config.weights == "none" else model.pretrained(config.weights, config.model)
    had = pretrained or {"image_size": 32, "resize": 32, "interpolation": "bilinear", "mean": (), "std": ()}
    size = config.image_size or had["image_size"]
    # Another size than the weights' own is the user's choice, who then gets the whole of the shorter side.
    resize = config.resize or (had["resize"] if size == had["image_size"] else size)
    if resize < size:
        raise ConfigError(f"--resize {resize} is below the image size, {size} pixels")
    if max(config.crop, config.cutout) > size:
        raise ConfigError(f"--crop and --cutout can be at most the image size, {size} pixels")
    interpolation = had["interpolation"] if config.interpolation == "auto" else config.interpolation
    mean, std = (config.mean, config.std) if config.mean else (tuple(had["mean"]), tuple(had["std"]))
    config = replace(config, image_size=size, resize=resize, interpolation=interpolation, mean=mean, std=std)
    for name, value in pretrained["model"]["options"].items() if pretrained else ():
        if getattr(config, name, value) == "auto":
            config = replace(config, **{name: value})
        elif getattr(config, name, value) != value and name not in ("image_size", "classes"):
            raise ConfigError(
                f"--weights {config.weights}: that network was trained otherwise; add {flag(name, value)}"
            )
    return config, pretrained


def stored(config: Config) -> dict:
    """The config as plain values; without the run's name, so that it can be run again."""
    values = {key.name: getattr(config, key.name) for key in settings() if key.name != "run_name"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def as_toml(config: Config) -> str:
    """The config as a file that `--config` reads."""
    values = stored(config)
    return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items())


# ---- data and network ------------------------------------------------------------------------------------------------


def load_data(config: Config, device: torch.device, group: Group = Group()) -> list[datasets.Pictures]:
    """The training and the test set; with `val_fraction`, training, validation (held out of training) and test."""
    names = ("data", "data_dir", "image_size", "resize", "interpolation", "limit", "mean", "std", "data_url")
    names += ("val_fraction", "strict", "workers", "memory_share")
    how = {name: getattr(config, name) for name in names}
    train_set, test_set = datasets.load(device=device, group=group, **how)
    if not config.val_fraction or test_set.split == "val":  # a folder without train/ was split by val_fraction already
        return [train_set, test_set]
    return [*train_set.hold_out(config.val_fraction, config.seed), test_set]


def augmentation(config: Config) -> datasets.Augment | None:
    """The random changes of training pictures; None where there are none."""
    augment = datasets.Augment(**{key.name: getattr(config, key.name) for key in fields(datasets.Augment)})
    return augment if augment != datasets.Augment() else None


def options_for(config: Config, classes: int, pretrained: dict | None = None) -> dict:
    """What the network's constructor gets; stored in the checkpoint, from which it is built again."""
    append = pretrained["model"]["options"].get("append", 0) if pretrained else 0
    if config.head == "append" and append:
        raise ConfigError(f"--head append: {config.weights} has an appended layer already; add --head replace")
    if config.head == "append":
        append = len(pretrained["classes"]) if pretrained else 1000
    settings = {name: getattr(config, name) for name in model.SETTINGS}
    return model.network_options(config.model, classes, config.image_size, append, **settings)


def check_network(config: Config, pretrained: dict | None, run: "Run", group: Group) -> None:
    """Raises NetworkError for a network that cannot train so, before the data are read."""
    if not run.checkpoint and group.rank == 0:
        model.check(config.model, options_for(config, 2, pretrained), config.batch_size, config.freeze != "all")


def make_network(
    config: Config, train_set: datasets.Pictures, pretrained: dict | None, run: "Run", group: Group
) -> tuple[nn.Module, list[str], dict]:
    """The network, as the run left it or with its first weights, frozen where `config` says so; the names of its
    head's weights; and its options. All processes get the first one's.

    Raises NetworkError or CheckpointError.
    """
    if run.checkpoint:
        options = run.checkpoint["model"]["options"]
    else:
        options = group.of_first(lambda: options_for(config, len(train_set.classes), pretrained))
    head = model.head_keys(config.model, options)
    if run.network:
        network = run.network
    elif group.rank or run.checkpoint:
        network = model.create(config.model, options)
    else:
        seed(config.seed)
        network = build(config, options, train_set.classes, pretrained, head)
        if config.whiten and not pretrained:
            images, _, _ = train_set.look(torch.arange(min(train_set.evaluation_batch, len(train_set))))
            model.whiten(network, images)
    group.spread(network.state_dict().values())
    if config.freeze != "0":
        model.freeze(network, head, None if config.freeze == "all" else int(config.freeze))
    return network, head, options


def build(config: Config, options: dict, classes: list[str], pretrained: dict | None, head: list[str]) -> nn.Module:
    """A new network with its trained weights, if there are any."""
    network = model.create(config.model, options)
    if pretrained:
        append, same_classes = config.head == "append", pretrained["classes"] == classes
        new = () if append or (config.head == "auto" and same_classes) else head
        source = f"{config.weights} (trained on {pretrained['image_size']} x {pretrained['image_size']} pixels)"
        model.transfer(network.network if append else network, pretrained["state_dict"], new, source)
    return network


def what_trains(
    network: nn.Module,
    head: list[str],
    sets: list[datasets.Pictures],
    config: Config,
    precision: torch.dtype,
    group: Group,
) -> tuple[nn.Module, list[datasets.Pictures]]:
    """What an epoch trains, and on what: the network on pictures; of a frozen one the head, on features if it can."""
    if config.freeze != "all":
        return network, sets
    head_only = model.HeadOnly(network, head, config.image_size)
    if augmentation(config):
        return head_only, sets
    if config.tta != "none":
        note(config, "features are computed anew every epoch; --tta none would compute them once")
    elif features := as_features(sets, head_only, config, precision, group):
        return head_only.tail, features
    return head_only, sets


def as_features(
    sets: list[datasets.Pictures], frozen: model.HeadOnly, config: Config, precision: torch.dtype, group: Group
) -> list[datasets.Features] | None:
    """What the frozen part makes of all pictures, computed once, by each process of a share of them; None where it does
    not fit into memory."""
    device, found, start = sets[0].labels.device, [], time.perf_counter()
    with bar("features", sum(map(len, sets)), "pictures") as progress:
        for pictures in sets:
            features, (at_once, places) = None, pictures.evaluation_parts(group)
            for images, labels in pictures.batches(at_once, group=group):
                with autocast(device, precision):
                    batch = frozen.features(images).float()
                if features is None:
                    copies = group.local_count if device.type == "cpu" else 1
                    size = copies * batch[:1].nbytes * progress.total if len(batch) else 0
                    fits = size <= config.memory_share * datasets.free_memory(device)
                    if not found and not all(group.gather(fits)):
                        note(config, f"features would take {size / 1e6:,.1f} MB: computed anew every epoch")
                        return None
                    features = batch.new_zeros(len(pictures), *batch.shape[1:])
                own, places = places.split([len(labels), len(places) - len(labels)])
                features[own.to(device)] = batch
                progress.update(len(labels) * group.count)
            group.sum(features)
            found.append(datasets.Features(features, pictures.labels, pictures.classes, pictures.split))
    note(config, f"features computed once, in {time.perf_counter() - start:.1f} s")
    return found


# ---- time, and who may stop a run ------------------------------------------------------------------------------------


@dataclass
class Clock:
    """The seconds that a run has taken, in all of its sittings, and may take."""

    limit: float = math.inf
    before: float = 0.0  # in earlier sittings
    begun: float | None = None  # when training began
    ending: float = 0.0  # from the last step to the end of the run, about
    done: float = 0.0  # the share of the time for training that was over when all processes last compared
    started: float = field(default_factory=lambda: time.perf_counter())

    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.started

    @property
    def training_ends(self) -> float:
        """When there is only time left to evaluate and save; some seconds are for what came before this clock."""
        return self.limit - 1.2 * self.ending - 4

    def begin(self) -> None:
        """From here on, unless an earlier sitting began it, the time is for training."""
        self.begun = self.seconds() if self.begun is None else self.begun

    def share(self) -> float:
        """How much of the time for training is over; 0 where there is no limit."""
        return min(1.0, (self.seconds() - self.begun) / max(1e-9, self.training_ends - self.begun))

    def is_over(self) -> bool:
        return self.seconds() > self.training_ends


@dataclass
class Votes:
    """What all processes agree on between two steps: whether one was asked to stop or is out of time, and the clock.

    Several vote about twice a second, at the same step, which they agree on too: to vote at each would take a tenth of
    the time of small steps.
    """

    group: Group
    interrupts: Interrupts
    clock: Clock
    steps: int = 0
    next: int = 1  # step of a vote
    last: tuple[int, float] = (0, 0.0)  # step and time
    ends: bool = False  # one was asked to stop

    def asked(self) -> tuple[bool, bool]:
        """Whether one was asked to stop, and whether one is out of time."""
        self.steps += 1
        if self.ends or self.steps < self.next:
            return self.ends, False
        (before, then), self.last = self.last, (self.steps, time.perf_counter())
        pause = VOTE_SECONDS * (self.steps - before) / max(1e-9, self.last[1] - then)
        asked, is_over, self.clock.done, pause = self.group.most(
            self.interrupts.asked, self.clock.is_over(), self.clock.share(), pause
        )
        self.next = self.steps + (max(1, int(pause)) if self.group.count > 1 else 1)
        self.ends = bool(asked)
        return self.ends, bool(is_over)

    def stop(self) -> bool:
        return any(self.asked())

    def check(self) -> None:
        if self.asked()[0]:
            raise Interrupted


# ---- a training step -------------------------------------------------------------------------------------------------


@dataclass
class Sums:
    """What the steps of an epoch add up to so far: what an interrupted one needs to go on, beside the weights."""

    correct: Tensor  # int64, on the device
    confidence: Tensor | None = None  # of the network in each training picture's class; 0 where it is still to come
    step: int = 0
    pictures: int = 0
    loss: float = 0.0  # over all pictures
    logged_loss: float = 0.0  # up to the last point of the curve
    logged_pictures: int = 0
    lr: float = 0.0  # of the last step
    seconds: float = 0.0

    def add_answers(self, logits: Tensor, labels: Tensor, places: Tensor | None, loss: str) -> None:
        """Count what is right, and note how sure the network was of it: `places` are those of the training pictures."""
        self.correct += (logits.argmax(1) == labels).sum()
        if places is not None:
            of_truth = model.probabilities(logits.float(), loss).gather(1, labels.view(-1, 1))
            self.confidence[places] = of_truth.squeeze(1).clamp(min=SEEN)

    def add_losses(
        self, losses: list[tuple[Tensor, float]], parts: list[slice], order: Tensor, epoch: int, group: Group
    ) -> None:
        """Add the mean losses of the last steps, each with its learning rate, which waits for the device and the group.

        Raises TrainingError where one is not finite; `parts` are the places in `order` of the epoch's batches.
        """
        first = self.step - len(losses)
        values = group.sum(torch.stack([loss for loss, _ in losses])).tolist()
        for step, (value, (_, lr)) in enumerate(zip(values, losses, strict=True), first):
            if not math.isfinite(value):
                numbers = order[parts[step]].tolist()
                more = f" and {len(numbers) - 16} more" if len(numbers) > 16 else ""
                raise TrainingError(
                    f"the loss is {value} in epoch {epoch}, step {step + 1} (lr {lr:.4g}, training pictures number "
                    f"{', '.join(map(str, numbers[:16]))}{more}); try a lower --lr, or --clip-grad 1"
                )
            self.loss += value * (parts[step].stop - parts[step].start)
        losses.clear()

    def point(self) -> float:
        """The mean loss since the last point of the curve, of which this is the next."""
        mean = (self.loss - self.logged_loss) / (self.pictures - self.logged_pictures)
        self.logged_loss, self.logged_pictures = self.loss, self.pictures
        return mean

    def metrics(self) -> dict:
        """What is told of an epoch's training."""
        return {
            "train_loss": self.loss / self.pictures,
            "train_accuracy": self.correct.item() / self.pictures,
            "lr": self.lr,
            "epoch_seconds": self.seconds,
            "images_per_second": self.pictures / self.seconds,
        }


@dataclass
class Trainer:
    """What a training step needs: the network, and what changes it."""

    network: nn.Module  # the bare and whole one, which is saved
    trains: nn.Module  # the same, or the part of it that trains
    forward: Callable[[Tensor], Tensor]  # that part, in its group and compiled if the user wants it
    eager: Callable[[Tensor], Tensor]  # the same, not compiled
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler  # does nothing but in fp16
    device: torch.device
    precision: torch.dtype
    clock: Clock
    group: Group
    steps: int  # of the whole run
    sitting: tuple[int, float] | None = None  # the first step that was done since the program began, and when
    confidence: Tensor | None = None  # in every training picture's class, when it was last seen
    sums: Sums | None = None  # of the epoch in progress
    norm: Tensor | None = None  # of the last step's gradient, before it was shortened

    def step(self, images: Tensor, labels: Tensor, config: Config, batch: slice | None = None) -> tuple[Tensor, Tensor]:
        """One step of SGD on a batch; returns its mean loss and its logits, without waiting for the device.

        In a group these are this process's pictures of the `batch` in that place of the epoch, their logits, and what
        they add to the mean loss. The gradients stay until the next step, for whoever wants to look at them.
        """
        batch, found = batch or slice(0, len(labels)), []
        self.optimizer.zero_grad(set_to_none=True)
        pieces = [piece.stop - piece.start for piece in datasets.share(batch, self.group, config.accumulate)]
        for part in zip(images.split(pieces), labels.split(pieces), strict=True):
            found.append(self.backward(*part, config, batch.stop - batch.start, len(found) + 1 == len(pieces)))
        if config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            self.norm = torch.nn.utils.clip_grad_norm_(self.trains.parameters(), config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        if len(found) == 1:
            return found[0]
        losses, logits = zip(*found, strict=True)
        return torch.stack(losses).sum(), torch.cat(logits)

    def backward(
        self, images: Tensor, labels: Tensor, config: Config, size: int, last: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Add to the gradients what these pictures of a batch of `size` do; with the `last` of them, of all processes.

        Returns their share of the batch's mean loss, and their logits.
        """
        more_to_come = self.group.count > 1 and not last
        with self.forward.no_sync() if more_to_come else contextlib.nullcontext():
            with autocast(self.device, self.precision):
                forward = self.forward if len(images) else self.eager  # compiled code takes no empty batches
                logits, *auxiliary = model.answers(forward(images))
                loss = total = self.loss(logits, labels, config)
                for others in auxiliary:
                    total = total + model.AUXILIARY_WEIGHT * self.loss(others, labels, config)
            share = len(labels) / size
            # The processes' gradients are averaged, not summed.
            self.scaler.scale(total * (share * self.group.count)).backward()
        return loss.detach() * share, logits.detach()

    def loss(self, logits: Tensor, labels: Tensor, config: Config) -> Tensor:
        """The mean loss of these pictures, 0 if there are none."""
        if not len(labels):
            return 0 * logits.sum()
        return model.loss_function(logits, labels, config.loss, config.label_smoothing)

    def end_epoch(self) -> None:
        """The epoch is over: its confidences replace earlier ones, but for the pictures that it left out."""
        if self.sums.confidence is not None:
            before = torch.zeros_like(self.sums.confidence) if self.confidence is None else self.confidence
            self.confidence = torch.where(self.sums.confidence > 0, self.sums.confidence, before)
        self.sums = None

    def left(self) -> str:
        """About how long the run takes from here, at the pace of this sitting: `0:03:12`."""
        step, now = self.schedule.last_epoch, self.clock.seconds()
        self.sitting = self.sitting or (step, now)
        pace = (now - self.sitting[1]) / max(1, step - self.sitting[0])
        seconds = min(pace * (self.steps - step), max(0, self.clock.limit - now))
        return str(datetime.timedelta(seconds=round(seconds))) if step > self.sitting[0] else "?"

    def gradient_norm(self) -> float:
        """The length of the last step's gradient, over all that trains."""
        if self.norm is not None:
            return self.norm.item()
        return torch.nn.utils.get_total_norm([p.grad for p in self.trains.parameters() if p.grad is not None]).item()

    def state_dict(self) -> dict:
        """What resuming needs beside the weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": {"last_epoch": self.schedule.last_epoch},
            "scaler": self.scaler.state_dict(),
            "confidence": self.confidence,
            "sums": asdict(self.sums) if self.sums else None,
            "clock": {"before": self.clock.seconds(), "begun": self.clock.begun},
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from there, at the learning rate that the schedule, perhaps a longer one now, has for that step."""
        self.clock.before, self.clock.begun = state["clock"]["before"], state["clock"]["begun"]
        self.clock.done = max(self.group.gather(self.clock.share()))
        # Of the file only what training has found: all that the config says is the trainer's own.
        own, found = self.optimizer.state_dict(), state["optimizer"]["state"]
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for place, buffers in found.items():
            for of in buffers.values():
                fits = of.shape in (parameters[place].shape, ()) if isinstance(of, Tensor) else type(of) in (int, float)
                if not fits and of is not None:
                    raise ValueError("its momentum is not that of its weights")
        self.optimizer.load_state_dict(own | {"state": found})
        if state["scaler"]:  # one that does nothing has no state
            self.scaler.load_state_dict(state["scaler"])
        self.schedule.last_epoch = state["schedule"]["last_epoch"]
        factors = zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        self.schedule._last_lr = [base * factor(self.schedule.last_epoch) for base, factor in factors]
        for group, lr in zip(self.optimizer.param_groups, self.schedule._last_lr, strict=True):
            group["lr"] = lr
        self.confidence = None if state["confidence"] is None else state["confidence"].to(self.device)
        if state["sums"]:
            sums = {key: of.to(self.device) if isinstance(of, Tensor) else of for key, of in state["sums"].items()}
            self.sums = Sums(**sums)
            numbers = [value for key, value in sums.items() if key not in ("correct", "confidence")]
            if self.sums.correct.dtype != torch.int64 or not all(isinstance(number, int | float) for number in numbers):
                raise ValueError("the sums of its epoch are no numbers")
            if self.group.rank:  # the first process has those of all
                self.sums.correct.zero_()
                self.sums.confidence = None if self.sums.confidence is None else torch.zeros_like(self.sums.confidence)


def learning_rate(config: Config, steps: int, step: float) -> float:
    """The share of `config.lr` to use at `step` of `steps`.

    `onecycle` climbs for a fifth of the run and falls for the rest, both in a straight line (after Smith 2018,
    arxiv.org/abs/1803.09820); `cosine` falls along half a wave (Loshchilov and Hutter 2017, arxiv.org/abs/1608.03983).
    """
    done = min(1.0, step / max(1, steps))
    if config.schedule == "onecycle":
        return min((step + 1) / (0.2 * steps + 1), (1 - done) / 0.8)
    if config.schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    return 1.0


def make_trainer(
    network: nn.Module,
    config: Config,
    steps: int,
    device: torch.device,
    precision: torch.dtype,
    head: Collection[str] = (),
    trains: nn.Module | None = None,
    clock: Clock | None = None,
    group: Group = Group(),
) -> Trainer:
    """The optimizer and its schedule for a run of `steps` steps, or as long as the clock's limit lets it run.

    `head` names the weights that `backbone_lr` leaves.
    """
    parts = {}  # by (of the head, a matrix, Muon's)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            of_head, is_matrix = name in head, parameter.ndim > 1
            orthogonal = config.optimizer == "muon" and is_matrix and not of_head and name.endswith("weight")
            parts.setdefault((of_head, is_matrix, orthogonal), []).append(parameter)
    groups = [
        {
            "params": parameters,
            "lr": config.muon_lr if orthogonal else config.lr if of_head else config.backbone_lr or config.lr,
            "weight_decay": config.weight_decay if is_matrix else 0.0,
            "orthogonal": orthogonal,
        }
        for (of_head, is_matrix, orthogonal), parameters in sorted(parts.items(), key=itemgetter(0), reverse=True)
    ]
    optimizer = OPTIMIZERS[config.optimizer](groups, config, precision, device.type in ("cpu", "cuda"))
    clock = clock or Clock()
    clock.begin()

    def factor(step: int) -> float:
        return learning_rate(config, steps, max(step, clock.done * steps))

    trains = trains or network
    eager = trains if group.count == 1 else in_group(trains, config, device)
    return Trainer(
        network=network,
        trains=trains,
        forward=torch.compile(eager) if config.compile else eager,
        eager=eager,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
        device=device,
        precision=precision,
        clock=clock,
        group=group,
        steps=steps,
    )


def in_group(network: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """The network, whose gradients become the mean over all processes in each backward pass.

    Buffers, which are the averages of batch normalisation, are not sent around at each step: the first process's count,
    and the others get them before they evaluate.
    """
    wrap = nn.parallel.DistributedDataParallel
    buffers = {"forward_sync_buffers", "broadcast_buffers"} & inspect.signature(wrap).parameters.keys()
    wrapped = wrap(
        network,
        device_ids=[device] if device.type == "cuda" else None,
        **{max(buffers): False},  # the newer name, in PyTorch that has it
        gradient_as_bucket_view=True,
        static_graph=config.accumulate == 1,  # it must learn the graph in a step that synchronises
    )
    WRAPPED.append(wrapped)
    return wrapped


# ---- an epoch --------------------------------------------------------------------------------------------------------


def train_epoch(
    trainer: Trainer,
    train_set: datasets.Pictures,
    config: Config,
    epoch: int,
    writer,
    stop: Callable[[], bool] = lambda: False,
) -> dict:
    """One pass over the training pictures, or the rest of one that `trainer.sums` began; returns its metrics.

    `stop` is asked after each step whether to leave it there; `trainer.sums` then tells where that is. Raises
    TrainingError when the loss is not finite.
    """
    start, group = time.perf_counter(), trainer.group
    model.train_mode(trainer.trains)
    keep = hardest(trainer, config, epoch)
    order, _ = train_set.order(config.shuffle, config.seed, epoch, keep)
    parts = datasets.cuts(len(order), config.batch_size)
    sums = trainer.sums = trainer.sums or new_sums(trainer, len(train_set), config)
    steps_before, losses = trainer.schedule.last_epoch - sums.step, []
    places = [None] * len(parts) if sums.confidence is None else own_places(order, parts, config, trainer)
    how = config.batch_size, config.shuffle, augmentation(config), config.seed, epoch
    batches = train_set.batches(*how, keep, sums.step, group, config.accumulate)
    progress, shown = bar(f"epoch {epoch}/{config.epochs}", len(parts), "steps", sums.step), ""
    for images, labels in batches:
        sums.lr = trainer.schedule.get_last_lr()[0]
        seed(config.seed, epoch, sums.step, group.rank)
        batch = parts[sums.step]
        loss, logits = trainer.step(images, labels, config, batch)
        losses.append((loss, sums.lr))
        sums.add_answers(logits, labels, places[sums.step], config.loss)
        sums.step, sums.pictures = sums.step + 1, sums.pictures + batch.stop - batch.start
        at_end, at_point, leave = sums.step == len(parts), sums.step % LOG_STEPS == 0, stop()
        if at_point or at_end or leave:  # to read a loss waits for the device, so not at every step
            sums.add_losses(losses, parts, order, epoch, group)
        if at_point and not at_end:  # the epoch's own loss comes with its accuracy
            mean = sums.point()
            shown = f"loss {mean:.3f}, "
            writer.add_scalar("loss/train", mean, steps_before + sums.step)
            writer.add_scalar("lr", sums.lr, steps_before + sums.step)
        if at_point or at_end:
            writer.add_scalar("gradient_norm", trainer.gradient_norm(), steps_before + sums.step)
        progress.set_postfix_str(f"{shown}run {trainer.left()} left", refresh=False)
        progress.update()
        if leave:
            break
    progress.close()
    group.sum(sums.correct)
    if sums.confidence is not None:
        group.sum(sums.confidence)
    if not config.sync_bn:
        group.spread(trainer.trains.buffers())
    sums.seconds += time.perf_counter() - start
    if sums.step == len(parts):
        trainer.end_epoch()
    return {"epoch": epoch, "step": steps_before + sums.step} | sums.metrics()


def own_places(order: Tensor, parts: list[slice], config: Config, trainer: Trainer) -> Sequence[Tensor]:
    """Which training pictures this process sees in each batch, int64 `(N,)` each, on the device."""
    own = datasets.own(parts, trainer.group, config.accumulate)
    return order[own.places].to(trainer.device).split(own.sizes)


def new_sums(trainer: Trainer, pictures: int, config: Config) -> Sums:
    """Those of an epoch that begins."""
    confidence = torch.zeros(pictures, device=trainer.device) if config.hardest < 1 else None
    return Sums(torch.zeros((), dtype=torch.int64, device=trainer.device), confidence)


def hardest(trainer: Trainer, config: Config, epoch: int) -> Tensor | None:
    """Which pictures an epoch trains on, bool `(N,)`: all (None) in the first half of the run, then `config.hardest`.

    These are the ones of whose class the network was least sure when it last saw them: the others teach it little by
    then (after Jordan 2024, arxiv.org/abs/2404.00498, section 5, where a small network chooses).
    """
    if config.hardest == 1 or epoch <= math.ceil(config.epochs / 2):
        return None
    count = kept(len(trainer.confidence), config, epoch)
    keep = torch.zeros(len(trainer.confidence), dtype=torch.bool, device=trainer.device)
    keep[trainer.confidence.topk(count, largest=False).indices] = True
    return keep


def kept(pictures: int, config: Config, epoch: int) -> int:
    """How many of the training pictures an epoch trains on."""
    return pictures if epoch <= math.ceil(config.epochs / 2) else max(2, round(config.hardest * pictures))


def all_steps(history: list[dict], pictures: int, config: Config) -> int:
    """The steps of a run: those of its finished epochs, and those to come."""
    to_come = range(len(history) + 1, config.epochs + 1)
    steps = [len(datasets.cuts(kept(pictures, config, epoch), config.batch_size)) for epoch in to_come]
    return sum(steps, history[-1]["step"] if history else 0)


def evaluate(
    trainer: Trainer, pictures: datasets.Pictures, config: Config, check: Callable[[], None] = lambda: None
) -> tuple[dict, Tensor, Tensor]:
    """Exact mean loss (without label smoothing) and accuracy over all pictures, in eval mode; and what they are of:
    class probabilities `(N, classes)` and labels `(N,)`. Each process of a group looks at a share of them; all get all.

    Raises TrainingError when the loss is not finite, and what `check` raises, which is called before each batch."""
    batches = len(datasets.cuts(len(pictures), pictures.evaluation_batch * trainer.group.count))
    with autocast(trainer.device, trainer.precision), bar(pictures.split, batches, "batches", delay=1) as progress:
        how = trainer.group, len(pictures.classes), config.tta, lambda: (check(), progress.update())
        logits, labels = model.outputs_of_all(trainer.trains, pictures, *how)
    metrics = {f"{pictures.split}_{name}": value for name, value in model.score(logits, labels, config.loss).items()}
    if not math.isfinite(loss := metrics[f"{pictures.split}_loss"]):
        raise TrainingError(f"the {pictures.split} loss is {loss}; try a lower --lr, or --clip-grad 1")
    return metrics, model.probabilities(logits, config.loss), labels


def evaluation_seconds(trainer: Trainer, pictures: datasets.Pictures, config: Config) -> float:
    """About how long an evaluation takes, by its second batch."""
    seconds = 0.0
    for batch in itertools.islice(pictures.batches(pictures.evaluation_batch), 2):
        start = time.perf_counter()
        with autocast(trainer.device, trainer.precision):
            model.outputs(trainer.trains, [batch], config.tta)[0].sum().item()
        seconds = time.perf_counter() - start
    return seconds * len(pictures) / min(len(pictures), pictures.evaluation_batch) / trainer.group.count


# ---- the run folder --------------------------------------------------------------------------------------------------


RESUMED = ("history", "unevaluated", "mistakes", "pictures")  # what of a Run its checkpoints hold


@dataclass
class Run:
    """A run's folder, which this process alone may write to, and what is known of its finished epochs."""

    folder: Path | None = None  # until it is made
    lock: FileLock | None = None
    network: nn.Module | None = None  # with `checkpoint`, what a resumed run goes on from
    checkpoint: dict = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)  # the metrics of each epoch
    unevaluated: dict | None = None  # the metrics of an epoch that was not evaluated yet
    mistakes: list[str] = field(default_factory=list)  # what the best epoch mistook most, in words
    unsaved: dict[str, str] = field(default_factory=dict)  # files that could not be written, and why
    best: memoryview | None = None  # best.pt, as long as it could not be written
    header: dict = field(default_factory=dict)  # what is the same in all checkpoints
    pictures: int = 0  # that it trains on
    job: str = ""  # of torchrun, which may start the run again
    writer: object = field(default_factory=views.NoBoard)  # TensorBoard's
    background: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    writing: Future | None = None  # what is done there

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """Let other processes have the folder, and tell a failed run what it can go on from."""
        self.background.shutdown()
        self.attempt("TensorBoard's events", self.writer.flush)
        if self.lock:
            remove(self.folder / LOCK)  # Windows removes none that is open; the lock does it there
            self.lock.release()
        if isinstance(error, TrainingError) and not self.unsaved and self.folder:
            last = next((path for path in reversed(self.epoch_files()) if path.exists()), "none yet")
            error.add_note(f"last good checkpoint: {last}")
        elif isinstance(error, KeyboardInterrupt) and self.header:
            error.add_note(f"python train.py --resume {quoted(self.folder)}")

    def epoch_files(self) -> list[Path]:
        """Where the finished epochs' checkpoints are, or would be."""
        return [self.folder / epoch_file(epoch) for epoch in range(1, len(self.history) + 1)]

    def checkpoint_of(self, trainer: Trainer) -> dict:
        """What predict.py needs of the network as it is now."""
        now = {"state_dict": trainer.network.state_dict(), "epoch": len(self.history)}
        return self.header | now | {"metrics": self.history[-1] if self.history else {}}

    def attempt(self, name: str, write: Callable[[], None]) -> bool:
        """Write a file of the run. Where the disk refuses, training goes on, and the run fails at its end."""
        try:
            write()
        except OSError as error:
            self.unsaved[name] = error.strerror or str(error)
            print(f"train.py: {name} could not be saved ({self.unsaved[name]}); training goes on", file=sys.stderr)
            return False
        self.unsaved.pop(name, None)
        return True

    def later(self, write: Callable[[], None]) -> None:
        """Write something while training goes on, so that other processes need not wait for the disk."""
        self.wait()
        self.writing = self.background.submit(write)

    def wait(self) -> None:
        """Until what was to be written is; raises what that raised."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def write_metrics(self) -> None:
        lines = "".join(json.dumps(metrics) + "\n" for metrics in self.history)
        model.write(self.folder / "metrics.jsonl", lines.encode())


def agree_on_config(
    run: "Run", config: Config, given: dict, resume: str | None, group: Group
) -> tuple[Config, dict | None]:
    """The settings of a new run, or of the one that `run` becomes; in the first process, the weights to start from too.

    The first process decides for all. Raises ConfigError, and what `resolve` raises.
    """
    pretrained = None
    if group.rank == 0:
        if job := group.job():
            called = repr((job, config, given, resume)).encode()
            run.job = hashlib.md5(called, usedforsecurity=False).hexdigest()
        if own := run_of_job(run.job, given.get("log_dir", config.log_dir)):
            resume, given = str(own), {}
        if resume is not None:
            reopen(run, find_run(resume, given.get("log_dir", config.log_dir), given))
            config = resumed_config(run, given)
            check_together(config)
        elif config.run_name:
            check_name(config)
        if config.batch_size < group.count * config.accumulate:
            raise ConfigError(
                f"--batch-size {config.batch_size}: that is less than a picture for each of {group.count} processes"
                + (f" in {config.accumulate} pieces (--accumulate)" if config.accumulate > 1 else "")
            )
        if not run.checkpoint:
            config, pretrained = resolve(config)
    known = {key: value for key, value in run.checkpoint.items() if key != "state_dict"}
    of_run = {name: getattr(run, name) for name in RESUMED}
    config, run.checkpoint, of_run = group.of_first(lambda: (config, known, of_run))
    for name, value in of_run.items():
        setattr(run, name, value)
    return config, pretrained


def check_name(config: Config) -> None:
    """Raises ConfigError if there is a run of this name already."""
    folder = Path(config.log_dir) / config.run_name
    if folder.exists() and not (folder.is_dir() and is_empty(folder)):
        hint = f"; --resume {quoted(folder)} goes on with it" if (folder / "config.toml").exists() else ""
        raise ConfigError(f"--run-name {config.run_name}: {folder} exists already{hint}")


def open_run(run: Run, trainer: Trainer, sets: list[datasets.Pictures], config: Config, header: dict) -> None:
    """Open the run's folder; show what is there before training."""
    open_folder(run, config, header, trainer.schedule.last_epoch)
    if not run.network:
        show_start(run.writer, trainer.network, sets[1].split, config, trainer.device)
        show(run.writer, trainer.network, sets, 0, 0, config)


def open_folder(run: Run, config: Config, header: dict, step: int) -> None:
    """Make a new run's folder, and open all that is written into it, from after this step on.

    Folders with something in them are left alone. Raises OSError.
    """
    again = run.folder is not None
    if not again:
        make_folder(run, config)
    model.write(run.folder / "config.toml", (mark(run.job) + as_toml(config)).encode())
    run.header, run.writer = header, views.board(run.folder, step + bool(step) if again else None)
    if again:
        mend_best(run)
        run.write_metrics()


def make_folder(run: Run, config: Config) -> None:
    name = config.run_name or f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{config.model}"
    Path(config.log_dir).mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = Path(config.log_dir) / (name if number == 1 else f"{name}_{number}")
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / LOCK)
        with contextlib.suppress(Timeout):  # another run, started in the same second
            lock.acquire(timeout=0)
            if is_empty(folder):
                run.folder, run.lock = folder, lock
                return
            lock.release()
        if config.run_name:
            raise FileExistsError(errno.EEXIST, "another run has this folder", str(folder))


def is_empty(folder: Path) -> bool:
    """Whether nothing is in it but a lock: what a process leaves that is killed before it writes anything."""
    return {path.name for path in folder.iterdir()} <= {LOCK}


def header(config: Config, options: dict, classes: list[str]) -> dict:
    """The part of a checkpoint that all of a run have in common."""
    return {
        "format": model.FORMAT,
        "model": {"name": config.model, "options": options},
        "classes": classes,
        "image_size": config.image_size,
        "resize": config.resize,
        "interpolation": config.interpolation,
        "mean": list(config.mean),
        "std": list(config.std),
        "config": stored(config),
    }


def has_ended(history: list[dict], config: Config) -> bool:
    return bool(history) and ("ended" in history[-1] or len(history) >= config.epochs)


def split_of(history: list[dict]) -> str:
    """The pictures that choose the best epoch: val, where some were held out of training, else test."""
    return "val" if "val_accuracy" in history[-1] else "test"


def best_of(history: list[dict]) -> dict:
    """The metrics of the first epoch of the highest accuracy."""
    return max(history, key=itemgetter(f"{split_of(history)}_accuracy"))


def epoch_file(epoch: int) -> str:
    return f"epoch_{epoch:03}.pt"


def remove(path: Path) -> None:
    """Remove a file, if it is there and nobody (a virus scanner, on Windows) has it open."""
    with contextlib.suppress(OSError):
        path.unlink()


# ---- going on with a run ---------------------------------------------------------------------------------------------


def find_run(name: str, log_dir: str, given: dict) -> Path:
    """The folder of the run called so, or that lies there; without a name, of the newest one that can go on. Raises
    ConfigError."""
    folders = [path.parent for path in Path(log_dir).glob("*/config.toml")]
    for folder in (Path(name), Path(log_dir, name)) if name else ():
        if (folder / "config.toml").is_file():
            return folder
    if name:
        known = suggestion(name, [folder.name for folder in folders])
        raise ConfigError(f"--resume {name}: no run there (its folder has a config.toml){known}")

    for folder in sorted(folders, key=last_written, reverse=True):
        if can_go_on(folder, given):
            return folder
    raise ConfigError(f"--resume: no unfinished run in {log_dir}; --resume RUN --epochs N makes a finished one longer")


def last_written(folder: Path) -> float:
    found = [folder / name for name in ("config.toml", "metrics.jsonl", "best.pt", INTERRUPTED)]
    return max((path.stat().st_mtime for path in found if path.exists()), default=0.0)


def can_go_on(folder: Path, given: dict) -> bool:
    """Whether the run there is unfinished, be it because of what was `given` anew."""
    try:
        config = read_config(folder / "config.toml")
        history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    except FileNotFoundError:  # no epoch has ended
        return True
    except (ConfigError, OSError, ValueError):
        return False  # of another version, or damaged: it has to be named
    if not all(isinstance(metrics, dict) for metrics in history):
        return False
    why = ("epochs", history[-1].get("ended") if history else None)  # it would end, and what was given may be more
    longer = any(value != getattr(config, name) for name, value in given.items() if name in why)
    whole = (folder / epoch_file(len(history))).exists()  # else killed while it wrote the last of its files
    return longer or not whole or not has_ended(history, config)


def mark(job: str) -> str:
    """The first line of config.toml, by which processes that torchrun starts again find their run."""
    return f"# torchrun {job}\n" if job else ""


def run_of_job(job: str, log_dir: str) -> Path | None:
    """The run that this very torchrun (or one of the same --rdzv-id and flags) began; None where it is done."""
    is_restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    for path in sorted(Path(log_dir).glob("*/config.toml"), reverse=True) if job else ():
        if path.read_bytes().startswith(mark(job).encode()) and (is_restart or can_go_on(path.parent, {})):
            return path.parent
    return None


def reopen(run: Run, folder: Path) -> None:
    """Make it this folder's run, with its newest whole checkpoint.

    Raises ConfigError while another process has the folder, CheckpointError for checkpoints that cannot be used.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise ConfigError(f"--resume {folder}: another process is training this run") from None
    run.folder, run.lock = folder, lock
    for part in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
        remove(part)
    found = sorted(folder.glob("epoch_*.pt"), key=lambda path: (len(path.name), path.name), reverse=True)
    last = found[0] if found else folder / epoch_file(0)
    for path in [path for path in (folder / INTERRUPTED, *found) if path.exists()]:
        try:
            network, checkpoint = model.load(path)
        except model.CheckpointError as error:
            print(f"train.py: {error}; trying the checkpoint before", file=sys.stderr)
            continue
        if path.name != INTERRUPTED or epoch_file(checkpoint["epoch"]) == last.name:  # else of an epoch that ended
            run.network, run.checkpoint = network, checkpoint
            return
    epochs = folder / "metrics.jsonl"  # the first one's are there before its checkpoint
    if found or (epochs.exists() and epochs.read_bytes().count(b"\n") > 1):
        raise model.CheckpointError(f"{folder}: none of its checkpoints can be resumed; {new_run(folder)}")


def new_run(folder: Path) -> str:
    """What to do where a run cannot be resumed, as the end of an error message."""
    return f"--weights {quoted(folder / 'best.pt')} starts a new run from its weights"


def resumed_config(run: Run, given: dict) -> Config:
    """The run's own config, with what was given anew; an end that this puts off is taken out of the history.

    Raises ConfigError for what cannot change any more, CheckpointError for a checkpoint without what resuming needs.
    """
    config = own_config(run)
    check_changes(run, config, given)
    given = {name: value for name, value in given.items() if may_change(name) or name == "data"}
    changed = replace(config, **given | {"log_dir": str(run.folder.parent), "run_name": ""})
    why = run.history[-1].get("ended") if run.history else None
    if why and (getattr(changed, why) != getattr(config, why) or changed.epochs > config.epochs):
        del run.history[-1]["ended"]
    return changed


def own_config(run: Run) -> Config:
    """The config of a run, which also gets back what of it its checkpoint holds; raises CheckpointError."""
    config = read_config(run.folder / "config.toml")
    if not run.checkpoint:
        return config
    try:
        of_checkpoint = Config(**checked(run.checkpoint["config"], str))
        for name in RESUMED:
            setattr(run, name, run.checkpoint["training"][name])
        trouble = bad_history(run, of_checkpoint)
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        why = "its checkpoint is of another version, whose runs this one cannot resume"
        raise model.CheckpointError(f"{run.folder}: {why}; {new_run(run.folder)}") from error
    if trouble:
        raise model.CheckpointError(f"{run.folder}: its checkpoint's {trouble}")
    # What can change was perhaps changed after that checkpoint.
    return replace(
        of_checkpoint, **{name: getattr(config, name) for name in Config.__dataclass_fields__ if may_change(name)}
    )


def check_changes(run: Run, config: Config, given: dict) -> None:
    """Raises ConfigError for what cannot change any more."""
    for name, value in given.items():
        same = value == getattr(config, name) or (name in RESOLVED and value in ("auto", 0, ()))
        same |= (name == "run_name" and value == run.folder.name) or (name == "data" and Path(value).is_dir())
        if not same and not may_change(name):
            had = f"the run has {getattr(config, name)!r}, which cannot change any more"
            raise ConfigError(f"{flag(name)}: {had}; {new_run(run.folder)}")
    epochs = given.get("epochs", config.epochs)
    if config.epochs > epochs <= len(run.history):
        raise ConfigError(f"--epochs {epochs}: the run has {len(run.history)} epochs already")
    if config.epochs != epochs and config.hardest < 1 and run.checkpoint.get("training", {}).get("sums"):
        raise ConfigError("--epochs: --hardest pictures of an interrupted epoch depend on it; first go on without it")


def may_change(name: str) -> bool:
    """Whether a setting can be another when a run goes on."""
    group = Config.__dataclass_fields__[name].metadata["group"]
    return name in LATER or (group in ("machine", "run") and name != "run_name")


def bad_history(run: Run, config: Config) -> str | None:
    """What is wrong with what a checkpoint tells of its run, in words; None when nothing is."""
    split = split_of(run.history) if run.history else ""
    numbers = ("epoch", "step", "lr", "train_loss", "train_accuracy", f"{split}_loss", f"{split}_accuracy")
    if config.model != run.checkpoint["model"]["name"] or len(run.history) != run.checkpoint["epoch"]:
        return "parts do not belong together"
    for number, metrics in enumerate(run.history, 1):
        known = all(isinstance(metrics[name], int | float) for name in numbers) and metrics["epoch"] == number
        if (
            not known
            or not model.is_plain(metrics)
            or metrics.get("ended", "patience") not in ("patience", "time_limit")
        ):
            return "history holds impossible values"
    trained = run.unevaluated
    whole = trained is None or (model.is_plain(trained) and {*numbers[:5]} <= {*trained})
    if not whole or not isinstance(run.pictures, int) or not all(name.isprintable() for name in run.mistakes):
        return "training holds impossible values"
    return None


def go_on(run: Run, trainer: Trainer, train_set: datasets.Pictures, config: Config) -> None:
    """Bring a resumed run's trainer to where its checkpoint was made, and say where that is.

    Raises CheckpointError where the checkpoint does not fit, DataError where the pictures are others now.
    """
    if run.folder and not run.checkpoint:
        note(config, f"{run.folder}: no checkpoint yet, starts anew")
    if not run.checkpoint:
        run.pictures = len(train_set)
        return
    training, epochs = run.checkpoint["training"], run.checkpoint["config"]["epochs"]
    if train_set.classes != run.checkpoint["classes"] or len(train_set) != run.pictures:
        raise datasets.DataError(f"{config.data}: not the {run.pictures} pictures that the run trained on")
    try:
        trainer.load_state_dict(training)
    except Exception as error:  # a stranger's file can hold anything
        if type(error) is RuntimeError and trainer.group.count > 1:  # perhaps another process is gone
            raise
        raise model.CheckpointError(f"{run.folder}: its training cannot go on: {reason(error)}") from error
    where = f" at step {trainer.sums.step}" if trainer.sums else " with its evaluation" if run.unevaluated else ""
    where = "is finished" if has_ended(run.history, config) else f"goes on in epoch {len(run.history) + 1}{where}"
    note(config, f"{run.folder}: {where}")
    if epochs != config.epochs:
        lr = trainer.schedule.get_last_lr()[0]
        note(
            config,
            f"{epochs} -> {config.epochs} epochs: the {config.schedule} schedule now spans all of them, so that the "
            f"learning rate goes on at {lr:.3g}; a run of {config.epochs} epochs from its start would end elsewhere",
        )


def mend_best(run: Run) -> None:
    """Make best.pt anew from its epoch's checkpoint, if the disk had no room for it, or it is gone."""
    epoch = best_of(run.history)["epoch"] if run.history else 0
    try:
        held = model.read(run.folder / "best.pt")["epoch"]
    except model.CheckpointError:
        held = 0
    if held == epoch or held > len(run.history):  # the latter is of an epoch that is done again
        return
    try:
        checkpoint = model.read(run.folder / epoch_file(epoch))
        run.best = model.packed({key: value for key, value in checkpoint.items() if key != "training"})
    except model.CheckpointError as error:
        print(f"train.py: best.pt is not that of epoch {epoch}, and cannot be made anew: {error}", file=sys.stderr)
        run.unsaved["best.pt"] = f"its checkpoint, {epoch_file(epoch)}, is gone"
    save_best(run)


# ---- what TensorBoard shows ------------------------------------------------------------------------------------------


def show_start(writer, network: nn.Module, split: str, config: Config, device: torch.device) -> None:
    """What TensorBoard knows before training: the graph, the config as hparams and as text, which curves belong
    together."""
    from torch.utils.tensorboard.summary import hparams

    model.write_graph(writer, network, torch.zeros(1, 3, config.image_size, config.image_size, device=device))
    values = {name: str(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    # add_hparams would make a run of its own (pytorch issue 32651); the three summaries it is made of do not.
    for summary in hparams(values, dict.fromkeys((f"accuracy/{split}", f"loss/{split}"), 0.0)):
        writer.file_writer.add_summary(summary)
    together = {what: ["Multiline", [f"{what}/train", f"{what}/{split}"]] for what in ("loss", "accuracy")}
    writer.add_custom_scalars({"training against what was held back": together})
    machine = {
        "revision": revision(),
        "device": str(device),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    for name, rows in (("config", values), ("machine", machine)):
        lines = [f"| {key} | {value} |" for key, value in rows.items()]
        writer.add_text(name, "\n".join(["| | |", "| --- | --- |", *lines]))


def revision() -> str:
    """The git commit of these scripts, with a + when files were changed since; "unknown" outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def show(
    writer,
    network: nn.Module,
    sets: list[datasets.Pictures],
    epoch: int,
    step: int,
    config: Config,
    answers: tuple = (),
    last: bool = False,
):
    """Draw what is due after an epoch (0: before training).

    `answers`, if there are any yet, are the class probabilities and labels of the last set.
    """
    every = config.view_every or math.ceil(config.epochs / 10)
    if not config.views or (epoch % every and not last):
        return
    train_set, test_set = sets
    views.write(
        writer,
        step,
        network.eval(),
        test_set.classes,
        lambda: train_set.look(torch.arange(min(16, len(train_set))), augmentation(config), config.seed, epoch)[1:],
        test_set.look,
        *answers,
    )
    if config.histograms and epoch:
        views.write_histograms(writer, step, network)


def show_embedding(run: Run, network: nn.Module, head: list[str], test_set: datasets.Pictures, config: Config) -> None:
    """1,000 test pictures in TensorBoard's projector, by what the head gets to see of them."""
    frozen, places = model.HeadOnly(network, head, config.image_size), torch.arange(min(1000, len(test_set)))
    parts = [test_set.look(part) for part in places.split(test_set.evaluation_batch)]
    hidden, images, labels = (
        torch.cat(part) for part in zip(*((frozen.features(x), *y) for x, *y in parts), strict=True)
    )
    names = [test_set.classes[label] for label in labels.tolist()]
    views.write_embedding(run.writer, run.history[-1]["step"], hidden.flatten(1), images, names)


def log_metrics(writer, metrics: dict, memory: float) -> None:
    """One epoch's metrics into TensorBoard."""
    for name, value in metrics.items():
        split, _, what = name.partition("_")
        if split in ("train", "val", "test"):
            writer.add_scalar(f"{what}/{split}", value, metrics["step"])
        elif name in ("lr", "images_per_second", "epoch_seconds"):
            writer.add_scalar(name, value, metrics["step"])
    writer.add_scalar("memory_mib", memory, metrics["step"])


# ---- the end of an epoch, and of a run -------------------------------------------------------------------------------


def add_epoch(run: Run, trainer: Trainer, metrics: dict, answers: list[Tensor], config: Config) -> bool:
    """Take an epoch into the run's history, with the reason if it is to be the last; whether it is the best so far."""
    run.unevaluated = None
    if trainer.sums:  # no time was left for the rest
        trainer.end_epoch()
    run.history.append(metrics)
    since_best = len(run.history) - best_of(run.history)["epoch"]
    if not since_best and run.header:
        run.mistakes = views.worst_pairs(views.count_pairs(*answers), run.header["classes"])
    time_is_over = any(trainer.group.gather(trainer.clock.is_over()))
    if len(run.history) < config.epochs and time_is_over:
        metrics["ended"] = "time_limit"
    elif len(run.history) < config.epochs and 0 < config.patience <= since_best:
        metrics["ended"] = "patience"
    return not since_best


def record_epoch(
    run: Run, trainer: Trainer, sets: list[datasets.Pictures], answers: list, config: Config, is_best: bool
) -> None:
    """Show, save and print what an epoch came to; in the first process."""
    metrics, ends = run.history[-1], has_ended(run.history, config)
    show(run.writer, trainer.network, sets, metrics["epoch"], metrics["step"], config, answers, ends)
    log_metrics(run.writer, metrics, memory_used(trainer.device))
    if ends and config.views and config.embedding:
        head = model.head_keys(config.model, run.header["model"]["options"])
        views.attempt("embedding", lambda: show_embedding(run, trainer.network, head, sets[1], config))
    save_epoch(run, trainer, config, is_best, epoch_line(metrics, sets[1].split, config, is_best))


def save_epoch(run: Run, trainer: Trainer, config: Config, is_best: bool, text: str) -> None:
    """Write what an epoch leaves, and then print its line; the large files in the background.

    Its checkpoint is written last: a process that is killed before that does the epoch again. best.pt is without what
    only resuming needs.
    """
    run.wait()
    run.attempt("TensorBoard's events", run.writer.flush)
    run.attempt("metrics.jsonl", run.write_metrics)
    run.best = model.packed(run.checkpoint_of(trainer)) if is_best else run.best
    content, files = packed(run, trainer), run.epoch_files()
    run.later(lambda: write_epoch(run, content, files, config.keep, text))


def write_epoch(run: Run, content: memoryview, files: list[Path], keep: int, text: str) -> None:
    """The part of save_epoch for the background: `content` goes into the last of the epochs' files."""
    from tqdm import tqdm

    save_best(run)
    if save(run, files[-1].name, content):
        remove(run.folder / INTERRUPTED)
        for path in files[:-keep] if keep and not run.best else ():  # best.pt is made of one
            remove(path)
            run.unsaved.pop(path.name, None)
    tqdm.write(text)  # above the bar of the epoch in progress
    sys.stdout.flush()


def save_best(run: Run) -> None:
    """Write best.pt, if it is to be written anew."""
    if run.best and run.attempt("best.pt", lambda: model.write(run.folder / "best.pt", run.best)):
        run.best = None


def packed(run: Run, trainer: Trainer) -> memoryview:
    """A checkpoint with all that resuming needs, as the bytes of a file."""
    of_run = {name: getattr(run, name) for name in RESUMED}
    return model.packed(run.checkpoint_of(trainer) | {"training": trainer.state_dict() | of_run})


def save(run: Run, name: str, content: memoryview) -> bool:
    """Write a file of the run; whether the disk took it."""
    return run.attempt(name, lambda: model.write(run.folder / name, content))


def save_interrupted(run: Run, trainer: Trainer, metrics: dict) -> int:
    """Save an interrupted run, and say how to go on; returns the exit status."""
    if trainer.group.rank:
        return 130
    run.wait()
    run.unevaluated = None if trainer.sums else metrics  # of an epoch whose steps are all done
    save_best(run)
    where = f"epoch {len(run.history) + 1}, {f'step {trainer.sums.step}' if trainer.sums else 'after its steps'}"
    saved = save(run, INTERRUPTED, packed(run, trainer))
    how = "from there, to the same result" if saved else "from the checkpoint before"
    with contextlib.suppress(OSError):  # who read the output may have ended by the same Ctrl-C
        print(f"train.py: interrupted in {where}; this goes on {how}:", file=sys.stderr)
        print(f"python train.py --resume {quoted(run.folder)}", flush=True)
    return 130


def finish_run(run: Run, trainer: Trainer, sets: list[datasets.Pictures], config: Config) -> None:
    """Say where the best checkpoint is, what it mistakes, and how to go on; with held-out pictures, test it now, once.

    Raises TrainingError when something could not be saved.
    """
    if trainer.group.rank == 0:
        run.wait()
        save_best(run)
        if "best.pt" in run.unsaved:  # what is called so is another epoch's, if anything
            raise TrainingError(f"not saved: best.pt ({run.unsaved['best.pt']})")
    if len(sets) > 1:
        test_best(run, trainer, sets[1], config)
    if trainer.group.rank:
        return
    run.attempt("TensorBoard's events", run.writer.flush)
    if why := run.history[-1].get("ended"):
        print(f"ended after epoch {len(run.history)} of {config.epochs} by {flag(why)} {getattr(config, why):g}")
    best, split = best_of(run.history), sets[0].split
    result = f"{split} accuracy {best[f'{split}_accuracy']:.1%} (chosen on the {split} pictures)"
    if len(sets) > 1:
        result = f"validation accuracy {best['val_accuracy']:.1%}, test accuracy {best['test_accuracy']:.1%}"
    print(f"best: epoch {best['epoch']}, {result}")
    if run.mistakes:
        print(f"most mistaken: {', '.join(run.mistakes)}")
    print(f"python predict.py YOUR_PICTURE --checkpoint {quoted(run.folder / 'best.pt')}")
    print(f"tensorboard --logdir {quoted(config.log_dir)}")
    if run.unsaved:
        raise TrainingError(f"not saved: {', '.join(f'{name} ({why})' for name, why in run.unsaved.items())}")


def test_best(run: Run, trainer: Trainer, test_set: datasets.Pictures, config: Config) -> None:
    """Test the best epoch's network, which the trainer gets, and add what came out to best.pt and the history."""
    best = best_of(run.history)
    if trainer.group.rank == 0:
        checkpoint = model.read(run.folder / "best.pt", trainer.device)
        trainer.network.load_state_dict(checkpoint["state_dict"])
    trainer.group.spread(trainer.network.state_dict().values())
    test, *answers = evaluate(replace(trainer, trains=trainer.network), test_set, config)
    best |= test
    if trainer.group.rank == 0:
        run.mistakes = views.worst_pairs(views.count_pairs(*answers), run.header["classes"])
        for name, value in test.items():
            run.writer.add_scalar(f"{name.partition('_')[2]}/test", value, best["step"])
        save(run, "best.pt", model.packed(checkpoint | {"metrics": best}))


# ---- what is printed -------------------------------------------------------------------------------------------------


def say_what(
    config: Config, sets: Iterable[datasets.Pictures], network: nn.Module, device: torch.device, group: Group
) -> None:
    """In one line: the pictures, the network and its weights, the device and how many processes."""
    sizes = ", ".join(f"{len(pictures):,} {pictures.split}" for pictures in sets)
    parameters = list(network.parameters())
    count, training = (sum(p.numel() for p in parameters if p.requires_grad or every) for every in (True, False))
    what = f"{config.model}: {count:,} parameters"
    if training < count:
        what += f", {training:,} of them trained"
    if config.weights != "none":
        what += f", from {config.weights}"
    where = f"{group.count} processes, this one on {device}" if group.count > 1 else device
    note(config, f"{config.data}: {sizes} pictures; {what}; {where}")


def note(config: Config, text: str) -> None:
    """Say something on standard error that a user may want to know, but need not."""
    if not config.quiet:
        print(text, file=sys.stderr)


def epoch_line(metrics: dict, split: str, config: Config, best: bool) -> str:
    """An epoch in one line of at most 100 columns."""
    epoch = f"{metrics['epoch']:>{len(str(config.epochs))}}/{config.epochs}"
    train = f"train loss {metrics['train_loss']:.3f} acc {metrics['train_accuracy']:.1%}"
    held_out = f"{split} loss {metrics[f'{split}_loss']:.3f} acc {metrics[f'{split}_accuracy']:.1%}"
    speed = f"{metrics['epoch_seconds']:.1f} s  {metrics['images_per_second']:,.0f} images/s"
    return f"epoch {epoch}  {train}  {held_out}  {speed}{'  <- best' if best else ''}"


def quoted(path: str | Path) -> str:
    """As one types it."""
    return f'"{path}"' if " " in str(path) else str(path)


# ---- the story -------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Train as these flags say; returns the exit status: 0, or 130 when it was interrupted."""
    clock = Clock()
    config, given, resume = parse(argv)
    with Group(config.timeout) as group, Run() as run:
        config, pretrained = agree_on_config(run, config, given, resume, group)
        clock.limit = 60 * config.time_limit or math.inf
        device = pick(config.device, group)
        precision = pick_precision(config.precision, device)
        tune(device, config.deterministic)
        if config.quiet:
            os.environ["TQDM_DISABLE"] = "1"  # of all bars
        check_network(config, pretrained, run, group)

        train_set, *eval_sets = load_data(config, device, group)  # the first of eval_sets chooses the best epoch
        shown_sets = [train_set, eval_sets[0]]
        config = replace(config, mean=train_set.mean, std=train_set.std)

        network, head, options = make_network(config, train_set, pretrained, run, group)
        network = network.to(device, memory_format=memory_format(device))
        del pretrained  # whose memory is free again
        network = model.synchronise(network, device) if config.sync_bn and group.count > 1 else network
        say_what(config, (train_set, *eval_sets), network, device, group)

        trains, epoch_sets = what_trains(network, head, shown_sets, config, precision, group)
        steps = all_steps(run.history, len(train_set), config)
        trainer = make_trainer(network, config, steps, device, precision, head, trains, clock, group)
        if config.time_limit:
            clock.ending = len(eval_sets) * evaluation_seconds(trainer, epoch_sets[1], config)
        go_on(run, trainer, train_set, config)
        if group.rank == 0:
            open_run(run, trainer, shown_sets, config, header(config, options, train_set.classes))
        with Interrupts(group) as interrupts:
            votes = Votes(group, interrupts, clock)
            while not has_ended(run.history, config):
                epoch = len(run.history) + 1
                metrics = run.unevaluated or train_epoch(trainer, epoch_sets[0], config, epoch, run.writer, votes.stop)
                trained_seconds = clock.seconds()
                try:
                    held_out, *answers = evaluate(trainer, epoch_sets[1], config, votes.check)
                except Interrupted:
                    return save_interrupted(run, trainer, metrics)
                metrics |= held_out
                is_best = add_epoch(run, trainer, metrics, answers, config)
                if group.rank == 0:
                    record_epoch(run, trainer, shown_sets, answers, config, is_best)
                clock.ending = max(clock.ending, (clock.seconds() - trained_seconds) * len(eval_sets))
        finish_run(run, trainer, eval_sets, config)
    return 0


def cli(argv: list[str] | None = None) -> int:
    return command("train.py", main, argv, "; what was saved before is whole")


if __name__ == "__main__":
    end(cli())

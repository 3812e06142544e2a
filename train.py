"""Train a picture classifier: configuration -> device -> data -> network -> epochs -> run folder.

`python train.py --epochs 10` trains CIFAR-quick on CIFAR-10; read `main()` first, it tells the whole story.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import Field, asdict, dataclass, field, fields, replace
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor, nn

import datasets
import model
import views
from device import DeviceError, autocast, memory_format, memory_used, pick, pick_precision, seed, tune
from model import ACTIVATIONS, INTERPOLATIONS, LOSSES, NETWORKS, STEMS, TTA, suggestion

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "cifar_quick.toml"
LOG_STEPS = 100  # between two points of the training curves


class ConfigError(ValueError):
    """A setting that cannot be; the message names the file or flag, the key and the value."""


class TrainingError(RuntimeError):
    """Training cannot go on."""


WRONG_CALL = (ConfigError, DeviceError, datasets.LimitError, model.NetworkError)  # exit status 2; all else is 1


# ---- configuration -------------------------------------------------------------------------------------------------


def setting(group: str, default: object, help: str, **rules: object) -> Field:
    """One line of Config: its group in `--help`, its default, what it is, and what its values must be."""
    return field(default=default, metadata={"group": group, "help": help, **rules})


def bad_freeze(value: str) -> str | None:
    return (
        None
        if value == "all" or re.fullmatch("0|[1-9][0-9]*", value, re.ASCII)
        else f"{value!r} is neither a number of stages nor all"
    )


@dataclass(frozen=True)
class Config:
    """Every setting of a run: a key of the config files, and a flag of the same name."""

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
    flip: bool = setting("data", False, "augmentation: mirror half the training pictures")
    crop: int = setting(
        "data", 0, "augmentation: shift by up to PIXELS, reflected at the edge", at_least=0, metavar="PIXELS"
    )
    cutout: int = setting("data", 0, "augmentation: hide a square of PIXELS", at_least=0, metavar="PIXELS")
    jitter: float = setting(
        "data", 0.0, "augmentation: change brightness, contrast, saturation by up to this share", at_least=0, at_most=1
    )
    resized_crop: float = setting(
        "data", 0.0, "augmentation: enlarge a part of at least this share of the area; 0: none", at_least=0, at_most=1
    )

    model: str = setting("network", "cifar_quick", "the network: `python model.py --list`", check=model.unknown)
    batch_norm: bool = setting("network", True, "of cifar_quick: batch normalisation in every stage")
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
    batch_size: int = setting("recipe", 64, "pictures a step", at_least=1)
    optimizer: str = setting("recipe", "sgd", "muon: SGD, hidden layers' weights by --muon-lr", choices=("sgd", "muon"))
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
    tta: str = setting(
        "recipe", "none", "test-time augmentation: look at mirror images, or also at shifted ones", choices=TTA
    )

    device: str = setting("machine", "auto", "auto, cpu, cuda, cuda:1 or mps")
    precision: str = setting("machine", "auto", "of the forward pass", choices=("auto", "fp32", "bf16", "fp16"))
    workers: int = setting("machine", -1, "processes that read picture files; -1: one a core", at_least=-1)
    memory_share: float = setting(
        "machine", 0.4, "share of free memory that pictures may take; more are streamed", at_least=0, at_most=1
    )
    compile: bool = setting("machine", False, "torch.compile: slow to start, faster on GPUs")

    seed: int = setting("run", 0, "of initialisation, order and augmentation", at_least=0, at_most=2**63 - 1)
    log_dir: str = setting("run", "logs", "where run folders live")
    views: bool = setting("run", True, "pictures and a PR curve a class in TensorBoard, beside the scalars")
    view_every: int = setting("run", 0, "epochs between two sets of pictures; 0: ten times in the run", at_least=0)
    histograms: bool = setting("run", False, "views: how weights and gradients are distributed")
    embedding: bool = setting("run", False, "views: 1,000 test pictures in the projector, by the last hidden layer")
    run_name: str = setting("run", "", "the run's folder; date, time and network if not given")


def parse(argv: list[str] | None) -> Config:
    """The config file's settings, overruled by the flags; a wrong one ends the program with one line and status 2."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=DEFAULT_CONFIG, help="TOML file with the defaults of all other flags")
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="python train.py [--config FILE] [--KEY VALUE ...]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        parents=[first],
        allow_abbrev=False,
    )
    first.error = parser.error = lambda message: parser.exit(2, f"train.py: {message}\n")
    try:
        defaults = read_config(Path(first.parse_known_args(argv)[0].config))
        add_flags(parser, defaults)
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            flags = [flag for action in parser._actions for flag in action.option_strings]
            raise ConfigError(f"unknown flag {unknown[0]}{suggestion(unknown[0].partition('=')[0], flags)}")
        values = {key.name: getattr(args, key.name) for key in fields(Config)}
        config = checked(values, lambda name: f"--{name.replace('_', '-')}")
        check_together(config)
    except ConfigError as error:
        parser.error(str(error))
    return config


def read_config(path: Path) -> Config:
    """A TOML file's settings on top of Config's own defaults; raises ConfigError."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
    for name in content:
        if name not in Config.__dataclass_fields__:
            raise ConfigError(f"{path}: unknown key {name!r}{suggestion(name, Config.__dataclass_fields__)}")
    return checked(content, lambda name: f"{path}: {name}")


def checked(values: dict, called: Callable[[str], str]) -> Config:
    """A Config of these values; raises ConfigError for an impossible one, by the name that the user `called` it."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if type(values.get("freeze")) is int:  # `freeze = 2` is what one writes into a file
        values["freeze"] = str(values["freeze"])
    for key in fields(Config):
        if key.name in values and (trouble := problem(key, values[key.name])):
            raise ConfigError(f"{called(key.name)}: {trouble}")
    return Config(**values)


def add_flags(parser: argparse.ArgumentParser, defaults: Config) -> None:
    groups = {}
    for key in fields(Config):
        if key.metadata["group"] not in groups:
            groups[key.metadata["group"]] = parser.add_argument_group(key.metadata["group"])
        if key.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif key.type is tuple:
            how = {"type": float, "nargs": 3, "metavar": ("R", "G", "B")}
        else:
            how = {"type": key.type, "choices": key.metadata.get("choices"), "metavar": key.metadata.get("metavar")}
        flag, default = "--" + key.name.replace("_", "-"), getattr(defaults, key.name)
        groups[key.metadata["group"]].add_argument(flag, default=default, help=key.metadata["help"], **how)


def problem(key: Field, value: object) -> str | None:
    """What is wrong with a value of this setting, in words; None when nothing is."""
    rules, kinds = key.metadata, (int, float) if key.type is float else key.type
    if not isinstance(value, kinds) or (isinstance(value, bool) and key.type is not bool):
        return f"{value!r} is not of type {key.type.__name__}"
    if "choices" in rules and value not in rules["choices"]:
        return f"{value!r} is not one of {', '.join(rules['choices'])}{suggestion(value, rules['choices'])}"
    if trouble := "check" in rules and rules["check"](value):
        return trouble
    numbers = value if key.type is tuple else (value,) if key.type in (int, float) else ()
    if key.type is tuple and len(value) not in (0, 3):
        return f"{list(value)} is not one number for each of the three channels"
    for number in numbers:
        if not isinstance(number, int | float) or not -1e300 < number < 1e300:
            return f"{number!r:.40} is not a finite number"
        if number < rules.get("at_least", -math.inf) or number <= rules.get("above", -math.inf):
            bound = f"at least {rules['at_least']}" if "at_least" in rules else f"above {rules['above']}"
            return f"{number} is not {bound}"
        if number >= rules.get("below", math.inf) or number > rules.get("at_most", math.inf):
            bound = f"below {rules['below']}" if "below" in rules else f"at most {rules['at_most']}"
            return f"{number} is not {bound}"
    return None


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
    if config.model in NETWORKS and config.batch_norm and config.batch_size == 1 and config.freeze != "all":
        raise ConfigError("--batch-size 1: batch normalisation needs at least 2 pictures; add --no-batch-norm")
    if config.run_name != Path(config.run_name).name or config.run_name == "..":
        raise ConfigError(f"--run-name {config.run_name}: a folder's name is wanted, without a path")
    if config.run_name and (Path(config.log_dir) / config.run_name).exists():
        raise ConfigError(f"--run-name {config.run_name}: {Path(config.log_dir) / config.run_name} exists already")


def resolve(config: Config) -> tuple[Config, dict | None]:
    """Fill in what depends on the weights to start from; also returns these, in the form of a checkpoint.

    Raises ConfigError for settings that do not fit them, and what `model.trained` raises.
    """
    trained = None if config.weights == "none" else model.trained(config.weights, config.model)
    had = trained or {"image_size": 32, "resize": 32, "interpolation": "bilinear", "mean": (), "std": ()}
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
    for name, value in trained["model"]["options"].items() if trained else ():
        if getattr(config, name, value) == "auto":
            config = replace(config, **{name: value})
        elif getattr(config, name, value) != value and name not in ("image_size", "classes"):
            flag = "--no-batch-norm" if value is False else "--batch-norm" if value is True else f"--{name} {value}"
            raise ConfigError(f"--weights {config.weights}: that network was trained otherwise; add {flag}")
    return config, trained


def as_toml(config: Config) -> str:
    """The config as a file that `--config` reads; without the run's name, so that it can be run again."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    del values["run_name"]
    return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items())


# ---- training ------------------------------------------------------------------------------------------------------


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
                if weight not in self.state:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
                buffer = self.state[weight]["momentum_buffer"]
                buffer.mul_(group["momentum"]).add_(weight.grad)
                update = weight.grad.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
                update = orthogonal(update.flatten(1).to(self.precision)).to(weight).view_as(weight)
                lr = group["lr"] * max(1, len(weight) / weight[0].numel()) ** 0.5  # tall matrices have longer columns
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-lr)


def orthogonal(matrix: Tensor, steps: int = 3) -> Tensor:
    """A matrix on the way to the nearest (semi-)orthogonal one, by Newton-Schulz steps on its singular values.

    Three steps bring those above 0.03 of the matrix's norm to between 0.6 and 1.2, and let smaller ones grow about 40
    times, which serves as well as exact ones; the polynomial is that of the page named in Muon.
    """
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        square = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    return wide if len(matrix) <= matrix.shape[1] else wide.T


@dataclass
class Trainer:
    """What a training step needs: the network, and what changes it."""

    network: nn.Module  # the bare and whole one, which is saved
    trains: nn.Module  # the same, or the part of it that trains
    forward: Callable[[Tensor], Tensor]  # that part, compiled if the user wants it
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler  # does nothing but in fp16
    device: torch.device
    precision: torch.dtype
    shares: Tensor | None = None  # given to the right class of every training picture, when it was last seen

    def step(self, images: Tensor, labels: Tensor, config: Config) -> tuple[Tensor, Tensor]:
        """One step of SGD on a batch; returns its mean loss and its logits, without waiting for the device.

        The gradients stay until the next step, for whoever wants to look at them.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.precision):
            logits, *auxiliary = model.answers(self.forward(images))
            loss = total = model.loss_function(logits, labels, config.loss, config.label_smoothing)
            for others in auxiliary:
                total = total + model.AUXILIARY_WEIGHT * model.loss_function(
                    others, labels, config.loss, config.label_smoothing
                )
        self.scaler.scale(total).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        return loss.detach(), logits.detach()

    def gradient_norm(self) -> float:
        """The length of the last step's gradient, over all that trains."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.trains.parameters() if p.grad is not None]).item()

    def state_dict(self) -> dict:
        """What resuming needs beside the weights."""
        parts = {"optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler}
        return {name: part.state_dict() for name, part in parts.items()} | {"shares": self.shares}


def learning_rate(config: Config, steps: int, step: int) -> float:
    """The share of `config.lr` to use at `step` of `steps`.

    `onecycle` climbs for a fifth of the run and falls for the rest, both in a straight line (after Smith 2018,
    arxiv.org/abs/1803.09820); `cosine` falls along half a wave (Loshchilov and Hutter 2017, arxiv.org/abs/1608.03983).
    """
    done = step / steps
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
) -> Trainer:
    """The optimizer and its schedule for a run of `steps` steps; `head` names the weights that `backbone_lr` leaves."""
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
    settings = {"nesterov": config.nesterov, "fused": device.type in ("cpu", "cuda")}  # one pass over all weights
    if config.optimizer == "muon":
        optimizer = Muon(groups, config.lr, config.momentum, precision=precision, **settings)
    else:
        optimizer = torch.optim.SGD(groups, config.lr, config.momentum, **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(config, steps, step))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    trains = trains or network
    compiled = torch.compile(trains) if config.compile else trains
    return Trainer(network, trains, compiled, optimizer, schedule, scaler, device, precision)


def load_data(config: Config, device: torch.device) -> list[datasets.Pictures]:
    """The training and the test set; with `val_fraction`, training, validation (held out of training) and test."""
    names = ("data", "data_dir", "image_size", "resize", "interpolation", "limit", "mean", "std", "data_url")
    names += ("val_fraction", "strict", "workers", "memory_share")
    train_set, test_set = datasets.load(device=device, **{name: getattr(config, name) for name in names})
    if not config.val_fraction or test_set.split == "val":  # a folder without train/ was split by val_fraction already
        return [train_set, test_set]
    return [*train_set.hold_out(config.val_fraction, config.seed), test_set]


def network_options(config: Config, classes: int, trained: dict | None = None) -> dict:
    """What the network's constructor gets; stored in the checkpoint, from which it is built again."""
    append = trained["model"]["options"].get("append", 0) if trained else 0
    if config.head == "append" and append:
        raise ConfigError(f"--head append: {config.weights} has an appended layer already; add --head replace")
    if config.head == "append":
        append = len(trained["classes"]) if trained else 1000
    settings = {name: getattr(config, name) for name in model.SETTINGS}
    return model.network_options(config.model, classes, config.image_size, append, **settings)


def build(config: Config, options: dict, classes: list[str], trained: dict | None) -> tuple[nn.Module, list[str]]:
    """The network with its trained weights, frozen where `config` says so; and the names of its head's weights.

    Raises NetworkError or CheckpointError.
    """
    network, head = model.create(config.model, options), model.head_keys(config.model, options)
    if trained:
        append, same_classes = config.head == "append", trained["classes"] == classes
        new = () if append or (config.head == "auto" and same_classes) else head
        source = f"{config.weights} (trained on {trained['image_size']} x {trained['image_size']} pixels)"
        model.transfer(network.network if append else network, trained["state_dict"], new, source)
    if config.freeze != "0":
        model.freeze(network, head, None if config.freeze == "all" else int(config.freeze))
    return network, head


def augmentation(config: Config) -> datasets.Augment | None:
    """The random changes of training pictures; None where there are none."""
    augment = datasets.Augment(config.flip, config.crop, config.cutout, config.jitter, config.resized_crop)
    return augment if augment != datasets.Augment() else None


def training_batches(
    train_set: datasets.Pictures, config: Config, epoch: int, keep: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    return train_set.batches(config.batch_size, config.shuffle, augmentation(config), config.seed, epoch, keep)


def as_features(
    sets: list[datasets.Pictures], frozen: model.HeadOnly, config: Config, precision: torch.dtype
) -> list[datasets.Features] | None:
    """What the frozen part makes of all pictures, computed once; None where it does not fit into memory."""
    from tqdm import tqdm

    device, found, start = sets[0].labels.device, [], time.perf_counter()
    with tqdm(total=sum(map(len, sets)), desc="features", unit=" pictures", leave=False, disable=None) as bar:
        for pictures in sets:
            features, done = None, 0
            for images, labels in pictures.batches(pictures.evaluation_batch):
                with autocast(device, precision):
                    batch = frozen.features(images).float()
                size = batch[0].nbytes * bar.total
                if not found and not done and size > config.memory_share * datasets.free_memory(device):
                    print(f"features would take {size / 1e6:,.1f} MB: computed anew every epoch", file=sys.stderr)
                    return None
                features = batch.new_empty(len(pictures), *batch.shape[1:]) if features is None else features
                features[done : done + len(labels)] = batch
                done += len(labels)
                bar.update(len(labels))
            found.append(datasets.Features(features, pictures.labels, pictures.classes, pictures.split))
    print(f"features computed once, in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return found


def what_trains(
    network: nn.Module, head: list[str], sets: list[datasets.Pictures], config: Config, precision: torch.dtype
) -> tuple[nn.Module, list[datasets.Pictures]]:
    """What an epoch trains, and on what: the network on pictures; of a frozen one the head, on features if it can."""
    if config.freeze != "all":
        return network, sets
    head_only = model.HeadOnly(network, head, config.image_size)
    if augmentation(config):
        return head_only, sets
    if config.tta != "none":
        print("features are computed anew every epoch; --tta none would compute them once", file=sys.stderr)
    elif features := as_features(sets, head_only, config, precision):
        return head_only.tail, features
    return head_only, sets


def hardest(trainer: Trainer, config: Config, epoch: int) -> Tensor | None:
    """Which pictures an epoch trains on, bool `(N,)`: all (None) in the first half of the run, then `config.hardest`.

    These are the ones of whose class the network was least sure when it last saw them: the others teach it little by
    then (after Jordan 2024, arxiv.org/abs/2404.00498, section 5, where a small network chooses).
    """
    if config.hardest == 1 or epoch <= math.ceil(config.epochs / 2):
        return None
    count = kept(len(trainer.shares), config, epoch)
    keep = torch.zeros(len(trainer.shares), dtype=torch.bool, device=trainer.device)
    keep[trainer.shares.topk(count, largest=False).indices] = True
    return keep


def kept(pictures: int, config: Config, epoch: int) -> int:
    """How many of the training pictures an epoch trains on."""
    return pictures if epoch <= math.ceil(config.epochs / 2) else max(2, round(config.hardest * pictures))


def train_epoch(trainer: Trainer, train_set: datasets.Pictures, config: Config, epoch: int, writer) -> dict:
    """One pass over the training pictures; returns its metrics. Raises TrainingError when the loss is not finite."""
    from tqdm import tqdm

    start = time.perf_counter()
    seed(config.seed, epoch)
    model.train_mode(trainer.trains)
    keep = hardest(trainer, config, epoch)
    order, _ = train_set.order(config.shuffle, config.seed, epoch, keep)
    steps, steps_before = len(datasets.cuts(len(order), config.batch_size)), trainer.schedule.last_epoch
    batches = training_batches(train_set, config, epoch, keep)
    bar = tqdm(batches, f"epoch {epoch}", steps, unit=" steps", leave=False, disable=None)
    loss_sum, correct = torch.zeros(2, device=trainer.device).unbind()
    logged_sum, logged_pictures, pictures, found = 0.0, 0, 0, []
    for step, (images, labels) in enumerate(bar, 1):
        lr = trainer.schedule.get_last_lr()[0]
        loss, logits = trainer.step(images, labels, config)
        loss_sum += loss * len(labels)
        correct += (logits.argmax(1) == labels).sum()
        pictures += len(labels)
        if config.hardest < 1:
            found.append(model.probabilities(logits.float(), config.loss).gather(1, labels.view(-1, 1)))
        if step % LOG_STEPS == 0 or step == steps:  # .item() waits for the device, so not at every step
            total = loss_sum.item()
            if not math.isfinite(total):
                raise TrainingError(f"the loss is {total} in epoch {epoch}, step {step}; try a lower --lr")
            if step < steps:
                mean = (total - logged_sum) / (pictures - logged_pictures)
                bar.set_postfix(loss=f"{mean:.3f}")
                writer.add_scalar("loss/train", mean, steps_before + step)
                writer.add_scalar("lr", lr, steps_before + step)
            writer.add_scalar("gradient_norm", trainer.gradient_norm(), steps_before + step)
            logged_sum, logged_pictures = total, pictures
    if config.hardest < 1:
        trainer.shares = trainer.shares if epoch > 1 else torch.zeros(len(train_set), device=trainer.device)
        trainer.shares[order.to(trainer.device)] = torch.cat(found).squeeze(1)
    seconds = time.perf_counter() - start
    return {
        "epoch": epoch,
        "step": steps_before + steps,
        "train_loss": total / pictures,
        "train_accuracy": correct.item() / pictures,
        "lr": lr,
        "epoch_seconds": seconds,
        "images_per_second": pictures / seconds,
    }


def evaluate(trainer: Trainer, pictures: datasets.Pictures, config: Config) -> tuple[dict, Tensor, Tensor]:
    """Exact mean loss (without label smoothing) and accuracy over all pictures, in eval mode; and what they are of:
    class probabilities `(N, classes)` and labels `(N,)`. Raises TrainingError when the loss is not finite."""
    with autocast(trainer.device, trainer.precision):
        logits, labels = model.outputs(trainer.trains, pictures.batches(pictures.evaluation_batch), config.tta)
    loss, accuracy = model.score(logits, labels, config.loss)
    if not math.isfinite(loss):
        raise TrainingError(f"the {pictures.split} loss is {loss}; try a lower --lr")
    metrics = {f"{pictures.split}_loss": loss, f"{pictures.split}_accuracy": accuracy}
    return metrics, model.probabilities(logits, config.loss), labels


# ---- the run folder ------------------------------------------------------------------------------------------------


def start_run(config: Config) -> Path:
    """Make the run's folder, never an existing one, and write the config into it. Raises OSError."""
    name = config.run_name or f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{config.model}"
    Path(config.log_dir).mkdir(parents=True, exist_ok=True)
    for again in range(1, 100):
        run = Path(config.log_dir) / (name if again == 1 else f"{name}_{again}")
        try:
            run.mkdir()
            break
        except FileExistsError:  # another run started in the same second
            if config.run_name:
                raise
    (run / "config.toml").write_text(as_toml(config), encoding="utf-8")
    return run


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
    about = {
        "revision": revision(),
        "device": str(device),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    for name, rows in (("config", values), ("machine", about)):
        lines = [f"| {key} | {value} |" for key, value in rows.items()]
        writer.add_text(name, "\n".join(["| | |", "| --- | --- |", *lines]))


def revision() -> str:
    """The git commit of these scripts, with a + when files were changed since; "unknown" outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def look(
    pictures: datasets.Pictures, places: Tensor, epoch: int = 0, config: Config | None = None
) -> tuple[Tensor, ...]:
    """Pictures at these places: float as the network gets them, uint8 as a person does, and their labels.

    With a config they are augmented as its training pictures in this epoch.
    """
    augment, seed = (augmentation(config), config.seed) if config else (None, 0)
    chosen = pictures.take(places.cpu())
    if isinstance(chosen, datasets.Streamed):
        chosen = replace(chosen, workers=0)  # to start processes takes longer than to read a few files
    inputs, labels = next(chosen.batches(len(places), False, augment, seed, epoch))
    return inputs, datasets.denormalize(inputs, pictures.mean, pictures.std), labels


def show(
    writer, network: nn.Module, sets: list[datasets.Pictures], epoch: int, step: int, config: Config, answers: tuple
):
    """Draw what is due after an epoch; `answers` are shares and labels of the last set, none before training (0)."""
    every = config.view_every or math.ceil(config.epochs / 10)
    if not config.views or (epoch % every and epoch != config.epochs):
        return
    train_set, test_set = sets
    views.write(
        writer,
        step,
        network.eval(),
        test_set.classes,
        lambda: look(train_set, torch.arange(min(16, len(train_set))), epoch, config)[1:],
        lambda places: look(test_set, places),
        *answers,
    )
    if config.histograms and epoch:
        views.write_histograms(writer, step, network)


def show_embedding(writer, network: nn.Module, head: list[str], test_set: datasets.Pictures, step: int, config: Config):
    """1,000 test pictures in TensorBoard's projector, by what the head gets to see of them."""
    frozen, places = model.HeadOnly(network, head, config.image_size), torch.arange(min(1000, len(test_set)))
    parts = [look(test_set, part) for part in places.split(test_set.evaluation_batch)]
    hidden, images, labels = (
        torch.cat(part) for part in zip(*((frozen.features(x), *y) for x, *y in parts), strict=True)
    )
    views.write_embedding(
        writer, step, hidden.flatten(1), images, [test_set.classes[label] for label in labels.tolist()]
    )


def log(writer, run: Path, metrics: dict, memory: float) -> None:
    """One epoch's metrics into metrics.jsonl and TensorBoard."""
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")
    for name, value in metrics.items():
        split, _, what = name.partition("_")
        if what in ("loss", "accuracy"):
            writer.add_scalar(f"{what}/{split}", value, metrics["step"])
        elif name in ("lr", "images_per_second", "epoch_seconds"):
            writer.add_scalar(name, value, metrics["step"])
    writer.add_scalar("memory_mib", memory, metrics["step"])
    writer.flush()  # so that a short or broken run shows all it did


def save(
    run: Path, trainer: Trainer, options: dict, classes: list[str], config: Config, metrics: dict, best: bool
) -> None:
    """Write the epoch's checkpoint, and best.pt (without what only resuming needs) when it is the best so far."""
    checkpoint = {
        "format": model.FORMAT,
        "model": {"name": config.model, "options": options},
        "classes": classes,
        "image_size": config.image_size,
        "resize": config.resize,
        "interpolation": config.interpolation,
        "mean": list(config.mean),
        "std": list(config.std),
        "state_dict": trainer.network.state_dict(),
        "epoch": metrics["epoch"],
        "metrics": metrics,
        "config": asdict(config),
    }
    model.save(run / f"epoch_{metrics['epoch']:03}.pt", checkpoint | {"training": trainer.state_dict()})
    if best:
        model.save(run / "best.pt", checkpoint)


def line(metrics: dict, split: str, config: Config, best: bool) -> str:
    """An epoch in one line of at most 100 columns."""
    epoch = f"{metrics['epoch']:>{len(str(config.epochs))}}/{config.epochs}"
    train = f"train loss {metrics['train_loss']:.3f} acc {metrics['train_accuracy']:.1%}"
    held_out = f"{split} loss {metrics[f'{split}_loss']:.3f} acc {metrics[f'{split}_accuracy']:.1%}"
    speed = f"{metrics['epoch_seconds']:.1f} s  {metrics['images_per_second']:,.0f} images/s"
    return f"epoch {epoch}  {train}  {held_out}  {speed}{'  <- best' if best else ''}"


def finish(
    writer,
    run: Path,
    trainer: Trainer,
    sets: list[datasets.Pictures],
    best: dict,
    answers: tuple[Tensor, Tensor],
    config: Config,
) -> None:
    """Say where the best checkpoint is, what it mistakes (by its `answers`: shares and labels), and how to go on; with
    held-out pictures, test it now, once."""
    if len(sets) == 1:
        split = sets[0].split
        result = f"{split} accuracy {best[f'{split}_accuracy']:.1%} (chosen on the {split} pictures)"
    else:
        network, checkpoint = model.load(run / "best.pt", trainer.device)
        test, *answers = evaluate(replace(trainer, trains=network), sets[1], config)
        for name, value in test.items():
            writer.add_scalar(f"{name.partition('_')[2]}/test", value, best["step"])
        model.save(run / "best.pt", checkpoint | {"metrics": best | test})
        result = f"validation accuracy {best['val_accuracy']:.1%}, test accuracy {test['test_accuracy']:.1%}"
    print(f"best: epoch {best['epoch']}, {result}")
    if pairs := views.worst_pairs(views.count_pairs(*answers), sets[0].classes):
        print(f"most mistaken: {', '.join(pairs)}")
    print(f"python predict.py YOUR_PICTURE --checkpoint {quoted(run / 'best.pt')}")
    print(f"tensorboard --logdir {quoted(config.log_dir)}")


def quoted(path: str | Path) -> str:
    return f'"{path}"' if " " in str(path) else str(path)


def say_what(config: Config, sets: Iterable[datasets.Pictures], network: nn.Module, device: torch.device) -> None:
    """One line on standard error: the pictures, the network and its weights, the device."""
    sizes = ", ".join(f"{len(pictures):,} {pictures.split}" for pictures in sets)
    parameters = list(network.parameters())
    count, training = (sum(p.numel() for p in parameters if p.requires_grad or every) for every in (True, False))
    about = f"{config.model}: {count:,} parameters"
    if training < count:
        about += f", {training:,} of them trained"
    if config.weights != "none":
        about += f", from {config.weights}"
    print(f"{config.data}: {sizes} pictures; {about}; {device}", file=sys.stderr)


# ---- the story -----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    config, trained = resolve(parse(argv))
    device = pick(config.device)
    precision = pick_precision(config.precision, device)
    tune(device)
    model.check(config.model, network_options(config, 2, trained), config.batch_size, config.freeze != "all")

    train_set, *eval_sets = load_data(config, device)  # the first of eval_sets chooses the best epoch
    split, classes = eval_sets[0].split, train_set.classes
    config = replace(config, mean=train_set.mean, std=train_set.std)

    seed(config.seed)
    options = network_options(config, len(classes), trained)
    network, head = build(config, options, classes, trained)
    if config.whiten and not trained:
        model.whiten(network, look(train_set, torch.arange(min(train_set.evaluation_batch, len(train_set))))[0])
    network, trained = network.to(device, memory_format=memory_format(device)), None  # its memory is free again
    steps = sum(
        len(datasets.cuts(kept(len(train_set), config, epoch), config.batch_size))
        for epoch in range(1, config.epochs + 1)
    )
    say_what(config, (train_set, *eval_sets), network, device)

    shown_sets = [train_set, eval_sets[0]]
    trains, epoch_sets = what_trains(network, head, shown_sets, config, precision)
    trainer = make_trainer(network, config, steps, device, precision, head, trains)

    from torch.utils.tensorboard import SummaryWriter  # takes a while, so not before all is known to be right

    run, best, best_answers = start_run(config), None, ()
    with SummaryWriter(run) as writer:
        show_start(writer, network, split, config, device)
        show(writer, network, shown_sets, 0, 0, config, ())
        for epoch in range(1, config.epochs + 1):
            metrics = train_epoch(trainer, epoch_sets[0], config, epoch, writer)
            held_out, *answers = evaluate(trainer, epoch_sets[1], config)
            metrics |= held_out
            is_best = best is None or metrics[f"{split}_accuracy"] > best[f"{split}_accuracy"]
            best, best_answers = (metrics, answers) if is_best else (best, best_answers)
            save(run, trainer, options, classes, config, metrics, is_best)
            show(writer, network, shown_sets, epoch, metrics["step"], config, answers)
            log(writer, run, metrics, memory_used(device))
            print(line(metrics, split, config, is_best), flush=True)
        if config.views and config.embedding:
            views.attempt("embedding", lambda: show_embedding(writer, network, head, eval_sets[0], steps, config))
        finish(writer, run, trainer, eval_sets, best, best_answers, config)


def cli(argv: list[str] | None = None) -> int:
    """main() for the command line: a user's mistake ends in one line, not in a traceback."""
    try:
        main(argv)
    except (*WRONG_CALL, datasets.DataError, model.CheckpointError, TrainingError, OSError) as error:
        where = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(f"train.py: {where}", file=sys.stderr)
        return 2 if isinstance(error, WRONG_CALL) else 1
    except KeyboardInterrupt:
        print("train.py: interrupted; what finished epochs saved in the run folder is whole", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(cli())

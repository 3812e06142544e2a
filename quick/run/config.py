"""Config files and flags become one Config: reading, checking, and writing it."""

import argparse
import json
import tomllib
from collections.abc import Callable, Collection
from dataclasses import fields, replace
from pathlib import Path

from torch import nn

from quick.cli import Parser, add_flags, expanded, flag, read_text, wrong_value
from quick.data.holdout import share_of
from quick.data.pictures import Pictures
from quick.errors import ConfigError, suggestion
from quick.processes import Group
from quick.run.optimizers import RATES, fitting_lr
from quick.run.settings import SETTINGS, Config

DEFAULT_CONFIG = Path(__file__).parents[2] / "configs" / "cifar_quick.toml"
NAMES = tuple(key.name for key in SETTINGS)
PATHS = ("data", "labels", "data_dir", "weights", "log_dir")  # settings that name files


def parse_config(
    parser: Parser, argv: list[str] | None, names: Collection[str] = NAMES
) -> tuple[Config, dict, argparse.Namespace]:
    """Parse a script's flags: `--config`, the settings called `names`, and what the parser has already.

    Returns the config file's settings overruled by the flags, only the settings that were given as flags, and all
    parsed values. Raises CallError for a wrong flag or file.
    """
    parser.add_argument("--config", type=Path, help=f"TOML file with other defaults than {DEFAULT_CONFIG.name}'s")
    # The file tells the defaults of the other flags, so it is read first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", type=Path)
    try:
        config = read_config(first.parse_known_args(argv)[0].config or DEFAULT_CONFIG)
        add_flags(parser, [key for key in SETTINGS if key.name in names], config)
        # argparse leaves a value that is there already: what is still None afterwards was not given.
        args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names)))
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        given = checked(given, called=flag)
    except (ConfigError, argparse.ArgumentError) as error:
        parser.error(str(error))
    return replace(config, **given), given, args


def read_config(path: Path) -> Config:
    """The settings of a TOML file, on top of Config's own defaults; raises ConfigError."""
    try:
        content = tomllib.loads(read_text(path))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not TOML, not a known encoding, or too deep
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
    for name in content:
        if name not in NAMES:
            raise ConfigError(f"{path}: unknown key {name!r}{suggestion(name, NAMES)}")
    return Config(**checked(content, called=lambda name: f"{path}: {name}"))


def checked(values: dict, called: Callable[[str], str]) -> dict:
    """These values as a Config wants them; raises ConfigError for a wrong one, by what the user `called` it."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    values |= {name: expanded(values[name]) for name in PATHS if isinstance(values.get(name), str)}
    if type(values.get("freeze")) is int:  # `freeze = 2` is what one writes into a file
        values["freeze"] = str(values["freeze"])
    for key in fields(Config):
        if key.name in values and (error := wrong_value(key, values[key.name])):
            raise ConfigError(f"{called(key.name)}: {error}")
    return values


def check_together(config: Config, group: Group, own_networks: Collection[str]) -> None:
    """Raise ConfigError for settings that are right alone and wrong together.

    `own_networks` are the networks of model.py, which nobody has pretrained.
    """
    if config.batch_size < group.size * config.accumulate:
        error = f"--batch-size {config.batch_size}: that is less than a picture for each of {group.size} processes"
        raise ConfigError(error + (f" in {config.accumulate} pieces (--accumulate)" if config.accumulate > 1 else ""))
    if bool(config.mean) != bool(config.std):
        raise ConfigError("--mean and --std: give both or neither")
    share_of(config.val_fraction, config.fold, config.folds)
    if config.nesterov and not config.momentum:
        raise ConfigError("--nesterov needs --momentum above 0; add --no-nesterov")
    if config.model in own_networks and config.head == "append" and config.weights == "none":
        raise ConfigError(f"--head append: an untrained {config.model} has no outputs to append to; add --weights FILE")
    if config.freeze != "0" and config.weights == "none":
        raise ConfigError(f"--freeze {config.freeze}: untrained stages would stay random; add --weights")
    if config.warmup and config.schedule == "onecycle":
        raise ConfigError("--warmup: --schedule onecycle has its own; add --schedule cosine, or --warmup 0")
    if config.warmup >= config.epochs:
        raise ConfigError(f"--warmup {config.warmup:g}: that is not below the {config.epochs} of --epochs")
    if not config.lr and config.optimizer not in RATES:
        raise ConfigError(f"--lr 0: no rate is known that fits {config.optimizer}; add --lr and a number")
    if config.freeze == "all" and config.backbone_lr:
        raise ConfigError("--backbone-lr: with --freeze all nothing but the head trains; add --backbone-lr 0")
    if config.model == "cifar_quick" and config.batch_norm and config.batch_size == 1 and config.freeze != "all":
        raise ConfigError("--batch-size 1: batch normalisation needs at least 2 pictures; add --no-batch-norm")


def resolve(config: Config, pretrained: dict | None) -> Config:
    """Replace "auto" settings by the values of a pretrained checkpoint, or by ours where there is none.

    Raises ConfigError for settings that do not fit the weights.
    """
    defaults = {"image_size": 32, "resize": 32, "interpolation": "bilinear", "mean": (), "std": (), "levels": ()}
    source = defaults | (pretrained or {})  # a plain state_dict tells nothing of pictures
    size = config.image_size or source["image_size"]
    resize, fit = config.resize, source.get("fit", "crop") if config.fit == "auto" else config.fit
    if not resize:  # pictures of another size than the weights' own show the whole of the shorter side
        resize = source["resize"] if size == source["image_size"] and fit == "crop" else size
    if resize < size:
        raise ConfigError(f"--resize {resize} is below the image size, {size} pixels")
    if resize > size and fit != "crop":
        raise ConfigError(f"--resize {resize}: --fit {fit} cuts no middle out; add --resize 0 or --fit crop")
    if max(config.crop, config.cutout) > size:
        raise ConfigError(f"--crop and --cutout can be at most the image size, {size} pixels")
    config = replace(config, image_size=size, resize=resize, fit=fit)
    if config.interpolation == "auto":
        config = replace(config, interpolation=source["interpolation"])
    if not config.levels:
        config = replace(config, levels=tuple(source.get("levels") or ()))
    if not config.mean:
        config = replace(config, mean=tuple(source["mean"]), std=tuple(source["std"]))
    if not pretrained:
        return config
    for name, value in pretrained["model"]["options"].items():
        if name in ("image_size", "classes") or name not in NAMES:
            continue
        if getattr(config, name) == "auto":
            config = replace(config, **{name: value})
        elif getattr(config, name) != value:
            error = f"--weights {config.weights}: that network was trained otherwise"
            raise ConfigError(f"{error}; add {flag(name, value)}")
    return config


def complete(config: Config, train_set: Pictures, network: nn.Module, own: bool) -> Config:
    """Replace what is still "auto" by what the training pictures and the network say; `own`: it is one of model.py."""
    lr = config.lr or fitting_lr(network, config, own)
    return replace(config, mean=train_set.mean, std=train_set.std, levels=train_set.levels or (), lr=lr)


def to_plain(config: Config) -> dict:
    """The config as numbers, strings and lists; without the run's name, so that it can be run again."""
    values = {key.name: getattr(config, key.name) for key in SETTINGS if key.name != "run_name"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def as_toml(config: Config) -> str:
    """The config as a file that `--config` reads."""
    return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in to_plain(config).items())

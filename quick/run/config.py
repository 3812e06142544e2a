"""Config files and flags become one Config: reading, checking, and writing it."""

import argparse
import functools
import json
import tomllib
from collections.abc import Callable, Collection
from dataclasses import fields, replace
from pathlib import Path

from quick.cli import USUAL, Parser, add_flags, expanded, flag, read_text
from quick.errors import ConfigError, suggestion
from quick.run.settings import SETTINGS, Config
from quick.values import wrong_value

DEFAULT_CONFIG = Path(__file__).parents[2] / "configs" / "cifar_quick.toml"
NAMES = tuple(key.name for key in SETTINGS)
PATHS = ("data", "labels", "data_dir", "weights", "log_dir")  # settings that name files


def parse_config(
    parser: Parser, argv: list[str] | None, names: Collection[str] = NAMES, resume: bool = False
) -> tuple[Config, dict, argparse.Namespace]:
    """Parse a script's flags: `--config`, the settings called `names`, and what the parser has already.

    With `resume` there is `--resume` too, and the first group of `--help` has all that one needs.

    Returns the config file's settings overruled by the flags, only the settings that were given as flags, and all
    parsed values. Raises CallError for a wrong flag or file.
    """
    what = f"TOML file of settings, which flags overrule (default: configs/{DEFAULT_CONFIG.name})"
    usual = parser.group(USUAL)
    usual.add_argument("--config", type=Path, metavar="FILE", help=what)
    # The file tells the defaults of the other flags, so it is read first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", type=Path)
    try:
        path = first.parse_known_args(argv)[0].config or DEFAULT_CONFIG
        values = read_values(path)
        add_flags(parser, [key for key in SETTINGS if key.name in names], values)
        if resume:
            what = "go on with this run, or without a name with the newest unfinished one"
            usual.add_argument("--resume", nargs="?", const="", metavar="RUN", help=what)
            usual.add_argument("-h", "--help", action="help", help="show this help and exit")
        # argparse leaves a value that is there already: what is still None afterwards was not given.
        args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names)))
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        given, config = checked(given, called=flag), config_of(values, path)
    except (ConfigError, argparse.ArgumentError) as error:
        parser.error(str(error))
    return replace(config, **given), given, args


def read_values(path: Path) -> dict:
    """What a TOML file says, by the names of settings, unchecked; raises ConfigError."""
    try:
        is_stream = not path.is_file() or path.is_relative_to("/dev")
        content = tomllib.loads(read_stream(path) if is_stream else read_text(path))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not TOML, not a known encoding, or too deep
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
    for name in content:
        if name not in NAMES:
            raise ConfigError(f"{path}: unknown key {name!r}{suggestion(name, NAMES)}")
    return content


@functools.cache
def read_stream(path: Path) -> str:
    """The text of a pipe, such as a shell's `<(...)`: it comes once, and a script parses its flags twice."""
    return read_text(path)


def config_of(values: dict, path: Path) -> Config:
    """The settings that the TOML file at `path` says, on top of Config's own defaults; raises ConfigError."""
    return Config(**checked(values, called=lambda name: f"{path}: {name}"))


def read_config(path: Path) -> Config:
    """The settings of a TOML file, on top of Config's own defaults; raises ConfigError."""
    return config_of(read_values(path), path)


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


def to_plain(config: Config) -> dict:
    """The config as numbers, strings and lists; without the run's name, so that it can be run again."""
    values = {key.name: getattr(config, key.name) for key in SETTINGS if key.name != "run_name"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def as_toml(config: Config) -> str:
    """The config as a file that `--config` reads."""
    return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in to_plain(config).items())

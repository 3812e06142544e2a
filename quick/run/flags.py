"""The flags of train.py, datasets.py, model.py and device.py.

Nothing here imports PyTorch, so that `--help` and a wrong flag are answered at once.
"""

import argparse
from dataclasses import fields
from pathlib import Path

from quick.choices import PRECISIONS
from quick.cli import Parser, flag
from quick.data.augment import Augment
from quick.data.source import LOADED
from quick.run.config import parse_config
from quick.run.settings import Config

BUILDING = ("model", "image_size", "batch_norm", "activation", "stem", "width")  # what a network depends on


def parse_train(argv: list[str] | None = None) -> tuple[Config, dict, argparse.Namespace]:
    """The config file's settings overruled by the flags; the settings that were given as flags; and all values."""
    parser = Parser(
        "Train a picture classifier. Each run gets a folder with its settings, its checkpoints and its curves.",
        examples=(
            "python train.py --config configs/shapes.toml --epochs 3",
            "python train.py --config configs/photos.toml --data FOLDER",
        ),
        usage="python train.py [--config FILE | --resume [RUN]] [--KEY VALUE ...]",
        add_help=False,
    )
    config, given, args = parse_config(parser, argv, resume=True)
    if args.resume is not None and args.config:
        parser.error("--config: a resumed run has its own; give --resume without it")
    return config, given, args


def parse_datasets(argv: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """The settings of a data set, and all values."""
    parser = Parser(
        "The doctor of a data set: pictures in each class, bad files, copies, mean and std; with --log-dir also "
        "samples, before and after the augmentation that train.py would do.",
        examples=("python datasets.py --data FOLDER", "python datasets.py --data shapes --flip --log-dir logs/samples"),
    )
    parser.add_argument("--log-dir", metavar="FOLDER", help="folder in which TensorBoard finds the samples")
    config, _, args = parse_config(parser, argv, (*LOADED, *(key.name for key in fields(Augment))))
    return config, args


def parse_model(argv: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """The settings of a network, and all values."""
    parser = Parser(
        "Show a network as a table, a line for each layer; list all networks; tell what a checkpoint holds, or write "
        "it for other programs.",
        examples=(
            "python model.py --model resnet18",
            "python model.py --checkpoint logs/RUN/best.pt --export net.onnx",
        ),
    )
    parser.add_argument("--classes", type=int, metavar="N", help="number of classes (default: 10)")
    parser.add_argument("--log-dir", metavar="FOLDER", help="folder in which TensorBoard finds the network's graph")
    parser.add_argument("--list", action="store_true", help="name all networks")
    parser.add_argument("--checkpoint", metavar="FILE", help="tell what this checkpoint holds")
    parser.add_argument(
        "--export", type=Path, metavar="OUT", help="write the checkpoint as .pt2 (torch.export) or .onnx"
    )
    config, given, args = parse_config(parser, argv, BUILDING)
    mode, more = ("list", ("checkpoint", "export")) if args.list else ("checkpoint", ())
    given |= {name: getattr(args, name) for name in ("config", "classes", "log_dir", *more)}
    idle = [flag(name, False if value is False else None) for name, value in given.items() if value is not None]
    if idle and getattr(args, mode):
        parser.error(f"{idle[0]} does nothing with --{mode}; leave it out")
    args.classes = 10 if args.classes is None else args.classes
    if args.export and not args.checkpoint:
        parser.error("--export: give --checkpoint FILE too")
    return config, args


def parse_device(argv: list[str] | None = None) -> argparse.Namespace:
    """Device and precision."""
    parser = Parser(
        "What this machine has, and what a run would use.",
        examples=("python device.py", "python device.py --device cpu --precision fp32"),
    )
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="device to try: auto, cpu, cuda, cuda:1 or mps (default: auto)"
    )
    parser.add_argument("--precision", default="auto", choices=PRECISIONS, help="precision to try (default: auto)")
    return parser.parse_args(argv)

"""What predict.py is asked to do: its flags, and which of them go together."""

import argparse
import os
from pathlib import Path

from quick.choices import TTA
from quick.cli import Parser, expanded, is_folder

TABLE = "sorted.csv"  # in the folder of --into


def parse_predict(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's flags; raises CallError."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if "" in [*args.pictures, args.evaluate, args.csv, args.data_dir, args.checkpoint, args.into, args.labels]:
        parser.error("a name is empty; give one of a file or folder")
    if args.csv:
        args.form, args.csv = "csv", "" if args.csv is True else expanded(args.csv)
        if args.csv and not args.csv.lower().endswith(".csv"):  # not a file to write: the first picture
            args.pictures, args.csv = [args.csv, *args.pictures], ""
    args.pictures, args.evaluate = list(map(expanded, args.pictures)), args.evaluate and expanded(args.evaluate)
    if error := wrong_call(args):
        parser.error(error)
    args.top_k = 3 if args.top_k is None else args.top_k
    return args


def make_parser() -> Parser:
    """The flags, each with its help."""
    parser = Parser(
        "Ask a trained network about pictures: it answers with classes and their percentages.",
        examples=("python predict.py dog.png", "python predict.py --evaluate FOLDER --checkpoint logs/RUN/best.pt"),
    )
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="files, folders, or - for standard input")
    parser.add_argument(
        "--evaluate", metavar="DATA", help="measure the network on the test set of cifar10, shapes or a folder"
    )
    parser.add_argument(
        "--labels",
        type=expanded,
        metavar="FILE",
        help="table (CSV: file,label) with the classes of the folder that --evaluate names (default: that of its run)",
    )
    parser.add_argument("--data-dir", default="data", metavar="FOLDER", help="folder for downloads (default: data)")
    parser.add_argument(
        "--checkpoint",
        type=expanded,
        metavar="FILE",
        help="checkpoint of the network to ask (default: the newest run's best.pt, else that in weights/)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="classes that each picture gets (default: 3)")
    parser.add_argument(
        "--sure",
        type=float,
        metavar="SHARE",
        help="say unsure where no class has this probability, such as 0.8; with --evaluate, tell how many are sure, "
        "and how many of these are right",
    )
    parser.add_argument(
        "--into",
        type=expanded,
        metavar="FOLDER",
        help="copy each picture to FOLDER/CLASS, or with --sure to FOLDER/unsure; FOLDER/sorted.csv lists them",
    )
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument(
        "--json", dest="form", action="store_const", const="json", help="print a JSON object for each picture"
    )
    forms.add_argument(
        "--csv",
        nargs="?",
        const=True,
        metavar="FILE",
        help="print a table with a header; with a FILE, whose name ends in .csv, a stopped run goes on where it was, "
        "and torchrun can share the work",
    )
    parser.add_argument(
        "--show", action="store_true", help="write NAME.explained.png: which pixels the answer depends on"
    )
    parser.add_argument("--tta", choices=TTA, help="test-time augmentation (default: as in training)")
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="where to compute: auto, cpu, cuda, cuda:1 or mps (default: auto)",
    )
    return parser


def wrong_call(args: argparse.Namespace) -> str | None:
    """What is wrong with these flags, in words; None when nothing is."""
    several, unsuited = int(os.environ.get("WORLD_SIZE", 1)) > 1, wrong_for_into(args) if args.into else None
    if bool(args.pictures) == bool(args.evaluate):
        return "give pictures or --evaluate DATA, one of them (--help tells more)"
    if args.csv and (Path(args.csv).is_dir() or not Path(args.csv).absolute().parent.is_dir()):
        return f"--csv {args.csv}: that is a folder, or in a folder that is not there"
    if args.csv and "-" in args.pictures:
        return f"--csv {args.csv}: standard input cannot be read again after a stop; use --csv without a file"
    if unsuited:
        return f"--into {args.into}: {unsuited}"
    if several and args.pictures and not args.csv:
        return "several processes need a file to write to: add --csv FILE.csv"
    if args.labels and not args.evaluate:
        return f"--labels {args.labels}: they are compared with the answers by --evaluate FOLDER; add it"
    if args.evaluate and args.form == "csv":
        return "--csv: an evaluation is printed as text or with --json"
    if args.evaluate and args.show:
        return "--show: it explains pictures, not an evaluation"
    if args.evaluate and args.top_k is not None:
        return "--top-k: an evaluation counts the most probable class alone"
    if args.top_k is not None and args.top_k < 1:
        return f"--top-k {args.top_k}: must be at least 1"
    if args.sure is not None and not 0 <= args.sure <= 1:
        return f"--sure {args.sure:g}: must be a probability from 0 to 1, such as 0.8"
    return None


def wrong_for_into(args: argparse.Namespace) -> str | None:
    """Why pictures cannot be copied into the folder that --into names, in words; None when they can."""
    if args.evaluate:
        return "an evaluation copies nothing; give the pictures without --evaluate"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return "one process alone copies; start it without torchrun"
    if "-" in args.pictures:
        return "standard input has no name that a copy could get; give a file"
    if args.form:
        return f"what it says goes into {Path(args.into, TABLE)}; leave --{args.form} out"
    if args.show:
        return f"leave --show out; {Path(args.into, 'CLASS')} can be asked about with it afterwards"
    if args.top_k is not None:
        return "pictures go by the most probable class alone; leave --top-k out"
    if os.path.lexists(args.into) and not is_folder(args.into):
        return "that is no folder"
    if is_folder(args.into) and all(is_folder(name) and Path(name).samefile(args.into) for name in args.pictures):
        return f"that is the folder asked about itself; give another, such as {Path(args.into, 'sorted')}"
    return None

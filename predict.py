"""Ask a trained network about pictures: files, folders or standard input -> classes with their percentages.

`python predict.py dog.png` uses the newest run's best checkpoint; `--evaluate DATA` measures it on a test set.
"""

import argparse
import contextlib
import csv
import errno
import hashlib
import io
import itertools
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import datasets
import model
import views
from device import Group, Parser, bar, command, end, memory_format, pick, printable

EXPLAINED = ".explained.png"  # how the names of the pictures that --show writes end
BATCH = 250  # pictures in memory at a time
MANY = 2000  # files, from which on it pays to start processes that read them
PART = 1000  # files whose answers are saved together, where a table is written


class Answer(NamedTuple):
    """What is said about a picture."""

    name: str
    top: list[tuple[str, float]] | None  # classes and their probabilities, None for what can't be read
    picture: np.ndarray  # uint8 (side, side, 3), as the network sees it
    reason: str = ""  # why it can't be read


def newest_checkpoint(log_dir: Path = Path("logs")) -> Path:
    """The newest run's best.pt, else the one that comes with the repository; raises CheckpointError."""
    runs = sorted(log_dir.glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    shipped = sorted(Path(__file__).parent.glob("weights/*.pt"))
    if not runs and not shipped:
        raise model.CheckpointError(f"no checkpoint in {log_dir}: run `python train.py` first, or give --checkpoint")
    return runs[-1] if runs else shipped[0]


def classify(
    image: str | Path | Image.Image | np.ndarray | Tensor,
    loaded: tuple[nn.Module, dict] | None = None,
    top_k: int = 3,
) -> list[tuple[str, float]]:
    """The `top_k` classes of a picture, most probable first, with their probabilities: `[("dog", 0.93), ...]`.

    `image` is a file, a Pillow picture of any mode, or pixels: uint8 `(H, W, 3)`, or `(3, H, W)` in a Tensor; of any
    size. `loaded` is what `model.load` gives; without it the checkpoint that `newest_checkpoint` finds is loaded, anew
    each time. Raises DataError for what is no picture, CheckpointError.
    """
    network, checkpoint = loaded or model.load(newest_checkpoint())
    if isinstance(image, Tensor):
        image = np.moveaxis(image.cpu().numpy(), 0, -1)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise datasets.DataError(f"pixels are wanted as uint8 (H, W, 3), not {image.dtype} {image.shape}")
        image = Image.fromarray(image)
    pixels, _ = datasets.read_picture(image, sizing(checkpoint))
    images = torch.tensor(pixels).permute(2, 0, 1)[None].to(next(network.parameters()).device)
    best = probabilities(network, checkpoint, images)[0].topk(min(top_k, len(checkpoint["classes"])))
    names = [checkpoint["classes"][place] for place in best.indices.tolist()]
    return list(zip(names, best.values.tolist(), strict=True))


def probabilities(network: nn.Module, checkpoint: dict, images: Tensor) -> Tensor:
    """Class probabilities `(N, classes)` of uint8 images `(N, 3, image_size, image_size)`, on the images' device."""
    parts = images.split(datasets.evaluation_batch(checkpoint["image_size"]))
    batches = (datasets.normalize(part, checkpoint["mean"], checkpoint["std"]) for part in parts)
    config = checkpoint["config"]
    logits, _ = model.outputs(network, ((batch, torch.empty(0)) for batch in batches), config.get("tta", "none"))
    return model.probabilities(logits, config.get("loss", "cross_entropy"))


def find(names: list[str]) -> Iterator[str]:
    """The pictures to classify, in the order given: folders are searched, `-` is standard input."""
    for name in names:
        inside = datasets.list_pictures(Path(name)) if name != "-" and Path(name).is_dir() else []
        yield from [path for path in inside if not path.endswith(EXPLAINED)] or [name]


def sizing(checkpoint: dict) -> datasets.Sizing:
    """How the checkpoint's network had its pictures resized."""
    return datasets.Sizing(checkpoint["image_size"], checkpoint["resize"], checkpoint["interpolation"])


def decode(names: list[str], sizing: datasets.Sizing, group: Group) -> Iterator[tuple[list, datasets.Decoded]]:
    """Names and what was read of them, some at a time and in order; of many files by processes of their own, if there
    are cores that the network leaves them: on two cores they would only be in each other's way."""
    cores = datasets.cores() // group.local_count
    workers = cores - 2 if len(names) >= MANY and "-" not in names and cores >= 4 else 0
    # What workers hand over has to fit into 64 MB of shared memory (Docker's default).
    batch = max(1, min(BATCH, 2**23 // (sizing.side**2 * max(1, workers))))
    plan = [list(range(start, min(start + batch, len(names)))) for start in range(0, len(names), batch)]
    paths = [os.fsencode(name) for name in names]
    with tempfile.TemporaryDirectory() if "-" in names else contextlib.nullcontext() as folder:
        if folder:
            typed = Path(folder, "standard input")
            typed.write_bytes(sys.stdin.buffer.read() if sys.stdin else b"")
            paths = [os.fsencode(typed) if path == b"-" else path for path in paths]
        files = datasets.Files(np.array(paths), sizing, sizing.side)
        for picks, decoded in zip(plan, datasets.decoder(files, plan, workers, torch.device("cpu")), strict=True):
            yield [names[pick] for pick in picks], decoded


def answers(
    names: list[str], network: nn.Module, checkpoint: dict, device: torch.device, top_k: int, group: Group
) -> Iterator[Answer]:
    """The `top_k` classes of each picture, in order."""
    classes = checkpoint["classes"]
    for batch, decoded in decode(names, sizing(checkpoint), group):
        readable = decoded.extent > 0
        tops, reasons = iter(()), iter(decoded.bad)
        if readable.any():
            images = decoded.images[readable].permute(0, 3, 1, 2).to(device)
            best = probabilities(network, checkpoint, images).topk(top_k)
            tops = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        for name, good, picture in zip(batch, readable.tolist(), decoded.images.numpy(), strict=True):
            if good:
                top = [(classes[place], share) for share, place in zip(*next(tops), strict=True)]
                yield Answer(name, top, picture)
                continue
            _, reason = next(reasons)
            if name != "-" and Path(name).is_dir():
                reason = "no pictures in this folder"
            yield Answer(name, None, picture, reason)


def explain(answer: Answer, network: nn.Module, checkpoint: dict) -> None:
    """Write `dog.explained.png` beside `dog.png`: the picture, what the answer hangs on, the top classes as bars."""
    path = Path("standard_input" if answer.name == "-" else answer.name)
    path = path.with_name(path.name.removesuffix(".png") + EXPLAINED)
    image = torch.from_numpy(answer.picture).permute(2, 0, 1)[None].to(next(network.parameters()).device)
    heat = views.saliency(network, datasets.normalize(image, checkpoint["mean"], checkpoint["std"]))
    file = io.BytesIO()
    Image.fromarray(views.explained(answer.picture, heat, *map(list, zip(*answer.top, strict=True)))).save(file, "PNG")
    model.write(path, file.getvalue())
    print(f"explained: {printable(str(path))}", file=sys.stderr)


def explaining(answered: Iterable[Answer], network: nn.Module, checkpoint: dict) -> Iterator[Answer]:
    """The same answers; each picture is explained as it passes."""
    for answer in answered:
        if answer.top is not None:
            explain(answer, network, checkpoint)
        yield answer


def complain(name: str, reason: str) -> None:
    print(f"predict.py: {printable(f'{name}: {reason}')}", file=sys.stderr)


def header(top_k: int) -> list[str]:
    return ["file"] + [f"{what}_{place + 1}" for place in range(top_k) for what in ("class", "probability")]


def row(answer: Answer) -> list[str]:
    """The answer in a line of a table."""
    return [cell(answer.name)] + [part for guess, share in answer.top for part in (cell(guess), f"{share:.6f}")]


def report(answered: Iterable[Answer], top_k: int, form: str) -> int:
    """Print the `top_k` classes of each picture as text, JSON lines or CSV; returns the exit status."""
    failed = False
    table = csv.writer(sys.stdout, lineterminator="\n")
    if form == "csv":
        table.writerow(header(top_k))
    for answer in answered:
        if answer.top is None:
            failed = True
            complain(answer.name, answer.reason)
        elif form == "json":
            guesses = [{"class": guess, "probability": round(share, 6)} for guess, share in answer.top]
            found = {"file": answer.name, "classes": guesses}
            text = json.dumps(found, ensure_ascii=False)
            print(text if text.isprintable() else json.dumps(found))
        elif form == "csv":
            table.writerow(row(answer))
        else:
            guesses = [f"{guess} {share:.1%}" for guess, share in answer.top]
            print("  ".join([printable(answer.name), *guesses]))
    return int(failed)


# ---- very many files -----------------------------------------------------------------------------------------------


def write_table(
    out: Path, names: list[str], top_k: int, answer: Callable[[list[str]], Iterable[Answer]], of: str, group: Group
) -> int:
    """Write a CSV file about all these pictures; returns the exit status.

    The processes of a group share them by thousands. Each thousand is saved when it is done, in a folder beside the
    file, so that after a stop only the others are left to do; it is tossed if it is of other names or settings (`of`).
    """
    folder = out.with_name(f"{out.name}.parts")
    group.of_first(lambda: open_parts(folder, hashlib.sha256(repr((of, names)).encode()).hexdigest()))
    parts = [(folder / f"{start:012}.json", names[start : start + PART]) for start in range(0, len(names), PART)]
    own = [(path, inside) for path, inside in parts[group.rank :: group.count] if not path.exists()]
    done = len(names) - sum(group.gather(sum(len(inside) for _, inside in own)))
    if done:
        print(f"{folder}: {done:,} of {len(names):,} files are done already", file=sys.stderr)
    left = sum(len(inside) for _, inside in own)
    with bar("reading", left, "files") as progress:
        answered = iter(answer([name for _, inside in own for name in inside]))
        for path, inside in own:
            rows, bad = [], []
            for found in itertools.islice(answered, len(inside)):
                if found.top is None:
                    bad.append([found.name, found.reason])
                else:
                    rows.append(row(found))
            model.write(path, json.dumps({"rows": rows, "bad": bad}).encode())
            progress.update(len(inside))
    group.wait()
    status = merge(out, [path for path, _ in parts], top_k) if group.rank == 0 else 0
    return 0 if group.count > 1 else status  # torchrun would take it for a failure, and start all again


def open_parts(folder: Path, of: str) -> None:
    """Make the folder for parts of a table, empty but for parts of this very one."""
    about = folder / "of"
    if about.is_file() and about.read_text() != of:
        print(f"{folder}: of another table, done anew", file=sys.stderr)
        shutil.rmtree(folder)
    elif not about.is_file() and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            errno.EEXIST, "parts of the table are to go there, but something else is in it", str(folder)
        )
    folder.mkdir(exist_ok=True)
    model.write(about, of.encode())


def merge(out: Path, parts: list[Path], top_k: int) -> int:
    """Make the table of its parts, name what could not be read, and remove the parts; returns the exit status."""
    if missing := [path for path in parts if not path.exists()]:
        raise datasets.DataError(f"{missing[0]}: written on another machine; {out.parent} must be on a shared disk")
    failed, text = False, io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header(top_k))
    for path in parts:
        part = json.loads(path.read_bytes())
        table.writerows(part["rows"])
        for name, reason in part["bad"]:
            failed = True
            complain(name, reason)
    model.write(out, text.getvalue().encode())
    shutil.rmtree(parts[0].parent)
    print(out)
    return int(failed)


def cell(text: str) -> str:
    """Text for a table: what a spreadsheet would take for a formula begins with an apostrophe, which tells it not to
    (owasp.org/www-community/attacks/CSV_Injection)."""
    text = printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) and text != "-" else text


def evaluate(
    data: str, data_dir: str, network: nn.Module, checkpoint: dict, device: torch.device, group: Group
) -> dict:
    """Loss, accuracy, accuracy a class and confusion counts (rows: truth) on a test set. Raises DataError."""
    classes, config = checkpoint["classes"], checkpoint["config"]
    how = {name: checkpoint[name] for name in ("image_size", "resize", "interpolation", "mean", "std")}
    fraction = config.get("val_fraction", 0.0)
    how["val_fraction"] = fraction if isinstance(fraction, float) and 0 <= fraction < 1 else 0.0
    [test_set] = datasets.load(data, data_dir, device=device, splits=["test"], group=group, **how)
    if strange := [name for name in test_set.classes if name not in classes]:
        raise datasets.DataError(f"{data}: the checkpoint does not know class {strange[0]!r}; {', '.join(classes)}")
    renumber = torch.tensor([classes.index(name) for name in test_set.classes], device=device)
    test_set.labels = renumber[test_set.labels]
    logits, labels = model.outputs_of_all(network, test_set, group, len(classes), config.get("tta", "none"))
    scores = model.score(logits, labels, config.get("loss", "cross_entropy"))
    confusion = views.count_pairs(logits, labels).tolist()
    by_class = {
        name: row[place] / sum(row)
        for place, (name, row) in enumerate(zip(classes, confusion, strict=True))
        if sum(row)
    }
    return scores | {"pictures": len(labels), "classes": by_class, "confusion": confusion}


def show(result: dict, classes: list[str]) -> None:
    """Print an evaluation: the sums, then a line a class with its accuracy and what its pictures were taken for."""
    of_all = [f"loss {result['loss']:.4f}", f"accuracy {result['accuracy']:.2%}"]
    of_all += [f"{name} {result[name]:.4f}" for name in model.METRICS if name != "accuracy"]
    print("  ".join([*of_all, f"{result['pictures']:,} test pictures\n"]))
    width, cell = max(map(len, [*classes, "class"])), max(5, len(str(max(map(max, result["confusion"])))) + 1)
    numbers = "".join(f"{place:>{cell}}" for place in range(len(classes)))
    print(f"   {'class':{width}}  accuracy  {numbers}   <- taken for")
    for place, (name, row) in enumerate(zip(classes, result["confusion"], strict=True)):
        share = f"{result['classes'][name]:.1%}" if name in result["classes"] else "-"
        print(f"{place:>2} {name:{width}}  {share:>8}  {''.join(f'{count:>{cell}}' for count in row)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    argv = list(sys.argv[1:] if argv is None else argv)
    for place, (flag, after) in enumerate(itertools.pairwise([*argv, ""])):
        if flag == "--csv" and not after.lower().endswith(".csv"):  # what follows is no file to write but a picture
            argv[place] = "--csv="
    parser = Parser(description=__doc__)
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="files, folders, or - for standard input")
    parser.add_argument("--evaluate", metavar="DATA", help="measure on the test set of cifar10, shapes or a folder")
    parser.add_argument("--data-dir", default="data", help="where downloads live (default: data)")
    parser.add_argument("--checkpoint", type=Path, help="default: the newest run's best.pt, else the one in weights/")
    parser.add_argument("--top-k", type=int, default=3, metavar="K", help="classes a picture (default: 3)")
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--json", dest="form", action="store_const", const="json", help="a JSON object a line")
    forms.add_argument(
        "--csv",
        metavar="FILE",
        help="a table with a header; with a FILE, whose name ends in .csv, a stopped run goes on where it was, and "
        "torchrun can share the work",
    )
    parser.add_argument("--show", action="store_true", help="write NAME.explained.png: what the answer hangs on")
    parser.add_argument("--tta", choices=model.TTA, help="views of each picture; default: as in training")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    args = parser.parse_args(argv)
    if bool(args.pictures) == bool(args.evaluate):
        parser.error("give pictures or --evaluate DATA, one of them (--help tells more)")
    if args.csv is not None:
        args.form = "csv"
    if args.csv and "-" in args.pictures:
        parser.error(f"--csv {args.csv}: standard input cannot be gone on with; print its table, by --csv alone")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and args.pictures and not args.csv:
        parser.error("several processes need a file to write to: add --csv FILE.csv")
    if args.evaluate and args.form == "csv":
        parser.error("--csv: an evaluation is printed as text or with --json")
    if args.evaluate and args.show:
        parser.error("--show: it explains pictures, not an evaluation")
    if args.top_k < 1:
        parser.error(f"--top-k {args.top_k}: must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with Group() as group:
        device = pick(args.device, group)
        path = args.checkpoint or group.of_first(newest_checkpoint)
        network, checkpoint = model.load(path, device)
        checksum = zlib.crc32(path.read_bytes()) if args.csv or group.count > 1 else 0
        if len(set(group.gather(checksum))) > 1:
            raise model.CheckpointError(f"{path}: other machines have another file of this name")
        network = network.to(memory_format=memory_format(device))
        if args.tta is not None:
            checkpoint["config"]["tta"] = args.tta
        if not args.checkpoint:
            print(f"checkpoint: {path}", file=sys.stderr)
        if args.evaluate:
            result = evaluate(args.evaluate, args.data_dir, network, checkpoint, device, group)
            if args.form == "json":
                print(json.dumps(result))
            else:
                show(result, checkpoint["classes"])
            return 0
        top_k = min(args.top_k, len(checkpoint["classes"]))

        def answer(names: list[str]) -> Iterable[Answer]:
            answered = answers(names, network, checkpoint, device, top_k, group)
            return explaining(answered, network, checkpoint) if args.show else answered

        names = group.of_first(lambda: list(find(args.pictures)))
        if args.csv:
            of = f"{checksum} {top_k} {checkpoint['config'].get('tta')} {args.show}"
            return write_table(Path(args.csv), names, top_k, answer, of, group)
        return report(answer(names), top_k, args.form)


def cli(argv: list[str] | None = None) -> int:
    return command("predict.py", main, argv, "; with --csv FILE, the same command goes on from here")


if __name__ == "__main__":
    end(cli())

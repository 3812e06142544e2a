"""Ask a trained network about pictures: files, folders or standard input -> classes with their percentages.

`python predict.py dog.png` uses the newest run's best checkpoint; `--evaluate DATA` measures it on a test set.
"""

from quick.asking import parse_predict
from quick.cli import check_flags

if __name__ == "__main__":  # --help and wrong flags are answered before PyTorch is imported, which takes seconds
    check_flags("predict.py", parse_predict)

import errno
import io
import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import datasets
import model
from device import memory_format, pick
from quick.answers import Answer, check_unsure, labelled, print_answers, write_table
from quick.checkpoints import write_file
from quick.cli import exit_script, log, run_script
from quick.data.asked import find_pictures, is_same_folder, labels_of_run, why_unreadable
from quick.data.decoding import read_picture
from quick.data.holdout import told_by
from quick.data.pictures import BUILT_IN, evaluation_batch, normalize
from quick.data.sizing import Sizing
from quick.data.streaming import decode_files
from quick.data.tree import EXPLAINED
from quick.errors import CheckpointError, DataError, composed, in_short, printable
from quick.nets import losses
from quick.processes import ALONE, Group
from quick.run import evaluation
from quick.sorting import sort_pictures
from quick.views import drawing, fonts, insight

NOT_FINITE = "the network's outputs for it are not finite numbers"


def main(argv: list[str] | None = None) -> int:
    """Do what these flags say; returns the exit status."""
    args = parse_predict(argv)
    with Group() as group:
        device = pick(args.device, group)
        path = Path(args.checkpoint) if args.checkpoint else group.from_rank0(newest_checkpoint)
        network, checkpoint = model.load(path, device)
        network = network.to(memory_format=memory_format(device))
        checksum = zlib.crc32(path.read_bytes()) if args.csv or group.size > 1 else 0
        if len(set(group.all_gather(checksum))) > 1:
            raise CheckpointError(f"{path}: other machines have another file of this name")
        if args.tta is not None:
            checkpoint["config"]["tta"] = args.tta
        if not args.checkpoint:
            log.info(f"checkpoint: {path}")

        if args.evaluate:
            result = evaluate(args.evaluate, args.data_dir, network, checkpoint, path, group, args.sure, args.labels)
            if args.form == "json":
                print(json.dumps(result, allow_nan=False))
            else:
                evaluation.print_evaluation(result, checkpoint["classes"], losses.METRICS)
            return 0

        top_k, sure = min(args.top_k, len(checkpoint["classes"])), args.sure
        if sure is not None:
            check_unsure(checkpoint["classes"])
        refused = set()  # folders that took no explanation: one line for each will do

        def answer(names: Sequence[str]) -> Iterator[Answer]:
            for found in classify_files(names, network, checkpoint, top_k=top_k, group=group):
                folder = Path(found.name).parent
                if args.show and found.top is not None and folder not in refused:
                    try:
                        explain(found, network, checkpoint)
                    except OSError as error:
                        if error.errno != errno.ENAMETOOLONG:  # which the others may not be
                            refused.add(folder)
                        found = found._replace(error=f"no explanations there: {error.filename}: {error.strerror}")
                yield found if sure is None else labelled(found, sure)

        names = group.from_rank0(lambda: list(find_pictures(args.pictures, args.into)))
        if args.into:
            return sort_pictures(Path(args.into), answer(names), len(names), checkpoint["classes"])
        if args.csv:
            settings = f"{checksum} {top_k} {checkpoint['config'].get('tta')} {args.show}"
            settings += "" if sure is None else f" {sure}"  # as it was before there was --sure
            return write_table(Path(args.csv), names, top_k, answer, settings, group, labels=sure is not None)
        return print_answers(answer(names), top_k, args.form, labels=sure is not None)


def newest_checkpoint(log_dir: Path = Path("logs")) -> Path:
    """The newest run's best.pt, else the one that comes with the repository; raises CheckpointError."""
    runs = sorted(log_dir.glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    shipped = sorted(Path(__file__).parent.glob("weights/*.pt"))
    if not runs and not shipped:
        raise CheckpointError(f"no checkpoint in {log_dir}: run `python train.py` first, or give --checkpoint")
    return runs[-1] if runs else shipped[0]


# ---- classify, explain -----------------------------------------------------------------------------------------------


def classify(
    image: str | Path | Image.Image | np.ndarray | Tensor,
    loaded: tuple[nn.Module, dict] | None = None,
    top_k: int = 3,
) -> list[tuple[str, float]]:
    """The `top_k` most probable classes of a picture with their probabilities: `[("dog", 0.93), ...]`.

    `image` is a file, a Pillow picture of any mode, or pixels of any size: uint8 `(H, W, 3)`, or `(3, H, W)` in a
    Tensor. `loaded` is what `model.load` returns; without it the checkpoint that `newest_checkpoint` finds is loaded in
    each call. Raises DataError for what is no picture, or where the outputs are not finite numbers; CheckpointError.
    """
    network, checkpoint = loaded or model.load(newest_checkpoint())
    if isinstance(image, Tensor):
        image = np.moveaxis(image.cpu().numpy(), 0, -1)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DataError(f"pixels are wanted as uint8 (H, W, 3), not {image.dtype} {image.shape}")
        image = Image.fromarray(image)
    pixels, _ = read_picture(image, sizing(checkpoint))
    images = torch.tensor(pixels).permute(2, 0, 1)[None].to(next(network.parameters()).device)
    best = probabilities(network, checkpoint, images)[0].topk(min(top_k, len(checkpoint["classes"])))
    if best.values.isnan().any():
        raise DataError(NOT_FINITE)
    names = [checkpoint["classes"][index] for index in best.indices.tolist()]
    return list(zip(names, best.values.tolist(), strict=True))


def classify_files(
    names: Sequence[str], network: nn.Module, checkpoint: dict, *, top_k: int, group: Group = ALONE
) -> Iterator[Answer]:
    """An Answer with the `top_k` classes for each of these files, in order; `-` is standard input."""
    device, classes = next(network.parameters()).device, checkpoint["classes"]
    for batch, decoded in decode_files(names, sizing(checkpoint), group):
        readable = decoded.extent > 0
        tops, errors = iter(()), iter(decoded.bad)
        if readable.any():
            images = decoded.images[readable].permute(0, 3, 1, 2).to(device)
            best = probabilities(network, checkpoint, images).topk(top_k)
            tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        for name, is_readable, picture in zip(batch, readable.tolist(), decoded.images.numpy(), strict=True):
            if not is_readable:
                _, error = next(errors)
                yield Answer(name, None, picture, why_unreadable(name, error))
                continue
            top = [(classes[index], share) for index, share in zip(*next(tops), strict=True)]
            yield Answer(name, None, picture, NOT_FINITE) if math.isnan(top[0][1]) else Answer(name, top, picture)


def probabilities(network: nn.Module, checkpoint: dict, images: Tensor) -> Tensor:
    """Class probabilities, float32 `(N, classes)`, of uint8 images `(N, 3, side, side)`, on their device.

    They are nan where the network's outputs for an image are not finite.
    """
    parts = images.split(evaluation_batch(checkpoint["image_size"], images.device))
    batches = (normalize(part, checkpoint["mean"], checkpoint["std"]) for part in parts)
    config = checkpoint["config"]
    logits = evaluation.outputs(network, batches, tta=config.get("tta", "none"))
    shares = losses.probabilities(logits, config.get("loss", "cross_entropy"))
    return shares.masked_fill(~logits.isfinite().all(1, keepdim=True), math.nan)


def sizing(checkpoint: dict) -> Sizing:
    """How the pictures of the checkpoint's network were resized."""
    levels = checkpoint["levels"] and tuple(checkpoint["levels"])
    return Sizing(*(checkpoint[name] for name in ("image_size", "resize", "interpolation")), levels, checkpoint["fit"])


def explain(answer: Answer, network: nn.Module, checkpoint: dict) -> None:
    """Write `dog.explained.png` beside `dog.png`: the picture, what the answer depends on, the top classes as bars."""
    path = Path("standard_input" if answer.name == "-" else answer.name)
    path = path.with_name(path.name.removesuffix(".png") + EXPLAINED)
    image = torch.from_numpy(answer.picture).permute(2, 0, 1)[None].to(next(network.parameters()).device)
    heat = insight.saliency(network, normalize(image, checkpoint["mean"], checkpoint["std"]))
    file = io.BytesIO()
    Image.fromarray(drawing.explained(answer.picture, heat, answer.top)).save(file, "PNG")
    write_file(path, file.getvalue())
    numbered = fonts.legend([name for name, _ in answer.top])  # for want of a font
    log.info(printable(f"explained: {path}{''.join(f', {number} {name}' for number, name in numbered.items())}"))


# ---- evaluate --------------------------------------------------------------------------------------------------------


def evaluate(
    data: str,
    data_dir: str,
    network: nn.Module,
    checkpoint: dict,
    path: Path,
    group: Group = ALONE,
    sure: float | None = None,
    labels: str | None = None,
) -> dict:
    """Loss, metrics, scores of each class, their means, and confusion counts (rows: truth) on the test set of `data`.

    Of a folder: on the test pictures if it has splits, else on all in it; but only on those that were held out if it is
    the one that the network of the checkpoint at `path` was trained on. A table of `labels` tells the classes of a
    folder; of its own folder, the run's table does if there is none. With `sure`, a probability, also how many are
    sure, and how many of these right. Raises DataError, also where outputs are not finite numbers.
    """
    classes, config, device = checkpoint["classes"], checkpoint["config"], next(network.parameters()).device
    preparation = {name: checkpoint[name] for name in ("image_size", "resize", "interpolation", "fit", "mean", "std")}
    preparation["levels"] = checkpoint["levels"] or ()  # none: those of the type, as for single pictures
    trained_on = config.get("data")
    is_own = data in BUILT_IN or (trained_on not in BUILT_IN and is_same_folder(data, config, path))
    if is_own and data not in BUILT_IN:
        labels = labels or labels_of_run(data, config, path)
    preparation |= told_by(config) | {"labels": labels or ""}
    splits = ["test" if is_own else "whole"]
    [test_set] = datasets.load(data, data_dir, device=device, splits=splits, group=group, **preparation)
    if data not in BUILT_IN:
        count = f"{len(test_set):,}"
        log.info(f"{data}: {f'all {count}' if test_set.split == 'whole' else f'{count} {test_set.split}'} pictures")
    index_of = {composed(name): index for index, name in enumerate(classes)}
    names = [composed(name) for name in test_set.classes]
    if strange := [name for name in names if name not in index_of]:
        raise DataError(f"{data}: the checkpoint does not know class '{strange[0]}'; {in_short(classes)}")
    places = torch.tensor([index_of[name] for name in names], device=device)
    tta, loss = config.get("tta", "none"), config.get("loss", "cross_entropy")
    logits, truth = evaluation.outputs_of_set(network, test_set, classes=len(classes), group=group, tta=tta)
    if len(wrong := (~logits.isfinite().all(1)).nonzero()):
        paths, first = test_set.paths, wrong[0].item()
        name = f"{data}: picture {first + 1}" if paths is None else os.fsdecode(paths[first])
        raise DataError(f"{name}: {NOT_FINITE} ({len(wrong):,} of {len(truth):,} pictures)")
    truth = places[truth]  # classes are matched by name: the folder may have fewer
    counts = losses.confusion_counts(logits, truth)
    by_class, means = evaluation.scores_by_class(logits, truth, classes)
    scores = losses.score(logits, truth, loss)
    if strange := [name for name, value in scores.items() if not math.isfinite(value)]:
        raise DataError(f"{data}: its {strange[0]} is {scores[strange[0]]}: the network's outputs are too large")
    if sure is not None:
        scores["sure"] = evaluation.sure_scores(logits, truth, loss, sure)
    scores |= {"split": test_set.split, "pictures": len(truth)}
    return scores | {"classes": by_class, "means": means, "confusion": counts.tolist()}


def cli(argv: list[str] | None = None) -> int:
    return run_script("predict.py", main, argv, "; with --csv FILE or --into, the same command goes on from here")


if __name__ == "__main__":
    exit_script(cli())

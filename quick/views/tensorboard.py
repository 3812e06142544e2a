"""TensorBoard: a file of events that survives a full disk, and what is shown in it and when.

Only the first process of a run has a board; the others have a NoBoard.
"""

import contextlib
import io
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from quick.cli import log
from quick.data.pictures import Pictures
from quick.errors import reason
from quick.nets.losses import confusion_counts
from quick.nets.summary import write_graph
from quick.nets.transfer import HeadOnly
from quick.views import drawing, fonts, insight

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FLUSH_SECONDS = 30  # between two flushes that happen by themselves
SAMPLES, SALIENCIES, EMBEDDED = 16, 8, 1000  # how many pictures are shown


class ViewSettings(Protocol):
    """The settings that decide what is shown; the Config of a run has them, and those of the augmentation."""

    views: bool
    view_every: int  # epochs; 0: a tenth of the run
    histograms: bool
    epochs: int
    seed: int


# ---- the file --------------------------------------------------------------------------------------------------------


class EventFile:
    """TensorBoard's file of events. They wait in memory until `flush` appends them, all or none.

    TensorBoard's own writer is a thread, which a full disk ends for good. Here the next flush writes what the last one
    could not write.
    """

    def __init__(self, path: Path):
        self.path, self.waiting, self.flushed = path, [], time.monotonic()

    def get_logdir(self) -> str:
        return str(self.path.parent)

    def add_event(self, event) -> None:
        self.waiting.append(event.SerializeToString())
        if time.monotonic() > self.flushed + FLUSH_SECONDS:
            with contextlib.suppress(OSError):  # the flush at the end of the epoch reports it
                self.flush()

    def flush(self) -> None:
        """Append the waiting events to the file. If the disk refuses, raise OSError and leave the file as it was."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.flushed, records = time.monotonic(), io.BytesIO()
        for event in self.waiting:
            RecordWriter(records).write(event)
        size = self.path.stat().st_size
        try:
            with self.path.open("ab") as file:
                file.write(records.getbuffer())
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            raise
        self.waiting.clear()

    def close(self) -> None:
        """Does nothing: who wants a last flush calls `flush`, and learns whether it worked."""


class NoBoard:
    """Takes the place of a board in processes that write nothing."""

    def add_scalar(self, *_: object) -> None:
        pass

    def flush(self) -> None:
        pass


def open_board(folder: Path, purge_step: int | None = None) -> "SummaryWriter":
    """A SummaryWriter that keeps its events in an EventFile in this folder.

    A resumed run gives its `purge_step`: TensorBoard hides what earlier files in the folder say from that step on.
    """
    from torch.utils.tensorboard import SummaryWriter  # takes a second to import

    earlier = set(folder.glob("events.out.tfevents.*"))
    board = SummaryWriter(folder, purge_step=purge_step)
    board.file_writer.event_writer.close()  # ends its thread too
    [path] = set(folder.glob("events.out.tfevents.*")) - earlier
    if earlier and path < max(earlier):  # TensorBoard reads files in the order of names, which have whole seconds only
        path = path.rename(f"{max(earlier)}.1")
    board.file_writer.event_writer = EventFile(path)
    return board


@contextlib.contextmanager
def attempt(name: str) -> Iterator[None]:
    """Draw the view `name` inside of this; an error is reported once a process and never ends a run."""
    try:
        yield
    except Exception as error:  # users' own networks and full disks fail in all kinds of ways
        report_once(name, reason(error))


@cache
def report_once(name: str, error: str) -> None:
    log.warning(f"no {name} in TensorBoard: {error}")


# ---- before training -------------------------------------------------------------------------------------------------


def show_start(board: "SummaryWriter", network: nn.Module, config: dict, split: str) -> None:
    """Write what is known before training: the graph, the config as hparams and as text, the machine.

    `config` are plain values by name. `split` names the held-out set: its curves are put beside the training's.
    """
    from torch.utils.tensorboard.summary import hparams

    side, device = config["image_size"], next(network.parameters()).device
    write_graph(board, network, torch.zeros(1, 3, side, side, device=device))
    values = {name: str(value) if isinstance(value, list | tuple) else value for name, value in config.items()}
    # add_hparams would make a run of its own (pytorch issue 32651); the three summaries that it consists of do not.
    for summary in hparams(values, {f"accuracy/{split}": 0.0, f"loss/{split}": 0.0}):
        board.file_writer.add_summary(summary)
    pairs = {name: ["Multiline", [f"{name}/train", f"{name}/{split}"]] for name in ("loss", "accuracy")}
    board.add_custom_scalars({"training against what was held back": pairs})
    machine = {
        "revision": revision(),
        "device": str(device),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    for name, rows in (("config", values), ("machine", machine)):
        board.add_text(name, markdown_table(rows))


def markdown_table(rows: dict[str, object]) -> str:
    """A table of two columns, as TensorBoard's texts show it: signs that mean something in Markdown become codes."""

    def plain(text: object) -> str:
        # An underscore inside of a word means nothing.
        return re.sub(r"[&\\`*\[\]<>|#~]|(?<![^\W_])_|_(?![^\W_])", lambda sign: f"&#{ord(sign[0])};", str(text))

    lines = [f"| {plain(key)} | {plain(value)} |" for key, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def revision() -> str:
    """The git commit of this code, with a + if files were changed since; "unknown" outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


# ---- after an epoch --------------------------------------------------------------------------------------------------


def log_metrics(board: "SummaryWriter", metrics: dict, memory: float) -> None:
    """Write the metrics of one epoch as curves; `memory` is in MiB."""
    for name, value in metrics.items():
        split, _, metric = name.partition("_")
        if split in ("train", "val", "test"):
            board.add_scalar(f"{metric}/{split}", value, metrics["step"])
        elif name in ("lr", "images_per_second", "epoch_seconds"):
            board.add_scalar(name, value, metrics["step"])
    board.add_scalar("memory_mib", memory, metrics["step"])


def show_epoch(
    board: "SummaryWriter",
    network: nn.Module,
    sets: Sequence[Pictures],
    config: ViewSettings,
    metrics: dict | None = None,
    answers: tuple[Tensor, Tensor] | None = None,
    *,
    last: bool = False,
) -> None:
    """Write all views of a network, if they are due after the epoch of these `metrics`, or it is the `last` one.

    `sets` are the training set and the held-out set. `config` is also the augmentation of the samples. `answers` are
    probabilities, float `(N, classes)`, and labels, int64 `(N,)`, of the whole held-out set. Before training there are
    neither metrics nor answers, and the views of answers are left out. The network is in eval mode afterwards.
    """
    epoch, step = (metrics["epoch"], metrics["step"]) if metrics else (0, 0)
    every = config.view_every or math.ceil(config.epochs / 10)
    if not config.views or (epoch % every and not last):
        return
    train_set, held_out = sets
    network.eval()
    if not metrics and (numbered := fonts.legend(train_set.classes)):
        log.info("no font for the names of some classes: pictures number them, TensorBoard's text has the names")
        board.add_text("classes", markdown_table(numbered))
    with attempt("samples"):
        some = torch.arange(min(SAMPLES, len(train_set)))
        _, images, labels = train_set.preview(some, augment=config, seed=config.seed, epoch=epoch)
        add_picture(board, "samples", drawing.samples(images, labels, train_set.classes), step)
    with attempt("filters"):
        add_picture(board, "filters", insight.filters(network), step)
    with attempt("features"):
        image, _, _ = held_out.preview(torch.tensor([0]))
        for name, maps in insight.layer_maps(network, image).items():
            add_picture(board, f"features/{name}", insight.features(maps), step)
    if answers is not None:
        show_answers(board, network, held_out, *answers, step=step)
    if config.histograms and epoch:
        show_histograms(board, network, step)


def add_picture(board: "SummaryWriter", name: str, picture: np.ndarray, step: int) -> None:
    board.add_image(name, picture, step, dataformats="HWC")


def show_answers(
    board: "SummaryWriter", network: nn.Module, pictures: Pictures, probabilities: Tensor, labels: Tensor, *, step: int
) -> None:
    """Write the views of a network's answers to a whole set; see `show_epoch` for the tensors."""
    classes = pictures.classes
    with attempt("confusion"):
        counts = confusion_counts(probabilities, labels)
        add_picture(board, "confusion", drawing.confusion_picture(counts, classes), step)
    with attempt("mistakes"):
        wrong = drawing.most_mistaken(probabilities, labels)
        if len(wrong):
            _, images, truths = pictures.preview(wrong)
            picture = drawing.mistakes(images, truths, probabilities[wrong], classes)
        else:
            picture = drawing.note_picture("no mistakes")
        add_picture(board, "mistakes", picture, step)
    with attempt("saliency"):
        first = torch.arange(min(SALIENCIES, len(pictures)))
        inputs, images, truths = pictures.preview(first)
        heats = [insight.saliency(network, image[None]) for image in inputs]
        picture = drawing.saliencies(images, heats, truths, probabilities[: len(first)], classes)
        add_picture(board, "saliency", picture, step)
    with attempt("pr"):
        for label, name in enumerate(classes[: drawing.MOST_CLASSES]):
            board.add_pr_curve(f"pr/{name}", labels == label, probabilities[:, label], step)


def show_histograms(board: "SummaryWriter", network: nn.Module, step: int) -> None:
    """Write how the weights, and the gradients of the last step, are distributed, but for infinite ones and NaN."""
    with attempt("histograms"):
        for name, parameter in network.named_parameters():
            for kind, values in (("weights", parameter.detach()), ("gradients", parameter.grad)):
                if values is not None and values.isfinite().any():
                    board.add_histogram(f"{kind}/{name}", values[values.isfinite()], step)


def show_embedding(board: "SummaryWriter", network: nn.Module, head: list[str], pictures: Pictures, step: int) -> None:
    """Write 1,000 pictures into TensorBoard's projector, at the positions that the inputs of the last layer give them.

    `head` names the weights of the network's head, its last layer's at the end.
    """
    network.eval()
    with attempt("embedding"), torch.no_grad():
        hidden_of = HeadOnly(network, head, pictures.side).features
        hidden, thumbnails, names = [], [], []
        for indices in torch.arange(min(EMBEDDED, len(pictures))).split(pictures.evaluation_batch):
            inputs, images, labels = pictures.preview(indices)
            small = nn.functional.interpolate(images.float() / 255, (32, 32), mode="bilinear", antialias=True)
            hidden.append(hidden_of(inputs).float().flatten(1))
            thumbnails.append(small.clamp(0, 1))
            names += [pictures.classes[label] for label in labels.tolist()]
        if not all(part.isfinite().all() for part in hidden):
            raise ValueError("the network's features are not all finite numbers")
        board.add_embedding(torch.cat(hidden), names, torch.cat(thumbnails), step)

"""All that changes while training, in one object: what a checkpoint stores, and what resuming restores."""

import datetime
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from quick.data.batching import batch_slices
from quick.errors import TrainingError
from quick.nets.losses import balanced_weights, confusion_counts, worst_pairs
from quick.processes import Group, wrap_ddp
from quick.run.crowding import Crowding
from quick.run.history import History
from quick.run.settings import Config


@dataclass
class EpochTotals:
    """What the steps of an epoch add up to so far, over all processes."""

    steps: int  # how many steps the epoch has
    step: int = 0  # how many of them are done
    pictures: int = 0  # how many pictures these had
    loss: float = 0.0  # the sum over all pictures
    logged_loss: float = 0.0  # the same, up to the last point of the curve
    logged_pictures: int = 0
    correct: int = 0
    lr: float = 0.0  # of the last step
    seconds: float = 0.0
    confidence: Tensor | None = None  # with --hardest: as in TrainState; 0 for pictures that are still to come

    def add_losses(self, steps: list[tuple[Tensor, int, Tensor, float]], epoch: int, group: Group) -> None:
        """Add the losses of the last steps: of each step the loss, the batch's size and indices, and the learning rate.

        The loss (a scalar) is what this process's pictures add to the mean loss of the batch. To read it waits for the
        device and the group. Raises TrainingError where one is not finite.
        """
        losses = group.all_reduce(torch.stack([loss for loss, *_ in steps])).tolist()
        first = self.step - len(steps) + 1
        for step, (mean, (_, size, indices, lr)) in enumerate(zip(losses, steps, strict=True), first):
            if not math.isfinite(mean):
                numbers = [index for shard in group.all_gather(indices.tolist()) for index in shard]
                more = f" and {len(numbers) - 16} more" if len(numbers) > 16 else ""
                raise TrainingError(
                    f"the loss is {mean} in epoch {epoch}, step {step} (lr {lr:.4g}, training pictures number "
                    f"{', '.join(map(str, numbers[:16]))}{more}); try a lower --lr, or --clip-grad 1"
                )
            self.loss += mean * size
            self.pictures += size

    def loss_since_last_point(self) -> float:
        """The mean loss since the last point of the curve; this is the next point."""
        mean = (self.loss - self.logged_loss) / (self.pictures - self.logged_pictures)
        self.logged_loss, self.logged_pictures = self.loss, self.pictures
        return mean

    def metrics(self) -> dict:
        """What an epoch's line in metrics.jsonl says of training."""
        return {
            "train_loss": self.loss / self.pictures,
            "train_accuracy": self.correct / self.pictures,
            "lr": self.lr,
            "epoch_seconds": self.seconds,
            "images_per_second": self.pictures / self.seconds,
        }


@dataclass
class TrainState:
    """All that changes while training.

    `network` is the bare and whole network, which is saved; `trainable` is the part of it that trains: the same
    network, or its head. `forward` is that part as it is called: in its group, and compiled with --compile; `eager` is
    the same, but never compiled.
    """

    network: nn.Module
    trainable: nn.Module
    forward: nn.Module | Callable[[Tensor], Tensor]
    eager: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing but in fp16
    device: torch.device
    precision: torch.dtype  # of the forward pass
    group: Group  # of the processes that train together
    pictures: int  # in the training set
    crowding: Crowding  # whether other programs take the same cores
    class_weights: Tensor | None = None  # with --balance: of each class in the loss, float32 (classes,)
    history: History = field(default_factory=History)
    total_steps: int = 0  # of the whole run; `restore` in resume.py sets it
    epoch: int = 1  # in progress, or the next one
    step: int = 0  # steps that are done, of all epochs
    lr: float = 0.0  # of the last step, where the highest is --lr
    totals: EpochTotals | None = None  # of the epoch in progress
    confidence: Tensor | None = None  # with --hardest: the probability of each picture's class, when it last trained
    mistakes: list[str] = field(default_factory=list)  # what the best epoch mistook most, in words
    clipped_norm: Tensor | None = None  # the length of the last step's gradient, before it was clipped
    first_step: tuple[int, float] | None = None  # the first step since the program began, and when it was

    def end_epoch(self, metrics: dict, answers: tuple[Tensor, Tensor], classes: list[str]) -> bool:
        """Take the epoch's metrics into the history; returns whether it is the best epoch so far.

        `answers` are class probabilities `(N, classes)` and labels `(N,)` of the held-out set.
        """
        if self.totals.confidence is not None:  # pictures that the epoch left out keep their earlier confidence
            seen = self.totals.confidence > 0
            before = torch.zeros_like(self.totals.confidence) if self.confidence is None else self.confidence
            self.confidence = torch.where(seen, self.totals.confidence, before)
        self.totals = None
        self.epoch += 1
        self.history.epochs.append(metrics)
        if self.history.best is not metrics:
            return False
        self.mistakes = worst_pairs(confusion_counts(*answers), classes)
        return True

    def gradient_norm(self) -> float:
        """The length of the last step's gradient, over all weights that train."""
        if self.clipped_norm is not None:
            return self.clipped_norm.item()
        gradients = [parameter.grad for parameter in self.trainable.parameters() if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).item()

    def time_left(self) -> str:
        """About how long the run still takes, at the pace since the program began: `0:03:12`."""
        now = time.perf_counter()
        self.first_step = self.first_step or (self.step, now)
        first, began = self.first_step
        if self.step == first:
            return "?"
        seconds = (now - began) / (self.step - first) * (self.total_steps - self.step)
        return str(datetime.timedelta(seconds=round(seconds)))

    def state_dict(self) -> dict:
        """What resuming needs beside the weights of the network."""
        return {
            "optimizer": {"state": self.optimizer.state_dict()["state"]},  # its groups are as the config says
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "totals": asdict(self.totals) if self.totals else None,
            "confidence": self.confidence,
            "history": self.history.state_dict(),
            "mistakes": self.mistakes,
            "pictures": self.pictures,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from there. The file has what training found; all that the config says is our own."""
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        if state["scaler"]:  # one that does nothing has no state
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.mistakes = state["step"], state["mistakes"]
        self.history = History.load(state["history"], self.history.by)
        self.epoch = len(self.history) + 1
        self.totals = EpochTotals(**state["totals"]) if state["totals"] else None
        self.confidence = state["confidence"]
        if self.confidence is not None:
            self.confidence = self.confidence.to(self.device)
        if self.totals and self.totals.confidence is not None:
            self.totals.confidence = self.totals.confidence.to(self.device)


def make_state(
    network: nn.Module,
    trainable: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    precision: torch.dtype,
    group: Group,
    *,
    labels: Tensor,
) -> TrainState:
    """The state at the beginning of a run, whose training pictures have these labels, int64 `(N,)`.

    In a group `trainable` is wrapped in DistributedDataParallel.
    """
    device = next(network.parameters()).device
    eager = trainable if group.size == 1 else wrap_ddp(trainable, device, config.accumulate)
    return TrainState(
        network=network,
        trainable=trainable,
        forward=torch.compile(eager) if config.compile else eager,
        eager=eager,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
        device=device,
        precision=precision,
        group=group,
        pictures=len(labels),
        crowding=Crowding(device),
        class_weights=balanced_weights(labels, config.balance),
        history=History(by=config.best),
    )


def epoch_pictures(pictures: int, config: Config, epoch: int) -> int:
    """How many of the training pictures an epoch trains on: all, or with --hardest fewer in the run's second half."""
    if epoch <= math.ceil(config.epochs / 2):
        return pictures
    return max(2, round(config.hardest * pictures))


def epoch_steps(pictures: int, config: Config, epoch: int) -> int:
    """How many steps an epoch has."""
    return len(batch_slices(epoch_pictures(pictures, config, epoch), config.batch_size))


def run_steps(history: History, pictures: int, config: Config) -> int:
    """The steps of a whole run: those of its finished epochs, and those of the epochs to come.

    Only two kinds of epochs are counted, so that a run can have millions.
    """
    finished, half = len(history.epochs), math.ceil(config.epochs / 2)
    done = history.epochs[-1]["step"] if finished else 0
    of_all, of_hardest = max(0, half - finished), max(0, config.epochs - max(half, finished))
    steps_of_all, steps_of_hardest = (epoch_steps(pictures, config, epoch) for epoch in (half, half + 1))
    return done + of_all * steps_of_all + of_hardest * steps_of_hardest


def hardest(confidence: Tensor | None, config: Config, epoch: int) -> Tensor | None:
    """Which pictures an epoch trains on, bool `(N,)`: all (None) in the first half of the run, then `config.hardest`.

    These are the pictures whose true class got the lowest probability, `confidence` `(N,)`, when they last trained:
    the others teach the network little by then (after Jordan 2024, arxiv.org/abs/2404.00498, section 5, where a small
    network chooses).
    """
    if config.hardest == 1 or epoch <= math.ceil(config.epochs / 2):
        return None
    keep = torch.zeros(len(confidence), dtype=torch.bool, device=confidence.device)
    keep[confidence.topk(epoch_pictures(len(confidence), config, epoch), largest=False).indices] = True
    return keep

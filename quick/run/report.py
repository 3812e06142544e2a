"""The lines that train.py prints: what it trains, one line an epoch, and the result."""

from collections.abc import Sequence

import torch
from torch import nn

from quick.cli import flag, how_to_see, log, quoted
from quick.data.doctor import unbalanced
from quick.data.pictures import Pictures
from quick.processes import Group
from quick.run.folder import RunFolder
from quick.run.settings import Config
from quick.run.state import TrainState

IN_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
FEW = 50  # held-out pictures: below that, one more or less moves the accuracy by over 2 points


def print_start(
    config: Config,
    sets: Sequence[Pictures],
    network: nn.Module,
    device: torch.device,
    precision: torch.dtype,
    group: Group,
) -> None:
    """In one line: the pictures, the network and its weights, the device, the precision and how many processes.

    In others, where few pictures are held out, or some classes have many more pictures than others.
    """
    sizes = ", ".join(f"{len(pictures):,} {pictures.split}" for pictures in sets)
    count = sum(parameter.numel() for parameter in network.parameters())
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    what = f"{config.model}: {count:,} parameters"
    if trained < count:
        what += f", {trained:,} of them trained"
    if config.weights != "none":
        what += f", from {config.weights}"
    where = f"{group.size} processes, this one on {device}" if group.size > 1 else device
    log.info(f"{config.data}: {sizes} pictures; {what}; {where}, {IN_SHORT[precision]}")
    if (held_out := len(sets[1])) < FEW and not config.limit:
        what = f"only {held_out} {sets[1].split} pictures: one more or less moves the accuracy by {1 / held_out:.1%}"
        log.info(f"{what} (docs/recipes.md, Cross-validation, uses all in turn)")
    if line := unbalanced(sets):
        hint = "--balance 1 lets all classes count the same"
        if config.balance:
            hint = f"with {flag('balance', config.balance)} small classes weigh more"
        log.info(f"{line}; {hint}")


def epoch_line(metrics: dict, split: str, epochs: int, is_best: bool) -> str:
    """An epoch in one line of at most 100 columns."""
    epoch = f"{metrics['epoch']:>{len(str(epochs))}}/{epochs}"
    train = f"train loss {metrics['train_loss']:.3f} acc {metrics['train_accuracy']:.1%}"
    held_out = f"{split} loss {metrics[f'{split}_loss']:.3f} acc {metrics[f'{split}_accuracy']:.1%}"
    speed = f"{metrics['epoch_seconds']:.1f} s  {metrics['images_per_second']:,.0f} images/s"
    return f"epoch {epoch}  {train}  {held_out}  {speed}{'  <- best' if is_best else ''}"


def print_result(run: RunFolder, state: TrainState, config: Config) -> None:
    """Why the run has ended, its best epoch, what that mistakes, and the commands that come next."""
    history = state.history
    if history.ended_by(config) == "patience":
        print(f"ended after epoch {len(history)} of {config.epochs} by {flag('patience', config.patience)}")
    best, split = history.best, history.split
    chosen = ""
    if history.by == "loss":
        chosen = f" by loss {best[f'{split}_loss']:.3f}"
    elif history.by == "f1":
        chosen = f" by macro F1 {best[f'{split}_f1']:.1%}"
    result = f"{split} accuracy {best[f'{split}_accuracy']:.1%} (chosen on the {split} pictures)"
    if "val_accuracy" in best and "test_accuracy" in best:
        result = f"val accuracy {best['val_accuracy']:.1%}, test accuracy {best['test_accuracy']:.1%}"
    print(f"best: epoch {best['epoch']}{chosen}, {result}")
    last = "test" if "test_accuracy" in best else split  # what was evaluated last
    balanced = best.get(f"{last}_balanced_accuracy")  # runs of an earlier version have none
    if balanced is not None and abs(balanced - best[f"{last}_accuracy"]) >= 0.01:
        print(f"each class counted the same: balanced accuracy {balanced:.1%}, macro F1 {best[f'{last}_f1']:.1%}")
    if state.mistakes:
        print(f"most mistaken: {', '.join(state.mistakes)}")
    print(f"next: python predict.py YOUR_PICTURE --checkpoint {quoted(run.path / 'best.pt')}")
    print(how_to_see(config.log_dir))

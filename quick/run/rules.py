"""Which settings go together, and what becomes of those that a run finds out itself."""

from collections.abc import Collection
from dataclasses import replace

from torch import nn

from quick.data.holdout import share_of
from quick.data.pictures import Pictures
from quick.errors import ConfigError
from quick.processes import Group
from quick.run.optimizers import RATES, fitting_lr
from quick.run.settings import Config


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


def complete(config: Config, train_set: Pictures, network: nn.Module, own: bool) -> Config:
    """Replace what is still "auto" by what the training pictures and the network say; `own`: it is one of model.py."""
    lr = config.lr or fitting_lr(network, config, own)
    return replace(config, mean=train_set.mean, std=train_set.std, levels=train_set.levels or (), lr=lr)

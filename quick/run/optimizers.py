"""Optimizers: SGD, Muon, AdamW, their learning rates, and the groups of weights that have one of their own."""

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor, nn


class OptimizerSettings(Protocol):
    """The settings that an optimizer is made of; the Config of a run has them."""

    optimizer: str
    weights: str
    freeze: str
    lr: float
    muon_lr: float
    backbone_lr: float
    momentum: float
    nesterov: bool
    weight_decay: float


# What --lr 0 stands for: by what trains, for our own networks, those of torchvision with batch normalisation, and those
# without. SGD's are for a momentum of 0.9 and batches of 64. 0.1 is of He et al. 2015 (arxiv.org/abs/1512.03385); with
# 0.01 torchvision's references/classification trains VGG; with 0.001, in batches of 4, PyTorch's transfer learning
# tutorial trains all of a ResNet18. Our own with weights: the best of 0.1, 0.03, 0.01 and 0.005 on
# 245 photographs. AdamW: 0.001 is its authors' (arxiv.org/abs/1711.05101).
RATES = {
    "sgd": {"nothing": (0.1, 0.1, 0.01), "pretrained": (0.03, 0.005, 0.001), "head": (0.1, 0.01, 0.001)},
    "adamw": {"nothing": (1e-3, 1e-3, 1e-4), "pretrained": (3e-4, 1e-4, 1e-4), "head": (1e-3, 1e-3, 1e-3)},
}
RATES["muon"] = RATES["sgd"]  # of all that Muon leaves to SGD


def fitting_lr(network: nn.Module, config: OptimizerSettings, own: bool) -> float:
    """The highest learning rate that suits the optimizer, the network, its weights and what of it is frozen.

    `own` says whether the network is one of ours. Only for a `config.optimizer` in RATES.
    """
    what = "pretrained" if config.weights != "none" else "nothing"
    if what == "pretrained" and (config.freeze == "all" or config.backbone_lr):
        what = "head"  # all else has stopped, or has a rate of its own
    normalises = any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules())
    return RATES[config.optimizer][what][0 if own else 1 if normalises else 2]


def make_optimizer(
    network: nn.Module, head: Collection[str], config: OptimizerSettings, precision: torch.dtype
) -> torch.optim.Optimizer:
    """The optimizer that the config asks for; each of its groups has its highest learning rate in "highest_lr".

    `head` names the weights of the last layer; `precision` is that of the forward pass.
    """
    groups = parameter_groups(network, head, config)
    fused = next(network.parameters()).device.type in ("cpu", "cuda")
    return OPTIMIZERS[config.optimizer](groups, config, precision, fused)


def parameter_groups(network: nn.Module, head: Collection[str], config: OptimizerSettings) -> list[dict]:
    """The weights that train, in groups with their own "highest_lr" and "weight_decay".

    `backbone_lr` is for all but the head. Biases and normalisation are not decayed. In groups with `orthogonal=True`
    are the weight matrices that Muon works on.
    """
    groups = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        in_head, is_matrix = name in head, parameter.ndim > 1
        orthogonal = config.optimizer == "muon" and is_matrix and not in_head and name.endswith("weight")
        lr = config.lr if in_head else config.backbone_lr or config.lr
        if orthogonal:
            lr = config.muon_lr
        weight_decay = config.weight_decay if is_matrix else 0.0
        group = {"params": [], "lr": lr, "highest_lr": lr, "weight_decay": weight_decay, "orthogonal": orthogonal}
        groups.setdefault((in_head, is_matrix, orthogonal), group)["params"].append(parameter)
    return list(groups.values())


class Muon(torch.optim.Optimizer):
    """SGD with momentum, whose steps on groups with `orthogonal=True` are made more like orthogonal matrices.

    After Jordan et al. 2024 (kellerjordan.github.io/posts/muon): a convolution's step, seen as a matrix `(outputs, all
    else)`, keeps its directions, but their lengths come closer to each other. torch.optim.Muon takes only matrices.
    `precision` is the dtype of the products.
    """

    def __init__(self, groups: list[dict], momentum: float, nesterov: bool, precision: torch.dtype):
        super().__init__(groups, {"momentum": momentum, "nesterov": nesterov})
        self.precision = torch.bfloat16 if precision == torch.bfloat16 else torch.float32

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            momentum, weight_decay = group["momentum"], group["weight_decay"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                lr, gradient, state = group["lr"], weight.grad, self.state[weight]
                if not group["orthogonal"]:
                    gradient = gradient.add(weight, alpha=weight_decay)  # as torch.optim.SGD does it
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                buffer = state["momentum_buffer"].mul_(momentum).add_(gradient)
                update = gradient.add(buffer, alpha=momentum) if group["nesterov"] else buffer
                if group["orthogonal"]:
                    update = orthogonal(update.flatten(1).to(self.precision)).to(weight).view_as(weight)
                    weight.mul_(1 - lr * weight_decay)
                    lr *= max(1, len(weight) / weight[0].numel()) ** 0.5  # tall matrices have longer columns
                weight.add_(update, alpha=-lr)


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix on the way to the nearest (semi-)orthogonal one, by Newton-Schulz steps on its singular values.

    Three steps bring those above 0.03 of the matrix's norm to between 0.6 and 1.2, and let smaller ones grow about 40
    times, which serves as well as exact ones; the polynomial is that of the page named in Muon.
    """
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(3):
        square = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    return wide if len(matrix) <= matrix.shape[1] else wide.T


def sgd(groups: list[dict], config: OptimizerSettings, precision: torch.dtype, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov, fused=fused)


def muon(groups: list[dict], config: OptimizerSettings, precision: torch.dtype, fused: bool) -> torch.optim.Optimizer:
    return Muon(groups, config.momentum, config.nesterov, precision)


def adamw(groups: list[dict], config: OptimizerSettings, precision: torch.dtype, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=fused)


# Each is made of the groups of weights, the config, the precision of the forward pass, and whether the device can
# update all weights in one go (`fused`).
OPTIMIZERS = {"sgd": sgd, "muon": muon, "adamw": adamw}

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
    muon_decay: float
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
    return OPTIMIZERS[config.optimizer](parameter_groups(network, head, config), config, precision)


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
        weight_decay = config.weight_decay if is_matrix else 0.0
        if orthogonal:
            lr, weight_decay = config.muon_lr, config.muon_decay or config.weight_decay
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
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            gradients = [weight.grad for weight in weights]
            lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
            if not group["orthogonal"]:
                gradients = torch._foreach_add(gradients, weights, alpha=weight_decay)  # as torch.optim.SGD does it
            buffers = [self.state[weight].get("momentum_buffer") for weight in weights]
            for place, weight in enumerate(weights):
                if buffers[place] is None:
                    buffers[place] = self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, gradients)
            updates = torch._foreach_add(gradients, buffers, alpha=momentum) if group["nesterov"] else buffers
            if group["orthogonal"]:
                updates = orthogonal([update.movedim(1, -1) for update in updates], self.precision)
                updates = [update.movedim(-1, 1) for update in updates]
                torch._foreach_mul_(weights, 1 - lr * weight_decay)
                # Tall matrices have longer columns.
                torch._foreach_mul_(updates, [max(1, len(weight) / weight[0].numel()) ** 0.5 for weight in weights])
            torch._foreach_add_(weights, updates, alpha=-lr)


def orthogonal(tensors: list[Tensor], precision: torch.dtype = torch.float32) -> list[Tensor]:
    """Each tensor, seen as a matrix `(first dimension, all else)`, on the way to the nearest (semi-)orthogonal one.

    Three Newton-Schulz steps on its singular values bring those above 0.03 of the matrix's norm to between 0.6 and 1.2,
    and let smaller ones grow about 40 times, which serves as well as exact ones; the polynomial is that of the page
    named in Muon. Each step multiplies the matrix X by a polynomial of X X^T, so they are taken on this small square,
    of all matrices with the same number of rows at once, and X itself is multiplied at the end alone. The products with
    X are in `precision`.
    """
    matrices = [matrix.flatten(1) for matrix in converted(tensors, precision)]
    wide = [matrix if len(matrix) <= matrix.shape[1] else matrix.T for matrix in matrices]
    for rows in {len(matrix) for matrix in wide}:
        places = [place for place, matrix in enumerate(wide) if len(matrix) == rows]
        square = torch.stack([wide[place] @ wide[place].T for place in places]).float()
        size = square.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1) + 1e-14  # the norm of the matrix, squared
        square, factor = square / size, size.rsqrt()
        for number in range(3):
            step = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
            step.diagonal(dim1=1, dim2=2).add_(3.4445)
            factor = step @ factor if number else step * factor
            if number < 2:
                square = step @ square @ step
        for place, multiply in zip(places, factor.to(precision), strict=True):
            wide[place] = multiply @ wide[place]
    results = [new if new.shape == old.shape else new.T for new, old in zip(wide, matrices, strict=True)]
    results = [result.view_as(tensor) for result, tensor in zip(results, tensors, strict=True)]
    return converted(results, tensors[0].dtype)


def converted(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in this dtype, by one operation for all."""
    if tensors[0].dtype == dtype:
        return tensors
    results = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(results, tensors)
    return results


def sgd(groups: list[dict], config: OptimizerSettings, precision: torch.dtype) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov, fused=True)


def muon(groups: list[dict], config: OptimizerSettings, precision: torch.dtype) -> torch.optim.Optimizer:
    return Muon(groups, config.momentum, config.nesterov, precision)


def adamw(groups: list[dict], config: OptimizerSettings, precision: torch.dtype) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True)


# Each is made of the groups of weights, the config and the precision of the forward pass.
OPTIMIZERS = {"sgd": sgd, "muon": muon, "adamw": adamw}

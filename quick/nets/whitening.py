"""Whitening: a first convolution that decorrelates its inputs from the first step on."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quick.errors import NetworkError


@torch.no_grad()
def whiten(network: nn.Module, images: Tensor) -> None:
    """Start the first convolution with filters that whiten patches of float images `(N, 3, H, W)`.

    The filters are the principal components of its patches, scaled to the same variance. Each stands beside its
    negative, so that pooling and activation lose neither end. The network then learns from decorrelated inputs from
    the first step on (Page 2019, myrtle.ai/learn/how-to-train-your-resnet-8-bag-of-tricks; Jordan 2024,
    arxiv.org/abs/2404.00498, section 3.2). Raises NetworkError for a network that does not begin with a convolution.
    """
    conv = next((layer for layer in network.modules() if isinstance(layer, nn.Conv2d)), None)
    if conv is None or conv.in_channels != 3:
        raise NetworkError("--whiten: this network does not begin with a convolution; add --no-whiten")
    padding = conv.padding if images.shape[3] < max(conv.kernel_size) else 0
    patches = F.unfold(images.cpu(), conv.kernel_size, padding=padding, stride=max(1, images.shape[3] // 32))
    patches = patches.transpose(1, 2).flatten(0, 1)
    variances, components = torch.linalg.eigh((patches.T @ patches / len(patches)).double())
    # A component and its negative serve as well: this makes the choice the same on every machine.
    components *= components.gather(0, components.abs().argmax(0, keepdim=True)).sign()
    filters = (components / (variances.clamp(min=0) + 5e-4).sqrt()).T.flip(0)[: len(conv.weight) // 2]
    filters = torch.cat([filters, -filters]).view(-1, *conv.weight.shape[1:])
    conv.weight[: len(filters)] = filters.to(conv.weight)

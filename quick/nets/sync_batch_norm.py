"""Batch normalisation by the pictures of all processes, on CPUs as well."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class SumOverProcesses(torch.autograd.Function):
    """The sum of all processes' tensors; gradients flow back to all of them.

    PyTorch 2.14 warns that its own, in torch.distributed.nn.functional, will go.
    """

    @staticmethod
    def forward(_, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_, gradient: Tensor) -> Tensor:
        return SumOverProcesses.forward(None, gradient)


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation by the inputs `(N, C, ...)` of all processes; N may differ between them and may be 0.

    It computes what torch.nn.SyncBatchNorm does, which works only on GPUs.
    """

    def __init__(self, norm: _BatchNorm):
        """Takes over the very parameters and buffers of `norm`, and its mode."""
        super().__init__(norm.num_features, norm.eps, norm.momentum, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.train(norm.training)

    def _check_input_dim(self, _: Tensor) -> None:
        """Inputs may have any number of dimensions from two."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return super().forward(inputs)
        dims = [0, *range(2, inputs.ndim)]
        shape = [1, -1, *[1] * (inputs.ndim - 2)]
        values, channels = inputs.float(), inputs.shape[1]
        count = values.new_tensor([values.numel() / channels])
        total, count = SumOverProcesses.apply(torch.cat([values.sum(dims), count])).split([channels, 1])
        mean = total / count
        centred = values - mean.view(shape)
        variance = SumOverProcesses.apply(centred.square().sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            weight = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, weight)
            self.running_var.lerp_(variance * count / (count - 1), weight)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(shape) + self.bias.view(shape)).to(inputs.dtype)


def synchronise(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with batch normalisation by the pictures of all processes; parameters and buffers stay the same."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    # A layer that stands in two places is replaced in both.
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if isinstance(module, _BatchNorm):
            network.set_submodule(name, SyncBatchNorm(module))
    return network

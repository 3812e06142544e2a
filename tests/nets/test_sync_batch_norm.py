"""Batch normalisation over all processes; that it gives several the bits of one is in test_groups.py."""

import pytest
import torch
from torch import nn

from quick.nets.sync_batch_norm import SyncBatchNorm, synchronise


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this PyTorch has no gloo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def a_network(momentum: float | None = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    norms = nn.BatchNorm2d(4, eps=1e-3, momentum=momentum), nn.BatchNorm1d(5, momentum=momentum)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), norms[0], nn.Flatten(), nn.Sequential(nn.Linear(16, 5), norms[1]))
    for norm in norms:
        nn.init.uniform_(norm.weight)
        nn.init.uniform_(norm.bias)
    return network


@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_process_computes_what_batch_norm_does(group, momentum):
    plain, sync = a_network(momentum), synchronise(a_network(momentum), torch.device("cpu"))
    assert sum(isinstance(layer, SyncBatchNorm) for layer in sync.modules()) == 2
    for _ in range(3):
        images, weights = torch.rand(6, 3, 4, 4), torch.randn(6, 5)
        results = []
        for network in (plain, sync):
            network.zero_grad()
            outputs = network(images)
            (weights * outputs).sum().backward()
            results.append([outputs, *(parameter.grad for parameter in network.parameters())])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sync.state_dict(), plain.state_dict())
    torch.testing.assert_close(sync.eval()(images), plain.eval()(images))


def test_parameters_buffers_and_modes_stay_the_very_same():
    network = a_network()
    network[3].eval()
    network[1].weight.requires_grad_(False)
    before = [*network.named_parameters(), *network.named_buffers()]
    assert synchronise(network, torch.device("cpu")) is network
    after = [*network.named_parameters(), *network.named_buffers()]
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(new is old for (_, new), (_, old) in zip(after, before, strict=True))
    norm, frozen = network[3][1], network[1]
    assert isinstance(norm, SyncBatchNorm) and not norm.training and frozen.training
    assert frozen.eps == 1e-3 and not frozen.weight.requires_grad


def test_a_layer_in_two_places_is_replaced_in_both():
    norm = nn.BatchNorm1d(3)
    network = synchronise(nn.Sequential(norm, nn.Linear(3, 3), norm), torch.device("cpu"))
    assert all(isinstance(network[place], SyncBatchNorm) for place in (0, 2))
    assert network[0].weight is network[2].weight is norm.weight

"""A network's answers, in eval mode and by test-time augmentation."""

import numpy as np
import pytest
import torch
from torch import nn

import model
from quick.checkpoints import TTA
from quick.run import evaluation
from quick.run.evaluation import outputs


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return model.create("cifar_quick", {"classes": 3})


def test_test_time_augmentation_is_the_mean_of_its_views(network, monkeypatch):
    images = torch.rand(5, 3, 32, 32)
    network.eval()
    with torch.no_grad():
        both = lambda images: (network(images) + network(images.flip(3))) / 2  # noqa: E731
        moved = torch.from_numpy(np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), "reflect"))
        shifted = (both(moved[:, :, :32, :32]) + both(moved[:, :, 2:, 2:])) / 2
        wanted = {"none": network(images), "mirror": both(images), "shift": both(images) / 2 + shifted / 2}
    for tta in TTA:
        assert torch.allclose(outputs(network, [images], tta), wanted[tta], atol=1e-6)
    # Where the first class is far above the second one, shifted views are spared.
    first, second = wanted["mirror"].softmax(1).topk(2).values.unbind(1)
    between = (first - second).sort().values[2:4].mean().item()
    monkeypatch.setattr(evaluation, "UNSURE", between)
    found, unsure = outputs(network, [images], "shift"), first - second < between
    assert unsure.sum() == 3
    assert torch.allclose(found, torch.where(unsure[:, None], wanted["shift"], wanted["mirror"]), atol=1e-6)
    monkeypatch.setattr(evaluation, "UNSURE", 0)
    assert torch.equal(outputs(network, [images], "shift"), outputs(network, [images], "mirror"))


def test_outputs_are_those_of_eval_mode(network):
    batches = [torch.rand(4, 3, 32, 32), torch.zeros(0, 3, 32, 32), torch.rand(1, 3, 32, 32)]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    logits = outputs(network.train(), batches)
    assert network.training  # as it was before
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with torch.no_grad():
        expected = torch.cat([network.eval()(images) for images in batches])
    assert torch.allclose(logits, expected) and logits.dtype == torch.float32
    assert not logits.requires_grad  # which would keep all that was computed
    assert outputs(network, []).shape == (0, 0)

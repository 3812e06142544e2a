"""Whitening filters."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model
from quick.errors import NetworkError
from quick.nets.whitening import whiten


def test_whitening_filters_make_the_first_layers_outputs_uncorrelated():
    torch.manual_seed(0)
    images = 5 * F.avg_pool2d(torch.randn(300, 3, 36, 36), 5, stride=1)  # neighbours are alike, as in pictures
    images = images + torch.randn(300, 1, 1, 1)  # and so are colours
    network = model.CifarQuick()
    whiten(network, images)
    outputs = F.conv2d(images, network.stage1.conv.weight).transpose(0, 1).flatten(1)
    assert torch.allclose(outputs[:16], -outputs[16:], atol=1e-4)
    products = outputs[:16] @ outputs[:16].T / outputs.shape[1]
    assert torch.allclose(products, torch.eye(16), atol=0.05)
    filters = network.stage1.conv.weight[:16].flatten(1)  # of the two signs, the same one on every machine
    assert (filters.gather(1, filters.abs().argmax(1, keepdim=True)) > 0).all()
    with pytest.raises(NetworkError, match="--whiten: this network does not begin with a convolution"):
        whiten(nn.Linear(3, 3), images)

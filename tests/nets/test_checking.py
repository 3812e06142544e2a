"""Whether a network can work on pictures of a size."""

import pytest
from torch import nn

import model
from quick.errors import NetworkError
from quick.nets.checking import check_network


@pytest.mark.parametrize(
    ("name", "too_small", "wanted"),
    [
        ("alexnet", 32, 63),
        pytest.param("inception_v3", 75, 299, marks=pytest.mark.expensive),
        ("vit_b_16", 40, 64),
        ("squeezenet1_0", 10, 21),
        ("vgg16", 16, 32),
    ],
)
def test_networks_say_which_size_they_need(name, too_small, wanted):
    options = {"classes": 10, "image_size": too_small}
    with pytest.raises(NetworkError, match=f"pictures of {too_small} x {too_small} .* add --image-size {wanted}$"):
        check_network(model.create_empty, name, options)
    check_network(model.create_empty, name, options | {"image_size": wanted})
    if name == "inception_v3":  # its auxiliary classifier alone needs so much
        check_network(model.create_empty, name, options, training=False)


class Hopeless(nn.Module):
    def __init__(self, classes: int = 10, image_size: int = 32):
        super().__init__()

    def forward(self, images):
        raise RuntimeError("for no size")


def test_a_network_that_no_size_would_help_says_why(monkeypatch):
    monkeypatch.setitem(model.NETWORKS, "hopeless", Hopeless)
    with pytest.raises(NetworkError, match="hopeless cannot train on 2 pictures of 32 x 32 pixels a step: for no size"):
        check_network(model.create_empty, "hopeless", {"classes": 2, "image_size": 32})

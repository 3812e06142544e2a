"""Looks into networks whose answers are known to depend on certain pixels."""

import pytest
import torch
from torch import nn

import model
from quick.views import insight


class LooksAtACorner(nn.Module):
    """Its answer is the sum of the upper left quarter, after a layer that changes nothing."""

    def __init__(self, with_layer: bool):
        super().__init__()
        self.layer = nn.Identity() if not with_layer else nn.Conv2d(3, 3, 1, groups=3, bias=False)
        self.pool, self.with_layer = nn.AdaptiveAvgPool2d(1), with_layer
        if with_layer:
            nn.init.ones_(self.layer.weight)

    def forward(self, images):
        mask = torch.zeros_like(images)
        mask[:, :, :16, :16] = 1
        maps = self.layer(images * mask) if self.with_layer else images * mask
        return maps.sum((2, 3))[:, :2]


@pytest.mark.parametrize("with_layer", [True, False])  # Grad-CAM, or the gradient of the input
def test_saliency_is_where_the_answer_comes_from(with_layer):
    heat = insight.saliency(LooksAtACorner(with_layer).eval(), torch.rand(1, 3, 32, 32) + 0.5)
    assert heat.shape == (32, 32) and heat.max() == 1 and heat.min() >= 0
    assert heat[:16, :16].mean() > 0.4 and heat[17:, 17:].max() == 0


class LooksForAndAgainst(nn.Module):
    """What lies to the upper left speaks for the answer; what lies below, against it and for the other class."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]).view(2, 3, 1, 1))

    def forward(self, images):
        left, below = self.layer(images).mean((2, 3)).unbind(1)
        return torch.stack([2 * left - below, 3 * below], 1)


def test_saliency_shows_what_speaks_for_the_answer():
    image = torch.zeros(1, 3, 32, 32)
    image[:, 0, :16, :16] = 1  # for the first class
    image[:, 1, 16:] = 0.2  # for the second
    heat = insight.saliency(LooksForAndAgainst(), image)
    assert heat.min() == 0 and heat[:16, :16].min() == 1 and heat[16:].max() == 0 and heat[:16, 16:].max() == 0


def test_where_nothing_speaks_for_the_answer_saliency_shows_what_it_depends_on():
    image = torch.zeros(1, 3, 32, 32)
    image[:, 1, 16:] = -0.2  # against both classes, but less against the first
    assert LooksForAndAgainst()(image).argmax() == 0
    assert insight.saliency(LooksForAndAgainst(), image).max() > 0.99


def test_maps_are_the_layers_outputs_before_they_are_changed_in_place():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 64, 2))
    maps = insight.layer_maps(network, torch.randn(1, 3, 8, 8))
    assert list(maps) == ["0", "1"] and maps["0"].min() < 0 and torch.equal(maps["0"].relu(), maps["1"])
    many = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(60)))
    assert len(insight.layer_maps(many, torch.rand(1, 3, 4, 4))) == 24


def test_a_network_without_maps_has_none():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2))
    assert insight.layer_maps(network, torch.randn(1, 3, 8, 8)) == {}
    assert insight.saliency(network, torch.randn(1, 3, 8, 8)).shape == (8, 8)


def test_filters_are_in_colour_where_they_see_colours():
    network = nn.Sequential(nn.Conv2d(3, 2, 5))
    with torch.no_grad():
        network[0].weight.zero_()
        network[0].weight[0, 0] = 1  # red
    picture = insight.filters(network)
    assert picture[20, 20].tolist() == [255, 128, 128] or picture[20, 20].tolist() == [255, 127, 127]
    assert insight.filters(nn.Sequential(nn.Linear(2, 2))).ndim == 3


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", pytest.param("vit_b_32", marks=pytest.mark.expensive)])
def test_networks_of_torchvision_can_be_looked_into(name):
    network = model.create(name, {"classes": 3, "image_size": 64}).eval()
    image = torch.rand(1, 3, 64, 64)
    assert insight.saliency(network, image).shape == (64, 64)
    assert all(insight.features(maps).ndim == 3 for maps in insight.layer_maps(network, image).values())
    assert insight.filters(network).ndim == 3


def test_what_is_no_finite_number_does_not_stop_a_view():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64, 2))
    with torch.no_grad():
        network[0].weight[0], network[0].weight[1] = float("nan"), float("inf")
    assert (insight.filters(network)[4:49, 4:49] == insight.filters(network)[20, 20]).all()  # grey
    maps = insight.layer_maps(network, torch.rand(1, 3, 8, 8))["0"]
    assert not maps.isfinite().all() and insight.features(maps).std() > 5
    assert insight.saliency(network, torch.rand(1, 3, 8, 8)).isfinite().all()


def test_pictures_of_a_pixel_and_filters_of_a_row():
    network = nn.Sequential(nn.Conv2d(3, 4, (1, 100)))
    assert insight.filters(network).ndim == 3
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 1))
    assert insight.layer_maps(network, torch.rand(1, 3, 1, 1)) == {}
    assert insight.saliency(network, torch.rand(1, 3, 1, 1)).shape == (1, 1)

"""What people see of networks: the table, the list, what a checkpoint holds, the graph."""

import pytest
import torch
from conftest import ROOT

import model
from quick.nets import summary
from quick.nets.pretrained import torchvision_names

FORMAT_1 = ROOT / "tests" / "files" / "format_1.pt"  # of `train.py --config configs/shapes.toml --image-size 8`


def numbers(line: list[str]) -> list[int]:
    """Parameters and multiply-adds of a line of the table."""
    return [int(column.replace(",", "")) for column in line[-2:]]


def test_the_table_counts_parameters_and_multiply_adds():
    network = model.CifarQuick(batch_norm=False, activation="none")
    lines = summary.table(network.train(), 32, ["head.weight", "head.bias"]).splitlines()
    assert lines[1].split() == ["1", "stage1.conv", "32", "x", "32", "x", "32", "2,432", "2,457,600"]
    assert lines[-1].split() == ["total", "145,578", "12,354,176"]
    assert len(lines) == 11 and lines[-2].split()[:2] == ["head", "head"] and network.training


@pytest.mark.parametrize(
    ("name", "multiply_adds"),
    [
        ("resnet18", 1_814_073_344),
        ("swin_t", 4_500_000_000),
        pytest.param("vit_b_32", 4_410_000_000, marks=pytest.mark.expensive),
    ],
)
def test_the_tables_lines_add_up_for_every_kind_of_network(name, multiply_adds):
    """The multiply-adds at 224 pixels are those of the papers (ViT's and Swin's are given there in round numbers)."""
    pytest.importorskip("torchvision")
    options = {"classes": 1000, "image_size": 224}
    table = summary.table(model.create(name, options), 224, model.head_keys(name, options))
    _, *lines, total = [line.split() for line in table.splitlines()]
    columns = zip(*map(numbers, lines), strict=True)
    assert [sum(column) for column in columns] == numbers(total)
    assert numbers(total)[1] == pytest.approx(multiply_adds, rel=0.02)


def test_the_list_has_every_network():
    pytest.importorskip("torchvision")
    lines = summary.listing(model.NETWORKS).splitlines()
    assert [line.split()[0] for line in lines[1:]] == [*model.NETWORKS, *torchvision_names()]
    assert "vgg16" in torchvision_names() and len(lines) > 80
    assert next(line for line in lines if line.startswith("vgg16 ")).split()[1] == "138,357,544"
    assert lines[1].split()[1] == "145,770"


def test_what_a_file_holds():
    lines = summary.describe(FORMAT_1, *model.load(FORMAT_1)).splitlines()
    expected = [
        "format 1",
        "cifar_quick (classes 10, image_size 8, batch_norm True, activation relu), 84,330 parameters",
        "10: arrow, circle",
        "8 x 8 pixels, bilinear",
        "0.4948, 0.4969, 0.4979",
        "0.2768, 0.2765, 0.2755",
        "20",
    ]
    assert all(what in line for what, line in zip(expected, lines, strict=False))
    assert "    test_accuracy = 0.397" in lines and "    lr = 0.1" in lines


class Untraceable(model.CifarQuick):
    def forward(self, images):
        if torch.jit.is_tracing():
            raise RuntimeError("not\nhere")
        return super().forward(images)


def test_a_graph_that_cannot_be_drawn_is_named(tmp_path, capsys):
    from torch.utils.tensorboard import SummaryWriter

    network = Untraceable().train()
    with SummaryWriter(tmp_path) as writer:
        summary.write_graph(writer, network, torch.zeros(1, 3, 32, 32))
    assert capsys.readouterr().err == "no graph in TensorBoard: not here\n" and network.training


@pytest.mark.parametrize(
    "name",
    [
        "googlenet",
        pytest.param("vit_b_32", marks=pytest.mark.expensive),
        pytest.param("swin_v2_t", marks=pytest.mark.expensive),
    ],
)
def test_graphs_of_torchvisions_networks_can_be_drawn(name, tmp_path, capsys):
    pytest.importorskip("torchvision")
    from torch.utils.tensorboard import SummaryWriter

    network = model.create(name, {"classes": 3, "image_size": 32})
    with SummaryWriter(tmp_path) as writer:
        summary.write_graph(writer, network, torch.zeros(1, 3, 32, 32))
    assert "no graph" not in capsys.readouterr().err

"""What is drawn: read back as pictures, from the functions and from TensorBoard's event files."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import datasets
import model
import train
import views


@pytest.fixture(scope="module")
def viewed(tmp_path_factory):
    """The run folder of a network that learned 1,000 shapes, with everything that can be shown."""
    logs = tmp_path_factory.mktemp("views")
    flags = f"--data shapes --limit 1000 --epochs 4 --view-every 2 --histograms --embedding --log-dir {logs}"
    assert train.cli([*flags.split(), "--run-name", "a", *"--device cpu --precision fp32 --tta none".split()]) == 0
    return logs / "a"


@pytest.fixture(scope="module")
def events(viewed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(viewed), size_guidance={"images": 0, "tensors": 0, "histograms": 0}).Reload()


def last_picture(events, tag: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string)))


# ---- in TensorBoard ----


def test_pictures_come_before_training_and_every_so_many_epochs(events):
    steps = 16 * np.array([0, 2, 4])
    layers = ["conv", "pool", "norm", "activation"]
    from_the_start = {
        "samples",
        "filters",
        *(f"features/stage{stage}.{layer}" for stage in (1, 2, 3) for layer in layers),
    }
    of_answers = {"confusion", "mistakes", "saliency"}
    assert set(events.Tags()["images"]) == from_the_start | of_answers
    for tag in from_the_start:
        assert [event.step for event in events.Images(tag)] == steps.tolist(), tag
    for tag in of_answers:
        assert [event.step for event in events.Images(tag)] == steps[1:].tolist(), tag
    for tag in events.Tags()["images"]:
        picture = last_picture(events, tag)
        assert picture.ndim == 3 and picture.shape[2] == 3 and picture.std() > 5 and max(picture.shape) < 1000, tag


def test_texts_curves_histograms_and_layout_are_there(events):
    from tensorboard.util.tensor_util import make_ndarray

    tags = events.Tags()
    assert {f"pr/{name}" for name in datasets.SHAPES} <= set(tags["tensors"])
    assert {"config/text_summary", "machine/text_summary", "custom_scalars__config__"} <= set(tags["tensors"])
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| batch_size | 64 |" in text and "| limit | 1000 |" in text
    machine = events.Tensors("machine/text_summary")[0].tensor_proto.string_val[0].decode()
    assert torch.__version__ in machine and "| device | cpu |" in machine and "| revision | " in machine
    assert {"weights/stage1.conv.weight", "gradients/head.bias"} <= set(tags["histograms"])
    last = [events.Histograms(f"{kind}/head.weight")[-1].histogram_value for kind in ("weights", "gradients")]
    assert (last[0].min, last[0].max) != (last[1].min, last[1].max)
    counts = make_ndarray(events.Tensors("pr/ring")[-1].tensor_proto)  # true and false positives, ... by threshold
    assert counts[:2, 0].tolist() == [100, 900]


def test_the_projector_has_the_test_pictures(viewed):
    [tsv] = viewed.glob("*/default/metadata.tsv")
    names = tsv.read_text().split()
    assert len(names) == 1000 and set(names) == set(datasets.SHAPES)
    assert len((tsv.parent / "tensors.tsv").read_text().splitlines()) == 1000
    assert Image.open(tsv.parent / "sprite.png").size == (32 * 32, 32 * 32)


def test_the_diagonal_of_a_trained_network_is_brightest(colour_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    picture = last_picture(EventAccumulator(str(colour_run)).Reload(), "confusion").astype(int)
    first = picture.shape[0] - 44 * 3 - 10
    cells = picture[first + 3 :: 44, first + 3 :: 44][:3, :3].sum(2)
    assert (cells.argmax(1) == np.arange(3)).all() and (cells.diagonal() > 2 * cells[0, 1]).all()


def test_the_mistakes_really_are_mistakes(viewed, events):
    """The pictures in the last `mistakes` are those that the last checkpoint answers wrongly, the surest first."""
    network, checkpoint = model.load(viewed / "epoch_004.pt")
    how = {name: checkpoint[name] for name in ("mean", "std")}
    [test_set] = datasets.load("shapes", limit=1000, splits=["test"], **how)
    logits, labels = model.outputs(network, test_set.batches(250))
    confidence, guesses = logits.softmax(1).max(1)
    wrong = (guesses != labels).nonzero().squeeze(1)
    surest = wrong[confidence[wrong].argmax()]
    shown = last_picture(events, "mistakes")[4:100, 4:100][1::3, 1::3].astype(int)
    assert np.abs(shown - test_set.images[surest].permute(1, 2, 0).numpy()).max() <= 1


def test_what_a_run_shows_is_small_and_can_be_turned_off(viewed, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    size = sum(path.stat().st_size for path in viewed.rglob("*") if path.is_file() and path.suffix != ".pt")
    assert size < 10e6
    flags = "--data shapes --limit 100 --epochs 1 --no-views --run-name a --log-dir".split()
    assert train.cli([*flags, str(tmp_path)]) == 0
    assert not EventAccumulator(str(tmp_path / "a")).Reload().Tags()["images"]


class Odd(model.CifarQuick):
    """Cannot be looked into: its layers are never called as modules, and it breaks when asked for a gradient."""

    def forward(self, images):
        if images.requires_grad:
            raise RuntimeError("no gradients\nhere")
        return super().forward(images)


def test_a_view_that_fails_is_named_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(model.NETWORKS, "cifar_quick", Odd)
    views.report_once.cache_clear()
    flags = "--data shapes --limit 100 --epochs 3 --run-name a --log-dir".split()
    assert train.cli([*flags, str(tmp_path)]) == 0
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if "TensorBoard" in line] == ["no saliency in TensorBoard: no gradients here"]


def test_views_leave_the_training_as_it_is(tmp_path):
    weights = []
    for name, flag in (("a", "--views"), ("b", "--no-views")):
        flags = ["--data", "shapes", "--limit", "300", "--epochs", "2", flag, "--run-name", name]
        assert train.cli([*flags, "--log-dir", str(tmp_path)]) == 0
        weights.append(torch.load(tmp_path / name / "best.pt", weights_only=True)["state_dict"])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_full_disk_leaves_no_half_event(tmp_path):
    resource = pytest.importorskip("resource", reason="needs a limit of file sizes (not on Windows)")
    writer, before = views.board(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    file = writer.file_writer.event_writer
    writer.add_scalar("a", 1.0, 1)
    file.flush()
    whole = file.path.read_bytes()
    writer.add_scalar("b", 2.0, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 9, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            file.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.path.read_bytes() == whole
    file.flush()
    assert file.path.read_bytes().startswith(whole) and file.path.stat().st_size > len(whole) and not file.waiting


def test_events_are_written_every_half_minute(tmp_path):
    writer = views.board(tmp_path)
    file = writer.file_writer.event_writer
    before = file.path.stat().st_size
    writer.add_scalar("a", 1.0, 1)
    assert file.path.stat().st_size == before
    file.flushed -= file.seconds + 1
    writer.add_scalar("b", 2.0, 2)
    assert file.path.stat().st_size > before and not file.waiting


# ---- the functions ----


def test_most_mistaken_are_wrong_and_most_confident():
    shares = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    assert views.most_mistaken(shares, torch.tensor([1, 0, 1, 1])).tolist() == [0, 1, 2]
    assert views.most_mistaken(shares, torch.tensor([1, 0, 1, 1]), 2).tolist() == [0, 1]
    assert views.most_mistaken(shares, torch.tensor([0, 1, 0, 1])).tolist() == []


def test_pairs_are_counted_and_put_into_words():
    shares = torch.eye(3)[torch.tensor([0, 0, 1, 1, 2, 2])]
    counts = views.count_pairs(shares, torch.tensor([0, 1, 1, 1, 2, 0]))
    assert counts.tolist() == [[1, 0, 1], [1, 2, 0], [0, 0, 1]]
    assert views.worst_pairs(counts, ["cat", "dog", "fox"]) == ["cat taken for fox 50 %", "dog taken for cat 33 %"]
    assert views.worst_pairs(torch.eye(3).long(), ["cat", "dog", "fox"]) == []


@pytest.mark.parametrize("count", [2, 12, 20, 100, 150])
def test_a_confusion_of_up_to_a_hundred_classes(count):
    torch.manual_seed(0)
    counts = torch.randint(0, 50, (count, count)) + 500 * torch.eye(count).long()
    picture = views.confusion(counts, [f"a rather long class name {number}" for number in range(count)])
    assert picture.dtype == np.uint8 and picture.shape[0] == picture.shape[1] < 2500


def test_a_confusions_rows_are_the_truth_and_its_colours_their_shares():
    picture = views.confusion(torch.tensor([[9, 1], [0, 100]]), ["a", "b"]).astype(int)
    first = picture.shape[0] - 44 * 2 - 10
    cells = picture[first + 3 :: 44, first + 3 :: 44][:2, :2]
    shares = np.array([[0.9, 0.1], [0, 1]])
    assert np.array_equal(cells, views.colours(shares))


def test_of_many_classes_those_with_the_most_mistakes_are_shown():
    counts = 10 * torch.eye(103).long()
    counts[3:, 3:] += 1  # the first three are never mistaken
    names = [f"class {number}" for number in range(103)]
    assert np.array_equal(views.confusion(counts, names), views.confusion(counts[3:, 3:], names[3:]))


def test_captions_tell_the_truth_from_the_guess():
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    labels, shares, names = torch.tensor([0, 1]), torch.tensor([[0.1, 0.9], [0.2, 0.8]]), ["cat", "dog"]
    tiles = [views.enlarged(picture, views.TILE) for picture in views.arrays(images)]
    expected = views.grid(tiles, ["is cat\n90% dog", "is dog\n80% dog"])
    assert np.array_equal(views.mistakes(images, labels, shares, names), expected)
    network, inputs = LooksAtACorner(True).eval(), images.float() / 255
    heats = [views.saliency(network, image[None]) for image in inputs]
    shown = views.saliency_in(network, lambda _: (inputs, images, labels), shares, names)
    assert np.array_equal(shown, views.saliencies(images, heats, ["dog (is cat)", "dog"]))


def test_samples_keep_their_colours_and_pixels():
    images = (
        torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8).view(3, 3, 1, 1).expand(-1, -1, 32, 32)
    )
    picture = views.samples(images, torch.tensor([0, 1, 0]), ["red", "green"])
    assert [picture[50, 4 + 100 * number + 10].tolist() for number in range(3)] == [
        [255, 0, 0],
        [0, 255, 0],
        [0, 0, 255],
    ]
    assert (picture[101:115, 4:100] < 128).any() and (picture[0] == 255).all()  # the caption, and the background
    chequered = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    chequered[:, :, ::2, ::2] = 255
    picture = views.samples(chequered, torch.tensor([0]), ["a"])
    assert set(np.unique(picture[4:100, 4:100])) == {0, 255}  # enlarged without smoothing


def test_large_pictures_are_reduced():
    assert views.enlarged(np.zeros((224, 224, 3), np.uint8), 96).shape == (96, 96, 3)


def test_colours_go_from_dark_to_bright():
    scale = views.colours(np.linspace(0, 1, 50)).astype(int)
    assert (np.diff(scale @ [0.3, 0.59, 0.11]) > 0).all()
    assert views.spread(np.full((2, 2), 3.0)).tolist() == [[0, 0], [0, 0]]


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
    heat = views.saliency(LooksAtACorner(with_layer).eval(), torch.rand(1, 3, 32, 32) + 0.5)
    assert heat.shape == (32, 32) and heat.max() == 1 and heat.min() >= 0
    assert heat[:16, :16].mean() > 0.4 and heat[17:, 17:].max() == 0


class LooksForAndAgainst(nn.Module):
    """The answer hangs on what lies to the upper left; what lies below speaks against it, and for the other class."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]).view(2, 3, 1, 1))

    def forward(self, images):
        left, below = self.layer(images).mean((2, 3)).unbind(1)
        return torch.stack([2 * left - below, 3 * below], 1)


def test_saliency_is_of_what_speaks_for_the_answer():
    image = torch.zeros(1, 3, 32, 32)
    image[:, 0, :16, :16] = 1  # for the first class
    image[:, 1, 16:] = 0.2  # for the second
    heat = views.saliency(LooksForAndAgainst(), image)
    assert heat.min() == 0 and heat[:16, :16].min() == 1 and heat[16:].max() == 0 and heat[:16, 16:].max() == 0


def test_where_nothing_speaks_for_the_answer_saliency_is_what_it_hangs_on():
    image = torch.zeros(1, 3, 32, 32)
    image[:, 1, 16:] = -0.2  # against both classes, but less against the first
    assert LooksForAndAgainst()(image).argmax() == 0
    assert views.saliency(LooksForAndAgainst(), image).max() > 0.99


def test_what_does_not_matter_is_dimmed():
    picture, heat = np.full((2, 2, 3), 200, np.uint8), torch.tensor([[1.0, 0.25], [0.0, 0.0]])
    shown = views.salient(picture, heat)[..., 0]
    assert shown[0, 0] == 200 > shown[0, 1] > shown[1, 0] == 47


def test_outputs_are_those_of_the_layers_before_they_are_changed_in_place():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 64, 2))
    maps = views.layer_maps(network, torch.randn(1, 3, 8, 8))
    assert list(maps) == ["0", "1"] and maps["0"].min() < 0 and torch.equal(maps["0"].relu(), maps["1"])
    many = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(60)))
    assert len(views.layer_maps(many, torch.rand(1, 3, 4, 4))) == 24


def test_filters_are_in_colour_where_they_see_colours():
    network = nn.Sequential(nn.Conv2d(3, 2, 5))
    with torch.no_grad():
        network[0].weight.zero_()
        network[0].weight[0, 0] = 1  # red
    picture = views.filters(network)
    assert picture[20, 20].tolist() == [255, 128, 128] or picture[20, 20].tolist() == [255, 127, 127]
    assert views.filters(nn.Sequential(nn.Linear(2, 2))).ndim == 3


@pytest.mark.parametrize("name", ["resnet18", "vit_b_32", "squeezenet1_1"])
def test_networks_of_torchvision_can_be_looked_into(name):
    network = model.create(name, {"classes": 3, "image_size": 64}).eval()
    image = torch.rand(1, 3, 64, 64)
    assert views.saliency(network, image).shape == (64, 64)
    assert all(views.features(maps).ndim == 3 for maps in views.layer_maps(network, image).values())
    assert views.filters(network).ndim == 3

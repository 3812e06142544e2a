"""What a run writes for TensorBoard, read back from its event files; and the files themselves."""

import html
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import model
import train
from quick.data import shapes
from quick.data.pictures import Pictures
from quick.data.stores import InMemory
from quick.run import evaluation
from quick.run.settings import Config
from quick.views import tensorboard


@pytest.fixture(scope="module")
def viewed(tmp_path_factory):
    """The run folder of a network that learned 1,000 shapes, with everything that can be shown."""
    logs = tmp_path_factory.mktemp("views")
    flags = f"--data shapes --limit 1000 --epochs 4 --view-every 2 --histograms --embedding --log-dir {logs}"
    assert train.cli([*flags.split(), "--run-name", "a", *"--device cpu --precision fp32 --tta none".split()]) == 0
    return logs / "a"


def events_in(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0, "histograms": 0}).Reload()


@pytest.fixture(scope="module")
def events(viewed):
    return events_in(viewed)


def last_picture(events, tag: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string)))


def test_a_text_shows_signs_of_markdown_as_they_are():
    from tensorboard import plugin_util

    name, value = "#3", r"a_b_ __init__ _c d_ <b>x</b> *i* `c` [l](u) | p & q \_ ~ 猫 &amp;"
    shown = plugin_util.markdown_to_safe_html(tensorboard.markdown_table({name: value}))
    assert [html.unescape(cell) for cell in re.findall("<td>(.*)</td>", shown)] == [name, value]


# ---- what a run shows ----


def test_pictures_come_before_training_and_every_so_many_epochs(events):
    steps = 16 * np.array([0, 2, 4])
    layers = ["conv", "pool", "norm", "activation"]
    from_the_start = {"samples", "filters", *(f"features/stage{n}.{layer}" for n in (1, 2, 3) for layer in layers)}
    of_answers = {"confusion", "mistakes", "saliency"}
    assert set(events.Tags()["images"]) == from_the_start | of_answers
    for tag in from_the_start:
        assert [event.step for event in events.Images(tag)] == steps.tolist(), tag
    for tag in of_answers:
        assert [event.step for event in events.Images(tag)] == steps[1:].tolist(), tag
    for tag in events.Tags()["images"]:
        picture = last_picture(events, tag)
        assert picture.ndim == 3 and picture.shape[2] == 3 and picture.std() > 5 and max(picture.shape) < 1000, tag


def test_samples_are_augmented_training_pictures(run):
    picture = Image.open(io.BytesIO(events_in(run).Images("samples")[0].encoded_image_string))
    first = np.asarray(picture)[4:100, 4:100][::3, ::3].astype(int)
    config = Config(**torch.load(run / "best.pt", weights_only=True)["config"])
    train_set, _ = datasets.load("shapes", limit=1000)
    _, [expected, *_], _ = train_set.preview(torch.arange(16), augment=config, seed=config.seed, epoch=0)
    assert not torch.equal(expected, train_set.preview(torch.arange(1))[1][0])
    assert picture.size[0] >= 4 * 96 and np.abs(first - expected.permute(1, 2, 0).numpy()).max() <= 1


def test_texts_curves_histograms_and_layout_are_there(events):
    from tensorboard.util.tensor_util import make_ndarray

    tags = events.Tags()
    assert {f"pr/{name}" for name in shapes.CLASSES} <= set(tags["tensors"])
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
    assert len(names) == 1000 and set(names) == set(shapes.CLASSES)
    assert len((tsv.parent / "tensors.tsv").read_text().splitlines()) == 1000
    assert Image.open(tsv.parent / "sprite.png").size == (32 * 32, 32 * 32)


def test_the_diagonal_of_a_trained_network_is_brightest(colour_run):
    picture = last_picture(events_in(colour_run), "confusion").astype(int)
    first = picture.shape[0] - 44 * 3 - 10
    cells = picture[first + 3 :: 44, first + 3 :: 44][:3, :3].sum(2)
    assert (cells.argmax(1) == np.arange(3)).all() and (cells.diagonal() > 2 * cells[0, 1]).all()


def test_the_mistakes_really_are_mistakes(viewed, events):
    """The pictures in the last `mistakes` are those that the last checkpoint answers wrongly, the surest first."""
    network, checkpoint = model.load(viewed / "epoch_004.pt")
    [test_set] = datasets.load("shapes", limit=1000, splits=["test"], mean=checkpoint["mean"], std=checkpoint["std"])
    logits, labels = evaluation.outputs_of_set(network, test_set, classes=10)
    confidence, guesses = logits.softmax(1).max(1)
    wrong = (guesses != labels).nonzero().squeeze(1)
    _, [surest], _ = test_set.preview(wrong[confidence[wrong].argmax()][None])
    shown = last_picture(events, "mistakes")[4:100, 4:100][1::3, 1::3].astype(int)
    assert np.abs(shown - surest.permute(1, 2, 0).numpy()).max() <= 1


def test_what_a_run_shows_is_small_and_can_be_turned_off(viewed, tmp_path):
    size = sum(path.stat().st_size for path in viewed.rglob("*") if path.is_file() and path.suffix != ".pt")
    assert size < 10e6
    flags = "--data shapes --limit 100 --epochs 1 --no-views --run-name a --log-dir".split()
    assert train.cli([*flags, str(tmp_path)]) == 0
    assert not events_in(tmp_path / "a").Tags()["images"]


class Odd(model.CifarQuick):
    """Breaks when it is asked for a gradient of its input, as saliency does."""

    def forward(self, images):
        if images.requires_grad:
            raise RuntimeError("no gradients\nhere")
        return super().forward(images)


def test_a_view_that_fails_is_named_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(model.NETWORKS, "cifar_quick", Odd)
    tensorboard.report_once.cache_clear()
    flags = "--data shapes --limit 100 --epochs 3 --run-name a --log-dir".split()
    assert train.cli([*flags, str(tmp_path)]) == 0
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if "TensorBoard" in line] == ["no saliency in TensorBoard: no gradients here"]


@pytest.mark.expensive
def test_views_leave_the_training_as_it_is(tmp_path):
    weights = []
    for name, flag in (("a", "--views"), ("b", "--no-views")):
        flags = ["--data", "shapes", "--limit", "300", "--epochs", "2", flag, "--run-name", name]
        assert train.cli([*flags, "--log-dir", str(tmp_path)]) == 0
        weights.append(torch.load(tmp_path / name / "best.pt", weights_only=True)["state_dict"])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


# ---- the functions and the file ----


def test_the_saliencies_are_those_of_the_first_pictures_with_their_answers(tmp_path):
    """Each function gets the pictures, labels and probabilities that belong together."""
    torch.manual_seed(0)
    [test_set] = datasets.load("shapes", limit=30, splits=["test"])
    network = model.create("cifar_quick", {"classes": 10}).eval()
    logits, labels = evaluation.outputs_of_set(network, test_set, classes=10)
    probabilities = logits.softmax(1)
    board = tensorboard.open_board(tmp_path)
    tensorboard.show_answers(board, network, test_set, probabilities, labels, step=3)
    board.flush()
    inputs, images, truths = test_set.preview(torch.arange(8))
    heats = [tensorboard.insight.saliency(network, image[None]) for image in inputs]
    expected = tensorboard.drawing.saliencies(images, heats, truths, probabilities[:8], test_set.classes)
    assert torch.equal(truths, labels[:8]) and np.array_equal(last_picture(events_in(tmp_path), "saliency"), expected)


def test_metrics_become_curves(tmp_path):
    board = tensorboard.open_board(tmp_path)
    metrics = {"epoch": 1, "step": 7, "train_loss": 0.5, "val_accuracy": 0.25, "lr": 0.125, "ended": "patience"}
    tensorboard.log_metrics(board, metrics, memory=64.0)
    board.flush()
    events = events_in(tmp_path)
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {"loss/train": [(7, 0.5)], "accuracy/val": [(7, 0.25)], "lr": [(7, 0.125)], "memory_mib": [(7, 64)]}


def test_a_run_that_goes_on_hides_what_it_tells_again(tmp_path):
    for purge_step, values in ((None, {1: 0.1, 2: 0.2, 3: 0.3}), (2, {2: 0.4})):
        board = tensorboard.open_board(tmp_path, purge_step)
        for step, value in values.items():
            board.add_scalar("loss", value, step)
        board.flush()
    found = [(event.step, round(event.value, 3)) for event in events_in(tmp_path).Scalars("loss")]
    assert found == [(1, 0.1), (2, 0.4)]


def test_a_full_disk_leaves_no_half_event(tmp_path):
    resource = pytest.importorskip("resource", reason="needs a limit of file sizes (not on Windows)")
    board, before = tensorboard.open_board(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    file = board.file_writer.event_writer
    board.add_scalar("a", 1.0, 1)
    file.flush()
    whole = file.path.read_bytes()
    board.add_scalar("b", 2.0, 2)
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
    board = tensorboard.open_board(tmp_path)
    file = board.file_writer.event_writer
    before = file.path.stat().st_size
    board.add_scalar("a", 1.0, 1)
    assert file.path.stat().st_size == before
    file.flushed -= tensorboard.FLUSH_SECONDS + 1
    board.add_scalar("b", 2.0, 2)
    assert file.path.stat().st_size > before and not file.waiting


def test_weights_that_are_no_numbers_leave_the_other_histograms(tmp_path):
    network, board = model.create("cifar_quick", {"classes": 3}), tensorboard.open_board(tmp_path)
    with torch.no_grad():
        network.stage1.conv.weight.fill_(float("nan"))
        network.stage2.conv.weight[0] = float("inf")
    network.head.weight.grad = torch.full((3, 64), float("nan"))
    tensorboard.show_histograms(board, network, 1)
    board.flush()
    tags = set(events_in(tmp_path).Tags()["histograms"])
    missing = {"weights/stage1.conv.weight"}
    assert tags == {f"weights/{name}" for name, _ in network.named_parameters()} - missing


def test_an_embedding_without_numbers_says_so(tmp_path, capsys):
    tensorboard.report_once.cache_clear()
    [test_set] = datasets.load("shapes", limit=10, splits=["test"])
    network, board = model.create("cifar_quick", {"classes": 10}), tensorboard.open_board(tmp_path)
    with torch.no_grad():
        network.stage1.conv.weight.fill_(float("inf"))
    tensorboard.show_embedding(board, network, ["head.weight", "head.bias"], test_set, 1)
    expected = "no embedding in TensorBoard: the network's features are not all finite numbers\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(("side", "classes"), [(1, ["a"]), (2, ["a", "b" * 1000])])
def test_tiny_pictures_and_few_classes_can_be_shown(side, classes, tmp_path, capsys):
    """One class, names of a thousand letters, pictures of a pixel: every view is there."""
    tensorboard.report_once.cache_clear()
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.Flatten(), torch.nn.Linear(4 * side**2, len(classes))
    ).eval()
    images = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    labels = torch.tensor([0, 0, len(classes) - 1])
    pictures = Pictures(InMemory(images), labels, classes, "test", mean=(0.5,) * 3, std=(0.2,) * 3)
    board, settings = tensorboard.open_board(tmp_path), Config(histograms=True)
    probabilities = torch.rand(3, len(classes)).softmax(1)
    metrics = {"epoch": 1, "step": 1}
    tensorboard.show_epoch(board, network, [pictures, pictures], settings, metrics, (probabilities, labels), last=True)
    tensorboard.show_embedding(board, network, ["2.weight", "2.bias"], pictures, 1)
    board.flush()
    assert "TensorBoard" not in capsys.readouterr().err
    assert {"samples", "confusion", "mistakes", "saliency", "filters"} <= set(events_in(tmp_path).Tags()["images"])

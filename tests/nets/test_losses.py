"""Losses, probabilities, metrics and the confusion matrix."""

import pytest
import torch
from torch import nn

import model
from quick.checkpoints import LOSSES
from quick.nets import losses


def test_losses_are_means_per_picture():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    one_hot = torch.eye(2)
    cross_entropy = -(logits.log_softmax(1) * one_hot).sum(1).mean()
    assert torch.isclose(losses.loss_function(logits, labels), cross_entropy)
    assert torch.isclose(losses.loss_function(logits, labels, "mse"), (logits - one_hot).square().mean())
    assert torch.isclose(losses.loss_function(logits, labels, "l1"), (logits - one_hot).abs().mean())


@pytest.mark.parametrize("kind", LOSSES)
def test_label_smoothing_gives_a_share_of_the_label_to_all_classes(kind):
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    target = nn.functional.one_hot(labels, 4) * 0.8 + 0.05
    expected = {
        "cross_entropy": -(logits.log_softmax(1) * target).sum(1).mean(),
        "mse": (logits - target).square().mean(),
        "l1": (logits - target).abs().mean(),
    }[kind]
    assert torch.isclose(losses.loss_function(logits, labels, kind, 0.2), expected)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_loss_of_no_pictures_is_zero_and_so_are_its_gradients(kind):
    """Of a small last batch some processes get no pictures, and still take part in the backward pass."""
    layer = nn.Linear(2, 3)
    loss = losses.loss_function(layer(torch.zeros(0, 2)), torch.zeros(0, dtype=torch.int64), kind, 0.1)
    loss.backward()
    assert loss.item() == 0 and not layer.weight.grad.any() and not layer.bias.grad.any()


@pytest.mark.parametrize("kind", LOSSES)
def test_class_weights_count_a_picture_so_many_times_and_parts_of_a_batch_add_up(kind):
    logits, labels = torch.randn(7, 3), torch.tensor([0, 0, 0, 0, 1, 2, 2])
    weights = losses.balanced_weights(labels, 1)
    assert torch.allclose(weights, torch.tensor([7 / 12, 7 / 3, 7 / 6]))
    whole = losses.loss_function(logits, labels, kind, 0.1, weights)
    of_each = [losses.loss_function(logits[[place]], labels[[place]], kind, 0.1) for place in range(7)]
    assert torch.isclose(whole, sum(weights[label] * of for label, of in zip(labels, of_each, strict=True)) / 7)
    often = torch.tensor([0, 1, 2, 3, *[4] * 4, 5, 5, 6, 6])  # as if each class had four pictures
    assert torch.isclose(whole, losses.loss_function(logits[often], labels[often], kind, 0.1))
    sizes = [3, 1, 0, 3]  # of pieces, or of the shards of processes
    parts = zip(logits.split(sizes), labels.split(sizes), strict=True)
    total = sum(losses.loss_function(*part, kind, 0.1, weights) * len(part[1]) / 7 for part in parts)
    assert torch.isclose(total, whole)


def test_balance_weighs_classes_by_a_power_of_their_counts_and_the_mean_weight_is_one():
    labels = torch.tensor([0] * 16 + [2] * 4)  # the second class has no pictures
    for balance, ratio in ((1, 4), (0.5, 2)):
        weights = losses.balanced_weights(labels, balance)
        assert weights[1] == 0 and weights[2] / weights[0] == pytest.approx(ratio)
        assert weights[labels].mean() == pytest.approx(1) and weights.dtype == torch.float32
    assert losses.balanced_weights(labels, 0) is None


@pytest.mark.parametrize("kind", LOSSES)
def test_probabilities_sum_to_one(kind):
    found = losses.probabilities(torch.tensor([[0.9, 0.1, -0.2], [-1.0, -2.0, -3.0]]), kind)
    assert torch.allclose(found.sum(1), torch.ones(2)) and (found >= 0).all() and found[0].argmax() == 0
    if kind != "cross_entropy":
        assert found[1].argmax() == 0  # the guess stays, even where no logit is above 0
        assert torch.allclose(found[0], torch.tensor([0.9, 0.1, 0.0]), atol=1e-6)


def test_the_score_has_the_loss_and_every_metric(monkeypatch):
    monkeypatch.setitem(losses.METRICS, "first", lambda logits, labels: float(labels[0]))
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]]), torch.tensor([0, 1, 1])
    for kind in LOSSES:
        found = losses.score(logits, labels, kind)
        assert found["loss"] == pytest.approx(losses.loss_function(logits, labels, kind).item())
        assert found["accuracy"] == pytest.approx(2 / 3) and found["first"] == 0
        assert list(found) == ["loss", "accuracy", "balanced_accuracy", "f1", "first"]


def test_scores_of_each_class_are_those_of_its_pictures_and_its_guesses():
    guess, labels = torch.tensor([0, 0, 1, 1, 1, 3, 0]), torch.tensor([0, 0, 0, 1, 2, 2, 2])  # none is of class 3
    scores = losses.class_scores(torch.eye(4)[guess], labels)
    expected = {"recall": [2 / 3, 1, 0], "precision": [2 / 3, 1 / 3, 0], "f1": [2 / 3, 1 / 2, 0]}
    for name, values in expected.items():
        assert scores[name][:3].tolist() == pytest.approx(values) and scores[name][3].isnan()
    assert losses.macro_f1(torch.eye(4)[guess], labels) == pytest.approx((2 / 3 + 1 / 2) / 3)
    assert losses.balanced_accuracy(torch.eye(4)[guess], labels) == pytest.approx((2 / 3 + 1) / 3)


def test_auxiliary_outputs_come_after_the_logits():
    pytest.importorskip("torchvision")
    network = model.create("googlenet", {"classes": 5, "image_size": 32})
    images = torch.rand(2, 3, 32, 32)
    logits, *auxiliary = losses.split_outputs(network.train()(images))
    assert logits.shape == (2, 5) and [other.shape for other in auxiliary] == [(2, 5), (2, 5)]
    assert len(losses.split_outputs(network.eval()(images))) == 1
    assert len(losses.split_outputs(model.create("resnet18", {})(images))) == 1


def test_confusion_is_counted_and_put_into_words():
    shares = torch.eye(3)[torch.tensor([0, 0, 1, 1, 2, 2])]
    counts = losses.confusion_counts(shares, torch.tensor([0, 1, 1, 1, 2, 0]))
    assert counts.tolist() == [[1, 0, 1], [1, 2, 0], [0, 0, 1]] and counts.dtype == torch.int64
    assert losses.worst_pairs(counts, ["cat", "dog", "fox"]) == ["cat taken for fox 50.0%", "dog taken for cat 33.3%"]
    assert losses.worst_pairs(torch.eye(3).long(), ["cat", "dog", "fox"]) == []


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_are_float32_in_any_precision_also_of_no_pictures(kind):
    """The processes of a group add up their losses, and one of them may have no pictures."""
    layer = nn.Linear(4, 3)
    for count in (0, 2):
        with torch.autocast("cpu", torch.bfloat16):
            logits = layer(torch.rand(count, 4))
            loss = losses.loss_function(logits, torch.zeros(count, dtype=torch.int64), kind)
        assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
        loss.backward()
    assert layer.weight.grad is not None

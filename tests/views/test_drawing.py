"""Pictures from tensors: their pixels, colours and captions."""

import numpy as np
import pytest
import torch

from quick.views import drawing


def test_most_mistaken_are_wrong_and_most_confident():
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    assert drawing.most_mistaken(probabilities, torch.tensor([1, 0, 1, 1])).tolist() == [0, 1, 2]
    assert drawing.most_mistaken(probabilities, torch.tensor([1, 0, 1, 1]), 2).tolist() == [0, 1]
    assert drawing.most_mistaken(probabilities, torch.tensor([0, 1, 0, 1])).tolist() == []


@pytest.mark.parametrize("count", [2, 12, 20, 100, 150])
def test_a_confusion_matrix_of_up_to_a_hundred_classes(count):
    torch.manual_seed(0)
    counts = torch.randint(0, 50, (count, count)) + 500 * torch.eye(count).long()
    picture = drawing.confusion_picture(counts, [f"a rather long class name {number}" for number in range(count)])
    assert picture.dtype == np.uint8 and picture.shape[0] == picture.shape[1] < 2500


def test_rows_of_a_confusion_matrix_are_true_classes_and_colours_their_shares():
    picture = drawing.confusion_picture(torch.tensor([[9, 1], [0, 100]]), ["a", "b"]).astype(int)
    first = picture.shape[0] - 44 * 2 - 10
    cells = picture[first + 3 :: 44, first + 3 :: 44][:2, :2]
    assert np.array_equal(cells, drawing.colours(np.array([[0.9, 0.1], [0, 1]])))


def test_of_many_classes_those_with_the_most_mistakes_are_shown():
    counts = 10 * torch.eye(103).long()
    counts[3:, 3:] += 1  # the first three are never mistaken
    names = [f"class {number}" for number in range(103)]
    shown = drawing.confusion_picture(counts, names)
    assert np.array_equal(shown, drawing.confusion_picture(counts[3:, 3:], names[3:]))


def test_captions_distinguish_the_class_from_the_guess():
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    labels, probabilities = torch.tensor([0, 1]), torch.tensor([[0.1, 0.9], [0.2, 0.8]])
    tiles = [drawing.enlarged(picture, drawing.TILE) for picture in drawing.arrays(images)]
    expected = drawing.grid(tiles, ["is cat\n90% dog", "is dog\n80% dog"])
    assert np.array_equal(drawing.mistakes(images, labels, probabilities, ["cat", "dog"]), expected)
    heats = [torch.rand(32, 32), torch.rand(32, 32)]
    salient = [drawing.salient(*pair) for pair in zip(drawing.arrays(images), heats, strict=True)]
    pairs = [np.hstack([tile, drawing.enlarged(heat, drawing.TILE)]) for tile, heat in zip(tiles, salient, strict=True)]
    expected = drawing.grid(pairs, ["dog (is cat)", "dog"], columns=2)
    assert np.array_equal(drawing.saliencies(images, heats, labels, probabilities, ["cat", "dog"]), expected)


def test_samples_keep_their_colours_and_pixels():
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
    picture = drawing.samples(
        colours.view(3, 3, 1, 1).expand(-1, -1, 32, 32), torch.tensor([0, 1, 0]), ["red", "green"]
    )
    assert [picture[50, 4 + 100 * number + 10].tolist() for number in range(3)] == colours.tolist()
    assert (picture[101:115, 4:100] < 128).any() and (picture[0] == 255).all()  # the caption, and the background
    chequered = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    chequered[:, :, ::2, ::2] = 255
    picture = drawing.samples(chequered, torch.tensor([0]), ["a"])
    assert set(np.unique(picture[4:100, 4:100])) == {0, 255}  # enlarged without smoothing


def test_pictures_without_captions_have_no_space_for_them():
    tiles = [np.zeros((10, 10, 3), np.uint8)] * 3
    assert drawing.grid(tiles, columns=2, gap=4).shape == (2 * 14 + 4, 2 * 14 + 4, 3)
    assert drawing.grid(tiles, ["a\nb", "c", "d"], columns=2, gap=4).shape == (2 * (14 + 30) + 4, 2 * 14 + 4, 3)


def test_large_pictures_are_reduced():
    assert drawing.enlarged(np.zeros((224, 224, 3), np.uint8), 96).shape == (96, 96, 3)


def test_colours_go_from_dark_to_bright():
    scale = drawing.colours(np.linspace(0, 1, 50)).astype(int)
    assert (np.diff(scale @ [0.3, 0.59, 0.11]) > 0).all()
    assert drawing.stretch(np.full((2, 2), 3.0)).tolist() == [[0, 0], [0, 0]]


def test_what_does_not_matter_is_darkened():
    picture, heat = np.full((2, 2, 3), 200, np.uint8), torch.tensor([[1.0, 0.25], [0.0, 0.0]])
    shown = drawing.salient(picture, heat)[..., 0]
    assert shown[0, 0] == 200 > shown[0, 1] > shown[1, 0] == 47

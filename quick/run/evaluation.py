"""A network's answers to pictures, in eval mode: one look, or several by test-time augmentation."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quick.cli import progress_bar
from quick.data.pictures import Pictures
from quick.processes import ALONE, Group


@torch.inference_mode()
def outputs(network: nn.Module, batches: Iterable[Tensor], tta: str = "none") -> Tensor:
    """The network's logits for all batches of float images `(N, 3, H, W)`, in eval mode: float32 `(N, classes)`.

    With `tta` they are the mean over several views of each picture, see `mean_of_views`. No pictures give `(0, 0)`.
    """
    training = network.training
    network.eval()
    try:
        logits = [mean_of_views(network, images, tta) for images in batches if len(images)]
    finally:
        network.train(training)
    return torch.cat(logits) if logits else torch.zeros(0, 0)


def outputs_of_set(
    network: nn.Module,
    pictures: Pictures,
    *,
    classes: int,
    group: Group = ALONE,
    tta: str = "none",
    check: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits `(N, classes)` and int64 labels `(N,)` of a whole set, each picture once.

    Each process of a group looks at its shard, and all get all logits. `check` is called before the network gets a
    batch.
    """
    indices, count = [], math.ceil(len(pictures) / (pictures.evaluation_batch * group.size))

    def images() -> Iterator[Tensor]:
        with progress_bar(pictures.split, count, "batches", delay=1) as bar:
            for batch in pictures.evaluation_batches(group):
                if check:
                    check()
                indices.append(batch.indices)
                yield batch.images
                bar.update()

    logits = outputs(network, images(), tta)
    indices = torch.cat(indices)
    logits = logits.to(pictures.labels.device).view(len(indices), classes)
    return group.assemble(logits, indices, len(pictures)), pictures.labels


def mean_of_views(network: nn.Module, images: Tensor, tta: str = "none") -> Tensor:
    """Float32 logits `(N, classes)` of images `(N, 3, H, W)`, by test-time augmentation.

    `none` looks once. `mirror` takes the mean over a picture and its mirror image. `shift` takes half of that, and half
    of the same for the picture moved by a pixel up and left, and down and right, after airbench (Jordan 2024,
    arxiv.org/abs/2404.00498).
    """
    if tta == "none":
        return network(images).float()
    logits = (network(images).float() + network(images.flip(3)).float()) / 2
    if tta == "shift":
        padded, (height, width) = F.pad(images, (1,) * 4, "reflect"), images.shape[2:]
        moved = padded[:, :, 2:, 2:], padded[:, :, :height, :width]
        logits = logits / 2 + sum(mean_of_views(network, views, "mirror") for views in moved) / 4
    return logits

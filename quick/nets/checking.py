"""Whether a network can work on pictures of a size, found out without computing anything but shapes."""

from collections.abc import Callable

import torch
from torch import nn

from quick.errors import NetworkError, reason

LARGEST_TRIED = 512  # pixels of the side: up to this a picture costs less than the start of "meta", 1.5 seconds
SIZES_TO_TRY = (64, 128, 224, 299, 384, 512)  # in pixels, when a network cannot work on smaller pictures


def check_network(
    create: Callable[[str, dict], nn.Module], name: str, options: dict, batch_size: int = 2, training: bool = True
) -> None:
    """Raise NetworkError if a network cannot train on pictures of the `image_size` in `options`.

    `create` is model.py's `create_empty`. The message names the size that would do. Without `training` the network is
    only asked to evaluate them, as a frozen one does.
    """

    def error_at(side: int) -> str | None:
        try:
            network = create(name, options | {"image_size": side}).to("meta")  # only shapes, nothing is computed
            network.train(training)(torch.zeros(min(batch_size, 2), 3, side, side, device="meta"))
        except NetworkError:
            raise
        except Exception as error:  # each network has its own way to fail
            return reason(error, 100)
        return None

    side = options["image_size"]
    why = error_at(side)
    if not why:
        return
    good = next((larger for larger in SIZES_TO_TRY if larger > side and not error_at(larger)), None)
    if good is None:
        raise NetworkError(f"{name} cannot train on {batch_size} pictures of {side} x {side} pixels a step: {why}")
    bad = side
    while good - bad > 1:  # the smallest size that works, by bisection
        middle = (bad + good) // 2
        if error_at(middle):
            bad = middle
        else:
            good = middle
    raise NetworkError(f"{name} cannot train on pictures of {side} x {side} pixels ({why}); add --image-size {good}")


def check_loaded(network: nn.Module, image_size: int, classes: int) -> None:
    """Raise ValueError unless a network, in eval mode, gives so many logits for a black picture, and finite ones.

    A small file could ask for very large pictures. Of one above LARGEST_TRIED only shapes are computed, and the weights
    must be finite. What layers raise for pictures of this size goes on.
    """
    picture, device = (1, 3, image_size, image_size), next(network.parameters()).device
    with torch.no_grad():
        if image_size > LARGEST_TRIED:
            weights = dict(network.named_parameters()) | dict(network.named_buffers())
            shapes = {name: torch.empty_like(value, device="meta") for name, value in weights.items()}
            try:
                logits = torch.func.functional_call(network, shapes, torch.empty(picture, device="meta"))
            except Exception as error:
                if "meta" not in str(error).lower():
                    raise
                logits = network(torch.zeros(picture, device=device))  # one of yours, which looks at values
            edges = [torch.stack(value.aminmax()) for value in weights.values() if value.numel()]
        else:
            logits = network(torch.zeros(picture, device=device))
            edges = [logits]
    if logits.shape != (1, classes):
        raise ValueError(f"{classes} classes, but {logits.shape[-1]} outputs")
    if not all(values.isfinite().all() for values in edges):
        raise ValueError("its answers are not finite numbers")

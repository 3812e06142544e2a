"""Whether a network can work on pictures of a size, found out without computing anything."""

from collections.abc import Callable

import torch
from torch import nn

from quick.errors import NetworkError, reason

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

"""What several tests make: checkpoints of networks that were never trained, and what a training step needs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quick.checkpoints import FORMAT
from quick.data.pictures import Batch
from quick.processes import ALONE
from quick.run.optimizers import make_optimizer
from quick.run.settings import Config
from quick.run.state import TrainState, make_state


def a_checkpoint(network: nn.Module, name: str = "cifar_quick", **options: object) -> dict:
    """The content of a checkpoint; `options` are those that the network was made with, `classes` among them."""
    side = options.get("image_size", 32)
    return {
        "format": FORMAT,
        "model": {"name": name, "options": options},
        "classes": [f"class {number}" for number in range(options["classes"])],
        "image_size": side,
        "resize": side,
        "interpolation": "bilinear",
        "fit": "crop",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
        "levels": None,
        "state_dict": network.state_dict(),
        "epoch": 1,
        "metrics": {},
        "config": {},
    }


def a_state(
    network: nn.Module, config: Config, head: Sequence[str] = (), steps: int = 10, labels: Tensor | None = None
) -> TrainState:
    """The state of a run of so many steps, on pictures of these labels, that has just begun: on the CPU, in float32."""
    labels = torch.arange(100) % 2 if labels is None else labels
    optimizer = make_optimizer(network, head, config, torch.float32)
    state = make_state(network, network, optimizer, config, torch.float32, ALONE, labels=labels)
    state.total_steps = steps
    return state


def a_batch(images: Tensor, labels: Tensor, pieces: int = 1) -> Batch:
    """A whole batch, to be worked on in so many pieces."""
    indices = torch.arange(len(labels))
    return Batch(images, labels, indices, len(labels), [len(part) for part in indices.tensor_split(pieces)])

"""Transfer learning: pretrained weights in a network, a new head, stages, freezing, training only the head."""

import re
from collections import OrderedDict
from collections.abc import Collection

import torch
from torch import Tensor, nn

from quick.errors import CheckpointError, NetworkError
from quick.nets.losses import split_outputs

FEWEST_STAGES = 4  # a network with fewer parts than this has its largest part divided
AUXILIARY = re.compile(r"(network\.)?(aux\d|AuxLogits)\b")  # what GoogLeNet and Inception call auxiliary classifiers


class Appended(nn.Module):
    """A whole network with a linear layer behind its outputs, as the tutorial adds one to VGG16's 1,000 outputs.

    Takes float images `(N, 3, H, W)`, returns float logits `(N, classes)`. The network loses its auxiliary classifiers:
    they know nothing of the new classes, and no loss would reach their weights.
    """

    def __init__(self, network: nn.Module, outputs: int, classes: int):
        super().__init__()
        if hasattr(network, "aux_logits"):  # GoogLeNet and Inception; they run no part that is None
            network.aux_logits = False
            for name in [name for name, _ in network.named_children() if AUXILIARY.match(name)]:
                setattr(network, name, None)
        self.network = network
        self.head = nn.Linear(outputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(split_outputs(self.network(images))[0])


# ---- trained weights -------------------------------------------------------------------------------------------------


def transfer_weights(network: nn.Module, state_dict: dict, new: Collection[str], source: str) -> None:
    """Put trained weights into a network; the weights named in `new` stay as they are.

    Raises CheckpointError, which names the `source`, when the weights do not fit; the network is then unchanged.
    """
    own = network.state_dict()
    content = OrderedDict(state_dict) | {key: own[key] for key in new}
    drop_auxiliary(content, own)
    if misfit := misfits(own, content):
        raise CheckpointError(f"{source}: its weights do not fit the network: {misfit}")
    # The versions of layers; some layers read theirs. A plain dict has none: complete, it is as one of today.
    versions = getattr(state_dict, "_metadata", None)
    content._metadata = versions or (own._metadata if own.keys() <= content.keys() else None)
    network.load_state_dict(content)


def drop_auxiliary(given: dict, wanted: dict) -> None:
    """Delete auxiliary classifiers' weights that are not `wanted` from the state_dict `given`.

    Published networks have them, and so have networks with an appended head that earlier versions saved.
    """
    for key in [key for key in given if key not in wanted and AUXILIARY.match(key)]:
        del given[key]


def misfits(wanted: dict, given: dict) -> str:
    """What is missing, unexpected or of another shape or type in the state_dict `given`, in words; empty if all fits.

    It is computed here, as `load_state_dict(strict=False)` tells only after it has changed the network.
    """
    # Before PyTorch 0.4.1 batch normalisation did not count its batches; nothing here uses the count.
    missing = [key for key in wanted if key not in given and "num_batches_tracked" not in key]
    unexpected = [key for key in given if key not in wanted]
    wrong_shape = [
        f"{key} {list(given[key].shape)} in place of {list(wanted[key].shape)}"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape
    ]
    wrong_type = [
        f"{key} {given[key].dtype}"
        for key in wanted
        if key in given and given[key].is_floating_point() != wanted[key].is_floating_point()
    ]
    parts = []
    found = {"missing": missing, "unexpected": unexpected, "wrong shape": wrong_shape, "wrong type": wrong_type}
    for what, names in found.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{what}: {', '.join(names[:3])}{more}")
    return "; ".join(parts)


# ---- stages and freezing ---------------------------------------------------------------------------------------------


def stages(network: nn.Module, head: Collection[str]) -> dict[str, int]:
    """The stage of each parameter by its name, in the network's order: 1, 2, 3 ...; 0 for the `head`'s parameters.

    A stage is a direct part of the network. As long as there are fewer than FEWEST_STAGES parts, the largest is
    replaced by its own parts. A normalisation layer belongs to the stage before it; parameters outside of all parts
    (ViT's class token) belong to the first stage. Below an appended head the stages are those of the network without
    it, and its old head is one stage more.
    """
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters() if name not in head}

    def size(part: str) -> int:
        return sum(count for name, count in sizes.items() if name.startswith(f"{part}."))

    def parts_of(part: str) -> list[str]:
        names = [name for name, _ in network.get_submodule(part).named_children()]
        children = [f"{part}.{name}" if part else name for name in names]
        return [child for child in children if size(child)]

    parts, fewest = parts_of(""), FEWEST_STAGES + isinstance(network, Appended)
    while len(parts) < fewest:
        divisible = [part for part in parts if parts_of(part)]
        if not divisible:
            break
        place = parts.index(max(divisible, key=size))
        parts[place : place + 1] = parts_of(parts[place])

    stage_of = dict.fromkeys(sizes, 1) | dict.fromkeys(head, 0)
    stage = 0
    for part in parts:
        names = [name for name in sizes if name.startswith(f"{part}.")]
        only_normalises = all(network.get_parameter(name).ndim <= 1 for name in names)
        if stage == 0 or not only_normalises:
            stage += 1
        stage_of |= dict.fromkeys(names, stage)
    return stage_of


def freeze(network: nn.Module, head: list[str], count: int | None) -> None:
    """Freeze the first `count` stages, or all but the last layer (None): their weights get no gradients.

    `head` names the head's parameters, those of the last layer at the end. With None, auxiliary classifiers are frozen
    as well, since they serve the layers before them. Raises NetworkError if there are fewer stages.
    """
    stage_of = stages(network, head)
    last_layer = head[-1].rpartition(".")[0]
    if count is not None and count > max(stage_of.values()):
        raise NetworkError(f"--freeze {count}: there are {max(stage_of.values())} stages before the head")
    for name, parameter in network.named_parameters():
        if count is None:
            parameter.requires_grad_(name.rpartition(".")[0] == last_layer)
        else:
            parameter.requires_grad_(not 0 < stage_of[name] <= count)


def train_mode(network: nn.Module) -> None:
    """Put the network into training mode, but its frozen layers into eval mode.

    So frozen batch normalisation keeps its averages. Layers without weights, such as dropout, count as frozen when they
    stand before the first layer that trains.
    """
    network.train()
    all_frozen_so_far = True
    for module in network.modules():
        parameters, is_leaf = list(module.parameters()), not list(module.children())
        if any(parameter.requires_grad for parameter in parameters):
            if is_leaf:
                all_frozen_so_far = False
        elif parameters or (is_leaf and all_frozen_so_far):
            module.eval()


class HeadReached(Exception):
    """Ends a forward pass before the head, whose inputs are its value."""


class HeadOnly(nn.Module):
    """A network of which only the last layer trains: all before it runs in eval mode and without gradients.

    Takes float images `(N, 3, H, W)`, returns float logits `(N, classes)`. Raises NetworkError for a network that goes
    on behind its last layer with more than the Sequential around it.
    """

    def __init__(self, network: nn.Module, head: list[str], image_size: int):
        super().__init__()
        place, _, name = head[-1].rpartition(".")[0].rpartition(".")
        around = network.get_submodule(place)
        self.network, self.head = network, around.get_submodule(name)
        last_layers = [self.head]
        if isinstance(around, nn.Sequential):  # it goes on: SqueezeNet's averages its outputs over the picture
            names = [child for child, _ in around.named_children()]
            last_layers = around[names.index(name) :]
        self.tail = nn.Sequential(*last_layers, nn.Flatten())
        self.eval()
        image = torch.zeros(1, 3, image_size, image_size, device=self.head.weight.device)
        with torch.autocast(image.device.type, enabled=False):
            same = torch.allclose(self(image), network(image), atol=1e-4, equal_nan=True)
        if not same:
            raise NetworkError("--freeze all: this network goes on behind its last layer; freeze a number of stages")

    def train(self, mode: bool = True) -> "HeadOnly":
        super().train(mode)
        self.network.eval()
        self.tail.train(mode)
        return self

    def features(self, images: Tensor) -> Tensor:
        """The head's inputs for images `(N, 3, H, W)`: float `(N, ...)`, of the shape that the head takes."""

        def leave(_: nn.Module, inputs: tuple[Tensor]) -> None:
            raise HeadReached(inputs[0])

        # The head itself must not run: autocast of PyTorch 2.10 would remember its weights in the lower precision as
        # they are without gradients, and use these where the head trains.
        try:
            with self.head.register_forward_pre_hook(leave), torch.no_grad():
                self.network(images)
        except HeadReached as reached:
            return reached.args[0]

    def forward(self, images: Tensor) -> Tensor:
        return self.tail(self.features(images))

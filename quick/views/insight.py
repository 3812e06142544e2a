"""What happens inside a network: its filters, its layers' outputs, and where in a picture it looks."""

import numpy as np
import torch
from torch import Tensor, nn

from quick.nets.summary import watched
from quick.views import drawing


def filters(network: nn.Module, most: int = 64) -> np.ndarray:
    """The first filters of the first convolution, at most `most`, as a picture; grey is zero, or no finite number.

    They are in colour if the convolution sees three channels.
    """
    convolution = next((layer for layer in network.modules() if isinstance(layer, nn.Conv2d)), None)
    if convolution is None:
        return drawing.note_picture("no convolution")
    weight = convolution.weight.detach()[:most].float().cpu().nan_to_num(0, 0, 0)
    if weight.shape[1] != 3:
        weight = weight.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    largest = weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    pictures = drawing.arrays(((weight / largest + 1) * 127.5).round().byte())
    return drawing.grid([drawing.enlarged(picture, 48) for picture in pictures], columns=16)


def leaves(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that have no layers inside, with their names."""
    return [(name, layer) for name, layer in network.named_modules() if not list(layer.children())]


def layer_maps(network: nn.Module, image: Tensor, most: int = 24) -> dict[str, Tensor]:
    """The outputs of layers for one image, float `(1, 3, H, W)`: maps `(C, H, W)`, float32 on the CPU, by layer name.

    Of more than `most` layers it takes some at even distances.
    """
    # clone(): an in-place ReLU may follow and change the output.
    with watched(leaves(network), lambda output: output.clone()) as seen, torch.no_grad():
        network(image)
    maps = {name: output[0].float().cpu() for name, output in seen.items() if output.ndim == 4 and output.shape[-1] > 1}
    names = list(maps)
    shown = np.linspace(0, len(names) - 1, min(most, len(names))).round().astype(int)
    return {names[index]: maps[names[index]] for index in shown}


def features(maps: Tensor, most: int = 32) -> np.ndarray:
    """A layer's maps, float `(C, H, W)`, as tiles, at most `most`; all share one scale from dark (low) to bright."""
    pictures = drawing.colours(drawing.stretch(maps[:most].numpy()))
    return drawing.grid([drawing.enlarged(picture, 64) for picture in pictures], columns=8)


def saliency(network: nn.Module, image: Tensor) -> Tensor:
    """Which pixels of an image, float `(1, 3, H, W)`, the answer depends on: float32 `(H, W)` in [0, 1], on the CPU.

    Grad-CAM (Selvaraju et al. 2017, arxiv.org/abs/1610.02391) at the last layer whose output is a map of at least 4x4
    pixels. If there is no such layer, or nothing in its map speaks for the answer: the absolute gradient of the input
    (Simonyan et al. 2014, arxiv.org/abs/1312.6034).
    """
    image = image.detach().clone().requires_grad_(True)
    with watched(leaves(network), lambda output: output) as seen, torch.enable_grad():
        logit = network(image)[0].max()
    maps = [output for output in seen.values() if is_map(output)]
    of_image, *of_map = torch.autograd.grad(logit, [image, *maps[-1:]])
    heat = of_image.abs().amax(1, keepdim=True)
    if of_map:
        weights = of_map[0].mean((2, 3), keepdim=True)
        speaks_for_it = (weights * maps[-1]).sum(1, keepdim=True).relu()
        heat = speaks_for_it if speaks_for_it.any() else heat
    heat = heat.detach().float().nan_to_num(0, 0, 0)  # gradients can overflow where the outputs do not
    heat = nn.functional.interpolate(heat, image.shape[2:], mode="bilinear")[0, 0].cpu()
    return heat / heat.max().clamp(min=1e-12)


def is_map(output: object) -> bool:
    """Whether a layer's output is a map of at least 4x4 pixels that has a gradient."""
    return isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) >= 4 and output.requires_grad

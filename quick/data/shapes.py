"""Ten shapes, drawn by the program: a data set that needs no download, the same on every machine."""

import numpy as np
import torch

from quick.data.batching import balanced
from quick.data.pictures import Pictures
from quick.data.stores import InMemory

CLASSES = ["arrow", "circle", "cross", "heart", "hourglass", "moon", "ring", "square", "star", "triangle"]
STATISTICS = (0.4948, 0.4969, 0.4979), (0.2768, 0.2765, 0.2755)  # mean and std of the 5,000 training pictures


def shapes(split: str, count: int = 0, side: int = 32, limit: int = 0) -> Pictures:
    """Drawn pictures of ten shapes, which vary in all but the shape: the `train` set has 5,000, the `test` set 1,000.

    `count` and `side` ask for another number and size, in pixels. A `limit` above 0 takes as many of them, with all
    classes even, and draws no more than that needs; raises LimitError for a `limit` below 10.

    Only a frozen random stream and arithmetic that IEEE 754 fixes to the bit (no sine, no power) are used, so that
    every machine draws the same pictures.
    """
    random = np.random.RandomState(["train", "test"].index(split))  # numpy never changes this stream (NEP 19)
    labels = random.permutation(np.arange(count or {"train": 5000, "test": 1000}[split]) % len(CLASSES))
    chosen, chunk = np.arange(len(labels)), 500
    if limit:
        chosen = balanced(torch.from_numpy(labels), CLASSES, limit).numpy()
        labels = labels[: chunk * (chosen.max() // chunk + 1)]
    chunks = [draw_shapes(labels[start : start + chunk], random, side) for start in range(0, len(labels), chunk)]
    images = torch.from_numpy(np.concatenate(chunks)[chosen]).permute(0, 3, 1, 2).contiguous()
    return Pictures(InMemory(images), torch.from_numpy(labels[chosen]).long(), CLASSES, split, *STATISTICS)


def draw_shapes(labels: np.ndarray, random: np.random.RandomState, side: int) -> np.ndarray:
    """Draw the shapes with these labels: uint8 pictures `(N, side, side, 3)`."""
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return low + (high - low) * random.random_sample((count, *shape))

    def place(size: np.ndarray, span: float) -> tuple[np.ndarray, np.ndarray]:
        """Where every pixel (4 samples each) lies as a turned and shifted object of this size sees it."""
        tangent = uniform(-1, 1, 1, 1)  # of half the angle, up to 90 degrees, without sine and cosine
        cosine, sine = (1 - tangent * tangent) / (1 + tangent * tangent), 2 * tangent / (1 + tangent * tangent)
        grid = (np.arange(2 * side) + 0.5) / side - 1
        x, y = grid - uniform(-span, span, 1, 1), grid[:, None] - uniform(-span, span, 1, 1)
        return (cosine * x + sine * y) / size, (cosine * y - sine * x) / size

    def paint(canvas: np.ndarray, inside: np.ndarray, colour: np.ndarray) -> np.ndarray:
        cover = inside.reshape(count, side, 2, side, 2).sum((2, 4), dtype=np.int64)[..., None] / 4
        return canvas + cover * (colour - canvas)

    back = uniform(0, 255, 1, 1, 3)
    slope = uniform(-40, 40, 1, 1, 3) * np.linspace(-1, 1, side)[:, None]
    canvas = back + (slope if random.randint(2) else slope.swapaxes(1, 2))
    for _ in range(2):  # clutter: bars of any colour behind the shape
        x, y = place(uniform(0.1, 0.4, 1, 1), 1.0)
        canvas = paint(canvas, (abs(x) < 1) & (abs(y) < 0.3), uniform(0, 255, 1, 1, 3))
    colour = back + np.where(back < 128, 1, -1) * uniform(60, 127, 1, 1, 3)  # always unlike the background
    upside_down = np.where(uniform(0, 1, 1, 1) < 0.5, -1, 1)
    x, y = place(upside_down * uniform(0.45, 0.75, 1, 1), 0.25)
    inside = np.zeros(x.shape, bool)
    for label in np.unique(labels):
        chosen = labels == label
        inside[chosen] = SHAPE_OF[CLASSES[label]](x[chosen], y[chosen])
    canvas = paint(canvas, inside, colour)
    noise = sum(random.random_sample(canvas.shape) for _ in range(3)) - 1.5
    return (canvas + uniform(5, 25, 1, 1, 1) * noise).clip(0, 255).astype(np.uint8)


def star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five lines make a pentagram: the star is where at most one of them is crossed."""
    normals = [(0.0, 1.0), (0.951, 0.309), (0.588, -0.809), (-0.588, -0.809), (-0.951, 0.309)]
    return sum((a * x + b * y < 0.36).astype(np.int64) for a, b in normals) >= 4


SHAPE_OF = {  # bool functions of x (to the right) and y (down), about within the unit circle
    "arrow": lambda x, y: (abs(y) < 0.25) & (abs(x) < 0.9) & (x < 0.2) | (x > 0.0) & (abs(y) < (1 - x) * 0.8),
    "circle": lambda x, y: x * x + y * y < 0.8,
    "cross": lambda x, y: (abs(x) < 0.28) & (abs(y) < 0.95) | (abs(y) < 0.28) & (abs(x) < 0.95),
    "heart": lambda x, y: x * x + (y + 0.7 * abs(x) - 0.2) * (y + 0.7 * abs(x) - 0.2) < 0.65,
    "hourglass": lambda x, y: (abs(x) < abs(y) * 0.8 + 0.05) & (abs(y) < 0.9),
    "moon": lambda x, y: (x * x + y * y < 0.9) & ((x - 0.45) * (x - 0.45) + y * y > 0.6),
    "ring": lambda x, y: (x * x + y * y < 0.9) & (x * x + y * y > 0.36),
    "square": lambda x, y: (abs(x) < 0.75) & (abs(y) < 0.75),
    "star": star,
    "triangle": lambda x, y: (y < 0.6) & (y > 1.75 * abs(x) - 0.95),
}

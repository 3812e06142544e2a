"""Draws accuracy over time, from what `benchmarks/race.py --curves FILE` wrote, as an SVG picture.

`python benchmarks/picture.py race.json docs/race.svg`
"""

import json
import math
import statistics
import sys
from html import escape
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 760, 490, 60, 120, 20, 20
COLOURS = ["#00224e", "#c44536", "#2a9d8f", "#e9a100", "#7b2d8b", "#707173"]
TITLES = {
    "tutorial": "the tutorial's loop",
    "airbench-plain": "airbench94, half width, float32",
    "airbench": "the same, tuned as ours",
    "default": "cifar_quick.toml",
    "fast": "fast.toml",
    "fast-short": "fast.toml, 6 epochs",
}
SECONDS = [5, 10, 20, 50, 100, 200, 500, 1000]


def mean(curves: list[list[list[float]]]) -> list[tuple[float, float]]:
    """The mean of several trainings of one kind, epoch by epoch: (seconds, accuracy)."""
    return [tuple(map(statistics.mean, zip(*points, strict=True))) for points in zip(*curves, strict=True)]


def draw(curves: dict[str, list]) -> str:
    lines = {name: mean(found) for name, found in curves.items()}
    points = [point for line in lines.values() for point in line]
    first, last = (math.log(of(seconds for seconds, _ in points)) for of in (min, max))
    low, high = math.floor(20 * min(share for _, share in points)) / 20, 0.95

    def x(seconds: float) -> float:
        return LEFT + (math.log(seconds) - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(share: float) -> float:
        return HEIGHT - BOTTOM - (share - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    def text(across: float, down: float, words: str, anchor: str = "middle") -> str:
        return f'<text x="{across:.0f}" y="{down:.0f}" text-anchor="{anchor}">{escape(words)}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for share in (place / 20 for place in range(round(20 * low), round(20 * high) + 1)):
        parts.append(f'<path d="M{LEFT} {y(share):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(text(LEFT - 8, y(share) + 4, f"{share:.0%}", "end"))
    for seconds in (place for place in SECONDS if first <= math.log(place) <= last):
        parts.append(f'<path d="M{x(seconds):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#ddd"/>')
        parts.append(text(x(seconds), HEIGHT - BOTTOM + 18, f"{seconds} s"))
    parts.append(text((LEFT + WIDTH) / 2, HEIGHT - BOTTOM + 38, "seconds of training (logarithmic)"))
    for place, (name, line) in enumerate(lines.items()):
        colour = COLOURS[place % len(COLOURS)]
        path = "L".join(f"{x(seconds):.1f} {y(share):.1f}" for seconds, share in line)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        parts += [f'<circle cx="{x(s):.1f}" cy="{y(share):.1f}" r="3" fill="{colour}"/>' for s, share in line]
        across, down = LEFT + (WIDTH - LEFT) / 2 * (place % 2), HEIGHT - BOTTOM + 62 + 20 * (place // 2)
        parts.append(f'<path d="M{across} {down}h24" stroke="{colour}" stroke-width="3"/>')
        words = f"{TITLES.get(name, name)}: {line[-1][1]:.1%} in {line[-1][0]:.0f} s"
        parts.append(text(across + 32, down + 4, words, "start"))
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(draw(json.loads(Path(sys.argv[1]).read_text())))

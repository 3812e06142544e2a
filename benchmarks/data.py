"""How fast pictures become batches, each part against the plain way, in turn and in one process.

`python benchmarks/data.py folder FOLDER`   files of a picture folder, against PIL's open and convert in a loop
`python benchmarks/data.py archive DIR`     CIFAR-10's official files under DIR, against pickle.load
`python benchmarks/data.py stream`          256x256 JPEGs, against the same workers doing nothing but decode and resize
`python benchmarks/data.py cache`           an epoch of 512x384 JPEGs with --cache, against one without
`python benchmarks/data.py memory`          the memory that streaming takes, epoch by epoch
The last three make their pictures in a temporary folder. `--quick` ends each in less than a minute.
"""

import argparse
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from PIL import Image

import datasets
from quick.data.augment import Augment
from quick.data.listing import find_files
from quick.data.streaming import decoder


def compare(plain: Callable[[], object], ours: Callable[[], object], rounds: int) -> None:
    """Run both in turn; print their median seconds and the median of the ratios."""
    pairs = []
    for _ in range(rounds):
        seconds = []
        for side in (plain, ours):
            start = time.perf_counter()
            side()
            seconds.append(time.perf_counter() - start)
        pairs.append(seconds)
    first, second = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(ours / plain for plain, ours in pairs)
    print(f"plain {first:.2f} s, ours {second:.2f} s, ratio {ratio:.3f} (median of {rounds})")


def folder(root: Path, rounds: int) -> None:
    found = find_files(root, ["train", "test"], 0.2)
    paths = [path for listing in found.values() for path, _ in listing.files]

    def plain() -> None:
        for path in paths:
            Image.open(path).convert("RGB")

    print(f"{len(paths):,} files of {root}:", end=" ")
    compare(plain, lambda: datasets.load(str(root)), rounds)


def archive(root: Path, rounds: int) -> None:
    names = [*(f"data_batch_{part}" for part in range(1, 6)), "test_batch"]

    def plain() -> None:
        for name in names:
            with (root / "cifar-10-batches-py" / name).open("rb") as file:
                pickle.load(file, encoding="latin1")

    datasets.load("cifar10", root)  # unpacks it, once
    print(f"CIFAR-10's batches under {root}:", end=" ")
    compare(plain, lambda: datasets.load("cifar10", root), rounds)


def make_photographs(root: Path, count: int, size: tuple[int, int]) -> None:
    """Smooth random JPEGs of (width, height) `size` in two classes, about as large as photographs of that size."""
    random = np.random.RandomState(0)
    for split, part in (("train", count), ("test", 100)):
        for number in range(part):
            pixels = random.randint(0, 256, (24, 24, 3)).astype(np.uint8)
            path = root / split / "ab"[number % 2] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)


def stream(root: Path, rounds: int, image_size: int = 224) -> None:
    [train_set] = datasets.load(str(root), image_size=image_size, memory_share=0, splits=["train"])
    plan = [list(range(start, min(start + 64, len(train_set)))) for start in range(0, len(train_set), 64)]
    store = train_set.store
    bare = decoder(store.files, plan, store.workers, torch.device("cpu"))
    indices = [torch.tensor(rows) for rows in plan]
    augment = Augment(flip=True, crop=8)
    sides = {
        "bytes on the device": lambda: sum(len(images) for images in store.read(indices, None)),
        "normalised batches": lambda: sum(len(batch.labels) for batch in train_set.batches(64)),
        "flipped and cropped": lambda: sum(len(batch.labels) for batch in train_set.batches(64, augment=augment)),
    }
    print(f"{len(train_set):,} JPEGs of 256x256, resized to {image_size} by {store.workers} workers")
    for name, ours in sides.items():
        print(f"{name:20}", end=" ")
        compare(lambda: sum(len(decoded.extent) for decoded in bare), ours, rounds)


def cache(root: Path, rounds: int) -> None:
    plain, ours = (
        datasets.load(str(root), image_size=224, memory_share=0, splits=["train"], cache=kept)[0]
        for kept in (False, True)
    )
    print(f"{len(plain):,} JPEGs of 512x384, an epoch's batches of 64:", end=" ")
    compare(
        lambda: sum(len(batch.labels) for batch in plain.batches(64, shuffle=True)),
        lambda: sum(len(batch.labels) for batch in ours.batches(64, shuffle=True)),
        rounds,
    )


def memory(root: Path, rounds: int) -> None:
    """Resident memory (less what is shared) of this process and its workers after each epoch."""
    import os

    def resident() -> float:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        status = [Path(f"/proc/{pid}/smaps_rollup").read_text().split() for pid in ["self", *children]]
        return sum(int(words[words.index("Pss:") + 1]) for words in status) / 1024

    before = resident()
    [train_set] = datasets.load(str(root), image_size=224, memory_share=0, splits=["train"])
    print(f"{len(train_set):,} JPEGs of 256x256: {before:.0f} MiB before, {resident():.0f} after checking", end="")
    for epoch in range(rounds):
        for _ in train_set.batches(64, shuffle=True, epoch=epoch):
            pass
        print(f", {resident():.0f} after epoch {epoch + 1}", end="", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["folder", "archive", "stream", "cache", "memory"])
    parser.add_argument("root", nargs="?", type=Path, help="the folder, for the first two")
    parser.add_argument("--pictures", type=int, default=20_000, help="for the last three (default: 20000)")
    parser.add_argument("--quick", action="store_true", help="fewer pictures and rounds")
    args = parser.parse_args()
    rounds = 2 if args.quick else 5
    if args.part in ("folder", "archive"):
        {"folder": folder, "archive": archive}[args.part](args.root, rounds)
        return
    with tempfile.TemporaryDirectory() as root:
        size = (512, 384) if args.part == "cache" else (256, 256)
        make_photographs(Path(root), 2000 if args.quick else args.pictures, size)
        {"stream": stream, "cache": cache, "memory": memory}[args.part](Path(root), rounds)


if __name__ == "__main__":
    main()

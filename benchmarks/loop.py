"""What the training loop adds to the bare step: an epoch of train.py against forward, backward and SGD on one batch.

`python benchmarks/loop.py` runs both in turn, in one process, and prints the ratio of their medians. `--quick` ends in
less than a minute.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import datasets
import model
import train
from device import autocast, memory_format, pick, pick_precision, tune


class NoWriter:
    """Stands in for TensorBoard's writer, whose cost is counted in steps of a hundred and is next to nothing."""

    def add_scalar(self, *_: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="of both sides, in turn (default: 15)")
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    args, flags = parser.parse_known_args()

    config, _ = train.resolve(train.parse([*flags, "--data", "shapes"]))
    device = pick(config.device)
    precision = pick_precision(config.precision, device)
    tune(device)
    [train_set] = datasets.load("shapes", device=device, splits=["train"])
    steps = train_set.steps(config.batch_size)

    def new_trainer() -> train.Trainer:
        network = model.create(config.model, train.network_options(config, len(train_set.classes)))
        network = network.to(device, memory_format=memory_format(device)).train()
        return train.make_trainer(network, config, 10**6, device, precision)

    ours, bare = new_trainer(), new_trainer()
    images, labels = next(train_set.batches(config.batch_size))

    def bare_step() -> None:
        with autocast(device, precision):
            logits = bare.forward(images)
            loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        loss.backward()
        bare.optimizer.step()
        bare.optimizer.zero_grad(set_to_none=True)

    times = {"train.py's epoch": [], "bare steps": []}
    for number in range(3 if args.quick else args.rounds):
        start = time.perf_counter()
        train.train_epoch(ours, train_set, config, number + 1, NoWriter())
        middle = time.perf_counter()
        for _ in range(steps):
            bare_step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number:  # the first round warms up
            times["train.py's epoch"].append(middle - start)
            times["bare steps"].append(time.perf_counter() - middle)
    for name, seconds in times.items():
        print(f"{name:18} {1000 * statistics.median(seconds) / steps:7.2f} ms a step of {config.batch_size} pictures")
    loop, step = map(statistics.median, times.values())
    print(f"{'ratio':18} {loop / step:7.3f}")


if __name__ == "__main__":
    main()

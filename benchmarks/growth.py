"""How a run grows: time an epoch by pictures, memory by epochs, pictures a second by threads.

`python benchmarks/growth.py --data data/cifar10` trains the default network on 10,000, 20,000 and 40,000 pictures; then
20 epochs on 10,000, with the memory in use after the first and the last; then with each number of threads. `--quick`
takes a tenth of the pictures.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import datasets
import model
from device import memory_format, pick, pick_precision, tune
from quick.data.pictures import Pictures
from quick.processes import ALONE
from quick.run.config import resolve
from quick.run.optimizers import make_optimizer
from quick.run.state import make_state
from quick.run.stopping import StopVote
from quick.views.tensorboard import NoBoard
from train import parse_train, train_epoch


def resident() -> float:
    """MiB of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="cifar10 or a folder with its pictures")
    parser.add_argument("--quick", action="store_true", help="a tenth of the pictures")
    args, flags = parser.parse_known_args()
    config = resolve(parse_train([*flags, "--data", args.data])[0], pretrained=None)
    device = pick(config.device)
    tune(device)
    [pictures] = datasets.load(args.data, device=device, splits=["train"])
    pictures = pictures.take(torch.randperm(len(pictures))[: 4000 if args.quick else 40_000])
    options = model.config_options(config, 10)
    network = model.create(config.model, options).to(device, memory_format=memory_format(device))
    head, precision = model.head_keys(config.model, options), pick_precision(config.precision, device)
    optimizer = make_optimizer(network, head, config, precision)
    state = make_state(network, network, optimizer, config, precision, ALONE, labels=pictures.labels)
    state.total_steps = 10**6

    def train(part: Pictures, epoch: int) -> float:
        state.epoch, state.totals, state.pictures = epoch, None, len(part)
        return train_epoch(state, part, config, NoBoard(), StopVote(ALONE, 0, 0))["epoch_seconds"]

    def seconds(part: Pictures, epochs: int = 3) -> float:
        return statistics.median(train(part, epoch) for epoch in range(epochs))

    parts = {count: pictures.take(torch.arange(count)) for count in (len(pictures) // by for by in (4, 2, 1))}
    seconds(parts[min(parts)])  # warms up
    for count, part in parts.items():
        took = seconds(part)
        print(f"{count:6,} pictures: {took:6.2f} s an epoch, {1e6 * took / count:6.1f} us a picture", flush=True)
    part, after = parts[min(parts)], []
    for epoch in range(20):
        train(part, epoch)
        after.append(resident())
    print(f"memory: {after[0]:,.1f} MiB after epoch 1, {after[-1]:,.1f} after epoch 20, at most {max(after):,.1f}")
    for threads in range(1, torch.get_num_threads() + 1):
        torch.set_num_threads(threads)
        seconds(part, 1)
        print(f"{threads} thread{'s' * (threads > 1)}: {len(part) / seconds(part):8,.0f} images/s", flush=True)


if __name__ == "__main__":
    main()

"""What a training step of VGG16 (or another network of torchvision) costs, whole and with `--freeze all`.

`python benchmarks/freeze.py` trains on batches of random pictures in three ways, each in a process of its own, and
prints the time a step, the peak memory, and their ratios to the whole training.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import model
from device import memory_format, pick, pick_precision, seed, tune
from quick.data.pictures import Batch
from quick.nets.transfer import HeadOnly, freeze, train_mode
from quick.processes import ALONE
from quick.run.optimizers import make_optimizer
from quick.run.settings import Config
from quick.run.state import make_state
from train import train_step

WAYS = {
    "whole": "the whole network trains",
    "frozen": "--freeze all, pictures augmented",
    "features": "--freeze all, features computed once",
}


def measure(way: str, name: str, side: int, batch_size: int, steps: int) -> None:
    """Print the median milliseconds of a step and the peak memory in MiB."""
    config = Config(model=name, lr=1e-4, momentum=0.9, batch_size=batch_size)
    device = pick()
    precision = pick_precision("auto", device)
    tune(device)
    seed(0)
    options = {"classes": 10, "image_size": side}
    network, head = model.create(name, options), model.head_keys(name, options)
    network = network.to(device, memory_format=memory_format(device))
    trained = network
    inputs = torch.rand(batch_size, 3, side, side, device=device).to(memory_format=memory_format(device))
    labels = torch.arange(batch_size, device=device) % 10
    if way != "whole":
        freeze(network, head, None)
        trained = HeadOnly(network, head, side)
    if way == "features":
        trained, inputs = trained.tail, trained.features(inputs)
    optimizer = make_optimizer(network, head, config, precision)
    state = make_state(network, trained, optimizer, config, precision, ALONE, labels=labels)
    state.total_steps = 10**6
    train_mode(trained)
    batch = Batch(inputs, labels, torch.arange(batch_size, device=device), batch_size, [batch_size])
    seconds = []
    for _ in range(steps + 2):  # two to warm up
        start = time.perf_counter()
        loss, _ = train_step(state, batch, config)
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    on_device = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0
    unit = 2**20 if sys.platform == "darwin" else 2**10
    print(1000 * statistics.median(seconds[2:]), on_device or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vgg16")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="to take the median of (default: 10)")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        measure(args.way, args.model, args.image_size, args.batch_size, args.steps)
        return
    print(f"{args.model}, {args.batch_size} pictures of {args.image_size} x {args.image_size} a step")
    whole = None
    for way, what in WAYS.items():
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        time_taken, memory = map(
            float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        )
        whole = whole or (time_taken, memory)
        ratios = f"{time_taken / whole[0]:6.3f} of the time, {memory / whole[1]:.2f} of the memory"
        print(f"{what:38} {time_taken:9,.1f} ms a step {memory:8,.0f} MiB at most  {ratios}")


if __name__ == "__main__":
    main()

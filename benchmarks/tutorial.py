"""An epoch of train.py against one of the plain tutorial loop: the same network, the same batch size, in turn.

`python benchmarks/tutorial.py --data data/cifar10` prints pictures a second of both, and the ratio. The tutorial's
network has no activations, its pictures come from torchvision's data set through ToTensor and a DataLoader, and it
trains in float32; ours trains in float32 too, and then in what `--precision auto` picks. `--quick`: 6,400 pictures.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torchvision
from torch import nn

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

CONFIG = str(Path(__file__).parent.parent / "configs" / "tutorial.toml")


class InMemory(torchvision.datasets.CIFAR10):
    """torchvision's CIFAR-10 around pictures that are in memory already, in the form that it keeps them in."""

    def __init__(self, pictures: Pictures):
        _, images, _ = pictures.preview(torch.arange(len(pictures)))
        self.data = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        self.targets = pictures.labels.tolist()
        self.transform, self.target_transform = torchvision.transforms.ToTensor(), None


class Tutorial:
    """The plain loop, as beginners' courses have it."""

    def __init__(self, pictures: Pictures, device: torch.device):
        self.device = device
        self.loader = torch.utils.data.DataLoader(InMemory(pictures), batch_size=64)
        self.network = nn.Sequential(
            nn.Conv2d(3, 32, 5, 1, 2),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 5, 1, 2),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, 1, 2),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(1024, 64),
            nn.Linear(64, 10),
        ).to(device)
        self.loss_function = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01)

    def epoch(self) -> None:
        self.network.train()
        for step, (images, labels) in enumerate(self.loader):
            images, labels = images.to(self.device), labels.to(self.device)
            outputs = self.network(images)
            loss = self.loss_function(outputs, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if step % 100 == 0:
                loss.item()

    @torch.no_grad()
    def accuracy(self, pictures: Pictures) -> float:
        self.network.eval()
        loader = torch.utils.data.DataLoader(InMemory(pictures), batch_size=64)
        guesses = torch.cat([self.network(images.to(self.device)).argmax(1) for images, _ in loader])
        return (guesses == pictures.labels).float().mean().item()


def ours(pictures: Pictures, precision: str) -> Callable[[int], object]:
    """A function that trains one epoch of the same network by train.py."""
    config = resolve(parse_train(["--config", CONFIG, "--precision", precision, "--device", "cpu"])[0], pretrained=None)
    device = pick("cpu")
    network = model.create("cifar_quick", model.config_options(config, 10)).to(memory_format=memory_format(device))
    dtype = pick_precision(precision, device)
    optimizer = make_optimizer(network, [], config, dtype)
    state = make_state(network, network, optimizer, config, dtype, ALONE, labels=pictures.labels)
    state.total_steps = 10**6

    def epoch(number: int) -> None:
        state.epoch, state.totals = number, None
        train_epoch(state, pictures, config, NoBoard(), StopVote(ALONE, 0, 0))

    return epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="cifar10 or a folder with its pictures")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each, in turn, after one that warms up")
    parser.add_argument("--quick", action="store_true", help="6,400 pictures")
    args = parser.parse_args()
    [pictures] = datasets.load(
        args.data, limit=6400 if args.quick else 0, mean=(0, 0, 0), std=(1, 1, 1), splits=["train"]
    )
    plain = Tutorial(pictures, torch.device("cpu"))
    # The plain loop's side first, so that it has the system's memory allocator as it is.
    start = time.perf_counter()
    plain.epoch()
    untuned = len(pictures) / (time.perf_counter() - start)
    tune(pick("cpu"))
    sides = {"plain tutorial loop": lambda _: plain.epoch()}
    sides |= {f"train.py, {precision}": ours(pictures, precision) for precision in ("fp32", "auto")}
    rates = {name: [] for name in sides}
    for number in range(args.rounds + 1):
        for name, epoch in sides.items():
            start = time.perf_counter()
            epoch(number)
            rates[name].append(len(pictures) / (time.perf_counter() - start))
    rates = {name: statistics.median(found[1:]) for name, found in rates.items()}
    slow = rates["plain tutorial loop"]
    print(f"plain tutorial loop, before device.tune: {untuned:,.0f} images/s (one epoch)")
    for name, rate in rates.items():
        print(f"{name:20} {rate:8,.0f} images/s   {len(pictures) / rate:6.1f} s an epoch   ratio {rate / slow:.2f}")


if __name__ == "__main__":
    main()

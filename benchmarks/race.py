"""Accuracy over time: our configs, the airbench94 design at half width and the tutorial, in turn, on the same device.

`python benchmarks/race.py --data data/cifar10` trains for each seed, and prints seconds of training (without
evaluation), accuracies, and the ratio of times to the airbench design. `--only` picks sides, `--curves FILE` adds
accuracy over time to a JSON file, which benchmarks/picture.py draws. `--quick`: 5,000 pictures, one epoch, one seed.
On a GPU: `--config configs/fast_gpu.toml --widths 64 256 256 --only airbench fast`, the design at its full width.

The other side is written anew from the public description of airbench94 (Jordan 2024, arxiv.org/abs/2404.00498): a
frozen 2x2 whitening convolution, three groups of two 3x3 convolutions with max pooling, batch normalisation and GELU,
here of 32, 128 and 128 channels; SGD with 64 times the rate for biases, label smoothing 0.2, alternating flip, crops of
2 reflected pixels, lookahead, a triangular schedule, batches of 1,024; six views of a picture at test time. Its epochs
are 8 here, 9.9 in the original. `airbench` runs with what helps it here too: device.tune() and our precision;
`airbench-plain` without, in float32, in a process of its own. Both are channels_last.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tutorial import Tutorial

import datasets
import train
from device import autocast, memory_format, pick, pick_precision, seed, tune
from quick.choices import PRECISIONS
from quick.data.pictures import Pictures

FAST = str(Path(__file__).parent.parent / "configs" / "fast.toml")
SHORT = "--epochs 6"
SIDES = ["tutorial", "airbench-plain", "airbench", "default", "fast", "fast-short"]


class Group(nn.Sequential):
    def __init__(self, channels_in: int, channels_out: int):
        def norm() -> nn.BatchNorm2d:
            layer = nn.BatchNorm2d(channels_out, eps=1e-12, momentum=0.4)
            layer.weight.requires_grad_(False)
            return layer

        def conv(channels_in: int) -> nn.Conv2d:
            layer = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
            nn.init.dirac_(layer.weight.data[:channels_in])
            return layer

        super().__init__(
            *(conv(channels_in), nn.MaxPool2d(2), norm(), nn.GELU()), *(conv(channels_out), norm(), nn.GELU())
        )


class Airbench(nn.Module):
    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.bias)
        groups = [Group(*pair) for pair in zip((24, *widths[:-1]), widths, strict=True)]
        self.layers = nn.Sequential(nn.GELU(), *groups, nn.MaxPool2d(3), nn.Flatten())
        self.head = nn.Linear(widths[-1], 10, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(self.whiten(images))) / 9


def views(network: nn.Module, images: Tensor) -> Tensor:
    """Logits over six views: mirrored or not, moved by one pixel in two directions or not."""

    def both(images: Tensor) -> Tensor:
        return (network(images) + network(images.flip(3))).float() / 2

    padded = F.pad(images, (1,) * 4, "reflect")
    return both(images) / 2 + (both(padded[:, :, :32, :32]) + both(padded[:, :, 2:, 2:])) / 4


class Race:
    """One training of the airbench design."""

    def __init__(self, sets: list[Pictures], device: torch.device, precision: torch.dtype):
        self.device, self.precision = device, precision
        self.images, self.test_images = (
            torch.cat([batch.images for batch in pictures.evaluation_batches()]) for pictures in sets
        )
        self.labels, self.test_labels = (pictures.labels for pictures in sets)

    def run(
        self, number: int, epochs: int, widths: tuple[int, ...], batch_size: int = 1024
    ) -> list[tuple[float, float]]:
        """Train with this seed; (seconds of training so far, accuracy over six views) after each epoch."""
        seed(number)
        network = Airbench(widths).to(self.device, memory_format=memory_format(self.device))
        momentum, curve, seconds = 0.85, [], 0.0
        scale = 1024 * (1 + 1 / (1 - momentum))
        lr, decay = 11.5 / scale, 0.0153 * batch_size / scale
        biases = [p for p in network.layers.parameters() if p.ndim == 1 and p.requires_grad]
        others = [p for p in network.parameters() if p.requires_grad and not any(p is bias for bias in biases)]
        groups = [{"params": biases, "lr": 64 * lr, "weight_decay": decay / (64 * lr)}]
        groups += [{"params": others, "lr": lr, "weight_decay": decay / lr}]
        optimizer = torch.optim.SGD(groups, momentum=momentum, nesterov=True, fused=self.device.type != "mps")
        steps = epochs * (len(self.images) // batch_size)
        climb = int(0.23 * steps)

        def share(step: int) -> float:
            if step < climb:
                return 0.2 + 0.8 * step / climb
            return 1 - 0.93 * (step - climb) / (steps - climb)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        slow = [value.clone() for value in network.state_dict().values()]
        whiten(network.whiten, self.images[:5000])
        start, step = time.perf_counter(), 0
        mirrored = torch.rand(len(self.images), device=self.device) < 0.5
        images = torch.where(mirrored.view(-1, 1, 1, 1), self.images.flip(3), self.images)
        padded = F.pad(images, (2,) * 4, "reflect")
        windows = padded.unfold(2, 32, 1).unfold(3, 32, 1)
        for epoch in range(epochs):
            network.train()
            network.whiten.bias.requires_grad_(epoch < 3)
            for picks in torch.randperm(len(images), device=self.device).split(batch_size)[: steps // epochs]:
                row, column = torch.randint(5, (2, len(picks)), device=self.device)
                batch = windows[picks, :, row, column]
                batch = batch.flip(3) if epoch % 2 else batch
                batch = batch.to(memory_format=memory_format(self.device))
                with autocast(self.device, self.precision):
                    logits = network(batch).float()
                F.cross_entropy(logits, self.labels[picks], label_smoothing=0.2, reduction="sum").backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                step += 1
                if step % 5 == 0 or step == steps:
                    keeps = 0.95**5 * (step / steps) ** 3
                    for mean, value in zip(slow, network.state_dict().values(), strict=True):
                        if value.is_floating_point():
                            mean.lerp_(value, 1 - keeps)
                            value.copy_(mean)
            self.wait()
            seconds += time.perf_counter() - start
            curve.append((seconds, self.accuracy(network)))
            start = time.perf_counter()
        return curve

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def accuracy(self, network: nn.Module) -> float:
        network.eval()
        with autocast(self.device, self.precision):
            guesses = torch.cat([views(network, part).argmax(1) for part in self.test_images.split(500)])
        return (guesses == self.test_labels).float().mean().item()


@torch.no_grad()
def whiten(conv: nn.Conv2d, images: Tensor, eps: float = 5e-4) -> None:
    patches = F.unfold(images, conv.kernel_size).transpose(1, 2).flatten(0, 1)
    variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (components / (variances + eps).sqrt()).T.view(-1, *conv.weight.shape[1:])
    conv.weight.copy_(torch.cat([filters, -filters]))


def ours(flags: list[str]) -> list[tuple[float, float]]:
    """Run train.py; (seconds of training so far, test accuracy) after each epoch."""
    with tempfile.TemporaryDirectory() as logs:
        status = train.cli([*flags, "--no-views", "--log-dir", logs, "--run-name", "race"])
        if status:
            sys.exit(status)
        lines = [json.loads(line) for line in Path(logs, "race", "metrics.jsonl").read_text().splitlines()]
    seconds, curve = 0.0, []
    for line in lines:
        seconds += line["epoch_seconds"]
        curve.append((seconds, line["test_accuracy"]))
    return curve


def tutorial(sets: list[Pictures], number: int, epochs: int) -> list[tuple[float, float]]:
    """The plain tutorial loop; (seconds of training so far, test accuracy) after each epoch."""
    torch.manual_seed(number)
    plain, seconds, curve = Tutorial(sets[0], sets[0].labels.device), 0.0, []
    for _ in range(epochs):
        start = time.perf_counter()
        plain.epoch()
        seconds += time.perf_counter() - start
        curve.append((seconds, plain.accuracy(sets[1])))
    return curve


def airbench_plain(args: argparse.Namespace, number: int) -> list[tuple[float, float]]:
    """The airbench design in a process of its own, where nothing of ours helps it."""
    with tempfile.TemporaryDirectory() as folder:
        curves, epochs = Path(folder, "curves.json"), str(args.epochs)
        flags = ["--plain", "--only", "airbench", "--seeds", str(number), "--epochs", epochs, "--curves", str(curves)]
        flags += ["--data", args.data, "--device", args.device, "--limit", str(args.limit)]
        subprocess.run([sys.executable, __file__, *flags], check=True, stdout=subprocess.DEVNULL)
        return json.loads(curves.read_text())["airbench"][0]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="cifar10 or a folder with its pictures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=PRECISIONS, help="of ours and of airbench's")
    parser.add_argument("--epochs", type=int, default=8, help="of the airbench design (default: 8)")
    parser.add_argument("--widths", type=int, nargs=3, default=[32, 128, 128], help="of it (default: 32 128 128)")
    parser.add_argument("--tutorial-epochs", type=int, default=20)
    parser.add_argument("--config", default=FAST, help="the recipe of ours that races (default: configs/fast.toml)")
    parser.add_argument("--short", default=SHORT, help=f"flags of our shorter run (default: {SHORT})")
    parser.add_argument("--flags", default="", help="more flags for both, e.g. '--width 0.5'")
    parser.add_argument("--only", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--plain", action="store_true", help="the airbench side in float32, without device.tune()")
    parser.add_argument("--limit", type=int, default=0, help="pictures a split; 0: all")
    parser.add_argument("--curves", type=Path, help="write accuracy over time here, as JSON")
    parser.add_argument("--quick", action="store_true", help="5,000 pictures, one epoch, one seed")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.epochs, args.short, args.tutorial_epochs, args.limit = [0], 1, "--epochs 1", 1, 5000
    return args


def main() -> None:
    args = parse()
    device = pick(args.device)
    if not args.plain:
        tune(device)
    sets = datasets.load(args.data, limit=args.limit, device=device)
    common = ["--data", args.data, "--limit", str(args.limit), "--device", str(device), "--precision", args.precision]
    common += ["--epochs", "1"] if args.quick else []
    fast = ["--config", args.config, *common, *args.flags.split()]
    race = Race(sets, device, pick_precision("fp32" if args.plain else args.precision, device))
    train_side = {
        "tutorial": lambda number: tutorial(sets, number, args.tutorial_epochs),
        "airbench-plain": lambda number: airbench_plain(args, number),
        "airbench": lambda number: race.run(number, args.epochs, tuple(args.widths)),
        "default": lambda number: ours([*common, "--seed", str(number)]),
        "fast": lambda number: ours([*fast, "--seed", str(number)]),
        "fast-short": lambda number: ours([*fast, *args.short.split(), "--seed", str(number)]),
    }
    curves = {name: [] for name in args.only}
    for number in args.seeds:
        for name in args.only:
            curves[name].append(train_side[name](number))
            seconds, accuracy = curves[name][-1][-1]
            print(f"seed {number}  {name}: {accuracy:.2%} in {seconds:.1f} s", flush=True)
    took = {name: statistics.mean(curve[-1][0] for curve in found) for name, found in curves.items()}
    for name, found in curves.items():
        accuracies = [curve[-1][1] for curve in found]
        result = f"{statistics.mean(accuracies):.2%} ({min(accuracies):.2%} to {max(accuracies):.2%})"
        ratios = [f"{took[name] / took[other]:.2f} of {other}" for other in took if other.startswith("airbench")]
        print(f"{name:15} {result}  {took[name]:6.1f} s   {', '.join(ratios)}")
    if args.curves:
        known = json.loads(args.curves.read_text()) if args.curves.exists() else {}
        args.curves.write_text(json.dumps(known | curves))


if __name__ == "__main__":
    main()

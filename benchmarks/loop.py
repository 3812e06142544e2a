"""What train.py adds to the bare work: to the training step, to evaluation, and to the start.

`python benchmarks/loop.py` runs both sides in turn, in one process, and prints medians and the ratio of the rates. Bare
are forward, backward and SGD (or forward alone) on one fixed batch, in the fastest layout. The start is the time from
`python train.py` to the first step, less `import torch` and reading the data. Flags of train.py choose the network and
recipe; `--quick` ends in less than a minute.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import datasets
import model
from device import autocast, memory_format, pick, pick_precision, tune
from quick.data.batching import batch_slices
from quick.processes import ALONE
from quick.run.config import resolve
from quick.run.optimizers import make_optimizer
from quick.run.state import TrainState, make_state
from quick.run.stopping import StopVote
from quick.views.tensorboard import NoBoard
from train import evaluate, parse_train, train_epoch

ROOT = Path(__file__).parent.parent
START = """
import sys, tempfile, time
began = time.perf_counter()
import torch
less = time.perf_counter() - began
import datasets, train
load_sets, train_step = datasets.load_sets, train.train_step
def timed(*inputs):
    global less
    start = time.perf_counter()
    sets = load_sets(*inputs)
    less += time.perf_counter() - start
    return sets
def first_step(*inputs):
    train_step(*inputs)
    print(time.perf_counter() - began - less)
    raise SystemExit
datasets.load_sets, train.train_step = timed, first_step
with tempfile.TemporaryDirectory() as logs:
    train.main([*sys.argv[1:], "--log-dir", logs])
"""


def compare(name: str, sides: dict[str, Callable[[], int]], rounds: int, device: torch.device) -> None:
    """Run both in turn, after a round that warms up; each returns how many pictures it worked on."""
    rates = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, work in sides.items():
            start = time.perf_counter()
            pictures = work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                rates[side].append(pictures / (time.perf_counter() - start))
    ours, bare = (statistics.median(found) for found in rates.values())
    ratio = statistics.median(pair[0] / pair[1] for pair in zip(*rates.values(), strict=True))
    print(f"{name:10} train.py {ours:9,.0f} images/s   bare {bare:9,.0f} images/s   ratio {ratio:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="of both sides, in turn (default: 15)")
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    args, flags = parser.parse_known_args()
    rounds = 3 if args.quick else args.rounds

    config = resolve(parse_train([*flags, "--data", "shapes"])[0], pretrained=None)
    device = pick(config.device)
    precision = pick_precision(config.precision, device)
    tune(device)
    [train_set] = datasets.load("shapes", device=device, splits=["train"])

    def new_state() -> TrainState:
        options = model.config_options(config, len(train_set.classes))
        network = model.create(config.model, options).to(device, memory_format=memory_format(device)).train()
        optimizer = make_optimizer(network, model.head_keys(config.model, options), config, precision)
        state = make_state(network, network, optimizer, config, precision, ALONE, labels=train_set.labels)
        state.total_steps = 10**6
        return state

    ours, bare = new_state(), new_state()
    images, labels, *_ = next(train_set.batches(config.batch_size))

    def bare_steps() -> int:
        bare.network.train()
        steps = len(batch_slices(len(train_set), config.batch_size))
        for _ in range(steps):
            with autocast(device, precision):
                logits = bare.forward(images)
                loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
            loss.backward()
            bare.optimizer.step()
            bare.optimizer.zero_grad(set_to_none=True)
        return steps * len(labels)

    def epoch() -> int:
        ours.totals = None
        train_epoch(ours, train_set, config, NoBoard(), StopVote(ALONE, 0, 0))
        return len(train_set)

    compare("training", {"ours": epoch, "bare": bare_steps}, rounds, device)

    fixed, *_ = next(train_set.batches(train_set.evaluation_batch))
    seen = []
    with ours.network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0]))):
        evaluate(ours, ours.network, train_set, config)

    @torch.inference_mode()
    def bare_forward() -> int:
        bare.network.eval()
        with autocast(device, precision):
            for _ in range(sum(seen) // len(fixed)):  # as many views
                bare.network(fixed)
        return len(train_set)

    def evaluation() -> int:
        evaluate(ours, ours.network, train_set, config)
        return len(train_set)

    compare("evaluation", {"ours": evaluation, "bare": bare_forward}, rounds, device)

    found = []
    for _ in range(2 if args.quick else 5):
        command = [sys.executable, "-c", START, *flags, "--data", "shapes"]
        found.append(float(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout))
    print(f"start      {statistics.median(found):.2f} s to the first step, beyond import torch and reading the data")


if __name__ == "__main__":
    main()

"""What more processes bring on one machine's cores, and what train.py adds to DistributedDataParallel.

`python benchmarks/scaling.py` trains in turn one process with all threads and `--processes` with a share of them each
(torchrun, gloo), on built-in pictures of CIFAR-10's size, and prints medians. Within each, epochs of train.py and a
bare loop on one fixed batch take turns; the group has DistributedDataParallel's. Flags of train.py choose network and
recipe; `--quick` ends in less than a minute.
"""

import argparse
import json
import os
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
from quick.cli import exit_script
from quick.data.batching import batch_slices
from quick.nets.losses import loss_function
from quick.nets.sync_batch_norm import synchronise
from quick.processes import Group
from quick.run.config import resolve
from quick.run.optimizers import make_optimizer
from quick.run.state import TrainState, make_state
from quick.run.stopping import StopVote
from quick.views.tensorboard import NoBoard
from train import parse_train, train_epoch

PICTURES = 20_000  # in an epoch


def rates(work: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Pictures a second of each, in turn, after a round that warms up."""
    found = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, run in work.items():
            start = time.perf_counter()
            pictures = run()
            if number:
                found[name].append(pictures / (time.perf_counter() - start))
    return found


def side(rounds: int, flags: list[str]) -> None:
    """Measure in this process, or group of processes; the first prints what it found."""
    with Group() as group:
        config = resolve(parse_train([*flags, "--data", "shapes"])[0], pretrained=None)
        device = pick(config.device, group)
        precision = pick_precision(config.precision, device)
        tune(device)
        [train_set] = datasets.load("shapes", device=device, splits=["train"])
        train_set = train_set.take(torch.arange(PICTURES) % len(train_set))

        def new_state() -> TrainState:
            options = model.config_options(config, len(train_set.classes))
            network = model.create(config.model, options).to(device, memory_format=memory_format(device)).train()
            network = synchronise(network, device) if config.sync_bn and group.size > 1 else network
            optimizer = make_optimizer(network, model.head_keys(config.model, options), config, precision)
            state = make_state(network, network, optimizer, config, precision, group, labels=train_set.labels)
            state.total_steps = 10**6
            return state

        ours, bare = new_state(), new_state()
        images, labels, *_ = next(train_set.batches(config.batch_size, group=group))
        stop = StopVote(group, 0, 0)
        steps = len(batch_slices(len(train_set), config.batch_size))

        def epoch() -> int:
            ours.totals = None
            train_epoch(ours, train_set, config, NoBoard(), stop)
            return len(train_set)

        def bare_steps() -> int:
            bare.network.train()
            for _ in range(steps):
                with autocast(device, precision):
                    loss = loss_function(bare.forward(images), labels, config.loss, config.label_smoothing)
                loss.backward()
                bare.optimizer.step()
                bare.optimizer.zero_grad(set_to_none=True)
            return steps * config.batch_size

        found = rates({"ours": epoch, "bare": bare_steps}, rounds)
        print(json.dumps(found | {"bytes": sum(p.nbytes for p in ours.network.parameters()), "steps": steps}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="default: 2")
    parser.add_argument("--rounds", type=int, default=5, help="of one process and the group, in turn (default: 5)")
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    if args.side:
        side(args.side, flags)
        exit_script(0)

    threads, found = torch.get_num_threads(), {1: [], args.processes: []}
    for _ in range(1 if args.quick else args.rounds):
        for count, results in found.items():
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] * (count > 1)
            command = [sys.executable, *launcher, __file__, "--side", "1" if args.quick else "4", *flags]
            environment = os.environ | {"OMP_NUM_THREADS": str(max(1, threads // count))}
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            results.append(json.loads(done.stdout))
    medians = {count: statistics.median(rate for result in results for rate in result["ours"])
               for count, results in found.items()}  # fmt: skip
    for count, rate in medians.items():
        ratios = [
            ours / bare for result in found[count] for ours, bare in zip(result["ours"], result["bare"], strict=True)
        ]
        each = (
            f"{count} process{'es' * (count > 1)}, {max(1, threads // count)} thread{'s' * (threads // count > 1)} each"
        )
        bare = "the bare loop" if count == 1 else "the bare DDP loop"
        print(f"{each:30} {rate:9,.0f} images/s   {statistics.median(ratios):.3f} of {bare}")
    print(f"{args.processes} processes against one: {medians[args.processes] / medians[1]:.3f}")
    print(f"gradients: {found[1][0]['bytes']:,} bytes a step, {found[1][0]['steps']} steps an epoch")


if __name__ == "__main__":
    main()

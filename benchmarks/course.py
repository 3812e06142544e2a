"""From the beginner's recipe to ours, one change at a time: what each change gives after the same number of epochs.

`python benchmarks/course.py --data data/cifar10` trains with configs/tutorial.toml, then again with each change of
STEPS on top of all earlier ones, and prints the test accuracies after the last epoch as a table. The runs stay in
logs/course: `tensorboard --logdir logs/course` shows their curves over each other. Started again, it takes the results
of runs that are there, and goes on with an unfinished one. Further flags go to train.py. `--quick`: 1,000 pictures.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train

CONFIG = str(Path(__file__).parent.parent / "configs" / "tutorial.toml")
# Name of the run, flags that it adds, and what they do. With the last but one, the recipe is that of cifar_quick.toml.
STEPS = [
    ("course", "", "the course's recipe"),
    ("shuffle", "--shuffle", "pictures in a new order in each epoch"),
    ("normalise", "--mean 0.4914 0.4822 0.4465 --std 0.247 0.2435 0.2616", "channels with mean 0 and deviation 1"),
    ("relu", "--activation relu", "an activation behind each layer but the last"),
    ("batch_norm", "--batch-norm", "batch normalisation before each activation"),
    ("momentum", "--momentum 0.9 --nesterov", "momentum"),
    ("schedule", "--lr 0.1 --schedule onecycle", "ten times the learning rate, which rises and then falls"),
    ("augment", "--flip --crop 1", "pictures mirrored and shifted by a pixel at random"),
    ("whiten", "--whiten", "the first convolution starts as whitening filters"),
    ("regularise", "--weight-decay 5e-4 --label-smoothing 0.1", "weight decay and label smoothing"),
    ("silu", "--activation silu", "SiLU in place of ReLU"),
    ("tta", "--tta shift", "the test looks at shifted and mirrored pictures too"),
    ("muon", "--optimizer muon", "Muon in place of SGD in the hidden layers"),
]


def accuracy(folder: Path, flags: list[str], epochs: int) -> float:
    """The test accuracy of a run after its last epoch; it is trained first where it is not finished."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    if len(lines) < epochs:
        new = [*flags, "--run-name", folder.name, "--no-views"]
        flags = ["--resume", folder.name] if list(folder.glob("*.pt")) else new
        if status := train.cli([*flags, "--log-dir", str(folder.parent)]):
            sys.exit(status)
        lines = metrics.read_text(encoding="utf-8").splitlines()
    return json.loads(lines[-1])["test_accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", default="cifar10", help="cifar10 or a folder with its pictures")
    parser.add_argument("--epochs", type=int, default=5, help="of each run (default: 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-dir", type=Path, help="where the runs stay (default: logs/course, or logs/course-quick)")
    parser.add_argument("--quick", action="store_true", help="1,000 pictures, two epochs")
    args, more = parser.parse_known_args()
    if args.quick:
        args.epochs, more = 2, [*more, "--limit", "1000"]
    logs = args.log_dir or Path("logs", "course-quick" if args.quick else "course")
    flags = ["--config", CONFIG, "--data", args.data, "--epochs", str(args.epochs), "--seed", str(args.seed), *more]
    logs.mkdir(parents=True, exist_ok=True)
    common = logs / "flags.json"  # of all runs in the folder
    if common.exists() and json.loads(common.read_text(encoding="utf-8")) != flags:
        parser.error(f"{logs} has runs with other flags, see {common}; give another --log-dir")
    common.write_text(json.dumps(flags), encoding="utf-8")
    rows = []
    for number, (name, added, what) in enumerate(STEPS):
        flags += added.split()
        rows.append(accuracy(logs / f"{number:02}_{name}", flags, args.epochs))
        print(f"{what}: {rows[-1]:.1%}", flush=True)
    print(f"\n| change | flags | test accuracy, {args.epochs} epochs |\n| --- | --- | --- |")
    for (_, added, what), found in zip(STEPS, rows, strict=True):
        print(f"| {what} | `{added or '--config configs/tutorial.toml'}` | {found:.1%} |")


if __name__ == "__main__":
    main()

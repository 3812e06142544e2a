"""How fast predict.py answers: one picture against `import torch`, many against the plain loop, in turn.

`python benchmarks/predicting.py` makes 10,000 PNG files of 32x32 in a temporary folder. The plain loop opens,
transforms and classifies one by one, as tutorials do, with the same checkpoint (the one in weights/), once a picture;
ours runs once so (`--tta none`) and once as the checkpoint says. `--quick` takes 2,000 files.
"""

import argparse
import collections
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from PIL import Image

import model
import predict
from quick.data.shapes import shapes

ROOT = Path(__file__).parent.parent


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def one_picture(picture: Path, checkpoint: Path, rounds: int) -> None:
    commands = {
        "import torch": [sys.executable, "-c", "import torch"],
        "predict.py": [sys.executable, str(ROOT / "predict.py"), str(picture), "--checkpoint", str(checkpoint)],
    }
    times = {name: [] for name in commands}
    for _ in range(rounds + 1):
        for name, command in commands.items():
            times[name].append(
                seconds(lambda command=command: subprocess.run(command, check=True, capture_output=True))
            )
    plain, ours = (statistics.median(found[1:]) for found in times.values())
    print(f"one picture: predict.py {ours:.2f} s, python -c 'import torch' {plain:.2f} s, ratio {ours / plain:.2f}")


def plain_loop(paths: list[Path], network: torch.nn.Module, checkpoint: dict) -> None:
    from torchvision import transforms

    side = checkpoint["image_size"]
    transform = transforms.Compose(
        [
            transforms.Resize((side, side)),
            transforms.ToTensor(),
            transforms.Normalize(checkpoint["mean"], checkpoint["std"]),
        ]
    )
    for path in paths:
        with torch.no_grad():
            logits = network(transform(Image.open(path).convert("RGB"))[None])
        print(path, checkpoint["classes"][logits.argmax(1).item()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "weights" / "cifar_quick.pt")
    parser.add_argument("--kind", default="png", choices=["png", "jpg"], help="of the files (default: png)")
    parser.add_argument("--quick", action="store_true", help="2,000 files")
    args = parser.parse_args()
    model.read(args.checkpoint)  # or say what is wrong with it
    count, rounds = (2000, 3) if args.quick else (10_000, 5)
    with tempfile.TemporaryDirectory() as folder:
        images = shapes("test", count).store.images.permute(0, 2, 3, 1).numpy()
        paths = [Path(folder, f"{number:05}.{args.kind}") for number in range(count)]
        for path, image in zip(paths, images, strict=True):
            Image.fromarray(image).save(path)
        one_picture(paths[0], args.checkpoint, rounds)
        network, checkpoint = model.load(args.checkpoint)
        times = collections.defaultdict(list)
        for _ in range(rounds):
            with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):  # all in this process
                times["plain loop"].append(seconds(lambda: plain_loop(paths, network, checkpoint)))
                for name, flags in (("predict.py --tta none", ["--tta", "none"]), ("predict.py", [])):
                    call = [folder, *flags, "--checkpoint", str(args.checkpoint)]
                    times[name].append(seconds(lambda call=call: predict.main(call)))
    plain = statistics.median(times["plain loop"])
    for name, found in times.items():
        took = statistics.median(found)
        print(f"{count:,} {args.kind} files  {name:22} {count / took:7,.0f} a second   ratio {plain / took:.2f}")


if __name__ == "__main__":
    main()

"""What TensorBoard's pictures cost: the share of a run's time that is spent on them, and the size of its folder.

`python benchmarks/views.py --data data/cifar10` trains as train.py does, with all of its flags.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train


def main() -> None:
    seconds, show_epoch = [], train.show_epoch

    def timed(*arguments: object, **options: object) -> None:
        start = time.perf_counter()
        show_epoch(*arguments, **options)
        seconds.append(time.perf_counter() - start)

    train.show_epoch = timed
    with tempfile.TemporaryDirectory() as logs:
        start = time.perf_counter()
        train.main([*sys.argv[1:], "--log-dir", logs, "--run-name", "run"])
        whole = time.perf_counter() - start
        files = [path for path in Path(logs).rglob("*") if path.is_file() and path.suffix != ".pt"]
        size = sum(path.stat().st_size for path in files) / 1e6
    share = sum(seconds) / whole
    print(
        f"{len(seconds)} times, {sum(seconds):.1f} s of {whole:.1f} s: {share:.1%}; {size:.1f} MB without checkpoints"
    )


if __name__ == "__main__":
    main()

"""What all scripts share: device and precision, the processes of a run, seeds; flags, and how a script ends.

`python device.py` shows what this machine has, what `auto` picks and why, and tries it on one convolution.
"""

import argparse
import contextlib
import ctypes
import datetime
import difflib
import math
import os
import platform
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import Field, dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from tqdm import tqdm

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ECHO_SECONDS = 5  # in which a second signal under torchrun is the same one
LOST = re.compile(r"gloo|nccl|store|socket|connection|broken pipe|timed out", re.IGNORECASE)
T = TypeVar("T")


class Problem(ValueError):
    """What a user can mend: the message names the file, flag or value, and what to do. Ends a script with `status`."""

    status = 1

    def __init__(self, message: str):
        super().__init__(printable(message))


class CallError(Problem):
    """A flag or setting that cannot be."""

    status = 2


class DeviceError(CallError):
    """A device or precision was asked for that this machine does not have."""


class GroupError(Problem):
    """The processes of a run cannot work together."""


class Ended(Exception):
    """Another process has ended the run, and has said why."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM asked for an end."""


# ---- device and precision ------------------------------------------------------------------------------------------


def available() -> dict[str, str]:
    """The devices of this machine, fastest first: `{"cuda:0": "NVIDIA A100, 79.2 GiB", "cpu": "2 threads"}`."""
    found = {}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    found["cpu"] = f"{torch.get_num_threads()} threads"
    return found


def pick(name: str = "auto", group: "Group | None" = None) -> torch.device:
    """The device called `name`: `auto` (the fastest here), `cpu`, `cuda`, `cuda:1` or `mps`.

    Each process of a group that shares this machine gets a GPU of its own. Raises DeviceError, listing what is there,
    when this machine has no such device.
    """
    found, place = available(), 0
    if group and group.count > 1:
        found.pop("mps", None)  # it has no way to talk to other processes
        place = group.local_rank
        if name.startswith("cuda:"):
            raise DeviceError(f"--device {name} is one for {group.count} processes; --device cuda gives each its own")
    chosen = next(iter(found)) if name == "auto" else name
    chosen = f"cuda:{place}" if chosen in ("cuda", "cuda:0") else chosen
    if chosen not in found:
        here = ", ".join(f"{device} ({what})" for device, what in found.items())
        raise DeviceError(f"no device {chosen!r} here; this machine has: {here}")
    return torch.device(chosen)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype that convolutions and matrix products run in: `auto`, `fp32`, `bf16` or `fp16`.

    `auto` is bf16 where the hardware computes in it, NVIDIA GPUs from Ampere (2020) on and CPUs with AVX512-BF16 or
    AMX: it needs no loss scaling, and takes about 0.6 of the time on such a CPU. Elsewhere it is slow, emulated or
    unsafe, and `auto` is fp32. Raises DeviceError where a precision cannot work.
    """
    if name == "auto":
        return torch.bfloat16 if computes_bf16(device) else torch.float32
    if name not in PRECISIONS:
        raise DeviceError(f"no precision {name!r}; there are: auto, {', '.join(PRECISIONS)}")
    # Autocast and GradScaler give wrong gradients on MPS (pytorch PR 184286); fp16 convolutions crawl on CPUs.
    if (device.type, name) in {("mps", "bf16"), ("mps", "fp16"), ("cpu", "fp16")}:
        raise DeviceError(f"{name} does not train well on {device.type}; use --precision fp32")
    return PRECISIONS[name]


def computes_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 numbers in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    has = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}  # PyTorch 2.10 cannot tell
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager:
    """The context for a forward pass in `precision`; weights stay float32."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


def memory_format(device: torch.device) -> torch.memory_format:
    """How `(N, C, H, W)` lies in memory: channels_last is faster (1.4 times on CPUs), but wrong on MPS.

    BatchNorm2d and average pooling compute silently wrong gradients there (pytorch issues 175189, 175190).
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def tune(device: torch.device, deterministic: bool = False) -> None:
    """Turn on what makes this device fast: cuDNN's search for the best kernel, and TF32 for float32 products.

    With `deterministic` only what gives the same bits each time: no search, and slower kernels on GPUs. PyTorch warns
    of an operation that it has no such kernel for.

    On Linux's CPUs: keep freed memory for the next step. By default glibc gives blocks above 32 MB back to the system
    at once, and the next step waits while the system clears them anew: a step of 1,000 pictures then takes 1.7 times as
    long.
    """
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS looks at it when it first works
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would only cost time
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic  # its choice can change from run to run
        torch.set_float32_matmul_precision("high")
    elif device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def memory_used(device: torch.device) -> float:
    """The most memory that this process had at a time, in MiB: on a GPU, or else in the machine (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def seed(*numbers: int) -> None:
    """Seed torch's generators on all devices (initialisation, dropout) with a mix of e.g. `(seed, epoch)`."""
    number = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(number)
    # torch.manual_seed would also queue the seed for GPUs that nothing uses yet, which takes half a millisecond.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(number)


# ---- processes -----------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """The processes that share a run, as torchrun started them; without torchrun it is this one alone.

    While it is entered they can talk to each other, and all but the first (rank 0) print nothing. When one of them
    fails, all end: the first to fail with its error, the others with Ended. `timeout` is how many seconds they wait for
    each other.
    """

    timeout: float = 600.0
    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among those on this machine
    local_count: int = 1

    def __enter__(self) -> "Group":
        """Raises GroupError when the processes do not find each other."""
        self.standard, self.vote, self.store = (sys.stdout, sys.stderr), None, None
        if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
            return self
        if not (dist.is_available() and dist.is_gloo_available()):
            raise GroupError(
                "this PyTorch was built without gloo, by which processes talk; start one, without torchrun"
            )
        self.local_rank, self.local_count = (int(os.environ.get(f"LOCAL_{name}", 0)) for name in ("RANK", "WORLD_SIZE"))
        most = datetime.timedelta(seconds=self.timeout)
        try:
            store, self.rank, self.count = next(dist.rendezvous("env://", timeout=most))
            self.store = dist.PrefixStore(self.meet(store), store)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
            dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.count, timeout=most)
        except (
            RuntimeError,
            ValueError,
        ) as error:  # all of torch's are, and what it says of variables that are missing
            raise GroupError(f"the {os.environ['WORLD_SIZE']} processes did not find each other: {error}") from error
        if torch.cuda.is_available() and self.local_rank < torch.cuda.device_count():
            torch.cuda.set_device(self.local_rank)
        if self.rank:
            sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123 - closed at the exit
        return self

    def meet(self, store: "dist.Store") -> str:
        """A name that all processes of this start agree on, and that no earlier start had.

        When torchrun starts processes again they get the same store, in which the addresses of the dead still are. So
        the first gives a name, the others answer with a word of their own, and go on when it says that it heard theirs.
        """
        word = uuid.uuid4().hex
        if self.rank == 0:
            store.set("name", word)
            store.set(f"{word}/heard", b" ".join(store.get(f"{word}/{rank}") for rank in range(1, self.count)))
            return word
        ends = time.monotonic() + self.timeout
        while time.monotonic() < ends:
            name = store.get("name").decode()
            store.set(f"{name}/{self.rank}", word)
            if store.check([f"{name}/heard"]) and word in store.get(f"{name}/heard").decode().split():
                return name
            time.sleep(0.01)
        raise GroupError(f"waited {self.timeout:g} seconds (--timeout)")

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if self.rank:
            sys.stdout.close()
        sys.stdout, sys.stderr = self.standard
        if self.count == 1:
            return
        if error is None:
            if self.vote:
                self.vote[0].wait()
            dist.destroy_process_group()
            return
        time.sleep(0.3 * bool(self.rank))  # what fails in all, the first knows most about
        with contextlib.suppress(RuntimeError):  # the store is gone with the machine that had it
            if self.store.add("ended", 1) > 1:
                raise Ended from None
        if type(error) is RuntimeError or isinstance(error, dist.DistError):
            if "timed out" in str(error).lower():
                raise GroupError(f"waited {self.timeout:g} seconds (--timeout) for another process") from error
            if LOST.search(str(error)):
                raise GroupError("lost another process of the run") from error

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor, which becomes the sum of all processes' ones."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def whole(self, rows: Tensor, places: Tensor, count: int) -> Tensor:
        """`count` rows in a tensor, of which each process has those of its `places`."""
        whole = rows.new_zeros(count, *rows.shape[1:])
        whole[places.to(rows.device)] = rows
        return self.sum(whole)

    def of_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, for all."""
        values = [make() if self.rank == 0 else None]
        if self.count > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Make these tensors what they are in the first process, where they may lie otherwise in memory."""
        for tensor in tensors if self.count > 1 else ():
            dist.broadcast(packed := tensor.contiguous(), 0)
            tensor.copy_(packed)

    def wait(self) -> None:
        """Until all processes have come here, however long that takes."""
        if self.count > 1:
            self.store.add("here", 1)
            while self.store.add("here", 0) < self.count:
                time.sleep(0.2)

    def most(self, *values: float) -> list[float]:
        """The largest of each value over all processes, as they were when this was called the time before (0 at first):
        so nobody waits. All processes must call it equally often."""
        if self.count == 1:
            return list(values)
        work, found = self.vote or (None, torch.zeros(len(values)))
        if work:
            work.wait()
        now = torch.tensor(values)
        self.vote = dist.all_reduce(now, dist.ReduceOp.MAX, async_op=True), now
        return found.tolist()

    def job(self) -> str:
        """What names the same for all processes that one torchrun (or one on each machine, with the same --rdzv-id)
        ever starts; empty without torchrun."""
        name = os.environ.get("TORCHELASTIC_RUN_ID", "")
        return f"{socket.gethostname()}-{os.getppid()}" if name == "none" else name


class Interrupts:
    """While this is entered, Ctrl-C and SIGTERM are a wish that `asked` tells of; a second one ends all at once."""

    def __init__(self, group: Group | None = None):
        self.asked, self.time, self.first = False, 0.0, not (group and group.rank)
        self.echo = ECHO_SECONDS if "RANK" in os.environ else 0  # torchrun sends on what its processes got already

    def __enter__(self) -> "Interrupts":
        in_main = threading.current_thread() is threading.main_thread()  # elsewhere nobody gets signals
        self.before = {n: signal.signal(n, self.ask) for n in (signal.SIGINT, signal.SIGTERM)} if in_main else {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, _: object) -> None:
        if self.asked:
            if time.monotonic() < self.time + self.echo:
                return
            raise KeyboardInterrupt
        self.asked, self.time = True, time.monotonic()
        if not self.first:
            return
        # Not print(), which the signal may have caught in the middle of its work.
        with contextlib.suppress(OSError):  # tee has ended already, by the same Ctrl-C
            os.write(2, b"\nstopping after this step, with a checkpoint (once more: at once, without)\n")


# ---- the scripts as commands ---------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Flags, written in full; a wrong one raises CallError."""

    def __init__(self, **how: object):
        super().__init__(allow_abbrev=False, **how)

    def parse_args(self, argv: list[str] | None = None, namespace: object = None) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            self.error(f"unknown flag {unknown[0]}{suggestion(unknown[0].partition('=')[0], flags)}")
        return args

    def error(self, message: str) -> None:
        if os.environ.get("LOCAL_RANK", "0") != "0":  # of processes that torchrun started, the first says it
            raise Ended
        raise CallError(message)


def setting(group: str, default: object, help: str, **rules: object) -> Field:
    """A dataclass's field that is a flag too: its group in `--help`, its default, what it is, and its values' rules."""
    return field(default=default, metadata={"group": group, "help": help, **rules})


def flag(name: str, value: object = None) -> str:
    """A setting as the user types it: `--batch-size`, and with a value `--batch-size 64` or `--no-batch-norm`."""
    no, after = "no-" if value is False else "", "" if value is None or isinstance(value, bool) else f" {value}"
    return f"--{no}{name.replace('_', '-')}{after}"


def add_flag(parser: argparse._ActionsContainer, key: Field, default: object) -> None:
    """Make a setting a flag of the same name."""
    if key.type is bool:
        how = {"action": argparse.BooleanOptionalAction}
    elif key.type is tuple:
        how = {"type": float, "nargs": 3, "metavar": ("R", "G", "B")}
    else:
        how = {"type": key.type, "choices": key.metadata.get("choices"), "metavar": key.metadata.get("metavar")}
    parser.add_argument(flag(key.name), **how, default=default, help=key.metadata["help"])


def problem(key: Field, value: object) -> str | None:
    """What is wrong with a value of this setting, in words; None when nothing is."""
    rules, kinds = key.metadata, (int, float) if key.type is float else key.type
    if not isinstance(value, kinds) or (isinstance(value, bool) and key.type is not bool):
        return f"{value!r} is not of type {key.type.__name__}"
    if key.type is str and not value.isprintable():  # which no UTF-8 file of settings could hold, or no terminal show
        return f"{value!r:.80} has characters that cannot be printed"
    if "choices" in rules and value not in rules["choices"]:
        return f"{value!r} is not one of {', '.join(rules['choices'])}{suggestion(value, rules['choices'])}"
    if trouble := "check" in rules and rules["check"](value):
        return trouble
    numbers = value if key.type is tuple else (value,) if key.type in (int, float) else ()
    if key.type is tuple and len(value) not in (0, 3):
        return f"{list(value)} is not one number for each of the three channels"
    for number in numbers:
        if not isinstance(number, int | float) or not -1e300 < number < 1e300:
            return f"{number!r:.40} is not a finite number"
        if number < rules.get("at_least", -math.inf) or number <= rules.get("above", -math.inf):
            bound = f"at least {rules['at_least']}" if "at_least" in rules else f"above {rules['above']}"
            return f"{number} is not {bound}"
        if number >= rules.get("below", math.inf) or number > rules.get("at_most", math.inf):
            bound = f"below {rules['below']}" if "below" in rules else f"at most {rules['at_most']}"
            return f"{number} is not {bound}"
    return None


def suggestion(word: str, known: Iterable[str]) -> str:
    """What the user may have meant, as the end of an error message; nothing if nothing is close."""
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def printable(text: str) -> str:
    """The text with its control characters escaped: names of strangers' files must not steer the terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def reason(error: BaseException, most: int = 200) -> str:
    """What an error says, in one line of at most so many characters; its kind if it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def bar(name: str, total: int, unit: str, start: int = 0, delay: float = 0) -> "tqdm":
    """A progress bar on standard error, gone when it is done: on a terminal alone, and unless `TQDM_DISABLE` is set."""
    from tqdm import tqdm  # predicting does without it

    hidden = True if os.environ.get("TQDM_DISABLE") else None  # None: if this is no terminal
    return tqdm(desc=name, total=total, unit=f" {unit}", initial=start, delay=delay, leave=False, disable=hidden)


def command(
    script: str, main: Callable[[list[str] | None], int | None], argv: list[str] | None = None, interrupted: str = ""
) -> int:
    """Run a script's main(): what a user can mend ends in one line, not in a traceback. Returns the exit status.

    `interrupted` is what to say after Ctrl-C.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal's encoding lacks
    try:
        return main(argv) or 0
    except Ended:
        return 1
    except BrokenPipeError:  # who read the output had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Problem, OSError) as error:
        where = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        message = "; ".join(map(str, [where, *getattr(error, "__notes__", [])]))
        print(f"{script}: {printable(message)}", file=sys.stderr)
        return getattr(error, "status", 1)
    except KeyboardInterrupt as interrupt:
        with contextlib.suppress(OSError):
            print(f"{script}: interrupted{interrupted}", file=sys.stderr)
            for how_to_go_on in getattr(interrupt, "__notes__", []):
                print(how_to_go_on, flush=True)
        return 130


def end(status: int) -> None:
    """End the program with this exit status."""
    try:
        sys.stdout.flush()
    except OSError:  # who read it has ended, and Python would say so at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if "RANK" in os.environ:  # one of PyTorch's threads would now and then abort a process that ends in peace
        os._exit(status)
    sys.exit(status)


# ---- the script ----------------------------------------------------------------------------------------------------


def why(device: torch.device, precision: torch.dtype) -> tuple[str, str]:
    """The reasons for `auto`'s choice of device and precision, in words."""
    of_device = {
        "cuda": "an NVIDIA GPU is the fastest device here",
        "mps": "an Apple GPU is faster than the CPU",
        "cpu": "no CUDA or MPS device answers",
    }[device.type]
    if precision == torch.bfloat16:
        kind = "GPU" if device.type == "cuda" else "CPU"
        return of_device, f"this {kind} computes bf16 natively, with the range of fp32"
    of_precision = {
        "cuda": "this GPU is older than Ampere and has no bf16",
        "mps": "autocast gives wrong gradients on MPS",
        "cpu": "this CPU has neither AVX512-BF16 nor AMX, and would emulate bf16",
    }[device.type]
    return of_device, of_precision


def try_out(device: torch.device, precision: torch.dtype) -> float:
    """One CIFAR-sized convolution, forward and backward, warmed up; returns its milliseconds.

    Raises RuntimeError when the result is not finite.
    """
    layout = memory_format(device)
    images = torch.rand(64, 3, 32, 32, device=device).to(memory_format=layout)
    convolution = torch.nn.Conv2d(3, 32, 5, padding=2, device=device).to(memory_format=layout)
    for _ in range(5):
        start = time.perf_counter()
        with autocast(device, precision):
            total = convolution(images).float().sum()
        total.backward()
        gradient = convolution.weight.grad.sum().item()  # .item() waits for the device
    if not np.isfinite(gradient):
        raise RuntimeError(f"the convolution's gradient on {device} is {gradient}")
    return 1000 * (time.perf_counter() - start)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="What this machine has, and what a run would use.")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    parser.add_argument("--precision", default="auto", choices=["auto", *PRECISIONS], help="default: auto")
    args = parser.parse_args(argv)
    device = pick(args.device)
    precision = pick_precision(args.precision, device)

    rows = [("python", platform.python_version())]
    for package in ("torch", "torchvision"):
        try:
            rows.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    found = available()
    if not any(name.startswith("cuda") for name in found):
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        rows.append(("cuda", f"none (this torch was built for {built})"))
    if "mps" not in found:
        rows.append(("mps", "none"))
    rows += found.items()
    precision_name = next(name for name, dtype in PRECISIONS.items() if dtype == precision)
    device_reason, precision_reason = why(device, precision)
    rows.append(("device", f"{args.device} -> {device}" + f": {device_reason}" * (args.device == "auto")))
    rows.append(
        ("precision", f"{args.precision} -> {precision_name}" + f": {precision_reason}" * (args.precision == "auto"))
    )
    for name, what in rows:
        print(f"{name:12} {what}")
    milliseconds = try_out(device, precision)
    print(f"{'trial':12} 5x5 convolution, forward and backward, 64 pictures: {milliseconds:.1f} ms ... ok")


def cli(argv: list[str] | None = None) -> int:
    return command("device.py", main, argv)


if __name__ == "__main__":
    end(cli())

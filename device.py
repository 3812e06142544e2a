"""Which device and precision a run uses, and why; how the device is set up and random numbers are seeded.

`python device.py` shows what this machine has, what `auto` picks and why, and tries it with one convolution.
"""

from quick.cli import check_flags
from quick.run.flags import parse_device

if __name__ == "__main__":  # --help and wrong flags are answered before PyTorch is imported, which takes seconds
    check_flags("device.py", parse_device)

import ctypes
import os
import platform
import sys
import time
from contextlib import AbstractContextManager
from importlib import metadata

import numpy as np
import torch

from quick.cli import exit_script, run_script
from quick.data.streaming import cores
from quick.errors import DeviceError
from quick.processes import ALONE, Group

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def pick(name: str = "auto", group: Group = ALONE) -> torch.device:
    """The device called `name`: `auto` (the fastest one here), `cpu`, `cuda`, `cuda:1` or `mps`.

    Each process of a group gets a GPU of its own. Raises DeviceError, which lists what is there, when this machine has
    no such device.
    """
    limit_threads()
    found = available()
    if group.size > 1:
        found.pop("mps", None)  # it cannot talk to other processes
        if name.startswith("cuda:"):
            raise DeviceError(f"--device {name} is one for {group.size} processes; --device cuda gives each its own")
    chosen = next(iter(found)) if name == "auto" else name
    if chosen in ("cuda", "cuda:0"):
        chosen = f"cuda:{group.local_rank}"
    if chosen not in found:
        here = ", ".join(f"{device} ({what})" for device, what in found.items())
        raise DeviceError(f"no device {chosen!r} here; this machine has: {here}")
    return torch.device(chosen)


def limit_threads() -> None:
    """Compute with at most as many threads as this process may use cores, also in a container that has a share of them.

    PyTorch counts the cores of the whole machine; many threads on few cores only wait for each other. What the user
    says in OMP_NUM_THREADS stays.
    """
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores():
        torch.set_num_threads(cores())


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


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of convolutions and matrix products, by its name: `auto`, `fp32`, `bf16` or `fp16`.

    `auto` is bf16 where the hardware computes in it: NVIDIA GPUs from Ampere (2020) on, and CPUs with AVX512-BF16 or
    AMX. It needs no loss scaling, and takes about 0.6 of the time on such a CPU. Elsewhere bf16 is slow, emulated or
    unsafe, and `auto` is fp32. Raises DeviceError for a precision that cannot work.
    """
    if name == "auto":
        return torch.bfloat16 if computes_bf16(device) else torch.float32
    if name not in DTYPES:
        raise DeviceError(f"no precision {name!r}; there are: auto, {', '.join(DTYPES)}")
    # Autocast and GradScaler give wrong gradients on MPS (pytorch PR 184286); fp16 convolutions crawl on CPUs.
    if (device.type, name) in {("mps", "bf16"), ("mps", "fp16"), ("cpu", "fp16")}:
        raise DeviceError(f"{name} does not train well on {device.type}; use --precision fp32")
    return DTYPES[name]


def computes_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 numbers in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # PyTorch 2.10 cannot tell
        return False
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager:
    """The context for a forward pass in this precision; weights stay float32."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


def memory_format(device: torch.device) -> torch.memory_format:
    """How `(N, C, H, W)` lies in memory: channels_last is faster (1.4 times on CPUs), but wrong on MPS.

    There BatchNorm2d and average pooling compute wrong gradients in silence (pytorch issues 175189, 175190).
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def tune(device: torch.device, deterministic: bool = False) -> None:
    """Turn on what makes this device fast: on GPUs cuDNN's search for the best kernel, and TF32 for float32 products.

    With `deterministic` a GPU gives the same bits each time: no search, and slower kernels. PyTorch warns of an
    operation that has no such kernel.

    On Linux's CPUs freed memory is kept for the next step. By default glibc gives blocks above 32 MB back to the system
    at once, and the next step waits while the system clears them again. A step of 1,000 pictures then takes 1.7 times
    as long.
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


def seed(*numbers: int) -> None:
    """Seed torch's generators on all devices (initialisation, dropout), with numbers such as `(seed, epoch, step)`."""
    number = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(number)
    # torch.manual_seed would also queue the seed for GPUs that nothing uses yet, which takes half a millisecond.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(number)


def memory_used(device: torch.device) -> float:
    """The most memory that this process had at a time, in MiB: on a GPU, or else in the machine (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ---- python device.py ------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = parse_device(argv)
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
    device_reason, precision_reason = why(device, precision)
    precision_name = next(name for name, dtype in DTYPES.items() if dtype == precision)
    rows.append(("device", f"{args.device} -> {device}" + f": {device_reason}" * (args.device == "auto")))
    rows.append(
        ("precision", f"{args.precision} -> {precision_name}" + f": {precision_reason}" * (args.precision == "auto"))
    )
    for name, what in rows:
        print(f"{name:12} {what}")
    milliseconds = try_out(device, precision)
    print(f"{'trial':12} 5x5 convolution, forward and backward, 64 pictures: {milliseconds:.1f} ms ... ok")


def why(device: torch.device, precision: torch.dtype) -> tuple[str, str]:
    """The reasons for the choice of device and of precision by `auto`, in words."""
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
    """The milliseconds of one CIFAR-sized convolution, forward and backward, after a warm-up.

    Raises DeviceError when the gradient is not finite.
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
        raise DeviceError(f"the convolution's gradient on {device} is {gradient}; take another --device or --precision")
    return 1000 * (time.perf_counter() - start)


def cli(argv: list[str] | None = None) -> int:
    return run_script("device.py", main, argv)


if __name__ == "__main__":
    exit_script(cli())

"""The device and the precision that a run uses, how they are set up, and the seeds."""

import os
import re
import statistics
import sys

import pytest
import torch
from conftest import same_weights
from runs import start

import device
from quick.errors import DeviceError
from quick.processes import Group


def test_auto_takes_the_first_of_what_is_here():
    assert str(device.pick("auto")) == next(iter(device.available()))
    assert "cpu" in device.available()


def test_a_container_with_a_share_of_the_cores_gets_as_many_threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(device, "cores", lambda: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    try:
        torch.set_num_threads(2)
        assert device.available()["cpu"] == "2 threads"
        device.pick("cpu")
        assert torch.get_num_threads() == 2  # as the user says
        monkeypatch.delenv("OMP_NUM_THREADS")
        device.pick("cpu")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "", "cpu:0x"])
def test_a_missing_device_is_refused_with_a_list_of_what_is_here(name):
    with pytest.raises(DeviceError, match=r"no device .* this machine has: .*cpu \(\d+ threads\)"):
        device.pick(name)


def test_cuda_means_the_first_gpu(monkeypatch):
    monkeypatch.setattr(device, "available", lambda: {"cuda:0": "a GPU", "cuda:1": "a GPU", "cpu": "2 threads"})
    assert device.pick("cuda") == torch.device("cuda:0")
    assert device.pick("cuda:1") == torch.device("cuda:1")
    assert device.pick("auto") == torch.device("cuda:0")


@pytest.mark.parametrize("name", ["cuda:1", "cuda"])
def test_each_process_gets_a_gpu_of_its_own(name, monkeypatch):
    monkeypatch.setattr(device, "available", lambda: {"cuda:0": "a GPU", "cuda:1": "a GPU", "mps": "", "cpu": ""})
    groups = [Group(rank=rank, size=3, local_rank=rank % 3, local_size=3) for rank in range(3)]
    if name == "cuda:1":
        with pytest.raises(DeviceError, match="--device cuda gives each its own"):
            device.pick(name, groups[0])
        return
    assert [str(device.pick(name, group)) for group in groups[:2]] == ["cuda:0", "cuda:1"]
    with pytest.raises(DeviceError, match="no device 'cuda:2' here"):
        device.pick(name, groups[2])


def test_a_second_machine_begins_with_its_first_gpu(monkeypatch):
    monkeypatch.setattr(device, "available", lambda: {"cuda:0": "a GPU", "cuda:1": "a GPU", "cpu": ""})
    groups = [Group(rank=2 + place, size=4, local_rank=place, local_size=2) for place in (0, 1)]
    assert [str(device.pick("auto", group)) for group in groups] == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)],
)
def test_auto_is_bf16_on_cpus_that_compute_in_it(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert device.pick_precision("auto", torch.device("cpu")) == expected
    assert ("computes bf16" in device.why(torch.device("cpu"), expected)[1]) == (expected == torch.bfloat16)


def count_faults(pipe) -> None:
    """Send how many pages the system had to clear in a usual step."""
    import resource

    device.tune(torch.device("cpu"))
    convolution, images, faults = torch.nn.Conv2d(3, 32, 1), torch.rand(350, 3, 32, 32), []
    for _ in range(15):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        convolution(images).relu().sum().backward()  # blocks of 46 MB, more than glibc keeps by default
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    pipe.send(statistics.median(faults))


@pytest.mark.skipif(device.platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_freed_memory_is_kept_for_the_next_step(processes):
    pipe, other_end = processes.Pipe()
    process = processes.Process(target=count_faults, args=(other_end,))
    process.start()
    assert pipe.poll(60) and pipe.recv() < 5000  # pages that the system had to clear; above 50,000 by default
    process.join()


def test_precision_on_the_cpu():
    cpu = torch.device("cpu")
    assert device.pick_precision("bf16", cpu) == torch.bfloat16
    with pytest.raises(DeviceError, match="fp16 does not train well on cpu"):
        device.pick_precision("fp16", cpu)
    with pytest.raises(DeviceError, match="no precision 'fp8'"):
        device.pick_precision("fp8", cpu)


def test_precision_on_a_gpu_depends_on_its_generation(monkeypatch):
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert device.pick_precision("auto", gpu) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert device.pick_precision("auto", gpu) == torch.float32
    assert device.pick_precision("fp16", gpu) == torch.float16


def test_mps_gets_contiguous_float32_alone():
    mps = torch.device("mps")
    assert device.memory_format(mps) == torch.contiguous_format
    assert device.pick_precision("auto", mps) == torch.float32
    for name in ("bf16", "fp16"):
        with pytest.raises(DeviceError, match="on mps"):
            device.pick_precision(name, mps)


def test_autocast_computes_in_the_precision_asked_for():
    images, cpu = torch.rand(1, 3, 8, 8), torch.device("cpu")
    for precision in (torch.float32, torch.bfloat16, torch.float16):
        with device.autocast(cpu, precision):
            assert torch.nn.Conv2d(3, 4, 3)(images).dtype == precision


def test_seed_repeats_and_tells_epochs_apart():
    draws = []
    for numbers in ((0, 1), (0, 1), (0, 2), (1, 1)):
        device.seed(*numbers)
        draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 3


def test_the_seed_hangs_on_every_number():
    draws = set()
    for place in range(5):  # all zero, and then each of (seed, epoch, step, rank) alone
        device.seed(*(int(number == place) for number in range(4)))
        draws.add(torch.rand(1).item())
    assert len(draws) == 5


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell")
def test_memory_is_told_in_mib():
    assert 20 < device.memory_used(torch.device("cpu")) < 10**6  # Python with PyTorch takes hundreds


def test_the_table_ends_in_ok(capsys):
    device.main(["--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["python", "torch", "torchvision"]
    assert any(line.startswith("device       cpu -> cpu") for line in lines)
    assert lines[-1].endswith("ok")


def test_the_reasons_for_auto_are_given(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    device.main([])
    out = capsys.readouterr().out
    assert "auto -> cpu: no CUDA or MPS device answers" in out
    assert re.search("auto -> (fp32|bf16): this CPU ", out)


def test_a_wrong_device_is_a_wrong_call(capsys):
    assert device.cli(["--device", "cuda:99"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("device.py: no device 'cuda:99' here") and error.count("\n") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda_computes(precision):
    gpu = device.pick("cuda")
    assert device.try_out(gpu, device.pick_precision(precision, gpu)) > 0


def test_deterministic_runs_give_the_same_bits(tmp_path):
    on = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        for name in ("a", "b"):
            assert start(tmp_path, name, "--deterministic", "--device", on) == 0
            assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        device.tune(torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
    assert same_weights(tmp_path / "a" / "best.pt", tmp_path / "b" / "best.pt")

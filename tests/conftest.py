"""What several tests use: small generated pictures, a trained run, and the scripts as a user starts them."""

import copy
import functools
import io
import multiprocessing.forkserver
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

# Small pictures gain nothing from more threads, and wait long for each other where something else runs.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from PIL import Image

import datasets
import train
from quick.checkpoints import to_bytes, write_file
from quick.processes import Group

ROOT = Path(__file__).parent.parent
COLOURS = {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (220, 40, 30)}


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the expensive tests too: all groups, networks and pages")
    parser.addoption("--kills", type=int, help="how many processes are killed at random moments (1; with --all 3)")
    parser.addoption("--fuzz", type=int, help="how many pictures, configs, checkpoints are damaged (50; --all: 200)")


def pytest_configure(config):
    config.addinivalue_line("markers", "expensive: runs with --all alone")
    everything = config.getoption("--all")
    if config.option.kills is None:
        config.option.kills = 3 if everything else 1
    if config.option.fuzz is None:
        config.option.fuzz = 200 if everything else 50


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name != "test_00_one_step.py")  # the whole story comes first
    if config.getoption("--all"):
        return
    for item in items:
        if item.get_closest_marker("expensive"):
            item.add_marker(pytest.mark.skip(reason="expensive: --all runs it"))


def noisy(colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A picture of one colour with noise on it."""
    noise = np.random.RandomState(seed).randint(-30, 31, (size[1], size[0], 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session", autouse=True)
def shapes_are_drawn_once():
    """Most tests train on the same few shapes, which take longer to draw than to train on."""
    drawn = functools.cache(datasets.shapes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "shapes", lambda *how, **more: copy.copy(drawn(*how, **more)))
        yield


@pytest.fixture(scope="session")
def colour_folder(tmp_path_factory) -> Path:
    """A picture folder: 3 classes of colours, 20 training and 6 test pictures each."""
    root = tmp_path_factory.mktemp("colours")
    for split, count in (("train", 20), ("test", 6)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                noisy(colour, number).save(root / split / name / f"{number:02}.png")
    return root


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """The run folder of three epochs on 1,000 shapes."""
    logs = tmp_path_factory.mktemp("logs")
    flags = f"--data shapes --limit 1000 --epochs 3 --log-dir {logs} --run-name shapes --device cpu --precision fp32"
    status = train.cli(flags.split())
    assert status == 0
    return logs / "shapes"


@pytest.fixture(scope="session")
def colour_run(tmp_path_factory, colour_folder) -> Path:
    """The run folder of a network that tells the colours of `colour_folder` apart."""
    logs = tmp_path_factory.mktemp("logs")
    flags = f"--epochs 15 --batch-size 20 --log-dir {logs} --run-name colours --device cpu --no-whiten --view-every 15"
    assert train.cli(["--data", str(colour_folder), *flags.split()]) == 0
    return logs / "colours"


@pytest.fixture(scope="session")
def processes():
    """Starts processes at once: they come from a server that has imported everything."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs processes that a server starts (not on Windows)")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "predict", "torch.utils.tensorboard", "torch._inductor", "tqdm"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        multiprocessing.forkserver.ensure_running()
    return context


def in_two_processes(processes, work, folder: Path) -> list:
    """What `work(group, folder)` returned in each process of a group of two: tensors, and plain values."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    members = [processes.Process(target=member, args=(rank, store.port, work, folder)) for rank in (0, 1)]
    for process in members:
        process.start()
    for process in members:
        process.join(100)
        process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def member(rank: int, port: int, work, folder: Path) -> None:
    """In each of the two processes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    with Group(timeout=60) as group:
        torch.save(work(group, folder), folder / f"{rank}.pt")


@pytest.fixture
def script(tmp_path):
    """Starts one of the scripts as a user would, in an empty folder; returns the finished process."""

    def start(name: str, *arguments: object, environment: dict = os.environ) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / name), *map(str, arguments)]
        environment = dict(environment) | {"CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)

    return start


def save(path: Path, checkpoint: dict) -> None:
    write_file(path, to_bytes(checkpoint))


def same_weights(first: Path, second: Path) -> bool:
    """Whether two checkpoints hold the same bits."""
    states = [torch.load(path, weights_only=True)["state_dict"] for path in (first, second)]
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def as_bytes(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()

"""Groups of processes that torchrun starts: the same results as one process, and what becomes of their failures."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from conftest import ROOT, noisy
from test_reliability import contents, differences

import datasets
import device
import model
import predict
import train

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs PyTorch with gloo"
)

SMALL = "--data shapes --limit 200 --image-size 8 --batch-size 33 --epochs 2 --device cpu --precision fp32 --no-views"
AGREEING = {  # runs that are the same, to rounding, on any number of processes
    "held out": "--no-batch-norm --flip --crop 2 --cutout 2 --val-fraction 0.2 --optimizer muon --patience 1",
    "hard": "--no-batch-norm --hardest 0.5 --accumulate 3 --clip-grad 1 --jitter 0.3 --resized-crop 0.5",
    "synchronised": "--sync-bn --lr 0.001",
    "streamed": "--data ROOT/colours --batch-size 7 --lr 0.01 --no-batch-norm --memory-share 0 --workers 0",
    "frozen": "--weights ROOT/colours.pt --image-size 32 --freeze all --no-flip --crop 0 --tta none",
}
PAIRS = [(name, 2) for name in AGREEING] + [(name, 3) for name in ("held out", "hard", "streamed")]
FAULTS = {
    "stopped": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "wrong": lambda: (_ for _ in ()).throw(train.TrainingError("no good")),
    "late": lambda: time.sleep(3),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


# ---- in the processes that torchrun starts, and in pytest's own ----


def call(task: dict, rank: int = 0) -> list:
    """Call a script; its exit status, and what it printed."""
    step, steps = train.Trainer.step, []

    def faulty(*inputs):
        steps.append(None)
        if [rank, len(steps)] == task.get("at") and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            FAULTS[task["fault"]]()
        return step(*inputs)

    train.Trainer.step = faulty
    out, err = io.StringIO(), io.StringIO()
    out.reconfigure = lambda **_: None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = {"train": train, "predict": predict}[task["script"]].cli(task["argv"])
    finally:
        train.Trainer.step = step
    return [status, out.getvalue(), err.getvalue()]


def run_plan(path: Path) -> None:
    rank, found = int(os.environ["RANK"]), {}
    for name, task in json.loads(path.read_text()).items():
        if torch.distributed.is_initialized():  # the task before failed, with which a process would have ended
            torch.distributed.destroy_process_group()
        train.VOTE_SECONDS = task.get("votes", 0.0)  # at each step
        found[name] = call(task, rank)
        path.with_name(f"{rank}.json").write_text(json.dumps(found))
    device.end(0)


if __name__ == "__main__":
    run_plan(Path(sys.argv[1]))


# ---- in pytest ----


def member(environment: dict[str, str], plan: Path) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    run_plan(plan)


def group(processes, count: int, plan: dict[str, dict], folder: Path) -> list[dict]:
    """Start a group as torchrun does, but at once; what each of its processes found."""
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(plan))
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_RUN_ID": uuid.uuid4().hex}
    members = []
    for rank in range(count):
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
        members.append(processes.Process(target=member, args=(environment, folder / "plan.json")))
        members[-1].start()
    for process in members:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in members] == [0] * count
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def torchrun(count: int, plan: dict[str, dict], folder: Path, *flags: str) -> tuple[list[dict], str]:
    """Start a group; what each of its processes found, and what torchrun printed."""
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command += [__file__, str(folder / "plan.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)], done.stderr


def training(logs: Path, name: str, flags: str, **more: object) -> dict:
    argv = [*SMALL.split(), *flags.split(), "--log-dir", str(logs), "--run-name", name]
    return {"script": "train", "argv": argv} | more


@pytest.fixture(scope="module")
def root(tmp_path_factory, colour_folder, colour_run) -> Path:
    """A folder with pictures, of which some are bad, in `colours` and, without classes, in `pictures`."""
    root = tmp_path_factory.mktemp("groups")
    shutil.copytree(colour_folder, root / "colours")
    for name in ("train/red/broken.png", "train/blue/empty.jpg", "test/red/not.png"):
        (root / "colours" / name).write_bytes(b"" if "empty" in name else b"nothing")
    (root / "pictures").mkdir()
    for number in range(7):
        noisy((30 * number, 100, 200 - 20 * number), number).save(root / "pictures" / f"{number}.png")
    (root / "pictures" / "3b.png").write_bytes(b"nothing")
    shutil.copy(colour_run / "best.pt", root / "colours.pt")
    return root


def shared_plan(root: Path, count: int) -> dict[str, dict]:
    """What one, two and three processes do with the same result."""
    plan = {
        name: training(root / str(count), name, flags.replace("ROOT", str(root)))
        for name, flags in AGREEING.items()
        if count == 1 or (name, count) in PAIRS
    }
    asking = ["--checkpoint", str(root / "colours.pt"), "--device", "cpu"]
    plan["evaluated"] = {"script": "predict", "argv": ["--evaluate", str(root / "colours"), *asking, "--json"]}
    plan["table"] = {
        "script": "predict",
        "argv": [str(root / "pictures"), *asking, "--csv", str(root / f"{count}.csv")],
    }
    return plan


def resuming(root: Path, before: Path, after: str) -> dict:
    """A task that goes on with a copy of an interrupted run."""
    shutil.copytree(before, root / after)
    return {"script": "train", "argv": ["--resume", str(root / after)]}


@pytest.fixture(scope="module")
def found(root, processes) -> dict:
    """What groups of one, two and three processes found, by their size and rank."""
    one = {name: call(task) for name, task in shared_plan(root, 1).items()}
    one["stopped"] = call(training(root / "1", "stopped", AGREEING["hard"], fault="stopped", at=[0, 8]))
    frozen = shared_plan(root, 1)["frozen"]["argv"][:-1]
    one["stopped frozen"] = call({"script": "train", "argv": [*frozen, "x"], "fault": "stopped", "at": [0, 8]})
    plan = shared_plan(root, 2)
    plan["stopped"] = training(root / "2", "stopped", AGREEING["hard"], fault="stopped", at=[1, 8])
    plan["1 to 2"] = resuming(root, root / "1" / "stopped", "1 to 2")
    long = "--no-batch-norm --batch-size 4 --epochs 20"
    plan["long"] = training(root / "2", "long", long, fault="stopped", at=[1, 120], votes=train.VOTE_SECONDS)
    plan["frozen on 2"] = resuming(root, root / "1" / "x", "frozen on 2")
    plan["averages"] = training(root / "2", "averages", "--lr 0.01")  # of each process's pictures
    plan["small"] = training(root / "2", "small", "--batch-size 3 --accumulate 2")
    plan["wrong"] = training(root / "2", "wrong", AGREEING["held out"], fault="wrong", at=[1, 3])
    two = group(processes, 2, plan, root / "two")
    one["2 to 1"] = call(resuming(root, root / "2" / "stopped", "2 to 1"))
    plan = shared_plan(root, 3) | {"2 to 3": resuming(root, root / "2" / "stopped", "2 to 3")}
    plan["late"] = training(root / "3", "late", AGREEING["held out"] + " --timeout 2", fault="late", at=[1, 3])
    three = group(processes, 3, plan, root / "three")
    return {1: [one], 2: two, 3: three}


def agree(first: Path, second: Path) -> bool:
    """Whether two runs' metrics and last weights are the same to rounding."""
    metrics = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (first, second)
    ]
    for one, other in zip(*metrics, strict=True):
        for key in set(one) - {"epoch_seconds", "images_per_second"}:
            likely = 0.011 if "accuracy" in key else 1e-3  # two answers that hang on the last bit
            assert other[key] == pytest.approx(one[key], rel=1e-3, abs=likely), key
    states = [torch.load(run / "epoch_002.pt", weights_only=True)["state_dict"] for run in (first, second)]
    return all(torch.allclose(states[0][name], states[1][name], rtol=1e-2, atol=1e-3) for name in states[0])


@pytest.mark.parametrize(("name", "count"), PAIRS)
def test_any_number_of_processes_takes_the_same_steps(name, count, found, root):
    assert [of_rank[name][0] for of_rank in found[count]] == [0] * count
    assert agree(root / "1" / name, root / str(count) / name)


@pytest.mark.parametrize(("name", "count"), PAIRS)
def test_the_first_process_alone_prints_and_writes(name, count, found, root):
    first, *others = (of_rank[name] for of_rank in found[count])
    assert [printed for of_rank in others for printed in of_rank[1:]] == [""] * 2 * len(others)
    without_figures = [re.sub(r"[0-9.,]+", "#", found_by[1]) for found_by in (found[1][0][name], first)]
    assert without_figures[0].replace("/#/", "/") == without_figures[1].replace("/#/", "/")
    one, other = (sorted(path.name[:9] for path in (root / str(n) / name).iterdir()) for n in (1, count))
    assert one == other and sum(file.startswith("events") for file in other) == 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_bad_files_are_named_once_in_order(count, found, root):
    lines = found[count][0]["streamed"][2].splitlines()
    left_out = [line for line in lines if line.startswith("left out: ")]
    names = ["train/blue/empty.jpg", "train/red/broken.png", "test/red/not.png"]
    assert [line.split(": ")[1] for line in left_out] == [str(root / "colours" / name) for name in names]


@pytest.mark.parametrize("count", [2, 3])
def test_each_test_picture_counts_once(count, found):
    one, other = (json.loads(found[n][0]["evaluated"][1]) for n in (1, count))
    assert other["pictures"] == 18 and other["confusion"] == one["confusion"]
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)


@pytest.mark.parametrize("count", [2, 3])
def test_files_are_shared_and_their_answers_merged_in_order(count, found, root):
    one, first = found[1][0]["table"], found[count][0]["table"]
    assert (root / f"{count}.csv").read_text() == (root / "1.csv").read_text()
    assert (one[0], first[0]) == (1, 0) and first[2] == one[2]
    assert "3b.png: not a picture that Pillow can read" in first[2]


@pytest.mark.parametrize("way", ["1 to 2", "2 to 1", "2 to 3"])
def test_a_run_goes_on_with_another_number_of_processes(way, found, root):
    before, after = int(way[0]), int(way[-1])
    assert all(of_rank["stopped"][0] == 130 for of_rank in found[before])
    assert found[before][0]["stopped"][1].endswith(f"\npython train.py --resume {root / str(before) / 'stopped'}\n")
    assert all(of_rank[way][0] == 0 for of_rank in found[after])
    assert " goes on in epoch 2 at step " in found[after][0][way][2]
    assert agree(root / "1" / "hard", root / way)


def test_votes_that_are_seldom_stop_all_too(found, root):
    assert [of_rank["long"][0] for of_rank in found[2]] == [130, 130]
    assert (root / "2" / "long" / "interrupted.pt").exists()


def test_a_frozen_network_goes_on_with_two_processes(found, root):
    assert found[1][0]["stopped frozen"][0] == 130 and found[2][0]["frozen on 2"][0] == 0
    assert agree(root / "1" / "frozen", root / "frozen on 2")


def test_all_evaluate_with_the_averages_that_are_saved(found, root):
    assert [of_rank["averages"][0] for of_rank in found[2]] == [0, 0]
    network, checkpoint = model.load(root / "2" / "averages" / "epoch_002.pt")
    how = {name: checkpoint[name] for name in ("image_size", "mean", "std")}
    [test_set] = datasets.load("shapes", limit=200, splits=["test"], **how)
    loss = model.score(*model.outputs(network, test_set.batches(50), checkpoint["config"]["tta"]))["loss"]
    assert loss == pytest.approx(checkpoint["metrics"]["test_loss"], rel=1e-4)


def test_an_error_of_one_process_ends_all_with_its_message(found):
    (first_status, _, first), (status, _, error) = (of_rank["wrong"] for of_rank in found[2])
    assert status == first_status == 1
    assert error == "train.py: no good\n" and "train.py: " not in first


def test_processes_do_not_wait_for_ever(found):
    assert [of_rank["late"][0] for of_rank in found[3]] == [1, 1, 1]
    said = [line for of_rank in found[3] for line in of_rank["late"][2].splitlines() if line.startswith("train.py: ")]
    assert said == ["train.py: waited 2 seconds (--timeout) for another process"]


def test_an_error_of_all_is_said_once(found):
    (first_status, _, first), (_, _, error) = (of_rank["small"] for of_rank in found[2])
    assert first_status == 2 and error == ""
    assert first == (
        "train.py: --batch-size 3: that is less than a picture for each of 2 processes in 2 pieces (--accumulate)\n"
    )


def test_a_killed_process_brings_the_group_back_to_the_same_bits(found, root, tmp_path):
    plan = {"killed": training(tmp_path / "logs", "killed", AGREEING["held out"], fault="killed", at=[1, 9])}
    processes, _ = torchrun(2, plan, tmp_path / "plan", "--max-restarts", "1")
    assert [of_rank["killed"][0] for of_rank in processes] == [0, 0]
    assert f"{tmp_path / 'logs' / 'killed'}: goes on in epoch 2\n" in processes[0]["killed"][2]
    assert not differences(contents(root / "2" / "held out"), contents(tmp_path / "logs" / "killed"))


def test_a_job_that_is_sent_again_goes_on_with_its_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    task = training(tmp_path, "a", "--hardest 0.5")
    task["argv"] = task["argv"][:-2]  # without a name for the run
    other = task | {"argv": [*task["argv"], "--lr", "0.02"]}
    assert call(task | {"fault": "stopped", "at": [0, 8]})[0] == 130
    assert call(other)[0] == 0  # of other flags
    status, _, said = call(task)
    assert status == 0 and " goes on in epoch 2 at step " in said and len(list(tmp_path.iterdir())) == 2
    assert "goes on" not in call(task)[2] and len(list(tmp_path.iterdir())) == 3  # it was finished
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert ": is finished\n" in call(task)[2]  # torchrun started it again while it said its last words
    assert len(list(tmp_path.iterdir())) == 3


def test_without_torchrun_nothing_of_it_is_started(tmp_path, monkeypatch):
    for name in ("init_process_group", "rendezvous", "all_reduce", "broadcast"):
        monkeypatch.setattr(torch.distributed, name, None)
    assert call(training(tmp_path, "a", "--epochs 1"))[0] == 0


@pytest.mark.parametrize("pieces", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_are_all_of_a_batch_and_none_is_a_single_picture(count, pieces):
    for size in (1, 2, 3, 7, 33, 64):
        of_rank = [
            datasets.share(slice(10, 10 + size), device.Group(rank=r, count=count), pieces) for r in range(count)
        ]
        taken = sorted(place for share in of_rank for at in share for place in range(at.start, at.stop))
        assert taken == list(range(size)) and len({len(share) for share in of_rank}) == 1
        assert size == 1 or 1 not in {at.stop - at.start for share in of_rank for at in share}
        assert all(at.stop > at.start for at in of_rank[0])


@pytest.mark.parametrize("name", ["cuda:1", "cuda"])
def test_each_process_gets_a_gpu_of_its_own(name, monkeypatch):
    monkeypatch.setattr(device, "available", lambda: {"cuda:0": "a GPU", "cuda:1": "a GPU", "mps": "", "cpu": ""})
    groups = [device.Group(rank=rank, count=3, local_rank=rank % 3, local_count=3) for rank in range(3)]
    if name == "cuda:1":
        with pytest.raises(device.DeviceError, match="--device cuda gives each its own"):
            device.pick(name, groups[0])
        return
    assert [str(device.pick(name, group)) for group in groups[:2]] == ["cuda:0", "cuda:1"]
    with pytest.raises(device.DeviceError, match="no device 'cuda:2' here"):
        device.pick(name, groups[2])


def test_a_second_machine_begins_with_its_first_gpu(monkeypatch):
    monkeypatch.setattr(device, "available", lambda: {"cuda:0": "a GPU", "cuda:1": "a GPU", "cpu": ""})
    groups = [device.Group(rank=2 + place, count=4, local_rank=place, local_count=2) for place in (0, 1)]
    assert [str(device.pick("auto", group)) for group in groups] == ["cuda:0", "cuda:1"]


def test_predict_without_a_file_for_its_table_refuses_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert predict.cli(["docs", "--csv"]) == 2
    assert capsys.readouterr().err == "predict.py: several processes need a file to write to: add --csv FILE.csv\n"

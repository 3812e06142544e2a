"""Groups of processes, as torchrun starts them: the same results as one process, and what becomes of their failures.

The groups come from a server of processes, in a second; `--all` also starts larger ones, and torchrun itself.
"""

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
from runs import contents, differences

import datasets
import model
import predict
import train
from quick.cli import exit_script
from quick.errors import TrainingError
from quick.nets.losses import score
from quick.run import stopping
from quick.run.evaluation import outputs_of_set

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs PyTorch with gloo"
)

SMALL = "--data shapes --limit 200 --image-size 8 --batch-size 33 --epochs 2 --device cpu --precision fp32 --no-views"
AGREEING = {  # runs that are the same, to rounding, on any number of processes
    "held out": "--no-batch-norm --flip --crop 2 --cutout 2 --val-fraction 0.2 --optimizer muon --patience 1",
    "hard": "--no-batch-norm --hardest 0.5 --accumulate 3 --clip-grad 1 --jitter 0.3 --resized-crop 0.5",
    "synchronised": "--sync-bn --lr 0.001",
    "streamed": "--data ROOT/colours --batch-size 7 --lr 0.01 --no-batch-norm --memory-share 0 --workers 0 "
    "--balance 1 --best f1",
    "frozen": "--weights ROOT/colours.pt --image-size 32 --freeze all --no-flip --crop 0 --tta none",
}
EXPENSIVE = {("frozen", 2), ("held out", 3), ("hard", 3), ("streamed", 3)}
PAIRS = [(name, 2) for name in AGREEING if (name, 2) not in EXPENSIVE]
PAIRS += [pytest.param(*pair, marks=pytest.mark.expensive) for pair in sorted(EXPENSIVE)]
COUNTS = [2, pytest.param(3, marks=pytest.mark.expensive)]


def fail() -> None:
    raise TrainingError("no good")


FAULTS = {
    "stopped": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "wrong": fail,
    "late": lambda: time.sleep(3),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


# ---- in the processes of a group, and in pytest's own ----


def call(task: dict, rank: int = 0) -> list:
    """Call a script; its exit status, and what it printed."""
    step, steps = train.train_step, []

    def faulty(*inputs):
        steps.append(None)
        if [rank, len(steps)] == task.get("at") and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            FAULTS[task["fault"]]()
        return step(*inputs)

    train.train_step = faulty
    out, err = io.StringIO(), io.StringIO()
    out.reconfigure = lambda **_: None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = {"train": train, "predict": predict}[task["script"]].cli(task["argv"])
    finally:
        train.train_step = step
    return [status, out.getvalue(), err.getvalue()]


def run_plan(path: Path) -> None:
    """Call the scripts of a plan, one after the other, and write down what each said."""
    rank, found = int(os.environ["RANK"]), {}
    for name, task in json.loads(path.read_text()).items():
        if torch.distributed.is_initialized():  # the task before failed, with which a process would have ended
            torch.distributed.destroy_process_group()
        stopping.VOTE_SECONDS = task.get("votes", 0.0)  # at each step
        found[name] = call(task, rank)
        path.with_name(f"{rank}.json").write_text(json.dumps(found))
    exit_script(0)


if __name__ == "__main__":
    run_plan(Path(sys.argv[1]))


# ---- in pytest ----


def member(environment: dict[str, str], plan: Path) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    run_plan(plan)


def group(
    processes, count: int, plan: dict[str, dict], folder: Path, restarts: int = 0
) -> tuple[list[dict], list[list[int]]]:
    """Start a group as torchrun does, but at once; what each of its processes found.

    When one of them dies all are ended, and are started again up to `restarts` times. The exit status of all
    processes, for each start, comes second.
    """
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(plan))
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_RUN_ID": uuid.uuid4().hex}
    statuses = []
    for restart in range(restarts + 1):
        shared["TORCHELASTIC_RESTART_COUNT"] = str(restart)
        members = []
        for rank in range(count):
            environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
            members.append(processes.Process(target=member, args=(environment, folder / "plan.json")))
            members[-1].start()
        deadline = time.monotonic() + 120
        while any(process.exitcode is None for process in members) and time.monotonic() < deadline:
            if any(process.exitcode for process in members):
                break
            time.sleep(0.01)
        for process in members:
            process.kill()
            process.join()
        statuses.append([process.exitcode for process in members])
        if statuses[-1] == [0] * count:
            break
    assert statuses[-1] == [0] * count
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)], statuses


def torchrun(count: int, plan: dict[str, dict], folder: Path, *flags: str) -> list[dict]:
    """Start a group by torchrun itself; what each of its processes found."""
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *flags]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    command += [__file__, str(folder / "plan.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


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
    for number in range(12):
        (root / "colours" / "train" / "red" / f"{number:02}.png").unlink()
    (root / "pictures").mkdir()
    for number in range(7):
        noisy((30 * number, 100, 200 - 20 * number), number).save(root / "pictures" / f"{number}.png")
    (root / "pictures" / "3b.png").write_bytes(b"nothing")
    shutil.copy(colour_run / "best.pt", root / "colours.pt")
    return root


def shared_plan(root: Path, count: int, everything: bool) -> dict[str, dict]:
    """What one, two and three processes do with the same result."""
    names = [name for name in AGREEING if everything or (name, 2) not in EXPENSIVE]
    plan = {
        name: training(root / str(count), name, AGREEING[name].replace("ROOT", str(root)))
        for name in names
        if count < 3 or (name, 3) in EXPENSIVE
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
def everything(request) -> bool:
    return request.config.getoption("--all")


@pytest.fixture(scope="module")
def one(processes, root, everything) -> dict:
    """What one process found; meanwhile the server of processes starts."""
    plan = shared_plan(root, 1, everything)
    plan["stopped"] = training(root / "1", "stopped", AGREEING["hard"], fault="stopped", at=[0, 8])
    if everything:
        frozen = plan["frozen"]["argv"][:-1]
        plan["stopped frozen"] = {"script": "train", "argv": [*frozen, "x"], "fault": "stopped", "at": [0, 8]}
    return {name: call(task) for name, task in plan.items()}


@pytest.fixture(scope="module")
def two(root, one, processes, everything) -> list[dict]:
    """What each of two processes found."""
    plan = shared_plan(root, 2, everything)
    plan["stopped"] = training(root / "2", "stopped", AGREEING["hard"], fault="stopped", at=[1, 8])
    plan["1 to 2"] = resuming(root, root / "1" / "stopped", "1 to 2")
    plan["averages"] = training(root / "2", "averages", "--lr 0.01")  # of each process's pictures
    plan["time"] = training(root / "2", "time", AGREEING["hard"] + " --time-limit 0.0001")
    plan["more time"] = {"script": "train", "argv": ["--resume", str(root / "2" / "time"), "--time-limit", "0"]}
    plan["small"] = training(root / "2", "small", "--batch-size 3 --accumulate 2")
    if everything:
        plan["frozen on 2"] = resuming(root, root / "1" / "x", "frozen on 2")
    # Last, since the other process notices it when this one has ended.
    plan["wrong"] = training(root / "2", "wrong", AGREEING["held out"], fault="wrong", at=[1, 3])
    return group(processes, 2, plan, root / "two")[0]


@pytest.fixture(scope="module")
def three(root, two, processes) -> list[dict]:
    """What each of three processes found."""
    plan = shared_plan(root, 3, True) | {"2 to 3": resuming(root, root / "2" / "stopped", "2 to 3")}
    plan["late"] = training(root / "3", "late", AGREEING["held out"] + " --timeout 2", fault="late", at=[1, 3])
    return group(processes, 3, plan, root / "three")[0]


@pytest.fixture
def found(request, count) -> list[dict]:
    """What each of `count` processes found."""
    return [request.getfixturevalue("one")] if count == 1 else request.getfixturevalue({2: "two", 3: "three"}[count])


def agree(first: Path, second: Path) -> bool:
    """Whether two runs' metrics and last weights are the same to rounding."""
    metrics = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (first, second)
    ]
    for one, other in zip(*metrics, strict=True):
        for key in set(one) - {"epoch_seconds", "images_per_second"}:
            likely = 0.011 if "accuracy" in key or "f1" in key else 1e-3  # two answers that depend on the last bit
            assert other[key] == pytest.approx(one[key], rel=1e-3, abs=likely), key
    states = [torch.load(run / "epoch_002.pt", weights_only=True)["state_dict"] for run in (first, second)]
    return all(torch.allclose(states[0][name], states[1][name], rtol=1e-2, atol=1e-3) for name in states[0])


# ---- the same results ----


@pytest.mark.parametrize(("name", "count"), PAIRS)
def test_any_number_of_processes_takes_the_same_steps(name, count, found, root):
    assert [of_rank[name][0] for of_rank in found] == [0] * count
    assert agree(root / "1" / name, root / str(count) / name)


@pytest.mark.parametrize(("name", "count"), PAIRS)
def test_the_first_process_alone_prints_and_writes(name, count, found, one, root):
    first, *others = (of_rank[name] for of_rank in found)
    assert [printed for of_rank in others for printed in of_rank[1:]] == [""] * 2 * len(others)
    without_figures = [re.sub(r"[0-9.,]+", "#", printed) for printed in (one[name][1], first[1])]
    assert without_figures[0].replace("/#/", "/") == without_figures[1].replace("/#/", "/")
    alone, together = (sorted(path.name[:9] for path in (root / str(n) / name).iterdir()) for n in (1, count))
    assert alone == together and sum(file.startswith("events") for file in together) == 1


@pytest.mark.parametrize("count", [1, *COUNTS])
def test_bad_files_are_named_once_in_order(count, found, root):
    left_out = [line for line in found[0]["streamed"][2].splitlines() if line.startswith("left out: ")]
    names = ["train/blue/empty.jpg", "train/red/broken.png", "test/red/not.png"]
    assert [line.split(": ")[1] for line in left_out] == [str(root / "colours" / name) for name in names]


@pytest.mark.parametrize("count", COUNTS)
def test_each_test_picture_counts_once(count, found, one):
    alone, together = (json.loads(of_rank["evaluated"][1]) for of_rank in (one, found[0]))
    assert together["pictures"] == 18 and together["confusion"] == alone["confusion"]
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4)


@pytest.mark.parametrize("count", COUNTS)
def test_files_are_shared_and_their_answers_merged_in_order(count, found, one, root):
    alone, first = one["table"], found[0]["table"]
    assert (root / f"{count}.csv").read_text() == (root / "1.csv").read_text()
    assert (alone[0], first[0]) == (1, 0) and first[2] == alone[2]
    assert "3b.png: not a picture that Pillow can read" in first[2]


def test_all_evaluate_with_the_averages_that_are_saved(two, root):
    assert [of_rank["averages"][0] for of_rank in two] == [0, 0]
    network, checkpoint = model.load(root / "2" / "averages" / "epoch_002.pt")
    preparation = {name: checkpoint[name] for name in ("image_size", "mean", "std")}
    [test_set] = datasets.load("shapes", limit=200, splits=["test"], **preparation)
    loss = score(*outputs_of_set(network, test_set, classes=10, tta=checkpoint["config"]["tta"]))["loss"]
    assert loss == pytest.approx(checkpoint["metrics"]["test_loss"], rel=1e-4)


# ---- stopped and resumed ----


@pytest.mark.parametrize(
    ("before", "after"), [(1, 2), (2, 1), pytest.param(2, 3, marks=pytest.mark.expensive)], ids=str
)
def test_a_run_goes_on_with_another_number_of_processes(before, after, request, root):
    names = {1: "one", 2: "two", 3: "three"}
    found = request.getfixturevalue(names[before])
    found = [found] if before == 1 else found
    way = f"{before} to {after}"
    if after == 1:
        goes_on = [{way: call(resuming(root, root / str(before) / "stopped", way))}]
    else:
        goes_on = request.getfixturevalue(names[after])
    assert all(of_rank["stopped"][0] == 130 for of_rank in found)
    assert found[0]["stopped"][1].endswith(f"\npython train.py --resume {root / str(before) / 'stopped'}\n")
    assert all(of_rank[way][0] == 0 for of_rank in goes_on)
    assert " goes on in epoch 2 at step " in goes_on[0][way][2]
    assert agree(root / "1" / "hard", root / way)


@pytest.mark.expensive
def test_a_frozen_network_goes_on_with_two_processes(one, two, root):
    assert one["stopped frozen"][0] == 130 and two[0]["frozen on 2"][0] == 0
    assert agree(root / "1" / "frozen", root / "frozen on 2")


def test_a_time_limit_stops_all_and_they_go_on_to_the_same_bits(two, root):
    assert [of_rank["time"][0] for of_rank in two] == [of_rank["more time"][0] for of_rank in two] == [0, 0]
    assert two[0]["time"][1] == f"python train.py --resume {root / '2' / 'time'}\n"
    assert "interrupted in epoch 1, step " in two[0]["time"][2]
    assert not differences(contents(root / "2" / "hard"), contents(root / "2" / "time"))


@pytest.mark.expensive
def test_votes_that_are_seldom_stop_all_too(processes, tmp_path):
    long = "--no-batch-norm --batch-size 4 --epochs 20"
    task = training(tmp_path, "long", long, fault="stopped", at=[1, 120], votes=stopping.VOTE_SECONDS)
    found, _ = group(processes, 2, {"long": task}, tmp_path / "plan")
    assert [of_rank["long"][0] for of_rank in found] == [130, 130]
    assert (tmp_path / "long" / "interrupted.pt").exists()


# ---- failures ----


def test_an_error_of_one_process_ends_all_with_its_message(two):
    (first_status, _, first), (status, _, error) = (of_rank["wrong"] for of_rank in two)
    assert status == first_status == 1
    assert error == "train.py: no good\n" and "train.py: " not in first


def test_an_error_of_all_is_said_once(two):
    (first_status, _, first), (_, _, error) = (of_rank["small"] for of_rank in two)
    assert first_status == 2 and error == ""
    assert first == (
        "train.py: --batch-size 3: that is less than a picture for each of 2 processes in 2 pieces (--accumulate)\n"
    )


@pytest.mark.expensive
def test_processes_do_not_wait_for_ever(three):
    assert [of_rank["late"][0] for of_rank in three] == [1, 1, 1]
    said = [line for of_rank in three for line in of_rank["late"][2].splitlines() if line.startswith("train.py: ")]
    assert said == ["train.py: waited 2 seconds (--timeout) for another process"]


@pytest.mark.parametrize("starter", ["server", pytest.param("torchrun", marks=pytest.mark.expensive)])
def test_a_killed_process_brings_the_group_back_to_the_same_bits(starter, two, processes, root, tmp_path):
    plan = {"killed": training(tmp_path / "logs", "killed", AGREEING["held out"], fault="killed", at=[1, 9])}
    if starter == "torchrun":
        found = torchrun(2, plan, tmp_path / "plan", "--max-restarts", "1")
    else:
        found, statuses = group(processes, 2, plan, tmp_path / "plan", restarts=1)
        assert len(statuses) == 2 and -signal.SIGKILL in statuses[0]
    assert [of_rank["killed"][0] for of_rank in found] == [0, 0]
    assert f"{tmp_path / 'logs' / 'killed'}: goes on in epoch 2\n" in found[0]["killed"][2]
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


def test_predict_without_a_file_for_its_table_refuses_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert predict.cli(["docs", "--csv"]) == 2
    assert capsys.readouterr().err == "predict.py: several processes need a file to write to: add --csv FILE.csv\n"

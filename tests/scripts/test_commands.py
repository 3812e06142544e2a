"""The commands as a user starts them, in processes of their own and in another folder, and what they load."""

import os
import runpy
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, noisy

import predict


def test_train_then_predict_then_evaluate(script, tmp_path, monkeypatch, capsys):
    run = "--config configs/shapes.toml --limit 200 --epochs 2".split()
    run[1] = str(ROOT / run[1])
    trained = script("train.py", *run)
    assert trained.returncode == 0, trained.stderr
    lines = trained.stdout.splitlines()
    assert len(lines) == 7 and lines[1].startswith("epoch 2/2")
    assert trained.stderr.count("\n") == 1 and "200 train, 200 test pictures" in trained.stderr  # no bar in a pipe
    noisy((90, 90, 90), 0).save(tmp_path / "dog.png")

    monkeypatch.chdir(tmp_path)
    assert predict.cli(["dog.png"]) == 0
    guessed, said = capsys.readouterr()
    assert guessed.startswith("dog.png  ") and guessed.count("%") == 3 and said.startswith("checkpoint: logs")
    assert predict.cli(["dog.png", *lines[4].split()[4:]]) == 0  # the command that train.py printed
    assert capsys.readouterr() == (guessed, "")
    assert predict.cli(["--evaluate", "shapes"]) == 0 and "1,000 test pictures" in capsys.readouterr().out


@pytest.mark.expensive
def test_a_piped_picture_gets_the_answer_of_its_file(colour_run, tmp_path, capsys):
    noisy((90, 90, 90), 0).save(tmp_path / "dog.png")
    checkpoint = ["--checkpoint", str(colour_run / "best.pt")]
    assert predict.cli([str(tmp_path / "dog.png"), *checkpoint]) == 0
    command = [sys.executable, str(ROOT / "predict.py"), "-", *checkpoint]
    content = (tmp_path / "dog.png").read_bytes()
    piped = subprocess.run(command, input=content, capture_output=True, cwd=tmp_path, timeout=120)
    assert piped.stdout.decode().replace("-  ", f"{tmp_path / 'dog.png'}  ", 1) == capsys.readouterr().out


def test_every_script_explains_itself(monkeypatch, capsys):
    for name in ("device.py", "datasets.py", "model.py", "train.py", "predict.py"):
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        out, err = capsys.readouterr()
        assert stop.value.code == 0 and "--help" in out and err == ""


# ---- what is loaded ----


def test_help_and_wrong_flags_are_answered_before_pytorch_is_loaded():
    code = """if True:
        import runpy, sys
        for name in ("device", "datasets", "model", "train", "predict"):
            for flags in (["--help"], ["--epoch", "3"], ["--config", "configs/fast.toml", "--help"]):
                sys.argv = [f"{name}.py", *flags]
                try:
                    runpy.run_path(f"{name}.py", run_name="__main__")
                except SystemExit as stop:
                    assert stop.code == (0 if "--help" in flags else 2), (name, flags)
                assert not {"torch", "numpy", "PIL"} & set(sys.modules), (name, flags)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = [line.partition("; did you mean ")[0] for line in done.stderr.splitlines()]
    assert said == [f"{name}.py: unknown flag --epoch" for name in ("device", "datasets", "model", "train", "predict")]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_ctrl_c_while_pytorch_is_loaded_ends_without_a_traceback():
    code = """if True:
        import os, runpy, signal, sys
        class CtrlC:
            def find_spec(self, name, *_):
                if name == "torch":
                    os.kill(os.getpid(), signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.meta_path.insert(0, CtrlC())
        sys.argv = ["train.py"]
        runpy.run_path("train.py", run_name="__main__")
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_no_script_works_on_import_and_predicting_loads_no_more_than_it_needs(colour_run, tmp_path):
    code = """if True:
        import os, pathlib, sys, threading
        before = set(os.listdir("."))
        for path in sorted(pathlib.Path("quick").rglob("*.py")):
            __import__(".".join(path.with_suffix("").parts))
        import device, datasets, model, train, predict
        assert set(os.listdir(".")) == before and threading.active_count() == 1
        assert not {"torchvision", "tensorboard"} & set(sys.modules)
        status = predict.cli(sys.argv[1:])
        assert not {"torchvision", "tensorboard", "torch._dynamo"} & set(sys.modules)
        assert status == 0
    """
    noisy((200, 30, 30), 0).save(tmp_path / "a.png")
    command = [sys.executable, "-c", code, str(tmp_path / "a.png"), "--checkpoint", str(colour_run / "best.pt")]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 1, "")


@pytest.mark.expensive
def test_predicting_alone_imports_neither_torchvision_nor_tensorboard(colour_run, tmp_path):
    code = (
        "import sys, predict; status = predict.cli(sys.argv[1:]);"
        "print([name for name in ('torchvision', 'tensorboard', 'torch._dynamo') if name in sys.modules])"
    )
    noisy((200, 30, 30), 0).save(tmp_path / "a.png")
    command = [sys.executable, "-c", code, str(tmp_path / "a.png"), "--checkpoint", str(colour_run / "best.pt")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


# ---- other systems ----


@pytest.mark.expensive
def test_names_that_the_console_lacks_are_escaped(script, tmp_path):
    """With spaces and Cyrillic letters in all paths, no home, and processes that are spawned, as Windows does it."""
    for place in range(12):
        folder = tmp_path / "мои фото" / ("train" if place % 3 else "test") / ("кот", "рыжий пёс")[place % 2]
        folder.mkdir(parents=True, exist_ok=True)
        noisy(((200, 40, 40), (40, 40, 200))[place % 2], place).save(folder / f"№ {place}.png")
    spawning = tmp_path / "site"
    spawning.mkdir()
    (spawning / "sitecustomize.py").write_text("import multiprocessing\nmultiprocessing.set_start_method('spawn')\n")
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "PYTHONPATH": str(spawning)}
    flags = "--epochs 1 --batch-size 8 --no-whiten --memory-share 0 --workers 1"
    flags += " --log-dir журнал --run-name проба"
    environment["HOME"] = "/dev/null/none"
    trained = script("train.py", "--data", "мои фото", *flags.split(), environment=environment)
    assert trained.returncode == 0 and trained.stderr.count("\n") == 2, trained.stderr  # sizes; how few they are
    [printed] = [line for line in trained.stdout.splitlines() if line.startswith("next: python predict.py")]
    assert "\\u0436\\u0443\\u0440\\u043d\\u0430\\u043b" in printed

    environment |= {"PYTHONIOENCODING": "ascii"}
    del environment["HOME"], environment["PYTHONPATH"]
    asked = script("predict.py", "мои фото/test", "--checkpoint", "журнал/проба/best.pt", environment=environment)
    assert asked.returncode == 0 and asked.stdout.count("\n") == 4 and not asked.stderr
    assert "\\u043a\\u043e\\u0442 " in asked.stdout and asked.stdout.isascii()

"""How a script ends, whoever reads its output, and what its flags may be."""

import io
import logging
import subprocess
import sys
from dataclasses import dataclass, fields

import pytest
from conftest import ROOT

from quick.cli import Parser, add_flags, flag, log, progress_bar, quoted, run_script, setting, wrong_value
from quick.errors import CallError, Ended, Problem

# ---- the end ----


@pytest.mark.skipif(sys.platform == "win32", reason="Windows tells it otherwise")
def test_a_reader_that_had_enough_ends_a_script_without_a_word():
    code = "from quick import cli; cli.exit_script(cli.run_script('a.py', lambda _: print(100_000 * 'a line\\n')))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 1


def ending_with(error: BaseException) -> int:
    def main(_) -> None:
        raise error

    return run_script("a.py", main, interrupted="; nothing was lost")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (Problem("no pictures"), 1, "a.py: no pictures\n"),
        (CallError("--lr: no"), 2, "a.py: --lr: no\n"),
        (FileNotFoundError(2, "No such file", "x\x1b.png"), 1, "a.py: x\\x1b.png: No such file\n"),
        (Ended(), 1, ""),
        (KeyboardInterrupt(), 130, "a.py: interrupted; nothing was lost\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_user_can_mend_is_one_line(error, status, message, capsys):
    assert ending_with(error) == status
    assert capsys.readouterr() == ("", message)


def test_notes_follow_the_error(capsys):
    for error, text in ((Problem("no"), "a.py: no; first; second\n"), (KeyboardInterrupt(), "first\nsecond\n")):
        error.add_note("first")
        error.add_note("second")
        ending_with(error)
        assert "".join(reversed(capsys.readouterr())).endswith(text)


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError):
        ending_with(RuntimeError())


def test_letters_that_the_console_lacks_are_escaped(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    assert run_script("a.py", lambda _: print("журнал é")) == 0
    out.flush()
    assert out.buffer.getvalue().decode("cp1252").rstrip() == "\\u0436\\u0443\\u0440\\u043d\\u0430\\u043b é"


def test_quiet_scripts_say_problems_alone_and_the_next_script_says_all(capsys):
    def main(_) -> None:
        log.setLevel(logging.WARNING)
        log.info("a note")
        log.warning("a problem")
        assert progress_bar("x", 3, "steps").disable

    assert run_script("a.py", main) == 0
    assert capsys.readouterr().err == "a problem\n"
    assert run_script("a.py", lambda _: log.info("a note")) == 0
    assert capsys.readouterr().err == "a note\n"


# ---- flags ----


@dataclass
class Settings:
    lr: float = setting("recipe", 0.1, "learning rate", above=0)
    epochs: int = setting("recipe", 1, "passes", at_least=1)
    flip: bool = setting("augmentation", True, "mirror")
    loss: str = setting("recipe", "mse", "the loss", choices=("mse", "l1"))
    mean: tuple = setting("data", (), "of channels", below=1)


def test_settings_are_flags_of_their_names():
    parser = Parser()
    add_flags(parser, fields(Settings), Settings())
    assert vars(parser.parse_args([])) == vars(Settings())
    given = parser.parse_args("--lr 1 --epochs 3 --no-flip --loss l1 --mean 0.1 0.2 0.3".split())
    assert vars(given) == {"lr": 1.0, "epochs": 3, "flip": False, "loss": "l1", "mean": [0.1, 0.2, 0.3]}


@pytest.mark.parametrize(
    ("argv", "message"),
    [("--epoch 3", "unknown flag --epoch; did you mean --epochs?"), ("--epochs x", "invalid int value: 'x'")],
)
def test_flags_are_written_in_full(argv, message):
    parser = Parser()
    add_flags(parser, fields(Settings), Settings())
    with pytest.raises(CallError, match=message.replace("?", r"\?")):
        parser.parse_args(argv.split())


def test_the_first_process_alone_says_that_a_flag_is_wrong(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(Ended):
        Parser().parse_args(["--x"])


def test_flags_and_paths_as_one_types_them():
    assert [flag("batch_size"), flag("batch_size", 64), flag("sync_bn", True), flag("sync_bn", False)] == [
        "--batch-size",
        "--batch-size 64",
        "--sync-bn",
        "--no-sync-bn",
    ]
    assert (quoted("logs/a"), quoted("my logs/a")) == ("logs/a", '"my logs/a"')


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", 1, None),
        ("lr", 0.0, "0.0 is not above 0"),
        ("lr", True, "True is not of type float"),
        ("lr", float("nan"), "nan is not a finite number"),
        ("lr", 10**400, "1000000000000000000000000000000000000000 is not a finite number"),
        ("epochs", 0, "0 is not at least 1"),
        ("epochs", 1.5, "1.5 is not of type int"),
        ("loss", "mes", "'mes' is not one of mse, l1; did you mean mse?"),
        ("loss", "\x1b", "'\\x1b' has characters that cannot be printed"),
        ("mean", (0.1, 0.2), "[0.1, 0.2] is not one number for each of the three channels"),
        ("mean", (0.1, 0.2, 1.0), "1.0 is not below 1"),
        ("mean", (0.1, 0.2, "x"), "'x' is not a finite number"),
    ],
)
def test_wrong_values_are_said_in_words(name, value, message):
    [key] = [key for key in fields(Settings) if key.name == name]
    assert wrong_value(key, value) == message

"""How a script ends, whoever reads its output, and what its flags may be."""

import io
import logging
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from quick.cli import Parser, add_flags, flag, log, progress_bar, quoted, read_text, run_script, setting
from quick.errors import CallError, Ended, Problem
from quick.values import wrong_value

# ---- the end ----


@pytest.mark.skipif(sys.platform == "win32", reason="Windows tells it otherwise")
def test_a_reader_that_had_enough_ends_a_script_without_a_word():
    code = "from quick import cli; cli.exit_script(cli.run_script('a.py', lambda _: print(100_000 * 'a line\\n')))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs sh")
@pytest.mark.parametrize(("to", "status"), [(">&-", 0), ("2>&-", 0), (">/dev/full", 1), ("2>/dev/full", 0)])
def test_output_that_goes_nowhere(to, status):
    if "full" in to and not Path("/dev/full").exists():
        pytest.skip("needs a disk that is always full")
    code = (
        "from quick import cli; cli.exit_script(cli.run_script('a.py', lambda _: (cli.log.info('y'), print('x'))[1]))"
    )
    call = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {to}"
    done = subprocess.run(["sh", "-c", call], cwd=ROOT, capture_output=True, text=True)
    expected = "" if to[0] == "2" else "y\na.py: standard output: No space left on device\n" if status else "y\n"
    assert (done.returncode, done.stderr) == (status, expected) and "y" not in done.stdout


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
    main(None)
    Parser().parse_args([])  # as a main() begins that a notebook calls
    log.info("a note")
    assert capsys.readouterr().err == "a problem\na note\n"


# ---- flags ----


@dataclass
class Settings:
    lr: float = setting("recipe", 0.1, "learning rate", above=0)
    epochs: int = setting("recipe", 1, "passes", at_least=1)
    flip: bool = setting("augmentation", True, "mirror")
    loss: str = setting("recipe", "mse", "the loss", choices=("mse", "l1"))
    mean: tuple = setting("data", (), "of channels", below=1)
    data: str = setting("data", "", "pictures")


def test_settings_are_flags_of_their_names():
    parser = Parser()
    add_flags(parser, fields(Settings), {})
    assert vars(parser.parse_args([])) == vars(Settings())
    given = parser.parse_args("--lr 1 --epochs 3 --no-flip --loss l1 --mean 0.1 0.2 0.3".split())
    assert vars(given) == {"lr": 1.0, "epochs": 3, "flip": False, "loss": "l1", "mean": [0.1, 0.2, 0.3], "data": ""}


@dataclass
class Explained:
    share: float = setting("first", 0.5, "share of 100% of the pictures", metavar="SHARE")
    keep: int = setting("first", 0, "checkpoints that are kept", means="all")
    fit: str = setting("second", "auto", "how it fits", means="as before", choices=("auto", "crop"))
    url: str = setting("first", "", "address to load from", means="known ones")
    name: str = setting("second", "", "name of it")
    mean: tuple = setting("second", (), "of channels")
    rate: float = setting("second", 0.0, "highest rate", means="what fits")
    flip: bool = setting("second", False, "mirror half")


def test_help_tells_defaults_that_are_values_and_what_others_stand_for(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    parser = Parser("What it does.", examples=("python a.py", "python a.py --keep 3"))
    add_flags(parser, fields(Explained), {"rate": 0.25, "name": "x\x1b[2J", "mean": [0.5, 0.25, 1]})
    text = re.sub(r" +", " ", parser.format_help())
    groups = dict(zip(["first", "second", "end"], re.split("\n\n(?:first|second|examples):\n", text)[1:], strict=True))
    assert [line.strip() for line in groups["first"].splitlines()] == [
        "--share SHARE share of 100% of the pictures (default: 0.5)",
        "--keep N checkpoints that are kept (default: 0 = all)",
        "--url NAME address to load from (default: known ones)",
    ]
    assert [line.strip() for line in groups["second"].splitlines()] == [
        "--fit {auto,crop} how it fits (default: auto = as before)",
        "--name NAME name of it (default: x\\x1b[2J)",
        "--mean R G B of channels (default: 0.5 0.25 1)",
        "--rate X highest rate (default: 0.25; 0 = what fits)",
        "--flip, --no-flip mirror half (default: off)",
    ]
    assert groups["end"] == " python a.py\n python a.py --keep 3\n"
    parser = Parser()
    add_flags(parser, [key for key in fields(Explained) if key.name in ("name", "mean")], {})
    assert "default" not in parser.format_help()


@pytest.mark.parametrize(
    ("argv", "message"),
    [("--epoch 3", "unknown flag --epoch; did you mean --epochs?"), ("--epochs x", "invalid int value: 'x'")],
)
def test_flags_are_written_in_full(argv, message):
    parser = Parser()
    add_flags(parser, fields(Settings), {})
    with pytest.raises(CallError, match=message.replace("?", r"\?")):
        parser.parse_args(argv.split())


def test_a_picture_that_is_named_like_a_flag(tmp_path, monkeypatch):
    (tmp_path / "-x.png").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CallError, match=r"unknown flag -x.png; write ./ before a file's name"):
        Parser().parse_args(["-x.png"])


def test_the_first_process_alone_shows_the_help_and_says_that_a_flag_is_wrong(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(Ended):
        Parser().parse_args(["--x"])
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit, match="0"):
            Parser().parse_args(["--help"])
    assert capsys.readouterr().out.count("usage:") == 1


def test_flags_and_paths_as_one_types_them():
    assert [flag("batch_size"), flag("batch_size", 64), flag("sync_bn", True), flag("sync_bn", False)] == [
        "--batch-size",
        "--batch-size 64",
        "--sync-bn",
        "--no-sync-bn",
    ]
    assert shlex.split(flag("model", "a; rm b")) == ["--model", "a; rm b"]  # a stranger's checkpoint can say anything


NAMES = [
    "plain",
    "two words",
    "copy(1)",
    "r&d",
    "it's $HOME",
    "a`b`",
    '"quoted"',
    "!x",
    "*",
    "100%",
    "-x",
    "~",
    "#1",
    "猫",
]


@pytest.mark.skipif(sys.platform == "win32", reason="needs sh")
@pytest.mark.parametrize("name", [*NAMES, "a\\b"])
def test_paths_survive_a_shell(name):
    done = subprocess.run(["sh", "-c", f"printf %s {quoted(name)}"], capture_output=True, check=True)
    assert done.stdout.decode() == (f"./{name}" if name[0] == "-" else name)


def test_paths_on_windows(monkeypatch):
    monkeypatch.setattr(os, "name", "nt")
    asked = ["C:\\logs\\a.b_c-1", "my logs", "copy(1)", "r&d", "it's", "it's $HOME", "a`b", "\u201ca\u201d it\u2019s"]
    assert [quoted(name) for name in asked] == [
        *("C:\\logs\\a.b_c-1", '"my logs"', '"copy(1)"', '"r&d"', '"it\'s"'),
        *("'it''s $HOME'", "'a`b'", "'\u201ca\u201d it\u2019\u2019s'"),
    ]
    assert quoted("-x") == f".{os.sep}-x"


# ---- files of a user ----


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_text_of_windows_editors_is_read_or_its_encoding_named(encoding, tmp_path):
    path, text = tmp_path / "a.txt", "é = 1\r\n"
    path.write_bytes(text.encode(encoding))
    if encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert read_text(path) == text
    else:
        with pytest.raises(ValueError, match="its encoding is not UTF-8; save it anew as UTF-8"):
            read_text(path)


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
        ("data", "می\u200cرود black\u00a0cat", None),
        ("loss", "\x1b", "'\\x1b' has characters that cannot be printed"),
        ("mean", (0.1, 0.2), "[0.1, 0.2] is not one number for each of the three channels"),
        ("mean", (0.1, 0.2, 1.0), "1.0 is not below 1"),
        ("mean", (0.1, 0.2, "x"), "'x' is not a finite number"),
    ],
)
def test_wrong_values_are_said_in_words(name, value, message):
    [key] = [key for key in fields(Settings) if key.name == name]
    assert wrong_value(key, value) == message


@pytest.mark.parametrize("script", ["train.py", "predict.py", "model.py", "datasets.py", "device.py"])
@pytest.mark.parametrize(
    "allocate", [lambda _: torch.ones(2**55), lambda _: np.ones(2**55), lambda _: bytearray(2**60)]
)
def test_a_script_without_memory_says_what_needs_less(script, allocate, capsys):
    assert run_script(script, allocate, []) == 1
    out, err = capsys.readouterr()
    assert err.startswith(f"{script}: there is not enough memory") and err.count("\n") == 1 and not out


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_killed_worker_is_named_however_it_shows(error, capsys):
    assert ending_with(error) == 1
    assert capsys.readouterr().err.startswith("a.py: a process that reads files was killed, most likely because memory")

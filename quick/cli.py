"""What the scripts have in common as commands: settings as flags, notes, progress bars, how they begin and end."""

import argparse
import codecs
import contextlib
import errno
import logging
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import Field, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from quick.errors import CallError, Ended, Problem, out_of_memory, printable, suggestion
from quick.values import CHANNELS

if TYPE_CHECKING:
    from tqdm import tqdm

USUAL = "most used"  # heading of the settings that --help begins with
# What PyTorch says of a worker process that the system killed, or that got no memory to share.
LOST_WORKER = re.compile(r"DataLoader worker \(pid|shared memory|Cannot allocate memory")
LESS_MEMORY = {  # what to do where there is not enough
    "train.py": "a lower --batch-size, --image-size or --memory-share needs less, and so does --accumulate 2",
    "predict.py": "free some, or try another --device",
    "model.py": "fewer --classes, a lower --image-size or --width need less",
    "datasets.py": "a lower --memory-share or --limit needs less",
    "device.py": "free some, or try another --device",
}


class Notes(logging.Handler):
    """Prints messages on what `sys.stderr` is at that moment: processes of a group, notebooks and tests replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr:  # else it is closed, and print() would take standard output in its place
            with contextlib.suppress(OSError):  # a full disk there does not end a run
                print(printable(record.getMessage()), file=sys.stderr)


log = logging.getLogger("quick")  # info: a note, which --quiet silences; warning: a problem, which is always said
log.addHandler(Notes())
log.setLevel(logging.INFO)
log.propagate = False


# ---- settings --------------------------------------------------------------------------------------------------------


def setting(
    group: str,
    default: object,
    help: str,
    *,
    means: str = "",
    resumable: bool = False,
    auto: bool = False,
    **rules: object,
) -> Field:
    """A field of a dataclass that is also a flag and a key of config files.

    `group` is its heading in `--help`; `means` says what a default stands for that is no value itself, such as 0. A
    `resumable` setting may change when a run is resumed. With `auto` the default stands for a value that is found out
    when a run starts. `rules` are for its values: `at_least`, `at_most`, `above`, `below` (numbers), `choices`
    (strings, or a function that knows them), `check` (a function from a value to an error or None); `metavar` is for
    the help.
    """
    metadata = {"group": group, "help": help, "means": means, "resumable": resumable, "auto": auto, **rules}
    return field(default=default, metadata=metadata)


def flag(name: str, value: object = None) -> str:
    """A setting as the user types it: `--batch-size`, and with a value `--batch-size 64` or `--no-batch-norm`."""
    if isinstance(value, bool) or value is None:
        return f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
    return f"--{name.replace('_', '-')} {quoted(value) if isinstance(value, str) else value}"


def add_flags(parser: "Parser", keys: Iterable[Field], defaults: dict) -> None:
    """Add settings to the parser as flags of the same names, under the headings of their groups.

    `defaults` are those, by name, that differ from the fields' own. `wrong_value` looks at values, argparse does not.
    """
    for key in keys:
        rules = key.metadata
        if key.type is bool:
            values = {"action": argparse.BooleanOptionalAction}
        elif key.type is tuple:
            metavar = rules.get("metavar", CHANNELS)
            values = {"type": float, "nargs": len(metavar), "metavar": metavar}
        else:
            metavar = "N" if key.type is int else "NAME" if key.type is str else "X"
            if isinstance(choices := rules.get("choices"), tuple):
                metavar = f"{{{','.join(choices)}}}"
            values = {"type": key.type, "metavar": rules.get("metavar", metavar)}
        default = defaults.get(key.name, key.default)
        text = printable(f"{rules['help']}{told_default(key, default)}").replace("%", "%%")
        parser.group(rules["group"]).add_argument(flag(key.name), **values, default=default, help=text)


def told_default(key: Field, default: object) -> str:
    """The default of a setting as the end of its help: the value, and what a value stands for that is none itself."""
    value, told = in_help(key.default), in_help(default)
    own = " = ".join(filter(None, (value, key.metadata["means"])))
    if told == value:
        told = own
    elif " = " in own:
        told += f"; {own}"
    return f" (default: {told})" if told else ""


def in_help(value: object) -> str:
    """A setting's value as `--help` shows it; empty for one that says nothing."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple | list):
        return " ".join(map(in_help, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose flags are written in full, and which raises CallError for a wrong one.

    `examples` are commands that `--help` ends with.
    """

    def __init__(self, description: str = "", examples: Sequence[str] = (), **options: object):
        width = max(20, shutil.get_terminal_size().columns - 2)
        super().__init__(
            description=textwrap.fill(description, width),
            epilog="\n  ".join(["examples:", *examples]) if examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )
        self.groups = {}

    def group(self, heading: str) -> argparse._ArgumentGroup:
        """The group of flags with this heading in `--help`."""
        if heading not in self.groups:
            self.groups[heading] = self.add_argument_group(heading)
        return self.groups[heading]

    def parse_args(self, argv: list[str] | None = None, namespace: object = None) -> argparse.Namespace:
        log.setLevel(logging.INFO)  # a notebook calls main() alone, maybe after a quiet one
        args, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            is_file = os.path.lexists(unknown[0])
            hint = "; write ./ before a file's name" if is_file else suggestion(unknown[0].partition("=")[0], flags)
            self.error(f"unknown flag {unknown[0]}{hint}")
        return args

    def print_help(self, file: TextIO | None = None) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # as below
            super().print_help(file)

    def error(self, message: str) -> None:
        if os.environ.get("LOCAL_RANK", "0") != "0":  # of the processes that torchrun started, the first says it
            raise Ended
        raise CallError(message)


# ---- what is printed -------------------------------------------------------------------------------------------------


def progress_bar(name: str, total: int, unit: str, start: int = 0, delay: float = 0) -> "tqdm":
    """A progress bar on standard error, which is removed when it is done.

    It shows only on terminals, and not at all where the environment has `TQDM_DISABLE` or `--quiet` was given. With a
    `delay`, in seconds, it appears only then.
    """
    from tqdm import tqdm  # predicting does without it

    hidden = bool(os.environ.get("TQDM_DISABLE")) or not log.isEnabledFor(logging.INFO)
    return tqdm(
        desc=name, total=total, unit=f" {unit}", initial=start, delay=delay, leave=False, disable=hidden or None
    )


def quoted(path: str | Path) -> str:
    """A path as one types it in a shell: one of POSIX, or PowerShell and where they agree cmd.exe."""
    text = f".{os.sep}{path}" if str(path).startswith("-") else str(path)  # else it looks like a flag
    if os.name != "nt":
        return shlex.quote(text)
    if re.fullmatch(r"[\w.:/\\-]+", text):
        return text
    if not re.search("[$`\u201c-\u201e]", text):
        return f'"{text}"'
    return "'" + re.sub("(['\u2018-\u201b])", r"\1\1", text) + "'"  # PowerShell takes all of these for quotes


def how_to_see(log_dir: str | Path) -> str:
    """How TensorBoard shows what was written into this folder, in two lines; 6006 is its usual port."""
    return f"next: tensorboard --logdir {quoted(log_dir)}\nthen open http://localhost:6006"


def is_folder(name: str) -> bool:
    """Whether this is a folder; False also for names that the system refuses, such as very long ones."""
    return name != "-" and os.path.isdir(name)  # noqa: PTH112 - Path's raises an error


def expanded(path: str) -> str:
    """The path with a `~` in front as the home folder: shells leave it in `--data=~/photos`, Windows' always."""
    return os.path.expanduser(path)  # noqa: PTH111 - Path changes names, as ./-a.png


def read_text(path: Path) -> str:
    """The text of a user's file, in UTF-8 or, as Windows' editors may save it, UTF-16 with a byte order mark.

    Raises OSError, ValueError for another encoding.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # as UTF-16 without a mark has it, and UTF-32
        raise ValueError("its encoding is not UTF-8; save it anew as UTF-8")
    return text


# ---- how a script begins and ends ------------------------------------------------------------------------------------


def check_flags(script: str, parse: Callable[[list[str] | None], object]) -> None:
    """End the program if its flags ask for help or are wrong.

    Scripts call this before they import PyTorch, which takes seconds, and which Ctrl-C then ends without a traceback.
    main() parses the flags again.
    """
    if status := run_script(script, lambda argv: parse(argv) and None):
        exit_script(status)
    usual = sys.excepthook
    sys.excepthook = lambda kind, *more: kind is KeyboardInterrupt or usual(kind, *more)


def run_script(
    script: str, main: Callable[[list[str] | None], int | None], argv: list[str] | None = None, interrupted: str = ""
) -> int:
    """Run a script's main() and return the exit status. What a user can mend becomes one line, not a traceback.

    `interrupted` is what to say after Ctrl-C.
    """
    log.setLevel(logging.INFO)
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # for names with letters that the terminal's encoding lacks
    try:
        status = main(argv) or 0
        if sys.stdout:  # else it is closed
            sys.stdout.flush()  # a full disk is an error too
        return status
    except Ended:
        return 1
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MemoryError, RuntimeError, ConnectionError, EOFError) as error:
        if out_of_memory(error):
            asked = re.search(r"allocate ([\d.]+ \w+)", str(error))
            message = f"there is not enough memory{f' ({asked[1]} more)' if asked else ''}; {LESS_MEMORY[script]}"
        elif isinstance(error, ConnectionError | EOFError) or LOST_WORKER.search(str(error)):
            more = "" if script == "predict.py" else ", or give fewer --workers"
            message = f"a process that reads files was killed, most likely because memory ran out: free some{more}"
        else:
            raise
        log.error("; ".join([f"{script}: {message}", *getattr(error, "__notes__", [])]))
        return 1
    except (Problem, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.strerror:
            name = error.filename or ("standard output" if error.errno == errno.ENOSPC else "")  # write_file says names
            message = f"{name}: {error.strerror}" if name else error.strerror
        log.error("; ".join([f"{script}: {message}", *getattr(error, "__notes__", [])]))
        return getattr(error, "status", 1)
    except KeyboardInterrupt as error:
        log.error(f"{script}: interrupted{interrupted}")
        with contextlib.suppress(OSError):
            for note in getattr(error, "__notes__", []):
                print(note, flush=True)
        return 130


def exit_script(status: int) -> None:
    """End the program with this exit status."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:  # the reader of the output has ended, and Python would complain at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if "RANK" in os.environ:  # under torchrun one of PyTorch's threads sometimes aborts a process that ends normally
        os._exit(status)
    sys.exit(status)

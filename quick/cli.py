"""What the scripts have in common as commands: settings as flags, notes, progress bars, and how a script ends."""

import argparse
import codecs
import contextlib
import errno
import logging
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import Field, field
from pathlib import Path
from typing import TYPE_CHECKING

from quick.errors import CallError, Ended, Problem, out_of_memory, printable, suggestion

if TYPE_CHECKING:
    from tqdm import tqdm

CHANNELS = ("R", "G", "B")
# What PyTorch says of a worker process that the system killed, or that got no memory to share.
LOST_WORKER = re.compile(r"DataLoader worker \(pid|shared memory|Cannot allocate memory")
LESS_MEMORY = {  # what to do where there is not enough
    "train.py": "a lower --batch-size, --image-size or --memory-share needs less, and so does --accumulate 2",
    "predict.py": "free some, or try another --device",
    "model.py": "fewer --classes, a lower --image-size or --width need less",
    "datasets.py": "a lower --memory-share or --limit needs less",
    "device.py": "free some, or try another --device",
}
RESERVED = re.compile(
    r"(con|prn|aux|nul|(com|lpt)[0-9\xb9\xb2\xb3]|conin\$|conout\$)([. ].*)?", re.IGNORECASE
)  # Windows' names of devices


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
    group: str, default: object, help: str, *, resumable: bool = False, auto: bool = False, **rules: object
) -> Field:
    """A field of a dataclass that is also a flag and a key of config files.

    `group` is its heading in `--help`. A `resumable` setting may change when a run is resumed. With `auto` the default
    stands for a value that is found out when a run starts. `rules` are for its values: `at_least`, `at_most`, `above`,
    `below` (numbers), `choices` (strings), `check` (a function from a value to an error or None); `metavar` is for the
    help.
    """
    metadata = {"group": group, "help": help, "resumable": resumable, "auto": auto, **rules}
    return field(default=default, metadata=metadata)


def flag(name: str, value: object = None) -> str:
    """A setting as the user types it: `--batch-size`, and with a value `--batch-size 64` or `--no-batch-norm`."""
    if isinstance(value, bool) or value is None:
        return f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
    return f"--{name.replace('_', '-')} {quoted(value) if isinstance(value, str) else value}"


def add_flags(parser: argparse.ArgumentParser, keys: Iterable[Field], defaults: object) -> None:
    """Add settings to the parser as flags of the same names, under the headings of their groups.

    `defaults` is an object of their dataclass.
    """
    sections = {}
    for key in keys:
        group = key.metadata["group"]
        if group not in sections:
            sections[group] = parser.add_argument_group(group)
        if key.type is bool:
            values = {"action": argparse.BooleanOptionalAction}
        elif key.type is tuple:
            metavar = key.metadata.get("metavar", CHANNELS)
            values = {"type": float, "nargs": len(metavar), "metavar": metavar}
        else:
            values = {"type": key.type, "choices": key.metadata.get("choices"), "metavar": key.metadata.get("metavar")}
        default = getattr(defaults, key.name)
        sections[group].add_argument(flag(key.name), **values, default=default, help=key.metadata["help"])


def wrong_value(key: Field, value: object) -> str | None:
    """What is wrong with a value of this setting, in words; None when nothing is."""
    rules, kinds = key.metadata, (int, float) if key.type is float else key.type
    if not isinstance(value, kinds) or (isinstance(value, bool) and key.type is not bool):
        return f"{value!r} is not of type {key.type.__name__}"
    if key.type is str and printable(value) != value:  # no config file in UTF-8 could hold it, or no terminal show it
        return f"{value!r:.80} has characters that cannot be printed"
    if "choices" in rules and value not in rules["choices"]:
        return f"{value!r} is not one of {', '.join(rules['choices'])}{suggestion(value, rules['choices'])}"
    if key.type is tuple and len(value) not in (0, len(rules.get("metavar", CHANNELS))):
        wanted = "two numbers" if "metavar" in rules else "one number for each of the three channels"
        return f"{list(value)} is not {wanted}"
    numbers = value if key.type is tuple else [value] if key.type in (int, float) else []
    for number in numbers:
        if not isinstance(number, int | float) or not -1e300 < number < 1e300:
            return f"{number!r:.40} is not a finite number"
        if number < rules.get("at_least", -math.inf):
            return f"{number} is not at least {rules['at_least']}"
        if number <= rules.get("above", -math.inf):
            return f"{number} is not above {rules['above']}"
        if number > rules.get("at_most", math.inf):
            return f"{number} is not at most {rules['at_most']}"
        if number >= rules.get("below", math.inf):
            return f"{number} is not below {rules['below']}"
    return rules["check"](value) if "check" in rules else None


def bad_folder(value: str) -> str | None:
    """What is wrong with this name for a folder; None when nothing is. It must work on Windows too, without a path."""
    usable = not set(value) & set('<>:"/\\|?*') and len(value.encode()) <= 200
    if not value or (usable and value[-1] not in ". " and not RESERVED.fullmatch(value)):
        return None
    return f"{value!r:.80} cannot be a folder's name on every system, without a path"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose flags are written in full, and which raises CallError for a wrong one."""

    def __init__(self, **options: object):
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, argv: list[str] | None = None, namespace: object = None) -> argparse.Namespace:
        log.setLevel(logging.INFO)  # a notebook calls main() alone, maybe after a quiet one
        args, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            is_file = os.path.lexists(unknown[0])
            hint = "; write ./ before a file's name" if is_file else suggestion(unknown[0].partition("=")[0], flags)
            self.error(f"unknown flag {unknown[0]}{hint}")
        return args

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


def expanded(path: str) -> str:
    """The path with a `~` in front as the home folder: shells leave it in `--data=~/photos`, Windows' always."""
    return os.path.expanduser(path)  # noqa: PTH111 - Path changes names, as ./-a.png


def read_text(path: Path) -> str:
    """The text of a user's file, in UTF-8 or, as Windows' editors may save it, UTF-16 with a byte order mark.

    Raises OSError, ValueError for another encoding.
    """
    content = path.read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # as UTF-16 without a mark has it, and UTF-32
        raise ValueError("its encoding is not UTF-8; save it anew as UTF-8")
    return text


# ---- how a script ends -----------------------------------------------------------------------------------------------


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

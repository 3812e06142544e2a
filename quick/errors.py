"""Errors for users, and the words of their messages.

A `Problem` is something that a user can mend: its message names the file, flag or value, and says what to do. A script
that meets one prints that line and ends with the problem's `status`, without a traceback.
"""

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence

# Control characters, separators of lines and paragraphs, marks that turn the order of letters round
# (unicode.org/reports/tr36, section 2.4), and surrogates: bytes of a file's name that are no text.
STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Problem(ValueError):
    """What a user can mend. Ends a script with exit status 1."""

    status = 1

    def __init__(self, message: str):
        super().__init__(printable(message))


class CallError(Problem):
    """A flag or setting that is wrong. Ends a script with exit status 2."""

    status = 2


class ConfigError(CallError):
    """A setting that is wrong; the message names the file or flag, the key and the value."""


class DeviceError(CallError):
    """A device or precision that this machine does not have."""


class NetworkError(CallError):
    """A network that does not exist, or options that it cannot work with."""


class DataError(Problem):
    """A data set that cannot be used; the message names the file or folder."""


class LimitError(DataError, CallError):
    """`--limit`, `--val-fraction` or `--fold` leaves too few pictures."""


class CheckpointError(Problem):
    """A checkpoint that cannot be used; the message names the file and the reason."""


class TrainingError(Problem):
    """Training cannot go on."""


class GroupError(Problem):
    """The processes of a run cannot work together."""


class Ended(Exception):
    """Another process has ended the run and has said why."""


class Interrupted(Exception):
    """A signal such as Ctrl-C, or the time limit, asked for an end."""


def printable(text: str) -> str:
    """The text with what could steer a terminal escaped: names of strangers' files must not.

    All else stays, also what `str.isprintable` refuses: U+200C and U+200D of Persian, Hindi and emoji, and U+202F,
    which macOS writes into the names of screenshots.
    """
    return STEERING.sub(lambda found: repr(found[0])[1:-1], text)


def in_short(names: Sequence[str], most: int = 10) -> str:
    """The first of these names, and how many more there are: some data sets have thousands of classes."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def composed(text: str) -> str:
    """A name in the form in which all are compared: macOS may write an accent as a character of its own (NFD)."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def terminal_width(text: str) -> int:
    """How wide a terminal shows a text: Chinese, Japanese and Korean letters count twice, marks at letters do not."""
    seen = [letter for letter in text if unicodedata.category(letter) not in ("Mn", "Me", "Cf")]
    return len(seen) + sum(unicodedata.east_asian_width(letter) in "WF" for letter in seen)


def padded(text: str, width: int) -> str:
    """The text with spaces behind it, so that a terminal shows it in this width."""
    return text + " " * (width - terminal_width(text))


def reason(error: BaseException, most: int = 200) -> str:
    """What an error says, in one line of at most `most` characters; the name of its class if it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python or PyTorch says that there was not enough memory, on whichever device."""
    words = r"out of memory|not enough memory|can't allocate memory|ALLOC_FAILED|could not create a memory"
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(re.search(words, str(error))))


def suggestion(word: str, known: Iterable[str]) -> str:
    """What the user may have meant, as the end of an error message; empty if nothing is close."""
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]}?" if close else ""

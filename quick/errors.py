"""Errors for users, and the words of their messages.

A `Problem` is something that a user can mend: its message names the file, flag or value, and says what to do. A script
that meets one prints that line and ends with the problem's `status`, without a traceback.
"""

import difflib
from collections.abc import Iterable


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
    """`--limit` or `--val-fraction` leaves too few pictures."""


class CheckpointError(Problem):
    """A checkpoint that cannot be used; the message names the file and the reason."""


class TrainingError(Problem):
    """Training cannot go on."""


class GroupError(Problem):
    """The processes of a run cannot work together."""


class Ended(Exception):
    """Another process has ended the run and has said why."""


class Interrupted(Exception):
    """Ctrl-C, SIGTERM or the time limit asked for an end."""


def printable(text: str) -> str:
    """The text with control characters escaped: names of strangers' files must not steer the terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def reason(error: BaseException, most: int = 200) -> str:
    """What an error says, in one line of at most `most` characters; the name of its class if it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def suggestion(word: str, known: Iterable[str]) -> str:
    """What the user may have meant, as the end of an error message; empty if nothing is close."""
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]}?" if close else ""

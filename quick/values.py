"""What is wrong with the value of a setting, in words."""

import math
import re
from dataclasses import Field

from quick.errors import printable, suggestion

CHANNELS = ("R", "G", "B")
RESERVED = re.compile(
    r"(con|prn|aux|nul|(com|lpt)[0-9\xb9\xb2\xb3]|conin\$|conout\$)([. ].*)?", re.IGNORECASE
)  # Windows' names of devices


def wrong_value(key: Field, value: object) -> str | None:
    """What is wrong with a value of this setting, in words; None when nothing is."""
    rules, kinds = key.metadata, (int, float) if key.type is float else key.type
    if not isinstance(value, kinds) or (isinstance(value, bool) and key.type is not bool):
        return f"{value!r} is not of type {key.type.__name__}"
    if key.type is str and printable(value) != value:  # no config file in UTF-8 could hold it, or no terminal show it
        return f"{value!r:.80} has characters that cannot be printed"
    if "choices" in rules and value != key.default:
        choices = rules["choices"]() if callable(rules["choices"]) else rules["choices"]
        if value not in choices:
            return f"{value!r} is not one of {', '.join(choices)}{suggestion(value, choices)}"
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

"""Text in pictures: Pillow's own font, and for letters that it lacks the fonts of the system.

Pillow's font has hardly more than ASCII. What it lacks is looked for once, in the usual folders of Linux, macOS and
Windows. A name with letters that no font has becomes its number: `legend` tells which name that is.
"""

import os
import sys
import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path

from PIL import ImageDraw, ImageFont, features

from quick.errors import printable

NOT_PLAIN = "bold black heavy italic oblique light thin medium mono serif narrow cond".split()  # in names of files
NO_CHARACTER = "\U0010ffff"  # no font has it: it is drawn as what stands for missing letters
FOUND: dict[str, Path | None] = {}  # the font of letters that Pillow's own lacks; None: there is none


@lru_cache(64)  # fonts are files that stay open
def font(size: int, path: Path | None = None, layout: ImageFont.Layout | None = None) -> ImageFont.FreeTypeFont:
    """A font of the system, or Pillow's own; `size` is in pixels. Without a `layout` Raqm puts letters together, if it
    is there."""
    return ImageFont.truetype(str(path), size, layout_engine=layout) if path else ImageFont.load_default(size)


# ---- finding fonts ---------------------------------------------------------------------------------------------------


def font_folders() -> list[Path]:
    """Where this system keeps its fonts, the user's own first."""
    home = Path(os.environ.get("HOME") or os.environ.get("USERPROFILE") or "/")
    if sys.platform == "win32":
        local = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
        return [local / "Microsoft" / "Windows" / "Fonts", Path(os.environ.get("WINDIR", "C:/Windows"), "Fonts")]
    if sys.platform == "darwin":
        return [home / "Library" / "Fonts", Path("/Library/Fonts"), Path("/System/Library/Fonts")]
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    own = os.environ.get("XDG_DATA_HOME") or home / ".local" / "share"
    return [home / ".fonts", *(Path(folder, "fonts") for folder in (own, *shared.split(":")))]


@cache
def font_files() -> list[Path]:
    """The system's font files, upright ones of usual weight first."""
    files = {
        path
        for folder in font_folders()
        for path in folder.rglob("*")
        if path.suffix.lower() in (".ttf", ".otf", ".ttc", ".otc")
        if "lastresort" not in path.name.lower()  # macOS: pictures of alphabets in the place of letters
    }

    def order(path: Path) -> tuple:
        name = path.stem.lower()
        return sum(word in name for word in NOT_PLAIN), "sans" not in name, path.name, path

    return sorted(files, key=order)


def shape(letter: str, path: Path | None) -> tuple:
    """How a font draws a letter: its size and pixels."""
    mask = font(16, path, ImageFont.Layout.BASIC).getmask(letter)
    return mask.size, bytes(mask)


@cache
def has(path: Path | None, letter: str) -> bool:
    """Whether a font has a letter: it looks neither like a missing one nor like nothing."""
    size, pixels = shape(letter, path)
    return (size, pixels) != shape(NO_CHARACTER, path) and (any(pixels) or letter.isspace())


def in_own(text: str) -> bool:
    """Whether Pillow's own font has all letters of a text."""
    return text.isascii() or all(has(None, letter) for letter in text)


def is_visible(letter: str) -> bool:
    """Whether a letter needs a font: joiners, marks of direction and variation selectors do not."""
    return unicodedata.category(letter) != "Cf" and not "\ufe00" <= letter <= "\ufe0f"


def find_fonts(text: str) -> None:
    """Look for fonts that have the letters of a text, and remember them; does nothing for what Pillow's own has."""
    scripts = {}  # the letters of a script are mostly in the same font: CJK, HIRAGANA, ARABIC ...
    for letter in dict.fromkeys(text):
        if is_visible(letter) and letter not in FOUND and not in_own(letter):
            scripts.setdefault(unicodedata.name(letter, "?").split()[0], []).append(letter)
    for path in font_files() if scripts else []:
        try:
            for script, letters in scripts.items():
                if letters and has(path, letters[0]):
                    FOUND.update((letter, path) for letter in letters if has(path, letter))
                    scripts[script] = [letter for letter in letters if letter not in FOUND]
        except (OSError, ValueError):  # no font after all, or one of colours in a single size
            continue
        if not any(scripts.values()):
            break
    FOUND.update(dict.fromkeys((letter for letters in scripts.values() for letter in letters), None))


# ---- names -----------------------------------------------------------------------------------------------------------


def drawable(names: Sequence[str]) -> list[str]:
    """The names as pictures show them. One that cannot be drawn gets its number and the codes of letters: `#3 U+732B`.

    Arabic, Hebrew, and all scripts with marks, need Pillow with Raqm, which puts their letters together.
    """
    names = [printable(name) for name in names]
    find_fonts("".join(names))
    return [name if can_draw(name) else f"#{number} {with_codes(name)}" for number, name in enumerate(names)]


def with_codes(name: str) -> str:
    """The beginning of a name, with codes in the place of letters that cannot be drawn: `cat U+732B`."""
    letters = filter(is_visible, name[:100])
    words = (letter if can_draw(letter) else f" U+{ord(letter):04X} " for letter in letters)
    return " ".join("".join(words).split())


def legend(names: Sequence[str]) -> dict[str, str]:
    """The names that `drawable` numbers, by their numbers: `{"#3": "..."}`."""
    shown = drawable(names)
    return {f"#{number}": name for number, name in enumerate(names) if shown[number] != printable(name)}


def can_draw(text: str) -> bool:
    """Whether there are fonts for all letters of a text, which `find_fonts` has seen."""
    if in_own(text):
        return True
    if not features.check("raqm") and any(
        unicodedata.bidirectional(letter) in ("R", "AL") or unicodedata.category(letter).startswith("M")
        for letter in text
    ):
        return False
    return all(FOUND.get(letter) or not is_visible(letter) or in_own(letter) for letter in text)


# ---- drawing ---------------------------------------------------------------------------------------------------------


def runs(text: str) -> list[tuple[str, Path | None]]:
    """A text in parts that have a font each: the whole, if one font has all of it. None is Pillow's own."""
    if in_own(text):
        return [(text, None)]
    find_fonts(text)
    letters = [letter for letter in text if is_visible(letter)]
    for path in dict.fromkeys(map(FOUND.get, letters)):
        if path and all(has(path, letter) for letter in letters):
            return [(kept(text, path), path)]
    parts = []
    for letter in text:
        joins = unicodedata.category(letter).startswith("M") or not is_visible(letter)
        path = parts[-1][1] if joins and parts else FOUND.get(letter)
        if parts and parts[-1][1] == path:
            parts[-1] = (parts[-1][0] + letter, path)
        else:
            parts.append((letter, path))
    return [(kept(part, path), path) for part, path in parts]


def kept(text: str, path: Path | None) -> str:
    """The text without what has no shape of its own, where the font would draw a box for it."""
    return "".join(letter for letter in text if is_visible(letter) or has(path, letter))


def length(text: str, size: int) -> float:
    """How many pixels a text is wide."""
    return sum(font(size, path).getlength(part) for part, path in runs(text))


def shortened(text: str, width: int, size: int) -> str:
    """The text, with an ellipsis for what `width` pixels cannot hold."""
    if len(text) <= width and length(text, size) <= width:
        return text
    fits, too_long = 0, min(len(text), width)  # letters; hardly one is narrower than a pixel
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if length(text[:middle] + "…", size) <= width:
            fits = middle
        else:
            too_long = middle
    return text[:fits] + "…"


def draw_text(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, ink: tuple, anchor: str = "la"
) -> None:
    """Draw a line of text; `anchor` is one of Pillow's: l, m or r, then a or m."""
    parts = runs(text)
    if parts == [(text, None)]:
        draw.text(place, text, ink, font(size), anchor=anchor)
        return
    (x, y), (ascent, descent) = place, font(size).getmetrics()
    x -= {"l": 0, "m": 0.5, "r": 1}[anchor[0]] * length(text, size)
    y += {"a": ascent, "m": (ascent - descent) / 2}[anchor[1]]  # the base line, which all fonts share
    for part, path in parts:
        draw.text((x, y), part, ink, font(size, path), anchor="ls")
        x += font(size, path).getlength(part)

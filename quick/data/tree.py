"""What is below a folder: pictures by their endings, each real folder and each real file once; the rest is counted.

Nothing that we write is a picture here: neither what `predict.py --show` writes nor what is in a run's folder.
"""

import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from quick.cli import log
from quick.data.cache import FOLDER as CACHE
from quick.data.decoding import ENDINGS
from quick.errors import composed

EVENTS = "events.out.tfevents."  # how the names of TensorBoard's files begin
EXPLAINED = ".explained.png"  # how the names of the pictures end that predict.py --show writes
DEBRIS = {".DS_Store", "Thumbs.db", "desktop.ini"}  # files that systems put everywhere: not worth a word
SYSTEM = {"__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}

Place = tuple[str, ...]  # of a folder: the names of the folders from the root down to it


class Folder(NamedTuple):
    """What is directly in a folder."""

    pictures: list[str]  # names of files, sorted
    left_out: Counter[str]  # what else is there, in words, and how often
    is_ours: bool  # TensorBoard's events are in it, as in the folders that our scripts write
    classes: dict[str, str] | None = None  # of the pictures, by their names, where a table of labels tells them


def search(root: Path) -> dict[Place, Folder]:
    """The root and all folders below it, in the order of their names.

    Links are followed once all real folders are known, and only to what is not among these: circles end, and no picture
    has two names. Hidden folders and those of systems are left out. Raises OSError for the root.
    """
    found = Search(root)
    found.read_all()
    found.drop_second_names()
    return found.folders


def list_pictures(root: Path) -> list[str]:
    """All picture files below a folder, in the order of their names; says in one line what is left out."""
    folders = search(root)
    tell_left_out(root, sum((folder.left_out for folder in folders.values()), Counter()))
    found = ((f"{path_of(root, place)}{os.sep}", folder.pictures) for place, folder in folders.items())
    return [f"{start}{name}" for start, names in found for name in names]


def tell_left_out(root: Path, counts: Counter[str]) -> None:
    """Say in one line what was left out of a folder, if anything."""
    if counts:
        log.warning(f"{root}: left out: {in_words(counts)}")


def in_words(counts: Counter[str], most: int = 12) -> str:
    """Like ".txt (3), __MACOSX/", the most frequent first."""
    words = [what if count == 1 else f"{what} ({count:,})" for what, count in counts.most_common(most)]
    words += [f"{len(counts) - most} more kinds"] if len(counts) > most else []
    return ", ".join(words)


class Search:
    """A search through folders, and what it has found so far."""

    def __init__(self, root: Path):
        self.root = root
        self.folders: dict[Place, Folder] = {}
        self.seen = set()  # the real folders
        self.links: list[Place] = []  # to folders
        self.linked: set[tuple[Place, str]] = set()  # pictures that were found behind links
        self.inodes: list[int] = []  # of the others, as far as they are known without asking for each

    def read_all(self) -> None:
        """Read the root and all below it, links last."""
        waiting, behind = [()], False
        while waiting:
            waiting += self.read(waiting.pop(), behind)
            if not waiting and self.links:
                self.links.sort()
                waiting, behind = [self.links.pop(0)], True
        self.folders = {place: self.folders[place] for place in sorted(self.folders, key=lambda p: [*map(composed, p)])}

    def read(self, place: Place, behind: bool) -> list[Place]:
        """Read one folder, which may be `behind` a link; returns the real folders in it."""
        path = path_of(self.root, place)
        try:
            real = identity(path)
            if real in self.seen or (behind and leads_up(Path(path), self.root)):
                raise OSError("a link to a folder that is searched anyway")
            with os.scandir(path) as entries:
                entries = list(entries)
        except OSError as error:
            if not place:
                raise
            if error.strerror:  # an unreadable folder is there: it may be a class, which must not get lost
                self.folders[place] = Folder([], Counter(), False)
            where = place if error.strerror else place[:-1]
            self.folders[where].left_out[f"{place[-1]}{os.sep} ({error.strerror or error})"] += 1
            return []
        self.seen.add(real)
        is_ours = any(entry.name.startswith(EVENTS) for entry in entries)
        folder = self.folders[place] = Folder([], Counter(), is_ours)
        if is_ours and place and any(entry.name == "config.toml" for entry in entries):
            folder.left_out["a run's folder"] += 1
            return []
        return [(*place, name) for name in self.sort_out(entries, place, folder, behind)]

    def sort_out(self, entries: list[os.DirEntry], place: Place, folder: Folder, behind: bool) -> list[str]:
        """Put what is in a folder where it belongs; returns the names of the real folders in it."""
        inside, knows_inodes = [], os.name != "nt"  # Windows would open each file
        for entry in entries:
            name = entry.name
            try:
                if name.lower().endswith(ENDINGS) and name[0] != "." and is_picture(entry):
                    folder.pictures.append(name)
                    if behind or entry.is_symlink():
                        self.linked.add((place, name))
                    elif knows_inodes:
                        self.inodes.append(entry.inode())
                elif not entry.is_dir():
                    folder.left_out.update(words_for(entry))
                elif name[0] == "." or name in SYSTEM:
                    if name != CACHE:
                        folder.left_out[f"{name}{os.sep}"] += 1
                elif is_link(entry):
                    self.links.append((*place, name))
                else:
                    inside.append(name)
            except OSError:  # a link to itself
                folder.left_out["broken links"] += 1
        folder.pictures.sort(key=None if "".join(folder.pictures).isascii() else composed)
        return inside

    def drop_second_names(self) -> None:
        """Leave out second names of one file; a name that is no link stays, else the first."""
        if not self.linked and len(set(self.inodes)) == len(self.inodes):
            return
        names = [(place, name) for place, folder in self.folders.items() for name in folder.pictures]
        seen, second = set(), defaultdict(set)
        for place, name in sorted(names, key=self.linked.__contains__):
            try:
                real = identity(path_of(self.root, (*place, name)))
            except OSError:  # reading will name it
                continue
            if real in seen:
                second[place].add(name)
            seen.add(real)
        for place, names in second.items():
            self.folders[place].pictures[:] = [name for name in self.folders[place].pictures if name not in names]
            self.folders[place].left_out["second names of files"] += len(names)


def is_link(entry: os.DirEntry) -> bool:
    """Whether a folder is a link or, on Windows, a junction."""
    return entry.is_symlink() or (hasattr(entry, "is_junction") and entry.is_junction())  # is_junction: Python 3.12


def is_picture(entry: os.DirEntry) -> bool:
    """Whether a file with a picture's ending is one to read: neither ours nor a pipe, which would never end."""
    return not entry.name.endswith(EXPLAINED) and entry.is_file()


def words_for(entry: os.DirEntry) -> list[str]:
    """What a file is that is left out, in words; nothing for debris."""
    if entry.name in DEBRIS:
        return []
    if entry.name[0] == ".":
        return ["hidden files"]
    if not entry.is_file():
        return ["broken links" if entry.is_symlink() and not Path(entry).exists() else "pipes or devices"]
    if entry.name.endswith(EXPLAINED):
        return [EXPLAINED]
    ending = Path(entry).suffix.lower()
    return [ending if 1 < len(ending) <= 12 else "other files"]


def path_of(root: Path, place: Place) -> str:
    """The path of a folder below the root, as `root.joinpath(*place)` but ten times as fast."""
    return f"{start_of(root)}{os.sep.join(place)}" if place else str(root)  # noqa: PTH118


def path_to(root: Path, place: Place, name: str) -> str:
    """The path of a file of this name in a folder below the root."""
    return f"{start_of(root)}{os.sep.join((*place, name))}"  # noqa: PTH118 - a Path would take longer to make


def start_of(root: Path) -> str:
    """How the paths of all that is below a folder begin: with its name and a separator; with nothing for `.`."""
    return str(root) + os.sep if root.name else str(root / "x")[:-1]


def identity(path: str) -> object:
    """What two paths have in common that lead to one file or folder; raises OSError."""
    status = os.stat(path)  # noqa: PTH116 - of many folders; a Path would take longer to make than this
    return (status.st_dev, status.st_ino) if status.st_ino else Path(path).resolve()  # some disks number no files


def leads_up(link: Path, root: Path) -> bool:
    """Whether a link leads to a folder above itself or above the root."""
    return any(folder.resolve().is_relative_to(link.resolve()) for folder in (link.parent, root))

"""Which files of a folder are in which split and class: the layouts of folders, and tables of labels."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from quick.cli import log, read_text
from quick.data.holdout import Share, as_flags, held_out, names_below
from quick.data.labels import label_pictures
from quick.data.tree import Folder, Place, in_words, path_of, path_to, search, tell_left_out
from quick.errors import DataError, LimitError, composed, in_short, printable

SPLITS = {  # and the words in the names of their folders
    "train": ("train", "training", "训练"),
    "val": ("val", "valid", "validation", "dev", "eval", "evaluation", "验证"),
    "test": ("test", "testing", "测试"),
}
BESIDE = ("set", "sets", "data", "dataset", "split", "image", "images", "img", "imgs", "pictures", "photos", "集")
WORD = re.compile(rf"({'|'.join(word for words in SPLITS.values() for word in words)})({'|'.join(BESIDE)})?")
LABEL_BYTES = 4096  # at most, of a label file, which holds one name

Tree = dict[Place, Folder]


class Listing(NamedTuple):
    """What was found in a folder for one split."""

    split: str
    classes: list[str]
    files: list[tuple[str, str]]  # path and class
    bad: list[tuple[str, str]]  # path and reason
    unmatched: tuple[str, ...] = ()  # pictures that have no row in the table of labels, and rows without a picture


def find_files(root: Path, splits: Sequence[str], share: Share, labels: str | Path = "") -> dict[str, Listing]:
    """The picture files of each split, with their classes; without `splits` of all that the folder has.

    The layouts are `<split>/<class>/*` (with `val/` for `test/`), `<split>/<name>_image/*` with
    `<split>/<name>_label/*.txt`, or `<class>/*` without splits, of which about `share` is held out (0: a fifth).
    With a share, `val/` alone is the test set, since training gives the validation set. The split "whole" is all
    that can be tested: `test/`, else `val/`, else all pictures. Says in one line what is left out. Raises DataError.

    With a table of `labels` this says the classes, wherever the pictures are, and no class folders count.
    """
    tree, unmatched = search(root), ()
    if labels:
        tree, rest, unmatched = label_pictures(tree, root, labels)
        parts = find_labelled_parts(tree, root, labels, least=1 if "whole" in splits else 2)
    else:
        parts = find_parts(tree, root)
        rest = left_out(tree, list(parts.values()) or [()])
    if "whole" in splits:
        split = next((split for split in ("test", "val") if split in parts), "whole")
        place = parts.get(split, parts.get("train", ()))
        files, bad = list_files(tree, root, place)
        found = {"whole": Listing(split, class_names(root.joinpath(*place), files, least=1), files, bad)}
    elif set(parts) <= {"train"}:
        if not set(splits) <= {"train", "test"}:
            raise DataError(f"{root}: it has no folders train/ and test/, only these two splits can be made of it")
        found = split_files(tree, root, parts.get("train", ()), share or 0.2)
    else:
        found = split_by_folders(tree, root, parts, splits, share)
    tell_left_out(root, rest)
    return {split: listing._replace(unmatched=unmatched) for split, listing in found.items()}


def split_by_folders(
    tree: Tree, root: Path, parts: dict[str, Place], splits: Sequence[str], share: Share
) -> dict[str, Listing]:
    """The files of each split's own folder; the training set names the classes. Raises DataError."""
    found, classes, has_both = {}, [], {"val", "test"} <= set(parts)
    if not splits and has_both and share:
        held = root.joinpath(*parts["val"])
        raise LimitError(f"{as_flags(share)}: {held} is the validation set already; leave this out")
    splits = splits or (tuple(SPLITS) if has_both else ("train", "test"))
    for split in dict.fromkeys(["train", *splits] if "train" in parts else splits):
        source = "val" if split == "test" and "test" not in parts else split
        if source not in parts:
            raise DataError(f"{root}: no folder {split}/ in it; wanted are train/<class>/* and test/<class>/*")
        part = root.joinpath(*parts[source])
        files, bad = list_files(tree, root, parts[source])
        if not files:
            what = "no class folders with pictures in it, and its name is that of a split"
            hint = "; sort its pictures into folders of their classes, add --labels FILE, or move it away"
            raise DataError(f"{part}: {what}{but_these(tree[parts[source]].left_out)}{hint}")
        classes = classes or class_names(part, files, least=2 if split == "train" else 1)
        filled = {name for _, name in files}
        for name in sorted(filled - set(classes)):
            train = root.joinpath(*parts["train"])
            raise DataError(f"{part}: class '{name}' is not in {train}, which has: {in_short(classes)}")
        if lacking := sorted(set(classes) - filled):
            log.warning(f"{part}: no pictures of these classes, which are not measured: {in_short(lacking)}")
        found[split] = Listing(split if share else source, classes, files, bad)
    return found


def split_files(tree: Tree, root: Path, place: Place, share: Share) -> dict[str, Listing]:
    """The files of `<class>/*` at this place below the root, with about `share` held out; raises DataError."""
    part, (files, bad) = root.joinpath(*place), list_files(tree, root, place)
    classes = class_names(part, files)
    is_out = held_out(names_below(part, [path for path, _ in files]), [name for _, name in files], share, root)
    train_files, val_files = (
        [file for file, out in zip(files, is_out, strict=True) if out is side] for side in (False, True)
    )
    return {"train": Listing("train", classes, train_files, bad), "test": Listing("val", classes, val_files, [])}


# ---- splits --------------------------------------------------------------------------------------------------------


def find_parts(tree: Tree, root: Path) -> dict[str, Place]:
    """Where train, val and test are, by the names of folders at the top; empty if these are classes.

    `Training`, `test_set` or `seg_train` are names of splits too, and `seg_train/seg_train` is looked into. A folder
    with such a name is a class if pictures are directly in it and other classes are beside it. Raises DataError where
    it may be both.
    """
    names, groups = dict.fromkeys(place[0] for place in tree if place), defaultdict(dict)
    for name in names:
        split, rest = split_of(name)
        if split and name.endswith("_image") and is_label_place(tree, (label_name(name),)):
            raise DataError(f"{root}: put {name}/ and {label_name(name)}/ into a folder {split}/")
        if split and groups[rest].setdefault(split, name) != name:
            raise DataError(f"{root}: {groups[rest][split]}/ and {name}/ would both be the {split} pictures; keep one")
    sides = groups.get((), {})
    for found in groups.values():  # such as seg_train and seg_test
        sides = sides or (found if "train" in found and len(found) > 1 else {})
    filled = {place[0] for place, folder in tree.items() if place and folder.pictures}
    others = sorted(filled - set(sides.values()))
    nested = [name for name in sides.values() if name in filled and not tree[(name,)].pictures]
    if others and not nested:
        return {}
    if others and (len(nested) < len(sides) or "train" not in sides or len(sides) == 1):
        raise DataError(
            f"{root}: {nested[0]}/ looks like a split, {others[0]}/ beside it like a class; move or rename one of them"
        )
    return {split: innermost(tree, (name,)) for split, name in sides.items()}


def find_labelled_parts(tree: Tree, root: Path, labels: str | Path, least: int) -> dict[str, Place]:
    """Where train, val and test are, of a tree of the pictures that have labels in a table; empty without such folders.

    Raises DataError for less than the `least` number of classes, and where some pictures alone are in splits.
    """
    places = [place for place, folder in tree.items() if folder.pictures]
    names = {name for place in places for name in tree[place].classes.values()}
    if len(names) < least:
        raise DataError(f"{labels}: one class alone, '{min(names)}'; a classifier needs at least {least}")
    parts = find_parts({place: folder for place, folder in tree.items() if place and split_of(place[0])[0]}, root)
    within = [next((split for split in parts if place[: len(parts[split])] == parts[split]), "") for place in places]
    if parts and "" in within:
        place, split = places[within.index("")], next(iter(parts.values()))
        other = path_to(root, place, tree[place].pictures[0])
        what = f"{root.joinpath(*split)} looks like a split, and {other} is beside it; move or rename one of them"
        raise DataError(f"{labels}: it labels pictures in splits and outside: {what}")
    if parts and "train" not in parts and least > 1:
        raise DataError(f"{labels}: it labels pictures of {' and '.join(parts)}, none in a folder train/ to train on")
    return parts


def split_of(name: str) -> tuple[str, tuple[str, ...]]:
    """The split that a folder's name tells, empty if it tells none, and what else is in the name."""
    words = re.findall(r"[^\W\d_]+", composed(name).casefold())
    told = [found[1] for word in words if (found := WORD.fullmatch(word))]
    rest = tuple(word for word in words if word not in BESIDE and not WORD.fullmatch(word))
    split = next((split for split in SPLITS if len(told) == 1 and told[0] in SPLITS[split]), "")
    return split, rest


def innermost(tree: Tree, place: Place) -> Place:
    """This place, or the one folder in it if that is a split of the same name again, as Kaggle's archives have it."""
    deeper = {other[: len(place) + 1] for other in tree if len(other) > len(place) and other[: len(place)] == place}
    [only] = deeper if len(deeper) == 1 else [place]
    again = split_of(only[-1]) == split_of(place[-1]) and not tree[only].pictures and not tree[place].pictures
    return only if again else place


# ---- classes -------------------------------------------------------------------------------------------------------


def list_files(tree: Tree, root: Path, part: Place) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The picture files below a part of the root, each with its class; and what is wrong there, each with its reason.

    A class has one name, in whichever form of Unicode its folders are written. Raises DataError for one without
    pictures. Where a table tells the classes, their folders do not count.
    """
    tables = [(place, folder.classes) for place, folder in tree.items() if folder.classes is not None]
    if tables:
        below = [(place, of) for place, of in tables if place[: len(part)] == part]
        return [(path_to(root, place, name), label) for place, of in below for name, label in of.items()], []
    files, bad, classes = [], [], defaultdict(list)
    for place, folder in tree.items():
        if len(place) > len(part) and place[: len(part)] == part and not is_label_place(tree, place, len(part)):
            classes[place[len(part)]].append((f"{path_of(root, place)}{os.sep}", folder))
    for name, folders in classes.items():
        paths = [f"{path}{file}" for path, folder in folders for file in folder.pictures]
        if name.endswith("_image") and is_label_place(tree, (*part, label_name(name))):
            labelled, wrong = label_files(root.joinpath(*part, label_name(name)), paths)
            files, bad = files + labelled, bad + wrong
        elif paths:
            files += [(path, composed(name)) for path in paths]
        elif not any(folder.is_ours for _, folder in folders):
            counts = sum((folder.left_out for _, folder in folders), Counter())
            raise DataError(f"{root.joinpath(*part, name)}: no pictures in it{but_these(counts)}")
    return files, bad


def but_these(counts: Counter[str]) -> str:
    """What was left out, as the end of an error message; empty if nothing was."""
    return f"; left out: {in_words(counts)}" if counts else ""


def label_name(name: str) -> str:
    """The name of the folder that holds the labels of the pictures in `<name>_image`."""
    return name.removesuffix("_image") + "_label"


def is_label_place(tree: Tree, place: Place, depth: int = -1) -> bool:
    """Whether the folder at this depth of a place holds labels: `<name>_label` beside `<name>_image`."""
    name, above = place[depth], place[:depth]
    pair = (*above, name.removesuffix("_label") + "_image")
    return name.endswith("_label") and place in tree and pair in tree


def label_files(labels: Path, paths: Sequence[str]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The pictures, each with the class that the text file of the same name holds; and what is wrong with which."""
    with os.scandir(labels) as entries:  # a pipe or device is no label file
        texts = [entry for entry in entries if entry.name.endswith(".txt") and entry.name[0] != "." and entry.is_file()]
    by_stem = {composed(Path(entry).stem): entry for entry in texts if entry.stat().st_size <= LABEL_BYTES}
    files, bad, stems = [], [], set()
    for path in paths:
        stem = composed(Path(path).stem)
        stems.add(stem)
        try:
            name = composed(read_text(Path(by_stem[stem])).strip())
        except (OSError, ValueError, KeyError):
            bad.append((path, f"no label: {labels / Path(path).stem}.txt cannot be read"))
            continue
        if name and printable(name) == name:
            files.append((path, name))
        else:
            bad.append((path, "its label file holds no class name"))
    alone = sorted(entry.path for entry in texts if composed(Path(entry).stem) not in stems)
    return files, bad + [(path, "label without a picture") for path in alone]


def class_names(part: Path, files: list[tuple[str, str]], least: int = 2) -> list[str]:
    """The classes of these files, sorted; raises DataError when there is nothing to tell apart."""
    classes = sorted({name for _, name in files})
    if strange := [name for name in classes if printable(name) != name]:
        raise DataError(f"{part}: class '{strange[0]}' has control characters in its name; rename its folder")
    if len(classes) < least:
        found = f"one class alone, '{classes[0]}'" if classes else "no class folders with pictures"
        folders = {str(Path(path).parent) for path, _ in files}
        inner = f"; if the classes are in {os.path.commonpath(folders)}, give that folder" if len(folders) > 1 else ""
        needed = "a classifier needs at least 2" if least > 1 else "sort its pictures into folders of their classes"
        table = "" if classes else ", or a table of them with --labels FILE"
        raise DataError(f"{part}: {found}; {needed}{table}{inner}")
    return classes


def left_out(tree: Tree, parts: Sequence[Place]) -> Counter[str]:
    """What is in the folder and in none of the classes of these parts, in words, and how often."""
    counts = Counter()
    for place, folder in tree.items():
        part = next((part for part in parts if place[: len(part)] == part), None)
        is_label = part is not None and len(place) > len(part) and is_label_place(tree, place, len(part))
        counts.update({} if is_label else folder.left_out)
        if folder.pictures and (part is None or place == part or is_label):
            what = "pictures beside the class folders" if place == part else f"pictures in {Path(*place)}{os.sep}"
            counts[what] += len(folder.pictures)
    return counts

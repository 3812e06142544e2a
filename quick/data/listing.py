"""Which files of a folder are in which split and class: the layouts of folders, and what is held out."""

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from quick.errors import DataError

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")


class Listing(NamedTuple):
    """What was found in a folder for one split."""

    split: str
    classes: list[str]
    files: list[tuple[str, str]]  # path and class
    bad: list[tuple[str, str]]  # path and reason


def find_files(root: Path, splits: Sequence[str], fraction: float) -> dict[str, Listing]:
    """The picture files of each split, with their classes, in one of three layouts:

    `<split>/<class>/*` (with `val/` for `test/`), `<split>/<name>_image/*` with `<split>/<name>_label/*.txt`, or
    `<class>/*` without splits, of which `fraction` is held out. Raises DataError.
    """
    if not any((root / name).is_dir() for name in ("train", "test", "val")):
        if not set(splits) <= {"train", "test"}:
            raise DataError(f"{root}: it has no folders train/ and test/, only these two splits can be made of it")
        return split_files(root, fraction)
    has_train, has_test = (root / "train").is_dir(), (root / "test").is_dir()
    found, classes = {}, []
    for split in dict.fromkeys(["train", *splits] if has_train else splits):  # the training set names the classes
        part = root / "val" if split == "test" and not has_test and (root / "val").is_dir() else root / split
        if not part.is_dir():
            raise DataError(f"{root}: no folder {split}/ in it; wanted are train/<class>/* and test/<class>/*")
        files, bad = list_files(part)
        if not files:
            raise DataError(f"{part}: no class folders with pictures in it")
        classes = classes or class_names(part, files, least=2 if split == "train" else 1)
        for name in sorted({name for _, name in files} - set(classes)):
            raise DataError(f"{part}: class {name!r} is not in {root / 'train'}, which has: {', '.join(classes)}")
        found[split] = Listing(split, classes, files, bad)
    return found


def split_files(root: Path, fraction: float) -> dict[str, Listing]:
    """The files of `root/<class>/*`, with `fraction` of each class held out.

    A hash of a file's name decides, so that what was held out stays so when files are added. Raises DataError.
    """
    files, bad = list_files(root)
    classes, held_out = class_names(root, files), set()
    for name in classes:
        of_class = sorted((hash_fraction(path, root), path) for path, class_name in files if class_name == name)
        count = sum(place < fraction for place, _ in of_class)
        count = min(max(count, 1), len(of_class) - 1)  # some on either side
        held_out |= {path for _, path in of_class[:count]}
    train_files = [(path, name) for path, name in files if path not in held_out]
    val_files = [(path, name) for path, name in files if path in held_out]
    if not val_files:
        raise DataError(f"{root}: one picture a class; put at least two into each, one of which is held out")
    return {"train": Listing("train", classes, train_files, bad), "test": Listing("val", classes, val_files, [])}


def list_files(part: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The picture files below a split, each with its class; and what is wrong there, each with its reason."""
    files, bad = [], []
    for folder in sorted(path for path in part.iterdir() if path.is_dir() and not path.name.startswith(".")):
        labels = folder.with_name(folder.name.removesuffix("_image") + "_label")
        if folder.name.endswith("_label") and folder.with_name(folder.name.removesuffix("_label") + "_image").is_dir():
            continue
        pictures = list_pictures(folder)
        if not (folder.name.endswith("_image") and labels.is_dir()):
            if not pictures:
                raise DataError(f"{folder}: no pictures in it")
            files += [(path, folder.name) for path in pictures]
            continue
        stems = [Path(path).stem for path in pictures]
        for stem, path in zip(stems, pictures, strict=True):
            try:
                name = (labels / f"{stem}.txt").read_text(encoding="utf-8").strip()
            except (OSError, ValueError):
                bad.append((path, f"no label: {labels / stem}.txt cannot be read"))
                continue
            if name and name.isprintable():
                files.append((path, name))
            else:
                bad.append((path, "its label file holds no class name"))
        alone = {path.stem for path in labels.glob("*.txt")} - set(stems)
        bad += [(str(labels / f"{stem}.txt"), "label without a picture") for stem in sorted(alone)]
    return files, bad


def list_pictures(root: Path) -> list[str]:
    """All picture files below a folder, by their endings, in the order of their names; hidden ones are left out."""
    found = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        pictures = (name for name in sorted(names) if name.lower().endswith(PICTURE_ENDINGS) and name[0] != ".")
        found += [f"{folder}{os.sep}{name}" for name in pictures]
    return found


def class_names(part: Path, files: list[tuple[str, str]], least: int = 2) -> list[str]:
    """The classes of these files, sorted; raises DataError when there is nothing to tell apart."""
    classes = sorted({name for _, name in files})
    if strange := [name for name in classes if not name.isprintable()]:
        raise DataError(f"{part}: class {strange[0]!r} has control characters in its name; rename its folder")
    if len(classes) < least:
        found = f"one class alone, {classes[0]!r}" if classes else "no class folders with pictures"
        raise DataError(f"{part}: {found}; a classifier needs at least 2")
    return classes


def hash_fraction(path: str, root: Path) -> float:
    """A number in [0, 1) from a file's name below `root`: the same on every machine and in every Unicode form."""
    name = unicodedata.normalize("NFC", Path(path).relative_to(root).as_posix()).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.md5(name, usedforsecurity=False).digest()[:6]) / 2**48

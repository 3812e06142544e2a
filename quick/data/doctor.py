"""The doctor of a data set: what is in it, what is wrong with it, and which pictures are there twice."""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from quick.data.pictures import Pictures
from quick.data.sizing import PADDING
from quick.data.stores import Enlarged
from quick.data.streaming import free_memory
from quick.errors import padded, printable, terminal_width

UNBALANCED = 3  # times as many pictures in the largest class as in the smallest, above which that is said
MOST_LISTED = 20  # of the pictures without a row in the table of labels, and the rows without a picture
FLAT = 8  # standard deviation of 0..255, below which there is nothing to see on a picture


def describe(sets: list[Pictures]) -> str:
    """Pictures a class and split, sizes, memory, copies, empty pictures, and what to paste into a config."""
    classes = sets[0].classes
    width = max(terminal_width(name) for name in [*classes, "class"])
    lines = [f"{'class':{width}}" + "".join(f"{pictures.split:>10}" for pictures in sets)]
    counts = [torch.bincount(pictures.labels.cpu(), minlength=len(classes)).tolist() for pictures in sets]
    for name, *of_class in zip(classes, *counts, strict=True):
        lines.append(padded(name, width) + "".join(f"{count:>10,}" for count in of_class))
    lines.append(f"{'total':{width}}" + "".join(f"{len(pictures):>10,}" for pictures in sets))

    sizes = sorted({size for pictures in sets for size in pictures.file_sizes}, key=math.prod)
    found = " to ".join(f"{width} x {height}" for width, height in dict.fromkeys((sizes[0], sizes[-1])))
    lines.append(f"\nfiles     {found} pixels; the network gets {sets[0].side} x {sets[0].side}")
    bad = {path for pictures in sets for path, _ in pictures.bad}  # a validation set shares training's list and store
    lines.append(f"bad       {len(bad)} files left out")
    lines += [f"labels    {printable(line)}" for line in sets[0].unmatched[:MOST_LISTED]]
    if (more := len(sets[0].unmatched) - MOST_LISTED) > 0:
        lines.append(f"labels    {more:,} more")
    taken = sum({id(pictures.store): pictures.store.nbytes for pictures in sets}.values())
    share = f"{taken / 1e6:,.1f} MB, {taken / (free_memory(sets[0].labels.device) + taken):.1%} of what is free"
    lines.append(f"memory    {share if taken else 'streamed from the files: they do not fit'}")
    files = {id(pictures.store): getattr(pictures.store, "files", None) for pictures in sets}
    for cache in (found.cache for found in files.values() if found and found.cache):
        lines.append(f"cache     {cache.nbytes / 1e6:,.1f} MB, {printable(str(cache.path))}")
    for pictures in sets[1:]:
        copies = duplicates(sets[0], pictures)
        example = f", first {printable(' = '.join(copies[0]))}" if copies else ""
        lines.append(f"copies    {len(copies)} {pictures.split} pictures are in {sets[0].split} too{example}")
    for pictures in sets:
        lines += [f"flat      {line}" for line in flat_in_words(pictures)]
    if line := unbalanced(sets):
        lines.append(f"balance   {line}; --balance 1 lets all classes count the same")
    lines.append("")

    for name, values in (("mean", sets[0].mean), ("std", sets[0].std)):
        lines.append(f"{name} = [{', '.join(f'{value:.4f}' for value in values)}]")
    if sets[0].levels:  # of pixels wider than 8 bits
        lines.append(f"levels = [{', '.join(f'{value:g}' for value in sets[0].levels)}]")
    return "\n".join(lines)


def unbalanced(sets: Sequence[Pictures]) -> str | None:
    """What it means that the largest class of the first set, training, is far larger than the smallest, in words.

    None where it is not. The last set is one that is held out.
    """
    train_set, held_out = sets[0], sets[-1]
    counts = torch.bincount(train_set.labels.cpu(), minlength=len(train_set.classes)).tolist()
    (most, largest), (least, smallest) = ((f(counts), counts.index(f(counts))) for f in (max, min))
    if most <= UNBALANCED * least:
        return None
    share = (held_out.labels == largest).double().mean().item()
    large, small = printable(train_set.classes[largest]), printable(train_set.classes[smallest])
    return (
        f"{large} has {most:,} {train_set.split} pictures, {small} {least:,}: always answering {large} would get "
        f"{share:.1%} of the {held_out.split} pictures right"
    )


def flat_in_words(pictures: Pictures) -> list[str]:
    """How many pictures have nothing on them, in lines such as `3 train pictures are nearly black, first a.png`."""
    lines = []
    for what, places in flat(pictures).items():
        name = f"number {places[0]}" if pictures.paths is None else os.fsdecode(pictures.paths[places[0]])
        lines.append(printable(f"{len(places):,} {pictures.split} pictures are {what}, first {name}"))
    return lines


def flat(pictures: Pictures) -> dict[str, list[int]]:
    """The places of pictures that are nearly black, nearly white or of one colour, as the network sees their centre."""
    rows = torch.arange(len(pictures)) if pictures.rows is None else pictures.rows.cpu()
    batches, found, start = rows.to(pictures.labels.device).split(pictures.evaluation_batch), {}, 0
    for images in pictures.store.read(batches):
        values, counts = images.flatten(2).float(), (images != PADDING).any(1).flatten(1)  # not what --fit pad added
        counts |= ~counts.any(1, keepdim=True)
        shares = (counts / counts.sum(1, keepdim=True)).unsqueeze(1)
        means = (values * shares).sum(2)
        spread = ((values - means.unsqueeze(2)).square() * shares).sum(2).sqrt()
        for place in (spread.amax(1) < FLAT).nonzero().flatten().tolist():
            mean = means[place].mean().item()
            what = "nearly black" if mean < 4 * FLAT else "nearly white" if mean > 255 - 4 * FLAT else "of one colour"
            found.setdefault(what, []).append(start + place)
        start += len(images)
    return found


def duplicates(train_set: Pictures, test_set: Pictures) -> list[tuple[str, str]]:
    """Test pictures that are training pictures too, to the byte: pairs of file names, or of places in the sets."""

    def hashes(pictures: Pictures) -> Iterator[tuple[bytes, str]]:
        if pictures.paths is None:
            store = pictures.store.small if isinstance(pictures.store, Enlarged) else pictures.store
            rows = enumerate(range(len(pictures)) if pictures.rows is None else pictures.rows.tolist())
            named = ((f"number {place}", store.images[row].cpu().numpy().tobytes()) for place, row in rows)
        else:
            named = ((path, Path(path).read_bytes()) for path in map(os.fsdecode, pictures.paths))
        for name, content in named:
            yield hashlib.md5(content, usedforsecurity=False).digest(), name

    seen = dict(hashes(train_set))
    return [(name, seen[digest]) for digest, name in hashes(test_set) if digest in seen]

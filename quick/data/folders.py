"""Reading the files of a folder once: into memory, or to be streamed; bad ones are named and left out."""

import itertools
import math
import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quick.cli import log, progress_bar
from quick.data.batching import balanced
from quick.data.cache import open_cache
from quick.data.decoding import Decoded, Files, open_picture
from quick.data.doctor import flat
from quick.data.listing import Listing
from quick.data.pictures import Pictures, histogram, statistics
from quick.data.pixels import Values, levels_of
from quick.data.sizing import Sizing
from quick.data.stores import InMemory, Streamed
from quick.data.streaming import Budget, decoder
from quick.errors import DataError, printable
from quick.processes import Group


def read_files(
    listing: Listing,
    sizing: Sizing,
    *,
    limit: int,
    device: torch.device,
    workers: int,
    budget: Budget,
    strict: bool,
    find_levels: bool,
    group: Group,
    cache: Path | None = None,
) -> Pictures:
    """Decode and check all pictures of a listing once; keep them in memory if they fit, else stream them.

    They fit if the `budget` of all sets has room for them. Bad files are named and left out; raises DataError for
    them if `strict`, and where too few are left. With `find_levels` pictures wider than 8 bits a pixel set the sizing's
    levels, and all are read again with these. With `cache`, the data folder, what is streamed is kept resized there.
    """
    label_of = {name: label for label, name in enumerate(listing.classes)}
    labels = torch.tensor([label_of[name] for _, name in listing.files])
    chosen = balanced(labels, listing.classes, limit) if limit else torch.arange(len(labels))
    # The order is mixed once and for all: in class order, unshuffled training would forget all but the last class.
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))]
    paths = np.array([os.fsencode(listing.files[place][0]) for place in chosen.tolist()])
    width = group.from_rank0(lambda: stored_width(paths, sizing)) if listing.split == "train" else sizing.side
    files = Files(paths, sizing, width)

    # Each process collects them in the machine's memory, then they move to the device.
    size = len(paths) * files.side * files.width * 3
    fits = budget.take(size)
    if cache and not fits:
        files.cache = open_cache(cache, paths, sizing, width)
    decoded, counts = decode_all(files, workers=workers, keep=fits, name=f"reading {listing.split}", group=group)
    if find_levels and decoded.values:
        levels = levels_of(decoded.values)
        del decoded  # its memory is needed again
        files = replace(files, sizing=sizing._replace(levels=levels))
        files.cache = files.cache and open_cache(cache, paths, files.sizing, width)
        name = f"reading {listing.split}, values {levels[0]:g} to {levels[1]:g}"
        decoded, counts = decode_all(files, workers=workers, keep=fits, name=name, group=group)
    if fits:
        is_square = files.width == files.side
        images = decoded.images.permute(0, 3, 1, 2)
        store = InMemory(images) if is_square else InMemory(images, decoded.extent, decoded.tall)
        store = store.to(device)
    else:
        store = Streamed(files, workers, device)

    good = decoded.extent > 0
    areas = decoded.sizes.prod(1).double()
    extremes = areas.where(good, math.inf).argmin(), areas.argmax()
    pictures = Pictures(
        store,
        labels[chosen].to(device),
        listing.classes,
        listing.split,
        paths=paths,
        file_sizes=tuple(tuple(decoded.sizes[place].tolist()) for place in extremes),
        levels=files.sizing.levels,
        bad=listing.bad + decoded.bad,
        unmatched=listing.unmatched,
    )
    if good.any():
        pictures.mean, pictures.std = statistics(counts)
    pictures = pictures if good.all() else pictures.take(good.nonzero().squeeze(1))
    check_bad_files(pictures, strict)
    tell_values_outside(decoded.values, files.sizing.levels, listing.split)
    some = min(64, pictures.evaluation_batch)
    sample = pictures.take(torch.arange(0, len(pictures), math.ceil(len(pictures) / some)))
    for what, places in flat(sample).items():
        if 2 * len(places) > len(sample):
            path = os.fsdecode(sample.paths[places[0]])
            log.warning(f"most {listing.split} pictures are {what}, {path} among them; python datasets.py tells more")
    return pictures


def decode_all(files: Files, *, workers: int, keep: bool, name: str, group: Group) -> tuple[Decoded, Tensor]:
    """Decode all files with a progress bar: what was found, with the images only if `keep`, and their histogram.

    Each process decodes its shard, and all get everything.
    """
    count = len(files.paths)
    images = torch.zeros((count if keep else 0, files.side, files.width, 3), dtype=torch.uint8)
    extent, tall = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.uint8)
    sizes, bad, counts = torch.zeros(count, 2, dtype=torch.int64), [], torch.zeros(3, 256, dtype=torch.int64)
    values = []
    workers = workers if count > 1000 else 0  # to start processes costs time, most where they import torch again
    # To hand over costs time, but what waits for it has to fit into 64 MB of shared memory (Docker's default).
    most = max(1, min(4000, 2**23 // (files.side * files.width * max(1, workers))))
    evenly = group.size * max(1, workers)  # as many batches for every worker
    batches = np.array_split(np.arange(count), math.ceil(count / most / evenly) * evenly)
    batches = [rows.tolist() for rows in batches[group.rank :: group.size] if len(rows)]
    loader = decoder(files, batches, workers, torch.device("cpu"))
    with progress_bar(name, sum(map(len, batches)), "pictures") as progress:
        for rows, decoded in zip(batches, loader, strict=True):
            place = slice(rows[0], rows[-1] + 1)
            if keep:
                images[place] = decoded.images
            counts += histogram(decoded.images.permute(0, 3, 1, 2))
            extent[place], tall[place], sizes[place] = decoded.extent, decoded.tall, decoded.sizes
            bad += decoded.bad
            values += decoded.values
            progress.update(len(rows))
    for tensor in (images, extent, tall, sizes, counts):  # which are zero for the other processes' files
        group.all_reduce(tensor)
    bad = sorted(itertools.chain(*group.all_gather(bad)))
    values = [*itertools.chain(*group.all_gather(values))]
    counts[:, 0] -= files.side * (files.width - extent).sum()  # the black beside the pictures does not count
    return Decoded(images, extent, tall.bool(), sizes, bad, values), counts


def stored_width(paths: np.ndarray, sizing: Sizing) -> int:
    """The width to store pictures with, in pixels: as the longest of 64 files needs it, at most twice the side."""
    if sizing.fit != "crop":  # all become squares
        return sizing.side
    longest = 1.0
    for path in paths[:: max(1, len(paths) // 64)]:
        try:
            with warnings.catch_warnings(action="ignore"), open_picture(os.fsdecode(path)) as image:
                longest = max(longest, max(image.size) / min(image.size))
        except Exception:  # bad files are named when all are read
            continue
    return min(round(sizing.shorter * longest), 2 * sizing.side)


def tell_values_outside(values: list[Values], levels: tuple[float, float] | None, split: str) -> None:
    """Warn where most of the pictures wider than 8 bits go beyond the levels by more than half of what these span."""
    low, high = levels or (-math.inf, math.inf)
    reach = (high - low) / 2
    beyond = [part for part in values if part.lowest < low - reach or part.highest > high + reach]
    if 2 * len(beyond) > len(values):
        least, most = min(part.lowest for part in beyond), max(part.highest for part in beyond)
        what = f"values {least:g} to {most:g}, far beyond the levels {low:g} to {high:g} that become black and white"
        log.warning(f"most {split} pictures of more than 8 bits have {what}")


def check_bad_files(pictures: Pictures, strict: bool) -> None:
    """Name the first 20 files that were left out on standard error.

    Raises DataError for the first one if `strict`, for a class without a training picture, and for an empty set.
    """
    lines = [f"{path}: {reason}" for path, reason in pictures.bad]
    if strict and (found := [*lines, *pictures.unmatched]):
        more = f" (and {len(found) - 1} more bad files)" if len(found) > 1 else ""
        raise DataError(f"{found[0]}{more}")
    for line in lines[:20]:
        log.warning(f"left out: {printable(line)}")
    if len(lines) > 20:
        log.warning(f"left out: {len(lines) - 20} more files")
    counts = torch.bincount(pictures.labels.cpu(), minlength=len(pictures.classes)).tolist()
    if pictures.split == "train" and 0 in counts:
        raise DataError(f"class '{pictures.classes[counts.index(0)]}' has no readable training pictures")
    if not len(pictures):
        raise DataError(f"no readable {pictures.split} pictures")

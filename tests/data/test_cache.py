"""--cache: pictures that are streamed are decoded once, and kept resized on the disk."""

import errno
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from quick.data import cache as room
from quick.data import decoding
from quick.data.augment import Augment
from quick.data.tree import list_pictures


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of 24 photographs, wide, tall and square, and one that is damaged."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user's"))
    root, random = tmp_path / "photographs", np.random.RandomState(0)
    for split, count in (("train", 9), ("test", 3)):
        for name in ("red", "blue"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.randint(0, 256, (5, 5, 3)).astype(np.uint8)
                image = Image.fromarray(pixels).resize([(90, 60), (60, 90), (50, 50)][number % 3])
                image.save(root / split / name / f"{number}.png")
    (root / "train" / "red" / "damaged.jpg").write_bytes(b"\xff\xd8 no more")
    return root


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that this process decodes."""
    names, decode = [], decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda path, *how: names.append(Path(path).name) or decode(path, *how))
    return names


def load(folder, cache=True, workers=0, **how):
    return datasets.load(str(folder), memory_share=0, cache=cache, workers=workers, **how)


def everything(sets):
    """All that training sees of the sets, with random squares of the pictures that are not square."""
    augment = Augment(flip=True, crop=2)
    batches = [batch for epoch in (1, 2) for batch in sets[0].batches(7, shuffle=True, augment=augment, epoch=epoch)]
    batches += sets[1].batches(7)
    assert [sets[0].bad[0][1], sets[0].file_sizes, len(sets[0])] == [sets[0].bad[0][1], ((50, 50), (90, 60)), 18]
    return [tensor for batch in batches for tensor in (batch.images, batch.labels)]


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_the_same_pixels_with_and_without_and_nothing_is_decoded_twice(folder, decoded, fit, capsys):
    expected = everything(load(folder, cache=False, fit=fit))
    decoded.clear()
    sets = load(folder, fit=fit)
    assert len(decoded) == len(set(decoded)) + 15 == 25  # each of the 24 and the damaged one, once
    found = everything(sets)
    assert len(decoded) == 25 and same(expected, found)
    decoded.clear()
    again = load(folder, fit=fit)
    assert same(expected, everything(again)) and decoded == ["damaged.jpg"]
    assert (again[0].mean, again[0].std) == (sets[0].mean, sets[0].std)
    [first, second] = sorted((folder / room.FOLDER).iterdir(), key=os.path.getsize)
    said = capsys.readouterr().err
    assert f"--cache: {second}: 0.1 MB for 19 pictures" in said and "left out: .resized" not in said
    assert f"cache     0.1 MB, {second}" in datasets.describe(again)
    assert not [name for name in list_pictures(folder) if room.FOLDER in name] and first.suffix == ".pixels"


def test_a_changed_picture_is_read_anew_and_one_that_is_gone_is_named(folder, decoded):
    load(folder)
    path = folder / "train" / "blue" / "3.png"
    Image.new("RGB", (70, 60), "white").save(path)
    decoded.clear()
    sets = load(folder)
    assert decoded.count("3.png") == 1 and len(decoded) == 2
    place = [Path(os.fsdecode(name)) for name in sets[0].paths].index(path)
    assert (sets[0][place][0] == 255).all()
    path.unlink()
    with pytest.raises(datasets.DataError, match=r"3\.png: No such file"):
        sets[0][place]


@pytest.mark.parametrize("how", [{"image_size": 24}, {"interpolation": "bicubic"}, {"limit": 8}, {"fit": "squash"}])
def test_other_pictures_and_sizes_have_files_of_their_own(folder, how):
    load(folder)
    expected = [tensor for batch in load(folder, False, **how)[0].batches(9) for tensor in (batch.images, batch.labels)]
    assert same(expected, [x for batch in load(folder, **how)[0].batches(9) for x in (batch.images, batch.labels)])
    assert len([*(folder / room.FOLDER).iterdir()]) == 3 + ("limit" not in how)


@pytest.mark.parametrize("spoil", ["half written", "empty places", "cut off", "zeros for pixels"])
def test_what_is_not_whole_is_decoded_again(folder, decoded, spoil):
    expected = everything(load(folder, cache=False))
    sets = load(folder)
    cache = sets[0].store.files.cache
    content = bytearray(cache.path.read_bytes())
    if spoil == "half written":  # killed between pixels and head, or two that wrote at once
        content[3 * cache.record + 500] ^= 1
    elif spoil == "empty places":
        content[cache.record : 3 * cache.record] = bytes(2 * cache.record)
    elif spoil == "zeros for pixels":  # the power went
        content[4 * cache.record + room.HEAD.size : 5 * cache.record] = bytes(cache.record - room.HEAD.size)
    else:
        content = content[: len(content) // 2]
    cache.path.write_bytes(content)
    decoded.clear()
    assert same(expected, everything(load(folder)))
    assert 1 <= len(decoded) - 1 <= 10
    decoded.clear()
    assert same(expected, everything(load(folder))) and decoded == ["damaged.jpg"]


def test_a_full_disk_is_said_in_one_line_for_each_set(folder, capsys, monkeypatch):
    expected = everything(load(folder, cache=False))
    write, written = room.Cache.write, []

    def full(*args):
        if len(written) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(1)
        write(*args)

    monkeypatch.setattr(room.Cache, "write", full)
    assert same(expected, everything(load(folder)))
    assert capsys.readouterr().err.count("No space left on device; the others are decoded each time") == 2  # sets
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    assert same(expected, everything(load(folder)))
    assert "which the disk has no room for" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_has_its_file_at_the_users(folder, decoded, tmp_path, capsys):
    (folder / room.FOLDER).touch()  # as root, every folder can be written
    expected = everything(load(folder))
    [kept] = (tmp_path / "user's" / "resized-pictures").iterdir()
    assert len([*kept.iterdir()]) == 2
    decoded.clear()
    assert same(expected, everything(load(folder))) and decoded == ["damaged.jpg"]
    shutil.rmtree(tmp_path / "user's")
    (tmp_path / "user's").touch()
    assert same(expected, everything(load(folder)))
    assert "the pictures are decoded each time" in capsys.readouterr().err


def test_worker_processes_and_a_moved_folder_use_what_is_kept(folder, decoded, tmp_path):
    expected = everything(load(folder, cache=False))
    assert same(expected, everything(load(folder, workers=2)))
    shutil.move(folder, tmp_path / "moved")
    decoded.clear()
    sets = load(tmp_path / "moved")
    assert decoded == ["damaged.jpg"] and same(expected, everything(sets))
    cache = pickle.loads(pickle.dumps(sets[0].store)).files.cache
    assert (cache.path, cache.opened) == (sets[0].store.files.cache.path, (0, None))


def test_levels_of_wide_pixels_are_kept_too(folder, decoded):
    for split in ("train", "test"):
        for name in ("red", "blue"):
            pixels = np.random.RandomState(1).randint(0, 4096, (60, 50)).astype(np.uint16)
            Image.fromarray(pixels).save(folder / split / name / "wide.png")
    expected = [batch.images for batch in load(folder, cache=False)[0].batches(9)]
    for _ in range(2):
        decoded.clear()
        sets = load(folder)
        assert sets[0].levels == (0, 4095) and same(expected, [batch.images for batch in sets[0].batches(9)])
    assert sorted(decoded) == 2 * ["damaged.jpg"] + 2 * ["wide.png"]  # these twice, to look for the levels


def test_pictures_that_fit_into_memory_need_no_file(folder):
    datasets.load(str(folder), cache=True)
    assert not (folder / room.FOLDER).exists()


def test_files_that_changed_names_are_decoded_anew(folder):
    first, second = folder / "train" / "red" / "0.png", folder / "train" / "blue" / "0.png"
    for path in (first, second):
        Image.open(path).save(path, "BMP")
        os.utime(path, ns=(10**18, 10**18))
    load(folder)
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    assert first.stat().st_size == second.stat().st_size and first.stat().st_mtime_ns == second.stat().st_mtime_ns
    assert same(everything(load(folder, cache=False)), everything(load(folder)))


def test_a_link_in_the_place_of_the_file_is_left_alone(folder, tmp_path, capsys):
    load(folder)
    precious = tmp_path / "precious"
    precious.write_bytes(b"mine")
    for path in (folder / room.FOLDER).iterdir():
        path.unlink()
        path.symlink_to(precious)
    assert same(everything(load(folder, cache=False)), everything(load(folder)))
    assert precious.read_bytes() == b"mine" and "user's" in capsys.readouterr().err


def test_a_picture_that_cannot_be_read_leaves_nothing_behind(folder, monkeypatch):
    expected = everything(load(folder))

    def half(cache, row, stamp, image):
        image[:] = 7
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(room.Cache, "read", half)
    assert same(expected, everything(load(folder)))

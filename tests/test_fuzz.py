"""Files that were damaged at random, from a seed: each gets an answer or the one-line error, and nothing else.

`--fuzz 20000` tries that many of each kind.
"""

import io
import pickle
import random
import shutil
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, noisy
from PIL import Image

import datasets
import model
import predict
import train
from quick.checkpoints import read, to_bytes
from quick.data import cifar10
from quick.errors import CallError, CheckpointError, DataError
from quick.nets.summary import describe
from quick.run.config import as_toml
from quick.run.settings import Config

FORMAT_1 = ROOT / "tests" / "files" / "format_1.pt"
PIECES = [
    b"\x00",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\x80",
    b"\x00\x00\x00\x00",
    b"=",
    b'"',
    b"[",
    b"\n",
    b"9999999999",
]
VALUES = [
    None,
    True,
    -1,
    0,
    10**30,
    1e308,
    float("nan"),
    "x" * 1000,
    "\x1b[2J",
    b"x",
    [],
    {},
    (1,),
    [[]],
    {"a": {}},
    "none",
]
VALUES += [torch.zeros(0), torch.zeros(3, 3), torch.zeros(1).expand(10**12), torch.zeros(2, dtype=torch.cfloat)]


def damaged(content: bytes, dice: random.Random) -> bytes:
    """The bytes with up to eight of them flipped, or pieces replaced, put in, left out, repeated or cut off."""
    content = bytearray(content)
    for _ in range(dice.randint(1, 8)):
        at, piece = dice.randrange(len(content) + 1), dice.choice(PIECES)
        kind = dice.randrange(6)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            content[at : at + len(piece)] = piece
        elif kind == 2:
            content[at:at] = piece
        elif kind == 3:
            del content[at : at + dice.randint(1, 40)]
        elif kind == 4:
            content[at:at] = content[dice.randrange(len(content) + 1) :][: dice.randint(1, 100)]
        elif kind == 5 and dice.random() < 0.2:
            del content[at:]
    return bytes(content)


@pytest.fixture
def cases(request):
    return request.config.getoption("fuzz")


def originals() -> list[tuple[str, bytes]]:
    """Small pictures of every kind that is read, with their endings."""
    picture, found = noisy((200, 90, 40), 0, (40, 30)), []
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    kinds = [
        ("png", "RGB", {}),
        ("png", "P", {}),
        ("png", "LA", {}),
        ("jpg", "RGB", {"exif": exif}),
        ("jpg", "CMYK", {}),
    ]
    kinds += [("jpg", "L", {"progressive": True}), ("gif", "P", {}), ("bmp", "RGB", {}), ("webp", "RGB", {})]
    kinds += [("tif", "RGB", {"compression": "tiff_lzw"}), ("tif", "RGB", {}), ("webp", "RGBA", {"lossless": True})]
    for ending, mode, options in kinds:
        file = io.BytesIO()
        picture.convert(mode).save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(ending, ending.upper()), **options)
        found.append((ending, file.getvalue()))
    return found


def test_damaged_pictures_are_classified_or_named(cases, tmp_path, capsys):
    dice, pictures = random.Random(1), originals()
    for start in range(0, cases, 500):
        folder, count = tmp_path / "pictures", min(500, cases - start)
        folder.mkdir()
        for number in range(count):
            ending, content = dice.choice(pictures)
            (folder / f"{number:03}.{ending}").write_bytes(damaged(content, dice))
        status = predict.cli([str(folder), "--checkpoint", str(FORMAT_1), "--device", "cpu"])
        out, err = (text.splitlines() for text in capsys.readouterr())
        assert len(out) + len(err) == count and status == bool(err)
        assert all(line.count("%") == 3 for line in out) and all(line.startswith("predict.py: ") for line in err)
        assert 0.1 < len(out) / count < 0.9  # neither is all damage harmless nor is none
        shutil.rmtree(folder)


def test_damaged_configs_are_read_or_named(cases, tmp_path, capsys):
    dice, path = random.Random(2), tmp_path / "my.toml"
    texts = [*(file.read_bytes() for file in (ROOT / "configs").glob("*.toml")), as_toml(Config()).encode()]
    lines = [line for text in texts for line in text.splitlines() if b" = " in line]
    good = 0
    for _ in range(cases):
        text = dice.choice(texts)
        if dice.random() < 0.5:
            picked = [dice.choice(lines).partition(b" = ") for _ in range(3)]
            text = b"".join(name + b" = " + dice.choice(lines).partition(b" = ")[2] + b"\n" for name, _, _ in picked)
        path.write_bytes(text if dice.random() < 0.3 else damaged(text, dice))
        try:
            assert isinstance(train.parse_train(["--config", str(path)])[0], Config)
            good += 1
        except CallError as error:
            assert str(error).isprintable()
    assert 0.02 < good / cases < 0.9


def test_damaged_batches_of_cifar10_are_read_or_named(cases, tmp_path):
    dice, folder, good = random.Random(4), tmp_path / cifar10.FOLDER, 0
    folder.mkdir()
    pixels = np.arange(10 * 3072).astype(np.uint8).reshape(10, 3072)
    plain = pickle.dumps({"data": pixels, "labels": list(range(10))}, protocol=2)
    facts = [*range(100), *range(len(plain) - 200, len(plain))]  # all but most pixels
    for _ in range(cases):
        content = damaged(plain, dice)
        if dice.random() < 0.8:
            content = bytearray(plain)
            for at in dice.sample(facts, dice.randint(1, 3)):
                content[at] = dice.randrange(256)
        (folder / "test_batch").write_bytes(content)
        try:
            [test_set] = datasets.load("cifar10", tmp_path, splits=["test"])
        except DataError as error:
            assert str(error).startswith(f"{folder}: ") and str(error).isprintable() and len(str(error)) < 1000
            continue
        good += 1
        assert test_set.store.images.shape[1:] == (3, 32, 32) and set(test_set.labels.tolist()) <= set(range(10))
    assert 0.02 < good / cases < 0.9


def places(value: object, found: list | None = None) -> list[tuple[dict | list, object]]:
    """Every place in nested dicts and lists, as a container and the key in it."""
    found = [] if found is None else found
    for key, inside in list(value.items() if isinstance(value, dict) else enumerate(value)):
        found.append((value, key))
        if isinstance(inside, dict | list):
            places(inside, found)
    return found


def changed(path, dice: random.Random) -> bytes:
    """A checkpoint's bytes, some of its values replaced or left out."""
    checkpoint = torch.load(path, weights_only=True)
    for _ in range(dice.randint(1, 3)):
        container, key = dice.choice(places(checkpoint))
        if isinstance(container, dict) and dice.random() < 0.3:
            value = container.pop(key)
            if dice.random() < 0.5:
                container[dice.choice(["x", "\x1b]0;x", 7, key])] = value
        else:
            container[key] = dice.choice(VALUES)
    return to_bytes(checkpoint)


def with_checksum(content: bytes) -> bytes:
    """Damaged bytes that say they are whole, so that what lies behind the checksum is tried too."""
    return b"%b%08x" % (content[:-8], zlib.crc32(content[:-8]))


def test_damaged_checkpoints_answer_or_are_named(cases, tmp_path):
    dice, path, good = random.Random(3), tmp_path / "file.pt", 0
    (tmp_path / "new.pt").write_bytes(to_bytes(read(FORMAT_1)))
    plain = [FORMAT_1.read_bytes(), (tmp_path / "new.pt").read_bytes()]
    images = torch.from_numpy(np.array(noisy((90, 90, 90), 0, (8, 8)))).permute(2, 0, 1)[None]
    for number in range(cases):
        if number % 3 == 0:
            path.write_bytes(changed(tmp_path / "new.pt", dice))
        else:
            content = damaged(plain[number % 2], dice)
            path.write_bytes(content if number % 3 == 1 else with_checksum(content))
        try:
            network, checkpoint = model.load(path)
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ") and str(error).isprintable() and len(str(error)) < 1000
            continue
        good += 1
        assert describe(path, network, checkpoint).replace("\n", "").isprintable()
        if checkpoint["image_size"] == 8:
            probabilities = predict.probabilities(network, checkpoint, images)
            assert probabilities.shape == (1, len(checkpoint["classes"]))
    assert 0.02 < good / cases < 0.9

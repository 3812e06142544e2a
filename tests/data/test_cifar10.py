"""CIFAR-10: its files, and its download, against a server on this machine that misbehaves as asked."""

import hashlib
import io
import pickle
import struct
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from servers import serving

import datasets
from quick import downloads
from quick.data import cifar10
from quick.errors import DataError, LimitError


def small_files() -> dict[str, bytes]:
    """CIFAR-10's files in small: the same names and pickles, 10 pictures each."""
    files = {"batches.meta": pickle.dumps({"label_names": cifar10.CLASSES}, protocol=2), "readme.html": b"<html>"}
    for number, name in enumerate([*(f"data_batch_{part}" for part in range(1, 6)), "test_batch"]):
        pixels = np.random.RandomState(number).randint(0, 256, (10, 3072)).astype(np.uint8)
        files[name] = pickle.dumps({"data": pixels, "labels": list(range(10))}, protocol=2)
    return files


def packed(files: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    """An archive of such files; what is no content is put in as it is."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, inside in files.items():
            member = inside if isinstance(inside, tarfile.TarInfo) else tarfile.TarInfo()
            member.name = f"cifar-10-batches-py/{name}"
            if member is not inside:
                member.size = len(inside)
            tar.addfile(member, io.BytesIO(inside) if member is not inside else None)
    return content.getvalue()


ARCHIVE = packed(small_files())


@pytest.fixture
def server(monkeypatch):
    """A running server; its `url(behaviour)` is an archive's address, its `asked` what was asked so far."""
    monkeypatch.setattr(cifar10, "SIZE", len(ARCHIVE))
    monkeypatch.setattr(cifar10, "MD5", hashlib.md5(ARCHIVE).hexdigest())
    with serving(ARCHIVE, "cifar-10-python.tar.gz", monkeypatch) as running:
        yield running


@pytest.fixture
def fetch(server, tmp_path, monkeypatch):
    """Loads CIFAR-10 from mirrors that behave like this; returns what the server was asked."""

    def call(*behaviours: str) -> list[tuple[str, int]]:
        monkeypatch.setattr(cifar10, "MIRRORS", [server.url(name) for name in behaviours])
        server.delays = {name: 0.1 * place for place, name in enumerate(behaviours)}  # the first is the fastest
        train_set, test_set = datasets.load("cifar10", tmp_path / "data")
        assert (len(train_set), len(test_set)) == (50, 10)
        left = {path.name for path in (tmp_path / "data").iterdir()}
        assert left == {"cifar-10-batches-py", "cifar-10-python.tar.gz", ".cifar10.lock"}
        return server.asked

    return call


def test_a_good_mirror_is_asked_once(fetch):
    assert fetch("good") == [("good", 0)]
    assert fetch("good") == [("good", 0)]  # it is there now


@pytest.mark.parametrize("bad", ["html", "404", "503", "short"])
def test_a_mirror_without_the_file_loses_the_race(fetch, server, bad):
    assert fetch(bad, "good") == [("good", 0)] and sorted(server.probed) == sorted([bad, "good"])


def test_a_mirror_with_other_bytes_is_left_for_the_next(fetch):
    assert fetch("corrupt", "good") == [("corrupt", 0), ("good", 0)]


def test_the_fastest_mirror_is_taken_wherever_it_stands(server, tmp_path, monkeypatch, caplog):
    """Of one that sends a few bytes now and then, one that is silent at first, and a good one."""
    caplog.set_level("INFO")
    server.delays = {"silent": 0.3}
    monkeypatch.setattr(cifar10, "MIRRORS", [server.url(name) for name in ("trickle", "silent", "good")])
    start = time.perf_counter()
    datasets.load("cifar10", tmp_path / "data")
    assert server.asked == [("good", 0)] and time.perf_counter() - start < 3  # the first alone takes 20
    assert f"127.0.0.1:{server.server_port} is the fastest of 3 mirrors" in caplog.text


def test_the_next_mirrors_come_in_the_order_of_the_race(server, tmp_path, monkeypatch):
    server.delays = {"rangeless": 0.2, "good": 0.1}
    monkeypatch.setattr(cifar10, "MIRRORS", [server.url(name) for name in ("rangeless", "good", "corrupt", "404")])
    datasets.load("cifar10", tmp_path / "data")
    assert server.asked == [("corrupt", 0), ("good", 0)]


def test_a_server_that_does_not_say_how_much_it_sends(fetch):
    assert fetch("lengthless") == [("lengthless", 0)]


@pytest.mark.parametrize("broken", ["cut", "stall"])
def test_a_broken_connection_is_gone_on_with(fetch, broken):
    asked = fetch(broken, "good")
    half = len(ARCHIVE) // 2
    assert asked[:2] == [(broken, 0), (broken, half)] and asked[-1][0] == "good"
    starts = [start for _, start in asked]
    assert starts == sorted(starts) and starts[-1] > half


def test_a_server_without_ranges_starts_anew(fetch, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-10-python.tar.gz.part").write_bytes(ARCHIVE[:100])
    assert fetch("rangeless") == [("rangeless", 100)]


def test_a_server_that_does_not_say_which_part_it_sends_is_left(fetch, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-10-python.tar.gz.part").write_bytes(ARCHIVE[:100])
    assert fetch("unsaid", "good") == [("unsaid", 100), ("good", 100)]


def test_a_wrong_part_is_discarded_and_the_mirror_asked_again(fetch, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-10-python.tar.gz.part").write_bytes(b"x" * 100)
    assert fetch("good") == [("good", 100), ("good", 0)]


def test_a_whole_part_needs_no_network(fetch, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-10-python.tar.gz.part").write_bytes(ARCHIVE)
    assert fetch("404", "503") == []


def test_an_address_of_ones_own(server, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "MIRRORS", [])
    datasets.load("cifar10", tmp_path / "a", data_url=server.url("good"))
    monkeypatch.setenv("CIFAR10_URL", server.url("good"))
    datasets.load("cifar10", tmp_path / "b")
    assert len(server.asked) == 2


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x", "http://nowhere.invalid/x", "no address", "file:///etc/hosts"])
def test_without_a_network_one_message_names_the_ways_out(url, server, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="could not be downloaded") as caught:
        datasets.load("cifar10", tmp_path / "data", data_url=url)
    for way in ("put cifar-10-python.tar.gz into", "--data-url", "point --data at a folder", "--data shapes"):
        assert way in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(cifar10, "MIRRORS", ["http://127.0.0.1:9/a", "http://127.0.0.1:9/b"])
    with pytest.raises(DataError, match=r"downloaded \(all 2 mirrors: Connection refused\)"):
        datasets.load("cifar10", tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".cifar10.lock"]


def test_an_interrupt_leaves_a_part_that_the_next_try_continues(fetch, tmp_path, monkeypatch):
    whole = downloads.is_right
    read = iter([True])

    def interrupted(path: Path, *right: object) -> bool:
        if next(read, False):
            path.write_bytes(path.read_bytes()[:1000])
            raise KeyboardInterrupt
        return whole(path, *right)

    monkeypatch.setattr(downloads, "is_right", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("good")
    assert fetch("good") == [("good", 0), ("good", 1000)]


def download_of(size: int, md5: str, folder: Path, url: str) -> None:
    """In a process of its own: download an archive of this size and checksum."""
    cifar10.SIZE, cifar10.MD5 = size, md5
    assert len(cifar10.cifar10(folder, "train", url)) == 50


@pytest.mark.expensive
def test_two_processes_download_once(server, tmp_path, processes):
    inputs = len(ARCHIVE), hashlib.md5(ARCHIVE).hexdigest(), tmp_path / "data", server.url("slow")
    both = [processes.Process(target=download_of, args=inputs) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in both] == [0, 0] and server.asked == [("slow", 0)]


def test_an_unwritable_data_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file: (File exists|Not a directory)"):
        datasets.load("cifar10", tmp_path / "file")


# ---- its files ----


def give_archive(folder: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put an archive there that is the right one."""
    monkeypatch.setattr(cifar10, "SIZE", len(content))
    monkeypatch.setattr(cifar10, "MD5", hashlib.md5(content).hexdigest())
    (folder / "cifar-10-python.tar.gz").write_bytes(content)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A folder with the small archive."""
    give_archive(tmp_path, ARCHIVE, monkeypatch)
    return tmp_path


def test_cifar10_is_read_from_the_archive_and_from_its_folder(archive):
    packed = datasets.load("cifar10", archive)
    assert {path.name for path in archive.iterdir()} == {"cifar-10-batches-py", ".cifar10.lock", cifar10.ARCHIVE}
    (archive / "cifar-10-python.tar.gz").unlink()
    unpacked = datasets.load("cifar10", archive)
    for one, other in zip(packed, unpacked, strict=True):
        assert torch.equal(one.store.images, other.store.images) and torch.equal(one.labels, other.labels)
    train_set, test_set = packed
    assert (len(train_set), len(test_set)) == (50, 10)
    first = np.random.RandomState(0).randint(0, 256, (10, 3072)).astype(np.uint8)[1].reshape(3, 32, 32)
    assert np.array_equal(train_set.store.images[1], first)
    assert train_set.classes[train_set.labels[1]] == "automobile"


def test_a_limit_takes_the_first_of_each_class(archive):
    few, whole = (datasets.load("cifar10", archive, limit=limit, splits=["train"])[0] for limit in (20, 0))
    assert torch.equal(few.store.images, whole.store.images[:20]) and torch.equal(few.labels, whole.labels[:20])
    assert torch.bincount(few.labels).tolist() == [2] * 10
    with pytest.raises(LimitError, match="limit 9 is below the number of classes, 10"):
        datasets.load("cifar10", archive, limit=9)


def test_a_damaged_archive_is_named(archive):
    path = archive / "cifar-10-python.tar.gz"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"gz: damaged or another .*; delete it, and it is downloaded again"):
        datasets.load("cifar10", archive)
    assert not (archive / "cifar-10-batches-py").exists()


def test_another_archive_is_not_unpacked(archive):
    (archive / "cifar-10-python.tar.gz").write_bytes(packed(small_files() | {"batches.meta": b"abc"}))
    with pytest.raises(DataError, match=r"gz: damaged or another archive \(its MD5 is not [0-9a-f]{32}\); delete it"):
        datasets.load("cifar10", archive)
    assert {path.name for path in archive.iterdir()} == {"cifar-10-python.tar.gz", ".cifar10.lock"}


def test_only_the_known_files_are_unpacked(archive):
    datasets.load("cifar10", archive)
    assert {path.name for path in (archive / "cifar-10-batches-py").iterdir()} == set(cifar10.MEMBERS)


def member(kind: bytes, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo()
    made.type, made.linkname = kind, target
    return made


@pytest.mark.parametrize(
    "strange",
    [
        {"test_batch": member(tarfile.SYMTYPE, "/etc/passwd")},
        {"test_batch": member(tarfile.LNKTYPE, "../../outside")},
        {"test_batch": member(tarfile.DIRTYPE)},
        {"test_batch": member(tarfile.FIFOTYPE)},
        {"test_batch": member(tarfile.CHRTYPE)},
    ],
)
def test_no_links_and_devices_are_unpacked(strange, tmp_path, monkeypatch):
    """Not even from the right archive: also Python 3.11.0, whose tarfile has no filter, is safe."""
    outside = {"../../outside": b"x", "../outside": b"x", "/outside": b"x"}
    (tmp_path / "data").mkdir()
    give_archive(tmp_path / "data", packed(outside | small_files() | strange), monkeypatch)
    with pytest.raises(DataError, match=r"gz: damaged \(it has no test_batch\); delete it"):
        datasets.load("cifar10", tmp_path / "data")
    assert {path.name for path in tmp_path.rglob("*")} == {"data", ".cifar10.lock", "cifar-10-python.tar.gz"}


def python2_batch(labels: list[int], pixels: bytes) -> bytes:
    """A batch as Python 2 and NumPy 1 wrote the real ones: its strings are bytes, its classes numpy.core's."""

    def text(content: bytes) -> bytes:
        return (
            b"U%c%b" % (len(content), content)
            if len(content) < 256
            else b"T" + struct.pack("<i", len(content)) + content
        )

    def whole(number: int) -> bytes:
        return b"M" + struct.pack("<H", number)

    dtype = b"cnumpy\ndtype\nq\x04" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xff"
    dtype += b"J\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R(K\x01"
    array += whole(len(labels)) + whole(3072) + b"\x86" + dtype + b"\x89" + text(pixels) + b"tb"
    parts = [
        *(text(b"batch_label"), text(b"testing batch 1 of 1"), text(b"labels"), b"](", *map(whole, labels), b"e"),
        *(text(b"data"), array, text(b"filenames"), b"](", *[text(b"cat_s_000907.png")] * len(labels), b"e"),
    ]
    return b"\x80\x02}q\x01(" + b"".join(parts) + b"u."


def test_the_real_files_form_is_read(tmp_path):
    pixels = np.random.RandomState(1).randint(0, 256, (10, 3072)).astype(np.uint8)
    (tmp_path / "cifar-10-batches-py").mkdir()
    labels = [3, 1, 4, 1, 5, 9, 2, 6, 0, 8]
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(python2_batch(labels, pixels.tobytes()))
    [test_set] = datasets.load("cifar10", tmp_path, splits=["test"])
    assert np.array_equal(test_set.store.images.numpy(), pixels.reshape(10, 3, 32, 32))
    assert test_set.labels.tolist() == labels


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_batches_of_any_numpy_are_read(protocol, core, tmp_path):
    """Written again by another program, with NumPy 1 or 2."""
    pixels = np.arange(2 * 3072).astype(np.uint8).reshape(2, 3072)
    content = pickle.dumps({"data": pixels, "labels": [7, 8]}, protocol)
    own = np.zeros(1).__reduce__()[0].__module__.removesuffix(".multiarray")
    if protocol < 4:  # later ones say before each name how long it is
        content = content.replace(own.encode(), core.encode())
    (tmp_path / "batch").write_bytes(content)
    images, labels = cifar10.read_batch(tmp_path / "batch")
    assert np.array_equal(images.numpy().reshape(2, 3072), pixels) and labels.tolist() == [7, 8]


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("code ran",))

    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match=r"builtins\.print, which is no data"):
        datasets.load("cifar10", tmp_path, splits=["test"], mean=(0, 0, 0), std=(1, 1, 1))


class Flags:
    """numpy's type of objects, told that it holds plain numbers."""

    def __reduce__(self):
        return np.dtype, ("O", False, True), (3, "|", None, None, None, -1, -1, 0)


class Pointers:
    """An array of such objects: bytes that NumPy would take for addresses."""

    def __init__(self, dtype: object = None):
        self.dtype = dtype or Flags()

    def __reduce__(self):
        reconstruct = np.zeros(1).__reduce__()[0]
        content = struct.pack("<10Q", *[0x4141414141414141] * 10)
        return reconstruct, (np.ndarray, (0,), b"b"), (1, (10,), self.dtype, False, content)


GOOD = np.zeros((10, 3072), np.uint8)
PUT = b"\x80\x02K\x01r\xff\xff\xff\x7f."  # Python's memo of so many values takes 32 GB


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ({"data": GOOD, "labels": Pointers()}, "an array of 'O'"),
        ({"data": GOOD, "labels": Pointers(np.dtype("int64"))}, "an array of 'i8'"),
        ({"data": GOOD, "labels": np.zeros(10, np.uint8)}, "do not fit"),
        ({"data": np.asfortranarray(np.zeros((10, 3072), np.uint8)), "labels": [0] * 10}, "other things than bytes"),
        ({"data": np.zeros((10, 3072), [("a", "u1")]), "labels": [0] * 10}, "an array of 'V1'"),
        ({"data": GOOD, "labels": [0.0] * 10}, "labels are not 0 to 9"),
        ({"data": GOOD, "labels": [[[]]] * 10}, "labels are not 0 to 9"),
        (PUT, "too many values"),
        (b"\x80\x02(" + b"]" * 10**6 + b"l.", "too many values"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.", "damaged"),
    ],
)
def test_batches_that_control_memory_are_refused(batch, reason, tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    content = batch if isinstance(batch, bytes) else pickle.dumps(batch, protocol=2)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match=f"not CIFAR-10's Python version, or damaged: .*{reason}|{reason}"):
        datasets.load("cifar10", tmp_path, splits=["test"])


@pytest.mark.parametrize(
    "batch",
    [
        {"data": [1, 2, 3], "labels": [1]},
        {"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [0]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]},
        {"data": np.zeros((2, 3000), np.uint8), "labels": [0, 1]},
        {},
        7,
    ],
)
def test_batches_that_do_not_fit_are_refused(batch, tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(DataError, match="not CIFAR-10's Python version, or damaged"):
        datasets.load("cifar10", tmp_path, splits=["test"])

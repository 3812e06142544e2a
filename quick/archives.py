"""Files from elsewhere, before anything of them is read: what they are, and whether an archive is as torch.save writes
one."""

import codecs
import io
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections import Counter, OrderedDict
from typing import BinaryIO

# What an archive may hold. torch looks its records up without regard to case, but digits and small letters leave it
# no second one to find.
RECORD = re.compile(r"data/\d+|(?:\.data/)?[a-z_.]+")
END, LOCATOR, END64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sLQL"), struct.Struct("<4sQ2H2L4Q")
CHECKSUM_BYTES = 8  # of a file's comment: CRC-32 in hexadecimal digits
MOST_RECORDS = 100_000
# What bounds the time and memory that the values beside the tensors take, when they are read and when they are walked.
LARGEST_PICKLE = 2**22  # bytes
MOST_OPERATIONS = 10**6
MOST_OBJECTS = 200_000  # lists, dicts, tuples, and tensors
MOST_REPEATS = 20  # of tuples: as keys, ((a, a), (a, a)) and so on would be hashed 2 to the power of this times
NEEDED = re.compile(r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_(tensor_v2|parameter)")
VALUES = set("PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE".split())
VALUES |= set("EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3".split())
VALUES |= set("BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL REDUCE BUILD BINPERSID".split())
OBJECTS = ("EMPTY_DICT", "EMPTY_LIST", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "REDUCE", "BUILD")

LEGACY = "a file of torch.save as it was before PyTorch 1.6"
LEGACY_BEGINNING = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
NUMBER_BYTES = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2}
NUMBER_BYTES |= dict.fromkeys(("Char", "Byte", "Bool"), 1)

# How files of other kinds begin.
BEGINNINGS = {
    LEGACY_BEGINNING: LEGACY,
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras writes",
    b"version https://git-lfs": "a pointer of Git LFS (`git lfs pull` brings the file itself)",
    b"<!DOCTYPE html": "a web page (download the file itself)",
    b"<html": "a web page (download the file itself)",
    b"<?xml": "a web page (download the file itself)",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip archive",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"PK\x03\x04": "one that was cut short: its end is missing",
}
# Members that tell archives of other kinds, in this order.
MEMBERS = {
    r".*/constants\.pkl": "a TorchScript file",
    r".*/?(archive_format|serialized_exported_program\.json|models/model\.json)": "a file of torch.export or --export",
    r"model\.weights\.h5": "a Keras file",
    r".*\.npy": "a file of NumPy",
}


def kind_of(file: BinaryIO) -> str | None:
    """What a file is that torch.save has not written, in words; None for one that it seems to have written.

    Nothing in the file is unpickled.
    """
    file.seek(0)
    head = file.read(512)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
        for pattern, kind in MEMBERS.items():
            if any(re.fullmatch(pattern, name) for name in names):
                return kind
        return None if any(name.lower().endswith("/data.pkl") for name in names) else "a zip archive of other things"
    for beginning, kind in BEGINNINGS.items():
        if head.removeprefix(codecs.BOM_UTF8).lstrip().lower().startswith(beginning.lower()):
            return kind
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "a Python pickle, which could run code (it was not loaded)"
    if head[8:10] == b'{"':
        return "a safetensors file, which has weights alone"
    if head[:1] == b"\x08" and re.search(b"onnx|pytorch|tf2onnx|keras2onnx|skl2onnx", head):
        return "an ONNX file"
    return "an empty file" if not head else "a file of another kind"


def check_archive(file: BinaryIO) -> None:
    """Raise an error unless a file is as it was written, and reading it takes about as much memory as it is large.

    UnpicklingError: the file is for objects that are neither tensors nor plain values. ValueError: all else.
    """
    size = file.seek(0, 2)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        check_directory(file, size, archive)
        if not archive.comment and archive.testzip() is not None:  # earlier versions wrote no checksum of the whole
            raise ValueError("altered")
        if archive.comment:
            file.seek(0)
            left, checksum = size - CHECKSUM_BYTES, 0
            while part := file.read(min(left, 2**20)):
                left, checksum = left - len(part), zlib.crc32(part, checksum)
            if archive.comment != b"%08x" % checksum:
                raise ValueError("altered")
        [values] = [entry for entry in entries if entry.filename.partition("/")[2] == "data.pkl"]
        if values.file_size > LARGEST_PICKLE:
            raise ValueError("too many values")
        check_pickle(archive.read(values))


def check_directory(file: BinaryIO, size: int, archive: zipfile.ZipFile) -> None:
    """Raise ValueError unless every reader finds the same records in an archive, together no larger than the file.

    Readers of zip files differ in where they look for the directory and in how they take names, so that torch's own
    could find other records than Python's.
    """
    entries = archive.infolist()
    end_at = size - END.size - len(archive.comment)
    file.seek(max(0, end_at - LOCATOR.size - END64.size))
    tail = file.read()
    sign, *disks, here, count, length, start, comment = END.unpack_from(tail, len(tail) - size + end_at)
    if sign != b"PK\5\6" or any(disks) or here != count or comment != len(archive.comment):
        raise ValueError("no plain end")
    if comment not in (0, CHECKSUM_BYTES) or len(entries) > MOST_RECORDS:
        raise ValueError("a strange comment, or too many records")
    directory_end = end_at
    if tail[-END.size - comment - LOCATOR.size :].startswith(b"PK\6\7"):
        directory_end = end_at - LOCATOR.size - END64.size
        _, disk, place, disks = LOCATOR.unpack_from(tail, END64.size)
        sign, _, _, _, *more, here64, count64, length64, start64 = END64.unpack_from(tail)
        if sign != b"PK\6\6" or disk or disks != 1 or any(more) or place != directory_end or here64 != count64:
            raise ValueError("no plain zip64 end")
        if (
            count not in (count64, 2**16 - 1)
            or length not in (length64, 2**32 - 1)
            or start not in (start64, 2**32 - 1)
        ):
            raise ValueError("two directories")
        count, length, start = count64, length64, start64
    if start + length != directory_end or archive.start_dir != start or count != len(entries):
        raise ValueError("another directory")

    prefix = entries[0].orig_filename.partition("/")[0] + "/"
    names = {entry.orig_filename for entry in entries}
    if len(names) < len(entries) or not all(
        name.startswith(prefix) and RECORD.fullmatch(name.removeprefix(prefix)) for name in names
    ):
        raise ValueError("strange names")
    for entry in entries:
        is_plain = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
        if not is_plain or (entry.extra and size < 2**32):
            raise ValueError("compressed, or with two sizes")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("larger inside than outside")


def check_pickle(content: bytes | BinaryIO) -> None:
    """Raise UnpicklingError for a pickle that names more than tensors, ValueError for one that grows.

    weights_only=True allows more than what a checkpoint needs, for example a bytearray of any size.
    """
    counts, tuples, is_tuple = Counter(), set(), False  # the memo's tuples; whether the last value is one
    for number, (operation, value, _) in enumerate(pickletools.genops(content)):
        name = operation.name
        if number > MOST_OPERATIONS:
            raise ValueError("too many values")
        counts[name] += 1
        if name == "GLOBAL" and not NEEDED.fullmatch(value):
            raise pickle.UnpicklingError(value.replace(" ", "."))
        if name not in VALUES:
            raise pickle.UnpicklingError(f"pickle's {name}")
        if "PUT" in name and is_tuple:
            tuples.add(value)
        elif "GET" in name:
            is_tuple = value in tuples
            counts["tuples again"] += is_tuple
        else:
            is_tuple = name.startswith("TUPLE")
        if name == "LONG1" and not -(2**63) <= value < 2**63:
            raise ValueError("a long number")
    if sum(counts[name] for name in OBJECTS) > MOST_OBJECTS:
        raise ValueError("too many values")
    if counts["tuples again"] > MOST_REPEATS:
        raise ValueError("a tuple in itself many times")


def check_legacy(file: BinaryIO) -> None:
    """Like `check_archive`, for a file of torch.save as it was before PyTorch 1.6; such files have no sums.

    It is five pickles (a mark, a version, a machine, the content, the names of its storages), then the storages.
    """
    size = file.seek(0, 2)
    file.seek(0)
    if file.read(len(LEGACY_BEGINNING) + 1) != LEGACY_BEGINNING + b".":
        raise ValueError("another mark")
    pickles = [file.read(LARGEST_PICKLE)]
    for _ in range(4):
        source = io.BytesIO(pickles[-1])
        check_pickle(source)
        pickles.append(source.read())
    storages = StorageSizes(io.BytesIO(pickles[2]))
    storages.load()
    if sum(storages.sizes.values()) > size:
        raise ValueError("larger inside than outside")


class StorageSizes(pickle._Unpickler):
    """Finds out how many bytes the storages of a checked pickle take, and makes none.

    Python's own unpickler, in C, would make room for as many values as the highest PUT says.
    """

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.sizes = {}

    def find_class(self, module: str, name: str) -> object:
        return OrderedDict if name == "OrderedDict" else name if name.endswith("Storage") else lambda *_: None

    def persistent_load(self, saved: tuple) -> None:
        what, storage, key, _, count, view = saved
        if what != "storage" or view is not None or type(count) is not int or count < 0:
            raise ValueError("a storage in another")
        self.sizes.setdefault(key, count * NUMBER_BYTES[storage.removesuffix("Storage")])

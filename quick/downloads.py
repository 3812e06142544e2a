"""Downloads that begin with the fastest mirror, go on where they stopped, and are checked."""

import hashlib
import http.client
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from quick.cli import log, progress_bar

STALLED_SECONDS = 20  # without a byte, after which the next address is tried
PROBE = 2**18  # bytes that each mirror sends in the race: 9 seconds at 30 KB/s, 1.5 MB for six mirrors


class NotDownloaded(Exception):
    """No address had the file; the message says what is wrong with each."""


def download(path: Path, urls: Sequence[str], sizes: range, algorithm: str, digest: str) -> None:
    """Download a file from the fastest of `urls` that has the right bytes; go on where an earlier try stopped.

    Right are those whose number is in `sizes`, and whose sum by the `algorithm` of hashlib begins with `digest`. Raises
    NotDownloaded when no address has them.
    """
    partial, failures = path.with_name(path.name + ".part"), {}
    if partial.exists() and is_right(partial, sizes, algorithm, digest):
        partial.replace(path)
        return
    for url in fastest_first(urls, sizes, failures):
        for _ in range(5):  # as long as each try brings more bytes
            before = partial.stat().st_size if partial.exists() else 0
            try:
                append_missing(url, partial, sizes)
                if is_right(partial, sizes, algorithm, digest):
                    partial.replace(path)
                    return
                partial.unlink()
                failures[url] = "serves other bytes"
                if not before:
                    break
            except (OSError, ValueError, http.client.HTTPException) as error:
                failures[url] = in_words(error)
                if not partial.exists() or partial.stat().st_size <= before:
                    break
    reasons = "; ".join(f"{host(url)}: {why}" for url, why in failures.items())
    if len(failures) > 1 and len(set(failures.values())) == 1:
        reasons = f"all {len(failures)} mirrors: {next(iter(failures.values()))}"
    raise NotDownloaded(reasons)


def fastest_first(urls: Sequence[str], sizes: range, failures: dict[str, str]) -> Iterator[str]:
    """The addresses that have the file, in the order in which they sent its first PROBE bytes; all are asked at once.

    The first comes as soon as it is known, so that a slow mirror holds up nobody. Of those that do not have the file,
    `failures` gets the reason.
    """
    if len(urls) == 1:
        yield from urls
        return
    probed = queue.SimpleQueue()

    def probe(url: str) -> None:
        try:
            answer, _, size = ask(url, sizes, 0, PROBE)
            with answer:
                missing = min(PROBE, size or sizes[0])
                while missing > 0 and (block := answer.read1(missing)):
                    missing -= len(block)
            probed.put((url, f"the connection ended, {missing:,} bytes too early" if missing > 0 else None))
        except Exception as error:  # whatever it is, an answer is waited for
            probed.put((url, in_words(error)))

    for url in urls:
        threading.Thread(target=probe, args=(url,), daemon=True).start()
    is_first = True
    for _ in urls:
        while probed.empty():
            time.sleep(0.01)  # and not probed.get(), which Ctrl-C does not end on Windows
        url, failure = probed.get()
        if failure:
            failures[url] = failure
            continue
        if is_first:
            log.info(f"{host(url)} is the fastest of {len(urls)} mirrors")
        is_first = False
        yield url


def ask(
    url: str, sizes: range, start: int, most: int | None = None
) -> tuple[http.client.HTTPResponse, int, int | None]:
    """Ask for a file from byte `start` on, for `most` bytes or all; returns the answer, where it starts, and the size.

    The answer starts at 0 where the server cannot send a part; the size of the whole file is None where the server does
    not tell it. Raises OSError or HTTPException for a connection that fails, ValueError for a file of another size.
    """
    last = start + most - 1 if most else ""
    headers = {"User-Agent": "Mozilla/5.0", "Range": f"bytes={start}-{last}"}
    answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=STALLED_SECONDS)
    part, length, size = answer.headers["Content-Range"] or "", answer.headers["Content-Length"], None
    if answer.status == 206 and not part.startswith(f"bytes {start}-"):
        raise ValueError("does not say which part it sends")
    if answer.status == 206 and part.rpartition("/")[2].isdigit():
        size = int(part.rpartition("/")[2])
    elif answer.status != 206:
        start, size = 0, int(length) if length else None
    if size and size not in sizes:
        raise ValueError(f"serves {size:,} bytes instead of {sizes[0]:,}")
    return answer, start, size


def append_missing(url: str, partial: Path, sizes: range) -> None:
    """Append what is missing of a file to `partial`; start again where the server cannot send a part.

    Raises OSError or HTTPException on a broken or stalled connection, ValueError on an answer that is not the file.
    """
    have = partial.stat().st_size if partial.exists() else 0
    if have >= sizes[-1]:
        return
    try:
        answer, start, size = ask(url, sizes, have)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and have in sizes:
            return  # there is no more
        raise
    most = size or sizes[-1]
    progress = progress_bar(host(url), round(most / 1e6), "MB", round(start / 1e6))
    with answer, progress, partial.open("ab" if start else "wb") as file:
        while start < most and (block := answer.read1(min(2**18, most - start))):
            file.write(block)
            start += len(block)
            progress.update(round(start / 1e6) - progress.n)
    if start < (size or sizes[0]):
        raise OSError(f"the connection ended after {start:,} bytes")


def host(url: str) -> str:
    """The server of an address, for people."""
    return urllib.parse.urlsplit(url).netloc or url


def in_words(error: Exception) -> str:
    """Why an address cannot be read."""
    cause = getattr(error, "reason", error)
    return getattr(cause, "strerror", None) or str(cause) or type(error).__name__


def is_right(path: Path, sizes: range, algorithm: str, digest: str) -> bool:
    """Whether a file has so many bytes, and a sum that begins so."""
    if path.stat().st_size not in sizes:
        return False
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
    return found.startswith(digest)

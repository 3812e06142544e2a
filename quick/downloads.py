"""Downloads that go on where they stopped, and are checked."""

import hashlib
import http.client
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from quick.cli import progress_bar

STALLED_SECONDS = 20  # without a byte, after which the next address is tried


class NotDownloaded(Exception):
    """No address had the file; the message says what is wrong with each."""


def download(path: Path, urls: Sequence[str], sizes: range, algorithm: str, digest: str) -> None:
    """Download a file from the first of `urls` that has the right bytes; go on where an earlier try stopped.

    Right are those whose number is in `sizes`, and whose sum by the `algorithm` of hashlib begins with `digest`. Raises
    NotDownloaded when no address has them.
    """
    partial, failures = path.with_name(path.name + ".part"), {}
    for url in urls:
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
                cause = getattr(error, "reason", error)
                failures[url] = getattr(cause, "strerror", None) or str(cause) or type(error).__name__
                if not partial.exists() or partial.stat().st_size <= before:
                    break
    reasons = "; ".join(f"{urllib.parse.urlsplit(url).netloc or url}: {why}" for url, why in failures.items())
    if len(failures) > 1 and len(set(failures.values())) == 1:
        reasons = f"all {len(failures)} mirrors: {next(iter(failures.values()))}"
    raise NotDownloaded(reasons)


def append_missing(url: str, partial: Path, sizes: range) -> None:
    """Append what is missing of a file to `partial`; start again where the server cannot send a part.

    Raises OSError or HTTPException on a broken or stalled connection, ValueError on an answer that is not the file.
    """
    have = partial.stat().st_size if partial.exists() else 0
    if have >= sizes[-1]:
        return
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0", "Range": f"bytes={have}-"})
    try:
        answer = urllib.request.urlopen(request, timeout=STALLED_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and have in sizes:
            return  # there is no more
        raise
    with answer:
        goes_on = (answer.headers["Content-Range"] or "").startswith(f"bytes {have}-")
        start = have if answer.status == 206 and goes_on else 0
        length = answer.headers["Content-Length"]
        size = start + int(length) if length else None
        if size and size not in sizes:
            raise ValueError(f"serves {size:,} bytes instead of {sizes[0]:,}")
        shown = round((size or sizes[-1]) / 1e6)
        progress = progress_bar(urllib.parse.urlsplit(url).netloc, shown, "MB", round(start / 1e6))
        most = size or sizes[-1]
        with progress, partial.open("ab" if start else "wb") as file:
            while start < most and (block := answer.read1(min(2**18, most - start))):
                file.write(block)
                start += len(block)
                progress.update(round(start / 1e6) - progress.n)
    if start < (size or sizes[0]):
        raise OSError(f"the connection ended after {start:,} bytes")


def is_right(path: Path, sizes: range, algorithm: str, digest: str) -> bool:
    """Whether a file has so many bytes, and a sum that begins so."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
    return path.stat().st_size in sizes and found.startswith(digest)

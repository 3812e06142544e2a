"""A server on this machine that serves one file, and misbehaves as asked."""

import contextlib
import http.server
import threading
import time
from collections.abc import Iterator

import pytest

from quick import downloads


class Server(http.server.BaseHTTPRequestHandler):
    """GET /<behaviour>/...; the server object has the file's `content`, and keeps lists of what was asked and probed.

    A probe, which asks for the file's first bytes alone, is answered after the seconds of `delays`.
    """

    def do_GET(self):
        behaviour, whole = self.path.split("/")[1], self.server.content
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, is_probe = int(first), bool(last)
        if is_probe:
            self.server.probed.append(behaviour)
            time.sleep(self.server.delays.get(behaviour, 0))
        else:
            self.server.asked.append((behaviour, start))
        if behaviour.isdigit():
            return self.send_error(int(behaviour))
        if start >= len(whole):
            return self.send_error(416)
        body = {"html": b"<html>Sorry</html>", "corrupt": whole[::-1], "short": whole[:-1]}.get(behaviour, whole)
        partly = (start or is_probe) and behaviour not in ("rangeless", "html", "lengthless")
        self.send_response(206 if partly else 200)
        if partly and (behaviour != "unsaid" or is_probe):
            end = min(int(last or len(body)), len(body) - 1)
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(body)}")
            body = body[start : end + 1]
        elif partly:
            body = body[start:]
        if behaviour != "lengthless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if behaviour in ("cut", "stall") and not is_probe:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if behaviour == "stall":
                time.sleep(0.8)
            return self.connection.close()
        if behaviour == "slow":
            time.sleep(0.5)
        while behaviour == "trickle" and body:  # never without a byte for long, and never ready
            self.wfile.write(body[:10])
            self.wfile.flush()
            body = body[10:]
            time.sleep(0.05)
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(content: bytes, name: str, patch: pytest.MonkeyPatch) -> Iterator[http.server.ThreadingHTTPServer]:
    """A running server; its `url(behaviour)` is the file's address, its `asked` what was asked so far."""
    patch.setattr(downloads, "STALLED_SECONDS", 0.4)
    patch.setattr(downloads, "PROBE", 1000)
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        patch.delenv(proxy, raising=False)
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    running.handle_error = lambda *_: None  # who has read enough hangs up
    running.content, running.asked, running.probed, running.delays = content, [], [], {}
    running.url = lambda behaviour: f"http://127.0.0.1:{running.server_port}/{behaviour}/{name}"
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()

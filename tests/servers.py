"""A server on this machine that serves one file, and misbehaves as asked."""

import contextlib
import http.server
import threading
import time
from collections.abc import Iterator

import pytest

from quick import downloads


class Server(http.server.BaseHTTPRequestHandler):
    """GET /<behaviour>/...; the server object has the file's `content`, and keeps a list of what was asked."""

    def do_GET(self):
        behaviour, whole = self.path.split("/")[1], self.server.content
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.server.asked.append((behaviour, start))
        if behaviour.isdigit():
            return self.send_error(int(behaviour))
        if start >= len(whole):
            return self.send_error(416)
        body = {"html": b"<html>Sorry</html>", "corrupt": whole[::-1], "short": whole[:-1]}.get(behaviour, whole)
        partly = start and behaviour not in ("rangeless", "html")
        self.send_response(206 if partly else 200)
        if partly and behaviour != "unsaid":
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        body = body[start:] if partly else body
        if behaviour != "lengthless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if behaviour in ("cut", "stall"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if behaviour == "stall":
                time.sleep(0.8)
            return self.connection.close()
        if behaviour == "slow":
            time.sleep(0.5)
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(content: bytes, name: str, patch: pytest.MonkeyPatch) -> Iterator[http.server.ThreadingHTTPServer]:
    """A running server; its `url(behaviour)` is the file's address, its `asked` what was asked so far."""
    patch.setattr(downloads, "STALLED_SECONDS", 0.4)
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        patch.delenv(proxy, raising=False)
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    running.content, running.asked = content, []
    running.url = lambda behaviour: f"http://127.0.0.1:{running.server_port}/{behaviour}/{name}"
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()

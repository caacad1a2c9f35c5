"""A real web server on this machine that answers byte ranges, and goes wrong when it is told to."""

from __future__ import annotations

import base64
import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class FileServer(ThreadingHTTPServer):
    """Serves a folder at `url`.

    ranges: whether it heeds Range. delay: seconds before each answer. open: set while it answers at all. user:
    "name:password" that it wants, query: what must stand after the "?". `served` lists (path, Range or None) of all
    requests, `busiest` is how many it had at once, `sent` the bytes of contents handed to the system.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.ranges, self.delay = True, 0.0
        self.open = threading.Event()
        self.open.set()
        self.user, self.query = "", ""
        self.served: list[tuple[str, str | None]] = []
        self.busy = self.busiest = self.sent = 0
        self.lock = threading.Lock()
        self._faults: list[tuple[str, Fault]] = []

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    def fail(self, fault: str | int, times: int = 1, path: str = "") -> None:
        """Answer the next requests whose path ends so with a fault: a status, or a name in FAULTS."""
        found = FAULTS[fault] if isinstance(fault, str) else lambda answer: answer.refuse(fault)
        with self.lock:
            self._faults += [(path, found)] * times

    def next_fault(self, path: str) -> Fault | None:
        with self.lock:
            for i, (end, _) in enumerate(self._faults):
                if path.endswith(end):
                    return self._faults.pop(i)[1]
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[FileServer]:
    server = FileServer(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.open.set()
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: FileServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        server, parts = self.server, urlsplit(self.path)
        with server.lock:
            server.served.append((parts.path, self.headers["Range"]))
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        try:
            time.sleep(server.delay)
            server.open.wait()
            basic = "Basic " + base64.b64encode(server.user.encode()).decode()
            fault = server.next_fault(parts.path)
            if server.user and self.headers["Authorization"] != basic:
                self.refuse(401)
            elif server.query and parts.query != server.query:
                self.refuse(403)
            elif fault is not None:
                fault(self)
            else:
                self.answer()
        finally:
            with server.lock:
                server.busy -= 1

    def part(self) -> tuple[int, int, bytes] | None:
        """(first byte, file's size, bytes asked for); None and an answer where there are none."""
        file = self.server.folder / unquote(urlsplit(self.path).path).lstrip("/")
        if not file.is_file():
            self.refuse(404)
            return None
        data = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        if asked is None or not self.server.ranges:
            return 0, len(data), data
        if int(asked[1]) >= len(data):
            self.refuse(416, f"bytes */{len(data)}")
            return None
        return int(asked[1]), len(data), data[int(asked[1]) : int(asked[2]) + 1]

    def answer(self, alter: Callable[[bytes], bytes] = lambda data: data, shift: int = 0) -> None:
        """Answer as one should, but for the content and the place it is said to come from."""
        part = self.part()
        if part is not None:
            start, size, data = part
            data = alter(data)
            self.head(start + shift, size, len(data))
            for at in range(0, len(data), 1 << 20):
                self.wfile.write(data[at : at + (1 << 20)])
                self.server.sent += len(data[at : at + (1 << 20)])

    def head(self, start: int, size: int, length: int) -> None:
        ranged = self.headers["Range"] and self.server.ranges
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Length", str(length))
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{start + length - 1}/{size}")
        self.end_headers()

    def refuse(self, status: int, content_range: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()

    def hang_up(self) -> None:
        self.close_connection = True

    def break_off(self) -> None:
        """Half of what was announced."""
        part = self.part()
        assert part is not None
        self.head(part[0], part[1], len(part[2]))
        self.wfile.write(part[2][: len(part[2]) // 2])
        self.hang_up()


Fault = Callable[[Handler], None]
FAULTS: dict[str, Fault] = {
    "hang up": Handler.hang_up,
    "break off": Handler.break_off,
    "short": lambda answer: answer.answer(lambda data: data[:-1]),
    "shifted": lambda answer: answer.answer(shift=1),
    "flipped": lambda answer: answer.answer(lambda data: bytes([data[0] ^ 1]) + data[1:]),
}

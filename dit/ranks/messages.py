"""Lines of JSON between the ranks' watches, apart from torch's connections: those are what may hang."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from typing import Any

LONGEST = 1 << 16  # bytes of a line
SEND_SECONDS = 1.0  # a peer that takes nothing for so long counts as lost

Message = dict[str, Any]


class Connection:
    """One end of a connection. Any thread may send, one thread receives. OSError where the other end is gone."""

    def __init__(self, peer: socket.socket):
        self._socket = peer
        self._socket.settimeout(SEND_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lock = threading.Lock()
        self._begun = b""  # a line of which the end has not come

    @classmethod
    def open(cls, host: str, port: int, timeout: float) -> Connection:
        """Connect within `timeout` seconds. OSError if nobody answers."""
        return cls(socket.create_connection((host, port), timeout))

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        with self._lock:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float) -> list[Message]:
        """Take the messages that have come, after waiting `timeout` seconds for the first; none if nothing came.

        ConnectionError at the end of the connection, or where what comes is no message.
        """
        ready = select.poll()  # select() knows no file beyond the 1024th
        ready.register(self._socket, select.POLLIN)
        if not ready.poll(1e3 * max(0.0, timeout)):
            return []
        data = self._socket.recv(LONGEST)
        if not data:
            raise ConnectionError("closed by the other end")
        *lines, self._begun = (self._begun + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError) as error:  # of a stranger, who may send anything
            raise ConnectionError(f"no JSON: {error}") from None
        if len(self._begun) > LONGEST or not all(isinstance(m, dict) for m in messages):
            raise ConnectionError("not a line of a JSON object")
        return messages

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def listener(backlog: int) -> socket.socket:
    """Open a socket that takes connections on a free port, over IPv4 and, where there is one, IPv6."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # compiled in, but switched off on this machine
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", 0), backlog=backlog)


def connect(host: str, port: int, patience: float) -> Connection:
    """Open a connection, trying again until `patience` seconds are over: many ranks ask at once."""
    end = time.monotonic() + patience
    while True:
        try:
            return Connection.open(host, port, max(0.1, end - time.monotonic()))
        except OSError:
            if time.monotonic() > end - 0.2:
                raise
            time.sleep(0.1)

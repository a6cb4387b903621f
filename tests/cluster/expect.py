"""PUTs at the pace of a test: one that waits for leave to send its body, one that sends a piece at a time.

In: a node, a key, a body. Out: what the node answered, and when. Always holds: signed as root, over a connection of its own.
"""

from __future__ import annotations

import socket

from tests.crash.client import sign
from tests.crash.node import Node


def _open(node: Node, path: str, length: int, timeout_s: float, **more: str) -> socket.socket:
    connection = node.connection(timeout_s)
    connection.connect()
    opened: socket.socket = connection.sock
    headers = sign("PUT", path, "", {"host": f"{node.host}:{node.port()}", **more})
    lines = [
        f"PUT {path} HTTP/1.1",
        *(f"{name}: {value}" for name, value in headers.items()),
        f"content-length: {length}",
    ]
    opened.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
    return opened


def _status(opened: socket.socket) -> int:
    data = b""
    while b"\r\n" not in data:
        piece = opened.recv(65536)
        if not piece:
            raise OSError("the connection was closed without an answer")
        data += piece
    return int(data.split(b" ", 2)[1])


def status_before_body(node: Node, bucket: str, key: str, length: int, timeout_s: float = 30.0) -> int:
    """100: the body may be sent (it is not). Anything else: the answer without a body having been sent."""
    with _open(node, f"/{bucket}/{key}", length, timeout_s, expect="100-continue") as opened:
        return _status(opened)


class SlowPut:
    """A PUT whose body goes out as the test says."""

    def __init__(self, node: Node, bucket: str, key: str, body: memoryview, timeout_s: float = 60.0) -> None:
        self._body = body
        self._sent = 0
        self._socket = _open(node, f"/{bucket}/{key}", len(body), timeout_s)

    def send(self, count: int) -> None:
        """A node that has refused already may have closed: that is what ``status`` is for."""
        try:
            self._socket.sendall(self._body[self._sent : self._sent + count])
        except (BrokenPipeError, ConnectionResetError):
            pass
        self._sent += count

    def status(self) -> int:
        return _status(self._socket)

    def close(self) -> None:
        self._socket.close()

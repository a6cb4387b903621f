"""The sender of the demonstration, and what it is compared with: a bare receiver, and the disk by itself.

``python -m gateway.demo.stream send`` takes a ``Plan`` as JSON on stdin and the pool's descriptor by number; it PUTs every
object over some connections with ``sendfile`` and writes what was sent, and at the end the time it took, as JSON lines
to stdout. ``… sink`` takes the same requests, reads the bodies into one buffer and forgets them: no server that keeps
bytes can be faster on this machine. Both are processes of their own, and end
when their stdin does, so that neither outlives the demonstration.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gateway.demo.frames import pieces

SINK_BUFFER_BYTES = 4 << 20
SEND_BYTES = 16 << 20
DISK_BLOCK_BYTES = 4 << 20
TIMEOUT_S = 60
REPORT_PERIOD_S = 0.1


@dataclasses.dataclass(frozen=True, slots=True)
class Body:
    """One object: a complete request head, and where its bytes begin in the pool."""

    head: str
    start_byte: int
    length_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    host: str
    port: int
    connections: int
    pool_fd: int
    pool_bytes: int
    bodies: list[Body]


class StreamFailed(Exception):
    """The sender ended without sending everything; ``str()`` is its last word."""


def send(plan: Plan, progress: Callable[[int], None]) -> float:
    """Run the plan in a process of its own; seconds from the first byte to the last answer. ``progress`` is told bytes,
    some times a second. Raises StreamFailed."""
    command = [sys.executable, "-m", "gateway.demo.stream", "send"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(plan.pool_fd,)
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(json.dumps(dataclasses.asdict(plan)).encode() + b"\n")
        process.stdin.flush()
        sent = 0
        for line in process.stdout:
            report = json.loads(line)
            progress(report["bytes"] - sent)
            sent = report["bytes"]
            if "seconds" in report:
                return float(report["seconds"])
        raise StreamFailed((process.stderr.read().decode().strip().splitlines() or ["it was killed"])[-1])
    finally:
        process.kill()
        process.communicate()


def disk_bytes_per_s(folder: Path, size_bytes: int) -> float:
    """What the disk takes: O_DIRECT writes over a file that is there already, flushed at the end. Raises OSError."""
    block = mmap.mmap(-1, DISK_BLOCK_BYTES)
    block.write(os.urandom(DISK_BLOCK_BYTES))

    def write() -> float:
        started = time.perf_counter()
        for offset in range(0, size_bytes, DISK_BLOCK_BYTES):
            os.pwrite(fd, block, offset)
        os.fdatasync(fd)
        return time.perf_counter() - started

    with tempfile.NamedTemporaryFile(dir=folder) as file:
        fd = os.open(file.name, os.O_RDWR | os.O_DIRECT)
        try:
            write()
            return size_bytes / write()
        finally:
            os.close(fd)


class Sink:
    """The bare receiver: ``with Sink() as port``."""

    def __enter__(self) -> int:
        command = [sys.executable, "-m", "gateway.demo.stream", "sink"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


class _Sender:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._sent = [0] * plan.connections
        self._failure: BaseException | None = None
        self._go = threading.Event()

    def run(self) -> float:
        peers = [_connected(self._plan.host, self._plan.port) for _ in range(self._plan.connections)]
        threads = [
            threading.Thread(target=self._work, args=(number, peer), daemon=True) for number, peer in enumerate(peers)
        ]
        for thread in threads:
            thread.start()
        started = time.perf_counter()
        self._go.set()
        for thread in threads:
            while thread.is_alive() and self._failure is None:
                thread.join(REPORT_PERIOD_S)
                _say(bytes=self.total())
        if self._failure is not None:
            raise self._failure
        return time.perf_counter() - started

    def total(self) -> int:
        return sum(self._sent)

    def _work(self, number: int, peer: socket.socket) -> None:
        try:
            self._go.wait()
            for body in self._plan.bodies[number :: self._plan.connections]:
                self._put(number, peer, body)
        except BaseException as error:
            self._failure = error

    def _put(self, number: int, peer: socket.socket, body: Body) -> None:
        peer.sendall(body.head.encode())
        for start, length in pieces(body.start_byte, body.length_bytes, self._plan.pool_bytes):
            offset, end = start, start + length
            while offset < end:
                count = os.sendfile(peer.fileno(), self._plan.pool_fd, offset, min(end - offset, SEND_BYTES))
                offset += count
                self._sent[number] += count
        answer = b""
        while b"\r\n\r\n" not in answer:
            data = peer.recv(65536)
            if not data:
                raise ConnectionError("the connection was closed before an answer came")
            answer += data
        if answer.split(b" ", 2)[1] != b"200":
            raise ConnectionError(f"refused: {answer.decode('latin-1', 'replace')[:600]}")


def _connected(host: str, port: int) -> socket.socket:
    peer = socket.create_connection((host, port))
    # Limits of the operating system instead of Python's own, which would make the socket non-blocking for sendfile.
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        peer.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", TIMEOUT_S, 0))
    return peer


def _say(**report: float) -> None:
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()


def _sink() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    while True:
        peer, _ = listener.accept()
        threading.Thread(target=_discard, args=(peer,), daemon=True).start()


def _discard(peer: socket.socket) -> None:
    buffer = bytearray(SINK_BUFFER_BYTES)
    head = b""
    with peer:
        while data := peer.recv(65536):
            head += data
            end = head.find(b"\r\n\r\n")
            if end < 0:
                continue
            lengths = [line[15:] for line in head[:end].lower().split(b"\r\n") if line.startswith(b"content-length:")]
            left = int(lengths[0]) - (len(head) - end - 4)
            while left > 0:
                count = peer.recv_into(buffer, min(left, len(buffer)))
                if not count:
                    return
                left -= count
            peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            head = b""


def _end_with_stdin() -> None:
    """Whoever started this process holds the other end: when that is gone, so is the reason to run."""

    def watch() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    if sys.argv[1:] == ["sink"]:
        _end_with_stdin()
        _sink()
        return
    values: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    _end_with_stdin()
    plan = Plan(**{**values, "bodies": [Body(**body) for body in values["bodies"]]})
    sender = _Sender(plan)
    try:
        seconds = sender.run()
    except OSError as error:
        sys.exit(str(error))
    _say(bytes=sender.total(), seconds=seconds)


if __name__ == "__main__":
    main()

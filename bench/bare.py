"""The ceilings: servers that do nothing but move bytes, and the disk's own rate.

``python -m bench.bare receiver HOST [CERT KEY]`` takes PUT bodies straight into a pre-faulted pool and discards them;
``sendfile HOST FILE`` answers every GET with one cached file. Both print their port. They are what Python with uvloop can
reach here, not a product.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import uvloop

POOL_BYTES = {"receiver": 1 << 30, "small-receiver": 64 << 20}
"""By kind: a rate of gigabytes wants memory that no cache holds, a shaped link does not care and starts sooner."""
WINDOW_BYTES = 4 << 20


class Receiver(asyncio.BufferedProtocol):
    """Head into a small buffer, body into the pool, 200."""

    pool: memoryview

    def __init__(self) -> None:
        self._head = bytearray(65536)
        self._filled = 0
        self._left = 0
        self._offset = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def get_buffer(self, _: int) -> memoryview:
        if self._left:
            if self._offset + WINDOW_BYTES > len(self.pool):
                self._offset = 0
            return self.pool[self._offset : self._offset + min(self._left, WINDOW_BYTES)]
        return memoryview(self._head)[self._filled :]

    def buffer_updated(self, count: int) -> None:
        if self._left:
            self._left -= count
            self._offset += count
        else:
            self._filled += count
            end = self._head.find(b"\r\n\r\n", 0, self._filled)
            if end < 0:
                return
            at = self._head.lower().find(b"content-length:", 0, end)
            length = int(self._head[at + 15 : self._head.find(b"\r\n", at)])
            self._left = length - (self._filled - end - 4)
            self._filled = 0
        if not self._left:
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")  # type: ignore[attr-defined]


async def _receive(listener: socket.socket, pool_bytes: int, tls: ssl.SSLContext | None) -> None:
    memory = mmap.mmap(-1, pool_bytes, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
    Receiver.pool = memoryview(memory)
    server = await asyncio.get_running_loop().create_server(Receiver, sock=listener, ssl=tls)
    print(listener.getsockname()[1], flush=True)
    await server.serve_forever()


def _sendfile(listener: socket.socket, path: str) -> None:
    """Blocking, one connection at a time."""
    file = os.open(path, os.O_RDONLY)
    size = os.fstat(file).st_size
    print(listener.getsockname()[1], flush=True)
    while True:
        peer, _ = listener.accept()
        with peer:
            peer.setblocking(True)
            while True:
                data = b""
                while not data.endswith(b"\r\n\r\n"):
                    received = peer.recv(65536)
                    if not received:
                        break
                    data += received
                if not data:
                    break
                peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
                offset = 0
                while offset < size:
                    offset += os.sendfile(peer.fileno(), file, offset, size - offset)


@contextlib.contextmanager
def serve(kind: str, *arguments: str, host: str = "127.0.0.1", launcher: Sequence[str] = ()) -> Iterator[int]:
    """Run a bare server in a process of its own; gives its port. ``launcher``: a command before its own."""
    process = subprocess.Popen(
        [*launcher, sys.executable, "-m", "bench.bare", kind, host, *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def disk_bytes_per_s(folder: Path, size_bytes: int, flush_bytes: int) -> float:
    """O_DIRECT writes of 4 MiB into a pre-written file, fdatasync after every ``flush_bytes``: what the disk gives."""
    block = mmap.mmap(-1, WINDOW_BYTES)
    block.write(os.urandom(WINDOW_BYTES))
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        fd = os.open(file.name, os.O_RDWR | os.O_DIRECT)
        try:
            for offset in range(0, size_bytes, WINDOW_BYTES):
                os.pwrite(fd, block, offset)
            os.fsync(fd)
            started = time.perf_counter()
            for offset in range(0, size_bytes, WINDOW_BYTES):
                os.pwrite(fd, block, offset)
                if (offset + WINDOW_BYTES) % flush_bytes == 0:
                    os.fdatasync(fd)
            return size_bytes / (time.perf_counter() - started)
        finally:
            os.close(fd)


def main() -> None:
    kind, host, *arguments = sys.argv[1:]
    listener = socket.create_server((host, 0), backlog=64)
    if kind in POOL_BYTES:
        tls = None
        if arguments:
            tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            tls.load_cert_chain(arguments[0], arguments[1])
        uvloop.run(_receive(listener, POOL_BYTES[kind], tls))
    else:
        _sendfile(listener, arguments[0])


if __name__ == "__main__":
    main()

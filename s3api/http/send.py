"""Answers on the wire: status line and fields, small bodies, iterated bodies, stored files.

In: a ``Response`` and what the request allows. Out: bytes on the connection. A stored file goes by ``sendfile`` on a
duplicate of the socket's descriptor (uvloop has no ``loop.sendfile`` and keeps its own descriptors to itself), through
a thread's reads on a TLS connection.

Always holds: the event loop never waits for the disk. A window of a file is sent on the loop only if the page cache
holds it, else the same call is made in a thread. A body that cannot be sent whole ends in an aborted connection, never
in an answer that looks complete.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import functools
import http
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from email.utils import formatdate
from typing import Protocol

from ingest.ports import FilePiece
from s3api.http.limits import HttpLimits
from s3api.http.message import FileBody, Response

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
BODILESS = frozenset({204, 304})
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_REASONS = {status.value: status.phrase for status in http.HTTPStatus}


class Outlet(Protocol):
    """What sending needs of a connection."""

    limits: HttpLimits

    def write(self, data: bytes | memoryview) -> None: ...
    async def drained(self, *, empty: bool) -> None:
        """Returns once the peer took enough (``empty``: all) of what was written. Raises ConnectionResetError."""
        ...

    def progress(self, body_bytes: int) -> None:
        """The peer took bytes: restarts the send timeout, counts body bytes."""
        ...

    def peer_future(self) -> asyncio.Future[bool]:
        """A future to wait for the peer with; ConnectionResetError is set on it when the connection is lost."""
        ...

    def socket_fd(self) -> int: ...


# -- heads


class _Date:
    """The Date field, formatted once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._text = ""

    def __call__(self) -> str:
        now = int(time.time())
        if now != self._second:
            self._second = now
            self._text = formatdate(now, usegmt=True)
        return self._text


_date = _Date()


def response_head(response: Response, *, length: int | None, chunked: bool, close: bool) -> bytes:
    """Status line and fields. ``length`` None: no Content-Length. ValueError for a field that would break the head."""
    status = response.status
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Unknown')}", f"Date: {_date()}", "Server: hiss"]
    lines += [f"{name}: {value}" for name, value in response.headers]
    if chunked:
        lines.append("Transfer-Encoding: chunked")
    elif length is not None:
        lines.append(f"Content-Length: {length}")
    if close:
        lines.append("Connection: close")
    text = "\r\n".join(lines)
    if text.count("\n") != len(lines) - 1 or text.count("\r") != len(lines) - 1:
        raise ValueError("a response field holds a line break")
    return (text + "\r\n\r\n").encode("latin-1")


# -- iterated bodies


async def send_iterated(outlet: Outlet, chunks: AsyncIterator[bytes], *, chunked: bool, length: int | None) -> None:
    """Send every chunk, waiting for the peer. Raises ValueError when there are more or fewer bytes than ``length``."""
    sent = 0
    async for chunk in chunks:
        if not chunk:
            continue
        sent += len(chunk)
        if length is not None and sent > length:
            raise ValueError(f"the body is longer than the {length} bytes announced")
        outlet.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if chunked else chunk)
        await outlet.drained(empty=False)
        outlet.progress(len(chunk))
    if length is not None and sent != length:
        raise ValueError(f"the body is {sent} bytes long, not the {length} announced")
    if chunked:
        outlet.write(b"0\r\n\r\n")


# -- stored files


class _CacheRange(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _CacheStat(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    )


_SYS_CACHESTAT = 451
_PROBE_HOLDS_S = 0.1


@functools.cache
def _syscall() -> Callable[..., int]:
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.restype = ctypes.c_long
    return function


class Residency:
    """Whether a range of a file can be read without waiting for the disk. One for each process is enough.

    cachestat(2) (Linux 6.5) counts the cached pages of a range; a one-byte ``preadv2(RWF_NOWAIT)`` at its ends tells
    pages that are still being read. Without cachestat a few more such bytes are sampled. In doubt: not resident.
    """

    def __init__(self) -> None:
        self._cachestat = True

    def resident(self, fd: int, offset: int, length: int) -> bool:
        samples = 2
        if self._cachestat:
            first = offset // _PAGE_BYTES
            pages = (offset + length - 1) // _PAGE_BYTES - first + 1
            span, stat = _CacheRange(first * _PAGE_BYTES, pages * _PAGE_BYTES), _CacheStat()
            if _syscall()(_SYS_CACHESTAT, fd, ctypes.byref(span), ctypes.byref(stat), 0) == 0:
                if stat.cached < pages:
                    return False
            else:
                self._cachestat = ctypes.get_errno() not in (errno.ENOSYS, errno.EPERM)
                samples = 16
        else:
            samples = 16
        return all(_readable(fd, offset + (length - 1) * i // (samples - 1)) for i in range(samples))


def _readable(fd: int, offset: int) -> bool:
    try:
        return os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:
        return False  # EAGAIN: not in memory. EOPNOTSUPP: this filesystem cannot tell.


_residency = Residency()


class FileSender:
    """Sends one head and the file pieces behind it on a plain TCP socket."""

    def __init__(self, outlet: Outlet, head: bytes, body: FileBody) -> None:
        self._outlet = outlet
        self._head = memoryview(head)
        self._pieces = [piece for piece in body.pieces if piece.length]
        self._index = 0
        self._offset = self._pieces[0].offset if self._pieces else 0
        # A window found in memory is not probed again for every part of it that the socket takes.
        self._trusted_stop = 0
        self._trusted_until_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[bool] = self._loop.create_future()

    async def send(self) -> None:
        """Raises ConnectionResetError when the peer is gone, OSError when the file cannot be read."""
        await self._outlet.drained(empty=True)
        with socket.socket(fileno=os.dup(self._outlet.socket_fd())) as sock:
            try:
                while not await self._send_on_loop(sock):
                    await self._send_in_thread(sock)
            except OSError as error:
                if error.errno in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ETIMEDOUT):
                    raise ConnectionResetError("the peer is gone") from None
                raise

    async def _send_on_loop(self, sock: socket.socket) -> bool:
        """Send what is in memory; True when everything is sent, False when the next window is not in memory."""
        outcome = self._send_window(sock)
        if outcome is None:
            self._waiter = self._outlet.peer_future()
            self._loop.add_writer(sock.fileno(), self._on_writable, sock)
            try:
                outcome = await self._waiter
            finally:
                self._loop.remove_writer(sock.fileno())
        return outcome

    def _on_writable(self, sock: socket.socket) -> None:
        if self._waiter.done():
            return
        try:
            outcome = self._send_window(sock)
        except OSError as error:
            self._waiter.set_exception(error)
        else:
            if outcome is not None:
                self._waiter.set_result(outcome)

    def _send_window(self, sock: socket.socket) -> bool | None:
        """One window at most. True: all sent; False: the next bytes are not in memory; None: come again."""
        try:
            if self._head:
                # With MSG_MORE the head travels in the first segment of the body.
                self._head = self._head[sock.send(self._head, socket.MSG_MORE if self._pieces else 0) :]
                self._outlet.progress(0)
                if self._head:
                    return None
            if self._index == len(self._pieces):
                return True
            piece, count = self._window()
            trusted = self._trusted_stop - self._offset
            if trusted > 0 and self._loop.time() < self._trusted_until_s:
                count = min(count, trusted)
            elif _residency.resident(piece.fd, self._offset, count):
                self._trusted_stop = self._offset + count
                self._trusted_until_s = self._loop.time() + _PROBE_HOLDS_S
            else:
                return False
            self._advance(piece, os.sendfile(sock.fileno(), piece.fd, self._offset, count))
        except BlockingIOError:
            return None
        return True if self._index == len(self._pieces) else None

    async def _send_in_thread(self, sock: socket.socket) -> None:
        """One window that is on the disk: read ahead of it, and wait for it in a thread."""
        piece, count = self._window()
        offset = self._offset
        ahead = min(2 * self._outlet.limits.send_window_bytes, piece.offset + piece.length - offset)

        def work() -> int:
            os.posix_fadvise(piece.fd, offset, ahead, os.POSIX_FADV_WILLNEED)
            return os.sendfile(sock.fileno(), piece.fd, offset, count)

        try:
            self._advance(piece, await in_thread(self._loop, work))
        except BlockingIOError:
            waiter = self._outlet.peer_future()
            self._loop.add_writer(sock.fileno(), _set, waiter)
            try:
                await waiter
            finally:
                self._loop.remove_writer(sock.fileno())

    def _window(self) -> tuple[FilePiece, int]:
        piece = self._pieces[self._index]
        return piece, min(self._outlet.limits.send_window_bytes, piece.offset + piece.length - self._offset)

    def _advance(self, piece: FilePiece, sent: int) -> None:
        if sent == 0:
            raise OSError(errno.EIO, f"stored file ends at {self._offset}, {piece.offset + piece.length} expected")
        self._offset += sent
        self._outlet.progress(sent)
        if self._offset == piece.offset + piece.length:
            self._index += 1
            self._trusted_stop = 0
            if self._index < len(self._pieces):
                self._offset = self._pieces[self._index].offset


def _set(future: asyncio.Future[bool]) -> None:
    if not future.done():
        future.set_result(True)


async def send_small_file(outlet: Outlet, head: bytes, body: FileBody) -> None:
    """Head and body in one write: for a few KiB, duplicating a descriptor and probing pages costs more than copying."""
    data = memoryview(bytearray(len(head) + body.length))
    data[: len(head)] = head
    at = len(head)
    for piece in body.pieces:
        part = data[at : at + piece.length]
        if _read_resident(piece.fd, part, piece.offset) < piece.length:
            read = functools.partial(os.preadv, piece.fd, [part], piece.offset)
            count = await in_thread(asyncio.get_running_loop(), read)
            if count < piece.length:
                raise OSError(errno.EIO, f"stored file ends at {piece.offset + count}, {piece.length} bytes expected")
        at += piece.length
    outlet.write(data)
    outlet.progress(body.length)


def _read_resident(fd: int, part: memoryview, offset: int) -> int:
    """Bytes read without waiting for the disk; 0 where that cannot be had."""
    try:
        return os.preadv(fd, [part], offset, os.RWF_NOWAIT)
    except OSError:
        return 0


async def send_file_encrypted(outlet: Outlet, head: bytes, body: FileBody) -> None:
    """Read in a thread into one buffer, write it, wait until the TLS layer has taken it, use it again."""
    loop = asyncio.get_running_loop()
    outlet.write(head)
    buffer = memoryview(bytearray(min(outlet.limits.tls_window_bytes, max(body.length, 1))))
    for piece in body.pieces:
        offset, end = piece.offset, piece.offset + piece.length
        while offset < end:
            part = buffer[: min(len(buffer), end - offset)]
            count = await in_thread(loop, functools.partial(os.preadv, piece.fd, [part], offset))
            if count == 0:
                raise OSError(errno.EIO, f"stored file ends at {offset}, {end} expected")
            outlet.write(part[:count])
            await outlet.drained(empty=True)
            outlet.progress(count)
            offset += count


async def send_chunks(outlet: Outlet, head: bytes, chunks: AsyncIterator[memoryview], length: int) -> None:
    """Bytes that come from elsewhere, in memory that is used again once the peer has taken them."""
    outlet.write(head)
    sent = 0
    async for view in chunks:
        outlet.write(view)
        await outlet.drained(empty=True)
        sent += len(view)
        outlet.progress(len(view))
    if sent != length:
        raise OSError(errno.EIO, f"{length} bytes were announced and {sent} came")


async def in_thread(loop: asyncio.AbstractEventLoop, work: Callable[[], int]) -> int:
    """Run in the default executor; a cancelled caller still waits, for the thread uses its descriptors and memory."""
    future: Awaitable[int] = loop.run_in_executor(None, work)
    task = asyncio.ensure_future(future)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise

"""One peer: reads heads, runs the handler, sends its answer, one request after the other.

Upstream: ``listener.Server`` makes connections and looks at their timeouts (``sweep``). Downstream: the handler,
through ``Request`` and ``RequestBody``. uvloop calls ``get_buffer`` and ``buffer_updated`` for every read.

Always holds: at most one request is in the handler's hands; bytes behind it stay in the inbox, unparsed, until its
answer is written. When the end of a request's body is not known for certain the connection closes after the answer, and
lingers so that the peer reads the answer instead of a reset (RFC 9112 section 9.6). A handler is not cancelled because
its peer left: it learns of it from its body or not at all, so that what it has begun to commit it can finish.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import random
import socket
import time
from typing import TYPE_CHECKING, cast

from s3api.http.body import RequestBody, scratch, short_body
from s3api.http.chunked import ChunkedFraming, Framing, LengthFraming
from s3api.http.head import Head, find_head_end, parse_head
from s3api.http.inbox import Inbox
from s3api.http.message import FileBody, HttpError, Request, Response
from s3api.http.pace import Pace
from s3api.http.send import (
    BODILESS,
    CONTINUE,
    FileSender,
    response_head,
    send_chunks,
    send_file_encrypted,
    send_iterated,
    send_small_file,
)

if TYPE_CHECKING:
    from s3api.http.listener import Server

_log = logging.getLogger(__name__)
_HIGH_WATER_BYTES = 256 * 1024
_SO_RCVBUFFORCE, _SO_BUF_LOCK = 33, 72
_PATIENCE = 10
"""So many times longer may a body pause that another node sends."""


class Wait(enum.Enum):
    """What the connection waits for; each has its time limit."""

    NEXT = enum.auto()  # the first byte of a request
    HEAD = enum.auto()  # the rest of a head
    BODY = enum.auto()  # bytes of a body
    SEND = enum.auto()  # the peer to take the answer
    LINGER = enum.auto()  # the peer to close
    US = enum.auto()  # our own handler or memory: no limit here


class HttpConnection(asyncio.BufferedProtocol):
    """One accepted connection. Implements ``body.Wire`` and ``send.Outlet``."""

    def __init__(self, server: Server, peer: str) -> None:
        self.server = server
        self.limits = server.limits
        self.inbox = Inbox(bytearray())
        self.sent_bytes = 0
        self._peer = peer
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._receiving: RequestBody | None = None
        self._pace: Pace | None = None
        self._head: Head | None = None
        self._scanned = 0
        self._continued = False
        self._closing = False
        self._eof = False
        self._lost = False
        self._paused = False
        self._writing_paused = False
        self._peer_waiter: asyncio.Future[bool] | None = None
        self._lingered_bytes = 0
        self._status = 0
        self._wait = Wait.NEXT
        self._moved = True
        self._since = 0.0
        self._unsent_bytes = 0
        self._natural_bytes = 0
        """The receive buffer, while ``set_window`` makes it smaller; 0: it does not."""

    # -- transport callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class: not an asyncio.Transport by type
        self._transport.set_write_buffer_limits(_HIGH_WATER_BYTES)
        self.server.opened(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._receiving is not None:
            return self._receiving.buffer()
        if self._wait is Wait.LINGER:
            return scratch()
        if not self.inbox.data:
            self.inbox.move_to(self.server.inboxes.borrow())
        return self.inbox.room()

    def buffer_updated(self, nbytes: int) -> None:
        if self._receiving is not None:
            self._moved = True
            self._receiving.updated(nbytes)
            return
        if self._wait is Wait.LINGER:
            self._lingered_bytes += nbytes
            if self._lingered_bytes > self.limits.linger_bytes:
                self.abort()
            return
        self.inbox.end += nbytes
        if self._task is None:
            self._next_request()
        elif self.inbox.full:
            self.pause_reading()

    def eof_received(self) -> bool:
        """The peer sends no more. It may still read (half-close), except over TLS."""
        self._eof = True
        if self._receiving is not None:
            self._receiving.fail(short_body())
        if self._task is not None:
            return not self.server.secure
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        gone = ConnectionResetError("the peer closed the connection")
        if self._receiving is not None:
            self._receiving.fail(gone)
        if self._peer_waiter is not None and not self._peer_waiter.done():
            self._peer_waiter.set_exception(gone)
        self.server.closed(self)

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        if self._peer_waiter is not None and not self._peer_waiter.done():
            self._peer_waiter.set_result(True)

    # -- for the server

    @property
    def task(self) -> asyncio.Task[None] | None:
        return self._task

    def sweep(self, now: float) -> None:
        """Called every ``limits.tick_s`` with the loop's time: let go of a peer that makes us wait too long."""
        assert self._transport is not None
        if self._wait is Wait.SEND or self._wait is Wait.US:
            unsent = self._transport.get_write_buffer_size()
            if unsent != self._unsent_bytes:
                self._unsent_bytes = unsent
                self._moved = True
        if self._moved:
            self._moved = False
            self._since = now
            if self._wait is Wait.BODY:
                self._check_pace(now)
            return
        timeout_s = self._timeout_s()
        if now - self._since < timeout_s:
            return
        if self._wait is Wait.BODY and self._receiving is not None:
            if not self._receiving.starved:
                self._receiving.fail(
                    HttpError(408, "RequestTimeout", f"No byte of the body came for {timeout_s:g} seconds.")
                )
        elif self._wait is Wait.HEAD and not self._transport.is_closing():
            self._refuse(HttpError(408, "RequestTimeout", f"The request head took longer than {timeout_s:g} seconds."))
        elif self._wait is not Wait.US:
            self.abort()

    def _timeout_s(self) -> float:
        patient = self._receiving is not None and self._receiving.patient
        return self.server.timeouts_s[self._wait] * (_PATIENCE if patient else 1)

    def _check_pace(self, now: float) -> None:
        body, pace = self._receiving, self._pace
        if body is None or pace is None or body.patient:
            return
        if pace.too_slow(now, body.payload_bytes, excused=body.starved or self._paused):
            body.fail(HttpError(408, "RequestTimeout", f"The body must come at {pace} or faster."))

    def shut_down(self) -> None:
        """Close now when idle, else after the answer to the request in hand."""
        self._closing = True
        if self._task is None and self._wait is Wait.NEXT and self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # -- body.Wire

    def begin_body(self, body: RequestBody) -> None:
        if self._lost:
            raise ConnectionResetError("the peer closed the connection")
        if body.in_chunks and len(self.inbox.data) < self.limits.read_ahead_bytes:
            self.inbox.move_to(self.server.pool.borrow())
        assert self._head is not None
        if self._head.expects_continue and not self._continued and not len(self.inbox):
            self.write(CONTINUE)
        self._continued = True
        self._receiving = body
        self._pace = Pace(self.limits, body.length)
        self._enter(Wait.BODY)
        self.server.active_bodies += 1
        if self._eof and not len(self.inbox):
            body.fail(short_body())

    def end_body(self) -> None:
        if self._receiving is None:
            return
        self._receiving = None
        self.server.active_bodies -= 1
        self._enter(Wait.US)
        self._shrink_inbox()
        if not self.inbox.full:
            self.resume_reading()

    def _shrink_inbox(self) -> None:
        """Back to the size for heads; to nothing, when it is empty between requests."""
        small = self.limits.inbox_bytes
        if len(self.inbox.data) > small >= len(self.inbox):
            self.server.pool.give_back(self.inbox.move_to(self.server.inboxes.borrow()))
        if self._wait is Wait.NEXT and self.inbox.data and not len(self.inbox):
            self.server.inboxes.give_back(self.inbox.move_to(bytearray()))

    def pause_reading(self) -> None:
        if not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._paused and not self._eof and not self._lost and self._transport is not None:
            self._paused = False
            self._moved = True
            self._transport.resume_reading()

    # -- send.Outlet

    def write(self, data: bytes | memoryview) -> None:
        if self._lost or self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the peer closed the connection")
        self._transport.write(data)

    async def drained(self, *, empty: bool) -> None:
        transport = self._transport
        assert transport is not None
        if self._lost:
            raise ConnectionResetError("the peer closed the connection")
        if not (self._writing_paused or (empty and transport.get_write_buffer_size())):
            return
        if empty:
            # A high mark of one byte makes resume_writing mean: everything is out.
            transport.set_write_buffer_limits(1, 0)
        try:
            while self._writing_paused or (empty and transport.get_write_buffer_size()):
                await self.peer_future()
        finally:
            if empty and not transport.is_closing():
                transport.set_write_buffer_limits(_HIGH_WATER_BYTES)

    def peer_future(self) -> asyncio.Future[bool]:
        self._peer_waiter = asyncio.get_running_loop().create_future()
        if self._lost:
            self._peer_waiter.set_exception(ConnectionResetError("the peer closed the connection"))
        return self._peer_waiter

    def progress(self, body_bytes: int) -> None:
        self._moved = True
        self.sent_bytes += body_bytes
        self.server.count_sent(body_bytes)

    def socket_fd(self) -> int:
        assert self._transport is not None
        return int(self._transport.get_extra_info("socket").fileno())

    def set_window(self, size_bytes: int) -> None:
        """SO_RCVBUF of socket(7), which the kernel doubles for its own overhead; 0: as it was, and adapted by the kernel."""
        assert self._transport is not None
        if self._lost or self._transport.is_closing():
            return  # its number may be another connection's by now
        found = self._transport.get_extra_info("socket")
        with contextlib.suppress(OSError):  # the peer has gone
            if size_bytes:
                if not self._natural_bytes:
                    self._natural_bytes = found.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
                found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, min(size_bytes, self._natural_bytes))
            elif self._natural_bytes:
                try:  # beyond net.core.rmem_max, as the kernel may have chosen: with CAP_NET_ADMIN only
                    found.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, self._natural_bytes)
                except PermissionError:
                    found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._natural_bytes)
                self._natural_bytes = 0
                found.setsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK, 0)  # since Linux 5.14

    # -- requests

    def _enter(self, wait: Wait) -> None:
        self._wait = wait
        self._moved = True

    def _next_request(self) -> None:
        """Begin the request whose head is in the inbox, if it is complete."""
        inbox = self.inbox
        while inbox.start < inbox.end and inbox.data[inbox.start] in b"\r\n":
            inbox.start += 1  # RFC 9112 section 2.2: empty lines before a request line
        if inbox.start == inbox.end:
            if self._wait is not Wait.NEXT:
                self._enter(Wait.NEXT)
            self._shrink_inbox()
            return
        if self._wait is not Wait.HEAD:
            self._enter(Wait.HEAD)
            self._scanned = 0
        try:
            end = find_head_end(inbox.data, inbox.start, inbox.start + self._scanned, inbox.end, self.limits)
            if end < 0:
                self._scanned = len(inbox)
                if inbox.full:
                    inbox.move_to(bytearray(min(2 * len(inbox.data), self.limits.head_bytes + 1)))
                return
            head = parse_head(bytes(inbox.view[inbox.start : end]), self.limits)
        except HttpError as error:
            self._refuse(error)
            return
        inbox.start = end
        self._head = head
        self._continued = False
        framing: Framing = ChunkedFraming(self.limits) if head.chunked else LengthFraming(head.content_length or 0)
        body = RequestBody(self, framing, head.content_length, self.limits)
        request = Request(
            method=head.method,
            target=head.target,
            path=head.path,
            query=head.query,
            headers=head.headers,
            body=body,
            peer=self._peer,
            secure=self.server.secure,
            request_id=f"{random.getrandbits(64):016X}",
            scope={"received_ns": time.time_ns()},
        )
        self._enter(Wait.US)
        self._task = asyncio.get_running_loop().create_task(self._serve(request, head, body))

    def _refuse(self, error: HttpError) -> None:
        """Answer what never became a request, and close."""
        self._closing = True
        response = self.server.render(None, error)
        body = response.body if isinstance(response.body, bytes) else b""
        try:
            self.write(response_head(response, length=len(body), chunked=False, close=True) + body)
        except (ValueError, ConnectionResetError):
            self.abort()
        else:
            self._linger()

    async def _serve(self, request: Request, head: Head, body: RequestBody) -> None:
        """One request from its head to the last byte of its answer, then on to the next."""
        started_ns = time.monotonic_ns()
        self._status = self.sent_bytes = 0
        keep = False
        try:
            keep = await self._answer(request, head, body)
        except ConnectionResetError:
            self.abort()
        except asyncio.CancelledError:
            self.abort()
            raise
        except Exception:
            # The head may be out already: only a broken connection tells the peer that the answer is not whole.
            _log.exception("request %s: the answer could not be sent", request.request_id)
            self.abort()
        finally:
            self._task = None
            self.server.finished(request, self._status, self.sent_bytes, time.monotonic_ns() - started_ns)
        assert self._transport is not None
        if self._lost or self._transport.is_closing():
            return
        if not keep or self._closing:
            self._close_after_answer(clean=body.received and not len(self.inbox))
            return
        self._enter(Wait.NEXT)
        self._next_request()
        if self._task is None:
            if self._eof:
                self._close_after_answer(clean=True)
            else:
                self.resume_reading()

    async def _answer(self, request: Request, head: Head, body: RequestBody) -> bool:
        """Run the handler, send what it says; True when the connection can take another request."""
        response = await self.server.respond(request)
        self._status = response.status
        keep = head.keep_alive and not (response.close or self._closing) and self._can_reuse(head, body)
        try:
            await self._send(response, head, close=not keep)
        finally:
            if isinstance(response.body, FileBody):
                await response.body.closed()
        if keep and not body.received:
            try:
                await body.discard()
            except HttpError:
                return False  # The rest of an unread body came late or not at all; the answer is out.
        return keep

    def _can_reuse(self, head: Head, body: RequestBody) -> bool:
        """Whether the next request's first byte will be known for certain.

        A peer that was not sent the 100 it asked for may or may not send its body after the answer: only closing is
        safe.
        """
        if self._eof and not len(self.inbox):
            return False
        if body.received:
            return True
        if head.expects_continue and not self._continued and not len(self.inbox):
            return False
        unread = body.unread_bytes
        return unread is not None and unread <= self.limits.drain_bytes

    async def _send(self, response: Response, head: Head, *, close: bool) -> None:
        self._enter(Wait.SEND)
        body = response.body
        bodiless = head.method == "HEAD" or response.status in BODILESS
        length = response.content_length
        if isinstance(body, bytes):
            if response.status in BODILESS:
                length = None
            elif head.method != "HEAD" or length is None:
                length = len(body)
            wire = response_head(response, length=length, chunked=False, close=close)
            self.write(wire if bodiless or not body else wire + body)
            if body and not bodiless:
                self.progress(len(body))
        elif isinstance(body, FileBody):
            wire = response_head(response, length=body.length, chunked=False, close=close)
            await self._send_stored(wire, None if bodiless else body)
        else:
            chunked = length is None and head.http11
            self.write(response_head(response, length=length, chunked=chunked, close=close or not head.http11))
            if not bodiless:
                await send_iterated(self, body, chunked=chunked, length=length)
        # A peer that asks and never reads must not fill our memory.
        await self.drained(empty=False)

    async def _send_stored(self, wire: bytes, body: FileBody | None) -> None:
        if body is None or not body.length:
            self.write(wire)
        elif body.chunks is not None:
            await send_chunks(self, wire, body.chunks(self.limits.send_window_bytes), body.length)
        elif body.length <= self.limits.small_send_bytes:
            await send_small_file(self, wire, body)
        elif self.server.secure:
            await send_file_encrypted(self, wire, body)
        else:
            await FileSender(self, wire, body).send()

    def _close_after_answer(self, *, clean: bool) -> None:
        if clean or self._eof:
            self._enter(Wait.SEND)
            assert self._transport is not None
            self._transport.close()
        else:
            self._linger()

    def _linger(self) -> None:
        """Close our direction, then read and drop until the peer closes: unread bytes would turn into a reset."""
        assert self._transport is not None
        self._closing = True
        self._enter(Wait.LINGER)
        if self._transport.can_write_eof() and not self.server.secure:
            self._transport.write_eof()
        self.inbox.start = self.inbox.end = 0
        self.resume_reading()

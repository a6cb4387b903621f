"""Accepts connections on inherited listening sockets and looks after them: shares, timeouts, TLS, shutting down.

In: listening sockets (the caller's to close), a handler, limits. Out: ``HttpConnection``s on the running loop.
Always holds: no more than ``limits.connections`` are open; nothing a peer does, or fails to do, stops the accepting.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import math
import socket
import ssl
from collections.abc import Callable, Sequence

from ingest.counters import Counters
from s3api.http.connection import HttpConnection, Wait
from s3api.http.inbox import BufferPool
from s3api.http.limits import HttpLimits
from s3api.http.message import Handler, HttpError, Request, Response
from s3api.http.send import response_head

_log = logging.getLogger(__name__)

RenderError = Callable[[Request | None, HttpError], Response]
Observer = Callable[[Request, int, int, int], None]
"""(request, status, body bytes sent, nanoseconds from head to last byte); status 0: the peer left before an answer."""

_TLS_HANDSHAKE = 0x16  # RFC 8446 section 5.1: the first byte of a ClientHello's record
_ACCEPT_AT_ONCE = 32
_INBOXES_KEPT = 256
_OUT_OF_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_DESCRIPTOR_PAUSE_S = 0.2


def plain_error(request: Request | None, error: HttpError) -> Response:
    """An error as text, for rooms that have no form of their own."""
    text = f"{error.code}: {error.message}\n".encode()
    return Response(error.status, [("Content-Type", "text/plain; charset=utf-8")], text, close=error.close)


class Server:
    """Serves ``handler`` on ``listeners``; all of them speak TLS when ``ssl_context`` is given.

    ``start`` and ``close`` run on the loop that serves. ``observe`` is called once for every request that reached the
    handler. A handler's ``HttpError`` is rendered by ``render_error``; any other exception of it is logged and rendered
    as 500 InternalError.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        handler: Handler,
        limits: HttpLimits,
        counters: Counters | None = None,
        ssl_context: ssl.SSLContext | None = None,
        render_error: RenderError = plain_error,
        observe: Observer | None = None,
    ) -> None:
        self.limits = limits
        self.secure = ssl_context is not None
        self.active_bodies = 0
        self.pool = BufferPool(limits.read_ahead_bytes)
        self.inboxes = BufferPool(limits.inbox_bytes, keep=_INBOXES_KEPT)
        self.timeouts_s = {
            Wait.NEXT: limits.idle_timeout_s,
            Wait.HEAD: limits.head_timeout_s,
            Wait.BODY: limits.body_timeout_s,
            Wait.SEND: limits.send_timeout_s,
            Wait.LINGER: limits.linger_timeout_s,
            Wait.US: math.inf,
        }
        self._listeners = list(listeners)
        self._handler = handler
        self._ssl_context = ssl_context
        self._render_error = render_error
        self._observe = observe
        self._open_gauge = counters.cell("hiss_http_connections") if counters is not None else None
        self._sent_counter = counters.cell("hiss_http_sent_bytes_total") if counters is not None else None
        self._connections: set[HttpConnection] = set()
        self._arriving: set[asyncio.Task[None]] = set()
        self._listening: set[socket.socket] = set()
        self._resting: set[socket.socket] = set()
        self._yielded: set[socket.socket] = set()
        self._closing = False
        self._all_gone: asyncio.Future[None] | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    # -- life

    def start(self) -> None:
        for listener in self._listeners:
            listener.setblocking(False)
            self._listen(listener)
        self._sweeper = asyncio.get_running_loop().call_later(self.limits.tick_s, self._sweep)

    async def close(self, grace_s: float) -> None:
        """Stop accepting, let requests in hand be answered for up to ``grace_s``, then abort what is left.

        The listening sockets stay open: they are the caller's.
        """
        self._closing = True
        for listener in self._listeners:
            self._stop_listening(listener)
        for task in self._arriving:
            task.cancel()
        for connection in list(self._connections):
            connection.shut_down()
        await self._wait_gone(grace_s)
        left = list(self._connections)
        tasks = {connection.task for connection in left} - {None}
        for connection in left:
            connection.abort()
        await self._wait_gone(1.0)
        pending = {task for task in tasks if task is not None and not task.done()}
        if pending:
            _, pending = await asyncio.wait(pending, timeout=1.0)
        for task in pending:
            task.cancel()
        if pending or self._arriving:
            await asyncio.wait(pending | self._arriving, timeout=1.0)
        if self._sweeper is not None:
            self._sweeper.cancel()

    async def _wait_gone(self, timeout_s: float) -> None:
        if self._connections and timeout_s > 0:
            self._all_gone = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._all_gone], timeout=timeout_s)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        self._sweeper = loop.call_later(self.limits.tick_s, self._sweep)
        now = loop.time()
        for connection in list(self._connections):
            connection.sweep(now)

    # -- accepting

    def _listen(self, listener: socket.socket) -> None:
        if self._closing or listener in self._listening or listener in self._resting:
            return
        if len(self._connections) + len(self._arriving) < self.limits.connections:
            self._listening.add(listener)
            asyncio.get_running_loop().add_reader(listener.fileno(), self._accept, listener)

    def _listen_again(self) -> None:
        if len(self._listening) < len(self._listeners):
            for listener in self._listeners:
                self._listen(listener)

    def _stop_listening(self, listener: socket.socket) -> None:
        if listener in self._listening:
            self._listening.discard(listener)
            asyncio.get_running_loop().remove_reader(listener.fileno())

    def _over_share(self) -> bool:
        return 0 < self.limits.accept_share <= self.active_bodies

    def _accept(self, listener: socket.socket) -> None:
        """Accept what waits. Where there are other workers, one at a time, and then it is their turn for a moment; above our
        share of bodies they come first."""
        at_once = _ACCEPT_AT_ONCE if self.limits.accept_share == 0 else 1
        if self._over_share():
            if listener not in self._yielded:
                self._yielded.add(listener)
                self._rest(listener, self.limits.accept_yield_s)
                return
        self._yielded.discard(listener)
        for _ in range(at_once):
            if len(self._connections) + len(self._arriving) >= self.limits.connections:
                self._stop_listening(listener)
                return
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _OUT_OF_DESCRIPTORS:
                    raise
                _log.error("cannot accept: %s", error)
                self._rest(listener, _DESCRIPTOR_PAUSE_S)
                return
            sock.setblocking(False)
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = asyncio.get_running_loop().create_task(self._welcome(sock, _peer_name(address)))
            self._arriving.add(task)
            task.add_done_callback(self._arrived)
        if self.limits.accept_share:
            self._rest(listener, self.limits.accept_turn_s)

    def _rest(self, listener: socket.socket, seconds: float) -> None:
        self._stop_listening(listener)
        self._resting.add(listener)
        asyncio.get_running_loop().call_later(seconds, self._rested, listener)

    def _rested(self, listener: socket.socket) -> None:
        self._resting.discard(listener)
        self._listen(listener)

    def _arrived(self, task: asyncio.Task[None]) -> None:
        self._arriving.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.debug("connection not set up: %s", task.exception())
        self._listen_again()

    async def _welcome(self, sock: socket.socket, peer: str) -> None:
        """Hand an accepted socket to its connection; on a TLS port look at its first byte before."""
        loop = asyncio.get_running_loop()
        factory = functools.partial(HttpConnection, self, peer)
        try:
            if self._ssl_context is None:
                await loop.connect_accepted_socket(factory, sock)
                return
            async with asyncio.timeout(self.limits.head_timeout_s):
                first = await _peek(sock)
            if not first:
                sock.close()
            elif first[0] == _TLS_HANDSHAKE:
                await loop.connect_accepted_socket(
                    factory,
                    sock,
                    ssl=self._ssl_context,
                    ssl_handshake_timeout=self.limits.tls_handshake_timeout_s,
                    ssl_shutdown_timeout=self.limits.linger_timeout_s,
                )
            else:
                await self._explain_tls(sock)
        except BaseException:
            sock.close()
            raise

    async def _explain_tls(self, sock: socket.socket) -> None:
        """Answer plain HTTP on a TLS port, then wait for the peer to have read it."""
        loop = asyncio.get_running_loop()
        response = self.render(None, HttpError(400, "InvalidRequest", "This port speaks TLS: use https://."))
        body = response.body if isinstance(response.body, bytes) else b""
        wire = response_head(response, length=len(body), chunked=False, close=True) + body
        with sock:
            async with asyncio.timeout(self.limits.linger_timeout_s):
                await loop.sock_sendall(sock, wire)
                sock.shutdown(socket.SHUT_WR)
                while await loop.sock_recv(sock, 64 * 1024):
                    pass

    # -- for connections

    def opened(self, connection: HttpConnection) -> None:
        self._connections.add(connection)
        if self._open_gauge is not None:
            self._open_gauge.add(1)
        if self._closing:
            connection.shut_down()

    def closed(self, connection: HttpConnection) -> None:
        self._connections.discard(connection)
        if self._open_gauge is not None:
            self._open_gauge.add(-1)
        if not self._connections and self._all_gone is not None and not self._all_gone.done():
            self._all_gone.set_result(None)
        self._listen_again()

    def count_sent(self, body_bytes: int) -> None:
        if self._sent_counter is not None:
            self._sent_counter.add(body_bytes)

    async def respond(self, request: Request) -> Response:
        """The handler's answer, or its error's. ConnectionResetError passes: there is nobody to answer."""
        try:
            return await self._handler(request)
        except HttpError as error:
            return self.render(request, error)
        except ConnectionResetError:
            raise
        except Exception:
            _log.exception("request %s: %s %s failed", request.request_id, request.method, request.path)
            return self.render(
                request, HttpError(500, "InternalError", "We encountered an internal error. Please try again.")
            )

    def render(self, request: Request | None, error: HttpError) -> Response:
        try:
            response = self._render_error(request, error)
        except Exception:
            _log.exception("an error answer could not be rendered")
            response = plain_error(request, error)
        response.close = response.close or error.close
        return response

    def finished(self, request: Request, status: int, sent_bytes: int, elapsed_ns: int) -> None:
        if self._observe is not None:
            try:
                self._observe(request, status, sent_bytes, elapsed_ns)
            except Exception:
                _log.exception("request %s: not observed", request.request_id)


async def _peek(sock: socket.socket) -> bytes:
    """The first byte, left in the socket; empty when the peer closed."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            return sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            readable = loop.create_future()
            loop.add_reader(sock.fileno(), _set, readable)
            try:
                await readable
            finally:
                loop.remove_reader(sock.fileno())


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _peer_name(address: object) -> str:
    if isinstance(address, tuple) and len(address) >= 2:
        return f"[{address[0]}]:{address[1]}" if ":" in str(address[0]) else f"{address[0]}:{address[1]}"
    return ""

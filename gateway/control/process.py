"""Runs the application: uvicorn on a listening socket that the supervisor bound, with or without TLS.

In: a FastAPI application, the socket, certificates. Out: served requests until ``stop`` is set, then a graceful end.
A plain HTTP request to the TLS port is told so in HTTP: the first byte of a connection is looked at before TLS begins
(RFC 8446 section 5.1: a handshake record starts with 22), which uvicorn itself has no place for.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator

import uvicorn
from fastapi import FastAPI

from gateway.control import patience
from gateway.control.feedback import websocket

logger = logging.getLogger(__name__)

GRACE_S = 10.0
CONNECTIONS_MAX = 1024
CONNECTIONS_SPARE = 64
"""Kept free by closing idle ones."""
FIRST_BYTE_TIMEOUT_S = 10.0
TLS_HANDSHAKE_TIMEOUT_S = 20.0
KEEP_ALIVE_S = 75
STALL_S = 60.0
"""How long a client may leave what was sent to it unread: TCP's own limit, so that also a closed connection's rest ends."""
SEND_BUFFER_BYTES = 256 << 10
_DESCRIPTOR_PAUSE_S = 0.2

_TLS_HANDSHAKE = b"\x16"
_MESSAGE = b'{"detail":"this port speaks TLS: use https://"}\n'
_PLAIN_ON_TLS = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(_MESSAGE), _MESSAGE)
)


async def serve(
    app: FastAPI,
    listener: socket.socket,
    *,
    stop: asyncio.Event,
    tls: ssl.SSLContext | None = None,
    ready: Callable[[], None] = lambda: None,
    stopping: Callable[[], Awaitable[None]],
) -> None:
    """Serve until ``stop`` is set. ``ready`` is called once requests are accepted; ``stopping`` is awaited before the
    server waits for open answers: it ends the endless ones. The listening socket is closed at the end."""
    # Accepted connections inherit both: a subscriber that takes nothing holds little memory, and is gone after a while.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(STALL_S * 1000))
    config = uvicorn.Config(
        app,
        http=patience.patient_protocol(CONNECTIONS_MAX - CONNECTIONS_SPARE),
        ws="websockets-sansio",
        ws_max_size=websocket.MESSAGE_BYTES_MAX,
        ws_ping_interval=websocket.PING_S,
        ws_ping_timeout=websocket.PONG_TIMEOUT_S,
        ws_per_message_deflate=False,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS_MAX,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=round(GRACE_S),
    )
    server = _Server(config, listener, tls, ready)
    running = asyncio.create_task(server.serve(sockets=[listener]), name="uvicorn")
    stopped = asyncio.create_task(stop.wait(), name="stop")
    await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    await stopping()
    server.should_exit = True
    await running


class _Server(uvicorn.Server):
    """uvicorn that leaves signals to the process, and with ``tls`` accepts connections through ``_TlsDoor``."""

    def __init__(
        self, config: uvicorn.Config, listener: socket.socket, tls: ssl.SSLContext | None, ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._door = _TlsDoor(listener, tls, self._protocol) if tls is not None else None
        self._ready = ready

    def _protocol(self) -> asyncio.Protocol:
        protocol: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[] if self._door is not None else sockets)
        if self._door is not None:
            self._door.open()
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._door is not None:
            await self._door.close()
        await super().shutdown(sockets)


class _TlsDoor:
    """Accepts connections, looks at their first byte, and hands those that speak TLS to ``protocol``."""

    def __init__(self, listener: socket.socket, tls: ssl.SSLContext, protocol: Callable[[], asyncio.Protocol]) -> None:
        self._listener = listener
        self._tls = tls
        self._protocol = protocol
        self._accepting: asyncio.Task[None] | None = None
        self._tasks: dict[asyncio.Task[None], None] = {}
        """Connections at their first bytes, oldest first."""

    def open(self) -> None:
        self._listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept())

    async def close(self) -> None:
        tasks = [*self._tasks, *([self._accepting] if self._accepting is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED):
                    raise
                await asyncio.sleep(_DESCRIPTOR_PAUSE_S)
                continue
            if len(self._tasks) >= CONNECTIONS_MAX - CONNECTIONS_SPARE:
                oldest = next(iter(self._tasks))
                del self._tasks[oldest]
                oldest.cancel()
            task = asyncio.create_task(self._admit(connection))
            self._tasks[task] = None
            task.add_done_callback(lambda done: self._tasks.pop(done, None))

    async def _admit(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            connection.setblocking(False)
            async with asyncio.timeout(FIRST_BYTE_TIMEOUT_S):
                first = await _peek(connection)
            if first == _TLS_HANDSHAKE:
                await loop.connect_accepted_socket(
                    self._protocol,
                    connection,
                    ssl=self._tls,
                    ssl_handshake_timeout=TLS_HANDSHAKE_TIMEOUT_S,
                )
                return
            if first:
                async with asyncio.timeout(FIRST_BYTE_TIMEOUT_S):
                    await loop.sock_recv(connection, 65536)
                    await loop.sock_sendall(connection, _PLAIN_ON_TLS)
        except (OSError, TimeoutError) as error:
            logger.debug("a connection ended before it began: %s", error)
        except asyncio.CancelledError:
            connection.close()
            raise
        connection.close()


async def _peek(connection: socket.socket) -> bytes:
    """The first byte, left where it is; empty when the peer closed."""
    loop = asyncio.get_running_loop()
    readable = loop.create_future()
    descriptor = connection.fileno()

    def arrived() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(descriptor, arrived)
    try:
        await readable
    finally:
        loop.remove_reader(descriptor)
    return connection.recv(1, socket.MSG_PEEK)

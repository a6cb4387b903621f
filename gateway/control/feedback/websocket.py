"""Feedback over WebSocket (RFC 6455), ``ws://…/v1/feedback``: the same events, filters and ids as server-sent events.

In: the same query as for SSE, and ``last_event_id``, for a browser cannot set that header here. Out: text messages, each a JSON
array of events in order, each event an object with ``id``, ``event`` (ready, feedback, gap, expired, failed, heartbeat) and the
fields that SSE has in ``data``. What the client sends is read and ignored. Pings go out every PING_S; who does not answer, or
takes nothing, is closed. A slow client loses events and gets a ``gap``; nothing is queued for it but one message.

Credentials: an ``Authorization: Basic`` field as everywhere, or, for browsers, which cannot set one, a subprotocol
``hiss.basic.BASE64URL(access key:secret key)`` offered beside ``hiss.feedback``. The secret is never in a URL, where logs would
keep it. A browser sends ambient Basic credentials to any page's socket, so with them the Origin must be this host.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from urllib.parse import urlsplit

from starlette.websockets import WebSocket, WebSocketDisconnect

from archive.dav.auth import CREDENTIALS_BYTES_MAX, basic_credentials
from gateway.control.feedback.ring import Form

SUBPROTOCOL = "hiss.feedback"
SECRET_SUBPROTOCOL = "hiss.basic."
PING_S = 10.0
PONG_TIMEOUT_S = 20.0
MESSAGE_BYTES_MAX = 4096
"""Of what a client may send: it has nothing to say."""
GOING_AWAY = 1001


def _one(event_id: bytes, kind: bytes, data: bytes) -> bytes:
    comma = b"" if data == b"{}" else b","
    return b'{"id":"%b","event":"%b"%b%b' % (event_id, kind, comma, data[1:])


def _many(events: list[bytes]) -> bytes:
    return b"[%b]" % b",".join(events)


WEBSOCKET = Form("websocket", _one, _many)


def credentials(headers: Mapping[str, str], subprotocols: Sequence[str]) -> tuple[str, str] | None:
    """(access key, secret key) of a handshake; None when there are none, or they came from another site's page."""
    for offered in subprotocols:
        if offered.startswith(SECRET_SUBPROTOCOL):
            return _from_subprotocol(offered.removeprefix(SECRET_SUBPROTOCOL))
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("host", ""):
        return None
    return basic_credentials(headers.get("authorization", ""))


def _from_subprotocol(encoded: str) -> tuple[str, str] | None:
    if len(encoded) > CREDENTIALS_BYTES_MAX:
        return None
    try:
        padded = encoded + "=" * (-len(encoded) % 4)
        user, colon, password = base64.b64decode(padded, b"-_", validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return (user, password) if colon else None


async def pump(socket: WebSocket, chunks: AsyncIterator[bytes], *, binary: bool = False) -> None:
    """Accept the handshake and send until the client goes or the chunks end."""

    async def text(chunk: bytes) -> None:
        await socket.send_text(chunk.decode())

    await socket.accept(SUBPROTOCOL if SUBPROTOCOL in socket.scope["subprotocols"] else None)
    sending = asyncio.create_task(_send(socket, chunks, socket.send_bytes if binary else text), name="websocket")
    try:
        # Reading is what notices that the client is gone; what it says is ignored.
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                break
    finally:
        sending.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sending


async def _send(
    socket: WebSocket, chunks: AsyncIterator[bytes], send: Callable[[bytes], Coroutine[object, object, None]]
) -> None:
    # The client may go at any moment; ``pump`` sees that.
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        try:
            async for chunk in chunks:
                await send(chunk)
            await socket.close(GOING_AWAY, "the node is stopping")
        finally:
            await chunks.aclose()  # type: ignore[attr-defined]

"""The body of one request: asks the sink for memory, lets the kernel fill it, keeps the framing's account.

Upstream: ``HttpConnection`` calls ``buffer`` and ``updated`` for every read while the body is being received.
Downstream: a handler awaits ``read`` or ``into`` once; all reads in between run in the connection's callbacks, without
waking the handler's task. Payload goes straight into the sink where the framing promises a long run of it, else through
the connection's inbox and one ``memmove``.

Always holds: the sink is never offered more than the payload; reading is paused while the sink has no memory and while
framing of very small chunks is caught up with, so neither memory nor one callback's time grows with what a peer sends.
"""

from __future__ import annotations

import asyncio
import fcntl
import sys
import termios
from typing import Protocol

from ingest.errors import IngestError
from ingest.ports import BodySink
from s3api.http.chunked import AwsChunkedFraming, ChunkVerifier, Framing, LengthFraming, NestedFraming, incomplete
from s3api.http.inbox import Inbox
from s3api.http.limits import HttpLimits
from s3api.http.message import Headers, HttpError

# Runs of payload or framing moved out of the inbox before the loop gets its turn: about a millisecond.
_PUMP_STEPS = 400
# Read this much of the framing between long chunks, so that their payload stays for the next read, in place.
_FRAMING_WINDOW_BYTES = 4096
_NO_BYTES = bytes(4)
_SCRATCH = memoryview(bytearray(256 * 1024))


class Wire(Protocol):
    """What a body needs of its connection."""

    inbox: Inbox

    def socket_fd(self) -> int: ...
    def set_window(self, size_bytes: int) -> None: ...
    def begin_body(self, body: RequestBody) -> None:
        """Reads go to ``body`` from now on; a peer that waits for 100 Continue gets it."""
        ...

    def end_body(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


class RequestBody:
    """Implements ``message.Body``."""

    def __init__(self, wire: Wire, framing: Framing, length: int | None, limits: HttpLimits) -> None:
        self._wire = wire
        self._outer = framing
        self._framing = framing
        self._length = length
        self._limits = limits
        self._in_place_bytes = 1 if length is not None else limits.direct_bytes
        self._long_runs = False
        self._used = False
        self._broken = False
        self._finished = framing.done
        self._starved = False
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._sink: BodySink | None = None
        self._direct: memoryview | None = None
        self._payload_bytes = 0
        self.patient = False
        """The pace of the body is judged elsewhere: by the node that it comes from."""

    # -- for the handler

    @property
    def length(self) -> int | None:
        return self._length

    @property
    def trailers(self) -> Headers:
        return Headers([(name.lower(), value) for name, value in self._framing.trailers])

    def unwrap_aws_chunked(
        self, decoded_length: int | None, signed: bool, trailer: bool, verifier: ChunkVerifier | None
    ) -> None:
        if self._used or self._framing is not self._outer:
            raise RuntimeError("the body's coding is settled before its first byte is read")
        inner = AwsChunkedFraming(
            self._limits, decoded_length=decoded_length, signed=signed, trailer=trailer, verifier=verifier
        )
        self._framing = NestedFraming(self._outer, inner)
        self._finished = False
        self._length = decoded_length
        self._in_place_bytes = self._limits.direct_bytes

    async def read(self, limit_bytes: int) -> bytes:
        sink = _MemorySink(limit_bytes, self._length)
        await self.into(sink)
        return sink.value()

    async def into(self, sink: BodySink) -> int:
        if self._used:
            raise RuntimeError("the body was already received")
        self._used = True
        await self._receive(sink)
        return self._payload_bytes

    # -- for the connection

    @property
    def received(self) -> bool:
        """Every byte of the body has left the wire."""
        return self._finished and not self._broken

    @property
    def unread_bytes(self) -> int | None:
        """Bytes of the body still on the wire; None when unknown, or when its framing cannot be trusted."""
        if self._broken or not isinstance(self._outer, LengthFraming):
            return None
        return self._outer.payload_left

    @property
    def payload_bytes(self) -> int:
        """What has come so far."""
        return self._payload_bytes

    @property
    def starved(self) -> bool:
        """No memory to receive into: the peer is not to blame for the silence."""
        return self._starved

    @property
    def in_chunks(self) -> bool:
        return not isinstance(self._framing, LengthFraming)

    def backlog(self) -> int:
        """Bytes in the socket (FIONREAD of ioctl(2)): over TLS, as they come."""
        try:
            answer = fcntl.ioctl(self._wire.socket_fd(), termios.FIONREAD, _NO_BYTES)
        except (OSError, ValueError, AttributeError):
            return 0  # the connection has gone
        return int.from_bytes(answer, sys.byteorder)

    def set_window(self, size_bytes: int) -> None:
        self._wire.set_window(size_bytes)

    async def discard(self) -> None:
        """Receive what is left of a body of known length and drop it."""
        self._framing = self._outer
        self._finished = self._outer.done
        self._error = None
        await self._receive(_DiscardSink())

    def fail(self, error: BaseException) -> None:
        """The wire is gone, silent, or at its end."""
        if self._finished or self._error is not None:
            return
        self._error = error
        if not isinstance(error, IngestError):
            self._broken = True
        self._signal()

    def buffer(self) -> memoryview:
        """Memory for the next read: the sink's own when payload comes next, else the inbox."""
        inbox = self._wire.inbox
        left = self._framing.payload_left
        if left >= self._in_place_bytes and not len(inbox) and self._sink is not None:
            try:
                view = self._sink.get_buffer()
            except Exception as error:
                # Raised through the transport it would break the connection, and nobody would be told why. One read
                # still comes, into the empty inbox: ``updated`` pauses then (uvloop crashes when paused from here).
                self.fail(error)
                view = None
            if view is not None:
                most = min(left, self._limits.receive_bytes)
                self._direct = view if len(view) <= most else view[:most]
                return self._direct
        self._direct = None
        room = inbox.room()
        return room[:_FRAMING_WINDOW_BYTES] if self._long_runs and not left else room

    def updated(self, count: int) -> None:
        """``count`` bytes were read into the last ``buffer``."""
        view = self._direct
        if view is None:
            self._wire.inbox.end += count
            self._advance()
            return
        self._direct = None
        try:
            assert self._sink is not None
            self._framing.payload(view if count == len(view) else view[:count])
            self._payload_bytes += count
            self._sink.received(count)
            if self._framing.done:
                self._finish()
        except Exception as error:
            self._give_up(error)

    # -- receiving

    async def _receive(self, sink: BodySink) -> None:
        if self._finished:
            return
        self._sink = sink
        self._wire.begin_body(self)
        try:
            self._advance()
            while not self._finished:
                if self._error is not None:
                    raise self._error
                if self._starved:
                    await sink.writable()
                    self._starved = False
                    self._advance()
                    continue
                self._wire.resume_reading()
                self._waiter = asyncio.get_running_loop().create_future()
                try:
                    await self._waiter
                finally:
                    self._waiter = None
        except BaseException as error:
            self.fail(error)
            raise
        finally:
            self._sink = self._direct = None
            self._wire.end_body()

    def _advance(self) -> None:
        """Use what is in the inbox, as far as memory and this turn's share of time go."""
        if self._error is not None:
            self._wire.pause_reading()
            return
        if self._sink is None:
            return
        try:
            if self._pump(self._sink):
                self._finish()
        except Exception as error:
            self._give_up(error)

    def _pump(self, sink: BodySink) -> bool:
        """Move framing to the decoder and payload to the sink; True once the body is complete."""
        framing, inbox = self._framing, self._wire.inbox
        view: memoryview | None = None
        filled = 0
        for _ in range(_PUMP_STEPS):
            if inbox.start == inbox.end or framing.done:
                break
            left = framing.payload_left
            if not left:
                inbox.start = framing.take(inbox.data, inbox.start, inbox.end)
                self._long_runs = framing.payload_left >= self._limits.read_ahead_bytes
                continue
            if view is None:
                view = sink.get_buffer()
                if view is None:
                    self._starved = True
                    self._wire.pause_reading()
                    self._signal()
                    return False
                filled = 0
            count = min(left, len(inbox), len(view) - filled)
            place = view[filled : filled + count]
            place[:] = inbox.view[inbox.start : inbox.start + count]
            framing.payload(place)
            inbox.start += count
            filled += count
            self._payload_bytes += count
            if filled == len(view):
                view = None
                sink.received(filled)
        else:
            self._wire.pause_reading()
            asyncio.get_running_loop().call_soon(self._go_on)
        if view is not None:
            sink.received(filled)
        return framing.done

    def _go_on(self) -> None:
        """Another turn for a peer whose chunks are tiny."""
        if self._finished or self._starved or self._sink is None:
            return
        self._wire.resume_reading()
        self._advance()

    def _finish(self) -> None:
        self._finished = True
        self._sink = None
        self._wire.end_body()
        self._signal()

    def _give_up(self, error: Exception) -> None:
        """``fail``, and leave in the socket what comes before the handler's turn: the inbox might not hold it."""
        self.fail(error)
        self._wire.pause_reading()

    def _signal(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _MemorySink:
    """Collects a control document, up to a limit."""

    def __init__(self, limit_bytes: int, length: int | None) -> None:
        if length is not None and length > limit_bytes:
            raise self._too_large(limit_bytes)
        self._limit = limit_bytes
        self._data = bytearray(min(length + 1 if length is not None else 16 * 1024, limit_bytes + 1))
        self._count = 0

    @staticmethod
    def _too_large(limit_bytes: int) -> HttpError:
        return HttpError(413, "EntityTooLarge", f"The body must not be longer than {limit_bytes} bytes.", close=True)

    def get_buffer(self) -> memoryview:
        if self._count == len(self._data):
            grown = bytearray(min(2 * len(self._data), self._limit + 1))
            grown[: self._count] = self._data
            self._data = grown
        return memoryview(self._data)[self._count :]

    def received(self, count: int) -> None:
        self._count += count
        if self._count > self._limit:
            raise self._too_large(self._limit)

    async def writable(self) -> None:
        return

    def value(self) -> bytes:
        return bytes(memoryview(self._data)[: self._count])


class _DiscardSink:
    """Forgets everything; all connections share the scratch memory, for nobody reads it."""

    def get_buffer(self) -> memoryview:
        return _SCRATCH

    def received(self, count: int) -> None:
        return

    async def writable(self) -> None:
        return


def scratch() -> memoryview:
    """Memory for bytes that are read only to be dropped."""
    return _SCRATCH


def short_body() -> HttpError:
    return incomplete()

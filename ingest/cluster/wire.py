"""One HTTP/1.1 connection to another node: heads out, memory out, answers and memory in.

In: request heads, views of memory to send. Out: the answer's status and fields, its body in a few buffers that are used
again and again. Always holds: one request at a time; no byte of a body becomes a ``bytes``; memory does not grow with the
body (reading pauses while every buffer waits to be used); every wait ends after ``stall_s`` without progress.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import re
from typing import cast

_INBOX_BYTES = 16 << 10
RING_BUFFERS = 3
"""One is with whoever reads, one is being filled, one is ready."""
_STATUS = re.compile(rb"HTTP/1\.1 ([1-5]\d\d)(?: [^\r\n]*)?")


class WireError(Exception):
    """The connection is lost, silent, or says what cannot be understood; ``str()`` is fit for a client."""


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    status: int
    fields: dict[str, str]
    """Names in lower case."""
    length: int
    keep: bool
    """The connection can take another request."""


class Ring:
    """Buffers of one body: filled by the connection, read by its user, filled again."""

    def __init__(self, size_bytes: int, count: int = RING_BUFFERS) -> None:
        self._free = collections.deque(memoryview(bytearray(size_bytes)) for _ in range(count))
        self._full: collections.deque[memoryview] = collections.deque()
        self._filling: memoryview | None = None
        self._fill = 0
        self._taken: memoryview | None = None

    @property
    def starved(self) -> bool:
        """No memory to receive into."""
        return self._filling is None and not self._free

    def room(self) -> memoryview:
        if self._filling is None:
            self._filling = self._free.popleft()
            self._fill = 0
        return self._filling[self._fill :]

    def filled(self, count: int) -> None:
        assert self._filling is not None
        self._fill += count
        if self._fill == len(self._filling):
            self._full.append(self._filling)
            self._filling = None

    def take(self) -> memoryview | None:
        """The oldest bytes that are there. They are valid until the next call, which gives their memory back."""
        if self._taken is not None:
            self._free.append(self._taken)
            self._taken = None
        if self._full:
            self._taken = self._full.popleft()
            return self._taken
        if self._filling is not None and self._fill:
            self._taken, self._filling = self._filling, None
            return self._taken[: self._fill]
        return None


def parse_answer(head: bytes) -> Answer:
    """An answer's head, without the empty line. Raises WireError: only what a node of ours sends is understood."""
    first, *lines = head.split(b"\r\n")
    status = _STATUS.fullmatch(first)
    if status is None:
        raise WireError("its answer is not HTTP/1.1")
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon:
            raise WireError("its answer has a field without a name")
        fields[name.decode("latin-1").lower()] = value.strip().decode("latin-1")
    length = fields.get("content-length", "0")
    if "transfer-encoding" in fields or not (length.isascii() and length.isdigit() and len(length) < 20):
        raise WireError("its answer has no known length")
    return Answer(int(status[1]), fields, int(length), fields.get("connection", "").lower() != "close")


class Wire(asyncio.BufferedProtocol):
    """The connection. Made by ``loop.create_connection``; one request at a time, by one task."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._transport: asyncio.Transport | None = None
        self._inbox = memoryview(bytearray(_INBOX_BYTES))
        self._inbox_start = self._inbox_end = 0
        self._left = 0
        """Bytes of the body that have not come."""
        self._ring: Ring | None = None
        self._answer: Answer | None = None
        self._error: WireError | None = None
        self._paused = False
        self._writing_paused = False
        self._moved = False
        self._readable: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None

    # -- transport callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class: not an asyncio.Transport by type
        # A high mark of one byte makes resume_writing mean: everything is out, its memory may be used again.
        self._transport.set_write_buffer_limits(1, 0)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._ring is not None and self._left and not self._ring.starved:
            return self._ring.room()[: self._left]
        return self._inbox[self._inbox_end :] or memoryview(bytearray(1))

    def buffer_updated(self, nbytes: int) -> None:
        self._moved = True
        if self._ring is not None and self._left:
            self._ring.filled(nbytes)
            self._left -= nbytes
            if self._ring.starved and self._left:
                self._pause()
        else:
            self._inbox_end += nbytes
            if self._inbox_end > len(self._inbox):
                self.fail("it sends what nobody asked for")
                return
            self._find_answer()
        self._wake(self._readable)

    def eof_received(self) -> bool:
        self.fail("it closed the connection")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail("the connection was lost" if exc is not None else "it closed the connection")

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._wake(self._writable)

    # -- for the user

    @property
    def alive(self) -> bool:
        return self._error is None

    @property
    def answered(self) -> bool:
        """An answer has come that ``answer`` has not given out."""
        return self._answer is not None

    def write(self, data: bytes | memoryview) -> None:
        """Small things: heads and framing. They go out with what follows."""
        if self._error is not None:
            raise self._error
        assert self._transport is not None
        if self._transport.is_closing():
            raise WireError("the connection was lost")
        self._transport.write(data)

    async def send(self, view: memoryview) -> None:
        """Send ``view``; its memory is free again on return."""
        self.write(view)
        await self.drained()

    async def drained(self) -> None:
        """Everything written is with the operating system. Raises WireError; nothing is read from its memory then, either."""
        transport = self._transport
        assert transport is not None
        await asyncio.sleep(0)  # others' turn, however fast the other side is
        unsent = transport.get_write_buffer_size()
        while self._writing_paused or unsent:
            if self._error is not None:
                raise self._error
            self._writable = asyncio.get_running_loop().create_future()
            if not await self._waited(self._writable) and transport.get_write_buffer_size() >= unsent:
                self.fail(f"it took nothing for {self._stall_s:g} seconds")
            unsent = transport.get_write_buffer_size()
        if self._error is not None:
            raise self._error

    async def answer(self, timeout_s: float) -> Answer:
        """The next answer's head (an interim one too). Raises WireError."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self._answer is None:
            if self._error is not None:
                raise self._error
            left = deadline - loop.time()
            if left <= 0:
                self.fail(f"it did not answer within {timeout_s:g} seconds")
                continue
            self._readable = loop.create_future()
            await self._waited(self._readable, left)
        answer, self._answer = self._answer, None
        if answer.status < 200:
            self._find_answer()
        return answer

    def rest(self) -> bool:
        """Between two requests: read on, to learn of the other side's closing. False where the connection is of no use."""
        if self._error is not None or self._left or self._answer is not None or self._inbox_start < self._inbox_end:
            return False
        self._ring = None
        self._inbox_start = self._inbox_end = 0
        self._resume()
        return True

    def receive(self, length: int, ring: Ring) -> None:
        """The body of the answer, ``length`` bytes, goes into ``ring``: ask ``take`` for it."""
        self._ring = ring
        self._left = length - (self._inbox_end - self._inbox_start)
        if self._left < 0:
            self.fail("it sent more than it said")
        self._resume()

    async def take(self) -> memoryview | None:
        """The next bytes of the body, valid until the next call; None at its end. Raises WireError."""
        ring = self._ring
        assert ring is not None
        if self._inbox_start < self._inbox_end:
            early = self._inbox[self._inbox_start : self._inbox_end]
            self._inbox_start = self._inbox_end
            return early
        while True:
            view = ring.take()
            if self._left and not ring.starved:
                self._resume()
            if view is not None:
                return view
            if not self._left:
                self._ring = None
                self._inbox_start = self._inbox_end = 0
                return None
            if self._error is not None:
                raise self._error
            self._readable = asyncio.get_running_loop().create_future()
            self._moved = False
            if not await self._waited(self._readable) and not self._moved:
                self.fail(f"it sent nothing for {self._stall_s:g} seconds")

    async def document(self, length: int, limit: int) -> bytes:
        """The whole body of a small answer."""
        if length > limit:
            self.fail(f"its answer is longer than {limit} bytes")
        if self._error is not None:
            raise self._error
        whole = bytearray()
        self.receive(length, Ring(max(1, min(length, 64 << 10)), 2))
        while (view := await self.take()) is not None:
            whole += view
        return bytes(whole)

    def fail(self, reason: str) -> None:
        """Give the connection up."""
        if self._error is None:
            self._error = WireError(reason)
            if self._transport is not None:
                self._transport.abort()
        self._wake(self._readable)
        self._wake(self._writable)

    # -- inside

    def _find_answer(self) -> None:
        if self._answer is not None:
            return
        seen = bytes(self._inbox[self._inbox_start : self._inbox_end])
        end = seen.find(b"\r\n\r\n")
        if end < 0:
            if self._inbox_end == len(self._inbox):
                self.fail("its answer's head is too long")
            return
        try:
            self._answer = parse_answer(seen[:end])
        except WireError as error:
            self.fail(str(error))
            return
        self._inbox_start += end + 4
        if self._answer.status >= 200:
            # What follows is the body, and where it goes is not known before somebody has looked at the head.
            self._pause()

    def _pause(self) -> None:
        if not self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()

    async def _waited(self, future: asyncio.Future[None], timeout_s: float | None = None) -> bool:
        done, _ = await asyncio.wait((future,), timeout=self._stall_s if timeout_s is None else timeout_s)
        return bool(done)

    @staticmethod
    def _wake(future: asyncio.Future[None] | None) -> None:
        if future is not None and not future.done():
            future.set_result(None)

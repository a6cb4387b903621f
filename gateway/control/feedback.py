"""The feedback hub: what kernels emit, from the workers to whoever subscribed, within a millisecond.

In: batches of ``FeedbackEvent`` from the workers' connections (kernels.feedback writes them: a 4-byte little-endian
length and a msgpack list). Out: server-sent events (WHATWG HTML section 9.2), one stream a subscriber.

A bucket's events lie in a ring and carry ids ``EPOCH-NUMBER``; a subscriber is only a position in the ring. So a slow
one costs no memory and delays nobody: once the ring has overtaken it, it gets a ``gap`` event that says how many it
lost. The same happens to one that comes back (Last-Event-ID) too late, or after a restart, which a new epoch tells.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import secrets
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path

import msgspec

from ingest.counters import Counters
from ingest.paths import socket_address
from ingest.ports import FeedbackEvent

logger = logging.getLogger(__name__)

RING_EVENTS = 16_384
RINGS_MAX = 512
SUBSCRIBERS_MAX = 256
CHUNK_EVENTS = 256
"""Events rendered into one write to a subscriber."""
SCAN_EVENTS = 4096
"""Events a filtering subscriber passes over before it lets others run."""
HEARTBEAT_S = 10.0
MESSAGE_BYTES_MAX = 4 << 20
KEY_BYTES_SHOWN_MAX = 1024

_DECODER = msgspec.msgpack.Decoder(list[FeedbackEvent])


class TooManySubscribers(Exception):
    """SUBSCRIBERS_MAX streams are open."""


class _Shown(msgspec.Struct, omit_defaults=True):
    """An event as subscribers see it."""

    bucket: str
    key: str
    kernel: str
    frame: int
    code: int
    value: float
    time_ns: int
    key_base64: str = ""
    """Only for a key that is not UTF-8."""


class _Gap(msgspec.Struct):
    reason: str
    """``slow``, ``expired`` (away too long) or ``restart``."""
    lost: int | None
    """Events of the bucket that were passed over; None after a restart, when nobody knows."""
    exact: bool
    """False where a filter is set: some of the lost ones may not have matched it."""


def _data(event: FeedbackEvent) -> bytes:
    key = event.key[:KEY_BYTES_SHOWN_MAX]
    try:
        text, encoded = key.decode(), ""
    except UnicodeDecodeError:
        text, encoded = key.decode("utf-8", "replace"), base64.b64encode(event.key).decode()
    shown = _Shown(
        event.bucket, text, event.kernel, event.frame, event.code, event.value, event.time_ns, encoded
    )  # fmt: skip
    return msgspec.json.encode(shown)


class Ring:
    """The last events of one bucket. Numbers start at 1 and have no holes."""

    def __init__(self, size: int = RING_EVENTS) -> None:
        self.epoch = secrets.token_hex(6)
        self.next = 1
        self.subscribers = 0
        self._size = size
        self._events: list[tuple[str, bytes, bytes]] = []
        self._waiters: set[asyncio.Future[None]] = set()

    @property
    def oldest(self) -> int:
        """Number of the oldest event still held (``next`` when there is none)."""
        return self.next - len(self._events)

    def append(self, events: Iterable[FeedbackEvent]) -> None:
        for event in events:
            entry = (event.kernel, event.key, _data(event))
            if len(self._events) < self._size:
                self._events.append(entry)
            else:
                self._events[(self.next - 1) % self._size] = entry
            self.next += 1

    def wake(self) -> None:
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def changed(self, timeout_s: float) -> bool:
        """Wait for the next ``wake``; False when there was none in time."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
            return True
        except TimeoutError:
            return False
        finally:
            self._waiters.discard(waiter)

    def since(self, number: int) -> Iterator[tuple[int, str, bytes, bytes]]:
        """(number, kernel, key, data) from ``number`` on, which must not be older than ``oldest``."""
        for current in range(number, self.next):
            yield (current, *self._events[(current - 1) % self._size])

    def position(self, last_event_id: str) -> tuple[int, _Gap | None]:
        """Where a subscriber goes on that saw ``last_event_id`` last, and what it has lost."""
        epoch, _, number = last_event_id.rpartition("-")
        seen = int(number) if number.isascii() and number.isdigit() and len(number) < 19 else self.next
        if epoch != self.epoch or seen >= self.next:
            return self.oldest, _Gap("restart", None, False)
        if seen + 1 < self.oldest:
            return self.oldest, _Gap("expired", self.oldest - seen - 1, True)
        return seen + 1, None


class FeedbackHub:
    """One for the node, in the control process. ``listen`` then ``close`` on its loop."""

    def __init__(self, counters: Counters, *, ring_events: int = RING_EVENTS, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._ring_events = ring_events
        self._heartbeat_s = heartbeat_s
        self._rings: dict[str, Ring] = {}
        self._subscribers = counters.cell("hiss_feedback_subscribers")
        self._subscribers.set(0)
        self._open = 0
        self._closed = False
        self._server: asyncio.Server | None = None
        self._workers: set[asyncio.Task[None]] = set()

    # -- from the workers

    async def listen(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._server = await asyncio.start_unix_server(self._worker, socket_address(path))

    async def _worker(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._workers.add(task)
        try:
            while True:
                length = int.from_bytes(await reader.readexactly(4), "little")
                if length > MESSAGE_BYTES_MAX:
                    raise ValueError(f"a feedback message of {length} bytes")
                self.publish(_DECODER.decode(await reader.readexactly(length)))
        except (asyncio.IncompleteReadError, ConnectionError):
            logger.debug("a worker closed its feedback connection")
        except (ValueError, msgspec.MsgspecError) as error:
            logger.warning("closed a feedback connection: %s", error)
        finally:
            self._workers.discard(task)
            writer.close()

    def publish(self, events: Iterable[FeedbackEvent]) -> None:
        """Hand events to the subscribers of their buckets; never waits."""
        touched = {}
        for event in events:
            ring = self._ring(event.bucket)
            ring.append((event,))
            touched[id(ring)] = ring
        for ring in touched.values():
            ring.wake()

    def _ring(self, bucket: str) -> Ring:
        ring = self._rings.pop(bucket, None)
        if ring is None:
            if len(self._rings) >= RINGS_MAX:
                # The bucket that was quiet for longest; one somebody listens to is kept (there are at most SUBSCRIBERS_MAX).
                quiet = next(name for name, held in self._rings.items() if not held.subscribers)
                del self._rings[quiet]
            ring = Ring(self._ring_events)
        self._rings[bucket] = ring
        return ring

    # -- to the subscribers

    def subscribe(self, bucket: str, *, kernel: str, key_prefix: bytes, last_event_id: str) -> AsyncIterator[bytes]:
        """A stream of server-sent events; empty filters match everything. Raises TooManySubscribers."""
        if self._closed or self._open >= SUBSCRIBERS_MAX:
            raise TooManySubscribers
        return self._stream(bucket, kernel, key_prefix, last_event_id)

    async def _stream(self, bucket: str, kernel: str, key_prefix: bytes, last_event_id: str) -> AsyncIterator[bytes]:
        ring = self._ring(bucket)
        self._count(ring, 1)
        try:
            position, gap = ring.position(last_event_id) if last_event_id else (ring.next, None)
            yield b"retry: 1000\n" + _event(ring, position - 1, b"ready", b"{}")
            filtered = bool(kernel or key_prefix)
            while not self._closed:
                if position < ring.oldest:
                    gap = _Gap("slow", ring.oldest - position, True)
                    position = ring.oldest
                if gap is not None:
                    gap.exact = gap.exact and not filtered
                    yield _event(ring, position - 1, b"gap", msgspec.json.encode(gap))
                    gap = None
                    continue
                chunk, position = _matching(ring, position, kernel, key_prefix)
                if chunk:
                    yield chunk
                elif position < ring.next:
                    await asyncio.sleep(0)
                elif not await ring.changed(self._heartbeat_s):
                    # An id without data only moves the browser's Last-Event-ID on, past what the filter left out.
                    yield b": heartbeat\nid: %b-%d\n\n" % (ring.epoch.encode(), position - 1)
        finally:
            self._count(ring, -1)

    def _count(self, ring: Ring, step: int) -> None:
        ring.subscribers += step
        self._open += step
        self._subscribers.set(self._open)

    async def close(self) -> None:
        """End every stream and every worker's connection."""
        self._closed = True
        for ring in self._rings.values():
            ring.wake()
        if self._server is not None:
            self._server.close()
        workers = list(self._workers)
        for task in workers:
            task.cancel()
        for task in workers:
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _event(ring: Ring, number: int, name: bytes, data: bytes) -> bytes:
    return b"id: %b-%d\nevent: %b\ndata: %b\n\n" % (ring.epoch.encode(), number, name, data)


def _matching(ring: Ring, position: int, kernel: str, key_prefix: bytes) -> tuple[bytes, int]:
    """The next matching events as one chunk, and the position after the last one looked at."""
    pieces: list[bytes] = []
    start = position
    for number, of_kernel, key, data in ring.since(position):
        if len(pieces) == CHUNK_EVENTS or number - start == SCAN_EVENTS:
            break
        if (not kernel or of_kernel == kernel) and key.startswith(key_prefix):
            pieces.append(_event(ring, number, b"feedback", data))
        position = number + 1
    return b"".join(pieces), position

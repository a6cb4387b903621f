"""Kernels' feedback on its way to the control process: a stream socket, a bounded queue, a rate limit for each kernel.

In: ``publish``, ``stream_opened`` and ``stream_closed`` from the event loop, at once and never blocking. Out: messages on
``run/feedback.sock``, each a 4-byte little-endian length and msgpack: ``Events``, or ``Streams``, which of the worker's
streams run now (decode with ``DECODER``). What always holds: a kernel that emits too much, or a control process that is
slow or away, costs events (counted), never memory and never a frame; every new connection begins with ``Streams``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import cast

import msgspec

from ingest.counters import Counters
from ingest.ports import FeedbackEvent

log = logging.getLogger("hiss.kernels")

QUEUE_EVENTS_MAX = 65_536
MESSAGE_EVENTS_MAX = 512
BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 2.0
BUCKETS_OF_RATE_MAX = 4096
STREAMS_EVERY_S = 0.05
"""An opening is told at once, closings together after this time: a series of short streams is told of as one."""
STREAMS_TOLD_MAX = 4096


class Events(msgspec.Struct, tag="events"):
    events: list[FeedbackEvent]


class Streams(msgspec.Struct, tag="streams"):
    """(bucket, kernel) of every stream of the sender that is arriving now, each pair once."""

    running: list[tuple[str, str]]


DECODER = msgspec.msgpack.Decoder(Events | Streams)
_ENCODER = msgspec.msgpack.Encoder()


class Allowance:
    """A token bucket: ``rate_per_s`` on average, ``burst`` at once."""

    __slots__ = ("_burst", "_left", "_rate_per_s", "_then_s")

    def __init__(self, rate_per_s: float, burst: float, now_s: float) -> None:
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._left = burst
        self._then_s = now_s

    def take(self, wanted: int, now_s: float) -> int:
        """How many of ``wanted`` may pass now."""
        self._left = min(self._burst, self._left + (now_s - self._then_s) * self._rate_per_s)
        self._then_s = now_s
        granted = min(wanted, int(self._left))
        self._left -= granted
        return granted


class _Wire(asyncio.Protocol):
    """One connection: tells the sender when there is room and when it is gone. The peer sends nothing."""

    def __init__(self, sender: SocketFeedback) -> None:
        self._sender = sender
        self.transport: asyncio.Transport | None = None
        self.room = True
        self.closed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not inherit from asyncio's.
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=1 << 20)

    def pause_writing(self) -> None:
        self.room = False

    def resume_writing(self) -> None:
        self.room = True
        self._sender.room_again()

    def connection_lost(self, exc: Exception | None) -> None:
        self.room = False
        self.closed.set()


class SocketFeedback:
    """The ``FeedbackSink`` of a worker. ``start`` and ``close`` on the loop that publishes."""

    def __init__(
        self,
        address: Callable[[], str],
        counters: Counters,
        *,
        rate_per_s: float = 10_000.0,
        burst: int = 10_000,
        queue_events_max: int = QUEUE_EVENTS_MAX,
    ) -> None:
        """``address``: where the control process listens; asked once, on ``start``, for it may open a folder
        (ingest.paths.socket_address)."""
        self._address = address
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._queue_events_max = queue_events_max
        self._queue: deque[FeedbackEvent] = deque()
        self._streams: Counter[tuple[str, str]] = Counter()
        self._streams_told: list[tuple[str, str]] = []
        self._streams_timer: asyncio.TimerHandle | None = None
        self._allowances: dict[tuple[str, str], Allowance] = {}
        self._taken = counters.cell("hiss_feedback_events_total")
        self._dropped = counters.cell("hiss_feedback_dropped_total")
        self._wire: _Wire | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._keep_connected(), name="feedback")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self.flush()
        self._tell_streams()
        if self._wire is not None and self._wire.transport is not None:
            self._wire.transport.close()

    def publish(self, events: Sequence[FeedbackEvent]) -> None:
        """Send now if there is room, else queue, else drop and count. All events of a call are of one kernel."""
        if not events:
            return
        granted = self._allowance(events[0]).take(len(events), time.monotonic())
        room = self._queue_events_max - len(self._queue)
        accepted = min(granted, room)
        self._taken.add(accepted)
        self._dropped.add(len(events) - accepted)
        self._queue.extend(events[:accepted])
        self.flush()

    def stream_opened(self, bucket: str, kernels: Sequence[str]) -> None:
        """See ``FeedbackSink``."""
        pairs = [(bucket, kernel) for kernel in kernels]
        self._streams.update(pairs)
        # At once: should this process die now, its stream's silence must count.
        if any(pair not in self._streams_told for pair in pairs):
            self._tell_streams()

    def stream_closed(self, bucket: str, kernels: Sequence[str]) -> None:
        """See ``FeedbackSink``."""
        for kernel in kernels:
            self._streams[bucket, kernel] -= 1
            if self._streams[bucket, kernel] <= 0:
                del self._streams[bucket, kernel]
        if self._streams_timer is None:
            self._streams_timer = asyncio.get_running_loop().call_later(STREAMS_EVERY_S, self._tell_streams)

    def flush(self) -> None:
        while self._queue and self._wire is not None and self._wire.room:
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), MESSAGE_EVENTS_MAX))]
            self._send(Events(batch))

    def room_again(self) -> None:
        self.flush()
        self._tell_streams()

    def _tell_streams(self) -> None:
        """Events first: what a stream emitted is known before its end is."""
        if self._streams_timer is not None:
            self._streams_timer.cancel()
            self._streams_timer = None
        running = sorted(self._streams)[:STREAMS_TOLD_MAX]
        if running != self._streams_told and not self._queue and self._wire is not None and self._wire.room:
            self._streams_told = running
            self._send(Streams(running))

    def _send(self, message: Events | Streams) -> None:
        assert self._wire is not None
        assert self._wire.transport is not None
        body = _ENCODER.encode(message)
        self._wire.transport.write(len(body).to_bytes(4, "little") + body)

    def _allowance(self, event: FeedbackEvent) -> Allowance:
        owner = (event.bucket, event.kernel)
        found = self._allowances.get(owner)
        if found is None:
            if len(self._allowances) >= BUCKETS_OF_RATE_MAX:
                self._allowances.clear()
            found = self._allowances[owner] = Allowance(self._rate_per_s, self._burst, time.monotonic())
        return found

    async def _keep_connected(self) -> None:
        loop = asyncio.get_running_loop()
        address = self._address()
        backoff_s = BACKOFF_FIRST_S
        while True:
            try:
                _, wire = await loop.create_unix_connection(lambda: _Wire(self), address)
            except OSError:
                await asyncio.sleep(backoff_s)
                backoff_s = min(BACKOFF_MAX_S, 2 * backoff_s)
                continue
            backoff_s = BACKOFF_FIRST_S
            self._wire = wire
            self._streams_told = sorted(self._streams)[:STREAMS_TOLD_MAX]
            self._send(Streams(self._streams_told))
            self.flush()
            await wire.closed.wait()
            self._wire = None
            log.info("the control process closed the feedback connection; connecting again")
            await asyncio.sleep(backoff_s)

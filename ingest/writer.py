"""From the arena to the disk: writes, group flushes, lazy write-back, and what happens when a file fails.

In: ``WriteItem``s (an aligned piece of memory and its place in a segment). Out: ``on_durable`` once a flush that began after the
write has succeeded, or ``on_storage_failed`` when the segment was retired: the owner then moves its items elsewhere, because the
bytes are still in the arena. Flush rule: 64 MiB or 20 ms after the first unflushed write, at once where somebody waits.
One event loop owns a writer; only ``WriteItem.work`` runs in threads.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Protocol

from ingest.segments import Segment, SegmentStore

logger = logging.getLogger(__name__)

FLUSH_BYTES = 64 << 20
FLUSH_AFTER_S = 0.020
LAZY_AFTER_S = 1.0
LAZY_ARENA_SHARE = 0.5
"""Lazy writing starts when spans fill this share of the arena, or when the oldest item is LAZY_AFTER_S old."""
LAZY_IN_FLIGHT_MAX = 4
REHOMES_MAX = 3
"""Times one body is moved away from failing segments before it is given up."""
MOVE_RETRY_S = 1.0
"""A body that cannot be given up, because it was acknowledged, is moved again this much later."""


class WriteItem(Protocol):
    """One aligned write. ``segment`` may change between attempts (``Writer`` reads it when the item is submitted)."""

    @property
    def segment(self) -> Segment: ...
    @property
    def size_bytes(self) -> int: ...

    @property
    def awaited(self) -> bool:
        """Somebody waits: flush as soon as it is written."""
        ...

    def begin(self) -> Callable[[], None]:
        """Submitted: what a thread is to do (compute and write; raises OSError), with its place as it is now. The memory
        stays as it is until ``on_written``."""
        ...

    def on_written(self, segment: Segment) -> bool:
        """Back on the loop; False if the item was moved to another segment meanwhile (this write counts for nothing)."""
        ...

    def on_durable(self, segment: Segment) -> None: ...
    def on_storage_failed(self, segment: Segment, error: OSError) -> None: ...


class Writer:
    def __init__(self, store: SegmentStore, executor: Executor, arena_share: Callable[[], float]) -> None:
        self._store = store
        self._executor = executor
        self._arena_share = arena_share
        self._unflushed: dict[Segment, list[WriteItem]] = {}
        self._writing: dict[Segment, set[WriteItem]] = collections.defaultdict(set)
        self._timers: dict[Segment, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._lazy: collections.OrderedDict[WriteItem, float] = collections.OrderedDict()
        self._lazy_in_flight = 0
        self._lazy_timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    # -- writing now

    def submit(self, item: WriteItem) -> None:
        """Write the item from a thread, then flush it by the rule."""
        segment = item.segment
        self._writing[segment].add(item)
        segment.in_flight += 1
        future = self._loop.run_in_executor(self._executor, item.begin())
        future.add_done_callback(lambda done: self._written(item, segment, done))

    def _written(self, item: WriteItem, segment: Segment, done: asyncio.Future[None]) -> None:
        self._writing[segment].discard(item)
        if not self._writing[segment]:
            del self._writing[segment]
        segment.in_flight -= 1
        error = done.exception()
        if error is not None and not isinstance(error, OSError):
            logger.error("write of segment %s broke", segment.path, exc_info=error)
            error = OSError(5, str(error))
        counts = item.on_written(segment)
        if error is not None:
            self._fail("write", segment, error, [item] if counts else [])
            return
        if not counts:
            return
        if (items := self._unflushed.get(segment)) is None:
            items = self._unflushed[segment] = []
            segment.in_flight += 1
        items.append(item)
        if item.awaited or sum(unflushed.size_bytes for unflushed in items) >= FLUSH_BYTES:
            self.flush(segment)
        elif segment not in self._timers:
            self._timers[segment] = self._loop.call_later(FLUSH_AFTER_S, self.flush, segment)

    def flush(self, segment: Segment) -> None:
        """Start a flush of what is written and not yet flushed."""
        if timer := self._timers.pop(segment, None):
            timer.cancel()
        if items := self._unflushed.pop(segment, None):
            self._keep(self._loop.create_task(self._flush(segment, items)))

    async def _flush(self, segment: Segment, items: list[WriteItem]) -> None:
        try:
            await segment.flusher.flush()
        except OSError as error:
            self._fail("flush", segment, error, items)
            return
        finally:
            segment.in_flight -= 1
        for item in items:
            item.on_durable(segment)

    def _fail(self, kind: str, segment: Segment, error: OSError, items: list[WriteItem]) -> None:
        """Retire the segment and have every owner with unflushed bytes in it move them."""
        self._store.failed(kind, segment, error)
        if timer := self._timers.pop(segment, None):
            timer.cancel()
        if unflushed := self._unflushed.pop(segment, []):
            segment.in_flight -= 1
        affected = [*items, *unflushed, *self._writing.pop(segment, set())]
        affected += [item for item in self._lazy if item.segment is segment]
        for item in dict.fromkeys(affected):
            item.on_storage_failed(segment, error)

    # -- writing later (``memory`` durability)

    def defer(self, item: WriteItem) -> None:
        """Write the item back when memory runs short, when it has waited long enough, or on ``hasten``."""
        self._lazy[item] = time.monotonic()
        self.pump_lazy()

    def waiting(self, item: WriteItem) -> bool:
        return item in self._lazy

    def cancel(self, item: WriteItem) -> bool:
        """Take a deferred item back; False if it is no longer waiting."""
        return self._lazy.pop(item, None) is not None

    def hasten(self, item: WriteItem) -> None:
        """Somebody waits for this item: write it now."""
        if self._lazy.pop(item, None) is not None:
            self.submit(item)

    def hasten_all(self) -> None:
        while self._lazy:
            item, _ = self._lazy.popitem(last=False)
            self.submit(item)

    def pump_lazy(self, *, pressed: bool = False) -> None:
        """Start lazy writes that are due; called on deferral, by the timer, and when somebody waits for memory (pressed)."""
        now = time.monotonic()
        in_flight = sum(len(items) for items in self._writing.values())
        while self._lazy and in_flight < LAZY_IN_FLIGHT_MAX:
            item, since = next(iter(self._lazy.items()))
            if not pressed and now - since < LAZY_AFTER_S and self._arena_share() < LAZY_ARENA_SHARE:
                break
            del self._lazy[item]
            self.submit(item)
            in_flight += 1
        if self._lazy and self._lazy_timer is None:
            self._lazy_timer = self._loop.call_later(0.05 if in_flight else 0.25, self._lazy_tick)

    def _lazy_tick(self) -> None:
        self._lazy_timer = None
        self.pump_lazy()

    # -- ending

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self, timeout_s: float) -> None:
        """Write and flush everything that is still owed; returns when it is durable, or at the time limit."""
        self.hasten_all()
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for segment in list(self._unflushed):
                self.flush(segment)
            if not self._tasks and not any(self._writing.values()) and not self._unflushed and not self._lazy:
                break
            await asyncio.sleep(0.005)
        if self._lazy_timer is not None:
            self._lazy_timer.cancel()

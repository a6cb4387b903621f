"""What the drain process needs of the segments: opened versions, a place for recalled bytes, and how full the buffer is.

In: the catalogue, and the segment store of the drain's own slot. Out: the ``OpenReader``, ``Landing`` and ``usage`` that
``archive.process.serve`` asks for. Always holds: recalled bytes are flushed before their extents are returned; a segment
that failed a write or a flush is not written again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor

from ingest.blockio import AlignedBuffer
from ingest.cluster.neighbours import Neighbours
from ingest.cluster.relay import RelayReader, open_copies
from ingest.counters import SLOTS, Counters
from ingest.errors import CatalogUnavailable, DataLost, StorageFailed
from ingest.label import write_label
from ingest.paths import NodePaths
from ingest.ports import Catalog
from ingest.reader import SegmentReader, StaleExtent, lies_on
from ingest.records import BLOCK_BYTES, LABEL_BYTES, Extent, LifetimeClass, ObjectRecord
from ingest.segments import Reservation, SegmentStore

STAGING_BYTES = 8 << 20
SETTLE_TIMEOUT_S = 30.0
OPEN_TRIES = 5
REOPEN_WAIT_S = 0.05
OPEN_SEGMENTS_PER_SLOT = 3
"""One for each lifetime class: partly filled, and not to be counted as full."""


async def open_version(
    paths: NodePaths, catalog: Catalog, executor: Executor, neighbours: Neighbours | None, me: int, record: ObjectRecord
) -> SegmentReader | RelayReader:
    """Open all bytes of a version where they are now, here (``me``) or on another node. Raises NoSuchKey (deleted meanwhile),
    DataLost, NodeAway, CatalogUnavailable."""
    for _ in range(OPEN_TRIES):
        if not record.settled:
            record = await catalog.settle(record.object_id, SETTLE_TIMEOUT_S)
        try:
            return await open_copies(paths, executor, neighbours, me, record, 0, record.stored_length)
        except StaleExtent as stale:
            # Compaction moved it, or it was deleted: the catalogue knows.
            fresh = await catalog.by_id(record.object_id)
            if fresh.extents == record.extents and fresh.settled == record.settled:
                if lies_on(me, record.extents, 0, record.stored_length):
                    raise DataLost(f"segment {stale} no longer holds {record.bucket}/{record.key!r}") from None
                await asyncio.sleep(REOPEN_WAIT_S)  # its node knows of a change that has not reached us
            record = fresh
    raise CatalogUnavailable(f"{record.bucket}/{record.key!r} moves faster than it can be opened")


class SegmentLanding:
    """Recalled bytes into the drain slot's segments (implements ``archive.recall.Landing``). What has landed holds its
    place until it is kept or abandoned: the catalogue, which says what may be recycled, does not know of it before."""

    def __init__(self, segments: SegmentStore) -> None:
        self._segments = segments
        self._landed: dict[tuple[Extent, ...], list[tuple[Reservation, int]]] = {}

    async def land(self, record: ObjectRecord, chunks: AsyncIterator[memoryview]) -> tuple[Extent, ...]:
        """Raises BufferFull, StorageFailed, and whatever ``chunks`` raises; then nothing is held any more."""
        landing = _Landed(self._segments, record)
        try:
            async for chunk in chunks:
                await landing.add(chunk)
            extents = await landing.complete()
            self._landed[extents] = landing.done
            return extents
        except BaseException:
            landing.forget()
            raise
        finally:
            landing.close()

    async def keep(self, extents: Sequence[Extent]) -> None:
        self._segments.adopt(extents)
        for reservation, used in self._landed.pop(tuple(extents), ()):
            self._segments.finish(reservation, LABEL_BYTES + used)

    async def abandon(self, extents: Sequence[Extent]) -> None:
        for reservation, _ in self._landed.pop(tuple(extents), ()):
            self._segments.finish(reservation, 0)


class _Landed:
    """One recalled version on its way into segments: blocks are gathered in a staging buffer and written past the
    page cache, extent after extent."""

    def __init__(self, segments: SegmentStore, record: ObjectRecord) -> None:
        self._segments = segments
        self._record = record
        self._staging = AlignedBuffer(STAGING_BYTES)
        self._filled = 0
        self._position = 0
        self._open: Reservation | None = None
        self._written = 0
        self.done: list[tuple[Reservation, int]] = []
        """Reservations in body order with the payload bytes used of each."""

    async def add(self, chunk: memoryview) -> None:
        while len(chunk):
            if self._open is None:
                self._begin()
            assert self._open is not None
            room = min(STAGING_BYTES, self._open.capacity - self._written) - self._filled
            count = min(room, len(chunk))
            self._staging.view[self._filled : self._filled + count] = chunk[:count]
            self._filled += count
            self._position += count
            chunk = chunk[count:]
            if count == room:
                await self._write_staged()

    async def complete(self) -> tuple[Extent, ...]:
        if self._filled:
            await self._write_staged()
        if self._open is not None:
            self._end()
        for segment in {reservation.segment for reservation, _ in self.done}:
            try:
                await segment.flusher.flush()
            except OSError as error:
                self._segments.failed("flush", segment, error)
                raise StorageFailed(f"flush of recalled bytes: {error.strerror}") from error
        store = self._segments
        return tuple(reservation.extent(store.node, store.slot, used) for reservation, used in self.done)

    def forget(self) -> None:
        """Give back what was reserved; bytes already there are nobody's."""
        if self._open is not None:
            self.done.append((self._open, 0))
            self._open = None
        for reservation, _ in self.done:
            self._segments.finish(reservation, 0)

    def close(self) -> None:
        # After an error its traceback may still hold a view: then the memory goes with that.
        with contextlib.suppress(BufferError):
            self._staging.close()

    def _begin(self) -> None:
        left = self._record.stored_length - self._position
        self._open = self._segments.reserve(LifetimeClass.STREAM, left)
        self._written = 0

    def _end(self) -> None:
        assert self._open is not None
        self.done.append((self._open, self._written))
        self._open = None

    async def _write_staged(self) -> None:
        """Write what is staged behind what was written; the last block of an extent is padded with zeros."""
        assert self._open is not None
        whole = -(-self._filled // BLOCK_BYTES) * BLOCK_BYTES
        self._staging.view[self._filled : whole] = bytes(whole - self._filled)
        reservation, first = self._open, self._written == 0
        offset = reservation.offset + LABEL_BYTES + self._written
        try:
            if first:
                await self._write_label(reservation)
            await self._write(reservation, self._staging.view[:whole], offset)
        except OSError as error:
            self._segments.failed("write", reservation.segment, error)
            raise StorageFailed(f"write of recalled bytes: {error.strerror}") from error
        self._written += self._filled
        self._filled = 0
        if self._written == reservation.capacity:
            self._end()

    async def _write(self, reservation: Reservation, view: memoryview, offset: int) -> None:
        loop = asyncio.get_running_loop()
        writing = loop.run_in_executor(self._segments.executor, reservation.segment.write, [view], offset)
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            # The thread still reads the staging buffer: it must be done before that is given back.
            await asyncio.wait([writing])
            raise

    async def _write_label(self, reservation: Reservation) -> None:
        position = self._position - self._filled
        label = self._segments.label(self._record, reservation, position, reservation.capacity)
        block = AlignedBuffer(LABEL_BYTES)
        try:
            write_label(label, block.view)
            await self._write(reservation, block.view, reservation.offset)
        finally:
            block.close()


class BufferUsage:
    """How full the node's segments are. ``refresh`` asks the catalogue; ``__call__`` gives (used, capacity) bytes.

    A segment is only reused when nothing in it lives. So when live data is scattered, the segments in use count, not
    the live bytes: else the buffer could be full of half-empty segments and nothing would be evicted.
    Neither number sees a slot whose room is all in other slots' files, or open segments that hold next to nothing. So
    a buffer that has refused a body since the last look (``shortages`` grew) is full, whatever the numbers say: else it
    could refuse for ever what an eviction would make room for.
    """

    def __init__(
        self,
        catalog: Catalog,
        slots: Sequence[int],
        segment_bytes: int,
        capacity_bytes: int,
        shortages: Callable[[], int],
    ) -> None:
        self._catalog = catalog
        self._slots = tuple(slots)
        self._segment_bytes = segment_bytes
        self._capacity_bytes = capacity_bytes
        self._shortages = shortages
        self._shortages_seen = shortages()
        self._used_bytes = 0

    async def refresh(self) -> None:
        shortages = self._shortages()
        live_bytes = segment_bytes = 0
        for slot in self._slots:
            use = [item.live_bytes for item in await self._catalog.segment_use(slot) if item.live_bytes > 0]
            live_bytes += sum(use)
            segment_bytes += max(0, len(use) - OPEN_SEGMENTS_PER_SLOT) * self._segment_bytes
        short_bytes = self._capacity_bytes if shortages > self._shortages_seen else 0
        self._shortages_seen = shortages
        self._used_bytes = max(live_bytes, segment_bytes, short_bytes)

    def __call__(self) -> tuple[int, int]:
        return self._used_bytes, self._capacity_bytes


def reserved_usage(
    usage: Callable[[], tuple[int, int]], held: Callable[[], int], evict_high: float
) -> Callable[[], tuple[int, int]]:
    """``usage``, made to look above the high mark where what is reserved and not used yet (``held``) does not fit beside it."""

    def reserved() -> tuple[int, int]:
        used_bytes, capacity_bytes = usage()
        return max(used_bytes, used_bytes + held() - round((1 - evict_high) * capacity_bytes)), capacity_bytes

    return reserved


def shortages(counters: Counters) -> int:
    """How often a body found no room, over all slots."""
    return sum(int(counters.read(slot, "hiss_segment_short_total", (), 1)[0]) for slot in range(SLOTS))


def files_elsewhere(counters: Counters, own_slot: int) -> int:
    """Segment files of every slot but one, from the node's counters: the limit on files is node-wide."""
    name = "hiss_segment_files"
    return sum(int(counters.read(slot, name, (), 1)[0]) for slot in range(SLOTS) if slot != own_slot)

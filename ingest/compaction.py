"""Housekeeping of an idle slot: keep a spare segment ahead, move the last live extents out of nearly empty ones.

Compaction copies an extent to an open segment, flushes it, and only then tells the catalogue; a crash between leaves the old
extent in force and the copy unreferenced, which is free space.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator

from ingest.blockio import AlignedBuffer
from ingest.buffer import Buffer
from ingest.counters import Counters
from ingest.crashpoints import crashpoint
from ingest.errors import BufferFull, CatalogUnavailable, DataLost, IngestError, StaleVersion, StorageFailed, Unreadable
from ingest.label import write_label
from ingest.reader import SegmentReader, StaleExtent
from ingest.records import BLOCK_BYTES, LABEL_BYTES, Extent, LifetimeClass, ObjectRecord
from ingest.segments import Reservation, Segment

logger = logging.getLogger(__name__)

SPARSE_SHARE = 0.10
"""A sealed segment with less than this share live is compacted."""
INTERVAL_S = 1.0
COPY_BYTES = 4 << 20
WRITE_PAUSE_MAX_S = 60.0
UNREADABLE_PAUSE_S = 10.0
UNREADABLE_PAUSE_MAX_S = 600.0
"""After this long, twice as long each time, a segment that could not be read is tried again."""


async def housekeep(buffer: Buffer, counters: Counters, stop: asyncio.Event) -> None:
    """Runs for the life of the worker; every step yields to ingest."""
    compaction = _Compaction(buffer, counters)
    while not stop.is_set():
        await asyncio.sleep(INTERVAL_S)
        try:
            if buffer.busy():
                continue
            buffer.packer.close_idle()
            await buffer.segments.recycle_quietly()
            await buffer.segments.prepare_spare(buffer.busy)
            await compaction.step()
        except (IngestError, StaleExtent, OSError) as error:
            logger.warning("housekeeping of slot %d: %s", buffer.segments.slot, error)
        except Exception:
            logger.exception("housekeeping of slot %d", buffer.segments.slot)


class _Compaction:
    def __init__(self, buffer: Buffer, counters: Counters) -> None:
        self._buffer = buffer
        self._store = buffer.segments
        self._moved_bytes = counters.cell("hiss_segment_compacted_bytes_total")
        self._read_errors = counters.cell("hiss_storage_errors_total", "read")
        self._pause_s = 0.0
        self._not_before = 0.0
        self._unreadable: dict[tuple[int, int], tuple[float, float]] = {}
        """(number, generation): when it may be tried again, and the pause after that. Few: each is sparse and ill."""

    async def step(self) -> None:
        """Empty one sparse segment, as far as nobody streams meanwhile. What cannot be read stays where it is."""
        now = time.monotonic()
        if now < self._not_before:
            return
        segment = self._store.sparse(SPARSE_SHARE, [one for one, (at, _) in self._unreadable.items() if now < at])
        if segment is None:
            return
        which = segment.number, segment.generation
        unreadable = False
        for record, extent in await self._buffer.catalog.segment_extents(self._store.slot, segment.number):
            if record is None or not record.settled:
                continue  # a part, or bytes on their way: these segments empty by themselves
            if extent not in record.extents and extent not in record.mirror:
                continue  # evicted or moved a moment ago
            if self._buffer.busy():
                break
            try:
                self._moved_bytes.add(await self._move(record, extent))
                self._pause_s = 0.0
            except StorageFailed:
                # Each try costs a file.
                self._pause_s = min(max(INTERVAL_S, 2 * self._pause_s), WRITE_PAUSE_MAX_S)
                self._not_before = time.monotonic() + self._pause_s
                raise
            except (Unreadable, DataLost) as error:
                self._read_errors.add()
                logger.error("%s/%r cannot be moved out of %s: %s", record.bucket, record.key, segment.path, error)
                unreadable = True
        if unreadable:
            _, pause_s = self._unreadable.get(which, (0.0, UNREADABLE_PAUSE_S))
            self._unreadable[which] = time.monotonic() + pause_s, min(2 * pause_s, UNREADABLE_PAUSE_MAX_S)

    async def _move(self, record: ObjectRecord, extent: Extent) -> int:
        """Copy one extent elsewhere; returns its bytes, 0 if it was not moved. Raises Unreadable, DataLost, StorageFailed."""
        store = self._store
        try:
            reservation = store.reserve_whole(LifetimeClass.STREAM, extent.length, extent.length)
        except BufferFull:
            return 0
        used: int | None = 0
        try:
            await self._copy(record, extent, reservation)
            crashpoint("relocate-written")
            new = reservation.extent(store.node, store.slot, extent.length)
            used = None  # until the catalogue answers, the copy may be in force
            try:
                await _relocate(self._buffer, record, extent, new)
            except StaleVersion:
                used = 0
                return 0
            used = new.stored_bytes
            store.adopt([new])
            return extent.length
        finally:
            if used is not None:
                store.finish(reservation, used)

    async def _copy(self, record: ObjectRecord, extent: Extent, reservation: Reservation) -> None:
        """Label and payload, written and flushed. Raises Unreadable, DataLost, StorageFailed."""
        block = AlignedBuffer(COPY_BYTES)
        try:
            copy = record.mirror if extent in record.mirror else record.extents
            position = sum(other.length for other in copy[: copy.index(extent)])
            write_label(self._store.label(record, reservation, position, extent.length), block.view)
            await self._write(reservation.segment, block.view[:LABEL_BYTES], reservation.offset)
            offset = reservation.offset + LABEL_BYTES
            async with contextlib.aclosing(self._payload(extent)) as chunks:
                async for chunk in chunks:
                    padded = -(-len(chunk) // BLOCK_BYTES) * BLOCK_BYTES
                    block.view[: len(chunk)] = chunk
                    block.view[len(chunk) : padded] = bytes(padded - len(chunk))
                    await self._write(reservation.segment, block.view[:padded], offset)
                    offset += padded
            try:
                await reservation.segment.flusher.flush()
            except OSError as error:
                raise self._failed("flush", reservation.segment, error) from error
        finally:
            block.close()

    async def _payload(self, extent: Extent) -> AsyncGenerator[memoryview, None]:
        store = self._store
        try:
            async with await SegmentReader.open(store.paths, store.executor, [extent], 0, extent.length) as reader:
                async for chunk in reader.chunks(COPY_BYTES):
                    yield chunk
        except OSError as error:
            raise Unreadable(str(error)) from error

    async def _write(self, segment: Segment, view: memoryview, offset: int) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._store.executor, segment.write, [view], offset)
        except OSError as error:
            raise self._failed("write", segment, error) from error

    def _failed(self, kind: str, segment: Segment, error: OSError) -> StorageFailed:
        self._store.failed(kind, segment, error)
        return StorageFailed(f"{segment.path} could not be written: {error.strerror}")


async def _relocate(buffer: Buffer, record: ObjectRecord, old: Extent, new: Extent) -> None:
    """Until the catalogue has decided: the copy's place is neither free nor in use before. Raises StaleVersion."""
    while True:
        try:
            await buffer.catalog.relocate(record.object_id, old, [new])
        except (CatalogUnavailable, StorageFailed):
            await asyncio.sleep(INTERVAL_S)
        else:
            return

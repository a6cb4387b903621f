"""Housekeeping of an idle slot: keep a spare segment ahead, move the last live extents out of nearly empty ones.

Compaction copies an extent to an open segment, flushes it, and only then tells the catalogue; a crash between leaves the old
extent in force and the copy unreferenced, which is free space.
"""

from __future__ import annotations

import asyncio
import logging
import time

from ingest.blockio import AlignedBuffer
from ingest.buffer import Buffer
from ingest.counters import Counters
from ingest.crashpoints import crashpoint
from ingest.errors import BufferFull, CatalogError, CatalogUnavailable, IngestError, StaleVersion, StorageFailed
from ingest.label import Label, write_label
from ingest.reader import SegmentReader, StaleExtent
from ingest.records import BLOCK_BYTES, LABEL_BYTES, Extent, LifetimeClass, ObjectRecord

logger = logging.getLogger(__name__)

SPARSE_SHARE = 0.10
"""A sealed segment with less than this share live is compacted."""
INTERVAL_S = 1.0
COPY_BYTES = 4 << 20


async def housekeep(buffer: Buffer, counters: Counters, stop: asyncio.Event) -> None:
    """Runs for the life of the worker; every step yields to ingest."""
    moved_bytes = counters.cell("hiss_segment_compacted_bytes_total")
    while not stop.is_set():
        await asyncio.sleep(INTERVAL_S)
        try:
            if buffer.busy():
                continue
            buffer.packer.close_idle()
            await buffer.segments.recycle_quietly()
            await buffer.segments.prepare_spare(buffer.busy)
            segment = buffer.segments.sparse(SPARSE_SHARE)
            if segment is None:
                continue
            for record, extent in await buffer.catalog.segment_extents(buffer.segments.slot, segment.number):
                if record is None or not record.settled:
                    continue  # a part, or bytes on their way: these segments empty by themselves
                if buffer.busy():
                    break
                moved_bytes.add(await _move(buffer, record, extent))
        except (IngestError, StaleExtent, OSError) as error:
            logger.warning("housekeeping of slot %d: %s", buffer.segments.slot, error)


async def _move(buffer: Buffer, record: ObjectRecord, extent: Extent) -> int:
    """Copy one extent elsewhere; returns its bytes, 0 if it was not moved."""
    store = buffer.segments
    loop = asyncio.get_running_loop()
    try:
        reservation = store.reserve_whole(LifetimeClass.STREAM, extent.length, extent.length)
    except BufferFull:
        return 0
    used: int | None = 0
    try:
        position = 0
        for other in record.mirror if extent in record.mirror else record.extents:
            if other == extent:
                break
            position += other.length
        block = AlignedBuffer(COPY_BYTES)
        label = Label(
            object_id=record.object_id,
            bucket=record.bucket,
            key=record.key,
            node=store.node,
            slot=store.slot,
            segment=reservation.segment.number,
            generation=reservation.segment.generation,
            offset=reservation.offset,
            position=position,
            length=extent.length,
            created_ns=time.time_ns(),
        )
        write_label(label, block.view)
        write = reservation.segment.write
        await loop.run_in_executor(store.executor, write, [block.view[:LABEL_BYTES]], reservation.offset)
        offset = reservation.offset + LABEL_BYTES
        async with await SegmentReader.open(store.paths, store.executor, [extent], 0, extent.length) as reader:
            async for chunk in reader.chunks(COPY_BYTES):
                padded = -(-len(chunk) // BLOCK_BYTES) * BLOCK_BYTES
                block.view[: len(chunk)] = chunk
                block.view[len(chunk) : padded] = bytes(padded - len(chunk))
                await loop.run_in_executor(store.executor, write, [block.view[:padded]], offset)
                offset += padded
        await reservation.segment.flusher.flush()
        crashpoint("relocate-written")
        new = reservation.extent(store.node, store.slot, extent.length)
        used = None  # until the catalogue answers, the copy may be in force
        try:
            await _relocate(buffer, record, extent, new)
        except StaleVersion:
            used = 0
            return 0
        used = new.stored_bytes
        store.adopt([new])
        block.close()
        return extent.length
    except OSError as error:
        store.retire(reservation.segment)
        raise CatalogError(f"compaction could not write: {error.strerror}") from error
    finally:
        if used is not None:
            store.finish(reservation, used)


async def _relocate(buffer: Buffer, record: ObjectRecord, old: Extent, new: Extent) -> None:
    """Until the catalogue has decided: the copy's place is neither free nor in use before. Raises StaleVersion."""
    while True:
        try:
            await buffer.catalog.relocate(record.object_id, old, [new])
        except (CatalogUnavailable, StorageFailed):
            await asyncio.sleep(INTERVAL_S)
        else:
            return

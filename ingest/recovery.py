"""What a worker does before it serves: adopt its segments, write what its predecessor still owed, name what is lost.

In: the slot's segment files, the catalogue's view of them, the span table and arena that outlived the predecessor.
Out: a slot in which every acknowledged object reads back whole, or is named in the list of lost objects.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import functools
import json
import logging
import os
import time

from ingest.arena import Arena
from ingest.blockio import AlignedBuffer, open_direct, read_fully, write_fully
from ingest.counters import Counters
from ingest.digests import CRC_FUNCTIONS
from ingest.errors import CatalogError, DataLost, NoSuchKey, StaleVersion, StorageFailed, Unreadable
from ingest.label import write_label
from ingest.paths import NodePaths
from ingest.ports import Catalog
from ingest.reader import SegmentReader, StaleExtent
from ingest.records import LABEL_BYTES, DeleteObject, Extent, LifetimeClass, ObjectRecord
from ingest.segments import Reservation, SegmentHeader, SegmentStore
from ingest.span_table import OwedSpan, SpanTable

logger = logging.getLogger(__name__)

VERIFY_READ_BYTES = 4 << 20
UNSETTLED_BATCH = 1000
COPY_BYTES = 4 << 20
RETRY_PAUSES_S = (0.5, 1.0, 2.0, 4.0)
"""Between tries where the disk refuses to take or give what was acknowledged."""


async def recover(
    paths: NodePaths, catalog: Catalog, segments: SegmentStore, arena: Arena, spans: SpanTable, counters: Counters
) -> list[ObjectRecord]:
    """Run once at start, before the first request. Returns the lost versions (only ``memory`` ones can be).

    Raises StorageFailed, BufferFull or Unreadable where the disk takes nothing of what is owed: it stays in memory, for the
    next try.
    """
    await _hear(segments, spans)
    segments.open(await catalog.segment_use(segments.slot))
    unwritten = await _write_owed(paths, segments, arena, spans)
    if unwritten:
        await segments.recycle_idle()  # room for what must go elsewhere
    lost: list[ObjectRecord] = []
    pauses_s: tuple[float, ...] = RETRY_PAUSES_S
    while unsettled := await catalog.unsettled(segments.slot, UNSETTLED_BATCH):
        whole: list[ObjectRecord] = []
        gone: list[ObjectRecord] = []
        for record in unsettled:
            there = await _rescued(catalog, segments, arena, record, unwritten)
            if there is None:
                continue
            reads_back = await _reads_back(paths, segments, there, pauses_s)
            if reads_back is None:
                pauses_s = ()  # the others need not wait as long
            (gone if reads_back is False else whole).append(there)
        if whole:
            await catalog.settled([record.object_id for record in whole])
        _name_lost(paths, gone)
        for record in gone:
            request = DeleteObject(
                record.bucket, record.key, record.version_id, object_id=record.object_id, lost=True
            )  # fmt: skip
            (outcome,) = await catalog.delete([request])
            if isinstance(outcome, Exception):
                raise outcome
        lost += gone
    spans.clear()
    counters.cell("hiss_lost_objects").set(len(lost))
    await segments.recycle_quietly()
    return lost


# -- what an earlier worker still owed


async def _hear(segments: SegmentStore, spans: SpanTable) -> None:
    """Until what the last process asked to commit is decided nobody knows what it owed. Raises CatalogError, StorageFailed; not
    where it owed nothing: then reads need not wait for an engine that is away."""
    try:
        await segments.hear()
    except (CatalogError, StorageFailed):
        if any(spans.owed()):
            raise


async def _write_owed(paths: NodePaths, segments: SegmentStore, arena: Arena, spans: SpanTable) -> list[OwedSpan]:
    """Write each span's image where it belongs. Returns those whose place took nothing, however often."""
    loop = asyncio.get_running_loop()
    left, nowhere, written = list(spans.owed()), list[OwedSpan](), 0
    for pause_s in (*RETRY_PAUSES_S, None):
        failed = []
        for owed in left:
            try:
                written += await loop.run_in_executor(segments.executor, _write_in_place, paths, segments, arena, owed)
            except _NoPlace:
                nowhere.append(owed)
            except OSError as error:
                segments.note_error("write", paths.segment_file(segments.slot, owed.segment), error)
                failed.append(owed)
        left = failed
        if not left or pause_s is None:
            break
        await asyncio.sleep(pause_s)
    if written:
        logger.warning("slot %d: wrote %d bytes that an earlier worker still owed the disk", segments.slot, written)
    return left + nowhere


class _NoPlace(Exception):
    """The file has gone, or has a new life: whoever still names the place has its bytes in memory only."""


def _write_in_place(paths: NodePaths, segments: SegmentStore, arena: Arena, owed: OwedSpan) -> int:
    """In a thread. Returns the bytes written. Raises OSError, _NoPlace."""
    path = paths.segment_file(segments.slot, owed.segment)
    if owed.region >= len(arena.regions):
        return 0
    try:
        fd = open_direct(path, os.O_RDWR)
    except FileNotFoundError:
        raise _NoPlace from None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        with open(path, "rb") as plain:
            header = SegmentHeader.read(plain.fileno())
        if header is None or header.generation != owed.generation:
            raise _NoPlace
        write_fully(fd, [_image(arena, owed)], owed.file_offset)
        os.fdatasync(fd)
        return owed.length
    finally:
        os.close(fd)


def _image(arena: Arena, owed: OwedSpan) -> memoryview:
    return arena.regions[owed.region].view[owed.offset : owed.offset + owed.length]


async def _rescued(
    catalog: Catalog, segments: SegmentStore, arena: Arena, record: ObjectRecord, unwritten: list[OwedSpan]
) -> ObjectRecord | None:
    """The version with what could not be written in its place moved to another segment; None if it has gone. Raises
    StorageFailed, BufferFull, Unreadable, CatalogUnavailable."""
    moved = False
    for extent in record.extents:
        owed = [
            one
            for one in unwritten
            if one.region < len(arena.regions)
            and (one.segment, one.generation) == (extent.segment, extent.generation)
            and one.file_offset < extent.offset + extent.stored_bytes
            and extent.offset < one.file_offset + one.length
        ]
        if owed and extent.slot == segments.slot and extent.node == segments.node:
            reservation = segments.reserve_whole(LifetimeClass.STREAM, extent.length, extent.length)
            work = functools.partial(_copy_out, segments, arena, record, extent, owed, reservation)
            try:
                await asyncio.get_running_loop().run_in_executor(segments.executor, work)
            except OSError as error:
                segments.failed("write", reservation.segment, error)
                raise StorageFailed(f"what is owed of {record.bucket}/{record.key!r}: {error.strerror}") from error
            new = reservation.extent(segments.node, segments.slot, extent.length)
            try:
                await catalog.relocate(record.object_id, extent, [new])
            except StaleVersion:
                segments.finish(reservation, 0)
                return None
            segments.adopt([new])
            segments.finish(reservation, new.stored_bytes)
            moved = True
    try:
        return await catalog.by_id(record.object_id) if moved else record
    except NoSuchKey:
        return None


def _copy_out(
    segments: SegmentStore,
    arena: Arena,
    record: ObjectRecord,
    extent: Extent,
    owed: list[OwedSpan],
    reservation: Reservation,
) -> None:
    """In a thread: the extent as it should be, from its old place and from memory, in a new place. Raises OSError where that
    cannot be written, Unreadable where the old one cannot be read."""
    segment = reservation.segment
    position = sum(other.length for other in record.extents[: record.extents.index(extent)])
    block = AlignedBuffer(COPY_BYTES)
    try:
        write_label(segments.label(record, reservation, position, extent.length), block.view)
        segment.write([block.view[:LABEL_BYTES]], reservation.offset)
        for start in range(LABEL_BYTES, extent.stored_bytes, COPY_BYTES):
            count = min(COPY_BYTES, extent.stored_bytes - start)
            low = extent.offset + start
            overlaps = [(max(low, one.file_offset), min(low + count, one.file_offset + one.length)) for one in owed]
            if sum(max(0, end - begin) for begin, end in overlaps) < count:
                _read_stored(segments, extent, block.view[:count], low)
            for one, (begin, end) in zip(owed, overlaps, strict=True):
                if begin < end:
                    there = _image(arena, one)[begin - one.file_offset : end - one.file_offset]
                    block.view[begin - low : end - low] = there
            segment.write([block.view[:count]], reservation.offset + start)
        os.fdatasync(segment.fd)
    finally:
        block.close()


def _read_stored(segments: SegmentStore, extent: Extent, view: memoryview, offset: int) -> None:
    source = segments.segments.get(extent.segment)
    try:
        if source is None:
            raise OSError(errno.EIO, "its header cannot be read")
        if read_fully(source.fd, view, offset) < len(view):
            raise OSError(errno.EIO, "it ends inside an extent")
    except OSError as error:
        raise Unreadable(f"segment {extent.segment}: {error.strerror}") from error


# -- what has to read back


async def _reads_back(
    paths: NodePaths, segments: SegmentStore, record: ObjectRecord, pauses_s: tuple[float, ...]
) -> bool | None:
    """Whether all of it is there. None where the disk does not say, however often it is asked: it may be, and the drain, which
    compares checksums, will know."""
    for pause_s in (*pauses_s, None):
        try:
            async with await SegmentReader.open(paths, segments.executor, record.extents, 0, record.length) as reader:
                crc = 0
                async for chunk in reader.chunks(VERIFY_READ_BYTES):
                    crc = CRC_FUNCTIONS["crc64nvme"](chunk, crc)
            return crc == record.crc64nvme
        except (StaleExtent, DataLost):
            return False
        except (Unreadable, OSError) as error:
            reason = error
        if pause_s is not None:
            await asyncio.sleep(pause_s)
    logger.error("%s/%r cannot be read now, and may be there: %s", record.bucket, record.key, reason)
    return None


def _name_lost(paths: NodePaths, records: list[ObjectRecord]) -> None:
    """Append the lost versions to DIR/lost-objects.jsonl, one JSON object a line, and to the log."""
    if not records:
        return
    with open(paths.root / "lost-objects.jsonl", "a", encoding="utf-8") as file:
        for record in records:
            key = record.key.decode("utf-8", "backslashreplace")
            logger.critical("LOST with the host's memory: s3://%s/%s (%d bytes)", record.bucket, key, record.length)
            line = {
                "bucket": record.bucket,
                "key": key,
                "length": record.length,
                "crc64nvme": f"{record.crc64nvme:016x}",
                "acknowledged_ns": record.modified_ns,
                "found_ns": time.time_ns(),
            }
            file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())

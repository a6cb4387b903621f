"""What a worker does before it serves: adopt its segments, write what its predecessor still owed, name what is lost.

In: the slot's segment files, the catalogue's view of them, the span table and arena that outlived the predecessor.
Out: a slot in which every acknowledged object reads back whole, or is named in the list of lost objects.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time

from ingest.arena import Arena
from ingest.blockio import open_direct, write_fully
from ingest.counters import Counters
from ingest.digests import CRC_FUNCTIONS
from ingest.errors import IngestError
from ingest.paths import NodePaths
from ingest.ports import Catalog
from ingest.reader import SegmentReader, StaleExtent
from ingest.records import DeleteObject, ObjectRecord
from ingest.segments import SegmentHeader, SegmentStore
from ingest.span_table import OwedSpan, SpanTable

logger = logging.getLogger(__name__)

VERIFY_READ_BYTES = 4 << 20
UNSETTLED_BATCH = 1000


async def recover(
    paths: NodePaths, catalog: Catalog, segments: SegmentStore, arena: Arena, spans: SpanTable, counters: Counters
) -> list[ObjectRecord]:
    """Run once at start, before the first request. Returns the lost versions (only ``memory`` ones can be)."""
    slot = segments.slot
    segments.open(await catalog.segment_use(slot))
    written = 0
    for owed in spans.owed():
        written += _write_owed(paths, slot, arena, owed)
    if written:
        logger.warning("slot %d: wrote %d bytes that an earlier worker still owed the disk", slot, written)
    lost = []
    while unsettled := await catalog.unsettled(slot, UNSETTLED_BATCH):
        whole = []
        for record in unsettled:
            if await _reads_back(paths, segments, record):
                whole.append(record.object_id)
            else:
                lost.append(record)
        if whole:
            await catalog.settled(whole)
        gone = [record for record in unsettled if record.object_id not in set(whole)]
        _name_lost(paths, gone)
        for record in gone:
            await catalog.delete(
                [DeleteObject(record.bucket, record.key, record.version_id, object_id=record.object_id)]
            )
    spans.clear()
    counters.cell("hiss_lost_objects").set(len(lost))
    await segments.recycle_quietly()
    return lost


def _write_owed(paths: NodePaths, slot: int, arena: Arena, owed: OwedSpan) -> int:
    """Write one span's image where it belongs, unless the segment has a new life."""
    path = paths.segment_file(slot, owed.segment)
    try:
        fd = open_direct(path, os.O_RDWR)
    except FileNotFoundError:
        return 0
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        with open(path, "rb") as plain:
            header = SegmentHeader.read(plain.fileno())
        if header is None or header.generation != owed.generation or owed.region >= len(arena.regions):
            return 0
        image = arena.regions[owed.region].view[owed.offset : owed.offset + owed.length]
        write_fully(fd, [image], owed.file_offset)
        os.fdatasync(fd)
        return owed.length
    except OSError as error:
        logger.error("segment %s: %s while writing what was owed", path, error)
        return 0
    finally:
        os.close(fd)


async def _reads_back(paths: NodePaths, segments: SegmentStore, record: ObjectRecord) -> bool:
    try:
        async with await SegmentReader.open(paths, segments.executor, record.extents, 0, record.length) as reader:
            crc = 0
            async for chunk in reader.chunks(VERIFY_READ_BYTES):
                crc = CRC_FUNCTIONS["crc64nvme"](chunk, crc)
        return crc == record.crc64nvme
    except (StaleExtent, IngestError, OSError):
        return False


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

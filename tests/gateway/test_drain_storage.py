"""Recalled bytes into segments and back out: whole, block-aligned, over segment ends, and free again when abandoned."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from awscrt.checksums import crc64nvme

from gateway.drain_storage import BufferUsage, SegmentLanding, reserved_usage, shortages
from ingest.counters import Counters
from ingest.errors import BufferFull, StorageFailed
from ingest.label import read_label
from ingest.paths import NodePaths
from ingest.reader import SegmentReader
from ingest.records import ObjectRecord, ObjectState, SegmentUse
from ingest.segments import SegmentStore

SEGMENT_BYTES = 16 << 20
SLOT = 31


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def paths(tmp_path: Path) -> NodePaths:
    paths = NodePaths(tmp_path)
    paths.create()
    return paths


@pytest.fixture
def counters() -> Counters:
    return Counters(None, SLOT)


@pytest.fixture
def segments(paths: NodePaths, executor: ThreadPoolExecutor, counters: Counters) -> Iterator[SegmentStore]:
    async def use() -> list[SegmentUse]:
        return [SegmentUse(SLOT, one.number, one.generation, one.live_bytes) for one in store.segments.values()]

    store = SegmentStore(
        paths, node=0, slot=SLOT, segment_bytes=SEGMENT_BYTES, files_max=4, files_elsewhere=lambda: 0, use=use,
        durable=functools.partial(asyncio.sleep, 0), executor=executor, counters=counters,
    )  # fmt: skip
    store.open([])
    yield store
    store.close()


def record(body: bytes) -> ObjectRecord:
    return ObjectRecord(
        bucket="scan42",
        key=b"run/frame",
        version_id="null",
        object_id=os.urandom(16),
        sequence=1,
        state=ObjectState.RECALLING,
        length=len(body),
        stored_length=len(body),
        etag="",
        crc64nvme=crc64nvme(body),
        modified_ns=0,
        owner="root",
    )


async def pieces(body: bytes, size_bytes: int) -> AsyncIterator[memoryview]:
    # One buffer for all: each view is only valid until the next is asked for.
    buffer = bytearray(size_bytes)
    for start in range(0, len(body), size_bytes):
        part = body[start : start + size_bytes]
        buffer[: len(part)] = part
        yield memoryview(buffer)[: len(part)]


async def read_back(paths: NodePaths, executor: ThreadPoolExecutor, extents: tuple[object, ...], length: int) -> bytes:
    async with await SegmentReader.open(paths, executor, extents, 0, length) as reader:  # type: ignore[arg-type]
        return b"".join([bytes(view) async for view in reader.chunks(1 << 20)])


@pytest.mark.parametrize("length", [0, 1, 4096, 4097, (8 << 20) + 5, 20 << 20, (40 << 20) + 12345])
@pytest.mark.parametrize("step", [3 << 20])
async def test_what_lands_reads_back(
    paths: NodePaths, executor: ThreadPoolExecutor, segments: SegmentStore, length: int, step: int
) -> None:
    body = os.urandom(length)
    landing = SegmentLanding(segments)
    extents = await landing.land(record(body), pieces(body, step))
    assert sum(segment.open_extents for segment in segments.segments.values()) == len(extents), "their place is held"
    await landing.keep(extents)
    assert all(segment.open_extents == 0 for segment in segments.segments.values())
    assert await read_back(paths, executor, extents, length) == body
    assert segments.live_bytes == sum(extent.stored_bytes for extent in extents)
    for extent in extents:
        fd = os.open(paths.segment_file(SLOT, extent.segment), os.O_RDONLY)
        label = read_label(fd, extent.offset)
        os.close(fd)
        assert label is not None
        assert (label.bucket, label.key, label.offset) == ("scan42", b"run/frame", extent.offset)


async def test_several_land_at_a_time(paths: NodePaths, executor: ThreadPoolExecutor, segments: SegmentStore) -> None:
    landing = SegmentLanding(segments)
    bodies = [os.urandom(1_000_001 * (number + 1)) for number in range(4)]
    landed = await asyncio.gather(*(landing.land(record(body), pieces(body, 100_000)) for body in bodies))
    for body, extents in zip(bodies, landed, strict=True):
        assert await read_back(paths, executor, extents, len(body)) == body


async def test_a_source_that_fails_leaves_the_room_free(segments: SegmentStore) -> None:
    class ArchiveGone(Exception):
        pass

    async def broken() -> AsyncIterator[memoryview]:
        yield memoryview(bytes(9 << 20))
        raise ArchiveGone

    with pytest.raises(ArchiveGone):
        await SegmentLanding(segments).land(record(bytes(30 << 20)), broken())
    assert segments.live_bytes == 0
    assert all(segment.open_extents == 0 for segment in segments.segments.values())


async def test_abandoned_extents_are_free_again(segments: SegmentStore) -> None:
    body = bytes(5 << 20)
    landing = SegmentLanding(segments)
    extents = await landing.land(record(body), pieces(body, 1 << 20))
    await landing.abandon(extents)
    assert segments.live_bytes == 0
    assert all(segment.open_extents == 0 for segment in segments.segments.values())


async def test_a_full_buffer_refuses_and_holds_nothing(segments: SegmentStore) -> None:
    body = bytes(5 * SEGMENT_BYTES)
    with pytest.raises(BufferFull):
        await SegmentLanding(segments).land(record(body), pieces(body, 4 << 20))
    assert segments.live_bytes == 0
    assert all(segment.open_extents == 0 for segment in segments.segments.values())


async def test_a_buffer_that_refuses_counts_as_full(segments: SegmentStore, counters: Counters) -> None:
    """Else nothing would be evicted while every segment holds a little, and it would refuse for ever."""

    class NearlyEmpty:
        async def segment_use(self, slot: int) -> list[SegmentUse]:
            return [SegmentUse(slot, number, 1, 4096) for number in range(1, 4)]

    usage = BufferUsage(NearlyEmpty(), (SLOT,), SEGMENT_BYTES, 4 * SEGMENT_BYTES, lambda: shortages(counters))  # type: ignore[arg-type]
    await usage.refresh()
    assert usage() == (3 * 4096, 4 * SEGMENT_BYTES)
    body = bytes(5 * SEGMENT_BYTES)
    with pytest.raises(BufferFull):
        await SegmentLanding(segments).land(record(body), pieces(body, 4 << 20))
    await usage.refresh()
    assert usage() == (4 * SEGMENT_BYTES, 4 * SEGMENT_BYTES)
    await usage.refresh()
    assert usage()[0] == 3 * 4096
    assert not segments.can_hold(1 << 50)  # what could never fit is no sign of a shortage
    await usage.refresh()
    assert usage()[0] == 3 * 4096


async def test_a_segment_that_fails_a_write_is_retired(segments: SegmentStore) -> None:
    body = bytes(1 << 20)
    landing = SegmentLanding(segments)
    await landing.land(record(body), pieces(body, 1 << 20))
    (segment,) = segments.segments.values()
    real, segment.fd = segment.fd, os.open("/dev/full", os.O_RDWR)
    try:
        with pytest.raises(StorageFailed):
            await landing.land(record(body), pieces(body, 1 << 20))
    finally:
        os.close(segment.fd)
        segment.fd = real
    assert segment.retired
    assert (await landing.land(record(body), pieces(body, 1 << 20)))[0].segment != segment.number


async def test_a_segment_that_failed_takes_nothing_of_what_lands_beside(
    segments: SegmentStore, counters: Counters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two recalls share a file; a write of one fails, and is counted. The other has begun, and fails too."""
    landing, go, begun, written = SegmentLanding(segments), asyncio.Event(), asyncio.Event(), []
    loop = asyncio.get_running_loop()
    real, failures = os.pwritev, [OSError(5, "Input/output error")]

    async def slow() -> AsyncIterator[memoryview]:
        yield memoryview(bytes(8 << 20))
        await go.wait()
        yield memoryview(bytes(1 << 20))

    def pwritev(fd: int, views: Any, offset: int, *rest: int) -> int:
        if failures and begun.is_set():
            raise failures.pop()
        loop.call_soon_threadsafe(begun.set)
        written.append(os.readlink(f"/proc/self/fd/{fd}"))
        return real(fd, views, offset, *rest)

    monkeypatch.setattr(os, "pwritev", pwritev)
    landed = asyncio.create_task(landing.land(record(bytes(9 << 20)), slow()))
    await begun.wait()
    with pytest.raises(StorageFailed):
        await landing.land(record(bytes(8 << 20)), pieces(bytes(8 << 20), 1 << 20))
    (retired,) = (segment for segment in segments.segments.values() if segment.retired)
    written.clear()
    go.set()
    with pytest.raises(StorageFailed):
        await landed
    assert str(retired.path) not in written
    assert not retired.open_extents
    assert counters.cell("hiss_storage_errors_total", "write").value() == 1


def test_eviction_makes_the_room_that_is_reserved_and_not_used_yet() -> None:
    held = [0]
    used = reserved_usage(lambda: (500, 1000), lambda: held[0], 0.8)
    assert used() == (500, 1000)
    held[0] = 500
    # It fits beside what is there: the watermarks go on as they were.
    assert used()[0] <= 800
    held[0] = 600
    assert used()[0] > 800

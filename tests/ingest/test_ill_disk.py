"""A disk that fails for a call, for a minute or for ever: what it costs, what is counted and said, and that it passes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from ingest import compaction, recovery, segments, versioning, writer
from ingest.buffer import Buffer
from ingest.catalog import rows, statements
from ingest.catalog.client import CatalogClient
from ingest.catalog.fsck import fsck
from ingest.catalog.reader import Reader
from ingest.compaction import housekeep
from ingest.counters import Counters
from ingest.errors import BufferFull, StorageFailed, Unreadable
from ingest.journal import FileOps
from ingest.mend import Patch
from ingest.paths import NodePaths
from ingest.records import LABEL_BYTES, ArchiveCopy, CommitObject, DeleteObject, Durability, Extent, ObjectRecord
from ingest.segments import REMOVE_EVERY_S
from tests.ingest import test_faults as _faults

MIB = 1 << 20
EIO = OSError(5, "Input/output error")


_plane = _faults._plane
memory, buffer, disk, gates = _faults.memory, _faults.buffer, _faults.disk, _faults.gates
worker, put, get, eventually = _plane.worker, _plane.put, _plane.get, _plane.eventually
Disk = _faults.Disk


@contextlib.asynccontextmanager
async def _housekeeping(buffer: Buffer, counters: Counters | None = None) -> AsyncIterator[None]:
    stop = asyncio.Event()
    keeper = asyncio.create_task(housekeep(buffer, counters or Counters(None, 0), stop))
    try:
        yield
        assert not keeper.done()
    finally:
        stop.set()
        await keeper


# -- a worker that starts beside an ill disk


@pytest.fixture
async def owing(paths: NodePaths, memory: Any, client: CatalogClient) -> dict[bytes, bytes]:
    """Acknowledged objects that a worker left in memory when it died, by key."""
    await client.create_bucket("b", "root")
    await client.set_bucket_tags("b", {"hiss.durability": "memory"})
    bodies = {b"small": os.urandom(5000), b"large": os.urandom(9 * MIB + 77)}
    async with worker(paths, memory, client) as one:
        one.writer.pump_lazy = lambda **_: None
        for key, body in bodies.items():
            assert not (await put(one, key, body)).settled
    return bodies


async def _all_read_back(plane: Buffer, bodies: dict[bytes, bytes]) -> None:
    assert plane.lost == []  # type: ignore[attr-defined]
    for key, body in bodies.items():
        record = await plane.catalog.head("b", key)
        assert record.settled
        assert await get(plane, record) == body


@pytest.mark.parametrize("times", [1, 3])
async def test_what_is_owed_is_written_when_the_disk_takes_it(
    paths: NodePaths, memory: Any, client: CatalogClient, owing: dict[bytes, bytes], disk: Disk,
    monkeypatch: pytest.MonkeyPatch, times: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(recovery, "RETRY_PAUSES_S", (0.01, 0.01, 0.01, 0.01))
    failures = [EIO] * times

    def rule(*_: object) -> None:
        if failures:
            raise failures.pop()

    disk.rule = rule
    async with worker(paths, memory, client) as two:
        await _all_read_back(two, owing)
        assert _count(two, "hiss_storage_errors_total", "write") == times
        await two.close(10)


async def test_what_is_owed_goes_elsewhere_where_its_place_takes_nothing(
    paths: NodePaths, memory: Any, client: CatalogClient, owing: dict[bytes, bytes], disk: Disk,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(recovery, "RETRY_PAUSES_S", (0.01,))
    before = {key: (await client.head("b", key)).extents for key in owing}
    bad = {str(paths.segment_file(extent.slot, extent.segment)) for extents in before.values() for extent in extents}

    def rule(path: str, _: int) -> None:
        if path in bad:
            raise EIO

    disk.rule = rule
    async with worker(paths, memory, client) as two:
        await _all_read_back(two, owing)
        for key, extents in before.items():
            after = (await client.head("b", key)).extents
            assert {extent.segment for extent in after}.isdisjoint(extent.segment for extent in extents)
        await two.close(10)
    assert fsck(paths.root, payload=True).problems == []


async def test_a_disk_that_takes_nothing_costs_the_start_and_no_object(
    paths: NodePaths, memory: Any, client: CatalogClient, owing: dict[bytes, bytes], disk: Disk,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(recovery, "RETRY_PAUSES_S", (0.01,))

    def away(*_: object) -> None:
        raise EIO

    disk.rule = away
    for _ in range(2):
        with pytest.raises(StorageFailed):
            async with worker(paths, memory, client):
                pass
    disk.rule = lambda *_: None
    async with worker(paths, memory, client) as two:
        await _all_read_back(two, owing)
        await two.close(10)


@pytest.mark.parametrize("how", ["once", "always"])
async def test_what_cannot_be_read_back_is_not_lost(
    paths: NodePaths, memory: Any, client: CatalogClient, owing: dict[bytes, bytes],
    monkeypatch: pytest.MonkeyPatch, how: str,
) -> None:  # fmt: skip
    """It is on the disk. Who cannot read it (here for want of descriptors) knows nothing about it."""
    monkeypatch.setattr(recovery, "RETRY_PAUSES_S", (0.01,))
    real, failures = os.preadv, [OSError(24, "Too many open files")] * (1 if how == "once" else 1000)

    def preadv(fd: int, views: Any, offset: int, *rest: int) -> int:
        if "/segments/" in os.readlink(f"/proc/self/fd/{fd}") and failures:
            raise failures.pop()
        return real(fd, views, offset, *rest)

    monkeypatch.setattr(os, "preadv", preadv)
    async with worker(paths, memory, client) as two:
        failures.clear()
        await _all_read_back(two, owing)
        await two.close(10)


async def test_a_header_that_cannot_be_read_costs_its_file_only(
    paths: NodePaths, memory: Any, client: CatalogClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.create_bucket("b", "root")
    async with worker(paths, memory, client) as one:
        bodies = {b"first": os.urandom(30 * MIB), b"second": os.urandom(30 * MIB)}
        records = {key: await put(one, key, body) for key, body in bodies.items()}
        await one.close(10)
    bad = str(paths.segment_file(0, records[b"first"].extents[0].segment))
    real = os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{fd}") == bad and offset == 0:
            raise EIO
        return real(fd, length, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", pread)
        async with worker(paths, memory, client) as two:
            assert await get(two, records[b"second"]) == bodies[b"second"]
            with pytest.raises(Unreadable):
                await two.open_reader(records[b"first"], 0, 10)
            third = await put(two, b"third", bodies[b"first"])
            assert str(paths.segment_file(0, third.extents[0].segment)) != bad
            assert _count(two, "hiss_storage_errors_total", "read") == 1
            await two.close(10)
    async with worker(paths, memory, client) as three:
        for key, body in bodies.items():
            assert await get(three, records[key]) == body
        await three.close(10)


class _SlowFlush(FileOps):
    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()

    def flush(self, fd: int) -> None:
        if not self.gate.is_set():
            self.waiting.set()
            self.gate.wait(60)
        super().flush(fd)


async def test_nothing_is_overwritten_for_a_commit_that_an_earlier_worker_did_not_hear_of(
    paths: NodePaths, memory: Any, serving: Callable[..., contextlib.AbstractAsyncContextManager[None]]
) -> None:
    """The worker died while the journal's flush hung. Its next one asks what lives before that commit can be seen."""
    ops, old, new = _SlowFlush(), os.urandom(5000), os.urandom(20 * MIB)
    async with serving(ops=ops):
        async with CatalogClient(paths, slot=0) as client:
            await client.create_bucket("b", "root")
            async with worker(paths, memory, client) as one:
                await put(one, b"k", old)
                one.packer.close_idle()
                one.segments.seal_all()
                stream = one.open_stream(await _plane.spec_for(one, b"k", len(new)))
                await _plane.receive(stream, new)
                digest = await stream.finish()
                ops.gate.clear()
                request = CommitObject(
                    bucket="b", key=b"k", object_id=digest.object_id, length=digest.length, etag="e",
                    crc64nvme=digest.crc64nvme, owner="root", extents=digest.extents,
                )  # fmt: skip
                asking = asyncio.create_task(client.commit(request))
                assert await eventually(ops.waiting.is_set)
                asking.cancel()
        async with CatalogClient(paths, slot=0) as client:
            asyncio.get_running_loop().call_later(0.5, ops.gate.set)
            async with worker(paths, memory, client) as two:
                for _ in range(3):
                    await two.segments.recycle_idle()
                record = await client.head("b", b"k")
                assert record.object_id == digest.object_id
                assert await get(two, record) == new
                await two.close(10)


def _dies(plane: Buffer) -> None:
    """Nothing that the worker does from here on reaches the disk."""
    plane.writer.submit = lambda *_: None  # type: ignore[method-assign]
    plane.writer.pump_lazy = lambda **_: None  # type: ignore[method-assign]


@pytest.mark.parametrize("length", [5000, 5 * MIB, 9 * MIB + 77])
async def test_an_object_that_was_to_move_outlives_its_worker(
    paths: NodePaths, memory: Any, client: CatalogClient, disk: Disk, length: int
) -> None:
    """Its file failed after the acknowledgement. Until the catalogue knows of the new place the worker owes the old one."""
    await client.create_bucket("b", "root")
    await client.set_bucket_tags("b", {"hiss.durability": "memory"})
    body = os.urandom(length)

    def away(path: str, _: int) -> None:
        if path.endswith(".seg"):
            raise EIO

    async with worker(paths, memory, client) as one:
        disk.rule = away
        await put(one, b"k", body)
        one.writer.hasten_all()
        assert await eventually(lambda: _count(one, "hiss_segment_retired_total") >= 1)
        await asyncio.sleep(0.1)
        _dies(one)
    disk.rule = lambda *_: None
    async with worker(paths, memory, client) as two:
        await _all_read_back(two, {b"k": body})
        await two.close(10)


@pytest.mark.parametrize("length", [5000, 9 * MIB])
async def test_an_object_that_moved_outlives_its_worker(
    paths: NodePaths, memory: Any, client: CatalogClient, disk: Disk, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """It is durable in its new place, of which the catalogue has not been told."""
    await client.create_bucket("b", "root")
    await client.set_bucket_tags("b", {"hiss.durability": "memory"})
    body, failures, asked = os.urandom(length), [EIO], asyncio.Event()

    def once(path: str, _: int) -> None:
        if path.endswith(".seg") and failures:
            raise failures.pop()

    async def never(*_: object) -> None:
        asked.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr(client, "relocate", never)
        async with worker(paths, memory, client) as one:
            disk.rule = once
            await put(one, b"k", body)
            one.writer.hasten_all()
            await asyncio.wait_for(asked.wait(), 60)
            _dies(one)
    async with worker(paths, memory, client) as two:
        await _all_read_back(two, {b"k": body})
        await two.close(10)


async def test_a_file_that_a_commit_under_way_names_is_not_removed(
    paths: NodePaths, memory: Any, client: CatalogClient, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.create_bucket("b", "root")
    await client.set_bucket_tags("b", {"hiss.durability": "memory"})
    body, go, commit = os.urandom(5000), asyncio.Event(), client.commit

    async def late(request: CommitObject, **how: Any) -> ObjectRecord:
        await go.wait()
        return await commit(request, **how)

    def away(path: str, _: int) -> None:
        if path.endswith(".seg"):
            raise EIO

    async with worker(paths, memory, client) as one:
        stream = one.open_stream(await _plane.spec_for(one, b"k", len(body)))
        await _plane.receive(stream, body)
        digest = await stream.finish()
        with monkeypatch.context() as patch:
            patch.setattr(client, "commit", late)
            committing = asyncio.create_task(stream.commit(_faults._commit(b"k", digest)))
            disk.rule = away
            one.writer.hasten_all()
            assert await eventually(lambda: stream._stranded)
            await asyncio.sleep(REMOVE_EVERY_S)
            await one.segments.recycle_idle()
            go.set()
            record = await committing
        assert record.extents[0].segment in one.segments.segments
        _dies(one)
    disk.rule = lambda *_: None
    async with worker(paths, memory, client) as two:
        await _all_read_back(two, {b"k": body})
        await two.close(10)


async def test_bytes_in_memory_outlive_the_header_of_their_file(
    paths: NodePaths, memory: Any, client: CatalogClient, owing: dict[bytes, bytes]
) -> None:
    for path in paths.segment_file(0, 0).parent.iterdir():
        with path.open("r+b") as file:
            file.write(bytes(4096))
    async with worker(paths, memory, client) as two:
        await _all_read_back(two, owing)
        await two.close(10)


async def test_a_commit_that_was_under_way_is_settled_by_the_next_worker(
    paths: NodePaths, memory: Any, serving: Callable[..., contextlib.AbstractAsyncContextManager[None]]
) -> None:
    """It asks what it owes only when everything that its predecessor asked for is decided."""
    ops, body = _SlowFlush(), os.urandom(5000)
    async with serving(ops=ops):
        async with CatalogClient(paths, slot=0) as client:
            await client.create_bucket("b", "root")
            await client.set_bucket_tags("b", {"hiss.durability": "memory"})
            async with worker(paths, memory, client) as one:
                one.writer.pump_lazy = lambda **_: None
                stream = one.open_stream(await _plane.spec_for(one, b"k", len(body)))
                await _plane.receive(stream, body)
                digest = await stream.finish()
                ops.gate.clear()
                request = CommitObject(
                    bucket="b", key=b"k", object_id=digest.object_id, length=digest.length, etag="e",
                    crc64nvme=digest.crc64nvme, owner="root", extents=digest.extents,
                    durability=Durability.MEMORY, settled=False,
                )  # fmt: skip
                # The bucket makes the batch wait for the disk, which an object in memory does not.
                asking = asyncio.gather(client.commit(request), client.create_bucket("c", "root"))
                assert await eventually(ops.waiting.is_set)
                asking.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asking
        async with CatalogClient(paths, slot=0) as client:
            asyncio.get_running_loop().call_later(0.5, ops.gate.set)
            async with worker(paths, memory, client) as two:
                await _all_read_back(two, {b"k": body})
                await two.close(10)


async def test_what_goes_elsewhere_finds_room_where_every_file_exists(
    paths: NodePaths, memory: Any, client: CatalogClient, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "RETRY_PAUSES_S", (0.01,))
    await client.create_bucket("b", "root")
    await client.set_bucket_tags("b", {"hiss.durability": "memory"})
    body = os.urandom(5000)
    async with worker(paths, memory, client, files_max=6) as one:
        one.writer.pump_lazy = lambda **_: None
        record = await put(one, b"k", body)
        while len(one.segments.segments) < 6:
            one.segments._create()
    bad = str(paths.segment_file(0, record.extents[0].segment))

    def rule(path: str, _: int) -> None:
        if path == bad:
            raise EIO

    disk.rule = rule
    async with worker(paths, memory, client, files_max=6) as two:
        await _all_read_back(two, {b"k": body})
        await two.close(10)


async def test_what_is_lost_is_named_once_and_no_lock_keeps_it(paths: NodePaths, client: CatalogClient) -> None:
    """The host's memory is gone, and a legal hold on the version cannot bring it back."""
    await client.create_bucket("b", "root", documents=versioning.with_lock())
    await client.set_bucket_tags("b", {"hiss.durability": "memory"})
    before, after = _plane.Memory(), _plane.Memory()
    async with worker(paths, before, client) as one:
        one.writer.pump_lazy = lambda **_: None
        record = await put(one, b"gone", os.urandom(50_000))
        await client.set_legal_hold("b", b"gone", record.version_id, True)
    async with asyncio.timeout(60), worker(paths, after, client) as two:
        assert [lost.key for lost in two.lost] == [b"gone"]
        await two.close(10)
    assert (paths.root / "lost-objects.jsonl").read_text().count("\n") == 1
    before.close()
    after.close()


async def test_a_file_that_cannot_be_written_any_more_is_read(
    paths: NodePaths, memory: Any, client: CatalogClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file system that was remounted read-only."""
    await client.create_bucket("b", "root")
    async with worker(paths, memory, client) as one:
        record = await put(one, b"a", body := os.urandom(MIB))
        await one.close(10)
    real = os.open

    def refuses(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if str(path).endswith(".seg") and flags & (os.O_RDWR | os.O_CREAT):
            raise OSError(30, "Read-only file system")
        return real(path, flags, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuses)
        async with worker(paths, memory, client) as two:
            assert await get(two, record) == body
            with pytest.raises(BufferFull):
                await put(two, b"b", body)
            await two.close(10)


# -- a worker that runs beside one


def _count(buffer: Buffer, name: str, *labels: str) -> float:
    return float(buffer.segments._counters.cell(name, *labels).value())


async def _fill_and_empty(buffer: Buffer) -> None:
    """Every file that may exist exists, and nothing lives in any but the first."""
    for number in range(15):
        await put(buffer, b"filler%d" % number, bytes(28 * MIB))
    await buffer.catalog.delete([DeleteObject("b", b"filler%d" % number) for number in range(15)])
    buffer.segments.seal_all()
    await buffer.segments.recycle_idle()
    assert await eventually(lambda: len(buffer.segments._free) >= len(buffer.segments.segments) - 1)


async def test_a_disk_that_was_away_for_a_while_costs_no_room(buffer: Buffer, disk: Disk) -> None:
    """Each write that failed has retired a file. When the disk is back there is room for as much as before."""
    body = os.urandom(5 * MIB)
    kept = await put(buffer, b"kept", body)
    await _fill_and_empty(buffer)
    full = len(buffer.segments.segments)

    def away(*_: object) -> None:
        raise OSError(5, "Input/output error")

    disk.rule = away
    for number in range(3 * full):
        with pytest.raises((StorageFailed, BufferFull)):
            await put(buffer, b"lost", bytes((7000, 6 * MIB)[number % 2]))
    assert _count(buffer, "hiss_segment_retired_total") >= full - 1
    disk.rule = lambda *_: None
    await asyncio.sleep(REMOVE_EVERY_S)
    await buffer.segments.recycle_idle()
    large = os.urandom(int(0.8 * full) * 28 * MIB)
    record = await put(buffer, b"large", large)
    assert await get(buffer, record) == large
    assert await get(buffer, kept) == body
    files = {int(path.stem) for path in buffer.paths.segment_file(0, 0).parent.iterdir()}
    assert files == set(buffer.segments.segments)
    assert len(files) <= full
    assert fsck(buffer.paths.root, payload=True).problems == []


async def test_a_file_is_not_used_again_while_a_thread_is_at_it(
    buffer: Buffer, disk: Disk, gates: list[threading.Event]
) -> None:
    """A mend whose PUT was given up: its late write would land in what comes after."""
    record = await put(buffer, b"k", os.urandom(12 * MIB))
    (extent,) = record.extents
    segment = buffer.segments.segments[extent.segment]

    def late(*_: object) -> None:
        gates[0].wait(60)

    disk.rule = late
    buffer.writer.submit(Patch(segment, extent.offset + LABEL_BYTES + 100, b"late"))
    await buffer.catalog.delete([DeleteObject("b", b"k")])
    buffer.segments.seal_all()
    for _ in range(3):
        await buffer.segments.recycle_idle()
        assert segment.generation == extent.generation
    gates[0].set()
    assert await eventually(lambda: not segment.in_flight)
    await buffer.segments.recycle_idle()
    assert segment.generation == extent.generation + 1


async def test_every_file_that_cannot_be_made_is_counted(buffer: Buffer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        for _ in range(2):
            with pytest.raises(BufferFull, match="No space left on device"):
                await put(buffer, b"k", b"x" * 100)
    assert _count(buffer, "hiss_storage_errors_total", "segment") == 2
    await put(buffer, b"k", b"x" * 100)


@pytest.fixture
async def sparse(buffer: Buffer) -> list[ObjectRecord]:
    """Two objects that are all that lives in a segment, which is not the current one."""
    records = [await put(buffer, b"a", os.urandom(200_000)), await put(buffer, b"b", os.urandom(200_000))]
    await put(buffer, b"filler", bytes(31 * MIB))
    await put(buffer, b"more", os.urandom(20 * MIB))
    await buffer.catalog.delete([DeleteObject("b", b"filler")])
    buffer.segments.seal_all()
    return records


@pytest.mark.parametrize("kind", ["write", "flush"])
async def test_a_copy_that_cannot_be_written_is_counted_and_made_elsewhere(
    buffer: Buffer, sparse: list[ObjectRecord], disk: Disk, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    failures: list[OSError] = []
    real = os.fdatasync

    def fail(path: str) -> None:
        if failures and path.endswith(".seg"):
            raise failures.pop()

    def fdatasync(fd: int) -> None:
        fail(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    if kind == "write":
        disk.rule = lambda path, offset: fail(path)
    else:
        monkeypatch.setattr(os, "fdatasync", fdatasync)
    await buffer.segments.prepare_spare(lambda: False)
    failures.append(OSError(5, "Input/output error"))
    source = buffer.segments.segments[sparse[0].extents[0].segment]
    generation = source.generation
    counters = Counters(None, 0)
    stop = asyncio.Event()
    keeper = asyncio.create_task(housekeep(buffer, counters, stop))
    assert await eventually(lambda: source.generation > generation)
    stop.set()
    await keeper
    assert _count(buffer, "hiss_storage_errors_total", kind) == 1
    assert not source.retired
    for record in sparse:
        assert len(await get(buffer, await buffer.catalog.by_id(record.object_id))) == record.length


async def test_what_cannot_be_moved_stays_and_costs_no_file(
    buffer: Buffer, sparse: list[ObjectRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad sector under one object: the others move, nothing is retired, and it is tried again later and later."""
    monkeypatch.setattr(compaction, "UNREADABLE_PAUSE_S", 1.5)
    source = buffer.segments.segments[sparse[0].extents[0].segment]
    real, bad, away = os.preadv, sparse[0].extents[0], [EIO]

    def preadv(fd: int, views: Any, offset: int, *rest: int) -> int:
        if away and os.readlink(f"/proc/self/fd/{fd}") == str(source.path):
            if bad.offset <= offset < bad.offset + bad.stored_bytes:
                raise away[0]
        return real(fd, views, offset, *rest)

    monkeypatch.setattr(os, "preadv", preadv)
    counters = Counters(None, 0)
    generation = source.generation
    async with _housekeeping(buffer, counters):
        moved, errors = (
            counters.cell("hiss_segment_compacted_bytes_total"),
            counters.cell("hiss_storage_errors_total", "read"),
        )
        assert await eventually(lambda: moved.value() == sparse[1].length)
        assert await eventually(lambda: errors.value() == 2)
        assert not any(one.retired for one in buffer.segments.segments.values())
        assert source.live_bytes == bad.stored_bytes
        away.clear()
        assert await eventually(lambda: source.generation > generation)
    for record in sparse:
        assert len(await get(buffer, record)) == record.length


async def test_housekeeping_goes_on_beside_an_eviction(
    buffer: Buffer, sparse: list[ObjectRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It evicts what was just listed as lying in the segment that is to be emptied."""
    for record in await buffer.catalog.claim_drain(10, 60):
        await buffer.catalog.drained(record.object_id, ArchiveCopy("posix", "b/x", record.crc64nvme, 1))
    listed, evicted = threading.Event(), threading.Event()

    def slow(self: Reader, slot: int, segment: int) -> Any:
        of = {"node": self._node, "slot": slot, "segment": segment}
        places = self._db.execute(statements.SEGMENT_EXTENTS, of).fetchall()
        listed.set()
        evicted.wait(60)
        for *place, holder in places:
            row = self._db.execute(statements.BY_ID, {"object_id": holder}).fetchone()
            yield (None if row is None else rows.object_record(row)), Extent(*place)

    monkeypatch.setattr(Reader, "_segment_extents", slow)
    source = buffer.segments.segments[sparse[0].extents[0].segment]
    generation = source.generation
    async with _housekeeping(buffer):
        assert await eventually(listed.is_set)
        await buffer.catalog.evicted(sparse[0].object_id)
        evicted.set()
        assert await eventually(lambda: source.generation > generation)
    moved = await buffer.catalog.by_id(sparse[1].object_id)
    assert len(await get(buffer, moved)) == moved.length


@pytest.mark.parametrize("kind", ["full", "read-only", "takes nothing"])
async def test_an_idle_worker_is_quiet_beside_an_ill_disk(
    buffer: Buffer, disk: Disk, sparse: list[ObjectRecord], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, kind: str,
) -> None:  # fmt: skip
    """It tries later and later to have a file ahead; and on a full disk it still moves what makes room."""
    monkeypatch.setattr(segments, "SPARE_PAUSE_MAX_S", 1000.0)
    buffer.segments._free.clear()
    await put(buffer, b"opens a file", os.urandom(5 * MIB))
    tried: list[str] = []
    allocate, open_file = os.posix_fallocate, os.open

    def full(fd: int, offset: int, length: int) -> None:
        tried.append("file")
        if kind == "full":
            raise OSError(28, "No space left on device")
        allocate(fd, offset, length)

    def read_only(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if kind == "read-only" and str(path).endswith(".seg") and flags & os.O_CREAT:
            tried.append("file")
            raise OSError(30, "Read-only file system")
        return open_file(path, flags, *rest, **named)

    def rule(path: str, _: int) -> None:
        if kind == "takes nothing" and path.endswith(".seg"):
            raise EIO

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(os, "open", read_only)
    disk.rule = rule
    caplog.set_level(logging.WARNING)
    caplog.clear()
    counters = Counters(None, 0)
    async with _housekeeping(buffer, counters):
        if kind == "full":
            moved = counters.cell("hiss_segment_compacted_bytes_total")
            assert await eventually(lambda: moved.value() == sum(record.length for record in sparse))
        await asyncio.sleep(6.5)
    assert 1 <= len(tried) <= 6  # five times the pauses 1, 2 and 4 s have room, for the spare file and for what moves
    said = [record.getMessage() for record in caplog.records if "housekeeping" not in record.getMessage()]
    assert len(said) <= 4 * len(tried)


async def test_a_body_that_is_given_up_between_write_and_flush_costs_no_file(
    buffer: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file may not go, or be used again, before the flush: the descriptor would be another file's by then."""
    monkeypatch.setattr(writer, "FLUSH_AFTER_S", 1.0)
    await _fill_and_empty(buffer)
    stream = buffer.open_stream(await _plane.spec_for(buffer, b"x", 30 * MIB))
    await _plane.receive(stream, os.urandom(9 * MIB))
    assert await eventually(lambda: sum(map(len, buffer.writer._unflushed.values())) >= 2)
    segment = next(iter(buffer.writer._unflushed))
    buffer.segments._files_max = len(buffer.segments.segments)
    await stream.abort()
    buffer.segments.seal_all()
    await buffer.segments.recycle_idle()
    assert buffer.segments.segments[segment.number] is segment
    assert await eventually(lambda: not segment.in_flight)
    assert _count(buffer, "hiss_segment_retired_total") == 0
    assert _count(buffer, "hiss_storage_errors_total", "flush") == 0


async def test_what_only_memory_has_outlasts_the_disk_and_is_said_once(
    buffer: Buffer, disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await buffer.catalog.set_bucket_tags("b", {"hiss.durability": "memory"})

    def away(*_: object) -> None:
        raise EIO

    disk.rule = away
    for number in range(20):
        await put(buffer, b"k%d" % number, os.urandom((5000, 5 * MIB)[number % 10 == 0]))
    buffer.writer.hasten_all()
    assert await eventually(lambda: _count(buffer, "hiss_segment_retired_total") >= 16)
    await asyncio.sleep(3)
    said = [record for record in caplog.records if "is only in memory" in record.getMessage()]
    assert 1 <= len(said) <= 20
    disk.rule = lambda *_: None
    assert await eventually(lambda: not buffer._unsettled)


async def test_a_file_that_cannot_be_opened_is_no_bug(buffer: Buffer, monkeypatch: pytest.MonkeyPatch) -> None:
    record = await put(buffer, b"a", os.urandom(200_000))
    real = os.open

    def refuses(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if str(path).endswith(".seg"):
            raise EIO
        return real(path, flags, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuses)
        with pytest.raises(Unreadable, match="Input/output error"):
            await buffer.open_reader(record, 0, record.length)
    assert len(await get(buffer, record)) == record.length

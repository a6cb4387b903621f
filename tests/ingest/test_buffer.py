"""The data plane against a real catalogue process: bodies in, bytes out, memory and segments given back."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import zlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import pytest
from awscrt import checksums

from ingest import bucket_settings
from ingest.arena import SLAB_BYTES, Arena, create_regions
from ingest.buffer import Buffer
from ingest.catalog.client import CatalogClient
from ingest.compaction import housekeep
from ingest.counters import Counters
from ingest.errors import BufferFull, StorageFailed
from ingest.label import read_label
from ingest.paths import NodePaths
from ingest.records import CommitObject, DeleteObject, LifetimeClass, ObjectRecord
from ingest.recovery import recover
from ingest.segments import SegmentStore
from ingest.span_table import SpanTable
from ingest.stream_types import StreamSpec

MIB = 1 << 20
SEGMENT_BYTES = 32 * MIB


class Memory:
    """What the supervisor owns: it outlives a worker."""

    def __init__(self, regions: int = 2) -> None:
        self.fds = create_regions(regions)
        self.table = SpanTable.create(regions, (64 * MIB) // SLAB_BYTES)

    def close(self) -> None:
        for fd in (*self.fds, self.table):
            os.close(fd)


@pytest.fixture
def memory() -> AsyncIterator[Memory]:
    memory = Memory()
    yield memory
    memory.close()


@asynccontextmanager
async def worker(
    paths: NodePaths, memory: Memory, client: CatalogClient, *, files_max: int = 16
) -> AsyncIterator[Buffer]:
    counters = Counters(None, 0)
    executor = ThreadPoolExecutor(4)
    segments = SegmentStore(
        paths,
        node=0,
        slot=0,
        segment_bytes=SEGMENT_BYTES,
        files_max=files_max,
        files_elsewhere=lambda: 0,
        use=lambda: client.segment_use(0),
        durable=client.barrier,
        executor=executor,
        counters=counters,
    )
    arena = Arena(memory.fds, counters)
    spans = SpanTable(memory.table, (64 * MIB) // SLAB_BYTES)
    lost = await recover(paths, client, segments, arena, spans, counters)
    buffer = Buffer(
        paths=paths,
        arena=arena,
        spans=spans,
        segments=segments,
        catalog=client,
        executor=executor,
        counters=counters,
    )
    buffer.lost = lost  # type: ignore[attr-defined]
    try:
        yield buffer
    finally:
        executor.shutdown(wait=True)
        segments.close()


@pytest.fixture
async def buffer(paths: NodePaths, memory: Memory, client: CatalogClient) -> AsyncIterator[Buffer]:
    await client.create_bucket("b", "root")
    async with worker(paths, memory, client) as buffer:
        yield buffer
        await buffer.close(10)
        assert await eventually(lambda: buffer.arena.used_bytes <= 2 * 16 * MIB), "spans were not given back"


async def eventually(condition: Callable[[], object], timeout_s: float = 60.0) -> bool:
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.005)
    return True


async def spec_for(buffer: Buffer, key: bytes, length: int | None, **changes: object) -> StreamSpec:
    bucket = await buffer.catalog.bucket("b")
    settings = bucket_settings.parse(bucket.tags)
    return StreamSpec(bucket=bucket, settings=settings, key=key, length=length, **changes)  # type: ignore[arg-type]


async def receive(stream: object, body: bytes, step: int = MIB) -> None:
    done = 0
    while done < len(body):
        view = stream.get_buffer()  # type: ignore[attr-defined]
        if view is None:
            await stream.writable()  # type: ignore[attr-defined]
            continue
        count = min(len(view), len(body) - done, step)
        view[:count] = body[done : done + count]
        stream.received(count)  # type: ignore[attr-defined]
        done += count
        if random.random() < 0.2:
            await asyncio.sleep(0)


async def put(buffer: Buffer, key: bytes, body: bytes, *, known: bool = True, **changes: object) -> ObjectRecord:
    spec = await spec_for(buffer, key, len(body) if known else None, **changes)
    stream = buffer.open_stream(spec)
    try:
        await receive(stream, body)
        digest = await stream.finish()
        assert digest.crc64nvme == checksums.crc64nvme(body)
        assert digest.length == len(body)
        for name, value in digest.digests.items():
            if name in ("md5", "sha256", "sha1"):
                assert value == hashlib.new(name, body).digest()
            if name == "crc32":
                assert int.from_bytes(value, "big") == zlib.crc32(body)
        return await stream.commit(
            CommitObject(
                bucket="b",
                key=key,
                object_id=digest.object_id,
                length=digest.length,
                etag="e",
                crc64nvme=digest.crc64nvme,
                owner="root",
                extents=digest.extents,
                durability=spec.settings.durability,
                settled=digest.settled,
            )
        )
    finally:
        await stream.abort()


async def get(buffer: Buffer, record: ObjectRecord, start: int = 0, stop: int | None = None) -> bytes:
    out = bytearray()
    async with await buffer.open_reader(record, start, record.length if stop is None else stop) as reader:
        async for chunk in reader.chunks(MIB):
            out += chunk
        buffered = b"".join(os.pread(piece.fd, piece.length, piece.offset) for piece in reader.pieces)
    assert bytes(out) == buffered, "reads past the page cache and through it differ"
    return bytes(out)


LENGTHS = (0, 1, 4095, 4096, 4097, 300_000, MIB, MIB + 1, 4 * MIB - 4096, 4 * MIB, 9 * MIB + 123, 70 * MIB + 5)


@pytest.mark.parametrize("durability", ["disk", "memory"])
@pytest.mark.parametrize("known", [True, False])
async def test_bodies_of_every_length_read_back(buffer: Buffer, durability: str, known: bool) -> None:
    await buffer.catalog.set_bucket_tags("b", {"hiss.durability": durability})
    for length in LENGTHS:
        body = os.urandom(length)
        algorithms = frozenset({"md5", "sha256", "crc32"}) if length % 2 else frozenset[str]()
        record = await put(buffer, str(length).encode(), body, known=known, algorithms=algorithms)
        assert await get(buffer, record) == body
        if length > 100:
            assert await get(buffer, record, 7, length - 50) == body[7 : length - 50]


async def test_concurrent_bodies_keep_to_themselves(buffer: Buffer) -> None:
    lengths = [5_000, 3 * MIB, MIB, 12 * MIB] * 6  # as many large ones as are admitted at a time
    bodies = {f"k{n}".encode(): os.urandom(length) for n, length in enumerate(lengths)}
    records = await asyncio.gather(*(put(buffer, key, body) for key, body in bodies.items()))
    for record, (_key, body) in zip(records, bodies.items(), strict=True):
        assert await get(buffer, record) == body


async def test_every_extent_starts_with_its_label(buffer: Buffer, paths: NodePaths) -> None:
    for key, length in ((b"small", 1000), (b"large", 50 * MIB)):
        record = await put(buffer, key, os.urandom(length))
        position = 0
        for extent in record.extents:
            fd = os.open(paths.segment_file(extent.slot, extent.segment), os.O_RDONLY)
            label = read_label(fd, extent.offset)
            os.close(fd)
            assert label is not None
            assert (label.object_id, label.key, label.position) == (record.object_id, key, position)
            position += extent.length


async def test_aborted_bodies_give_everything_back(buffer: Buffer) -> None:
    for length in (1000, 20 * MIB, None):
        stream = buffer.open_stream(await spec_for(buffer, b"gone", length))
        await receive(stream, os.urandom(900 if length == 1000 else 9 * MIB))
        await stream.abort()
        await stream.abort()
    assert await eventually(lambda: buffer.arena.used_bytes <= 16 * MIB)
    assert buffer.segments.live_bytes == 0


async def test_full_buffer_refuses_before_the_body(paths: NodePaths, memory: Memory, client: CatalogClient) -> None:
    await client.create_bucket("b", "root")
    async with worker(paths, memory, client, files_max=2) as buffer:
        record = await put(buffer, b"one", os.urandom(25 * MIB))
        with pytest.raises(BufferFull):
            buffer.open_stream(await spec_for(buffer, b"two", 60 * MIB))
        assert buffer.arena.used_bytes == 0
        await client.delete([DeleteObject("b", b"one")])
        assert await eventually(lambda: buffer.segments.live_bytes == 0)
        assert await get(buffer, await put(buffer, b"three", b"x" * 25 * MIB)) == b"x" * 25 * MIB
        assert record.extents
        await buffer.close(10)


async def test_segments_are_recycled_and_readers_are_safe(buffer: Buffer) -> None:
    """Objects come and go through few segments while readers hold on: no reader ever sees another object's bytes."""
    stop = asyncio.Event()
    live: dict[bytes, tuple[ObjectRecord, int]] = {}
    reads = 0

    async def reader() -> None:
        nonlocal reads
        while not stop.is_set():
            for record, value in list(live.values()):
                try:
                    opened = await buffer.open_reader(record, 0, record.length)
                except Exception:
                    continue  # deleted meanwhile
                async with opened:
                    await asyncio.sleep(random.random() * 0.02)
                    async for chunk in opened.chunks(MIB):
                        assert bytes(chunk) == bytes([value]) * len(chunk)
                        reads += 1
            await asyncio.sleep(0)

    readers = [asyncio.create_task(reader()) for _ in range(4)]
    for number in range(60):
        key = f"k{number % 5}".encode()
        value = number % 251 + 1
        live.pop(key, None)
        record = await put(buffer, key, bytes([value]) * (7 * MIB))
        live[key] = (record, value)
    stop.set()
    await asyncio.gather(*readers)
    assert reads > 100
    assert len(buffer.segments.segments) < 12
    assert any(segment.generation > 1 for segment in buffer.segments.segments.values()), "nothing was recycled"


async def test_memory_objects_survive_the_worker(paths: NodePaths, memory: Memory, client: CatalogClient) -> None:
    await client.create_bucket("b", "root")
    await client.set_bucket_tags("b", {"hiss.durability": "memory"})
    bodies = {b"small": os.urandom(5000), b"large": os.urandom(20 * MIB), b"million": os.urandom(MIB)}
    async with worker(paths, memory, client) as buffer:
        buffer.writer.pump_lazy = lambda: None  # type: ignore[method-assign]  # nothing is written back in this life
        for key, body in bodies.items():
            assert not (await put(buffer, key, body)).settled
    async with worker(paths, memory, client) as buffer:
        assert buffer.lost == []  # type: ignore[attr-defined]
        for key, body in bodies.items():
            record = await client.head("b", key)
            assert record.settled
            assert await get(buffer, record) == body
        await buffer.close(10)


async def test_memory_objects_lost_with_the_host_are_named(
    paths: NodePaths, memory: Memory, client: CatalogClient
) -> None:
    await client.create_bucket("b", "root")
    await client.set_bucket_tags("b", {"hiss.durability": "memory"})
    async with worker(paths, memory, client) as buffer:
        buffer.writer.pump_lazy = lambda: None  # type: ignore[method-assign]
        await put(buffer, b"gone", os.urandom(5 * MIB))
    other = Memory()
    async with worker(paths, other, client) as buffer:
        assert [record.key for record in buffer.lost] == [b"gone"]  # type: ignore[attr-defined]
        assert "gone" in (paths.root / "lost-objects.jsonl").read_text()
        assert (await client.list_objects("b"))[0] == []
        await buffer.close(10)
    other.close()


@pytest.mark.parametrize("durability", ["disk", "memory"])
@pytest.mark.parametrize("length", [5000, 20 * MIB])
@pytest.mark.parametrize("call", ["pwritev", "fdatasync"])
async def test_a_failing_segment_costs_nothing(
    buffer: Buffer, monkeypatch: pytest.MonkeyPatch, call: str, length: int, durability: str
) -> None:
    """EIO on the first write or flush: the bytes go elsewhere from the arena, the file is never written again."""
    await buffer.catalog.set_bucket_tags("b", {"hiss.durability": durability})
    real = getattr(os, call)
    faults = [OSError(5, "Input/output error")]

    def broken(fd: int, *rest: object) -> object:
        # The catalogue lives in this process, too, and flushes its journal. Several threads come here at once.
        if "/segments/" in os.readlink(f"/proc/self/fd/{fd}"):
            with contextlib.suppress(IndexError):
                raise faults.pop()
        return real(fd, *rest)

    monkeypatch.setattr(os, call, broken)
    body = os.urandom(length)
    record = await put(buffer, b"k", body)
    assert await get(buffer, await buffer.catalog.by_id(record.object_id)) == body
    assert faults == []
    assert sum(segment.retired for segment in buffer.segments.segments.values()) == 1


async def test_storage_that_always_fails_is_a_clear_error(buffer: Buffer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", broken)
    for length in (1000, 5 * MIB):
        with pytest.raises((StorageFailed, BufferFull)):
            await put(buffer, b"k", os.urandom(length))
    monkeypatch.undo()
    body = os.urandom(5 * MIB)
    assert await get(buffer, await put(buffer, b"k", body)) == body


async def test_products_are_stored_through_the_landing_pad(buffer: Buffer) -> None:
    body = os.urandom(2 * MIB)
    request = CommitObject(
        bucket="b", key=b"_products/k/x.nxs", object_id=os.urandom(16), length=0, etag="", crc64nvme=0,
        owner="root", extents=(),
    )  # fmt: skip
    record = await buffer.store(request, body)
    assert record.crc64nvme == checksums.crc64nvme(body)
    assert await get(buffer, record) == body
    assert LifetimeClass.PRODUCT in buffer.segments._current


async def test_nearly_empty_segments_are_compacted(buffer: Buffer) -> None:
    """A survivor in a segment of dead extents moves elsewhere, and its old segment is free again."""
    body = os.urandom(200_000)
    survivor = await put(buffer, b"survivor", body, lifetime=LifetimeClass.STREAM)
    for number in range(4):
        await put(buffer, b"filler%d" % number, os.urandom(14 * MIB))
    await buffer.catalog.delete([DeleteObject("b", b"filler%d" % number) for number in range(4)])
    old = survivor.extents[0]
    stop = asyncio.Event()
    keeper = asyncio.create_task(housekeep(buffer, Counters(None, 0), stop))
    deadline = asyncio.get_running_loop().time() + 60
    moved = await buffer.catalog.by_id(survivor.object_id)
    while moved.extents[0] == old and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.02)
        moved = await buffer.catalog.by_id(survivor.object_id)
    assert moved.extents[0] != old
    assert await get(buffer, moved) == body
    assert await get(buffer, survivor) == body, "a reader with the old record finds the new place"
    assert await eventually(lambda: buffer.segments.segments[old.segment].generation > old.generation)
    assert buffer.segments.live_bytes == moved.extents[0].stored_bytes
    stop.set()
    await keeper

"""What must hold between two lines: writes that wait while another fails, commits nobody answers, places not yet free."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ingest.buffer import Buffer
from ingest.catalog.client import CatalogClient
from ingest.catalog.fsck import fsck
from ingest.errors import CatalogUnavailable, NoSuchKey, StaleVersion, StorageFailed
from ingest.label import read_label
from ingest.records import (
    LABEL_BYTES,
    CommitObject,
    CommitPart,
    CompletedPart,
    CompleteUpload,
    DeleteObject,
    Extent,
    LifetimeClass,
    ObjectRecord,
    PartRecord,
    UploadRecord,
)
from ingest.segments import Segment

MIB = 1 << 20


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"ingest_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The data plane of those tests, and how they use it.
_plane = _load("test_buffer")
memory, buffer = _plane.memory, _plane.buffer
put, get, eventually = _plane.put, _plane.get, _plane.eventually


class Disk:
    """``os.pwritev`` with gates and failures: ``rule(path, offset)`` says what a write does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writes: list[tuple[str, int]] = []
        self.rule: Callable[[str, int], None] = lambda path, offset: None
        real = os.pwritev

        def pwritev(fd: int, views: Any, offset: int, *rest: int) -> int:
            path = os.readlink(f"/proc/self/fd/{fd}")
            self.writes.append((path, offset))
            self.rule(path, offset)
            return real(fd, views, offset, *rest)

        monkeypatch.setattr(os, "pwritev", pwritev)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def gates() -> Iterator[list[threading.Event]]:
    """Gates for writes; all are open at the end, so that no thread stays behind."""
    made = [threading.Event(), threading.Event()]
    yield made
    for gate in made:
        gate.set()


async def test_writes_that_waited_do_not_touch_a_file_that_failed(
    buffer: Buffer, disk: Disk, gates: list[threading.Event]
) -> None:
    """Their places belong to the new file by then; in the failed one others' acknowledged bytes lie there."""
    kept = os.urandom(6 * MIB)
    record = await put(buffer, b"kept", kept)
    failed: list[str] = []
    failing, waiting = gates

    def rule(path: str, _: int) -> None:
        if not failed:
            failed.append(path)
            failing.wait(60)
            raise OSError(5, "Input/output error")

    disk.writes.clear()
    disk.rule = rule
    body = os.urandom(23 * MIB)
    stream = buffer.open_stream(await _plane.spec_for(buffer, b"moved", len(body)))
    await _plane.receive(stream, body[: 5 * MIB])
    assert await eventually(lambda: failed)
    busy = [buffer.executor.submit(waiting.wait, 10) for _ in range(4)]  # every thread, the failing one's next
    await _plane.receive(stream, body[5 * MIB :])
    failing.set()
    assert await eventually(lambda: any(one.retired for one in buffer.segments.segments.values()))
    waiting.set()
    digest = await stream.finish()
    assert [path for path, _ in disk.writes].count(failed[0]) == 1, "the failed file was written again"
    assert all(one.result() for one in busy)
    moved = await stream.commit(_commit(b"moved", digest))
    assert await get(buffer, moved) == body
    assert await get(buffer, record) == kept


def _commit(key: bytes, digest: Any) -> CommitObject:
    return CommitObject(
        bucket="b",
        key=key,
        object_id=digest.object_id,
        length=digest.length,
        etag="e",
        crc64nvme=digest.crc64nvme,
        owner="root",
        extents=digest.extents,
    )


async def test_a_small_object_that_moves_is_durable_only_in_its_new_place(
    buffer: Buffer, disk: Disk, gates: list[threading.Event]
) -> None:
    """Its first write succeeds late, in a file that another write has retired meanwhile: that counts for nothing."""
    await put(buffer, b"first", b"x" * 100, lifetime=LifetimeClass.SMALL)  # opens the slab of ``disk``
    segment = next(iter(buffer.segments.segments.values()))
    old_gate, new_gate = gates
    disk.writes.clear()
    disk.rule = lambda path, _: (old_gate if path == str(segment.path) else new_gate).wait(60) and None  # type: ignore[assignment]
    body = os.urandom(5000)
    putting = asyncio.create_task(put(buffer, b"moved", body, lifetime=LifetimeClass.SMALL))
    assert await eventually(lambda: len(disk.writes) == 1)
    buffer.writer._fail("write", segment, OSError(5, "Input/output error"), [])
    assert await eventually(lambda: len(disk.writes) == 2), "it moves at once"
    old_gate.set()
    await asyncio.sleep(0.1)
    assert not putting.done(), "acknowledged before its new place was written"
    new_gate.set()
    record = await putting
    assert segment.number not in {extent.segment for extent in record.extents}
    assert await get(buffer, record) == body


async def test_nobody_writes_to_a_retired_file(buffer: Buffer) -> None:
    """Bodies that were being received when their segment failed land elsewhere, small ones and large ones."""
    streams = []
    for length in (5000, 6 * MIB):
        stream = buffer.open_stream(await _plane.spec_for(buffer, b"%d" % length, length))
        view = stream.get_buffer()
        assert view is not None
        view[:100] = bytes(100)
        stream.received(100)
        streams.append((stream, length))
    for segment in list(buffer.segments.segments.values()):
        buffer.segments.retire(segment)
    retired = {segment.number for segment in buffer.segments.segments.values()}
    for stream, length in streams:
        await _plane.receive(stream, bytes(length - 100))
        digest = await stream.finish()
        assert retired.isdisjoint(extent.segment for extent in digest.extents)
        await stream.abort()


async def test_acknowledged_memory_objects_outlast_a_disk_that_takes_nothing(
    buffer: Buffer, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await buffer.catalog.set_bucket_tags("b", {"hiss.durability": "memory"})

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    disk.rule = broken
    bodies = {b"small": os.urandom(7000), b"large": os.urandom(9 * MIB)}
    records = {key: await put(buffer, key, body) for key, body in bodies.items()}
    buffer.writer.hasten_all()
    assert await eventually(lambda: sum(one.retired for one in buffer.segments.segments.values()) >= 4)
    disk.rule = lambda *_: None
    for key, body in bodies.items():
        assert await get(buffer, await buffer.catalog.settle(records[key].object_id, 20)) == body


async def test_segments_of_uncommitted_small_objects_are_not_recycled(
    buffer: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Durable, not yet known to the catalogue (it is being started again, say), and everything around them has died."""
    commit, answered = buffer.catalog.commit, asyncio.Event()

    async def late(request: CommitObject, **how: bool) -> ObjectRecord:
        await answered.wait()
        return await commit(request, **how)

    monkeypatch.setattr(buffer.catalog, "commit", late)
    body = os.urandom(9000)
    putting = asyncio.create_task(put(buffer, b"waits", body))
    assert await eventually(lambda: buffer.packer._open and not next(iter(buffer.packer._open.values())).members)
    buffer.packer.close_idle()
    buffer.segments.seal_all()
    await buffer.segments.recycle_idle()
    answered.set()
    record = await putting
    assert await get(buffer, record) == body


async def test_news_of_freed_extents_that_never_came_costs_no_space(
    buffer: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = await put(buffer, b"k", os.urandom(5 * MIB))
    monkeypatch.setattr(buffer.segments, "freed", lambda extents: None)
    await buffer.catalog.delete([DeleteObject("b", b"k")])
    buffer.segments.seal_all()
    await buffer.segments.recycle_idle()
    segment = buffer.segments.segments[record.extents[0].segment]
    assert (segment.live_bytes, segment.generation) == (0, record.extents[0].generation + 1)


async def test_wrong_news_never_recycles_a_segment_that_lives(buffer: Buffer) -> None:
    body = os.urandom(5 * MIB)
    record = await put(buffer, b"k", body)
    buffer.segments.seal_all()
    buffer.segments.freed([*record.extents, *record.extents])
    await buffer.segments.recycle_idle()
    assert await get(buffer, record) == body


async def test_news_that_comes_while_segments_are_recycled_recycles_no_other(
    buffer: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count was taken before, and has no part in what the news says."""
    dead = await put(buffer, b"dead", os.urandom(30 * MIB))
    body = os.urandom(20 * MIB)
    record = await put(buffer, b"k", body)
    assert dead.extents[0].segment < record.extents[0].segment
    await buffer.catalog.delete([DeleteObject("b", b"dead")])
    buffer.segments.seal_all()
    recycle = buffer.segments._recycle

    async def and_then_news(segment: Segment) -> None:
        await recycle(segment)
        buffer.segments.freed([*record.extents, *record.extents])

    monkeypatch.setattr(buffer.segments, "_recycle", and_then_news)
    await buffer.segments.recycle_idle()
    recycled = buffer.segments.segments[dead.extents[0].segment]
    assert await eventually(lambda: recycled.generation == 2)
    assert await get(buffer, record) == body


async def test_a_commit_without_an_answer_never_overwrites_what_came_later(
    buffer: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client was told that it failed, and has put something else since."""
    commit = buffer.catalog.commit

    async def nobody(*_: object, **__: object) -> ObjectRecord:
        raise CatalogUnavailable("nobody answers")

    monkeypatch.setattr(buffer.catalog, "commit", nobody)
    with pytest.raises(CatalogUnavailable):
        await put(buffer, b"k", b"old" * 1000)
    await asyncio.sleep(0.05)  # the outcome is asked for now, and again later
    monkeypatch.setattr(buffer.catalog, "commit", commit)
    record = await put(buffer, b"k", b"new" * 1000)
    assert await eventually(lambda: not buffer._tasks), "the outcome was never asked for"
    assert (await buffer.catalog.head("b", b"k")).object_id == record.object_id


@pytest.mark.parametrize("error", [CatalogUnavailable("nobody answers"), StorageFailed("journal: EIO")])
async def test_an_object_whose_settling_failed_once_is_settled_all_the_same(
    buffer: Buffer, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    await buffer.catalog.set_bucket_tags("b", {"hiss.durability": "memory"})
    settled, failures = buffer.catalog.settled, [error]

    async def once(object_ids: list[bytes]) -> None:
        if failures:
            raise failures.pop()
        await settled(object_ids)

    monkeypatch.setattr(buffer.catalog, "settled", once)
    record = await put(buffer, b"k", b"x" * 5000)
    assert (await buffer.catalog.settle(record.object_id, 10)).settled
    assert not failures


async def test_a_lost_version_is_deleted_and_not_its_successor(
    client: CatalogClient, commit_of: Callable[..., CommitObject]
) -> None:
    """The client sent the same bytes again, to a worker that was quicker to start: the same key, the same ETag."""
    await client.create_bucket("run", "root")
    lost = await client.commit(commit_of("run", b"k"))
    again = await client.commit(commit_of("run", b"k"))
    (deleted,) = await client.delete([DeleteObject("run", b"k", object_id=lost.object_id)])
    assert not deleted.existed  # type: ignore[union-attr]
    assert (await client.head("run", b"k")).object_id == again.object_id
    await client.delete([DeleteObject("run", b"k", object_id=again.object_id)])
    with pytest.raises(NoSuchKey):
        await client.head("run", b"k")


@pytest.mark.parametrize("end", ["complete", "abort"])
async def test_the_outcome_of_a_part_is_known_after_its_upload_has_ended(client: CatalogClient, end: str) -> None:
    """Else its worker would take a linked part for refused, and write over its bytes."""
    await client.create_bucket("run", "root")
    await client.create_upload(UploadRecord("run", b"big", "u1", "root", 1))
    requests = []
    for number in (1, 2):
        extent = Extent(0, 0, 1, 1, number << 20, 100)
        part = PartRecord(number, 100, f"etag{number}", number, extents=(extent,))
        requests.append(CommitPart("run", b"big", "u1", part, os.urandom(16)))
        await client.commit_part(requests[-1])
    if end == "complete":
        named = tuple(CompletedPart(number, f"etag{number}") for number in (1, 2))
        await client.complete_upload(CompleteUpload("run", b"big", "u1", os.urandom(16), named, "whole-2", 9, 200))
    else:
        await client.abort_upload("run", b"big", "u1")
    for request in requests:
        assert (await client.commit_part(request, only_if_known=True)).extents == request.part.extents
    unknown = CommitPart("run", b"big", "u1", requests[0].part, os.urandom(16))
    with pytest.raises(StaleVersion):
        await client.commit_part(unknown, only_if_known=True)


async def test_the_rest_of_an_acknowledged_memory_object_moves(
    buffer: Buffer, disk: Disk, gates: list[threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its head was durable when the segment failed and stays; the catalogue hears of both, and counts both."""
    await buffer.catalog.set_bucket_tags("b", {"hiss.durability": "memory"})

    def rule(path: str, offset: int) -> None:
        if offset > 9 * MIB and path.endswith("000001.seg"):
            gates[0].wait(60)
            raise OSError(5, "Input/output error")

    disk.rule = rule
    body = os.urandom(20 * MIB)
    record = await put(buffer, b"k", body)
    (stream,) = (one for one in buffer._streams if one.object_id == record.object_id)
    stream.hasten()
    assert await eventually(lambda: stream._pieces[0].position > 0 or stream._pieces[0].durable), "the head is durable"
    relocate, heard = buffer.catalog.relocate, asyncio.Event()

    async def late(*arguments: Any) -> None:
        await heard.wait()
        await relocate(*arguments)

    monkeypatch.setattr(buffer.catalog, "relocate", late)
    gates[0].set()
    assert await eventually(lambda: stream.is_settled)
    buffer.segments.seal_all()
    await buffer.segments.recycle_idle()
    heard.set()
    settled = await buffer.catalog.settle(record.object_id, 10)
    assert [extent.segment for extent in settled.extents] == [1, 2]
    assert await get(buffer, settled) == body
    assert fsck(buffer.paths.root, payload=True).problems == []
    await buffer.catalog.delete([DeleteObject("b", b"k")])
    assert await eventually(lambda: buffer.segments.segments[2].generation == 2)


async def test_a_small_memory_object_that_moves_gives_its_space_back(buffer: Buffer, disk: Disk) -> None:
    await buffer.catalog.set_bucket_tags("b", {"hiss.durability": "memory"})
    failures = [OSError(5, "Input/output error")]

    def rule(*_: object) -> None:
        if failures:
            raise failures.pop()

    disk.rule = rule
    body = os.urandom(7000)
    record = await put(buffer, b"k", body)
    settled = await buffer.catalog.settle(record.object_id, 10)
    assert await get(buffer, settled) == body
    await buffer.catalog.delete([DeleteObject("b", b"k")])
    buffer.packer.close_idle()
    buffer.segments.seal_all()
    assert await eventually(lambda: not any(one.open_extents for one in buffer.segments.segments.values()))


async def test_labels_follow_a_body_that_moves(buffer: Buffer, disk: Disk) -> None:
    """Its head is durable where it was; the rest gets a label of its own, with its position in the body."""
    body = os.urandom(21 * MIB + 5)
    stream = buffer.open_stream(await _plane.spec_for(buffer, b"k", len(body)))
    await _plane.receive(stream, body[: 9 * MIB])
    assert await eventually(lambda: len(stream._pieces) == 1), "the head is durable"
    failures = [OSError(5, "Input/output error")]

    def rule(*_: object) -> None:
        if failures:
            raise failures.pop()

    disk.rule = rule
    await _plane.receive(stream, body[9 * MIB :])
    digest = await stream.finish()
    assert len(digest.extents) == 2
    position, found = 0, b""
    for extent in digest.extents:
        with buffer.paths.segment_file(extent.slot, extent.segment).open("rb") as file:
            label = read_label(file.fileno(), extent.offset)
            found += os.pread(file.fileno(), extent.length, extent.offset + LABEL_BYTES)
        assert label is not None
        assert (label.object_id, label.position, label.offset) == (digest.object_id, position, extent.offset)
        position += extent.length
    assert found == body
    await stream.abort()

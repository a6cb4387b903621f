"""Bytes back from the archive: whole and checked, or a reason why not."""

from __future__ import annotations

import asyncio

import pytest

from ingest.errors import BufferFull
from ingest.records import DeleteObject, ObjectState

ARCHIVED, EVICTED = ObjectState.ARCHIVED, ObjectState.EVICTED


@pytest.fixture
async def evicted(node):
    """Make a version that is on the archive only: its record and its body."""

    async def make(key: bytes, size_bytes: int = (2 << 20) + 5):
        record = await node.put(key, size_bytes)
        body = node.body(record)
        node.start()
        await node.state(record, ARCHIVED)
        await node.stop()
        await node.catalog.evicted(record.object_id)
        node.buffer.path(record.object_id).unlink()
        return await node.catalog.by_id(record.object_id), body

    return make


async def test_a_recalled_version_is_buffered_again_and_still_archived(node, evicted, until) -> None:
    record, body = await evicted(b"scan/1")
    node.start()
    await node.catalog.request_recall(record.object_id)
    recalled = await node.state(record, ARCHIVED)
    assert node.body(record) == body
    assert recalled.archive == record.archive
    assert sum(extent.length for extent in recalled.extents) == len(body)
    assert {extent.slot for extent in recalled.extents} == {31}
    await until(lambda: node.count("hiss_recall_objects_total") == 1, "the recall being counted")


async def failed(node, record):
    """Wait for the recall to have failed: the version is evicted again, with a reason."""
    while True:
        now = await node.state(record, EVICTED)
        if now.drain_error:
            return now
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda body: (
                body[:4096] + b"\xff" + body[4097:] if body[4096] != 0xFF else body[:4096] + b"\0" + body[4097:]
            ),
            "is damaged",
        ),
        (lambda body: body[:-1], "is damaged"),
        (lambda body: body + b"!", "is damaged"),
        (lambda _: b"", "is damaged"),
    ],
    ids=["a byte flipped", "too short", "too long", "empty"],
)
async def test_a_damaged_copy_is_never_offered_as_the_object(node, evicted, damage, reason) -> None:
    record, body = await evicted(b"scan/1")
    path = node.archive / record.archive.path
    path.write_bytes(damage(body))
    await node.catalog.request_recall(record.object_id)
    node.start()
    now = await failed(node, record)
    assert reason in now.drain_error
    assert "mx-2026/scan/1" in now.drain_error
    assert now.extents == ()
    assert not node.buffer.path(record.object_id).exists()
    assert node.count("hiss_recall_failures_total") == 1
    path.write_bytes(body)
    await node.catalog.request_recall(record.object_id)
    await node.state(record, ARCHIVED)
    assert node.body(record) == body


async def test_a_missing_copy_is_named(node, evicted) -> None:
    record, _ = await evicted(b"scan/1")
    (node.archive / record.archive.path).unlink()
    await node.catalog.request_recall(record.object_id)
    node.start()
    assert (await failed(node, record)).drain_error == "the archive has no file mx-2026/scan/1"


async def test_a_full_buffer_fails_the_recall_and_not_the_process(node, evicted, monkeypatch) -> None:
    record, body = await evicted(b"scan/1")
    land, full = node.buffer.land, True

    async def refusing(record, chunks):
        if full:
            raise BufferFull("no segment is free")
        return await land(record, chunks)

    monkeypatch.setattr(node.buffer, "land", refusing)
    await node.catalog.request_recall(record.object_id)
    node.start()
    assert (await failed(node, record)).drain_error == "no segment is free"
    full = False
    await node.catalog.request_recall(record.object_id)
    await node.state(record, ARCHIVED)
    assert node.body(record) == body


async def test_a_recall_waits_for_room_that_an_eviction_is_making(node, evicted, monkeypatch) -> None:
    record, body = await evicted(b"scan/1")
    land, refusals = node.buffer.land, 2

    async def refusing(record, chunks):
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise BufferFull("no segment is free")
        return await land(record, chunks)

    monkeypatch.setattr(node.buffer, "land", refusing)
    await node.catalog.request_recall(record.object_id)
    node.start(recall_room_s=8.0)
    await node.state(record, ARCHIVED)
    assert node.body(record) == body
    assert node.count("hiss_recall_failures_total") == 0


async def test_a_version_deleted_while_it_is_recalled_gives_its_space_back(node, evicted, monkeypatch, until) -> None:
    record, _ = await evicted(b"scan/1")
    land, abandoned = node.buffer.land, []

    async def landing(record, chunks):
        extents = await land(record, chunks)
        await node.catalog.delete([DeleteObject("mx-2026", b"scan/1")])
        return extents

    async def abandon(extents) -> None:
        abandoned.extend(extents)

    monkeypatch.setattr(node.buffer, "land", landing)
    monkeypatch.setattr(node.buffer, "abandon", abandon)
    await node.catalog.request_recall(record.object_id)
    node.start()
    await until(lambda: len(abandoned) == 1, "the landed extents being given back")
    await node.no_tombstones()
    assert node.archived() == {}

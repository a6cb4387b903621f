"""Versions in the archive: the current one lies where its key belongs, the others below ``.versions``; all can be recalled."""

from __future__ import annotations

import asyncio
import os

import pytest

from archive import keymap
from archive.targets.base import CopyMissing, FileRights
from archive.targets.posix import PosixTarget
from ingest.records import DeleteObject, ObjectRecord, ObjectState

ARCHIVED = ObjectState.ARCHIVED
KEY = b"scan/1"


def aside(record: ObjectRecord) -> str:
    return keymap.version_path("mx-2026", record.key, record.object_id)


async def settled(node, expected: dict[str, ObjectRecord], deadline_s: float = 60.0) -> None:
    """Wait until the archive shows these versions, and nothing else, and the catalogue says the same."""
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline_s
    while True:
        shown = node.archived()
        recorded = {}
        for record in expected.values():
            copy = (await node.catalog.by_id(record.object_id)).archive
            recorded[copy.path if copy else ""] = record
        wanted = {path: node.body(record) for path, record in expected.items()}
        if (shown, recorded) == (wanted, expected):
            return
        assert loop.time() < end, (shown.keys(), recorded.keys(), expected.keys())
        await asyncio.sleep(0.01)


@pytest.fixture
async def versioned(node):
    await node.catalog.configure_bucket("mx-2026", {"versioning": b"Enabled"})
    return node


@pytest.mark.parametrize("links", [True, False])
async def test_the_archive_shows_the_current_version(versioned, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    node = versioned
    if not links:

        def no_links(*_: object, **__: object) -> None:
            raise PermissionError(1, "no hard links here")

        monkeypatch.setattr(os, "link", no_links)
    first = await node.put(KEY, 10)
    node.start()
    await settled(node, {"mx-2026/scan/1": first})
    second = await node.put(KEY, 20)
    await settled(node, {"mx-2026/scan/1": second, aside(first): first})
    third = await node.put(KEY, 30)
    await settled(node, {"mx-2026/scan/1": third, aside(first): first, aside(second): second})
    # A deleted key is not shown; its versions are still there.
    (marker,) = await node.catalog.delete([DeleteObject("mx-2026", KEY)])
    await settled(node, {aside(first): first, aside(second): second, aside(third): third})
    await node.catalog.delete([DeleteObject("mx-2026", KEY, marker.version_id)])
    await node.catalog.delete([DeleteObject("mx-2026", KEY, second.version_id)])
    await settled(node, {aside(first): first, aside(third): third})
    fourth = await node.put(KEY, 40)
    await settled(node, {"mx-2026/scan/1": fourth, aside(first): first, aside(third): third})
    await node.catalog.delete([DeleteObject("mx-2026", KEY, fourth.version_id)])
    for record in (first, third):
        await node.catalog.delete([DeleteObject("mx-2026", KEY, record.version_id)])
    await settled(node, {})
    assert node.count("hiss_drain_failures_total") == 0


async def test_a_version_that_is_not_current_when_it_is_drained(versioned) -> None:
    node = versioned
    records = [await node.put(KEY, size) for size in (10, 20, 30)]
    node.start()
    await settled(node, {aside(records[0]): records[0], aside(records[1]): records[1], "mx-2026/scan/1": records[2]})


async def test_every_version_is_evicted_and_recalled(versioned) -> None:
    node = versioned
    records = [await node.put(KEY, size) for size in (10, 20, 30)]
    bodies = [node.body(record) for record in records]
    node.start()
    for record in records:
        await node.state(record, ARCHIVED)
        await node.catalog.evicted(record.object_id)
        node.buffer.path(record.object_id).unlink()
    for record in records:
        assert (await node.catalog.request_recall(record.object_id)).state is ObjectState.RECALLING
    for record in records:
        await node.state(record, ARCHIVED)
    assert [node.body(record) for record in records] == bodies


async def test_a_suspended_bucket_replaces_the_null_version(versioned) -> None:
    node = versioned
    first = await node.put(KEY, 10)
    node.start()
    await settled(node, {"mx-2026/scan/1": first})
    await node.catalog.configure_bucket("mx-2026", {"versioning": b"Suspended"})
    for size in (20, 30):
        null = await node.put(KEY, size)
        assert null.version_id == "null"
        await settled(node, {"mx-2026/scan/1": null, aside(first): first})
    await node.catalog.delete([DeleteObject("mx-2026", KEY)])
    await settled(node, {aside(first): first})


async def test_moving_aside_twice_changes_nothing(versioned, threads) -> None:
    node = versioned
    record = await node.put(KEY, 10)
    node.start()
    await settled(node, {"mx-2026/scan/1": record})
    await node.stop()
    target = PosixTarget(node.archive, threads)
    await target.open()
    rights = FileRights()
    for _ in range(2):
        await target.move_aside("mx-2026/scan/1", aside(record), record.object_id, rights)
    assert (node.archive / aside(record)).read_bytes() == node.body(record)
    with pytest.raises(CopyMissing):
        await target.move_aside("mx-2026/scan/1", "mx-2026/.versions/%f-x/" + "0" * 32, b"\0" * 16, rights)
    await target.close()

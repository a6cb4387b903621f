"""SIGKILL at every named step of drain, eviction and recall, in a process of its own over real files and the real
catalogue. After a restart: one verified copy of every version, nothing half-visible, nothing left over."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from archive.keymap import version_path
from ingest.records import DeleteObject, ObjectState

ARCHIVED, EVICTED = ObjectState.ARCHIVED, ObjectState.EVICTED
LIMITS = {"poll_s": 0.02, "lease_s": 0.3, "retry_first_s": 0.05, "chunk_bytes": 1 << 20}
PROGRAM = Path(__file__).with_name("drain_node.py")


@contextlib.asynccontextmanager
async def drain_process(
    node, crashpoint: str = "", usage: tuple[int, int] = (0, 1)
) -> AsyncIterator[asyncio.subprocess.Process]:
    environment = os.environ | {"HISS_CRASHPOINT": crashpoint, "PYTHONPATH": str(PROGRAM.parents[2])}
    arguments = (str(node.root), str(node.archive), json.dumps(LIMITS), *map(str, usage))
    process = await asyncio.create_subprocess_exec(sys.executable, str(PROGRAM), *arguments, env=environment)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def killed(node, crashpoint: str, usage: tuple[int, int] = (0, 1)) -> None:
    async with drain_process(node, crashpoint, usage) as process, asyncio.timeout(60):
        assert await process.wait() == -signal.SIGKILL


def unfinished(node) -> list[Path]:
    return list((node.archive / ".hiss-tmp").rglob("*.part"))


DRAIN_POINTS = ("drain-claimed", "drain-written", "drain-verified", "drain-published", "drain-recorded")


@pytest.mark.parametrize("crashpoint", DRAIN_POINTS)
async def test_killed_while_draining(node, crashpoint) -> None:
    records = [await node.put(b"scan/%d" % number, 100_000 + number) for number in range(3)]
    records.append(await node.put(b"scan", 5))
    await killed(node, crashpoint)
    for path, body in node.archived().items():
        assert body in [node.body(record) for record in records], f"{path} is half-visible"
    async with drain_process(node) as process:
        records = [await node.state(record, ARCHIVED) for record in records]
        process.terminate()
        assert await process.wait() == 0
    assert node.archived() == {record.archive.path: node.body(record) for record in records}
    assert unfinished(node) == []


@pytest.mark.parametrize("crashpoint", ["aside-named", "drain-published"])
async def test_killed_while_a_newer_version_takes_the_name(node, crashpoint) -> None:
    await node.catalog.configure_bucket("mx-2026", {"versioning": b"Enabled"})
    old = await archived(node)
    new = await node.put(b"scan/1")
    await killed(node, crashpoint)
    async with drain_process(node):
        new = await node.state(new, ARCHIVED)
    old = await node.catalog.by_id(old.object_id)
    assert old.archive.path == version_path("mx-2026", b"scan/1", old.object_id)
    assert node.archived() == {record.archive.path: node.body(record) for record in (old, new)}
    assert new.archive.path == "mx-2026/scan/1"


@pytest.mark.parametrize("crashpoint", ["drain-written", "drain-published", "drain-recorded"])
async def test_killed_while_draining_and_deleted_before_the_restart(node, crashpoint) -> None:
    await node.put(b"scan/1")
    await killed(node, crashpoint)
    await node.catalog.delete([DeleteObject("mx-2026", b"scan/1")])
    other = await node.put(b"scan/2")
    async with drain_process(node):
        await node.state(other, ARCHIVED)
        await node.no_tombstones()
    assert node.archived() == {"mx-2026/scan/2": node.body(other)}
    assert unfinished(node) == []


async def archived(node):
    record = await node.put(b"scan/1")
    node.start()
    record = await node.state(record, ARCHIVED)
    await node.stop()
    return record


@pytest.mark.parametrize("crashpoint", ["evict-before", "evict-recorded"])
async def test_killed_while_evicting(node, crashpoint) -> None:
    record = await archived(node)
    await killed(node, crashpoint, usage=(100, 100))
    async with drain_process(node, usage=(100, 100)):
        now = await node.state(record, EVICTED)
    assert (node.archive / now.archive.path).read_bytes() == node.body(record)


async def test_killed_while_recalling(node) -> None:
    record = await archived(node)
    body = node.body(record)
    await node.catalog.evicted(record.object_id)
    node.buffer.path(record.object_id).unlink()
    await node.catalog.request_recall(record.object_id)
    await killed(node, "recall-written")
    assert (await node.catalog.by_id(record.object_id)).state is ObjectState.RECALLING
    async with drain_process(node):
        await node.state(record, ARCHIVED)
    assert node.body(record) == body

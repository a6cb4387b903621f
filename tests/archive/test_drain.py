"""Draining with a real catalogue and a real archive: what ends up where, and what every kind of trouble leads to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat

import pytest

from archive.targets.base import TargetError, TargetLost
from archive.targets.files import aligned_buffer
from archive.targets.posix import PosixTarget
from ingest.errors import NoSuchKey, StorageFailed
from ingest.records import DeleteObject, ObjectState

ARCHIVED, BUFFERED = ObjectState.ARCHIVED, ObjectState.BUFFERED


class TroubledTarget(PosixTarget):
    """A real archive whose steps a test can watch, hold up or spoil."""

    def __init__(self, root, threads) -> None:
        super().__init__(root, threads)
        self.before_read_back = self.before_publish = self.after_publish = self.before_stage = None

    async def stage(self, record, rights, chunks):
        if self.before_stage is not None:
            await self.before_stage(record)
        return await super().stage(record, rights, chunks)

    async def read_back(self, staged, size_bytes):
        if self.before_read_back is not None:
            await self.before_read_back(staged)
        async with contextlib.aclosing(super().read_back(staged, size_bytes)) as chunks:
            async for view in chunks:
                yield view

    async def publish(self, staged, *, only_at=None):
        if self.before_publish is not None:
            await self.before_publish(staged)
        path = await super().publish(staged, only_at=only_at)
        if self.after_publish is not None:
            await self.after_publish(staged)
        return path


@pytest.fixture
def troubled(node, threads) -> TroubledTarget:
    node.target = TroubledTarget(node.archive, threads)
    return node.target


async def test_every_version_ends_as_one_verified_copy(node, until) -> None:
    bodies = {b"scan/%04d" % number: number * 999 for number in range(20)} | {
        b"a": 10,
        b"a/b": 10,
        b"../x": 5,
        b"big": 9 << 20,
    }
    records = [await node.put(key, size) for key, size in bodies.items()]
    node.start()
    records = [await node.state(record, ARCHIVED) for record in records]
    assert node.archived() == {record.archive.path: node.body(record) for record in records}
    for record in records:
        assert record.archive.crc64nvme == record.crc64nvme
        assert record.archive.verified_ns > record.modified_ns
    await until(lambda: node.count("hiss_drain_objects_total") == len(bodies), "every copy being counted")
    assert node.count("hiss_drain_bytes_total") == sum(bodies.values())
    assert node.count("hiss_drain_failures_total") == 0


async def test_the_bucket_says_who_may_read(node) -> None:
    await node.catalog.set_bucket_tags("mx-2026", {"hiss.archive-mode": "0444"})
    record = await node.put(b"scan/1")
    node.start()
    record = await node.state(record, ARCHIVED)
    status = (node.archive / record.archive.path).stat()
    assert stat.S_IMODE(status.st_mode) == 0o444
    assert status.st_mtime_ns == record.modified_ns


async def test_a_copy_spoilt_on_the_device_is_found_and_made_again(node, troubled) -> None:
    spoilt = 0

    async def spoil(_) -> None:
        nonlocal spoilt
        if spoilt == 2:
            return
        spoilt += 1
        (copy,) = (node.archive / ".hiss-tmp").rglob("*.part")
        fd = os.open(copy, os.O_WRONLY | os.O_DIRECT)
        os.pwrite(fd, aligned_buffer(4096), 4096)
        os.close(fd)

    troubled.before_read_back = spoil
    record = await node.put(b"scan/1")
    node.start()
    record = await node.state(record, ARCHIVED)
    assert node.archived() == {record.archive.path: node.body(record)}
    assert node.count("hiss_drain_verify_failures_total") == 2
    assert record.drain_attempts == 2
    assert not list((node.archive / ".hiss-tmp").rglob("*.part"))


async def test_buffered_bytes_that_changed_are_never_archived(node) -> None:
    record = await node.put(b"scan/1")
    node.buffer.path(record.object_id).write_bytes(b"something else")
    lost = await node.put(b"scan/2")
    node.buffer.path(lost.object_id).unlink()
    node.start()
    errors: dict[bytes, str] = {}
    async with asyncio.timeout(60):
        while len(errors) < 2:  # each is tried again and again, in no order that the test knows
            for version in (record, lost):
                if error := (await node.catalog.by_id(version.object_id)).drain_error:
                    errors[version.key] = error
            await asyncio.sleep(0.005)
    assert "not the ones acknowledged" in errors[record.key]
    assert "is not in the buffer" in errors[lost.key]
    assert node.archived() == {}
    assert node.count("hiss_storage_errors_total", "read") >= 1


@pytest.mark.parametrize("moment", ["before_stage", "before_read_back", "before_publish", "after_publish"])
async def test_a_version_deleted_while_it_is_drained_leaves_no_file(node, troubled, until, moment) -> None:
    record = await node.put(b"scan/1")

    async def delete(_) -> None:
        await node.catalog.delete([DeleteObject("mx-2026", b"scan/1")])
        setattr(troubled, moment, None)

    setattr(troubled, moment, delete)
    node.start()
    other = await node.put(b"scan/2")
    await node.state(other, ARCHIVED)
    with pytest.raises(NoSuchKey):
        await node.catalog.by_id(record.object_id)
    await until(
        lambda: node.archived() == {"mx-2026/scan/2": node.body(other)}, "the file of the deleted version going"
    )
    assert node.count("hiss_drain_failures_total") == 0
    await node.no_tombstones()


@pytest.mark.parametrize("moment", ["before_stage", "before_read_back", "before_publish", "after_publish"])
async def test_a_version_replaced_while_it_is_drained_gives_way(node, troubled, moment) -> None:
    await node.put(b"scan/1")
    newer = []

    async def replace(_) -> None:
        setattr(troubled, moment, None)
        newer.append(await node.put(b"scan/1", b"newer"))

    setattr(troubled, moment, replace)
    node.start()
    other = await node.state(await node.put(b"scan/2"), ARCHIVED)
    record = await node.state(newer[0], ARCHIVED)
    assert node.archived() == {record.archive.path: b"newer", other.archive.path: node.body(other)}
    assert node.count("hiss_drain_failures_total") == 0


async def test_a_delete_removes_the_archived_file_and_is_confirmed(node) -> None:
    kept = await node.put(b"scan/2")
    record = await node.put(b"scan/1")
    node.start()
    await node.state(record, ARCHIVED)
    await node.state(kept, ARCHIVED)
    await node.catalog.delete([DeleteObject("mx-2026", b"scan/1")])
    await node.no_tombstones()
    assert node.archived() == {"mx-2026/scan/2": node.body(kept)}


async def test_a_copy_is_removed_once_its_delete_is_durable(node, monkeypatch) -> None:
    """A power cut before that brings the version back."""
    record = await node.put(b"scan/1")
    node.start()
    await node.state(record, ARCHIVED)
    asked = asyncio.Event()

    async def not_yet() -> None:
        asked.set()
        raise StorageFailed("journal: the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(node.catalog, "barrier", not_yet)
        await node.catalog.delete([DeleteObject("mx-2026", b"scan/1")])
        for _ in range(2):  # the second is asked when the first has been given up
            asked.clear()
            async with asyncio.timeout(60):
                await asked.wait()
        assert len(node.archived()) == 1
    await node.no_tombstones()
    assert node.archived() == {}


async def test_deletes_done_while_no_drain_ran_are_carried_out_at_start(node) -> None:
    below = await node.put(b"a/b")
    record = await node.put(b"a")
    node.start()
    await node.state(below, ARCHIVED)
    record = await node.state(record, ARCHIVED)
    await node.stop()
    await node.catalog.delete([DeleteObject("mx-2026", b"a"), DeleteObject("mx-2026", b"a/b")])
    again = await node.put(b"a", b"again")
    node.start()
    await node.state(again, ARCHIVED)
    await node.no_tombstones()
    assert list(node.archived().values()) == [b"again"]


async def test_deletes_are_carried_out_several_at_a_time_and_one_that_fails_holds_up_no_other(
    node, until, monkeypatch
) -> None:
    records = [await node.put(b"scan/%02d" % number, 100) for number in range(40)]
    node.start(parallel_objects=8)
    records = [await node.state(record, ARCHIVED) for record in records]
    await node.stop()
    stuck = records[0].archive.path
    remove, at_once, most, refused = node.target.remove, set(), [0], []

    async def watched(path: str, object_id: bytes | None) -> bool:
        at_once.add(path)
        most.append(max(most[-1], len(at_once)))
        try:
            if path == stuck and not healed:
                refused.append(path)
                raise TargetError("the archive does not answer")
            return await remove(path, object_id)
        finally:
            at_once.discard(path)

    healed: list[bool] = []
    monkeypatch.setattr(node.target, "remove", watched)
    await node.catalog.delete([DeleteObject("mx-2026", record.key) for record in records])
    node.start(tombstones_at_once=4, tombstone_batch_objects=16)
    await until(lambda: list(node.archived()) == [stuck], "all but the one going")
    assert refused
    assert 1 < most[-1] <= 4
    healed.append(True)
    await node.no_tombstones()
    assert node.archived() == {}


async def test_a_target_that_is_full_pauses_the_drain_and_loses_nothing(node, troubled, until) -> None:
    tries = 0

    async def full(_) -> None:
        nonlocal tries
        tries += 1
        raise TargetError("writing: the archive is full (No space left on device)", whole_target=True)

    troubled.before_stage = full
    records = [await node.put(b"scan/%d" % number, 10) for number in range(10)]
    node.start()
    await until(lambda: tries >= 3, "the drain trying again")
    counts = await node.catalog.drain_counts()
    assert counts.queued_objects == 10
    assert 1 <= counts.failing_objects <= tries
    troubled.before_stage = None
    for record in records:
        await node.state(record, ARCHIVED)
    assert tries <= 6
    assert node.count("hiss_drain_failures_total") == tries


async def test_an_archive_that_comes_late_is_waited_for(node) -> None:
    node.archive.write_bytes(b"not a folder")
    record = await node.put(b"scan/1")
    node.start()
    await asyncio.sleep(0)
    node.archive.unlink()
    await node.state(record, ARCHIVED)


async def test_an_archive_that_must_be_opened_anew_ends_the_process(node, troubled, until) -> None:
    async def stale(_) -> None:
        raise TargetLost("writing: the archive's file system was unmounted", whole_target=True)

    troubled.before_stage = stale
    record = await node.put(b"scan/1")
    node.start()
    with pytest.raises(ExceptionGroup) as caught:
        await node.ended()
    assert caught.group_contains(TargetLost)
    assert "unmounted" in (await node.catalog.by_id(record.object_id)).drain_error
    troubled.before_stage = None
    node.start()
    await node.state(record, ARCHIVED)


async def test_stopping_gives_back_what_is_in_flight(node, troubled) -> None:
    reached = asyncio.Event()

    async def hang(_) -> None:
        reached.set()
        await asyncio.Event().wait()

    troubled.before_publish = hang
    record = await node.put(b"scan/1")
    node.start(stop_grace_s=0.05)
    await reached.wait()
    await node.stop()
    given_back = await node.catalog.by_id(record.object_id)
    assert given_back.state is BUFFERED
    assert given_back.drain_error == "the drain process stopped"
    assert node.archived() == {}
    troubled.before_publish = None
    node.start()
    await node.state(record, ARCHIVED)


async def test_the_sweep_publishes_anew_what_vanished_or_was_swapped(node, until) -> None:
    gone, swapped = await node.put(b"gone"), await node.put(b"swapped")
    node.start()
    gone, swapped = await node.state(gone, ARCHIVED), await node.state(swapped, ARCHIVED)
    await node.stop()
    (node.archive / "mx-2026/gone").unlink()
    mark = os.getxattr(node.archive / "mx-2026/swapped", "user.hiss.object")
    os.setxattr(node.archive / "mx-2026/swapped", "user.hiss.object", bytes(reversed(mark)))
    (node.archive / "mx-2026/swapped").write_bytes(b"a zombie's")
    node.start()
    await until(lambda: node.count("hiss_reconciler_repairs_total") == 2, "two repairs")
    assert node.archived() == {"mx-2026/gone": node.body(gone), "mx-2026/swapped": node.body(swapped)}


async def test_the_sweep_names_a_copy_that_is_lost(node, until, caplog) -> None:
    record = await node.put(b"scan/lost")
    node.start()
    await node.state(record, ARCHIVED)
    await node.stop()
    await node.catalog.evicted(record.object_id)
    (node.archive / "mx-2026/scan/lost").unlink()
    node.start()
    await until(lambda: node.count("hiss_drain_verify_failures_total") == 1, "the loss being counted")
    assert "archive copy of mx-2026/scan/lost" in caplog.text


async def test_catalogue_snapshots_are_kept_on_the_archive(node, until) -> None:
    for number in range(3):
        await node.put(b"scan/%d" % number)
        await node.catalog.snapshot()
    here = sorted(path.name for path in node.paths.snapshots.glob("*.sqlite"))[-2:]
    node.start()
    kept = node.archive / ".hiss/snapshots"
    await until(lambda: kept.is_dir() and sorted(os.listdir(kept)) == here, "two snapshots")
    for name in here:
        assert (kept / name).read_bytes() == (node.paths.snapshots / name).read_bytes()


async def test_gauges_show_the_queue(node, until) -> None:
    await node.catalog.set_bucket_tags("mx-2026", {"hiss.drain-after-s": "3600"})
    await node.put(b"scan/1", 1000)
    node.start()
    await until(lambda: node.count("hiss_drain_queue_objects") == 1, "the queue being measured")
    assert node.count("hiss_drain_queue_bytes") == 1000
    assert 0 < node.count("hiss_drain_oldest_undrained_age_seconds") < 60

"""Crashes, failures and repairs of the catalogue: what was answered survives, what was refused never comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from awscrt import checksums

from ingest import journal
from ingest.catalog import backup, fsck, lock, recovery, rows, snapshot, statements
from ingest.catalog.client import CatalogClient
from ingest.catalog.reader import Reader
from ingest.counters import CATALOGUE, Counters
from ingest.errors import CatalogUnavailable, NoSuchKey, StorageFailed
from ingest.journal import FileOps, JournalDamaged
from ingest.label import Label, write_label
from ingest.notification import Target
from ingest.paths import NodePaths
from ingest.records import (
    LABEL_BYTES,
    AccessKey,
    CommitObject,
    DeleteObject,
    Durability,
    Extent,
    FreedExtents,
    ObjectRecord,
    UserRecord,
)
from ingest.segments import SegmentHeader

Serving = Callable[..., AbstractAsyncContextManager[None]]
CommitOf = Callable[..., CommitObject]
LOGIC = {"journal", "index", "reference", "overlap", "accounting"}
"""Kinds of problems that can show where there are no segment files."""


class FailingOps(FileOps):
    """Fails the next write or flush when told to."""

    def __init__(self) -> None:
        self.fail_write = self.fail_flush = False

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        if self.fail_write:
            self.fail_write = False
            os.pwrite(fd, data, offset)  # it may have reached the file all the same
            raise OSError(28, "injected")
        return os.pwrite(fd, data, offset)

    def flush(self, fd: int) -> None:
        if self.fail_flush:
            self.fail_flush = False
            raise OSError(5, "injected")
        os.fdatasync(fd)


def problems(paths: NodePaths) -> list[fsck.Problem]:
    return [problem for problem in fsck.fsck(paths.root).problems if problem.kind in LOGIC]


async def names(client: CatalogClient, bucket: str = "run") -> list[bytes]:
    return [row.key for row in (await client.list_objects(bucket))[0]]


async def fill(client: CatalogClient, commit_of: CommitOf, count: int, **fields: object) -> list[ObjectRecord]:
    """``count`` commits, some of one key, in a bucket that is made here."""
    with contextlib.suppress(Exception):
        await client.create_bucket("run", "root")
    requests = [commit_of("run", b"%03d" % (i % 40), **fields) for i in range(count)]
    return list(await asyncio.gather(*(client.commit(request) for request in requests)))


CRASHES = (
    "journal-before",
    "journal-written",
    "journal-flushed",
    "index-before",
    "index-committed",
    "answer-before",
    "snapshot-written",
    "snapshot-renamed",
    "journal-rotated",
)


@pytest.mark.parametrize("point", CRASHES)
async def test_a_killed_catalogue_forgets_nothing_and_repeats_nothing(
    paths: NodePaths, make_catalogue: Callable[..., Any], commit_of: CommitOf, point: str
) -> None:
    catalogue = make_catalogue(paths, journal_bytes=24 * 1024, batch_mutations=40)  # several batches
    async with CatalogClient(paths, slot=0) as client:
        before = await fill(client, commit_of, 10)
        assert catalogue.stop() == 0
        catalogue.start(crashpoint=point, passage=1 if "snapshot" in point or "rotated" in point else 2)
        requests = [commit_of("run", b"n%03d" % i) for i in range(120)]
        calls = [asyncio.create_task(client.commit(request)) for request in requests[:60]]
        await asyncio.sleep(0)
        calls += [asyncio.create_task(client.commit(request)) for request in requests[60:]]
        snapshotting = asyncio.create_task(client.snapshot())
        assert await asyncio.to_thread(catalogue.died) == -9
        answered = [call.result() for call in calls if call.done()]
        catalogue.start()
        records = await asyncio.gather(*calls)
        await snapshotting
        assert [record for record in records if record in answered] == answered
        assert await names(client) == [b"%03d" % i for i in range(10)] + [request.key for request in requests]
        sequences = [record.sequence for record in [*before, *records]]
        assert len(set(sequences)) == len(sequences)
        for request, record in zip(requests, records, strict=True):
            assert await client.by_id(request.object_id) == record
    assert catalogue.stop() == 0
    assert problems(paths) == []


@pytest.mark.parametrize("point", ["journal-written", "index-before", "index-committed"])
async def test_an_event_is_there_once_for_each_commit_and_for_no_other(
    paths: NodePaths, make_catalogue: Callable[..., Any], commit_of: CommitOf, point: str
) -> None:
    catalogue = make_catalogue(paths, batch_mutations=20)
    async with CatalogClient(paths, slot=0) as client:
        await client.create_bucket("run", "root")
        target = Target("all", "Queue", "arn:hiss:sqs:::hook", ("s3:ObjectCreated:*",))
        await client.configure_bucket("run", {"notification": msgspec.json.encode([target])})
        assert catalogue.stop() == 0
        catalogue.start(crashpoint=point, passage=2)
        requests = [commit_of("run", b"%03d" % number) for number in range(60)]
        calls = [asyncio.create_task(client.commit(request)) for request in requests[:30]]
        await asyncio.sleep(0)
        calls += [asyncio.create_task(client.commit(request)) for request in requests[30:]]
        assert await asyncio.to_thread(catalogue.died) == -9
        catalogue.start()
        records = await asyncio.gather(*calls)
        found = [json.loads(event) for _, event in await client.notices("hook", 1000)]
        told = [event["Records"][0]["s3"]["object"] for event in found[1:]]
        assert found[0]["Event"] == "s3:TestEvent"
        assert [item["key"] for item in told] == [record.key.decode() for record in records]
        assert [int(item["sequencer"], 16) for item in told] == [record.sequence for record in records]
    assert catalogue.stop() == 0
    assert problems(paths) == []


async def test_replay_gives_the_identical_index(paths: NodePaths, serving: Serving, commit_of: CommitOf) -> None:
    async with serving(), CatalogClient(paths, slot=0) as client:
        records = await fill(client, commit_of, 150, reductions=("hits",))
        await client.claim_drain(5, 60)
        await client.delete([DeleteObject("run", record.key) for record in records[5:15]])
    live = rows.connect(paths.catalogue, read_only=True)
    kept = paths.catalogue.with_name("kept.sqlite")
    snapshot.copy_database(live, kept)
    live.close()
    recovery.rebuild(paths, 0)
    with contextlib.closing(rows.connect(kept, read_only=True)) as one:
        with contextlib.closing(rows.connect(paths.catalogue, read_only=True)) as two:
            assert list(fsck.differences(one, two)) == []
            assert one.execute("SELECT COUNT(*) FROM objects").fetchone()[0] == 30


@pytest.mark.parametrize("damage", ["missing", "garbage", "torn page", "no snapshot"])
async def test_a_damaged_index_is_rebuilt(paths: NodePaths, serving: Serving, commit_of: CommitOf, damage: str) -> None:
    async with serving(), CatalogClient(paths, slot=0) as client:
        before = await fill(client, commit_of, 200)
        if damage != "no snapshot":
            await client.snapshot()
        after = [await client.commit(commit_of("run", b"later"))]
    recovery.clean_mark(paths).unlink()
    content = bytearray(paths.catalogue.read_bytes())
    if damage in ("missing", "no snapshot"):
        paths.catalogue.unlink()
    elif damage == "garbage":
        paths.catalogue.write_bytes(b"not a database" * 1000)
    else:
        content[4096 * 3 : 4096 * 8] = bytes(4096 * 5)
        paths.catalogue.write_bytes(content)
    async with serving(), CatalogClient(paths, slot=0) as client:
        for record in [*before[-40:], *after]:
            assert await client.head("run", record.key) == record
    assert problems(paths) == []


async def test_an_index_ahead_of_the_journal_goes_back_to_it(
    paths: NodePaths, serving: Serving, commit_of: CommitOf, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(), CatalogClient(paths, slot=0) as client:
        await client.create_bucket("run", "root")
        safe = await client.commit(commit_of("run", b"safe"))
        length = sum(frame.end for frame in list(journal.frames(journal.files(paths.journal)[-1]))[-1:])
        await client.commit(commit_of("run", b"lost", durability=Durability.MEMORY))
    # The power cut took the journal's unflushed tail; SQLite's own file had it already.
    path = journal.files(paths.journal)[-1].path
    content = path.read_bytes()
    path.write_bytes(content[:length] + bytes(len(content) - length))
    recovery.clean_mark(paths).unlink()
    async with serving(), CatalogClient(paths, slot=0) as client:
        assert await names(client) == [b"safe"]
        assert await client.head("run", b"safe") == safe
        assert (await client.commit(commit_of("run", b"next"))).sequence == safe.sequence + 1
    assert "run/lost" in caplog.text
    assert problems(paths) == []


async def test_a_flush_that_fails_under_a_barrier_is_counted(
    paths: NodePaths, serving: Serving, commit_of: CommitOf
) -> None:
    ops, counters = FailingOps(), Counters(None, CATALOGUE)
    async with serving(ops, counters, memory_flush_s=60), CatalogClient(paths, slot=0) as client:
        await client.create_bucket("run", "root")
        await client.commit(commit_of("run", b"memory", durability=Durability.MEMORY))
        ops.fail_flush = True
        with pytest.raises(StorageFailed):
            await client.barrier()
        await client.barrier()
        assert counters.cell("hiss_storage_errors_total", "journal").value() == 1


@pytest.mark.parametrize("kind", ["write", "flush"])
async def test_a_failed_journal_refuses_the_batch_for_ever(
    paths: NodePaths, serving: Serving, commit_of: CommitOf, kind: str
) -> None:
    ops, counters = FailingOps(), Counters(None, CATALOGUE)
    async with serving(ops, counters, memory_flush_s=60), CatalogClient(paths, slot=0) as client:
        await client.create_bucket("run", "root")
        old = await client.commit(commit_of("run", b"k"))
        await client.commit(commit_of("run", b"memory", durability=Durability.MEMORY))
        setattr(ops, f"fail_{kind}", True)
        refused = commit_of("run", b"k")
        with pytest.raises(StorageFailed):
            await client.commit(refused)
        assert await client.head("run", b"k") == old
        await client.commit(commit_of("run", b"next"))
        with pytest.raises(NoSuchKey):
            await client.by_id(refused.object_id)
    assert counters.cell("hiss_storage_errors_total", "journal").value() == 1
    assert counters.cell("hiss_journal_mutations_total").value() == 4
    recovery.clean_mark(paths).unlink()
    paths.catalogue.unlink()  # so that everything comes from the journals
    async with serving(), CatalogClient(paths, slot=0) as client:
        assert await names(client) == [b"k", b"memory", b"next"]
        assert await client.head("run", b"k") == old
        accepted = await client.commit(refused)
        assert await client.head("run", b"k") == accepted
    assert problems(paths) == []


async def test_a_failed_flush_behind_memory_commits_writes_them_again(
    paths: NodePaths, serving: Serving, commit_of: CommitOf
) -> None:
    ops = FailingOps()
    async with serving(ops, memory_flush_s=0.01), CatalogClient(paths, slot=0) as client:
        await client.create_bucket("run", "root")
        number = journal.files(paths.journal)[-1].number
        ops.fail_flush = True
        await client.commit(commit_of("run", b"1", durability=Durability.MEMORY))
        end = time.monotonic() + 60
        while journal.files(paths.journal)[-1].number == number:
            assert time.monotonic() < end
            await client.settled([])
        await client.commit(commit_of("run", b"2", durability=Durability.MEMORY))
    paths.catalogue.unlink()
    async with serving(), CatalogClient(paths, slot=0) as client:
        assert await names(client) == [b"1", b"2"]


async def test_an_index_that_cannot_be_read_ends_what_waits_for_a_settle_and_no_connection(
    paths: NodePaths,
    serving: Serving,
    commit_of: CommitOf,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def unreadable(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    async with serving(), CatalogClient(paths, slot=0) as owner, CatalogClient(paths) as asker:
        await owner.create_bucket("run", "root")
        record = await owner.commit(commit_of("run", b"k", durability=Durability.MEMORY, settled=False))
        for target, name, value in (
            (Reader, "by_id", unreadable),
            (statements, "UNSETTLED_PARTS_OF", "SELECT part_id FROM gone"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(target, name, value)
                with pytest.raises(StorageFailed):
                    await asker.settle(record.object_id, 1)

        waiting = asyncio.create_task(asker.settle(record.object_id, 60))
        await asker.settled([])  # a round trip: the other call has arrived
        with monkeypatch.context() as patch:
            patch.setattr(Reader, "by_id", unreadable)
            await owner.commit(commit_of("run", b"other"))
            with pytest.raises(StorageFailed):
                await waiting

        waiting = asyncio.create_task(asker.settle(record.object_id, 60))
        await asker.settled([])
        with monkeypatch.context() as patch:
            patch.setattr(statements, "UNSETTLED_PARTS_OF", "SELECT part_id FROM gone")
            async with CatalogClient(paths, slot=0) as newer:
                with pytest.raises(StorageFailed):
                    await waiting
                await newer.settled([record.object_id])
        assert (await asker.settle(record.object_id, 60)).settled
    assert "the catalogue process is gone" not in caplog.text


async def test_extents_are_freed_only_when_the_journal_is_on_disk(
    paths: NodePaths, serving: Serving, commit_of: CommitOf
) -> None:
    freed: list[Extent] = []

    async def note(push: object) -> None:
        assert isinstance(push, FreedExtents)
        freed.extend(push.extents)

    async with serving(memory_flush_s=60), CatalogClient(paths, slot=0) as client:
        client.subscribe(note)
        await client.create_bucket("run", "root")
        old = await client.commit(commit_of("run", b"k"))
        await client.commit(commit_of("run", b"k", durability=Durability.MEMORY))
        assert (await client.head("run", b"k")).object_id != old.object_id
        await client.settled([])  # a round trip: a push of the commit would have arrived before
        assert freed == []
        await client.barrier()
        await client.settled([])
        assert freed == list(old.extents)


async def test_journals_rotate_and_two_snapshots_are_kept(
    paths: NodePaths, serving: Serving, commit_of: CommitOf
) -> None:
    async with serving(journal_bytes=8 * 1024), CatalogClient(paths, slot=0) as client:
        for _ in range(6):
            await fill(client, commit_of, 40)
            await client.snapshot()
        kept = snapshot.available(paths.snapshots)
        assert len(kept) == 2
        chain = journal.files(paths.journal)
        assert chain[0].first_sequence <= kept[1].applied + 1
        assert len(chain) == 1 or chain[1].first_sequence > kept[1].applied + 1
    for path in (paths.catalogue, kept[0].path):
        path.write_bytes(b"damaged")
    recovery.clean_mark(paths).unlink()
    async with serving(), CatalogClient(paths, slot=0) as client:
        assert len(await names(client)) == 40
    assert problems(paths) == []


async def test_a_journal_with_a_hole_is_not_glossed_over(
    paths: NodePaths, serving: Serving, commit_of: CommitOf
) -> None:
    async with serving(journal_bytes=8 * 1024), CatalogClient(paths, slot=0) as client:
        for _ in range(3):
            await fill(client, commit_of, 40)
    paths.catalogue.unlink()
    for found in snapshot.available(paths.snapshots):
        found.path.unlink()
    journal.files(paths.journal)[0].path.unlink()
    with pytest.raises(JournalDamaged):
        async with serving():
            pass


async def test_documents_of_a_bucket_come_back_from_the_journal_and_from_a_snapshot(
    paths: NodePaths, serving: Serving
) -> None:
    async with serving(), CatalogClient(paths, slot=0) as client:
        await client.create_bucket("run", "ada", documents={"policy": b"{}"})
        before = await client.configure_bucket("run", {"cors": b"<rules>", "policy": None})
    paths.catalogue.unlink()
    async with serving(), CatalogClient(paths, slot=0) as client:
        assert await client.bucket("run") == before
        await client.snapshot()
        await client.snapshot()
    paths.catalogue.unlink()
    async with serving(), CatalogClient(paths, slot=0) as client:
        assert await client.bucket("run") == before


# -- back-up, restore, fsck
async def test_backup_of_a_running_node_and_restore(
    paths: NodePaths, serving: Serving, commit_of: CommitOf, tmp_path: Path
) -> None:
    file = tmp_path / "backup.sqlite"
    async with serving(), CatalogClient(paths, slot=0) as client:
        before = await fill(client, commit_of, 40)
        report = await asyncio.to_thread(backup.backup, paths.root, file)
        assert report.applied_sequence == before[-1].sequence
        await client.commit(commit_of("run", b"later"))
        with pytest.raises(lock.CatalogueBusy):
            backup.restore(paths.root, file)
    restored = backup.restore(paths.root, file)
    assert restored.applied_sequence == report.applied_sequence
    assert all(folder.is_dir() for folder in restored.set_aside)
    assert problems(paths) == []  # before the first start, too
    paths.catalogue.unlink()  # as where a crash, or a repair, leaves only the snapshot
    async with serving(), CatalogClient(paths, slot=0) as client:
        assert await names(client) == [record.key for record in before]
        later = await client.commit(commit_of("run", b"anew"))
        assert later.sequence == before[-1].sequence + 1
    # The restored state can itself be rebuilt: restoring made it a snapshot.
    paths.catalogue.unlink()
    async with serving(), CatalogClient(paths, slot=0) as client:
        assert await client.head("run", b"anew") == later
    assert problems(paths) == []


async def test_restore_onto_an_empty_machine(
    paths: NodePaths, serving: Serving, commit_of: CommitOf, tmp_path: Path
) -> None:
    async with serving(), CatalogClient(paths, slot=0) as client:
        before = await fill(client, commit_of, 5)
    backup.backup(paths.root, tmp_path / "file")
    other = NodePaths(tmp_path / "other")
    backup.restore(other.root, tmp_path / "file")
    found = recovery.recover(other, 0)
    assert found.applied == before[-1].sequence
    found.database.close()


async def test_what_is_no_backup_is_refused(paths: NodePaths, tmp_path: Path) -> None:
    with pytest.raises(backup.NoCatalogue):
        backup.backup(paths.root, tmp_path / "file")
    (tmp_path / "file").write_bytes(b"x" * 5000)
    foreign = sqlite3.connect(tmp_path / "foreign.sqlite")
    foreign.execute("CREATE TABLE t (a)")
    foreign.close()
    for name in ("file", "foreign.sqlite", "missing"):
        with pytest.raises(backup.NoCatalogue):
            backup.restore(paths.root, tmp_path / name)


async def test_fsck_finds_and_repairs_an_index_that_differs(
    paths: NodePaths, serving: Serving, commit_of: CommitOf
) -> None:
    async with serving(), CatalogClient(paths, slot=0) as client:
        await fill(client, commit_of, 40)
        assert problems(paths) == []
        with pytest.raises(lock.CatalogueBusy):
            fsck.fsck(paths.root, repair=True)
    with contextlib.closing(rows.connect(paths.catalogue, read_only=False)) as database:
        database.execute("DELETE FROM objects WHERE sequence = 7")
        database.execute("UPDATE objects SET etag = 'other' WHERE sequence = 9")
        database.execute("UPDATE segments SET live_bytes = live_bytes + 1")
    found = problems(paths)
    assert {problem.kind for problem in found} == {"index", "reference", "accounting"}
    report = fsck.fsck(paths.root, repair=True)
    assert report.repaired
    assert [problem for problem in report.problems if problem.kind in LOGIC] == []


async def test_fsck_names_overlaps_and_missing_segments(
    paths: NodePaths, serving: Serving, commit_of: CommitOf
) -> None:
    async with serving(), CatalogClient(paths, slot=0) as client:
        await client.create_bucket("run", "root")
        for offset in (4096, 8192):
            await client.commit(commit_of("run", b"%d" % offset, extents=(Extent(0, 0, 1, 1, offset, 10),)))
    report = fsck.fsck(paths.root)
    assert not report.sound
    assert {problem.kind for problem in report.problems} == {"overlap", "segment"}
    assert (report.objects, report.extents, report.live_bytes) == (2, 2, 16384)


async def test_fsck_reads_segments_labels_and_payload(paths: NodePaths, serving: Serving, commit_of: CommitOf) -> None:
    bodies = {name: secrets.token_bytes(9000) for name in (b"whole", b"payload", b"label", b"moved")}
    file = paths.segment_file(0, 1)
    file.parent.mkdir(parents=True)
    image = bytearray(SegmentHeader(0, 0, 1, 1, 1 << 20).encode())
    requests = []
    for name, body in bodies.items():
        extent = Extent(0, 0, 1, 1, len(image), len(body))
        request = commit_of("run", name, length=len(body), crc64nvme=checksums.crc64nvme(body), extents=(extent,))
        requests.append(request)
        label = Label(request.object_id, "run", name, 0, 0, 1, 1, extent.offset, 0, len(body), 0)
        block = bytearray(LABEL_BYTES)
        write_label(label, memoryview(block))
        image += (block + body).ljust(extent.stored_bytes, b"\0")
    file.write_bytes(image)
    async with serving(), CatalogClient(paths, slot=0) as client:
        await client.create_bucket("run", "root")
        for request in requests:
            await client.commit(request)
        report = await asyncio.to_thread(fsck.fsck, paths.root, payload=True)
        assert report.problems == []
        assert (report.objects, report.payload_bytes_checked) == (4, 36000)
    image[requests[1].extents[0].offset + LABEL_BYTES + 5] ^= 1
    image[requests[2].extents[0].offset + 30] ^= 1
    start = requests[3].extents[0].offset
    image[start : start + LABEL_BYTES] = image[4096 : 4096 + LABEL_BYTES]
    file.write_bytes(image)
    found = {(problem.kind, problem.where) for problem in fsck.fsck(paths.root, payload=True).problems}
    assert found == {("payload", "run/payload"), ("label", "run/label"), ("label", "run/moved")}
    file.write_bytes(SegmentHeader(0, 0, 1, 2, 1 << 20).encode() + image[4096:])
    assert {problem.kind for problem in fsck.fsck(paths.root).problems} == {"segment"}


# -- the client over restarts
async def test_calls_outlive_a_restart_and_end_in_time_without_one(
    paths: NodePaths, make_catalogue: Callable[..., Any], commit_of: CommitOf
) -> None:
    catalogue = make_catalogue(paths)
    async with CatalogClient(paths, slot=0, timeout_s=10) as client:
        await client.create_bucket("run", "root")
        catalogue.kill()
        call = asyncio.create_task(client.commit(commit_of("run", b"k")))
        assert [bucket.name for bucket in await client.buckets()] == ["run"]  # reads need no process
        catalogue.start()
        record = await call
        assert await client.head("run", b"k") == record
    async with CatalogClient(paths, timeout_s=0.2) as client:
        catalogue.kill()
        with pytest.raises(CatalogUnavailable, match="unknown"):
            await client.commit(commit_of("run", b"k2"))


async def test_readers_follow_a_database_that_was_replaced(
    paths: NodePaths, make_catalogue: Callable[..., Any], commit_of: CommitOf
) -> None:
    catalogue = make_catalogue(paths)
    async with CatalogClient(paths, slot=0) as client:
        await client.create_bucket("run", "root")
        assert await names(client) == []
        catalogue.kill()
        paths.catalogue.unlink()
        catalogue.start()
        record = await client.commit(commit_of("run", b"k"))
        assert await client.head("run", b"k") == record
        assert await names(client) == [b"k"]


async def test_an_entry_the_index_refuses_takes_nothing_of_its_batch_with_it(
    paths: NodePaths, serving: Serving, commit_of: CommitOf
) -> None:
    async with serving(), CatalogClient(paths, slot=0) as client:
        await client.create_bucket("run", "root")
        good = [commit_of("run", b"before"), commit_of("run", b"after")]
        bad = commit_of("run", b"bad")
        bad = msgspec.structs.replace(bad, extents=good[0].extents * 2)  # the second reference breaks a primary key
        before, refused, after = await asyncio.gather(
            *(client.commit(request) for request in (good[0], bad, good[1])), return_exceptions=True
        )
        assert isinstance(refused, StorageFailed)
        assert [await client.head("run", b"before"), await client.head("run", b"after")] == [before, after]
        assert await names(client) == [b"after", b"before"]
        with pytest.raises(NoSuchKey):
            await client.by_id(bad.object_id)
    paths.catalogue.unlink()
    async with serving(), CatalogClient(paths, slot=0) as client:
        assert [await client.head("run", b"before"), await client.head("run", b"after")] == [before, after]
    assert problems(paths) == []


async def test_an_index_that_an_earlier_program_packed_is_no_damage(
    paths: NodePaths, serving: Serving, commit_of: CommitOf
) -> None:
    async with serving(), CatalogClient(paths, slot=0) as client:
        await client.create_bucket("run", "root")
        await client.put_user(UserRecord("ada", "Ada", keys=(AccessKey("ADAKEY", b"sealed"),)))
        await client.commit(commit_of("run", b"k"))
        gone = await client.commit(commit_of("run", b"gone"))
        await client.commit(commit_of("run", b"gone"))
        assert gone != await client.head("run", b"gone")
    with contextlib.closing(rows.connect(paths.catalogue, read_only=False)) as index:
        old = {"user_id": "ada", "display_name": "Ada", "access_key": "ADAKEY", "secret": b"sealed"}
        index.execute("UPDATE users SET record = ? WHERE user_id = 'ada'", (rows.encode(old),))
        for sequence, detail in index.execute("SELECT sequence, detail FROM objects").fetchall():
            fields = msgspec.msgpack.decode(detail)[:6]  # as they were before there were versions
            index.execute("UPDATE objects SET detail = ? WHERE sequence = ?", (rows.encode(fields), sequence))
        for object_id, record in index.execute("SELECT object_id, record FROM outcomes").fetchall():
            of = {name: value for name, value in msgspec.msgpack.decode(record).items() if name != "retention"}
            index.execute("UPDATE outcomes SET record = ? WHERE object_id = ?", (rows.encode(of), object_id))
        assert index.execute("SELECT COUNT(*) FROM outcomes").fetchone() == (1,)
    assert problems(paths) == []
    with contextlib.closing(rows.connect(paths.catalogue, read_only=False)) as index:
        index.execute("UPDATE users SET record = ? WHERE user_id = 'ada'", (rows.encode(old | {"root": True}),))
    assert [(problem.kind, problem.where) for problem in problems(paths)] == [("index", "users")]

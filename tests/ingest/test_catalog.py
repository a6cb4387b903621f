"""Buckets, users, objects and the life of their bytes, through the client against a real catalogue process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import msgspec
import pytest

from ingest import clock
from ingest.bucket_documents import Form
from ingest.catalog.client import CatalogClient
from ingest.errors import (
    BadDocument,
    BucketExists,
    BucketNotEmpty,
    CatalogError,
    CatalogUnavailable,
    NoSuchBucket,
    NoSuchKey,
    PreconditionFailed,
    StaleEpoch,
    StaleVersion,
)
from ingest.paths import NodePaths
from ingest.records import (
    ArchiveCopy,
    BucketRecord,
    CommitObject,
    DeleteObject,
    Durability,
    Extent,
    FrameGeometry,
    FrameLedger,
    FreedExtents,
    Grant,
    ObjectRecord,
    ObjectState,
    PartialMember,
    PartialOf,
    RunProductOf,
    SettleRequest,
    UserRecord,
    VersionAttributes,
)

CommitOf = Callable[..., CommitObject]
Serving = Callable[..., AbstractAsyncContextManager[None]]


async def eventually(holds: Callable[[], bool], deadline_s: float = 60.0) -> None:
    end = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < end, "did not happen in time"
        await asyncio.sleep(0.005)


def copy_of(record: ObjectRecord, path: str = "b/k") -> ArchiveCopy:
    return ArchiveCopy("posix", path, record.crc64nvme, 7)


async def archived(client: CatalogClient, record: ObjectRecord, path: str = "b/k") -> ObjectRecord:
    await client.claim_drain(1000, 60)
    return await client.drained(record.object_id, copy_of(record, path))


# -- buckets and users
async def test_buckets(client: CatalogClient, commit_of: CommitOf) -> None:
    made = await client.create_bucket("run", "ada", "lab")
    assert await client.bucket("run") == made
    with pytest.raises(BucketExists) as refusal:
        await client.create_bucket("run", "bob")
    assert refusal.value.owner == "ada"
    tagged = await client.set_bucket_tags("run", {"proposal": "4711", "hiss.durability": "memory"})
    assert await client.buckets() == [tagged]
    with pytest.raises(CatalogError, match="drain-after-s"):
        await client.set_bucket_tags("run", {"hiss.drain-after-s": "soon"})
    await client.commit(commit_of("run", b"k"))
    with pytest.raises(BucketNotEmpty):
        await client.delete_bucket("run")
    await client.delete([DeleteObject("run", b"k")])
    await client.delete_bucket("run")
    with pytest.raises(NoSuchBucket):
        await client.bucket("run")


async def test_documents_of_a_bucket(client: CatalogClient) -> None:
    await client.create_bucket("run", "ada", documents={"versioning": b"Enabled"})
    record = await client.configure_bucket("run", {"cors": b"<rules>", "policy": b"{}"})
    assert record.documents == {"versioning": b"Enabled", "cors": b"<rules>", "policy": b"{}"}
    assert await client.bucket("run") == record
    changed = await client.configure_bucket("run", {"cors": None, "policy": b"{ }"})
    assert changed.documents == {"versioning": b"Enabled", "policy": b"{ }"}
    assert await client.set_bucket_tags("run", {"a": "b"}) == msgspec.structs.replace(changed, tags={"a": "b"})
    for wrong in ({"polcy": b"{}"}, {"policy": bytes(20 * 1024 + 1)}):
        with pytest.raises(BadDocument, match="pol"):
            await client.configure_bucket("run", {"cors": b"<rules>", **wrong})
    with pytest.raises(BadDocument):
        await client.create_bucket("other", "ada", documents={"polcy": b""})
    with pytest.raises(NoSuchBucket):
        await client.configure_bucket("gone", {"cors": b""})
    assert "cors" not in (await client.bucket("run")).documents


def test_a_form_parses_once_and_says_which_document_is_bad() -> None:
    parsed: list[bytes] = []

    def parse(document: bytes) -> int:
        parsed.append(document)
        return int(document)

    form = Form("versioning", parse)
    bucket = BucketRecord("run", "ada", 0, documents={"versioning": b"12"})
    assert [form.of(bucket), form.of(bucket)] == [12, 12]
    assert parsed == [b"12"]
    assert form.of(BucketRecord("run", "ada", 0)) is None
    with pytest.raises(BadDocument, match="versioning: "):
        form.check(b"x")
    with pytest.raises(ValueError, match="no document"):
        Form("versionning", parse)


async def test_time_passes_where_a_node_has_a_virtual_clock(
    paths: NodePaths, serving: Serving, commit_of: CommitOf
) -> None:
    with pytest.raises(FileNotFoundError):
        clock.advance(paths, 1)
    clock.create(paths)
    async with serving(), CatalogClient(paths) as client:
        before = await client.create_bucket("run", "ada")
        clock.advance(paths, 30 * 86400)
        later = await client.commit(commit_of("run", b"k"))
        assert 0 <= later.modified_ns - before.created_ns - 30 * 86400 * 10**9 < 3600 * 10**9
        assert client.now_ns() >= later.modified_ns


async def test_a_copy_that_goes_by_time_waits_for_the_products_it_owes(
    client: CatalogClient, commit_of: CommitOf
) -> None:
    await client.create_bucket("run", "ada")
    cold = VersionAttributes(storage_class="GLACIER")
    record = await client.commit(commit_of("run", b"k", attributes=cold, reductions=("hits",)))
    await archived(client, record, "run/k")
    assert await client.evictions_due(10) == []
    await client.reduction_failed(record.object_id, "hits", "slow", give_up=False)
    assert await client.evictions_due(10) == []
    await client.reduction_failed(record.object_id, "hits", "never", give_up=True)
    assert [found.object_id for found in await client.evictions_due(10)] == [record.object_id]
    await client.evicted(record.object_id)
    assert await client.evictions_due(10) == []


async def test_users_replace_by_id_and_keys_are_unique(client: CatalogClient) -> None:
    ada = UserRecord("ada", "Ada", "AKADA", b"sealed", (Grant("run*", access="write"),))
    await client.put_user(ada)
    renamed = UserRecord("ada", "Ada L.", "AKNEW", b"sealed")
    await client.put_user(renamed)
    assert await client.users() == [renamed]
    with pytest.raises(CatalogError, match="another user"):
        await client.put_user(UserRecord("bob", "Bob", "AKNEW", b"sealed"))


async def test_the_generation_changes_with_buckets_users_and_kernels_only(
    client: CatalogClient, commit_of: CommitOf
) -> None:
    seen = client.generation()

    async def changes(work: Awaitable[object]) -> bool:
        nonlocal seen
        await work
        before, seen = seen, client.generation()
        return seen != before

    assert await changes(client.create_bucket("run", "ada"))
    assert await changes(client.set_bucket_tags("run", {"a": "b"}))
    assert await changes(client.configure_bucket("run", {"cors": b"<rules>"}))
    assert await changes(client.put_user(UserRecord("ada", "Ada", "AK", b"s")))
    assert not await changes(client.commit(commit_of("run", b"frame")))
    assert await changes(client.commit(commit_of("run", b"_kernels/hits.py")))
    assert await changes(client.delete([DeleteObject("run", b"_kernels/hits.py")]))
    assert not await changes(client.delete([DeleteObject("run", b"frame")]))


# -- objects
async def test_a_record_keeps_everything_the_commit_said(client: CatalogClient, commit_of: CommitOf) -> None:
    await client.create_bucket("run", "root")
    request = commit_of(
        "run",
        b"a/\xc3\xa4",
        checksums={"crc32": "AAAAAA=="},
        headers={"content-type": "x/y"},
        metadata={"frame-dtype": "uint16"},
        ledger=FrameLedger(received=3, kept=2, dropped=1, gaps=((1, 2),)),
        geometry=FrameGeometry("<u2", (4, 4), 128, 32, 3),
    )
    record = await client.commit(request)
    assert await client.head("run", b"a/\xc3\xa4") == record
    assert await client.head("run", b"a/\xc3\xa4", "null") == record
    assert await client.by_id(request.object_id) == record
    for name in ("length", "etag", "crc64nvme", "checksums", "headers", "metadata", "ledger", "geometry", "extents"):
        assert getattr(record, name) == getattr(request, name)
    assert record.state is ObjectState.BUFFERED
    amended = FrameLedger(received=3, kept=3)
    await client.amend_ledger(request.object_id, amended)
    assert (await client.head("run", request.key)).ledger == amended


async def test_sequences_are_dense_in_commit_order(client: CatalogClient, commit_of: CommitOf) -> None:
    await client.create_bucket("run", "root")
    records = await asyncio.gather(*(client.commit(commit_of("run", b"%d" % i)) for i in range(300)))
    first = min(record.sequence for record in records)
    assert sorted(record.sequence for record in records) == list(range(first, first + 300))


async def test_what_is_not_there(client: CatalogClient, commit_of: CommitOf) -> None:
    with pytest.raises(NoSuchBucket):
        await client.head("nowhere", b"k")
    with pytest.raises(NoSuchBucket):
        await client.commit(commit_of("nowhere", b"k"))
    with pytest.raises(NoSuchBucket):
        await client.list_objects("nowhere")
    (refused,) = await client.delete([DeleteObject("nowhere", b"k")])
    assert isinstance(refused, NoSuchBucket)
    await client.create_bucket("run", "root")
    with pytest.raises(NoSuchKey):
        await client.head("run", b"k")
    with pytest.raises(NoSuchKey):
        await client.by_id(b"x" * 16)
    missing, conditional = await client.delete([DeleteObject("run", b"k"), DeleteObject("run", b"k", if_match="e")])
    assert not missing.existed  # type: ignore[union-attr]
    assert isinstance(conditional, PreconditionFailed)


async def test_preconditions_are_decided_at_commit(client: CatalogClient, commit_of: CommitOf) -> None:
    await client.create_bucket("run", "root")
    attempts = await asyncio.gather(
        *(client.commit(commit_of("run", b"once", if_none_match="*")) for _ in range(20)), return_exceptions=True
    )
    (winner,) = (result for result in attempts if isinstance(result, ObjectRecord))
    assert sum(isinstance(result, PreconditionFailed) for result in attempts) == 19
    with pytest.raises(PreconditionFailed):
        await client.commit(commit_of("run", b"once", if_match="0" * 32))
    with pytest.raises(NoSuchKey):
        await client.commit(commit_of("run", b"other", if_match="*"))
    second = await client.commit(commit_of("run", b"once", if_match=winner.etag))
    stale, current = await client.delete(
        [DeleteObject("run", b"once", if_match=winner.etag), DeleteObject("run", b"once", if_match=second.etag)]
    )
    assert isinstance(stale, PreconditionFailed)
    assert current.existed  # type: ignore[union-attr]


async def test_a_commit_sent_again_is_answered_and_not_repeated(client: CatalogClient, commit_of: CommitOf) -> None:
    await client.create_bucket("run", "root")
    first, second = commit_of("run", b"k"), commit_of("run", b"k", if_none_match="")
    record = await client.commit(first)
    assert await client.commit(first) == record
    newer = await client.commit(second)
    assert await client.commit(first) == record  # its version has gone, its outcome is known
    assert await client.head("run", b"k") == newer
    await client.delete([DeleteObject("run", b"k")])
    assert await client.commit(second) == newer
    with pytest.raises(NoSuchKey):
        await client.head("run", b"k")


async def test_a_copy_shares_extents_until_the_last_version_goes(client: CatalogClient, commit_of: CommitOf) -> None:
    freed: list[Extent] = []

    async def note(push: FreedExtents | SettleRequest) -> None:
        assert isinstance(push, FreedExtents)
        freed.extend(push.extents)

    client.subscribe(note)
    await client.create_bucket("run", "root")
    original = await client.commit(commit_of("run", b"original"))
    copy = await client.commit(
        commit_of("run", b"copy", extents=original.extents, source=original.object_id, length=10)
    )
    (use,) = await client.segment_use(0)
    assert use.live_bytes == original.extents[0].stored_bytes
    holders = await client.segment_extents(0, original.extents[0].segment)
    assert {record.key for record, _ in holders if record is not None} == {b"original", b"copy"}
    await client.delete([DeleteObject("run", b"original")])
    onto_itself = await client.commit(commit_of("run", b"copy", extents=copy.extents, source=copy.object_id, length=10))
    with pytest.raises(StaleVersion):
        await client.commit(commit_of("run", b"late", extents=original.extents, source=original.object_id))
    assert await client.segment_use(0) == [use]
    assert freed == []
    await client.delete([DeleteObject("run", b"copy")])
    await eventually(lambda: freed == list(onto_itself.extents))
    assert await client.segment_use(0) == []


# -- settling
async def test_settle_asks_the_owner_and_waits_for_it(
    client: CatalogClient, paths: NodePaths, commit_of: CommitOf
) -> None:
    await client.create_bucket("run", "root")
    record = await client.commit(commit_of("run", b"k", durability=Durability.MEMORY, settled=False))
    assert not record.settled
    assert await client.claim_drain(10, 60) == []

    async def owner(push: FreedExtents | SettleRequest) -> None:
        assert push == SettleRequest(record.object_id)
        await client.settled([record.object_id, b"gone" * 4])

    async with CatalogClient(paths) as reader:
        with pytest.raises(CatalogUnavailable):
            await reader.settle(record.object_id, 0.05)
        client.subscribe(owner)
        assert (await reader.settle(record.object_id, 5)).settled
        assert (await reader.settle(record.object_id, 5)).settled
        with pytest.raises(StaleVersion):
            await reader.settle(b"x" * 16, 5)
    assert [claimed.key for claimed in await client.claim_drain(10, 60)] == [b"k"]


async def test_a_settle_of_a_deleted_version_ends(client: CatalogClient, commit_of: CommitOf) -> None:
    await client.create_bucket("run", "root")
    record = await client.commit(commit_of("run", b"k", durability=Durability.MEMORY, settled=False))
    waiting = asyncio.create_task(client.settle(record.object_id, 10))
    await client.barrier()
    await client.delete([DeleteObject("run", b"k")])
    with pytest.raises(StaleVersion):
        await waiting


# -- drain, eviction, recall
async def test_drain_order_is_by_deadline_and_leases_expire(client: CatalogClient, commit_of: CommitOf) -> None:
    await client.create_bucket("late", "root")
    await client.create_bucket("soon", "root")
    await client.set_bucket_tags("late", {"hiss.drain-after-s": "3600"})
    await client.commit(commit_of("late", b"waits"))
    for name in (b"1", b"2", b"3"):
        await client.commit(commit_of("soon", name))
    claimed = await client.claim_drain(2, 60)
    assert [record.key for record in claimed] == [b"1", b"2"]
    assert {record.state for record in claimed} == {ObjectState.DRAINING}
    assert [record.key for record in await client.claim_drain(10, 0)] == [b"3"]  # a lease that is over at once
    await client.drain_failed(claimed[0].object_id, "no space", 3600)
    await client.drain_failed(claimed[0].object_id, "no space", 3600)  # sent again: counts once
    failed = await client.by_id(claimed[0].object_id)
    assert (failed.state, failed.drain_attempts, failed.drain_error) == (ObjectState.BUFFERED, 1, "no space")
    assert [record.key for record in await client.claim_drain(10, 60)] == [b"3"]
    await client.set_bucket_tags("late", {"hiss.drain-after-s": "default"})
    assert [record.key for record in await client.claim_drain(10, 60)] == [b"waits"]


async def test_a_version_goes_through_archive_eviction_and_recall(client: CatalogClient, commit_of: CommitOf) -> None:
    await client.create_bucket("run", "root")
    record = await client.commit(commit_of("run", b"k", length=5000))
    counts = await client.drain_counts()
    assert (counts.queued_objects, counts.queued_bytes, counts.evictable_bytes) == (1, 5000, 0)
    assert counts.oldest_undrained_ns == record.modified_ns
    with pytest.raises(StaleVersion):
        await client.evicted(record.object_id)
    drained = await archived(client, record)
    assert drained.archive == copy_of(record)
    assert await client.drained(record.object_id, copy_of(record)) == drained
    assert await client.evictable(10) == [drained]
    assert (await client.drain_counts()).evictable_bytes == 5000
    await client.evicted(record.object_id)
    await client.evicted(record.object_id)
    cold = await client.head("run", b"k")
    assert (cold.state, cold.extents) == (ObjectState.EVICTED, ())
    counts = await client.drain_counts()
    assert (counts.queued_objects, counts.buffered_bytes, counts.oldest_undrained_ns) == (0, 0, None)
    await client.request_recall(record.object_id)
    assert [asked.key for asked in await client.recalls(10)] == [b"k"]
    await client.recall_failed(record.object_id, "archive is away")
    assert (await client.head("run", b"k")).drain_error == "archive is away"
    await client.request_recall(record.object_id)
    extents = (Extent(0, 31, 1, 1, 4096, 3000), Extent(0, 31, 1, 1, 12288, 2000))
    warm = await client.recalled(record.object_id, extents)
    assert (warm.state, warm.extents) == (ObjectState.ARCHIVED, extents)
    assert await client.recalled(record.object_id, extents) == warm
    assert sum(use.live_bytes for use in await client.segment_use(31)) == sum(e.stored_bytes for e in extents)


async def test_an_archived_version_stays_buffered_as_long_as_its_bucket_says(
    client: CatalogClient, commit_of: CommitOf
) -> None:
    await client.create_bucket("keeps", "root")
    await client.create_bucket("drops", "root")
    await client.set_bucket_tags("keeps", {"hiss.evict-after-s": "3600"})
    for bucket in ("keeps", "drops"):
        await archived(client, await client.commit(commit_of(bucket, b"k")))
    assert [record.bucket for record in await client.evictable(10)] == ["drops"]


async def test_a_late_drain_of_a_replaced_version_is_refused(client: CatalogClient, commit_of: CommitOf) -> None:
    await client.create_bucket("run", "root")
    record = await client.commit(commit_of("run", b"k"))
    await client.claim_drain(10, 60)
    await client.commit(commit_of("run", b"k"))
    with pytest.raises(StaleVersion):
        await client.drained(record.object_id, copy_of(record))
    for late in (client.evicted(record.object_id), client.drain_failed(record.object_id, "x", 1)):
        with pytest.raises(StaleVersion):
            await late


@pytest.mark.parametrize("how", ["archived", "draining", "replaced", "deleted twice", "buffered"])
async def test_a_delete_leaves_a_tombstone_where_a_copy_may_lie(
    client: CatalogClient, commit_of: CommitOf, how: str
) -> None:
    await client.create_bucket("run", "root")
    record = await client.commit(commit_of("run", b"k"))
    expected = [("" if how == "draining" else "b/k", "run", b"k")]
    if how == "draining":
        await client.claim_drain(10, 60)
    elif how == "buffered":
        expected = []
    else:
        await archived(client, record)
    if how == "replaced":
        await client.commit(commit_of("run", b"k"))  # the new copy will lie at the same path
        assert await client.pending_archive_deletes(10) == []
    if how == "deleted twice":
        await client.delete([DeleteObject("run", b"k")])
        await client.commit(commit_of("run", b"k"))  # not drained, so no copy of its own
    await client.delete([DeleteObject("run", b"k")])
    pending = await client.pending_archive_deletes(10)
    assert [tombstone[1:4] for tombstone in pending] == expected
    for tombstone, *_ in pending:
        await client.archive_deleted(tombstone)
        await client.archive_deleted(tombstone)
    assert await client.pending_archive_deletes(10) == []


async def test_what_a_node_owes_is_its_mirrors_when_it_has_gone(client: CatalogClient, commit_of: CommitOf) -> None:
    await client.create_bucket("run", "root")
    here, away = Extent(client.node, 0, 1, 1, 4096, 100), Extent(5, 2, 1, 1, 4096, 100)
    for number, key in enumerate((b"r/mirrored", b"r/only")):
        extent = msgspec.structs.replace(away, offset=4096 * (number + 1))
        request = commit_of("run", key, reductions=("hits",), filters={}, length=100, extents=(extent,))
        if key == b"r/mirrored":
            await client.hold_mirror(request.object_id, (here,))
            request = msgspec.structs.replace(request, durability=Durability.MIRROR)
        await client.commit(request)
    assert await client.pending_reductions(0, 10) == []
    (job,) = await client.pending_reductions(0, 10, gone=[5])
    assert (job.record.key, job.released) == (b"r/mirrored", True)
    assert await client.pending_reductions(1, 10, gone=[5]) == [], "another worker has the copy"
    assert await client.owed_at_node(5, "run", b"") == {"hits": 1}
    assert await client.owed_at_node(5, "run", b"other/") == {}
    assert await client.owed_at_node(client.node, "run", b"") == {}


async def test_of_two_keepers_of_a_run_the_one_that_knows_less_is_refused(
    client: CatalogClient, commit_of: CommitOf
) -> None:
    """For a moment two nodes may keep the same run; whatever the order, what stays is the product that reflects most."""
    await client.create_bucket("run", "root")
    known = []
    for name in (b"a", b"b"):
        member = await client.commit(commit_of("run", b"r/" + name, reductions=("hits",)))
        partial = PartialOf("hits", b"r/", "g", (PartialMember(member.object_id),), batch=True)
        await client.commit(commit_of("run", b"_products/hits/r/.partials/" + name, partial=partial))
        (due,) = await client.run_products_due(10)
        known.append(due.changed)
    key = b"_products/hits/r/_run.nxs"

    def product(reflects: int, *, final: bool = True) -> CommitObject:
        return commit_of("run", key, run_product=RunProductOf("hits", b"r/", reflects, final))

    early = await client.commit(product(known[0]))
    assert (await client.run_products_due(10))[0].stored == known[0], "it is due still"
    await client.commit(product(known[1], final=False))
    assert (await client.run_products_due(10))[0].stored == known[0], "another one of this state follows"
    newest = await client.commit(product(known[1]))
    assert await client.run_products_due(10) == []
    for final in (False, True):
        with pytest.raises(StaleVersion):
            await client.commit(product(known[0], final=final))
    # One that found the run empty deletes what it saw then, not what is there now.
    await client.delete([DeleteObject("run", key, object_id=early.object_id)])
    assert (await client.head("run", key)).object_id == newest.object_id


async def test_one_commit_may_delete_several_archived_versions(client: CatalogClient, commit_of: CommitOf) -> None:
    await client.create_bucket("run", "root")
    parts = []
    for name in (b"a", b"b"):
        member = await client.commit(commit_of("run", b"r/" + name, reductions=("hits",)))
        await archived(client, member, f"r/{name.decode()}")
        partial = PartialOf("hits", b"r/", "g", (PartialMember(member.object_id),), batch=True)
        part = await client.commit(commit_of("run", b"_products/hits/r/.partials/" + name, partial=partial))
        parts.append((await archived(client, part, f"p/{name.decode()}")).object_id)
    partial = PartialOf("hits", b"r/", "g", replaces=tuple(parts), batch=True)
    joined = await client.commit(commit_of("run", b"_products/hits/r/.partials/joined", partial=partial))
    assert {path for _, path, *_ in await client.pending_archive_deletes(10)} == {"p/a", "p/b"}
    await archived(client, joined, "p/joined")
    # A member that goes takes the partial with it, and the other member is owed again.
    assert await client.delete([DeleteObject("run", b"r/a")])
    pending = await client.pending_archive_deletes(10)
    assert {path for _, path, *_ in pending} == {"p/a", "p/b", "p/joined", "r/a"}
    for tombstone, *_ in pending:
        await client.archive_deleted(tombstone)
    assert await client.pending_archive_deletes(10) == []


async def test_relocation_swaps_one_extent(client: CatalogClient, commit_of: CommitOf) -> None:
    await client.create_bucket("run", "root")
    one, two, new = (Extent(0, 0, segment, 1, 4096, 5) for segment in (1, 2, 3))
    record = await client.commit(commit_of("run", b"k", extents=(one, two), length=10))
    await client.relocate(record.object_id, two, [new])
    await client.relocate(record.object_id, two, [new])
    assert (await client.head("run", b"k")).extents == (one, new)
    assert [use.segment for use in await client.segment_use(0)] == [1, 3]
    with pytest.raises(StaleVersion):
        await client.relocate(record.object_id, two, [Extent(0, 0, 9, 1, 0, 5)])


# -- kernels
async def test_products_that_are_owed(client: CatalogClient, commit_of: CommitOf) -> None:
    await client.create_bucket("run", "root")
    source = await client.commit(commit_of("run", b"k", reductions=("hits", "sum")))
    assert {job.kernel for job in await client.pending_reductions(0, 10)} == {"hits", "sum"}
    assert await client.pending_reductions(5, 10) == []
    await client.reduction_failed(source.object_id, "hits", "crashed", give_up=False)
    assert [(job.kernel, job.attempts) for job in await client.pending_reductions(None, 10)] == [
        ("sum", 0),
        ("hits", 1),
    ]
    await client.commit(commit_of("run", b"_products/sum/k.nxs", reduces=(source.object_id, "sum")))
    assert [job.kernel for job in await client.pending_reductions(0, 10)] == ["hits"]
    await client.reduction_failed(source.object_id, "hits", "crashed", give_up=True)
    assert await client.pending_reductions(None, 10) == []
    await client.delete([DeleteObject("run", b"k")])
    with pytest.raises(StaleVersion):
        await client.commit(commit_of("run", b"_products/hits/k.nxs", reduces=(source.object_id, "hits")))


# -- processes
async def test_a_newer_process_of_a_slot_fences_the_older(
    client: CatalogClient, paths: NodePaths, commit_of: CommitOf
) -> None:
    await client.create_bucket("run", "root")
    async with CatalogClient(paths, slot=0) as newer:
        await newer.commit(commit_of("run", b"new"))
        with pytest.raises(StaleEpoch):
            await client.commit(commit_of("run", b"old"))
        with pytest.raises(StaleEpoch):
            await client.delete_bucket("run")
        await newer.commit(commit_of("run", b"newer"))
    assert (await client.head("run", b"new")).key == b"new"


async def test_freed_extents_go_to_the_owner_of_their_slot(
    client: CatalogClient, paths: NodePaths, commit_of: CommitOf
) -> None:
    pushes: dict[int, list[object]] = {0: [], 1: []}

    async def note(slot: int, push: object) -> None:
        pushes[slot].append(push)

    await client.create_bucket("run", "root")
    async with CatalogClient(paths, slot=1) as other:
        client.subscribe(lambda push: note(0, push))
        other.subscribe(lambda push: note(1, push))
        mine, theirs = Extent(0, 0, 1, 1, 4096, 5), Extent(0, 1, 1, 1, 4096, 5)
        await client.commit(commit_of("run", b"k", extents=(mine, theirs)))
        await other.commit(commit_of("run", b"k", extents=(), length=0))
        await eventually(lambda: all(pushes.values()))
    assert pushes == {0: [FreedExtents((mine,))], 1: [FreedExtents((theirs,))]}


async def test_without_a_catalogue_process_a_call_ends_in_time(paths: NodePaths) -> None:
    with pytest.raises(CatalogUnavailable):
        async with CatalogClient(paths, timeout_s=0.2):
            pass

"""Versions of a key in the catalogue: what is current, what a delete leaves, what a lock forbids; a rebuilt index agrees."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ingest import clock, versioning
from ingest.catalog import server
from ingest.catalog.client import CatalogClient
from ingest.catalog.fsck import fsck
from ingest.counters import CATALOGUE, Counters
from ingest.errors import (
    BucketNotEmpty,
    BucketState,
    CannotAppend,
    IngestError,
    InvalidLock,
    NoSuchKey,
    NoSuchVersion,
    PreconditionFailed,
    StaleVersion,
    VersionLocked,
    WrongOffset,
)
from ingest.paths import NodePaths
from ingest.records import (
    ArchiveCopy,
    CommitObject,
    DeleteObject,
    Extent,
    LockMode,
    ObjectRecord,
    ObjectState,
    PartialMember,
    PartialOf,
    RawVersion,
    Retention,
    Versioning,
)

Serving = Callable[[], AbstractAsyncContextManager[None]]
CommitOf = Callable[..., CommitObject]
DAY_S = 86400
DAY_NS = DAY_S * 10**9
ENABLED, SUSPENDED = {"versioning": b"Enabled"}, {"versioning": b"Suspended"}


async def shown(client: CatalogClient, key: bytes) -> list[tuple[str, bool]]:
    """Every version of a key, newest first: (version id, is it a delete marker)."""
    rows, _ = await client.list_versions("run", prefix=key)
    records = [row.record for row in rows if row.record is not None]
    assert [row.latest for row in rows] == [True] + [False] * (len(rows) - 1) if rows else True
    return [(record.version_id, record.delete_marker) for record in records]


async def delete(client: CatalogClient, key: bytes, version_id: str | None = None, **rest: object) -> object:
    (outcome,) = await client.delete([DeleteObject("run", key, version_id, **rest)])  # type: ignore[arg-type]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


async def current(client: CatalogClient, key: bytes) -> ObjectRecord | None:
    try:
        return await client.head("run", key)
    except NoSuchKey:
        return None


async def test_what_each_status_keeps(client: CatalogClient, commit_of: CommitOf) -> None:
    await client.create_bucket("run", "root")
    first = await client.commit(commit_of("run", b"k"))
    assert first.version_id == "null"
    await client.configure_bucket("run", ENABLED)
    second = await client.commit(commit_of("run", b"k"))
    third = await client.commit(commit_of("run", b"k"))
    assert [second.version_id, third.version_id] == [second.object_id.hex(), third.object_id.hex()]
    assert await shown(client, b"k") == [(third.version_id, False), (second.version_id, False), ("null", False)]
    assert (await client.head("run", b"k", "null")).object_id == first.object_id
    await client.configure_bucket("run", SUSPENDED)
    fourth = await client.commit(commit_of("run", b"k"))
    assert fourth.version_id == "null"
    assert await shown(client, b"k") == [("null", False), (third.version_id, False), (second.version_id, False)]
    assert (await client.head("run", b"k", "null")).object_id == fourth.object_id
    with pytest.raises(NoSuchKey):
        await client.by_id(first.object_id)
    gone = await delete(client, b"k")
    assert (gone.version_id, gone.delete_marker) == ("null", True)
    assert await shown(client, b"k") == [("null", True), (third.version_id, False), (second.version_id, False)]
    assert await current(client, b"k") is None
    rows, _ = await client.list_objects("run")
    assert rows == []
    with pytest.raises(BucketNotEmpty):
        await client.delete_bucket("run")


async def test_the_next_version_is_current_when_the_current_one_goes(
    client: CatalogClient, commit_of: CommitOf
) -> None:
    await client.create_bucket("run", "root", documents=ENABLED)
    one, two = [await client.commit(commit_of("run", b"k")) for _ in range(2)]
    marker = await delete(client, b"k")
    assert await current(client, b"k") is None
    again = await delete(client, b"k", marker.version_id)
    assert (again.version_id, again.delete_marker) == (marker.version_id, True)
    assert await current(client, b"k") == await client.head("run", b"k", two.version_id)
    await delete(client, b"k", one.version_id)
    assert (await current(client, b"k")).version_id == two.version_id
    await delete(client, b"k", two.version_id)
    assert await shown(client, b"k") == []
    assert await delete(client, b"k", two.version_id) == msgspec.structs.replace(again, existed=False,
                                                                                  version_id=two.version_id,
                                                                                  delete_marker=False)  # fmt: skip
    await client.delete_bucket("run")


async def test_a_version_is_found_by_its_key_only(client: CatalogClient, commit_of: CommitOf) -> None:
    await client.create_bucket("run", "root", documents=ENABLED)
    record = await client.commit(commit_of("run", b"k"))
    for wrong in ("null", secrets.token_hex(16), record.version_id.upper(), "", "x"):
        with pytest.raises(NoSuchVersion):
            await client.head("run", b"k", wrong)
    with pytest.raises(NoSuchVersion):
        await client.head("run", b"other", record.version_id)
    assert not (await delete(client, b"other", record.version_id)).existed
    await client.create_bucket("plain", "root")
    plain = await client.commit(commit_of("plain", b"k"))
    with pytest.raises(NoSuchVersion):
        await client.head("plain", b"k", plain.object_id.hex())


async def test_conditions_look_at_what_is_current(client: CatalogClient, commit_of: CommitOf) -> None:
    await client.create_bucket("run", "root", documents=ENABLED)
    first = await client.commit(commit_of("run", b"k"))
    with pytest.raises(PreconditionFailed):
        await client.commit(commit_of("run", b"k", if_none_match="*"))
    await delete(client, b"k", if_match=first.etag)
    with pytest.raises(PreconditionFailed):
        await delete(client, b"k", if_match="*")
    with pytest.raises(NoSuchKey):
        await client.commit(commit_of("run", b"k", if_match="*"))
    assert (await client.commit(commit_of("run", b"k", if_none_match="*"))).version_id != "null"


async def test_a_delete_may_name_what_it_was_decided_for(client: CatalogClient, commit_of: CommitOf) -> None:
    """As lifecycle rules do: nothing is deleted or hidden that is not what the rule saw."""
    await client.create_bucket("run", "root", documents=ENABLED)
    one, two = [await client.commit(commit_of("run", b"k")) for _ in range(2)]
    assert not (await delete(client, b"k", object_id=one.object_id)).existed
    assert not (await delete(client, b"k", two.version_id, object_id=two.object_id, if_noncurrent=True)).existed
    assert await shown(client, b"k") == [(two.version_id, False), (one.version_id, False)]
    assert (await delete(client, b"k", one.version_id, object_id=one.object_id, if_noncurrent=True)).existed
    assert (await delete(client, b"k", object_id=two.object_id)).delete_marker


async def test_products_have_one_version(client: CatalogClient, commit_of: CommitOf) -> None:
    await client.create_bucket("run", "root", documents=versioning.with_lock())
    for _ in range(2):
        assert (await client.commit(commit_of("run", b"_products/hits/k.nxs"))).version_id == "null"
    assert await shown(client, b"_products/") == [("null", False)]
    assert not (await delete(client, b"_products/hits/k.nxs")).delete_marker
    assert await shown(client, b"_products/") == []


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
async def test_listing_pages_go_on_where_the_last_one_ended(
    client: CatalogClient, commit_of: CommitOf, limit: int
) -> None:
    await client.create_bucket("run", "root", documents=ENABLED)
    expected = []
    for key in (b"a", b"b/1", b"b/2", b"c"):
        versions = [(await client.commit(commit_of("run", key))).version_id for _ in range(3)]
        versions.append((await delete(client, key)).version_id)
        expected += [(key, version_id) for version_id in reversed(versions)]
    for gone in (False, True):
        found: list[tuple[bytes, str]] = []
        after, version, more = b"", "", True
        while more:
            rows, more = await client.list_versions("run", after=after, after_version=version, limit=limit)
            page = [(row.key, row.record.version_id) for row in rows if row.record is not None]
            found += page
            after, version = page[-1]
            if gone:  # whoever empties a bucket deletes each page before it asks for the next
                await client.delete([DeleteObject("run", *each) for each in page])
        assert found == expected
    rows, _ = await client.list_versions("run")
    assert rows == []


async def test_common_prefixes_of_versions(client: CatalogClient, commit_of: CommitOf) -> None:
    await client.create_bucket("run", "root", documents=ENABLED)
    for key in (b"a", b"b/1", b"b/2", b"c"):
        await client.commit(commit_of("run", key))
    await delete(client, b"b/1")
    found, after, version, more = [], b"", "", True
    while more:
        rows, more = await client.list_versions("run", after=after, after_version=version, delimiter=b"/", limit=1)
        found += [row.key for row in rows]
        after, version = rows[0].key, rows[0].record.version_id if rows[0].record else ""
    assert found == [b"a", b"b/", b"c"]


# -- object lock


@pytest.fixture
async def locked(paths: NodePaths, serving: Serving) -> AsyncIterator[CatalogClient]:
    paths.create()
    clock.create(paths)
    async with serving(), CatalogClient(paths, slot=0) as client:
        await client.create_bucket("run", "root", documents=versioning.with_lock())
        yield client
    clock.discard(paths)


def until(client: CatalogClient, days: float, mode: LockMode = LockMode.GOVERNANCE) -> Retention:
    return Retention(mode, client.now_ns() + int(days * DAY_NS))


@pytest.mark.parametrize("mode", list(LockMode))
async def test_retention_holds_until_its_date(
    locked: CatalogClient, paths: NodePaths, commit_of: CommitOf, mode: LockMode
) -> None:
    record = await locked.commit(commit_of("run", b"k", retention=until(locked, 10, mode)))
    await delete(locked, b"k")  # a marker hides it, and deletes nothing
    for _ in range(2):
        with pytest.raises(VersionLocked):
            await delete(locked, b"k", record.version_id)
        clock.advance(paths, 4.9 * DAY_S)
    if mode is LockMode.COMPLIANCE:
        with pytest.raises(VersionLocked):
            await delete(locked, b"k", record.version_id, bypass_governance=True)
    clock.advance(paths, 0.3 * DAY_S)
    assert (await delete(locked, b"k", record.version_id)).existed


async def test_governance_yields_to_who_may_bypass_it(locked: CatalogClient, commit_of: CommitOf) -> None:
    record = await locked.commit(commit_of("run", b"k", retention=until(locked, 10)))
    shorter = until(locked, 5)
    with pytest.raises(VersionLocked):
        await locked.set_retention("run", b"k", record.version_id, shorter)
    await locked.set_retention("run", b"k", record.version_id, shorter, bypass=True)
    assert (await locked.head("run", b"k")).retention == shorter
    await locked.set_retention("run", b"k", None, until(locked, 20))
    with pytest.raises(VersionLocked):
        await locked.set_retention("run", b"k", None, None)
    assert (await delete(locked, b"k", record.version_id, bypass_governance=True)).existed


async def test_compliance_only_grows(locked: CatalogClient, commit_of: CommitOf) -> None:
    strict = LockMode.COMPLIANCE
    record = await locked.commit(commit_of("run", b"k", retention=until(locked, 10, strict)))
    for weaker in (None, until(locked, 5, strict), until(locked, 50)):
        with pytest.raises(VersionLocked):
            await locked.set_retention("run", b"k", record.version_id, weaker, bypass=True)
    await locked.set_retention("run", b"k", record.version_id, until(locked, 20, strict))
    with pytest.raises(VersionLocked):
        await delete(locked, b"k", record.version_id, bypass_governance=True)


async def test_a_legal_hold_holds_by_itself(locked: CatalogClient, paths: NodePaths, commit_of: CommitOf) -> None:
    record = await locked.commit(commit_of("run", b"k", legal_hold=True, retention=until(locked, 1)))
    clock.advance(paths, 9999 * DAY_S)
    with pytest.raises(VersionLocked):
        await delete(locked, b"k", record.version_id, bypass_governance=True)
    await locked.set_legal_hold("run", b"k", record.version_id, False)
    assert (await delete(locked, b"k", record.version_id)).existed


async def test_the_default_counts_from_the_commit(locked: CatalogClient, commit_of: CommitOf) -> None:
    rule = versioning.DefaultRetention(LockMode.COMPLIANCE, years=2)
    document = versioning.lock_document(versioning.LockConfiguration(rule))
    await locked.configure_bucket("run", {"object-lock": document})
    record = await locked.commit(commit_of("run", b"k"))
    assert record.retention is not None
    assert record.retention.mode is LockMode.COMPLIANCE
    assert 729 <= (record.retention.until_ns - record.modified_ns) / DAY_NS <= 732
    own = until(locked, 1)
    assert (await locked.commit(commit_of("run", b"k", retention=own))).retention == own
    assert (await locked.commit(commit_of("run", b"_products/hits/k.nxs"))).retention is None


async def test_lock_and_versioning_belong_together(locked: CatalogClient, commit_of: CommitOf) -> None:
    for edit in (SUSPENDED, {"object-lock": None}, {"versioning": None}):
        with pytest.raises(BucketState):
            await locked.configure_bucket("run", edit)
    await locked.create_bucket("plain", "root")
    with pytest.raises(BucketState):
        await locked.configure_bucket("plain", {"object-lock": versioning.with_lock()["object-lock"]})
    with pytest.raises(InvalidLock):
        await locked.commit(commit_of("plain", b"k", legal_hold=True))
    await locked.commit(commit_of("plain", b"k"))
    with pytest.raises(InvalidLock):
        await locked.set_legal_hold("plain", b"k", None, True)
    with pytest.raises(NoSuchKey):
        await locked.set_legal_hold("run", b"missing", None, True)
    with pytest.raises(InvalidLock):
        await locked.commit(commit_of("run", b"k", retention=until(locked, -1)))


# -- kernels: a version that is not current is not in its run


async def owed(client: CatalogClient) -> set[tuple[str, bytes]]:
    return {(job.kernel, job.record.object_id) for job in await client.pending_reductions(None, 100)}


async def test_what_is_owed_goes_and_comes_back_with_being_current(client: CatalogClient, commit_of: CommitOf) -> None:
    await client.create_bucket("run", "root", documents=ENABLED)
    first = await client.commit(commit_of("run", b"r/k", reductions=("hits",)))
    partial = PartialOf("hits", b"r/", "g", (PartialMember(first.object_id),))
    product = commit_of("run", b"_products/hits/r/k.nxs", reduces=(first.object_id, "hits"), partial=partial)
    await client.commit(product)
    assert await owed(client) == set()
    second = await client.commit(commit_of("run", b"r/k", reductions=("hits",)))
    assert await owed(client) == {("hits", second.object_id)}
    assert await client.partials("run", b"r/", "hits") == []
    late = commit_of("run", b"_products/hits/r/k.nxs", reduces=(first.object_id, "hits"), partial=partial)
    with pytest.raises(StaleVersion):
        await client.commit(late)
    marker = await delete(client, b"r/k")
    assert await owed(client) == set()
    await delete(client, b"r/k", marker.version_id)
    assert await owed(client) == {("hits", second.object_id)}
    await delete(client, b"r/k", second.version_id)
    assert await owed(client) == {("hits", first.object_id)}


async def test_a_filtered_version_covers_the_one_received(client: CatalogClient, commit_of: CommitOf) -> None:
    await client.create_bucket("run", "root", documents=ENABLED)
    await client.set_bucket_tags("run", {"hiss.raw-filter": "allow"})
    raw = await client.commit(commit_of("run", b"r/k", filters={"hits": "kept"}))
    was = RawVersion(raw.object_id, raw.length, raw.etag, raw.crc64nvme, raw.modified_ns)
    left = await client.commit(commit_of("run", b"r/k", raw=was))
    assert await shown(client, b"r/k") == [(left.version_id, False), (raw.version_id, False)]
    assert await client.filters_due(0, 10) == []
    # One that was covered meanwhile stays as it was received.
    raw = await client.commit(commit_of("run", b"r/k", filters={"hits": "kept"}))
    newer = await client.commit(commit_of("run", b"r/k"))
    was = RawVersion(raw.object_id, raw.length, raw.etag, raw.crc64nvme, raw.modified_ns)
    with pytest.raises(StaleVersion):
        await client.commit(commit_of("run", b"r/k", raw=was))
    assert (await client.head("run", b"r/k")).object_id == newer.object_id


# -- appending


def piece(commit_of: CommitOf, old: ObjectRecord, number: int, length: int = 10) -> CommitObject:
    extent = Extent(0, 0, 7, 1, number * 65536, length)
    return commit_of(
        "run", old.key, extents=(extent,), length=old.length + length, append_at=old.length, source=old.object_id
    )


async def test_an_append_adds_its_extents(client: CatalogClient, commit_of: CommitOf) -> None:
    await client.create_bucket("run", "root")
    first = await client.commit(commit_of("run", b"k", append_at=0))
    request = piece(commit_of, first, 1)
    second = await client.commit(request)
    assert second == await client.commit(request)  # asked again
    assert second.extents == (*first.extents, *request.extents)
    assert (second.length, second.version_id) == (first.length + 10, "null")
    with pytest.raises(WrongOffset):
        await client.commit(piece(commit_of, first, 2))
    with pytest.raises(StaleVersion):
        await client.commit(msgspec.structs.replace(piece(commit_of, second, 3), source=first.object_id))
    await delete(client, b"k")
    with pytest.raises(NoSuchKey):
        await client.by_id(second.object_id)
    assert await client.segment_use(0) == []
    with pytest.raises(NoSuchKey):
        await client.commit(msgspec.structs.replace(piece(commit_of, second, 4), if_match="*"))
    await client.configure_bucket("run", ENABLED)
    kept = await client.commit(commit_of("run", b"k"))
    with pytest.raises(CannotAppend):
        await client.commit(piece(commit_of, kept, 5))


# -- the journal tells the same


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "delete", "delete-newest", "delete-oldest", "enable", "suspend", "drain"]),
        st.sampled_from([b"a", b"b"]),
    ),
    max_size=14,
)


class Model:
    """What S3 says of a bucket: versions of each key, newest first, as (id, is a marker)."""

    def __init__(self) -> None:
        self.status = Versioning.OFF
        self.keys: dict[bytes, list[tuple[str, bool]]] = {b"a": [], b"b": []}

    def add(self, key: bytes, version_id: str, marker: bool) -> None:
        if version_id == "null":
            self.keys[key] = [each for each in self.keys[key] if each[0] != "null"]
        self.keys[key].insert(0, (version_id, marker))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS)
def test_index_journal_and_model_agree(
    tmp_path_factory: pytest.TempPathFactory,
    in_loop: Callable[..., None],
    commit_of: CommitOf,
    operations: list[tuple[str, bytes]],
) -> None:
    in_loop(tmp_path_factory.mktemp("versions"), lambda client: _run(client, commit_of, operations))


async def _run(client: CatalogClient, commit_of: CommitOf, operations: list[tuple[str, bytes]]) -> None:
    await client.create_bucket("run", "root")
    model = Model()
    for what, key in operations:
        await _step(client, commit_of, model, what, key)
        for name, versions in model.keys.items():
            assert await shown(client, name) == versions
            found = await current(client, name)
            visible = versions[0][0] if versions and not versions[0][1] else None
            assert (None if found is None else found.version_id) == visible


async def _step(client: CatalogClient, commit_of: CommitOf, model: Model, what: str, key: bytes) -> None:
    if what == "put":
        record = await client.commit(commit_of("run", key))
        assert (record.version_id == "null") == (model.status is not Versioning.ENABLED)
        model.add(key, record.version_id, False)
    elif what == "delete":
        outcome = await delete(client, key)
        if model.status is Versioning.OFF:
            model.keys[key] = []
        else:
            model.add(key, outcome.version_id, True)
    elif what.startswith("delete-") and model.keys[key]:
        version_id, _ = model.keys[key].pop(0 if what == "delete-newest" else -1)
        assert (await delete(client, key, version_id)).existed
    elif what in ("enable", "suspend"):
        model.status = Versioning.ENABLED if what == "enable" else Versioning.SUSPENDED
        await client.configure_bucket("run", {"versioning": model.status.encode()})
    elif what == "drain":
        for record in await client.claim_drain(100, 60):
            assert not record.delete_marker
            with contextlib.suppress(IngestError):
                copy = ArchiveCopy("posix", f"p/{record.object_id.hex()}", record.crc64nvme, 1)
                assert (await client.drained(record.object_id, copy)).state is ObjectState.ARCHIVED


@pytest.fixture(scope="module")
def in_loop() -> Callable[..., None]:
    async def run(root: Path, work: Callable[[CatalogClient], object]) -> None:
        paths = NodePaths(root)
        paths.create()
        up, stop = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(server.serve(paths, Counters(None, CATALOGUE), node=0, ready=up.set, stop=stop))
        await up.wait()
        try:
            async with CatalogClient(paths, slot=0) as client:
                await work(client)  # type: ignore[misc]
            report = await asyncio.to_thread(fsck, root)
            assert [
                problem for problem in report.problems if problem.kind in ("index", "reference", "accounting")
            ] == []
        finally:
            stop.set()
            await task

    return lambda root, work: asyncio.run(run(root, work))

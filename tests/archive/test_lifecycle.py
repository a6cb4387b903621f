"""Lifecycle rules: what they say of a version, and the scanner that carries them out over a real catalogue."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from archive.lifecycle import LifecycleScanner
from ingest import clock, versioning
from ingest.catalog import server
from ingest.catalog.client import CatalogClient
from ingest.counters import CATALOGUE, DRAIN, Counters
from ingest.errors import NoSuchUpload, StorageFailed
from ingest.lifecycle import Expire, Lifecycle, Move, Place, Rule, Transition, When, due, expiration
from ingest.paths import NodePaths
from ingest.records import (
    BucketRecord,
    CommitObject,
    Deleted,
    DeleteObject,
    Extent,
    ObjectRecord,
    ObjectState,
    UploadRecord,
    VersionAttributes,
)

DAY_S = 86400
DAY_NS = DAY_S * 10**9
NOW_NS = 20_000 * DAY_NS
BIG = 1 << 20


def version(key: bytes = b"raw/1", length: int = BIG, **fields: Any) -> ObjectRecord:
    values = {"state": ObjectState.ARCHIVED, "etag": "e", "crc64nvme": 0, "owner": "ada", "stored_length": length}
    values |= {"modified_ns": NOW_NS} | fields
    return ObjectRecord("b", key, "null", b"i" * 16, 1, length=length, **values)


def says(rule: dict[str, Any], record: ObjectRecord, place: Place, days_later: float) -> Expire | Move | None:
    rules = Lifecycle((Rule(id="r", enabled=True, **rule),))
    return due(rules, record, place, NOW_NS + int(days_later * DAY_NS), DAY_S)


CURRENT = Place(current=True)
MARKER = {"delete_marker": True, "length": 0}


@pytest.mark.parametrize(
    ("rule", "facts", "place", "days", "expected"),
    [
        ({"expire": When(days=2)}, {}, CURRENT, 1.9, None),
        ({"expire": When(days=2)}, {}, CURRENT, 2, Expire("r")),
        ({"expire": When(date_ns=NOW_NS + DAY_NS)}, {}, CURRENT, 0.9, None),
        ({"expire": When(date_ns=NOW_NS + DAY_NS)}, {}, CURRENT, 1, Expire("r")),
        ({"expire": When(days=2), "prefix": "other/"}, {}, CURRENT, 9, None),
        ({"expire": When(days=2), "tags": {"a": "b"}}, {}, CURRENT, 9, None),
        ({"expire": When(days=2), "tags": {"a": "b"}}, {"attributes": VersionAttributes({"a": "b", "c": "d"})},
         CURRENT, 9, Expire("r")),
        ({"expire": When(days=2), "larger_than": BIG}, {}, CURRENT, 9, None),
        ({"expire": When(days=2), "larger_than": BIG - 1, "smaller_than": BIG + 1}, {}, CURRENT, 9, Expire("r")),
        ({"expire": When(days=2), "smaller_than": BIG}, {}, CURRENT, 9, None),
        ({"expire": When(days=2)}, {}, Place(current=False, since_ns=NOW_NS), 9, None),
        ({"expire": When(days=2)}, {"key": b"_kernels/hits.py"}, CURRENT, 9, None),
        ({"expire": When(days=2), "prefix": "_kernels/"}, {"key": b"_kernels/hits.py"}, CURRENT, 9, Expire("r")),
        ({"expire_markers": True}, MARKER, Place(current=True, alone=True), 0, Expire("r")),
        ({"expire_markers": True}, MARKER, CURRENT, 9, None),
        ({"expire_markers": True}, {}, Place(current=True, alone=True), 9, None),
        ({"expire": When(days=2)}, MARKER, Place(current=True, alone=True), 2, Expire("r")),
        ({"expire": When(days=2)}, MARKER, CURRENT, 2, None),
        ({"noncurrent_days": 2}, {}, Place(current=False, since_ns=NOW_NS + DAY_NS), 2.9, None),
        ({"noncurrent_days": 2}, {}, Place(current=False, since_ns=NOW_NS + DAY_NS), 3, Expire("r")),
        ({"noncurrent_days": 2, "noncurrent_keep": 2}, {}, Place(False, since_ns=NOW_NS, newer=1), 9, None),
        ({"noncurrent_days": 2, "noncurrent_keep": 2}, {}, Place(False, since_ns=NOW_NS, newer=2), 9, Expire("r")),
        ({"transitions": (Transition(When(days=0), "GLACIER"),)}, {}, CURRENT, 0, Move("GLACIER", "r")),
        ({"transitions": (Transition(When(days=0), "GLACIER"),)}, {"length": 1000}, CURRENT, 0, None),
        ({"transitions": (Transition(When(days=0), "GLACIER"),), "smaller_than": 2000}, {"length": 1000}, CURRENT, 0,
         Move("GLACIER", "r")),
        ({"transitions": (Transition(When(days=1), "STANDARD_IA"), Transition(When(days=2), "DEEP_ARCHIVE"))},
         {}, CURRENT, 5, Move("DEEP_ARCHIVE", "r")),
        ({"transitions": (Transition(When(days=0), "STANDARD_IA"),)},
         {"attributes": VersionAttributes(storage_class="GLACIER")}, CURRENT, 5, None),
        ({"transitions": (Transition(When(days=0), "GLACIER"),), "expire": When(days=1)}, {}, CURRENT, 1, Expire("r")),
        ({"noncurrent_transitions": (Transition(When(days=1), "GLACIER", keep=1),)}, {},
         Place(False, since_ns=NOW_NS, newer=1), 1, Move("GLACIER", "r")),
        ({"noncurrent_transitions": (Transition(When(days=1), "GLACIER", keep=1),)}, {},
         Place(False, since_ns=NOW_NS, newer=0), 1, None),
    ],
)  # fmt: skip
def test_what_a_rule_says(
    rule: dict[str, Any], facts: dict[str, Any], place: Place, days: float, expected: Expire | Move | None
) -> None:
    record = version(**facts)
    assert says(rule, record, place, days) == expected
    assert due(Lifecycle((Rule(id="r", enabled=False, **rule),)), record, place, NOW_NS + 99 * DAY_NS, DAY_S) is None


def test_the_first_rule_to_expire_a_version_is_told() -> None:
    rules = tuple(Rule(str(days), True, expire=When(days=days)) for days in (5, 2, 9))
    assert expiration(Lifecycle(rules), version(), DAY_S) == (NOW_NS + 2 * DAY_NS, "2")
    assert expiration(Lifecycle(()), version(), DAY_S) is None


# -- the scanner


@pytest.fixture
async def timed(tmp_path: Path) -> AsyncIterator[CatalogClient]:
    paths = NodePaths(tmp_path / "node")
    paths.create()
    clock.create(paths)
    stop, ready = asyncio.Event(), asyncio.Event()
    serving = asyncio.create_task(server.serve(paths, Counters(None, CATALOGUE), node=0, ready=ready.set, stop=stop))
    await ready.wait()
    async with CatalogClient(paths, slot=0) as client:
        yield client
    stop.set()
    await serving


class Bucket:
    """A bucket with rules, what it holds, and a scanner that is started anew for each pass."""

    def __init__(self, catalog: CatalogClient, paths: NodePaths, slice_versions: int = 1000) -> None:
        self.catalog = catalog
        self.counters = Counters(None, DRAIN)
        self.paths = paths
        self._slice = slice_versions
        self._offset = 0

    async def rules(self, *rules: Rule) -> None:
        await self.catalog.configure_bucket("b", {"lifecycle": msgspec.json.encode(Lifecycle(rules))})

    async def put(self, key: bytes, length: int = BIG, **fields: Any) -> ObjectRecord:
        self._offset += 2 * BIG
        request = CommitObject(
            "b",
            key,
            secrets.token_bytes(16),
            length,
            "e",
            0,
            "ada",
            (Extent(0, 0, 1, 1, self._offset, length),),
            **fields,
        )
        return await self.catalog.commit(request)

    async def keys(self) -> list[bytes]:
        return [row.key for row in (await self.catalog.list_objects("b"))[0]]

    def scanner(self, every_s: float = 1) -> LifecycleScanner:
        return LifecycleScanner(
            self.catalog, self.counters, self.paths.lifecycle, day_s=DAY_S, every_s=every_s, slice_versions=self._slice
        )

    async def one_pass(self) -> None:
        """Each slice in a scanner of its own: what was kept is all it knows."""
        while await self.scanner().step():
            pass

    def done(self, action: str) -> float:
        return self.counters.cell("hiss_lifecycle_actions_total", action).value()


@pytest.fixture(params=[1000, 2])
async def bucket(timed: CatalogClient, tmp_path: Path, request: pytest.FixtureRequest) -> Bucket:
    await timed.create_bucket("a-without-rules", "ada")
    await timed.create_bucket("b", "ada")
    return Bucket(timed, NodePaths(tmp_path / "node"), request.param)


def names(records: Sequence[ObjectRecord]) -> list[bytes]:
    return [record.key for record in records]


async def test_objects_expire(bucket: Bucket) -> None:
    for key in (b"keep", b"logs/1", b"logs/2", b"logs/3", b"raw/1"):
        await bucket.put(key)
    await bucket.rules(Rule("logs", True, prefix="logs/", expire=When(days=3)))
    await bucket.one_pass()
    assert len(await bucket.keys()) == 5
    clock.advance(bucket.paths, 4 * DAY_S)
    await bucket.put(b"logs/2")
    await bucket.one_pass()
    assert await bucket.keys() == [b"keep", b"logs/2", b"raw/1"]
    assert bucket.done("expire") == 2


async def test_uploads_are_aborted(bucket: Bucket) -> None:
    for number in range(5):
        await bucket.catalog.create_upload(UploadRecord("b", b"k", f"{number}", "ada", bucket.catalog.now_ns()))
    await bucket.rules(Rule("uploads", True, abort_days=2))
    await bucket.one_pass()
    clock.advance(bucket.paths, 3 * DAY_S)
    await bucket.catalog.create_upload(UploadRecord("b", b"k", "late", "ada", bucket.catalog.now_ns()))
    await bucket.one_pass()
    assert [upload.upload_id for upload in (await bucket.catalog.uploads("b"))[0]] == ["late"]
    with pytest.raises(NoSuchUpload):
        await bucket.catalog.upload("b", b"k", "0")
    assert bucket.done("abort") == 5


async def test_objects_move_to_the_archive(bucket: Bucket) -> None:
    await bucket.catalog.set_bucket_tags("b", {"hiss.drain-after-s": "86400"})
    small = await bucket.put(b"small", 1000)
    large = await bucket.put(b"large")
    await bucket.rules(Rule("cold", True, transitions=(Transition(When(days=1), "GLACIER"),)))
    assert await bucket.catalog.claim_drain(10, 60) == []
    clock.advance(bucket.paths, 2 * DAY_S)
    late = await bucket.put(b"late")
    await bucket.one_pass()
    assert (await bucket.catalog.by_id(large.object_id)).attributes.storage_class == "GLACIER"
    assert (await bucket.catalog.by_id(small.object_id)).attributes.storage_class == "STANDARD"
    claimed = await bucket.catalog.claim_drain(10, 60)
    assert late.object_id not in {record.object_id for record in claimed}
    assert large.object_id in {record.object_id for record in claimed}
    assert bucket.done("move") == 1
    await bucket.one_pass()
    assert bucket.done("move") == 1


async def versions(bucket: Bucket) -> list[tuple[bytes, bool]]:
    return [(record.key, record.delete_marker) for record in await bucket.catalog.scan_versions("b", b"", 0, 100)]


async def test_noncurrent_versions_go_and_the_newest_of_them_stay(bucket: Bucket) -> None:
    await bucket.catalog.configure_bucket("b", {"versioning": b"Enabled"})
    for _ in range(5):
        await bucket.put(b"k")
        clock.advance(bucket.paths, 1)
    await bucket.put(b"other")
    rule = Rule("old", True, noncurrent_days=2, noncurrent_keep=1)
    await bucket.rules(rule)
    await bucket.one_pass()
    assert len(await versions(bucket)) == 6
    clock.advance(bucket.paths, 3 * DAY_S)
    await bucket.one_pass()
    assert await versions(bucket) == [(b"k", False), (b"k", False), (b"other", False)]


async def test_in_a_bucket_with_versions_expiring_leaves_a_marker_and_markers_expire(bucket: Bucket) -> None:
    await bucket.catalog.configure_bucket("b", {"versioning": b"Enabled"})
    await bucket.put(b"k")
    await bucket.rules(Rule("all", True, expire=When(days=1), noncurrent_days=1))
    clock.advance(bucket.paths, 2 * DAY_S)
    await bucket.one_pass()
    assert await versions(bucket) == [(b"k", True), (b"k", False)]
    clock.advance(bucket.paths, 2 * DAY_S)
    await bucket.one_pass()
    assert await versions(bucket) == [(b"k", True)]
    clock.advance(bucket.paths, 2 * DAY_S)
    await bucket.one_pass()
    assert await versions(bucket) == []


async def test_what_was_replaced_since_it_was_looked_at_stays(bucket: Bucket) -> None:
    for document in ({}, {"versioning": b"Enabled"}):
        await bucket.catalog.configure_bucket("b", document)
        old = await bucket.put(b"k")
        await bucket.put(b"k")
        (outcome,) = await bucket.catalog.delete([DeleteObject("b", b"k", object_id=old.object_id)])
        assert isinstance(outcome, Deleted)
        assert not outcome.existed
        assert await bucket.keys() == [b"k"]


async def test_locked_versions_stay(bucket: Bucket) -> None:
    lock = versioning.with_lock()
    await bucket.catalog.configure_bucket("b", lock)
    await bucket.put(b"k", legal_hold=True)
    await bucket.put(b"k")
    await bucket.rules(Rule("old", True, noncurrent_days=1))
    clock.advance(bucket.paths, 3 * DAY_S)
    await bucket.one_pass()
    assert len(await versions(bucket)) == 2
    assert bucket.counters.cell("hiss_lifecycle_failures_total").value() == 1


async def test_rules_that_cannot_be_read_stop_no_others(bucket: Bucket) -> None:
    await bucket.put(b"k")
    await bucket.catalog.configure_bucket("a-without-rules", {"lifecycle": b"{"})
    await bucket.rules(Rule("all", True, expire=When(days=1)))
    clock.advance(bucket.paths, 2 * DAY_S)
    await bucket.one_pass()
    assert await bucket.keys() == []
    assert bucket.counters.cell("hiss_lifecycle_failures_total").value() >= 1


async def test_a_disk_that_fails_ends_no_scanner(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    await bucket.put(b"k")
    await bucket.rules(Rule("all", True, expire=When(days=1)))
    clock.advance(bucket.paths, 2 * DAY_S)
    asked, stop = asyncio.Event(), asyncio.Event()

    async def fail() -> Sequence[BucketRecord]:
        asked.set()
        raise StorageFailed("catalogue: disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(bucket.catalog, "buckets", fail)
        scanning = asyncio.create_task(bucket.scanner(every_s=0.01).run(stop))
        async with asyncio.timeout(60):
            for _ in range(2):  # the second is asked when the first has been given up
                asked.clear()
                await asked.wait()
    deadline = asyncio.get_running_loop().time() + 60
    while await bucket.keys():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.01)
    stop.set()
    await scanning


async def test_a_version_that_cannot_be_changed_holds_up_no_other(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    ill = await bucket.put(b"a")
    well = await bucket.put(b"b")
    await bucket.rules(Rule("cold", True, transitions=(Transition(When(days=1), "GLACIER"),)))
    clock.advance(bucket.paths, 2 * DAY_S)
    amend = bucket.catalog.amend_object

    async def some(object_id: bytes, **changes: Any) -> ObjectRecord:
        if object_id == ill.object_id:
            raise StorageFailed("index: database disk image is malformed")
        return await amend(object_id, **changes)

    monkeypatch.setattr(bucket.catalog, "amend_object", some)
    await bucket.one_pass()
    assert (await bucket.catalog.by_id(well.object_id)).attributes.storage_class == "GLACIER"
    assert bucket.counters.cell("hiss_lifecycle_failures_total").value() == 1

"""Multipart uploads in the catalogue: parts, Complete, Abort, and what becomes of extents and of unsettled bytes."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import pytest

from ingest.catalog.client import CatalogClient
from ingest.errors import (
    BucketNotEmpty,
    EntityTooSmall,
    InvalidPart,
    InvalidPartOrder,
    NoSuchKey,
    NoSuchUpload,
    PreconditionFailed,
)
from ingest.records import (
    CommitObject,
    CommitPart,
    CompletedPart,
    CompleteUpload,
    DeleteObject,
    Durability,
    Extent,
    FreedExtents,
    PartRecord,
    SettleRequest,
    UploadRecord,
)

CommitOf = Callable[..., CommitObject]
_places = iter(range(1, 1 << 20))


@pytest.fixture
async def upload(client: CatalogClient) -> UploadRecord:
    await client.create_bucket("run", "root")
    made = UploadRecord("run", b"big", "u1", "ada", 1, {"content-type": "x/y"}, {"note": "n"})
    await client.create_upload(made)
    return made


def part(number: int, length: int = 100, **fields: object) -> CommitPart:
    extent = Extent(0, 0, 1, 1, next(_places) * 65536, length)
    record = PartRecord(number, length, f"etag{number}", number, {"crc32": f"c{number}"}, (extent,), **fields)  # type: ignore[arg-type]
    return CommitPart("run", b"big", "u1", record, secrets.token_bytes(16))


def complete(*numbers: int, length: int | None = None, **fields: object) -> CompleteUpload:
    named = tuple(CompletedPart(number, f"etag{number}") for number in numbers)
    total = 100 * len(numbers) if length is None else length
    return CompleteUpload("run", b"big", "u1", secrets.token_bytes(16), named, "whole-3", 99, total, **fields)  # type: ignore[arg-type]


async def test_complete_links_the_parts_in_order_and_drops_the_rest(
    client: CatalogClient, upload: UploadRecord
) -> None:
    freed: list[Extent] = []

    async def note(push: FreedExtents | SettleRequest) -> None:
        assert isinstance(push, FreedExtents)
        freed.extend(push.extents)

    client.subscribe(note)
    requests = {number: part(number) for number in (3, 1, 2, 7)}
    for request in requests.values():
        stored = await client.commit_part(request)
        assert stored.modified_ns > 0
        assert await client.commit_part(request) == stored
    listed, truncated = await client.parts("run", b"big", "u1", limit=3)
    assert ([found.number for found in listed], truncated) == ([1, 2, 3], True)
    assert [found.number for found in (await client.parts("run", b"big", "u1", after=3))[0]] == [7]
    request = complete(1, 2, 3)
    record = await client.complete_upload(request)
    assert await client.complete_upload(request) == record
    assert record.extents == tuple(extent for number in (1, 2, 3) for extent in requests[number].part.extents)
    assert [(piece.number, piece.length, piece.extents) for piece in record.parts] == [(n, 100, ()) for n in (1, 2, 3)]
    assert (record.owner, record.headers, record.metadata) == ("ada", upload.headers, upload.metadata)
    assert await client.head("run", b"big") == record
    (row,), _ = await client.list_objects("run")
    assert row.record is not None
    assert (row.record.extents, row.record.parts) == (record.extents, ())
    with pytest.raises(NoSuchUpload):
        await client.upload("run", b"big", "u1")
    await client.barrier()
    assert freed == list(requests[7].part.extents)
    holders = await client.segment_extents(0, 1)
    assert {holder and holder.key for holder, _ in holders} == {b"big"}
    await client.delete([DeleteObject("run", b"big")])
    assert await client.segment_use(0) == []


async def test_a_part_sent_anew_replaces_the_earlier_one(client: CatalogClient, upload: UploadRecord) -> None:
    first, second = part(1), part(1, 200)
    earlier = await client.commit_part(first)
    later = await client.commit_part(second)
    assert await client.commit_part(first) == earlier  # the late repetition of a call changes nothing
    assert (await client.parts("run", b"big", "u1"))[0] == [later]
    (use,) = await client.segment_use(0)
    assert use.live_bytes == second.part.extents[0].stored_bytes
    ((holder, extent),) = await client.segment_extents(0, 1)
    assert (holder, extent) == (None, second.part.extents[0])


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (complete(), InvalidPart),
        (complete(2, 1), InvalidPartOrder),
        (complete(1, 1), InvalidPartOrder),
        (complete(1, 9), InvalidPart),
        (complete(1, 2, 3), EntityTooSmall),
        (complete(1, 3, length=7), InvalidPart),
        (complete(1, 3, length=200, if_match="e"), NoSuchKey),
    ],
)
async def test_what_a_complete_must_not_do(
    client: CatalogClient, upload: UploadRecord, request_: CompleteUpload, error: type[Exception]
) -> None:
    for piece in (part(1), part(2, 99), part(3)):
        await client.commit_part(piece)
    with pytest.raises(error):
        await client.complete_upload(request_)
    assert len((await client.parts("run", b"big", "u1"))[0]) == 3


async def test_a_wrong_etag_or_checksum_is_an_invalid_part(client: CatalogClient, upload: UploadRecord) -> None:
    await client.commit_part(part(1))
    for named in (CompletedPart(1, "other"), CompletedPart(1, "etag1", {"crc32": "other"})):
        request = CompleteUpload("run", b"big", "u1", b"i" * 16, (named,), "e", 1, 100)
        with pytest.raises(InvalidPart):
            await client.complete_upload(request)


async def test_complete_obeys_preconditions(client: CatalogClient, upload: UploadRecord, commit_of: CommitOf) -> None:
    await client.commit(commit_of("run", b"big"))
    await client.commit_part(part(1))
    with pytest.raises(PreconditionFailed):
        await client.complete_upload(complete(1, if_none_match="*"))
    assert (await client.complete_upload(complete(1))).length == 100


async def test_abort_frees_everything_and_a_bucket_with_uploads_is_not_empty(
    client: CatalogClient, upload: UploadRecord
) -> None:
    await client.create_upload(upload)
    await client.commit_part(part(1))
    with pytest.raises(BucketNotEmpty):
        await client.delete_bucket("run")
    await client.abort_upload("run", b"big", "u1")
    with pytest.raises(NoSuchUpload):
        await client.abort_upload("run", b"big", "u1")
    with pytest.raises(NoSuchUpload):
        await client.commit_part(part(2))
    assert await client.segment_use(0) == []
    await client.delete_bucket("run")


async def test_uploads_are_listed_by_key_and_id(client: CatalogClient, upload: UploadRecord) -> None:
    for key, name in ((b"a/1", "x"), (b"a/1", "y"), (b"a/2", "x"), (b"b", "x")):
        await client.create_upload(UploadRecord("run", key, f"{name}{key.decode()}", "ada", 1))
    found, truncated = await client.uploads("run", prefix=b"a/", limit=2)
    assert ([item.upload_id for item in found], truncated) == (["xa/1", "ya/1"], True)
    found, truncated = await client.uploads("run", prefix=b"a/", after=(b"a/1", "ya/1"), limit=2)
    assert ([item.upload_id for item in found], truncated) == (["xa/2"], False)


async def test_a_version_settles_with_the_last_of_its_parts(client: CatalogClient, upload: UploadRecord) -> None:
    pieces = [part(1, settled=False), part(2, settled=False), part(3, settled=False)]
    for piece in pieces:
        await client.commit_part(piece)
    await client.settled([pieces[0].object_id])
    assert [found.settled for found in (await client.parts("run", b"big", "u1"))[0]] == [True, False, False]
    record = await client.complete_upload(complete(1, 2, 3, durability=Durability.MEMORY))
    assert not record.settled
    asked: list[bytes] = []

    async def owner(push: FreedExtents | SettleRequest) -> None:
        assert isinstance(push, SettleRequest)
        asked.append(push.object_id)
        await client.settled([push.object_id])

    client.subscribe(owner)
    assert (await client.settle(record.object_id, 5)).settled
    assert sorted(asked) == sorted(piece.object_id for piece in pieces[1:])

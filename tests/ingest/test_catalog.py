"""The catalogue through its client, against a real catalogue process."""

from __future__ import annotations

import secrets

import pytest

from ingest.catalog.client import CatalogClient
from ingest.errors import NoSuchKey
from ingest.records import CommitObject, DeleteObject, Extent


def commit_of(bucket: str, key: bytes, **fields: object) -> CommitObject:
    values: dict[str, object] = {
        "object_id": secrets.token_bytes(16), "length": 10, "etag": "e" * 32, "crc64nvme": 2**64 - 5, "owner": "root",
        "extents": (Extent(0, 0, 1, 1, secrets.randbelow(1 << 30) * 4096, 10),),
    }  # fmt: skip
    return CommitObject(bucket=bucket, key=key, **(values | fields))  # type: ignore[arg-type]


async def test_a_commit_is_visible_and_a_delete_takes_it_away(client: CatalogClient) -> None:
    await client.create_bucket("run", "root")
    record = await client.commit(commit_of("run", b"a/1"))
    assert await client.head("run", b"a/1") == record
    (row,), truncated = await client.list_objects("run")
    assert row.record == record
    assert not truncated
    (deleted,) = await client.delete([DeleteObject("run", b"a/1")])
    assert deleted.existed
    with pytest.raises(NoSuchKey):
        await client.head("run", b"a/1")

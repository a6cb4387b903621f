"""PutObject with ``x-amz-write-offset-bytes``: an instrument writes one long object piece by piece.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/directory-buckets-objects-append.html. The new bytes are received like any
body and become further extents of the object; nothing that is stored is copied or read. Its CRC64NVME is combined. Readers see
the object before or after a piece, never part of one. Kernels get the whole object, from disk.
"""

from __future__ import annotations

import dataclasses

import msgspec

from ingest import versioning
from ingest.bucket_settings import BucketSettings
from ingest.errors import PreconditionFailed
from ingest.records import BucketRecord, CommitObject, Durability, LifetimeClass, ObjectRecord, Versioning
from ingest.stream_types import Stream, StreamDigest, StreamSpec
from s3api import checksums
from s3api.call import Call
from s3api.conditions import WriteCondition
from s3api.errors import S3Error
from s3api.http.message import Response
from s3api.integrity import plan
from s3api.operations import kernels
from s3api.operations.describe import checksum_headers, lowered_headers
from s3api.operations.reading import current, open_version
from s3api.operations.received import lost_race, received

OFFSET = "x-amz-write-offset-bytes"
SETTLE_TIMEOUT_S = 30.0


def offset_of(call: Call) -> int | None:
    """Where the body goes; None for a PUT of a whole object. Raises InvalidArgument."""
    text = call.request.headers.get(OFFSET)
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 14):
        raise S3Error("InvalidArgument", f"{OFFSET} must be a whole number", fields=[("ArgumentName", OFFSET)])
    return int(text)


def wrong_offset(length: int) -> S3Error:
    return S3Error("InvalidWriteOffset", fields=[("ObjectSize", str(length))])


async def check_append(call: Call, bucket: BucketRecord, offset: int) -> ObjectRecord | None:
    """The object to append to; None: the first piece makes it. Raises InvalidWriteOffset, InvalidRequest."""
    if versioning.versioning_of_key(bucket, call.key) is not Versioning.OFF:
        raise S3Error("InvalidRequest", "Appending needs a bucket that does not keep versions")
    kernels.refuse_reserved(call.key)
    found = await current(call)
    length = 0 if found is None else found.length
    if offset != length:
        raise wrong_offset(length)
    return found


async def append_object(
    call: Call, bucket: BucketRecord, settings: BucketSettings, found: ObjectRecord, condition: WriteCondition
) -> Response:
    """Put the body behind the bytes of ``found``."""
    expected = plan(call.request, call.signed, length_max_bytes=call.limits.object_bytes - found.length)
    # A piece is durable before it is told of, whatever the bucket says: a version is in memory or on disk, not both.
    level = Durability.DISK if settings.durability is Durability.MEMORY else settings.durability
    spec = StreamSpec(
        bucket=bucket,
        settings=dataclasses.replace(settings, durability=level),
        key=call.key,
        length=expected.length,
        algorithms=expected.algorithms(md5=False),
        metadata=found.metadata,
        content_type=found.headers.get("content-type", ""),
        lifetime=LifetimeClass.STREAM,
        part=True,
    )
    host = call.node.kernels

    async def commit(stream: Stream, digest: StreamDigest, _: dict[str, str]) -> ObjectRecord:
        request = _request(call, await _whole(call, found.length, settings), digest, condition, level)
        if host is not None:
            await host.prepare(call.bucket_name)
            request = msgspec.structs.replace(
                request,
                reductions=host.kernels_for(call.bucket_name, call.key),
                filters=host.filters(call.bucket_name, call.key),
            )
        try:
            record = await stream.commit(request)
        except PreconditionFailed as error:
            raise lost_race(condition, error) from None
        if host is not None and request.reductions:
            host.catch_up(record, request.reductions)
        return record

    record = await received(call, spec, expected, commit)
    answer = [("etag", f'"{record.etag}"'), *checksum_headers(record), ("x-amz-object-size", str(record.length))]
    return Response(200, answer + lowered_headers(bucket, record.length, record.mirror))


async def _whole(call: Call, offset: int, settings: BucketSettings) -> ObjectRecord:
    """The object as it is now, all its bytes in segments."""
    record = await call.catalog.head(call.bucket_name, call.key)
    if record.length != offset:
        raise wrong_offset(record.length)
    if record.length and not record.extents:
        async with await open_version(call, record, settings, 0, 1):
            pass
        return await call.catalog.head(call.bucket_name, call.key)
    return record if record.settled else await call.catalog.settle(record.object_id, SETTLE_TIMEOUT_S)


def _request(
    call: Call, old: ObjectRecord, digest: StreamDigest, condition: WriteCondition, level: Durability
) -> CommitObject:
    crc = checksums.combined_crc64([(old.crc64nvme, old.length), (digest.crc64nvme, digest.length)])
    length = old.length + digest.length
    return CommitObject(
        bucket=call.bucket_name,
        key=call.key,
        object_id=digest.object_id,
        length=length,
        etag=checksums.etag_from_crc64(crc, length),
        crc64nvme=crc,
        owner=call.user.user_id,
        extents=digest.extents,
        durability=level,
        checksums={"crc64nvme": checksums.crc64_base64(crc)},
        if_none_match=condition.if_none_match,
        if_match=condition.if_match,
        source=old.object_id,
        append_at=old.length,
    )

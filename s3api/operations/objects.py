"""PutObject, GetObject, HeadObject.

https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutObject.html and its neighbours.
"""

from __future__ import annotations

import msgspec

from ingest.bucket_settings import BucketSettings
from ingest.errors import StaleVersion
from ingest.ports import BodySink
from ingest.records import (
    BucketRecord,
    CommitObject,
    ObjectRecord,
)
from ingest.stream_types import Stream, StreamDigest, StreamSpec
from s3api import checksums
from s3api.call import Call
from s3api.conditions import WriteCondition, check_read, range_applies, write_condition
from s3api.errors import S3Error
from s3api.http.message import FileBody, Response
from s3api.integrity import BodyPlan, needs_checksum, plan, read_document
from s3api.operations import append, kernels
from s3api.operations.describe import (
    checksum_headers,
    describe,
    new_version_headers,
    stored_headers,
    user_metadata,
    version_headers,
)
from s3api.operations.lifecycle import expiration_header
from s3api.operations.locks import Lock, lock_headers, lock_of_write
from s3api.operations.object_tags import attributes_of
from s3api.operations.reading import current, open_version, version
from s3api.operations.received import committed, etag_of, lifetime_of, once, received, stored
from s3api.operations.refusals import refuse_encryption_of_reads, refuse_unsupported
from s3api.ranges import parse_range

# -- writing


async def put_object(call: Call) -> Response:
    headers = call.request.headers
    refuse_unsupported(headers)
    if call.request.arg("versionId") is not None:
        raise S3Error("InvalidArgument", "This operation does not accept a version-id")
    attributes_of(headers)
    name = kernels.kernel_name(call.key)
    metadata = user_metadata(headers, call.limits)
    condition = write_condition(headers)
    bucket, settings = await call.bucket()
    if condition:
        condition.check(await current(call))
    lock = await lock_of_write(call, bucket)
    if lock != Lock():
        needs_checksum(call.request)
    offset = append.offset_of(call)
    if offset is not None:
        found = await append.check_append(call, bucket, offset)
        if found is not None:
            return await append.append_object(call, bucket, settings, found, condition)
    if name is not None:
        record = await _put_kernel(call, name, bucket, settings, metadata, condition, lock)
    elif (array := kernels.array_name(call.key)) is not None:
        record = await _put_array(call, array, bucket, settings, metadata, condition, lock)
    else:
        expected = plan(call.request, call.signed, length_max_bytes=call.limits.object_bytes)
        spec = spec_of(call, bucket, settings, expected, metadata)

        async def commit(stream: Stream, digest: StreamDigest, verified: dict[str, str]) -> ObjectRecord:
            return await committed(call, stream, commit_of(call, spec, digest, verified, condition, lock), condition)

        record = await received(call, spec, expected, commit)
    answer = [("etag", f'"{record.etag}"'), *checksum_headers(record), *new_version_headers(bucket, record)]
    answer += expiration_header(call, bucket, record)
    if record.ledger is not None and record.ledger.truncated:
        answer.append(truncated(record, settings))
    return Response(200, answer)


def truncated(record: ObjectRecord, settings: BucketSettings) -> tuple[str, str]:
    """The header that tells a sender that a kernel's STOP cut its object short. Raises StreamStopped where the bucket
    wants that told by an error (the object is stored all the same)."""
    assert record.ledger is not None
    if settings.stop == "answer":
        counts = [("Frames", str(record.ledger.received)), ("Bytes", str(record.length)), ("ETag", f'"{record.etag}"')]
        raise S3Error("StreamStopped", fields=counts)
    return "x-hiss-truncated", f"frames={record.ledger.received}; bytes={record.length}"


def spec_of(
    call: Call, bucket: BucketRecord, settings: BucketSettings, expected: BodyPlan, metadata: dict[str, str]
) -> StreamSpec:
    return StreamSpec(
        bucket=bucket,
        settings=settings,
        key=call.key,
        length=expected.length,
        algorithms=expected.algorithms(md5=wants_md5(call, settings)),
        metadata=metadata,
        content_type=call.request.headers.get("content-type"),
        lifetime=lifetime_of(call.key, expected.length, call.limits),
        stoppable=True,
    )


def wants_md5(call: Call, settings: BucketSettings) -> bool:
    """Are ETags MD5s here, whatever the client sent?"""
    return settings.etag == "md5" or call.node.settings.etag == "md5"


def commit_of(
    call: Call,
    spec: StreamSpec,
    digest: StreamDigest,
    verified: dict[str, str],
    condition: WriteCondition,
    lock: Lock,
) -> CommitObject:
    return CommitObject(
        bucket=call.bucket_name,
        key=call.key,
        object_id=digest.object_id,
        length=digest.length,
        etag=etag_of(digest),
        crc64nvme=digest.crc64nvme,
        owner=call.owner,
        extents=digest.extents,
        durability=spec.settings.durability,
        settled=digest.settled,
        checksums=verified,
        headers=stored_headers(call.request.headers),
        metadata=dict(spec.metadata),
        attributes=msgspec.structs.replace(attributes_of(call.request.headers), acl=call.acl),
        if_none_match=condition.if_none_match,
        if_match=condition.if_match,
        append_at=append.offset_of(call),
        retention=lock.retention,
        legal_hold=lock.legal_hold,
    )


async def _put_array(
    call: Call,
    array: tuple[str, str],
    bucket: BucketRecord,
    settings: BucketSettings,
    metadata: dict[str, str],
    condition: WriteCondition,
    lock: Lock,
) -> ObjectRecord:
    """A parameter array is stored like any body, and committed if its first bytes say that a kernel can take it."""
    expected = plan(call.request, call.signed, length_max_bytes=call.limits.kernel_array_bytes)
    spec = spec_of(call, bucket, settings, expected, metadata)
    kept: list[kernels.HeadKept] = []

    def sink(stream: Stream) -> BodySink:
        kept.append(kernels.HeadKept(stream))
        return kept[0]

    async def commit(stream: Stream, digest: StreamDigest, verified: dict[str, str]) -> ObjectRecord:
        await kernels.check_array(call, array, bytes(kept[0].head), digest.length)
        return await committed(call, stream, commit_of(call, spec, digest, verified, condition, lock), condition)

    return await received(call, spec, expected, commit, sink)


async def _put_kernel(
    call: Call,
    name: str,
    bucket: BucketRecord,
    settings: BucketSettings,
    metadata: dict[str, str],
    condition: WriteCondition,
    lock: Lock,
) -> ObjectRecord:
    """A kernel is read whole, judged, and only then stored; it is small."""
    request = call.request
    source = await read_document(request, call.signed, call.limits.kernel_source_bytes)
    await kernels.check(call, name, source, metadata)
    expected = BodyPlan(len(source), None, None, None, None, in_trailer=False)
    spec = spec_of(call, bucket, settings, expected, metadata)

    async def commit(stream: Stream, digest: StreamDigest) -> ObjectRecord:
        verified = {"crc64nvme": checksums.crc64_base64(digest.crc64nvme)}
        return await committed(call, stream, commit_of(call, spec, digest, verified, condition, lock), condition)

    return await stored(call, spec, once(source), commit)


# -- reading


async def get_object(call: Call) -> Response:
    try:
        return await _read(call, body=True)
    except StaleVersion:
        # Overwritten or deleted between the look-up and the opening: what is current now answers.
        return await _read(call, body=True)


async def head_object(call: Call) -> Response:
    return await _read(call, body=False)


async def _read(call: Call, *, body: bool) -> Response:
    headers = call.request.headers
    refuse_encryption_of_reads(headers)
    bucket, settings = await call.bucket()
    record = await version(call, bucket)
    answer = [*describe(call, record, settings), *version_headers(bucket, record), *lock_headers(record)]
    if call.request.arg("versionId") is None:
        answer += expiration_header(call, bucket, record)
    if check_read(headers, record) is not None:
        return Response(304, [(name, value) for name, value in answer if name in _KEPT_BY_304])
    extent = _wanted(call, record)
    start, stop = extent or (0, record.length)
    if extent is not None:
        answer.append(("content-range", f"bytes {start}-{stop - 1}/{record.length}"))
    elif headers.get("x-amz-checksum-mode").upper() == "ENABLED":
        # Never beside a range: clients would compare the whole object's checksum with a part of it.
        answer.extend(checksum_headers(record))
    if call.request.arg("partNumber") is not None and record.parts:
        answer.append(("x-amz-mp-parts-count", str(len(record.parts))))
    status = 206 if extent is not None else 200
    if not body or start == stop:
        return Response(status, answer, content_length=stop - start)
    reader = await open_version(call, record, settings, start, stop)
    await reader.__aenter__()
    return Response(status, answer, FileBody.of(reader, stop - start))


_KEPT_BY_304 = frozenset({"etag", "last-modified", "cache-control", "expires", "x-amz-version-id"})


def _wanted(call: Call, record: ObjectRecord) -> tuple[int, int] | None:
    """The range of bytes asked for, by Range or by part number; None for the whole object."""
    headers = call.request.headers
    part = call.request.arg("partNumber")
    field = headers.get("range")
    if part is not None:
        if field:
            raise S3Error("InvalidRequest", "Cannot specify both Range header and partNumber query parameter")
        return _part_range(call, record)
    if field and range_applies(headers, record):
        return parse_range(field, record.length)
    return None


def _part_range(call: Call, record: ObjectRecord) -> tuple[int, int] | None:
    number = call.number("partNumber", 1, call.limits.parts, 1)
    if not record.parts:
        if number != 1:
            raise S3Error("InvalidPartNumber")
        return (0, record.length) if record.length else None
    start = 0
    for position, part in enumerate(record.parts, 1):
        if position == number:
            return (start, start + part.length) if part.length else None
        start += part.length
    raise S3Error("InvalidPartNumber")

"""CopyObject and UploadPartCopy: bytes from one version into a new stream, without a client in between.

https://docs.aws.amazon.com/AmazonS3/latest/API/API_CopyObject.html. The copy is read past the page cache and its
CRC64NVME is compared with the source's, so that a copy is never worse than what was acknowledged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from urllib.parse import unquote_to_bytes

import msgspec

from ingest import versioning
from ingest.bucket_settings import BucketSettings
from ingest.errors import DataLost
from ingest.records import BucketRecord, CommitObject, CommitPart, LifetimeClass, ObjectRecord, PartRecord, Versioning
from ingest.stream_types import Stream, StreamDigest, StreamSpec
from s3api import checksums, times, xml
from s3api.call import Call
from s3api.conditions import check_read, failed, write_condition
from s3api.errors import S3Error
from s3api.http.message import Response
from s3api.operations import kernels
from s3api.operations.buckets import XML_TYPE
from s3api.operations.describe import lowered_headers, new_version_headers, stored_headers, user_metadata
from s3api.operations.lifecycle import expiration_header
from s3api.operations.locks import lock_of_write
from s3api.operations.multipart import part_number, upload_of
from s3api.operations.object_tags import attributes_of, replaces_tags
from s3api.operations.objects import wants_md5
from s3api.operations.reading import check_version_id, current, open_version
from s3api.operations.received import committed, etag_of, lifetime_of, once, stored
from s3api.operations.refusals import refuse_unsupported
from s3api.ranges import parse_copy_range

COPY_SOURCE = "x-amz-copy-source"


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    record: ObjectRecord
    settings: BucketSettings
    bucket: BucketRecord
    named: bool
    """The request names the version."""

    @property
    def headers(self) -> list[tuple[str, str]]:
        """What the answer says of the source."""
        if versioning.versioning_of(self.bucket) is Versioning.OFF:
            return []
        return [(COPY_SOURCE + "-version-id", self.record.version_id)]

    @property
    def algorithm(self) -> str:
        """The checksum its client chose."""
        return next(iter(self.record.checksums), "crc64nvme")


async def source_of(call: Call) -> Source:
    """The version ``x-amz-copy-source`` names, if the user may read it and the copy conditions hold."""
    headers = call.request.headers
    bucket, key, version_id = _parsed(headers.get(COPY_SOURCE))
    if not bucket or not key or len(key) > call.limits.key_bytes:
        raise S3Error("InvalidArgument", "Copy Source must mention the source bucket and key: sourcebucket/sourcekey")
    check_version_id(version_id)
    action = "s3:GetObject" if version_id is None else "s3:GetObjectVersion"
    await call.authorise(action, bucket, key, version_id=version_id)
    record_of_bucket, settings = await call.node.buckets.get(bucket)
    expected = headers.get("x-amz-source-expected-bucket-owner")
    if expected and not await call.is_owner(record_of_bucket, expected):
        raise S3Error("AccessDenied", "The bucket is not owned by x-amz-source-expected-bucket-owner")
    record = await call.catalog.head(bucket, key, version_id)
    if record.delete_marker:
        raise S3Error(
            "InvalidRequest",
            "The source of a copy request may not specifically refer to a delete marker by version id.",
        )
    unchanged = check_read(headers, record, prefix=COPY_SOURCE + "-")
    if unchanged is not None:
        raise failed(unchanged.condition)
    return Source(record, settings, record_of_bucket, named=version_id is not None)


def _parsed(text: str) -> tuple[str, bytes, str | None]:
    """Bucket, key and version id of ``[/]bucket/key[?versionId=id]``, percent-encoded as a whole or in parts; an empty
    bucket for what is none."""
    path, mark, version_id = text.rpartition("?versionId=")
    if not mark:
        path = text
    try:
        name = unquote_to_bytes(path.encode("latin-1"))
        name.decode("utf-8")
        bucket, _, key = name.removeprefix(b"/").partition(b"/")
        return bucket.decode("ascii"), key, version_id if mark else None
    except UnicodeError:
        return "", b"", None


async def copy_object(call: Call) -> Response:
    headers = call.request.headers
    refuse_unsupported(headers)
    kernel = kernels.kernel_name(call.key)
    replace = _directive(headers.get("x-amz-metadata-directive"))
    algorithm = _algorithm(headers.get("x-amz-checksum-algorithm"))
    condition = write_condition(headers)
    attributes = attributes_of(headers)
    replaced_metadata = user_metadata(headers, call.limits) if replace else {}
    source = await source_of(call)
    record = source.record
    if not replaces_tags(headers):
        attributes = msgspec.structs.replace(attributes, tags=record.attributes.tags)
    if (record.bucket, record.key) == (call.bucket_name, call.key) and not (
        replace or source.named or "x-amz-storage-class" in headers
    ):
        raise S3Error(
            "InvalidRequest",
            "This copy request is illegal because it is trying to copy an object to itself without changing the"
            " object's metadata.",
        )
    bucket, settings = await call.bucket()
    if condition:
        condition.check(await current(call))
    lock = await lock_of_write(call, bucket)
    kept_headers = stored_headers(headers) if replace else record.headers
    metadata = replaced_metadata if replace else record.metadata
    chosen = algorithm or source.algorithm
    spec = StreamSpec(
        bucket=bucket,
        settings=settings,
        key=call.key,
        length=record.length,
        algorithms=_wanted(chosen, md5=wants_md5(call, settings)),
        metadata=metadata,
        content_type=kept_headers.get("content-type", ""),
        lifetime=lifetime_of(call.key, record.length, call.limits),
    )

    async def commit(stream: Stream, digest: StreamDigest) -> ObjectRecord:
        if (digest.crc64nvme, digest.length) != (record.crc64nvme, record.length):
            raise DataLost(f"{record.bucket}/{record.key!r} did not read back as it was acknowledged")
        request = CommitObject(
            bucket=call.bucket_name,
            key=call.key,
            object_id=digest.object_id,
            length=digest.length,
            etag=etag_of(digest),
            crc64nvme=digest.crc64nvme,
            owner=call.owner,
            extents=digest.extents,
            durability=settings.durability,
            settled=digest.settled,
            checksums=_checksum(chosen, digest),
            headers=dict(kept_headers),
            metadata=dict(metadata),
            attributes=msgspec.structs.replace(attributes, acl=call.acl),
            if_none_match=condition.if_none_match,
            if_match=condition.if_match,
            retention=lock.retention,
            legal_hold=lock.legal_hold,
        )
        return await committed(call, stream, request, condition)

    if (array := kernels.array_name(call.key)) is not None:
        head = await _head_of(call, source)
        await kernels.check_array(call, array, head, record.length)
    if kernel is not None:
        text = await _source_text(call, source)
        await kernels.check(call, kernel, text, dict(metadata))
        copied = await stored(call, spec, once(text), commit)
    else:
        copied = await stored(call, spec, _bytes_of(call, source, 0, record.length), commit)
    told = [*source.headers, *new_version_headers(bucket, copied), *expiration_header(call, bucket, copied)]
    return _result("CopyObjectResult", copied.etag, copied.modified_ns, copied.checksums, copied.checksum_type, told)


async def upload_part_copy(call: Call) -> Response:
    headers = call.request.headers
    refuse_unsupported(headers)
    number = part_number(call)
    source = await source_of(call)
    bucket, settings = await call.bucket()
    upload = await upload_of(call)
    field = headers.get(COPY_SOURCE + "-range")
    length = source.record.length
    start, stop = parse_copy_range(field, length) if field else (0, length)
    chosen = upload.checksum_algorithm or "crc64nvme"
    spec = StreamSpec(
        bucket=bucket,
        settings=settings,
        key=call.key,
        length=stop - start,
        algorithms=_wanted(chosen, md5=wants_md5(call, settings)),
        metadata=upload.metadata,
        content_type=upload.headers.get("content-type", ""),
        lifetime=LifetimeClass.STREAM,
        part=True,
    )

    async def commit(stream: Stream, digest: StreamDigest) -> PartRecord:
        part = PartRecord(
            number=number,
            length=digest.length,
            etag=etag_of(digest),
            crc64nvme=digest.crc64nvme,
            checksums=_checksum(chosen, digest),
            extents=digest.extents,
            modified_ns=call.catalog.now_ns(),
            settled=digest.settled,
        )
        return await stream.commit_part(
            CommitPart(call.bucket_name, call.key, upload.upload_id, part, digest.object_id)
        )

    part = await stored(call, spec, _bytes_of(call, source, start, stop), commit)
    told = [*source.headers, *lowered_headers(bucket, part.length, part.mirror)]
    return _result("CopyPartResult", part.etag, part.modified_ns, part.checksums, None, told)


def _directive(text: str) -> bool:
    if text not in ("", "COPY", "REPLACE"):
        raise S3Error("InvalidArgument", "Unknown metadata directive; use COPY or REPLACE")
    return text == "REPLACE"


def _algorithm(text: str) -> str:
    name = text.lower()
    if name and name not in checksums.ALGORITHMS:
        raise S3Error(
            "InvalidRequest",
            f"Checksum algorithm provided is unsupported; known are {checksums.NAMES}",
        )
    return name


def _wanted(algorithm: str, *, md5: bool) -> frozenset[str]:
    wanted = {"md5"} if md5 else set()
    if algorithm != "crc64nvme":
        wanted.add(algorithm)
    return frozenset(wanted)


def _checksum(algorithm: str, digest: StreamDigest) -> dict[str, str]:
    if algorithm == "crc64nvme":
        return {algorithm: checksums.crc64_base64(digest.crc64nvme)}
    return {algorithm: checksums.encode(digest.digests[algorithm])}


async def _bytes_of(call: Call, source: Source, start: int, stop: int) -> AsyncIterator[memoryview]:
    if start == stop:
        return
    async with await open_version(call, source.record, source.settings, start, stop) as reader:
        async for chunk in reader.chunks(call.limits.copy_chunk_bytes):
            yield chunk


async def _head_of(call: Call, source: Source) -> bytes:
    stop = min(source.record.length, kernels.ARRAY_HEAD_BYTES)
    return b"".join([bytes(chunk) async for chunk in _bytes_of(call, source, 0, stop)])


async def _source_text(call: Call, source: Source) -> bytes:
    """A kernel's source; it is small or refused."""
    most = call.limits.kernel_source_bytes
    if source.record.length > most:
        raise S3Error("EntityTooLarge", f"A kernel's source must not be longer than {most} bytes")
    return b"".join([bytes(chunk) async for chunk in _bytes_of(call, source, 0, source.record.length)])


def _result(
    name: str, etag: str, modified_ns: int, values: dict[str, str], kind: str | None, headers: list[tuple[str, str]]
) -> Response:
    document: list[tuple[str, xml.Value]] = [
        ("LastModified", times.iso(modified_ns)),
        ("ETag", f'"{etag}"'),
        *((f"Checksum{algorithm.upper()}", value) for algorithm, value in values.items()),
        ("ChecksumType", kind),
    ]
    return Response(200, [XML_TYPE, *headers], xml.document(name, document))

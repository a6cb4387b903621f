"""Multipart uploads: Create, UploadPart, Complete, Abort, ListParts, ListMultipartUploads.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpuoverview.html. Parts are streams like any other; Complete links
their extents and combines their digests, and touches no byte. An upload's id is also the object id of what it becomes,
so that a Complete whose answer was lost can be asked again.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from xml.etree.ElementTree import Element

import msgspec

from ingest.errors import NoSuchKey, NoSuchUpload, PreconditionFailed
from ingest.records import (
    NULL_VERSION,
    BucketRecord,
    CommitPart,
    CompletedPart,
    CompleteUpload,
    LifetimeClass,
    ObjectRecord,
    ObjectState,
    PartRecord,
    UploadRecord,
)
from ingest.stream_types import Stream, StreamDigest, StreamSpec
from s3api import checksums, times, xml
from s3api.acls import people
from s3api.call import Call
from s3api.checksums import ALGORITHMS, COMPOSITE, FULL_OBJECT
from s3api.conditions import write_condition
from s3api.errors import S3Error
from s3api.http.message import Headers, Response
from s3api.integrity import bad_checksum, plan, read_document, too_large
from s3api.operations import kernels
from s3api.operations.buckets import XML_TYPE
from s3api.operations.describe import (
    checksum_headers,
    lowered_headers,
    new_version_headers,
    stored_headers,
    user_metadata,
)
from s3api.operations.lifecycle import abort_headers, expiration_header
from s3api.operations.listing import namer
from s3api.operations.locks import lock_of_write
from s3api.operations.object_tags import attributes_of
from s3api.operations.objects import wants_md5
from s3api.operations.reading import current
from s3api.operations.received import etag_of, lost_race, received
from s3api.operations.refusals import refuse_unsupported

_CATALOG_PAGE = 1000


async def create_multipart_upload(call: Call) -> Response:
    headers = call.request.headers
    refuse_unsupported(headers)
    kernels.refuse_reserved(call.key)
    metadata = user_metadata(headers, call.limits)
    algorithm, kind = _chosen_checksum(headers)
    bucket, _ = await call.bucket()
    lock = await lock_of_write(call, bucket)
    upload = UploadRecord(
        bucket=call.bucket_name,
        key=call.key,
        upload_id=secrets.token_hex(16),
        owner=call.owner,
        started_ns=call.catalog.now_ns(),
        headers=stored_headers(headers),
        metadata=metadata,
        attributes=msgspec.structs.replace(attributes_of(headers), acl=call.acl),
        checksum_algorithm=algorithm,
        checksum_type=kind,
        retention=lock.retention,
        legal_hold=lock.legal_hold,
    )
    await call.catalog.create_upload(upload)
    answer = [XML_TYPE, *abort_headers(call, bucket, upload)]
    if algorithm:
        answer += [("x-amz-checksum-algorithm", algorithm.upper()), ("x-amz-checksum-type", kind)]
    document: list[tuple[str, xml.Value]] = [
        ("Bucket", call.bucket_name),
        ("Key", call.key.decode()),
        ("UploadId", upload.upload_id),
    ]
    return Response(200, answer, xml.document("InitiateMultipartUploadResult", document))


def _chosen_checksum(headers: Headers) -> tuple[str, str]:
    name = headers.get("x-amz-checksum-algorithm").lower()
    kind = headers.get("x-amz-checksum-type").upper()
    if not name:
        if kind:
            raise S3Error(
                "InvalidRequest",
                "The x-amz-checksum-type header can only be used with the x-amz-checksum-algorithm header.",
            )
        return "", ""
    algorithm = ALGORITHMS.get(name)
    if algorithm is None:
        raise S3Error(
            "InvalidRequest",
            "Checksum algorithm provided is unsupported. Please try again with any of the valid types:"
            f" [{checksums.NAMES}]",
        )
    if kind and kind not in algorithm.types:
        raise S3Error("InvalidRequest", f"The {kind} checksum type cannot be used with the {name} checksum algorithm.")
    return name, kind or algorithm.types[0]


def part_number(call: Call) -> int:
    text = call.request.arg("partNumber") or ""
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= 6 else 0
    if not 1 <= number <= call.limits.parts:
        raise S3Error(
            "InvalidArgument",
            f"Part number must be an integer between 1 and {call.limits.parts}, inclusive",
            fields=[("ArgumentName", "partNumber"), ("ArgumentValue", text[:32])],
        )
    return number


async def upload_of(call: Call) -> UploadRecord:
    return await call.catalog.upload(call.bucket_name, call.key, call.request.arg("uploadId") or "")


async def upload_part(call: Call) -> Response:
    headers = call.request.headers
    refuse_unsupported(headers)
    number = part_number(call)
    bucket, settings = await call.bucket()
    upload = await upload_of(call)
    expected = plan(
        call.request,
        call.signed,
        length_max_bytes=call.limits.object_bytes,
        upload_algorithm=upload.checksum_algorithm,
    )
    spec = StreamSpec(
        bucket=bucket,
        settings=settings,
        key=call.key,
        length=expected.length,
        algorithms=expected.algorithms(md5=wants_md5(call, settings)),
        metadata=upload.metadata,
        content_type=upload.headers.get("content-type", ""),
        lifetime=LifetimeClass.STREAM,
        part=True,
    )

    async def commit(stream: Stream, digest: StreamDigest, verified: dict[str, str]) -> PartRecord:
        part = PartRecord(
            number=number,
            length=digest.length,
            etag=etag_of(digest),
            crc64nvme=digest.crc64nvme,
            checksums=verified,
            extents=digest.extents,
            modified_ns=call.catalog.now_ns(),
            settled=digest.settled,
        )
        return await stream.commit_part(
            CommitPart(call.bucket_name, call.key, upload.upload_id, part, digest.object_id)
        )

    part = await received(call, spec, expected, commit)
    answer = [("etag", f'"{part.etag}"')]
    answer += [(checksums.HEADER_PREFIX + name, value) for name, value in part.checksums.items()]
    return Response(200, answer + lowered_headers(bucket, part.length, part.mirror))


async def complete_multipart_upload(call: Call) -> Response:
    headers = call.request.headers
    condition = write_condition(headers)
    body = await read_document(call.request, call.signed, call.limits.document_bytes, headers_describe_body=False)
    wanted = _wanted_parts(xml.parse(body, "CompleteMultipartUpload"), call.limits.parts)
    bucket, settings = await call.bucket()
    try:
        upload = await upload_of(call)
    except NoSuchUpload:
        return _completed(call, bucket, await _completed_before(call))
    _check_part_checksums(upload, wanted)
    parts = await _chosen(call, wanted)
    values, kind = _object_checksum(upload, parts)
    length = sum(part.length for part in parts)
    if length > call.limits.object_bytes:
        raise too_large(length, call.limits.object_bytes)
    _check_claims(headers, values, kind, length)
    if condition:
        condition.check(await current(call))
    crc = checksums.combined_crc64([(part.crc64nvme, part.length) for part in parts])
    host = call.node.kernels
    reductions: tuple[str, ...] = ()
    filters: dict[str, str] = {}
    if host is not None:
        await host.prepare(call.bucket_name)
        reductions = host.kernels_for(call.bucket_name, call.key)
        filters = host.filters(call.bucket_name, call.key)
    request = CompleteUpload(
        bucket=call.bucket_name,
        key=call.key,
        upload_id=upload.upload_id,
        object_id=bytes.fromhex(upload.upload_id),
        parts=wanted,
        etag=checksums.etag_from_parts([part.etag for part in parts], crc, length),
        crc64nvme=crc,
        length=length,
        checksums=values,
        checksum_type=kind,
        durability=settings.durability,
        reductions=reductions,
        filters=filters,
        if_none_match=condition.if_none_match,
        if_match=condition.if_match,
    )
    if (array := kernels.array_name(call.key)) is not None:
        await kernels.check_array(call, array, await _head(call, upload, parts, length), length)
    try:
        record = await call.catalog.complete_upload(request)
    except PreconditionFailed as error:
        raise lost_race(condition, error) from None
    if host is not None and reductions:
        host.catch_up(record, reductions)
    return _completed(call, bucket, record)


async def _head(call: Call, upload: UploadRecord, parts: list[PartRecord], length: int) -> bytes:
    """The first bytes of what the parts are about to become: they are on disk already."""
    stop = min(length, kernels.ARRAY_HEAD_BYTES)
    unborn = ObjectRecord(
        bucket=call.bucket_name,
        key=call.key,
        version_id=NULL_VERSION,
        object_id=bytes.fromhex(upload.upload_id),
        sequence=0,
        state=ObjectState.BUFFERED,
        length=length,
        stored_length=length,
        etag="",
        crc64nvme=0,
        modified_ns=0,
        owner=upload.owner,
        extents=tuple(extent for part in parts for extent in part.extents),
    )
    async with await call.node.data.open_reader(unborn, 0, stop) as reader:
        return b"".join([bytes(chunk) async for chunk in reader.chunks(call.limits.copy_chunk_bytes)])


async def _completed_before(call: Call) -> ObjectRecord:
    """What this upload became, if it was completed already and is still there; else NoSuchUpload."""
    try:
        object_id = bytes.fromhex(call.request.arg("uploadId") or "")
    except ValueError:
        raise S3Error("NoSuchUpload") from None
    try:
        record = await call.catalog.by_id(object_id)
    except NoSuchKey:
        raise S3Error("NoSuchUpload") from None
    if (record.bucket, record.key) != (call.bucket_name, call.key):
        raise S3Error("NoSuchUpload")
    return record


def _completed(call: Call, bucket: BucketRecord, record: ObjectRecord) -> Response:
    scheme = "https" if call.request.secure else "http"
    document: list[tuple[str, xml.Value]] = [
        ("Location", f"{scheme}://{call.request.headers.get('host')}{call.request.path}"),
        ("Bucket", call.bucket_name),
        ("Key", call.key.decode()),
        ("ETag", f'"{record.etag}"'),
        *((f"Checksum{name.upper()}", value) for name, value in record.checksums.items()),
        ("ChecksumType", record.checksum_type if record.checksums else None),
    ]
    headers = [XML_TYPE, *checksum_headers(record), *new_version_headers(bucket, record)]
    headers += expiration_header(call, bucket, record)
    return Response(200, headers, xml.document("CompleteMultipartUploadResult", document))


def _wanted_parts(tree: Element, parts_max: int) -> tuple[CompletedPart, ...]:
    """Parts as the document names them. ETags arrive quoted and bare; both mean the same."""
    elements = tree.findall("Part")
    if not 0 < len(elements) <= parts_max:
        raise S3Error("MalformedXML", f"Name from 1 to {parts_max} parts")
    wanted = []
    previous = 0
    for element in elements:
        text = xml.text(element, "PartNumber")
        number = int(text) if text.isascii() and text.isdigit() and len(text) <= 6 else 0
        if not 1 <= number <= parts_max:
            raise S3Error("InvalidArgument", f"PartNumber must be an integer between 1 and {parts_max}, inclusive")
        if number <= previous:
            raise S3Error("InvalidPartOrder")
        previous = number
        values = {name: value for name in ALGORITHMS if (value := xml.text(element, f"Checksum{name.upper()}", ""))}
        wanted.append(CompletedPart(number, xml.text(element, "ETag").strip('"'), values))
    return tuple(wanted)


async def _all_parts(call: Call) -> dict[int, PartRecord]:
    found: dict[int, PartRecord] = {}
    upload_id = call.request.arg("uploadId") or ""
    after, more = 0, True
    while more:
        page, more = await call.catalog.parts(call.bucket_name, call.key, upload_id, after=after, limit=_CATALOG_PAGE)
        found.update((part.number, part) for part in page)
        after = page[-1].number if page else 0
        more = more and bool(page)
    return found


async def _chosen(call: Call, wanted: tuple[CompletedPart, ...]) -> list[PartRecord]:
    """The stored parts the document names. Raises InvalidPart, and CatalogUnavailable where other nodes may have them."""
    try:
        return _matched(wanted, await _all_parts(call))
    except S3Error:
        await call.catalog.fresh()
        return _matched(wanted, await _all_parts(call))


def _matched(wanted: tuple[CompletedPart, ...], stored: dict[int, PartRecord]) -> list[PartRecord]:
    """The stored parts the document names, or InvalidPart. The catalogue compares the ETags again when it commits."""
    parts = []
    for claim in wanted:
        part = stored.get(claim.number)
        if (
            part is None
            or part.etag != claim.etag
            or any(part.checksums.get(name, value) != value for name, value in claim.checksums.items())
        ):
            raise S3Error("InvalidPart", fields=[("PartNumber", str(claim.number)), ("ETag", claim.etag[:64])])
        parts.append(part)
    return parts


def _check_part_checksums(upload: UploadRecord, wanted: tuple[CompletedPart, ...]) -> None:
    """An upload with a composite checksum is completed with the checksum of each part."""
    name = upload.checksum_algorithm
    if not name or upload.checksum_type != COMPOSITE:
        return
    missing = next((claim.number for claim in wanted if name not in claim.checksums), None)
    if missing is not None:
        raise S3Error(
            "InvalidRequest",
            f"The upload was created using a {name} checksum. The complete request must include the checksum for each"
            f" part. It was missing for part {missing} in the request.",
        )


def _object_checksum(upload: UploadRecord, parts: list[PartRecord]) -> tuple[dict[str, str], str]:
    """The checksum of the whole, of the type the upload was created with; CRC64NVME of every byte by default."""
    name = upload.checksum_algorithm
    if not name or name == "crc64nvme":
        crc = checksums.combined_crc64([(part.crc64nvme, part.length) for part in parts])
        return {"crc64nvme": checksums.crc64_base64(crc)}, FULL_OBJECT
    algorithm = ALGORITHMS[name]
    if upload.checksum_type == COMPOSITE:
        return {name: checksums.composite(algorithm, [part.checksums[name] for part in parts])}, COMPOSITE
    return {
        name: checksums.full_object(algorithm, [(part.checksums[name], part.length) for part in parts])
    }, FULL_OBJECT


def _check_claims(headers: Headers, values: dict[str, str], kind: str, length: int) -> None:
    """What a Complete says about the whole object must be what the parts add up to."""
    claimed_kind = headers.get("x-amz-checksum-type").upper()
    if claimed_kind and claimed_kind != kind:
        raise S3Error("InvalidRequest", f"The upload was created with checksum type {kind}, not {claimed_kind}")
    claimed_length = headers.get("x-amz-mp-object-size")
    if claimed_length and claimed_length != str(length):
        raise S3Error(
            "InvalidRequest", f"The parts add up to {length} bytes, x-amz-mp-object-size says {claimed_length[:20]}"
        )
    for header, algorithm in checksums.BY_HEADER.items():
        claim = headers.get(header)
        if not claim:
            continue
        if algorithm.name not in values:
            raise S3Error("InvalidRequest", f"The upload was not created with a {algorithm.name} checksum")
        if claim.partition("-")[0] != values[algorithm.name].partition("-")[0]:
            raise bad_checksum(algorithm)


async def abort_multipart_upload(call: Call) -> Response:
    await call.bucket()
    await call.catalog.abort_upload(call.bucket_name, call.key, call.request.arg("uploadId") or "")
    return Response(204)


async def list_parts(call: Call) -> Response:
    bucket, _ = await call.bucket()
    upload = await upload_of(call)
    marker = call.number("part-number-marker", 0, call.limits.parts, 0)
    limit = call.number("max-parts", 0, call.limits.keys_per_page, call.limits.keys_per_page)
    parts, more = (
        await call.catalog.parts(call.bucket_name, call.key, upload.upload_id, after=marker, limit=limit)
        if limit
        else ((), False)
    )
    name = namer(call.request.arg("encoding-type") == "url")
    rows: list[tuple[str, xml.Value]] = [("Part", _part_row(part)) for part in parts]
    owner = (await people(call.node.users, {upload.owner}))[upload.owner]
    document: list[tuple[str, xml.Value]] = [
        ("Bucket", call.bucket_name),
        ("Key", name(call.key)),
        ("UploadId", upload.upload_id),
        ("Initiator", owner),
        ("Owner", owner),
        ("StorageClass", upload.attributes.storage_class),
        ("PartNumberMarker", marker),
        ("NextPartNumberMarker", parts[-1].number if parts else 0),
        ("MaxParts", limit),
        ("IsTruncated", more),
        ("ChecksumAlgorithm", upload.checksum_algorithm.upper() or None),
        ("ChecksumType", upload.checksum_type or None),
        *rows,
    ]
    return Response(200, [XML_TYPE, *abort_headers(call, bucket, upload)], xml.document("ListPartsResult", document))


def _part_row(part: PartRecord) -> list[tuple[str, xml.Value]]:
    return [
        ("PartNumber", part.number),
        ("LastModified", times.iso(part.modified_ns)),
        ("ETag", f'"{part.etag}"'),
        ("Size", part.length),
        *((f"Checksum{name.upper()}", value) for name, value in part.checksums.items()),
    ]


async def list_multipart_uploads(call: Call) -> Response:
    await call.bucket()
    arg = call.request.arg
    if arg("encoding-type") not in (None, "", "url"):
        raise S3Error("InvalidArgument", "Invalid Encoding Method specified in Request; url is the only one")
    name = namer(arg("encoding-type") == "url")
    prefix, delimiter = (arg("prefix") or "").encode(), (arg("delimiter") or "").encode()
    # An id marker says something only beside a key marker; a key marker alone means: after every upload of that key.
    key_marker = (arg("key-marker") or "").encode()
    id_marker = (arg("upload-id-marker") or "") if key_marker else ""
    after = (key_marker, id_marker or _LAST_ID) if key_marker else (b"", "")
    limit = call.number("max-uploads", 0, call.limits.keys_per_page, call.limits.keys_per_page)
    rows, last = await _uploads_page(call, prefix, delimiter, after, limit)
    owners = await people(call.node.users, {row.owner for row in rows if isinstance(row, UploadRecord)})
    entries: list[tuple[str, xml.Value]] = [
        ("Upload", _upload_row(row, name, owners[row.owner])) for row in rows if isinstance(row, UploadRecord)
    ]
    entries += [("CommonPrefixes", [("Prefix", name(row))]) for row in rows if isinstance(row, bytes)]
    document: list[tuple[str, xml.Value]] = [
        ("Bucket", call.bucket_name),
        ("KeyMarker", name(key_marker)),
        ("UploadIdMarker", id_marker),
        ("NextKeyMarker", name(last[0]) if last else None),
        ("NextUploadIdMarker", last[1].removesuffix(_LAST_ID) if last else None),
        ("Delimiter", name(delimiter) if delimiter else None),
        ("Prefix", name(prefix)),
        ("EncodingType", arg("encoding-type") or None),
        ("MaxUploads", limit),
        ("IsTruncated", last is not None),
        *entries,
    ]
    return Response(200, [XML_TYPE], xml.document("ListMultipartUploadsResult", document))


_LAST_ID = "\uffff"
"""Behind every upload id."""


async def _uploads_page(
    call: Call, prefix: bytes, delimiter: bytes, after: tuple[bytes, str], limit: int
) -> tuple[list[UploadRecord | bytes], tuple[bytes, str] | None]:
    """Uploads, and common prefixes as bytes, in key order; and where to go on, if there are more."""
    rows: list[UploadRecord | bytes] = []
    place: tuple[bytes, str] = after
    more = limit > 0
    while more:
        page, more = await call.catalog.uploads(call.bucket_name, prefix=prefix, after=after, limit=_CATALOG_PAGE)
        for upload in page:
            end = upload.key.find(delimiter, len(prefix)) if delimiter else -1
            group = upload.key[: end + len(delimiter)] if end >= 0 else b""
            if group and place[0].startswith(group):
                continue  # it was given on this page, or is the marker of the one before
            if len(rows) == limit:
                return rows, place
            rows.append(group or upload)
            place = (group, _LAST_ID) if group else (upload.key, upload.upload_id)
            if group:
                break
        else:
            if page:
                after = page[-1].key, page[-1].upload_id
            continue
        # No key of the group, however many there are, is worth a look.
        after, more = (_behind(group), ""), True
    return rows, None


def _behind(group: bytes) -> bytes:
    """The least key that does not start with ``group``; for an ``after`` whose id is empty it comes itself."""
    stem = group.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else group


def _upload_row(upload: UploadRecord, name: Callable[[bytes], str], owner: xml.Value) -> list[tuple[str, xml.Value]]:
    return [
        ("Key", name(upload.key)),
        ("UploadId", upload.upload_id),
        ("Initiator", owner),
        ("Owner", owner),
        ("StorageClass", upload.attributes.storage_class),
        ("Initiated", times.iso(upload.started_ns)),
        ("ChecksumAlgorithm", upload.checksum_algorithm.upper() or None),
        ("ChecksumType", upload.checksum_type or None),
    ]

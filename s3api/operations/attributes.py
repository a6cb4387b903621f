"""GetObjectAttributes: what is known of a version, without its bytes.

https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetObjectAttributes.html
"""

from __future__ import annotations

from ingest.records import ObjectRecord
from s3api import times, xml
from s3api.call import Call
from s3api.checksums import COMPOSITE
from s3api.errors import S3Error
from s3api.http.message import Response
from s3api.operations.buckets import XML_TYPE
from s3api.operations.describe import storage_class, version_headers
from s3api.operations.reading import version

WANTED = "x-amz-object-attributes"
_KNOWN = ("ETag", "Checksum", "ObjectParts", "StorageClass", "ObjectSize")
_PARTS_MAX = 1000


async def get_object_attributes(call: Call) -> Response:
    fields = [value for name, value in call.request.headers.items() if name == WANTED]
    wanted = {name.strip() for value in fields for name in value.split(",")} - {""}
    if not wanted or not wanted <= set(_KNOWN):
        raise S3Error("InvalidArgument", "Invalid attribute name specified.", fields=[("ArgumentName", WANTED)])
    most, marker = _number(call, "x-amz-max-parts", _PARTS_MAX), _number(call, "x-amz-part-number-marker", 0)
    bucket, settings = await call.bucket()
    record = await version(call, bucket)
    values: dict[str, xml.Value] = {
        "ETag": record.etag,
        "Checksum": _checksum(record),
        "ObjectParts": _parts(record, min(most, _PARTS_MAX), marker) if record.parts else None,
        "StorageClass": storage_class(record, settings, call.catalog.now_ns()),
        "ObjectSize": record.length,
    }
    headers = [XML_TYPE, ("last-modified", times.http_date(record.modified_ns)), *version_headers(bucket, record)]
    document = [(name, values[name]) for name in _KNOWN if name in wanted]
    return Response(200, headers, xml.document("GetObjectAttributesResponse", document))


def _number(call: Call, header: str, default: int) -> int:
    text = call.request.headers.get(header)
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise S3Error("InvalidArgument", f"{header} must be a whole number", fields=[("ArgumentName", header)])
    return int(text)


def _checksum(record: ObjectRecord) -> xml.Value:
    if not record.checksums:
        return None
    values: list[tuple[str, xml.Value]] = [
        (f"Checksum{name.upper()}", value) for name, value in record.checksums.items()
    ]
    return [*values, ("ChecksumType", record.checksum_type)]


def _parts(record: ObjectRecord, most: int, marker: int) -> xml.Value:
    """Parts are numbered anew from 1, as a GET with ``partNumber`` counts them. They are listed one by one where each has a
    checksum of its own."""
    document: list[tuple[str, xml.Value]] = [("PartsCount", len(record.parts))]
    if record.checksum_type != COMPOSITE and not all(part.checksums for part in record.parts):
        return document
    numbered = [(number, part) for number, part in enumerate(record.parts, 1) if number > marker]
    page = numbered[:most]
    document += [
        ("PartNumberMarker", marker),
        ("NextPartNumberMarker", page[-1][0] if page else 0),
        ("MaxParts", most),
        ("IsTruncated", len(numbered) > len(page)),
    ]
    for number, part in page:
        values: list[tuple[str, xml.Value]] = [
            (f"Checksum{name.upper()}", value) for name, value in part.checksums.items()
        ]
        document.append(("Part", [("PartNumber", number), ("Size", part.length), *values]))
    return document

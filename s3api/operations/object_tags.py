"""Tags and storage classes of objects: Get/Put/DeleteObjectTagging, the headers that set them, and RestoreObject.

https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutObjectTagging.html,
https://docs.aws.amazon.com/AmazonS3/latest/API/API_RestoreObject.html
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import parse_qsl

from ingest.errors import StaleVersion
from ingest.records import NULL_VERSION, ObjectRecord, VersionAttributes
from ingest.storage_class import CLASSES, STANDARD, restored
from s3api import xml
from s3api.auth.engine import Question
from s3api.call import Call
from s3api.errors import S3Error
from s3api.http.message import Headers, Response
from s3api.integrity import has_body, needs_checksum, read_document
from s3api.operations.buckets import XML_TYPE
from s3api.operations.describe import is_cold
from s3api.operations.reading import version
from s3api.operations.tagging import KEY_CHARS_MAX, VALUE_CHARS_MAX, parsed

TAGS_MAX = 10
_ALLOWED = re.compile(r"[\w\s+\-=.:/@]*")
_TRIES = 3
_TIERS = ("Standard", "Bulk", "Expedited")
_DAYS_MAX = 2**31 - 1

# -- headers of a write


def attributes_of(headers: Headers) -> VersionAttributes:
    """``x-amz-tagging`` and ``x-amz-storage-class``. Raises InvalidArgument, InvalidTag, InvalidStorageClass."""
    name = headers.get("x-amz-storage-class") or STANDARD
    if name not in CLASSES:
        raise S3Error("InvalidStorageClass", fields=[("StorageClassRequested", name[:64])])
    return VersionAttributes(_tags_of(headers.get("x-amz-tagging")), name)


def _tags_of(field: str) -> dict[str, str]:
    if not field:
        return {}
    try:
        pairs = parse_qsl(field, keep_blank_values=True, errors="strict", max_num_fields=10 * TAGS_MAX)
    except (ValueError, UnicodeError):
        pairs = []
    tags = dict(pairs)
    if not pairs or len(tags) != len(pairs):
        raise S3Error(
            "InvalidArgument",
            "The header 'x-amz-tagging' shall be encoded as UTF-8 then URLEncoded URL query parameters without tag name"
            " duplicates.",
            fields=[("ArgumentName", "x-amz-tagging"), ("ArgumentValue", field[:256])],
        )
    check_tags(tags.items())
    return tags


def check_tags(tags: Iterable[tuple[str, str]]) -> None:
    """Raises InvalidTag for what no object can have."""
    pairs = list(tags)
    if len(pairs) > TAGS_MAX:
        raise S3Error("InvalidTag", f"Object tags cannot be greater than {TAGS_MAX}")
    for name, value in pairs:
        if not 0 < len(name) <= KEY_CHARS_MAX or not _ALLOWED.fullmatch(name) or name.startswith("aws:"):
            raise S3Error("InvalidTag", "The TagKey you have provided is invalid", fields=[("TagKey", name[:128])])
        if len(value) > VALUE_CHARS_MAX or not _ALLOWED.fullmatch(value):
            raise S3Error("InvalidTag", "The TagValue you have provided is invalid", fields=[("TagKey", name[:128])])


def replaces_tags(headers: Headers) -> bool:
    """Does a copy get the tags of its own head, and not its source's? Raises InvalidArgument."""
    directive = headers.get("x-amz-tagging-directive")
    if directive not in ("", "COPY", "REPLACE"):
        raise S3Error("InvalidArgument", "Unknown tagging directive; use COPY or REPLACE")
    return directive == "REPLACE"


# -- tags


async def put_object_tagging(call: Call) -> Response:
    await call.bucket()
    needs_checksum(call.request)
    body = await read_document(call.request, call.signed, call.limits.configuration_bytes)
    tags = parsed(xml.parse(body, "Tagging"), TAGS_MAX)
    check_tags(tags.items())
    await _may_set(call, tags)
    return Response(200, _version_header(await _tagged(call, tags)))


async def _may_set(call: Call, tags: dict[str, str]) -> None:
    """The head has been allowed; a policy may forbid these very tags. Raises AccessDenied."""
    action = "s3:PutObjectTagging" if call.request.arg("versionId") is None else "s3:PutObjectVersionTagging"
    verdict = await call.verdict(Question(action, call.bucket_name, call.key), request_tags=tags)
    if not verdict.allowed:
        await call.refuse(call.bucket_name)


async def delete_object_tagging(call: Call) -> Response:
    await call.bucket()
    return Response(204, _version_header(await _tagged(call, {})))


async def _tagged(call: Call, tags: dict[str, str]) -> ObjectRecord:
    for _ in range(_TRIES):
        record = await _readable(call)
        try:
            return await call.catalog.amend_object(record.object_id, tags=tags)
        except StaleVersion:
            continue  # replaced between the look-up and now: the tags are for what is there now
    raise S3Error("OperationAborted")


async def get_object_tagging(call: Call) -> Response:
    await call.bucket()
    record = await _readable(call)
    rows: list[tuple[str, xml.Value]] = [
        ("Tag", [("Key", name), ("Value", value)]) for name, value in sorted(record.attributes.tags.items())
    ]
    return Response(200, [XML_TYPE, *_version_header(record)], xml.document("Tagging", [("TagSet", rows)]))


async def _readable(call: Call) -> ObjectRecord:
    bucket, _ = await call.bucket()
    return await version(call, bucket)


def _version_header(record: ObjectRecord) -> list[tuple[str, str]]:
    return [] if record.version_id == NULL_VERSION else [("x-amz-version-id", record.version_id)]


# -- restore


async def restore_object(call: Call) -> Response:
    """202 when the archive is asked for the object, 200 when it was restored before and only its days change."""
    _, settings = await call.bucket()
    days = await _restore_days(call)
    record = await _readable(call)
    now_ns = call.catalog.now_ns()
    again = restored(record, now_ns)
    if not again and not is_cold(record, settings, now_ns):
        raise S3Error(
            "InvalidObjectState",
            "Restore is not allowed for the object's current storage class",
            fields=[("StorageClass", record.attributes.storage_class)],
        )
    await call.catalog.restore_object(record.object_id, days, call.node.settings.day_s)
    return Response(200 if again else 202, _version_header(record))


async def _restore_days(call: Call) -> int:
    if not has_body(call.request):
        raise S3Error("MalformedXML", "A RestoreRequest says for how many days")
    body = await read_document(call.request, call.signed, call.limits.configuration_bytes)
    tree = xml.parse(body, "RestoreRequest")
    if tree.find("SelectParameters") is not None or xml.text(tree, "Type", ""):
        raise S3Error("NotImplemented", "Select on archived objects is not implemented; restore them")
    tier = xml.text(tree, "Tier", "")
    parameters = tree.find("GlacierJobParameters")
    if parameters is not None:
        tier = xml.text(parameters, "Tier")
    if tier and tier not in _TIERS:
        raise xml.BadXml(f"<Tier> is one of {', '.join(_TIERS)}")
    text = xml.text(tree, "Days")
    days = int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else 0
    if not 0 < days <= _DAYS_MAX:
        raise S3Error("InvalidArgument", "restoration days should be at least 1", fields=[("ArgumentName", "Days")])
    return days

"""Object headers, both ways: what a PUT's head says to remember, what an answer says about a version.

User metadata travels as ``x-amz-meta-*`` and is kept byte for byte; Content-* headers are kept as sent, without the
``aws-chunked`` coding, which belongs to the transfer.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping

from ingest import versioning
from ingest.bucket_settings import BucketSettings
from ingest.records import BucketRecord, Durability, Extent, ObjectRecord, ObjectState, Versioning
from ingest.storage_class import STANDARD, needs_restore, restored, restoring
from s3api import checksums, times, xml
from s3api.call import Call, Limits
from s3api.errors import S3Error
from s3api.http.message import Headers
from s3api.integrity import AWS_CHUNKED

META_PREFIX = "x-amz-meta-"
DEFAULT_CONTENT_TYPE = "binary/octet-stream"
_STORED = ("content-type", "content-disposition", "content-language", "cache-control", "expires")
_OVERRIDES = {
    "response-content-type": "content-type",
    "response-content-language": "content-language",
    "response-expires": "expires",
    "response-cache-control": "cache-control",
    "response-content-disposition": "content-disposition",
    "response-content-encoding": "content-encoding",
}


def stored_headers(headers: Headers) -> dict[str, str]:
    """The Content-* and caching headers to keep with the object."""
    kept = {name: value for name in _STORED if (value := headers.get(name))}
    codings = [coding.strip() for coding in headers.get("content-encoding").split(",")]
    codings = [coding for coding in codings if coding and coding.lower() != AWS_CHUNKED]
    if codings:
        kept["content-encoding"] = ",".join(codings)
    return kept


def user_metadata(headers: Headers, limits: Limits) -> dict[str, str]:
    """``x-amz-meta-*`` without the prefix. Raises MetadataTooLarge."""
    metadata = {name[len(META_PREFIX) :]: value for name, value in headers.items() if name.startswith(META_PREFIX)}
    size = sum(len(name) + len(value) for name, value in metadata.items())
    if size > limits.metadata_bytes:
        raise S3Error(
            "MetadataTooLarge",
            fields=[("Size", str(size)), ("MaxSizeAllowed", str(limits.metadata_bytes))],
        )
    return metadata


def is_cold(record: ObjectRecord, settings: BucketSettings, now_ns: int) -> bool:
    """Must be restored before it can be read: by its storage class, or because it is only on the archive tier and the bucket
    does not recall on reading."""
    if needs_restore(record, now_ns):
        return True
    return settings.recall == "never" and record.state in (ObjectState.EVICTED, ObjectState.RECALLING)


def storage_class(record: ObjectRecord, settings: BucketSettings, now_ns: int) -> str:
    """The class an answer names: what the bucket keeps on the archive tier only, S3 calls GLACIER."""
    if record.attributes.storage_class == STANDARD and is_cold(record, settings, now_ns):
        return "GLACIER"
    return record.attributes.storage_class


def restore_status(record: ObjectRecord, now_ns: int) -> xml.Value:
    """What a listing says of a restore, if it is asked; None where there is none."""
    if restoring(record):
        return [("IsRestoreInProgress", True)]
    if restored(record, now_ns):
        until = times.iso(record.attributes.restored_until_ns)
        return [("IsRestoreInProgress", False), ("RestoreExpiryDate", until)]
    return None


def _lifecycle_headers(call: Call, record: ObjectRecord, settings: BucketSettings) -> list[tuple[str, str]]:
    """Class, tags and restore, where there is something to say: each is absent by default."""
    headers, now_ns = [], call.catalog.now_ns()
    if (name := storage_class(record, settings, now_ns)) != STANDARD:
        headers.append(("x-amz-storage-class", name))
    if record.attributes.tags:
        headers.append(("x-amz-tagging-count", str(len(record.attributes.tags))))
    if restoring(record):
        headers.append(("x-amz-restore", 'ongoing-request="true"'))
    elif restored(record, now_ns):
        until = times.http_date(record.attributes.restored_until_ns)
        headers.append(("x-amz-restore", f'ongoing-request="false", expiry-date="{until}"'))
    return headers


def describe(call: Call, record: ObjectRecord, settings: BucketSettings) -> list[tuple[str, str]]:
    """Headers of a GET or HEAD of the whole object, except Content-Length, the range and checksums.

    Raises InvalidArgument for a ``response-*`` override that is no header value.
    """
    headers = [
        ("last-modified", times.http_date(record.modified_ns)),
        ("etag", f'"{record.etag}"'),
        ("accept-ranges", "bytes"),
    ]
    fields: Mapping[str, str] = record.headers
    if overrides := _overrides(call):
        fields = {**fields, **overrides}
    if "content-type" not in fields:
        headers.append(("content-type", DEFAULT_CONTENT_TYPE))
    headers.extend(fields.items())
    headers.extend([(META_PREFIX + name, _field_value(value)) for name, value in record.metadata.items()])
    headers.extend(_lifecycle_headers(call, record, settings))
    return headers


def _field_value(value: str) -> str:
    """Metadata as a header value. What came over S3 goes back byte for byte; text that another room wrote and that no
    header can carry goes as RFC 2047, as S3 does it."""
    if _is_field_value(value):
        return value
    return f"=?UTF-8?B?{base64.b64encode(value.encode('utf-8', 'surrogatepass')).decode('ascii')}?="


def _is_field_value(value: str) -> bool:
    if value.isascii() and value.isprintable():
        return True
    return all((" " <= character <= "\xff" and character != "\x7f") or character == "\t" for character in value)


def _overrides(call: Call) -> dict[str, str]:
    overrides = {}
    for argument, value in call.request.query:
        header = _OVERRIDES.get(argument)
        if header is None:
            continue
        if not _is_field_value(value):
            raise S3Error(
                "InvalidArgument",
                f"{argument} must be a header value: printable Latin-1 without line breaks",
                fields=[("ArgumentName", argument)],
            )
        overrides[header] = value
    return overrides


def version_headers(bucket: BucketRecord, record: ObjectRecord) -> list[tuple[str, str]]:
    """Which version an answer is about, in a bucket that keeps versions."""
    if versioning.versioning_of(bucket) is Versioning.OFF:
        return []
    return [("x-amz-version-id", record.version_id)]


def new_version_headers(bucket: BucketRecord, record: ObjectRecord) -> list[tuple[str, str]]:
    """Which version a write has made. Where versioning is suspended AWS stores the null version and does not say so
    (the PutObject page's sample response for such a bucket has no version id); reads of it tell ``null``. And where it was
    stored at a lower level of durability than the bucket asks for, as its settings allow: at which."""
    return [*lowered_headers(bucket, record.length, record.mirror), *_version_made(bucket, record)]


def lowered_headers(bucket: BucketRecord, length: int, mirror: tuple[Extent, ...]) -> list[tuple[str, str]]:
    """What tells a client that its body has no second copy although the bucket asks for one."""
    wanted = bucket.tags.get("hiss.durability") == Durability.MIRROR
    return [("x-hiss-durability", Durability.DISK.value)] if wanted and length and not mirror else []


def _version_made(bucket: BucketRecord, record: ObjectRecord) -> list[tuple[str, str]]:
    if versioning.versioning_of(bucket) is not Versioning.ENABLED:
        return []
    return version_headers(bucket, record)


def checksum_headers(record: ObjectRecord) -> list[tuple[str, str]]:
    """Checksums of the whole object, as a GET or HEAD with ``x-amz-checksum-mode: ENABLED`` returns them."""
    headers = [(checksums.HEADER_PREFIX + name, value) for name, value in record.checksums.items()]
    if headers:
        headers.append(("x-amz-checksum-type", record.checksum_type))
    return headers

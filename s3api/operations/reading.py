"""Finding a version and opening its bytes: for GET, HEAD and the source of a copy."""

from __future__ import annotations

import re

from ingest import versioning
from ingest.bucket_settings import BucketSettings
from ingest.errors import NoSuchKey, NoSuchVersion, ObjectOffline, StaleVersion
from ingest.ports import ObjectReader
from ingest.records import NULL_VERSION, BucketRecord, ObjectRecord, Versioning
from ingest.storage_class import STANDARD
from s3api import times
from s3api.call import Call
from s3api.errors import S3Error
from s3api.operations.describe import is_cold, storage_class

_VERSION_ID = re.compile(r"[0-9a-f]{32}")


async def current(call: Call) -> ObjectRecord | None:
    """The current version of the request's key, if it has one."""
    try:
        return await call.catalog.head(call.bucket_name, call.key)
    except NoSuchKey:
        return None


async def version(call: Call, bucket: BucketRecord) -> ObjectRecord:
    """The version the request names, or the current one. Raises NoSuchKey, which says so where a delete marker is in the
    way; NoSuchVersion; MethodNotAllowed for a delete marker that is named."""
    wanted = wanted_version(call)
    try:
        record = await call.catalog.head(call.bucket_name, call.key, wanted)
    except NoSuchKey:
        raise await no_such_key(call, bucket) from None
    except NoSuchVersion:
        raise S3Error("NoSuchVersion", fields=[("Key", call.key.decode()), ("VersionId", str(wanted))]) from None
    if record.delete_marker:
        raise marker_refusal(call.request.method, record)
    return record


async def no_such_key(call: Call, bucket: BucketRecord) -> S3Error:
    headers: list[tuple[str, str]] = []
    if versioning.versioning_of(bucket) is not Versioning.OFF:
        newest = await call.catalog.newest(call.bucket_name, call.key)
        if newest is not None and newest.delete_marker:
            headers = [("x-amz-delete-marker", "true"), ("x-amz-version-id", newest.version_id)]
    return S3Error("NoSuchKey", fields=[("Key", call.key.decode())], headers=headers)


def marker_refusal(method: str, marker: ObjectRecord | None = None) -> S3Error:
    """A delete marker that is named can only be deleted."""
    headers = [("allow", "DELETE"), ("x-amz-delete-marker", "true")]
    if marker is not None:
        headers += [("last-modified", times.http_date(marker.modified_ns)), ("x-amz-version-id", marker.version_id)]
    fields = [("Method", method), ("ResourceType", "DeleteMarker")]
    return S3Error("MethodNotAllowed", fields=fields, headers=headers)


def wanted_version(call: Call) -> str | None:
    """``versionId`` of the request; None for the current version. Raises InvalidArgument."""
    wanted = call.request.arg("versionId")
    check_version_id(wanted)
    return wanted


def check_version_id(version_id: str | None) -> None:
    if version_id is None or version_id == NULL_VERSION or _VERSION_ID.fullmatch(version_id):
        return
    raise S3Error(
        "InvalidArgument",
        "Invalid version id specified" if version_id else "Version id cannot be the empty string",
        fields=[("ArgumentName", "versionId"), ("ArgumentValue", version_id[:64])],
    )


async def open_version(
    call: Call, record: ObjectRecord, settings: BucketSettings, start: int, stop: int
) -> ObjectReader:
    """Open bytes [start, stop) of ``record``, whose bucket has ``settings``; it is recalled if need be.

    Raises InvalidObjectState where the bucket does not recall, ObjectOffline where the recall takes too long,
    StaleVersion when the version went away meanwhile, DataLost.
    """
    now_ns = call.catalog.now_ns()
    offline = S3Error(
        "InvalidObjectState",
        fields=[("StorageClass", storage_class(record, settings, now_ns).replace(STANDARD, "GLACIER"))],
    )
    if is_cold(record, settings, now_ns):
        raise offline
    try:
        return await call.node.data.open_reader(record, start, stop)
    except NoSuchKey:
        raise StaleVersion("overwritten or deleted since it was looked up") from None
    except ObjectOffline:
        if settings.recall == "never":
            raise offline from None
        raise

"""Finding a version and opening its bytes: for GET, HEAD and the source of a copy."""

from __future__ import annotations

from ingest.bucket_settings import BucketSettings
from ingest.errors import NoSuchKey, ObjectOffline, StaleVersion
from ingest.ports import ObjectReader
from ingest.records import NULL_VERSION, ObjectRecord
from ingest.storage_class import STANDARD
from s3api.call import Call
from s3api.errors import S3Error
from s3api.operations.describe import is_cold, storage_class


async def current(call: Call) -> ObjectRecord | None:
    """The current version of the request's key, if it has one."""
    try:
        return await call.catalog.head(call.bucket_name, call.key)
    except NoSuchKey:
        return None


async def version(call: Call) -> ObjectRecord:
    """The version the request names; NoSuchKey, or NoSuchVersion where it names one that never was."""
    wanted = call.request.arg("versionId")
    check_version_id(wanted)
    return await call.catalog.head(call.bucket_name, call.key, wanted)


def check_version_id(version_id: str | None) -> None:
    """Buckets are unversioned: every object has the one version ``null``."""
    if version_id not in (None, NULL_VERSION):
        raise S3Error("NoSuchVersion", fields=[("VersionId", version_id)])


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

"""PutBucketVersioning, GetBucketVersioning, ListObjectVersions.

https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutBucketVersioning.html, API_ListObjectVersions.html. The listing is a keyset
scan: newest version first within a key, and a marker may name a version that has been deleted since.
"""

from __future__ import annotations

from ingest import versioning
from ingest.records import ListedObject, ObjectRecord, Versioning
from s3api import times, xml
from s3api.call import Call
from s3api.errors import S3Error
from s3api.http.message import Response
from s3api.integrity import read_document
from s3api.operations.buckets import XML_TYPE
from s3api.operations.listing import Page


async def put_bucket_versioning(call: Call) -> Response:
    await call.bucket()
    body = await read_document(call.request, call.signed, call.limits.configuration_bytes)
    tree = xml.parse(body, "VersioningConfiguration")
    if "x-amz-mfa" in call.request.headers or xml.text(tree, "MfaDelete", "Disabled") != "Disabled":
        raise S3Error("NotImplemented", "MFA delete is not implemented; object lock keeps versions from being deleted")
    status = xml.text(tree, "Status", "")
    if not status:
        raise S3Error("IllegalVersioningConfigurationException")
    if status not in (Versioning.ENABLED, Versioning.SUSPENDED):
        raise xml.BadXml("<Status> is Enabled or Suspended")
    await call.catalog.configure_bucket(call.bucket_name, {"versioning": status.encode()})
    return Response(200)


async def get_bucket_versioning(call: Call) -> Response:
    """A bucket that never kept versions has an empty document."""
    bucket, _ = await call.bucket()
    status = versioning.versioning_of(bucket)
    return Response(200, [XML_TYPE], xml.document("VersioningConfiguration", [("Status", status.value or None)]))


async def list_object_versions(call: Call) -> Response:
    _, settings = await call.bucket()
    arg = call.request.arg
    page = Page(call, settings)
    key_marker, version_marker = arg("key-marker") or "", arg("version-id-marker")
    if version_marker is not None and not key_marker:
        raise _bad_marker("A version-id marker cannot be specified without a key marker.")
    if version_marker == "":
        raise _bad_marker("A version-id marker cannot be empty.")
    if page.limit:
        page.rows, page.truncated = await call.catalog.list_versions(
            call.bucket_name,
            prefix=page.prefix,
            after=key_marker.encode(),
            after_version=version_marker or "",
            delimiter=page.delimiter,
            limit=page.limit,
        )
    await page.name_owners(call)
    last = page.rows[-1] if page.truncated else None
    document: list[tuple[str, xml.Value]] = [
        ("Name", call.bucket_name),
        ("Prefix", page.name(page.prefix)),
        ("KeyMarker", page.name(key_marker.encode())),
        ("VersionIdMarker", version_marker or ""),
        ("NextKeyMarker", page.name(last.key) if last else None),
        ("NextVersionIdMarker", last.record.version_id if last and last.record else None),
        ("MaxKeys", page.limit),
        ("Delimiter", page.name(page.delimiter) if page.delimiter else None),
        ("EncodingType", "url" if page.encoded else None),
        ("IsTruncated", page.truncated),
        *(_entry(page, row, row.record) for row in page.rows if row.record is not None),
        *(("CommonPrefixes", [("Prefix", page.name(row.key))]) for row in page.rows if row.record is None),
    ]
    return Response(200, [XML_TYPE], xml.document("ListVersionsResult", document))


def _entry(page: Page, row: ListedObject, record: ObjectRecord) -> tuple[str, xml.Value]:
    names: list[tuple[str, xml.Value]] = [("VersionId", record.version_id), ("IsLatest", row.latest)]
    if record.delete_marker:
        modified = ("LastModified", times.iso(record.modified_ns))
        assert page.owners is not None
        return "DeleteMarker", [("Key", page.name(row.key)), *names, modified, ("Owner", page.owners(record))]
    entry = page.entry(row.key, record)
    return "Version", [entry[0], *names, *entry[1:]]


def _bad_marker(message: str) -> S3Error:
    return S3Error("InvalidArgument", message, fields=[("ArgumentName", "version-id-marker")])

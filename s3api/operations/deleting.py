"""DeleteObject and DeleteObjects: of a key, which leaves a delete marker where the bucket keeps versions, or of one version.

https://docs.aws.amazon.com/AmazonS3/latest/API/API_DeleteObject.html, API_DeleteObjects.html. What becomes of each is decided by
the catalogue at commit, preconditions and locks among it.
"""

from __future__ import annotations

from xml.etree.ElementTree import Element

from ingest import versioning
from ingest.records import BucketRecord, Deleted, DeleteObject, Versioning
from s3api import xml
from s3api.call import Call
from s3api.conditions import write_condition
from s3api.errors import S3Error, translated
from s3api.http.message import Response
from s3api.integrity import needs_checksum, read_document
from s3api.operations.buckets import XML_TYPE
from s3api.operations.locks import may_bypass
from s3api.operations.reading import check_version_id, wanted_version

_NO_MFA = "MFA delete is not implemented; object lock keeps versions from being deleted"


async def delete_object(call: Call) -> Response:
    bucket, _ = await call.bucket()
    _refuse_mfa(call)
    wanted = wanted_version(call)
    condition = write_condition(call.request.headers)
    if condition.if_none_match:
        raise S3Error("NotImplemented", "If-None-Match on a delete means nothing")
    await _may_compare(call, call.key, condition.if_match)
    bypass = await may_bypass(call, call.key)
    request = DeleteObject(call.bucket_name, call.key, wanted, condition.if_match, bypass_governance=bypass)
    (outcome,) = await call.catalog.delete([request])
    if isinstance(outcome, Exception):
        raise outcome
    headers = []
    if outcome.version_id and _shows_versions(bucket):
        headers.append(("x-amz-version-id", outcome.version_id))
    if outcome.delete_marker:
        headers.append(("x-amz-delete-marker", "true"))
    return Response(204, headers)


async def _may_compare(call: Call, key: bytes, etag: str) -> None:
    """An ETag that holds or does not tells something of the object. Raises AccessDenied."""
    if etag and etag != "*":
        await call.authorise("s3:GetObject", call.bucket_name, key)


def _shows_versions(bucket: BucketRecord) -> bool:
    return versioning.versioning_of(bucket) is not Versioning.OFF


def _refuse_mfa(call: Call) -> None:
    if "x-amz-mfa" in call.request.headers:
        raise S3Error("NotImplemented", _NO_MFA, fields=[("Header", "x-amz-mfa")])


async def delete_objects(call: Call) -> Response:
    """Up to 1,000 keys at once; each is decided on its own, also whether the user may."""
    await call.bucket()
    _refuse_mfa(call)
    needs_checksum(call.request)
    body = await read_document(call.request, call.signed, call.limits.document_bytes)
    tree = xml.parse(body, "Delete")
    quiet = xml.text(tree, "Quiet", "false").lower() == "true"
    wanted = tree.findall("Object")
    if not 0 < len(wanted) <= call.limits.keys_per_delete:
        raise S3Error("MalformedXML", f"Name from 1 to {call.limits.keys_per_delete} objects")
    failures: list[xml.Value] = []
    requests: list[DeleteObject] = []
    for element in wanted:
        try:
            requests.append(await _request(call, element))
        except S3Error as refusal:
            key, version_id = xml.raw_text(element, "Key"), xml.text(element, "VersionId", "")
            failures.append(_failure(key, version_id, refusal))
    deleted: list[xml.Value] = []
    if requests:
        outcomes = await call.catalog.delete(requests)
        for request, outcome in zip(requests, outcomes, strict=True):
            key, version_id = request.key.decode(), request.version_id or ""
            if isinstance(outcome, Exception):
                failures.append(_failure(key, version_id, translated(outcome)))
            else:
                deleted.append(_success(key, version_id, outcome))
    entries: list[tuple[str, xml.Value]] = [] if quiet else [("Deleted", entry) for entry in deleted]
    entries += [("Error", entry) for entry in failures]
    return Response(200, [XML_TYPE], xml.document("DeleteResult", entries))


async def _request(call: Call, element: Element) -> DeleteObject:
    """Raises S3Error for a key or version that cannot be, or that the user may not delete."""
    text = xml.raw_text(element, "Key")
    key = text.encode("utf-8", "surrogatepass")
    if not 0 < len(key) <= call.limits.key_bytes:
        raise S3Error("KeyTooLongError") if key else S3Error("MalformedXML", "A Key is empty")
    version_id = xml.text(element, "VersionId", "") or None
    check_version_id(version_id)
    action = "s3:DeleteObjectVersion" if version_id else "s3:DeleteObject"
    await call.authorise(action, call.bucket_name, key, version_id=version_id)
    etag = xml.text(element, "ETag", "").strip('"')
    await _may_compare(call, key, etag)
    bypass = await may_bypass(call, key)
    return DeleteObject(call.bucket_name, key, version_id, etag, bypass_governance=bypass)


def _success(key: str, version_id: str, outcome: Deleted) -> xml.Value:
    entry: list[tuple[str, xml.Value]] = [("Key", key), ("VersionId", version_id or None)]
    if outcome.delete_marker:
        entry += [("DeleteMarker", True), ("DeleteMarkerVersionId", outcome.version_id)]
    return entry


def _failure(key: str, version_id: str, error: S3Error) -> xml.Value:
    return [("Key", key), ("VersionId", version_id or None), ("Code", error.code), ("Message", error.message)]

"""Put/Get/DeleteBucketLifecycleConfiguration, and what answers about objects and uploads say of the rules.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-lifecycle-mgmt.html
"""

from __future__ import annotations

from urllib.parse import quote

import msgspec

from ingest.lifecycle import LIFECYCLE, Lifecycle, abortion, expiration
from ingest.records import BucketRecord, ObjectRecord, UploadRecord
from s3api import lifecycle_xml, times
from s3api.call import Call
from s3api.errors import S3Error
from s3api.http.message import Response
from s3api.integrity import needs_checksum, read_document
from s3api.operations.buckets import XML_TYPE

_MINIMUM = "x-amz-transition-default-minimum-object-size"
_MINIMA = ("all_storage_classes_128K", "varies_by_storage_class")


async def put_bucket_lifecycle(call: Call) -> Response:
    await call.bucket()
    needs_checksum(call.request)
    minimum = call.request.headers.get(_MINIMUM) or _MINIMA[0]
    if minimum not in _MINIMA:
        raise S3Error("InvalidRequest", f"{_MINIMUM} is {' or '.join(_MINIMA)}")
    body = await read_document(call.request, call.signed, call.limits.lifecycle_bytes)
    rules = Lifecycle(lifecycle_xml.parsed(body), minimum)
    await call.catalog.configure_bucket(call.bucket_name, {"lifecycle": msgspec.json.encode(rules)})
    return Response(200, [(_MINIMUM, minimum)])


async def get_bucket_lifecycle(call: Call) -> Response:
    bucket, _ = await call.bucket()
    rules = LIFECYCLE.of(bucket)
    if rules is None:
        raise S3Error("NoSuchLifecycleConfiguration", fields=[("BucketName", call.bucket_name)])
    return Response(200, [XML_TYPE, (_MINIMUM, rules.minimum)], lifecycle_xml.rendered(rules.rules))


async def delete_bucket_lifecycle(call: Call) -> Response:
    await call.bucket()
    await call.catalog.configure_bucket(call.bucket_name, {"lifecycle": None})
    return Response(204)


def expiration_header(call: Call, bucket: BucketRecord, record: ObjectRecord) -> list[tuple[str, str]]:
    """``x-amz-expiration`` of a current version, where a rule will let it expire."""
    rules = LIFECYCLE.of(bucket)
    found = None if rules is None else expiration(rules, record, call.node.settings.day_s)
    if found is None:
        return []
    return [("x-amz-expiration", f'expiry-date="{times.http_date(found[0])}", rule-id="{quote(found[1], safe="")}"')]


def abort_headers(call: Call, bucket: BucketRecord, upload: UploadRecord) -> list[tuple[str, str]]:
    rules = LIFECYCLE.of(bucket)
    found = None if rules is None else abortion(rules, upload, call.node.settings.day_s)
    if found is None:
        return []
    return [("x-amz-abort-date", times.http_date(found[0])), ("x-amz-abort-rule-id", quote(found[1], safe=""))]

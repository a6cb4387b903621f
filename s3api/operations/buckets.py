"""CreateBucket, HeadBucket, DeleteBucket, ListBuckets, GetBucketLocation.

Naming rules: https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html
"""

from __future__ import annotations

import base64
import binascii
import re

from ingest import versioning
from s3api import times, xml
from s3api.auth.engine import sees
from s3api.call import Call
from s3api.errors import S3Error
from s3api.http.message import Response
from s3api.integrity import has_body, read_document
from s3api.operations.ownership import new_bucket_documents

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_IPV4 = re.compile(r"\d{1,3}(\.\d{1,3}){3}")
_RESERVED_STARTS = ("xn--", "sthree-", "amzn-s3-demo-")
_RESERVED_ENDS = ("-s3alias", "--ol-s3", ".mrap", "--x-s3", "--table-s3")
_BUCKETS_PER_PAGE = 10_000
XML_TYPE = ("content-type", "application/xml")


def valid_name(name: str) -> bool:
    return (
        _NAME.fullmatch(name) is not None
        and not any(pair in name for pair in ("..", ".-", "-."))
        and _IPV4.fullmatch(name) is None
        and not name.startswith(_RESERVED_STARTS)
        and not name.endswith(_RESERVED_ENDS)
    )


async def create_bucket(call: Call) -> Response:
    headers = call.request.headers
    if not valid_name(call.bucket_name):
        raise S3Error("InvalidBucketName", fields=[("BucketName", call.bucket_name)])
    lock = headers.get("x-amz-bucket-object-lock-enabled").lower() == "true"
    documents = versioning.with_lock() if lock else {}
    region = call.node.settings.region
    if has_body(call.request):
        body = await read_document(call.request, call.signed, call.limits.configuration_bytes)
        if body.strip():
            tree = xml.parse(body, "CreateBucketConfiguration")
            if tree.find("Tags") is not None:
                raise S3Error("NotImplemented", "Tag the bucket with PutBucketTagging once it exists")
            region = xml.text(tree, "LocationConstraint", "") or region
    documents |= await new_bucket_documents(call)
    await call.catalog.create_bucket(call.bucket_name, call.user.user_id, region, documents)
    return Response(200, [("location", f"/{call.bucket_name}")])


async def head_bucket(call: Call) -> Response:
    await call.bucket()
    return Response(200, [("x-amz-bucket-region", call.node.settings.region), XML_TYPE], content_length=0)


async def delete_bucket(call: Call) -> Response:
    await call.bucket()
    await call.catalog.delete_bucket(call.bucket_name)
    return Response(204)


async def list_buckets(call: Call) -> Response:
    """Buckets the user has any grant in, in name order."""
    prefix = call.request.arg("prefix") or ""
    limit = call.number("max-buckets", 1, _BUCKETS_PER_PAGE, _BUCKETS_PER_PAGE)
    after = _bucket_token(call.request.arg("continuation-token") or "")
    principal = call.signed.credentials.principal
    visible = [
        bucket
        for bucket in sorted(await call.catalog.buckets(), key=lambda bucket: bucket.name)
        if bucket.name > after and bucket.name.startswith(prefix) and sees(principal, bucket, call.context())
    ]
    page = visible[:limit]
    region = call.node.settings.region
    rows: list[tuple[str, xml.Value]] = [
        (
            "Bucket",
            [("Name", bucket.name), ("CreationDate", times.iso(bucket.created_ns)), ("BucketRegion", region)],
        )
        for bucket in page
    ]
    owner: list[tuple[str, xml.Value]] = [("ID", call.user.canonical_id), ("DisplayName", call.user.display_name)]
    document: list[tuple[str, xml.Value]] = [
        ("Owner", owner),
        ("Buckets", rows),
        ("Prefix", prefix or None),
    ]
    if len(page) < len(visible):
        token = base64.urlsafe_b64encode(page[-1].name.encode()).decode("ascii")
        document.append(("ContinuationToken", token))
    return Response(200, [XML_TYPE], xml.document("ListAllMyBucketsResult", document))


def _bucket_token(token: str) -> str:
    try:
        return base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        raise S3Error("InvalidArgument", "The continuation token provided is incorrect") from None


async def get_bucket_location(call: Call) -> Response:
    await call.bucket()
    region = call.node.settings.region
    # us-east-1 is written as nothing at all, as AWS does since its first day.
    text = "" if region == "us-east-1" else xml.escape(region)
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<LocationConstraint xmlns="{xml.NAMESPACE}">{text}</LocationConstraint>'
    )
    return Response(200, [XML_TYPE], body.encode())

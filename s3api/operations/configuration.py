"""Bucket configurations that are a document and nothing else, and those that no bucket here ever has.

CORS rules and who pays are stored; for the rest (encryption, website, replication, logging, acceleration, inventories, …) a
GET answers what AWS answers for a bucket without one, because tools probe them, DELETE has nothing to do, and PUT is refused:
to take a configuration and not to act by it would be a lie.
https://docs.aws.amazon.com/AmazonS3/latest/API/API_Operations_Amazon_Simple_Storage_Service.html
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable

import msgspec

from s3api import cors, xml
from s3api.call import Call
from s3api.errors import S3Error
from s3api.http.message import Response
from s3api.integrity import needs_checksum, read_document
from s3api.operations.buckets import XML_TYPE

# -- CORS


async def put_bucket_cors(call: Call) -> Response:
    await call.bucket()
    needs_checksum(call.request)
    body = await read_document(call.request, call.signed, call.limits.configuration_bytes)
    await call.catalog.configure_bucket(call.bucket_name, {"cors": msgspec.json.encode(cors.parsed(body))})
    return Response(200)


async def get_bucket_cors(call: Call) -> Response:
    bucket, _ = await call.bucket()
    rules = cors.RULES.of(bucket)
    if rules is None:
        raise S3Error("NoSuchCORSConfiguration", fields=[("BucketName", call.bucket_name)])
    return Response(200, [XML_TYPE], cors.rendered(rules))


async def delete_bucket_cors(call: Call) -> Response:
    await call.bucket()
    await call.catalog.configure_bucket(call.bucket_name, {"cors": None})
    return Response(204)


# -- who pays


async def put_bucket_request_payment(call: Call) -> Response:
    await call.bucket()
    body = await read_document(call.request, call.signed, call.limits.configuration_bytes)
    payer = xml.text(xml.parse(body, "RequestPaymentConfiguration"), "Payer")
    if payer == "Requester":
        raise S3Error("NotImplemented", "Nobody is billed here, so requesters cannot pay")
    if payer != "BucketOwner":
        raise xml.BadXml("<Payer> is Requester or BucketOwner")
    return Response(200)


async def get_bucket_request_payment(call: Call) -> Response:
    await call.bucket()
    return Response(200, [XML_TYPE], xml.document("RequestPaymentConfiguration", [("Payer", "BucketOwner")]))


# -- what no bucket has


@dataclasses.dataclass(frozen=True, slots=True)
class Absent:
    """A configuration that no bucket has."""

    name: str
    """AWS's name of the operation without its verb."""
    query: str
    action: str
    """What its IAM actions are called after Get and Put."""
    missing: str = ""
    """Error code of a GET; empty: it is answered with an empty document."""
    root: str = ""
    refusal: str = ""
    deletable: bool = True
    listed: str = ""
    """Root of the document of a GET without ``id``, where a bucket may have many of the kind."""

    async def get(self, call: Call) -> Response:
        await call.bucket()
        if self.listed and call.request.arg("id") is None:
            return Response(200, [XML_TYPE], xml.document(self.listed, [("IsTruncated", False)]))
        if self.missing:
            raise S3Error(self.missing, fields=[("BucketName", call.bucket_name)])
        return Response(200, [XML_TYPE], xml.document(self.root, []))

    async def put(self, call: Call) -> Response:
        await call.bucket()
        raise S3Error("NotImplemented", self.refusal, fields=[("Query", self.query)])

    async def delete(self, call: Call) -> Response:
        await call.bucket()
        if self.listed:
            raise S3Error("NoSuchConfiguration")
        return Response(204)


_NO_REPORTS = "Reports and tiers are not made here; /metrics and hiss status say how the node is"
ABSENT = (
    Absent("BucketEncryption", "encryption", "EncryptionConfiguration", "ServerSideEncryptionConfigurationNotFoundError",
           refusal="Server-side encryption is not implemented; encrypt the gateway's disks and its archive instead"),
    Absent("BucketWebsite", "website", "BucketWebsite", "NoSuchWebsiteConfiguration",
           refusal="Static websites are not served here"),
    Absent("BucketReplication", "replication", "ReplicationConfiguration", "ReplicationConfigurationNotFoundError",
           refusal="Replication is not implemented; every object goes to the archive"),
    Absent("BucketLogging", "logging", "BucketLogging", root="BucketLoggingStatus", deletable=False,
           refusal="Access logs are written by the node, not into buckets"),
    Absent("BucketAccelerateConfiguration", "accelerate", "AccelerateConfiguration",
           root="AccelerateConfiguration", deletable=False,
           refusal="There are no edge locations to accelerate transfers with"),
    Absent("BucketInventoryConfiguration", "inventory", "InventoryConfiguration", "NoSuchConfiguration", refusal=_NO_REPORTS,
           listed="ListInventoryConfigurationsResult"),
    Absent("BucketAnalyticsConfiguration", "analytics", "AnalyticsConfiguration", "NoSuchConfiguration", refusal=_NO_REPORTS,
           listed="ListBucketAnalyticsConfigurationResult"),
    Absent("BucketMetricsConfiguration", "metrics", "MetricsConfiguration", "NoSuchConfiguration", refusal=_NO_REPORTS,
           listed="ListMetricsConfigurationsResult"),
    Absent("BucketIntelligentTieringConfiguration", "intelligent-tiering", "IntelligentTieringConfiguration",
           "NoSuchConfiguration", refusal=_NO_REPORTS, listed="ListBucketIntelligentTieringConfigurationsOutput"),
)  # fmt: skip

Operation = Callable[[Call], Awaitable[Response]]


def absent_rows() -> list[tuple[str, str, str, Operation, str]]:
    """(operation, method, query, function, action) of each, for the table of routes."""
    rows: list[tuple[str, str, str, Operation, str]] = []
    for kind in ABSENT:
        rows.append((f"Get{kind.name}", "GET", kind.query, kind.get, f"s3:Get{kind.action}"))
        rows.append((f"Put{kind.name}", "PUT", kind.query, kind.put, f"s3:Put{kind.action}"))
        if kind.deletable:
            rows.append((f"Delete{kind.name}", "DELETE", kind.query, kind.delete, f"s3:Put{kind.action}"))
    return rows

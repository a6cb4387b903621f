"""The routes table: which operation a request is, from its method, its bucket and key, and its query and headers.

In: method, level and the names in the query. Out: a ``Route`` with the operation and the action it needs, or an S3Error.
A subresource the table does not have is 501 NotImplemented: ``PUT /bucket/key?acl`` must never become a PutObject.
https://docs.aws.amazon.com/AmazonS3/latest/API/API_Operations_Amazon_Simple_Storage_Service.html
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Awaitable, Callable
from urllib.parse import unquote_to_bytes

from s3api.auth.actions import ACTIONS, Access, Over
from s3api.call import Call
from s3api.errors import S3Error
from s3api.http.message import Request, Response
from s3api.operations import (
    access,
    attributes,
    buckets,
    configuration,
    copy,
    deleting,
    lifecycle,
    listing,
    locks,
    multipart,
    notification,
    object_tags,
    objects,
    post_object,
    sts,
    tagging,
    versioning,
)


class Level(enum.Enum):
    """What the path names."""

    SERVICE = "service"
    BUCKET = "bucket"
    OBJECT = "object"


Operation = Callable[[Call], Awaitable[Response]]


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    name: str
    """AWS's name of the operation; the ``operation`` of metrics and log lines."""
    method: str
    level: Level
    run: Operation
    action: str
    """What the user must be allowed to do (a row of s3api/auth/actions.py) to the request's bucket or key."""
    query: tuple[str, ...] = ()
    """Parameters that make a request this operation; all must be there."""
    header: str = ""
    """A header that must be there."""
    accepts: tuple[str, ...] = ()
    """Subresource names this operation understands as arguments."""
    own_signature: bool = False
    """The signature is in the body: the operation verifies and authorises."""
    stores: bool = False
    """It brings bytes to this node: refused before they come where nothing can be taken."""
    over: Over | None = None
    """What a grant must cover, where it is not what the actions table says."""


_SERVICE, _BUCKET, _OBJECT = Level.SERVICE, Level.BUCKET, Level.OBJECT

# Within one (method, level) the first row that fits wins: more specific rows come first.
ROUTES: tuple[Route, ...] = (
    Route("ListBuckets", "GET", _SERVICE, buckets.list_buckets, "s3:ListAllMyBuckets"),
    Route("AssumeRole", "POST", _SERVICE, sts.sts, "s3:ListAllMyBuckets", own_signature=True),
    Route("PostObject", "POST", _BUCKET, post_object.post_object, "s3:PutObject", own_signature=True,
          stores=True),
    Route("CreateBucket", "PUT", _BUCKET, buckets.create_bucket, "s3:CreateBucket"),
    Route("HeadBucket", "HEAD", _BUCKET, buckets.head_bucket, "s3:ListBucket", over=Over.ANYTHING),
    Route("DeleteBucket", "DELETE", _BUCKET, buckets.delete_bucket, "s3:DeleteBucket"),
    Route("GetBucketLocation", "GET", _BUCKET, buckets.get_bucket_location, "s3:GetBucketLocation", ("location",)),
    Route("PutBucketVersioning", "PUT", _BUCKET, versioning.put_bucket_versioning, "s3:PutBucketVersioning",
          ("versioning",)),
    Route("GetBucketVersioning", "GET", _BUCKET, versioning.get_bucket_versioning, "s3:GetBucketVersioning",
          ("versioning",)),
    Route("ListObjectVersions", "GET", _BUCKET, versioning.list_object_versions, "s3:ListBucketVersions", ("versions",)),
    Route("PutObjectLockConfiguration", "PUT", _BUCKET, locks.put_object_lock_configuration,
          "s3:PutBucketObjectLockConfiguration", ("object-lock",)),
    Route("GetObjectLockConfiguration", "GET", _BUCKET, locks.get_object_lock_configuration,
          "s3:GetBucketObjectLockConfiguration", ("object-lock",)),
    Route("PutBucketTagging", "PUT", _BUCKET, tagging.put_bucket_tagging, "s3:PutBucketTagging", ("tagging",)),
    Route("GetBucketTagging", "GET", _BUCKET, tagging.get_bucket_tagging, "s3:GetBucketTagging", ("tagging",)),
    Route("DeleteBucketTagging", "DELETE", _BUCKET, tagging.delete_bucket_tagging, "s3:PutBucketTagging", ("tagging",)),
    Route("PutBucketCors", "PUT", _BUCKET, configuration.put_bucket_cors, "s3:PutBucketCORS", ("cors",)),
    Route("GetBucketCors", "GET", _BUCKET, configuration.get_bucket_cors, "s3:GetBucketCORS", ("cors",)),
    Route("DeleteBucketCors", "DELETE", _BUCKET, configuration.delete_bucket_cors, "s3:PutBucketCORS", ("cors",)),
    Route("PutBucketLifecycleConfiguration", "PUT", _BUCKET, lifecycle.put_bucket_lifecycle,
          "s3:PutLifecycleConfiguration", ("lifecycle",)),
    Route("GetBucketLifecycleConfiguration", "GET", _BUCKET, lifecycle.get_bucket_lifecycle,
          "s3:GetLifecycleConfiguration", ("lifecycle",)),
    Route("DeleteBucketLifecycle", "DELETE", _BUCKET, lifecycle.delete_bucket_lifecycle,
          "s3:PutLifecycleConfiguration", ("lifecycle",)),
    Route("PutBucketNotificationConfiguration", "PUT", _BUCKET, notification.put_bucket_notification,
          "s3:PutBucketNotification", ("notification",)),
    Route("GetBucketNotificationConfiguration", "GET", _BUCKET, notification.get_bucket_notification,
          "s3:GetBucketNotification", ("notification",)),
    Route("PutBucketRequestPayment", "PUT", _BUCKET, configuration.put_bucket_request_payment,
          "s3:PutBucketRequestPayment", ("requestPayment",)),
    Route("GetBucketRequestPayment", "GET", _BUCKET, configuration.get_bucket_request_payment,
          "s3:GetBucketRequestPayment", ("requestPayment",)),
    Route("PutBucketPolicy", "PUT", _BUCKET, access.put_bucket_policy, "s3:PutBucketPolicy", ("policy",)),
    Route("GetBucketPolicy", "GET", _BUCKET, access.get_bucket_policy, "s3:GetBucketPolicy", ("policy",)),
    Route("DeleteBucketPolicy", "DELETE", _BUCKET, access.delete_bucket_policy, "s3:DeleteBucketPolicy", ("policy",)),
    Route("GetBucketPolicyStatus", "GET", _BUCKET, access.get_bucket_policy_status, "s3:GetBucketPolicyStatus",
          ("policyStatus",)),
    Route("PutPublicAccessBlock", "PUT", _BUCKET, access.put_public_access_block, "s3:PutBucketPublicAccessBlock",
          ("publicAccessBlock",)),
    Route("GetPublicAccessBlock", "GET", _BUCKET, access.get_public_access_block, "s3:GetBucketPublicAccessBlock",
          ("publicAccessBlock",)),
    Route("DeletePublicAccessBlock", "DELETE", _BUCKET, access.delete_public_access_block,
          "s3:PutBucketPublicAccessBlock", ("publicAccessBlock",)),
    Route("PutBucketOwnershipControls", "PUT", _BUCKET, access.put_bucket_ownership_controls,
          "s3:PutBucketOwnershipControls", ("ownershipControls",)),
    Route("GetBucketOwnershipControls", "GET", _BUCKET, access.get_bucket_ownership_controls,
          "s3:GetBucketOwnershipControls", ("ownershipControls",)),
    Route("DeleteBucketOwnershipControls", "DELETE", _BUCKET, access.delete_bucket_ownership_controls,
          "s3:PutBucketOwnershipControls", ("ownershipControls",)),
    Route("PutBucketAcl", "PUT", _BUCKET, access.put_bucket_acl, "s3:PutBucketAcl", ("acl",)),
    Route("GetBucketAcl", "GET", _BUCKET, access.get_bucket_acl, "s3:GetBucketAcl", ("acl",)),
    Route("PutObjectAcl", "PUT", _OBJECT, access.put_object_acl, "s3:PutObjectAcl", ("acl",), "", ("versionId",)),
    Route("GetObjectAcl", "GET", _OBJECT, access.get_object_acl, "s3:GetObjectAcl", ("acl",), "", ("versionId",)),
    *(Route(name, method, _BUCKET, run, action, (query,))
      for name, method, query, run, action in configuration.absent_rows()),
    Route("ListMultipartUploads", "GET", _BUCKET, multipart.list_multipart_uploads, "s3:ListBucketMultipartUploads",
          ("uploads",)),
    Route("DeleteObjects", "POST", _BUCKET, deleting.delete_objects, "s3:DeleteObject", ("delete",),
          over=Over.NOTHING),
    Route("ListObjectsV2", "GET", _BUCKET, listing.list_objects_v2, "s3:ListBucket", ("list-type",)),
    Route("ListObjects", "GET", _BUCKET, listing.list_objects, "s3:ListBucket"),
    Route("UploadPartCopy", "PUT", _OBJECT, copy.upload_part_copy, "s3:PutObject", ("uploadId", "partNumber"),
          copy.COPY_SOURCE, stores=True),
    Route("UploadPart", "PUT", _OBJECT, multipart.upload_part, "s3:PutObject", ("uploadId", "partNumber"),
          stores=True),
    Route("CopyObject", "PUT", _OBJECT, copy.copy_object, "s3:PutObject", (), copy.COPY_SOURCE, stores=True),
    Route("PutObject", "PUT", _OBJECT, objects.put_object, "s3:PutObject", (), "", ("versionId",), stores=True),
    Route("PutObjectTagging", "PUT", _OBJECT, object_tags.put_object_tagging, "s3:PutObjectTagging", ("tagging",), "",
          ("versionId",)),
    Route("GetObjectTagging", "GET", _OBJECT, object_tags.get_object_tagging, "s3:GetObjectTagging", ("tagging",), "",
          ("versionId",)),
    Route("DeleteObjectTagging", "DELETE", _OBJECT, object_tags.delete_object_tagging, "s3:DeleteObjectTagging",
          ("tagging",), "", ("versionId",)),
    Route("RestoreObject", "POST", _OBJECT, object_tags.restore_object, "s3:RestoreObject", ("restore",), "",
          ("versionId",)),
    Route("PutObjectRetention", "PUT", _OBJECT, locks.put_object_retention, "s3:PutObjectRetention", ("retention",), "",
          ("versionId",)),
    Route("GetObjectRetention", "GET", _OBJECT, locks.get_object_retention, "s3:GetObjectRetention", ("retention",), "",
          ("versionId",)),
    Route("PutObjectLegalHold", "PUT", _OBJECT, locks.put_object_legal_hold, "s3:PutObjectLegalHold", ("legal-hold",), "",
          ("versionId",)),
    Route("GetObjectLegalHold", "GET", _OBJECT, locks.get_object_legal_hold, "s3:GetObjectLegalHold", ("legal-hold",), "",
          ("versionId",)),
    Route("GetObjectAttributes", "GET", _OBJECT, attributes.get_object_attributes, "s3:GetObjectAttributes",
          ("attributes",), "", ("versionId",)),
    Route("ListParts", "GET", _OBJECT, multipart.list_parts, "s3:ListMultipartUploadParts", ("uploadId",)),
    Route("GetObject", "GET", _OBJECT, objects.get_object, "s3:GetObject", (), "", ("versionId", "partNumber")),
    Route("HeadObject", "HEAD", _OBJECT, objects.head_object, "s3:GetObject", (), "", ("versionId", "partNumber")),
    Route("AbortMultipartUpload", "DELETE", _OBJECT, multipart.abort_multipart_upload, "s3:AbortMultipartUpload",
          ("uploadId",)),
    Route("DeleteObject", "DELETE", _OBJECT, deleting.delete_object, "s3:DeleteObject", (), "", ("versionId",)),
    Route("CreateMultipartUpload", "POST", _OBJECT, multipart.create_multipart_upload, "s3:PutObject", ("uploads",)),
    Route("CompleteMultipartUpload", "POST", _OBJECT, multipart.complete_multipart_upload, "s3:PutObject",
          ("uploadId",)),
)  # fmt: skip

# Every name that makes a request something else than the plain operation on its bucket or object.
SUBRESOURCES = frozenset(
    {
        "abac", "accelerate", "acl", "analytics", "annotation", "attributes", "cors", "delete", "encryption",
        "intelligent-tiering", "inventory", "legal-hold", "lifecycle", "list-type", "location", "logging",
        "metadataConfiguration", "metadataInventoryTable", "metadataJournalTable", "metadataTable", "metrics",
        "notification", "object-lock", "ownershipControls", "partNumber", "policy", "policyStatus",
        "publicAccessBlock", "renameObject", "replication", "requestPayment", "restore", "retention", "select",
        "select-type", "session", "tagging", "torrent", "uploadId", "uploads", "versionId", "versioning", "versions",
        "website",
    }
)  # fmt: skip

_BY_PLACE: dict[tuple[str, Level], tuple[Route, ...]] = {}
for _route in ROUTES:
    # Stable: rows with conditions before the one without.
    _rows = (*_BY_PLACE.get((_route.method, _route.level), ()), _route)
    _BY_PLACE[_route.method, _route.level] = tuple(
        sorted(_rows, key=lambda row: len(row.query) + bool(row.header), reverse=True)
    )
_ALLOWED = {
    level: ", ".join(sorted({row.method for row in ROUTES if row.level is level and not (row.query or row.header)}))
    for level in Level
}
"""Methods of the plain resource, which a 405 has to name (RFC 9110 section 15.5.6)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """What a request is about: path style or virtual-host style make no difference from here on."""

    level: Level
    bucket: str
    key: bytes
    virtual: bool = False
    """Host named the bucket."""


def target_of(request: Request, domains: tuple[str, ...], key_bytes_max: int) -> Target:
    """Bucket and key from Host and raw path. Raises InvalidURI, KeyTooLongError."""
    path = request.path.removeprefix("/")
    bucket = _virtual_bucket(request.headers.get("host"), domains) if domains else ""
    virtual = bool(bucket)
    if not bucket:
        bucket_text, _, path = path.partition("/")
        bucket = _decoded(bucket_text).decode("utf-8")
    if not bucket:
        if path:
            raise S3Error("InvalidURI")
        return Target(Level.SERVICE, "", b"")
    if not path:
        return Target(Level.BUCKET, bucket, b"", virtual)
    key = _decoded(path)
    if len(key) > key_bytes_max:
        raise S3Error("KeyTooLongError", fields=[("Size", str(len(key))), ("MaxSizeAllowed", str(key_bytes_max))])
    return Target(Level.OBJECT, bucket, key, virtual)


def _virtual_bucket(host: str, domains: tuple[str, ...]) -> str:
    name = host.lower()
    if not name.endswith("]"):
        name = name.partition(":")[0]
    for domain in domains:
        if name.endswith("." + domain):
            return name[: -len(domain) - 1]
    return ""


def _decoded(text: str) -> bytes:
    """Percent-decoded bytes; InvalidURI unless they are UTF-8, which every S3 name is."""
    try:
        raw = unquote_to_bytes(text.encode("latin-1")) if "%" in text else text.encode("latin-1")
        raw.decode("utf-8")
    except UnicodeError:
        raise S3Error("InvalidURI", "The path is not percent-encoded UTF-8") from None
    return raw


def route(request: Request, level: Level) -> Route:
    """The row for a request. Raises NotImplemented for subresources without one, else MethodNotAllowed."""
    rows = _BY_PLACE.get((request.method, level), ())
    names = [name for name, _ in request.query]
    for row in rows:
        if all(name in names for name in row.query) and (not row.header or row.header in request.headers):
            _refuse_unknown(row, request)
            return row
    for name in names:
        if name in SUBRESOURCES:
            raise _not_implemented(request.method, name)
    fields = [("Method", request.method), ("ResourceType", level.name)]
    raise S3Error("MethodNotAllowed", fields=fields, headers=[("allow", _ALLOWED[level])])


def _refuse_unknown(row: Route, request: Request) -> None:
    for name, value in request.query:
        if name in row.query:
            if name == "list-type" and value != "2":
                raise S3Error("InvalidArgument", "list-type must be 2")
            continue
        if name in SUBRESOURCES and name not in row.accepts:
            raise _not_implemented(request.method, name)
        # A flag we have never heard of may be a subresource of tomorrow: reading the plain resource instead does no
        # harm, writing it would.
        if name and not value and ACTIONS[row.action].access > Access.READ and name not in row.accepts:
            raise _not_implemented(request.method, name)


def _not_implemented(method: str, name: str) -> S3Error:
    return S3Error("NotImplemented", f"{method} ?{name} is not implemented here", fields=[("Query", name)])

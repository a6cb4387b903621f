"""Errors as S3 clients know them: one table of codes, one map from the buffer's errors, one rendering.

In: an ``S3Error`` raised anywhere above, an ``IngestError`` from below, an ``HttpError`` from the connection, or a bug.
Out: status, headers and the XML document of https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html.
Every code the gateway sends is a row of CODES; nothing about the inside (paths, tracebacks) ever leaves in a message.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ingest import errors as ingest
from ingest.bucket_settings import BadSetting
from ingest.ports import KernelRefused
from s3api import xml
from s3api.http.message import HttpError

RETRY_AFTER_S = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Code:
    status: int
    message: str
    kind: str = "client"
    """Class of the error in ``hiss_http_errors_total``."""


CODES: dict[str, Code] = {
    "AccessDenied": Code(403, "Access Denied", "auth"),
    "AccessForbidden": Code(
        403,
        "CORSResponse: This CORS request is not allowed. This is usually because the evalution of Origin, request method"
        " / Access-Control-Request-Method or Access-Control-Request-Headers are not whitelisted by the resource's CORS"
        " spec.",
        "auth",
    ),
    "AccessControlListNotSupported": Code(400, "The bucket does not allow ACLs"),
    "AuthorizationHeaderMalformed": Code(400, "The authorization header that you provided is not valid", "auth"),
    "AuthorizationQueryParametersError": Code(400, "The authorization query parameters are not valid", "auth"),
    "BadDigest": Code(400, "The checksum or Content-MD5 you specified did not match what was received"),
    "BadRequest": Code(400, "Bad Request"),
    "BucketAlreadyExists": Code(409, "The requested bucket name is not available; another user owns it"),
    "BucketAlreadyOwnedByYou": Code(409, "Your previous request to create the named bucket succeeded and you own it"),
    "BucketNotEmpty": Code(409, "The bucket you tried to delete is not empty"),
    "ConditionalRequestConflict": Code(409, "The object changed while the request was being received", "precondition"),
    "EntityTooLarge": Code(400, "Your proposed upload exceeds the maximum allowed size"),
    "EntityTooSmall": Code(400, "A part other than the last is smaller than the minimum of 5 MiB"),
    "ExpiredToken": Code(400, "The provided token has expired", "auth"),
    "IllegalLocationConstraintException": Code(400, "The location constraint is not valid"),
    "IncompleteBody": Code(400, "You did not provide the number of bytes specified by the Content-Length header"),
    "InternalError": Code(500, "We encountered an internal error. Please try again.", "server"),
    "InvalidAccessKeyId": Code(403, "The access key id you provided does not exist in our records", "auth"),
    "InvalidArgument": Code(400, "Invalid Argument"),
    "IllegalVersioningConfigurationException": Code(
        400, "The versioning configuration specified in the request is invalid"
    ),
    "InvalidBucketState": Code(409, "The request is not valid with the current state of the bucket"),
    "InvalidBucketName": Code(400, "The specified bucket is not valid"),
    "InvalidDigest": Code(400, "The Content-MD5 you specified is not valid"),
    "InvalidKernel": Code(400, "The kernel was refused"),
    "InvalidObjectState": Code(403, "The object is on the archive tier only; restore it first"),
    "InvalidPart": Code(
        400, "One or more of the specified parts could not be found, or its entity tag or checksum does not match"
    ),
    "InvalidPartOrder": Code(400, "The list of parts was not in ascending order"),
    "InvalidPartNumber": Code(416, "The requested part number is not satisfiable"),
    "InvalidRetentionPeriod": Code(400, "The retention period specified is not valid"),
    "InvalidWriteOffset": Code(
        400, "The write offset value that you specified does not match the current object size"
    ),
    "InvalidRange": Code(416, "The requested range is not satisfiable"),
    "InvalidRequest": Code(400, "Invalid Request"),
    "InvalidStorageClass": Code(400, "The storage class you specified is not valid"),
    "InvalidTag": Code(400, "The tag provided was not a valid tag"),
    "InvalidToken": Code(400, "The provided token is malformed or otherwise not valid", "auth"),
    "InvalidURI": Code(400, "Couldn't parse the specified URI"),
    "KeyTooLongError": Code(400, "Your key is too long; the maximum is 1024 bytes"),
    "InvalidAction": Code(400, "The action or operation requested is not valid"),
    "InvalidPolicyDocument": Code(400, "The content of the form does not meet the conditions in the policy document"),
    "MalformedPOSTRequest": Code(400, "The body of your POST request is not well-formed multipart/form-data"),
    "MalformedPolicyDocument": Code(400, "The policy document is malformed"),
    "MaxPostPreDataLengthExceededError": Code(
        400, "Your POST request fields preceding the upload file were too large"
    ),
    "MissingAuthenticationToken": Code(403, "The request must contain a valid access key and a signature", "auth"),
    "PackedPolicyTooLarge": Code(400, "The session policy is too large"),
    "ValidationError": Code(400, "The input fails to satisfy the constraints"),
    "MalformedACLError": Code(400, "The ACL you provided was not well-formed or did not validate against our schema"),
    "MalformedPolicy": Code(400, "The policy is not in the valid JSON format"),
    "NoSuchBucketPolicy": Code(404, "The bucket policy does not exist", "not_found"),
    "NoSuchPublicAccessBlockConfiguration": Code(
        404, "The public access block configuration was not found", "not_found"
    ),
    "OwnershipControlsNotFoundError": Code(404, "The bucket ownership controls were not found", "not_found"),
    "InvalidBucketAclWithObjectOwnership": Code(
        400, "Bucket cannot have ACLs set with ObjectOwnership's BucketOwnerEnforced setting"
    ),
    "UnexpectedContent": Code(400, "This request does not support content"),
    "UnresolvableGrantByEmailAddress": Code(
        400, "The email address you provided does not match any account on record"
    ),
    "MalformedTrailerError": Code(400, "The request contained trailing data that was not well-formed"),
    "MalformedXML": Code(400, "The XML you provided was not well-formed or did not validate against our schema"),
    "MetadataTooLarge": Code(400, "Your metadata headers exceed the maximum allowed metadata size of 2048 bytes"),
    "MethodNotAllowed": Code(405, "The specified method is not allowed against this resource"),
    "MissingContentLength": Code(411, "You must provide the Content-Length HTTP header"),
    "MissingSecurityHeader": Code(400, "Your request is missing a required header", "auth"),
    "NoSuchBucket": Code(404, "The specified bucket does not exist", "not_found"),
    "NoSuchCORSConfiguration": Code(404, "The CORS configuration does not exist", "not_found"),
    "NoSuchConfiguration": Code(404, "The specified configuration does not exist", "not_found"),
    "NoSuchKey": Code(404, "The specified key does not exist", "not_found"),
    "NoSuchLifecycleConfiguration": Code(404, "The lifecycle configuration does not exist", "not_found"),
    "NoSuchTagSet": Code(404, "The TagSet does not exist", "not_found"),
    "NoSuchObjectLockConfiguration": Code(
        404, "The specified object does not have a ObjectLock configuration", "not_found"
    ),
    "ObjectLockConfigurationNotFoundError": Code(
        404, "Object Lock configuration does not exist for this bucket", "not_found"
    ),
    "TooManyParts": Code(400, "The object has as many pieces as it may have; copy it to make it one again"),
    "NoSuchUpload": Code(
        404,
        "The specified multipart upload does not exist; it may have been aborted or completed",
        "not_found",
    ),
    "NoSuchWebsiteConfiguration": Code(
        404, "The specified bucket does not have a website configuration", "not_found"
    ),
    "NoSuchVersion": Code(404, "The specified version does not exist", "not_found"),
    "NotImplemented": Code(501, "A header or query you provided implies functionality that is not implemented"),
    "OperationAborted": Code(409, "A conflicting operation is in progress against this resource; try again"),
    "PreconditionFailed": Code(
        412, "At least one of the preconditions you specified did not hold", "precondition"
    ),
    "ReplicationConfigurationNotFoundError": Code(404, "The replication configuration was not found", "not_found"),
    "RestoreAlreadyInProgress": Code(409, "Object restore is already in progress"),
    "RequestTimeTooSkewed": Code(
        403, "The difference between the request time and the server's time is too large", "auth"
    ),
    "ServerSideEncryptionConfigurationNotFoundError": Code(
        404, "The server side encryption configuration was not found", "not_found"
    ),
    "ServiceUnavailable": Code(503, "The service is not available at the moment; please retry", "slow_down"),
    "SignatureDoesNotMatch": Code(
        403,
        "The request signature we calculated does not match the signature you provided. Check your key and signing"
        " method.",
        "auth",
    ),
    "SlowDown": Code(503, "Please reduce your request rate", "slow_down"),
    "StreamStopped": Code(
        409, "A kernel said STOP: what had arrived is stored under this key, the rest was not wanted"
    ),
    "XAmzContentSHA256Mismatch": Code(
        400, "The provided 'x-amz-content-sha256' header does not match what was computed"
    ),
}  # fmt: skip


class S3Error(Exception):
    """Refuse the request with a code of CODES. ``fields`` become extra elements of the document."""

    def __init__(
        self,
        code: str,
        message: str = "",
        *,
        fields: Sequence[tuple[str, str]] = (),
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        row = CODES[code]
        super().__init__(f"{code}: {message or row.message}")
        self.code = code
        self.status = row.status
        self.kind = row.kind
        self.message = message or row.message
        self.fields = tuple(fields)
        self.headers = tuple(headers)
        self.close = False


# The buffer's errors, most derived first where one derives from another. BucketExists and PreconditionFailed also say
# something about the request, see ``translated``.
INGEST_CODES: dict[type[ingest.IngestError], str] = {
    ingest.NodeDraining: "SlowDown",
    ingest.BufferFull: "SlowDown",
    ingest.KernelsUnavailable: "ServiceUnavailable",
    ingest.StreamAborted: "ServiceUnavailable",
    ingest.StorageFailed: "InternalError",
    ingest.Unreadable: "ServiceUnavailable",
    ingest.DataLost: "InternalError",
    ingest.ObjectOffline: "SlowDown",
    ingest.NodeAway: "ServiceUnavailable",
    ingest.MirrorUnavailable: "ServiceUnavailable",
    ingest.MirrorMissing: "ServiceUnavailable",
    ingest.CatalogUnavailable: "ServiceUnavailable",
    ingest.NoSuchBucket: "NoSuchBucket",
    ingest.BucketExists: "BucketAlreadyExists",
    ingest.BucketNotEmpty: "BucketNotEmpty",
    ingest.RestoreInProgress: "RestoreAlreadyInProgress",
    ingest.BadDocument: "InvalidArgument",
    ingest.NoSuchKey: "NoSuchKey",
    ingest.NoSuchVersion: "NoSuchVersion",
    ingest.DeleteMarker: "MethodNotAllowed",
    ingest.VersionLocked: "AccessDenied",
    ingest.InvalidLock: "InvalidRequest",
    ingest.WrongOffset: "InvalidWriteOffset",
    ingest.CannotAppend: "InvalidRequest",
    ingest.TooManyAppends: "TooManyParts",
    ingest.BucketState: "InvalidBucketState",
    ingest.NoSuchUpload: "NoSuchUpload",
    ingest.InvalidPart: "InvalidPart",
    ingest.InvalidPartOrder: "InvalidPartOrder",
    ingest.EntityTooSmall: "EntityTooSmall",
    ingest.PreconditionFailed: "PreconditionFailed",
    ingest.MembersGone: "OperationAborted",
    ingest.StaleVersion: "OperationAborted",
    ingest.StaleEpoch: "ServiceUnavailable",
}

_MESSAGES: dict[type[ingest.IngestError], str] = {
    ingest.NodeDraining: "This node is being taken out of service; please send to another one",
    ingest.BufferFull: "The buffer is full until the archive has caught up; please retry",
    ingest.StorageFailed: "The bytes could not be stored durably; nothing was kept. Please try again.",
    ingest.Unreadable: "Stored bytes of this object cannot be read now; please retry",
    ingest.DataLost: "Stored bytes of this object cannot be read back; the operator has been told",
    ingest.VersionLocked: "Access Denied because object protected by object lock.",
    ingest.ObjectOffline: "The object is being recalled from the archive; please retry",
}


def translated(error: Exception, *, user_id: str = "") -> S3Error:
    """The S3 error for anything a handler may raise; a bug becomes InternalError without its text."""
    if isinstance(error, S3Error):
        return error
    if isinstance(error, ingest.IngestError):
        return _from_ingest(error, user_id)
    if isinstance(error, HttpError):
        return _from_http(error)
    if isinstance(error, KernelRefused):
        return S3Error("InvalidKernel", str(error))
    if isinstance(error, BadSetting):
        return S3Error("InvalidTag", str(error))
    if isinstance(error, xml.BadXml):
        return S3Error("MalformedXML", f"{CODES['MalformedXML'].message}: {error}")
    return S3Error("InternalError")


def _from_ingest(error: ingest.IngestError, user_id: str) -> S3Error:
    if isinstance(error, ingest.BucketExists) and error.owner == user_id:
        return S3Error("BucketAlreadyOwnedByYou")
    if isinstance(error, ingest.KernelsUnavailable | ingest.NodeAway | ingest.MirrorUnavailable):
        return S3Error(INGEST_CODES[type(error)], f"{error}. Please try again.")
    if isinstance(error, ingest.NotAdmitted):
        return S3Error("SlowDown", str(error), headers=[("retry-after", str(error.retry_after_s))])
    if isinstance(error, ingest.BufferFull) and str(error):
        return S3Error("SlowDown", f"{error}; please retry")
    if isinstance(error, ingest.PreconditionFailed):
        return S3Error("PreconditionFailed", fields=[("Condition", error.condition)])
    if isinstance(error, ingest.InvalidLock | ingest.BucketState | ingest.CannotAppend):
        return S3Error(INGEST_CODES[type(error)], str(error))
    if isinstance(error, ingest.WrongOffset):
        return S3Error("InvalidWriteOffset", fields=[("ObjectSize", str(error))])
    for kind in type(error).__mro__:
        if kind in INGEST_CODES:
            return S3Error(INGEST_CODES[kind], _MESSAGES.get(kind, ""))
    return S3Error("InternalError")


def _from_http(error: HttpError) -> S3Error:
    # The connection's codes are its own; one this table does not have keeps its status and text.
    refusal = S3Error(error.code if error.code in CODES else "BadRequest", error.message)
    refusal.code = error.code
    refusal.status = error.status
    refusal.close = error.close
    return refusal


def render(error: S3Error, *, resource: str, request_id: str, host_id: str) -> tuple[list[tuple[str, str]], bytes]:
    """Headers and XML document of an error answer."""
    headers = [("content-type", "application/xml"), *error.headers]
    if error.status == 503 and not any(name == "retry-after" for name, _ in error.headers):
        headers.append(("retry-after", str(RETRY_AFTER_S)))
    document = xml.document(
        "Error",
        [
            ("Code", error.code),
            ("Message", error.message),
            *error.fields,
            ("Resource", resource),
            ("RequestId", request_id),
            ("HostId", host_id),
        ],
        namespace="",
    )
    return headers, document

"""Signature Version 2, header and presigned: what boto3 and the aws cli still make for custom endpoints.

In: a request head, a user store. Out: ``Signed`` or an S3Error. The body is not part of this signature. HMAC-SHA1 is what the
version is; a node can refuse it (``allow-sigv2 = false``).
https://docs.aws.amazon.com/AmazonS3/latest/API/RESTAuthentication.html
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Iterable
from urllib.parse import unquote

from s3api import times
from s3api.auth.signed import Signed, body_form
from s3api.auth.sigv4 import check_skew, expired
from s3api.auth.users import UserStore, usable
from s3api.errors import S3Error
from s3api.http.message import Headers, Request

ACCESS_KEY_CHARS_MAX = 256

# Parameters that are part of the resource that is signed.
_SIGNED_ARGUMENTS = frozenset(
    {
        "accelerate", "acl", "analytics", "cors", "defaultObjectAcl", "delete", "inventory", "lifecycle", "location",
        "logging", "metrics", "notification", "object-lock", "partNumber", "policy", "replication", "requestPayment",
        "response-cache-control", "response-content-disposition", "response-content-encoding",
        "response-content-language", "response-content-type", "response-expires", "restore", "select", "select-type",
        "storageClass", "tagging", "torrent", "uploadId", "uploads", "versionId", "versioning", "versions", "website",
    }
)  # fmt: skip


# Says in which form a listing comes, and nothing else.
_HARMLESS = frozenset({"list-type"})


def refuse_unsigned(subresources: Iterable[str]) -> None:
    """``subresources``: what makes a request the operation it is. The version is older than some of them and does not sign
    those; who was given a URL could then turn it into another operation. Raises AccessDenied."""
    for name in subresources:
        if name not in _SIGNED_ARGUMENTS and name not in _HARMLESS:
            raise S3Error(
                "AccessDenied", f"?{name} is not part of a Signature Version 2; presign it with AWS4-HMAC-SHA256"
            )


def claims(request: Request) -> bool:
    """Does the request say that it is signed with this version?"""
    if request.headers.get("authorization").startswith("AWS "):
        return True
    return request.arg("AWSAccessKeyId") is not None and request.arg("Signature") is not None


class SigV2:
    def __init__(self, users: UserStore) -> None:
        self._users = users

    async def verify(self, request: Request, virtual_bucket: str, now_s: float) -> Signed:
        """``virtual_bucket``: where Host names the bucket, which the signed resource then begins with. Raises S3Error."""
        authorization = request.headers.get("authorization")
        presigned = not authorization
        if presigned:
            access_key, signature = request.arg("AWSAccessKeyId") or "", request.arg("Signature") or ""
            when = request.arg("Expires") or ""
            _check_expires(when, now_s)
            signed_s = None
        else:
            if request.arg("Signature") is not None:
                raise S3Error(
                    "InvalidArgument", "Only one auth mechanism allowed: a presigned URL or an Authorization header"
                )
            access_key, _, signature = authorization.removeprefix("AWS ").strip().rpartition(":")
            when = "" if "x-amz-date" in request.headers else request.headers.get("date")
            signed_s = _check_date(request, now_s)
        if not access_key or not signature or len(access_key) > ACCESS_KEY_CHARS_MAX:
            raise S3Error("InvalidArgument", "Authorization header is invalid -- one and only one ' ' (space) required")
        token = request.headers.get("x-amz-security-token") or request.arg("x-amz-security-token") or ""
        credentials = await usable(self._users, access_key, token, now_s)
        text = string_to_sign(request, when, virtual_bucket, presigned=presigned)
        claimed = signature.encode("utf-8", "replace")
        if not any(
            hmac.compare_digest(sign(credentials.secret_key, form).encode("ascii"), claimed)
            for form in (text, *_with_slash(request, when, virtual_bucket, presigned=presigned))
        ):
            raise S3Error(
                "SignatureDoesNotMatch",
                fields=[
                    ("AWSAccessKeyId", access_key),
                    ("StringToSign", text),
                    ("SignatureProvided", signature[:128]),
                ],
            )
        if not credentials.user.enabled:
            raise S3Error("AccessDenied", "This user is disabled")
        payload, sha256 = body_form(request)
        return Signed(credentials, payload, sha256, "", "", "", b"", presigned=presigned, sigv2=True, signed_s=signed_s)


def sign(secret: str, text: str) -> str:
    return base64.b64encode(hmac.digest(secret.encode("utf-8"), text.encode("latin-1", "replace"), "sha1")).decode()


def string_to_sign(request: Request, when: str, virtual_bucket: str, *, presigned: bool, slash: str = "") -> str:
    """``when``: the Date field (empty where x-amz-date stands for it), or Expires of a presigned URL."""
    headers = request.headers

    def field(name: str) -> str:
        # A presigned URL carries in its query what was signed as a header.
        return headers.get(name) or ((request.arg(name) or "") if presigned else "")

    amz = {name: value for name, value in headers.items() if name.startswith("x-amz-")}
    if presigned:
        said = [(name.lower(), value) for name, value in request.query if name.lower().startswith("x-amz-")]
        amz = dict(Headers(said).items()) | amz
    lines = [request.method, field("content-md5").strip(), field("content-type").strip(), when]
    lines += [f"{name}:{amz[name].strip()}" for name in sorted(amz)]
    return "\n".join((*lines, _resource(request, virtual_bucket, slash)))


def _with_slash(request: Request, when: str, virtual_bucket: str, *, presigned: bool) -> list[str]:
    """boto3 signs ``/bucket/`` where it asks for ``/bucket``; other clients sign what they send."""
    if virtual_bucket or request.path.count("/") != 1 or len(request.path) == 1:
        return []
    return [string_to_sign(request, when, "", presigned=presigned, slash="/")]


def _resource(request: Request, virtual_bucket: str, slash: str) -> str:
    path = f"/{virtual_bucket}{request.path}" if virtual_bucket else request.path + slash
    _, _, query = request.target.partition("?")
    signed = []
    for piece in query.split("&"):
        name, equals, value = piece.partition("=")
        # As the routes will read it: a name that is percent-encoded names the same subresource.
        name = unquote(name.replace("+", " "))
        if name in _SIGNED_ARGUMENTS:
            signed.append((name, f"{name}={unquote(value)}" if equals else name))
    signed.sort(key=lambda pair: pair[0])
    return path + ("?" + "&".join(text for _, text in signed) if signed else "")


def _check_date(request: Request, now_s: float) -> int:
    text = request.headers.get("x-amz-date" if "x-amz-date" in request.headers else "date")  # the one that is signed
    signed_s = times.parse_http_date(text)
    if signed_s is None:
        iso = times.parse_iso_s(text)
        if iso is None:
            raise S3Error("AccessDenied", "AWS authentication requires a valid Date or x-amz-date header")
        signed_s = int(iso)
    if signed_s < 0:
        raise S3Error("AccessDenied", "AWS authentication requires a valid Date or x-amz-date header")
    check_skew(text, signed_s, now_s)
    return signed_s


def _check_expires(text: str, now_s: float) -> None:
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise S3Error("AccessDenied", "Invalid date (should be seconds since epoch): " + text[:32])
    if now_s > int(text):
        raise expired(text, int(text), now_s)

"""PostObject: a browser's form uploads a file. https://docs.aws.amazon.com/AmazonS3/latest/API/RESTObjectPOST.html

The form's fields stand in for the header of a PutObject, its policy for the header's signature; the file is then received and
committed exactly as a PutObject's body is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import SplitResult, quote, urlencode, urlsplit, urlunsplit

from s3api import xml
from s3api.auth import form_signature, post_policy
from s3api.auth.engine import Question
from s3api.call import Call
from s3api.errors import S3Error
from s3api.form import FormBody, boundary_of
from s3api.http.message import Headers, Response
from s3api.operations import kernels
from s3api.operations.objects import put_object
from s3api.operations.ownership import prepare_write
from s3api.operations.tagging import parsed

_AS_HEADERS = {
    "acl": "x-amz-acl",
    "content-type": "content-type",
    "cache-control": "cache-control",
    "content-disposition": "content-disposition",
    "content-encoding": "content-encoding",
    "expires": "expires",
    "content-md5": "content-md5",
}
_HEADER_FIELDS = (
    "x-amz-meta-", "x-amz-checksum-", "x-amz-sdk-checksum-algorithm", "x-amz-storage-class", "x-amz-grant-",
    "x-amz-server-side-encryption", "x-amz-object-lock-", "x-amz-website-redirect-location",
)  # fmt: skip
_TAGS_MAX = 10
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")
"""Names of header fields (RFC 9110 section 5.6.2), in lower case."""
_URL_CHARACTERS = "%/:?#[]@!$&'()*+,;=~-._"


async def post_object(call: Call) -> Response:
    """Verifies and authorises itself: the signature is in the form."""
    request = call.request
    boundary = boundary_of(request.headers.get("content-type"))
    if boundary is None:
        raise S3Error(
            "PreconditionFailed",
            "Bucket POST must be of the enclosure-type multipart/form-data",
            fields=[("Condition", "Bucket POST must be of the enclosure-type multipart/form-data")],
        )
    form = FormBody(request.body, boundary)
    try:
        fields = await form.fields()
        await _admit(call, form, fields)
        request.body = form
        stored = await put_object(call)
    finally:
        await form.close()
    return _answer(call, fields, stored)


async def _admit(call: Call, form: FormBody, fields: dict[str, str]) -> None:
    """Everything that is decided before the file: who, what, whether."""
    now_s = call.node.wall_s()
    key = fields.get("key", "").replace("${filename}", fields.get("filename", ""))
    if not key:
        raise S3Error(
            "InvalidArgument",
            "Bucket POST must contain a field named 'key'.  If it is specified, please check the order of the fields.",
            fields=[("ArgumentName", "key")],
        )
    call.key = key.encode()
    if len(call.key) > call.limits.key_bytes:
        raise S3Error("KeyTooLongError", fields=[("Size", str(len(call.key))), ("MaxSizeAllowed", "1024")])
    call.signed = await form_signature.verify(fields, call.node.users, call.node.authenticator, now_s)
    call.request.scope["user"] = call.user.user_id
    if fields.get("policy"):
        spoken = {**fields, "bucket": call.bucket_name, "key": key}
        form.least_bytes, form.most_bytes = post_policy.check(fields["policy"], spoken, now_s)
    elif fields.get("bucket", call.bucket_name) != call.bucket_name:
        raise S3Error("AccessDenied", "The form is for another bucket")
    headers = _headers(fields)
    call.request.headers = Headers((*_kept(call.request.headers), *headers.items()))
    verdict = await call.verdict(Question("s3:PutObject", call.bucket_name, call.key), form=headers)
    if not verdict.allowed:
        await call.refuse(call.bucket_name)
    kernels.refuse_reserved(call.key)
    await call.bucket()
    await prepare_write(call, call.request.headers)


def _headers(fields: Mapping[str, str]) -> dict[str, str]:
    """The header of a PutObject that the fields stand for."""
    headers = {header: fields[name] for name, header in _AS_HEADERS.items() if fields.get(name)}
    headers |= {name: value for name, value in fields.items() if name.startswith(_HEADER_FIELDS)}
    if "content-type" not in headers and fields.get("file-content-type"):
        headers["content-type"] = fields["file-content-type"]
    if fields.get("tagging"):
        tags = parsed(xml.parse(fields["tagging"].encode(), "Tagging"), _TAGS_MAX)
        headers["x-amz-tagging"] = urlencode(tags, quote_via=quote)
    for name, value in headers.items():
        if not _TOKEN.fullmatch(name):
            raise S3Error("InvalidArgument", "A field stands for a header and its name cannot be one's")
        if any(ord(char) < 0x20 or ord(char) == 0x7F for char in value):
            raise S3Error("InvalidArgument", f"The field {name} holds control characters")
    # Header values are octets as they came, like those of a request.
    return {name: value.encode("utf-8").decode("latin-1") for name, value in headers.items()}


def _kept(headers: Headers) -> list[tuple[str, str]]:
    """Of the POST's own header: what is about the connection and not about the object."""
    return [
        (name, value)
        for name, value in headers.fields
        if name in ("host", "content-length", "transfer-encoding", "origin", "referer", "user-agent")
    ]


def _answer(call: Call, fields: Mapping[str, str], stored: Response) -> Response:
    etag = dict(stored.headers)["etag"]
    scheme = "https" if call.request.secure else "http"
    path = call.request.path.rstrip("/") + "/" + quote(call.key)
    location = f"{scheme}://{call.request.headers.get('host')}{path}"
    headers = [*stored.headers, ("location", location)]
    redirect = _redirect(fields.get("success_action_redirect") or fields.get("redirect") or "")
    if redirect is not None:
        told = urlencode({"bucket": call.bucket_name, "key": call.key.decode(), "etag": etag})
        query = f"{redirect.query}&{told}" if redirect.query else told
        return Response(303, [*stored.headers, ("location", urlunsplit(redirect._replace(query=query, fragment="")))])
    status = fields.get("success_action_status")
    if status == "201":
        document: list[tuple[str, xml.Value]] = [
            ("Location", location),
            ("Bucket", call.bucket_name),
            ("Key", call.key.decode()),
            ("ETag", etag),
        ]
        body = xml.document("PostResponse", document, namespace="")
        return Response(201, [*headers, ("content-type", "application/xml")], body)
    return Response(200 if status == "200" else 204, headers)


def _redirect(field: str) -> SplitResult | None:
    """Where the browser goes, in characters that a header takes; None for what is no URL: then S3 does as if it was not there."""
    try:
        parts = urlsplit(quote(field, safe=_URL_CHARACTERS))
    except ValueError:
        return None
    return parts if parts.scheme in ("http", "https") and parts.netloc else None

"""Temporary keys for instruments: the part of STS that boto3's and the cli's ``sts`` clients need, on the S3 port.

GetSessionToken, GetCallerIdentity, and AssumeRole of one's own role (``arn:aws:iam::000000000000:role/USER``), which is how a
user hands out keys that may do less than the user (``Policy``). The signature is SigV4 of the service ``sts`` over the form in
the body, so the operation reads and verifies it itself.
https://docs.aws.amazon.com/STS/latest/APIReference/API_GetSessionToken.html
"""

from __future__ import annotations

import hashlib
import time
from urllib.parse import parse_qsl

from s3api import xml
from s3api.auth.policy.language import MalformedPolicy, parse
from s3api.auth.policy.principals import ACCOUNT_ID, user_arn
from s3api.auth.signed import Signed
from s3api.auth.users import NOBODY
from s3api.call import Call
from s3api.errors import S3Error
from s3api.http.message import Response

NAMESPACE = "https://sts.amazonaws.com/doc/2011-06-15/"
VERSION = "2011-06-15"
BODY_BYTES_MAX = 64 * 1024
POLICY_CHARS_MAX = 2048
SECONDS_MIN = 900
TOKEN_SECONDS_MAX, TOKEN_SECONDS = 129_600, 43_200
ROLE_SECONDS_MAX, ROLE_SECONDS = 43_200, 3600

Form = dict[str, str]


async def sts(call: Call) -> Response:
    """Never raises S3Error: clients of STS read another form of error document."""
    try:
        form, signed = await _verified(call)
        call.request.scope["user"] = signed.credentials.user.user_id
        action = form.get("Action", "")
        if form.get("Version") != VERSION or action not in _ACTIONS:
            raise S3Error("InvalidAction", f"Could not find operation {action[:64]} for version {VERSION}")
        name, result = _ACTIONS[action](call, form, signed)
    except S3Error as error:
        call.request.scope["error_class"], call.request.scope["error_code"] = error.kind, error.code
        details: list[tuple[str, xml.Value]] = [("Type", "Sender"), ("Code", error.code), ("Message", error.message)]
        return _document("ErrorResponse", [("Error", details), ("RequestId", call.request.request_id)], error.status)
    metadata: list[tuple[str, xml.Value]] = [("RequestId", call.request.request_id)]
    return _document(f"{name}Response", [(f"{name}Result", result), ("ResponseMetadata", metadata)], 200)


def _document(name: str, children: list[tuple[str, xml.Value]], status: int) -> Response:
    return Response(status, [("content-type", "text/xml")], xml.document(name, children, namespace=NAMESPACE))


async def _verified(call: Call) -> tuple[Form, Signed]:
    body = await call.request.body.read(BODY_BYTES_MAX)
    if not call.request.headers.get("authorization"):
        raise S3Error("MissingAuthenticationToken")
    digest = hashlib.sha256(body).hexdigest()
    now_s = call.node.wall_s()
    signed = await call.node.authenticator.sigv4.verify(call.request, now_s, service="sts", payload_hash=digest)
    try:
        form = dict(parse_qsl(body.decode("utf-8"), keep_blank_values=True, max_num_fields=100))
    except ValueError:
        raise S3Error("InvalidRequest", "The body is no form") from None
    assert signed.credentials is not NOBODY
    return form, signed


def _session(
    call: Call, signed: Signed, form: Form, *, default_s: int, most_s: int, policy: str = "", name: str = ""
) -> list[tuple[str, xml.Value]]:
    if signed.credentials.session is not None:
        raise S3Error("AccessDenied", "Cannot call this with temporary keys")
    text = form.get("DurationSeconds", str(default_s))
    seconds = int(text) if text.isascii() and text.isdigit() and len(text) <= 9 else 0
    if not SECONDS_MIN <= seconds <= most_s:
        raise S3Error("ValidationError", f"DurationSeconds must be a number from {SECONDS_MIN} to {most_s}")
    sealer = call.node.users.sealer
    if sealer is None:
        raise S3Error("NotImplemented", "This node makes no temporary keys")
    expires_s = int(call.node.wall_s()) + seconds
    credentials = signed.credentials
    access_key, secret_key, token = sealer.new(
        credentials.user.user_id, credentials.access_key, expires_s, policy, name
    )
    return [
        ("AccessKeyId", access_key),
        ("SecretAccessKey", secret_key),
        ("SessionToken", token),
        ("Expiration", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(expires_s))),
    ]


def _get_session_token(call: Call, form: Form, signed: Signed) -> tuple[str, list[tuple[str, xml.Value]]]:
    if form.get("SerialNumber") or form.get("TokenCode"):
        raise S3Error("NotImplemented", "Multi-factor authentication is not implemented")
    made = _session(call, signed, form, default_s=TOKEN_SECONDS, most_s=TOKEN_SECONDS_MAX)
    return "GetSessionToken", [("Credentials", made)]


def _assume_role(call: Call, form: Form, signed: Signed) -> tuple[str, list[tuple[str, xml.Value]]]:
    user_id, role = signed.credentials.user.user_id, form.get("RoleArn", "")
    name = form.get("RoleSessionName", "")
    if role not in (f"arn:aws:iam::{ACCOUNT_ID}:role/{user_id}", f"arn:aws:iam:::role/{user_id}"):
        message = f"User: {user_arn(user_id)} is not authorized to perform: sts:AssumeRole on resource: {role[:256]}"
        raise S3Error("AccessDenied", message)
    if not 2 <= len(name) <= 64:
        raise S3Error("ValidationError", "RoleSessionName must have from 2 to 64 characters")
    policy = form.get("Policy", "")
    if policy:
        if len(policy) > POLICY_CHARS_MAX:
            raise S3Error("PackedPolicyTooLarge", f"A session policy has at most {POLICY_CHARS_MAX} characters")
        try:
            parse(policy)
        except MalformedPolicy as error:
            raise S3Error("MalformedPolicyDocument", str(error)) from None
    made = _session(call, signed, form, default_s=ROLE_SECONDS, most_s=ROLE_SECONDS_MAX, policy=policy, name=name)
    who: list[tuple[str, xml.Value]] = [
        ("AssumedRoleId", f"{user_id}:{name}"),
        ("Arn", f"arn:aws:sts::{ACCOUNT_ID}:assumed-role/{user_id}/{name}"),
    ]
    return "AssumeRole", [("Credentials", made), ("AssumedRoleUser", who)]


def _get_caller_identity(call: Call, form: Form, signed: Signed) -> tuple[str, list[tuple[str, xml.Value]]]:
    user = signed.credentials.user
    arn = f"arn:aws:iam::{ACCOUNT_ID}:root" if user.root else user_arn(user.user_id)
    return "GetCallerIdentity", [("Arn", arn), ("UserId", user.user_id), ("Account", ACCOUNT_ID)]


_ACTIONS = {
    "GetSessionToken": _get_session_token,
    "AssumeRole": _assume_role,
    "GetCallerIdentity": _get_caller_identity,
}

"""Who signed a browser's form: Signature Version 4 or 2 over its policy, or nobody.

In: the form's fields. Out: ``Signed``, or an S3Error. https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-post-example.html
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from s3api.auth.authenticate import SIGV2_REFUSED, Authenticator
from s3api.auth.signed import Payload, Signed
from s3api.auth.sigv2 import sign as sign_v2
from s3api.auth.sigv4 import ALGORITHM, credential_of, signing_key, timestamp_s
from s3api.auth.users import NOBODY, Credentials, UserStore, usable
from s3api.errors import S3Error


async def verify(fields: Mapping[str, str], users: UserStore, authenticator: Authenticator, now_s: float) -> Signed:
    """Raises InvalidArgument where fields are missing, InvalidAccessKeyId, SignatureDoesNotMatch, AccessDenied."""
    policy = fields.get("policy", "")
    version4 = any(name in fields for name in ("x-amz-algorithm", "x-amz-signature", "x-amz-credential"))
    version2 = "awsaccesskeyid" in fields or "signature" in fields
    if not version4 and not version2:
        if policy:
            raise _missing("AWSAccessKeyId")
        return _signed(NOBODY)
    if not policy:
        raise _missing("policy")
    if version4:
        return await _version4(fields, policy, users, authenticator, now_s)
    if not authenticator.allow_sigv2:
        raise S3Error("InvalidRequest", SIGV2_REFUSED)
    access_key, signature = _field(fields, "awsaccesskeyid"), _field(fields, "signature")
    credentials = await usable(users, access_key, fields.get("x-amz-security-token", ""), now_s)
    _compare(sign_v2(credentials.secret_key, policy), signature, access_key, policy)
    return _enabled(credentials, sigv2=True)


async def _version4(
    fields: Mapping[str, str], policy: str, users: UserStore, authenticator: Authenticator, now_s: float
) -> Signed:
    if _field(fields, "x-amz-algorithm") != ALGORITHM:
        raise S3Error("InvalidArgument", f"X-Amz-Algorithm only supports {ALGORITHM}")
    access_key, date, region = credential_of(_field(fields, "x-amz-credential"), presigned=True)
    timestamp = _field(fields, "x-amz-date")
    if timestamp_s(timestamp) is None or timestamp[:8] != date:
        raise S3Error("InvalidArgument", "X-Amz-Date must be in the ISO8601 Long Format and of the credential's day")
    authenticator.sigv4.check_region(region, presigned=True)
    signature = _field(fields, "x-amz-signature")
    credentials = await usable(users, access_key, fields.get("x-amz-security-token", ""), now_s)
    key = signing_key(credentials.secret_key, date, region)
    _compare(hmac.digest(key, policy.encode("utf-8"), "sha256").hex(), signature, access_key, policy)
    return _enabled(credentials)


def _compare(expected: str, signature: str, access_key: str, policy: str) -> None:
    if not hmac.compare_digest(expected.encode("ascii"), signature.encode("utf-8", "replace")):
        fields = [("AWSAccessKeyId", access_key), ("StringToSign", policy), ("SignatureProvided", signature[:128])]
        raise S3Error("SignatureDoesNotMatch", fields=fields)


def _enabled(credentials: Credentials, *, sigv2: bool = False) -> Signed:
    if not credentials.user.enabled:
        raise S3Error("AccessDenied", "This user is disabled")
    return _signed(credentials, sigv2=sigv2)


def _signed(credentials: Credentials, *, sigv2: bool = False) -> Signed:
    return Signed(credentials, Payload.UNSIGNED, "", "", "", "", b"", sigv2=sigv2)


def _field(fields: Mapping[str, str], name: str) -> str:
    found = fields.get(name, "")
    if not found:
        raise _missing(name)
    return found


def _missing(name: str) -> S3Error:
    return S3Error(
        "InvalidArgument", f"Bucket POST must contain a field named '{name}'", fields=[("ArgumentName", name)]
    )

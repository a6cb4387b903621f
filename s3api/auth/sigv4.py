"""AWS Signature Version 4: is this request what the holder of the secret key signed?

In: a request head and a user store. Out: ``Signed`` (who, and how the body is protected) or an S3Error from the table.
Both forms are verified, Authorization header and presigned URL.
https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-authenticating-requests.html
A scope that names another region is refused with the right one, which SDKs then use; a node may be told to take any.
"""

from __future__ import annotations

import calendar
import dataclasses
import functools
import hashlib
import hmac
import time
from collections.abc import Sequence

from s3api.auth.canonical import canonical_query, canonical_request
from s3api.auth.signed import UNSIGNED_PAYLOAD, Signed, payload_of
from s3api.auth.users import UserStore, usable
from s3api.errors import S3Error
from s3api.http.message import Request

ALGORITHM = "AWS4-HMAC-SHA256"
SKEW_MAX_S = 15 * 60
EXPIRES_MAX_S = 7 * 86400
CREDENTIAL_MAX_CHARS = 512
SIGNED_HEADERS_MAX = 128
CACHED_KEYS_MAX = 4096

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()


@dataclasses.dataclass(frozen=True, slots=True)
class _Claim:
    """What the request says about its signature, not yet believed."""

    access_key: str
    date: str
    region: str
    signed_headers: tuple[str, ...]
    signature: str
    timestamp: str
    payload_hash: str
    presigned: bool
    token: str = ""
    service: str = "s3"

    @property
    def scope(self) -> str:
        return f"{self.date}/{self.region}/{self.service}/aws4_request"


class SigV4:
    """Verifies requests; keeps derived signing keys, which are good for a day. ``region``: the only one taken; empty: any."""

    def __init__(self, users: UserStore, region: str = "") -> None:
        self._users = users
        self._region = region
        self._keys: dict[tuple[str, str, str, str], bytes] = {}

    async def verify(self, request: Request, now_s: float, *, service: str = "s3", payload_hash: str = "") -> Signed:
        """``service`` other than S3: ``payload_hash`` is that of the body, which has been read. Raises S3Error with AWS's codes;
        see the table."""
        claim = _claimed(request, service, payload_hash)
        _check_time(claim, request, now_s)
        self.check_region(claim.region, presigned=claim.presigned)
        _check_all_signed(claim, request)
        payload, sha256 = payload_of(claim.payload_hash)
        credentials = await usable(self._users, claim.access_key, claim.token, now_s)
        if claim.timestamp[:8] != claim.date:
            raise _malformed(claim.presigned, "the date in the credential scope does not match x-amz-date")
        key = self._signing_key(credentials.secret_key, claim.date, claim.region, service)
        _check_signature(claim, request, key)
        if not credentials.user.enabled:
            raise S3Error("AccessDenied", "This user is disabled")
        return Signed(
            credentials,
            payload,
            sha256,
            claim.timestamp,
            claim.scope,
            claim.signature,
            key,
            presigned=claim.presigned,
            signed_s=timestamp_s(claim.timestamp),
        )

    def check_region(self, region: str, *, presigned: bool) -> None:
        """Raises AuthorizationHeaderMalformed (or its kin of the query) with the right region."""
        if self._region and region != self._region:
            text = f"the region '{region[:64]}' is wrong; expecting '{self._region}'"
            raise _malformed(presigned, text, [("Region", self._region)])

    def _signing_key(self, secret: str, date: str, region: str, service: str) -> bytes:
        # The secret itself is part of the cache's key: a changed secret can never verify with an old derivation.
        cached = self._keys.get((secret, date, region, service))
        if cached is None:
            if len(self._keys) >= CACHED_KEYS_MAX:
                self._keys.clear()
            cached = self._keys[secret, date, region, service] = signing_key(secret, date, region, service)
        return cached


def signing_key(secret: str, date: str, region: str, service: str = "s3") -> bytes:
    """The key derived for one day, region and service."""
    key = ("AWS4" + secret).encode("utf-8")
    for step in (date, region, service, "aws4_request"):
        key = hmac.digest(key, step.encode("utf-8"), "sha256")
    return key


def claims(request: Request) -> bool:
    """Does the request say that it is signed with this version?"""
    return request.headers.get("authorization").startswith(ALGORITHM) or any(
        request.arg(name) is not None for name in ("X-Amz-Algorithm", "X-Amz-Signature")
    )


def _claimed(request: Request, service: str, payload_hash: str) -> _Claim:
    authorization = request.headers.get("authorization")
    if authorization.startswith(ALGORITHM):
        return _from_header(authorization[len(ALGORITHM) :], request, service, payload_hash)
    if authorization:
        raise S3Error("InvalidArgument", "Only one auth mechanism allowed: a presigned URL or an Authorization header")
    return _from_query(request, service)


def _from_header(fields_text: str, request: Request, service: str, payload_hash: str) -> _Claim:
    fields: dict[str, str] = {}
    for field in fields_text.split(","):
        name, _, value = field.strip().partition("=")
        fields[name] = value
    missing = [name for name in ("Credential", "SignedHeaders", "Signature") if not fields.get(name)]
    if missing:
        raise _malformed(False, f"{missing[0]} is missing")
    access_key, date, region = credential_of(fields["Credential"], presigned=False, service=service)
    timestamp = request.headers.get("x-amz-date") or _basic_date(request.headers.get("date"))
    payload_hash = payload_hash or request.headers.get("x-amz-content-sha256") or _hash_of_no_body(request)
    return _Claim(
        access_key,
        date,
        region,
        _signed_headers(fields["SignedHeaders"], presigned=False),
        fields["Signature"],
        timestamp,
        payload_hash,
        presigned=False,
        token=request.headers.get("x-amz-security-token"),
        service=service,
    )


def _hash_of_no_body(request: Request) -> str:
    """Older curl leaves x-amz-content-sha256 out and signs the hash of nothing, which is right where there is no body."""
    if request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers:
        raise S3Error(
            "InvalidRequest",
            "Missing required header for this request: x-amz-content-sha256"
            " (with curl: -H 'x-amz-content-sha256: UNSIGNED-PAYLOAD')",
        )
    return EMPTY_SHA256


def _from_query(request: Request, service: str) -> _Claim:
    if request.arg("X-Amz-Algorithm") != ALGORITHM:
        raise _malformed(True, f'X-Amz-Algorithm only supports "{ALGORITHM}"')
    values = []
    for name in ("X-Amz-Credential", "X-Amz-SignedHeaders", "X-Amz-Signature", "X-Amz-Date", "X-Amz-Expires"):
        value = request.arg(name)
        if not value:
            raise _malformed(True, f"{name} is missing")
        values.append(value)
    credential, signed_headers, signature, timestamp, _ = values
    access_key, date, region = credential_of(credential, presigned=True, service=service)
    # The JS SDK hoists the header into the query; curl and browsers send neither, which means unsigned.
    payload_hash = (
        request.arg("X-Amz-Content-Sha256") or request.headers.get("x-amz-content-sha256") or UNSIGNED_PAYLOAD
    )
    return _Claim(
        access_key,
        date,
        region,
        _signed_headers(signed_headers, presigned=True),
        signature,
        timestamp,
        payload_hash,
        presigned=True,
        token=request.arg("X-Amz-Security-Token") or request.headers.get("x-amz-security-token"),
    )


def _malformed(presigned: bool, reason: str, fields: Sequence[tuple[str, str]] = ()) -> S3Error:
    code = "AuthorizationQueryParametersError" if presigned else "AuthorizationHeaderMalformed"
    what = "query parameters" if presigned else "header"
    return S3Error(code, f"The authorization {what} is malformed; {reason}.", fields=fields)


@functools.lru_cache(maxsize=256)
def credential_of(text: str, *, presigned: bool, service: str = "s3") -> tuple[str, str, str]:
    if len(text) > CREDENTIAL_MAX_CHARS:
        raise _malformed(presigned, "the Credential is too long")
    # An access key may itself contain slashes, so read the scope from the right.
    pieces = text.rsplit("/", 4)
    if len(pieces) != 5 or not pieces[0]:
        raise _malformed(presigned, f'the Credential must be "<access key>/YYYYMMDD/REGION/{service}/aws4_request"')
    access_key, date, region, named, terminator = pieces
    if named != service:
        raise _malformed(presigned, f'incorrect service "{named}"; this endpoint belongs to "{service}"')
    if terminator != "aws4_request":
        raise _malformed(presigned, f'incorrect terminal "{terminator}"; use "aws4_request"')
    if len(date) != 8 or not (date.isdigit() and date.isascii()):
        raise _malformed(presigned, f'invalid credential date "{date}"; it must be YYYYMMDD')
    return access_key, date, region


@functools.lru_cache(maxsize=256)
def _signed_headers(text: str, *, presigned: bool) -> tuple[str, ...]:
    names = tuple(text.split(";"))
    if len(names) > SIGNED_HEADERS_MAX:
        raise _malformed(presigned, "too many SignedHeaders")
    if "host" not in names:
        raise _malformed(presigned, "the host header must be signed")
    return tuple(sorted(names))


def _basic_date(http_date: str) -> str:
    """``x-amz-date`` form of a Date header, which signs in its stead when a client cannot set the former."""
    try:
        parsed = time.strptime(http_date, "%a, %d %b %Y %H:%M:%S GMT")
    except ValueError:
        return http_date
    return time.strftime("%Y%m%dT%H%M%SZ", parsed)


@functools.lru_cache(maxsize=64)
def timestamp_s(timestamp: str) -> int | None:
    """Seconds since the epoch of ``YYYYMMDDTHHMMSSZ``; None when it is not one."""
    digits = timestamp[:8] + timestamp[9:15]
    if (
        len(timestamp) != 16
        or timestamp[8] != "T"
        or timestamp[15] != "Z"
        or not (digits.isascii() and digits.isdigit())
    ):
        return None
    year, month, day = int(digits[:4]), int(digits[4:6]), int(digits[6:8])
    hour, minute, second = int(digits[8:10]), int(digits[10:12]), int(digits[12:])
    if not (year >= 1970 and 1 <= month <= 12 and 1 <= day <= 31 and hour < 24 and minute < 60 and second < 61):
        return None
    return calendar.timegm((year, month, day, hour, minute, second))


def _check_time(claim: _Claim, request: Request, now_s: float) -> None:
    signed_s = timestamp_s(claim.timestamp)
    if signed_s is None:
        if claim.presigned:
            raise _malformed(True, "X-Amz-Date must be in the ISO8601 Long Format \"yyyyMMdd'T'HHmmss'Z'\"")
        raise S3Error("AccessDenied", "AWS authentication requires a valid Date or x-amz-date header")
    if claim.presigned:
        _check_expiry(request.arg("X-Amz-Expires") or "", signed_s, now_s)
    else:
        check_skew(claim.timestamp, signed_s, now_s)


def check_skew(timestamp: str, signed_s: int, now_s: float) -> None:
    """Raises RequestTimeTooSkewed for a request signed too long ago, or ahead of time."""
    if abs(now_s - signed_s) > SKEW_MAX_S:
        raise S3Error(
            "RequestTimeTooSkewed",
            fields=[
                ("RequestTime", timestamp),
                ("ServerTime", _iso(now_s)),
                ("MaxAllowedSkewMilliseconds", str(SKEW_MAX_S * 1000)),
            ],
        )


def _check_expiry(text: str, signed_s: int, now_s: float) -> None:
    expires_s = int(text) if text.isascii() and text.isdigit() and len(text) <= 9 else -1
    if not 1 <= expires_s <= EXPIRES_MAX_S:
        raise _malformed(True, f"X-Amz-Expires must be a whole number of seconds from 1 to {EXPIRES_MAX_S}")
    if signed_s - now_s > SKEW_MAX_S:
        raise S3Error("AccessDenied", "Request is not yet valid", fields=[("ServerTime", _iso(now_s))])
    if now_s > signed_s + expires_s:
        raise expired(text, signed_s + expires_s, now_s)


def expired(text: str, expires_s: int, now_s: float) -> S3Error:
    """A presigned URL that was good until ``expires_s``; ``text``: how it says that."""
    fields = [("X-Amz-Expires", text), ("Expires", _iso(expires_s)), ("ServerTime", _iso(now_s))]
    return S3Error("AccessDenied", "Request has expired", fields=fields)


def _iso(time_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_s))


def _check_all_signed(claim: _Claim, request: Request) -> None:
    # An x-amz header that is not signed could have been added on the way: S3 refuses it, and so do we.
    signed = claim.signed_headers
    unsigned = [name for name, _ in request.headers.fields if name.startswith("x-amz-") and name not in signed]
    if unsigned:
        raise S3Error(
            "AccessDenied",
            "There were headers present in the request which were not signed",
            fields=[("HeadersNotSigned", ", ".join(unsigned))],
        )


def _check_signature(claim: _Claim, request: Request, key: bytes) -> None:
    path, _, raw_query = request.target.partition("?")
    query = canonical_query(raw_query, without="X-Amz-Signature" if claim.presigned else "")
    canonical = canonical_request(
        request.method, path, query, request.headers, claim.signed_headers, claim.payload_hash
    )
    digest = hashlib.sha256(canonical.encode("latin-1")).hexdigest()
    string_to_sign = f"{ALGORITHM}\n{claim.timestamp}\n{claim.scope}\n{digest}"
    expected = hmac.digest(key, string_to_sign.encode("latin-1", "replace"), "sha256").hex()
    if not hmac.compare_digest(expected.encode("ascii"), claim.signature.encode("latin-1", "replace")):
        # What we signed, as AWS answers it: with this a client's author finds the difference in a minute.
        raise S3Error(
            "SignatureDoesNotMatch",
            fields=[
                ("AWSAccessKeyId", claim.access_key),
                ("StringToSign", string_to_sign),
                ("SignatureProvided", claim.signature[:128]),
                ("CanonicalRequest", canonical),
            ],
        )

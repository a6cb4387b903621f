"""Signature V4: what botocore signs must verify, what anybody changes must not."""

from __future__ import annotations

import calendar
import datetime
import hashlib
import hmac
import string
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import pytest
from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotoCredentials
from hypothesis import given
from hypothesis import strategies as st

from ingest.records import UserRecord
from s3api.auth.authenticate import Authenticator
from s3api.auth.canonical import canonical_query, canonical_request
from s3api.auth.chunks import ChunkSignatures
from s3api.auth.principal import of_user
from s3api.auth.signed import Payload, Signed
from s3api.auth.sigv4 import SigV4, signing_key, timestamp_s
from s3api.auth.users import Credentials
from s3api.errors import S3Error
from s3api.http.message import Body, Headers, Request

ACCESS_KEY, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
USER = UserRecord("instrument", "Instrument", ACCESS_KEY, b"")


class Users:
    """A store of one user."""

    def __init__(self, user: UserRecord = USER) -> None:
        self.user = user

    async def find(self, access_key: str, token: str = "") -> Credentials | None:
        (key,) = self.user.keys
        return (
            Credentials(self.user, SECRET, of_user(self.user)) if access_key == key.access_key and not token else None
        )


def request_of(method: str, url: str, headers: dict[str, str], body: Body | None = None) -> Request:
    parts = urlsplit(url)
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    fields = [("host", parts.netloc)] + [(name.lower(), value) for name, value in headers.items()]
    return Request(
        method=method,
        target=target,
        path=parts.path,
        query=tuple(parse_qsl(parts.query, keep_blank_values=True)),
        headers=Headers(fields),
        body=body,  # type: ignore[arg-type]
        peer="",
        secure=False,
        request_id="",
    )


def now_s() -> float:
    return datetime.datetime.now(tz=datetime.UTC).timestamp()


def signed_by_botocore(method: str, url: str, headers: dict[str, str] | None = None, data: bytes = b"") -> Request:
    request = AWSRequest(method, url, data=data, headers=headers or {})
    S3SigV4Auth(BotoCredentials(ACCESS_KEY, SECRET), "s3", "eu-central-1").add_auth(request)
    return request_of(method, url, dict(request.headers))


async def code_of(request: Request, at_s: float | None = None, users: Users | None = None) -> str:
    with pytest.raises(S3Error) as caught:
        await Authenticator(users or Users()).verify(request, "", now_s() if at_s is None else at_s)
    return caught.value.code


async def test_header_signed_by_botocore() -> None:
    request = signed_by_botocore(
        "PUT",
        "http://127.0.0.1:9000/bucket/a%20b/%C3%BC+~//..?x-id=PutObject&uploads&prefix=a%2Fb%20c",
        {"x-amz-meta-note": "  two   blanks ", "content-type": "text/plain"},
        b"hello",
    )
    signed = await SigV4(Users()).verify(request, now_s())
    assert signed.payload is Payload.SHA256
    assert signed.sha256 == hashlib.sha256(b"hello").hexdigest()
    assert signed.credentials.user.user_id == "instrument"


async def test_presigned_by_botocore() -> None:
    request = AWSRequest("GET", "http://127.0.0.1:9000/bucket/key%2B1?response-content-type=a%2Fb")
    S3SigV4QueryAuth(BotoCredentials(ACCESS_KEY, SECRET), "s3", "us-east-1", expires=60).add_auth(request)
    signed = await SigV4(Users()).verify(request_of("GET", request.url, {}), now_s())
    assert signed.payload is Payload.UNSIGNED


@pytest.mark.parametrize(
    ("late_s", "expected"), [(61, "AccessDenied"), (-16 * 60, "AccessDenied")], ids=["expired", "not yet valid"]
)
async def test_presigned_outside_its_time(late_s: int, expected: str) -> None:
    request = AWSRequest("GET", "http://127.0.0.1:9000/bucket/key")
    S3SigV4QueryAuth(BotoCredentials(ACCESS_KEY, SECRET), "s3", "us-east-1", expires=60).add_auth(request)
    assert await code_of(request_of("GET", request.url, {}), now_s() + late_s) == expected


async def test_presigned_for_more_than_a_week() -> None:
    request = AWSRequest("GET", "http://127.0.0.1:9000/bucket/key")
    S3SigV4QueryAuth(BotoCredentials(ACCESS_KEY, SECRET), "s3", "us-east-1", expires=604_801).add_auth(request)
    assert await code_of(request_of("GET", request.url, {})) == "AuthorizationQueryParametersError"


# The example of https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html, "GET Object".
DOCUMENTED_AT_S = calendar.timegm((2013, 5, 24, 0, 0, 0))
DOCUMENTED = {
    "Range": "bytes=0-9",
    "x-amz-content-sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "x-amz-date": "20130524T000000Z",
    "Authorization": "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,"
    "SignedHeaders=host;range;x-amz-content-sha256;x-amz-date,"
    "Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
}


async def test_documented_example() -> None:
    request = request_of("GET", "http://examplebucket.s3.amazonaws.com/test.txt", DOCUMENTED)
    signed = await SigV4(Users()).verify(request, DOCUMENTED_AT_S)
    assert signed.scope == "20130524/us-east-1/s3/aws4_request"


@pytest.mark.parametrize("change", ["method", "path", "query", "header", "signature", "secret"])
async def test_any_change_is_noticed(change: str) -> None:
    method, url, headers = "GET", "http://examplebucket.s3.amazonaws.com/test.txt", dict(DOCUMENTED)
    if change == "method":
        method = "DELETE"
    elif change == "path":
        url = "http://examplebucket.s3.amazonaws.com/test.tx%74"
    elif change == "query":
        url += "?acl"
    elif change == "header":
        headers["Range"] = "bytes=0-8"
    elif change == "signature":
        headers["Authorization"] = headers["Authorization"][:-1] + "0"
    else:
        headers["Authorization"] = headers["Authorization"].replace("us-east-1", "us-east-2")
    assert await code_of(request_of(method, url, headers), DOCUMENTED_AT_S) == "SignatureDoesNotMatch"


async def test_an_added_amz_header_is_refused() -> None:
    headers = {**DOCUMENTED, "x-amz-meta-added": "1"}
    request = request_of("GET", "http://examplebucket.s3.amazonaws.com/test.txt", headers)
    assert await code_of(request, DOCUMENTED_AT_S) == "AccessDenied"


@pytest.mark.parametrize("late_s", [901, -901])
async def test_clock_skew(late_s: int) -> None:
    request = request_of("GET", "http://examplebucket.s3.amazonaws.com/test.txt", DOCUMENTED)
    assert await code_of(request, DOCUMENTED_AT_S + late_s) == "RequestTimeTooSkewed"


async def test_a_date_header_outside_the_scope_is_first_of_all_too_old() -> None:
    headers = {**DOCUMENTED, "x-amz-date": "20100707T215304Z"}
    request = request_of("GET", "http://examplebucket.s3.amazonaws.com/test.txt", headers)
    assert await code_of(request, DOCUMENTED_AT_S) == "RequestTimeTooSkewed"


async def test_unknown_access_key() -> None:
    other = Users(UserRecord("x", "X", "OTHER", b""))
    request = request_of("GET", "http://examplebucket.s3.amazonaws.com/test.txt", DOCUMENTED)
    assert await code_of(request, DOCUMENTED_AT_S, other) == "InvalidAccessKeyId"


async def test_disabled_user() -> None:
    users = Users(UserRecord("x", "X", ACCESS_KEY, b"", enabled=False))
    request = request_of("GET", "http://examplebucket.s3.amazonaws.com/test.txt", DOCUMENTED)
    assert await code_of(request, DOCUMENTED_AT_S, users) == "AccessDenied"


@pytest.mark.parametrize(
    ("authorization", "expected"),
    [
        ("AWS AKIAIOSFODNN7EXAMPLE:c2lnbmF0dXJl", "SignatureDoesNotMatch"),
        ("Basic dTpw", "InvalidArgument"),
        ("AWS4-HMAC-SHA256", "AuthorizationHeaderMalformed"),
        ("AWS4-HMAC-SHA256 Credential=a, SignedHeaders=host, Signature=0", "AuthorizationHeaderMalformed"),
        ("AWS4-HMAC-SHA256 Credential=a/20130524/r/ec2/aws4_request, SignedHeaders=host, Signature=0",
         "AuthorizationHeaderMalformed"),
        ("AWS4-HMAC-SHA256 Credential=a/20130524/r/s3/aws4, SignedHeaders=host, Signature=0",
         "AuthorizationHeaderMalformed"),
        ("AWS4-HMAC-SHA256 Credential=a/2013052/r/s3/aws4_request, SignedHeaders=host, Signature=0",
         "AuthorizationHeaderMalformed"),
        ("AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130525/us-east-1/s3/aws4_request,"
         "SignedHeaders=host;range;x-amz-content-sha256;x-amz-date,Signature=0",
         "AuthorizationHeaderMalformed"),
        ("AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN8EXAMPLE/20130525/us-east-1/s3/aws4_request,"
         "SignedHeaders=host;range;x-amz-content-sha256;x-amz-date,Signature=0",
         "InvalidAccessKeyId"),
        ("AWS4-HMAC-SHA256 Credential=a/20130524/r/s3/aws4_request, SignedHeaders=range, Signature=0",
         "AuthorizationHeaderMalformed"),
        ("AWS4-HMAC-SHA256 Credential=\xe9\xe9/20130524/r/s3/aws4_request, SignedHeaders=host, Signature=\xe9",
         "AccessDenied"),
    ],
)  # fmt: skip
async def test_bad_authorization(authorization: str, expected: str) -> None:
    headers = {**DOCUMENTED, "Authorization": authorization}
    request = request_of("GET", "http://examplebucket.s3.amazonaws.com/test.txt", headers)
    assert await code_of(request, DOCUMENTED_AT_S) == expected


async def test_without_a_payload_hash_there_must_be_no_body() -> None:
    """curl before 8.0: the documented request with the header left out, signed anew."""
    url = "http://examplebucket.s3.amazonaws.com/test.txt"
    headers = {"x-amz-date": "20130524T000000Z"}
    empty = hashlib.sha256(b"").hexdigest()
    canonical = canonical_request("GET", "/test.txt", "", request_of("GET", url, headers).headers, SIGNED, empty)
    text = "\n".join(
        (
            "AWS4-HMAC-SHA256",
            "20130524T000000Z",
            "20130524/us-east-1/s3/aws4_request",
            hashlib.sha256(canonical.encode()).hexdigest(),
        )
    )
    signature = hmac.digest(signing_key(SECRET, "20130524", "us-east-1"), text.encode(), "sha256").hex()
    headers["Authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/20130524/us-east-1/s3/aws4_request,"
        f" SignedHeaders={';'.join(SIGNED)}, Signature={signature}"
    )
    signed = await SigV4(Users()).verify(request_of("GET", url, headers), DOCUMENTED_AT_S)
    assert signed.sha256 == empty
    with_body = request_of("GET", url, {**headers, "content-length": "5"})
    assert await code_of(with_body, DOCUMENTED_AT_S) == "InvalidRequest"


SIGNED = ("host", "x-amz-date")


@pytest.mark.parametrize(
    ("header", "value", "expected"),
    [
        ("x-amz-content-sha256", "zz", "InvalidArgument"),
        ("x-amz-content-sha256", "STREAMING-AWS4-ECDSA-P256-SHA256-PAYLOAD", "NotImplemented"),
        ("x-amz-date", "yesterday", "AccessDenied"),
        ("x-amz-date", "20139924T000000Z", "AccessDenied"),
        ("x-amz-security-token", "token", "AccessDenied"),
    ],
)
async def test_bad_headers(header: str, value: str, expected: str) -> None:
    request = request_of("GET", "http://examplebucket.s3.amazonaws.com/test.txt", {**DOCUMENTED, header: value})
    assert await code_of(request, DOCUMENTED_AT_S) == expected


# https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-streaming.html: 65 KiB of "a" in chunks of 64 KiB.
CHUNKED_SEED = "4f232c4386841ef735655705268965c44a0e4690baa4adea153f7db9fa80a0a9"
CHUNK_SIGNATURES = (
    (65536, "ad80c730a21e5b8d04586a2213dd63b9a0e99e0e2307b0ade35a65485a288648"),
    (1024, "0055627c9e194cb4542bae2aa5492e3c1575bbb81b612b7d234b86a503ef5497"),
    (0, "b6c6ea8a5354eaf15b3cb7646744f4275b71ea724fed81ceb9323e279d449df9"),
)


def documented_chunks(seed: str = CHUNKED_SEED) -> ChunkSignatures:
    key = signing_key(SECRET, "20130524", "us-east-1")
    return ChunkSignatures(key, "20130524T000000Z", "20130524/us-east-1/s3/aws4_request", seed)


def test_documented_chunk_signatures() -> None:
    verifier = documented_chunks()
    for size, signature in CHUNK_SIGNATURES:
        verifier.payload(memoryview(b"a" * (size // 2)))
        verifier.payload(memoryview(b"a" * (size - size // 2)))
        verifier.chunk_end(size, signature)


def test_changed_chunk_is_noticed() -> None:
    verifier = documented_chunks()
    verifier.payload(memoryview(b"a" * 65535 + b"b"))
    with pytest.raises(S3Error) as caught:
        verifier.chunk_end(65536, CHUNK_SIGNATURES[0][1])
    assert caught.value.code == "SignatureDoesNotMatch"


def test_swapped_chunk_is_noticed() -> None:
    verifier = documented_chunks()
    verifier.payload(memoryview(b"a" * 1024))
    with pytest.raises(S3Error):
        verifier.chunk_end(1024, CHUNK_SIGNATURES[1][1])


def test_documented_trailer_signature() -> None:
    """https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-streaming-trailers.html"""
    verifier = documented_chunks("106e2a8a18243abcf37539882f36619c00e2dfc72633413f02d3b74544bfeb8e")
    for size, signature in (
        (65536, "b474d8862b1487a5145d686f57f013e54db672cee1c953b3010fb58501ef5aa2"),
        (1024, "1c1344b170168f8e65b41376b44b20fe354e373826ccbbe2c1d40a8cae51e5c7"),
        (0, "2ca2aba2005185cf7159c6277faf83795951dd77a3a99e6e65d5c9f85863f992"),
    ):
        verifier.payload(memoryview(b"a" * size))
        verifier.chunk_end(size, signature)
    trailers = [("x-amz-checksum-crc32c", "sOO8/Q==")]
    verifier.trailers(trailers, "d81f82fc3505edab99d459891051a732e8730629a2e4a59689829ca17fe2e435")


@given(st.lists(st.tuples(st.text(min_size=1, max_size=8), st.text(max_size=8)), max_size=6))
def test_canonical_query_agrees_with_botocore(pairs: list[tuple[str, str]]) -> None:
    raw = urlencode(pairs, quote_via=quote)
    expected = S3SigV4Auth(BotoCredentials(ACCESS_KEY, SECRET), "s3", "r")._canonical_query_string_url(
        urlsplit(f"http://h/b?{raw}")
    )
    assert canonical_query(raw) == expected


@given(st.text(alphabet=string.printable, max_size=40))
def test_canonical_query_never_fails_and_is_idempotent(raw: str) -> None:
    once = canonical_query(raw)
    assert canonical_query(once) == once


@given(st.text(max_size=20))
def test_timestamps_never_fail(text: str) -> None:
    assert timestamp_s(text) is None or len(text) == 16


def test_signed_hides_its_key() -> None:
    signed = Signed(Credentials(USER, SECRET, of_user(USER)), Payload.UNSIGNED, "", "t", "s", "sig", b"key-material")
    assert SECRET not in repr(signed)
    assert "key-material" not in repr(signed)

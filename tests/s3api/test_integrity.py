"""What a client says about a body must hold, however it says it; a body that does not verify leaves nothing."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import xxhash
from awscrt import checksums as crt
from botocore.exceptions import ClientError

from s3api import checksums

Raw = Callable[..., httpx.Response]
Code = Callable[[httpx.Response], str]

BODY = os.urandom(200_000)
DIGESTS = {
    "crc32": zlib.crc32(BODY).to_bytes(4, "big"),
    "crc32c": crt.crc32c(BODY).to_bytes(4, "big"),
    "crc64nvme": crt.crc64nvme(BODY).to_bytes(8, "big"),
    "sha1": hashlib.sha1(BODY).digest(),
    "sha256": hashlib.sha256(BODY).digest(),
    "sha512": hashlib.sha512(BODY).digest(),
    "md5": hashlib.md5(BODY).digest(),
    "xxhash64": xxhash.xxh64(BODY).digest(),
    "xxhash3": xxhash.xxh3_64(BODY).digest(),
    "xxhash128": xxhash.xxh3_128(BODY).digest(),
}


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


# -- checksums in headers


@pytest.mark.parametrize("name", DIGESTS)
def test_checksum_header(raw: Raw, bucket: str, name: str) -> None:
    header, value = f"x-amz-checksum-{name}", b64(DIGESTS[name])
    put = raw("PUT", f"/{bucket}/k", BODY, headers={header: value}, payload_hash="UNSIGNED-PAYLOAD")
    assert put.status_code == 200
    assert put.headers[header] == value
    assert put.headers["x-amz-checksum-type"] == "FULL_OBJECT"
    for method in ("GET", "HEAD"):
        plain = raw(method, f"/{bucket}/k")
        asked = raw(method, f"/{bucket}/k", headers={"x-amz-checksum-mode": "ENABLED"})
        ranged = raw(method, f"/{bucket}/k", headers={"x-amz-checksum-mode": "ENABLED", "range": "bytes=0-9"})
        assert asked.headers[header] == value
        assert header not in plain.headers
        assert header not in ranged.headers


@pytest.mark.parametrize("name", DIGESTS)
def test_wrong_checksum(raw: Raw, code_of: Code, bucket: str, name: str) -> None:
    wrong = b64(bytes(len(DIGESTS[name])))
    answer = raw("PUT", f"/{bucket}/k", BODY, headers={f"x-amz-checksum-{name}": wrong})
    assert (answer.status_code, code_of(answer)) == (400, "BadDigest")
    assert raw("HEAD", f"/{bucket}/k").status_code == 404


def test_without_any_checksum_it_is_crc64nvme(raw: Raw, bucket: str) -> None:
    put = raw("PUT", f"/{bucket}/k", BODY)
    assert put.headers["x-amz-checksum-crc64nvme"] == b64(DIGESTS["crc64nvme"])


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"x-amz-checksum-crc32": "AAAA"}, "InvalidRequest"),
        ({"x-amz-checksum-crc32": "!"}, "InvalidRequest"),
        ({"x-amz-checksum-crc32": "AAAAAA==", "x-amz-checksum-sha1": "AAAAAA=="}, "InvalidRequest"),
        ({"x-amz-checksum-xxhash": "AAAAAA=="}, "InvalidRequest"),
        ({"x-amz-checksum-crc32": "AAAAAA==", "x-amz-sdk-checksum-algorithm": "SHA1"}, "InvalidRequest"),
        ({"x-amz-sdk-checksum-algorithm": "CRC32"}, "InvalidRequest"),
        ({"x-amz-trailer": "x-amz-checksum-crc32"}, "InvalidRequest"),
        ({"content-md5": "AAAA"}, "InvalidDigest"),
        ({"content-md5": "not base64"}, "InvalidDigest"),
        ({"content-encoding": "aws-chunked"}, "InvalidRequest"),
    ],
)
def test_nonsense_in_the_head(raw: Raw, code_of: Code, bucket: str, headers: dict[str, str], code: str) -> None:
    answer = raw("PUT", f"/{bucket}/k", BODY, headers=headers, payload_hash="UNSIGNED-PAYLOAD")
    assert (answer.status_code, code_of(answer)) == (400, code)


def test_content_md5(raw: Raw, code_of: Code, bucket: str) -> None:
    right = raw("PUT", f"/{bucket}/k", BODY, headers={"content-md5": b64(hashlib.md5(BODY).digest())})
    assert right.headers["etag"] == f'"{hashlib.md5(BODY).hexdigest()}"'
    wrong = raw("PUT", f"/{bucket}/k2", BODY, headers={"content-md5": b64(bytes(16))})
    assert (wrong.status_code, code_of(wrong)) == (400, "BadDigest")


def test_signed_payload_hash(raw: Raw, code_of: Code, bucket: str) -> None:
    answer = raw("PUT", f"/{bucket}/k", BODY, payload_hash=hashlib.sha256(b"other").hexdigest())
    assert (answer.status_code, code_of(answer)) == (400, "XAmzContentSHA256Mismatch")
    assert raw("HEAD", f"/{bucket}/k").status_code == 404


def test_a_document_is_verified_too(raw: Raw, code_of: Code, bucket: str) -> None:
    body = b"<Delete><Object><Key>k</Key></Object></Delete>"
    right_md5 = {"content-md5": b64(hashlib.md5(body).digest())}
    other = hashlib.sha256(b"other").hexdigest()
    wrong_hash = raw("POST", f"/{bucket}?delete", body, headers=right_md5, payload_hash=other)
    wrong_md5 = raw("POST", f"/{bucket}?delete", body, headers={"content-md5": b64(bytes(16))})
    assert code_of(wrong_hash) == "XAmzContentSHA256Mismatch"
    assert code_of(wrong_md5) == "BadDigest"
    assert code_of(raw("POST", f"/{bucket}?delete", body)) == "InvalidRequest"


# -- aws-chunked, all four forms


class Chunked:
    """Encodes a body as an SDK would. ``spoil`` names what is wrong with it."""

    def __init__(self, raw: Any, path: str, *, signed: bool, trailer: str, chunk_bytes: int = 65536) -> None:
        self.raw, self.path, self.signed, self.trailer, self.chunk_bytes = raw, path, signed, trailer, chunk_bytes

    def send(self, body: bytes, *, spoil: str = "", http_chunked: bool = False) -> httpx.Response:
        form = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD" if self.signed else "STREAMING-UNSIGNED-PAYLOAD"
        form += "-TRAILER" if self.trailer else ""
        claimed = len(body) + (1 if spoil == "length" else 0)
        headers = {"content-encoding": "aws-chunked", "x-amz-decoded-content-length": str(claimed)}
        if self.trailer:
            headers["x-amz-trailer"] = f"x-amz-checksum-{self.trailer}"
        head = self.raw.signed("PUT", self.path, b"", headers, form)
        wire = b"".join(self._encoded(body, head, spoil))
        head = {name: value for name, value in head.items() if name.lower() != "content-length"}
        content: Any = wire if not http_chunked else iter([wire[:7], wire[7:100_000], wire[100_000:]])
        return self.raw.http.request("PUT", self.raw.endpoint + self.path, content=content, headers=head)

    def _encoded(self, body: bytes, head: dict[str, str], spoil: str) -> Iterator[bytes]:
        signature = head["Authorization"].rpartition("=")[2]
        stamp = head["X-Amz-Date"]
        scope = head["Authorization"].partition("Credential=")[2].partition(",")[0].partition("/")[2]
        key = b"AWS4" + self.raw.credentials.secret_key.encode()
        for step in scope.split("/"):
            key = hmac.digest(key, step.encode(), "sha256")

        def sign(kind: str, *parts: str) -> str:
            text = "\n".join((f"AWS4-HMAC-SHA256-{kind}", stamp, scope, *parts))
            return hmac.digest(key, text.encode(), "sha256").hex()

        pieces = [body[at : at + self.chunk_bytes] for at in range(0, len(body), self.chunk_bytes)]
        for number, piece in enumerate([*pieces, b""]):
            line = f"{len(piece):x}"
            if self.signed:
                empty = hashlib.sha256(b"").hexdigest()
                signature = sign("PAYLOAD", signature, empty, hashlib.sha256(piece).hexdigest())
                line += f";chunk-signature={signature}"
            if spoil == "payload" and number == 1:
                piece = bytes([piece[0] ^ 1]) + piece[1:]
            yield line.encode() + b"\r\n" + piece + (b"\r\n" if piece else b"")
        if self.trailer:
            digest = DIGESTS[self.trailer] if spoil != "trailer" else bytes(len(DIGESTS[self.trailer]))
            field = f"x-amz-checksum-{self.trailer}:{b64(digest)}"
            yield field.encode() + b"\r\n"
            if self.signed:
                final = sign("TRAILER", signature, hashlib.sha256(f"{field}\n".encode()).hexdigest())
                if spoil == "trailer signature":
                    final = final[::-1]
                yield f"x-amz-trailer-signature:{final}\r\n".encode()
        yield b"\r\n"


FORMS = [(False, "crc32"), (False, "crc64nvme"), (True, ""), (True, "sha256"), (True, "crc32c")]


@pytest.mark.parametrize(("signed", "trailer"), FORMS)
@pytest.mark.parametrize("http_chunked", [False, True])
def test_aws_chunked(raw: Raw, bucket: str, signed: bool, trailer: str, http_chunked: bool) -> None:
    answer = Chunked(raw, f"/{bucket}/k", signed=signed, trailer=trailer).send(BODY, http_chunked=http_chunked)
    assert answer.status_code == 200, answer.text
    name = trailer or "crc64nvme"
    assert answer.headers[f"x-amz-checksum-{name}"] == b64(DIGESTS[name])
    got = raw("GET", f"/{bucket}/k")
    assert got.content == BODY
    assert "content-encoding" not in got.headers


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 8 * 1024, 1001])
def test_sizes_of_chunks(raw: Raw, bucket: str, chunk_bytes: int) -> None:
    chunked = Chunked(raw, f"/{bucket}/k", signed=True, trailer="crc32", chunk_bytes=chunk_bytes)
    assert chunked.send(BODY).status_code == 200
    assert raw("GET", f"/{bucket}/k").content == BODY


@pytest.mark.parametrize(
    ("signed", "trailer", "spoil", "status", "code"),
    [
        (True, "", "payload", 403, "SignatureDoesNotMatch"),
        (True, "crc32", "payload", 403, "SignatureDoesNotMatch"),
        (True, "crc32", "trailer signature", 403, "SignatureDoesNotMatch"),
        (True, "crc32", "trailer", 400, "BadDigest"),
        (False, "crc32", "payload", 400, "BadDigest"),
        (False, "crc64nvme", "trailer", 400, "BadDigest"),
        (False, "crc32", "length", 400, "IncompleteBody"),
    ],
)
def test_spoiled_aws_chunked(
    raw: Raw, code_of: Code, bucket: str, signed: bool, trailer: str, spoil: str, status: int, code: str
) -> None:
    answer = Chunked(raw, f"/{bucket}/k", signed=signed, trailer=trailer).send(BODY, spoil=spoil)
    assert (answer.status_code, code_of(answer)) == (status, code)
    assert raw("HEAD", f"/{bucket}/k").status_code == 404


# -- lengths


def test_length_is_required(raw: Any, node: Any, bucket: str) -> None:
    head = raw.signed("PUT", f"/{bucket}/k", b"", None, "UNSIGNED-PAYLOAD")
    connection = http.client.HTTPConnection("127.0.0.1", node.port, timeout=60)
    connection.putrequest("PUT", f"/{bucket}/k")
    for name, value in head.items():
        if name.lower() != "content-length":
            connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 411
    assert b"MissingContentLength" in answer.read()
    connection.close()


def test_http_chunked_without_a_length(raw: Any, bucket: str) -> None:
    head = raw.signed("PUT", f"/{bucket}/k", b"", None, "UNSIGNED-PAYLOAD")
    head = {name: value for name, value in head.items() if name.lower() != "content-length"}
    answer = raw.http.put(f"{raw.endpoint}/{bucket}/k", content=iter([BODY[:10], BODY[10:]]), headers=head)
    assert answer.status_code == 200, answer.text
    assert raw("GET", f"/{bucket}/k").content == BODY


# -- SDKs


@pytest.mark.parametrize("algorithm", ["CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256"])
def test_boto3_verifies_what_it_gets(s3: Any, bucket: str, algorithm: str) -> None:
    put = s3.put_object(Bucket=bucket, Key="k", Body=BODY, ChecksumAlgorithm=algorithm)
    assert put[f"Checksum{algorithm}"]
    got = s3.get_object(Bucket=bucket, Key="k", ChecksumMode="ENABLED")
    assert got["Body"].read() == BODY
    assert got[f"Checksum{algorithm}"] == put[f"Checksum{algorithm}"]


def test_boto3_over_tls(make_client: Callable[..., Any], root_keys: tuple[str, str], bucket: str) -> None:
    """There it sends aws-chunked with a trailer, inside HTTP chunks, without a Content-Length."""
    client = make_client(root_keys, tls=True)
    put = client.put_object(Bucket=bucket, Key="k", Body=BODY)
    assert put["ChecksumCRC32"] == b64(DIGESTS["crc32"])
    assert client.get_object(Bucket=bucket, Key="k")["Body"].read() == BODY


def test_boto3_without_signing_the_payload(
    make_client: Callable[..., Any], root_keys: tuple[str, str], bucket: str
) -> None:
    """The fast way for an instrument on plain HTTP."""
    client = make_client(root_keys, s3={"addressing_style": "path", "payload_signing_enabled": False})
    assert client.put_object(Bucket=bucket, Key="k", Body=BODY)["ChecksumCRC32"] == b64(DIGESTS["crc32"])


def test_boto3_wrong_checksum(s3: Any, bucket: str) -> None:
    with pytest.raises(ClientError) as caught:
        s3.put_object(Bucket=bucket, Key="k", Body=BODY, ChecksumCRC32="AAAAAA==")
    assert caught.value.response["Error"]["Code"] == "BadDigest"


# -- combining


@pytest.mark.parametrize("name", ["crc32", "crc32c", "crc64nvme"])
def test_full_object_checksum_of_parts(name: str) -> None:
    algorithm = checksums.ALGORITHMS[name]
    pieces = [BODY[:1], BODY[1:70_000], b"", BODY[70_000:]]
    parts = [(b64(algorithm.digest(piece)), len(piece)) for piece in pieces]
    assert checksums.full_object(algorithm, parts) == b64(DIGESTS[name])


def test_composite_checksum_of_parts() -> None:
    algorithm = checksums.ALGORITHMS["sha256"]
    parts = [b64(hashlib.sha256(piece).digest()) for piece in (b"a", b"b")]
    joined = hashlib.sha256(hashlib.sha256(b"a").digest() + hashlib.sha256(b"b").digest()).digest()
    assert checksums.composite(algorithm, parts) == f"{b64(joined)}-2"


@pytest.mark.parametrize(
    ("name", "empty"),
    [
        ("XXHASH64", 0xEF46DB3751D8E999),
        ("XXHASH3", 0x2D06800538D394C2),
        ("XXHASH128", 0x99AA06D3014798D86001C324468D497F),
    ],
)
def test_xxhash_is_canonical(raw: Raw, bucket: str, name: str, empty: int) -> None:
    """Hashes of nothing, as the xxHash project publishes them: big-endian."""
    value = b64(empty.to_bytes(16 if name == "XXHASH128" else 8, "big"))
    answer = raw("PUT", f"/{bucket}/k", b"", headers={f"x-amz-checksum-{name.lower()}": value})
    assert (answer.status_code, answer.headers[f"x-amz-checksum-{name.lower()}"]) == (200, value)
    listed = raw("GET", f"/{bucket}?list-type=2").text
    assert f"<ChecksumAlgorithm>{name}</ChecksumAlgorithm>" in listed


def test_hashes_cannot_be_combined() -> None:
    with pytest.raises(ValueError, match="sha1"):
        checksums.full_object(checksums.ALGORITHMS["sha1"], [("", 0)])

"""Targets with a socket: any bytes on a connection, and any signed S3 request, against a real node in this process.

Promises: an answer comes, it is well-formed HTTP and never a 500; an error has a code of ours; no byte of what somebody else has
sent or stored privately is ever in it.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote_from_bytes

from gateway.cli.s3put import sign
from gateway.users import KeyPair
from ingest.records import Grant
from s3api.auth.canonical import canonical_query
from s3api.call import ServiceSettings
from s3api.routes import SUBRESOURCES
from tests.fuzz.reader import Reader
from tests.s3api.conftest import NodeThread, write_certificate

ANSWER_TIMEOUT_S = 30
SECRET = b"another-user's-bytes-" + os.urandom(8).hex().encode()
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
_HEAD_BYTES_MAX = 60_000

METHODS = ("GET", "PUT", "POST", "DELETE", "HEAD", "OPTIONS", "PATCH")
BUCKETS = ("fuzz", "fuzz", "fuzz", "fuzz", "private", "nosuch", "", "..", "a%00b")
KEYS = ("a", "b/c", "x y", "a//b", ".", "../a", "_kernels/k.py", "_products/x", "%C3%BC", "%FF", "%00", "*", "a" * 1030)
NAMES = (
    *sorted(SUBRESOURCES), "prefix", "delimiter", "marker", "max-keys", "continuation-token", "start-after", "encoding-type",
    "fetch-owner", "key-marker", "version-id-marker", "upload-id-marker", "max-uploads", "max-parts", "part-number-marker",
    "response-content-type", "response-expires", "x-id", "X-Amz-Expires", "AWSAccessKeyId", "Signature",
)  # fmt: skip
VALUES = (
    "", "0", "1", "2", "-1", "10001", "999999999999999999999", "url", "true", "null", "bytes=0-0", "bytes=-1", "bytes=5-2", "*",
    '"abc"', "Thu, 01 Jan 1970 00:00:00 GMT", "Fri, 99 Foo 9999 99:99:99 GMT", "2026-01-01T00:00:00Z", "/fuzz/a", "fuzz/a",
    "/private/secret", "private/secret?versionId=null", "%ZZ", "é", "=?UTF-8?B?w7w=?=", "a,b;c", "COPY", "REPLACE", "private",
    "public-read", "CRC32", "CRC64NVME", "SHA256", "COMPOSITE", "FULL_OBJECT", "AAAAAA==", "GOVERNANCE", "ON", "STANDARD",
    "AES256", "a=b&c=d", "id=\"1\"", "x" * 3000,
)  # fmt: skip
FIELDS = """
    range if-match if-none-match if-modified-since if-unmodified-since content-md5 content-type content-encoding
    expires cache-control x-amz-copy-source x-amz-copy-source-range x-amz-copy-source-if-match
    x-amz-metadata-directive x-amz-tagging-directive x-amz-tagging x-amz-meta-a x-amz-acl x-amz-grant-read
    x-amz-storage-class x-amz-checksum-crc32 x-amz-checksum-crc64nvme x-amz-checksum-sha256
    x-amz-checksum-algorithm x-amz-checksum-type x-amz-sdk-checksum-algorithm x-amz-checksum-mode
    x-amz-mp-object-size x-amz-object-lock-mode x-amz-object-lock-retain-until-date x-amz-object-lock-legal-hold
    x-amz-bypass-governance-retention x-amz-mfa x-amz-server-side-encryption
    x-amz-server-side-encryption-customer-algorithm x-amz-website-redirect-location x-amz-write-offset-bytes
    x-amz-expected-bucket-owner x-amz-request-payer x-amz-decoded-content-length x-amz-trailer
    x-amz-object-attributes x-amz-security-token origin access-control-request-method
    access-control-request-headers
""".split()
ELEMENTS = """
    Delete Object Key VersionId Quiet CompleteMultipartUpload Part PartNumber ETag Tagging TagSet Tag Value
    VersioningConfiguration Status LifecycleConfiguration Rule ID Filter Prefix Expiration Days Date
    CORSConfiguration CORSRule AllowedOrigin AllowedMethod NotificationConfiguration Event ObjectLockConfiguration
    ObjectLockEnabled Retention Mode RetainUntilDate LegalHold AccessControlPolicy Owner AccessControlList Grant
    Grantee Permission RestoreRequest CreateBucketConfiguration LocationConstraint PublicAccessBlockConfiguration
    BlockPublicAcls OwnershipControls ObjectOwnership And
""".split()
TEXTS = (
    "",
    "a",
    "1",
    "-1",
    "99999999999",
    "Enabled",
    "Suspended",
    "true",
    "2026-01-01T00:00:00Z",
    "GOVERNANCE",
    "é",
    "&lt;",
    "*",
)


class Stranger:
    """A node with one object that the fuzzing user may not see, and that user's keys."""

    def __init__(self, node: NodeThread) -> None:
        self.node = node
        self.root = KeyPair(*node.add_user("root", root=True))
        self.keys = KeyPair(*node.add_user("stranger", Grant(bucket="fuzz", access="admin")))
        self._connection: http.client.HTTPConnection | None = None
        self.run = 0
        for bucket in ("fuzz", "private"):
            assert self.send(self.root, "PUT", f"/{bucket}", "", {}, b"")[0] == 200
        assert self.send(self.root, "PUT", "/private/secret", "", {}, SECRET)[0] == 200

    def send(
        self, keys: KeyPair, method: str, path: str, query: str, fields: dict[str, str], body: bytes
    ) -> tuple[int, bytes, bytes]:
        """(status, fields, body). A connection that the node closed is opened again once."""
        headers = {"host": f"127.0.0.1:{self.node.port}", **fields}
        signed = sign(method, path, headers, keys, "us-east-1", query=canonical_query(query))
        for attempt in range(2):
            connection = self._connection or http.client.HTTPConnection(
                "127.0.0.1", self.node.port, timeout=ANSWER_TIMEOUT_S
            )
            self._connection = connection
            try:
                connection.putrequest(
                    method, path + (f"?{query}" if query else ""), skip_host=True, skip_accept_encoding=True
                )
                for name, value in signed.items():
                    connection.putheader(name, value.encode("latin-1", "replace"))
                connection.putheader("content-length", str(len(body)))
                connection.endheaders(body)
                answer = connection.getresponse()
                return answer.status, bytes(answer.headers), answer.read()
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                connection.close()
                self._connection = None
                assert attempt == 0, "the connection was closed without an answer"
        raise AssertionError("no answer")

    def keep_bucket(self) -> None:
        """The stranger may have deleted it."""
        self.run += 1
        if self.run % 256 == 0:
            self.send(self.root, "PUT", "/fuzz", "", {}, b"")


@contextlib.contextmanager
def node(folder: Path) -> Iterator[Stranger]:
    thread = NodeThread(folder / "node", ServiceSettings(), None)
    write_certificate(thread.certificate)
    thread.start()
    try:
        yield Stranger(thread)
    finally:
        thread.stop()


# -- any bytes

WIRES = [
    b"GET /private/secret HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PUT /fuzz/a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\nhelloGET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /fuzz?delete HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nA: b\r\n\r\n",
    b"PUT /fuzz/a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    b"GET /private/secret HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n",
    b"GET / HTTP/1.1\nHost: x\n\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET /fuzz?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=a/20260101/us-east-1/s3/aws4_request"
    b"&X-Amz-Date=20260101T000000Z&X-Amz-Expires=1&X-Amz-SignedHeaders=host&X-Amz-Signature=0 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /fuzz HTTP/1.1\r\nHost: x\r\nAuthorization: AWS a:b\r\n\r\n",
    b"OPTIONS /fuzz/a HTTP/1.1\r\nHost: x\r\nOrigin: http://a\r\nAccess-Control-Request-Method: PUT\r\n\r\n",
]


def wire(stranger: Stranger, data: bytes) -> None:
    """Bytes on a connection of their own, which then says that no more come."""
    stranger.send(
        stranger.root, "PUT", "/private/other", "", {}, SECRET
    )  # leaves its bytes in memory that is used again
    with socket.create_connection(("127.0.0.1", stranger.node.port), timeout=ANSWER_TIMEOUT_S) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := sock.recv(65536):
                answer += part
    statuses = [int(status) for status in _STATUS.findall(answer)]
    assert not answer or answer.startswith(b"HTTP/1.1 "), answer
    assert all(status < 500 or status in (501, 505) for status in statuses), answer
    assert SECRET not in answer.replace(data, b""), answer


# -- signed requests

SEEDS = [
    bytes([0, 0, 0, 0, 0, 0]),
    bytes([1, 0, 0, 1, 5, 3, 1, 7, 2, 5, 104, 101, 108, 108, 111]),
    bytes([2, 0, 250, 1, 7, 0, 0, 2, 0, 1, 2, 3]),
    *(
        bytes([method, 0, key, 1, name, 0, 0, 3, *range(12)])
        for method in range(5)
        for key in (0, 250)
        for name in range(0, 60, 7)
    ),
]


def request(stranger: Stranger, data: bytes) -> None:
    """One request of a user who may do anything in the bucket ``fuzz``, signed as it is sent."""
    stranger.keep_bucket()
    reader = Reader(data)
    method = reader.pick(METHODS)
    path = "/" + reader.pick(BUCKETS)
    key = reader.number(256)
    if key < 220:
        path += "/" + (KEYS[key % len(KEYS)] if key < 180 else quote_from_bytes(reader.take(40), safe="/-_.~"))
    path = path.replace(" ", "%20")
    query = "&".join(
        f"{reader.pick(NAMES)}={quote_from_bytes(_value(reader).encode('utf-8', 'replace'), safe='')}"
        for _ in range(reader.number(4))
    )
    fields = {reader.pick(FIELDS): _value(reader).encode().decode("latin-1").strip() for _ in range(reader.number(5))}
    body = _document(reader, 0).encode() if reader.number(3) else reader.take(200)
    if method in ("GET", "HEAD", "OPTIONS") and reader.number(4):
        body = b""
    status, head, answer = stranger.send(stranger.keys, method, path, query, fields, body)
    told = f"{method} {path}?{query} {fields} {body!r}: {status} {answer!r}"
    assert status < 500 or status in (501, 503), told
    assert SECRET not in head + answer, told
    assert len(head) < _HEAD_BYTES_MAX, told
    if status >= 400 and method != "HEAD":
        assert b"<Code>" in answer, told


def _value(reader: Reader) -> str:
    chosen = reader.number(256)
    if chosen < 200:
        return VALUES[chosen % len(VALUES)]
    return "".join(character for character in reader.take(30).decode("latin-1") if character.isprintable())


def _document(reader: Reader, depth: int) -> str:
    name = reader.pick(ELEMENTS)
    if depth > 4 or reader.empty:
        return f"<{name}>{reader.pick(TEXTS)}</{name}>"
    inside = "".join(_document(reader, depth + 1) for _ in range(reader.number(4))) or reader.pick(TEXTS)
    return f"<{name}>{inside}</{name}>"

"""An S3 client that never retries and never hides: signed requests over http.client, to be asked what exactly was answered.

In: a ``Node``. Out: ``S3``, one connection; ``Answer``, a whole answer. Always holds: no whole answer is an OSError, so the
caller knows that the outcome is unknown.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import hmac
import http.client
import re
import time
from collections.abc import Iterator
from urllib.parse import quote

from tests.crash.node import ROOT, Node

BUCKETS = {"disk": "disk", "memory": "memory"}
"""Bucket name -> durability."""


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def ok(self) -> bool:
        return self.status in (200, 204) and b"<Error>" not in self.body[:200]

    @property
    def code(self) -> str:
        found = re.search(rb"<Code>(\w+)</Code>", self.body)
        return found[1].decode() if found else ""


class S3:
    """One client with one connection. Raises OSError (HTTP trouble included) when there was no whole answer."""

    def __init__(self, node: Node, timeout_s: float = 40.0) -> None:
        self._node = node
        self._timeout_s = timeout_s
        self._connection: http.client.HTTPConnection | None = None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def request(
        self,
        method: str,
        path: str,
        query: str = "",
        body: bytes | memoryview = b"",
        pause_s: float = 0.0,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """``path`` is encoded already; ``query`` is canonical (sorted, encoded, every name with its =). ``pause_s`` between
        two reads of the answer makes a slow reader. ``headers`` have lower-case names."""
        try:
            if self._connection is None:
                self._connection = self._node.connection(self._timeout_s)
            url = f"{path}?{query}" if query else path
            signed = sign(
                method, path, query, {"host": f"{self._node.host}:{self._connection.port}", **(headers or {})}
            )
            self._connection.putrequest(method, url, skip_host=True, skip_accept_encoding=True)
            for name, value in {**signed, "content-length": str(len(body))}.items():
                self._connection.putheader(name, value)
            self._connection.endheaders()
            if len(body):
                self._connection.sock.sendall(body)
            answer = self._connection.getresponse()
            content = answer.read() if not pause_s else b"".join(_slowly(answer, pause_s))
            found = Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, content)
            if found.headers.get("connection") == "close":
                self.close()
            return found
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            self.close()
            raise OSError(f"{type(error).__name__}: {error}") from error

    def put(self, bucket: str, key: str, body: bytes | memoryview, **metadata: str) -> Answer:
        """``metadata``: user metadata, with _ for -."""
        headers = {f"x-amz-meta-{name.replace('_', '-')}": value for name, value in metadata.items()}
        return self.request("PUT", f"/{bucket}/{quote(key)}", body=body, headers=headers)

    def tag(self, bucket: str, **tags: str) -> Answer:
        """Settings of a bucket, without their ``hiss.`` and with _ for -."""
        rows = "".join(
            f"<Tag><Key>hiss.{name.replace('_', '-')}</Key><Value>{value}</Value></Tag>" for name, value in tags.items()
        )
        return self.request("PUT", f"/{bucket}", "tagging=", f"<Tagging><TagSet>{rows}</TagSet></Tagging>".encode())

    def get(self, bucket: str, key: str, *, pause_s: float = 0.0) -> Answer:
        return self.request("GET", f"/{bucket}/{quote(key)}", pause_s=pause_s)

    def delete(self, bucket: str, key: str) -> Answer:
        return self.request("DELETE", f"/{bucket}/{quote(key)}")

    def listed(self, bucket: str) -> set[str]:
        """Every key of the bucket."""
        keys: set[str] = set()
        token = ""
        while True:
            query = f"continuation-token={quote(token, safe='')}&list-type=2" if token else "list-type=2"
            answer = self.request("GET", f"/{bucket}", query)
            assert answer.ok, answer
            keys |= {key.decode() for key in re.findall(rb"<Key>([^<]*)</Key>", answer.body)}
            more = re.search(rb"<NextContinuationToken>([^<]*)<", answer.body)
            if more is None:
                return keys
            token = more[1].decode()

    def make_buckets(self) -> None:
        for bucket, durability in BUCKETS.items():
            assert self.request("PUT", f"/{bucket}").status in (200, 409)
            assert self.tag(bucket, durability=durability).ok


def _slowly(answer: http.client.HTTPResponse, pause_s: float) -> Iterator[bytes]:
    while piece := answer.read(256 << 10):
        yield piece
        time.sleep(pause_s)
    if answer.length:
        raise OSError(f"{answer.length} bytes are missing at the end")


def sign(method: str, path: str, query: str, headers: dict[str, str]) -> dict[str, str]:
    """``headers`` (lower-case names, ``host`` among them) with those that sign a request of root's."""
    when = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    signed = {**headers, "x-amz-date": when, "x-amz-content-sha256": "UNSIGNED-PAYLOAD"}
    names = sorted(signed)
    lines = "".join(f"{name}:{signed[name]}\n" for name in names)
    canonical = "\n".join((method, path, query, lines, ";".join(names), "UNSIGNED-PAYLOAD"))
    scope = f"{when[:8]}/us-east-1/s3/aws4_request"
    to_sign = "\n".join(("AWS4-HMAC-SHA256", when, scope, hashlib.sha256(canonical.encode()).hexdigest()))
    key = b"AWS4" + ROOT["HISS_ROOT_SECRET_KEY"].encode()
    for part in (when[:8], "us-east-1", "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    credential = f"Credential={ROOT['HISS_ROOT_ACCESS_KEY']}/{scope}"
    value = f"AWS4-HMAC-SHA256 {credential}, SignedHeaders={';'.join(names)}, Signature={signature}"
    return {**signed, "authorization": value}

"""Stored versions over S3, by ranges: what a task of a replay reads.

In: ``Access``; a version as it was listed. Out: its record as far as S3 tells, and its bytes, received into the memory where
they are judged. What always holds: bytes are of the listed version (its ETag is a condition of every request); a small
object is one request, and its checksum is compared; what is short for a while is asked for again, a few times.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import http.client
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from urllib.parse import quote, urlsplit

from awscrt import checksums

from gateway.cli.s3put import RETRIED_STATUSES, delay_s, sign
from gateway.replay.access import Access
from ingest.records import ObjectRecord, ObjectState
from kernels.offline.judging import Lost
from kernels.offline.pieces import ArrayPlace, Wanted

WHOLE_BYTES_MAX = 1 << 20
"""Objects up to this size are fetched in one request."""
ATTEMPTS = 4
TIMEOUT_S = 120.0
ANSWER_BYTES_MAX = 1 << 16
META = "x-amz-meta-"
CRC = "x-amz-checksum-crc64nvme"
_NO_BYTES = memoryview(b"")


class Endpoint:
    """Connections to one S3 endpoint, kept for the next request; for use by several threads. Raises LookupError where there are
    no keys."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._keys, self._token = access.keys()
        self._tls = access.tls()
        self._parts = urlsplit(access.endpoint)
        self._idle: list[http.client.HTTPConnection] = []
        self._used: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()
        self._closed = False

    def open(self, bucket: str, wanted: Wanted) -> tuple[ObjectRecord, Version]:
        """See ``kernels.offline.judging.Open``."""
        small = wanted.length <= WHOLE_BYTES_MAX
        body = bytearray(wanted.length if small else 0)
        headers = self.fetch(
            "GET" if small else "HEAD", bucket, wanted, memoryview(body), {"x-amz-checksum-mode": "ENABLED"}
        )
        record = _record(bucket, wanted, headers)
        if small and CRC in headers and checksums.crc64nvme(body) != record.crc64nvme:
            raise OSError(f"{_shown(bucket, wanted.key)}: its bytes do not have their checksum")
        return record, Version(self, bucket, wanted, bytes(body) if small else None)

    def array(self, bucket: str, place: ArrayPlace) -> bytearray:
        """See ``kernels.offline.seats.ReadArray``."""
        body = bytearray(place.length)
        self.fetch("GET", bucket, Wanted(place.key, place.etag, place.length), memoryview(body), {})
        return body

    def fetch(
        self, method: str, bucket: str, wanted: Wanted, into: memoryview, more: Mapping[str, str]
    ) -> dict[str, str]:
        """Fill ``into`` with the answer's body, and return its headers. Raises Lost, OSError."""
        path = f"/{quote(bucket)}/{quote(wanted.key, safe='/-_.~')}"
        asked = {"host": self._parts.netloc, "if-match": f'"{wanted.etag}"', **more}
        if self._token:
            asked["x-amz-security-token"] = self._token
        reason = ""
        for attempt in range(1, ATTEMPTS + 1):
            signed = sign(method, path, asked, self._keys, self._access.region)
            try:
                with self._connection() as connection:
                    connection.request(method, path, headers=signed)
                    answer = connection.getresponse()
                    if answer.status in (200, 206):
                        _receive(answer, into if method == "GET" else _NO_BYTES)
                        return {name.lower(): value for name, value in answer.getheaders()}
                    said = answer.read(ANSWER_BYTES_MAX)
                    if answer.status not in RETRIED_STATUSES:
                        raise Lost(f"{_shown(bucket, wanted.key)}: {_refusal(answer.status, said)}")
                    reason = f"answered {answer.status}"
            except (OSError, http.client.HTTPException) as error:
                reason = f"{type(error).__name__}: {error}"
            if self._closed:
                break
            if attempt < ATTEMPTS:
                time.sleep(delay_s(attempt, None))
        raise OSError(f"{self._access.endpoint}: {reason}")

    @contextlib.contextmanager
    def _connection(self) -> Iterator[http.client.HTTPConnection]:
        """Kept for the next request if this one came to its end."""
        with self._lock:
            if self._closed:
                raise OSError("the replay is over")
            connection = self._idle.pop() if self._idle else self._new()
            self._used.add(connection)
        sound = False
        try:
            yield connection
            sound = True
        finally:
            with self._lock:
                self._used.discard(connection)
                sound = sound and not self._closed
                if sound:
                    self._idle.append(connection)
            if not sound:
                connection.close()

    def _new(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._tls is None:
            return http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
        return http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=self._tls)

    def close(self) -> None:
        """Requests under way fail. Idempotent."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for connection in self._used:
                with contextlib.suppress(OSError):
                    if connection.sock is not None:
                        connection.sock.shutdown(socket.SHUT_RDWR)
        for connection in idle:
            connection.close()


class Version:
    """Implements ``kernels.offline.remote.Ranges``. ``body``: all of it, if it is small."""

    def __init__(self, endpoint: Endpoint, bucket: str, wanted: Wanted, body: bytes | None) -> None:
        self._endpoint = endpoint
        self._bucket = bucket
        self._wanted = wanted
        self._body = body

    def read_into(self, view: memoryview, offset: int) -> None:
        if not view:
            return
        if self._body is not None:
            piece = self._body[offset : offset + len(view)]
            if len(piece) != len(view):
                raise OSError(f"{_shown(self._bucket, self._wanted.key)}: has no bytes beyond {len(self._body)}")
            view[:] = piece
            return
        asked = {"range": f"bytes={offset}-{offset + len(view) - 1}"}
        try:
            self._endpoint.fetch("GET", self._bucket, self._wanted, view, asked)
        except Lost as lost:
            # Gone between its head and these bytes: the next try hears so at once.
            raise OSError(str(lost)) from None


def _receive(answer: http.client.HTTPResponse, into: memoryview) -> None:
    done = 0
    while done < len(into):
        got = answer.readinto(into[done:])
        if not got:
            raise OSError(f"{len(into) - done} bytes are missing")
        done += got
    if answer.read(1):
        raise OSError("more bytes than were asked for")


def _record(bucket: str, wanted: Wanted, headers: Mapping[str, str]) -> ObjectRecord:
    modified = email.utils.parsedate_to_datetime(headers["last-modified"]) if "last-modified" in headers else None
    crc = base64.b64decode(headers.get(CRC, "")) or b"\0"
    return ObjectRecord(
        bucket=bucket,
        key=wanted.key,
        version_id=headers.get("x-amz-version-id", "null"),
        object_id=b"",
        sequence=0,
        state=ObjectState.BUFFERED,
        length=wanted.length,
        stored_length=wanted.length,
        etag=wanted.etag,
        crc64nvme=int.from_bytes(crc, "big"),
        modified_ns=0 if modified is None else int(modified.timestamp()) * 1_000_000_000,
        owner="",
        headers={"content-type": headers["content-type"]} if "content-type" in headers else {},
        metadata={name[len(META) :]: value for name, value in headers.items() if name.startswith(META)},
    )


def _refusal(status: int, body: bytes) -> str:
    if status == 404:
        return "is gone"
    if status == 412:
        return "was overwritten while it was replayed"
    if b"<Code>InvalidObjectState</Code>" in body:
        return "is only in the archive: restore it first"
    return "the keys of the Dask workers were refused" if status == 403 else f"answered {status}"


def _shown(bucket: str, key: bytes) -> str:
    return f"s3://{bucket}/{key.decode('utf-8', 'backslashreplace')}"

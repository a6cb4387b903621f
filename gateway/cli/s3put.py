"""A reference S3 sender: signed PUTs with an announced checksum, bounded retries, and refusals heard before the body goes.

In: a file, a key, metadata. Out: ``Sent``, once the node has confirmed the CRC64NVME of exactly these bytes; else ``SendFailed``.
Nothing of a body is read into Python: the file is mapped and sent from the mapping. Standard library and llhttp only, so
that it can be read as documentation of what an instrument has to do.

SigV4: https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import hashlib
import hmac
import html
import mmap
import random
import re
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote, urlsplit

import httptools
from awscrt import checksums

from gateway.users import KeyPair

BLOCK_BYTES = 1 << 20
CRC_BLOCK_BYTES = 64 << 20
CONTINUE_WAIT_S = 2.0
BACKOFF_FIRST_S, BACKOFF_CAP_S, RETRY_AFTER_CAP_S = 0.25, 15.0, 60.0
RETRIED_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
RETRIED_CODES = frozenset({"RequestTimeout", "IncompleteBody", "SlowDown", "BadDigest"})
ANSWER_BYTES_MAX = 1 << 20


class SendFailed(Exception):
    """The object was not confirmed; ``str()`` says why and how often it was tried."""

    def __init__(self, message: str, answer: Answer | None = None) -> None:
        """``answer``: the refusal, where there was one."""
        super().__init__(message)
        self.answer = answer


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """The S3 error code of an XML error body; empty when there is none."""
        found = re.search(rb"<Code>([A-Za-z0-9]{1,64})</Code>", self.body)
        return found[1].decode() if found else ""

    @property
    def message(self) -> str:
        """The reason that an XML error body gives; a line that says so when there is none."""
        found = re.search(rb"<Message>([^<]{1,4000})</Message>", self.body)
        return html.unescape(found[1].decode("utf-8", "replace")) if found else "no reason given"

    @property
    def retriable(self) -> bool:
        return self.status in RETRIED_STATUSES or self.code in RETRIED_CODES


@dataclasses.dataclass(frozen=True, slots=True)
class Sent:
    """A confirmed object. ``crc64nvme`` as base64, as it travels."""

    file: str
    key: str
    size_bytes: int
    etag: str
    crc64nvme: str
    attempts: int
    seconds: float


class Connection:
    """One kept-alive connection to an S3 endpoint. Not for use by two threads at once."""

    def __init__(self, url: str, tls: ssl.SSLContext | None, timeout_s: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SendFailed(f"{url!r} is no http:// or https:// URL")
        self.authority = parts.netloc
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = (tls or ssl.create_default_context()) if parts.scheme == "https" else None
        self._timeout_s = timeout_s
        self._socket: socket.socket | None = None

    def exchange(self, head: bytes, body: memoryview, progress: Callable[[int], None]) -> Answer:
        """Send a request whose head asks for 100 Continue, and return its final answer. Raises OSError."""
        connection = self._connected()
        reader = _AnswerReader()
        try:
            connection.sendall(head)
            # A server that refuses says so now; one that does not know Expect is given the body after a while.
            refused = self._readable(CONTINUE_WAIT_S) and self._read(reader, interim=True)
            sent = 0
            while not refused and sent < len(body):
                connection.sendall(body[sent : sent + BLOCK_BYTES])
                progress(len(body[sent : sent + BLOCK_BYTES]))
                sent += BLOCK_BYTES
                refused = self._readable(0) and self._read(reader, interim=True)
            while reader.answer is None:
                self._read(reader, interim=False)
        except OSError:
            self.close()
            raise
        answer = reader.answer
        if answer.headers.get("connection", "").lower() == "close" or sent < len(body):
            self.close()
        return answer

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connected(self) -> socket.socket:
        if self._socket is None:
            plain = socket.create_connection((self._host, self._port), timeout=self._timeout_s)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket = self._tls.wrap_socket(plain, server_hostname=self._host) if self._tls else plain
        return self._socket

    def _readable(self, timeout_s: float) -> bool:
        assert self._socket is not None
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            return True
        return bool(select.select([self._socket], [], [], timeout_s)[0])

    def _read(self, reader: _AnswerReader, *, interim: bool) -> bool:
        """Take what has arrived; whether the final answer is here. ``interim``: one read is enough."""
        assert self._socket is not None
        while reader.answer is None:
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionResetError("the server closed the connection before it answered")
            reader.feed(data)
            if interim and reader.continued:
                break
        return reader.answer is not None


class _AnswerReader:
    """httptools callbacks: collects one final answer, passing over 1xx."""

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self.continued = False
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._body = bytearray()

    def feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise ConnectionAbortedError(f"the answer is no HTTP: {error}") from None

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, data: bytes) -> None:
        if len(self._body) + len(data) <= ANSWER_BYTES_MAX:
            self._body += data

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            self.continued = True
        else:
            self.answer = Answer(status, self._headers, bytes(self._body))
        self._headers, self._body = {}, bytearray()


def sign(
    method: str,
    path: str,
    headers: dict[str, str],
    keys: KeyPair,
    region: str,
    *,
    query: str = "",
    now: datetime.datetime | None = None,
) -> dict[str, str]:
    """The headers with ``x-amz-date`` and ``authorization``. ``path`` and ``query`` are encoded, the query sorted by name
    (``tagging=``); all headers are signed; the payload is not (its checksum header is, which is what protects the body)."""
    when = (now or datetime.datetime.now(datetime.UTC)).strftime("%Y%m%dT%H%M%SZ")
    payload = "UNSIGNED-PAYLOAD"
    signed = {**headers, "x-amz-date": when, "x-amz-content-sha256": payload}
    names = sorted(signed)
    lines = "".join(f"{name}:{signed[name].strip()}\n" for name in names)
    canonical = "\n".join((method, path, query, lines, ";".join(names), payload))
    scope = f"{when[:8]}/{region}/s3/aws4_request"
    to_sign = "\n".join(("AWS4-HMAC-SHA256", when, scope, hashlib.sha256(canonical.encode()).hexdigest()))
    key = b"AWS4" + keys.secret_key.encode()
    for part in (when[:8], region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    credential = f"Credential={keys.access_key}/{scope}, SignedHeaders={';'.join(names)}, Signature={signature}"
    return {**signed, "authorization": f"AWS4-HMAC-SHA256 {credential}"}


@contextlib.contextmanager
def mapped(file: Path) -> Iterator[memoryview]:
    """The file's bytes, mapped read-only."""
    with file.open("rb") as opened:
        try:
            mapping = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
        except ValueError:  # an empty file cannot be mapped
            yield memoryview(b"")
            return
        with mapping, memoryview(mapping) as view:
            yield view


def crc64nvme(body: memoryview) -> str:
    """CRC-64/NVME of the bytes, base64 of its 8 big-endian bytes, as S3 writes it."""
    crc = 0
    for start in range(0, len(body), CRC_BLOCK_BYTES):
        with body[start : start + CRC_BLOCK_BYTES] as block:
            crc = checksums.crc64nvme(block, crc)
    return base64.b64encode(crc.to_bytes(8, "big")).decode()


def delay_s(attempt: int, answer: Answer | None) -> float:
    """How long to wait after failed attempt ``attempt`` (from 1): what the server asks for, else doubling with jitter."""
    if answer is not None and answer.headers.get("retry-after", "").isdigit():
        return min(float(answer.headers["retry-after"]), RETRY_AFTER_CAP_S)
    return random.uniform(0.5, 1.0) * min(BACKOFF_FIRST_S * 2.0 ** (attempt - 1), BACKOFF_CAP_S)


def put(
    connection: Connection,
    file: Path,
    bucket: str,
    key: str,
    keys: KeyPair,
    *,
    region: str,
    metadata: Mapping[str, str],
    attempts: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Sent:
    """Send one file until it is confirmed or ``attempts`` are used up. ``progress`` is told bytes, negative when a try
    starts over. Raises SendFailed; OSError when the file cannot be read."""
    with mapped(file) as body:
        place = Place(bucket, key, region, str(file))
        return put_body(connection, body, place, keys, metadata=metadata, attempts=attempts, progress=progress)


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a body goes, and where it comes from (``file``, for reports)."""

    bucket: str
    key: str
    region: str
    file: str = ""

    @property
    def path(self) -> str:
        return f"/{quote(self.bucket)}/{quote(self.key, safe='/-_.~')}"


def put_body(
    connection: Connection,
    body: memoryview,
    place: Place,
    keys: KeyPair,
    *,
    metadata: Mapping[str, str],
    attempts: int,
    conditions: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Sent:
    """As ``put``. ``conditions``: further headers, such as ``if-match``."""
    started = time.monotonic()
    crc = crc64nvme(body)
    headers = {
        "host": connection.authority,
        "content-length": str(len(body)),
        "x-amz-checksum-crc64nvme": crc,
        **{f"x-amz-meta-{name}": value for name, value in metadata.items()},
        **(conditions or {}),
    }
    for attempt in range(1, attempts + 1):
        # Each try is signed anew: a signature is only good for some minutes.
        signed = sign("PUT", place.path, headers, keys, place.region)
        lines = "".join(f"{name}: {value}\r\n" for name, value in signed.items())
        head = f"PUT {place.path} HTTP/1.1\r\n{lines}expect: 100-continue\r\n\r\n".encode()
        counted = _Counted(progress)
        answer: Answer | None = None
        try:
            answer = connection.exchange(head, body, counted)
            if answer.status == 200:
                return _confirmed(answer, place, len(body), crc, attempt, time.monotonic() - started)
            reason = f"{answer.status} {answer.code}".strip()
            if not answer.retriable:
                raise SendFailed(f"{place.key}: refused with {reason}: {answer.message}", answer)
        except OSError as error:
            reason = str(error) or type(error).__name__
        counted.take_back()
        if attempt < attempts:
            time.sleep(delay_s(attempt, answer))
    raise SendFailed(f"{place.key}: not confirmed after {attempts} tries; the last one: {reason}", answer)


class _Counted:
    """Progress of one try, which a failure takes back."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        self._progress = progress
        self._total = 0

    def __call__(self, count: int) -> None:
        self._total += count
        self._progress(count)

    def take_back(self) -> None:
        self._progress(-self._total)


def _confirmed(answer: Answer, place: Place, size_bytes: int, crc: str, attempts: int, seconds: float) -> Sent:
    confirmed = answer.headers.get("x-amz-checksum-crc64nvme", "")
    if confirmed != crc:
        raise SendFailed(
            f"{place.key}: the node confirmed checksum {confirmed or 'none'}, sent was {crc}: do not clear it"
        )
    etag = answer.headers.get("etag", "").strip('"')
    return Sent(place.file, place.key, size_bytes, etag, crc, attempts, seconds)

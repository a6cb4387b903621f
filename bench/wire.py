"""The least a client needs: signed request heads made beforehand, and answers read to their end.

Signatures cover the head only (``UNSIGNED-PAYLOAD``), so one head serves every request for its key while the clock allows;
making heads costs nothing inside the measured time.
"""

from __future__ import annotations

import dataclasses
import socket
import ssl

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to send, and as whom. ``access_key`` empty: heads are not signed (bare servers). ``ca``: TLS, trusting this file."""

    host: str
    port: int
    access_key: str = ""
    secret_key: str = ""
    ca: str = ""


class _HeadSigner(S3SigV4Auth):  # type: ignore[misc]
    """Leaves the body out of the signature, over plain HTTP too."""

    def payload(self, _: AWSRequest) -> str:
        return "UNSIGNED-PAYLOAD"


class AnswerError(Exception):
    """The server answered with an error; ``str()`` has its status line and the start of its body."""


def head(endpoint: Endpoint, method: str, path: str, length: int, headers: dict[str, str] | None = None) -> bytes:
    """A complete request head. ``path`` is /bucket/key, already percent-encoded."""
    fields = {"Host": f"{endpoint.host}:{endpoint.port}", **(headers or {})}
    if method in ("PUT", "POST"):
        fields["Content-Length"] = str(length)
    if endpoint.access_key:
        url = f"{'https' if endpoint.ca else 'http'}://{endpoint.host}:{endpoint.port}{path}"
        request = AWSRequest(method, url, headers=fields)
        _HeadSigner(Credentials(endpoint.access_key, endpoint.secret_key), "s3", "us-east-1").add_auth(request)
        fields = dict(request.headers.items())
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


class Connection:
    """A blocking keep-alive connection."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.socket = socket.create_connection((endpoint.host, endpoint.port), timeout=60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if endpoint.ca:
            context = ssl.create_default_context(cafile=endpoint.ca)
            self.socket = context.wrap_socket(self.socket, server_hostname=endpoint.host)
        self._buffer = bytearray(1 << 20)

    def send(self, request_head: bytes, body: memoryview | None = None) -> None:
        self.socket.sendall(request_head)
        if body is not None:
            self.socket.sendall(body)

    def answer(self) -> tuple[int, bytes, int]:
        """(status, head, body bytes read and dropped). Raises AnswerError for a status of 400 or more."""
        return self._answer(None)

    def answer_body(self) -> bytes:
        """The body of an answer that is small."""
        kept = bytearray()
        self._answer(kept)
        return bytes(kept)

    def _answer(self, kept: bytearray | None) -> tuple[int, bytes, int]:
        data = b""
        while (end := data.find(b"\r\n\r\n")) < 0:
            received = self.socket.recv(65536)
            if not received:
                raise AnswerError("the server closed the connection before it answered")
            data += received
        answer_head, rest = data[:end], data[end + 4 :]
        status = int(answer_head.split(b" ", 2)[1])
        length = next(
            (int(line[15:]) for line in answer_head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
        )
        if kept is not None:
            kept += rest
        left = length - len(rest)
        while left > 0:
            count = self.socket.recv_into(self._buffer, min(left, len(self._buffer)))
            if not count:
                raise AnswerError("the server closed the connection inside a body")
            if kept is not None:
                kept += self._buffer[:count]
            if status >= 400:
                rest += self._buffer[:count]
            left -= count
        if status >= 400:
            raise AnswerError(f"{answer_head.splitlines()[0].decode()}: {rest[:400].decode(errors='replace')}")
        return status, answer_head, length

    def call(self, request_head: bytes, body: memoryview | None = None) -> bytes:
        self.send(request_head, body)
        return self.answer()[1]

    def close(self) -> None:
        self.socket.close()

"""Requests and responses as the operations see them: the seam between the HTTP connection and everything above it.

Upstream: s3api/http/connection.py makes ``Request``s and sends ``Response``s. Downstream: S3 operations, WebDAV.
A handler is ``async (Request) -> Response``; it runs as one task of the connection. Control documents (XML, kernel
sources) are read with ``Body.read`` under a limit; object bodies only ever go to a ``BodySink`` with ``Body.into``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol

from ingest.ports import BodySink, FilePiece, ObjectReader


class Headers:
    """Request header fields in arrival order; names are lower-case ``str``, values ``str`` (latin-1 as received)."""

    __slots__ = ("_by_name", "fields")

    def __init__(self, fields: Sequence[tuple[str, str]]) -> None:
        self.fields = tuple(fields)
        self._by_name: dict[str, str] = {}
        for name, value in self.fields:
            # A repeated field is one comma-joined list (RFC 9110 section 5.3).
            self._by_name[name] = f"{self._by_name[name]},{value}" if name in self._by_name else value

    def get(self, name: str, default: str = "") -> str:
        return self._by_name.get(name, default)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> str:
        return self._by_name[name]

    def count(self, name: str) -> int:
        return sum(1 for field, _ in self.fields if field == name)

    def items(self) -> Sequence[tuple[str, str]]:
        return tuple(self._by_name.items())


class ChunkVerifier(Protocol):
    """Checks the signatures of an aws-chunked body as it passes. Raises HttpError(403, "SignatureDoesNotMatch")."""

    def payload(self, view: memoryview) -> None:
        """The next payload bytes, in order, at their final place; valid only during the call."""
        ...

    def chunk_end(self, size: int, signature: str) -> None:
        """A chunk of ``size`` payload bytes is complete; also called for the final chunk, of size 0."""
        ...

    def trailers(self, raw: Sequence[tuple[str, str]], signature: str) -> None:
        """The trailer fields as received (names in their own case, values stripped), without the signature's."""
        ...


class Body(Protocol):
    """The body of one request. The interim 100 Continue is sent by the first call that wants bytes, never before."""

    @property
    def length(self) -> int | None:
        """Payload bytes after every coding is removed; None when only the end of the body will tell."""
        ...

    async def read(self, limit_bytes: int) -> bytes:
        """The whole body of a control document; raises HttpError(413) over the limit."""
        ...

    async def into(self, sink: BodySink) -> int:
        """Receive the payload straight into the sink; returns its length. Raises HttpError on bad framing (400), on a
        body shorter than declared (400 IncompleteBody) and on a stalled peer (408); ConnectionResetError when the
        connection is gone; whatever the sink or a verifier raises."""
        ...

    def unwrap_aws_chunked(
        self, decoded_length: int | None, signed: bool, trailer: bool, verifier: ChunkVerifier | None
    ) -> None:
        """Before the first byte is read: the content is aws-chunked. ``decoded_length``: x-amz-decoded-content-length,
        which the payload must match; ``trailer``: trailers may follow; ``signed``: every chunk carries a signature
        that ``verifier`` checks. From now on ``length`` is ``decoded_length``. Raises HttpError 400 when
        there is no body."""
        ...

    def backlog(self) -> int:
        """Bytes that have come and were not read yet."""
        ...

    def set_window(self, size_bytes: int) -> None:
        """Most that may be on its way beyond what was read; 0: as the system likes."""
        ...

    patient: bool
    """Set before the body is read: whoever sends it may be as slow as its own sender, who is watched there."""

    @property
    def trailers(self) -> Headers:
        """Trailer fields, once the body has been received."""
        ...


@dataclasses.dataclass(slots=True)
class Request:
    method: str
    target: str
    """Request target as on the wire: raw path and query, still percent-encoded (SigV4 signs it verbatim)."""
    path: str
    """Raw path, percent-encoded."""
    query: tuple[tuple[str, str], ...]
    """Decoded query parameters in order; ``?uploads`` and ``?uploads=`` are both ``("uploads", "")``."""
    headers: Headers
    body: Body
    peer: str
    secure: bool
    request_id: str
    scope: dict[str, object] = dataclasses.field(default_factory=dict)
    """Notes of the layers above (user, operation, bytes in/out) for metrics and the access log."""

    @property
    def peer_address(self) -> str:
        """``peer`` without its port; empty where it has none."""
        return self.peer.rpartition(":")[0].strip("[]")

    def arg(self, name: str) -> str | None:
        """First query parameter of this name, decoded; None when absent."""
        for key, value in self.query:
            if key == name:
                return value
        return None


@dataclasses.dataclass(slots=True)
class FileBody:
    """Stored bytes as the body: sent by sendfile (through memory for TLS); afterwards ``closed`` is awaited."""

    pieces: Sequence[FilePiece]
    length: int
    closed: Callable[[], Awaitable[None]]
    chunks: Callable[[int], AsyncIterator[memoryview]] | None = None
    """Where the bytes are in no file here: views of them, each valid until the next."""

    @classmethod
    def of(cls, reader: ObjectReader, length: int) -> FileBody:
        """What an entered ``reader`` has opened; it is left when everything is sent."""

        async def closed() -> None:
            await reader.__aexit__(None, None, None)

        return cls(reader.pieces, length, closed, None if reader.pieces else reader.chunks)


@dataclasses.dataclass(slots=True)
class Response:
    """``body`` is small bytes, a FileBody, or an async iterator of bytes (sent chunked when no length is known)."""

    status: int
    headers: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    body: bytes | FileBody | AsyncIterator[bytes] = b""
    content_length: int | None = None
    """For HEAD: the length to announce although no body is sent."""
    close: bool = False
    """Close the connection after this response."""


Handler = Callable[[Request], Awaitable[Response]]


class HttpError(Exception):
    """The request cannot be understood or received. ``code`` is the S3-style code the outer room renders."""

    def __init__(self, status: int, code: str, message: str, *, close: bool = True) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code
        self.message = message
        self.close = close

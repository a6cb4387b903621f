"""Body framing: Content-Length, HTTP chunked, aws-chunked, and one inside the other. Pure: no socket, no clock.

A ``Framing`` says what the next bytes on the wire are. While ``payload_left`` is more than 0 they are payload, which
the caller puts where it belongs and then reports with ``payload``. While it is 0 they are framing, which the caller
hands to ``take``. ``done`` says that the body has ended. So payload is never touched here and can be received in place.

Sources: RFC 9112 section 7.1; https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-streaming.html and
https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-streaming-trailers.html.
Always holds: framing kept between calls is at most one line (``chunk_line_bytes``) and the trailers
(``trailer_bytes``).
"""

from __future__ import annotations

import abc
import enum
import re
from collections.abc import Sequence
from typing import Protocol

from s3api.http.limits import HttpLimits
from s3api.http.message import ChunkVerifier, HttpError

_HEX = re.compile(rb"[0-9A-Fa-f]{1,15}")
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
__all__ = ["AwsChunkedFraming", "ChunkVerifier", "ChunkedFraming", "Framing", "LengthFraming", "NestedFraming"]

TRAILER_SIGNATURE = "x-amz-trailer-signature"


class Framing(Protocol):
    """Where the next bytes of a body belong; see the module's docstring."""

    @property
    def payload_left(self) -> int: ...
    @property
    def done(self) -> bool: ...
    @property
    def trailers(self) -> Sequence[tuple[str, str]]: ...

    def payload(self, view: memoryview) -> None:
        """The next ``len(view)`` <= ``payload_left`` payload bytes are at ``view``."""
        ...

    def skip(self, count: int) -> None:
        """As ``payload``, for bytes nobody verifies."""
        ...

    def take(self, buffer: bytearray, start: int, stop: int) -> int:
        """Consume framing from ``buffer[start:stop]``; returns where payload, or the end, begins. Raises HttpError."""
        ...


def malformed(message: str) -> HttpError:
    return HttpError(400, "InvalidRequest", message, close=True)


def incomplete(message: str = "The body ended before the number of bytes the request declared.") -> HttpError:
    return HttpError(400, "IncompleteBody", message, close=True)


class LengthFraming:
    """A body of a known number of bytes."""

    __slots__ = ("payload_left",)
    trailers: Sequence[tuple[str, str]] = ()

    def __init__(self, length: int) -> None:
        self.payload_left = length

    @property
    def done(self) -> bool:
        return self.payload_left == 0

    def payload(self, view: memoryview) -> None:
        self.payload_left -= len(view)

    def skip(self, count: int) -> None:
        self.payload_left -= count

    def take(self, buffer: bytearray, start: int, stop: int) -> int:
        return start


class _State(enum.Enum):
    SIZE = enum.auto()
    PAYLOAD = enum.auto()
    PAYLOAD_END = enum.auto()
    TRAILERS = enum.auto()
    DONE = enum.auto()


class _LineFraming(abc.ABC):
    """What the two chunked codings share: size line, payload, CRLF, …, last chunk, trailers, empty line."""

    __slots__ = ("_limits", "_line", "_state", "_trailer_bytes", "_trailers", "payload_left")

    def __init__(self, limits: HttpLimits) -> None:
        self.payload_left = 0
        self._limits = limits
        self._state = _State.SIZE
        self._line = bytearray()
        self._trailers: list[tuple[str, str]] = []
        self._trailer_bytes = 0

    @property
    def done(self) -> bool:
        return self._state is _State.DONE

    @property
    def trailers(self) -> Sequence[tuple[str, str]]:
        return self._trailers

    def payload(self, view: memoryview) -> None:
        self.skip(len(view))

    def skip(self, count: int) -> None:
        self.payload_left -= count
        if not self.payload_left:
            self._state = _State.PAYLOAD_END

    def take(self, buffer: bytearray, start: int, stop: int) -> int:
        while start < stop and not self.payload_left and self._state is not _State.DONE:
            end = buffer.find(b"\n", start, stop)
            size = (end + 1 if end >= 0 else stop) - start
            if len(self._line) + size > self._limits.chunk_line_bytes:
                raise malformed(f"A line of chunk framing is longer than {self._limits.chunk_line_bytes} bytes.")
            if end < 0:
                self._line += buffer[start:stop]
                return stop
            line = bytes(buffer[start : end + 1])
            if self._line:
                line = bytes(self._line) + line
                self._line.clear()
            start = end + 1
            self._on_line(line)
        return start

    def _on_line(self, line: bytes) -> None:
        if self._state is _State.TRAILERS:
            self._trailer_line(line)
            return
        if not line.endswith(b"\r\n"):
            raise malformed("Lines of chunk framing must end in CR LF.")
        if self._state is _State.PAYLOAD_END:
            if line != b"\r\n":
                raise malformed("A chunk is longer than its size line says.")
            self._state = _State.SIZE
            return
        size = self._size_line(line[:-2])
        if size:
            self.payload_left = size
            self._state = _State.PAYLOAD
        else:
            self._state = _State.TRAILERS

    @abc.abstractmethod
    def _size_line(self, line: bytes) -> int:
        """Payload bytes of the chunk that this line begins; 0 for the last."""

    @abc.abstractmethod
    def _trailer_line(self, line: bytes) -> None:
        """A line behind the last chunk."""

    def _add_trailer(self, line: bytes) -> tuple[str, str]:
        self._trailer_bytes += len(line)
        if self._trailer_bytes > self._limits.trailer_bytes or len(self._trailers) >= self._limits.trailer_fields:
            raise HttpError(400, "MalformedTrailerError", "The body's trailer section is too large.", close=True)
        name, colon, value = line.partition(b":")
        value = value.strip(b" \t\r\n")
        if not colon or not _TOKEN.fullmatch(name) or _CONTROL.search(value):
            raise HttpError(400, "MalformedTrailerError", "The body's trailer section is malformed.", close=True)
        field = (name.decode("ascii"), value.decode("latin-1"))
        self._trailers.append(field)
        return field


class ChunkedFraming(_LineFraming):
    """Transfer-Encoding: chunked (RFC 9112 section 7.1). Chunk extensions are ignored."""

    __slots__ = ()

    def _size_line(self, line: bytes) -> int:
        digits, semicolon, extension = line.partition(b";")
        if semicolon:
            digits = digits.rstrip(b" \t")
        if not _HEX.fullmatch(digits) or _CONTROL.search(extension):
            raise malformed("A chunk size is not a hexadecimal number.")
        return int(digits, 16)

    def _trailer_line(self, line: bytes) -> None:
        if not line.endswith(b"\r\n"):
            raise malformed("Trailer lines must end in CR LF.")
        if line == b"\r\n":
            self._state = _State.DONE
        else:
            self._add_trailer(line)


class AwsChunkedFraming(_LineFraming):
    """Content-Encoding: aws-chunked, in its four forms: signed or not, with trailers or not.

    ``decoded_length``: x-amz-decoded-content-length; the payload must be exactly that long.
    """

    __slots__ = ("_decoded_length", "_received", "_signature", "_signed", "_size", "_trailer", "_verifier")

    def __init__(
        self,
        limits: HttpLimits,
        *,
        decoded_length: int | None,
        signed: bool,
        trailer: bool,
        verifier: ChunkVerifier | None,
    ) -> None:
        super().__init__(limits)
        if signed and verifier is None:
            raise ValueError("a signed aws-chunked body needs a verifier")
        self._decoded_length = decoded_length
        self._signed = signed
        self._trailer = trailer
        self._verifier = verifier
        self._received = 0
        self._size = 0
        self._signature = ""

    def payload(self, view: memoryview) -> None:
        if self._verifier is not None:
            self._verifier.payload(view)
        self.skip(len(view))

    def skip(self, count: int) -> None:
        super().skip(count)
        self._received += count
        if not self.payload_left and self._verifier is not None:
            self._verifier.chunk_end(self._size, self._signature)

    def _size_line(self, line: bytes) -> int:
        digits, _, extension = line.partition(b";")
        if not _HEX.fullmatch(digits):
            raise HttpError(400, "InvalidChunkSizeError", "An aws-chunk's size is not a hexadecimal number.")
        self._size = int(digits, 16)
        name, _, signature = extension.partition(b"=")
        self._signature = signature.decode("latin-1").strip() if name.strip() == b"chunk-signature" else ""
        if self._signed and not self._signature:
            raise HttpError(403, "SignatureDoesNotMatch", "An aws-chunk of a signed body has no signature.")
        expected = self._decoded_length
        if expected is not None and (
            self._received + self._size > expected or (not self._size and self._received != expected)
        ):
            raise incomplete("The body is not as long as x-amz-decoded-content-length says.")
        if not self._size and self._verifier is not None:
            self._verifier.chunk_end(0, self._signature)
        return self._size

    def _trailer_line(self, line: bytes) -> None:
        """Some SDKs end trailer lines in a bare LF, and put an empty line before the signature's line."""
        if line.strip(b"\r\n"):
            if not self._trailer:
                raise malformed("An aws-chunked body without trailers goes on after its last chunk.")
            self._add_trailer(line)
            return
        if not self._trailer:
            self._state = _State.DONE
            return
        signature = next((value for name, value in self._trailers if name.lower() == TRAILER_SIGNATURE), "")
        if self._signed and not signature:
            self._trailer_bytes += len(line)
            if self._trailer_bytes > self._limits.trailer_bytes:
                raise HttpError(400, "MalformedTrailerError", "The body's trailers are not signed.", close=True)
            return
        self._trailers = [field for field in self._trailers if field[0].lower() != TRAILER_SIGNATURE]
        self._state = _State.DONE
        if self._verifier is not None:
            self._verifier.trailers(self._trailers, signature)


class NestedFraming:
    """aws-chunked inside Content-Length or HTTP chunked: payload is what both call payload."""

    __slots__ = ("_inner", "_outer", "_slack_bytes")

    def __init__(self, outer: Framing, inner: Framing) -> None:
        self._outer = outer
        self._inner = inner
        # Some SDKs send one more empty line behind the trailers.
        self._slack_bytes = 4
        self._check_end()

    @property
    def payload_left(self) -> int:
        return min(self._outer.payload_left, self._inner.payload_left)

    @property
    def done(self) -> bool:
        return self._outer.done and self._inner.done

    @property
    def trailers(self) -> Sequence[tuple[str, str]]:
        return (*self._outer.trailers, *self._inner.trailers)

    def payload(self, view: memoryview) -> None:
        self._inner.payload(view)
        self._outer.skip(len(view))
        self._check_end()

    def skip(self, count: int) -> None:
        self._inner.skip(count)
        self._outer.skip(count)
        self._check_end()

    def take(self, buffer: bytearray, start: int, stop: int) -> int:
        outer, inner = self._outer, self._inner
        while start < stop and not self.done:
            room = outer.payload_left
            if not room:
                start = outer.take(buffer, start, stop)
            elif inner.done:
                end = min(stop, start + room, start + self._slack_bytes)
                if end == start or buffer[start:end].strip(b"\r\n"):
                    raise malformed("The body goes on after its last aws-chunk.")
                self._slack_bytes -= end - start
                outer.skip(end - start)
                start = end
            elif inner.payload_left:
                break
            else:
                end = inner.take(buffer, start, min(stop, start + room))
                outer.skip(end - start)
                start = end
            self._check_end()
        return start

    def _check_end(self) -> None:
        if self._outer.done and not self._inner.done:
            raise incomplete("The body ended before its last aws-chunk.")

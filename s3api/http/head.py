"""Request heads: find the end, refuse what is ambiguous, parse with llhttp.

In: the bytes of one head, request line to empty line. Out: a ``Head``. Pure: no socket, no clock. llhttp never sees a
body byte, so the framing decided here is the only opinion there is about where a body ends (RFC 9112 section 6.3);
whatever could be read in two ways by two servers is refused with 400.
"""

from __future__ import annotations

import dataclasses
import re
from urllib.parse import unquote

import httptools

from s3api.http.limits import HttpLimits
from s3api.http.message import Headers, HttpError

# Octets a head may hold: visible ASCII, space, tab, CR, LF, obs-text. Deleting these must leave nothing.
_ALLOWED_OCTETS = bytes([9, 10, 13, *range(32, 127), *range(128, 256)])
_DIGITS = re.compile(r"[0-9]{1,18}")
_FIRST_OCTET = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_ABSOLUTE = re.compile(r"https?://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)
HEAD_END = b"\r\n\r\n"


@dataclasses.dataclass(slots=True)
class Head:
    """One parsed request head. ``content_length`` is None exactly when the body is ``chunked``."""

    method: str
    target: str
    """In origin-form, still percent-encoded."""
    path: str
    query: tuple[tuple[str, str], ...]
    headers: Headers
    http11: bool
    keep_alive: bool
    content_length: int | None
    chunked: bool
    expects_continue: bool

    @property
    def has_body(self) -> bool:
        return self.content_length != 0


def refuse(status: int, code: str, message: str) -> HttpError:
    return HttpError(status, code, message, close=True)


def bad_request(message: str) -> HttpError:
    return refuse(400, "InvalidRequest", message)


def find_head_end(buffer: bytearray, start: int, scanned: int, stop: int, limits: HttpLimits) -> int:
    """Index just behind the head that begins at ``start``, or -1 when more bytes are needed.

    ``scanned``: bytes before it were searched by an earlier call. Raises HttpError 400 as soon as it can no longer
    become a head, 431 when it is longer than allowed.
    """
    if buffer[start] not in _FIRST_OCTET:
        if buffer[start] == 0x16:
            raise bad_request("This looks like a TLS handshake; this port speaks plain HTTP.")
        raise bad_request("The request does not start with a method.")
    resume = max(start, scanned - len(HEAD_END) + 1)
    end = buffer.find(HEAD_END, resume, stop)
    if end >= 0:
        end += len(HEAD_END)
    elif buffer.find(b"\n\n", resume, stop) >= 0:
        raise bad_request("Header lines must end in CR LF.")
    if (end if end >= 0 else stop) - start > limits.head_bytes:
        raise refuse(431, "RequestHeaderSectionTooLarge", f"The request head is longer than {limits.head_bytes} bytes.")
    return end


class _Callbacks:
    """What llhttp found, in order."""

    __slots__ = ("complete", "fields", "target")

    def __init__(self) -> None:
        self.target = b""
        self.fields: list[tuple[str, str]] = []
        self.complete = False

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name.decode("latin-1").lower(), value.decode("latin-1").strip(" \t")))

    def on_headers_complete(self) -> None:
        self.complete = True


def parse_head(raw: bytes, limits: HttpLimits) -> Head:
    """Parse one head, ``raw`` ending in the empty line. Raises HttpError (400, 431, 501, 505)."""
    version = _check_octets(raw, limits)
    callbacks = _Callbacks()
    parser = httptools.HttpRequestParser(callbacks)
    try:
        parser.feed_data(raw)
    except httptools.HttpParserUpgrade:
        pass  # Upgrade is optional for a server: the request is served as it stands (RFC 9110 section 7.8).
    except httptools.HttpParserInvalidMethodError:
        raise refuse(501, "NotImplemented", "The request method is not one this server knows.") from None
    except httptools.HttpParserError as error:
        raise bad_request(f"The request head is malformed: {error}.") from None
    if not callbacks.complete:
        raise bad_request("The request head is malformed.")
    method = parser.get_method().decode("ascii")
    headers = Headers(callbacks.fields)
    http11 = version == "1.1"
    content_length, chunked = _body_length(headers, http11=http11)
    target = _origin_form(method, callbacks.target.decode("latin-1"), headers, http11=http11)
    path, _, query = target.partition("?")
    tokens = headers.get("connection").lower().replace(" ", "").split(",") if "connection" in headers else ()
    return Head(
        method=method,
        target=target,
        path=path,
        query=_parse_query(query, limits) if query else (),
        headers=headers,
        http11=http11,
        keep_alive=http11 and "close" not in tokens,
        content_length=content_length,
        chunked=chunked,
        expects_continue=_expects_continue(headers, http11=http11),
    )


def _check_octets(raw: bytes, limits: HttpLimits) -> str:
    """Everything llhttp is more forgiving about than two servers in a row can afford. Returns the HTTP version."""
    lines = raw.count(b"\r\n")
    if raw.count(b"\n") != lines or raw.count(b"\r") != lines:
        raise bad_request("Header lines must end in CR LF.")
    if raw.translate(None, _ALLOWED_OCTETS):
        raise bad_request("The request head holds control characters.")
    if b"\n " in raw or b"\n\t" in raw:
        raise bad_request("A header field must not be folded over lines.")
    if lines - 2 > limits.head_fields:
        raise refuse(431, "RequestHeaderSectionTooLarge", f"More than {limits.head_fields} header fields.")
    parts = raw[: raw.index(b"\r\n")].split(b" ")
    if len(parts) != 3 or b"\t" in raw[: raw.index(b"\r\n")]:
        raise bad_request("The request line is not method, target and version.")
    if parts[2] not in (b"HTTP/1.1", b"HTTP/1.0"):
        if parts[2].startswith(b"HTTP/"):
            raise refuse(505, "HTTPVersionNotSupported", "This server speaks HTTP/1.1.")
        raise bad_request("The request line does not name HTTP/1.1.")
    return parts[2][5:].decode("ascii")


def _body_length(headers: Headers, *, http11: bool) -> tuple[int | None, bool]:
    """(Content-Length or None, chunked) by RFC 9112 section 6.3; no body at all is (0, False)."""
    if "transfer-encoding" in headers:
        if "content-length" in headers:
            raise bad_request("Content-Length and Transfer-Encoding exclude each other.")
        if not http11:
            raise bad_request("HTTP/1.0 has no Transfer-Encoding.")
        if headers["transfer-encoding"].lower() != "chunked":
            raise refuse(501, "NotImplemented", "The only Transfer-Encoding understood is chunked.")
        return None, True
    if "content-length" not in headers:
        return 0, False
    if headers.count("content-length") > 1 or not _DIGITS.fullmatch(headers["content-length"]):
        raise bad_request("Content-Length must be one decimal number.")
    return int(headers["content-length"]), False


def _origin_form(method: str, target: str, headers: Headers, *, http11: bool) -> str:
    """The request target as path and query; absolute-form is unwrapped (RFC 9112 section 3.2)."""
    if headers.count("host") > 1 or (http11 and "host" not in headers):
        raise bad_request("A request needs exactly one Host header field.")
    if "#" in target:
        raise refuse(400, "InvalidURI", "The request target must not hold a fragment.")
    if target.startswith("/"):
        return target
    if target == "*" and method == "OPTIONS":
        return target
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None:
        raise refuse(400, "InvalidURI", "The request target must be an absolute path.")
    authority, rest = absolute.groups()
    if "host" in headers and authority.lower() != headers["host"].lower():
        raise bad_request("The request target and the Host header field name different hosts.")
    return rest if rest.startswith("/") else "/" + rest


def _parse_query(query: str, limits: HttpLimits) -> tuple[tuple[str, str], ...]:
    parameters = query.split("&")
    if len(parameters) > limits.query_parameters:
        raise refuse(400, "InvalidURI", f"More than {limits.query_parameters} query parameters.")
    try:
        return tuple(
            (_decode(name), _decode(value)) for name, _, value in (p.partition("=") for p in parameters) if name
        )
    except UnicodeDecodeError:
        raise refuse(400, "InvalidURI", "The query is not percent-encoded UTF-8.") from None


def _decode(text: str) -> str:
    text = text.replace("+", " ")
    return unquote(text, errors="strict") if "%" in text else text


def _expects_continue(headers: Headers, *, http11: bool) -> bool:
    """RFC 9110 section 10.1.1: ignored from HTTP/1.0. Other expectations too, as S3 does (a server may answer 417)."""
    if not http11 or "expect" not in headers:
        return False
    return any(member.strip().lower() == "100-continue" for member in headers["expect"].split(","))

"""Body framing without a socket: every coding, cut everywhere, and everything that must not be believed."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3api.http.chunked import AwsChunkedFraming, ChunkedFraming, Framing, LengthFraming, NestedFraming
from s3api.http.limits import HttpLimits
from s3api.http.message import HttpError

LIMITS = HttpLimits()
SIGNATURE = "f" * 64


@dataclasses.dataclass
class Recorder:
    """A ChunkVerifier that writes down what it is told."""

    seen: bytearray = dataclasses.field(default_factory=bytearray)
    chunks: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    trailer: tuple[list[tuple[str, str]], str] | None = None

    def payload(self, view: memoryview) -> None:
        self.seen += view

    def chunk_end(self, size: int, signature: str) -> None:
        self.chunks.append((size, signature))

    def trailers(self, raw, signature: str) -> None:
        self.trailer = (list(raw), signature)


def http_chunks(body: bytes, sizes: list[int], trailers: bytes = b"", extension: bytes = b"") -> bytes:
    out, at = bytearray(), 0
    for size in sizes:
        part = body[at : at + size]
        at += size
        if part:
            out += b"%x%b\r\n%b\r\n" % (len(part), extension, part)
    if body[at:]:
        out += b"%x\r\n%b\r\n" % (len(body) - at, body[at:])
    return bytes(out + b"0\r\n" + trailers + b"\r\n")


def aws_chunks(body: bytes, size: int, *, signed: bool, trailer: bytes = b"") -> bytes:
    sign = b";chunk-signature=" + SIGNATURE.encode() if signed else b""
    out = bytearray()
    for at in range(0, len(body), size):
        part = body[at : at + size]
        out += b"%x%b\r\n%b\r\n" % (len(part), sign, part)
    return bytes(out + b"0%b\r\n%b\r\n" % (sign, trailer))


def run(framing: Framing, pieces: list[bytes]) -> tuple[bytes, bytes]:
    """(payload, bytes left over behind the end), as a connection would drive it."""
    payload = bytearray()
    left = bytearray()
    for piece in pieces:
        buffer, at = bytearray(piece), 0
        while at < len(buffer) and not framing.done:
            count = min(framing.payload_left, len(buffer) - at)
            if count:
                framing.payload(memoryview(buffer)[at : at + count])
                payload += buffer[at : at + count]
                at += count
            else:
                at = framing.take(buffer, at, len(buffer))
        left += buffer[at:]
    return bytes(payload), bytes(left)


def cut(raw: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(c % (len(raw) + 1) for c in cuts), len(raw)]
    return [raw[a:b] for a, b in itertools.pairwise(edges) if a < b]


def aws(decoded: int | None, *, signed: bool, trailer: bool) -> tuple[AwsChunkedFraming, Recorder]:
    verifier = Recorder()
    return AwsChunkedFraming(
        LIMITS, decoded_length=decoded, signed=signed, trailer=trailer, verifier=verifier
    ), verifier


bodies = st.binary(max_size=400)
cuts = st.lists(st.integers(0, 10_000), max_size=40)
sizes = st.lists(st.integers(0, 60), max_size=20)


@given(bodies, sizes, cuts)
def test_http_chunks_cut_anywhere(body, chunk_sizes, where):
    framing = ChunkedFraming(LIMITS)
    raw = http_chunks(body, chunk_sizes, b"x-checksum: abc\r\n", b";name=value")
    assert run(framing, cut(raw + b"NEXT", where)) == (body, b"NEXT")
    assert framing.done
    assert list(framing.trailers) == [("x-checksum", "abc")]


@given(bodies, st.integers(1, 120), sizes, cuts, st.booleans(), st.booleans(), st.booleans())
def test_aws_chunks_inside_either_coding_cut_anywhere(body, size, http_sizes, where, signed, trailer, in_chunks):
    fields = b"x-amz-checksum-crc32:AAAA==\r\n" if trailer else b""
    if trailer and signed:
        fields += b"x-amz-trailer-signature:" + SIGNATURE.encode() + b"\r\n"
    encoded = aws_chunks(body, size, signed=signed, trailer=fields)
    raw = http_chunks(encoded, http_sizes) if in_chunks else encoded
    outer: Framing = ChunkedFraming(LIMITS) if in_chunks else LengthFraming(len(encoded))
    inner, verifier = aws(len(body), signed=signed, trailer=trailer)
    framing = NestedFraming(outer, inner)
    assert run(framing, cut(raw + b"NEXT", where)) == (body, b"NEXT")
    assert framing.done
    assert verifier.seen == body
    assert sum(count for count, _ in verifier.chunks) == len(body)
    assert verifier.chunks[-1][0] == 0
    assert {mark for _, mark in verifier.chunks} == {SIGNATURE if signed else ""}
    if trailer:
        assert verifier.trailer == ([("x-amz-checksum-crc32", "AAAA==")], SIGNATURE if signed else "")
        assert list(framing.trailers) == [("x-amz-checksum-crc32", "AAAA==")]


def test_every_single_cut_of_one_request():
    encoded = aws_chunks(b"abcdef", 4, signed=True)
    raw = http_chunks(encoded, [3, 90, 5])
    for at in range(1, len(raw)):
        inner, _ = aws(6, signed=True, trailer=False)
        assert run(NestedFraming(ChunkedFraming(LIMITS), inner), [raw[:at], raw[at:]]) == (b"abcdef", b"")


@pytest.mark.parametrize(
    "trailer",
    [
        b"x-amz-checksum-crc32c:AAAA==\n\r\nx-amz-trailer-signature:" + SIGNATURE.encode() + b"\r\n",
        b"x-amz-checksum-crc32c:AAAA==\r\nX-Amz-Trailer-Signature: " + SIGNATURE.encode() + b"\r\n",
    ],
)
def test_signed_trailers_as_different_sdks_write_them(trailer):
    encoded = aws_chunks(b"abc", 3, signed=True, trailer=trailer)
    inner, verifier = aws(3, signed=True, trailer=True)
    assert run(NestedFraming(LengthFraming(len(encoded)), inner), [encoded]) == (b"abc", b"")
    assert verifier.trailer == ([("x-amz-checksum-crc32c", "AAAA==")], SIGNATURE)


def test_one_more_empty_line_behind_unsigned_trailers():
    encoded = aws_chunks(b"abc", 3, signed=False, trailer=b"x-amz-checksum-crc32c:AAAA==\n\r\n")
    inner, _ = aws(3, signed=False, trailer=True)
    framing = NestedFraming(LengthFraming(len(encoded)), inner)
    assert run(framing, [encoded]) == (b"abc", b"")
    assert framing.done


@pytest.mark.parametrize(
    "raw",
    [
        b"zz\r\n", b"+5\r\nabcde\r\n", b"0x5\r\n", b"5_0\r\n", b" 5\r\n", b"\r\n", b"-1\r\n", b"1" * 16 + b"\r\n",
        b"5\nabcde\r\n", b"5\r\nabcdefg\r\n", b"5;a\0\r\n", b"0\r\nno colon\r\n\r\n", b"0\r\nbad name: x\r\n\r\n",
        b"0\r\na: b\n\r\n", b"0\r\n: b\r\n\r\n", b"f" * 20_000,
        b"0\r\n" + b"".join(b"a%d: b\r\n" % i for i in range(30)) + b"\r\n",
        b"0\r\n" + b"".join(b"a%d: %b\r\n" % (i, b"b" * 9000) for i in range(2)) + b"\r\n",
    ],
)  # fmt: skip
def test_malformed_http_chunks(raw):
    with pytest.raises(HttpError) as caught:
        run(ChunkedFraming(LIMITS), [raw])
    assert caught.value.status == 400
    assert caught.value.close


@pytest.mark.parametrize(
    ("raw", "decoded", "signed", "trailer", "expected"),
    [
        (b"3\r\nabc\r\n0\r\n\r\n", 4, False, False, (400, "IncompleteBody")),
        (b"3\r\nabc\r\n0\r\n\r\n", 2, False, False, (400, "IncompleteBody")),
        (b"3\r\nabc\r\n", 3, False, False, (400, "IncompleteBody")),
        (b"3\r\nab", 3, False, False, (400, "IncompleteBody")),
        (b"xyz\r\nabc\r\n", None, False, False, (400, "InvalidChunkSizeError")),
        (b"3\r\nabc\r\n0\r\n\r\n", 3, True, False, (403, "SignatureDoesNotMatch")),
        (b"3\r\nabc\r\n0\r\n\r\nmore", 3, False, False, (400, "InvalidRequest")),
        (b"3\r\nabc\r\n0\r\n\r\n\r\n\r\n\r\n", 3, False, False, (400, "InvalidRequest")),
        (b"3\r\nabc\r\n0\r\na:b\r\n\r\n", 3, False, False, (400, "InvalidRequest")),
        (b"3\r\nabcd\r\n0\r\n\r\n", 3, False, False, (400, "InvalidRequest")),
        (b"0;chunk-signature=f\r\na:b\r\n\r\n", 0, True, True, (400, "IncompleteBody")),
        (b"0;chunk-signature=f\r\n" + b"\r\n" * 9000, 0, True, True, (400, "MalformedTrailerError")),
    ],
)
def test_malformed_aws_chunks(raw, decoded, signed, trailer, expected):
    inner, _ = aws(decoded, signed=signed, trailer=trailer)
    with pytest.raises(HttpError) as caught:
        run(NestedFraming(LengthFraming(len(raw)), inner), [raw])
    assert (caught.value.status, caught.value.code) == expected


def test_an_aws_chunked_body_cannot_be_empty():
    inner, _ = aws(0, signed=False, trailer=False)
    with pytest.raises(HttpError, match="IncompleteBody"):
        NestedFraming(LengthFraming(0), inner)


def test_a_signed_body_needs_a_verifier():
    with pytest.raises(ValueError, match="verifier"):
        AwsChunkedFraming(LIMITS, decoded_length=None, signed=True, trailer=False, verifier=None)

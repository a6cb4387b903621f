"""Targets without a socket: request heads, body framings with their signatures, XML documents."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable

from s3api import xml
from s3api.auth.chunks import ChunkSignatures
from s3api.errors import S3Error
from s3api.http.chunked import AwsChunkedFraming, ChunkedFraming, Framing, LengthFraming, NestedFraming
from s3api.http.head import Head, find_head_end, parse_head
from s3api.http.limits import HttpLimits
from s3api.http.message import HttpError

LIMITS = HttpLimits(head_bytes=8192, inbox_bytes=1024, chunk_line_bytes=256, trailer_bytes=512)
KEY, STAMP, SCOPE, SEED = bytes(32), "20260101T000000Z", "20260101/us-east-1/s3/aws4_request", "0" * 64
_EMPTY = hashlib.sha256(b"").hexdigest()

HEADS = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PUT /b/k%20?partNumber=1&uploadId=a%2Fb&x=+ HTTP/1.1\r\nHost: x:1\r\nContent-Length: 10\r\nExpect: 100-continue\r\n\r\n",
    b"PUT http://x/b/k HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: keep-alive, close\r\n\r\n",
    b"OPTIONS * HTTP/1.0\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\nTransfer-Encoding : chunked\r\n a\r\n\r\n",
]


def heads(data: bytes) -> None:
    """A head is parsed or refused with a status of its own, by any cut; what is accepted can be read in one way only."""
    if not data:
        return
    outcomes = [_head(data, cut) for cut in {len(data), len(data) // 2, 1}]
    assert all(outcome == outcomes[0] for outcome in outcomes), outcomes


def _head(data: bytes, step: int) -> tuple[object, ...]:
    buffer, scanned = bytearray(data), 0
    for stop in [*range(step, len(data), step or 1), len(data)]:
        try:
            end = find_head_end(buffer, 0, scanned, stop, LIMITS)
        except HttpError as error:
            # Whether a limit or an early sign of nonsense is seen first depends on the cut; that it is refused does not.
            assert 400 <= error.status < 500
            return ("refused",)
        if end >= 0:
            try:
                return _checked(parse_head(data[:end], LIMITS))
            except HttpError as error:
                assert 400 <= error.status < 500 or error.status in (501, 505), error
                return ("refused",)
        scanned = stop
    return ("more",)


def _checked(head: Head) -> tuple[object, ...]:
    names = [name for name, _ in head.headers.fields]
    assert head.chunked == (head.content_length is None) == ("transfer-encoding" in names)
    assert not (head.chunked and "content-length" in names)
    assert names.count("content-length") <= 1
    assert all(name == name.strip() and "\n" not in value and "\r" not in value for name, value in head.headers.fields)
    assert head.target.startswith("/") or head.target == "*"
    assert "#" not in head.target
    assert head.target.partition("?")[0] == head.path
    return (head.method, head.target, head.headers.fields, head.content_length, head.keep_alive)


BODIES = [
    b"\x00\x00\x05\x00" + b"5\r\nhello\r\n0\r\n\r\n",
    b"\x01\x00\x05\x03"
    + b"5;chunk-signature="
    + b"0" * 64
    + b"\r\nhello\r\n0;chunk-signature="
    + b"0" * 64
    + b"\r\n\r\n",
    b"\x03\x01\x05\x01" + b"5\r\nhello\r\n0\r\nx-amz-checksum-crc32:AAAA==\n\r\nx-amz-trailer-signature:0\r\n\r\n",
    b"\x0a\x02\x05\x07" + b"18\r\n5\r\nhello\r\n0\r\na:b\r\n\r\n\r\n0\r\nt: u\r\n\r\n",
    b"\x09\x02\x05\x07" + b"ffffffffffffffff;a=b\r\n",
]


def framings(data: bytes) -> None:
    """A body gives the same payload or the same refusal however the wire cuts it; never more payload than declared."""
    if len(data) < 4:
        return
    kind, _, decoded, step = data[:4]
    wire = data[4:]
    # Signatures that fit, where asked for: the decoder's way behind a good signature is the one that matters.
    if kind & 16:
        wire = signed_chunks(wire)
    whole, cut = _decode(kind, decoded, wire, len(wire) or 1), _decode(kind, decoded, wire, step % 31 + 1)
    assert whole == cut, (whole, cut)


def signed_chunks(payload: bytes) -> bytes:
    """``payload`` as an aws-chunked body that verifies, in up to four chunks."""
    out, previous, step = b"", SEED, max(len(payload) // 3, 1)
    for chunk in [*(payload[at : at + step] for at in range(0, len(payload), step)), b""]:
        digest = hashlib.sha256(chunk).hexdigest()
        text = f"AWS4-HMAC-SHA256-PAYLOAD\n{STAMP}\n{SCOPE}\n{previous}\n{_EMPTY}\n{digest}"
        previous = hmac.digest(KEY, text.encode(), "sha256").hex()
        out += b"%x;chunk-signature=%b\r\n%b\r\n" % (len(chunk), previous.encode(), chunk)
    return out


def _decode(kind: int, decoded: int, wire: bytes, step: int) -> tuple[bytes, object, int]:
    """(payload, error code or trailers, bytes used)"""
    signed, trailer, in_chunks, aws = bool(kind & 17), bool(kind & 2), bool(kind & 8), kind & 4 == 0
    verifier = ChunkSignatures(KEY, STAMP, SCOPE, SEED) if signed else None
    payload, start, arrived = bytearray(), 0, 0
    buffer = bytearray(wire)
    try:
        outer: Framing = ChunkedFraming(LIMITS) if in_chunks else LengthFraming(len(wire))
        framing = outer
        if aws:
            expected = None if kind & 16 else decoded
            inner = AwsChunkedFraming(
                LIMITS, decoded_length=expected, signed=signed, trailer=trailer, verifier=verifier
            )
            framing = NestedFraming(outer, inner)
        while not framing.done and start < len(wire):
            arrived = max(arrived, min(start + step, len(wire)))
            left = framing.payload_left
            if left:
                count = min(left, arrived - start)
                payload += wire[start : start + count]
                framing.payload(memoryview(buffer)[start : start + count])
                start += count
            else:
                before = start
                start = framing.take(buffer, start, arrived)
                assert before <= start <= arrived
                if start == before and arrived == len(wire):
                    break
                arrived = max(arrived, min(start + step, len(wire)))
        if aws and not kind & 16:
            assert len(payload) <= decoded
        return bytes(payload), tuple(framing.trailers) if framing.done else "more", start if framing.done else 0
    except (HttpError, S3Error) as error:
        assert 400 <= error.status < 500, error
        # How much payload was seen before a refusal depends on the cut, and so may which of two faults is seen first.
        return b"", "refused", 0


ROOTS = ("Delete", "CompleteMultipartUpload", "Tagging", "CreateBucketConfiguration")
DOCUMENTS = [
    b"<Delete><Quiet>true</Quiet><Object><Key>a&#x20;b</Key></Object></Delete>",
    b'<?xml version="1.0" encoding="UTF-16"?><Tagging/>',
    b'<!DOCTYPE a [<!ENTITY b "c"><!ENTITY d "&b;&b;">]><Delete>&d;</Delete>',
    b'<CompleteMultipartUpload xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Part><PartNumber>1</PartNumber>'
    b"<ETag>&quot;x&quot;</ETag></Part></CompleteMultipartUpload>",
    b"<Tagging>" + b"<a>" * 20 + b"</a>" * 20 + b"</Tagging>",
]


def documents(data: bytes) -> None:
    """A document is read or BadXml; what is read stays small, and is written again as something that can be read."""
    for root in ROOTS:
        try:
            tree = xml.parse(data, root)
        except xml.BadXml:
            continue
        texts = [element.text or "" for element in tree.iter()]
        assert len(texts) <= xml.ELEMENTS_MAX
        assert sum(map(len, texts)) <= len(data)
        written = xml.document(root, [("Text", text) for text in texts[:100]])
        again = xml.parse(written, root)
        assert [element.text or "" for element in again] == texts[:100]


TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "heads": (heads, HEADS),
    "framings": (framings, BODIES),
    "documents": (documents, DOCUMENTS),
}

"""What a client says about a body before, beside and behind it; and whether it holds.

In: the head of a PUT (``x-amz-content-sha256``, Content-MD5, ``x-amz-checksum-*``, ``x-amz-trailer``, lengths).
Out: a ``BodyPlan``: which digests the data path must compute, and after the body ``verify``. Whatever is wrong with the
head is refused here, before a byte of the body is asked for. What real SDKs send differs by transport and language; all
combinations of https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html are taken.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
from collections.abc import Mapping

from awscrt import checksums as crt

from s3api import checksums
from s3api.auth.signed import Signed
from s3api.checksums import Algorithm
from s3api.errors import S3Error
from s3api.http.message import Headers, Request

AWS_CHUNKED = "aws-chunked"


@dataclasses.dataclass(frozen=True, slots=True)
class BodyPlan:
    """What must be true of a body that is about to be received."""

    length: int | None
    """Payload bytes; None when only the end of the body will tell."""
    sha256: bytes | None
    """From a signed ``x-amz-content-sha256``."""
    md5: bytes | None
    algorithm: Algorithm | None
    """The checksum the client chose; None: CRC64NVME alone."""
    value: bytes | None
    """Its value from the head; None when it comes in the trailer, or not at all (an upload's algorithm)."""
    in_trailer: bool

    def algorithms(self, *, md5: bool) -> frozenset[str]:
        """Digests the data path computes beside CRC64NVME. ``md5``: wanted for the ETag."""
        wanted = set()
        if self.sha256 is not None:
            wanted.add("sha256")
        if md5 or self.md5 is not None:
            wanted.add("md5")
        if self.algorithm is not None and self.algorithm.name != "crc64nvme":
            wanted.add(self.algorithm.name)
        return frozenset(wanted)

    def verify(self, length: int, crc64nvme: int, digests: Mapping[str, bytes], trailers: Headers) -> dict[str, str]:
        """Compare what was received with what was said. Returns the checksums to record, name -> base64.

        Raises IncompleteBody, XAmzContentSHA256Mismatch, BadDigest, MalformedTrailerError.
        """
        if self.length is not None and length != self.length:
            raise S3Error("IncompleteBody")
        if self.sha256 is not None and not hmac.compare_digest(digests["sha256"], self.sha256):
            raise S3Error(
                "XAmzContentSHA256Mismatch",
                fields=[
                    ("ClientComputedContentSHA256", self.sha256.hex()),
                    ("S3ComputedContentSHA256", digests["sha256"].hex()),
                ],
            )
        if self.md5 is not None and digests["md5"] != self.md5:
            raise S3Error(
                "BadDigest",
                "The Content-MD5 you specified did not match what we received.",
                fields=[
                    ("ExpectedDigest", checksums.encode(self.md5)),
                    ("CalculatedDigest", checksums.encode(digests["md5"])),
                ],
            )
        algorithm = self.algorithm or checksums.ALGORITHMS["crc64nvme"]
        computed = crc64nvme.to_bytes(8, "big") if algorithm.name == "crc64nvme" else digests[algorithm.name]
        stated = self._trailer_value(algorithm, trailers) if self.in_trailer else self.value
        if stated is not None and stated != computed:
            raise bad_checksum(algorithm)
        return {algorithm.name: checksums.encode(computed)}

    def _trailer_value(self, algorithm: Algorithm, trailers: Headers) -> bytes:
        text = trailers.get(algorithm.header)
        if not text:
            raise S3Error("MalformedTrailerError", f"The trailer {algorithm.header} that was announced did not come.")
        value = checksums.decode(text, algorithm.size_bytes)
        if value is None:
            raise S3Error("InvalidRequest", f"Value for {algorithm.header} trailing header is invalid.")
        return value


def bad_checksum(algorithm: Algorithm) -> S3Error:
    return S3Error("BadDigest", f"The {algorithm.name.upper()} you specified did not match the calculated checksum.")


def plan(
    request: Request,
    signed: Signed,
    *,
    length_max_bytes: int,
    upload_algorithm: str = "",
    headers_describe_body: bool = True,
) -> BodyPlan:
    """Read the head. Takes the body out of its aws-chunked framing as a side effect, which costs no byte of it.

    ``upload_algorithm``: what a part's upload was created with; computed even if the part itself says nothing.
    ``headers_describe_body``: False for a Complete, whose ``x-amz-checksum-*`` headers describe the object.
    """
    headers = request.headers
    _unwrap(request, signed)
    length = request.body.length
    if length is not None and length > length_max_bytes:
        raise too_large(length, length_max_bytes)
    algorithm, value, in_trailer = _checksum(headers, signed) if headers_describe_body else (None, None, False)
    if upload_algorithm:
        if algorithm is not None and algorithm.name != upload_algorithm:
            raise S3Error(
                "InvalidRequest",
                f"Checksum Type mismatch occurred, expected checksum Type: {upload_algorithm},"
                f" actual checksum Type: {algorithm.name}",
            )
        algorithm = checksums.ALGORITHMS[upload_algorithm]
    sha256 = bytes.fromhex(signed.sha256) if signed.sha256 else None
    return BodyPlan(length, sha256, _content_md5(headers), algorithm, value, in_trailer)


def too_large(length: int, length_max_bytes: int) -> S3Error:
    return S3Error("EntityTooLarge", fields=[("ProposedSize", str(length)), ("MaxSizeAllowed", str(length_max_bytes))])


def _unwrap(request: Request, signed: Signed) -> None:
    headers, payload = request.headers, signed.payload
    has_length = "content-length" in headers or "transfer-encoding" in headers
    if not payload.streaming:
        if AWS_CHUNKED in headers.get("content-encoding"):
            raise S3Error(
                "InvalidRequest", "aws-chunked encoding is not supported when x-amz-content-sha256 is not STREAMING-…"
            )
        if not has_length:
            raise S3Error("MissingContentLength")
        return
    text = headers.get("x-amz-decoded-content-length")
    if not text or not has_length:
        raise S3Error("MissingContentLength", "You must provide the x-amz-decoded-content-length HTTP header.")
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise S3Error("InvalidArgument", "x-amz-decoded-content-length must be a number of bytes")
    request.body.unwrap_aws_chunked(int(text), payload.signed_chunks, payload.trailer, signed.chunk_verifier())


def _checksum(headers: Headers, signed: Signed) -> tuple[Algorithm | None, bytes | None, bool]:
    """The client's checksum as (algorithm, value from the head, comes in the trailer)."""
    names = [
        name
        for name, _ in headers.fields
        if name.startswith(checksums.HEADER_PREFIX) and name not in checksums.NOT_VALUES
    ]
    trailer = headers.get("x-amz-trailer").strip().lower()
    if trailer and not signed.payload.trailer:
        raise S3Error("InvalidRequest", "x-amz-trailer needs an x-amz-content-sha256 that ends in -TRAILER")
    if len(names) + bool(trailer) > 1:
        raise S3Error(
            "InvalidRequest",
            "Expecting a single x-amz-checksum- header. Multiple checksum Types are not allowed.",
        )
    name = trailer or (names[0] if names else "")
    if not name:
        if signed.payload.trailer:
            raise S3Error("InvalidRequest", "x-amz-trailer is required with this x-amz-content-sha256")
        if headers.get("x-amz-sdk-checksum-algorithm"):
            raise S3Error(
                "InvalidRequest",
                "x-amz-sdk-checksum-algorithm specified, but no corresponding x-amz-checksum-* or x-amz-trailer"
                " headers were found.",
            )
        return None, None, False
    algorithm = checksums.BY_HEADER.get(name)
    if algorithm is None:
        raise S3Error("InvalidRequest", f"{name} is not supported; known are {', '.join(checksums.BY_HEADER)}")
    sdk = headers.get("x-amz-sdk-checksum-algorithm").lower()
    if sdk and sdk != algorithm.name:
        raise S3Error("InvalidRequest", "Value for x-amz-sdk-checksum-algorithm header is invalid.")
    if trailer:
        return algorithm, None, True
    value = checksums.decode(headers.get(name), algorithm.size_bytes)
    if value is None:
        raise S3Error("InvalidRequest", f"Value for {name} header is invalid.")
    return algorithm, value, False


def _content_md5(headers: Headers) -> bytes | None:
    if "content-md5" not in headers:
        return None
    digest = checksums.decode(headers.get("content-md5"), 16)
    if digest is None:
        raise S3Error("InvalidDigest")
    return digest


async def read_document(
    request: Request, signed: Signed, limit_bytes: int, *, headers_describe_body: bool = True
) -> bytes:
    """The whole body of a control document (XML, a kernel's source), verified like any other body."""
    expected = plan(request, signed, length_max_bytes=limit_bytes, headers_describe_body=headers_describe_body)
    body = await request.body.read(limit_bytes)
    wanted = expected.algorithms(md5=False)
    digests = {name: checksums.ALGORITHMS[name].digest(body) for name in wanted if name != "md5"}
    if "md5" in wanted:
        digests["md5"] = hashlib.md5(body, usedforsecurity=False).digest()
    trailers = request.body.trailers if expected.in_trailer else Headers(())
    expected.verify(len(body), crt.crc64nvme(body), digests, trailers)
    return body


def needs_checksum(request: Request) -> None:
    """Raises InvalidRequest where the body of an operation that demands it has no checksum."""
    headers = request.headers
    if "content-md5" not in headers and not headers.get("x-amz-trailer").startswith(checksums.HEADER_PREFIX):
        if not any(header in headers for header in checksums.BY_HEADER):
            raise S3Error("InvalidRequest", "Missing required header for this request: Content-MD5 OR x-amz-checksum-*")


def has_body(request: Request) -> bool:
    """Does the head announce a body that is not empty?"""
    return request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers

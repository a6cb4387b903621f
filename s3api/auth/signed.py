"""A request that was verified: who asked, and how the body is protected. And the payload hash's forms.

Upstream: the verifiers (sigv4, sigv2, anonymous requests, forms) make ``Signed``. Downstream: s3api.integrity, every operation.
https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
"""

from __future__ import annotations

import dataclasses
import enum

from s3api.auth.chunks import ChunkSignatures
from s3api.auth.users import NOBODY, Credentials
from s3api.errors import S3Error
from s3api.http.message import Request

UNSIGNED_PAYLOAD = "UNSIGNED-PAYLOAD"


class Payload(enum.Enum):
    """How the body is protected, as ``x-amz-content-sha256`` says."""

    UNSIGNED = UNSIGNED_PAYLOAD
    SHA256 = "sha256"
    CHUNKS = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
    CHUNKS_TRAILER = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER"
    UNSIGNED_TRAILER = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"

    @property
    def streaming(self) -> bool:
        """The body is in aws-chunked framing."""
        return self not in (Payload.UNSIGNED, Payload.SHA256)

    @property
    def signed_chunks(self) -> bool:
        return self in (Payload.CHUNKS, Payload.CHUNKS_TRAILER)

    @property
    def trailer(self) -> bool:
        return self in (Payload.CHUNKS_TRAILER, Payload.UNSIGNED_TRAILER)


_PAYLOADS = {payload.value: payload for payload in Payload if payload is not Payload.SHA256}


@dataclasses.dataclass(frozen=True, slots=True)
class Signed:
    """A verified request."""

    credentials: Credentials
    payload: Payload
    sha256: str
    """Lower-case hex of the signed payload hash; empty unless ``payload`` is SHA256."""
    timestamp: str
    scope: str
    signature: str
    signing_key: bytes = dataclasses.field(repr=False)
    presigned: bool = False
    """Signed in the query."""
    sigv2: bool = False
    signed_s: int | None = None
    """When, in seconds since the epoch."""

    def chunk_verifier(self) -> ChunkSignatures | None:
        """Verifier of the body's chunks; None where chunks carry no signatures."""
        if not self.payload.signed_chunks:
            return None
        return ChunkSignatures(self.signing_key, self.timestamp, self.scope, self.signature)


ANYBODY = Signed(NOBODY, Payload.UNSIGNED, "", "", "", "", b"")
"""A request that nobody signed, or not in its head."""


def payload_of(text: str) -> tuple[Payload, str]:
    """What ``x-amz-content-sha256`` says, and the hash where it is one. Raises InvalidArgument."""
    payload = _PAYLOADS.get(text)
    if payload is not None:
        return payload, ""
    if text.startswith("STREAMING-AWS4-ECDSA"):
        raise S3Error("NotImplemented", "Signature Version 4A (ECDSA) is not implemented; sign with AWS4-HMAC-SHA256")
    try:
        digest = bytes.fromhex(text) if len(text) == 64 else b""
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise S3Error(
            "InvalidArgument",
            "x-amz-content-sha256 must be UNSIGNED-PAYLOAD, STREAMING-UNSIGNED-PAYLOAD-TRAILER,"
            " STREAMING-AWS4-HMAC-SHA256-PAYLOAD, STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER or a valid sha256 value.",
            fields=[("ArgumentName", "x-amz-content-sha256"), ("ArgumentValue", text[:128])],
        )
    return Payload.SHA256, digest.hex()


def body_form(request: Request) -> tuple[Payload, str]:
    """As ``payload_of``, for requests whose signature does not cover the body: an SDK that cannot sign it still frames it."""
    text = request.headers.get("x-amz-content-sha256")
    if text:
        payload, sha256 = payload_of(text)
        if payload.signed_chunks:
            raise S3Error("InvalidRequest", "Signed chunks need a request that is signed with AWS4-HMAC-SHA256")
        return payload, sha256
    framed = "x-amz-trailer" in request.headers and "aws-chunked" in request.headers.get("content-encoding")
    return (Payload.UNSIGNED_TRAILER if framed else Payload.UNSIGNED), ""

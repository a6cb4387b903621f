"""Signatures inside an aws-chunked body: each chunk's, chained from the request's, and the trailer's.

https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-streaming.html and
https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-streaming-trailers.html. Implements the ``ChunkVerifier`` of
s3api/http/chunked.py: the decoder shows each run of payload where it lies, then ends the chunk with the signature its
header carried; nothing is copied.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from s3api.errors import S3Error

_EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()


class ChunkSignatures:
    """Verifies one body. ``seed`` is the signature of the request's head; ``scope`` is date/region/s3/aws4_request."""

    def __init__(self, signing_key: bytes, timestamp: str, scope: str, seed: str) -> None:
        self._key = signing_key
        self._prefix = f"{timestamp}\n{scope}\n"
        self._previous = seed
        self._hash = hashlib.sha256()

    def payload(self, view: memoryview) -> None:
        """The next bytes of the current chunk."""
        self._hash.update(view)

    def chunk_end(self, size: int, signature: str) -> None:
        """The chunk of ``size`` bytes is complete. S3Error SignatureDoesNotMatch unless it was signed as claimed."""
        digest = self._hash.hexdigest()
        self._hash = hashlib.sha256()
        self._check(f"AWS4-HMAC-SHA256-PAYLOAD\n{self._prefix}{self._previous}\n{_EMPTY_SHA256}\n{digest}", signature)

    def trailers(self, raw: Sequence[tuple[str, str]], signature: str) -> None:
        """The trailer fields as received, without the signature's own."""
        canonical = "".join([f"{name.lower()}:{value}\n" for name, value in raw])
        digest = hashlib.sha256(canonical.encode("latin-1")).hexdigest()
        self._check(f"AWS4-HMAC-SHA256-TRAILER\n{self._prefix}{self._previous}\n{digest}", signature)

    def _check(self, string_to_sign: str, signature: str) -> None:
        expected = hmac.digest(self._key, string_to_sign.encode("ascii"), "sha256").hex()
        if not hmac.compare_digest(expected.encode("ascii"), signature.encode("latin-1", "replace")):
            raise S3Error("SignatureDoesNotMatch", "A chunk of the body is not signed as its header claims")
        self._previous = expected

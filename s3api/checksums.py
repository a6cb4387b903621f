"""The checksums S3 clients may ask for: their names, sizes, encodings, and how those of parts combine.

In: digests that the data path computed over bytes in place. Out: base64 as it travels in ``x-amz-checksum-*``, and the
checksum of a multipart object: COMPOSITE (hash of the parts' hashes, ``-N``) or FULL_OBJECT (CRCs combined
algebraically, without touching the bytes).
https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import zlib
from collections.abc import Callable, Sequence

import xxhash
from awscrt import checksums as crt

HEADER_PREFIX = "x-amz-checksum-"
COMPOSITE = "COMPOSITE"
FULL_OBJECT = "FULL_OBJECT"


@dataclasses.dataclass(frozen=True, slots=True)
class Algorithm:
    name: str
    """Lower-case, as in the header's name and in records."""
    size_bytes: int
    digest: Callable[[bytes], bytes]
    """Of a small document or of the parts' concatenated checksums; bodies are digested by the data path."""
    combine: Callable[[int, int, int], int] | None = None
    """crc(A), crc(B), len(B) -> crc(AB); None for hashes, which cannot be combined."""
    composite: bool = True

    @property
    def header(self) -> str:
        return HEADER_PREFIX + self.name

    @property
    def types(self) -> tuple[str, ...]:
        """Checksum types a multipart upload may have; the first is the default."""
        return ((COMPOSITE,) if self.composite else ()) + ((FULL_OBJECT,) if self.combine else ())


ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm("crc32", 4, lambda data: zlib.crc32(data).to_bytes(4, "big"), crt.combine_crc32),
        Algorithm("crc32c", 4, lambda data: crt.crc32c(data).to_bytes(4, "big"), crt.combine_crc32c),
        Algorithm(
            "crc64nvme", 8, lambda data: crt.crc64nvme(data).to_bytes(8, "big"), crt.combine_crc64nvme, composite=False
        ),
        Algorithm("sha1", 20, lambda data: hashlib.sha1(data, usedforsecurity=False).digest()),
        Algorithm("sha256", 32, lambda data: hashlib.sha256(data).digest()),
        Algorithm("sha512", 64, lambda data: hashlib.sha512(data).digest()),
        Algorithm("md5", 16, lambda data: hashlib.md5(data, usedforsecurity=False).digest()),
        Algorithm("xxhash64", 8, lambda data: xxhash.xxh64_digest(data)),
        Algorithm("xxhash3", 8, lambda data: xxhash.xxh3_64_digest(data)),
        Algorithm("xxhash128", 16, lambda data: xxhash.xxh3_128_digest(data)),
    )
}
NAMES = ", ".join(name.upper() for name in ALGORITHMS)
BY_HEADER = {algorithm.header: algorithm for algorithm in ALGORITHMS.values()}
# Headers that share the prefix and are not checksum values.
NOT_VALUES = frozenset({"x-amz-checksum-algorithm", "x-amz-checksum-type", "x-amz-checksum-mode"})


def encode(digest: bytes) -> str:
    return base64.b64encode(digest).decode("ascii")


def decode(value: str, size_bytes: int) -> bytes | None:
    """The digest a header's base64 stands for; None unless it is exactly ``size_bytes`` long."""
    try:
        digest = base64.b64decode(value.encode("latin-1"), validate=True)
    except (binascii.Error, ValueError):
        return None
    return digest if len(digest) == size_bytes else None


def crc64_base64(crc: int) -> str:
    return encode(crc.to_bytes(8, "big"))


def composite(algorithm: Algorithm, parts: Sequence[str]) -> str:
    """Checksum of a multipart object from its parts' base64 checksums, part-number order."""
    joined = b"".join(base64.b64decode(part) for part in parts)
    return f"{encode(algorithm.digest(joined))}-{len(parts)}"


def full_object(algorithm: Algorithm, parts: Sequence[tuple[str, int]]) -> str:
    """Checksum of the whole object from (base64 CRC, length in bytes) of its parts."""
    if algorithm.combine is None:
        raise ValueError(f"{algorithm.name} of parts cannot be combined")
    total = int.from_bytes(base64.b64decode(parts[0][0]), "big")
    for value, length in parts[1:]:
        total = algorithm.combine(total, int.from_bytes(base64.b64decode(value), "big"), length)
    return encode(total.to_bytes(algorithm.size_bytes, "big"))


def combined_crc64(parts: Sequence[tuple[int, int]]) -> int:
    """CRC64NVME of a body from (CRC, length in bytes) of its consecutive pieces; 0 for none."""
    total = 0
    for crc, length in parts:
        total = crt.combine_crc64nvme(total, crc, length)
    return int(total)


def etag_from_crc64(crc64nvme: int, length: int, parts: int = 1) -> str:
    """The ETag where no MD5 was computed: 32 hex digits that depend on the content only, and ``-N`` so that no client
    takes it for an MD5."""
    return f"{crc64nvme:016x}{length:016x}-{parts}"


def etag_from_parts(etags: Sequence[str], crc64nvme: int, length: int) -> str:
    """ETag of a multipart object: MD5 of the parts' MD5s where every part has one (as S3 computes it), else derived."""
    if all(len(etag) == 32 for etag in etags):
        joined = b"".join(bytes.fromhex(etag) for etag in etags)
        return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(etags)}"
    return etag_from_crc64(crc64nvme, length, len(etags))

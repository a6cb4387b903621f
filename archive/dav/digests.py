"""Hashes of a whole object that are known, under the names that WebDAV and HTTP clients ask for. Pure.

In: an ``ObjectRecord``. Out: field and property values. What always holds: a hash that was not computed over exactly
these bytes is not named, because a client that is told nothing checks nothing, while one told a wrong name fails or,
worse, passes.
"""

from __future__ import annotations

import base64
import re

from ingest.records import ObjectRecord

_MD5 = re.compile("[0-9a-f]{32}")
# Names of the HTTP Digest Algorithm Values registry (RFC 3230 and RFC 9530) for what S3 clients send.
_REGISTERED = {"sha256": "sha-256", "sha1": "sha", "crc32c": "crc32c"}
_OWNCLOUD = {"md5": "MD5", "sha": "SHA1"}


def known(record: ObjectRecord) -> dict[str, bytes]:
    """Registered algorithm name -> raw digest of the whole object."""
    digests: dict[str, bytes] = {}
    if _MD5.fullmatch(record.etag):
        digests["md5"] = bytes.fromhex(record.etag)
    if record.checksum_type == "FULL_OBJECT":
        for name, value in record.checksums.items():
            if name in _REGISTERED:
                digests[_REGISTERED[name]] = base64.b64decode(value)
    return digests


def digest_field(record: ObjectRecord, wanted: str) -> str:
    """Value of ``Digest`` for a ``Want-Digest`` field (RFC 3230 section 4.3); empty when none of them is known."""
    digests = known(record)
    chosen = [name for name in _preferences(wanted, r";\s*q=([\d.]+)") if name in digests]
    return ",".join(f"{name}={base64.b64encode(digests[name]).decode()}" for name in chosen)


def repr_digest_field(record: ObjectRecord, wanted: str) -> str:
    """Value of ``Repr-Digest`` for a ``Want-Repr-Digest`` field (RFC 9530 sections 3 and 4); empty as above."""
    digests = known(record)
    chosen = [name for name in _preferences(wanted, r"=\s*(\d+)") if name in digests]
    return ", ".join(f"{name}=:{base64.b64encode(digests[name]).decode()}:" for name in chosen)


def owncloud(record: ObjectRecord) -> str:
    """Value of the property ``{http://owncloud.org/ns}checksum``, e.g. ``SHA1:… MD5:…``; empty when none is known."""
    digests = known(record)
    return " ".join(f"{shown}:{digests[name].hex()}" for name, shown in _OWNCLOUD.items() if name in digests)


def _preferences(field: str, weight: str) -> list[str]:
    """Algorithm names in the field, lower-case, the preferred first; those weighted zero are left out."""
    ranked = []
    for item in field.lower().split(","):
        match = re.fullmatch(rf"\s*([a-z0-9-]+)\s*(?:{weight})?\s*", item)
        if match and (value := float(match[2] or 1)) > 0:
            ranked.append((-value, match[1]))
    return [name for _, name in sorted(ranked, key=lambda pair: pair[0])]

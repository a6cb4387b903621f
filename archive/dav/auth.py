"""Who asks and what they may see: HTTP Basic with the S3 key pair, and a user's rights as a filter on keys.

In: an Authorization field; a ``UserRecord``. Out: the user or None; ``Sight``. The secret itself is compared by the
``Authenticator`` that the composition root injects (it alone can decrypt secrets). Basic (RFC 7617) sends the secret
with every request: fine on a beamline's own network, to be used with TLS anywhere else.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable
from typing import Protocol

from ingest.records import BucketRecord, UserRecord
from s3api.http.message import Request

REALM = "HISS"
CHALLENGE = f'Basic realm="{REALM}", charset="UTF-8"'
CREDENTIALS_BYTES_MAX = 1024

Authenticator = Callable[[str, str], Awaitable[UserRecord | None]]
"""``await authenticate(access_key, secret_key)``: the enabled user, else None; compares in constant time."""


def basic_credentials(field: str) -> tuple[str, str] | None:
    """(user, password) of an Authorization field; None when there is none, or not well formed (RFC 7617 section 2)."""
    scheme, _, encoded = field.strip().partition(" ")
    if scheme.lower() != "basic" or len(encoded) > CREDENTIALS_BYTES_MAX:
        return None
    try:
        user, colon, password = base64.b64decode(encoded.strip(), validate=True).decode("utf-8").partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return (user, password) if colon else None


class Sight(Protocol):
    """What one user may see. The composition root makes it from what decides over S3 too, so that both always agree."""

    @property
    def user_id(self) -> str: ...
    async def bucket(self, bucket: BucketRecord) -> bool:
        """Does the user learn that the bucket exists?"""
        ...

    async def key(self, bucket: str, key: bytes) -> bool:
        """May the user read it?"""
        ...

    async def scans(self, bucket: str, folder: bytes) -> list[bytes]:
        """Key prefixes, disjoint and in order, that together are what the user may list below the prefix ``folder``."""
        ...


SightOf = Callable[[UserRecord, Request], Sight]

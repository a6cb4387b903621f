"""Who asks and what they may see: HTTP Basic with the S3 key pair, and the read grants of a user as a filter on keys.

In: an Authorization field; a ``UserRecord``. Out: the user or None; ``Sight``. The secret itself is compared by the
``Authenticator`` that the composition root injects (it alone can decrypt secrets). Basic (RFC 7617) sends the secret
with every request: fine on a beamline's own network, to be used with TLS anywhere else.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
from collections.abc import Awaitable, Callable

from ingest.records import Grant, UserRecord

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


class Sight:
    """What one user may read. Every access level implies reading; root reads everything."""

    def __init__(self, user: UserRecord) -> None:
        self.user_id = user.user_id
        self._grants = (Grant(),) if user.root else user.grants

    def _prefixes(self, bucket: str) -> list[bytes]:
        return [grant.prefix.encode() for grant in self._grants if fnmatch.fnmatchcase(bucket, grant.bucket)]

    def bucket(self, bucket: str) -> bool:
        return bool(self._prefixes(bucket))

    def key(self, bucket: str, key: bytes) -> bool:
        return any(key.startswith(prefix) for prefix in self._prefixes(bucket))

    def scans(self, bucket: str, folder: bytes) -> list[bytes]:
        """Key prefixes, disjoint and in order, that together are what the user may read below the prefix ``folder``."""
        prefixes = self._prefixes(bucket)
        if any(folder.startswith(prefix) for prefix in prefixes):
            return [folder]
        chosen: list[bytes] = []
        for prefix in sorted(prefix for prefix in prefixes if prefix.startswith(folder)):
            if not chosen or not prefix.startswith(chosen[-1]):
                chosen.append(prefix)
        return chosen

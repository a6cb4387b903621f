"""Temporary keys: a token that carries its own record, sealed, so that no process has to remember it.

In: a user's key pair, a duration, optionally a session policy. Out: an access key (``ASIA…``), a secret key and a session token.
The token is AES-256-GCM (NIST SP 800-38D) over the record, bound to its access key; every worker opens it with the node's key.
It ends with its time, with the pair it was made from, or with its user.
https://docs.aws.amazon.com/STS/latest/APIReference/API_GetSessionToken.html
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
import string

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

PREFIX = "ASIA"
TOKEN_CHARS_MAX = 8192
_NONCE_BYTES = 12
_ALPHABET = string.ascii_uppercase + string.digits


class Session(msgspec.Struct, frozen=True, array_like=True):
    """What a token says. Fields are only ever added at the end, with a default."""

    user_id: str
    parent: str
    """Access key of the pair the session was made with."""
    secret_key: str
    expires_s: int
    policy: str = ""
    """JSON of a session policy: the session may do what it allows, of what the user may."""
    name: str = ""
    """RoleSessionName."""


class SessionSealer:
    """``key``: 32 bytes that all processes of the node share."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)
        self._decode = msgspec.msgpack.Decoder(Session).decode

    def new(self, user_id: str, parent: str, expires_s: int, policy: str = "", name: str = "") -> tuple[str, str, str]:
        """(access key, secret key, token)."""
        access_key = PREFIX + "".join(secrets.choice(_ALPHABET) for _ in range(16))
        session = Session(user_id, parent, secrets.token_urlsafe(30), expires_s, policy, name)
        nonce = os.urandom(_NONCE_BYTES)
        sealed = nonce + self._cipher.encrypt(nonce, msgspec.msgpack.encode(session), access_key.encode())
        return access_key, session.secret_key, base64.b64encode(sealed).decode("ascii")

    def open(self, token: str, access_key: str) -> Session | None:
        """None for a token that this node did not make for this access key."""
        if len(token) > TOKEN_CHARS_MAX:
            return None
        try:
            sealed = base64.b64decode(token.encode("ascii"), validate=True)
            plain = self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], access_key.encode())
            return self._decode(plain)
        except (InvalidTag, ValueError, binascii.Error, msgspec.DecodeError):
            return None

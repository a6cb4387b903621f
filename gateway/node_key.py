"""The node key: what the secrets of users are encrypted with at rest (AES-256-GCM, NIST SP 800-38D).

In: DATA/node.key, 32 random bytes that only the owner may read. Out: sealed secrets for ``AccessKey.secret`` and back.
A sealed secret is bound to its user and access key: copied to another user's record it does not open. Without the key
file no secret can be read; back it up with the folder, apart from catalogue back-ups.
"""

from __future__ import annotations

import hmac
import os
import stat
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ingest.cluster.signing import PeerKey
from ingest.records import AccessKey, UserRecord
from s3api.auth.sessions import SessionSealer

_KEY_BYTES = 32
_NONCE_BYTES = 12
_FORMAT = b"\x01"


class NodeKeyError(Exception):
    """The key file is missing, damaged or open to others, or a secret was sealed with another key."""


class NodeKey:
    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)
        self._fingerprint = hmac.digest(key, b"hiss-node-key-fingerprint", "sha256").hex()[:32]
        self._derived = hmac.digest(key, b"hiss-session-tokens", "sha256")
        self.peers = PeerKey.derived(key)
        """Signs requests between nodes that share this key."""

    @property
    def fingerprint(self) -> str:
        """Tells two keys apart and gives neither away."""
        return self._fingerprint

    @classmethod
    def load(cls, path: Path) -> NodeKey:
        """Raises NodeKeyError; never makes a key."""
        try:
            with path.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                key = file.read(_KEY_BYTES + 1)
        except OSError as error:
            raise NodeKeyError(f"{path}: cannot be read: {error.strerror}") from None
        if mode & 0o077:
            raise NodeKeyError(f"{path}: others may read it (mode {mode:04o}); run chmod 600 {path}")
        if len(key) != _KEY_BYTES:
            raise NodeKeyError(f"{path}: is no node key ({_KEY_BYTES} bytes); put the right one back")
        return cls(key)

    @classmethod
    def load_or_create(cls, path: Path) -> NodeKey:
        """For the holder of the folder's lock. A new key is on disk for good before anything is sealed with it."""
        if not path.exists():
            draft = path.with_name(f".{path.name}.{os.getpid()}")
            draft.unlink(missing_ok=True)
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(os.urandom(_KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            draft.rename(path)
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        return cls.load(path)

    def seal(self, secret: str, *, user_id: str, access_key: str) -> bytes:
        """Encrypt a secret for that user's record."""
        nonce = os.urandom(_NONCE_BYTES)
        return _FORMAT + nonce + self._cipher.encrypt(nonce, secret.encode(), _bound_to(user_id, access_key))

    def open(self, sealed: bytes, *, user_id: str, access_key: str) -> str:
        """Decrypt; raises NodeKeyError when it was not sealed with this key for this user."""
        nonce, secret = sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
        try:
            if sealed[:1] != _FORMAT:
                raise InvalidTag
            return self._cipher.decrypt(nonce, secret, _bound_to(user_id, access_key)).decode()
        except (InvalidTag, ValueError):
            raise NodeKeyError(f"the secret of user {user_id!r} was not sealed with this node's key") from None

    def open_secret(self, user: UserRecord, key: AccessKey) -> str:
        """The secret key of one of the user's pairs: what ``s3api.auth.users.CatalogUsers`` asks for."""
        return self.open(key.secret, user_id=user.user_id, access_key=key.access_key)

    def sealer(self) -> SessionSealer:
        """Makes and opens temporary keys, with a key of their own that is derived from this one."""
        return SessionSealer(self._derived)


def _bound_to(user_id: str, access_key: str) -> bytes:
    return f"hiss-user\0{user_id}\0{access_key}".encode()

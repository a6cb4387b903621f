"""users.toml: who may use a node, in a file that an operator keeps.

In::

    [[user]]
    id = "p11-daq"
    name = "DAQ of beamline P11"
    email = "p11@example.org"              # optional, as is the canonical id (64 hex digits)
    access_key = "P11DAQ"
    secret_key = "…"                       # or secret_key_file = "/run/secrets/p11"
    grants = ["write:scan*", "read:calib:dark/"]   # ACCESS:BUCKET[:PREFIX]; BUCKET is a glob

    [[user.key]]                           # further key pairs: rotate by adding one, then switching the old one off
    access_key = "P11DAQ2"
    secret_key_file = "/run/secrets/p11-2"
    enabled = true

    [[user.policy]]                        # identity policies, in IAM's JSON
    name = "own-buckets"
    document = '''{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:CreateBucket", "Resource": "*"}]}'''

Out: ``FileUser``s, checked, or a UsersError that names the file and the user, never a secret.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import msgspec

from gateway.users import (
    ROOT_ID,
    FileUser,
    KeyEntry,
    KeyPair,
    UsersError,
    check_identity,
    check_profile,
    parse_grant,
)

logger = logging.getLogger(__name__)

GRANTS_MAX = 256
USERS_MAX = 10_000


class _Key(msgspec.Struct, forbid_unknown_fields=True):
    access_key: str
    secret_key: str = ""
    secret_key_file: str = ""
    enabled: bool = True

    def __repr__(self) -> str:
        return f"_Key({self.access_key!r})"


class _Policy(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    document: str = ""
    document_file: str = ""


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    access_key: str = ""
    name: str = ""
    email: str = ""
    canonical_id: str = ""
    secret_key: str = ""
    secret_key_file: str = ""
    grants: list[str] = []
    enabled: bool = True
    key: list[_Key] = []
    policy: list[_Policy] = []

    def __repr__(self) -> str:
        return f"_Entry({self.id!r})"


class _File(msgspec.Struct, forbid_unknown_fields=True):
    user: list[_Entry] = []


def read_file(path: Path) -> list[FileUser]:
    """Parse and check a users.toml; raises UsersError that names the file and the user."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read()
        entries = msgspec.toml.decode(content, type=_File).user
    except OSError as error:
        raise UsersError(f"{path}: cannot be read: {error.strerror}") from None
    except msgspec.ValidationError as error:
        raise UsersError(f"{path}: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsersError(f"{path}: is not TOML: {error}") from None
    if len(entries) > USERS_MAX:
        raise UsersError(f"{path}: names {len(entries)} users; allowed are {USERS_MAX}")
    if mode & 0o077 and any(entry.secret_key or any(pair.secret_key for pair in entry.key) for entry in entries):
        logger.warning("%s holds secret keys and others may read it (mode %04o); run chmod 600", path, mode)
    try:
        users = [_checked(entry) for entry in entries]
        _refuse_twins(users)
    except UsersError as error:
        raise UsersError(f"{path}: {error}") from None
    return users


def _checked(entry: _Entry) -> FileUser:
    if entry.id == ROOT_ID:
        raise UsersError(f"user {ROOT_ID!r}: its keys come from HISS_ROOT_ACCESS_KEY and HISS_ROOT_SECRET_KEY")
    keys = tuple(_keys(entry))
    check_identity(entry.id, *(key.pair for key in keys))
    policies = {policy.name: _document(entry.id, policy) for policy in entry.policy}
    check_profile(entry.id, entry.email, entry.canonical_id, policies)
    if len(entry.grants) > GRANTS_MAX:
        raise UsersError(f"user {entry.id!r}: has {len(entry.grants)} grants; allowed are {GRANTS_MAX}")
    try:
        grants = tuple(parse_grant(text) for text in entry.grants)
    except UsersError as error:
        raise UsersError(f"user {entry.id!r}: {error}") from None
    return FileUser(
        entry.id, entry.name, keys, grants, entry.enabled, entry.email, entry.canonical_id.lower(), policies
    )


def _keys(entry: _Entry) -> list[KeyEntry]:
    """The pair of the user itself, if it has one there, and its further ones."""
    pairs: list[_Entry | _Key] = [*entry.key]
    if entry.access_key or entry.secret_key or entry.secret_key_file or not entry.key:
        pairs.insert(0, entry)
    return [
        KeyEntry(KeyPair(pair.access_key, _secret(entry.id, pair)), pair is entry or pair.enabled) for pair in pairs
    ]


def _secret(user_id: str, pair: _Entry | _Key) -> str:
    if bool(pair.secret_key) == bool(pair.secret_key_file):
        raise UsersError(f"user {user_id!r}: give either secret_key or secret_key_file")
    if pair.secret_key:
        return pair.secret_key
    try:
        return Path(pair.secret_key_file).read_text().strip()
    except (OSError, UnicodeDecodeError):
        raise UsersError(f"user {user_id!r}: secret_key_file {pair.secret_key_file!r} cannot be read") from None


def _document(user_id: str, policy: _Policy) -> str:
    if bool(policy.document) == bool(policy.document_file):
        raise UsersError(f"user {user_id!r}: policy {policy.name!r}: give either document or document_file")
    if policy.document:
        return policy.document
    try:
        return Path(policy.document_file).read_text()
    except (OSError, UnicodeDecodeError):
        raise UsersError(f"user {user_id!r}: document_file {policy.document_file!r} cannot be read") from None


def _refuse_twins(users: Sequence[FileUser]) -> None:
    ids: set[str] = set()
    access_keys: set[str] = set()
    for user in users:
        names = {key.pair.access_key for key in user.keys}
        if user.user_id in ids or not names.isdisjoint(access_keys):
            raise UsersError(f"user {user.user_id!r}: its id or its access key is there twice")
        ids.add(user.user_id)
        access_keys |= names

"""Users of a node: the root key pair, users.toml, and their way into the catalogue with secrets sealed.

In: HISS_ROOT_ACCESS_KEY / HISS_ROOT_SECRET_KEY or DATA/root-credentials.json, and a users.toml like::

    [[user]]
    id = "p11-daq"
    name = "DAQ of beamline P11"
    access_key = "P11DAQ"
    secret_key = "…"                       # or secret_key_file = "/run/secrets/p11"
    grants = ["write:scan*", "read:calib:dark/"]   # ACCESS:BUCKET[:PREFIX]; BUCKET is a glob

Out: ``UserRecord``s in the catalogue. What always holds: a secret in the clear is never written, logged or shown in a
``repr``; users that left users.toml are disabled, users made with ``hiss user add`` are left alone.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import secrets
import stat
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from gateway.node_key import NodeKey, NodeKeyError
from gateway.supervisor.resources import write_atomically
from ingest.paths import NodePaths
from ingest.ports import Catalog
from ingest.records import Grant, UserRecord

logger = logging.getLogger(__name__)

ROOT_ID = "root"
ACCESS_LEVELS = ("read", "write", "admin")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_ACCESS_KEY = re.compile(r"[A-Za-z0-9._-]{3,128}")
_SECRET_MIN, _SECRET_MAX = 8, 256
_GRANTS_MAX = 256
_USERS_MAX = 10_000


class UsersError(ValueError):
    """``str()`` says which user and what is wrong; it never holds a secret."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    access_key: str
    secret_key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class FileUser:
    """A user as users.toml gives it, checked."""

    user_id: str
    display_name: str
    keys: KeyPair
    grants: tuple[Grant, ...]
    enabled: bool


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    access_key: str
    name: str = ""
    secret_key: str = ""
    secret_key_file: str = ""
    grants: list[str] = []
    enabled: bool = True

    def __repr__(self) -> str:
        return f"_Entry({self.id!r})"


class _File(msgspec.Struct, forbid_unknown_fields=True):
    user: list[_Entry] = []


def new_keys(access_key: str | None = None) -> KeyPair:
    """A fresh pair: 20 capital letters and digits, and a secret of 40 characters (240 bits)."""
    alphabet = string.ascii_uppercase + string.digits
    return KeyPair(access_key or "".join(secrets.choice(alphabet) for _ in range(20)), secrets.token_urlsafe(30))


def parse_grant(text: str) -> Grant:
    """``ACCESS:BUCKET[:PREFIX]``, e.g. ``write:scan42:raw/``; raises UsersError."""
    access, _, rest = text.partition(":")
    bucket, _, prefix = rest.partition(":")
    if access not in ACCESS_LEVELS or not bucket:
        levels = ", ".join(ACCESS_LEVELS)
        raise UsersError(f"grant {text!r}: write it as ACCESS:BUCKET[:PREFIX], ACCESS one of {levels}")
    return Grant(bucket=bucket, prefix=prefix, access=access)


def grant_text(grant: Grant) -> str:
    """The inverse of ``parse_grant``."""
    return f"{grant.access}:{grant.bucket}" + (f":{grant.prefix}" if grant.prefix else "")


def check_identity(user_id: str, keys: KeyPair) -> None:
    """Raises UsersError for an id or a key pair that cannot be used."""
    if not _ID.fullmatch(user_id):
        raise UsersError(f"user id {user_id!r}: allowed are 1 to 64 letters, digits and ._@-, a letter or digit first")
    if not _ACCESS_KEY.fullmatch(keys.access_key):
        raise UsersError(f"user {user_id!r}: access key: allowed are 3 to 128 letters, digits and ._-")
    if not _SECRET_MIN <= len(keys.secret_key) <= _SECRET_MAX or not keys.secret_key.isprintable():
        raise UsersError(
            f"user {user_id!r}: secret key: allowed are {_SECRET_MIN} to {_SECRET_MAX} printable characters"
        )


def make_record(
    key: NodeKey,
    user_id: str,
    keys: KeyPair,
    *,
    display_name: str = "",
    grants: Sequence[Grant] = (),
    enabled: bool = True,
    root: bool = False,
) -> UserRecord:
    """A record with its secret sealed; raises UsersError for an identity that cannot be used."""
    check_identity(user_id, keys)
    return UserRecord(
        user_id=user_id,
        display_name=display_name or user_id,
        access_key=keys.access_key,
        secret=key.seal(keys.secret_key, user_id=user_id, access_key=keys.access_key),
        grants=tuple(grants),
        enabled=enabled,
        root=root,
    )


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
    if len(entries) > _USERS_MAX:
        raise UsersError(f"{path}: names {len(entries)} users; allowed are {_USERS_MAX}")
    if mode & 0o077 and any(entry.secret_key for entry in entries):
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
    if bool(entry.secret_key) == bool(entry.secret_key_file):
        raise UsersError(f"user {entry.id!r}: give either secret_key or secret_key_file")
    secret = entry.secret_key
    if entry.secret_key_file:
        try:
            secret = Path(entry.secret_key_file).read_text().strip()
        except (OSError, UnicodeDecodeError):
            raise UsersError(f"user {entry.id!r}: secret_key_file {entry.secret_key_file!r} cannot be read") from None
    keys = KeyPair(entry.access_key, secret)
    check_identity(entry.id, keys)
    if len(entry.grants) > _GRANTS_MAX:
        raise UsersError(f"user {entry.id!r}: has {len(entry.grants)} grants; allowed are {_GRANTS_MAX}")
    try:
        grants = tuple(parse_grant(text) for text in entry.grants)
    except UsersError as error:
        raise UsersError(f"user {entry.id!r}: {error}") from None
    return FileUser(entry.id, entry.name, keys, grants, entry.enabled)


def _refuse_twins(users: Sequence[FileUser]) -> None:
    ids: set[str] = set()
    access_keys: set[str] = set()
    for user in users:
        if user.user_id in ids or user.keys.access_key in access_keys:
            raise UsersError(f"user {user.user_id!r}: its id or its access key is there twice")
        ids.add(user.user_id)
        access_keys.add(user.keys.access_key)


def root_keys(paths: NodePaths, key: NodeKey, environ: Mapping[str, str] | None = None) -> tuple[KeyPair, bool]:
    """The root key pair, and whether it was made just now: from the environment, else as stored, else new.

    It is stored (sealed) before it is returned. Raises UsersError, NodeKeyError.
    """
    environ = os.environ if environ is None else environ
    given = environ.get("HISS_ROOT_ACCESS_KEY", ""), environ.get("HISS_ROOT_SECRET_KEY", "")
    if any(given) and not all(given):
        raise UsersError("HISS_ROOT_ACCESS_KEY and HISS_ROOT_SECRET_KEY come together: only one of them is set")
    stored = stored_root_keys(paths, key)
    if stored is not None and (not all(given) or given == (stored.access_key, stored.secret_key)):
        return stored, False
    keys = KeyPair(*given) if all(given) else new_keys()
    check_identity(ROOT_ID, keys)
    sealed = key.seal(keys.secret_key, user_id=ROOT_ID, access_key=keys.access_key)
    document = {"access_key": keys.access_key, "sealed_secret": base64.b64encode(sealed).decode()}
    write_atomically(paths.credentials, json.dumps(document).encode(), durable=True)
    return keys, not all(given)


def stored_root_keys(paths: NodePaths, key: NodeKey) -> KeyPair | None:
    """The root pair of a node that was started before; None when there is none. Raises UsersError, NodeKeyError."""
    try:
        document = json.loads(paths.credentials.read_bytes())
        access_key, sealed = document["access_key"], base64.b64decode(document["sealed_secret"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise UsersError(f"{paths.credentials}: is damaged; put it back or delete it to get a new pair") from None
    return KeyPair(access_key, key.open(sealed, user_id=ROOT_ID, access_key=access_key))


async def apply(catalog: Catalog, paths: NodePaths, key: NodeKey, root: KeyPair, users: Sequence[FileUser]) -> int:
    """Bring the catalogue's users in line with the root pair and users.toml; returns how many records changed.

    Raises UsersError when an access key is taken by a user that the file does not name, CatalogError.
    """
    present = {record.user_id: record for record in await catalog.users()}
    wanted = [make_record(key, ROOT_ID, root, root=True)]
    wanted += [
        make_record(
            key, user.user_id, user.keys, display_name=user.display_name, grants=user.grants, enabled=user.enabled
        )
        for user in users
    ]
    named = {record.user_id for record in wanted}
    holders = {record.access_key: record.user_id for record in present.values() if record.user_id not in named}
    for record in wanted:
        if record.access_key in holders:
            raise UsersError(
                f"user {record.user_id!r}: its access key belongs to user {holders[record.access_key]!r} already"
            )
    left = [present[user_id] for user_id in _applied_before(paths) - named if user_id in present]
    changes = [record for record in wanted if not _same(key, present.get(record.user_id), record)]
    changes += [msgspec.structs.replace(record, enabled=False) for record in left if record.enabled]
    for record in changes:
        await catalog.put_user(record)
    write_atomically(paths.users_applied, json.dumps(sorted(named - {ROOT_ID})).encode(), durable=True)
    return len(changes)


def _applied_before(paths: NodePaths) -> set[str]:
    try:
        return set(json.loads(paths.users_applied.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return set()


def _same(key: NodeKey, old: UserRecord | None, new: UserRecord) -> bool:
    """Equal but for the ciphertext, which differs each time it is sealed."""
    if old is None or msgspec.structs.replace(old, secret=b"") != msgspec.structs.replace(new, secret=b""):
        return False
    try:
        return key.open_secret(old) == key.open_secret(new)
    except NodeKeyError:
        return False

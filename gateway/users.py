"""Users of a node: the root key pair, and the way of users into the catalogue with their secrets sealed.

In: HISS_ROOT_ACCESS_KEY / HISS_ROOT_SECRET_KEY or DATA/root-credentials.json, and what users.toml says (users_file.py). Out:
``UserRecord``s in the catalogue. What always holds: a secret in the clear is never written, logged or shown in a
``repr``; access keys, canonical ids and e-mail addresses are one user's each; users that left users.toml are disabled, users made
with ``hiss user add`` are left alone.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from gateway.node_key import NodeKey, NodeKeyError
from gateway.supervisor.resources import write_atomically
from ingest.paths import NodePaths
from ingest.ports import Catalog
from ingest.records import AccessKey, Grant, UserRecord
from s3api.auth.policy.language import MalformedPolicy, parse
from s3api.auth.users import ANONYMOUS_ID

ROOT_ID = "root"
ACCESS_LEVELS = ("read", "write", "admin")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_ACCESS_KEY = re.compile(r"[A-Za-z0-9._-]{3,128}")
_SECRET_MIN, _SECRET_MAX = 8, 256
KEYS_MAX = 8
POLICIES_MAX = 16
_EMAIL = re.compile(r"[^\s@]+@[^\s@]+")
_EMAIL_MAX = 254
_CANONICAL_ID = re.compile(r"[0-9A-Fa-f]{64}")
_POLICY_NAME = re.compile(r"[A-Za-z0-9+=,.@_-]{1,128}")


class UsersError(ValueError):
    """``str()`` says which user and what is wrong; it never holds a secret."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    access_key: str
    secret_key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """A key pair as users.toml gives it."""

    pair: KeyPair
    enabled: bool = True


@dataclass(frozen=True, slots=True)
class FileUser:
    """A user as users.toml gives it, checked."""

    user_id: str
    display_name: str
    keys: tuple[KeyEntry, ...]
    grants: tuple[Grant, ...]
    enabled: bool
    email: str = ""
    canonical_id: str = ""
    policies: Mapping[str, str] = field(default_factory=dict)


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


def check_identity(user_id: str, *pairs: KeyPair) -> None:
    """Raises UsersError for an id or a key pair that cannot be used."""
    if not _ID.fullmatch(user_id):
        raise UsersError(f"user id {user_id!r}: allowed are 1 to 64 letters, digits and ._@-, a letter or digit first")
    if user_id == ANONYMOUS_ID:
        raise UsersError(f"user id {user_id!r}: means everybody who does not sign")
    for keys in pairs:
        if not _ACCESS_KEY.fullmatch(keys.access_key):
            raise UsersError(f"user {user_id!r}: access key: allowed are 3 to 128 letters, digits and ._-")
        if not _SECRET_MIN <= len(keys.secret_key) <= _SECRET_MAX or not keys.secret_key.isprintable():
            raise UsersError(
                f"user {user_id!r}: secret key: allowed are {_SECRET_MIN} to {_SECRET_MAX} printable characters"
            )
    names = [keys.access_key for keys in pairs]
    if len(set(names)) < len(names):
        raise UsersError(f"user {user_id!r}: an access key is there twice")
    if len(pairs) > KEYS_MAX:
        raise UsersError(f"user {user_id!r}: has {len(pairs)} key pairs; allowed are {KEYS_MAX}")


def check_profile(user_id: str, email: str, canonical_id: str, policies: Mapping[str, str]) -> None:
    """Raises UsersError for an e-mail address, a canonical id or an identity policy that cannot be used."""
    if email and (len(email) > _EMAIL_MAX or not _EMAIL.fullmatch(email)):
        raise UsersError(f"user {user_id!r}: {email!r} is no e-mail address")
    if canonical_id and not _CANONICAL_ID.fullmatch(canonical_id):
        raise UsersError(f"user {user_id!r}: canonical id: write 64 hex digits")
    if len(policies) > POLICIES_MAX:
        raise UsersError(f"user {user_id!r}: has {len(policies)} policies; allowed are {POLICIES_MAX}")
    for name, document in policies.items():
        if not _POLICY_NAME.fullmatch(name):
            raise UsersError(f"user {user_id!r}: policy {name!r}: a name is 1 to 128 letters, digits and +=,.@_-")
        try:
            parse(document)
        except MalformedPolicy as error:
            raise UsersError(f"user {user_id!r}: policy {name!r}: {error}") from None


def sealed(key: NodeKey, user_id: str, pair: KeyPair, *, enabled: bool = True, created_ns: int = 0) -> AccessKey:
    """A key pair for the catalogue."""
    secret = key.seal(pair.secret_key, user_id=user_id, access_key=pair.access_key)
    return AccessKey(pair.access_key, secret, enabled, created_ns)


def make_record(
    key: NodeKey,
    user_id: str,
    *pairs: KeyPair,
    display_name: str = "",
    grants: Sequence[Grant] = (),
    enabled: bool = True,
    root: bool = False,
    email: str = "",
    canonical_id: str = "",
    policies: Mapping[str, str] | None = None,
) -> UserRecord:
    """A record with its secrets sealed; raises UsersError for what cannot be used."""
    check_identity(user_id, *pairs)
    check_profile(user_id, email, canonical_id, policies or {})
    return UserRecord(
        user_id=user_id,
        display_name=display_name or user_id,
        keys=tuple(sealed(key, user_id, pair) for pair in pairs),
        grants=tuple(grants),
        enabled=enabled,
        root=root,
        email=email,
        canonical_id=canonical_id.lower(),
        policies=dict(policies or {}),
    )


def refuse_twins(record: UserRecord, others: Iterable[UserRecord]) -> None:
    """Raises UsersError where another user has one of the record's access keys, its canonical id or its e-mail address."""
    names = {pair.access_key for pair in record.keys}
    for other in others:
        if other.user_id == record.user_id:
            continue
        if taken := names & {pair.access_key for pair in other.keys}:
            raise UsersError(
                f"user {record.user_id!r}: access key {min(taken)} belongs to user {other.user_id!r} already"
            )
        if record.canonical_id == other.canonical_id:
            raise UsersError(f"user {record.user_id!r}: its canonical id belongs to user {other.user_id!r} already")
        if record.email and record.email.lower() == other.email.lower():
            raise UsersError(
                f"user {record.user_id!r}: {record.email} is the address of user {other.user_id!r} already"
            )


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
    _store_root(paths, key, keys)
    return keys, not all(given)


def _store_root(paths: NodePaths, key: NodeKey, keys: KeyPair) -> None:
    sealed = key.seal(keys.secret_key, user_id=ROOT_ID, access_key=keys.access_key)
    document = {"access_key": keys.access_key, "sealed_secret": base64.b64encode(sealed).decode()}
    write_atomically(paths.credentials, json.dumps(document).encode(), durable=True)


async def adopt_root(catalog: Catalog, paths: NodePaths, key: NodeKey) -> None:
    """A node of a cluster has the cluster's root pair: of whichever node was first, or changed it last. Raises NodeKeyError,
    CatalogError."""
    root = next((user for user in await catalog.users() if user.root and user.keys), None)
    if root is not None:
        keys = KeyPair(root.keys[0].access_key, key.open_secret(root, root.keys[0]))
        if keys != stored_root_keys(paths, key):
            _store_root(paths, key, keys)


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


def _record_of(key: NodeKey, user: FileUser) -> UserRecord:
    record = make_record(
        key,
        user.user_id,
        *(entry.pair for entry in user.keys),
        display_name=user.display_name,
        grants=user.grants,
        enabled=user.enabled,
        email=user.email,
        canonical_id=user.canonical_id,
        policies=user.policies,
    )
    keys = zip(record.keys, user.keys, strict=True)
    return msgspec.structs.replace(
        record, keys=tuple(msgspec.structs.replace(pair, enabled=entry.enabled) for pair, entry in keys)
    )


def _refuse_taken(wanted: Sequence[UserRecord], others: Sequence[UserRecord]) -> None:
    """As ``refuse_twins`` for all of a file's users, in time that grows with their number only."""
    holders = {name: record for record in others for name in _names(record)}
    for record in wanted:
        for name in _names(record):
            if name in holders:
                refuse_twins(record, [holders[name]])


def _names(record: UserRecord) -> list[str]:
    """Everything of a user that no other may have."""
    names = [f"key:{pair.access_key}" for pair in record.keys]
    names.append(f"canonical:{record.canonical_id}")
    if record.email:
        names.append(f"email:{record.email.lower()}")
    return names


def names_twice(records: Iterable[UserRecord]) -> UserRecord | None:
    """A record that has a name of an earlier one."""
    seen: set[str] = set()
    for record in records:
        names = _names(record)
        if not seen.isdisjoint(names):
            return record
        seen.update(names)
    return None


async def apply(catalog: Catalog, paths: NodePaths, key: NodeKey, root: KeyPair, users: Sequence[FileUser]) -> int:
    """Bring the catalogue's users in line with the root pair and users.toml; returns how many records changed.

    Raises UsersError when an access key is taken by a user that the file does not name, CatalogError.
    """
    present = {record.user_id: record for record in await catalog.users()}
    wanted = [make_record(key, ROOT_ID, root, root=True)]
    wanted += [_record_of(key, user) for user in users]
    named = {record.user_id for record in wanted}
    twin = names_twice(wanted)
    if twin is not None:
        raise UsersError(f"user {twin.user_id!r}: an access key, its canonical id or its address is there twice")
    _refuse_taken(wanted, [record for record in present.values() if record.user_id not in named])
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
    if old is None or _without_secrets(old) != _without_secrets(new):
        return False
    try:
        return [key.open_secret(old, pair) for pair in old.keys] == [key.open_secret(new, pair) for pair in new.keys]
    except NodeKeyError:
        return False


def _without_secrets(record: UserRecord) -> UserRecord:
    # Nor times: what a file says of a key pair has none.
    keys = tuple(msgspec.structs.replace(pair, secret=b"", created_ns=0) for pair in record.keys)
    return msgspec.structs.replace(record, keys=keys)

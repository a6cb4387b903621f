"""Who may do what, for the ports that the S3 room does not serve itself, and what the node's settings say about it.

In: settings, users, the rules of the S3 port. Out: what WebDAV and the control API ask: is this key pair right, what may this
user see.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable

from archive.dav.auth import Authenticator
from gateway.settings import Settings
from ingest.records import UserRecord
from s3api.auth.principal import of_user
from s3api.auth.rules import AccessDefaults, Gate
from s3api.auth.sight import UserSight
from s3api.auth.users import UserStore
from s3api.http import message

_ABSENT = "-"


def access_defaults(settings: Settings) -> AccessDefaults:
    return AccessDefaults(ownership=settings.object_ownership, block_public=settings.block_public_access)


def authenticator(users: UserStore) -> Authenticator:
    """Check key pairs against ``users``; the comparison takes as long for a wrong secret as for an unknown key."""

    async def authenticate(access_key: str, secret_key: str) -> UserRecord | None:
        found = await users.find(access_key)
        expected = found.secret_key if found else _ABSENT
        same = hmac.compare_digest(expected.encode(), secret_key.encode())
        return found.user if found and same and found.key_enabled and found.user.enabled else None

    return authenticate


def sight_maker(gate: Gate, clock: Callable[[], float]) -> Callable[[UserRecord, message.Request], UserSight]:
    """What a user may see, by the rules of the S3 port; for WebDAV and the control API."""

    def sight_of(user: UserRecord, request: message.Request) -> UserSight:
        return UserSight(gate, of_user(user), request, clock)

    return sight_of

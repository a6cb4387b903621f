"""From an access key to a user with a secret to verify with; from an id, canonical id or e-mail address to a user.

In: the user records of the catalogue, a function that opens a secret (the node key stays with the caller), and the sealer of
temporary keys. Out: ``Credentials`` and ``UserRecord``s. Cached until the catalogue's generation moves, so that a user or a key
pair that was disabled is refused at once, and with it the temporary keys that were made from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

from ingest.ports import Catalog
from ingest.records import AccessKey, UserRecord
from s3api.auth.principal import Principal, of_user
from s3api.auth.sessions import Session, SessionSealer
from s3api.errors import S3Error

ANONYMOUS_ID = "anonymous"


@dataclasses.dataclass(frozen=True, slots=True)
class Credentials:
    user: UserRecord
    secret_key: str = dataclasses.field(repr=False)
    principal: Principal
    access_key: str = ""
    key_enabled: bool = True
    """The pair may be used. The user's own ``enabled`` comes on top."""
    session: Session | None = None
    """Temporary keys: what their token says."""


ANONYMOUS = UserRecord(
    ANONYMOUS_ID,
    ANONYMOUS_ID,
    # AWS's own canonical id of everybody who does not sign.
    canonical_id="65a011a29cdf8ec533ec3d1ccaae921c",
)
NOBODY = Credentials(ANONYMOUS, "", of_user(ANONYMOUS, anonymous=True))


class UserStore(Protocol):
    async def find(self, access_key: str, token: str = "") -> Credentials | None:
        """The user with this access key, enabled or not; None when there is none. ``token``: the session token that came with
        temporary keys, whatever their time."""
        ...


class UserDirectory(UserStore, Protocol):
    """A store that can also be asked who is who."""

    async def by_id(self, user_id: str) -> UserRecord | None: ...
    async def by_canonical_id(self, canonical_id: str) -> UserRecord | None: ...
    async def by_email(self, email: str) -> UserRecord | None: ...

    @property
    def sealer(self) -> SessionSealer | None:
        """Makes temporary keys; None where there are none."""
        ...


async def usable(users: UserStore, access_key: str, token: str, now_s: float) -> Credentials:
    """The credentials of a pair that is in use. Raises InvalidAccessKeyId, InvalidToken, ExpiredToken."""
    found = await users.find(access_key, token)
    if token and (found is None or found.session is None):
        raise S3Error("InvalidToken")
    if found is None or not found.key_enabled:
        raise S3Error("InvalidAccessKeyId", fields=[("AWSAccessKeyId", access_key)])
    if found.session is not None and now_s >= found.session.expires_s:
        raise S3Error("ExpiredToken")
    return found


class CatalogUsers:
    """Users kept in the catalogue. ``open_secret`` decrypts ``AccessKey.secret`` of a user."""

    def __init__(
        self,
        catalog: Catalog,
        open_secret: Callable[[UserRecord, AccessKey], str],
        sealer: SessionSealer | None = None,
    ) -> None:
        self._catalog = catalog
        self._open_secret = open_secret
        self.sealer = sealer
        self._generation = -1
        self._keys: dict[str, tuple[UserRecord, AccessKey]] = {}
        self._users: dict[str, UserRecord] = {}
        self._canonical: dict[str, UserRecord] = {}
        self._emails: dict[str, UserRecord] = {}
        self._credentials: dict[str, Credentials] = {}

    async def find(self, access_key: str, token: str = "") -> Credentials | None:
        """Raises CatalogUnavailable for a pair that another node may have made: this one does not know everything now."""
        await self._refresh()
        if token and self.sealer is not None:
            return await self._temporary(access_key, token, self.sealer)
        found = self._credentials.get(access_key)
        if found is None and (pair := await self._pair(access_key)) is not None:
            user, key = pair
            found = Credentials(user, self._open_secret(user, key), of_user(user), access_key, key.enabled)
            self._credentials[access_key] = found
        return found

    async def _temporary(self, access_key: str, token: str, sealer: SessionSealer) -> Credentials | None:
        session = sealer.open(token, access_key)
        if session is None:
            return None
        pair = await self._pair(session.parent)
        if pair is None or pair[0].user_id != session.user_id:
            return None
        user, key = pair
        principal = of_user(user, session_policy=session.policy)
        return Credentials(user, session.secret_key, principal, access_key, key.enabled, session)

    async def _pair(self, access_key: str) -> tuple[UserRecord, AccessKey] | None:
        if access_key not in self._keys:
            await self._catalog.fresh()
            await self._refresh()
        return self._keys.get(access_key)

    async def by_id(self, user_id: str) -> UserRecord | None:
        await self._refresh()
        return self._users.get(user_id)

    async def by_canonical_id(self, canonical_id: str) -> UserRecord | None:
        await self._refresh()
        return self._canonical.get(canonical_id.lower())

    async def by_email(self, email: str) -> UserRecord | None:
        await self._refresh()
        return self._emails.get(email.lower())

    async def _refresh(self) -> None:
        generation = self._catalog.generation()
        if generation == self._generation:
            return
        # The generation was read first: a change during the read then only means reading again.
        users = await self._catalog.users()
        self._keys = {key.access_key: (user, key) for user in users for key in user.keys}
        self._users = {user.user_id: user for user in users}
        self._canonical = {user.canonical_id.lower(): user for user in users}
        self._emails = {user.email.lower(): user for user in users if user.email}
        self._credentials, self._generation = {}, generation

"""From an access key to a user with a secret to verify with.

In: the user records of the catalogue and a function that opens a secret (the node key stays with the caller). Out:
``Credentials``. Cached until the catalogue's generation moves, so that a disabled user is refused at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

from ingest.ports import Catalog
from ingest.records import UserRecord


@dataclasses.dataclass(frozen=True, slots=True)
class Credentials:
    user: UserRecord
    secret_key: str = dataclasses.field(repr=False)


class UserStore(Protocol):
    async def find(self, access_key: str) -> Credentials | None:
        """The user with this access key, enabled or not; None when there is none."""
        ...


class CatalogUsers:
    """Users kept in the catalogue. ``open_secret`` decrypts ``UserRecord.secret``."""

    def __init__(self, catalog: Catalog, open_secret: Callable[[UserRecord], str]) -> None:
        self._catalog = catalog
        self._open_secret = open_secret
        self._generation = -1
        self._records: dict[str, UserRecord] = {}
        self._credentials: dict[str, Credentials] = {}

    async def find(self, access_key: str) -> Credentials | None:
        generation = self._catalog.generation()
        if generation != self._generation:
            # Read the generation first: a change during the read then only means reading again.
            records = {user.access_key: user for user in await self._catalog.users()}
            self._records, self._credentials, self._generation = records, {}, generation
        found = self._credentials.get(access_key)
        if found is None and (record := self._records.get(access_key)) is not None:
            found = Credentials(record, self._open_secret(record))
            self._credentials[access_key] = found
        return found

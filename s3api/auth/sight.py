"""What one user may see of the whole namespace: the engine's answers as a filter on buckets, keys and key prefixes.

In: a principal, the gate, a request. Out: what WebDAV (archive/dav/auth.py, ``Sight``) and the control API ask. Listing
needs s3:ListBucket of a prefix, reading s3:GetObject of a key, exactly as over S3.
"""

from __future__ import annotations

from collections.abc import Callable

from ingest.records import BucketRecord
from s3api.auth import grants
from s3api.auth.context import RequestContext
from s3api.auth.engine import Question, sees
from s3api.auth.policy.language import Policy
from s3api.auth.principal import Principal
from s3api.auth.rules import Gate
from s3api.http.message import Request

PREFIXES_MAX = 256


class UserSight:
    def __init__(self, gate: Gate, principal: Principal, request: Request, clock: Callable[[], float]) -> None:
        """``clock``: seconds since the epoch."""
        self.user_id = principal.user_id
        self._gate = gate
        self._principal = principal
        self._request = request
        self._clock = clock

    async def may(self, action: str, bucket: str, name: bytes = b"") -> bool:
        """May the user do ``action`` to the bucket, or to the key or listed prefix ``name``?"""
        listed = {"s3:prefix": name.decode("utf-8", "surrogateescape")} if action == "s3:ListBucket" else None
        context = RequestContext(self._request, self._principal, self._clock(), extra=listed)
        return (await self._gate.ask(self._principal, Question(action, bucket, name), context)).allowed

    async def bucket(self, bucket: BucketRecord) -> bool:
        """Does the user learn that the bucket exists?"""
        context = RequestContext(self._request, self._principal, self._clock())
        return sees(self._principal, bucket, context) or bool(await self.scans(bucket.name, b""))

    async def key(self, bucket: str, key: bytes) -> bool:
        return await self.may("s3:GetObject", bucket, key)

    async def scans(self, bucket: str, folder: bytes) -> list[bytes]:
        """Key prefixes, disjoint and in order, that together are what the user may list below the prefix ``folder``."""
        if await self.may("s3:ListBucket", bucket, folder):
            return [folder]
        chosen: list[bytes] = []
        for prefix in await self._prefixes(bucket, folder):
            if not (chosen and prefix.startswith(chosen[-1])) and await self.may("s3:ListBucket", bucket, prefix):
                chosen.append(prefix)
        return chosen

    async def _prefixes(self, bucket: str, folder: bytes) -> list[bytes]:
        """Where something may begin that the user may list: what grants and conditions on s3:prefix name."""
        found = set(grants.prefixes(self._principal.grants, bucket))
        rules = await self._gate.rules(bucket)
        for policy in (*self._principal.policies, *([rules.policy] if rules.policy else [])):
            found |= _named(policy)
        return sorted(prefix for prefix in found if prefix.startswith(folder))[:PREFIXES_MAX]


def _named(policy: Policy) -> set[bytes]:
    return {
        value.partition("*")[0].partition("?")[0].encode("utf-8", "surrogateescape")
        for statement in policy.statements
        for condition in statement.conditions
        if condition.key == "s3:prefix"
        for value in condition.values
    }

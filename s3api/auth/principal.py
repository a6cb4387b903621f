"""Who asks, as the engine wants to know it: names, grants, policies, parsed once for each generation of the catalogue."""

from __future__ import annotations

import dataclasses
import functools

from ingest.records import Grant, UserRecord
from s3api.auth.policy.language import MalformedPolicy, Policy, parse
from s3api.auth.policy.principals import names_of

parsed_identity = functools.lru_cache(maxsize=1024)(parse)


@dataclasses.dataclass(frozen=True, slots=True)
class Principal:
    user_id: str
    canonical_id: str
    root: bool = False
    anonymous: bool = False
    grants: tuple[Grant, ...] = ()
    policies: tuple[Policy, ...] = ()
    session: Policy | None = None
    """Of temporary keys that were made with one."""
    broken: bool = False
    """A policy of the user cannot be read: it may have denied something, so everything is."""
    names: frozenset[str] = frozenset()


def of_user(user: UserRecord, *, session_policy: str = "", anonymous: bool = False) -> Principal:
    broken = False
    policies = []
    session = None
    try:
        policies = [parsed_identity(text) for text in user.policies.values()]
        session = parsed_identity(session_policy) if session_policy else None
    except MalformedPolicy:
        broken = True
    return Principal(
        user_id=user.user_id,
        canonical_id=user.canonical_id,
        root=user.root,
        anonymous=anonymous,
        grants=user.grants,
        policies=tuple(policies),
        session=session,
        broken=broken,
        names=frozenset() if anonymous else names_of(user.user_id, user.canonical_id),
    )

"""What a user may do: read, write or administer, by bucket glob and key prefix.

Pure functions over ``ingest.records.UserRecord``. ``admin`` implies ``write`` implies ``read``; root may do everything.
A grant with a prefix covers keys under it and listings that ask for it or deeper, never bucket settings.
"""

from __future__ import annotations

import fnmatch

from ingest.records import UserRecord
from s3api.auth.actions import ACTIONS, Access, Over

_LEVELS = {access.name.lower(): int(access) for access in Access}


def allows(user: UserRecord, access: Access, bucket: str, prefix: bytes = b"") -> bool:
    """May ``user`` do ``access`` to everything in ``bucket`` that starts with ``prefix`` (a whole key, or a listing's
    prefix; empty: the bucket itself)?"""
    if user.root:
        return True
    for grant in user.grants:
        if (
            _LEVELS.get(grant.access, 0) >= access
            and fnmatch.fnmatchcase(bucket, grant.bucket)
            and prefix.startswith(grant.prefix.encode())
        ):
            return True
    return False


def sees(user: UserRecord, bucket: str) -> bool:
    """Has ``user`` any grant in ``bucket``? Enough to learn that it exists, and its region."""
    return user.root or any(
        grant.access in _LEVELS and fnmatch.fnmatchcase(bucket, grant.bucket) for grant in user.grants
    )


def permits(user: UserRecord, action: str, bucket: str, name: bytes, over: Over | None = None) -> bool:
    """Do the user's grants allow ``action``? ``name``: the key, or the prefix that a listing asks for. ``over`` stands in for
    what the actions table says a grant must cover."""
    row = ACTIONS[action]
    over = over or row.over
    if over is Over.NOTHING:
        return True
    if over is Over.ANYTHING:
        return any(allows(user, row.access, bucket, grant.prefix.encode()) for grant in user.grants) or user.root
    return allows(user, row.access, bucket, b"" if over is Over.BUCKET else name)

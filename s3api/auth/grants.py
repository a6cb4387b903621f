"""What a user may do: read, write or administer, by bucket glob and key prefix.

Pure functions over ``ingest.records.UserRecord``. ``admin`` implies ``write`` implies ``read``; root may do everything.
A grant with a prefix covers keys under it and listings that ask for it or deeper, never bucket settings.
"""

from __future__ import annotations

import enum
import fnmatch

from ingest.records import UserRecord


class Access(enum.IntEnum):
    """Levels of access; a higher one implies the lower ones."""

    READ = 1
    WRITE = 2
    ADMIN = 3


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

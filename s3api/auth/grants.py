"""What a user's grants allow: read, write or administer, by bucket glob and key prefix.

Pure functions over ``ingest.records.Grant``. ``admin`` implies ``write`` implies ``read``. A grant with a prefix covers keys
under it and listings that ask for it or deeper, never bucket settings. The engine (s3api/auth/engine.py) asks here.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from ingest.records import Grant
from s3api.auth.actions import ACTIONS, Access, Over

_LEVELS = {access.name.lower(): int(access) for access in Access}


def allows(held: Sequence[Grant], access: Access, bucket: str, prefix: bytes = b"") -> bool:
    """Do the grants give ``access`` to everything in ``bucket`` that starts with ``prefix`` (a whole key, or a listing's
    prefix; empty: the bucket itself)?"""
    return any(
        _LEVELS.get(grant.access, 0) >= access
        and fnmatch.fnmatchcase(bucket, grant.bucket)
        and prefix.startswith(grant.prefix.encode())
        for grant in held
    )


def permits(held: Sequence[Grant], action: str, bucket: str, name: bytes, over: Over | None = None) -> bool:
    """Do the grants allow ``action``? ``name``: the key, or the prefix that a listing asks for. ``over`` stands in for what
    the actions table says a grant must cover."""
    row = ACTIONS[action]
    over = over or row.over
    if over is Over.NOTHING:
        return True
    if over is Over.ANYTHING:
        return any(allows((grant,), row.access, bucket, grant.prefix.encode()) for grant in held)
    return allows(held, row.access, bucket, b"" if over is Over.BUCKET else name)


def prefixes(held: Sequence[Grant], bucket: str) -> list[bytes]:
    """Of the keys in ``bucket`` that the grants open, at any level."""
    return [
        grant.prefix.encode() for grant in held if grant.access in _LEVELS and fnmatch.fnmatchcase(bucket, grant.bucket)
    ]

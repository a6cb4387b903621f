"""Who asks the control API: HTTP Basic with an S3 key pair, and read grants on buckets.

In: requests. Out: the ``UserRecord``, or 401 / 403. The same ``authenticator`` serves the WebDAV port.
"""

from __future__ import annotations

import hmac
from typing import Annotated

from fastapi import Depends, HTTPException, Request
from fastapi.security.http import HTTPBase
from starlette.requests import HTTPConnection

from archive.dav.auth import CHALLENGE, Authenticator, basic_credentials
from ingest.records import UserRecord
from s3api.auth.actions import Access
from s3api.auth.grants import allows
from s3api.auth.users import UserStore

_ABSENT = "-"


def authenticator(users: UserStore) -> Authenticator:
    """Check key pairs against ``users``; the comparison takes as long for a wrong secret as for an unknown key."""

    async def authenticate(access_key: str, secret_key: str) -> UserRecord | None:
        found = await users.find(access_key)
        expected = found.secret_key if found else _ABSENT
        same = hmac.compare_digest(expected.encode(), secret_key.encode())
        return found.user if found and same and found.user.enabled else None

    return authenticate


# Documents the scheme in the OpenAPI document and decides nothing: FastAPI's own Basic takes ASCII secrets only.
_SCHEME = HTTPBase(scheme="basic", scheme_name="S3 key pair", auto_error=False)


async def _signed_in(request: Request, _: Annotated[object, Depends(_SCHEME)]) -> UserRecord:
    return await signed_in(request, basic_credentials(request.headers.get("authorization", "")))


async def signed_in(connection: HTTPConnection, credentials: tuple[str, str] | None) -> UserRecord:
    """The user of these credentials; raises 401."""
    authenticate: Authenticator = connection.app.state.context.authenticate
    user = await authenticate(*credentials) if credentials else None
    if user is None:
        message = "sign in with an access key and its secret key"
        raise HTTPException(401, message, {"WWW-Authenticate": CHALLENGE})
    return user


User = Annotated[UserRecord, Depends(_signed_in)]


def require_write(user: UserRecord, bucket: str, prefix: bytes = b"") -> None:
    """Raises 403 unless the user may write everything under ``prefix``."""
    if not allows(user, Access.WRITE, bucket, prefix):
        raise HTTPException(
            403, f"your key pair may not write {prefix.decode(errors='replace')!r} in bucket {bucket!r}"
        )


def require_read(user: UserRecord, bucket: str, prefix: bytes = b"") -> None:
    """Raises 403 unless the user may read everything under ``prefix``."""
    if not allows(user, Access.READ, bucket, prefix):
        raise HTTPException(403, f"your key pair may not read {prefix.decode(errors='replace')!r} in bucket {bucket!r}")

"""Who asks the control API: HTTP Basic with an S3 key pair, and what the S3 port would allow.

In: requests. Out: the ``Caller``, or 401 / 403. Who is who is decided by gateway/access.py.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, cast

from fastapi import Depends, HTTPException, Request
from fastapi.security.http import HTTPBase
from starlette.requests import HTTPConnection

from archive.dav.auth import CHALLENGE, Authenticator, basic_credentials
from ingest.records import UserRecord
from s3api.auth.actions import Access
from s3api.auth.grants import allows
from s3api.auth.sight import UserSight
from s3api.http import message

_NO_BODY = cast(message.Body, None)
"""The rules look at heads only."""


# Documents the scheme in the OpenAPI document and decides nothing: FastAPI's own Basic takes ASCII secrets only.
_SCHEME = HTTPBase(scheme="basic", scheme_name="S3 key pair", auto_error=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and what they may do."""

    user: UserRecord
    sight: UserSight


async def _signed_in(request: Request, _: Annotated[object, Depends(_SCHEME)]) -> Caller:
    return await signed_in(request, basic_credentials(request.headers.get("authorization", "")))


async def signed_in(connection: HTTPConnection, credentials: tuple[str, str] | None) -> Caller:
    """The user of these credentials; raises 401."""
    context = connection.app.state.context
    authenticate: Authenticator = context.authenticate
    user = await authenticate(*credentials) if credentials else None
    if user is None:
        text = "sign in with an access key and its secret key"
        raise HTTPException(401, text, {"WWW-Authenticate": CHALLENGE})
    return Caller(user, context.sight_of(user, _as_request(connection)))


def _as_request(connection: HTTPConnection) -> message.Request:
    """What conditions of policies ask of a request, as the S3 port would see it."""
    client = connection.client
    host = f"[{client.host}]" if client and ":" in client.host else client.host if client else ""
    return message.Request(
        method="GET",
        target="",
        path="",
        query=(),
        headers=message.Headers([(name.lower(), value) for name, value in connection.headers.items()]),
        body=_NO_BODY,
        peer=f"{host}:{client.port}" if client else "",
        secure=connection.url.scheme in ("https", "wss"),
        request_id="",
    )


User = Annotated[Caller, Depends(_signed_in)]


def require_operator(caller: Caller) -> None:
    """Raises 403 unless the user administers every bucket: what is given to one is taken from the others."""
    if not (caller.user.root or allows(caller.user.grants, Access.ADMIN, "*")):
        raise HTTPException(403, "this needs root, or a key pair that administers all buckets")


async def require_write(caller: Caller, bucket: str, prefix: bytes = b"") -> None:
    """Raises 403 unless the user may write everything under ``prefix``."""
    await _require(caller, "s3:PutObject", bucket, prefix, "write")


async def require_read(caller: Caller, bucket: str, prefix: bytes = b"") -> None:
    """Raises 403 unless the user may read everything under ``prefix``."""
    await _require(caller, "s3:GetObject", bucket, prefix, "read")


async def _require(caller: Caller, action: str, bucket: str, prefix: bytes, verb: str) -> None:
    if not await caller.sight.may(action, bucket, prefix):
        where = prefix.decode(errors="replace")
        raise HTTPException(403, f"your key pair may not {verb} {where!r} in bucket {bucket!r}")

"""The WebDAV handler: who asks, what they mean, and which of three ways answers it.

In: ``Request``s of an s3api.http connection. Out: ``Response``s. GET, HEAD and OPTIONS are answered here, object
bytes as a ``FileBody`` that the connection sends from the buffer's files like an S3 GetObject; methods that write are
refused; the rest goes to WsgiDAV over the bridge. What always holds: an open reader is closed exactly once, whatever
happens to the request.
"""

from __future__ import annotations

import collections
from email.utils import formatdate
from urllib.parse import unquote

from archive.dav import conditions, digests
from archive.dav.auth import CHALLENGE, Authenticator, SightOf, basic_credentials
from archive.dav.errors import ALLOWED, READ_ONLY, render, text_response
from archive.dav.listing import listing
from archive.dav.paths import BadPath, Target, href, parse
from archive.dav.properties import DEFAULT_CONTENT_TYPE, modified_s
from archive.dav.tree import File, Folder, Root, Tree
from archive.dav.wsgi import WsgiBridge
from ingest.errors import NoSuchKey, ObjectOffline, StaleVersion
from ingest.records import ObjectRecord, ObjectState, UserRecord
from ingest.stream_types import DataPlane
from s3api.http.message import FileBody, Request, Response

RECALLS_PER_USER = 8
"""Offline objects one user may have this worker recall at a time; a previewing file manager asks for all it lists."""
OPEN_ATTEMPTS = 3
"""An object can be replaced between looking it up and opening it."""

_WRITING = frozenset(
    {"PUT", "POST", "PATCH", "DELETE", "MKCOL", "COPY", "MOVE", "PROPPATCH", "LOCK", "UNLOCK", "ACL", "MKCALENDAR"}
)
_STORED_FIELDS = ("content-encoding", "content-language", "content-disposition", "cache-control", "expires")
_SANDBOXED = ("Content-Security-Policy", "sandbox; default-src 'none'; style-src 'unsafe-inline'")
"""Stored HTML must not run as this site with the reader's credentials."""
_OFFLINE = frozenset({ObjectState.EVICTED, ObjectState.RECALLING})


class DavService:
    """One for each worker process. ``await service(request)`` answers and never raises; ``close`` ends its threads."""

    def __init__(self, plane: DataPlane, authenticate: Authenticator, sight_of: SightOf) -> None:
        self._plane = plane
        self._authenticate = authenticate
        self._sight_of = sight_of
        self._bridge = WsgiBridge()
        self._recalls: collections.Counter[str] = collections.Counter()

    def close(self) -> None:
        self._bridge.close()

    async def __call__(self, request: Request) -> Response:
        request.scope["operation"] = "WebDAV"
        try:
            return await self._answer(request)
        except Exception as error:
            return render(error)

    async def _answer(self, request: Request) -> Response:
        if request.method == "OPTIONS":
            # Windows asks without credentials and gives up on a 401; the answer is the same for everybody.
            return Response(200, [("DAV", "1"), ("Allow", ALLOWED), ("MS-Author-Via", "DAV")])
        user = await self._user(request)
        if user is None:
            message = "Sign in with an access key and its secret key."
            return text_response(401, message, [("WWW-Authenticate", CHALLENGE)])
        request.scope["user"] = user.user_id
        if request.method in _WRITING:
            response = text_response(405, READ_ONLY)
            # The body that may follow is not wanted, however long it is.
            response.close = request.body.length != 0
            return response
        tree = Tree(self._plane.catalog, self._sight_of(user, request))
        target = parse(request.path)
        if request.method in ("GET", "HEAD"):
            return await self._read(request, tree, target, user.user_id)
        return await self._bridge.run(request, tree, target, user.user_id)

    async def _user(self, request: Request) -> UserRecord | None:
        credentials = basic_credentials(request.headers.get("authorization"))
        return await self._authenticate(*credentials) if credentials else None

    async def _read(self, request: Request, tree: Tree, target: Target, user_id: str) -> Response:
        node = await tree.resolve(target)
        if node is None:
            raise BadPath("nothing here, or not yours to see")
        if isinstance(node, Root | Folder):
            return self._folder(request, tree, target, node)
        if not isinstance(node, File):
            return Response(200, [("Content-Type", DEFAULT_CONTENT_TYPE)], content_length=0)
        for attempt in range(OPEN_ATTEMPTS):
            try:
                return await self._object(request, node.record, user_id)
            except (StaleVersion, NoSuchKey):
                if attempt == OPEN_ATTEMPTS - 1:
                    raise
                node = await tree.resolve(target)
                if not isinstance(node, File):
                    raise
        raise AssertionError("unreachable")

    def _folder(self, request: Request, tree: Tree, target: Target, node: Root | Folder) -> Response:
        path = unquote(request.path)
        if not path.endswith("/"):
            return text_response(301, "Folders end in a slash.", [("Location", href(path + "/"))])
        headers = [("Content-Type", "text/html; charset=utf-8"), ("Cache-Control", "no-store"), _SANDBOXED]
        if request.method == "HEAD":
            return Response(200, headers)
        return Response(200, headers, listing(tree, target, path, node))

    async def _object(self, request: Request, record: ObjectRecord, user_id: str) -> Response:
        decision = conditions.decide(
            request.method,
            request.headers,
            etag=record.etag,
            modified_s=modified_s(record),
            length=record.length,
        )
        headers = _validators(record)
        if isinstance(decision, conditions.Refused):
            if decision.status == 416:
                headers.append(("Content-Range", f"bytes */{record.length}"))
            return Response(decision.status, headers)
        headers += _representation(request, record)
        if isinstance(decision, conditions.Part):
            headers.append(("Content-Range", f"bytes {decision.start}-{decision.stop - 1}/{record.length}"))
            return await self._bytes(206, headers, record, decision.start, decision.stop, user_id)
        if request.method == "HEAD":
            return Response(200, headers, content_length=record.length)
        return await self._bytes(200, headers, record, 0, record.length, user_id)

    async def _bytes(
        self, status: int, headers: list[tuple[str, str]], record: ObjectRecord, start: int, stop: int, user_id: str
    ) -> Response:
        if start == stop:
            return Response(status, headers, content_length=0)
        offline = record.state in _OFFLINE
        if offline and self._recalls[user_id] >= RECALLS_PER_USER:
            raise ObjectOffline(f"you already wait for {RECALLS_PER_USER} recalls")
        self._recalls[user_id] += offline
        try:
            reader = await self._plane.open_reader(record, start, stop)
        finally:
            self._recalls[user_id] -= offline
            if not self._recalls[user_id]:
                del self._recalls[user_id]
        await reader.__aenter__()
        return Response(status, headers, FileBody.of(reader, stop - start))


def _validators(record: ObjectRecord) -> list[tuple[str, str]]:
    return [
        ("ETag", f'"{record.etag}"'),
        ("Last-Modified", formatdate(modified_s(record), usegmt=True)),
        ("Accept-Ranges", "bytes"),
    ]


def _representation(request: Request, record: ObjectRecord) -> list[tuple[str, str]]:
    """What describes the whole object, and the digests that were asked for and are known."""
    headers = [("Content-Type", record.headers.get("content-type", DEFAULT_CONTENT_TYPE)), _SANDBOXED]
    headers.append(("X-Content-Type-Options", "nosniff"))
    headers += [(name.title(), record.headers[name]) for name in _STORED_FIELDS if name in record.headers]
    if digest := digests.digest_field(record, request.headers.get("want-digest")):
        headers.append(("Digest", digest))
    if digest := digests.repr_digest_field(record, request.headers.get("want-repr-digest")):
        headers.append(("Repr-Digest", digest))
    return headers

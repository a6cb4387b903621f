"""The bridge to WsgiDAV: one request in a bounded thread, its body and its answer both small and in memory.

In: a request whose method our own connection does not serve, its user's ``Tree``, its ``Target``. Out: a
``Response``; for a PROPFIND one that streams. What always holds: at most THREADS requests are in threads and at most
QUEUE_MAX wait; a thread waits for the loop, the loop never for a thread, so the two cannot block each other; every
wait has a limit.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import io
import logging
from typing import Any
from urllib.parse import unquote_to_bytes

from wsgidav.request_resolver import RequestResolver
from wsgidav.wsgidav_app import WsgiDAVApp

from archive.dav.errors import text_response
from archive.dav.multistatus import multistatus
from archive.dav.paths import Target
from archive.dav.provider import CALL, Call, CatalogueProvider
from archive.dav.tree import Tree
from s3api.http.message import Request, Response

THREADS = 4
QUEUE_MAX = 64
BODY_BYTES_MAX = 64 * 1024
CALL_TIMEOUT_S = 10.0

_HOP_BY_HOP = frozenset({"connection", "content-length", "date", "server", "transfer-encoding"})


class WsgiBridge:
    """One for each worker process; ``close`` ends its threads."""

    def __init__(self) -> None:
        # The library logs every request and every refusal by itself; the access log has those already.
        logging.getLogger("wsgidav").setLevel(logging.ERROR)
        self._app = WsgiDAVApp(
            {
                "provider_mapping": {"/": CatalogueProvider()},
                # Authentication and error pages are ours, on both sides of the bridge; locks come with writing.
                "middleware_stack": [RequestResolver],
                "lock_storage": None,
                "property_manager": None,
                "verbose": 1,
                "logging": {"enable": False},
            }
        )
        self._threads = concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="dav")
        self._waiting = 0

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def run(self, request: Request, tree: Tree, target: Target, user_id: str) -> Response:
        """Raises HttpError (body too large), DAVError, CatalogError, TimeoutError: see errors.py."""
        if self._waiting >= THREADS + QUEUE_MAX:
            return text_response(503, "Too many WebDAV requests at once; try again.")
        body = await request.body.read(BODY_BYTES_MAX)
        loop = asyncio.get_running_loop()
        call = Call(tree, target, loop, CALL_TIMEOUT_S)
        environ = {**_environ(request, body), CALL: call, "wsgidav.auth.user_name": user_id}
        self._waiting += 1
        try:
            response = await loop.run_in_executor(self._threads, self._serve, environ)
        finally:
            self._waiting -= 1
        if call.plan is not None:
            response.headers.append(("Content-Type", "application/xml; charset=utf-8"))
            response.body = multistatus(tree, call.plan)
        return response

    def _serve(self, environ: dict[str, Any]) -> Response:
        """In a thread: call WsgiDAV and gather what it answers."""
        started: list[Response] = []

        def start_response(status: str, headers: list[tuple[str, str]], _exc_info: object = None) -> None:
            fields = [(name, value) for name, value in headers if name.lower() not in _HOP_BY_HOP]
            started.append(Response(int(status.split(" ", 1)[0]), fields))

        body = b"".join(self._app(environ, start_response))
        response = started[-1]
        response.body = body
        return response


def _environ(request: Request, body: bytes) -> dict[str, Any]:
    """A WSGI environ (PEP 3333): paths are the decoded bytes as latin-1 text."""
    environ: dict[str, Any] = {
        "REQUEST_METHOD": request.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(request.path).decode("latin-1"),
        "QUERY_STRING": request.target.partition("?")[2],
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "0",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": request.peer,
        "CONTENT_TYPE": request.headers.get("content-type"),
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "https" if request.secure else "http",
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": io.StringIO(),
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    }
    for name, value in request.headers.items():
        if name not in ("content-type", "content-length", "authorization"):
            environ[f"HTTP_{name.upper().replace('-', '_')}"] = value
    return environ

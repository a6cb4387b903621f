"""WsgiDAV's view of the catalogue: a read-only provider, and the PROPFIND that WsgiDAV would build whole in memory.

Upstream: WsgiDAV, in one of the bridge's threads (wsgi.py). Downstream: ``Tree``, on the worker's loop, through the
request's ``Call``. WsgiDAV parses, checks ``If`` and other conditions and decides errors; the multistatus itself is
only planned here and streamed afterwards on the loop, so a slow client holds no thread and a folder of any size fits
in memory.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from defusedxml import DefusedXmlException, ElementTree
from wsgidav import util
from wsgidav.dav_error import (
    HTTP_BAD_REQUEST,
    HTTP_FORBIDDEN,
    HTTP_NOT_FOUND,
    HTTP_PRECONDITION_FAILED,
    DAVError,
    PRECONDITION_CODE_PropfindFiniteDepth,
)
from wsgidav.dav_provider import DAVProvider, _DAVResource

from archive.dav.multistatus import Plan
from archive.dav.paths import Target
from archive.dav.properties import PROPERTIES_MAX, Wanted, modified_s
from archive.dav.tree import File, Folder, Node, Root, Tree

CALL = "hiss.call"
"""Key of the request's ``Call`` in the WSGI environ."""

_T = TypeVar("_T")
_StartResponse = Callable[..., object]


class Call:
    """One request in a thread: its tree, its target, and the way back to the loop."""

    def __init__(self, tree: Tree, target: Target, loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        self.tree = tree
        self.target = target
        self.plan: Plan | None = None
        """Set by PROPFIND: what to stream once the thread is done."""
        self._loop = loop
        self._timeout_s = timeout_s

    def wait(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run on the loop and wait for it in this thread. TimeoutError; the coroutine is then cancelled."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(self._timeout_s)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise TimeoutError from None


class CatalogueResource(_DAVResource):  # type: ignore[misc]
    """What a path names, with the validators that conditions are checked against. Only objects have an ETag."""

    def __init__(self, path: str, environ: dict[str, Any], node: Node) -> None:
        super().__init__(path, isinstance(node, Root | Folder), environ)
        self.node = node
        self._record = node.record if isinstance(node, File) else None

    def get_content_length(self) -> int | None:
        return self._record.length if self._record else None

    def get_etag(self) -> str | None:
        return self._record.etag if self._record else None

    def support_etag(self) -> bool:
        return self._record is not None

    def get_last_modified(self) -> int | None:
        return modified_s(self._record) if self._record else None


class CatalogueProvider(DAVProvider):  # type: ignore[misc]
    def is_readonly(self) -> bool:
        return True

    def get_resource_inst(self, path: str, environ: dict[str, Any]) -> CatalogueResource | None:
        call: Call = environ[CALL]
        node = call.wait(call.tree.resolve(call.target))
        return None if node is None else CatalogueResource(path, environ, node)

    def custom_request_handler(
        self, environ: dict[str, Any], start_response: _StartResponse, default_handler: Callable[..., Iterable[bytes]]
    ) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "PROPFIND":
            return default_handler(environ, start_response)
        call: Call = environ[CALL]
        call.plan = self._plan(environ)
        start_response("207 Multi-Status", [("Content-Length", "0")])
        return [b""]

    def _plan(self, environ: dict[str, Any]) -> Plan:
        # Without the field the depth is infinite, which a server may refuse (RFC 4918 section 9.1).
        depth = environ.get("HTTP_DEPTH", "infinity")
        if depth == "infinity":
            raise DAVError(HTTP_FORBIDDEN, err_condition=PRECONDITION_CODE_PropfindFiniteDepth)
        if depth not in ("0", "1"):
            raise DAVError(HTTP_BAD_REQUEST, f"Depth must be 0 or 1, not {depth!r}.")
        path: str = environ["PATH_INFO"]
        resource = self.get_resource_inst(path, environ)
        if resource is None:
            raise DAVError(HTTP_NOT_FOUND, f"There is no {path!r}, or it is not yours to see.")
        _check_conditions(resource, environ)
        wanted = _wanted(environ["wsgi.input"].read())
        return Plan(path, resource.name or "/", resource.node, depth == "1", wanted)


def _check_conditions(resource: CatalogueResource, environ: dict[str, Any]) -> None:
    """The conditions of RFC 9110 section 13 and the ``If`` field of RFC 4918 section 10.4; DAVError 304 or 412."""
    if any(f"HTTP_IF_{name}" in environ for name in ("MATCH", "NONE_MATCH", "MODIFIED_SINCE", "UNMODIFIED_SINCE")):
        util.evaluate_http_conditionals(
            resource, resource.get_last_modified() or -1, resource.get_etag() or "[]", environ
        )
    if "HTTP_IF" in environ:
        util.parse_if_header_dict(environ)
        conditions = environ["wsgidav.conditions.if"]
        etag = resource.get_etag() or "[]"
        if not util.test_if_header_dict(resource, conditions, resource.get_ref_url(), [], etag):
            raise DAVError(HTTP_PRECONDITION_FAILED, "The If field does not hold.")


def _wanted(body: bytes) -> Wanted:
    """What the body of a PROPFIND asks for; no body means ``allprop`` (RFC 4918 section 9.1)."""
    if not body:
        return Wanted.all()
    try:
        request = ElementTree.fromstring(body, forbid_dtd=True)
    except (ElementTree.ParseError, DefusedXmlException, ValueError):
        raise DAVError(HTTP_BAD_REQUEST, "The body is not XML without a document type.") from None
    if request.tag != "{DAV:}propfind":
        raise DAVError(HTTP_BAD_REQUEST, "The body must be a DAV:propfind element.")
    asked = {child.tag: child for child in request if isinstance(child.tag, str)}
    kinds = asked.keys() & {"{DAV:}allprop", "{DAV:}propname", "{DAV:}prop"}
    if len(kinds) != 1:
        raise DAVError(HTTP_BAD_REQUEST, "DAV:propfind must hold one of allprop, propname and prop.")
    if "{DAV:}propname" in kinds:
        return Wanted.every_name()
    if "{DAV:}allprop" in kinds:
        include = asked.get("{DAV:}include")
        return Wanted.all(() if include is None else _names(include))
    return Wanted(_names(asked["{DAV:}prop"]), named=True)


def _names(element: Any) -> tuple[str, ...]:
    names = dict.fromkeys(child.tag for child in element if isinstance(child.tag, str))
    if len(names) > PROPERTIES_MAX:
        raise DAVError(HTTP_BAD_REQUEST, f"A PROPFIND may name at most {PROPERTIES_MAX} properties.")
    return tuple(names)

"""The answer to a PROPFIND as a stream: one page of the catalogue at a time, whatever the size of the folder.

In: a ``Plan``, made once the request is understood. Out: chunks of a 207 body (RFC 4918 section 13). What always
holds: a body that ends with its closing tag is complete; where reading the catalogue fails midway the stream breaks
off instead, so that no client takes half a folder for a folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator

from archive.dav.paths import href
from archive.dav.properties import ResponseWriter, Wanted
from archive.dav.tree import Folder, Node, Root, Tree

ENTRIES_MAX = 1_000_000
"""A longer folder ends with a 507 for the folder itself, the way RFC 5323 section 5.16.5 cuts a result short."""

_HEAD = '<?xml version="1.0" encoding="utf-8"?>\n<D:multistatus xmlns:D="DAV:">\n'
_TAIL = "</D:multistatus>\n"
_CUT = (
    "<D:response><D:href>{href}</D:href><D:status>HTTP/1.1 507 Insufficient Storage</D:status>"
    "<D:error><D:number-of-matches-within-limits/></D:error></D:response>\n"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """``path`` is the request's decoded path: hrefs are made of it, so that clients recognise what they asked for."""

    path: str
    name: str
    node: Node
    children: bool
    """Depth 1."""
    wanted: Wanted


async def multistatus(tree: Tree, plan: Plan) -> AsyncIterator[bytes]:
    writer = ResponseWriter(plan.wanted)
    collection = isinstance(plan.node, Root | Folder)
    base = href(plan.path.rstrip("/") + "/" if collection else plan.path)
    head = _HEAD + writer.response(base, plan.name, plan.node)
    if not plan.children or not isinstance(plan.node, Root | Folder):
        yield (head + _TAIL).encode()
        return
    yield head.encode()
    entries_sent = 0
    async for page in tree.children(plan.node):
        if entries_sent >= ENTRIES_MAX:
            yield _CUT.format(href=base).encode()
            break
        entries_sent += len(page)
        yield writer.page(base, href, page).encode()
    yield _TAIL.encode()

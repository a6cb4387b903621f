"""Properties of a node and their XML (RFC 4918 sections 9.1, 14 and 15). Pure: nodes in, bytes of a multistatus out.

One table says which properties exist, what they are for a file and for a folder, and whether ``allprop`` names them.
The XML is written by hand: ten thousand entries are then a matter of milliseconds a page instead of a tree of
elements in memory. What always holds: everything that came from a client is escaped, and characters XML 1.0 cannot
say never occur.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from email.utils import formatdate
from xml.sax.saxutils import escape, quoteattr

from archive.dav import digests
from archive.dav.tree import Entry, File, Folder, Node, Root, Sentinel
from ingest.records import ObjectRecord, ObjectState

HISS_NAMESPACE = "https://hiss"
OWNCLOUD_NAMESPACE = "http://owncloud.org/ns"
DEFAULT_CONTENT_TYPE = "application/octet-stream"
PROPERTIES_MAX = 256
"""Properties one PROPFIND may name."""

# ONLINE and NEARLINE are the words of the storage resource managers this view stands beside (SRM v2.2, TFileLocality).
_LOCALITY = {
    ObjectState.RECEIVING: "ONLINE",
    ObjectState.BUFFERED: "ONLINE",
    ObjectState.DRAINING: "ONLINE",
    ObjectState.ARCHIVED: "ONLINE_AND_NEARLINE",
    ObjectState.EVICTED: "NEARLINE",
    ObjectState.RECALLING: "NEARLINE",
    ObjectState.MARKER: "LOST",
    ObjectState.DELETED: "LOST",
}
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_LOCAL_NAME = re.compile(r"[^\W\d][\w.-]*")

_Value = Callable[[str, Node], str | None]
"""(name in its folder, node) -> the property's inner XML; None where the node does not have it."""


def text(value: str) -> str:
    """Character data: escaped, and without what XML 1.0 cannot carry."""
    return escape(_NOT_XML.sub("�", value))


def modified_s(record: ObjectRecord) -> int:
    return record.modified_ns // 1_000_000_000


def _of_file(read: Callable[[ObjectRecord], str | None]) -> _Value:
    return lambda _, node: read(node.record) if isinstance(node, File) else None


def _time(show: Callable[[int], str]) -> _Value:
    """When an object was stored or a bucket made, in whole seconds; a common prefix has no time of its own."""

    def value(_: str, node: Node) -> str | None:
        if isinstance(node, File):
            return show(modified_s(node.record))
        return show(node.bucket.created_ns // 10**9) if isinstance(node, Folder) and not node.prefix else None

    return value


def _length(_: str, node: Node) -> str | None:
    return str(node.record.length) if isinstance(node, File) else "0" if isinstance(node, Sentinel) else None


def _checksums(record: ObjectRecord) -> str | None:
    known = digests.owncloud(record)
    return f'<oc:checksum xmlns:oc="{OWNCLOUD_NAMESPACE}">{known}</oc:checksum>' if known else None


_TABLE: dict[str, tuple[bool, _Value]] = {
    "{DAV:}resourcetype": (True, lambda _, node: "<D:collection/>" if isinstance(node, Root | Folder) else ""),
    "{DAV:}displayname": (True, lambda name, _: text(name)),
    "{DAV:}creationdate": (True, _time(lambda seconds: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds)))),
    "{DAV:}getlastmodified": (True, _time(lambda seconds: formatdate(seconds, usegmt=True))),
    "{DAV:}getcontentlength": (True, _length),
    "{DAV:}getcontenttype": (
        True,
        _of_file(lambda record: text(record.headers.get("content-type", DEFAULT_CONTENT_TYPE))),
    ),
    "{DAV:}getetag": (True, _of_file(lambda record: text(f'"{record.etag}"'))),
    f"{{{HISS_NAMESPACE}}}state": (False, _of_file(lambda record: record.state.value)),
    f"{{{HISS_NAMESPACE}}}locality": (False, _of_file(lambda record: _LOCALITY[record.state])),
    f"{{{OWNCLOUD_NAMESPACE}}}checksums": (False, _of_file(_checksums)),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """What a PROPFIND asks for, in Clark notation. ``named``: absent ones are reported 404; else they are left out."""

    names: tuple[str, ...]
    named: bool = False
    values: bool = True
    """False for ``propname``: only which properties there are."""

    @staticmethod
    def all(include: tuple[str, ...] = ()) -> Wanted:
        """``allprop``: the properties RFC 4918 defines, and those the request includes by name."""
        return Wanted((*(name for name, (listed, _) in _TABLE.items() if listed), *include))

    @staticmethod
    def every_name() -> Wanted:
        return Wanted(tuple(_TABLE), values=False)


class ResponseWriter:
    """Writes ``D:response`` elements for one PROPFIND: tags are made once, only values for each node."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._tags = [(*_tags(name), _TABLE[name][1] if name in _TABLE else None) for name in wanted.names]

    def response(self, href: str, name: str, node: Node) -> str:
        """``href`` percent-encoded; ``name`` is the displayname."""
        found, missing = [], []
        for opening, closing, value in self._tags:
            inner = value(name, node) if value else None
            if inner is None:
                missing.append(f"{opening}{closing}")
            else:
                found.append(f"{opening}{inner if self._wanted.values else ''}{closing}")
        stats = _propstat(found, "200 OK") if found or not (missing and self._wanted.named) else ""
        if missing and self._wanted.named:
            stats += _propstat(missing, "404 Not Found")
        return f"<D:response><D:href>{escape(href)}</D:href>{stats}</D:response>\n"

    def page(self, base_href: str, quote: Callable[[str], str], entries: list[Entry]) -> str:
        """Responses for the children of the folder at ``base_href``, which ends in a slash."""
        return "".join(
            self.response(
                f"{base_href}{quote(entry.name)}{'/' if isinstance(entry.node, Folder) else ''}", entry.name, entry.node
            )
            for entry in entries
        )


def _propstat(elements: list[str], status: str) -> str:
    return f"<D:propstat><D:prop>{''.join(elements)}</D:prop><D:status>HTTP/1.1 {status}</D:status></D:propstat>"


def _tags(clark: str) -> tuple[str, str]:
    """Opening and closing tag of a property; a name that cannot be written as XML never came out of a parser."""
    namespace, local = clark[1:].split("}", 1) if clark.startswith("{") else ("", clark)
    if not _LOCAL_NAME.fullmatch(local):
        raise ValueError(f"{clark!r} is not the name of a property")
    if namespace == "DAV:":
        return f"<D:{local}>", f"</D:{local}>"
    if not namespace:
        return f'<{local} xmlns="">', f"</{local}>"
    return f"<p:{local} xmlns:p={quoteattr(namespace)}>", f"</p:{local}>"

"""A folder as a page for browsers: names, sizes, times and states; nothing to load from anywhere, no script.

In: a folder and its children from ``Tree``. Out: chunks of HTML, a page of the catalogue at a time. Every name is
escaped.
"""

from __future__ import annotations

import html
import time
from collections.abc import AsyncIterator

from archive.dav.multistatus import ENTRIES_MAX
from archive.dav.paths import Target, href, shown
from archive.dav.tree import Collection, Entry, File, Tree

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>body{{font:14px/1.5 system-ui,sans-serif;margin:2em;color:#222;background:#fff}}
table{{border-collapse:collapse}}td,th{{padding:.1em 1.2em .1em 0;text-align:left}}td.n{{text-align:right}}
@media(prefers-color-scheme:dark){{body{{color:#ddd;background:#181818}}a{{color:#8bf}}}}</style></head>
<body><h1>{title}</h1><table><tr><th>Name</th><th>Bytes</th><th>Modified (UTC)</th><th>State</th></tr>
"""
_TAIL = "</table>{note}</body></html>\n"


async def listing(tree: Tree, target: Target, path: str, collection: Collection) -> AsyncIterator[bytes]:
    """``path`` is the request's decoded path; it ends in a slash, so links are relative to it."""
    head = _HEAD.format(title=html.escape(shown(target)))
    if target.bucket:
        head += '<tr><td><a href="../">../</a></td></tr>\n'
    yield head.encode()
    entries_sent = 0
    async for page in tree.children(collection):
        if entries_sent >= ENTRIES_MAX:
            yield _TAIL.format(note=f"<p>Only the first {entries_sent} entries are shown.</p>").encode()
            return
        entries_sent += len(page)
        yield "".join(_row(path, entry) for entry in page).encode()
    yield _TAIL.format(note="").encode()


def _row(path: str, entry: Entry) -> str:
    record = entry.node.record if isinstance(entry.node, File) else None
    name = entry.name if record else entry.name + "/"
    link = f'<a href="{html.escape(href(path + name))}">{html.escape(name)}</a>'
    if record is None:
        return f"<tr><td>{link}</td></tr>\n"
    modified = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(record.modified_ns // 10**9))
    return f'<tr><td>{link}</td><td class="n">{record.length}</td><td>{modified}</td><td>{record.state}</td></tr>\n'

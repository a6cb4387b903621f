"""The tree: what a path names and what a folder holds, from the ``Catalog`` port, as one user may see it.

In: ``Target``s and a user's ``Sight``. Out: ``Root``, ``Folder``, ``File`` or ``Sentinel`` nodes, and the children of
a folder in pages. Runs on the loop that owns the catalogue client; reads only, and never asks for a recall.

What always holds: memory does not grow with the size of a folder (a page, and the stack of names that may still turn
out to be an object beside its folder).
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator

from archive.dav.auth import Sight
from archive.dav.paths import Target, escape, folder_beside
from ingest.errors import CatalogUnavailable, NoSuchBucket, NoSuchKey
from ingest.ports import Catalog
from ingest.records import BucketRecord, ListedObject, ObjectRecord
from ingest.runs import is_partials

PAGE_ENTRIES = 250
"""Rows read and rendered without a pause: about two milliseconds of the loop."""
SENTINELS = frozenset({b".metadata_never_index", b".ql_disablethumbnails"})
"""Empty files that ask macOS not to index a volume and not to make previews, either of which would read everything."""


@dataclasses.dataclass(frozen=True, slots=True)
class Root:
    """Lists the buckets."""


@dataclasses.dataclass(frozen=True, slots=True)
class Folder:
    """A bucket (``prefix`` empty) or a common prefix, which ends in a slash."""

    bucket: BucketRecord
    prefix: bytes = b""


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    record: ObjectRecord


@dataclasses.dataclass(frozen=True, slots=True)
class Sentinel:
    """One of SENTINELS where no object of that name exists; it is answered but not listed."""


Node = Root | Folder | File | Sentinel
Collection = Root | Folder


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A child: its name in the folder (see paths.py) and what it is."""

    name: str
    node: Folder | File


class Tree:
    def __init__(self, catalog: Catalog, sight: Sight) -> None:
        self._catalog = catalog
        self._sight = sight

    async def resolve(self, target: Target) -> Node | None:
        """What the path names; None when nothing does, or nothing the user may see. Raises CatalogUnavailable."""
        if not target.bucket:
            return Root()
        if target.key is None and target.bucket.encode() in SENTINELS:
            return Sentinel()
        unknown: CatalogUnavailable | None = None
        if not target.folder_only:
            try:
                if found := await self._object(target):
                    return found
            except CatalogUnavailable as error:
                # An object may have this name; a folder that is known does.
                unknown = error
        if target.key in SENTINELS:
            return Sentinel()
        folder = await self._folder(target)
        if folder is None and unknown is not None:
            raise unknown
        return folder

    async def _object(self, target: Target) -> File | None:
        if not target.key or not await self._sight.key(target.bucket, target.key):
            return None
        try:
            return File(await self._catalog.head(target.bucket, target.key))
        except (NoSuchKey, NoSuchBucket):
            return None

    async def _folder(self, target: Target) -> Folder | None:
        try:
            bucket = await self._catalog.bucket(target.bucket)
            if not await self._sight.bucket(bucket):
                return None
            if not target.prefix:
                return Folder(bucket)
            if await self._has_keys(target) or await self._surely_has_keys(target):
                return Folder(bucket, target.prefix)
        except NoSuchBucket:
            return None
        return None

    async def _has_keys(self, target: Target) -> bool:
        for scan in await self._sight.scans(target.bucket, target.prefix):
            rows, _ = await self._catalog.list_objects(target.bucket, prefix=scan, limit=1)
            if rows:
                return True
        return False

    async def _surely_has_keys(self, target: Target) -> bool:
        """Raises CatalogUnavailable where keys that are not known here may be there."""
        await self._catalog.fresh()
        return await self._has_keys(target)

    async def children(self, collection: Collection) -> AsyncIterator[list[Entry]]:
        """Pages of at most PAGE_ENTRIES children, in the order of their keys."""
        if isinstance(collection, Root):
            visible = [bucket for bucket in await self._catalog.buckets() if await self._sight.bucket(bucket)]
            for start in range(0, len(visible), PAGE_ENTRIES):
                yield [Entry(bucket.name, Folder(bucket)) for bucket in visible[start : start + PAGE_ENTRIES]]
            return
        naming = _Naming(collection)
        for scan in await self._sight.scans(collection.bucket.name, collection.prefix):
            # A grant can begin below this folder: all it shows here is the one folder that leads to it.
            slash = scan.find(b"/", len(collection.prefix))
            async for rows in self._rows(collection, scan, single=slash >= 0):
                if slash >= 0:
                    rows = [ListedObject(scan[: slash + 1], None)]
                yield [entry for row in rows if not is_partials(row.key) and (entry := naming.entry(row))]

    async def _rows(self, folder: Folder, scan: bytes, *, single: bool) -> AsyncIterator[list[ListedObject]]:
        after, truncated = b"", True
        while truncated:
            rows, truncated = await self._catalog.list_objects(
                folder.bucket.name, prefix=scan, after=after, delimiter=b"/", limit=1 if single else PAGE_ENTRIES
            )
            if rows:
                yield list(rows)
                after = rows[-1].key
            truncated = truncated and bool(rows) and not single


class _Naming:
    """Gives the rows of one folder their names; rows must come in bytewise order."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        # ``a`` and ``a/`` may lie any number of rows apart (``a-1``, ``a.txt`` …), but all those begin with ``a``: a
        # stack of keys, each a prefix of the next, is enough to know whether the folder's name is taken.
        self._open: list[bytes] = []
        self._last_folder: bytes | None = None

    def entry(self, row: ListedObject) -> Entry | None:
        while self._open and not row.key.startswith(self._open[-1]):
            self._open.pop()
        segment = row.key[len(self._folder.prefix) :]
        if row.record is not None:
            self._open.append(row.key)
            marker = not segment and row.record.length == 0
            return None if marker else Entry(escape(segment), File(row.record))
        if row.key == self._last_folder:
            return None
        self._last_folder = row.key
        taken = row.key[:-1] in self._open
        name = folder_beside(segment[:-1]) if taken else escape(segment[:-1])
        return Entry(name, Folder(self._folder.bucket, row.key))

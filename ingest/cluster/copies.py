"""Every node's own copies of what all of them must be able to read: kernels and their arrays, which lie on the node that
received them.

In: the catalogue's versions under ``_kernels/``. Out: one file each in DATA/kernels, and readers of it. What always holds:
a file is whole and has the checksum of its version; what is put anywhere is copied here within about a second, whether or not
this node has a use for it, so that a kernel does not go with the node that received it; whoever has a copy gives it to others. An
object beyond OBJECT_BYTES_MAX, or that has no room within BYTES_MAX, is read from its holder each time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Protocol

from awscrt import checksums

from ingest.cluster.neighbours import Address, Neighbours
from ingest.errors import DataLost, IngestError, NoSuchKey
from ingest.paths import NodePaths, make_folder
from ingest.ports import Catalog
from ingest.reader import SegmentReader, lies_on
from ingest.records import ObjectRecord
from ingest.runs import INTERNAL_PREFIXES

logger = logging.getLogger(__name__)

PREFIX = INTERNAL_PREFIXES[0]
OBJECT_BYTES_MAX = 256 << 20
BYTES_MAX = 8 << 30
"""Of all copies."""
LISTED_MAX = 2000
"""Kernels and arrays of one bucket."""
LOOK_S = 0.1
RETRY_S = 2.0
KEEP_S = 300.0
"""How long a file stays that the catalogue does not name (any more): what is being read, or has only just come."""
CHUNK_BYTES = 1 << 20


class Opened(Protocol):
    """An opened range on this node or another (``SegmentReader``, ``RelayReader``, ``Fetched``)."""

    async def __aenter__(self) -> Opened: ...
    async def __aexit__(self, *exc: object) -> None: ...
    def chunks(self, size_bytes: int) -> AsyncGenerator[memoryview, None]: ...


class Copies:
    """Of one process; the folder is the node's. ``stored`` opens a version where it is stored."""

    def __init__(
        self,
        paths: NodePaths,
        catalog: Catalog,
        executor: Executor,
        neighbours: Neighbours,
        me: int,
        stored: Callable[[ObjectRecord], Awaitable[Opened]],
    ) -> None:
        self._folder = paths.kernels
        self._catalog = catalog
        self._executor = executor
        self._neighbours = neighbours
        self._me = me
        self._stored = stored
        self._coming: dict[bytes, asyncio.Task[bool]] = {}

    # -- reading

    def local(self, object_id: bytes, start: int, stop: int) -> SegmentReader | None:
        """Bytes [start, stop) of a version, if there is a copy here."""
        path = self._folder / object_id.hex()
        try:
            return SegmentReader.of_file(self._executor, path, start, stop)
        except FileNotFoundError:
            return None

    async def open(self, record: ObjectRecord, start: int, stop: int) -> SegmentReader | None:
        """From the copy, which is fetched if need be; None: to be read where the version is stored."""
        if not record.key.startswith(PREFIX) or self._is_stored_here(record):
            return None
        found = self.local(record.object_id, start, stop)
        if found is None and await self.bring(record):
            found = self.local(record.object_id, start, stop)
        return found

    def _is_stored_here(self, record: ObjectRecord) -> bool:
        return bool(record.extents) and any(
            lies_on(self._me, copy, 0, record.stored_length) for copy in (record.extents, record.mirror)
        )

    # -- copying

    async def bring(self, record: ObjectRecord) -> bool:
        """Copy a version from wherever it can be had; False: from nowhere, now."""
        task = self._coming.get(record.object_id)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._bring(record))
            self._coming[record.object_id] = task
            task.add_done_callback(lambda _: self._coming.pop(record.object_id, None))
        return await asyncio.shield(task)

    async def _bring(self, record: ObjectRecord) -> bool:
        if record.length > OBJECT_BYTES_MAX:
            return False
        reasons = []
        for source in (lambda: self._stored(record), *self._others(record)):
            try:
                async with await source() as opened:
                    await self._write(record, opened)
                return True
            except (IngestError, OSError) as error:
                reasons.append(str(error))
        logger.warning("no copy of %s/%r could be made: %s", record.bucket, record.key, "; ".join(reasons))
        return False

    def _others(self, record: ObjectRecord) -> list[Callable[[], Awaitable[Opened]]]:
        """Nodes that may have a copy where the holder cannot be asked."""

        def ask(node: int) -> Callable[[], Awaitable[Opened]]:
            async def fetch() -> Opened:
                address: Address = self._neighbours.living(node)
                return await self._neighbours.client.fetch(address, record.object_id, 0, record.length)

            return fetch

        return [ask(one.node) for one in self._neighbours.members.others() if one.alive]

    async def _write(self, record: ObjectRecord, opened: Opened) -> None:
        """Raises NodeAway, DataLost, OSError."""
        loop = asyncio.get_running_loop()
        make_folder(self._folder)
        made = self._folder / f".{record.object_id.hex()}.{secrets.token_hex(4)}"
        crc = length = 0
        try:
            with made.open("xb") as file:
                async with contextlib.aclosing(opened.chunks(CHUNK_BYTES)) as views:
                    async for view in views:
                        crc = checksums.crc64nvme(view, crc)
                        length += len(view)
                        await loop.run_in_executor(self._executor, file.write, view)
                if (length, crc) != (record.length, record.crc64nvme):
                    raise DataLost(f"{length} bytes came, with another checksum than {record.key!r} has")
                await loop.run_in_executor(self._executor, _flush, file.fileno())
            made.replace(self._folder / record.object_id.hex())
        finally:
            made.unlink(missing_ok=True)

    # -- keeping

    async def run(self) -> None:
        """Forever: copy what is put, remove what has gone. One process of the node does it."""
        seen, again_s = -1, 0.0
        while True:
            generation = self._catalog.generation()
            if generation != seen or time.monotonic() >= again_s > 0:
                try:
                    complete = await self._keep()
                except (IngestError, OSError) as error:
                    logger.warning("the kernels of other nodes were not copied: %s", error)
                    complete = False
                seen, again_s = generation, 0.0 if complete else time.monotonic() + RETRY_S
            await asyncio.sleep(LOOK_S)

    async def _keep(self) -> bool:
        """True: this node has all there is."""
        wanted = {one.object_id: one for one in await self._catalog.kernel_objects(LISTED_MAX)}
        held = await asyncio.get_running_loop().run_in_executor(self._executor, self._tidy, set(wanted))
        complete = True
        room = BYTES_MAX - sum(held.values())
        # Small ones first: sources before arrays.
        for record in sorted(wanted.values(), key=lambda one: one.length):
            if record.object_id in held or self._is_stored_here(record):
                continue
            if record.length > min(OBJECT_BYTES_MAX, room):
                logger.warning("no room for a copy of %s/%r here", record.bucket, record.key)
                break
            if await self.bring(record):
                room -= record.length
            else:
                complete = complete and not await self._exists(record)
        return complete

    async def _exists(self, record: ObjectRecord) -> bool:
        try:
            await self._catalog.by_id(record.object_id)
        except NoSuchKey:
            return False
        return True

    def _tidy(self, wanted: set[bytes]) -> dict[bytes, int]:
        """In a thread: remove what is old and not wanted; sizes of what is there."""
        held = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self._folder) as found:
            for file in found:
                status = file.stat()
                object_id = _object_id(file.name)
                if object_id not in wanted and time.time() - status.st_mtime > KEEP_S:
                    Path(file.path).unlink(missing_ok=True)
                elif object_id is not None:
                    held[object_id] = status.st_size
        return held


def _object_id(name: str) -> bytes | None:
    try:
        return bytes.fromhex(name) if len(name) == 32 else None
    except ValueError:
        return None


def _flush(fd: int) -> None:
    os.fdatasync(fd)

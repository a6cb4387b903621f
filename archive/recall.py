"""Brings archived bytes back into the buffer when somebody asked for an evicted version.

In: versions in state recalling. Out: their bytes in segments of the drain process, recorded with ``recalled``; or
``recall_failed`` with a reason for whoever waits. Always true: bytes that do not match the checksum of the commit are never
offered as the object; every recall ends in one of the two.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from archive.checksum import Crc64
from archive.pace import DrainLimits
from archive.reconcile import key_text
from archive.targets.base import Target, TargetError, TargetLost
from ingest.counters import Counters
from ingest.crashpoints import crashpoint
from ingest.errors import (
    BufferFull,
    CatalogUnavailable,
    IngestError,
    NoSuchBucket,
    NoSuchKey,
    StaleVersion,
    StorageFailed,
)
from ingest.ports import Catalog
from ingest.records import ArchiveCopy, Extent, ObjectRecord

log = logging.getLogger(__name__)

_POLL_RECORDS = 64
_RECORD_RETRY_S = 1.0
_ROOM_RETRY_S = 0.25


class RecallMismatch(TargetError):
    """The archive's bytes are not the ones that were archived."""


class Landing(Protocol):
    """Where recalled bytes go: segments that the drain process writes."""

    async def land(self, record: ObjectRecord, chunks: AsyncIterator[memoryview]) -> tuple[Extent, ...]:
        """Write all of ``chunks`` (each view valid until the next is asked for); durable on return. An exception of
        ``chunks`` passes through, and what was written is then free again."""
        ...

    async def keep(self, extents: Sequence[Extent]) -> None:
        """These landed extents are recorded: they live until the catalogue says otherwise."""
        ...

    async def abandon(self, extents: Sequence[Extent]) -> None:
        """These landed extents will not be recorded: they are free again."""
        ...


class Recaller:
    def __init__(
        self, catalog: Catalog, target: Target, landing: Landing, counters: Counters, limits: DrainLimits
    ) -> None:
        self._catalog = catalog
        self._target = target
        self._landing = landing
        self._limits = limits
        self._running: dict[bytes, asyncio.Task[None]] = {}
        self._poked = asyncio.Event()
        self._fatal: TargetLost | None = None
        self._objects = counters.cell("hiss_recall_objects_total")
        self._failures = counters.cell("hiss_recall_failures_total")

    def poke(self) -> None:
        """Look for recalls now, not at the next poll."""
        self._poked.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop``; recalls under way are then broken off and begin anew with the next drain process. Raises
        TargetLost when the archive must be opened anew."""
        try:
            while not stop.is_set():
                if self._fatal is not None:
                    raise self._fatal
                self._poked.clear()
                await self._start_due()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._limits.poll_s):
                        await self._poked.wait()
        finally:
            for task in self._running.values():
                task.cancel()
            await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def _start_due(self) -> None:
        free = self._limits.recall_parallel_objects - len(self._running)
        if free <= 0:
            return
        try:
            due = await self._catalog.recalls(_POLL_RECORDS)
        except IngestError as error:
            log.warning("cannot ask for recalls: %s", error)
            return
        for record in [record for record in due if record.object_id not in self._running][:free]:
            task = asyncio.get_running_loop().create_task(self._recall(record))
            self._running[record.object_id] = task
            task.add_done_callback(functools.partial(self._done, record.object_id))

    def _done(self, object_id: bytes, _: asyncio.Task[None]) -> None:
        del self._running[object_id]
        self._poked.set()

    async def _recall(self, record: ObjectRecord) -> None:
        try:
            await self._bring_back(record)
        except (StaleVersion, NoSuchKey, NoSuchBucket):
            log.debug("%s was deleted or replaced while it was recalled", key_text(record))
        except CatalogUnavailable as error:
            log.warning("the recall of %s begins anew: %s", key_text(record), error)
        except Exception as error:  # whoever waits for the object must hear of it, whatever it was
            known = isinstance(error, TargetError | IngestError)
            await self._failed(record, str(error) if known else f"unexpected {type(error).__name__}: {error}")
            if isinstance(error, TargetLost):
                self._fatal = error
            if not known:
                log.exception("the recall of %s failed", key_text(record))
        else:
            self._objects.add()

    async def _bring_back(self, record: ObjectRecord) -> None:
        copy = record.archive
        if copy is None or copy.target != self._target.name:
            where = "nowhere" if copy is None else f"at {copy.target}"
            raise RecallMismatch(f"the catalogue knows an archive copy {where}, not at {self._target.name}")
        try:
            extents = await self._land(record, copy)
        except TargetError:
            # A newer version of the key may just have got the name this copy had.
            moved = (await self._catalog.by_id(record.object_id)).archive
            if moved is None or moved.path == copy.path:
                raise
            extents = await self._land(record, moved)
        crashpoint("recall-written")
        try:
            await self._record(record, extents)
        except asyncio.CancelledError:
            raise  # recorded or not: what holds them ends with the process
        except BaseException:
            await self._landing.abandon(extents)
            raise
        await self._landing.keep(extents)

    async def _land(self, record: ObjectRecord, copy: ArchiveCopy) -> tuple[Extent, ...]:
        give_up_s = time.monotonic() + self._limits.recall_room_s
        while True:
            try:
                return await self._landing.land(record, self._verified(record, copy))
            except BufferFull:
                if time.monotonic() >= give_up_s:
                    raise
                await asyncio.sleep(_ROOM_RETRY_S)

    async def _record(self, record: ObjectRecord, extents: Sequence[Extent]) -> None:
        """However long the catalogue takes to come back: until it has decided the extents are neither free nor in use."""
        while True:
            try:
                await self._catalog.recalled(record.object_id, extents)
            except (CatalogUnavailable, StorageFailed) as error:
                log.warning("cannot record the recall of %s yet: %s", key_text(record), error)
                await asyncio.sleep(_RECORD_RETRY_S)
            else:
                return

    async def _verified(self, record: ObjectRecord, copy: ArchiveCopy) -> AsyncIterator[memoryview]:
        """The archived bytes; raises after the last of them, so that nothing can be recorded, if they do not match."""
        crc = Crc64()
        async with contextlib.aclosing(self._target.read(copy.path, self._limits.chunk_bytes)) as chunks:
            async for view in chunks:
                crc.update(view)
                if crc.length > record.stored_length:
                    break
                yield view
        if (crc.length, crc.value) != (record.stored_length, record.crc64nvme):
            raise RecallMismatch(
                f"the archive copy {copy.path} is damaged: CRC64NVME {crc.value:016x} over {crc.length} bytes instead of "
                f"{record.crc64nvme:016x} over {record.stored_length}"
            )

    async def _failed(self, record: ObjectRecord, text: str) -> None:
        self._failures.add()
        log.error("cannot recall %s: %s", key_text(record), text)
        with contextlib.suppress(IngestError):
            await self._catalog.recall_failed(record.object_id, text)

"""Makes one verified, published archive copy of one version: read, write, read back, compare, publish.

In: a record whose bytes are buffered. Out: the ``ArchiveCopy`` to record, or an exception that says which side failed:
``SourceFailed`` (the buffered bytes), ``VerifyFailed`` (the archive's), any other TargetError. Always true: only bytes that
were read back from the archive and matched the checksum of the commit get a name; a copy that failed leaves nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

from archive.checksum import Crc64
from archive.pace import DrainLimits, RateLimit
from archive.targets.base import FileRights, Staged, Target, TargetError
from ingest.crashpoints import crashpoint
from ingest.errors import DataLost, IngestError, StorageFailed, Unreadable
from ingest.ports import ObjectReader
from ingest.records import BLOCK_BYTES, ArchiveCopy, ObjectRecord

OpenReader = Callable[[ObjectRecord], Awaitable[ObjectReader]]
"""Opens all bytes of a version, recalled or settled if need be; raises IngestError."""


class SourceFailed(IngestError):
    """The buffered bytes cannot be read, or are no longer the bytes that were acknowledged."""


class VerifyFailed(TargetError):
    """The archive does not give back what was written to it."""


class Copier:
    """One for each process: the byte rate is shared by all copies."""

    def __init__(self, target: Target, open_reader: OpenReader, limits: DrainLimits) -> None:
        self._target = target
        self._open_reader = open_reader
        self._limits = limits
        self._rate = RateLimit(limits.rate_bytes_per_s, time.monotonic())

    async def copy(
        self,
        record: ObjectRecord,
        rights: FileRights,
        *,
        only_at: str | None = None,
        may_publish: Callable[[], Awaitable[None]] | None = None,
    ) -> ArchiveCopy:
        """The caller holds the key; ``may_publish`` raises where that is not for this process to do any more.

        Raises TargetError, IngestError (StaleVersion, NoSuchKey: the version is gone)."""
        staged = await self._staged(record, rights)
        try:
            crashpoint("drain-written")
            await self._verify(staged)
            verified_ns = time.time_ns()
            crashpoint("drain-verified")
            if may_publish is not None:
                await may_publish()
            path = await self._target.publish(staged, only_at=only_at)
            crashpoint("drain-published")
        except BaseException:
            # What cannot be removed now is cleared when the next drain starts; the first error is the one to tell.
            with contextlib.suppress(TargetError):
                await self._target.discard(staged)
            raise
        return ArchiveCopy(self._target.name, path, record.crc64nvme, verified_ns)

    async def _staged(self, record: ObjectRecord, rights: FileRights) -> Staged:
        crc = Crc64()
        async with await self._opened(record) as reader:
            # A reader prepares memory for whole chunks: small versions ask for small ones.
            blocks = -(-max(1, record.stored_length) // BLOCK_BYTES)
            chunks = reader.chunks(min(self._limits.chunk_bytes, blocks * BLOCK_BYTES))
            async with contextlib.aclosing(self._source(chunks, crc)) as source:
                staged = await self._target.stage(record, rights, source)
        if (crc.length, crc.value) != (record.stored_length, record.crc64nvme):
            with contextlib.suppress(TargetError):
                await self._target.discard(staged)
            raise SourceFailed(
                f"the buffered bytes are not the ones acknowledged: CRC64NVME {crc.value:016x} over {crc.length} bytes, "
                f"committed was {record.crc64nvme:016x} over {record.stored_length}"
            )
        return staged

    async def _opened(self, record: ObjectRecord) -> ObjectReader:
        try:
            return await self._open_reader(record)
        except Unreadable as error:
            raise SourceFailed(f"the buffered bytes cannot be read: {error}") from error

    async def _source(self, chunks: AsyncIterator[memoryview], crc: Crc64) -> AsyncGenerator[memoryview, None]:
        while True:
            try:
                view = await anext(chunks)
            except StopAsyncIteration:
                return
            except (OSError, DataLost, StorageFailed) as error:
                raise SourceFailed(f"the buffered bytes cannot be read: {error}") from error
            wait_s = self._rate.take(len(view), time.monotonic())
            if wait_s:
                await asyncio.sleep(wait_s)
            crc.update(view)
            yield view

    async def _verify(self, staged: Staged) -> None:
        record = staged.record
        crc = Crc64()
        async with contextlib.aclosing(self._target.read_back(staged, self._limits.chunk_bytes)) as chunks:
            async for view in chunks:
                crc.update(view)
        if (crc.length, crc.value) != (record.stored_length, record.crc64nvme):
            raise VerifyFailed(
                f"the archive gave back other bytes than were written: CRC64NVME {crc.value:016x} over {crc.length} "
                f"bytes instead of {record.crc64nvme:016x} over {record.stored_length}"
            )

"""Group commit: batches of mutations become journal batches, then index transactions, then answers.

In: tickets (a mutation and who asked). Out: exactly one answer for each, after the batch it was in is durable and visible;
and what the batch did, for pushes. One batch at a time: while it is flushed the next one gathers, so load makes batches
larger and not waits longer.

The order of a batch is the order of safety: decide and apply inside an SQLite transaction, append to the journal, flush,
commit SQLite, answer. A crash before the journal has it loses what nobody was told; after, replay repeats it.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ingest.catalog import entries as e
from ingest.catalog import snapshot
from ingest.catalog.batching import Batch, BatchMaker, Limits
from ingest.catalog.index import distinct
from ingest.counters import Counters
from ingest.crashpoints import crashpoint
from ingest.errors import StorageFailed
from ingest.journal import FileOps, Journal
from ingest.paths import NodePaths
from ingest.records import Extent

logger = logging.getLogger(__name__)


class Committer(BatchMaker):
    """Owns the writing connection and the journal.

    ``committed`` is called after each batch, before its answers. ``freed`` is called with extents nobody refers to once
    the journal that says so is on disk, never earlier: their segment may be written anew from then on, and a power cut
    must not bring back a version whose bytes are gone.
    """

    def __init__(
        self,
        paths: NodePaths,
        database: sqlite3.Connection,
        applied: int,
        counters: Counters,
        *,
        node: int,
        limits: Limits,
        committed: Callable[[Batch], None],
        freed: Callable[[tuple[Extent, ...]], None],
        ops: FileOps | None = None,
    ) -> None:
        super().__init__(paths, database, applied, counters, node=node, limits=limits)
        self._committed = committed
        self._freed = freed
        self._freed_unflushed: list[tuple[int, list[Extent]]] = []
        self._journal = Journal(paths.journal, self._next, size_bytes=limits.journal_bytes, ops=ops)
        self._flushing = asyncio.Lock()
        self._journal_failed = False
        self._flush_timer: asyncio.TimerHandle | None = None
        # Flushes never wait behind a snapshot's copy or a checkpoint.
        self._flush_thread = ThreadPoolExecutor(1, "journal")
        self._snapshot_lock = asyncio.Lock()

    async def run(self) -> None:
        """Commit until stopped. Raises JournalLost or sqlite3.Error when the process must start anew: nothing was
        answered that is not in the journal, and clients send the rest again."""
        self._chore(self._prepare())
        while self._waiting or not self._stopping:
            if not self._waiting:
                self._wake.clear()
                await self._wake.wait()
            if self._journal_failed:
                await self._leave_journal(self._next)
            if self._waiting:
                async with self._deciding:
                    await self._commit_batch()
                self._write_back()
        await self._close()

    async def barrier(self) -> None:
        """Return once everything that was decided is visible and on disk. Raises StorageFailed."""
        async with self._deciding:
            pass  # the batch at hand may hold decisions that nobody can see yet
        try:
            await self._flush()
        except OSError as error:
            self._wake.set()
            raise StorageFailed(f"journal: {error}") from error

    async def fresh(self) -> bool:
        """At once: nobody else writes."""
        return True

    async def snapshot(self) -> str:
        """Write a snapshot while commits go on; its path. Raises StorageFailed."""
        loop = asyncio.get_running_loop()
        async with self._snapshot_lock:
            try:
                made = await loop.run_in_executor(
                    self._chore_thread, snapshot.write, self._paths.catalogue, self._paths.snapshots
                )
                # The copy must not know more than the journal on disk.
                await self._flush()
                published = await loop.run_in_executor(self._chore_thread, snapshot.publish, made)
                await loop.run_in_executor(
                    self._chore_thread, snapshot.prune, self._paths.snapshots, self._paths.journal
                )
            except (OSError, sqlite3.Error) as error:
                raise StorageFailed(f"no snapshot could be written: {error}") from error
        return str(published.path)

    # -- one batch
    async def _commit_batch(self) -> None:
        started = time.perf_counter()
        self._db.execute("BEGIN IMMEDIATE")
        batch = Batch(self._next)
        try:
            self._gather(batch, started + self._limits.batch_work_s, self._clock())
            if batch.entries:
                await self._write_journal(batch)
        except OSError as error:
            self._db.execute("ROLLBACK")
            self._notices.forget()
            self._decider.forget()
            self._index.forget()
            if not self._journal_failed:  # a flush that failed is counted
                self._errors.add()
            logger.error("the journal failed, this batch is refused: %s", error)
            # Only when the next file says that this batch never happened may anybody be told so.
            await self._leave_journal(batch.first_sequence)
            for ticket, _ in batch.outcomes:
                ticket.refuse(StorageFailed(f"journal: {error}"))
            return
        crashpoint("index-before")
        self._db.execute("COMMIT")
        crashpoint("index-committed")
        self._next += len(batch.entries)
        self._mutations_in_wal += len(batch.entries)
        if batch.entries:
            self._commit_seconds.observe(time.perf_counter() - started)
            self._mutations.add(len(batch.entries))
            self._committed(batch)
            if batch.freed:
                self._freed_unflushed.append((batch.first_sequence, batch.freed))
                self._release_freed()
        crashpoint("answer-before")
        self._answer(batch)

    def _release_freed(self) -> None:
        durable, held_back = [], []
        for first_sequence, extents in self._freed_unflushed:
            if first_sequence < self._journal.durable_before(self._next):
                durable += extents
            else:
                held_back.append((first_sequence, extents))
        self._freed_unflushed = held_back
        if durable:
            self._freed(distinct(durable))

    # -- journal
    async def _write_journal(self, batch: Batch) -> None:
        """Raises OSError when the batch must be taken back."""
        payload = e.join(batch.encoded)
        crashpoint("journal-before")
        if not self._journal.fits(len(payload)):
            await self._rotate(batch.first_sequence, len(payload))
        if self._journal_failed:
            await self._leave_journal(batch.first_sequence)
        self._bytes.add(self._journal.append(batch.first_sequence, len(batch.entries), payload))
        crashpoint("journal-written")
        if batch.must_flush:
            await self._flush()
        elif self._flush_timer is None:
            loop = asyncio.get_running_loop()
            self._flush_timer = loop.call_later(self._limits.memory_flush_s, self._flush_soon)
        crashpoint("journal-flushed")

    async def _flush(self) -> None:
        """Raises OSError; the file must then be left."""
        async with self._flushing:
            if self._journal_failed:
                raise OSError("the journal file failed before")
            if not self._journal.unflushed:
                return
            covered = self._journal.mark()
            try:
                await asyncio.get_running_loop().run_in_executor(self._flush_thread, self._journal.flush)
            except OSError as error:
                self._journal_failed = True
                self._errors.add()
                logger.error("a journal flush failed, its batches are written again elsewhere: %s", error)
                raise
            self._journal.flushed(covered)
            self._release_freed()

    def _flush_soon(self) -> None:
        self._flush_timer = None
        self._chore(self._flush_in_background())

    async def _flush_in_background(self) -> None:
        try:
            await self._flush()
        except OSError:
            self._wake.set()

    async def _leave_journal(self, next_sequence: int) -> None:
        """Go on in a new file; nothing from ``next_sequence`` on ever happened. Raises JournalLost."""
        async with self._flushing:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._flush_thread, self._journal.give_up, next_sequence)
            self._journal_failed = False
            self._release_freed()
        self._chore(self._prepare())

    async def _rotate(self, next_sequence: int, payload_bytes: int) -> None:
        await self._flush()
        async with self._flushing:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._flush_thread, self._journal.rotate, next_sequence, payload_bytes)
        crashpoint("journal-rotated")
        self._chore(self._prepare())
        self._chore(self._snapshot_in_background())

    # -- chores
    async def _prepare(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._chore_thread, self._journal.prepare)

    async def _snapshot_in_background(self) -> None:
        if self._snapshot_lock.locked():
            return
        try:
            await self.snapshot()
        except StorageFailed as error:
            self._wake.set()
            logger.error("%s; the journal is kept longer instead", error)

    async def _close(self) -> None:
        if self._flush_timer is not None:
            self._flush_timer.cancel()
        await asyncio.gather(*self._tasks)
        if self._journal_failed:
            await self._leave_journal(self._next)
        try:
            await self._flush()
        except OSError:
            await self._leave_journal(self._next)
        self._journal.close()
        self._flush_thread.shutdown()
        self._chore_thread.shutdown()

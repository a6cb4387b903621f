"""Group commit: batches of mutations become journal batches, then index transactions, then answers.

In: tickets (a mutation and who asked). Out: exactly one answer for each, after the batch it was in is durable and visible;
and what the batch did, for pushes. One batch at a time: while it is flushed the next one gathers, so load makes batches
larger and not waits longer.

The order of a batch is the order of safety: decide and apply inside an SQLite transaction, append to the journal, flush,
commit SQLite, answer. A crash before the journal has it loses what nobody was told; after, replay repeats it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import sqlite3
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from ingest import clock
from ingest.catalog import entries as e
from ingest.catalog import rows, snapshot, wire
from ingest.catalog.decide import PART_BYTES_MIN, Decider, Known
from ingest.catalog.index import Index, distinct
from ingest.catalog.notices import NoticeMaker
from ingest.catalog.reader import Reader
from ingest.counters import Counters
from ingest.crashpoints import crashpoint
from ingest.errors import CatalogError, IngestError, StaleEpoch, StorageFailed
from ingest.journal import SIZE_BYTES, FileOps, Journal
from ingest.origin import Origin
from ingest.paths import NodePaths
from ingest.records import Durability, Extent

logger = logging.getLogger(__name__)

KERNEL_PREFIX = b"_kernels/"


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a batch and what follows from it."""

    batch_mutations: int = 256
    batch_work_s: float = 0.005
    """Work on one batch before it is written; the rest of the queue goes into the next."""
    batch_bytes: int = 8 * 1024 * 1024
    """Encoded entries after which no further mutation joins a batch."""
    memory_flush_s: float = 0.05
    """Longest time a ``memory`` commit's journal entry stays unflushed."""
    journal_bytes: int = SIZE_BYTES
    wal_mutations: int = 1024
    """Mutations after which SQLite's WAL, about 40 KiB for each, is written back."""
    part_bytes_min: int = PART_BYTES_MIN


class Ticket(Protocol):
    """One mutation and the way back to whoever asked."""

    mutation: wire.Mutation
    origin: Origin | None

    @property
    def fenced(self) -> bool:
        """Whether the asker's slot has a newer owner."""
        ...

    def answer(self, result: bytes) -> None: ...
    def refuse(self, error: IngestError) -> None: ...


Outcome = tuple[Ticket, bytes | IngestError]


@dataclasses.dataclass(slots=True)
class Batch:
    """What one batch decided, before anything of it is durable."""

    first_sequence: int
    outcomes: list[Outcome] = dataclasses.field(default_factory=list)
    entries: list[e.Entry] = dataclasses.field(default_factory=list)
    encoded: list[bytes] = dataclasses.field(default_factory=list)
    encoded_bytes: int = 0
    freed: list[Extent] = dataclasses.field(default_factory=list)

    def add(self, entry: e.Entry, encoded: bytes) -> None:
        self.entries.append(entry)
        self.encoded.append(encoded)
        self.encoded_bytes += len(encoded)

    @property
    def must_flush(self) -> bool:
        return not all(map(_survives_in_memory, self.entries))

    @property
    def changes_generation(self) -> bool:
        return any(map(_changes_generation, self.entries))


def _survives_in_memory(entry: e.Entry) -> bool:
    """``memory`` promises to survive processes, not the host: the page cache is enough."""
    if isinstance(entry, e.Noticed):
        return True  # as its cause: an event must not outlive it, and need not
    return isinstance(entry, e.ObjectCommitted) and entry.record.durability is Durability.MEMORY


def _changes_generation(entry: e.Entry) -> bool:
    match entry:
        case e.BucketCreated() | e.BucketDeleted() | e.BucketTagged() | e.BucketConfigured() | e.UserPut():
            return True
        case e.ObjectCommitted() | e.ObjectAppended() | e.MarkerCommitted() | e.UploadCompleted():
            return entry.record.key.startswith(KERNEL_PREFIX)
        case e.ObjectDeleted():
            return entry.key.startswith(KERNEL_PREFIX)
        case _:
            return False


class Committer:
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
        limits: Limits,
        committed: Callable[[Batch], None],
        freed: Callable[[tuple[Extent, ...]], None],
        ops: FileOps | None = None,
    ) -> None:
        self._clock = clock.of(paths)
        self._paths = paths
        self._db = database
        self._limits = limits
        self._committed = committed
        self._freed = freed
        self._freed_unflushed: list[tuple[int, list[Extent]]] = []
        self._next = applied + 1
        self._journal = Journal(paths.journal, self._next, size_bytes=limits.journal_bytes, ops=ops)
        # SQLite would write its WAL back inside a COMMIT, for which everybody would wait; _write_back does it beside them.
        database.execute("PRAGMA wal_autocheckpoint=0")
        self._decider = Decider(database, part_bytes_min=limits.part_bytes_min)
        self._index = Index(database)
        self._notices = NoticeMaker(database, Reader(database), counters)
        self._waiting: deque[Ticket] = deque()
        self._wake = asyncio.Event()
        self._stopping = False
        self._deciding = asyncio.Lock()
        self._flushing = asyncio.Lock()
        self._journal_failed = False
        self._flush_timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[object]] = set()
        # Flushes never wait behind a snapshot's copy or a checkpoint.
        self._flush_thread = ThreadPoolExecutor(1, "journal")
        self._chore_thread = ThreadPoolExecutor(1, "chores")
        self._snapshot_lock = asyncio.Lock()
        self._mutations_in_wal = 0
        self._checkpointing = False
        self._commit_seconds = counters.histogram("hiss_journal_commit_seconds")
        self._mutations = counters.cell("hiss_journal_mutations_total")
        self._bytes = counters.cell("hiss_journal_bytes_total")
        self._errors = counters.cell("hiss_storage_errors_total", "journal")

    def submit(self, ticket: Ticket) -> None:
        self._waiting.append(ticket)
        self._wake.set()

    def stop(self) -> None:
        """Finish what was submitted; ``run`` then returns."""
        self._stopping = True
        self._wake.set()

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
            self._gather(batch, started + self._limits.batch_work_s)
            if batch.entries:
                await self._write_journal(batch)
        except OSError as error:
            self._db.execute("ROLLBACK")
            self._notices.forget()
            self._decider.forget()
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
        for ticket, outcome in batch.outcomes:
            if isinstance(outcome, IngestError):
                ticket.refuse(outcome)
            else:
                ticket.answer(outcome)

    def _gather(self, batch: Batch, work_until: float) -> None:
        now_ns = self._clock()
        waiting, outcomes = self._waiting, batch.outcomes
        while (
            waiting
            and len(outcomes) < self._limits.batch_mutations
            and batch.encoded_bytes < self._limits.batch_bytes
            and time.perf_counter() < work_until
        ):
            ticket = waiting.popleft()
            try:
                outcomes.append((ticket, self._evaluate(ticket, batch, now_ns)))
            except IngestError as error:
                outcomes.append((ticket, error))
            except (TypeError, ValueError, LookupError) as error:
                # A mutation nobody foresaw must not take the node's commits down each time it is sent again.
                logger.exception("a mutation could not be decided")
                outcomes.append((ticket, CatalogError(f"{type(error).__name__}: {error}")))
        if batch.entries:
            self._index.set_applied(batch.first_sequence + len(batch.entries) - 1)

    def _evaluate(self, ticket: Ticket, batch: Batch, now_ns: int) -> bytes:
        if ticket.fenced:
            raise StaleEpoch("this slot belongs to a newer process")
        sequence = batch.first_sequence + len(batch.entries)
        decision = self._decider.decide(ticket.mutation, sequence, now_ns)
        if isinstance(decision, Known):
            return wire.encode_value(decision.answer)
        encoded = e.encode(decision)
        try:
            freed = self._index.apply(sequence, decision)
            answer = wire.encode_value(self._decider.answer(decision))
        except (sqlite3.Error, IngestError) as error:
            logger.exception("an entry could not be applied to the index")
            self._take_back(batch)
            raise StorageFailed(f"index: {error}") from error
        batch.add(decision, encoded)
        batch.freed += freed
        for notice in self._notices.of(ticket.mutation, decision, ticket.origin, sequence, now_ns):
            self._index.apply(batch.first_sequence + len(batch.entries), notice)
            batch.add(notice, e.encode(notice))
        return answer

    def _take_back(self, batch: Batch) -> None:
        """Rid the transaction of an entry that failed halfway. Raises sqlite3.Error.

        The batch's other entries are applied anew: a savepoint for each would cost every commit what one failure costs.
        """
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        self._notices.forget()
        self._decider.forget()
        self._db.execute("BEGIN IMMEDIATE")
        for sequence, entry in enumerate(batch.entries, batch.first_sequence):
            try:
                self._index.apply(sequence, entry)
            except IngestError as error:  # not this one mutation's fault: the process must start anew
                raise sqlite3.DatabaseError(f"entry {sequence} could not be applied twice") from error

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
            except OSError:
                self._journal_failed = True
                raise
            self._journal.flushed(covered)
            self._release_freed()

    def _flush_soon(self) -> None:
        self._flush_timer = None
        self._chore(self._flush_in_background())

    async def _flush_in_background(self) -> None:
        try:
            await self._flush()
        except OSError as error:
            self._errors.add()
            logger.error("a journal flush failed, its batches are written again elsewhere: %s", error)
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

    def _write_back(self) -> None:
        """Keep SQLite's WAL short: a thread writes back most of it, so that the rest is short work between batches."""
        if self._mutations_in_wal >= self._limits.wal_mutations and not self._checkpointing:
            self._mutations_in_wal = 0
            self._checkpointing = True
            self._chore(self._checkpoint())

    async def _checkpoint(self) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._chore_thread, _checkpoint, self._paths.catalogue)
            if not self._db.in_transaction:
                self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        except sqlite3.Error as error:
            logger.warning("the index could not be written back: %s", error)
        finally:
            self._checkpointing = False

    def _chore(self, work: object) -> None:
        task: asyncio.Task[object] = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

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


def _checkpoint(catalogue: Path) -> None:
    with contextlib.closing(rows.connect(catalogue, read_only=False)) as database:
        database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

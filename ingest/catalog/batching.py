"""Making batches: mutations are decided one after the other against the index, and applied to it, in one transaction.

In: tickets (a mutation and who asked). Out: a ``Batch`` with everything that was decided, inside an open SQLite transaction; and
in the end exactly one answer for each ticket. Where a batch becomes durable is for the committers that build on this: a file
(committer.py), or the engine of a cluster (ingest/cluster/committer.py). The caller commits SQLite only after that.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import dataclasses
import logging
import sqlite3
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from ingest import clock
from ingest.catalog import entries as e
from ingest.catalog import rows, wire
from ingest.catalog.decide import PART_BYTES_MIN, Decider, Known
from ingest.catalog.index import Index
from ingest.catalog.notices import NoticeMaker
from ingest.catalog.reader import Reader
from ingest.counters import Counters
from ingest.errors import CatalogError, IngestError, StaleEpoch, StorageFailed
from ingest.journal import SIZE_BYTES
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
        case e.ReservationPut():
            return True
        case e.ObjectCommitted() | e.ObjectAppended() | e.MarkerCommitted() | e.UploadCompleted():
            return entry.record.key.startswith(KERNEL_PREFIX)
        case e.ObjectDeleted():
            return entry.key.startswith(KERNEL_PREFIX)
        case _:
            return False


class BatchMaker(abc.ABC):
    """Owns the writing connection. Between two batches its index has everything up to ``_next``."""

    def __init__(
        self,
        paths: NodePaths,
        database: sqlite3.Connection,
        applied: int,
        counters: Counters,
        *,
        node: int,
        limits: Limits,
    ) -> None:
        self._clock = clock.of(paths)
        self._paths = paths
        self._db = database
        self._limits = limits
        self._next = applied + 1
        # SQLite would write its WAL back inside a COMMIT, for which everybody would wait; _write_back does it beside them.
        database.execute("PRAGMA wal_autocheckpoint=0")
        self._decider = Decider(database, node=node, part_bytes_min=limits.part_bytes_min)
        self._index = Index(database)
        self._notices = NoticeMaker(database, Reader(database), counters)
        self._waiting: deque[Ticket] = deque()
        self._wake = asyncio.Event()
        self._stopping = False
        self._deciding = asyncio.Lock()
        self._tasks: set[asyncio.Task[object]] = set()
        self._chore_thread = ThreadPoolExecutor(1, "chores")
        self._mutations_in_wal = 0
        self._checkpointing = False
        self._commit_seconds = counters.histogram("hiss_journal_commit_seconds")
        self._mutations = counters.cell("hiss_journal_mutations_total")
        self._bytes = counters.cell("hiss_journal_bytes_total")
        self._errors = counters.cell("hiss_storage_errors_total", "journal")

    @abc.abstractmethod
    async def run(self) -> None:
        """Commit until stopped, and finish what was submitted before. Raises what the process must start anew for: nothing was
        answered that is not durable, and clients send the rest again."""

    @abc.abstractmethod
    async def barrier(self) -> None:
        """Return once everything that was decided is visible and durable. Raises StorageFailed."""

    @abc.abstractmethod
    async def fresh(self) -> bool:
        """Return once the index has everything that anybody was answered before; False where that cannot be known now."""

    @abc.abstractmethod
    async def snapshot(self) -> str:
        """Write a snapshot while commits go on; its path. Raises StorageFailed."""

    def submit(self, ticket: Ticket) -> None:
        self._waiting.append(ticket)
        self._wake.set()

    def stop(self) -> None:
        """Finish what was submitted; ``run`` then returns."""
        self._stopping = True
        self._wake.set()

    def _gather(self, batch: Batch, work_until: float, now_ns: int) -> None:
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
        self._index.forget()
        self._db.execute("BEGIN IMMEDIATE")
        for sequence, entry in enumerate(batch.entries, batch.first_sequence):
            try:
                self._index.apply(sequence, entry)
            except IngestError as error:  # not this one mutation's fault: the process must start anew
                raise sqlite3.DatabaseError(f"entry {sequence} could not be applied twice") from error

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

    @staticmethod
    def _answer(batch: Batch) -> None:
        for ticket, outcome in batch.outcomes:
            if isinstance(outcome, IngestError):
                ticket.refuse(outcome)
            else:
                ticket.answer(outcome)


def _checkpoint(catalogue: Path) -> None:
    with contextlib.closing(rows.connect(catalogue, read_only=False)) as database:
        database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

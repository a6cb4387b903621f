"""The catalogue process: the node's only writer. A unix socket in front of the committer.

In: ``Register`` and ``Call`` frames from every process of the node. Out: answers after commit, and pushes to the owner of a
slot: extents that became free, requests to settle. Start: take the lock, recover, serve. SIGTERM: finish the batch at hand,
write everything back, leave a mark that the database was closed in order, exit 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import os
import signal
import sqlite3
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import cast

import msgspec
import uvloop

from ingest.catalog import lock, recovery, rows, snapshot, statements, wire
from ingest.catalog.batching import Batch, BatchMaker, Limits
from ingest.catalog.committer import Committer
from ingest.catalog.generation import GenerationFile
from ingest.catalog.lock import CatalogueBusy
from ingest.catalog.reader import Reader
from ingest.catalog.recovery import Recovered
from ingest.counters import Counters
from ingest.errors import CatalogUnavailable, IngestError, NoSuchKey, StaleEpoch, StaleVersion, StorageFailed
from ingest.journal import FileOps
from ingest.origin import Origin
from ingest.paths import NodePaths, socket_address
from ingest.records import Extent, FreedExtents, ObjectRecord, SettleRequest

logger = logging.getLogger(__name__)

UNANSWERED_MAX = 4096
"""Calls of one connection in work; above it the connection is not read."""
LOCK_WAIT_S = 10.0
"""How long a new catalogue process waits for its predecessor to be gone."""


@dataclasses.dataclass(slots=True, eq=False)
class _Waiter:
    """A ``settle`` that waits for its version's bytes."""

    connection: _Connection
    call: int
    object_id: bytes
    slots: frozenset[int]
    timeout: asyncio.TimerHandle | None = None


class _Ticket:
    __slots__ = ("_call", "_connection", "mutation", "origin")

    def __init__(self, connection: _Connection, call: int, mutation: wire.Mutation, origin: Origin | None) -> None:
        self._connection = connection
        self._call = call
        self.mutation = mutation
        self.origin = origin

    @property
    def fenced(self) -> bool:
        return self._connection.fenced

    def answer(self, result: bytes) -> None:
        self._connection.send_answer(wire.Answer(self._call, msgspec.Raw(result)))

    def refuse(self, error: IngestError) -> None:
        self._connection.refuse(self._call, error)


_NOTHING = msgspec.Raw(wire.encode_value(None))


class _Connection(asyncio.Protocol):
    """One client. Answers of one turn of the loop leave in one write."""

    def __init__(self, server: CatalogueServer) -> None:
        self._server = server
        self._frames = wire.Frames()
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self._unanswered = 0
        self.slot: int | None = None
        self.epoch = 0
        self.fenced = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's does not inherit
        self._server.connections.add(self)

    def connection_lost(self, _: Exception | None) -> None:
        self._transport = None
        self._server.left(self)

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._frames.feed(data):
                message = wire.decode_from_client(payload)
                if isinstance(message, wire.Register):
                    self.slot, self.epoch = message.slot, message.epoch
                    self._server.register(self)
                else:
                    self._unanswered += 1
                    self._server.call(self, message)
        except (ValueError, msgspec.MsgspecError) as error:
            logger.error("a client of slot %s sent what cannot be read: %s", self.slot, error)
            self.close()
        if self._unanswered > UNANSWERED_MAX and self._transport is not None:
            self._transport.pause_reading()

    def ticket(self, call: int, mutation: wire.Mutation, origin: Origin | None) -> _Ticket:
        return _Ticket(self, call, mutation, origin)

    def refuse(self, call: int, error: IngestError) -> None:
        self.send_answer(wire.Answer(call, _NOTHING, wire.error_fields(error)))

    def send_answer(self, answer: wire.Answer) -> None:
        self._unanswered -= 1
        if self._unanswered == UNANSWERED_MAX and self._transport is not None:
            self._transport.resume_reading()
        self._send(wire.frame(answer))

    def push(self, push: wire.Push) -> None:
        self._send(wire.frame(push))

    def _send(self, frame: bytes) -> None:
        if self._transport is None:
            return
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        self._out.append(frame)

    def _flush(self) -> None:
        if self._transport is not None and self._out:
            self._transport.write(b"".join(self._out))
        self._out.clear()

    def close(self) -> None:
        self._flush()
        if self._transport is not None:
            self._transport.close()


MakeCommitter = Callable[
    [Recovered, GenerationFile, Callable[[Batch], None], Callable[[tuple[Extent, ...]], None]], BatchMaker
]
"""(the index, what other processes see, called after each batch, called with extents that nobody refers to any more)"""


class CatalogueServer:
    """Slots, settles and sockets around a ``Committer``."""

    def __init__(self, paths: NodePaths, *, node: int, recovered: Recovered, make: MakeCommitter) -> None:
        """The caller holds the lock. Raises JournalLost, sqlite3.Error, OSError."""
        self._paths = paths
        self._node = node
        self._database = recovered.database
        # Looks at what is committed, whatever the batch at hand has written so far.
        self.reader = Reader(rows.connect(paths.catalogue, read_only=True), node)
        self._lookup = rows.connect(paths.catalogue, read_only=True)
        self._generation = GenerationFile(paths.run / "generation", writable=True)
        self._generation.bump_generation()
        if recovered.rebuilt:
            self._generation.bump_incarnation()
        self.committer = make(recovered, self._generation, self._committed, self._push_freed)
        self.connections: set[_Connection] = set()
        self._slots: dict[int, _Connection] = {}
        self._epochs: dict[int, int] = {}
        self._waiters: dict[bytes, list[_Waiter]] = defaultdict(list)
        self._working: set[asyncio.Task[None]] = set()
        logger.info("catalogue at entry %d, %d replayed", recovered.applied, recovered.replayed)

    async def serve(
        self,
        ready: Callable[[], None],
        stop: asyncio.Event,
        before_ready: Callable[[CatalogueServer], Awaitable[None]],
    ) -> None:
        """Serve until ``stop`` is set; ``before_ready`` runs once commits are made. Raises what ends the committer early (see
        ``BatchMaker.run``)."""
        loop = asyncio.get_running_loop()
        self._paths.catalogue_socket.unlink(missing_ok=True)
        listener = await loop.create_unix_server(
            lambda: _Connection(self), socket_address(self._paths.catalogue_socket), backlog=128
        )
        self._paths.catalogue_socket.chmod(0o600)
        committing = asyncio.ensure_future(self.committer.run())
        stopping = asyncio.ensure_future(stop.wait())
        beginning = asyncio.ensure_future(before_ready(self))
        try:
            await asyncio.wait((committing, beginning), return_when=asyncio.FIRST_COMPLETED)
            if beginning.done():
                beginning.result()
                ready()
                await asyncio.wait((committing, stopping), return_when=asyncio.FIRST_COMPLETED)
            listener.close()
            if self._working and not committing.done():
                await asyncio.gather(*self._working)
            self.committer.stop()
            await committing
        finally:
            for task in (stopping, beginning, committing):
                task.cancel()
            await asyncio.gather(stopping, beginning, committing, return_exceptions=True)
            listener.close()
            for connection in list(self.connections):
                connection.close()
        self._close()

    def _close(self) -> None:
        self.reader.close()
        self._lookup.close()
        self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._database.close()
        self._generation.close()
        mark = recovery.clean_mark(self._paths)
        mark.touch()
        snapshot.flush_path(mark.parent)

    # -- slots
    def register(self, connection: _Connection) -> None:
        if connection.slot is None:
            return
        if connection.epoch < self._epochs.get(connection.slot, 0):
            connection.fenced = True
            return
        older = self._slots.get(connection.slot)
        if older is not None and older.epoch < connection.epoch:
            logger.warning("slot %d has a newer process; the older one is fenced", connection.slot)
        for other in self.connections:
            if other.slot == connection.slot and other.epoch < connection.epoch:
                other.fenced = True
        self._slots[connection.slot], self._epochs[connection.slot] = connection, connection.epoch
        for waiter in list(itertools.chain.from_iterable(self._waiters.values())):
            if connection.slot in waiter.slots:
                try:
                    self._ask_to_settle(waiter.object_id, frozenset((connection.slot,)))
                except StorageFailed as error:
                    self._end(waiter, error)

    def left(self, connection: _Connection) -> None:
        self.connections.discard(connection)
        if connection.slot is not None and self._slots.get(connection.slot) is connection:
            del self._slots[connection.slot]
        for object_id in list(self._waiters):
            for waiter in list(self._waiters[object_id]):
                if waiter.connection is connection:
                    self._forget(waiter)

    # -- calls
    def call(self, connection: _Connection, call: wire.Call) -> None:
        request = call.request
        if connection.fenced:
            connection.refuse(call.id, StaleEpoch("this slot belongs to a newer process"))
        elif isinstance(request, wire.Settle):
            self._settle(connection, call.id, request)
        elif isinstance(request, wire.Snapshot):
            self._work(connection, call.id, self.committer.snapshot())
        elif isinstance(request, wire.Fresh):
            self._work(connection, call.id, self.committer.fresh())
        elif isinstance(request, wire.Barrier):
            self._work(connection, call.id, self.committer.barrier())
        else:
            self.committer.submit(connection.ticket(call.id, request, call.origin))

    def _work(self, connection: _Connection, call: int, work: Coroutine[None, None, object]) -> None:
        async def answer() -> None:
            try:
                result = await work
            except IngestError as error:
                connection.refuse(call, error)
            else:
                connection.send_answer(wire.Answer(call, msgspec.Raw(wire.encode_value(result))))

        task = asyncio.ensure_future(answer())
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    # -- settling
    def _settle(self, connection: _Connection, call: int, request: wire.Settle) -> None:
        try:
            record = self._version(request.object_id)
            slots = frozenset(extent.slot for extent in record.extents)
            if not record.settled:
                self._ask_to_settle(request.object_id, slots)
        except (StaleVersion, StorageFailed) as error:
            connection.refuse(call, error)
            return
        if record.settled:
            connection.send_answer(wire.Answer(call, msgspec.Raw(wire.encode_value(record))))
            return
        waiter = _Waiter(connection, call, request.object_id, slots)
        waiter.timeout = asyncio.get_running_loop().call_later(request.timeout_s, self._give_up, waiter)
        self._waiters[request.object_id].append(waiter)

    def _version(self, object_id: bytes) -> ObjectRecord:
        """Raises StaleVersion, StorageFailed."""
        try:
            return self.reader.by_id(object_id)
        except NoSuchKey:
            raise StaleVersion("the version was deleted or replaced") from None
        except sqlite3.Error as error:
            raise StorageFailed(f"index: {error}") from error

    def _ask_to_settle(self, object_id: bytes, slots: frozenset[int]) -> None:
        """Slots know bodies by the id they committed them with: the version's own, or its parts'. Raises StorageFailed."""
        try:
            found = self._lookup.execute(statements.UNSETTLED_PARTS_OF, {"object_id": object_id}).fetchall()
        except sqlite3.Error as error:
            raise StorageFailed(f"index: {error}") from error
        bodies = [part_id for (part_id,) in found] or [object_id]
        for slot in slots & self._slots.keys():
            for body in bodies:
                self._slots[slot].push(wire.Push(settle=SettleRequest(body)))

    def _give_up(self, waiter: _Waiter) -> None:
        self._end(waiter, CatalogUnavailable("the version's owner did not settle it in time"))

    def _end(self, waiter: _Waiter, outcome: ObjectRecord | IngestError) -> None:
        self._forget(waiter)
        if isinstance(outcome, IngestError):
            waiter.connection.refuse(waiter.call, outcome)
        else:
            waiter.connection.send_answer(wire.Answer(waiter.call, msgspec.Raw(wire.encode_value(outcome))))

    def _forget(self, waiter: _Waiter) -> None:
        if waiter.timeout is not None:
            waiter.timeout.cancel()
        waiters = self._waiters[waiter.object_id]
        waiters.remove(waiter)
        if not waiters:
            del self._waiters[waiter.object_id]

    def _resolve_waiters(self) -> None:
        for object_id in list(self._waiters):
            outcome: ObjectRecord | IngestError
            try:
                outcome = self._version(object_id)
            except (StaleVersion, StorageFailed) as error:
                outcome = error
            if isinstance(outcome, ObjectRecord) and not outcome.settled:
                continue
            for waiter in list(self._waiters[object_id]):
                self._end(waiter, outcome)

    # -- after a batch
    def _committed(self, batch: Batch) -> None:
        if batch.changes_generation:
            self._generation.bump_generation()
        if self._waiters:
            self._resolve_waiters()

    def _push_freed(self, freed: tuple[Extent, ...]) -> None:
        of_slot: dict[int, list[Extent]] = defaultdict(list)
        for extent in freed:
            if extent.node == self._node:
                of_slot[extent.slot].append(extent)
        for slot in of_slot.keys() & self._slots.keys():
            self._slots[slot].push(wire.Push(freed=FreedExtents(tuple(of_slot[slot]))))


async def serve(
    paths: NodePaths,
    counters: Counters,
    *,
    node: int,
    ready: Callable[[], None],
    stop: asyncio.Event,
    limits: Limits | None = None,
    ops: FileOps | None = None,
) -> None:
    """A node alone: recover and serve until ``stop`` is set; ``ready`` is called when mutations are taken.

    Raises CatalogueBusy where another process serves this folder, JournalDamaged, JournalLost, sqlite3.Error, OSError.
    """

    def make(
        recovered: Recovered,
        _: GenerationFile,
        committed: Callable[[Batch], None],
        freed: Callable[[tuple[Extent, ...]], None],
    ) -> Committer:
        return Committer(
            paths,
            recovered.database,
            recovered.applied,
            counters,
            node=node,
            limits=limits or Limits(),
            committed=committed,
            freed=freed,
            ops=ops,
        )

    async def before_ready(server: CatalogueServer) -> None:
        if not recovery.rebuildable(paths):
            # After a restore: the journal begins later than the index, so nothing else could bring the index back.
            await server.committer.snapshot()

    async with locked(paths):
        server = CatalogueServer(paths, node=node, recovered=recovery.recover(paths, node), make=make)
        await server.serve(ready, stop, before_ready)


@contextlib.asynccontextmanager
async def locked(paths: NodePaths) -> AsyncIterator[None]:
    """Hold the catalogue of a folder. Raises CatalogueBusy."""
    paths.create()
    held = await _lock(paths)
    try:
        yield
    finally:
        os.close(held)


async def _lock(paths: NodePaths) -> int:
    deadline = asyncio.get_running_loop().time() + LOCK_WAIT_S
    while True:
        try:
            return lock.take(lock.catalogue(paths))
        except CatalogueBusy:
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(0.05)


def run(serving: Callable[[asyncio.Event], Coroutine[None, None, None]]) -> None:
    """The whole process: ``serving(stop)`` until SIGTERM or SIGINT, then until everything is written back."""

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await serving(stop)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())

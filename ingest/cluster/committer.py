"""Group commit of a node of a cluster: batches go to the engine's log, and what other nodes decided comes from there.

In: tickets, and the log. Out: one answer for each ticket once its batch is in the log and in this node's index; the batches of
others in the index soon after (FOLLOW_S), or at once when somebody asks (``fresh``).

The order of a batch is the order of safety: hold the head, apply what others appended, decide and apply inside an SQLite
transaction, append, commit in the engine, commit SQLite, answer. A crash before the engine's commit loses what nobody was told;
after it, the start applies it from the log. Where the engine's answer to the commit is lost, the log says whether it
happened: the batch's answers are kept until then, and until the engine has taken a later commit. An engine that crashed
finds in its own log what its standby may not have; when it confirms what came later, the standby has that too.

Trouble with the engine is waited out: what was submitted is refused after ENGINE_WAIT_S, what is read goes on from what is known.
An engine that says nothing at all (frozen, or its link is cut) is noticed after SILENT_S, long before a turn's time is up: new
bodies are then refused, and readers no longer wait. That decides nothing about a commit under way, which goes on waiting.
An engine that answers and takes no commits (its synchronous standby is gone, its disk is full) is stuck, from when something had
to be refused for it until it takes a commit, which is tried: new bodies are refused, readers still see everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence

from ingest.catalog import entries as e
from ingest.catalog import snapshot, wire
from ingest.catalog.batching import Batch, BatchMaker, Limits
from ingest.catalog.generation import GenerationFile
from ingest.catalog.index import applied_sequence, chain_of, distinct, set_chain
from ingest.cluster.engine import TRIES, TakenBack, give_way
from ingest.cluster.errors import EngineAway
from ingest.cluster.log import Diverged, EngineLog, Head, Left, Logged, chained
from ingest.cluster.members import LEASE_S
from ingest.counters import Counters
from ingest.crashpoints import crashpoint
from ingest.errors import CatalogUnavailable, StorageFailed
from ingest.paths import NodePaths
from ingest.records import Extent, NodeState

logger = logging.getLogger(__name__)

FOLLOW_S = 0.1
"""Longest time until this node knows, unasked, what another one has decided."""
RETRY_S = 0.25
ENGINE_WAIT_S = 8.0
"""How long a mutation waits for an engine that is away: longer than a restart, shorter than a client's patience."""
QUIET_S = 1.0
"""An engine that has answered nothing for so long is asked once more, on a connection of its own."""
SILENT_S = 2.0
"""An engine that has answered nothing for so long is away. Far below ENGINE_TIMEOUT_S, which a turn needs: it may wait for a node
that froze while it held the head. What is asked here is one row, which waits for no lock."""
SILENT_LOOKS = 4
"""The last wait is counted in so many pieces: a process that was held up itself must not call the engine silent."""
END_WAIT_S = 3.0
"""How long what is asked of the engine has to end when the process does."""
FRESH_WAIT_S = 1.0
"""How long a reader waits to be told that it sees everything; then it sees what is known here."""
_NEEDS_GONE = (wire.ClaimDrain, wire.HoldMirror, wire.SetNodeState, wire.RequestRecall)


@dataclasses.dataclass(slots=True)
class _Doubtful:
    """A batch whose commit was not answered."""

    batch: Batch
    chain: int


class ClusterCommitter(BatchMaker):
    """``committed`` is called after each batch, own or not; ``freed`` with extents, of any node, nobody refers to any more.

    ``generation``: where other processes see whether the engine is there, and what its clock says."""

    def __init__(
        self,
        paths: NodePaths,
        database: sqlite3.Connection,
        applied: int,
        counters: Counters,
        *,
        log: EngineLog,
        limits: Limits,
        committed: Callable[[Batch], None],
        freed: Callable[[tuple[Extent, ...]], None],
        generation: GenerationFile,
    ) -> None:
        super().__init__(paths, database, applied, counters, node=log.node, limits=limits)
        self._log = log
        self._committed = committed
        self._freed = freed
        self._generation = generation
        self._chain = chain_of(database)
        self._doubtful: _Doubtful | None = None
        self._found: list[Batch] = []
        """Were in doubt, and are in the log: to be answered with the next commit that the engine takes."""
        self._askers: list[asyncio.Future[bool]] = []
        self._asked = asyncio.Event()
        self._away_since: float | None = None
        self._heard = time.monotonic()
        """When the engine answered last."""
        self._uncommitted_since: float | None = None
        """When the first of the turns in a row began that the engine did not take; None: it took the last one."""
        self._stuck = False
        self._durable = 0
        """Entries before this one are on the engine's standby too: it has taken a commit of this process that came after them."""
        self._barriers: list[asyncio.Future[None]] = []
        """Wait for the next commit that the engine takes: the index has what they ask about already."""
        self._snapshot_lock = asyncio.Lock()
        self._ahead_ns = 0
        self._ended = False
        generation.engine_back()
        generation.commits_taken()

    @property
    def applied(self) -> int:
        """The last entry in this node's index."""
        return self._next - 1

    @property
    def away_s(self) -> float:
        """How long the engine has not answered; 0 while it does."""
        return 0.0 if self._away_since is None else time.monotonic() - self._away_since

    async def run(self) -> None:
        """As the base says; also raises Fenced, Diverged, ClusterRefused."""
        following = asyncio.ensure_future(self._follow())
        listening = asyncio.ensure_future(self._listen())
        deciding = asyncio.ensure_future(self._decide())
        try:
            await asyncio.wait((following, listening, deciding), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._ended = True
            self._asked.set()
            # A statement that is cancelled half way leaves a connection that nobody closes: it may end first.
            await asyncio.wait((following, listening), timeout=END_WAIT_S)
            for task in (following, listening, deciding):
                task.cancel()
            await asyncio.gather(following, listening, deciding, return_exceptions=True)
            self._release_askers(False)
            self._end_barriers(_not_durable())
        for task in (deciding, following, listening):
            if task.done() and not task.cancelled():
                task.result()
        await asyncio.gather(*self._tasks)
        self._chore_thread.shutdown()

    async def barrier(self) -> None:
        """Return once what was decided is visible here and durable in the engine, so that it survives a failover. Raises
        CatalogUnavailable."""
        if self._durable >= self._next and not (self._deciding.locked() or self._doubtful or self._found):
            return
        if self._away_since is not None or self._stuck or self._ended:
            raise _not_durable()
        passed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._barriers.append(passed)
        self._wake.set()
        await passed

    async def fresh(self) -> bool:
        if self._away_since is not None:
            return False
        asker: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._askers.append(asker)
        self._asked.set()
        try:
            async with asyncio.timeout(FRESH_WAIT_S):
                return await asker
        except TimeoutError:
            return False

    async def snapshot(self) -> str:
        loop = asyncio.get_running_loop()
        async with self._snapshot_lock:
            try:
                made = await loop.run_in_executor(
                    self._chore_thread, snapshot.write, self._paths.catalogue, self._paths.snapshots
                )
                published = await loop.run_in_executor(self._chore_thread, snapshot.publish, made)
                await loop.run_in_executor(
                    self._chore_thread, snapshot.prune, self._paths.snapshots, self._paths.journal
                )
            except (OSError, sqlite3.Error) as error:
                raise StorageFailed(f"no snapshot could be written: {error}") from error
        return str(published.path)

    # -- own batches
    async def _decide(self) -> None:
        taken_back = 0
        while self._waiting or self._doubtful or self._found or not self._stopping:
            if not (self._waiting or self._doubtful or self._found or self._barriers or self._stuck):
                self._uncommitted_since = None
                self._wake.clear()
                await self._wake.wait()
                continue
            began = time.monotonic()
            try:
                async with self._deciding:
                    await self._commit_batch()
            except EngineAway as error:
                if isinstance(error, TakenBack) and taken_back < TRIES:
                    taken_back += 1
                    await give_way(taken_back)
                    continue
                if not self._answers():
                    self._engine_away(error)
                self._refuse_late(began)
                if self._stopping:
                    self._refuse_all()
                    return
                await asyncio.sleep(RETRY_S)
            else:
                taken_back = 0
                self._commits_taken()
                self._engine_here()
            self._write_back()

    async def _commit_batch(self) -> None:
        """Raises EngineAway; what was not appended waits again, or is doubtful."""
        started = time.perf_counter()
        batch: Batch | None = None
        chain = 0
        try:
            async with self._log.turn() as turn:
                while self._next < turn.head.next_sequence:
                    self._apply_logged(await turn.since(self._next))
                self._check_end(self._next, turn.head.next_sequence)
                self._check_chain(turn.head)
                self._settle_doubt()
                if any(isinstance(ticket.mutation, _NEEDS_GONE) for ticket in self._waiting):
                    self._decider.gone = await turn.gone(LEASE_S) - {self._log.node}
                batch = Batch(self._next)
                now_ns = self._tell_time(turn.head.now_ns)
                self._db.execute("BEGIN IMMEDIATE")
                # Counted from here: waiting for the head is no work.
                self._gather(batch, time.perf_counter() + self._limits.batch_work_s, now_ns)
                if batch.entries:
                    payload = e.join(batch.encoded)
                    chain = chained(self._chain, payload)
                    crashpoint("log-before")
                    await turn.append(len(batch.entries), payload, turn.head.now_ns)
                    self._bytes.add(len(payload))
                    crashpoint("log-appended")
                elif self._durable < self._next or self._stuck:
                    await turn.touch()
        except BaseException as error:
            self._take_all_back()
            if batch is not None:
                if batch.entries and isinstance(error, EngineAway):
                    self._doubtful = _Doubtful(batch, chain)
                else:
                    self._waiting.extendleft(ticket for ticket, _ in reversed(batch.outcomes))
            raise
        crashpoint("index-before")
        if batch.entries:
            self._note(batch.first_sequence + len(batch.entries), chain)
        self._db.execute("COMMIT")
        crashpoint("index-committed")
        self._done(batch, started)
        crashpoint("answer-before")
        self._durable = self._next
        self._end_barriers(None)
        found, self._found = self._found, []
        for one in (*found, batch):
            self._answer(one)
        self._check_member(batch)

    def _check_member(self, batch: Batch) -> None:
        """Nothing of this node comes behind the entry that it has left: it must have applied that before it decides again."""
        for entry in batch.entries:
            if isinstance(entry, e.NodePut) and entry.record.node == self._log.node:
                if entry.record.state is NodeState.REMOVED:
                    raise Left(entry.record.name)

    def _done(self, batch: Batch, started: float) -> None:
        if not batch.entries:
            return
        self._mutations_in_wal += len(batch.entries)
        self._commit_seconds.observe(time.perf_counter() - started)
        self._mutations.add(len(batch.entries))
        self._committed(batch)
        if batch.freed:
            self._freed(distinct(batch.freed))

    def _take_all_back(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        self._notices.forget()
        self._decider.forget()
        self._index.forget()

    def _tell_time(self, engine_ns: int) -> int:
        """The time that this batch is decided at: the engine's, moved as a test has moved this node's clock."""
        self._ahead_ns = engine_ns - time.time_ns()
        self._generation.set_ahead(self._ahead_ns)
        return engine_ns + self._clock() - time.time_ns()

    # -- doubt
    def _settle_doubt(self) -> None:
        """Everything in the log has been applied: a batch that is still in doubt never happened, and is decided anew."""
        doubtful, self._doubtful = self._doubtful, None
        if doubtful is not None:
            self._waiting.extendleft(ticket for ticket, _ in reversed(doubtful.batch.outcomes))

    def _resolve_doubt(self, logged: Logged) -> None:
        """The batch in doubt is this one: it did happen, its askers will get the answers of then."""
        doubtful = self._doubtful
        if (
            doubtful is not None
            and logged.node == self._log.node
            and (logged.first_sequence, logged.chain) == (doubtful.batch.first_sequence, doubtful.chain)
        ):
            self._doubtful = None
            self._found.append(doubtful.batch)

    # -- the engine is away
    async def _listen(self) -> None:
        """Notice an engine that is silent. A turn cannot tell: it may wait for another node's. Nor can a question of the
        follower's, whose connection alone may be dead. Raises ClusterRefused."""
        while not self._ended:
            await asyncio.sleep((SILENT_S - QUIET_S) / SILENT_LOOKS)
            if time.monotonic() - self._heard < QUIET_S:
                continue
            with self._counting_silence(self._heard):
                try:
                    await self._log.head()
                except EngineAway as error:
                    self._engine_away(error)
                else:
                    self._engine_here()

    @contextlib.contextmanager
    def _counting_silence(self, since: float) -> Iterator[None]:
        """The engine is away if the block, and everybody else who asks it, waits until SILENT_S are over."""
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle

        def look(left: int) -> None:
            nonlocal timer
            if self._heard != since:
                return
            if left:
                timer = loop.call_later((SILENT_S - QUIET_S) / SILENT_LOOKS, look, left - 1)
            else:
                self._engine_away(EngineAway(f"the engine has been silent for {time.monotonic() - since:.1f} s"), since)

        timer = loop.call_later((SILENT_S - QUIET_S) / SILENT_LOOKS, look, SILENT_LOOKS - 1)
        try:
            yield
        finally:
            timer.cancel()

    def _engine_away(self, error: EngineAway, since: float | None = None) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic() if since is None else since
            logger.error("%s; commits wait, what is known can be read", error)
            self._generation.engine_away(self._away_since)
        self._release_askers(False)

    def _engine_here(self) -> None:
        self._heard = time.monotonic()
        if self._away_since is not None:
            logger.warning("the engine answers again after %.1f s", self.away_s)
            self._away_since = None
            self._generation.engine_back()

    def _answers(self) -> bool:
        """It may be that the engine takes nothing, but it is there."""
        return time.monotonic() - self._heard < SILENT_S

    def _refuse_late(self, began: float) -> None:
        """Nobody waits longer than ENGINE_WAIT_S for turns of which the first ``began`` then; what may have been committed is
        asked for again by whoever wants to know."""
        if self._uncommitted_since is None:
            self._uncommitted_since = began
        if max(self.away_s, time.monotonic() - self._uncommitted_since) > ENGINE_WAIT_S:
            self._refuse_all()
            if self._answers() and not self._stuck:
                self._stuck = True
                logger.error(
                    "the engine answers and has taken no commit for %.0f s: new bodies are refused. Does it wait for a standby "
                    "that is gone? Is its disk full?",
                    time.monotonic() - self._uncommitted_since,
                )
                self._generation.commits_stuck(self._uncommitted_since)

    def _commits_taken(self) -> None:
        self._uncommitted_since = None
        if self._stuck:
            self._stuck = False
            logger.warning("the engine takes commits again")
            self._generation.commits_taken()

    def _refuse_all(self) -> None:
        waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
        for batch in (*self._found, *([self._doubtful.batch] if self._doubtful else [])):
            waiting += [ticket for ticket, _ in batch.outcomes]
            batch.outcomes.clear()
        for ticket in waiting:
            ticket.refuse(CatalogUnavailable("the cluster's engine is away: the outcome is unknown"))
        self._end_barriers(_not_durable())

    def _end_barriers(self, refusal: CatalogUnavailable | None) -> None:
        barriers, self._barriers = self._barriers, []
        for passed in barriers:
            if passed.done():
                continue
            if refusal is None:
                passed.set_result(None)
            else:
                passed.set_exception(refusal)

    # -- batches of others
    async def _follow(self) -> None:
        """Raises Diverged, Fenced, ClusterRefused."""
        while not self._ended:
            try:
                async with asyncio.timeout(RETRY_S if self._away_since is not None else FOLLOW_S):
                    await self._asked.wait()
            except TimeoutError:
                pass
            self._asked.clear()
            askers, self._askers = self._askers, []
            known = self._next
            try:
                head = await self._log.head()
                self._tell_time(head.now_ns)
                self._check_end(known, head.next_sequence)
                if head.next_sequence == self._next:
                    self._check_chain(head)
                while self._next < head.next_sequence:
                    async with self._deciding:
                        if self._next < head.next_sequence:
                            self._apply_logged(await self._log.since(self._next))
            except EngineAway as error:
                self._askers += askers
                self._engine_away(error)
                continue
            self._engine_here()
            for asker in askers:
                if not asker.done():
                    asker.set_result(True)

    def _release_askers(self, answer: bool) -> None:
        askers, self._askers = self._askers, []
        for asker in askers:
            if not asker.done():
                asker.set_result(answer)

    @staticmethod
    def _check_end(known: int, next_sequence: int) -> None:
        if next_sequence < known:
            raise Diverged(
                f"this node knows entry {known - 1}, the engine's log ends at {next_sequence - 1}: the engine was restored from "
                "an older back-up, or lost what it had confirmed"
            )

    def _check_chain(self, head: Head) -> None:
        """Where the log ends with this node's last entry."""
        if head.chain != self._chain:
            raise Diverged(f"entry {self._next - 1} of this node's index is not that of the engine's log")

    def _apply_logged(self, batches: Sequence[Logged]) -> None:
        """Apply batches of the log in order. The caller holds the deciding lock and no transaction is open."""
        if not batches:
            raise Diverged(f"the log lacks entry {self._next}, which other nodes know")
        self._db.execute("BEGIN IMMEDIATE")
        try:
            applied = [self._applied(logged) for logged in batches]
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._index.forget()
            self._next, self._chain = applied_sequence(self._db) + 1, chain_of(self._db)
            raise
        for batch, logged in zip(applied, batches, strict=True):
            if batch.changes_generation:
                self._decider.forget()
            self._notices.forget()
            self._mutations_in_wal += len(batch.entries)
            self._committed(batch)
            if batch.freed:
                self._freed(distinct(batch.freed))
            self._resolve_doubt(logged)
        for batch in applied:
            self._check_member(batch)

    def _applied(self, logged: Logged) -> Batch:
        if logged.first_sequence != self._next or chained(self._chain, logged.payload) != logged.chain:
            raise Diverged(
                f"batch {logged.first_sequence} of the engine's log does not follow entry {self._next - 1} of this node"
            )
        batch = Batch(logged.first_sequence)
        for sequence, entry in enumerate(e.decode(logged.payload), logged.first_sequence):
            batch.freed += self._index.apply(sequence, entry)
            batch.entries.append(entry)
        self._index.set_applied(logged.first_sequence + logged.entries - 1)
        self._note(logged.first_sequence + logged.entries, logged.chain)
        return batch

    def _note(self, next_sequence: int, chain: int) -> None:
        set_chain(self._db, chain)
        self._next, self._chain = next_sequence, chain


def _not_durable() -> CatalogUnavailable:
    return CatalogUnavailable("the cluster's engine takes no commits now: what is known here may not outlive it")

"""What a node of a cluster does beside its commits: it says that it lives, learns who else does, and keeps the log short.

In: the engine, what this node says of itself. Out: a heartbeat each HEARTBEAT_S, DATA/run/members.json, checkpoints and a log
that does not grow for ever. Raises Fenced when another process has this node's number; trouble with the engine is waited out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from ingest.catalog import rows, snapshot
from ingest.catalog.reader import Reader
from ingest.cluster import checkpoint, members
from ingest.cluster.engine import Engine
from ingest.cluster.errors import EngineAway
from ingest.cluster.join import Place
from ingest.cluster.log import EngineLog, Fenced
from ingest.cluster.members import HEARTBEAT_S, LEASE_S, Load, Member, Membership
from ingest.cluster.schema import cluster, nodes
from ingest.paths import NodePaths
from ingest.records import NodeState

logger = logging.getLogger(__name__)

CHECKPOINT_ENTRIES = 200_000
"""So many entries behind the last checkpoint there is another one: some ten seconds' replay, some hundred megabytes of log."""
_CHECKPOINT_LOOK_S = 10.0
AWAY_S = 3 * HEARTBEAT_S
"""Longer between two heartbeats of this node's, and the engine was away, for it at least."""
_SILENT = sa.extract("epoch", sa.func.current_timestamp() - nodes.c.heartbeat)
_LIVES = sa.select(nodes.c.node, _SILENT, nodes.c.applied, nodes.c.status, nodes.c.claim)
_NEXT = sa.select(cluster.c.next_sequence)


class Keeper:
    """``applied``: the last entry that this node knows. ``load``: how it is."""

    def __init__(
        self,
        paths: NodePaths,
        engine: Engine,
        log: EngineLog,
        place: Place,
        reader: Reader,
        *,
        applied: Callable[[], int],
        load: Callable[[], Load],
        checkpoint_entries: int = CHECKPOINT_ENTRIES,
    ) -> None:
        self._paths = paths
        self._engine = engine
        self._log = log
        self._place = place
        self._reader = reader
        self._applied = applied
        self._load = load
        self._checkpoint_entries = checkpoint_entries
        self._ended = asyncio.Event()
        self._beat_s = time.monotonic()
        self._away_s = self._pardon_until_s = 0.0

    async def run(self) -> None:
        # A checkpoint may take longer than a lease.
        shortening = asyncio.create_task(self._keep_short())
        try:
            while not self._ended.is_set():
                started = time.monotonic()
                try:
                    await self.beat()
                except EngineAway as error:
                    logger.debug("no heartbeat: %s", error)
                if shortening.done():
                    shortening.result()
                await self._rest(max(0.05, HEARTBEAT_S - (time.monotonic() - started)))
        finally:
            shortening.cancel()
            await asyncio.gather(shortening, return_exceptions=True)

    async def _rest(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()

    def stop(self) -> None:
        """``run`` returns once what it asked of the engine has ended."""
        self._ended.set()

    async def beat(self) -> None:
        """Raises EngineAway and Fenced."""
        async with self._engine.transaction(_rehearse) as connection:
            status = msgspec.json.encode(self._load()).decode()
            alive = _alive(self._place.node, self._place.epoch, self._applied(), status)
            if (await connection.execute(alive)).rowcount != 1:
                raise Fenced(f"another process runs as node {self._place.node} of the cluster, or it was removed")
            found = (await connection.execute(_LIVES)).all()
            await self._fence(connection, frozenset(row[0] for row in found if row[4]))
            next_sequence = (await connection.execute(_NEXT)).scalar_one()
        self._beaten()
        self._tell({row[0]: (float(row[1]), row[2], row[3]) for row in found}, next_sequence - 1)

    def _beaten(self) -> None:
        """While the engine was away nobody could be heard of: for a lease from now on, that time is nobody's silence."""
        now = time.monotonic()
        away_s, self._beat_s = now - self._beat_s, now
        if away_s > AWAY_S:
            self._away_s, self._pardon_until_s = away_s, now + LEASE_S

    async def _fence(self, connection: AsyncConnection, there: frozenset[int]) -> None:
        """Whoever has left writes nothing any more. Its row stays, so that its number is never given again and what others mirror
        for it is drained; its name is free."""
        for record in self._reader.nodes():
            if record.state is NodeState.REMOVED and record.node in there:
                await connection.execute(_fenced(record.node))
                logger.warning("node %s has left the cluster", record.name)

    def _tell(self, lives: dict[int, tuple[float, int, str]], head: int) -> None:
        known = []
        pardoned_s = self._away_s if self._beat_s < self._pardon_until_s else 0.0
        for record in self._reader.nodes():
            silent_s, applied, status = lives.get(record.node, (2 * LEASE_S + pardoned_s, 0, "{}"))
            known.append(
                Member(record, max(0.0, silent_s - pardoned_s), applied, msgspec.json.decode(status, type=Load))
            )
        told = Membership(self._place.node, self._place.cluster_id, time.monotonic(), tuple(known), head)
        try:
            members.write(self._paths, told)
        except OSError as error:
            # A full disk of this node's: what others know of it goes on, and so do its commits.
            logger.warning("who is in the cluster cannot be written down: %s", error)

    # -- checkpoints
    async def _keep_short(self) -> None:
        while True:
            await self._rest(_CHECKPOINT_LOOK_S)
            if self._ended.is_set():
                return
            try:
                await self._shorten()
            except EngineAway as error:
                logger.debug("no checkpoint: %s", error)
            except (OSError, sqlite3.Error, sa.exc.IntegrityError) as error:
                # A full disk of this node's, or another node that thinks it is the first: the log stays long for a while.
                logger.warning("no checkpoint could be made: %s", error)

    async def _shorten(self) -> None:
        """The first node that lives does it for all."""
        if not members.Members(self._paths).leads():
            return
        last = await checkpoint.newest(self._engine)
        if self._applied() - (0 if last is None else last.sequence) >= self._checkpoint_entries:
            await self.checkpoint()

    async def checkpoint(self) -> int:
        """Publish this node's index; shorten the log behind the checkpoint before. The entry it holds."""
        copy = self._paths.catalogue.with_name(f"checkpoint-{os.getpid()}.sqlite")
        try:
            sequence = await asyncio.to_thread(_copy, self._paths.catalogue, copy)
            await checkpoint.publish(self._engine, copy, sequence)
            oldest = await checkpoint.prune(self._engine)
            if oldest is not None:
                trimmed = await self._log.trim(oldest + 1)
                logger.info("checkpoint at entry %d; %d batches of the log are no longer needed", sequence, trimmed)
        finally:
            snapshot.discard(copy)
        return sequence


def _alive(node: int, epoch: int, applied: int, status: str) -> sa.Update:
    mine = sa.update(nodes).where(nodes.c.node == node, nodes.c.epoch == epoch)
    return mine.values(heartbeat=sa.func.current_timestamp(), applied=applied, status=status)


def _fenced(node: int) -> sa.Update:
    values = {"claim": "", "name": f"#{node}", "epoch": nodes.c.epoch + 1}
    return sa.update(nodes).where(nodes.c.node == node).values(values)


async def _rehearse(connection: AsyncConnection) -> None:
    """Every statement of a heartbeat, of a node that does not exist: whoever fences this one waits for its row."""
    for statement in (_alive(-1, -1, 0, ""), _LIVES, _fenced(-1), _NEXT):
        await connection.execute(statement)


def _copy(catalogue: Path, target: Path) -> int:
    snapshot.discard(target)
    with contextlib.closing(rows.connect(catalogue, read_only=True)) as source:
        return snapshot.copy_database(source, target)

"""The journal of a cluster: batches in one order, in the engine.

In: batches of entries that a node decided while it held the head. Out: every batch since a sequence, checked against a chain of
digests, so that two nodes whose indexes have come apart (an engine restored from an older back-up, a data folder of another
cluster) are told so instead of answering different things.

What always holds: batches are dense and in the order in which they became visible, because who appends holds the lock of the
head's row; ``append`` does nothing for a node whose number was taken over (``Fenced``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
from collections.abc import AsyncIterator

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from ingest.cluster.engine import Engine
from ingest.cluster.errors import ClusterRefused
from ingest.cluster.schema import THE_ONE, cluster, log, nodes
from ingest.errors import IngestError

BATCHES_READ = 500
"""Rows of the log that are asked for at a time; a row has a few kilobytes, 8 MiB at most."""
_SECOND_NS = 1_000_000_000
_NOBODY = -1
_BEYOND = (1 << 63) - 1
"""A sequence that no batch has."""


class Fenced(IngestError):
    """Another process runs with this node's number: this one must end."""


class Diverged(IngestError):
    """This node's index is not of this log: it must not answer anything. ``str()`` is what its operator is told."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}. Nothing is served until that is put right. Is this an old copy of the engine? Put the right one in its "
            "place, and the node goes on. Is it the right one? Stop the node, run `hiss fsck --repair --data DIR --catalog URL`, "
            "which sets this node's index aside, and start it: it makes its index anew (docs/CLUSTER.md, Back-ups)"
        )


class Left(ClusterRefused):
    """This node was removed from the cluster: ``str()`` is what its operator is told."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"node {name} was removed from the cluster and does not come back: to use this machine again, start it on an empty "
            "data folder (with the cluster's node.key); what it had not drained lies in this folder's segments"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Logged:
    """A batch as it lies in the log."""

    first_sequence: int
    entries: int
    node: int
    chain: int
    payload: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Head:
    next_sequence: int
    chain: int
    now_ns: int
    """The engine's time; of two heads the later one has the greater."""


def chained(chain: int, payload: bytes) -> int:
    """Digest of a batch and all before it, as a non-negative 63-bit integer."""
    digest = hashlib.blake2b(payload, digest_size=8, key=chain.to_bytes(8)).digest()
    return int.from_bytes(digest) >> 1


def time_ns(moment: datetime.datetime) -> int:
    """Nanoseconds since the epoch; the engine's resolution is a microsecond."""
    since = moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return (since.days * 86_400 + since.seconds) * _SECOND_NS + since.microseconds * 1000


class Turn:
    """The head is this node's until the transaction ends. What is asked of the engine here is in ``_rehearse`` too."""

    def __init__(self, connection: AsyncConnection, node: int, epoch: int, head: Head) -> None:
        self._connection = connection
        self._node = node
        self._epoch = epoch
        self.head = head

    async def since(self, sequence: int) -> list[Logged]:
        return await _since(self._connection, sequence)

    async def gone(self, lease_s: float) -> frozenset[int]:
        """Nodes that have not been heard of for so long."""
        limit = sa.func.current_timestamp() - datetime.timedelta(seconds=lease_s)
        found = await self._connection.execute(sa.select(nodes.c.node).where(nodes.c.heartbeat < limit))
        return frozenset(found.scalars())

    async def append(self, entries: int, payload: bytes, now_ns: int) -> int:
        """The new chain. Raises Fenced."""
        head = self.head
        chain = chained(head.chain, payload)
        mine = sa.exists().where(nodes.c.node == self._node, nodes.c.epoch == self._epoch)
        row = sa.select(
            sa.literal(head.next_sequence, sa.BigInteger),
            sa.literal(entries, sa.Integer),
            sa.literal(self._node, sa.Integer),
            sa.literal(chain, sa.BigInteger),
            sa.literal(payload, sa.LargeBinary),
        ).where(mine)
        made = await self._connection.execute(sa.insert(log).from_select([column.name for column in log.columns], row))
        if made.rowcount != 1:
            raise Fenced(f"another process runs as node {self._node} of the cluster")
        await _advance(self._connection, THE_ONE, head.next_sequence + entries, chain, now_ns)
        return chain

    async def touch(self) -> None:
        """Write something that changes nothing: whether the engine takes it is known when the turn has ended."""
        head = self.head
        await _advance(self._connection, THE_ONE, head.next_sequence, head.chain, head.now_ns)


class EngineLog:
    """``node`` and ``epoch``: as whom this process appends."""

    def __init__(self, engine: Engine, cluster_id: str, node: int, epoch: int) -> None:
        self._engine = engine
        self._cluster_id = cluster_id
        self.node = node
        self.epoch = epoch

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[Turn]:
        """Wait for the head and hold it to the end of the block, which commits; an exception takes everything back.

        Raises EngineAway: whether what was appended is in the log is then for ``since`` to say."""
        async with self._engine.transaction(_rehearse) as connection:
            yield Turn(connection, self.node, self.epoch, await self._head(connection, lock=True))

    async def head(self) -> Head:
        async with self._engine.single() as connection:
            return await self._head(connection, lock=False)

    async def _head(self, connection: AsyncConnection, *, lock: bool) -> Head:
        row = await _row(connection, THE_ONE, lock=lock)
        if row is None or row[3] != self._cluster_id:
            raise ClusterRefused("the engine holds another cluster now: was its database made anew?")
        return Head(row[0], row[1], max(row[2] + 1, time_ns(row[4])))

    async def since(self, sequence: int) -> list[Logged]:
        """The batches from the one that begins at ``sequence`` on, BATCHES_READ at most."""
        async with self._engine.single() as connection:
            return await _since(connection, sequence)

    async def first_sequence(self) -> int | None:
        """Of the oldest batch that the log still has."""
        async with self._engine.transaction() as connection:
            first: int | None = (await connection.execute(sa.select(sa.func.min(log.c.first_sequence)))).scalar()
            return first

    async def trim(self, before: int) -> int:
        """Remove batches that end before ``before``; returns how many."""
        async with self._engine.transaction() as connection:
            ended = log.c.first_sequence + log.c.entries <= before
            return (await connection.execute(sa.delete(log).where(ended))).rowcount


async def _row(
    connection: AsyncConnection, one: int, *, lock: bool
) -> sa.Row[int, int, int, str, datetime.datetime] | None:
    asked = sa.select(
        cluster.c.next_sequence,
        cluster.c.chain,
        cluster.c.time_ns,
        cluster.c.cluster_id,
        sa.func.current_timestamp(),
    ).where(cluster.c.id == one)
    return (await connection.execute(asked.with_for_update() if lock else asked)).first()


async def _advance(connection: AsyncConnection, one: int, next_sequence: int, chain: int, now_ns: int) -> None:
    values = {"next_sequence": next_sequence, "chain": chain, "time_ns": now_ns}
    await connection.execute(sa.update(cluster).where(cluster.c.id == one).values(values))


async def _rehearse(connection: AsyncConnection) -> None:
    """Every statement of a turn, of a cluster, a batch and a node that do not exist."""
    await _row(connection, _NOBODY, lock=True)
    turn = Turn(connection, _NOBODY, _NOBODY, Head(0, 0, 0))
    await turn.since(_BEYOND)
    await turn.gone(0.0)
    with contextlib.suppress(Fenced):
        await turn.append(0, b"", 0)
    await _advance(connection, _NOBODY, 0, 0, 0)


async def _since(connection: AsyncConnection, sequence: int) -> list[Logged]:
    asked = sa.select(log).where(log.c.first_sequence >= sequence).order_by(log.c.first_sequence).limit(BATCHES_READ)
    return [Logged(*row) for row in await connection.execute(asked)]

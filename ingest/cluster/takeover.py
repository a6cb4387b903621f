"""A node alone becomes node 0 of a new cluster: what ``hiss migrate`` does.

In: the data folder of a stopped node and an engine that holds no cluster yet. Out: its index as the engine's first checkpoint,
the head behind its last entry, itself as node 0, DATA/cluster.json. Journal and snapshots are set aside, not removed.

What always holds: until the engine's row says that there is a cluster, the folder is a node alone, and nothing of it has
changed; from then on it is the cluster's, and refuses to start alone. The two cannot both be true: the folder is claimed
(cluster.json without a number) before the engine is asked, and a folder that is claimed starts neither way. Each step can be
done again: a migration that was killed goes on when it is started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from ingest import journal
from ingest.catalog import lock, recovery, rows, snapshot
from ingest.catalog.backup import NoCatalogue
from ingest.catalog.index import applied_sequence
from ingest.cluster import checkpoint, identity
from ingest.cluster.checkpoint import Checkpoint
from ingest.cluster.engine import Engine
from ingest.cluster.errors import ClusterRefused
from ingest.cluster.identity import Identity
from ingest.cluster.join import Joining, cluster_row, node_row
from ingest.cluster.schema import THE_ONE, checkpoint_parts, checkpoints, cluster, log, nodes
from ingest.crashpoints import crashpoint
from ingest.paths import NodePaths

NODE = 0

STEPS = (
    "bringing the index to the journal's end",
    "copying the index",
    "sending the index to the engine",
    "reading it back",
    "making the cluster",
    "setting journal and snapshots aside",
)

Progress = Callable[[str, int, int], None]
"""(a step of STEPS, done, of)"""


@dataclasses.dataclass(frozen=True, slots=True)
class TakeoverReport:
    cluster_id: str
    node: int
    name: str
    applied_sequence: int
    """The last entry of the time alone; the cluster's log begins behind it."""
    objects: int
    index_bytes: int
    digest: str
    """SHA-256 of the index as the engine holds it: it was read back."""
    resumed: bool
    set_aside: tuple[Path, ...]


async def take_over(paths: NodePaths, engine: Engine, joining: Joining, progress: Progress) -> TakeoverReport:
    """Raises CatalogueBusy while a node runs there, NoCatalogue for a folder without one, JournalDamaged, ClusterRefused for a
    folder or an engine that is part of a cluster already, EngineAway, sqlite3.Error, OSError."""
    if not paths.catalogue.exists():
        raise NoCatalogue(f"{paths.root} holds no node's data")
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, lock.take(paths.lock))
        stack.callback(os.close, lock.take(lock.catalogue(paths)))
        return await _take_over(paths, engine, joining, progress)


async def _take_over(paths: NodePaths, engine: Engine, joining: Joining, progress: Progress) -> TakeoverReport:
    known = identity.read(paths)
    if known is not None and known.joined and journal.last_sequence(paths.journal) is None:
        raise ClusterRefused(
            f"{paths.root} is node {known.node} of cluster {known.cluster_id} already: start it with hiss serve"
        )
    await engine.upgrade()
    claim = "" if known is None else known.claim
    made = await engine.run(lambda connection: _made_by(connection, claim)) if claim else None
    if made is None:
        if known is not None and known.joined:
            raise ClusterRefused(
                f"{paths.root} is of cluster {known.cluster_id}, and this engine does not know it: is --to right?"
            )
        await engine.run(_check_empty)
    progress(STEPS[0], 0, 1)
    if known is None or not known.joined:  # else it may have been started, and its journal is not the truth any more
        await asyncio.to_thread(_recover, paths)
    crashpoint("migrate-recovered")
    applied, objects = await asyncio.to_thread(_counted, paths)
    progress(STEPS[0], 1, 1)
    if made is None:
        base = await _published(paths, engine, applied, progress)
        known = identity.claimed(paths)
        crashpoint("migrate-claimed")
        progress(STEPS[4], 0, 1)
        claim = known.claim
        cluster_id = await engine.run(lambda connection: _make(connection, claim, joining, base))
        crashpoint("migrate-made")
        resumed = False
    else:
        cluster_id, base = made
        applied, resumed = base.sequence, True
    assert known is not None
    if not known.joined:
        identity.write(paths, Identity(known.claim, cluster_id, NODE))
        crashpoint("migrate-joined")
    progress(STEPS[4], 1, 1)
    aside = await asyncio.to_thread(_set_aside, paths)
    progress(STEPS[5], 1, 1)
    return TakeoverReport(cluster_id, NODE, joining.name, applied, objects, base.bytes, base.digest, resumed, aside)


# -- the folder
def _recover(paths: NodePaths) -> None:
    """Bring the index to the journal's end, as a start would."""
    database = recovery.recover(paths, NODE).database
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    database.close()
    mark = recovery.clean_mark(paths)
    mark.touch()
    snapshot.flush_path(mark.parent)


def _counted(paths: NodePaths) -> tuple[int, int]:
    """(last entry, object versions) of the index."""
    with contextlib.closing(rows.connect(paths.catalogue, read_only=True)) as database:
        (objects,) = database.execute("SELECT COUNT(*) FROM objects").fetchone()
        return applied_sequence(database), int(objects)


def _copied(paths: NodePaths, copy: Path) -> None:
    with contextlib.closing(rows.connect(paths.catalogue, read_only=True)) as source:
        snapshot.copy_database(source, copy)


def _set_aside(paths: NodePaths) -> tuple[Path, ...]:
    """Nothing reads them any more; a node of a cluster keeps its journal in the engine. The journal last: that it is there says
    that this is still to be done."""
    stamp = time.time_ns()
    moved = []
    for folder in (paths.snapshots, paths.journal):
        if folder.exists() and any(folder.iterdir()):
            aside = folder.with_name(f"{folder.name}.before-cluster-{stamp}")
            folder.rename(aside)
            snapshot.flush_path(folder.parent)
            moved.append(aside)
            crashpoint("migrate-aside")
    paths.create()
    return tuple(moved)


# -- the engine
async def _made_by(connection: AsyncConnection, claim: str) -> tuple[str, Checkpoint] | None:
    """The cluster that this very folder made before it was killed."""
    found = (
        await connection.execute(sa.select(cluster.c.cluster_id).where(cluster.c.id == THE_ONE))
    ).scalar_one_or_none()
    if found is None:
        return None
    its = (await connection.execute(sa.select(nodes.c.claim).where(nodes.c.node == NODE))).scalar_one_or_none()
    if its != claim:
        return None
    asked = sa.select(checkpoints.c.sequence, checkpoints.c.parts, checkpoints.c.bytes, checkpoints.c.digest)
    row = (await connection.execute(asked.order_by(checkpoints.c.sequence).limit(1))).first()
    return None if row is None else (str(found), Checkpoint(*row))


async def _check_empty(connection: AsyncConnection) -> None:
    for table in (cluster, nodes, log):
        if (await connection.execute(sa.select(sa.func.count()).select_from(table))).scalar_one():
            raise ClusterRefused(
                "the engine holds a cluster already: a node's data can only be taken into a new one. Give an empty database, or "
                "start this machine on an empty folder to join that cluster"
            )


async def _published(paths: NodePaths, engine: Engine, applied: int, progress: Progress) -> Checkpoint:
    """The index in the engine, read back and compared."""
    copy = paths.catalogue.with_name("migrate.sqlite")
    back = paths.catalogue.with_name("migrate-back.sqlite")
    snapshot.discard(copy)
    try:
        progress(STEPS[1], 0, 1)
        await asyncio.to_thread(_copied, paths, copy)
        progress(STEPS[1], 1, 1)
        # What an earlier attempt sent of an older state of this folder.
        await engine.run(lambda connection: _drop_others(connection, applied))
        base = await checkpoint.publish(engine, copy, applied, lambda done, of: progress(STEPS[2], done, of))
        crashpoint("migrate-published")
        progress(STEPS[3], 0, base.bytes)
        found = await checkpoint.newest(engine)
        if found != base:
            raise ClusterRefused("the engine does not hold what was sent: does somebody else write to this database?")
        await checkpoint.fetch(engine, base, back)
        same = await asyncio.to_thread(_same, copy, back, applied)
        if not same:
            raise ClusterRefused(
                "the index that was read back is not the one that was sent: the engine's storage is damaged"
            )
        crashpoint("migrate-verified")
        progress(STEPS[3], base.bytes, base.bytes)
        return base
    finally:
        snapshot.discard(copy)
        snapshot.discard(back)


def _same(copy: Path, back: Path, applied: int) -> bool:
    with copy.open("rb") as one, back.open("rb") as two:
        while piece := one.read(1 << 20):
            if two.read(len(piece)) != piece:
                return False
        if two.read(1):
            return False
    if not snapshot.sound(back):
        return False
    with contextlib.closing(rows.connect(back, read_only=True)) as database:
        return applied_sequence(database) == applied


async def _drop_others(connection: AsyncConnection, applied: int) -> None:
    await connection.execute(sa.delete(checkpoints).where(checkpoints.c.sequence != applied))
    await connection.execute(sa.delete(checkpoint_parts).where(checkpoint_parts.c.sequence != applied))


async def _make(connection: AsyncConnection, claim: str, joining: Joining, base: Checkpoint) -> str:
    """The cluster, from one moment to the next."""
    await _check_empty(connection)
    cluster_id = os.urandom(16).hex()
    await connection.execute(
        sa.insert(cluster).values(cluster_row(cluster_id, joining.key_fingerprint, base.sequence + 1, 0))
    )
    row = node_row(NODE, joining.name, claim) | {"applied": base.sequence}
    await connection.execute(sa.insert(nodes).values(row))
    return cluster_id

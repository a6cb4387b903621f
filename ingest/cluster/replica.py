"""A node's index at the start: brought to the log's end, or made anew from a checkpoint.

In: DATA/catalogue as a crash, a long absence or nothing at all left it, and the engine. Out: an open database. The log decides:
an index that is behind is brought up by the committer's own way; one that is damaged, or older than the log goes back, is
made anew from the newest checkpoint. Raises ClusterRefused where neither checkpoint nor log could tell it.
"""

from __future__ import annotations

import logging
import sqlite3

from ingest.catalog import migrate, recovery, rows, snapshot
from ingest.catalog.index import applied_sequence
from ingest.catalog.recovery import Recovered
from ingest.cluster import checkpoint
from ingest.cluster.engine import Engine
from ingest.cluster.errors import ClusterRefused
from ingest.cluster.log import EngineLog
from ingest.paths import NodePaths

logger = logging.getLogger(__name__)


async def recover(paths: NodePaths, engine: Engine, log: EngineLog) -> Recovered:
    """The caller holds the catalogue's lock. Raises ClusterRefused, EngineAway, sqlite3.Error, OSError."""
    head = await log.head()
    first = await log.first_sequence() or head.next_sequence
    snapshot.discard(paths.catalogue.with_name("rebuild.sqlite"))
    rebuilt = not _usable(paths, first - 1)
    if rebuilt:
        await _make_anew(paths, engine, log.node, first)
    database = rows.connect(paths.catalogue, read_only=False)
    database.execute("PRAGMA journal_mode=WAL")
    # The engine's log is the truth: what the WAL loses in a power cut comes from there again.
    database.execute("PRAGMA synchronous=NORMAL")
    migrate.upgrade(database, log.node)
    recovery.clean_mark(paths).unlink(missing_ok=True)
    snapshot.flush_path(paths.catalogue.parent)
    return Recovered(database, applied_sequence(database), 0, rebuilt)


def _usable(paths: NodePaths, oldest: int) -> bool:
    """Whether the database as found is whole, and the log has everything behind it."""
    if not paths.catalogue.exists():
        return False
    if not recovery.clean_mark(paths).exists() and not snapshot.sound(paths.catalogue):
        logger.warning("this node's index is damaged and will be made anew from the cluster's")
        return False
    try:
        database = rows.connect(paths.catalogue, read_only=True)
        try:
            return applied_sequence(database) >= oldest
        finally:
            database.close()
    except (sqlite3.Error, TypeError) as error:
        logger.warning("this node's index cannot be read (%s) and will be made anew", error)
        return False


async def _make_anew(paths: NodePaths, engine: Engine, node: int, first: int) -> None:
    made = paths.catalogue.with_name("rebuild.sqlite")
    base = await checkpoint.newest(engine)
    if base is None and first > 1:
        raise ClusterRefused(f"the engine's log begins at entry {first} and there is no checkpoint of what came before")
    if base is not None:
        if base.sequence < first - 1:
            raise ClusterRefused(
                f"the engine's log begins at entry {first}, its newest checkpoint ends at {base.sequence}"
            )
        await checkpoint.fetch(engine, base, made)
        if not snapshot.sound(made):
            raise ClusterRefused(f"checkpoint {base.sequence} in the engine is no sound index")
    database = rows.connect(made, read_only=False)
    try:
        database.execute("PRAGMA journal_mode=DELETE")
        migrate.upgrade(database, node)
    finally:
        database.close()
    snapshot.flush_path(made)
    recovery.install(made, paths.catalogue)
    logger.info("this node's index begins with %s", "nothing" if base is None else f"checkpoint {base.sequence}")

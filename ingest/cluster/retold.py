"""The index as the engine tells it: a checkpoint and the log behind it, up to an entry. For ``hiss fsck``.

In: the engine, an entry. Out: a database file. Raises Untold where checkpoints and log do not go back so far, or the engine is
away; NotOfTheLog where the engine does not know the entry; JournalDamaged where checkpoints and log do not fit together.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import msgspec

from ingest.catalog import entries, migrate, rows
from ingest.catalog.fsck import NotOfTheLog, Untold
from ingest.catalog.index import Index, applied_sequence, chain_of, set_chain
from ingest.cluster import checkpoint
from ingest.cluster.engine import Engine
from ingest.cluster.errors import ClusterRefused, EngineAway
from ingest.cluster.identity import Identity
from ingest.cluster.log import EngineLog, Logged, chained
from ingest.journal import JournalDamaged


async def retell(url: str, known: Identity, made: Path, up_to: int) -> None:
    """Write the index as of entry ``up_to`` to ``made``."""
    async with Engine(url) as engine:
        try:
            await _retell(engine, EngineLog(engine, known.cluster_id, known.node, 0), known, made, up_to)
        except EngineAway as error:
            raise Untold(f"index against the cluster's log: {engine.shown}: {error}") from None
        except ClusterRefused as error:
            raise JournalDamaged(str(error)) from None


async def _retell(engine: Engine, log: EngineLog, known: Identity, made: Path, up_to: int) -> None:
    head = await log.head()
    if head.next_sequence <= up_to:
        raise NotOfTheLog(f"the engine's log ends at entry {head.next_sequence - 1}, this node's index at {up_to}")
    base = next((one for one in await checkpoint.complete(engine) if one.sequence <= up_to), None)
    first = await log.first_sequence() or head.next_sequence
    if first > (0 if base is None else base.sequence) + 1:
        raise Untold(
            f"index against the cluster's log: this node knows entry {up_to}, and what the engine still has begins later; start "
            "the node, and check again"
        )
    if base is not None:
        await checkpoint.fetch(engine, base, made)
    with contextlib.closing(rows.connect(made, read_only=False)) as database:
        database.execute("PRAGMA journal_mode=DELETE")
        migrate.upgrade(database, known.node)
        while (applied := applied_sequence(database)) < up_to:
            batches = [batch for batch in await log.since(applied + 1) if batch.first_sequence <= up_to]
            if not batches:
                raise JournalDamaged(f"the engine's log lacks entry {applied + 1}")
            _apply(database, batches)


def _apply(database: sqlite3.Connection, batches: list[Logged]) -> None:
    index, chain = Index(database), chain_of(database)
    database.execute("BEGIN IMMEDIATE")
    for batch in batches:
        if batch.first_sequence != applied_sequence(database) + 1 or chained(chain, batch.payload) != batch.chain:
            raise JournalDamaged(f"batch {batch.first_sequence} of the engine's log does not follow the one before it")
        try:
            decoded = entries.decode(batch.payload)
        except msgspec.MsgspecError as error:
            raise JournalDamaged(
                f"batch {batch.first_sequence} holds entries this program cannot read: {error}"
            ) from None
        for sequence, entry in enumerate(decoded, batch.first_sequence):
            index.apply(sequence, entry)
        index.set_applied(batch.first_sequence + batch.entries - 1)
        chain = batch.chain
    set_chain(database, chain)
    database.execute("COMMIT")

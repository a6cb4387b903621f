"""Start of the catalogue: bring the index to the journal's end, building it anew when it cannot be trusted.

In: DIR/journal, DIR/catalogue, DIR/snapshots as a crash or a power cut left them. Out: an open database whose
``applied_sequence`` is the last whole entry of the journal. The journal decides: an index that is behind is replayed,
one that is ahead (a power cut may lose journal pages of ``memory`` commits that SQLite kept) or broken is rebuilt from
the newest usable snapshot. Raises JournalDamaged when entries are missing that nothing else holds.
"""

from __future__ import annotations

import dataclasses
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ingest import journal
from ingest.catalog import entries, migrate, rows, snapshot
from ingest.catalog.index import Index, applied_sequence
from ingest.journal import JournalDamaged
from ingest.paths import NodePaths

logger = logging.getLogger(__name__)

_TRANSACTION_ENTRIES = 2000


@dataclasses.dataclass(frozen=True, slots=True)
class Recovered:
    database: sqlite3.Connection
    applied: int
    replayed: int
    rebuilt: bool
    """The database file is a new one: connections that others hold must be opened anew."""


def recover(paths: NodePaths, node: int) -> Recovered:
    """The caller holds the catalogue's lock. Raises JournalDamaged, sqlite3.Error, OSError."""
    last = journal.last_sequence(paths.journal)
    for leftover in ("rebuild.sqlite", "snapshot.new"):
        snapshot.discard(paths.catalogue.parent / leftover)
        snapshot.discard(paths.snapshots / leftover)
    if _usable(paths, last):
        database = _open(paths.catalogue, node)
        rebuilt = False
    else:
        rebuild(paths, node)
        database = _open(paths.catalogue, node)
        rebuilt = True
    clean_mark(paths).unlink(missing_ok=True)
    snapshot.flush_path(paths.catalogue.parent)
    replayed = replay(database, paths.journal)
    return Recovered(database, applied_sequence(database), replayed, rebuilt)


def clean_mark(paths: NodePaths) -> Path:
    """Exists while no process writes the database and the last one closed it in order."""
    return paths.catalogue.parent / "clean"


def replay(database: sqlite3.Connection, journals: Path, up_to: int | None = None) -> int:
    """Apply every entry the index lacks; returns how many. Raises JournalDamaged for a gap or an unreadable entry."""
    index, count = Index(database), 0
    for sequence, entry in missing_entries(journals, applied_sequence(database)):
        if up_to is not None and sequence > up_to:
            break
        if not database.in_transaction:
            database.execute("BEGIN IMMEDIATE")
        index.apply(sequence, entry)
        index.set_applied(sequence)
        count += 1
        if count % _TRANSACTION_ENTRIES == 0:
            database.execute("COMMIT")
    if database.in_transaction:
        database.execute("COMMIT")
    return count


def missing_entries(journals: Path, after: int) -> Iterator[tuple[int, entries.Entry]]:
    """Journal entries later than ``after``, with their sequences."""
    for frame in journal.replay(journals, after):
        try:
            batch = entries.decode(frame.payload)
        except msgspec.MsgspecError as error:
            raise JournalDamaged(
                f"batch {frame.first_sequence} holds entries this program cannot read: {error}"
            ) from None
        for sequence, entry in enumerate(batch, frame.first_sequence):
            if sequence > after:
                yield sequence, entry


def rebuildable(paths: NodePaths) -> bool:
    """Whether journal and snapshots alone could bring the index back."""
    chain = journal.files(paths.journal)
    first = chain[0].first_sequence if chain else 1
    return first == 1 or any(found.applied >= first - 1 for found in snapshot.available(paths.snapshots))


def _open(path: Path, node: int) -> sqlite3.Connection:
    database = rows.connect(path, read_only=False)
    database.execute("PRAGMA journal_mode=WAL")
    # The journal is the truth: losing the WAL's tail in a power cut costs a replay, not a commit.
    database.execute("PRAGMA synchronous=NORMAL")
    migrate.upgrade(database, node)
    return database


def _usable(paths: NodePaths, last: int | None) -> bool:
    """Whether the database as found is whole and not ahead of the journal."""
    if not paths.catalogue.exists():
        return False
    if not clean_mark(paths).exists() and not snapshot.sound(paths.catalogue):
        logger.warning("the catalogue index is damaged and will be rebuilt from its snapshots and the journal")
        return False
    try:
        database = rows.connect(paths.catalogue, read_only=True)
        try:
            applied = applied_sequence(database)
            if last is not None and applied > last:
                _name_lost(database, applied, last)
                return False
        finally:
            database.close()
    except (sqlite3.Error, TypeError) as error:
        logger.warning("the catalogue index cannot be read (%s) and will be rebuilt", error)
        return False
    return True


def _name_lost(database: sqlite3.Connection, applied: int, last: int) -> None:
    """Say which versions a power cut took: the index knows them, the journal never held them on disk."""
    logger.error("the index holds entries %d to %d that the journal lost: rebuilding without them", last + 1, applied)
    found = database.execute("SELECT bucket, key FROM objects WHERE sequence > ?", (last,))
    for bucket, key in found:
        logger.error("lost with the power: %s/%s (memory durability)", bucket, key.decode("utf-8", "replace"))


def rebuild(paths: NodePaths, node: int) -> None:
    """Put a new database in place, from the newest usable snapshot, or from nothing when the journal goes back to 1.

    The caller holds the catalogue's lock. Raises JournalDamaged and leaves the old database when that is not possible.
    """
    last = journal.last_sequence(paths.journal)
    made = paths.catalogue.with_name("rebuild.sqlite")
    usable = [found for found in snapshot.available(paths.snapshots) if last is None or found.applied <= last]
    for base in [*usable, None]:
        snapshot.discard(made)
        if base is not None and not snapshot.sound(base.path):
            logger.error("snapshot %s is damaged", base.path.name)
            continue
        try:
            _build(made, paths.journal, node, None if base is None else base.path)
        except JournalDamaged as error:
            if base is None:
                raise
            logger.error("cannot rebuild from %s: %s", base.path.name, error)
            continue
        install(made, paths.catalogue)
        if base is None and last is None:
            return  # the first start of a node
        logger.warning("rebuilt the catalogue index from %s", "the journal" if base is None else base.path.name)
        return


def _build(made: Path, journals: Path, node: int, base: Path | None) -> None:
    database = rows.connect(made, read_only=False)
    try:
        if base is not None:
            source = rows.connect(base, read_only=True)
            try:
                source.backup(database)
            finally:
                source.close()
        database.execute("PRAGMA journal_mode=DELETE")
        migrate.upgrade(database, node)
        replay(database, journals)
    finally:
        database.close()
    snapshot.flush_path(made)


def install(made: Path, catalogue: Path) -> None:
    """Put a whole database file in the place of another. A crash between any two steps leaves none, which is rebuilt."""
    # First the old file itself: its WAL must never meet another database, nor the database be without its WAL.
    snapshot.discard(catalogue)
    made.rename(catalogue)
    snapshot.flush_path(catalogue.parent)

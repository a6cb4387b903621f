"""Snapshots of the index: whole copies of the database from which, with the journals since, it can be built again.

In: the live database. Out: DIR/snapshots/<applied sequence>.sqlite, self-contained (no WAL beside it), published by rename
once it is on disk. The last two are kept, and every journal file that the older one needs. A snapshot never holds an
entry that is not durable in the journal: the caller flushes the journal before ``publish``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sqlite3
from pathlib import Path

from ingest import journal
from ingest.catalog import rows
from ingest.catalog.index import applied_sequence
from ingest.catalog.schema import APPLICATION_ID
from ingest.crashpoints import crashpoint

KEPT = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    path: Path
    applied: int
    """The last journal entry it holds."""


def flush_path(path: Path) -> None:
    """fsync of a file or a folder."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def copy_database(source: sqlite3.Connection, target: Path) -> int:
    """One consistent copy, on disk on return; its applied sequence. Raises sqlite3.Error, OSError."""
    # It holds users' sealed secrets, and a target may lie outside the node's folder.
    os.close(os.open(target, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    with contextlib.closing(rows.connect(target, read_only=False)) as copy:
        source.backup(copy)
        # The copy is a file of its own: no WAL that would have to travel with it.
        copy.execute("PRAGMA journal_mode=DELETE")
        applied = applied_sequence(copy)
    flush_path(target)
    return applied


def write(catalogue: Path, folder: Path) -> Path:
    """Copy the database (a thread's work, commits go on meanwhile) to a file that is not a snapshot yet."""
    made = folder / "snapshot.new"
    discard(made)
    with contextlib.closing(rows.connect(catalogue, read_only=True)) as source:
        copy_database(source, made)
    crashpoint("snapshot-written")
    return made


def publish(made: Path) -> Snapshot:
    """Give a written copy its name. The journal must be flushed up to what the copy holds."""
    with contextlib.closing(rows.connect(made, read_only=True)) as copy:
        applied = applied_sequence(copy)
    path = made.with_name(f"{applied:020d}.sqlite")
    made.rename(path)
    flush_path(path.parent)
    crashpoint("snapshot-renamed")
    return Snapshot(path, applied)


def available(folder: Path) -> list[Snapshot]:
    """Published snapshots, newest first."""
    return [Snapshot(path, int(path.stem)) for path in sorted(folder.glob("[0-9]*.sqlite"), reverse=True)]


def prune(folder: Path, journals: Path) -> None:
    """Remove what neither of the two newest snapshots needs. With fewer than two, every journal file stays."""
    snapshots = available(folder)
    for old in snapshots[KEPT:]:
        old.path.unlink(missing_ok=True)
    if len(snapshots) < KEPT:
        return
    needed_from = snapshots[KEPT - 1].applied + 1
    chain = journal.files(journals)
    for file, following in itertools.pairwise(chain):
        if following.first_sequence > needed_from:
            break
        file.path.unlink()


def sound(path: Path) -> bool:
    """Whether a file is a catalogue that SQLite finds whole."""
    try:
        with contextlib.closing(rows.connect(path, read_only=True)) as database:
            (application,) = database.execute("PRAGMA application_id").fetchone()
            (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
            return application == APPLICATION_ID and verdict == "ok" and applied_sequence(database) >= 0
    except (sqlite3.Error, TypeError):
        return False


def discard(path: Path) -> None:
    """Remove a database file and what SQLite keeps beside it."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)

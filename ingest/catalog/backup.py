"""Back-up and restore of a catalogue: what ``hiss catalog backup|restore`` do.

A back-up is one self-contained SQLite file, consistent at one journal entry, taken while the node runs. It holds no
object bytes: those are in the segments and the archive. Restoring goes back to that entry: what was committed later is no
longer known, and what was deleted later may name bytes that were overwritten since; ``fsck`` says which.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sqlite3
import time
from pathlib import Path

from ingest.catalog import lock, migrate, recovery, rows, snapshot
from ingest.catalog.index import applied_sequence
from ingest.cluster import identity
from ingest.cluster.errors import ClusterRefused
from ingest.errors import IngestError
from ingest.paths import NodePaths


class NoCatalogue(IngestError):
    """There is no (readable) catalogue where one is needed."""


@dataclasses.dataclass(frozen=True, slots=True)
class BackupReport:
    file: Path
    applied_sequence: int
    """The last journal entry the back-up holds."""
    size_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class RestoreReport:
    applied_sequence: int
    set_aside: tuple[Path, ...]
    """Where the journal and the snapshots of before lie now; remove them when they are needed no more."""


def backup(data_dir: Path, target: Path) -> BackupReport:
    """Write a back-up of a running or stopped node to ``target``, which appears whole or not at all.

    Raises NoCatalogue, OSError, sqlite3.Error, and JournalDamaged for a stopped node whose journal cannot be read.
    """
    paths = NodePaths(data_dir)
    if not paths.catalogue.exists():
        raise NoCatalogue(f"{data_dir} holds no catalogue")
    known = identity.read(paths)
    # The index of a node of a cluster has what this node knew; its journal is the engine's.
    clustered = known is not None and known.joined
    made = target.with_name(target.name + ".partial")
    snapshot.discard(made)
    try:
        with contextlib.ExitStack() as stack:
            # A running node's index has everything that was answered. A stopped one's may lack the journal's last
            # entries, and only then is the journal at rest.
            stopped = False
            with contextlib.suppress(lock.CatalogueBusy):
                stack.callback(os.close, lock.take(lock.catalogue(paths)))
                stopped = True
            with contextlib.closing(rows.connect(paths.catalogue, read_only=True)) as source:
                applied = snapshot.copy_database(source, made)
            if stopped and not clustered:
                with contextlib.closing(rows.connect(made, read_only=False)) as copy:
                    recovery.replay(copy, paths.journal)
                    applied = applied_sequence(copy)
                snapshot.flush_path(made)
        made.rename(target)
        snapshot.flush_path(target.parent)
    finally:
        snapshot.discard(made)
    return BackupReport(target, applied, target.stat().st_size)


def restore(data_dir: Path, file: Path) -> RestoreReport:
    """Make a back-up the catalogue of a stopped node. Journal and snapshots of before are set aside, not removed.

    Raises CatalogueBusy while a node runs there, NoCatalogue for a file that is no whole back-up, ClusterRefused for a node of
    a cluster, SchemaTooNew, OSError.
    """
    known = identity.read(NodePaths(data_dir))
    if known is not None:
        raise ClusterRefused(
            f"{data_dir} is of a cluster, whose truth is in its engine: restore the engine's database instead (docs/CLUSTER.md, "
            "Back-ups); a node whose own index is damaged makes it anew when it starts"
        )
    if not file.is_file() or not snapshot.sound(file):
        raise NoCatalogue(f"{file} is not a whole catalogue back-up")
    paths = NodePaths(data_dir)
    paths.create()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, lock.take(paths.lock))
        stack.callback(os.close, lock.take(lock.catalogue(paths)))
        made = paths.catalogue.with_name("rebuild.sqlite")
        snapshot.discard(made)
        try:
            with contextlib.closing(rows.connect(file, read_only=True)) as source:
                snapshot.copy_database(source, made)
            with contextlib.closing(rows.connect(made, read_only=False)) as copy:
                migrate.upgrade(copy, node=0)
                applied = applied_sequence(copy)
            snapshot.flush_path(made)
        except sqlite3.Error as error:
            raise NoCatalogue(f"{file} cannot be copied: {error}") from error
        aside = tuple(_set_aside(folder) for folder in (paths.journal, paths.snapshots) if any(folder.iterdir()))
        paths.create()
        # From here on the index can be built again, as after any rotation: by fsck, and by a start after a crash below.
        snapshot.publish(snapshot.write(made, paths.snapshots))
        recovery.clean_mark(paths).unlink(missing_ok=True)
        recovery.install(made, paths.catalogue)
    return RestoreReport(applied, aside)


def _set_aside(folder: Path) -> Path:
    aside = folder.with_name(f"{folder.name}.before-restore-{time.time_ns()}")
    folder.rename(aside)
    snapshot.flush_path(folder.parent)
    return aside

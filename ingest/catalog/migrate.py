"""Brings a catalogue database to the schema of this program, at start, without anybody's help.

In: an open connection. Out: the same database at ``SCHEMA_HEAD``. One transaction: a crash leaves the old schema or the new
one. Nothing is imported from Alembic when there is nothing to do, which is every start but the first after an upgrade.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from ingest import journal
from ingest.catalog import statements
from ingest.catalog.schema import APPLICATION_ID, LABEL_FORMAT, SCHEMA_HEAD
from ingest.errors import IngestError


class SchemaTooNew(IngestError):
    """The database was written by a newer program."""


def upgrade(database: sqlite3.Connection, node: int) -> None:
    """Raises SchemaTooNew for a revision this program does not have, sqlite3.Error when the disk refuses."""
    if revision(database) == SCHEMA_HEAD:
        return
    import alembic.command
    import alembic.config
    import alembic.util
    import sqlalchemy as sa

    fresh = revision(database) is None
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    engine = sa.create_engine("sqlite://", creator=lambda: database, poolclass=sa.pool.StaticPool)
    # The driver is in autocommit mode, so this BEGIN spans every step until Alembic's commit.
    database.execute("BEGIN IMMEDIATE")
    try:
        with engine.connect() as connection:
            config.attributes["connection"] = connection
            alembic.command.upgrade(config, "head")
            if fresh:
                _set_meta(database, node)
            connection.commit()
    except alembic.util.CommandError as error:
        raise SchemaTooNew(f"catalogue schema {revision(database)}: {error}") from None
    finally:
        if database.in_transaction:
            database.execute("ROLLBACK")


def _set_meta(database: sqlite3.Connection, node: int) -> None:
    database.execute(f"PRAGMA application_id={APPLICATION_ID}")
    values = {"journal_format": journal.FORMAT, "label_format": LABEL_FORMAT, "node": node, "applied_sequence": 0}
    for name, value in values.items():
        database.execute(statements.SET_META, {"name": name, "value": value})


def revision(database: sqlite3.Connection) -> str | None:
    """The schema revision of a database; None for an empty one."""
    found = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone()
    if found is None:
        return None
    row = database.execute("SELECT version_num FROM alembic_version").fetchone()
    return None if row is None else str(row[0])

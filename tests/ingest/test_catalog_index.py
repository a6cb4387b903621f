"""The index alone: schema, plans, listings against a brute-force model."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ingest.catalog import entries, migrate, rows, statements
from ingest.catalog.index import Index
from ingest.catalog.reader import Reader, key_after
from ingest.catalog.schema import SCHEMA_HEAD, metadata
from ingest.records import BucketRecord, ObjectRecord, ObjectState


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    database = rows.connect(tmp_path / "index.sqlite", read_only=False)
    migrate.upgrade(database, 0)
    yield database
    database.close()


def test_migrations_build_the_schema_of_this_program(tmp_path: Path, database: sqlite3.Connection) -> None:
    assert migrate.revision(database) == SCHEMA_HEAD
    engine = sa.create_engine("sqlite://", creator=lambda: database, poolclass=sa.pool.StaticPool)
    with engine.connect() as connection:
        changes = compare_metadata(MigrationContext.configure(connection), metadata)
        # It sees a descending column as another index.
        assert [change for change in changes if getattr(change[1], "name", "") != "objects_order"] == []
    created = sqlite3.connect(":memory:")
    other = sa.create_engine("sqlite://", creator=lambda: created, poolclass=sa.pool.StaticPool)
    metadata.create_all(other)
    # Alembic's comparison does not see WITHOUT ROWID and the conditions of partial indexes.
    query = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name != 'alembic_version'"
    tables = [
        {name: re.sub(r"\W+", " ", sql).replace("CONSTRAINT", "") for name, sql in found.execute(query)}
        for found in (database, created)
    ]
    assert {name: sorted(sql.split()) for name, sql in tables[0].items()} == {
        name: sorted(sql.split()) for name, sql in tables[1].items()
    }
    created.close()


def test_a_database_of_a_newer_program_is_refused(database: sqlite3.Connection) -> None:
    database.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(migrate.SchemaTooNew):
        migrate.upgrade(database, 0)


def test_every_query_uses_an_index(database: sqlite3.Connection) -> None:
    # Small, read in the order of their primary key, one row of it, or a count over all of a bucket.
    whole_tables = {"META", "NODES", "ALL_PARTS", "BUCKETS", "USERS", "TOMBSTONES", "REDUCTION_COUNTS", "ANY_CHARGE"}
    for name, sql in vars(statements).items():
        if not name.isupper() or not isinstance(sql, str) or name in whole_tables:
            continue
        named = dict.fromkeys(re.findall(r":(\w+)", sql), 0)
        parameters = named or (0,) * sql.count("?")
        plan = [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {sql}", parameters)]
        # What nodes that have gone owe is asked for once in a while, over a range of places: it is put in order then.
        assert name.startswith(("ADOPTED_", "OWED_AT_")) or not [step for step in plan if "TEMP B-TREE" in step], (
            name,
            plan,
        )
        assert not [step for step in plan if step.startswith("SCAN") and "USING" not in step], (name, plan)


def put(index: Index, sequence: int, key: bytes) -> None:
    record = ObjectRecord(
        "b", key, "null", sequence.to_bytes(16), sequence, ObjectState.BUFFERED, 0, 0, "e", 0, sequence, "root"
    )
    index.apply(sequence, entries.ObjectCommitted(record, 0))


def brute_force(
    keys: set[bytes], prefix: bytes, after: bytes, delimiter: bytes, limit: int
) -> tuple[list[tuple[bytes, bool]], bool]:
    """ListObjectsV2 by its definition: (key or common prefix, whether it is a prefix)."""
    found: dict[bytes, bool] = {}
    for key in sorted(keys):
        if not key.startswith(prefix) or key <= after:
            continue
        place = key.find(delimiter, len(prefix)) if delimiter else -1
        name = key if place < 0 else key[: place + len(delimiter)]
        if place >= 0 and name == after:
            continue  # a page that ended with this common prefix
        found[name] = place >= 0
    ordered = sorted(found.items())
    return ordered[:limit], len(ordered) > limit


_key = st.lists(st.sampled_from([b"a", b"b", b"/", b"\xff", b"\x00"]), min_size=1, max_size=5).map(b"".join)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keys=st.sets(_key, max_size=25),
    prefix=st.one_of(st.just(b""), _key),
    delimiter=st.sampled_from([b"", b"/", b"a", b"/b"]),
    limit=st.integers(1, 6),
)
def test_listing_pages_like_the_definition(
    database: sqlite3.Connection, keys: set[bytes], prefix: bytes, delimiter: bytes, limit: int
) -> None:
    database.execute("BEGIN")
    index = Index(database)
    index.apply(1, entries.BucketCreated(BucketRecord("b", "root", 0)))
    for sequence, key in enumerate(keys, 2):
        put(index, sequence, key)
    database.execute("COMMIT")
    reader, after = Reader(database), b""
    try:
        while True:
            found, truncated = reader.list_objects("b", prefix, after, delimiter, limit)
            shown = [(row.key, row.record is None) for row in found]
            assert (shown, truncated) == brute_force(keys, prefix, after, delimiter, limit)
            assert all(row.record is None or row.record.key == row.key for row in found)
            if not truncated:
                break
            after = found[-1].key
    finally:
        database.execute("DELETE FROM objects")


@given(prefix=st.binary(max_size=4), other=st.binary(max_size=6))
def test_key_after_is_the_end_of_a_prefix(prefix: bytes, other: bytes) -> None:
    end = key_after(prefix)
    inside = other.startswith(prefix)
    assert (other >= prefix and (end is None or other < end)) == inside


def test_a_common_prefix_costs_one_seek_however_many_keys_it_holds(database: sqlite3.Connection) -> None:
    database.execute("BEGIN")
    index = Index(database)
    index.apply(1, entries.BucketCreated(BucketRecord("b", "root", 0)))
    for sequence in range(2, 20_002):
        put(index, sequence, b"run%d/%06d" % (sequence % 2, sequence))
    database.execute("COMMIT")
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    database.set_progress_handler(count, 100)  # every hundred instructions of SQLite's machine
    found, _ = Reader(database).list_objects("b", b"", b"", b"/", 10)
    database.set_progress_handler(None, 0)
    assert [row.key for row in found] == [b"run0/", b"run1/"]
    assert steps < 20

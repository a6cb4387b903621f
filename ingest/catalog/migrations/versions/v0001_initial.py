"""The catalogue of the first release."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "buckets",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("record", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "extents",
        sa.Column("node", sa.Integer(), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("segment", sa.Integer(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("offset", sa.BigInteger(), nullable=False),
        sa.Column("holder", sa.LargeBinary(), nullable=False),
        sa.Column("length", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("node", "slot", "segment", "generation", "offset", "holder"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "meta",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "objects",
        sa.Column("sequence", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("bucket", sa.Text(), nullable=False),
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("version_id", sa.Text(), nullable=False),
        sa.Column("object_id", sa.LargeBinary(), nullable=False),
        sa.Column("visible", sa.Integer(), nullable=False),
        sa.Column("delete_marker", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("settled", sa.Integer(), nullable=False),
        sa.Column("durability", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("codec", sa.Text(), nullable=False),
        sa.Column("length", sa.BigInteger(), nullable=False),
        sa.Column("stored_length", sa.BigInteger(), nullable=False),
        sa.Column("etag", sa.Text(), nullable=False),
        sa.Column("modified_ns", sa.BigInteger(), nullable=False),
        sa.Column("stored_ns", sa.BigInteger(), nullable=False),
        sa.Column("due_ns", sa.BigInteger(), nullable=False),
        sa.Column("lease_until_ns", sa.BigInteger(), nullable=False),
        sa.Column("lease_epoch", sa.BigInteger(), nullable=False),
        sa.Column("drain_attempts", sa.Integer(), nullable=False),
        sa.Column("drain_error", sa.Text(), nullable=False),
        sa.Column("recall_ns", sa.BigInteger(), nullable=False),
        sa.Column("archive_target", sa.Text(), nullable=True),
        sa.Column("archive_path", sa.Text(), nullable=True),
        sa.Column("archive_crc64nvme", sa.BigInteger(), nullable=True),
        sa.Column("archive_verified_ns", sa.BigInteger(), nullable=True),
        sa.Column("published_path", sa.Text(), nullable=True),
        sa.Column("detail", sa.LargeBinary(), nullable=False),
        sa.Column("ledger", sa.LargeBinary(), nullable=True),
        sa.Column("extents", sa.LargeBinary(), nullable=False),
        sa.Column("parts", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("sequence"),
    )
    op.create_index(
        "objects_evictable",
        "objects",
        ["stored_ns", "length"],
        unique=False,
        sqlite_where=sa.text("state = 'archived' AND length > 0"),
    )
    op.create_index("objects_id", "objects", ["object_id"], unique=True)
    op.create_index(
        "objects_leased", "objects", ["lease_until_ns"], unique=False, sqlite_where=sa.text("state = 'draining'")
    )
    op.create_index(
        "objects_queue",
        "objects",
        ["state", "settled", "due_ns", "modified_ns", "length", "drain_attempts"],
        unique=False,
        sqlite_where=sa.text("state IN ('buffered', 'draining')"),
    )
    op.create_index(
        "objects_recalling", "objects", ["recall_ns"], unique=False, sqlite_where=sa.text("state = 'recalling'")
    )
    op.create_index("objects_unsettled", "objects", ["sequence"], unique=False, sqlite_where=sa.text("settled = 0"))
    op.create_index("objects_version", "objects", ["bucket", "key", "version_id"], unique=True)
    op.create_index("objects_visible", "objects", ["bucket", "key"], unique=True, sqlite_where=sa.text("visible = 1"))
    op.create_table(
        "outcomes",
        sa.Column("object_id", sa.LargeBinary(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("record", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("object_id"),
    )
    op.create_index("outcomes_sequence", "outcomes", ["sequence"], unique=False)
    op.create_table(
        "parts",
        sa.Column("upload_id", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("object_id", sa.LargeBinary(), nullable=False),
        sa.Column("settled", sa.Integer(), nullable=False),
        sa.Column("record", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("upload_id", "number"),
        sa.UniqueConstraint("object_id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "reductions",
        sa.Column("object_id", sa.LargeBinary(), nullable=False),
        sa.Column("kernel", sa.Text(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("given_up", sa.Integer(), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("object_id", "kernel"),
        sqlite_with_rowid=False,
    )
    op.create_index(
        "reductions_of_slot",
        "reductions",
        ["slot", "attempts", "sequence"],
        unique=False,
        sqlite_where=sa.text("given_up = 0"),
    )
    op.create_index(
        "reductions_pending", "reductions", ["attempts", "sequence"], unique=False, sqlite_where=sa.text("given_up = 0")
    )
    op.create_table(
        "segments",
        sa.Column("node", sa.Integer(), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("segment", sa.Integer(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("live_bytes", sa.BigInteger(), nullable=False),
        sa.Column("live_extents", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("node", "slot", "segment", "generation"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "tombstones",
        sa.Column("sequence", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("bucket", sa.Text(), nullable=False),
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("sequence"),
    )
    op.create_index("tombstones_key", "tombstones", ["bucket", "key"], unique=False)
    op.create_table(
        "unsettled_parts",
        sa.Column("part_id", sa.LargeBinary(), nullable=False),
        sa.Column("object_id", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("part_id"),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_unsettled_parts_object_id"), "unsettled_parts", ["object_id"], unique=False)
    op.create_table(
        "uploads",
        sa.Column("bucket", sa.Text(), nullable=False),
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("upload_id", sa.Text(), nullable=False),
        sa.Column("record", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("bucket", "key", "upload_id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "users",
        sa.Column("user_id", sa.Text(), nullable=False),
        sa.Column("access_key", sa.Text(), nullable=False),
        sa.Column("record", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("user_id"),
        sa.UniqueConstraint("access_key"),
        sqlite_with_rowid=False,
    )

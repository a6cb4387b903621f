"""More than one node: who holds a version, who mirrors it, who recalls it; second copies; members."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("objects", sa.Column("node", sa.Integer(), nullable=False, server_default=sa.text("0")))
    op.add_column("objects", sa.Column("mirror_node", sa.Integer(), nullable=True))
    op.add_column("objects", sa.Column("recall_node", sa.Integer(), nullable=False, server_default=sa.text("0")))
    op.drop_index("objects_queue", "objects")
    op.create_index(
        "objects_queue",
        "objects",
        ["node", "state", "settled", "due_ns", "modified_ns", "length", "drain_attempts"],
        sqlite_where=sa.text("state IN ('buffered', 'draining')"),
    )
    op.create_index(
        "objects_mirrored", "objects", ["mirror_node", "node"], sqlite_where=sa.text("mirror_node IS NOT NULL")
    )
    op.create_index(
        "objects_unmirrored",
        "objects",
        ["node", "sequence"],
        sqlite_where=sa.text("durability = 'mirror' AND mirror_node IS NULL AND state IN ('buffered', 'draining')"),
    )
    op.drop_index("objects_evictable", "objects")
    op.create_index(
        "objects_evictable",
        "objects",
        ["node", "stored_ns", "length"],
        sqlite_where=sa.text("state = 'archived' AND length > 0"),
    )
    op.create_table(
        "mirrors",
        sa.Column("object_id", sa.LargeBinary(), nullable=False),
        sa.Column("node", sa.Integer(), nullable=False),
        sa.Column("extents", sa.LargeBinary(), nullable=False),
        sa.Column("held_ns", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("object_id"),
        sqlite_with_rowid=False,
    )
    op.create_index("mirrors_of_node", "mirrors", ["node", "held_ns"])
    op.create_table(
        "nodes",
        sa.Column("node", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("record", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("node"),
    )

"""Versions beside the null version: their order, their kernels while they are not current, their archive copies."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.drop_index("objects_version", "objects")
    op.create_index("objects_order", "objects", ["bucket", "key", sa.text("sequence DESC")])
    op.create_index(
        "objects_null",
        "objects",
        ["bucket", "key"],
        unique=True,
        sqlite_where=sa.text("version_id = 'null' AND visible = 0"),
    )
    op.create_table(
        "noncurrent_kernels",
        sa.Column("object_id", sa.LargeBinary(), nullable=False),
        sa.Column("kernel", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("object_id", "kernel"),
        sqlite_with_rowid=False,
    )
    op.add_column("tombstones", sa.Column("object_id", sa.LargeBinary(), nullable=True))

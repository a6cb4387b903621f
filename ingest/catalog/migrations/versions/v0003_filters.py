"""Raw filters that are due, and the verdicts they go by."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "filters",
        sa.Column("object_id", sa.LargeBinary(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("given_up", sa.Integer(), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("filters", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("object_id"),
        sqlite_with_rowid=False,
    )
    op.create_index(
        "filters_of_slot",
        "filters",
        ["slot", "attempts", "sequence"],
        unique=False,
        sqlite_where=sa.text("given_up = 0"),
    )
    op.create_index("filters_given_up", "filters", ["object_id"], unique=False, sqlite_where=sa.text("given_up = 1"))
    op.create_table(
        "filter_verdicts",
        sa.Column("object_id", sa.LargeBinary(), nullable=False),
        sa.Column("kernel", sa.Text(), nullable=False),
        sa.Column("verdicts", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("object_id", "kernel"),
        sqlite_with_rowid=False,
    )

"""Reservations of capacity and rate, and what is used of them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.create_table(
        "reservations",
        sa.Column("reservation_id", sa.Text(), nullable=False),
        sa.Column("bucket", sa.Text(), nullable=False),
        sa.Column("from_ns", sa.BigInteger(), nullable=False),
        sa.Column("ends_ns", sa.BigInteger(), nullable=False),
        sa.Column("record", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("reservation_id"),
        sqlite_with_rowid=False,
    )
    op.create_index("reservations_ends", "reservations", ["ends_ns"], unique=False)
    op.create_index("reservations_bucket", "reservations", ["bucket"], unique=False)
    op.create_table(
        "reservation_use",
        sa.Column("reservation_id", sa.Text(), nullable=False),
        sa.Column("node", sa.Integer(), nullable=False),
        sa.Column("used_bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("reservation_id", "node"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "charges",
        sa.Column("node", sa.Integer(), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("segment", sa.Integer(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("offset", sa.BigInteger(), nullable=False),
        sa.Column("reservation_id", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("node", "slot", "segment", "generation", "offset"),
        sqlite_with_rowid=False,
    )

"""Runs: their partials and members, and reductions that are owed a second time."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("reductions", sa.Column("released", sa.Integer(), nullable=False, server_default=sa.text("0")))
    op.create_index(
        "reductions_released",
        "reductions",
        ["slot"],
        unique=False,
        sqlite_where=sa.text("released = 1 AND given_up = 0"),
    )
    op.create_index("reductions_given_up", "reductions", ["kernel"], unique=False, sqlite_where=sa.text("given_up = 1"))
    op.create_table(
        "runs",
        sa.Column("bucket", sa.Text(), nullable=False),
        sa.Column("run", sa.LargeBinary(), nullable=False),
        sa.Column("member_ns", sa.BigInteger(), nullable=False),
        sa.Column("closed_ns", sa.BigInteger(), nullable=False),
        sa.Column("closed_by", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("bucket", "run"),
        sqlite_with_rowid=False,
    )
    op.create_index("runs_open", "runs", ["bucket", "member_ns"], unique=False, sqlite_where=sa.text("closed_ns = 0"))
    op.create_table(
        "run_products",
        sa.Column("bucket", sa.Text(), nullable=False),
        sa.Column("run", sa.LargeBinary(), nullable=False),
        sa.Column("kernel", sa.Text(), nullable=False),
        sa.Column("changed", sa.BigInteger(), nullable=False),
        sa.Column("stored", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("bucket", "run", "kernel"),
        sqlite_with_rowid=False,
    )
    op.create_index(
        "run_products_due", "run_products", ["changed"], unique=False, sqlite_where=sa.text("changed > stored")
    )
    op.create_table(
        "partials",
        sa.Column("object_id", sa.LargeBinary(), nullable=False),
        sa.Column("bucket", sa.Text(), nullable=False),
        sa.Column("run", sa.LargeBinary(), nullable=False),
        sa.Column("kernel", sa.Text(), nullable=False),
        sa.Column("group_id", sa.Text(), nullable=False),
        sa.Column("since", sa.BigInteger(), nullable=False),
        sa.Column("members", sa.Integer(), nullable=False),
        sa.Column("batch", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("object_id"),
        sqlite_with_rowid=False,
    )
    op.create_index("partials_of_run", "partials", ["bucket", "run", "kernel"], unique=False)
    op.create_table(
        "members",
        sa.Column("object_id", sa.LargeBinary(), nullable=False),
        sa.Column("kernel", sa.Text(), nullable=False),
        sa.Column("partial", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("object_id", "kernel"),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_members_partial"), "members", ["partial"], unique=False)

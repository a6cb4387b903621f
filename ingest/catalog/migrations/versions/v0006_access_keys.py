"""Users may have several key pairs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "access_keys",
        sa.Column("access_key", sa.Text(), nullable=False),
        sa.Column("user_id", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("access_key"),
        sqlite_with_rowid=False,
    )
    op.create_index("access_keys_user", "access_keys", ["user_id"], unique=False)
    op.execute("INSERT INTO access_keys SELECT access_key, user_id FROM users")
    op.rename_table("users", "users_before")
    op.create_table(
        "users",
        sa.Column("user_id", sa.Text(), nullable=False),
        sa.Column("record", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("user_id"),
        sqlite_with_rowid=False,
    )
    op.execute("INSERT INTO users SELECT user_id, record FROM users_before")
    op.drop_table("users_before")

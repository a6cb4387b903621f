"""Runs migrations on the connection that ``ingest.cluster.engine`` hands over, inside its transaction."""

from __future__ import annotations

from alembic import context

from ingest.cluster.schema import metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, version_table="hiss_schema"
)
with context.begin_transaction():
    context.run_migrations()

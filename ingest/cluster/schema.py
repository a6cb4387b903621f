"""Tables that a cluster keeps in its engine, as SQLAlchemy Core metadata: what every node may rely on.

Only what the SQL standard has and PostgreSQL-compatible engines share: no notifications, no advisory locks, no arrays. Times
that decide something are the engine's own (``CURRENT_TIMESTAMP``). Names begin with ``hiss_``, so that a database may be
shared. Migrations (migrations/versions) build exactly this; a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, DateTime, Index, Integer, LargeBinary, MetaData, Table, Text

SCHEMA_HEAD = "0001"
LOG_FORMAT = 1
"""Format of the entries in the log. A node refuses a cluster whose format it does not write."""
THE_ONE = 1
"""Key of the only row of ``cluster``."""

metadata = MetaData()

cluster = Table(
    "hiss_cluster",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("cluster_id", Text, nullable=False),
    Column("key_fingerprint", Text, nullable=False),
    Column("log_format", Integer, nullable=False),
    Column("next_sequence", BigInteger, nullable=False),
    Column("chain", BigInteger, nullable=False),
    Column("time_ns", BigInteger, nullable=False),
)
"""The head of the log. Who decides holds this row's lock, so all nodes decide one after the other."""

log = Table(
    "hiss_log",
    metadata,
    Column("first_sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("entries", Integer, nullable=False),
    Column("node", Integer, nullable=False),
    Column("chain", BigInteger, nullable=False),  # of this batch and all before it
    Column("payload", LargeBinary, nullable=False),
)
"""The journal of the cluster: a row is a batch (ingest/catalog/entries.py), there as a whole or not at all."""

nodes = Table(
    "hiss_nodes",
    metadata,
    Column("node", Integer, primary_key=True, autoincrement=False),
    Column("name", Text, nullable=False, unique=True),
    Column("claim", Text, nullable=False),  # of the data folder that has this number
    Column("epoch", BigInteger, nullable=False),
    Column("heartbeat", DateTime(timezone=True), nullable=False),
    Column("applied", BigInteger, nullable=False),
    Column("status", Text, nullable=False),  # JSON: load and room, for whoever chooses a node
)
"""Who lives. What members are for is in the log (``entries.NodePut``), this is only whether they are there."""

checkpoints = Table(
    "hiss_checkpoints",
    metadata,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("parts", Integer, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("digest", Text, nullable=False),
    Column("complete", Integer, nullable=False),
)
"""Copies of the index as of an entry: from one of them and the log behind it any node's index can be built."""

checkpoint_parts = Table(
    "hiss_checkpoint_parts",
    metadata,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("part", Integer, primary_key=True, autoincrement=False),
    Column("digest", Text, nullable=False),
    Column("data", LargeBinary, nullable=False),
    Index("hiss_checkpoint_parts_sequence", "sequence"),
)
"""zstd, cut into pieces."""

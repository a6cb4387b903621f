"""Tables and indexes of the catalogue, as SQLAlchemy Core metadata: what a query may rely on.

Keys are BLOBs, so that order is bytewise and no collation interferes. Times are integer nanoseconds (UTC), sizes bytes.
The seldom-queried parts of a record are msgpack BLOBs beside the indexed columns: one row is one record. Columns that a
listing does not need come last, so that SQLite does not read their overflow pages.
Migrations (migrations/versions) build exactly this; a test compares the two.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, Table, Text, text

SCHEMA_HEAD = "0008"
"""Newest migration; a database at this revision needs no upgrade."""
LABEL_FORMAT = 1
"""Format version of extent labels that the catalogue's extents point at."""
APPLICATION_ID = 0x48495353
"""``PRAGMA application_id`` of a catalogue ("HISS"): restore refuses any other file."""

metadata = sa.MetaData()


def _flag(name: str) -> Column[int]:
    return Column(name, Integer, nullable=False)


meta = Table(
    "meta",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
"""journal_format, label_format, node, applied_sequence (last journal entry in this index)."""

buckets = Table(
    "buckets",
    metadata,
    Column("name", Text, primary_key=True),
    Column("record", LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)

users = Table(
    "users",
    metadata,
    Column("user_id", Text, primary_key=True),
    Column("record", LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)

access_keys = Table(
    "access_keys",
    metadata,
    Column("access_key", Text, primary_key=True),
    Column("user_id", Text, nullable=False),
    Index("access_keys_user", "user_id"),
    sqlite_with_rowid=False,
)
"""Whose key pair it is, in use or switched off: an access key has one user."""

objects = Table(
    "objects",
    metadata,
    # The journal sequence of the commit: unique, dense over all entries, and as rowid it makes inserts appends.
    Column("sequence", Integer, primary_key=True, autoincrement=False),
    Column("bucket", Text, nullable=False),
    Column("key", LargeBinary, nullable=False),
    Column("version_id", Text, nullable=False),
    Column("object_id", LargeBinary, nullable=False),
    _flag("visible"),  # the current version of its key and no delete marker: what HEAD and LIST see
    _flag("delete_marker"),
    Column("state", Text, nullable=False),
    _flag("settled"),
    Column("durability", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("codec", Text, nullable=False),
    Column("length", BigInteger, nullable=False),
    Column("stored_length", BigInteger, nullable=False),
    Column("etag", Text, nullable=False),
    Column("modified_ns", BigInteger, nullable=False),
    Column("stored_ns", BigInteger, nullable=False),  # when the buffered copy came: commit or recall
    Column("due_ns", BigInteger, nullable=False),  # drain deadline, or the next attempt after a failure
    Column("lease_until_ns", BigInteger, nullable=False),
    Column("lease_epoch", BigInteger, nullable=False),
    Column("drain_attempts", Integer, nullable=False),
    Column("drain_error", Text, nullable=False),
    Column("recall_ns", BigInteger, nullable=False),
    Column("archive_target", Text),
    Column("archive_path", Text),
    Column("archive_crc64nvme", BigInteger),  # two's complement of the unsigned value
    Column("archive_verified_ns", BigInteger),
    # Where a copy of this key, this version's or a replaced one's, may lie in the archive: NULL for certainly nowhere,
    # "" when a drain was begun and the path is not known. What a delete leaves as its tombstone.
    Column("published_path", Text),
    Column("detail", LargeBinary, nullable=False),
    Column("ledger", LargeBinary),
    Column("extents", LargeBinary, nullable=False),
    Column("parts", LargeBinary),
    # Whose segments hold it: the node of its first extent. A node drains and evicts what it holds.
    Column("node", Integer, nullable=False, server_default=text("0")),
    Column("mirror_node", Integer),  # who holds the second copy
    Column("recall_node", Integer, nullable=False, server_default=text("0")),  # who fetches it from the archive
    # Newest first: the order of a listing of versions. A version id other than ``null`` is the object id, in hex.
    Index("objects_order", "bucket", "key", text("sequence DESC")),
    # Where the null version is a noncurrent one or a delete marker; else ``objects_visible`` finds it.
    Index("objects_null", "bucket", "key", unique=True, sqlite_where=text("version_id = 'null' AND visible = 0")),
    Index("objects_visible", "bucket", "key", unique=True, sqlite_where=text("visible = 1")),
    Index("objects_id", "object_id", unique=True),
    Index("objects_leased", "lease_until_ns", sqlite_where=text("state = 'draining'")),
    # One index for what is due and for the counts of the queue: every commit pays for each index it enters.
    Index(
        "objects_queue",
        "node",
        "state",
        "settled",
        "due_ns",
        "modified_ns",
        "length",
        "drain_attempts",
        sqlite_where=text("state IN ('buffered', 'draining')"),
    ),
    Index("objects_mirrored", "mirror_node", "node", sqlite_where=text("mirror_node IS NOT NULL")),
    Index(
        "objects_unmirrored",
        "node",
        "sequence",
        sqlite_where=text("durability = 'mirror' AND mirror_node IS NULL AND state IN ('buffered', 'draining')"),
    ),
    Index("objects_evictable", "node", "stored_ns", "length", sqlite_where=text("state = 'archived' AND length > 0")),
    Index("objects_recalling", "recall_ns", sqlite_where=text("state = 'recalling'")),
    Index("objects_unsettled", "sequence", sqlite_where=text("settled = 0")),
)

# A reference is a row, so a count of references cannot drift: an extent is live while any holder names it.
extents = Table(
    "extents",
    metadata,
    Column("node", Integer, primary_key=True),
    Column("slot", Integer, primary_key=True),
    Column("segment", Integer, primary_key=True),
    Column("generation", Integer, primary_key=True),
    Column("offset", BigInteger, primary_key=True),
    Column("holder", LargeBinary, primary_key=True),  # object_id of a version or of an uploaded part
    Column("length", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

segments = Table(
    "segments",
    metadata,
    Column("node", Integer, primary_key=True),
    Column("slot", Integer, primary_key=True),
    Column("segment", Integer, primary_key=True),
    Column("generation", Integer, primary_key=True),
    Column("live_bytes", BigInteger, nullable=False),
    Column("live_extents", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
"""Maintained with every reference; a segment generation without a row holds nothing alive."""

reservations = Table(
    "reservations",
    metadata,
    Column("reservation_id", Text, primary_key=True),
    Column("bucket", Text, nullable=False),
    Column("from_ns", BigInteger, nullable=False),
    Column("ends_ns", BigInteger, nullable=False),  # its grace included, or when it was released
    Column("record", LargeBinary, nullable=False),
    Index("reservations_ends", "ends_ns"),
    Index("reservations_bucket", "bucket"),
    sqlite_with_rowid=False,
)

reservation_use = Table(
    "reservation_use",
    metadata,
    Column("reservation_id", Text, primary_key=True),
    Column("node", Integer, primary_key=True),
    Column("used_bytes", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
"""Sums over ``charges``: what a PUT asks, without a scan."""

charges = Table(
    "charges",
    metadata,
    Column("node", Integer, primary_key=True),
    Column("slot", Integer, primary_key=True),
    Column("segment", Integer, primary_key=True),
    Column("generation", Integer, primary_key=True),
    Column("offset", BigInteger, primary_key=True),
    Column("reservation_id", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
"""Live extents that were committed in a bucket's slot, and the reservation whose capacity they take."""

uploads = Table(
    "uploads",
    metadata,
    Column("bucket", Text, primary_key=True),
    Column("key", LargeBinary, primary_key=True),
    Column("upload_id", Text, primary_key=True),
    Column("record", LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)

parts = Table(
    "parts",
    metadata,
    Column("upload_id", Text, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("object_id", LargeBinary, nullable=False, unique=True),
    _flag("settled"),
    Column("record", LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)

unsettled_parts = Table(
    "unsettled_parts",
    metadata,
    Column("part_id", LargeBinary, primary_key=True),
    Column("object_id", LargeBinary, nullable=False, index=True),
    sqlite_with_rowid=False,
)
"""Parts that were linked into a version before their bytes were on disk; the version settles with the last of them."""

reductions = Table(
    "reductions",
    metadata,
    Column("object_id", LargeBinary, primary_key=True),
    Column("kernel", Text, primary_key=True),
    Column("sequence", BigInteger, nullable=False),
    Column("slot", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    _flag("given_up"),
    Column("error", Text, nullable=False),
    # 1: paid once by a partial that is gone: nobody is at it. 2: waits for its run to close.
    Column("released", Integer, nullable=False, server_default=text("0")),
    Index("reductions_released", "slot", sqlite_where=text("released = 1 AND given_up = 0")),
    Index("reductions_given_up", "kernel", sqlite_where=text("given_up = 1")),
    Index("reductions_of_slot", "slot", "attempts", "sequence", sqlite_where=text("given_up = 0")),
    Index("reductions_pending", "attempts", "sequence", sqlite_where=text("given_up = 0")),
    sqlite_with_rowid=False,
)

runs = Table(
    "runs",
    metadata,
    Column("bucket", Text, primary_key=True),
    Column("run", LargeBinary, primary_key=True),
    Column("member_ns", BigInteger, nullable=False),
    Column("closed_ns", BigInteger, nullable=False),
    Column("closed_by", Text, nullable=False),
    Index("runs_open", "bucket", "member_ns", sqlite_where=text("closed_ns = 0")),
    sqlite_with_rowid=False,
)
"""Key prefixes with objects that have kernels."""

run_products = Table(
    "run_products",
    metadata,
    Column("bucket", Text, primary_key=True),
    Column("run", LargeBinary, primary_key=True),
    Column("kernel", Text, primary_key=True),
    Column("changed", BigInteger, nullable=False),  # sequence of the last entry that concerns the product
    Column("stored", BigInteger, nullable=False),  # the ``changed`` that the stored product reflects
    Index("run_products_due", "changed", sqlite_where=text("changed > stored")),
    sqlite_with_rowid=False,
)

partials = Table(
    "partials",
    metadata,
    Column("object_id", LargeBinary, primary_key=True),
    Column("bucket", Text, nullable=False),
    Column("run", LargeBinary, nullable=False),
    Column("kernel", Text, nullable=False),
    Column("group_id", Text, nullable=False),
    Column("since", BigInteger, nullable=False),
    Column("members", Integer, nullable=False),
    Column("batch", Integer, nullable=False),  # 0: of one version; 1: one state for many; APART: one state a member
    Index("partials_of_run", "bucket", "run", "kernel"),
    sqlite_with_rowid=False,
)
"""Stored objects whose state is a part of a run's."""
APART = 2

noncurrent_kernels = Table(
    "noncurrent_kernels",
    metadata,
    Column("object_id", LargeBinary, primary_key=True),
    Column("kernel", Text, primary_key=True),
    sqlite_with_rowid=False,
)
"""Kernels that a version had when it ceased to be current: owed again when it is current again."""

members = Table(
    "members",
    metadata,
    Column("object_id", LargeBinary, primary_key=True),
    Column("kernel", Text, primary_key=True),
    Column("partial", LargeBinary, nullable=False, index=True),
    sqlite_with_rowid=False,
)
"""Which partial holds a version's frames, for each kernel: each frame counts once."""

filters = Table(
    "filters",
    metadata,
    Column("object_id", LargeBinary, primary_key=True),
    Column("sequence", BigInteger, nullable=False),
    Column("slot", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    _flag("given_up"),
    Column("error", Text, nullable=False),
    Column("filters", LargeBinary, nullable=False),
    Index("filters_of_slot", "slot", "attempts", "sequence", sqlite_where=text("given_up = 0")),
    Index("filters_given_up", "object_id", sqlite_where=text("given_up = 1")),
    sqlite_with_rowid=False,
)
"""Versions that kernels are to filter once all of them have judged."""

filter_verdicts = Table(
    "filter_verdicts",
    metadata,
    Column("object_id", LargeBinary, primary_key=True),
    Column("kernel", Text, primary_key=True),
    Column("verdicts", LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)

mirrors = Table(
    "mirrors",
    metadata,
    Column("object_id", LargeBinary, primary_key=True),  # of the version or part that is being committed elsewhere
    Column("node", Integer, nullable=False),
    Column("extents", LargeBinary, nullable=False),
    Column("held_ns", BigInteger, nullable=False),
    Index("mirrors_of_node", "node", "held_ns"),
    sqlite_with_rowid=False,
)
"""Second copies that a node holds for another one whose commit is still to come."""

nodes = Table(
    "nodes",
    metadata,
    Column("node", Integer, primary_key=True, autoincrement=False),
    Column("record", LargeBinary, nullable=False),
)
"""Members of the cluster; none where there is one node."""

evictions = Table(
    "evictions",
    metadata,
    Column("object_id", LargeBinary, primary_key=True),
    Column("due_ns", BigInteger, nullable=False),
    Index("evictions_due", "due_ns"),
    sqlite_with_rowid=False,
)
"""Versions whose buffered copy goes by time, not by watermarks: of a class that is only in the archive, or restored."""

notices = Table(
    "notices",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=False),
    Column("target", Text, nullable=False),
    Column("event", LargeBinary, nullable=False),
    Index("notices_target", "target", "sequence"),
)
"""Events of buckets that are still to be delivered, in the order of their commits."""

tombstones = Table(
    "tombstones",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=False),
    Column("bucket", Text, nullable=False),
    Column("key", LargeBinary, nullable=False),
    Column("path", Text, nullable=False),
    Column("object_id", LargeBinary),  # NULL: of before there were versions
    Index("tombstones_key", "bucket", "key"),
)
"""Archive copies whose version was deleted or hidden by a delete marker, until the archive says that they are gone."""

outcomes = Table(
    "outcomes",
    metadata,
    Column("object_id", LargeBinary, primary_key=True),
    Column("sequence", Integer, nullable=False),
    Column("kind", Text, nullable=False),
    Column("record", LargeBinary, nullable=False),
    Index("outcomes_sequence", "sequence"),
)
"""Commits whose version or part has gone since, so that a commit sent again is answered and not done again."""

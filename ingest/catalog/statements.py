"""Every SQL statement of the catalogue, built with SQLAlchemy Core and compiled to text once, at import.

Why text: SQLAlchemy's execute costs more than SQLite itself (about 100 µs against 5 µs for a point look-up), and a
commit is a handful of statements. So Core describes schema and queries, and raw sqlite3 connections execute the text,
which is also the key of sqlite3's cache of prepared statements.

Conditions that a partial index needs are literals: SQLite cannot match a bound parameter to an index's WHERE.
Parameters are named, except those of the longest statement.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import bindparam, literal_column, text
from sqlalchemy.dialects import sqlite

from ingest.catalog.schema import (
    access_keys,
    buckets,
    charges,
    evictions,
    extents,
    filter_verdicts,
    filters,
    members,
    meta,
    mirrors,
    nodes,
    noncurrent_kernels,
    notices,
    objects,
    outcomes,
    partials,
    parts,
    reductions,
    reservation_use,
    reservations,
    run_products,
    runs,
    segments,
    tombstones,
    unsettled_parts,
    uploads,
    users,
)

_dialect = sqlite.dialect(paramstyle="named")
_one: sa.ColumnElement[int] = literal_column("1")
_none: sa.ColumnElement[int] = literal_column("0")  # spelled out, because the dialect would bind it
_limit = bindparam("limit", type_=sa.Integer)


def _sql(statement: sa.ClauseElement) -> str:
    return str(statement.compile(dialect=_dialect))


def _p(name: str) -> sa.BindParameter[object]:
    return bindparam(name)


# -- meta
APPLIED = _sql(sa.select(meta.c.value).where(meta.c.name == literal_column("'applied_sequence'")))
SET_APPLIED = _sql(
    sa.update(meta).where(meta.c.name == literal_column("'applied_sequence'")).values(value=_p("sequence"))
)
META = _sql(sa.select(meta.c.name, meta.c.value))
SET_META = _sql(
    sqlite.insert(meta)
    .values(name=_p("name"), value=_p("value"))
    .on_conflict_do_update(index_elements=["name"], set_={"value": _p("value")})
)

# -- buckets and users
BUCKET = _sql(sa.select(buckets.c.record).where(buckets.c.name == _p("name")))
BUCKETS = _sql(sa.select(buckets.c.record).order_by(buckets.c.name))
PUT_BUCKET = _sql(
    sqlite.insert(buckets)
    .values(name=_p("name"), record=_p("record"))
    .on_conflict_do_update(index_elements=["name"], set_={"record": _p("record")})
)
DELETE_BUCKET = _sql(sa.delete(buckets).where(buckets.c.name == _p("name")))
BUCKET_HAS_OBJECT = _sql(
    sa.select(_one).select_from(objects).where(objects.c.bucket == _p("name")).limit(_one).offset(_none)
)
BUCKET_HAS_UPLOAD = _sql(
    sa.select(_one).select_from(uploads).where(uploads.c.bucket == _p("name")).limit(_one).offset(_none)
)
RESCHEDULE_BUCKET = _sql(
    sa.update(objects)
    .where(
        objects.c.bucket == _p("name"),
        objects.c.state == literal_column("'buffered'"),
        objects.c.drain_attempts == literal_column("0"),
        # The drain waits for their filters, or is told when those have ended.
        objects.c.object_id.not_in(sa.select(filters.c.object_id).where(filters.c.given_up == literal_column("0"))),
    )
    .values(due_ns=objects.c.modified_ns + bindparam("drain_after_ns", type_=sa.BigInteger))
)
USERS = _sql(sa.select(users.c.record).order_by(users.c.user_id))
USER_OF_KEY = _sql(sa.select(access_keys.c.user_id).where(access_keys.c.access_key == _p("access_key")))
PUT_USER = _sql(
    sqlite.insert(users)
    .values(user_id=_p("user_id"), record=_p("record"))
    .on_conflict_do_update(index_elements=["user_id"], set_={"record": _p("record")})
)
DELETE_KEYS_OF_USER = _sql(sa.delete(access_keys).where(access_keys.c.user_id == _p("user_id")))
PUT_KEY_OF_USER = _sql(sqlite.insert(access_keys).values(access_key=_p("access_key"), user_id=_p("user_id")))

# -- reservations
PUT_RESERVATION = _sql(
    sqlite.insert(reservations)
    .values(
        reservation_id=_p("reservation_id"),
        bucket=_p("bucket"),
        from_ns=_p("from_ns"),
        ends_ns=_p("ends_ns"),
        record=_p("record"),
    )
    .on_conflict_do_update(index_elements=["reservation_id"], set_={"ends_ns": _p("ends_ns"), "record": _p("record")})
)
_use_of = reservation_use.c.reservation_id == reservations.c.reservation_id
_with_use = sa.select(reservations.c.record, reservation_use.c.node, reservation_use.c.used_bytes).select_from(
    reservations.outerjoin(reservation_use, _use_of)
)
RESERVATION = _sql(_with_use.where(reservations.c.reservation_id == _p("reservation_id")))
RESERVATIONS = _sql(_with_use.where(reservations.c.ends_ns > _p("ends_after_ns")))
RESERVATION_USE = _sql(
    sa.select(reservation_use.c.used_bytes).where(
        reservation_use.c.reservation_id == _p("reservation_id"), reservation_use.c.node == _p("node")
    )
)
DELETE_USE_ENDED = _sql(
    sa.delete(reservation_use).where(
        reservation_use.c.reservation_id.in_(
            sa.select(reservations.c.reservation_id).where(reservations.c.ends_ns < _p("before_ns"))
        )
    )
)
DELETE_RESERVATIONS_ENDED = _sql(sa.delete(reservations).where(reservations.c.ends_ns < _p("before_ns")))
DELETE_USE_OF_BUCKET = _sql(
    sa.delete(reservation_use).where(
        reservation_use.c.reservation_id.in_(
            sa.select(reservations.c.reservation_id).where(reservations.c.bucket == _p("name"))
        )
    )
)
DELETE_RESERVATIONS_OF_BUCKET = _sql(sa.delete(reservations).where(reservations.c.bucket == _p("name")))
USE_GAINS = _sql(
    sqlite.insert(reservation_use)
    .values(reservation_id=_p("reservation_id"), node=_p("node"), used_bytes=_p("bytes"))
    .on_conflict_do_update(
        index_elements=["reservation_id", "node"],
        set_={"used_bytes": reservation_use.c.used_bytes + _p("bytes")},
    )
)
USE_LOSES = _sql(
    sa.update(reservation_use)
    .where(reservation_use.c.reservation_id == _p("of"), reservation_use.c.node == _p("of_node"))
    .values(used_bytes=reservation_use.c.used_bytes - _p("bytes"))
)
INSERT_CHARGE = _sql(
    sqlite.insert(charges).values(
        node=_p("node"),
        slot=_p("slot"),
        segment=_p("segment"),
        generation=_p("generation"),
        offset=_p("offset"),
        reservation_id=_p("reservation_id"),
        bytes=_p("bytes"),
    )
)
_charged = sa.and_(
    charges.c.node == _p("node"),
    charges.c.slot == _p("slot"),
    charges.c.segment == _p("segment"),
    charges.c.generation == _p("generation"),
    charges.c.offset == _p("offset"),
)
CHARGE = _sql(sa.select(charges.c.reservation_id, charges.c.bytes).where(_charged))
DELETE_CHARGE = _sql(sa.delete(charges).where(_charged))
ANY_CHARGE = _sql(sa.select(_one).select_from(charges).limit(_one).offset(_none))

# -- objects: reads
RECORD_COLUMNS = (
    objects.c.sequence, objects.c.bucket, objects.c.key, objects.c.version_id, objects.c.object_id,
    objects.c.delete_marker, objects.c.state, objects.c.settled, objects.c.durability, objects.c.owner,
    objects.c.codec, objects.c.length, objects.c.stored_length, objects.c.etag, objects.c.modified_ns,
    objects.c.drain_attempts, objects.c.drain_error, objects.c.archive_target, objects.c.archive_path,
    objects.c.archive_crc64nvme, objects.c.archive_verified_ns, objects.c.detail, objects.c.ledger, objects.c.extents,
)  # fmt: skip
_whole = (*RECORD_COLUMNS, objects.c.parts)
_visible = objects.c.visible == _one
_of_key = sa.and_(objects.c.bucket == _p("bucket"), objects.c.key == _p("key"))

HEAD = _sql(sa.select(*_whole).where(_of_key, _visible))
BY_ID = _sql(sa.select(*_whole).where(objects.c.object_id == _p("object_id")))
BY_SEQUENCE = _sql(sa.select(*_whole).where(objects.c.sequence == _p("sequence")))
_facts = (objects.c.sequence, objects.c.version_id, objects.c.etag, objects.c.delete_marker, objects.c.object_id)
NEWEST = _sql(sa.select(*_facts).where(_of_key).order_by(objects.c.sequence.desc()).limit(_limit).offset(_none))
"""Of a key; the first is the current version, unless it is a delete marker."""
_hidden_null = text("version_id = 'null' AND visible = 0")  # word for word the index's condition
NULL_HIDDEN = _sql(sa.select(*_facts).where(_of_key, _hidden_null))
HIDDEN_NULL_RECORD = _sql(sa.select(*_whole).where(_of_key, _hidden_null))
NEWEST_RECORD = _sql(sa.select(*_whole).where(_of_key).order_by(objects.c.sequence.desc()).limit(_one).offset(_none))
STATE_BY_ID = _sql(
    sa.select(objects.c.sequence, objects.c.state, objects.c.settled, objects.c.archive_path, objects.c.extents).where(
        objects.c.object_id == _p("object_id")
    )
)
DETAIL = _sql(sa.select(objects.c.detail).where(objects.c.sequence == _p("sequence")))
VISIBLE_BY_ID = _sql(sa.select(objects.c.visible).where(objects.c.object_id == _p("object_id")))
PUBLISHED = _sql(sa.select(objects.c.published_path).where(objects.c.sequence == _p("sequence")))
_rows = sa.select(*RECORD_COLUMNS)
LIST_FROM = _sql(
    _rows.where(objects.c.bucket == _p("bucket"), objects.c.key >= _p("start"), objects.c.key < _p("end"), _visible)
    .order_by(objects.c.key)
    .limit(_limit)
    .offset(_none)
)
LIST_FROM_OPEN = _sql(
    _rows.where(objects.c.bucket == _p("bucket"), objects.c.key >= _p("start"), _visible)
    .order_by(objects.c.key)
    .limit(_limit)
    .offset(_none)
)

_newest_first = (objects.c.key, objects.c.sequence.desc())
SCAN_KEY = _sql(
    _rows.where(_of_key, objects.c.sequence < _p("sequence")).order_by(*_newest_first).limit(_limit).offset(_none)
)
SCAN_KEYS = _sql(
    _rows.where(objects.c.bucket == _p("bucket"), objects.c.key > _p("key"))
    .order_by(*_newest_first)
    .limit(_limit)
    .offset(_none)
)
VERSIONS_FROM = _sql(
    _rows.where(objects.c.bucket == _p("bucket"), objects.c.key >= _p("start"), objects.c.key < _p("end"))
    .order_by(objects.c.key, objects.c.sequence.desc())
    .limit(_limit)
    .offset(_none)
)
VERSIONS_FROM_OPEN = _sql(
    _rows.where(objects.c.bucket == _p("bucket"), objects.c.key >= _p("start"))
    .order_by(objects.c.key, objects.c.sequence.desc())
    .limit(_limit)
    .offset(_none)
)
VERSIONS_BELOW = _sql(
    _rows.where(_of_key, objects.c.sequence < _p("below"))
    .order_by(objects.c.sequence.desc())
    .limit(_limit)
    .offset(_none)
)
ARCHIVED_VERSIONS = _sql(_rows.where(_of_key, objects.c.archive_path.is_not(None)).order_by(objects.c.sequence.desc()))

# -- objects: writes
INSERT_OBJECT = str(sa.insert(objects).compile(dialect=sqlite.dialect(paramstyle="qmark")))
"""Its 35 parameters go by position: sqlite3 looks up each name again at every execute."""
DELETE_OBJECT = _sql(sa.delete(objects).where(objects.c.sequence == _p("sequence")))
_by_sequence = sa.update(objects).where(objects.c.sequence == _p("of"))
SET_SETTLED = _sql(_by_sequence.values(settled=_one))
SET_VISIBLE = _sql(_by_sequence.values(visible=bindparam("to", type_=sa.Integer)))
SET_DETAIL = _sql(_by_sequence.values(detail=_p("detail")))
SET_ARCHIVE_PATH = _sql(_by_sequence.values(archive_path=_p("path"), published_path=_p("path")))
SET_LEDGER = _sql(_by_sequence.values(ledger=_p("ledger")))
SET_EXTENTS = _sql(_by_sequence.values(extents=_p("extents")))
SET_CLAIMED = _sql(
    _by_sequence.values(
        state=_p("state"),
        lease_until_ns=_p("lease_until_ns"),
        lease_epoch=_p("lease_epoch"),
        published_path=sa.func.coalesce(objects.c.published_path, literal_column("''")),
    )
)
SET_DRAINED = _sql(
    _by_sequence.values(
        state=_p("state"),
        archive_target=_p("target"),
        archive_path=_p("path"),
        archive_crc64nvme=_p("crc64nvme"),
        archive_verified_ns=_p("verified_ns"),
        published_path=_p("path"),
        drain_error=literal_column("''"),
    )
)
SET_DRAIN_FAILED = _sql(
    _by_sequence.values(
        state=_p("state"),
        due_ns=_p("due_ns"),
        drain_error=_p("error"),
        drain_attempts=objects.c.drain_attempts + literal_column("1"),
    )
)
SET_EVICTED = _sql(
    _by_sequence.values(state=_p("state"), extents=_p("extents"), detail=_p("detail"), mirror_node=sa.null())
)
SET_RECALLING = _sql(_by_sequence.values(state=_p("state"), recall_ns=_p("recall_ns"), recall_node=_p("node")))
SET_MIRROR = _sql(_by_sequence.values(detail=_p("detail"), mirror_node=_p("node")))
SET_NODE = _sql(_by_sequence.values(node=_p("node")))
SET_RECALLED = _sql(
    _by_sequence.values(
        state=_p("state"),
        extents=_p("extents"),
        stored_ns=_p("stored_ns"),
        drain_error=literal_column("''"),
        node=_p("node"),
    )
)
SET_RECALL_FAILED = _sql(_by_sequence.values(state=_p("state"), drain_error=_p("error")))

# -- queues over objects
_buffered = objects.c.state == literal_column("'buffered'")
_queued = text("state IN ('buffered', 'draining')")  # word for word the index's condition
_draining = objects.c.state == literal_column("'draining'")
_here = objects.c.node == _p("node")
DUE = _sql(
    sa.select(objects.c.object_id, objects.c.due_ns)
    .where(_queued, _here, _buffered, objects.c.settled == _one, objects.c.due_ns <= _p("now_ns"))
    .order_by(objects.c.due_ns)
    .limit(_limit)
    .offset(_none)
)
DUE_AT_ONCE = _sql(
    sa.select(objects.c.object_id, objects.c.due_ns)
    .where(
        _queued,
        _here,
        _buffered,
        objects.c.settled == _one,
        sa.or_(
            objects.c.due_ns <= _p("now_ns"),
            sa.and_(
                objects.c.drain_attempts == literal_column("0"),
                objects.c.object_id.not_in(
                    sa.select(filters.c.object_id).where(filters.c.given_up == literal_column("0"))
                ),
            ),
        ),
    )
    .order_by(objects.c.due_ns)
    .limit(_limit)
    .offset(_none)
)
"""On a node that is being emptied: all but what waits for a filter, or failed and waits for its next attempt."""
LEASE_EXPIRED = _sql(
    sa.select(objects.c.object_id, objects.c.due_ns)
    .where(_draining, objects.c.lease_until_ns <= _p("now_ns"), _here)
    .order_by(objects.c.lease_until_ns)
    .limit(_limit)
    .offset(_none)
)
MIRRORED_DUE = _sql(
    sa.select(objects.c.object_id, objects.c.due_ns)
    .where(
        text("mirror_node IS NOT NULL"),
        objects.c.mirror_node == _p("mirror"),
        _here,
        text("state IN ('buffered', 'draining')"),
        objects.c.settled == _one,
        sa.or_(
            sa.and_(_buffered, objects.c.due_ns <= _p("now_ns")),
            sa.and_(_draining, objects.c.lease_until_ns <= _p("now_ns")),
        ),
    )
    .limit(_limit)
    .offset(_none)
)
"""What a node mirrors for one that has gone."""
EMPTY_DUE = _sql(
    sa.select(objects.c.object_id, objects.c.due_ns)
    .where(
        _queued,
        _here,
        objects.c.settled == _one,
        objects.c.stored_length == literal_column("0"),
        sa.or_(
            sa.and_(_buffered, objects.c.due_ns <= _p("now_ns")),
            sa.and_(_draining, objects.c.lease_until_ns <= _p("now_ns")),
        ),
    )
    .limit(_limit)
    .offset(_none)
)
LEASED = _sql(
    sa.select(objects.c.object_id, objects.c.lease_epoch)
    .where(_draining, objects.c.lease_until_ns > _p("now_ns"))
    .order_by(objects.c.lease_until_ns)
)
DRAIN_CLAIM = _sql(
    sa.select(objects.c.lease_epoch).where(
        objects.c.object_id == _p("object_id"), objects.c.state == literal_column("'draining'")
    )
)
QUEUE_COUNTS = _sql(
    sa.select(
        sa.func.count(),
        sa.func.coalesce(sa.func.sum(objects.c.length), literal_column("0")),
        sa.func.coalesce(sa.func.sum(objects.c.drain_attempts > literal_column("0")), literal_column("0")),
        sa.func.min(objects.c.modified_ns),
    ).where(_queued, _here)
)
QUEUE_BY_NODE = _sql(
    sa.select(
        objects.c.node,
        sa.func.count(),
        sa.func.coalesce(sa.func.sum(objects.c.length), literal_column("0")),
        sa.func.coalesce(sa.func.sum(objects.c.drain_attempts > literal_column("0")), literal_column("0")),
    )
    .where(_queued)
    .group_by(objects.c.node)
)
QUEUE_PLACES = _sql(
    sa.select(
        objects.c.bucket, objects.c.key, objects.c.length, objects.c.extents, objects.c.mirror_node, objects.c.detail
    ).where(_queued)
)
ALL_PARTS = _sql(sa.select(parts.c.record))
UNMIRRORED_COUNT = _sql(
    sa.select(sa.func.count())
    .select_from(objects)
    .where(text("durability = 'mirror' AND mirror_node IS NULL AND state IN ('buffered', 'draining')"))
)
COPIES_ON = _sql(
    sa.select(objects.c.object_id)
    .where(text("state = 'archived' AND length > 0"), _here)
    .order_by(objects.c.stored_ns)
    .limit(_limit)
    .offset(_none)
)
EVICTABLE_BYTES = _sql(
    sa.select(sa.func.coalesce(sa.func.sum(objects.c.length), literal_column("0"))).where(
        text("state = 'archived' AND length > 0"), _here
    )
)
EVICTABLE = _sql(
    sa.select(*RECORD_COLUMNS, objects.c.recall_ns, objects.c.stored_ns)
    .where(
        text("state = 'archived' AND length > 0"),
        _here,
        ~sa.exists(_one)
        .where(evictions.c.object_id == objects.c.object_id, evictions.c.due_ns > _p("now_ns"))
        .correlate(objects),
    )
    .order_by(objects.c.stored_ns)
)
EVICTIONS_DUE = _sql(
    sa.select(*RECORD_COLUMNS)
    .select_from(evictions.join(objects, objects.c.object_id == evictions.c.object_id))
    .where(
        evictions.c.due_ns <= _p("now_ns"),
        text("+state = 'archived' AND settled = 1 AND length > 0"),
        text("+node = :node"),
        ~sa.exists(_one)
        .where(reductions.c.object_id == objects.c.object_id, reductions.c.given_up == literal_column("0"))
        .correlate(objects),
    )
    .order_by(evictions.c.due_ns)
    .limit(_limit)
    .offset(_none)
)
DRAIN_NOW = _sql(
    sa.update(objects)
    .where(
        objects.c.sequence == _p("of"),
        objects.c.state == literal_column("'buffered'"),
        objects.c.due_ns > _p("now_ns"),
        objects.c.drain_attempts == literal_column("0"),
        objects.c.object_id.not_in(sa.select(filters.c.object_id).where(filters.c.given_up == literal_column("0"))),
    )
    .values(due_ns=_p("now_ns"))
)
"""Not what waits for a filter: the drain is told when that has ended; nor what failed and waits for its next attempt."""
"""Not what kernels still owe a product of: nobody could read it without a restore."""
PUT_EVICTION = _sql(
    sqlite.insert(evictions)
    .values(object_id=_p("object_id"), due_ns=_p("due_ns"))
    .on_conflict_do_update(index_elements=["object_id"], set_={"due_ns": _p("due_ns")})
)
DELETE_EVICTION = _sql(sa.delete(evictions).where(evictions.c.object_id == _p("of")))
UNSETTLED = _sql(sa.select(*_whole).where(text("settled = 0")).order_by(objects.c.sequence).limit(_limit).offset(_none))
RECALL_NODE = _sql(sa.select(objects.c.recall_node).where(objects.c.object_id == _p("object_id")))
RECALLS = _sql(
    sa.select(*_whole)
    .where(text("state = 'recalling'"), objects.c.recall_node == _p("node"))
    .order_by(objects.c.recall_ns)
    .limit(_limit)
    .offset(_none)
)

# -- extents and segments
_extent_key = sa.and_(
    extents.c.node == _p("node"),
    extents.c.slot == _p("slot"),
    extents.c.segment == _p("segment"),
    extents.c.generation == _p("generation"),
    extents.c.offset == _p("offset"),
)
HOLD_EXTENT = _sql(sa.insert(extents))
DROP_EXTENT = _sql(sa.delete(extents).where(_extent_key, extents.c.holder == _p("holder")))
PASS_EXTENT = _sql(sa.update(extents).where(_extent_key, extents.c.holder == _p("of")).values(holder=_p("holder")))
EXTENT_HELD = _sql(sa.select(_one).select_from(extents).where(_extent_key).limit(_one).offset(_none))
SEGMENT_GAINS = _sql(
    sqlite.insert(segments)
    .values(
        node=_p("node"),
        slot=_p("slot"),
        segment=_p("segment"),
        generation=_p("generation"),
        live_bytes=_p("bytes"),
        live_extents=_one,
    )
    .on_conflict_do_update(
        index_elements=["node", "slot", "segment", "generation"],
        set_={
            "live_bytes": segments.c.live_bytes + bindparam("bytes", type_=sa.BigInteger),
            "live_extents": segments.c.live_extents + literal_column("1"),
        },
    )
)
_segment_key = sa.and_(
    segments.c.node == _p("of_node"),
    segments.c.slot == _p("of_slot"),
    segments.c.segment == _p("of_segment"),
    segments.c.generation == _p("of_generation"),
)
SEGMENT_LOSES = _sql(
    sa.update(segments)
    .where(_segment_key)
    .values(
        live_bytes=segments.c.live_bytes - bindparam("bytes", type_=sa.BigInteger),
        live_extents=segments.c.live_extents - literal_column("1"),
    )
)
DROP_DEAD_SEGMENT = _sql(sa.delete(segments).where(_segment_key, segments.c.live_extents == literal_column("0")))
SEGMENT_USE = _sql(
    sa.select(segments.c.slot, segments.c.segment, segments.c.generation, segments.c.live_bytes)
    .where(segments.c.node == _p("node"), segments.c.slot == _p("slot"))
    .order_by(segments.c.segment, segments.c.generation)
)
BUFFERED_BYTES = _sql(
    sa.select(sa.func.coalesce(sa.func.sum(segments.c.live_bytes), literal_column("0"))).where(
        segments.c.node == _p("node")
    )
)
SEGMENT_EXTENTS = _sql(
    sa.select(
        extents.c.node, extents.c.slot, extents.c.segment, extents.c.generation, extents.c.offset, extents.c.length,
        extents.c.holder,
    )
    .where(extents.c.node == _p("node"), extents.c.slot == _p("slot"), extents.c.segment == _p("segment"))
    .order_by(extents.c.generation, extents.c.offset)
)  # fmt: skip

# -- uploads and parts
_upload_key = sa.and_(
    uploads.c.bucket == _p("bucket"), uploads.c.key == _p("key"), uploads.c.upload_id == _p("upload_id")
)
INSERT_UPLOAD = _sql(sa.insert(uploads))
UPLOAD = _sql(sa.select(uploads.c.record).where(_upload_key))
DELETE_UPLOAD = _sql(sa.delete(uploads).where(_upload_key))
UPLOADS = _sql(
    sa.select(uploads.c.record)
    .where(
        uploads.c.bucket == _p("bucket"),
        sa.tuple_(uploads.c.key, uploads.c.upload_id) > sa.tuple_(_p("after_key"), _p("after_id")),
        uploads.c.key >= _p("prefix"),
    )
    .order_by(uploads.c.key, uploads.c.upload_id)
    .limit(_limit)
    .offset(_none)
)
PUT_PART = _sql(
    sqlite.insert(parts)
    .values(
        upload_id=_p("upload_id"),
        number=_p("number"),
        object_id=_p("object_id"),
        settled=_p("settled"),
        record=_p("record"),
    )
    .on_conflict_do_update(
        index_elements=["upload_id", "number"],
        set_={"object_id": _p("object_id"), "settled": _p("settled"), "record": _p("record")},
    )
)
PART = _sql(
    sa.select(parts.c.record, parts.c.object_id, parts.c.settled).where(
        parts.c.upload_id == _p("upload_id"), parts.c.number == _p("number")
    )
)
PART_BY_ID = _sql(
    sa.select(parts.c.record, parts.c.upload_id, parts.c.number).where(parts.c.object_id == _p("object_id"))
)
PARTS = _sql(
    sa.select(parts.c.record, parts.c.object_id, parts.c.settled)
    .where(parts.c.upload_id == _p("upload_id"), parts.c.number > _p("after"))
    .order_by(parts.c.number)
    .limit(_limit)
    .offset(_none)
)
SETTLE_PART = _sql(sa.update(parts).where(parts.c.object_id == _p("of")).values(settled=_one, record=_p("record")))
DELETE_PARTS = _sql(sa.delete(parts).where(parts.c.upload_id == _p("upload_id")))
INSERT_UNSETTLED_PART = _sql(sa.insert(unsettled_parts))
UNSETTLED_PART = _sql(sa.select(unsettled_parts.c.object_id).where(unsettled_parts.c.part_id == _p("part_id")))
DELETE_UNSETTLED_PART = _sql(sa.delete(unsettled_parts).where(unsettled_parts.c.part_id == _p("part_id")))
UNSETTLED_PARTS_OF = _sql(sa.select(unsettled_parts.c.part_id).where(unsettled_parts.c.object_id == _p("object_id")))
DELETE_UNSETTLED_PARTS_OF = _sql(sa.delete(unsettled_parts).where(unsettled_parts.c.object_id == _p("object_id")))

# -- nodes
NODES = _sql(sa.select(nodes.c.record).order_by(nodes.c.node))
NODE = _sql(sa.select(nodes.c.record).where(nodes.c.node == _p("node")))
PUT_NODE = _sql(
    sqlite.insert(nodes)
    .values(node=_p("node"), record=_p("record"))
    .on_conflict_do_update(index_elements=["node"], set_={"record": _p("record")})
)
MIRROR = _sql(sa.select(mirrors.c.extents, mirrors.c.node).where(mirrors.c.object_id == _p("object_id")))
PUT_MIRROR = _sql(sa.insert(mirrors))
DELETE_MIRROR = _sql(sa.delete(mirrors).where(mirrors.c.object_id == _p("object_id")))
MIRRORS_HELD = _sql(
    sa.select(mirrors.c.object_id, mirrors.c.held_ns)
    .where(mirrors.c.node == _p("node"))
    .order_by(mirrors.c.held_ns)
    .limit(_limit)
    .offset(_none)
)
UNMIRRORED = _sql(
    sa.select(*RECORD_COLUMNS)
    .where(
        text("durability = 'mirror' AND mirror_node IS NULL AND state IN ('buffered', 'draining')"),
        _here,
        objects.c.sequence > _p("after"),
    )
    .order_by(objects.c.sequence)
    .limit(_limit)
    .offset(_none)
)
MIRRORED_BY = _sql(
    sa.select(*RECORD_COLUMNS)
    .where(text("mirror_node IS NOT NULL"), objects.c.mirror_node == _p("mirror"), _here)
    .limit(_limit)
    .offset(_none)
)

# -- reductions, tombstones, outcomes
_reduction_key = sa.and_(reductions.c.object_id == _p("of"), reductions.c.kernel == _p("of_kernel"))
INSERT_REDUCTION = _sql(sqlite.insert(reductions).on_conflict_do_nothing())
REDUCTION = _sql(sa.select(reductions.c.attempts).where(_reduction_key))
DELETE_REDUCTION = _sql(sa.delete(reductions).where(_reduction_key))
DELETE_REDUCTIONS_OF = _sql(sa.delete(reductions).where(reductions.c.object_id == _p("object_id")))
REDUCTION_FAILED = _sql(
    sa.update(reductions)
    .where(_reduction_key)
    .values(
        attempts=reductions.c.attempts + bindparam("counted", type_=sa.Integer),
        given_up=sa.func.max(reductions.c.given_up, bindparam("give_up", type_=sa.Integer)),
        error=_p("error"),
    )
)
DEFER_REDUCTION = _sql(sa.update(reductions).where(_reduction_key).values(released=literal_column("2")))
_pending_reductions = (
    sa.select(reductions.c.object_id, reductions.c.kernel, reductions.c.attempts, reductions.c.released)
    .where(reductions.c.given_up == literal_column("0"), reductions.c.released < literal_column("2"))
    .order_by(reductions.c.attempts, reductions.c.sequence)
    .limit(_limit)
    .offset(_none)
)
REDUCTIONS = _sql(_pending_reductions)
REDUCTIONS_OF_SLOT = _sql(_pending_reductions.where(reductions.c.slot == _p("slot")))
_of_node = text("reductions.slot BETWEEN :first AND :last")
_mirrored_here = text("+objects.mirror_node = :me")
ADOPTED_REDUCTIONS = _sql(
    sa.select(reductions.c.object_id, reductions.c.kernel, reductions.c.attempts, reductions.c.released)
    .select_from(reductions.join(objects, objects.c.object_id == reductions.c.object_id))
    .where(
        reductions.c.given_up == literal_column("0"),
        reductions.c.released < literal_column("2"),
        _of_node,
        _mirrored_here,
    )
    .order_by(reductions.c.attempts, reductions.c.sequence)
    .limit(_limit)
    .offset(_none)
)
"""What a node owes of versions whose second copy is here."""
OWED_AT_NODE = _sql(
    sa.select(reductions.c.kernel, sa.func.count())
    .select_from(reductions.join(objects, objects.c.object_id == reductions.c.object_id))
    .where(
        reductions.c.given_up == literal_column("0"),
        _of_node,
        text("+objects.mirror_node IS NULL AND +objects.bucket = :bucket AND +objects.key >= :start"),
        sa.or_(bindparam("end", type_=sa.LargeBinary).is_(None), text("+objects.key < :end")),
    )
    .group_by(reductions.c.kernel)
)
"""What a node owes of versions that nobody else has."""
REDUCTION_COUNTS = _sql(
    sa.select(
        reductions.c.kernel,
        reductions.c.given_up,
        reductions.c.error,
        sa.func.count(),
        sa.func.max(reductions.c.sequence),
        sa.func.max(objects.c.key),
    )
    .select_from(reductions.join(objects, objects.c.object_id == reductions.c.object_id))
    .where(text("+objects.bucket = :bucket"))  # the debts are few, the objects are not: see OWED_IN_RUN
    .group_by(reductions.c.kernel, reductions.c.given_up, reductions.c.error)
)
"""Errors are few and alike, so that the groups are few."""
RELEASED = _sql(
    sa.select(_one)
    .select_from(reductions)
    .where(text("released = 1 AND given_up = 0"), reductions.c.slot == _p("slot"))
    .limit(_one)
    .offset(_none)
)
_below = sa.and_(
    objects.c.object_id == reductions.c.object_id,
    text("+objects.bucket = :bucket"),
    objects.c.key >= _p("start"),
    sa.or_(bindparam("end", type_=sa.LargeBinary).is_(None), objects.c.key < _p("end")),
)
_member = sa.and_(
    _below,
    # Members of runs below this one are not its own.
    sa.func.instr(sa.func.substr(objects.c.key, bindparam("skip", type_=sa.Integer)), literal_column("x'2f'"))
    == literal_column("0"),
)
_in_run = sa.and_(
    _member,
    reductions.c.kernel == _p("kernel"),
)
# CROSS JOIN in effect: the reductions are few, so they come first ("+" keeps SQLite from the index over keys).
OWED_IN_RUN = _sql(
    sa.select(reductions.c.object_id)
    .select_from(reductions.join(objects, _in_run))
    .where(reductions.c.given_up == literal_column("0"))
    .limit(_limit)
    .offset(_none)
)
KERNELS_OWED_IN_RUN = _sql(
    sa.select(reductions.c.kernel)
    .select_from(reductions.join(objects, _member))
    .where(reductions.c.given_up == literal_column("0"))
    .limit(_limit)
    .offset(_none)
)
"""Once for each debt; what is given up has a product of the run that says so."""
_with_reason = (
    sa.select(objects.c.key, reductions.c.kernel, reductions.c.error, reductions.c.given_up)
    .select_from(reductions.join(objects, _below))
    .where(reductions.c.error != literal_column("''"))
    .limit(_limit)
    .offset(_none)
)
OWED_WITH_REASON = _sql(_with_reason.where(reductions.c.given_up == literal_column("0")))
FAILED_WITH_REASON = _sql(_with_reason.where(reductions.c.given_up == literal_column("1")))
FAILED_IN_RUN = _sql(
    sa.select(objects.c.key, reductions.c.error)
    .select_from(reductions.join(objects, _in_run))
    .where(reductions.c.given_up == literal_column("1"))
    .limit(_limit)
    .offset(_none)
)
INSERT_FILTER = _sql(sa.insert(filters))
DELETE_FILTER = _sql(sa.delete(filters).where(filters.c.object_id == _p("of")))
FILTER = _sql(sa.select(filters.c.given_up).where(filters.c.object_id == _p("of")))
FILTER_IF_JUDGED = _sql(
    sa.select(filters.c.given_up).where(
        filters.c.object_id == _p("of"),
        ~sa.exists(_one)
        .where(reductions.c.object_id == filters.c.object_id, reductions.c.given_up == literal_column("0"))
        .correlate(filters),
    )
)
"""A version may be owed again after its filter was found due: when a member judged together with it went."""
FILTER_FAILED = _sql(
    sa.update(filters)
    .where(filters.c.object_id == _p("of"))
    .values(
        attempts=filters.c.attempts + literal_column("1"),
        given_up=sa.func.max(filters.c.given_up, bindparam("give_up", type_=sa.Integer)),
        error=_p("error"),
    )
)
PUT_VERDICTS = _sql(
    sqlite.insert(filter_verdicts)
    .values(object_id=_p("object_id"), kernel=_p("kernel"), verdicts=_p("verdicts"))
    .on_conflict_do_update(index_elements=["object_id", "kernel"], set_={"verdicts": _p("verdicts")})
)
DELETE_VERDICTS = _sql(sa.delete(filter_verdicts).where(filter_verdicts.c.object_id == _p("of")))
VERDICTS = _sql(
    sa.select(filter_verdicts.c.kernel, filter_verdicts.c.verdicts).where(filter_verdicts.c.object_id == _p("of"))
)
UNJUDGED = _sql(sa.select(reductions.c.kernel).where(reductions.c.object_id == _p("of")))
"""Of a version whose filter is due: kernels that were given up; what is paid leaves no row."""
FILTERS_DUE = _sql(
    sa.select(filters.c.object_id, filters.c.attempts, filters.c.filters)
    .where(
        filters.c.given_up == literal_column("0"),
        filters.c.slot == _p("slot"),
        ~sa.exists(_one)
        .where(reductions.c.object_id == filters.c.object_id, reductions.c.given_up == literal_column("0"))
        .correlate(filters),
    )
    .order_by(filters.c.attempts, filters.c.sequence)
    .limit(_limit)
    .offset(_none)
)
ADOPTED_FILTERS = _sql(
    sa.select(filters.c.object_id, filters.c.attempts, filters.c.filters)
    .select_from(filters.join(objects, objects.c.object_id == filters.c.object_id))
    .where(
        filters.c.given_up == literal_column("0"),
        text("filters.slot BETWEEN :first AND :last"),
        _mirrored_here,
        ~sa.exists(_one)
        .where(reductions.c.object_id == filters.c.object_id, reductions.c.given_up == literal_column("0"))
        .correlate(filters),
    )
    .order_by(filters.c.attempts, filters.c.sequence)
    .limit(_limit)
    .offset(_none)
)
FILTERS_FAILED = _sql(
    sa.select(objects.c.key, filters.c.error)
    .select_from(filters.join(objects, objects.c.object_id == filters.c.object_id))
    .where(
        filters.c.given_up == literal_column("1"),
        text("+objects.bucket = :bucket"),
        objects.c.key >= _p("start"),
        sa.or_(bindparam("end", type_=sa.LargeBinary).is_(None), objects.c.key < _p("end")),
    )
    .limit(_limit)
    .offset(_none)
)
SET_DUE = _sql(sa.update(objects).where(objects.c.object_id == _p("of")).values(due_ns=_p("due_ns")))
MOVE_MEMBERSHIP = _sql(sa.update(members).where(members.c.object_id == _p("of")).values(object_id=_p("to")))
INSERT_NOTICE = _sql(sa.insert(notices))
DELETE_NOTICE = _sql(sa.delete(notices).where(notices.c.sequence == _p("sequence")))
COUNT_NOTICES = _sql(sa.select(sa.func.count()).select_from(notices))
NOTICE_COUNTS = _sql(sa.select(notices.c.target, sa.func.count()).group_by(notices.c.target))
NOTICES = _sql(
    sa.select(notices.c.sequence, notices.c.event)
    .where(notices.c.target == _p("target"))
    .order_by(notices.c.sequence)
    .limit(_limit)
    .offset(_none)
)
INSERT_TOMBSTONE = _sql(sqlite.insert(tombstones).on_conflict_do_nothing())
TOMBSTONES = _sql(
    sa.select(tombstones.c.sequence, tombstones.c.path, tombstones.c.bucket, tombstones.c.key, tombstones.c.object_id)
    .order_by(tombstones.c.sequence)
    .limit(_limit)
    .offset(_none)
)
DELETE_TOMBSTONE = _sql(sa.delete(tombstones).where(tombstones.c.sequence == _p("sequence")))

# -- runs
_run_key = sa.and_(runs.c.bucket == _p("of_bucket"), runs.c.run == _p("of_run"))
_product_key = sa.and_(run_products.c.bucket == _p("of_bucket"), run_products.c.run == _p("of_run"))
_run_columns = (runs.c.bucket, runs.c.run, runs.c.member_ns, runs.c.closed_ns, runs.c.closed_by)
RUN = _sql(sa.select(*_run_columns).where(_run_key))
RUNS = _sql(
    sa.select(*_run_columns)
    .where(runs.c.bucket == _p("bucket"), runs.c.run >= _p("prefix"), runs.c.run > _p("after"))
    .order_by(runs.c.run)
    .limit(_limit)
    .offset(_none)
)
RUNS_IDLE = _sql(
    sa.select(runs.c.run)
    .where(runs.c.bucket == _p("bucket"), text("closed_ns = 0"), runs.c.member_ns < _p("before_ns"))
    .limit(_limit)
    .offset(_none)
)
INSERT_RUN = _sql(sa.insert(runs))
RUN_GREW = _sql(
    sa.update(runs)
    .where(_run_key)
    .values(member_ns=_p("member_ns"), closed_ns=literal_column("0"), closed_by=literal_column("''"))
)
CLOSE_RUN = _sql(sa.update(runs).where(_run_key).values(closed_ns=_p("closed_ns"), closed_by=_p("closed_by")))
DELETE_RUN = _sql(sa.delete(runs).where(_run_key))
DELETE_RUNS = _sql(sa.delete(runs).where(runs.c.bucket == _p("name")))
DELETE_RUN_PRODUCTS = _sql(sa.delete(run_products).where(run_products.c.bucket == _p("name")))
RUN_PRODUCT_CHANGED = _sql(
    sqlite.insert(run_products)
    .values(bucket=_p("bucket"), run=_p("run"), kernel=_p("kernel"), changed=_p("changed"), stored=literal_column("0"))
    .on_conflict_do_update(index_elements=["bucket", "run", "kernel"], set_={"changed": _p("changed")})
)
RUN_CHANGED = _sql(sa.update(run_products).where(_product_key).values(changed=_p("changed")))
RUN_PRODUCT_STORED = _sql(
    sa.update(run_products)
    .where(_product_key, run_products.c.kernel == _p("of_kernel"))
    .values(stored=sa.func.max(run_products.c.stored, bindparam("reflects", type_=sa.BigInteger)))
)
DELETE_RUN_PRODUCT = _sql(
    sa.delete(run_products).where(
        _product_key, run_products.c.kernel == _p("of_kernel"), run_products.c.changed <= _p("reflects")
    )
)
RUN_PRODUCT = _sql(
    sa.select(run_products.c.changed, run_products.c.stored).where(
        _product_key, run_products.c.kernel == _p("of_kernel")
    )
)
RUN_PRODUCTS_OF = _sql(
    sa.select(run_products.c.kernel, run_products.c.changed, run_products.c.stored).where(_product_key)
)
RUN_PRODUCTS_DUE = _sql(
    sa.select(run_products.c.kernel, run_products.c.changed, run_products.c.stored, *_run_columns)
    .select_from(
        run_products.join(runs, sa.and_(runs.c.bucket == run_products.c.bucket, runs.c.run == run_products.c.run))
    )
    .where(text("changed > stored"))
    .order_by(run_products.c.changed)
    .limit(_limit)
    .offset(_none)
)

INSERT_PARTIAL = _sql(sa.insert(partials))
DELETE_PARTIAL = _sql(sa.delete(partials).where(partials.c.object_id == _p("of")))
_partial_columns = (
    partials.c.bucket, partials.c.run, partials.c.kernel, partials.c.group_id, partials.c.since, partials.c.members,
    partials.c.batch,
)  # fmt: skip
PARTIAL = _sql(sa.select(*_partial_columns).where(partials.c.object_id == _p("of")))
PARTIALS_OF_RUN = _sql(
    sa.select(
        partials.c.object_id, partials.c.group_id, partials.c.since, partials.c.members, partials.c.batch,
        objects.c.key, objects.c.length,
    )
    .select_from(partials.join(objects, objects.c.object_id == partials.c.object_id))
    .where(partials.c.bucket == _p("bucket"), partials.c.run == _p("run"), partials.c.kernel == _p("kernel"))
)  # fmt: skip
RUN_HAS_PARTIAL = _sql(
    sa.select(_one)
    .select_from(partials)
    .where(partials.c.bucket == _p("bucket"), partials.c.run == _p("run"), partials.c.kernel == _p("kernel"))
    .limit(_one)
    .offset(_none)
)
PUT_MEMBER = _sql(
    sqlite.insert(members)
    .values(object_id=_p("object_id"), kernel=_p("kernel"), partial=_p("partial"))
    .on_conflict_do_update(index_elements=["object_id", "kernel"], set_={"partial": _p("partial")})
)
NOTE_KERNELS = _sql(
    sqlite.insert(noncurrent_kernels)
    .from_select(
        ["object_id", "kernel"],
        sa.union_all(
            sa.select(members.c.object_id, members.c.kernel).where(members.c.object_id == _p("of")),
            sa.select(reductions.c.object_id, reductions.c.kernel).where(reductions.c.object_id == _p("of")),
        ),
    )
    .on_conflict_do_nothing()
)
NOTED_KERNELS = _sql(
    sa.select(noncurrent_kernels.c.kernel)
    .where(noncurrent_kernels.c.object_id == _p("of"))
    .order_by(noncurrent_kernels.c.kernel)
)
FORGET_KERNELS = _sql(sa.delete(noncurrent_kernels).where(noncurrent_kernels.c.object_id == _p("of")))
PARTIALS_OF_MEMBER = _sql(sa.select(members.c.partial).where(members.c.object_id == _p("object_id")))
MEMBERS_OF_PARTIAL = _sql(sa.select(members.c.object_id).where(members.c.partial == _p("of")))
KEYS_OF_PARTIAL = _sql(
    sa.select(objects.c.key)
    .select_from(members.join(objects, objects.c.object_id == members.c.object_id))
    .where(members.c.partial == _p("of"))
)
DELETE_MEMBER = _sql(sa.delete(members).where(members.c.object_id == _p("of"), members.c.partial == _p("of_partial")))
SET_PARTIAL_MEMBERS = _sql(sa.update(partials).where(partials.c.object_id == _p("of")).values(members=_p("members")))
COUNT_MEMBERS = _sql(sa.select(sa.func.count()).select_from(members).where(members.c.partial == _p("of")))
DELETE_MEMBERS = _sql(sa.delete(members).where(members.c.partial == _p("of")))
MOVE_MEMBERS = _sql(sa.update(members).where(members.c.partial == _p("of")).values(partial=_p("to")))
PUT_OUTCOME = _sql(
    sqlite.insert(outcomes)
    .values(sequence=_p("sequence"), object_id=_p("object_id"), kind=_p("kind"), record=_p("record"))
    .on_conflict_do_nothing()
)
OUTCOME = _sql(
    sa.select(outcomes.c.record).where(outcomes.c.object_id == _p("object_id"), outcomes.c.kind == _p("kind"))
)
SEEN = _sql(
    sa.union_all(
        sa.select(_one).select_from(objects).where(objects.c.object_id == _p("object_id")),
        sa.select(_one).select_from(outcomes).where(outcomes.c.object_id == _p("object_id")),
    )
)
"""A row for an id that is, or lately was, a version's or a part's."""
TRIM_OUTCOMES = _sql(sa.delete(outcomes).where(outcomes.c.sequence <= _p("sequence")))

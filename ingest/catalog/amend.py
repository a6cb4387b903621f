"""What may change of a version after its commit: tags, storage class, restores. Decisions, and their effect on the index.

In: the mutations AmendObject and RestoreObject, and the end of a recall. Out: entries that carry the whole new
``VersionAttributes``, so applying one decides nothing. A version that was deleted or replaced meanwhile is refused
(StaleVersion): nothing here reaches the version after it.

The table ``evictions`` says from when on a buffered copy should go (``due_ns``), whatever the watermarks say; while that lies
ahead, the watermarks leave the copy alone.
"""

from __future__ import annotations

import sqlite3

import msgspec

from ingest.catalog import entries as e
from ingest.catalog import rows, statements, wire
from ingest.errors import RestoreInProgress, StaleVersion
from ingest.records import ObjectRecord, ObjectState, VersionAttributes
from ingest.storage_class import ARCHIVE_ONLY, GONE, days_from, restored, restoring


def amend(record: ObjectRecord, mutation: wire.AmendObject, now_ns: int) -> e.ObjectAmended | None:
    """None: nothing changes. Raises StaleVersion for what cannot be amended."""
    if record.delete_marker:
        raise StaleVersion("a delete marker has no attributes")
    attributes = record.attributes
    if mutation.tags is not None:
        attributes = msgspec.structs.replace(attributes, tags=mutation.tags)
    if mutation.storage_class is not None:
        attributes = msgspec.structs.replace(attributes, storage_class=mutation.storage_class)
    if mutation.acl is not None:
        attributes = msgspec.structs.replace(attributes, acl=mutation.acl)
    if attributes == record.attributes:
        return None
    moved = attributes.storage_class != record.attributes.storage_class and attributes.storage_class in ARCHIVE_ONLY
    drain_ns = now_ns if moved and record.state is ObjectState.BUFFERED else 0
    return e.ObjectAmended(record.object_id, attributes, _evict_ns(attributes, record, now_ns), drain_ns=drain_ns)


def restore(record: ObjectRecord, mutation: wire.RestoreObject, now_ns: int) -> e.ObjectAmended:
    """Recall for a number of days; of a version that is in the buffer, only the days change.

    Raises RestoreInProgress."""
    if restoring(record):
        raise RestoreInProgress("the restore that was asked for before has not ended")
    attributes = msgspec.structs.replace(
        record.attributes, restore_days=mutation.days, restore_day_s=mutation.day_s, restored_until_ns=0
    )
    if record.state is ObjectState.EVICTED:
        return e.ObjectAmended(record.object_id, attributes, None, recall_ns=now_ns)
    if record.state is ObjectState.RECALLING:
        return e.ObjectAmended(record.object_id, attributes, None)
    attributes = _restored(attributes, now_ns)
    return e.ObjectAmended(record.object_id, attributes, attributes.restored_until_ns)


def recalled(record: ObjectRecord, now_ns: int) -> VersionAttributes | None:
    """Attributes of a version that has come back; None where it was recalled to be read, and not restored."""
    return _restored(record.attributes, now_ns) if record.attributes.restore_days else None


def _restored(attributes: VersionAttributes, now_ns: int) -> VersionAttributes:
    until_ns = days_from(now_ns, attributes.restore_days, attributes.restore_day_s)
    return msgspec.structs.replace(attributes, restore_days=0, restored_until_ns=until_ns)


def _evict_ns(attributes: VersionAttributes, record: ObjectRecord, now_ns: int) -> int | None:
    if restored(record, now_ns):
        return attributes.restored_until_ns
    return GONE if attributes.storage_class in ARCHIVE_ONLY else None


class AmendIndex:
    """Applies what was decided above."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._db = database

    def set_attributes(self, record: ObjectRecord, attributes: VersionAttributes, evict_ns: int | None) -> None:
        changed = msgspec.structs.replace(record, attributes=attributes)
        detail = rows.encode(rows.detail_of(changed))
        self._db.execute(statements.SET_DETAIL, {"of": record.sequence, "detail": detail})
        self.schedule(record.object_id, evict_ns)

    def drain_by(self, record: ObjectRecord, time_ns: int) -> None:
        self._db.execute(statements.DRAIN_NOW, {"of": record.sequence, "now_ns": time_ns})

    def schedule(self, object_id: bytes, evict_ns: int | None) -> None:
        """When the buffered copy goes; None: when the watermarks say so."""
        if evict_ns is None:
            self._db.execute(statements.DELETE_EVICTION, {"of": object_id})
        else:
            self._db.execute(statements.PUT_EVICTION, {"object_id": object_id, "due_ns": evict_ns})

    def committed(self, record: ObjectRecord) -> None:
        if record.attributes.storage_class in ARCHIVE_ONLY:
            self.schedule(record.object_id, GONE)
            self.drain_by(record, record.modified_ns)

"""Events for bucket notifications, made where mutations are decided: each is an entry of the same batch as what it tells of.

So an event is as durable as its cause, and one whose cause was never committed is never sent. The deliverer (gateway/notify.py)
reads them from the table ``notices`` and says which are done. In a bucket without notifications a mutation costs one look into
a dictionary here. Where NOTICES_MAX wait already, further ones are dropped and counted: a dead endpoint must not fill the node.
"""

from __future__ import annotations

import sqlite3

from ingest.catalog import entries as e
from ingest.catalog import statements, wire
from ingest.catalog.reader import Reader
from ingest.counters import Counters
from ingest.errors import IngestError
from ingest.notification import TARGETS, Happened, notices, test_events
from ingest.origin import Origin
from ingest.records import BucketRecord

NOTICES_MAX = 100_000


class NoticeMaker:
    """One for the process that decides. ``forget`` after a batch was taken back."""

    def __init__(self, database: sqlite3.Connection, reader: Reader, counters: Counters) -> None:
        self._db = database
        self._reader = reader
        self._buckets: dict[str, BucketRecord | None] = {}
        self._waiting: int | None = None
        self._dropped = counters.cell("hiss_notifications_dropped_total")

    def forget(self) -> None:
        self._buckets.clear()
        self._waiting = None

    def of(
        self, mutation: wire.Mutation, entry: e.Entry, origin: Origin | None, sequence: int, now_ns: int
    ) -> list[e.Noticed]:
        """Entries to follow ``entry``, which is applied already. Never raises: an event is never worth a commit."""
        if isinstance(entry, e.NoticesDone):
            self._waiting = None
            return []
        if isinstance(entry, e.BucketCreated | e.BucketDeleted | e.BucketConfigured | e.BucketTagged):
            self._buckets.clear()
        try:
            found = self._found(mutation, entry, origin, sequence, now_ns)
        except (IngestError, ValueError):
            self._dropped.add()
            return []
        return [e.Noticed(*notice) for notice in found if self._room()]

    def _found(
        self, mutation: wire.Mutation, entry: e.Entry, origin: Origin | None, sequence: int, now_ns: int
    ) -> list[tuple[str, bytes]]:
        if isinstance(entry, e.BucketConfigured):
            changed = entry.documents.get("notification") is not None
            return list(test_events(self._reader.bucket(entry.name), origin, now_ns)) if changed else []
        name = self._bucket_of(mutation, entry)
        bucket = self._bucket(name) if name else None
        if bucket is None:
            return []
        return [
            notice
            for happened in self._happened(mutation, entry, origin)
            for notice in notices(bucket, happened, origin, sequence, now_ns)
        ]

    def _bucket_of(self, mutation: wire.Mutation, entry: e.Entry) -> str:
        match mutation:
            case wire.Commit() | wire.Complete() | wire.Delete():
                return mutation.request.bucket
            case wire.AmendObject() | wire.RestoreObject() | wire.MarkRecalled():
                return self._reader.by_id(mutation.object_id).bucket
            case _:
                return ""

    def _happened(self, mutation: wire.Mutation, entry: e.Entry, origin: Origin | None) -> list[Happened]:
        match entry:
            case e.ObjectCommitted(record=record) if record.raw is None:
                method = origin.method if origin else "Put"
                return [Happened(f"ObjectCreated:{method}", record.key, record.version_id, record)]
            case e.UploadCompleted(record=record):
                return [Happened("ObjectCreated:CompleteMultipartUpload", record.key, record.version_id, record)]
            case e.ObjectAppended(record=record):
                whole = self._reader.by_id(record.object_id)
                return [Happened("ObjectCreated:Put", record.key, record.version_id, whole)]
            case e.MarkerCommitted(record=record):
                return [Happened(f"{_gone(origin)}:DeleteMarkerCreated", record.key, record.version_id)]
            case e.ObjectDeleted() if isinstance(mutation, wire.Delete):
                return [Happened(f"{_gone(origin)}:Delete", entry.key, mutation.request.version_id or "")]
            case e.ObjectAmended() if isinstance(mutation, wire.AmendObject):
                return self._amended(mutation)
            case e.ObjectAmended():
                return self._restore_asked(entry)
            case e.Recalled(attributes=attributes) if attributes is not None:
                record = self._reader.by_id(entry.object_id)
                return [Happened("ObjectRestore:Completed", record.key, record.version_id, record)]
            case _:
                return []

    def _amended(self, mutation: wire.AmendObject) -> list[Happened]:
        record = self._reader.by_id(mutation.object_id)
        found = []
        if mutation.tags is not None:
            found.append("ObjectTagging:Put" if mutation.tags else "ObjectTagging:Delete")
        if mutation.storage_class is not None:
            found.append("LifecycleTransition")
        return [Happened(event, record.key, record.version_id, record) for event in found]

    def _restore_asked(self, entry: e.ObjectAmended) -> list[Happened]:
        record = self._reader.by_id(entry.object_id)
        events = ["ObjectRestore:Post"]
        if not entry.attributes.restore_days:
            events.append("ObjectRestore:Completed")
        return [Happened(event, record.key, record.version_id, record) for event in events]

    def _bucket(self, name: str) -> BucketRecord | None:
        """The bucket, if it reports anything."""
        if name not in self._buckets:
            record = self._reader.bucket(name)
            self._buckets[name] = record if TARGETS.of(record) else None
        return self._buckets[name]

    def _room(self) -> bool:
        if self._waiting is None:
            (self._waiting,) = self._db.execute(statements.COUNT_NOTICES).fetchone()
        if self._waiting >= NOTICES_MAX:
            self._dropped.add()
            return False
        self._waiting += 1
        return True


def _gone(origin: Origin | None) -> str:
    return "LifecycleExpiration" if origin is not None and origin.lifecycle else "ObjectRemoved"

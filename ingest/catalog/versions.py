"""Decisions about the versions of a key: where a new one goes, what a delete does, what a lock forbids.

In: a request, the index with every earlier mutation of the batch applied, the time. Out: a place, an entry, or a refusal. Reads
only. Always holds: of a key's versions the newest is the current one, unless it is a delete marker; a locked version goes by no
request of anybody, whoever asks and by whatever way.
https://docs.aws.amazon.com/AmazonS3/latest/userguide/DeletingObjectVersions.html, object-lock-managing.html beside it.
"""

from __future__ import annotations

import dataclasses
import sqlite3

import msgspec

from ingest import versioning
from ingest.catalog import entries as e
from ingest.catalog import rows, statements, wire
from ingest.errors import DeleteMarker, InvalidLock, NoSuchKey, NoSuchVersion, PreconditionFailed, VersionLocked
from ingest.records import (
    NULL_VERSION,
    BucketRecord,
    Deleted,
    DeleteObject,
    LockMode,
    ObjectRecord,
    ObjectState,
    Retention,
    Versioning,
)
from ingest.states import Event, transition


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What deciding about a version needs to know of it."""

    sequence: int
    version_id: str
    etag: str
    delete_marker: int
    object_id: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a new version of a key goes."""

    version_id: str
    replaces: int | None = None
    """Sequence of the version that goes for it."""
    supersedes: int | None = None
    """Sequence of the version that is current no more."""


def version_name(object_id: bytes) -> str:
    """The version id of a version that is not the null one."""
    return object_id.hex()


def named_object(version_id: str) -> bytes | None:
    """The object id that a version id names; None for ``null`` and for what is none of ours."""
    try:
        found = bytes.fromhex(version_id)
    except ValueError:
        return None
    return found if len(found) == 16 and version_name(found) == version_id else None


class Versions:
    def __init__(self, database: sqlite3.Connection) -> None:
        self._db = database

    # -- what there is
    def newest(self, bucket: str, key: bytes) -> Facts | None:
        """The current version of a key, or the delete marker that hides what is below it."""
        of = {"bucket": bucket, "key": key, "limit": 1}
        row = self._db.execute(statements.NEWEST, of).fetchone()
        return None if row is None else Facts(*row)

    def _null(self, bucket: str, key: bytes, newest: Facts | None) -> Facts | None:
        if newest is None or newest.version_id == NULL_VERSION:
            return newest
        row = self._db.execute(statements.NULL_HIDDEN, {"bucket": bucket, "key": key}).fetchone()
        return None if row is None else Facts(*row)

    def _named(self, bucket: str, key: bytes, version_id: str, newest: Facts | None) -> Facts | None:
        if version_id == NULL_VERSION:
            return self._null(bucket, key, newest)
        record = self._record(version_id)
        if record is None or (record.bucket, record.key) != (bucket, key):
            return None
        return Facts(record.sequence, version_id, record.etag, record.delete_marker, record.object_id)

    def _record(self, version_id: str) -> ObjectRecord | None:
        object_id = named_object(version_id)
        row = object_id and self._db.execute(statements.BY_ID, {"object_id": object_id}).fetchone()
        record = rows.object_record(row) if row else None
        return record if record is not None and record.version_id == version_id else None

    # -- a new version
    def place(self, bucket: BucketRecord, key: bytes, object_id: bytes, newest: Facts | None) -> Place:
        kind = versioning.versioning_of_key(bucket, key)
        covered = None if newest is None or newest.delete_marker else newest.sequence
        if kind is Versioning.ENABLED:
            return Place(version_name(object_id), supersedes=covered)
        null = self._null(bucket.name, key, newest)
        replaces = None if null is None else null.sequence
        return Place(NULL_VERSION, replaces, None if covered == replaces else covered)

    def lock(
        self, bucket: BucketRecord, key: bytes, retention: Retention | None, legal_hold: bool, now_ns: int
    ) -> Retention | None:
        """The retention of a new version. Raises InvalidLock for a wish that the bucket cannot grant."""
        lock = versioning.lock_of(bucket)
        if lock is None or versioning.versioning_of_key(bucket, key) is not Versioning.ENABLED:
            if retention is not None or legal_hold:
                raise InvalidLock("Bucket is missing Object Lock Configuration")
            return None
        if retention is not None:
            if retention.until_ns <= now_ns:
                raise InvalidLock("The retain until date must be in the future!")
            return retention
        return None if lock.default is None else lock.default.from_ns(now_ns)

    # -- deleting
    def delete(
        self, bucket: BucketRecord, request: DeleteObject, sequence: int, now_ns: int
    ) -> e.ObjectDeleted | e.MarkerCommitted | Deleted:
        """What a delete does; ``Deleted``: nothing, that is the answer. Raises PreconditionFailed, VersionLocked."""
        newest = self.newest(request.bucket, request.key)
        kind = versioning.versioning_of_key(bucket, request.key)
        if request.version_id is None and kind is not Versioning.OFF:
            return self._mark(bucket, request, newest, sequence, now_ns)
        wanted = request.version_id or NULL_VERSION
        found = self._named(request.bucket, request.key, wanted, newest)
        shown = request.version_id or ""
        current = newest is not None and found is not None and found.sequence == newest.sequence
        if found is None or (request.object_id and found.object_id != request.object_id):
            if request.if_match:
                raise PreconditionFailed("If-Match")
            return Deleted(existed=False, version_id=shown)
        if current and request.if_noncurrent:
            return Deleted(existed=False, version_id=shown)
        _check_match(request, found)
        if versioning.lock_of(bucket) is not None and not request.lost:
            self._check_lock(found, now_ns, bypass=request.bypass_governance)
        uncovers = self._below(request) if current and kind is not Versioning.OFF else None
        return e.ObjectDeleted(found.sequence, request.key, Deleted(True, shown, bool(found.delete_marker)), uncovers)

    def _below(self, request: DeleteObject) -> int | None:
        """The version that is current once the newest has gone."""
        of = {"bucket": request.bucket, "key": request.key, "limit": 2}
        found = [Facts(*row) for row in self._db.execute(statements.NEWEST, of).fetchall()]
        return found[1].sequence if len(found) > 1 and not found[1].delete_marker else None

    def _mark(
        self, bucket: BucketRecord, request: DeleteObject, newest: Facts | None, sequence: int, now_ns: int
    ) -> e.MarkerCommitted | Deleted:
        before = self._db.execute(statements.BY_ID, {"object_id": request.marker_id}).fetchone()
        if before is not None:
            return Deleted(True, rows.object_record(before).version_id, True)
        if request.object_id and (newest is None or newest.object_id != request.object_id):
            return Deleted(existed=False)
        if request.if_match:
            if newest is None or newest.delete_marker:
                raise PreconditionFailed("If-Match")
            _check_match(request, newest)
        place = self.place(bucket, request.key, request.marker_id, newest)
        marker = ObjectRecord(
            bucket=request.bucket,
            key=request.key,
            version_id=place.version_id,
            object_id=request.marker_id,
            sequence=sequence,
            state=transition(ObjectState.RECEIVING, Event.MARK),
            length=0,
            stored_length=0,
            etag="",
            crc64nvme=0,
            modified_ns=now_ns,
            owner=bucket.owner,
            delete_marker=True,
        )
        return e.MarkerCommitted(marker, place.replaces, place.supersedes)

    # -- locks
    def _check_lock(self, found: Facts, now_ns: int, *, bypass: bool) -> None:
        record = rows.object_record(self._db.execute(statements.BY_SEQUENCE, {"sequence": found.sequence}).fetchone())
        if record.legal_hold:
            raise VersionLocked("legal hold")
        if _holds(record.retention, now_ns, bypass=bypass):
            raise VersionLocked("retention")

    def set_lock(self, bucket: BucketRecord, request: wire.SetLock, now_ns: int) -> e.VersionLockSet | None:
        """None: it is as asked for. Raises InvalidLock, VersionLocked, NoSuchKey, NoSuchVersion."""
        if versioning.lock_of(bucket) is None:
            raise InvalidLock("Bucket is missing Object Lock Configuration")
        if versioning.versioning_of_key(bucket, request.key) is Versioning.OFF:
            raise InvalidLock("Products can be made again; they cannot be locked")
        found = self._lockable(request)
        row = self._db.execute(statements.BY_SEQUENCE, {"sequence": found.sequence}).fetchone()
        record = rows.object_record(row)
        retention, legal_hold = record.retention, record.legal_hold
        if request.retention is not None:
            (wanted,) = request.retention
            if wanted is not None and wanted.until_ns <= now_ns:
                raise InvalidLock("The retain until date must be in the future!")
            if _weakens(wanted, retention) and _holds(retention, now_ns, bypass=request.bypass_governance):
                raise VersionLocked("retention")
            retention = wanted
        if request.legal_hold is not None:
            legal_hold = request.legal_hold
        if (retention, legal_hold) == (record.retention, record.legal_hold):
            return None
        return e.VersionLockSet(found.sequence, retention, legal_hold)

    def _lockable(self, request: wire.SetLock) -> Facts:
        newest = self.newest(request.bucket, request.key)
        if request.version_id is not None:
            found = self._named(request.bucket, request.key, request.version_id, newest)
            if found is None:
                raise NoSuchVersion(request.version_id)
        elif newest is None or newest.delete_marker:
            raise NoSuchKey(request.key.decode("utf-8", "replace"))
        else:
            found = newest
        if found.delete_marker:
            raise DeleteMarker(found.version_id)
        return found


def check_conditions(key: bytes, newest: Facts | None, if_none_match: str, if_match: str) -> None:
    """Of a write. Raises PreconditionFailed, or NoSuchKey for If-Match on a key that is not there."""
    etag = None if newest is None or newest.delete_marker else newest.etag
    if if_none_match and etag is not None and if_none_match in ("*", etag):
        raise PreconditionFailed("If-None-Match")
    if if_match:
        if etag is None:
            raise NoSuchKey(key.decode("utf-8", "replace"))
        if if_match not in ("*", etag):
            raise PreconditionFailed("If-Match")


def _holds(retention: Retention | None, now_ns: int, *, bypass: bool) -> bool:
    if retention is None or retention.until_ns <= now_ns:
        return False
    return retention.mode is LockMode.COMPLIANCE or not bypass


def _weakens(wanted: Retention | None, present: Retention | None) -> bool:
    """Anything but a later date in the same mode needs what lifting the retention needs."""
    if present is None:
        return False
    return wanted is None or wanted.mode is not present.mode or wanted.until_ns < present.until_ns


def _check_match(request: DeleteObject, found: Facts) -> None:
    if request.if_match and request.if_match not in ("*", found.etag):
        raise PreconditionFailed("If-Match")


def locked_detail(blob: bytes, retention: Retention | None, legal_hold: bool) -> bytes:
    """A version's ``detail`` with another lock."""
    detail = msgspec.structs.replace(rows.decode_detail(blob), retention=retention, legal_hold=legal_hold)
    return rows.encode(detail)

"""The index: journal entries applied to SQLite. The only code that writes the database.

In: an entry and its sequence. Out: the changed tables, and the extents that lost their last reference.
Applying decides nothing and reads no clock: live commits and replay run the same lines, so a rebuilt index is identical.
``applied_sequence`` changes in the same transaction as the effects.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from ingest import bucket_documents
from ingest.catalog import entries as e
from ingest.catalog import rows, statements
from ingest.catalog.amend import AmendIndex
from ingest.catalog.charges import ChargeIndex
from ingest.catalog.runs import RunIndex
from ingest.catalog.versions import locked_detail
from ingest.cluster import places
from ingest.errors import StaleVersion
from ingest.records import Extent, ObjectRecord, ObjectState
from ingest.runs import run_of
from ingest.states import Event, transition

OUTCOMES_KEPT = 100_000
"""Journal entries for which a commit that is sent again is still recognised after its version has gone."""
_TRIM_EVERY = 1024

_CHAIN = "log_chain"
"""Name of the chain in ``meta``."""


class Index:
    """Applies entries on one connection; the caller holds the transaction."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._db = database
        self._freed: list[Extent] = []
        self._runs = RunIndex(database, self._delete)
        self._amend = AmendIndex(database)
        self._charges = ChargeIndex(database)
        self._apply: dict[type, Callable[[int, Any], None]] = {
            e.BucketCreated: self._bucket_created,
            e.BucketDeleted: self._bucket_deleted,
            e.BucketTagged: self._bucket_tagged,
            e.BucketConfigured: self._bucket_configured,
            e.UserPut: self._user_put,
            e.ReservationPut: lambda _, entry: self._charges.put(entry),
            e.ObjectCommitted: self._object_committed,
            e.ObjectAppended: self._object_appended,
            e.MarkerCommitted: self._marker_committed,
            e.VersionLockSet: self._version_lock_set,
            e.UploadCreated: self._upload_created,
            e.PartCommitted: self._part_committed,
            e.UploadCompleted: self._upload_completed,
            e.UploadAborted: self._upload_aborted,
            e.ObjectDeleted: self._object_deleted,
            e.Settled: self._settled,
            e.LedgerAmended: self._ledger_amended,
            e.DrainClaimed: self._drain_claimed,
            e.Drained: self._drained,
            e.DrainFailed: self._drain_failed,
            e.Evicted: self._evicted,
            e.RecallRequested: self._recall_requested,
            e.Recalled: self._recalled,
            e.RecallFailed: self._recall_failed,
            e.Relocated: self._relocated,
            e.ObjectAmended: self._object_amended,
            e.Noticed: self._noticed,
            e.NoticesDone: self._notices_done,
            e.ArchiveDeleted: self._archive_deleted,
            e.ArchiveMoved: self._archive_moved,
            e.ReductionFailed: self._reduction_failed,
            e.FilterEnded: self._filter_ended,
            e.NodePut: self._node_put,
            e.MirrorHeld: self._mirror_held,
            e.MirrorsDropped: self._mirrors_dropped,
            e.Mirrored: self._mirrored,
            e.RunClosed: self._runs.closed,
            e.RunStored: lambda _, entry: self._runs.stored(entry),
            e.ReductionsDeferred: self._runs.deferred,
        }

    def apply(self, sequence: int, entry: e.Entry) -> list[Extent]:
        """Make the entry's effect; returns the extents nobody refers to any more. Raises sqlite3.Error."""
        self._freed = []
        self._apply[type(entry)](sequence, entry)
        if sequence % _TRIM_EVERY == 0:
            self._db.execute(statements.TRIM_OUTCOMES, {"sequence": sequence - OUTCOMES_KEPT})
        return self._freed

    def forget(self) -> None:
        """The transaction was rolled back: what was applied in it never was."""
        self._charges.forget()

    def set_applied(self, sequence: int) -> None:
        self._db.execute(statements.SET_APPLIED, {"sequence": sequence})

    # -- buckets and users
    def _bucket_created(self, _: int, entry: e.BucketCreated) -> None:
        self._db.execute(statements.PUT_BUCKET, {"name": entry.record.name, "record": rows.encode(entry.record)})

    def _bucket_deleted(self, _: int, entry: e.BucketDeleted) -> None:
        self._db.execute(statements.DELETE_BUCKET, {"name": entry.name})
        self._runs.bucket_deleted(entry.name)
        self._charges.bucket_deleted(entry.name)

    def _bucket_tagged(self, _: int, entry: e.BucketTagged) -> None:
        (blob,) = self._one(statements.BUCKET, name=entry.name)
        record = msgspec.structs.replace(rows.decode_bucket(blob), tags=entry.tags)
        self._db.execute(statements.PUT_BUCKET, {"name": entry.name, "record": rows.encode(record)})
        if entry.drain_after_ns is not None:
            self._db.execute(statements.RESCHEDULE_BUCKET, {"name": entry.name, "drain_after_ns": entry.drain_after_ns})

    def _bucket_configured(self, _: int, entry: e.BucketConfigured) -> None:
        (blob,) = self._one(statements.BUCKET, name=entry.name)
        record = rows.decode_bucket(blob)
        documents = bucket_documents.changed(record.documents, entry.documents)
        record = msgspec.structs.replace(record, documents=documents)
        self._db.execute(statements.PUT_BUCKET, {"name": entry.name, "record": rows.encode(record)})

    def _user_put(self, _: int, entry: e.UserPut) -> None:
        user = entry.user
        of = {"user_id": user.user_id}
        self._db.execute(statements.PUT_USER, of | {"record": rows.encode(user)})
        self._db.execute(statements.DELETE_KEYS_OF_USER, of)
        for key in user.keys:
            self._db.execute(statements.PUT_KEY_OF_USER, of | {"access_key": key.access_key})

    # -- objects
    def _object_committed(self, sequence: int, entry: e.ObjectCommitted) -> None:
        record = entry.record
        # Before the replaced version lets go: a copy onto itself shares that version's extents.
        charge = self._charges.of(record.bucket, record.modified_ns)
        for extent in record.extents:
            self._hold(extent, record.object_id, charge)
        self._link_mirror(record.object_id, record.mirror)
        if entry.supersedes is not None:
            self._supersede(sequence, entry.supersedes, raw_of=record)
        elif record.raw is not None:
            # What is left of a member is the member: its run stays as it is.
            self._db.execute(statements.MOVE_MEMBERSHIP, {"of": record.raw.object_id, "to": record.object_id})
        self._insert(sequence, record, entry.due_ns, entry.replaces, entry.reductions, filters=entry.filters)
        if entry.reduces is not None:
            source, kernel = entry.reduces
            if entry.verdicts:
                found = {"object_id": source, "kernel": kernel, "verdicts": entry.verdicts}
                self._db.execute(statements.PUT_VERDICTS, found)
            self._db.execute(statements.DELETE_REDUCTION, {"of": source, "of_kernel": kernel})
        if entry.partial is not None:
            self._runs.partial_committed(sequence, record, entry.partial)
        if entry.run_product is not None:
            self._runs.product_committed(record.bucket, entry.run_product)

    def _insert(
        self,
        sequence: int,
        record: ObjectRecord,
        due_ns: int,
        replaces: int | None,
        reductions: tuple[str, ...],
        *,
        filters: dict[str, str],
    ) -> None:
        path: str | None = None
        if replaces is not None:
            # A copy that the replaced version left in the archive lies where this version's will be published; a later
            # delete must know of it.
            (path,) = self._one(statements.PUBLISHED, sequence=replaces)
            self._remove(sequence, replaces)
        self._db.execute(statements.INSERT_OBJECT, rows.object_row(record, due_ns, path))
        slot = places.of_extents(record.extents)
        for kernel in reductions:
            self._db.execute(
                statements.INSERT_REDUCTION,
                {
                    "object_id": record.object_id,
                    "kernel": kernel,
                    "sequence": sequence,
                    "slot": slot,
                    "attempts": 0,
                    "given_up": 0,
                    "error": "",
                    "released": 0,
                },
            )
        if filters:
            self._db.execute(
                statements.INSERT_FILTER,
                {
                    "object_id": record.object_id,
                    "sequence": sequence,
                    "slot": slot,
                    "attempts": 0,
                    "given_up": 0,
                    "error": "",
                    "filters": rows.encode(filters),
                },
            )
        self._amend.committed(record)
        if record.raw is None:
            self._runs.committed(sequence, record, reductions)

    def _object_appended(self, sequence: int, entry: e.ObjectAppended) -> None:
        old = rows.object_record(self._one(statements.BY_SEQUENCE, sequence=entry.extends))
        new = entry.record
        self._db.executemany(
            statements.PASS_EXTENT,
            [
                _extent_key(extent) | {"of": old.object_id, "holder": new.object_id}
                for extent in old.extents + old.mirror
            ],
        )
        charge = self._charges.of(new.bucket, new.modified_ns)
        for extent in new.extents:
            self._hold(extent, new.object_id, charge)
        self._link_mirror(new.object_id, new.mirror)
        mirror = old.mirror + new.mirror
        if bool(old.mirror) != bool(old.extents) or bool(new.mirror) != bool(new.extents):
            # Half a second copy is none.
            for extent in mirror:
                self._release(extent, new.object_id)
            mirror = ()
        # The old version goes without what it was made of.
        self._db.execute(statements.SET_EXTENTS, {"of": entry.extends, "extents": rows.NO_EXTENTS})
        self._set_mirror(old, ())
        record = msgspec.structs.replace(new, extents=old.extents + new.extents, mirror=mirror)
        self._insert(sequence, record, entry.due_ns, entry.extends, entry.reductions, filters=entry.filters)

    # -- versions
    def _marker_committed(self, sequence: int, entry: e.MarkerCommitted) -> None:
        record = entry.record
        hidden = None
        if entry.supersedes is not None:
            (hidden,) = self._one(statements.PUBLISHED, sequence=entry.supersedes)
            self._supersede(sequence, entry.supersedes)
        if entry.replaces is not None:
            self._delete(sequence, entry.replaces)
        self._db.execute(statements.INSERT_OBJECT, rows.object_row(record, 0, None))
        if hidden is not None:
            # The archive shows a key that is deleted: the copy goes to where noncurrent ones are.
            self._tombstone(sequence, record, hidden)

    def _supersede(self, sequence: int, version: int, raw_of: ObjectRecord | None = None) -> None:
        """A version stays and is no longer current. To kernels that is as if it had gone: its frames leave the run, what is
        owed for it is owed no more. ``raw_of``: a raw filter's remains of it, which take its place in the run."""
        record = rows.object_record(self._one(statements.BY_SEQUENCE, sequence=version))
        of = {"of": record.object_id}
        self._db.execute(statements.SET_VISIBLE, {"of": version, "to": 0})
        self._db.execute(statements.NOTE_KERNELS, of)
        if raw_of is not None and raw_of.raw is not None and raw_of.raw.object_id == record.object_id:
            self._db.execute(statements.MOVE_MEMBERSHIP, of | {"to": raw_of.object_id})
        if self._db.execute(statements.DELETE_REDUCTIONS_OF, {"object_id": record.object_id}).rowcount > 0:
            self._runs.debt_gone(sequence, record)
        self._runs.removed(sequence, record.object_id)
        self._forget_filter(record.object_id)

    def _uncover(self, sequence: int, version: int) -> None:
        """A version is current again: its kernels owe what they owed, or had paid, when it ceased to be."""
        record = rows.object_record(self._one(statements.BY_SEQUENCE, sequence=version))
        of = {"of": record.object_id}
        self._db.execute(statements.SET_VISIBLE, {"of": version, "to": 1})
        kernels = [kernel for (kernel,) in self._db.execute(statements.NOTED_KERNELS, of).fetchall()]
        self._db.execute(statements.FORGET_KERNELS, of)
        self._runs.returned(sequence, record, kernels)

    def _version_lock_set(self, _: int, entry: e.VersionLockSet) -> None:
        (blob,) = self._one(statements.DETAIL, sequence=entry.version)
        detail = locked_detail(blob, entry.retention, entry.legal_hold)
        self._db.execute(statements.SET_DETAIL, {"of": entry.version, "detail": detail})

    def _remove(self, sequence: int, version: int) -> ObjectRecord:
        """Take a version out of every table; its outcome stays, so that its commit sent again is recognised."""
        record = rows.object_record(self._one(statements.BY_SEQUENCE, sequence=version))
        transition(record.state, Event.DELETE)
        of = {"object_id": record.object_id}
        self._db.execute(statements.DELETE_OBJECT, {"sequence": version})
        self._amend.schedule(record.object_id, None)
        if self._db.execute(statements.DELETE_REDUCTIONS_OF, of).rowcount > 0:
            self._runs.debt_gone(sequence, record)
        self._runs.removed(sequence, record.object_id)
        self._forget_filter(record.object_id)
        self._db.execute(statements.FORGET_KERNELS, {"of": record.object_id})
        if not record.settled:
            self._db.execute(statements.DELETE_UNSETTLED_PARTS_OF, of)
        for extent in record.extents + record.mirror:
            self._release(extent, record.object_id)
        self._outcome(sequence, record.object_id, "object", msgspec.structs.replace(record, parts=()))
        return record

    def _object_deleted(self, sequence: int, entry: e.ObjectDeleted) -> None:
        self._delete(sequence, entry.version)
        if entry.uncovers is not None:
            self._uncover(sequence, entry.uncovers)

    def _delete(self, sequence: int, version: int) -> None:
        """Remove a version that nothing takes the place of; what it left in the archive becomes a tombstone."""
        (path,) = self._one(statements.PUBLISHED, sequence=version)
        record = self._remove(sequence, version)
        if path is not None:
            # By the version's own sequence: one entry may delete several versions.
            self._tombstone(version, record, path)

    def _tombstone(self, sequence: int, record: ObjectRecord, path: str) -> None:
        of = {"bucket": record.bucket, "key": record.key, "object_id": record.object_id}
        self._db.execute(statements.INSERT_TOMBSTONE, of | {"sequence": sequence, "path": path})

    def _outcome(self, sequence: int, object_id: bytes, kind: str, record: msgspec.Struct) -> None:
        self._db.execute(
            statements.PUT_OUTCOME,
            {"sequence": sequence, "object_id": object_id, "kind": kind, "record": rows.encode(record)},
        )

    # -- multipart
    def _upload_created(self, _: int, entry: e.UploadCreated) -> None:
        upload = entry.upload
        self._db.execute(
            statements.INSERT_UPLOAD,
            {
                "bucket": upload.bucket,
                "key": upload.key,
                "upload_id": upload.upload_id,
                "record": rows.encode(upload),
            },
        )

    def _part_committed(self, sequence: int, entry: e.PartCommitted) -> None:
        part = entry.part
        of = {"upload_id": entry.upload_id, "number": part.number}
        replaced = self._db.execute(statements.PART, of).fetchone()
        if replaced is not None:
            old = rows.decode_part(replaced[0])
            for extent in old.extents + old.mirror:
                self._release(extent, replaced[1])
            self._outcome(sequence, replaced[1], "part", old)
        self._db.execute(
            statements.PUT_PART,
            of | {"object_id": entry.object_id, "settled": int(part.settled), "record": rows.encode(part)},
        )
        charge = self._charges.of(entry.bucket, part.modified_ns)
        for extent in part.extents:
            self._hold(extent, entry.object_id, charge)
        self._link_mirror(entry.object_id, part.mirror)

    def _upload_completed(self, sequence: int, entry: e.UploadCompleted) -> None:
        record = entry.record
        used = {part.number for part in record.parts}
        kept = frozenset(record.mirror)
        if entry.supersedes is not None:
            self._supersede(sequence, entry.supersedes)
        self._insert(sequence, record, entry.due_ns, entry.replaces, entry.reductions, filters=entry.filters)
        found = self._db.execute(statements.PARTS, {"upload_id": entry.upload_id, "after": -1, "limit": -1}).fetchall()
        for blob, part_id, settled in found:
            part = rows.decode_part(blob)
            for extent in part.extents + part.mirror:
                if part.number in used and (extent in part.extents or extent in kept):
                    self._pass_on(extent, part_id, record.object_id)
                else:
                    self._release(extent, part_id)
            self._outcome(sequence, part_id, "part", part)
            if part.number in used and not settled:
                self._db.execute(statements.INSERT_UNSETTLED_PART, {"part_id": part_id, "object_id": record.object_id})
        self._drop_upload(record.bucket, record.key, entry.upload_id)

    def _upload_aborted(self, sequence: int, entry: e.UploadAborted) -> None:
        found = self._db.execute(statements.PARTS, {"upload_id": entry.upload_id, "after": -1, "limit": -1}).fetchall()
        for blob, part_id, _settled in found:
            part = rows.decode_part(blob)
            for extent in part.extents + part.mirror:
                self._release(extent, part_id)
            self._outcome(sequence, part_id, "part", part)
        self._drop_upload(entry.bucket, entry.key, entry.upload_id)

    def _drop_upload(self, bucket: str, key: bytes, upload_id: str) -> None:
        self._db.execute(statements.DELETE_PARTS, {"upload_id": upload_id})
        self._db.execute(statements.DELETE_UPLOAD, {"bucket": bucket, "key": key, "upload_id": upload_id})

    # -- life of the bytes
    def _settled(self, _: int, entry: e.Settled) -> None:
        for object_id in entry.object_ids:
            self._settle(object_id)

    def _settle(self, object_id: bytes) -> None:
        """The id of a version, of an upload's part, or of a part already linked into a version."""
        found = self._db.execute(statements.STATE_BY_ID, {"object_id": object_id}).fetchone()
        if found is not None:
            self._db.execute(statements.SET_SETTLED, {"of": found[0]})
            return
        part = self._db.execute(statements.PART_BY_ID, {"object_id": object_id}).fetchone()
        if part is not None:
            record = msgspec.structs.replace(rows.decode_part(part[0]), settled=True)
            self._db.execute(statements.SETTLE_PART, {"of": object_id, "record": rows.encode(record)})
            return
        linked = self._db.execute(statements.UNSETTLED_PART, {"part_id": object_id}).fetchone()
        if linked is not None:
            self._db.execute(statements.DELETE_UNSETTLED_PART, {"part_id": object_id})
            of = {"object_id": linked[0]}
            if self._db.execute(statements.UNSETTLED_PARTS_OF, of).fetchone() is None:
                self._db.execute(statements.SET_SETTLED, {"of": self._one(statements.STATE_BY_ID, **of)[0]})

    def _ledger_amended(self, _: int, entry: e.LedgerAmended) -> None:
        sequence, _state = self._version(entry.object_id)
        self._db.execute(statements.SET_LEDGER, {"of": sequence, "ledger": rows.encode(entry.ledger)})

    def _drain_claimed(self, _: int, entry: e.DrainClaimed) -> None:
        for object_id in entry.object_ids:
            sequence, state = self._version(object_id)
            self._db.execute(
                statements.SET_CLAIMED,
                {
                    "of": sequence,
                    "state": transition(state, Event.CLAIM).value,
                    "lease_until_ns": entry.lease_until_ns,
                    "lease_epoch": entry.lease_epoch,
                },
            )

    def _drained(self, _: int, entry: e.Drained) -> None:
        sequence, state = self._version(entry.object_id)
        copy = entry.copy
        self._db.execute(
            statements.SET_DRAINED,
            {
                "of": sequence,
                "state": transition(state, Event.DRAINED).value,
                "target": copy.target,
                "path": copy.path,
                "crc64nvme": rows.signed(copy.crc64nvme),
                "verified_ns": copy.verified_ns,
            },
        )

    def _drain_failed(self, _: int, entry: e.DrainFailed) -> None:
        sequence, state = self._version(entry.object_id)
        self._db.execute(
            statements.SET_DRAIN_FAILED,
            {
                "of": sequence,
                "state": transition(state, Event.DRAIN_FAILED).value,
                "due_ns": entry.due_ns,
                "error": entry.error,
            },
        )

    def _evicted(self, _: int, entry: e.Evicted) -> None:
        record = self._record(entry.object_id)
        for extent in record.extents + record.mirror:
            self._release(extent, entry.object_id)
        self._db.execute(
            statements.SET_EVICTED,
            {
                "of": record.sequence,
                "state": transition(record.state, Event.EVICT).value,
                "extents": rows.NO_EXTENTS,
                "detail": rows.encode(rows.detail_of(msgspec.structs.replace(record, mirror=()))),
            },
        )
        self._amend.schedule(entry.object_id, None)

    def _recall_requested(self, _: int, entry: e.RecallRequested) -> None:
        sequence, state = self._version(entry.object_id)
        self._db.execute(
            statements.SET_RECALLING,
            {
                "of": sequence,
                "state": transition(state, Event.REQUEST_RECALL).value,
                "recall_ns": entry.recall_ns,
                "node": entry.node,
            },
        )

    def _recalled(self, _: int, entry: e.Recalled) -> None:
        sequence, state = self._version(entry.object_id)
        for extent in entry.extents:
            self._hold(extent, entry.object_id)
        self._db.execute(
            statements.SET_RECALLED,
            {
                "of": sequence,
                "state": transition(state, Event.RECALLED).value,
                "extents": rows.encode(entry.extents),
                "stored_ns": entry.stored_ns,
                "node": places.node_of(entry.extents),
            },
        )
        if entry.attributes is not None:
            record = self._record(entry.object_id)
            self._amend.set_attributes(record, entry.attributes, entry.attributes.restored_until_ns)

    def _recall_failed(self, _: int, entry: e.RecallFailed) -> None:
        sequence, state = self._version(entry.object_id)
        self._db.execute(
            statements.SET_RECALL_FAILED,
            {"of": sequence, "state": transition(state, Event.RECALL_FAILED).value, "error": entry.error},
        )
        record = self._record(entry.object_id)
        if record.attributes.restore_days:
            self._amend.set_attributes(record, msgspec.structs.replace(record.attributes, restore_days=0), None)

    def _object_amended(self, _: int, entry: e.ObjectAmended) -> None:
        record = self._record(entry.object_id)
        self._amend.set_attributes(record, entry.attributes, entry.evict_ns)
        if entry.drain_ns:
            self._amend.drain_by(record, entry.drain_ns)
        if entry.recall_ns:
            state = transition(record.state, Event.REQUEST_RECALL).value
            of = {"of": record.sequence, "state": state, "recall_ns": entry.recall_ns, "node": entry.recall_node}
            self._db.execute(statements.SET_RECALLING, of)

    def _noticed(self, sequence: int, entry: e.Noticed) -> None:
        row = {"sequence": sequence, "target": entry.target, "event": entry.event}
        self._db.execute(statements.INSERT_NOTICE, row)

    def _notices_done(self, _: int, entry: e.NoticesDone) -> None:
        for sequence in entry.sequences:
            self._db.execute(statements.DELETE_NOTICE, {"sequence": sequence})

    def _relocated(self, _: int, entry: e.Relocated) -> None:
        record = self._record(entry.object_id)
        copy = record.mirror if entry.old in record.mirror else record.extents
        place = copy.index(entry.old)
        moved = copy[:place] + entry.new + copy[place + 1 :]
        kept = next((extent for extent in entry.new if _extent_key(extent) == _extent_key(entry.old)), None)
        charge = self._charges.charged(entry.old)
        for extent in entry.new:
            if extent is not kept:
                self._hold(extent, entry.object_id, charge)
        if kept is None:
            self._release(entry.old, entry.object_id)
        else:
            self._shorten(entry.old, kept, entry.object_id)
        if copy is record.mirror:
            self._set_mirror(record, moved)
        else:
            self._db.execute(statements.SET_EXTENTS, {"of": record.sequence, "extents": rows.encode(moved)})

    # -- nodes
    def _node_put(self, _: int, entry: e.NodePut) -> None:
        self._db.execute(statements.PUT_NODE, {"node": entry.record.node, "record": rows.encode(entry.record)})

    def _mirror_held(self, _: int, entry: e.MirrorHeld) -> None:
        self._drop_held(entry.object_id)
        for extent in entry.extents:
            self._hold(extent, entry.object_id)
        self._db.execute(
            statements.PUT_MIRROR,
            {
                "object_id": entry.object_id,
                "node": places.node_of(entry.extents),
                "extents": rows.encode(entry.extents),
                "held_ns": entry.held_ns,
            },
        )

    def _link_mirror(self, object_id: bytes, mirror: tuple[Extent, ...]) -> None:
        """What its node has held from now on belongs to a version or part; a copy shares its source's."""
        if self._db.execute(statements.DELETE_MIRROR, {"object_id": object_id}).rowcount == 0:
            for extent in mirror:
                self._hold(extent, object_id)

    def _mirrors_dropped(self, _: int, entry: e.MirrorsDropped) -> None:
        for object_id in entry.object_ids:
            self._drop_held(object_id)

    def _drop_held(self, object_id: bytes) -> None:
        held = self._db.execute(statements.MIRROR, {"object_id": object_id}).fetchone()
        if held is not None:
            for extent in rows.decode_extents(held[0]):
                self._release(extent, object_id)
            self._db.execute(statements.DELETE_MIRROR, {"object_id": object_id})

    def _mirrored(self, _: int, entry: e.Mirrored) -> None:
        record = self._record(entry.object_id)
        for extent in record.mirror:
            self._release(extent, entry.object_id)
        for extent in entry.extents:
            self._hold(extent, entry.object_id)
        self._set_mirror(record, entry.extents)

    def _set_mirror(self, record: ObjectRecord, mirror: tuple[Extent, ...]) -> None:
        detail = rows.encode(rows.detail_of(msgspec.structs.replace(record, mirror=mirror)))
        node = mirror[0].node if mirror else None
        self._db.execute(statements.SET_MIRROR, {"of": record.sequence, "detail": detail, "node": node})

    # -- archive and kernels
    def _archive_moved(self, _: int, entry: e.ArchiveMoved) -> None:
        sequence, _state = self._version(entry.object_id)
        self._db.execute(statements.SET_ARCHIVE_PATH, {"of": sequence, "path": entry.path})

    def _archive_deleted(self, _: int, entry: e.ArchiveDeleted) -> None:
        self._db.execute(statements.DELETE_TOMBSTONE, {"sequence": entry.tombstone})

    def _reduction_failed(self, sequence: int, entry: e.ReductionFailed) -> None:
        self._db.execute(
            statements.REDUCTION_FAILED,
            {
                "of": entry.object_id,
                "of_kernel": entry.kernel,
                "error": entry.error,
                "give_up": int(entry.give_up),
                "counted": int(entry.counted),
            },
        )
        if entry.give_up:
            found = self._db.execute(statements.BY_ID, {"object_id": entry.object_id}).fetchone()
            if found is not None:
                # The run's product names it.
                self._runs.changed(sequence, found[1], run_of(found[2]), entry.kernel)

    def _filter_ended(self, _: int, entry: e.FilterEnded) -> None:
        if not entry.again:
            self._db.execute(statements.SET_DUE, {"of": entry.object_id, "due_ns": entry.due_ns})
        if not entry.error:
            self._forget_filter(entry.object_id)
            return
        of = {"of": entry.object_id, "error": entry.error, "give_up": int(not entry.again)}
        self._db.execute(statements.FILTER_FAILED, of)

    def _forget_filter(self, object_id: bytes) -> None:
        if self._db.execute(statements.DELETE_FILTER, {"of": object_id}).rowcount > 0:
            self._db.execute(statements.DELETE_VERDICTS, {"of": object_id})

    # -- extents
    def _hold(self, extent: Extent, holder: bytes, charge: str | None = None) -> None:
        """``charge``: the reservation that pays for it, if nobody holds it yet."""
        key = _extent_key(extent)
        shared = self._db.execute(statements.EXTENT_HELD, key).fetchone() is not None
        self._db.execute(statements.HOLD_EXTENT, key | {"holder": holder, "length": extent.length})
        if not shared:
            self._db.execute(
                statements.SEGMENT_GAINS,
                {
                    "node": extent.node,
                    "slot": extent.slot,
                    "segment": extent.segment,
                    "generation": extent.generation,
                    "bytes": extent.stored_bytes,
                },
            )
            if charge is not None:
                self._charges.charge(charge, extent)

    def _pass_on(self, extent: Extent, of: bytes, holder: bytes) -> None:
        self._db.execute(statements.PASS_EXTENT, _extent_key(extent) | {"of": of, "holder": holder})

    def _release(self, extent: Extent, holder: bytes) -> None:
        key = _extent_key(extent)
        self._db.execute(statements.DROP_EXTENT, key | {"holder": holder})
        if self._db.execute(statements.EXTENT_HELD, key).fetchone() is not None:
            return
        segment = {
            "of_node": extent.node,
            "of_slot": extent.slot,
            "of_segment": extent.segment,
            "of_generation": extent.generation,
        }
        self._db.execute(statements.SEGMENT_LOSES, segment | {"bytes": extent.stored_bytes})
        self._db.execute(statements.DROP_DEAD_SEGMENT, segment)
        self._charges.discharge(extent)
        self._freed.append(extent)

    def _shorten(self, extent: Extent, kept: Extent, holder: bytes) -> None:
        """The head of an extent stays where it is, its tail has moved. Nobody shares it: its bytes were not settled."""
        key = _extent_key(extent)
        self._db.execute(statements.DROP_EXTENT, key | {"holder": holder})
        self._db.execute(statements.HOLD_EXTENT, key | {"holder": holder, "length": kept.length})
        segment = {name: key[name] for name in ("node", "slot", "segment", "generation")}
        losing = {f"of_{name}": value for name, value in segment.items()}
        self._db.execute(statements.SEGMENT_LOSES, losing | {"bytes": extent.stored_bytes})
        self._db.execute(statements.SEGMENT_GAINS, segment | {"bytes": kept.stored_bytes})
        charge = self._charges.charged(extent)
        if charge is not None:
            self._charges.discharge(extent)
            self._charges.charge(charge, kept)

    # -- rows an entry counts on: it was decided in this state of the index
    def _one(self, statement: str, **parameters: object) -> rows.Row:
        row: rows.Row | None = self._db.execute(statement, parameters).fetchone()
        if row is None:
            raise StaleVersion(f"the index lacks a row that a journal entry counts on: {parameters}")
        return row

    def _version(self, object_id: bytes) -> tuple[int, ObjectState]:
        row = self._one(statements.STATE_BY_ID, object_id=object_id)
        return row[0], ObjectState(row[1])

    def _record(self, object_id: bytes) -> ObjectRecord:
        return rows.object_record(self._one(statements.BY_ID, object_id=object_id))


def _extent_key(extent: Extent) -> dict[str, object]:
    return {
        "node": extent.node,
        "slot": extent.slot,
        "segment": extent.segment,
        "generation": extent.generation,
        "offset": extent.offset,
    }


def applied_sequence(database: sqlite3.Connection) -> int:
    (sequence,) = database.execute(statements.APPLIED).fetchone()
    return int(sequence)


def chain_of(database: sqlite3.Connection) -> int:
    """Digest of every entry of a cluster's log that was applied; 0 for an index that was never of one."""
    return int(dict(database.execute(statements.META).fetchall()).get(_CHAIN, 0))


def set_chain(database: sqlite3.Connection, chain: int) -> None:
    database.execute(statements.SET_META, {"name": _CHAIN, "value": chain})


def distinct(freed: Iterable[Extent]) -> tuple[Extent, ...]:
    return tuple(dict.fromkeys(freed))

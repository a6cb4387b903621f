"""Decisions: a mutation against the index becomes a journal entry, an answer without an entry, or a refusal.

In: one request, the index as it is with every earlier mutation of the batch applied, the time, the next sequence. Out: the
entry that holds everything decided. Reads only; writes nothing, so a refused mutation has changed nothing. Preconditions
are evaluated here, in commit order, by the only process that writes: that is what makes them atomic.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from ingest import bucket_documents, bucket_settings, reservations, versioning
from ingest.catalog import amend, append, rows, statements, wire
from ingest.catalog import entries as e
from ingest.catalog.reader import Reader
from ingest.catalog.versions import Facts, Versions, check_conditions
from ingest.errors import (
    BadDocument,
    BucketExists,
    BucketNotEmpty,
    CatalogError,
    EntityTooSmall,
    InvalidPart,
    InvalidPartOrder,
    LeaseLost,
    MembersGone,
    MirrorMissing,
    NodeNeeded,
    NoSuchBucket,
    NoSuchKey,
    NoSuchNode,
    NoSuchReservation,
    NoSuchUpload,
    StaleVersion,
)
from ingest.records import (
    BucketRecord,
    CommitObject,
    CompleteUpload,
    Deleted,
    Durability,
    Extent,
    NodeRecord,
    NodeState,
    ObjectRecord,
    ObjectState,
    PartialOf,
    PartRecord,
    Reservation,
    RunProductOf,
)
from ingest.states import Event, transition

PART_BYTES_MIN = 5 * 1024 * 1024
"""Parts of a completed upload except the last: docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html."""
CLAIM_MAX = 1024
_SECOND_NS = 1_000_000_000
BATCH_DRAIN_NS = 600 * _SECOND_NS
"""How much later than other objects a partial of many one-frame objects is due in the archive."""


@dataclasses.dataclass(frozen=True, slots=True)
class Known:
    """No entry: the mutation was done before, or there is nothing to do."""

    answer: object = None


@functools.lru_cache(maxsize=4096)
def _settings(tags: tuple[tuple[str, str], ...]) -> bucket_settings.BucketSettings:
    try:
        return bucket_settings.parse(dict(tags))
    except bucket_settings.BadSetting as error:
        raise CatalogError(str(error)) from None


def _drain_after_ns(tags: Mapping[str, str]) -> int:
    return _settings(tuple(tags.items())).drain_after_s * _SECOND_NS


def drain_after_ns(bucket: BucketRecord) -> int:
    return _drain_after_ns(bucket.tags)


def may_filter(bucket: BucketRecord) -> bool:
    return _settings(tuple(bucket.tags.items())).raw_filter == "allow"


def filter_wait_ns(bucket: BucketRecord) -> int:
    """How long the drain leaves a version alone that is to be filtered."""
    settings = _settings(tuple(bucket.tags.items()))
    return max(settings.drain_after_s, settings.raw_filter_wait_s) * _SECOND_NS


class Decider:
    def __init__(self, database: sqlite3.Connection, *, node: int = 0, part_bytes_min: int = PART_BYTES_MIN) -> None:
        """``node``: the one whose processes ask."""
        self._node = node
        self.gone: frozenset[int] = frozenset()
        """Nodes whose lease is over, as of the batch at hand."""
        self._db = database
        self._reader = Reader(database, node)
        self._versions = Versions(database)
        self._buckets: dict[str, BucketRecord] = {}
        self._part_bytes_min = part_bytes_min
        self._now_ns = 0
        self._sequence = 0
        self._decide: dict[type, Callable[[Any], e.Entry | Known]] = {
            wire.Commit: self._commit,
            wire.Delete: self._delete,
            wire.CreateBucket: self._create_bucket,
            wire.DeleteBucket: self._delete_bucket,
            wire.TagBucket: self._tag_bucket,
            wire.ConfigureBucket: self._configure_bucket,
            wire.PutUser: self._put_user,
            wire.Reserve: self._reserve,
            wire.ExtendReservation: self._extend_reservation,
            wire.ReleaseReservation: self._release_reservation,
            wire.AmendObject: self._amend_object,
            wire.RestoreObject: self._restore_object,
            wire.MarkNoticed: lambda m: e.NoticesDone(m.sequences) if m.sequences else Known(),
            wire.SetLock: self._set_lock,
            wire.CreateUpload: self._create_upload,
            wire.PutPart: self._put_part,
            wire.Complete: self._complete,
            wire.AbortUpload: self._abort_upload,
            wire.MarkSettled: self._mark_settled,
            wire.AmendLedger: self._amend_ledger,
            wire.ClaimDrain: self._claim_drain,
            wire.MarkDrained: self._mark_drained,
            wire.FailDrain: self._fail_drain,
            wire.MarkEvicted: self._mark_evicted,
            wire.RequestRecall: self._request_recall,
            wire.MarkRecalled: self._mark_recalled,
            wire.FailRecall: self._fail_recall,
            wire.Relocate: self._relocate,
            wire.MarkArchiveMoved: self._mark_archive_moved,
            wire.MarkArchiveDeleted: self._mark_archive_deleted,
            wire.FailReduction: self._fail_reduction,
            wire.EndFilter: self._end_filter,
            wire.PutNode: self._put_node,
            wire.SetNodeState: self._set_node_state,
            wire.HoldMirror: self._hold_mirror,
            wire.DropMirrors: self._drop_mirrors,
            wire.CloseRun: self._close_run,
            wire.MarkRunStored: lambda m: e.RunStored(m.bucket, m.run, m.kernel, m.reflects, m.keep),
            wire.DeferReductions: lambda m: e.ReductionsDeferred(m.bucket, m.run, m.kernel, m.object_ids),
        }

    def decide(self, mutation: wire.Mutation, sequence: int, now_ns: int) -> e.Entry | Known:
        """Raises CatalogError for a refusal."""
        self._sequence, self._now_ns = sequence, now_ns
        return self._decide[type(mutation)](mutation)

    def forget(self) -> None:
        """What was decided before may not have happened: read everything anew."""
        self._buckets.clear()

    def _bucket(self, name: str) -> BucketRecord:
        """Kept from mutation to mutation: a bucket's documents may be long. Raises NoSuchBucket."""
        found = self._buckets.get(name)
        if found is None:
            found = self._buckets[name] = self._reader.bucket(name)
        return found

    def answer(self, entry: e.Entry) -> object:
        """What the asker gets for an entry that was applied."""
        match entry:
            case e.ObjectCommitted() | e.UploadCompleted() | e.BucketCreated() | e.ReservationPut():
                return entry.record
            case e.ObjectAppended():
                return self._reader.by_id(entry.record.object_id)
            case e.MarkerCommitted():
                return Deleted(existed=True, version_id=entry.record.version_id, delete_marker=True)
            case e.PartCommitted():
                return entry.part
            case e.BucketTagged() | e.BucketConfigured():
                return self._reader.bucket(entry.name)
            case e.ObjectDeleted():
                return entry.answer
            case e.DrainClaimed():
                return [self._reader.by_id(object_id) for object_id in entry.object_ids]
            case e.NodePut():
                return entry.record
            case e.Drained() | e.RecallRequested() | e.Recalled() | e.ObjectAmended():
                return self._reader.by_id(entry.object_id)
            case _:
                return None

    # -- buckets and users
    def _create_bucket(self, mutation: wire.CreateBucket) -> e.Entry | Known:
        record = mutation.record
        drain_after_ns(record)
        bucket_documents.check(record.documents)
        versioning.check({}, record.documents)
        self._buckets.pop(record.name, None)
        try:
            existing = self._reader.bucket(record.name)
        except NoSuchBucket:
            return e.BucketCreated(record)
        if (existing.owner, existing.created_ns) == (record.owner, record.created_ns):
            return Known(existing)
        raise BucketExists(existing.owner)

    def _delete_bucket(self, mutation: wire.DeleteBucket) -> e.Entry:
        self._reader.bucket(mutation.name)
        self._buckets.pop(mutation.name, None)
        of = {"name": mutation.name}
        for statement in (statements.BUCKET_HAS_OBJECT, statements.BUCKET_HAS_UPLOAD):
            if self._db.execute(statement, of).fetchone() is not None:
                raise BucketNotEmpty(mutation.name)
        return e.BucketDeleted(mutation.name)

    def _tag_bucket(self, mutation: wire.TagBucket) -> e.Entry | Known:
        bucket = self._reader.bucket(mutation.name)
        try:
            tags = bucket_settings.edited(bucket.tags, mutation.tags)
        except bucket_settings.BadSetting as error:
            raise BadDocument(str(error)) from None
        if bucket.tags == tags:
            return Known(bucket)
        self._buckets.pop(mutation.name, None)
        delay_ns = _drain_after_ns(tags)
        return e.BucketTagged(mutation.name, tags, delay_ns if delay_ns != drain_after_ns(bucket) else None)

    def _configure_bucket(self, mutation: wire.ConfigureBucket) -> e.Entry | Known:
        bucket = self._reader.bucket(mutation.name)
        bucket_documents.check(mutation.documents)
        if bucket_documents.changed(bucket.documents, mutation.documents) == bucket.documents:
            return Known(bucket)
        versioning.check(bucket.documents, mutation.documents)
        self._buckets.pop(mutation.name, None)
        return e.BucketConfigured(mutation.name, mutation.documents)

    def _put_user(self, mutation: wire.PutUser) -> e.Entry:
        user = mutation.user
        names = [key.access_key for key in user.keys]
        for name in names:
            taken = self._db.execute(statements.USER_OF_KEY, {"access_key": name}).fetchone()
            if taken is not None and taken[0] != user.user_id:
                raise CatalogError(f"access key {name} belongs to another user")
        if len(set(names)) < len(names):
            raise CatalogError(f"an access key of user {user.user_id} is there twice")
        return e.UserPut(user)

    # -- reservations
    def _reserve(self, mutation: wire.Reserve) -> e.Entry | Known:
        wanted = mutation.reservation
        try:
            return Known(self._reader.reservation(wanted.reservation_id).reservation)
        except NoSuchReservation:
            pass
        self._reader.bucket(wanted.bucket)
        admitted = reservations.admitted(wanted, mutation.offers, self._reserved(), self._now_ns)
        return e.ReservationPut(admitted, self._now_ns)

    def _extend_reservation(self, mutation: wire.ExtendReservation) -> e.Entry | Known:
        found = self._reader.reservation(mutation.reservation_id).reservation
        extended = reservations.extended(found, mutation.until_ns, mutation.offers, self._reserved(), self._now_ns)
        return Known(found) if extended == found else e.ReservationPut(extended, self._now_ns)

    def _release_reservation(self, mutation: wire.ReleaseReservation) -> e.Entry | Known:
        found = self._reader.reservation(mutation.reservation_id).reservation
        released = reservations.released(found, self._now_ns)
        return Known(found) if released == found else e.ReservationPut(released, self._now_ns)

    def _reserved(self) -> list[Reservation]:
        return [use.reservation for use in self._reader.reservations(self._now_ns)]

    # -- objects
    def _commit(self, mutation: wire.Commit) -> e.Entry | Known:
        request = mutation.request
        known = self._known(request.object_id)
        if known is not None:
            return Known(known)
        if mutation.only_if_known:
            raise StaleVersion("this commit never happened")
        bucket = self._bucket(request.bucket)
        newest = self._versions.newest(request.bucket, request.key)
        check_conditions(request.key, newest, request.if_none_match, request.if_match)
        if request.append_at is not None and not (newest is None and request.append_at == 0):
            return self._append(request, bucket, newest)
        place = self._versions.place(bucket, request.key, request.object_id, newest)
        if request.reduces is not None and not self._is_current(request.reduces[0]):
            raise StaleVersion("the version this product reduces has gone")
        if request.partial is not None:
            self._check_partial(request.bucket, request.partial)
        if request.run_product is not None:
            self._check_run_product(request.bucket, request.run_product)
        if (
            request.raw is not None
            and self._db.execute(statements.FILTER_IF_JUDGED, {"of": request.raw.object_id}).fetchone() is None
        ):
            raise StaleVersion("the version that was to be filtered has gone")
        mirror = self._second_copy(request)
        if request.raw is not None:
            request = self._as_received(request, request.raw.object_id)
        record = ObjectRecord(
            bucket=request.bucket,
            key=request.key,
            version_id=place.version_id,
            object_id=request.object_id,
            sequence=self._sequence,
            state=transition(ObjectState.RECEIVING, Event.COMMIT),
            length=request.length,
            stored_length=sum(extent.length for extent in request.extents),
            etag=request.etag,
            crc64nvme=request.crc64nvme,
            modified_ns=self._now_ns,
            owner=request.owner,
            durability=request.durability,
            settled=request.settled,
            checksums=request.checksums,
            checksum_type=request.checksum_type,
            headers=request.headers,
            metadata=request.metadata,
            extents=request.extents,
            ledger=request.ledger,
            geometry=request.geometry,
            epochs=request.epochs,
            raw=request.raw,
            attributes=request.attributes,
            retention=self._versions.lock(bucket, request.key, request.retention, request.legal_hold, self._now_ns),
            legal_hold=request.legal_hold,
            mirror=mirror,
        )
        filters = request.filters if may_filter(bucket) else {}
        due_ns = self._now_ns + (filter_wait_ns(bucket) if filters else drain_after_ns(bucket))
        if request.partial is not None and request.partial.batch:
            # Most are compacted or deleted before the archive would have them.
            due_ns += BATCH_DRAIN_NS
        return e.ObjectCommitted(
            record,
            due_ns,
            place.replaces,
            request.reductions,
            request.reduces,
            request.partial,
            request.run_product,
            filters,
            request.verdicts,
            place.supersedes,
        )

    def _second_copy(self, request: CommitObject) -> tuple[Extent, ...]:
        """Raises StaleVersion, MirrorMissing."""
        if request.source:
            return self._check_source(request.source, request.extents, request.durability)
        if request.mirror_later:
            return ()
        return self._mirror_of(request.object_id, request.durability, request.extents)

    def _as_received(self, request: CommitObject, object_id: bytes) -> CommitObject:
        """What a filter leaves of a version keeps what became of it since it was received."""
        received = self._version(object_id)
        holds = received.retention is not None and received.retention.until_ns > self._now_ns
        return msgspec.structs.replace(
            request,
            attributes=received.attributes,
            retention=received.retention if holds else None,
            legal_hold=received.legal_hold,
        )

    def _append(self, request: CommitObject, bucket: BucketRecord, newest: Facts | None) -> e.Entry:
        old = None if newest is None else self._version(newest.object_id)
        record = append.appended(request, bucket, old, self._sequence, self._now_ns)
        if not request.mirror_later:
            mirror = self._mirror_of(request.object_id, request.durability, request.extents)
            record = msgspec.structs.replace(record, mirror=mirror)
        filters = request.filters if may_filter(bucket) else {}
        due_ns = self._now_ns + (filter_wait_ns(bucket) if filters else drain_after_ns(bucket))
        assert newest is not None
        return e.ObjectAppended(record, due_ns, newest.sequence, request.reductions, filters)

    def _is_current(self, object_id: bytes) -> bool:
        row = self._db.execute(statements.VISIBLE_BY_ID, {"object_id": object_id}).fetchone()
        return row is not None and row[0] == 1

    def _known(self, object_id: bytes) -> ObjectRecord | None:
        """The record of a commit that was done before, though its version may have gone since."""
        if self._db.execute(statements.SEEN, {"object_id": object_id}).fetchone() is None:
            return None  # nearly always
        row = self._db.execute(statements.BY_ID, {"object_id": object_id}).fetchone()
        if row is not None:
            return rows.object_record(row)
        row = self._db.execute(statements.OUTCOME, {"object_id": object_id, "kind": "object"}).fetchone()
        return None if row is None else rows.decode_object(row[0])

    def _check_source(self, source: bytes, shared: tuple[Extent, ...], durability: Durability) -> tuple[Extent, ...]:
        """The second copy, which is shared, too, where the level asks for one. Raises StaleVersion."""
        # An extent that lost its last reference may be overwritten at any moment: only a live holder can share it.
        row = self._db.execute(statements.BY_ID, {"object_id": source}).fetchone()
        held = None if row is None else rows.object_record(row)
        if held is None or not held.settled or not set(shared) <= set(held.extents):
            raise StaleVersion("the version this copy shares its bytes with has gone, moved or is not on disk yet")
        if durability is not Durability.MIRROR:
            return ()
        if shared and (shared != held.extents or not held.mirror):
            raise StaleVersion("the version this copy shares its bytes with has no second copy of just these")
        return held.mirror

    def _check_partial(self, bucket: str, partial: PartialOf) -> None:
        """Each frame counts once: a batch's members must still be owed to it, and what it replaces must still be there."""
        if partial.batch:
            owed = (
                (member.object_id, {"of": member.object_id, "of_kernel": partial.kernel}) for member in partial.members
            )
            gone = [
                object_id.hex()
                for object_id, of in owed
                if self._db.execute(statements.REDUCTION, of).fetchone() is None
                and not self._is_in(partial.replaces, object_id)
            ]
            if gone:
                raise MembersGone(" ".join(gone))
        of_run = (bucket, partial.run, partial.kernel, partial.group)
        for old in partial.replaces:
            row = self._db.execute(statements.PARTIAL, {"of": old}).fetchone()
            if row is None or tuple(row[:4]) != of_run:
                raise StaleVersion(f"partial {old.hex()} of this run has gone")

    def _check_run_product(self, bucket: str, product: RunProductOf) -> None:
        """Two keepers of one run, one of which does not know yet that it is none: who knows more wins, whoever comes last."""
        of = {"of_bucket": bucket, "of_run": product.run, "of_kernel": product.kernel}
        row = self._db.execute(statements.RUN_PRODUCT, of).fetchone()
        if row is not None and row[1] > product.reflects:
            raise StaleVersion("a product of this run that reflects more is stored")

    def _is_in(self, replaced: tuple[bytes, ...], object_id: bytes) -> bool:
        """Whether a member counts in one of the partials that go with the commit."""
        found = self._db.execute(statements.PARTIALS_OF_MEMBER, {"object_id": object_id}).fetchall() if replaced else ()
        return any(partial in replaced for (partial,) in found)

    def _close_run(self, mutation: wire.CloseRun) -> e.Entry | Known:
        of = {"of_bucket": mutation.bucket, "of_run": mutation.run}
        row = self._db.execute(statements.RUN, of).fetchone()
        if row is None:
            self._reader.bucket(mutation.bucket)
            raise NoSuchKey(mutation.run.decode("utf-8", "replace"))
        if row[3] or (mutation.before_ns and row[2] >= mutation.before_ns):
            return Known()
        return e.RunClosed(mutation.bucket, mutation.run, self._now_ns, mutation.closed_by)

    def _delete(self, mutation: wire.Delete) -> e.Entry | Known:
        request = mutation.request
        decided = self._versions.delete(self._bucket(request.bucket), request, self._sequence, self._now_ns)
        return Known(decided) if isinstance(decided, Deleted) else decided

    def _set_lock(self, mutation: wire.SetLock) -> e.Entry | Known:
        entry = self._versions.set_lock(self._bucket(mutation.bucket), mutation, self._now_ns)
        return Known() if entry is None else entry

    def _amend_object(self, mutation: wire.AmendObject) -> e.Entry | Known:
        record = self._version(mutation.object_id)
        return amend.amend(record, mutation, self._now_ns) or Known(record)

    # -- multipart
    def _create_upload(self, mutation: wire.CreateUpload) -> e.Entry | Known:
        upload = mutation.upload
        try:
            self._reader.upload(upload.bucket, upload.key, upload.upload_id)
        except NoSuchUpload:
            return e.UploadCreated(upload)
        return Known()

    def _put_part(self, mutation: wire.PutPart) -> e.Entry | Known:
        request = mutation.request
        row = self._db.execute(statements.PART_BY_ID, {"object_id": request.object_id}).fetchone()
        if row is None:
            of = {"object_id": request.object_id, "kind": "part"}
            row = self._db.execute(statements.OUTCOME, of).fetchone()
        if row is not None:
            return Known(rows.decode_part(row[0]))
        if mutation.only_if_known:
            raise StaleVersion("this part was never committed")
        self._reader.upload(request.bucket, request.key, request.upload_id)
        mirror = self._mirror_of(request.object_id, mutation.request.durability, request.part.extents)
        part = msgspec.structs.replace(request.part, modified_ns=self._now_ns, mirror=mirror)
        return e.PartCommitted(request.upload_id, request.object_id, part, request.bucket)

    def _complete(self, mutation: wire.Complete) -> e.Entry | Known:
        request = mutation.request
        known = self._known(request.object_id)
        if known is not None:
            return Known(known)
        upload = self._reader.upload(request.bucket, request.key, request.upload_id)
        bucket = self._bucket(request.bucket)
        parts, settled = self._linked(request)
        newest = self._versions.newest(request.bucket, request.key)
        check_conditions(request.key, newest, request.if_none_match, request.if_match)
        place = self._versions.place(bucket, request.key, request.object_id, newest)
        extents = tuple(extent for part in parts for extent in part.extents)
        record = ObjectRecord(
            bucket=request.bucket,
            key=request.key,
            version_id=place.version_id,
            object_id=request.object_id,
            sequence=self._sequence,
            state=transition(ObjectState.RECEIVING, Event.COMMIT),
            length=request.length,
            stored_length=sum(extent.length for extent in extents),
            etag=request.etag,
            crc64nvme=request.crc64nvme,
            modified_ns=self._now_ns,
            owner=upload.owner,
            durability=request.durability,
            settled=settled,
            checksums=request.checksums,
            checksum_type=request.checksum_type,
            headers=upload.headers,
            metadata=upload.metadata,
            attributes=upload.attributes,
            extents=extents,
            mirror=_joined(parts),
            # The version's own list is the truth about extents: a relocation changes one place only.
            parts=tuple(msgspec.structs.replace(part, extents=(), mirror=()) for part in parts),
            retention=self._versions.lock(bucket, request.key, upload.retention, upload.legal_hold, self._now_ns),
            legal_hold=upload.legal_hold,
        )
        filters = request.filters if may_filter(bucket) else {}
        due_ns = self._now_ns + (filter_wait_ns(bucket) if filters else drain_after_ns(bucket))
        return e.UploadCompleted(
            record, due_ns, request.upload_id, place.replaces, request.reductions, filters, place.supersedes
        )

    def _linked(self, request: CompleteUpload) -> tuple[list[PartRecord], bool]:
        """The parts a Complete names, checked, and whether all their bytes are on disk."""
        numbers = [part.number for part in request.parts]
        if not numbers:
            raise InvalidPart("no parts are named")
        if any(later <= earlier for earlier, later in itertools.pairwise(numbers)):
            raise InvalidPartOrder("part numbers must ascend")
        of = {"upload_id": request.upload_id, "after": -1, "limit": -1}
        stored: dict[int, tuple[PartRecord, bool]] = {}
        for blob, _part_id, settled in self._db.execute(statements.PARTS, of).fetchall():
            part = rows.decode_part(blob)
            stored[part.number] = part, bool(settled)
        linked, all_settled = [], True
        for named in request.parts:
            if named.number not in stored:
                raise InvalidPart(f"part {named.number} was not uploaded")
            part, settled = stored[named.number]
            if part.etag != named.etag:
                raise InvalidPart(f"part {named.number} has another ETag")
            if any(part.checksums.get(name) != value for name, value in named.checksums.items()):
                raise InvalidPart(f"part {named.number} has another checksum")
            linked.append(part)
            all_settled = all_settled and settled
        if any(part.length < self._part_bytes_min for part in linked[:-1]):
            raise EntityTooSmall(f"every part but the last has at least {self._part_bytes_min} bytes")
        if sum(part.length for part in linked) != request.length:
            raise InvalidPart("the parts changed while the upload was completed")
        return linked, all_settled

    def _abort_upload(self, mutation: wire.AbortUpload) -> e.Entry:
        self._reader.upload(mutation.bucket, mutation.key, mutation.upload_id)
        return e.UploadAborted(mutation.bucket, mutation.key, mutation.upload_id)

    # -- life of the bytes
    def _state(self, object_id: bytes) -> tuple[ObjectState, bool] | None:
        row = self._db.execute(statements.STATE_BY_ID, {"object_id": object_id}).fetchone()
        return None if row is None else (ObjectState(row[1]), row[2] == 1)

    def _version(self, object_id: bytes) -> ObjectRecord:
        try:
            return self._reader.by_id(object_id)
        except NoSuchKey:
            raise StaleVersion(f"version {object_id.hex()} was deleted or replaced") from None

    def _mark_settled(self, mutation: wire.MarkSettled) -> e.Entry | Known:
        waiting = tuple(object_id for object_id in mutation.object_ids if self._unsettled(object_id))
        return e.Settled(waiting) if waiting else Known()

    def _unsettled(self, object_id: bytes) -> bool:
        state = self._state(object_id)
        if state is not None:
            return not state[1]
        part = self._db.execute(statements.PART_BY_ID, {"object_id": object_id}).fetchone()
        if part is not None:
            return not rows.decode_part(part[0]).settled
        linked = self._db.execute(statements.UNSETTLED_PART, {"part_id": object_id}).fetchone()
        return linked is not None

    def _amend_ledger(self, mutation: wire.AmendLedger) -> e.Entry:
        self._version(mutation.object_id)
        return e.LedgerAmended(mutation.object_id, mutation.ledger)

    def _claim_drain(self, mutation: wire.ClaimDrain) -> e.Entry | Known:
        now: dict[str, object] = {"now_ns": self._now_ns}
        held = [
            object_id
            for object_id, claim in self._db.execute(statements.LEASED, now).fetchall()
            if claim == mutation.claim
        ]
        if held:
            return Known([self._reader.by_id(object_id) for object_id in held])
        limit = max(0, min(mutation.limit, CLAIM_MAX))
        claimed = tuple(self._reader.drains_due(self._now_ns, self.gone, limit))
        if not claimed:
            return Known([])
        return e.DrainClaimed(claimed, self._now_ns + mutation.lease_ns, mutation.claim)

    def _mark_drained(self, mutation: wire.MarkDrained) -> e.Entry | Known:
        record = self._version(mutation.object_id)
        if record.archive is not None:
            return Known(record)
        transition(record.state, Event.DRAINED)
        if mutation.claim and self._reader.drain_claim(mutation.object_id) != mutation.claim:
            raise LeaseLost(f"version {mutation.object_id.hex()} is drained by somebody else meanwhile")
        return e.Drained(mutation.object_id, mutation.copy)

    def _fail_drain(self, mutation: wire.FailDrain) -> e.Entry | Known:
        if self._version(mutation.object_id).state is not ObjectState.DRAINING:
            return Known()
        return e.DrainFailed(mutation.object_id, mutation.error, self._now_ns + mutation.retry_after_ns)

    def _mark_evicted(self, mutation: wire.MarkEvicted) -> e.Entry | Known:
        record = self._version(mutation.object_id)
        if record.state is ObjectState.EVICTED:
            return Known()
        transition(record.state, Event.EVICT)
        if record.archive is None or not record.archive.verified_ns or not record.settled:
            raise StaleVersion("the archive copy is not verified")
        if record.attributes.restored_until_ns > self._now_ns:
            raise StaleVersion("the version was restored and is kept until its time is over")
        return e.Evicted(mutation.object_id)

    def _request_recall(self, mutation: wire.RequestRecall) -> e.Entry | Known:
        record = self._version(mutation.object_id)
        if record.state is ObjectState.RECALLING:
            (recaller,) = self._db.execute(statements.RECALL_NODE, {"object_id": mutation.object_id}).fetchone()
            if recaller not in self.gone | self._left():
                return Known(record)
        elif record.state is not ObjectState.EVICTED:
            return Known(record)
        return e.RecallRequested(mutation.object_id, self._now_ns, self._node)

    def _mark_recalled(self, mutation: wire.MarkRecalled) -> e.Entry | Known:
        record = self._version(mutation.object_id)
        if record.state is ObjectState.ARCHIVED and record.extents == mutation.extents:
            return Known(record)
        transition(record.state, Event.RECALLED)
        attributes = amend.recalled(record, self._now_ns)
        return e.Recalled(mutation.object_id, mutation.extents, self._now_ns, attributes)

    def _fail_recall(self, mutation: wire.FailRecall) -> e.Entry | Known:
        if self._version(mutation.object_id).state is not ObjectState.RECALLING:
            return Known()
        return e.RecallFailed(mutation.object_id, mutation.error)

    def _relocate(self, mutation: wire.Relocate) -> e.Entry | Known:
        version = self._version(mutation.object_id)
        extents = version.extents + version.mirror
        if mutation.old in extents:
            return e.Relocated(mutation.object_id, mutation.old, mutation.new)
        if mutation.new and set(mutation.new) <= set(extents):
            return Known()
        raise StaleVersion("the version no longer has this extent")

    # -- nodes
    def _put_node(self, mutation: wire.PutNode) -> e.Entry | Known:
        row = self._db.execute(statements.NODE, {"node": mutation.record.node}).fetchone()
        if row is not None and rows.decode_node(row[0]) == mutation.record:
            return Known(mutation.record)
        return e.NodePut(mutation.record)

    def _set_node_state(self, mutation: wire.SetNodeState) -> e.Entry | Known:
        """Raises NoSuchNode, NodeNeeded."""
        row = self._db.execute(statements.NODE, {"node": mutation.node}).fetchone()
        if row is None:
            raise NoSuchNode(f"the cluster has no node {mutation.node}")
        record = rows.decode_node(row[0])
        if record.state is mutation.state:
            return Known(record)
        if record.state is NodeState.REMOVED:
            raise NodeNeeded(f"node {record.name} was removed; a node that left does not come back")
        if mutation.state is NodeState.REMOVED:
            self._check_leaving(record, force=mutation.force)
        return e.NodePut(msgspec.structs.replace(record, state=mutation.state))

    def _check_leaving(self, record: NodeRecord, *, force: bool) -> None:
        """Decided in the log's order: what the node commits before is seen, and what it would commit later is fenced."""
        if not any(one.node != record.node and one.state is not NodeState.REMOVED for one in self._reader.nodes()):
            raise NodeNeeded(f"node {record.name} is the cluster's last")
        if force:
            return
        if record.state is NodeState.UP and record.node not in self.gone:
            raise NodeNeeded(f"node {record.name} takes data: drain it first (`hiss node drain {record.name} --wait`)")
        held = self._reader.held_by(record.node, away=self.gone | self._left())
        if held.only_objects or held.only_parts:
            raise NodeNeeded(
                f"node {record.name} holds {held.only_objects} objects ({held.only_bytes} bytes) and {held.only_parts} parts of "
                "open uploads that exist nowhere else: let it drain (`hiss node drain --wait`), complete or abort the uploads, "
                "or give them up with --force"
            )

    def _mirror_of(self, object_id: bytes, durability: Durability, extents: tuple[Extent, ...]) -> tuple[Extent, ...]:
        """The second copy that another node holds for a commit. Raises MirrorMissing."""
        if durability is not Durability.MIRROR or not extents:
            return ()
        held = self._db.execute(statements.MIRROR, {"object_id": object_id}).fetchone()
        if held is None:
            raise MirrorMissing("no other node holds a copy of this body")
        mirror = rows.decode_extents(held[0])
        if sum(extent.length for extent in mirror) != sum(extent.length for extent in extents):
            raise MirrorMissing("the copy on the other node is not whole")
        return mirror

    def _hold_mirror(self, mutation: wire.HoldMirror) -> e.Entry | Known:
        object_id, extents = mutation.object_id, mutation.extents
        held = self._db.execute(statements.MIRROR, {"object_id": object_id}).fetchone()
        if held is not None and rows.decode_extents(held[0]) == extents:
            return Known()
        row = self._db.execute(statements.BY_ID, {"object_id": object_id}).fetchone()
        if row is None:
            if self._known(object_id) is not None or self._part_seen(object_id):
                raise StaleVersion(f"version {object_id.hex()} was deleted, replaced or committed without this copy")
            return e.MirrorHeld(object_id, extents, self._now_ns)
        record = rows.object_record(row)
        if record.mirror == extents:
            return Known()
        whole = sum(extent.length for extent in extents) == record.length
        replaceable = not record.mirror or record.mirror[0].node in self.gone | self._left()
        if not (record.extents and record.durability is Durability.MIRROR and whole and replaceable):
            raise StaleVersion(f"version {object_id.hex()} needs no second copy, or has one")
        return e.Mirrored(object_id, extents)

    def _part_seen(self, object_id: bytes) -> bool:
        of = {"object_id": object_id}
        return (
            self._db.execute(statements.PART_BY_ID, of).fetchone() is not None
            or self._db.execute(statements.OUTCOME, of | {"kind": "part"}).fetchone() is not None
        )

    def _left(self) -> frozenset[int]:
        return frozenset(node.node for node in self._reader.nodes() if node.state is NodeState.REMOVED)

    def _drop_mirrors(self, mutation: wire.DropMirrors) -> e.Entry | Known:
        held = tuple(
            object_id
            for object_id in mutation.object_ids
            if self._db.execute(statements.MIRROR, {"object_id": object_id}).fetchone() is not None
        )
        return e.MirrorsDropped(held) if held else Known()

    def _restore_object(self, mutation: wire.RestoreObject) -> e.Entry:
        entry = amend.restore(self._version(mutation.object_id), mutation, self._now_ns)
        return msgspec.structs.replace(entry, recall_node=self._node) if entry.recall_ns else entry

    # -- archive and kernels
    def _mark_archive_moved(self, mutation: wire.MarkArchiveMoved) -> e.Entry | Known:
        copy = self._version(mutation.object_id).archive
        if copy is not None and copy.path == mutation.new:
            return Known()
        if copy is None or copy.path != mutation.old:
            raise StaleVersion("the version's copy lies elsewhere")
        return e.ArchiveMoved(mutation.object_id, mutation.new)

    def _mark_archive_deleted(self, mutation: wire.MarkArchiveDeleted) -> e.Entry:
        return e.ArchiveDeleted(mutation.tombstone)

    def _end_filter(self, mutation: wire.EndFilter) -> e.Entry | Known:
        found = self._db.execute(statements.BY_ID, {"object_id": mutation.object_id}).fetchone()
        if found is None or self._db.execute(statements.FILTER, {"of": mutation.object_id}).fetchone() is None:
            return Known()
        record = rows.object_record(found)
        due_ns = record.modified_ns + drain_after_ns(self._reader.bucket(record.bucket))
        return e.FilterEnded(mutation.object_id, mutation.error, mutation.again, due_ns)

    def _fail_reduction(self, mutation: wire.FailReduction) -> e.Entry | Known:
        of = {"of": mutation.object_id, "of_kernel": mutation.kernel}
        if self._db.execute(statements.REDUCTION, of).fetchone() is None:
            return Known()
        return e.ReductionFailed(
            mutation.object_id, mutation.kernel, mutation.error, mutation.give_up, mutation.counted
        )


def _joined(parts: Sequence[PartRecord]) -> tuple[Extent, ...]:
    """The second copy of a version of parts, where each has one. Like the first copy it may lie on several nodes."""
    if not all(part.mirror or not part.length for part in parts):
        return ()
    return tuple(extent for part in parts for extent in part.mirror)

"""Reads of the catalogue: synchronous, on one read-only SQLite connection, each a point look-up or an index scan.

In: names and keys. Out: records, or the ``CatalogError`` the ``Catalog`` port documents. Every call sees all commits that
were answered before it (SQLite WAL: a new read transaction sees the last commit). Used by the client in its own process
and by the catalogue process on its writing connection, where it sees the batch at hand.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from ingest import bucket_settings
from ingest.catalog import rows, statements, stranded
from ingest.catalog.schema import APART
from ingest.catalog.versions import named_object
from ingest.cluster import places
from ingest.errors import NoSuchBucket, NoSuchKey, NoSuchReservation, NoSuchUpload, NoSuchVersion
from ingest.records import (
    NULL_VERSION,
    BucketRecord,
    DrainCounts,
    Extent,
    FilterJob,
    HeldByNode,
    ListedObject,
    NodeCounts,
    NodeRecord,
    NodeState,
    ObjectRecord,
    OwedInRun,
    OwedProduct,
    PartialRecord,
    PartRecord,
    ReductionCount,
    ReductionJob,
    ReservationUse,
    RunProductRecord,
    RunRecord,
    SegmentUse,
    UploadRecord,
    UserRecord,
)
from ingest.runs import INTERNAL_PREFIXES

LIMIT_MAX = 100_000
"""Rows of one answer at most; a caller pages beyond that."""
DEBTS_LOOKED_AT = 10_000
FAILURES_NAMED_MAX = 20
RECALLED_STAYS_NS = 5 * 10**9
"""What came back for a reader stays so long, however full the buffer is: evicted before it was opened, it would be recalled
again, and nobody would ever read it. Less than a recall waits for room."""
_ANY_SEQUENCE = 2**63 - 1


def key_after(prefix: bytes) -> bytes | None:
    """The smallest key greater than every key that starts with ``prefix``; None when there is none."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes((stem[-1] + 1,)) if stem else None


class Reader:
    def __init__(self, database: sqlite3.Connection, node: int = 0) -> None:
        self._db = database
        self._node = node

    def close(self) -> None:
        self._db.close()

    # -- buckets and users
    def bucket(self, name: str) -> BucketRecord:
        row = self._db.execute(statements.BUCKET, {"name": name}).fetchone()
        if row is None:
            raise NoSuchBucket(name)
        return rows.decode_bucket(row[0])

    def buckets(self) -> list[BucketRecord]:
        return [rows.decode_bucket(blob) for (blob,) in self._db.execute(statements.BUCKETS).fetchall()]

    def users(self) -> list[UserRecord]:
        return [rows.decode_user(blob) for (blob,) in self._db.execute(statements.USERS).fetchall()]

    # -- reservations
    def reservation(self, reservation_id: str) -> ReservationUse:
        found = self._db.execute(statements.RESERVATION, {"reservation_id": reservation_id}).fetchall()
        if not found:
            raise NoSuchReservation(reservation_id)
        return rows.reservation_uses(found)[0]

    def reservations(self, ends_after_ns: int) -> list[ReservationUse]:
        """Those that have not ended by then, their grace included, by the time they begin."""
        of = {"ends_after_ns": ends_after_ns}
        return rows.reservation_uses(self._db.execute(statements.RESERVATIONS, of).fetchall())

    def used_bytes(self, reservation_id: str, node: int) -> int:
        """Of a reservation, on a node."""
        of = {"reservation_id": reservation_id, "node": node}
        row = self._db.execute(statements.RESERVATION_USE, of).fetchone()
        return 0 if row is None else int(row[0])

    # -- objects
    def head(self, bucket: str, key: bytes, version_id: str | None = None) -> ObjectRecord:
        if version_id is not None:
            return self._named(bucket, key, version_id)
        row = self._db.execute(statements.HEAD, {"bucket": bucket, "key": key}).fetchone()
        if row is None:
            self.bucket(bucket)
            raise NoSuchKey(key.decode("utf-8", "replace"))
        return rows.object_record(row)

    def _named(self, bucket: str, key: bytes, version_id: str) -> ObjectRecord:
        if version_id == NULL_VERSION:
            of = {"bucket": bucket, "key": key}
            row = (
                self._db.execute(statements.HIDDEN_NULL_RECORD, of).fetchone()
                or self._db.execute(statements.HEAD, of).fetchone()
            )
        else:
            object_id = named_object(version_id)
            row = object_id and self._db.execute(statements.BY_ID, {"object_id": object_id}).fetchone()
        record = rows.object_record(row) if row else None
        if record is None or (record.bucket, record.key, record.version_id) != (bucket, key, version_id):
            self.bucket(bucket)
            raise NoSuchVersion(version_id)
        return record

    def newest(self, bucket: str, key: bytes) -> ObjectRecord | None:
        """The current version of a key, or the delete marker in its place."""
        row = self._db.execute(statements.NEWEST_RECORD, {"bucket": bucket, "key": key}).fetchone()
        return None if row is None else rows.object_record(row)

    def archived_versions(self, bucket: str, key: bytes) -> list[ObjectRecord]:
        """Versions of a key with a copy in the archive, newest first; without ``parts``."""
        found = self._db.execute(statements.ARCHIVED_VERSIONS, {"bucket": bucket, "key": key}).fetchall()
        return rows.all_records(found)

    def by_id(self, object_id: bytes) -> ObjectRecord:
        row = self._db.execute(statements.BY_ID, {"object_id": object_id}).fetchone()
        if row is None:
            raise NoSuchKey(object_id.hex())
        return rows.object_record(row)

    def drains_due(self, now_ns: int, gone: Collection[int], limit: int) -> list[bytes]:
        """Versions that this node is to drain now, oldest deadline first. ``gone``: nodes whose lease has ended."""
        here: dict[str, object] = {"now_ns": now_ns, "limit": limit, "node": self._node}
        found = self._db.execute(statements.DUE_AT_ONCE if self._leaving() else statements.DUE, here).fetchall()
        found += self._db.execute(statements.LEASE_EXPIRED, here).fetchall()
        for node in sorted(gone):
            # What this node mirrors for one that has gone is drained from here.
            of_gone = here | {"node": node, "mirror": self._node}
            found += self._db.execute(statements.MIRRORED_DUE, of_gone).fetchall()
            # What has no bytes can be drained from anywhere.
            found += self._db.execute(statements.EMPTY_DUE, of_gone).fetchall()
        return [object_id for object_id, _ in sorted(found, key=lambda row: (row[1], row[0]))[:limit]]

    def _leaving(self) -> bool:
        """Whether this node is being emptied: everything it holds is due."""
        row = self._db.execute(statements.NODE, {"node": self._node}).fetchone()
        return row is not None and rows.decode_node(row[0]).state is NodeState.DRAINING

    def list_objects(
        self, bucket: str, prefix: bytes, after: bytes, delimiter: bytes, limit: int
    ) -> tuple[list[ListedObject], bool]:
        """Keyset scan. Past a common prefix it seeks, so keys under it are never read. Records come without ``parts``."""
        self.bucket(bucket)
        limit = max(0, min(limit, LIMIT_MAX))
        end = key_after(prefix)
        found: list[ListedObject] = []
        start: bytes | None = max(prefix, after + b"\x00" if after else b"")
        if delimiter and after and _common_prefix(after, prefix, delimiter) == after:
            start = key_after(after)
        self._db.execute("BEGIN")  # one view of the catalogue for all seeks of the page
        try:
            while start is not None:
                start = self._scan(bucket, start, end, prefix, delimiter, limit + 1, found)
        finally:
            self._db.execute("COMMIT")
        return found[:limit], len(found) > limit

    def _scan(
        self,
        bucket: str,
        start: bytes,
        end: bytes | None,
        prefix: bytes,
        delimiter: bytes,
        limit: int,
        found: list[ListedObject],
    ) -> bytes | None:
        """Add rows from ``start`` on; returns where to seek next, or None when the page is full or the keys ended."""
        of = {"bucket": bucket, "start": start, "end": end, "limit": limit - len(found)}
        cursor = self._db.execute(statements.LIST_FROM if end is not None else statements.LIST_FROM_OPEN, of)
        try:
            for row in cursor:
                common = _common_prefix(row[2], prefix, delimiter) if delimiter else None
                if common is None:
                    found.append(ListedObject(row[2], rows.object_record(row)))
                else:
                    found.append(ListedObject(common, None))
                if len(found) >= limit:
                    return None
                if common is not None:
                    return key_after(common)
        finally:
            cursor.close()
        return None

    def list_versions(
        self, bucket: str, prefix: bytes, after: bytes, after_version: str, delimiter: bytes, limit: int
    ) -> tuple[list[ListedObject], bool]:
        """Every version of every key, newest first within a key: a keyset scan like ``list_objects``. After version
        ``after_version`` of the key ``after``; one that has gone meanwhile is looked up among the outcomes, so that who
        deletes what it lists misses nothing."""
        self.bucket(bucket)
        limit = max(0, min(limit, LIMIT_MAX))
        end = key_after(prefix)
        found: list[ListedObject] = []
        start: bytes | None = max(prefix, after + b"\x00" if after else b"")
        if delimiter and after and _common_prefix(after, prefix, delimiter) is not None:
            # The page before ended in this common prefix, or below it.
            start = key_after(_common_prefix(after, prefix, delimiter) or b"")
            after_version = ""
        self._db.execute("BEGIN")
        try:
            if after_version and after.startswith(prefix):
                self._rest_of_key(bucket, after, after_version, limit + 1, found)
            while start is not None and len(found) <= limit:
                start = self._scan_versions(bucket, start, end, prefix, delimiter, limit + 1, found)
        finally:
            self._db.execute("COMMIT")
        return found[:limit], len(found) > limit

    def _rest_of_key(self, bucket: str, key: bytes, version_id: str, limit: int, found: list[ListedObject]) -> None:
        below = self._sequence_of(bucket, key, version_id)
        newest = self._db.execute(statements.NEWEST, {"bucket": bucket, "key": key, "limit": 1}).fetchone()
        of = {"bucket": bucket, "key": key, "below": _ANY_SEQUENCE if below is None else below, "limit": limit}
        for row in self._db.execute(statements.VERSIONS_BELOW, of).fetchall():
            record = rows.object_record(row)
            found.append(ListedObject(key, record, record.sequence == newest[0]))

    def _sequence_of(self, bucket: str, key: bytes, version_id: str) -> int | None:
        """When a version was committed, also of one that has gone lately."""
        try:
            return self._named(bucket, key, version_id).sequence
        except NoSuchVersion:
            pass
        object_id = named_object(version_id)
        if object_id is None:
            return None
        row = self._db.execute(statements.OUTCOME, {"object_id": object_id, "kind": "object"}).fetchone()
        return None if row is None else rows.decode_object(row[0]).sequence

    def _scan_versions(
        self,
        bucket: str,
        start: bytes,
        end: bytes | None,
        prefix: bytes,
        delimiter: bytes,
        limit: int,
        found: list[ListedObject],
    ) -> bytes | None:
        of = {"bucket": bucket, "start": start, "end": end, "limit": limit - len(found)}
        cursor = self._db.execute(statements.VERSIONS_FROM if end is not None else statements.VERSIONS_FROM_OPEN, of)
        before: bytes | None = None
        try:
            for row in cursor:
                key = row[2]
                common = _common_prefix(key, prefix, delimiter) if delimiter else None
                if common is None:
                    found.append(ListedObject(key, rows.object_record(row), key != before))
                else:
                    found.append(ListedObject(common, None))
                before = key
                if len(found) >= limit:
                    return None
                if common is not None:
                    return key_after(common)
        finally:
            cursor.close()
        return None

    # -- multipart
    def upload(self, bucket: str, key: bytes, upload_id: str) -> UploadRecord:
        of = {"bucket": bucket, "key": key, "upload_id": upload_id}
        row = self._db.execute(statements.UPLOAD, of).fetchone()
        if row is None:
            self.bucket(bucket)
            raise NoSuchUpload(upload_id)
        return rows.decode_upload(row[0])

    def uploads(
        self, bucket: str, prefix: bytes, after: tuple[bytes, str], limit: int
    ) -> tuple[list[UploadRecord], bool]:
        self.bucket(bucket)
        of = {
            "bucket": bucket,
            "prefix": prefix,
            "after_key": after[0],
            "after_id": after[1],
            "limit": min(limit, LIMIT_MAX) + 1,
        }
        found = []
        for (blob,) in self._db.execute(statements.UPLOADS, of).fetchall():
            upload = rows.decode_upload(blob)
            if not upload.key.startswith(prefix):
                break
            found.append(upload)
        return found[:limit], len(found) > limit

    def parts(self, bucket: str, key: bytes, upload_id: str, after: int, limit: int) -> tuple[list[PartRecord], bool]:
        self.upload(bucket, key, upload_id)
        of = {"upload_id": upload_id, "after": after, "limit": min(limit, LIMIT_MAX) + 1}
        found = [rows.decode_part(row[0]) for row in self._db.execute(statements.PARTS, of).fetchall()]
        return found[:limit], len(found) > limit

    def scan_versions(self, bucket: str, key: bytes, sequence: int, limit: int) -> list[ObjectRecord]:
        """Versions behind one, by key and newest first: what is left of its key (not where ``sequence`` is 0), then others."""
        of: dict[str, object] = {"bucket": bucket, "key": key, "sequence": sequence, "limit": limit}
        found = self._db.execute(statements.SCAN_KEY, of).fetchall() if sequence else []
        if len(found) < limit:
            found += self._db.execute(statements.SCAN_KEYS, of | {"limit": limit - len(found)}).fetchall()
        return rows.all_records(found)

    # -- notifications
    def notices(self, target: str, limit: int) -> list[tuple[int, bytes]]:
        found = self._db.execute(statements.NOTICES, {"target": target, "limit": limit}).fetchall()
        return [(sequence, event) for sequence, event in found]

    def notice_counts(self) -> dict[str, int]:
        return dict(self._db.execute(statements.NOTICE_COUNTS).fetchall())

    # -- queues
    def evictions_due(self, now_ns: int, limit: int) -> list[ObjectRecord]:
        """Archived versions whose buffered copy should have gone by now, whatever the watermarks say."""
        found = self._db.execute(
            statements.EVICTIONS_DUE, {"now_ns": now_ns, "limit": limit, "node": self._node}
        ).fetchall()
        return rows.all_records(found)

    def evictable(self, now_ns: int, limit: int) -> list[ObjectRecord]:
        """Archived versions with a buffered copy whose bucket's ``hiss.evict-after-s`` is over, oldest first; those that were
        recalled stay for RECALLED_STAYS_NS at least."""
        patience_ns = {
            bucket.name: bucket_settings.parse(bucket.tags).evict_after_s * 1_000_000_000 for bucket in self.buckets()
        }
        found: list[ObjectRecord] = []
        cursor = self._db.execute(statements.EVICTABLE, {"now_ns": now_ns, "node": self._node})
        try:
            for row in cursor:
                if len(found) >= limit:
                    break
                *columns, recall_ns, stored_ns = row
                stays_ns = RECALLED_STAYS_NS if recall_ns else 0
                if stored_ns + max(stays_ns, patience_ns.get(row[1], 0)) <= now_ns:
                    found.append(rows.object_record(columns))
        finally:
            cursor.close()
        return found

    def drain_claim(self, object_id: bytes) -> int | None:
        """The last claim of a version that is being drained; None for any other."""
        row = self._db.execute(statements.DRAIN_CLAIM, {"object_id": object_id}).fetchone()
        return None if row is None else int(row[0])

    def recalls(self, limit: int) -> list[ObjectRecord]:
        return rows.all_records(self._db.execute(statements.RECALLS, {"limit": limit, "node": self._node}).fetchall())

    def unsettled(self, slot: int, limit: int) -> list[ObjectRecord]:
        found = rows.all_records(self._db.execute(statements.UNSETTLED, {"limit": -1}).fetchall())
        mine = (self._node, slot)
        return [record for record in found if any((one.node, one.slot) == mine for one in record.extents)][:limit]

    def pending_archive_deletes(self, limit: int) -> list[tuple[int, str, str, bytes, bytes | None]]:
        return self._db.execute(statements.TOMBSTONES, {"limit": limit}).fetchall()

    def pending_reductions(self, slot: int | None, limit: int, gone: Collection[int] = ()) -> list[ReductionJob]:
        if slot is None:
            jobs = self._db.execute(statements.REDUCTIONS, {"limit": limit}).fetchall()
        else:
            of = {"slot": places.place(self._node, slot), "limit": limit}
            jobs = self._db.execute(statements.REDUCTIONS_OF_SLOT, of).fetchall()
        found = [
            ReductionJob(kernel, attempts, self.by_id(object_id), bool(released))
            for object_id, kernel, attempts, released in jobs
        ]
        for object_id, kernel, attempts, _ in self._adopted(statements.ADOPTED_REDUCTIONS, gone, limit):
            record = self.by_id(object_id)
            if record.mirror and record.mirror[0].slot == slot:
                found.append(ReductionJob(kernel, attempts, record, released=True))
        return found[:limit]

    def _adopted(self, statement: str, gone: Collection[int], limit: int) -> Iterator[tuple[Any, ...]]:
        """Rows of what nodes owe that have gone, of versions whose second copy is here."""
        for node in gone:
            first = places.place(node, 0)
            of = {"first": first, "last": first + places.SLOTS_MAX - 1, "me": self._node, "limit": limit}
            yield from self._db.execute(statement, of).fetchall()

    def owed_at_node(self, node: int, bucket: str, prefix: bytes) -> dict[str, int]:
        """By kernel: products that a node owes of versions which nobody else has."""
        first = places.place(node, 0)
        of = {"first": first, "last": first + places.SLOTS_MAX - 1, "bucket": bucket}
        of_keys = {"start": prefix, "end": key_after(prefix)}
        return dict(self._db.execute(statements.OWED_AT_NODE, of | of_keys).fetchall())

    # -- runs
    def released_reductions(self, slot: int) -> bool:
        """Whether the slot has versions that were reduced once and are owed again."""
        of = {"slot": places.place(self._node, slot)}
        return self._db.execute(statements.RELEASED, of).fetchone() is not None

    def runs(self, bucket: str, prefix: bytes, after: bytes, limit: int) -> tuple[list[RunRecord], bool]:
        self.bucket(bucket)
        limit = max(0, min(limit, LIMIT_MAX))
        # Below every name there is: the run "" is a run, too.
        of = {"bucket": bucket, "prefix": prefix, "after": after, "limit": limit + 1}
        found = [RunRecord(*row) for row in self._db.execute(statements.RUNS, of).fetchall()]
        if not prefix and not after:
            root = self._db.execute(statements.RUN, {"of_bucket": bucket, "of_run": b""}).fetchone()
            found = [RunRecord(*root), *found] if root is not None else found
        found = [record for record in found if record.run.startswith(prefix)]
        return found[:limit], len(found) > limit

    def run(self, bucket: str, run: bytes) -> RunRecord:
        row = self._db.execute(statements.RUN, {"of_bucket": bucket, "of_run": run}).fetchone()
        if row is None:
            self.bucket(bucket)
            raise NoSuchKey(run.decode("utf-8", "replace"))
        return RunRecord(*row)

    def idle_runs(self, bucket: str, before_ns: int, limit: int) -> list[bytes]:
        of = {"bucket": bucket, "before_ns": before_ns, "limit": limit}
        return [run for (run,) in self._db.execute(statements.RUNS_IDLE, of).fetchall()]

    def run_products(self, run: RunRecord) -> list[RunProductRecord]:
        found = self._db.execute(statements.RUN_PRODUCTS_OF, {"of_bucket": run.bucket, "of_run": run.run}).fetchall()
        return [RunProductRecord(kernel, changed, stored, run) for kernel, changed, stored in found]

    def run_products_due(self, limit: int) -> list[RunProductRecord]:
        found = self._db.execute(statements.RUN_PRODUCTS_DUE, {"limit": limit}).fetchall()
        return [RunProductRecord(kernel, changed, stored, RunRecord(*run)) for kernel, changed, stored, *run in found]

    def partials(self, bucket: str, run: bytes, kernel: str) -> list[PartialRecord]:
        of = {"bucket": bucket, "run": run, "kernel": kernel}
        found = self._db.execute(statements.PARTIALS_OF_RUN, of).fetchall()
        return [
            PartialRecord(object_id, group, since, members, bool(batch), batch == APART, key, length)
            for object_id, group, since, members, batch, key, length in found
        ]

    def member_keys(self, partial: bytes) -> frozenset[bytes]:
        return frozenset(key for (key,) in self._db.execute(statements.KEYS_OF_PARTIAL, {"of": partial}).fetchall())

    def owed_in_run(self, bucket: str, run: bytes, kernel: str, limit: int) -> OwedInRun:
        """Counts up to ``limit``."""
        of = {"bucket": bucket, "start": run, "end": key_after(run), "skip": len(run) + 1, "kernel": kernel}
        pending = self._db.execute(statements.OWED_IN_RUN, of | {"limit": limit}).fetchall()
        failed = self._db.execute(statements.FAILED_IN_RUN, of | {"limit": limit}).fetchall()
        return OwedInRun(len(pending), len(failed), tuple(failed[:FAILURES_NAMED_MAX]), tuple(i for (i,) in pending))

    def kernels_owed_in_run(self, bucket: str, run: bytes) -> list[str]:
        of = {"bucket": bucket, "start": run, "end": key_after(run), "skip": len(run) + 1, "limit": DEBTS_LOOKED_AT}
        return sorted({kernel for (kernel,) in self._db.execute(statements.KERNELS_OWED_IN_RUN, of).fetchall()})

    def owed_with_reason(self, bucket: str, prefix: bytes, limit: int) -> list[OwedProduct]:
        of = {"bucket": bucket, "start": prefix, "end": key_after(prefix), "limit": limit}
        found = self._db.execute(statements.FAILED_WITH_REASON, of).fetchall()
        found += self._db.execute(statements.OWED_WITH_REASON, of).fetchall()
        products = [OwedProduct(key, kernel, error, bool(given_up)) for key, kernel, error, given_up in found[:limit]]
        return sorted(products, key=lambda one: (one.key, one.kernel))

    def reduction_counts(self, bucket: str) -> list[ReductionCount]:
        groups: dict[str, list[tuple[int, str, int, int, bytes]]] = {}
        for kernel, *group in self._db.execute(statements.REDUCTION_COUNTS, {"bucket": bucket}).fetchall():
            groups.setdefault(kernel, []).append(tuple(group))
        return [_reduction_count(kernel, of_kernel) for kernel, of_kernel in sorted(groups.items())]

    def filters_due(self, slot: int, limit: int, gone: Collection[int] = ()) -> list[FilterJob]:
        jobs = []
        of = {"slot": places.place(self._node, slot), "limit": limit}
        found = self._db.execute(statements.FILTERS_DUE, of).fetchall()
        for row in self._adopted(statements.ADOPTED_FILTERS, gone, limit):
            mirror = self.by_id(row[0]).mirror
            if mirror and mirror[0].slot == slot:
                found.append(row)
        for object_id, attempts, filters in found:
            verdicts = dict(self._db.execute(statements.VERDICTS, {"of": object_id}).fetchall())
            unjudged = frozenset(kernel for (kernel,) in self._db.execute(statements.UNJUDGED, {"of": object_id}))
            asked = rows.decode_filters(filters)
            jobs.append(FilterJob(self.by_id(object_id), attempts, asked, verdicts, unjudged))
        return jobs

    def filters_failed(self, bucket: str, prefix: bytes, limit: int) -> list[tuple[bytes, str]]:
        of = {"bucket": bucket, "start": prefix, "end": key_after(prefix), "limit": limit}
        return [(key, error) for key, error in self._db.execute(statements.FILTERS_FAILED, of).fetchall()]

    def drain_counts(self) -> DrainCounts:
        """Of what this node holds."""
        here = {"node": self._node}
        queued, queued_bytes, failing, oldest_ns = self._db.execute(statements.QUEUE_COUNTS, here).fetchone()
        (buffered_bytes,) = self._db.execute(statements.BUFFERED_BYTES, here).fetchone()
        (evictable_bytes,) = self._db.execute(statements.EVICTABLE_BYTES, here).fetchone()
        return DrainCounts(queued, queued_bytes, failing, oldest_ns, buffered_bytes, evictable_bytes)

    def kernel_objects(self, limit: int) -> list[ObjectRecord]:
        found = []
        for bucket in self.buckets():
            listed, _ = self.list_objects(bucket.name, INTERNAL_PREFIXES[0], b"", b"", limit)
            found += [row.record for row in listed if row.record is not None]
        return found

    # -- nodes
    def held_by(self, node: int, away: frozenset[int] = frozenset()) -> HeldByNode:
        """What would be lost with a node. ``away``: nodes that do not count as holders of a copy."""
        return stranded.held_by(self._db, node, away)

    def node_counts(self) -> list[NodeCounts]:
        return stranded.node_counts(self._db)

    def stranded(self, away: frozenset[int], limit: int, of: int | None = None) -> tuple[int, list[tuple[str, bytes]]]:
        """Undrained versions of which only nodes that are away have the bytes (``of``: this one some of them): how many, and the
        first of them by name."""
        count = 0
        named: list[tuple[str, bytes]] = []
        for bucket, key, _, holders in stranded.stranded(self._db, away):
            if of is not None and of not in holders:
                continue
            count += 1
            if len(named) < limit:
                named.append((bucket, key))
        return count, named

    def unmirrored_count(self) -> int:
        """Undrained versions, of any node, that are to have a second copy and have none."""
        (count,) = self._db.execute(statements.UNMIRRORED_COUNT).fetchone()
        return int(count)

    def copies_on(self, node: int, limit: int) -> list[bytes]:
        """Archived versions whose buffered copy lies on a node."""
        found = self._db.execute(statements.COPIES_ON, {"node": node, "limit": limit}).fetchall()
        return [object_id for (object_id,) in found]

    def nodes(self) -> list[NodeRecord]:
        return [rows.decode_node(blob) for (blob,) in self._db.execute(statements.NODES).fetchall()]

    def held_mirrors(self, limit: int) -> list[tuple[bytes, int]]:
        """Second copies of this node whose commit is still to come: (object id, since when), oldest first."""
        return self._db.execute(statements.MIRRORS_HELD, {"node": self._node, "limit": limit}).fetchall()

    def unmirrored(self, after: int, limit: int) -> list[ObjectRecord]:
        """Versions of this node that are to have a second copy and have none, by sequence."""
        of = {"node": self._node, "after": after, "limit": limit}
        return rows.all_records(self._db.execute(statements.UNMIRRORED, of).fetchall())

    def mirrored_by(self, mirror: int, limit: int) -> list[ObjectRecord]:
        """Versions of this node whose second copy another one has."""
        of = {"node": self._node, "mirror": mirror, "limit": limit}
        return rows.all_records(self._db.execute(statements.MIRRORED_BY, of).fetchall())

    # -- segments
    def segment_use(self, slot: int) -> list[SegmentUse]:
        found = self._db.execute(statements.SEGMENT_USE, {"node": self._node, "slot": slot}).fetchall()
        return [SegmentUse(*row) for row in found]

    def segment_extents(self, slot: int, segment: int) -> Sequence[tuple[ObjectRecord | None, Extent]]:
        return list(self._segment_extents(slot, segment))

    def _segment_extents(self, slot: int, segment: int) -> Iterator[tuple[ObjectRecord | None, Extent]]:
        of = {"node": self._node, "slot": slot, "segment": segment}
        for *place, holder in self._db.execute(statements.SEGMENT_EXTENTS, of).fetchall():
            row = self._db.execute(statements.BY_ID, {"object_id": holder}).fetchone()
            yield (None if row is None else rows.object_record(row)), Extent(*place)


def _reduction_count(kernel: str, groups: list[tuple[int, str, int, int, bytes]]) -> ReductionCount:
    """``groups``: (given up, error, count, latest sequence, a key)."""
    failed = sum(count for given_up, _, count, _, _ in groups if given_up)
    owed = sum(count for given_up, _, count, _, _ in groups if not given_up)
    latest = max(((sequence, error, key) for _, error, _, sequence, key in groups if error), default=(0, "", b""))
    return ReductionCount(kernel, owed, failed, latest[1], latest[2])


def _common_prefix(key: bytes, prefix: bytes, delimiter: bytes) -> bytes | None:
    place = key.find(delimiter, len(prefix))
    return None if place < 0 or not key.startswith(prefix) else key[: place + len(delimiter)]

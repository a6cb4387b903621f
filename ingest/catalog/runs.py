"""Runs in the index: which partial holds which version's frames, and which run products are to be made anew.

In: what entries do to versions (``Index`` calls this). Out: rows of runs, run_products, partials and members. What always
holds: a version's frames are in at most one partial of a kernel; a partial of many versions that lost one of them is
deleted in the same transaction, and the others are owed again (or given up, where a raw filter has changed them), unless it
has a state for each: then only that one is left out. So
nobody ever merges a state with frames in it that are no longer stored, and nothing has to be repaired after a crash. Like
the index it decides nothing and reads no clock.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from ingest.catalog import rows, statements
from ingest.catalog.entries import ReductionsDeferred, RunClosed, RunStored
from ingest.catalog.schema import APART
from ingest.cluster import places
from ingest.records import ObjectRecord, PartialOf, RunProductOf
from ingest.runs import closes, run_of

MARKER = "marker"
FILTERED = "a member judged together with it went, and its frames as they were received are filtered away"


class RunIndex:
    """``drop`` deletes the version with a sequence as a client's delete does, at the sequence of the entry at hand."""

    def __init__(self, database: sqlite3.Connection, drop: Callable[[int, int], None]) -> None:
        self._db = database
        self._drop = drop

    # -- versions come and go
    def committed(self, sequence: int, record: ObjectRecord, reductions: tuple[str, ...]) -> None:
        """A version exists. A member opens its run again; a marker closes it, also when it is the last member itself."""
        run = run_of(record.key)
        if reductions:
            self._grew(sequence, record.bucket, run, record.modified_ns)
        if closes(record.key, record.metadata):
            self._close(sequence, record.bucket, run, record.modified_ns, MARKER)

    def removed(self, sequence: int, object_id: bytes) -> None:
        """A version is gone: as a member of partials, or as a partial itself (deleted or overwritten by somebody)."""
        for (partial,) in self._db.execute(statements.PARTIALS_OF_MEMBER, {"object_id": object_id}).fetchall():
            self._lost_member(sequence, partial, object_id)
        self._forget(sequence, object_id)

    def returned(self, sequence: int, record: ObjectRecord, kernels: list[str]) -> None:
        """A version is current again that was not: what these kernels did of it is owed again."""
        for kernel in kernels:
            self._owe_again(sequence, record.object_id, kernel)
        if kernels:
            self._grew(sequence, record.bucket, run_of(record.key), record.modified_ns)

    def debt_gone(self, sequence: int, record: ObjectRecord) -> None:
        """A member went that was still owed: its run may be complete now."""
        of = {"of_bucket": record.bucket, "of_run": run_of(record.key), "changed": sequence}
        self._db.execute(statements.RUN_CHANGED, of)

    def bucket_deleted(self, name: str) -> None:
        self._db.execute(statements.DELETE_RUNS, {"name": name})
        self._db.execute(statements.DELETE_RUN_PRODUCTS, {"name": name})

    # -- partials
    def partial_committed(self, sequence: int, record: ObjectRecord, partial: PartialOf) -> None:
        since = sequence
        count = len(partial.members)
        for member in partial.members:
            of = {"of": member.object_id, "of_kernel": partial.kernel}
            self._db.execute(statements.DELETE_REDUCTION, of)
            if member.ledger is not None:
                found = self._db.execute(statements.STATE_BY_ID, {"object_id": member.object_id}).fetchone()
                self._db.execute(statements.SET_LEDGER, {"of": found[0], "ledger": rows.encode(member.ledger)})
            self._db.execute(
                statements.PUT_MEMBER,
                {"object_id": member.object_id, "kernel": partial.kernel, "partial": record.object_id},
            )
            if member.verdicts and self._db.execute(statements.FILTER, {"of": member.object_id}).fetchone() is not None:
                said = {"object_id": member.object_id, "kernel": partial.kernel, "verdicts": member.verdicts}
                self._db.execute(statements.PUT_VERDICTS, said)
        for old in partial.replaces:
            row = self._db.execute(statements.PARTIAL, {"of": old}).fetchone()
            if row is None:
                continue
            since = min(since, row[4])
            self._db.execute(statements.MOVE_MEMBERS, {"of": old, "to": record.object_id})
            self._db.execute(statements.DELETE_PARTIAL, {"of": old})
            self._drop_object(sequence, old)
        if partial.replaces:
            # Members may be both named and taken over.
            (count,) = self._db.execute(statements.COUNT_MEMBERS, {"of": record.object_id}).fetchone()
        self._db.execute(
            statements.INSERT_PARTIAL,
            {
                "object_id": record.object_id,
                "bucket": record.bucket,
                "run": partial.run,
                "kernel": partial.kernel,
                "group_id": partial.group,
                "since": since,
                "members": count,
                "batch": APART if partial.apart else int(partial.batch),
            },
        )
        if partial.members:
            # Compaction changes no result.
            self.changed(sequence, record.bucket, partial.run, partial.kernel, record.modified_ns)

    def _lost_member(self, sequence: int, partial: bytes, gone: bytes) -> None:
        row = self._db.execute(statements.PARTIAL, {"of": partial}).fetchone()
        if row is None:
            return
        kernel, batch = row[2], row[6]
        if batch == APART and self._cut_out(sequence, partial, gone):
            return
        others = self._db.execute(statements.MEMBERS_OF_PARTIAL, {"of": partial}).fetchall()
        self._forget(sequence, partial)
        for (object_id,) in others:
            if object_id != gone:
                self._owe_again(sequence, object_id, kernel)
        if batch:
            self._drop_object(sequence, partial)

    def _cut_out(self, sequence: int, partial: bytes, gone: bytes) -> bool:
        """The member counts no more, the others do; False where there is none."""
        self._db.execute(statements.DELETE_MEMBER, {"of": gone, "of_partial": partial})
        (left,) = self._db.execute(statements.COUNT_MEMBERS, {"of": partial}).fetchone()
        if not left:
            return False
        self._db.execute(statements.SET_PARTIAL_MEMBERS, {"of": partial, "members": left})
        row = self._db.execute(statements.PARTIAL, {"of": partial}).fetchone()
        self.changed(sequence, row[0], row[1], row[2])
        return True

    def _owe_again(self, sequence: int, object_id: bytes, kernel: str) -> None:
        found = self._db.execute(statements.BY_ID, {"object_id": object_id}).fetchone()
        if found is None:
            return
        record = rows.object_record(found)
        # What a raw filter left of a member is not what its kernel judged, and must not be taken for it.
        lost = record.raw is not None
        self._db.execute(
            statements.INSERT_REDUCTION,
            {
                "object_id": object_id,
                "kernel": kernel,
                "sequence": sequence,
                "slot": places.of_extents(record.extents),
                "attempts": 0,
                "given_up": int(lost),
                "error": FILTERED if lost else "",
                "released": 1,
            },
        )

    def _forget(self, sequence: int, partial: bytes) -> None:
        """The partial counts no more; its members are in none."""
        row = self._db.execute(statements.PARTIAL, {"of": partial}).fetchone()
        if row is None:
            return
        self._db.execute(statements.DELETE_PARTIAL, {"of": partial})
        self._db.execute(statements.DELETE_MEMBERS, {"of": partial})
        self.changed(sequence, row[0], row[1], row[2])

    def _drop_object(self, sequence: int, object_id: bytes) -> None:
        found = self._db.execute(statements.STATE_BY_ID, {"object_id": object_id}).fetchone()
        if found is not None:
            self._drop(sequence, found[0])

    # -- products
    def changed(self, sequence: int, bucket: str, run: bytes, kernel: str, now_ns: int = 0) -> None:
        """The product of this run and kernel is to be made anew."""
        if self._db.execute(statements.RUN, {"of_bucket": bucket, "of_run": run}).fetchone() is None:
            self._insert(bucket, run, now_ns)
        of = {"bucket": bucket, "run": run, "kernel": kernel, "changed": sequence}
        self._db.execute(statements.RUN_PRODUCT_CHANGED, of)

    def product_committed(self, bucket: str, product: RunProductOf) -> None:
        if not product.final:
            return
        of = {"of_bucket": bucket, "of_run": product.run, "of_kernel": product.kernel, "reflects": product.reflects}
        self._db.execute(statements.RUN_PRODUCT_STORED, of)

    def deferred(self, sequence: int, entry: ReductionsDeferred) -> None:
        for object_id in entry.object_ids:
            self._db.execute(statements.DEFER_REDUCTION, {"of": object_id, "of_kernel": entry.kernel})
        self.changed(sequence, entry.bucket, entry.run, entry.kernel)

    def stored(self, entry: RunStored) -> None:
        of = {"of_bucket": entry.bucket, "of_run": entry.run, "of_kernel": entry.kernel, "reflects": entry.reflects}
        if entry.keep:
            self._db.execute(statements.RUN_PRODUCT_STORED, of)
            return
        self._db.execute(statements.DELETE_RUN_PRODUCT, of)
        if self._db.execute(statements.RUN_PRODUCTS_OF, of).fetchone() is None:
            # Nothing is left of it. A member that has come meanwhile brings it back with its partial.
            self._db.execute(statements.DELETE_RUN, of)

    # -- open and closed
    def closed(self, sequence: int, entry: RunClosed) -> None:
        self._close(sequence, entry.bucket, entry.run, entry.closed_ns, entry.closed_by)

    def _grew(self, sequence: int, bucket: str, run: bytes, member_ns: int) -> None:
        of = {"of_bucket": bucket, "of_run": run}
        row = self._db.execute(statements.RUN, of).fetchone()
        if row is None:
            self._insert(bucket, run, member_ns)
            return
        self._db.execute(statements.RUN_GREW, of | {"member_ns": member_ns})
        if row[3]:
            self._db.execute(statements.RUN_CHANGED, of | {"changed": sequence})

    def _close(self, sequence: int, bucket: str, run: bytes, closed_ns: int, closed_by: str) -> None:
        of = {"of_bucket": bucket, "of_run": run}
        if self._db.execute(statements.RUN, of).fetchone() is None:
            self._insert(bucket, run, 0)
        self._db.execute(statements.CLOSE_RUN, of | {"closed_ns": closed_ns, "closed_by": closed_by})
        self._db.execute(statements.RUN_CHANGED, of | {"changed": sequence})

    def _insert(self, bucket: str, run: bytes, member_ns: int) -> None:
        self._db.execute(
            statements.INSERT_RUN,
            {"bucket": bucket, "run": run, "member_ns": member_ns, "closed_ns": 0, "closed_by": ""},
        )

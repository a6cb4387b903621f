"""What lies in the buffers on account of a reservation: the tables ``reservations``, ``reservation_use`` and ``charges``.

In: reservations as they were decided, extents as they come and go. Out: the bytes each reservation uses on each node, as sums.
Always holds: an extent is charged once, from its first reference to its last, to the reservation its bucket was in when the
commit was decided; moving it to another place moves its charge. Where no bucket has a reservation this costs a look into an
empty dictionary for each commit.
"""

from __future__ import annotations

import sqlite3

from ingest import reservations
from ingest.catalog import entries as e
from ingest.catalog import rows, statements
from ingest.records import Extent, Reservation


class ChargeIndex:
    """Part of ``Index``; the caller holds the transaction. ``forget`` after one was rolled back."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._db = database
        self._known: dict[str, list[Reservation]] | None = None
        self._any: bool | None = None

    def forget(self) -> None:
        self._known = self._any = None

    def put(self, entry: e.ReservationPut) -> None:
        reservation = entry.record
        before = {"before_ns": entry.decided_ns - reservations.KEPT_NS}
        self._db.execute(statements.DELETE_USE_ENDED, before)
        self._db.execute(statements.DELETE_RESERVATIONS_ENDED, before)
        self._db.execute(
            statements.PUT_RESERVATION,
            {
                "reservation_id": reservation.reservation_id,
                "bucket": reservation.bucket,
                "from_ns": reservation.from_ns,
                "ends_ns": reservations.ends_ns(reservation),
                "record": rows.encode(reservation),
            },
        )
        self._known = None

    def bucket_deleted(self, name: str) -> None:
        """Its reservations go with it."""
        self._db.execute(statements.DELETE_USE_OF_BUCKET, {"name": name})
        self._db.execute(statements.DELETE_RESERVATIONS_OF_BUCKET, {"name": name})
        self._known = None

    def of(self, bucket: str, decided_ns: int) -> str | None:
        """The reservation that a commit to the bucket is charged to."""
        if self._known is None:
            self._known = {}
            for use in rows.reservation_uses(
                self._db.execute(statements.RESERVATIONS, {"ends_after_ns": 0}).fetchall()
            ):
                self._known.setdefault(use.reservation.bucket, []).append(use.reservation)
        found = self._known.get(bucket)
        reservation = reservations.of_bucket(found, bucket, decided_ns) if found else None
        return None if reservation is None else reservation.reservation_id

    def charged(self, extent: Extent) -> str | None:
        """To which reservation the extent is charged."""
        if not self._is_any():
            return None
        row = self._db.execute(statements.CHARGE, _key(extent)).fetchone()
        return None if row is None else str(row[0])

    def charge(self, reservation_id: str, extent: Extent) -> None:
        of = {"reservation_id": reservation_id, "bytes": extent.stored_bytes}
        self._db.execute(statements.INSERT_CHARGE, _key(extent) | of)
        self._db.execute(statements.USE_GAINS, of | {"node": extent.node})
        self._any = True

    def discharge(self, extent: Extent) -> None:
        """The extent lost its last reference."""
        if not self._is_any():
            return
        key = _key(extent)
        row = self._db.execute(statements.CHARGE, key).fetchone()
        if row is None:
            return
        self._db.execute(statements.DELETE_CHARGE, key)
        self._db.execute(statements.USE_LOSES, {"of": row[0], "of_node": extent.node, "bytes": row[1]})

    def _is_any(self) -> bool:
        if self._any is None:
            self._any = self._db.execute(statements.ANY_CHARGE).fetchone() is not None
        return self._any


def _key(extent: Extent) -> dict[str, object]:
    return {
        "node": extent.node,
        "slot": extent.slot,
        "segment": extent.segment,
        "generation": extent.generation,
        "offset": extent.offset,
    }

"""Whether a body may come in, by what is reserved: the bucket's capacity in its slot, its policy outside, what others hold.

In: a body's specification, the reservations as this process reads them from the index, the node's ``ShareTable``. Out: an
``Admission`` that counts until the body is committed or gone, or NotAdmitted, before the first byte.
Always holds: in a slot, what a bucket has committed on this node and what is let in to it and not committed together stay within
its share, whatever workers decide at the same moment (they do so one after the other); what is reserved and not yet used is left
by everybody else. Where nothing is reserved a body costs a look at two words and into an empty dictionary.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ingest import reservations
from ingest.errors import NotAdmitted
from ingest.records import BLOCK_BYTES, LABEL_BYTES, LifetimeClass, Reservation, Share
from ingest.reservations import State
from ingest.share_table import ACTIVE, BEST, EXEMPT, HELD_BYTES, ShareTable, name_of
from ingest.stream_types import StreamSpec

if TYPE_CHECKING:
    from ingest.body import Body
    from ingest.ports import Catalog

RETRY_AFTER_S = 10
"""Where room comes back as the archive takes data: nobody knows when."""
RETRY_AFTER_MAX_S = 3600
_SECOND_NS = 10**9


@dataclasses.dataclass(slots=True)
class Admission:
    """What a body has of its bucket's reservation; ``lane`` None: it is in no slot."""

    lane: int | None = None
    size_bytes: int = 0


class Slots:
    """The reservations of this moment, by bucket; read anew when the catalogue's generation moves."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._generation = -1
        self._known: dict[str, list[Reservation]] = {}

    def all_of(self, bucket: str) -> list[Reservation]:
        """Those of the bucket that have not ended, in the order they begin."""
        generation = self._catalog.generation()
        if generation != self._generation:
            known: dict[str, list[Reservation]] = {}
            for reservation in self._catalog.reserved():
                known.setdefault(reservation.bucket, []).append(reservation)
            self._known, self._generation = known, generation
        return self._known.get(bucket, [])

    def at(self, bucket: str, now_ns: int) -> Reservation | None:
        """The one that the bucket is in, its grace included."""
        found = self.all_of(bucket)
        return reservations.of_bucket(found, bucket, now_ns) if found else None


class Admissions:
    """One for a worker."""

    def __init__(self, catalog: Catalog, table: ShareTable, node: int, worker: int) -> None:
        self.slots = Slots(catalog)
        self._catalog = catalog
        self._table = table
        self._node = node
        self._worker = worker

    def held_bytes(self, admission: Admission) -> int:
        """Room that a body, or a second copy, must leave to others."""
        if admission.lane is not None or not self._table.words[ACTIVE]:
            return 0
        return self._table.words[HELD_BYTES]

    def admit(self, spec: StreamSpec) -> Admission:
        """Raises NotAdmitted."""
        found = self.slots.all_of(spec.bucket.name)
        if not found and spec.settings.outside_slot == "best-effort":
            return Admission()
        now_ns = self._catalog.now_ns()
        reservation = reservations.of_bucket(found, spec.bucket.name, now_ns)
        if reservation is None or reservations.state(reservation, now_ns) is not State.ACTIVE:
            self._refuse_outside(spec, found, now_ns)
            return Admission()
        share = next((share for share in reservation.shares if share.node == self._node), None)
        if share is None:
            return Admission()  # the slot is on other nodes: here the bucket is one of many
        lane = self._table.lanes().get(name_of(reservation.reservation_id), BEST)
        admission = Admission(lane)
        if share.capacity_bytes:
            self._take(admission, reservation, share, _stored_bytes(spec.length or 0))
        return admission

    def grow(self, spec: StreamSpec, admission: Admission, size_bytes: int) -> None:
        """A body of unknown length goes on for so many bytes. Raises NotAdmitted, and the body is cut there."""
        if admission.lane is None:
            return
        reservation = self.slots.at(spec.bucket.name, self._catalog.now_ns())
        share = next((one for one in reservation.shares if one.node == self._node), None) if reservation else None
        if reservation is not None and share is not None and share.capacity_bytes:
            self._take(admission, reservation, share, _stored_bytes(size_bytes))

    def let_go(self, admission: Admission) -> None:
        """The body is committed, and the index counts it, or it is gone."""
        if admission.lane is not None and admission.size_bytes:
            self._table.admit(self._worker, admission.lane, -admission.size_bytes)
            admission.size_bytes = 0

    def lane_of(self, body: Body) -> int:
        """The lane of a body, of those that are in force."""
        reservation = self.slots.at(body.spec.bucket.name, self._catalog.now_ns())
        if body.is_copy:
            return BEST if reservation is None else EXEMPT
        if reservation is None or body.began_ns >= reservation.until_ns:
            return BEST  # in its grace a slot is for those who began in it
        return self._table.lanes().get(name_of(reservation.reservation_id), BEST)

    def _take(self, admission: Admission, reservation: Reservation, share: Share, size_bytes: int) -> None:
        with self._table.admission():
            lane = self._lane(admission, reservation)
            # In this order: a body that is committed meanwhile counts twice, never not at all.
            let_in = self._table.admitted(lane)
            if lane != BEST:
                let_in += self._table.admitted(BEST)
            used = self._catalog.used_bytes(reservation.reservation_id, self._node)
            left = share.capacity_bytes - used - let_in
            if size_bytes > left:
                raise self._full(reservation, share, size_bytes, left)
            self._table.admit(self._worker, lane, size_bytes)
            admission.size_bytes += size_bytes

    def _lane(self, admission: Admission, reservation: Reservation) -> int:
        """Where its bytes are counted: as long as a slot that has just begun has no lane, together with others like it."""
        lane = self._table.lanes().get(name_of(reservation.reservation_id), BEST)
        if admission.lane is not None and lane != admission.lane:
            self._table.admit(self._worker, admission.lane, -admission.size_bytes)
            self._table.admit(self._worker, lane, admission.size_bytes)
        admission.lane = lane
        return lane

    def _full(self, reservation: Reservation, share: Share, size_bytes: int, left: int) -> NotAdmitted:
        after_s = RETRY_AFTER_S
        if size_bytes > share.capacity_bytes:
            after_s = self._until_s(reservation.until_ns)
        return NotAdmitted(
            f"reservation {reservation.reservation_id} of bucket {reservation.bucket} has "
            f"{reservations.size_text(max(0, left))} left of {reservations.size_text(share.capacity_bytes)} on this node; "
            "please retry when the archive has taken some of it",
            after_s,
        )

    def _refuse_outside(self, spec: StreamSpec, found: list[Reservation], now_ns: int) -> None:
        if spec.settings.outside_slot == "best-effort" or spec.lifetime is LifetimeClass.PRODUCT:
            return
        following = next((one for one in found if one.from_ns > now_ns), None)
        when = f"; the next one begins at {reservations.when(following.from_ns)}" if following else ""
        after_s = self._until_s(following.from_ns) if following else RETRY_AFTER_MAX_S
        raise NotAdmitted(f"bucket {spec.bucket.name} takes data only in its reserved slots{when}", after_s)

    def _until_s(self, at_ns: int) -> int:
        return max(1, min(RETRY_AFTER_MAX_S, -(-(at_ns - self._catalog.now_ns()) // _SECOND_NS)))


def _stored_bytes(payload_bytes: int) -> int:
    """What a body takes of the segments: an extent more where it does not fit the one it began in."""
    return payload_bytes and 2 * LABEL_BYTES + -(-payload_bytes // BLOCK_BYTES) * BLOCK_BYTES

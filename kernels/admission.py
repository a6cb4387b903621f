"""Whether kernels keep up with what a bucket has reserved: their paces against the rate of the slot.

In: paces, the rate on a node, how many cores kernels have there. Out: ``Demand``s; and, for a worker, which kernels do not run
live in the slot that a bucket is in (``hiss.kernel-admission``). What always holds: a kernel whose pace is not known runs; what
does not run live is owed, and reduced from what is stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from ingest import bucket_settings
from ingest.admission import Slots
from ingest.errors import IngestError
from ingest.ports import Catalog
from ingest.records import Reservation
from ingest.reservations import State, rate_text, state, when
from kernels.attach import Attachment
from kernels.pace import Pace, Paces

WARN, REFUSE = "warn", "refuse"
"""Of ``hiss.kernel-admission``; whatever else it is means catch-up."""


@dataclasses.dataclass(frozen=True, slots=True)
class Room:
    """``cores``: of the node, for kernels. ``workers``: a kernel has one process in each."""

    cores: int
    workers: int


@dataclasses.dataclass(frozen=True, slots=True)
class Demand:
    """What one kernel takes of a slot. ``pace`` None: not measured yet, and nothing is known."""

    kernel: str
    pace: Pace | None
    rate_bytes_per_s: int
    """On one node."""
    fits: bool
    shortage: str = ""
    """Why it does not."""

    @property
    def cores(self) -> float | None:
        return None if self.pace is None else self.rate_bytes_per_s / self.pace.bytes_per_s

    @property
    def said(self) -> str:
        """For whoever reserves, or submits."""
        if self.pace is None or self.cores is None:
            return f"{self.kernel}: not measured yet"
        need = f"{rate_text(self.rate_bytes_per_s)} on a node needs {self.cores:.2g} cores"
        return f"{self.kernel}: {self.pace.said}; {need}{f', and {self.shortage}' if self.shortage else ''}"


def weigh(paces: Mapping[str, Pace | None], rate_bytes_per_s: int, room: Room) -> list[Demand]:
    """Of all kernels of a bucket, by name, if each sees every frame. What needs least has its cores first."""

    def need(name: str) -> float:
        pace = paces[name]
        return 0.0 if pace is None else rate_bytes_per_s / pace.bytes_per_s

    left, demands = float(room.cores), []
    for name in sorted(paces, key=lambda name: (need(name), name)):
        shortage = ""
        if need(name) > room.workers:
            shortage = f"a kernel has one process in each of the node's {room.workers} workers"
        elif need(name) > left:
            shortage = f"{max(0.0, left):.2g} of {room.cores} cores are left for it"
        else:
            left -= need(name)
        demands.append(Demand(name, paces[name], rate_bytes_per_s, not shortage, shortage))
    return sorted(demands, key=lambda demand: demand.kernel)


def rate_on(reservation: Reservation, node: int | None) -> int:
    """What it has reserved on the node; None: the most on any."""
    shares = [share for share in reservation.shares if node is None or share.node == node]
    return max((share.rate_bytes_per_s for share in shares), default=0)


def too_slow(paces: Mapping[str, Pace | None], reservations: Iterable[Reservation], room: Room) -> dict[str, str]:
    """Kernel -> for which of its bucket's reservations it is too slow, the first of them, and why. On every node as on this."""
    found: dict[str, str] = {}
    for reservation in reservations:
        slot = f"{when(reservation.from_ns)} to {when(reservation.until_ns)}"
        for demand in weigh(paces, rate_on(reservation, None), room):
            if not demand.fits:
                found.setdefault(
                    demand.kernel, f"too slow for reservation {reservation.reservation_id} ({slot}): {demand.said}"
                )
    return found


class SlotAdmission:
    """Of one worker. ``node``: this node's number; None where it is alone."""

    def __init__(self, catalog: Catalog, paces: Paces, room: Room, node: Callable[[], int] | None) -> None:
        self._catalog = catalog
        self._slots = Slots(catalog)
        self._paces = paces
        self._room = room
        self._node = node or (lambda: 0)
        self._policies: dict[str, tuple[int, str]] = {}
        """Bucket -> the generation at which it was read, its policy."""

    def reserved(self, bucket: str) -> list[Reservation]:
        """Those of the bucket with a rate that have not ended."""
        return [one for one in self._slots.all_of(bucket) if one.rate_bytes_per_s]

    async def learn(self, bucket: str) -> str:
        """The bucket's policy as of now. Raises IngestError."""
        generation = self._catalog.generation()
        known = self._policies.get(bucket)
        if known is not None and known[0] == generation:
            return known[1]
        policy = bucket_settings.parse((await self._catalog.bucket(bucket)).tags).kernel_admission
        self._policies[bucket] = (generation, policy)
        return policy

    async def prepare(self, bucket: str) -> None:
        """Know what ``late`` needs; never raises, and costs nothing where nothing is reserved."""
        if not self.reserved(bucket):
            self._policies.pop(bucket, None)
            return
        try:
            await self.learn(bucket)
        except (IngestError, bucket_settings.BadSetting):
            return  # as it was

    def late(self, bucket: str, attached: Iterable[Attachment]) -> frozenset[str]:
        """Kernels that do not run live now: too slow for the slot that the bucket is in on this node."""
        policy = self._policies.get(bucket, (0, WARN))[1]
        if policy == WARN:
            return frozenset()
        return frozenset(one.kernel for one in self.demands(bucket, attached) if not one.fits)

    def demands(self, bucket: str, attached: Iterable[Attachment]) -> list[Demand]:
        """In the slot that the bucket is in on this node; none outside."""
        now_ns = self._catalog.now_ns()
        for reservation in self.reserved(bucket):
            rate = rate_on(reservation, self._node())
            if rate and state(reservation, now_ns) in (State.ACTIVE, State.GRACE):
                return weigh({one.name: self._paces.of(bucket, one) for one in attached}, rate, self._room)
        return []

    def refusal(self, bucket: str, submitted: Attachment, others: Sequence[Attachment]) -> str:
        """Why the kernel is too slow for what the bucket has reserved now or later, on any node; empty where it is not."""
        paces = {one.name: self._paces.of(bucket, one) for one in (*others, submitted)}
        return too_slow(paces, self.reserved(bucket), self._room).get(submitted.name, "")

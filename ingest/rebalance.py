"""What a node gives to whom, twenty times a second: lanes of the reservations in force, room held for them, grants to workers.

In: the reservations with what is used of them, what came in since the last time (``ShareTable``), the time. Out: the table, for
all workers. One process of the node runs it. ``Law`` is the control law, pure.
Always holds: lanes follow the reservations within one tick; a lane keeps its number as long as its reservation is in force; where
nothing is in force the table says so. A tick costs what is in force now, however many reservations are planned.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence

from ingest import reservations
from ingest.counters import Counters
from ingest.records import Reservation, Share
from ingest.reservations import State
from ingest.share_table import (
    ACTIVE,
    BEST,
    HELD_BYTES,
    LANES,
    MAKE_ROOM_BYTES,
    TICKED_NS,
    UNLIMITED,
    VERSION,
    WINDOW_BYTES,
    WORKERS,
    ShareTable,
    name_of,
)

TICK_S = 0.05
WINDOW_S = 0.005
WINDOW_BYTES_MIN, WINDOW_BYTES_MAX = 64 << 10, 1 << 20
"""All that is on its way to others is no more than the node takes in in ``WINDOW_S``, as long as each has so much: a reserved
stream does not wait longer for them in the network."""
MAKE_ROOM_S = 3600
"""So long before a slot begins eviction makes room for it."""
_SECOND_NS = 10**9


class Law:
    """How much those without a reservation may take in, in bytes per second.

    With a ``ceiling`` it is what reserved lanes leave of it: what they take now and a margin, so that an idle one is lent at once
    and a tick after it begins it is taken back. Without one, nobody knows what the machine can do. But a worker that holds
    others back says that it was too much: then less than what they had; else a little more each time."""

    LEAST_SHARE = 0.02
    """Of the ceiling, or of what is reserved: nobody starves."""
    LEAST_BYTES_PER_S = 8 << 20
    MARGIN = 1.25
    WINDOW = 10
    """Ticks that say what the others had of late: three quarters of them had no more."""
    HELD_TICKS = 2
    """So many of them with holds are too many: now and then a hold does what it is for."""
    LESS, MORE, FIRST_MORE = 0.9, 1.02, 1.1
    """A step down, a step up, and one up as long as none went down."""
    BACK_TICKS = 20
    """What was taken is given back in so many ticks; from there on it is a little more each time."""
    PATIENCE_TICKS = 10
    """Between two cuts: the hold itself helps at once, a cut needs some ticks to show."""
    IDLE_TICKS = 2

    def __init__(self, ceiling: int) -> None:
        self._ceiling = ceiling
        self._best: deque[float] = deque(maxlen=self.WINDOW)
        self._held: deque[bool] = deque(maxlen=self.WINDOW)
        self._limit = float(UNLIMITED)
        self._target = 0.0
        self._step = 0.0
        self._idle = 0
        self._since_cut = self.PATIENCE_TICKS

    def limit(self, lanes: Sequence[tuple[float, float]], best: float, holds: int) -> int:
        """``lanes``: (reserved, received) bytes per second of each; ``best``: taken by all others; ``holds``: times they were
        held back since the last tick."""
        reserved = sum(rate for rate, _ in lanes)
        if self._ceiling:
            wanted = sum(rate if holds else min(rate, self.MARGIN * received) for rate, received in lanes)
            return int(max(self._ceiling - wanted, self._ceiling * self.LEAST_SHARE))
        self._best.append(best)
        self._held.append(holds > 0)
        had = sorted(self._best)[3 * len(self._best) // 4]
        least = max(self.LEAST_BYTES_PER_S, self.LEAST_SHARE * reserved)
        self._idle = 0 if any(received for _, received in lanes) else self._idle + 1
        self._since_cut += 1
        if self._idle >= self.IDLE_TICKS:
            self._limit, self._target = float(UNLIMITED), 0.0
        elif sum(self._held) >= self.HELD_TICKS and self._since_cut >= self.PATIENCE_TICKS:
            self._target = min(self._limit, had)
            self._limit = max(self.LESS * self._target, least)
            self._step = (self._target - self._limit) / self.BACK_TICKS
            self._since_cut = 0
        elif not holds:
            if self._limit < self._target:
                more = self._limit + self._step
            else:
                more = self._limit * (self.MORE if self._target else self.FIRST_MORE)
            # Not far above what they take: a flood that begins is let in step by step.
            self._limit = min(more, max(2 * had, reserved / 4, least))
        return int(self._limit)


def fair(total: int, wanted: Sequence[tuple[int, float]]) -> list[int]:
    """``total`` shared out: each is (weight, most that it wants). Who wants less than its part leaves the rest to the others."""
    parts = [0.0] * len(wanted)
    left, open_ = float(total), [place for place, (weight, _) in enumerate(wanted) if weight]
    while open_:
        weights = sum(wanted[place][0] for place in open_)
        content = [place for place in open_ if wanted[place][1] <= left * wanted[place][0] / weights]
        if not content:
            for place in open_:
                parts[place] = left * wanted[place][0] / weights
            break
        for place in content:
            parts[place] = wanted[place][1]
        left -= sum(wanted[place][1] for place in content)
        open_ = [place for place in open_ if place not in content]
    return [int(part) for part in parts]


@dataclasses.dataclass(slots=True)
class _InForce:
    """A reservation of this moment with a share on the node."""

    reservation: Reservation
    share: Share
    in_grace: bool
    used_bytes: int = 0
    """Of the share, committed."""
    name: int = 0

    def __post_init__(self) -> None:
        self.name = name_of(self.reservation.reservation_id)


class Rebalancer:
    """``generation``, ``read`` and ``used`` are the catalogue's: when to read anew, every reservation that has not ended, and
    what one has committed on a node, in bytes."""

    def __init__(
        self,
        table: ShareTable,
        *,
        node: Callable[[], int],
        ceiling: int,
        generation: Callable[[], int],
        read: Callable[[], Sequence[Reservation]],
        used: Callable[[str, int], int],
        counters: Counters,
    ) -> None:
        self._table = table
        self._node = node
        self._ceiling = ceiling
        self._generation = generation
        self._read = read
        self._used_of = used
        self._law = Law(ceiling)
        self._as_of = -1
        self._known: Sequence[Reservation] = ()
        self._running: list[_InForce] = []
        self._planned_bytes = 0
        self._holds_ns = range(0)
        """Times for which the two above are right."""
        self._lanes: dict[int, int] = {}
        self._seen: dict[int, int] = {}
        self._best_of = [table.received_by(worker, BEST) for worker in range(WORKERS)]
        self._holds = table.holds()
        self._at_ns = 0
        self._active = counters.cell("hiss_reservations_active")
        self._capacity = counters.cell("hiss_reserved_capacity_bytes")
        self._used = counters.cell("hiss_reserved_used_bytes")
        self._held_bytes = counters.cell("hiss_reserved_held_bytes")
        self._rate = counters.cell("hiss_reserved_rate_bytes_per_second")
        self._received = counters.cell("hiss_reserved_received_bytes_total")
        self._held = counters.cell("hiss_reservation_holds_total")
        table.words[ACTIVE] = 0
        for lane in range(LANES):
            table.set_lane(lane, 0, 0, 0)
        table.words[VERSION] += 1

    def step(self, now_ns: int, monotonic_ns: int) -> None:
        """One tick. ``now_ns``: the node's clock. Raises CatalogError, StorageFailed."""
        words = self._table.words
        generation = self._generation()
        if generation != self._as_of or now_ns not in self._holds_ns:
            self._look(generation, now_ns)
        elif not self._running:
            words[TICKED_NS] = monotonic_ns
            return
        for one in self._running:
            one.used_bytes = self._used_of(one.reservation.reservation_id, one.share.node)
        rates = self._rates()
        self._set_lanes(rates)
        words[HELD_BYTES] = self._unused()
        words[MAKE_ROOM_BYTES] = words[HELD_BYTES] + self._planned_bytes
        words[WINDOW_BYTES] = self._window()
        words[ACTIVE] = len(self._lanes)
        self._grant(rates, monotonic_ns)
        words[TICKED_NS] = monotonic_ns
        self._tell()

    def _look(self, generation: int, now_ns: int) -> None:
        """What is in force, and until when it stays so."""
        if generation != self._as_of:
            self._known, self._as_of = self._read(), generation
        node = self._node()
        self._running = _running(self._known, node, now_ns)
        self._planned_bytes = _planned(self._known, node, now_ns)
        edges = (edge for reservation in self._known for edge in _edges(reservation) if edge > now_ns)
        self._holds_ns = range(now_ns, min(edges, default=UNLIMITED))

    def _rates(self) -> dict[int, int]:
        """Name -> rate. Slots that are in their grace have what the others leave."""
        left = self._ceiling or UNLIMITED
        rates = {}
        for late in (False, True):
            for one in self._running:
                if one.in_grace is late:
                    rate = min(one.share.rate_bytes_per_s, left) if late else one.share.rate_bytes_per_s
                    rates[one.name] = rate
                    left = max(0, left - rate)
        return rates

    def _set_lanes(self, rates: dict[int, int]) -> None:
        changed = False
        for name, lane in list(self._lanes.items()):
            if name not in rates:
                self._table.set_lane(lane, 0, 0, 0)
                del self._lanes[name]
                changed = True
        free = [lane for lane in range(LANES) if lane not in self._lanes.values()]
        for one in self._running:
            if one.name not in self._lanes:
                if not free:
                    continue
                lane = self._lanes[one.name] = free.pop(0)
                self._seen[lane] = self._table.received(lane)
                changed = True
            self._table.set_lane(self._lanes[one.name], one.name, rates[one.name], one.share.capacity_bytes)
        if changed:
            self._table.words[VERSION] += 1

    def _unused(self) -> int:
        unused = 0
        for one in self._running:
            if not one.in_grace:
                lane = self._lanes.get(one.name)
                let_in = self._table.admitted(lane) if lane is not None else 0
                unused += max(0, one.share.capacity_bytes - one.used_bytes - let_in)
        return unused

    def _window(self) -> int:
        if not self._ceiling:
            return WINDOW_BYTES_MAX
        bodies = sum(self._table.bodies(worker, BEST)[0] for worker in range(WORKERS))
        return min(max(int(self._ceiling * WINDOW_S) // max(1, bodies), WINDOW_BYTES_MIN), WINDOW_BYTES_MAX)

    def _grant(self, rates: dict[int, int], monotonic_ns: int) -> None:
        if not self._lanes:
            self._at_ns, self._law = 0, Law(self._ceiling)
            return
        elapsed_s = max((monotonic_ns - self._at_ns) / 1e9, TICK_S / 10) if self._at_ns else TICK_S
        self._at_ns = monotonic_ns
        table = self._table
        lanes = []
        for name, lane in self._lanes.items():
            received = table.received(lane)
            count = received - self._seen.get(lane, received)
            self._seen[lane] = received
            self._received.add(count)
            lanes.append((float(rates[name]), count / elapsed_s))
        holds = table.holds()
        held, self._holds = holds - self._holds, holds
        self._held.add(held)
        had = [table.received_by(worker, BEST) for worker in range(WORKERS)]
        came = [(now - before) / elapsed_s for now, before in zip(had, self._best_of, strict=True)]
        self._best_of = had
        limit = self._law.limit(lanes, sum(came), held)
        if limit >= UNLIMITED:
            grants = [UNLIMITED] * WORKERS
        else:
            shared = fair(limit, [self._wanted(worker, rate, limit) for worker, rate in enumerate(came)])
            # Whoever has no body yet may begin one.
            grants = [max(grant, limit // 10) for grant in shared]
        for worker, grant in enumerate(grants):
            table.set_grant(worker, grant)

    def _wanted(self, worker: int, rate: float, limit: int) -> tuple[int, float]:
        """Each body counts the same. A worker whose bodies wait wants all there is, another what it takes and some."""
        bodies, waiting = self._table.bodies(worker, BEST)
        return bodies, float(limit) if waiting else Law.MARGIN * rate + limit / 20

    def _tell(self) -> None:
        self._active.set(len(self._running))
        self._capacity.set(sum(one.share.capacity_bytes for one in self._running))
        self._rate.set(sum(one.share.rate_bytes_per_s for one in self._running))
        self._held_bytes.set(self._table.words[HELD_BYTES])
        self._used.set(sum(one.used_bytes for one in self._running))


def _edges(reservation: Reservation) -> tuple[int, ...]:
    """When its part in ``_running`` and ``_planned`` changes."""
    from_ns = reservation.from_ns
    return from_ns - MAKE_ROOM_S * _SECOND_NS, from_ns, reservation.until_ns, reservations.ends_ns(reservation)


def _running(known: Sequence[Reservation], node: int, now_ns: int) -> list[_InForce]:
    states = {State.ACTIVE: False, State.GRACE: True}
    found = []
    for reservation in known:
        in_grace = states.get(reservations.state(reservation, now_ns))
        share = next((share for share in reservation.shares if share.node == node), None)
        if in_grace is not None and share is not None:
            found.append(_InForce(reservation, share, in_grace))
    return found


def _planned(known: Sequence[Reservation], node: int, now_ns: int) -> int:
    """Capacity of the node in slots that begin soon."""
    return sum(
        share.capacity_bytes
        for reservation in known
        for share in reservation.shares
        if share.node == node and now_ns < reservation.from_ns <= now_ns + MAKE_ROOM_S * _SECOND_NS
    )

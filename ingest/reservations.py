"""Reservations of capacity, rate and time: what is free when, what a slot gets on which node, and why one is refused.

In: reservations that hold, what the nodes offer, what is asked for, the time. Out: ``Share``s, a state, or a refusal that says
what would fit. Pure: no clock, no database, so that the catalogue decides with it and tests play with it.
Always holds: at every moment what active reservations hold on a node is no more than the node offers. Grace is not held
against anybody: a slot may begin where another ends, and what a late stream gets then is what is left.
"""

from __future__ import annotations

import bisect
import datetime
import enum
import itertools
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from ingest.errors import BadReservation, DoesNotFit, ReservationEnded
from ingest.records import Offer, Reservation, Share

UNLIMITED = 1 << 62
"""Stands for the rate of a node that does not say what it can take (``Offer.rate_bytes_per_s`` 0)."""
RESERVATIONS_MAX = 1000
"""Reservations that have not ended, of all nodes together."""
OFFERS_MAX = 4096
KEPT_NS = 400 * 86400 * 10**9
"""How long ended reservations stay in the calendar."""
AHEAD_MAX_NS = 5 * 366 * 86400 * 10**9
GRACE_MAX_S = 86400
_STARTS_TRIED = 16
"""Later starts that a refusal looks at."""
_SECOND_NS = 10**9


class State(enum.StrEnum):
    PLANNED = "planned"
    ACTIVE = "active"
    GRACE = "grace"
    """Its time is over; bodies that began in it still arrive."""
    EXPIRED = "expired"
    RELEASED = "released"


def state(reservation: Reservation, now_ns: int) -> State:
    if reservation.released_ns and now_ns >= reservation.released_ns:
        return State.RELEASED
    if now_ns < reservation.from_ns:
        return State.PLANNED
    if now_ns < reservation.until_ns:
        return State.ACTIVE
    return State.GRACE if now_ns < ends_ns(reservation) else State.EXPIRED


def ends_ns(reservation: Reservation) -> int:
    """From then on nothing of it counts, its grace included."""
    return reservation.released_ns or reservation.until_ns + reservation.grace_s * _SECOND_NS


def holds_until_ns(reservation: Reservation) -> int:
    """Until then its shares are held against others."""
    return min(reservation.until_ns, reservation.released_ns or reservation.until_ns)


def admitted(wanted: Reservation, offers: Sequence[Offer], held: Sequence[Reservation], now_ns: int) -> Reservation:
    """The reservation with its shares. ``held``: every reservation that has not ended.

    Raises BadReservation (it makes no sense), DoesNotFit (``str()`` says what would)."""
    # Asked for a moment ago is asked for now.
    wanted = msgspec.structs.replace(
        wanted, from_ns=max(wanted.from_ns, now_ns), created_ns=now_ns, released_ns=0, shares=()
    )
    _check(wanted, now_ns)
    if len(held) >= RESERVATIONS_MAX:
        raise DoesNotFit(f"{len(held)} reservations are planned already; at most {RESERVATIONS_MAX}")
    _refuse_overlap(wanted, held)
    plan = _Plan(offers, held)
    shares = plan.place(wanted.capacity_bytes, wanted.rate_bytes_per_s, wanted.from_ns, wanted.until_ns)
    if shares is None:
        raise DoesNotFit(_what_would_fit(plan, wanted))
    return msgspec.structs.replace(wanted, shares=shares)


def extended(
    reservation: Reservation, until_ns: int, offers: Sequence[Offer], held: Sequence[Reservation], now_ns: int
) -> Reservation:
    """The reservation with a later end, on the nodes it has. Raises BadReservation, DoesNotFit, ReservationEnded."""
    if state(reservation, now_ns) in (State.EXPIRED, State.RELEASED):
        raise ReservationEnded(f"reservation {reservation.reservation_id} has ended: make a new one")
    if until_ns < reservation.until_ns:
        raise BadReservation(
            f"it ends at {when(reservation.until_ns)} already: an earlier end is a release, at its time"
        )
    longer = msgspec.structs.replace(reservation, until_ns=until_ns)
    _check(longer, now_ns)
    others = [one for one in held if one.reservation_id != reservation.reservation_id]
    _refuse_overlap(longer, others)
    # In grace it held nothing against others: what was free until now has to be free still.
    start_ns = min(reservation.until_ns, max(now_ns, reservation.from_ns))
    plan = _Plan(offers, others)
    fits_until_ns = plan.fits_until(reservation.shares, start_ns, until_ns)
    if fits_until_ns < until_ns:
        free = f"its shares are free until {when(fits_until_ns)}" if fits_until_ns > reservation.until_ns else ""
        raise DoesNotFit(free or "its nodes are reserved by others right behind it: nothing of it can be extended")
    return longer


def released(reservation: Reservation, now_ns: int) -> Reservation:
    """Raises ReservationEnded for one that expired; releasing twice is releasing once."""
    if reservation.released_ns:
        return reservation
    if state(reservation, now_ns) is State.EXPIRED:
        raise ReservationEnded(f"reservation {reservation.reservation_id} has expired")
    return msgspec.structs.replace(reservation, released_ns=now_ns)


def of_bucket(reservations: Iterable[Reservation], bucket: str, now_ns: int) -> Reservation | None:
    """The reservation that a body counts against which begins, or is committed, now: the latest that has begun and not
    ended, its grace included."""
    begun = (one for one in reservations if one.bucket == bucket and one.from_ns <= now_ns < ends_ns(one))
    return max(begun, key=lambda one: one.from_ns, default=None)


def free_steps(
    offers: Sequence[Offer], held: Sequence[Reservation], from_ns: int, until_ns: int
) -> list[tuple[int, int, int, int | None]]:
    """(from, until, capacity, rate or None for any) that is free on all nodes together, in steps over the interval."""
    plan = _Plan(offers, held)
    edges = [from_ns, *plan.edges(from_ns, until_ns), until_ns]
    steps = []
    for start_ns, stop_ns in itertools.pairwise(edges):
        free = plan.free(start_ns, stop_ns)
        rate = _sum(free, "rate_bytes_per_s")
        steps.append((start_ns, stop_ns, _sum(free, "capacity_bytes"), rate if rate < UNLIMITED // 2 else None))
    return steps


def _check(wanted: Reservation, now_ns: int) -> None:
    if wanted.until_ns <= wanted.from_ns:
        raise BadReservation(f"it ends at {when(wanted.until_ns)}, which is not after {when(wanted.from_ns)}")
    if wanted.until_ns > now_ns + AHEAD_MAX_NS:
        raise BadReservation(f"it ends at {when(wanted.until_ns)}: at most five years ahead")
    if (
        wanted.capacity_bytes < 0
        or wanted.rate_bytes_per_s < 0
        or not (wanted.capacity_bytes or wanted.rate_bytes_per_s)
    ):
        raise BadReservation("it reserves neither capacity nor rate")
    if wanted.capacity_bytes >= UNLIMITED or wanted.rate_bytes_per_s >= UNLIMITED:
        raise BadReservation("it asks for more than any machine has")
    if not 0 <= wanted.grace_s <= GRACE_MAX_S:
        raise BadReservation(f"a grace of {wanted.grace_s} s: allowed is 0 to {GRACE_MAX_S} s")


def _refuse_overlap(wanted: Reservation, held: Sequence[Reservation]) -> None:
    for other in held:
        if other.bucket == wanted.bucket and other.from_ns < wanted.until_ns and wanted.from_ns < holds_until_ns(other):
            raise DoesNotFit(
                f"bucket {wanted.bucket} has reservation {other.reservation_id} from {when(other.from_ns)} until "
                f"{when(other.until_ns)}: extend or release it, or choose another time"
            )


class _Timeline:
    """What reservations hold of one node, as steps in time."""

    def __init__(self, spans: Iterable[tuple[int, int, Share]]) -> None:
        changes: dict[int, tuple[int, int]] = {}
        for from_ns, until_ns, share in spans:
            for at_ns, sign in ((from_ns, 1), (until_ns, -1)):
                capacity, rate = changes.get(at_ns, (0, 0))
                changes[at_ns] = (capacity + sign * share.capacity_bytes, rate + sign * share.rate_bytes_per_s)
        self.times = sorted(changes)
        self._levels: list[tuple[int, int]] = []
        capacity = rate = 0
        for at_ns in self.times:
            capacity, rate = capacity + changes[at_ns][0], rate + changes[at_ns][1]
            self._levels.append((capacity, rate))

    def steps(self, from_ns: int, until_ns: int) -> Iterator[tuple[int, int, int]]:
        """(since, capacity, rate) held over the interval, in order."""
        first = bisect.bisect_right(self.times, from_ns) - 1
        yield (from_ns, *(self._levels[first] if first >= 0 else (0, 0)))
        for place in range(first + 1, bisect.bisect_left(self.times, until_ns)):
            yield (self.times[place], *self._levels[place])

    def most(self, from_ns: int, until_ns: int) -> tuple[int, int]:
        """Most capacity and most rate that is held at any moment of the interval."""
        held = list(self.steps(from_ns, until_ns))
        return max(step[1] for step in held), max(step[2] for step in held)


class _Plan:
    def __init__(self, offers: Sequence[Offer], held: Sequence[Reservation]) -> None:
        self.offers = {offer.node: offer for offer in offers[:OFFERS_MAX]}
        spans: dict[int, list[tuple[int, int, Share]]] = {node: [] for node in self.offers}
        for reservation in held:
            until_ns = holds_until_ns(reservation)
            if until_ns <= reservation.from_ns:
                continue  # released before it began
            for share in reservation.shares:
                if share.node in spans:
                    spans[share.node].append((reservation.from_ns, until_ns, share))
        self._lines = {node: _Timeline(of_node) for node, of_node in spans.items()}

    def free(self, from_ns: int, until_ns: int) -> list[Share]:
        """What each node could give over the whole interval."""
        found = []
        for node, offer in self.offers.items():
            capacity, rate = self._lines[node].most(from_ns, until_ns)
            limit = offer.rate_bytes_per_s or UNLIMITED
            found.append(Share(node, max(0, offer.buffer_bytes - capacity), max(0, limit - rate)))
        return found

    def place(self, capacity: int, rate: int, from_ns: int, until_ns: int) -> tuple[Share, ...] | None:
        """Shares on as few nodes as carry it, the freest first; None where all together do not."""

        def fits(share: Share) -> tuple[float, int]:
            of_capacity = share.capacity_bytes / capacity if capacity else float("inf")
            of_rate = share.rate_bytes_per_s / rate if rate else float("inf")
            return min(of_capacity, of_rate), -share.node

        chosen: list[Share] = []
        for share in sorted(self.free(from_ns, until_ns), key=fits, reverse=True):
            chosen.append(share)
            if _sum(chosen, "capacity_bytes") >= capacity and _sum(chosen, "rate_bytes_per_s") >= rate:
                capacities = _split(capacity, [one.capacity_bytes for one in chosen])
                rates = _split(rate, [one.rate_bytes_per_s for one in chosen])
                shares = (Share(one.node, *parts) for one, *parts in zip(chosen, capacities, rates, strict=True))
                return tuple(sorted(share for share in shares if share.capacity_bytes or share.rate_bytes_per_s))
        return None

    def fits_until(self, shares: Sequence[Share], from_ns: int, until_ns: int) -> int:
        """How long these very shares are free from ``from_ns`` on, ``until_ns`` at most."""
        last_ns = until_ns
        for share in shares:
            offer = self.offers.get(share.node)
            if offer is None:
                return from_ns
            rate_limit = offer.rate_bytes_per_s or UNLIMITED
            for since_ns, capacity, rate in self._lines[share.node].steps(from_ns, last_ns):
                if capacity + share.capacity_bytes > offer.buffer_bytes or rate + share.rate_bytes_per_s > rate_limit:
                    last_ns = since_ns
                    break
        return last_ns

    def edges(self, from_ns: int, until_ns: int) -> list[int]:
        """When what is held changes, strictly inside the interval."""
        times = {at_ns for line in self._lines.values() for at_ns in line.times if from_ns < at_ns < until_ns}
        return sorted(times)


def _sum(shares: Sequence[Share], field: str) -> int:
    return sum(getattr(share, field) for share in shares)


def _split(total: int, limits: Sequence[int]) -> list[int]:
    """``total`` in parts that are proportional to ``limits`` and within them; their sum is at least ``total``."""
    whole = sum(limits)
    parts = [total * limit // whole if whole else 0 for limit in limits]
    rest = total - sum(parts)
    for place, limit in enumerate(limits):
        more = min(rest, limit - parts[place])
        parts[place] += more
        rest -= more
    return parts


def _what_would_fit(plan: _Plan, wanted: Reservation) -> str:
    if not plan.offers:
        return "no node offers anything to reserve"
    capacity, rate = wanted.capacity_bytes, wanted.rate_bytes_per_s
    free = plan.free(wanted.from_ns, wanted.until_ns)
    said = [f"{_amounts(_sum(free, 'capacity_bytes'), _sum(free, 'rate_bytes_per_s'))} free over the whole time"]
    edges = plan.edges(wanted.from_ns, wanted.until_ns)
    longest_ns = 0
    if plan.place(capacity, rate, wanted.from_ns, wanted.from_ns + 1) is not None:
        low, high = 0, len(edges)
        while low < high:  # what fits until an edge fits until any earlier one
            middle = (low + high) // 2
            fits = plan.place(capacity, rate, wanted.from_ns, edges[middle]) is not None
            low, high = (middle + 1, high) if fits else (low, middle)
        longest_ns = edges[low - 1] if low else 0
    if longest_ns:
        said.append(f"what is asked for is free until {when(longest_ns)}")
    length_ns = wanted.until_ns - wanted.from_ns
    for start_ns in plan.edges(wanted.from_ns, UNLIMITED)[:_STARTS_TRIED]:
        if plan.place(capacity, rate, start_ns, start_ns + length_ns) is not None:
            said.append(f"it fits from {when(start_ns)} on, for as long")
            break
    return "; ".join(said)


def _amounts(capacity: int, rate: int) -> str:
    shown = rate_text(rate) if rate < UNLIMITED // 2 else "any rate"
    return f"{size_text(capacity)} and {shown} are"


def size_text(size_bytes: int) -> str:
    """Decimal units, as disks count: ``12.5 TB``."""
    for unit_bytes, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size_bytes >= unit_bytes:
            return f"{size_bytes / unit_bytes:.4g} {unit}"
    return f"{size_bytes} B"


def rate_text(rate_bytes_per_s: int) -> str:
    """Bits, as networks count: ``20 Gbps``."""
    bits = rate_bytes_per_s * 8
    for unit_bits, unit in ((10**9, "Gbps"), (10**6, "Mbps"), (10**3, "kbps")):
        if bits >= unit_bits:
            return f"{bits / unit_bits:.4g} {unit}"
    return f"{bits} bps"


def when(at_ns: int) -> str:
    """UTC, to the second: ``2026-12-01T14:00:00Z``."""
    moment = datetime.datetime.fromtimestamp(min(at_ns, UNLIMITED) // _SECOND_NS, datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")

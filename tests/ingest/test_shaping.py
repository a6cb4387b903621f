"""Who may read while something is reserved: the table, the control law on a machine nobody knows, turns and holds of a worker."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import secrets
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.admission import Admissions
from ingest.bucket_settings import BucketSettings
from ingest.counters import CONTROL, Counters
from ingest.errors import NotAdmitted
from ingest.rebalance import TICK_S, Law, Rebalancer, fair
from ingest.records import BucketRecord, Reservation, ReservationUse, Share
from ingest.shaping import ANY, TURN_BYTES, Shaper
from ingest.share_table import (
    ACTIVE,
    BEST,
    EXEMPT,
    HELD_BYTES,
    HOLD_UNTIL_NS,
    MAKE_ROOM_BYTES,
    TICKED_NS,
    UNLIMITED,
    VERSION,
    WINDOW_BYTES,
    ShareTable,
    name_of,
)
from ingest.stream_types import StreamSpec

MB = 10**6
SECOND_NS = 10**9
HOUR_NS = 3600 * SECOND_NS
NOW_NS = 1_800_000_000 * SECOND_NS


# -- sharing out


@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 10**6)), min_size=1, max_size=10),
)
def test_what_is_shared_out_is_within_what_there_is_and_what_is_wanted(
    total: int, wanted: list[tuple[int, int]]
) -> None:
    parts = fair(total, [(weight, float(most)) for weight, most in wanted])
    assert sum(parts) <= total
    assert all(0 <= part <= most for part, (_, most) in zip(parts, wanted, strict=True))
    # Nobody could have more without another having less: either all is given, or all are content.
    content = all(part >= most - 1 for part, (weight, most) in zip(parts, wanted, strict=True) if weight)
    assert content or sum(parts) >= total - len(wanted)


def test_who_wants_less_leaves_the_rest_to_the_others() -> None:
    assert fair(100, [(1, 1000), (1, 10), (2, 1000)]) == [30, 10, 60]
    assert fair(100, [(0, 1000), (1, 1000)]) == [0, 100]


# -- the law


def _play(law: Law, machine: float, reserved: float, wants: float, others_want: float, ticks: int) -> list[float]:
    """A machine that takes in ``machine`` bytes/s and shares it by what is offered. What the others had, tick by tick."""
    had = []
    limit, holds, credit = float(UNLIMITED), 0, 0.0
    for _ in range(ticks):
        best = min(others_want, limit, machine if not holds else machine / 2)
        offered = wants + best
        share = min(1.0, machine / offered) if offered else 1.0
        got = wants * share
        credit = max(0.0, credit + (min(wants, reserved) - got) * TICK_S)
        holds = int(credit > reserved * 0.004)
        if holds:
            credit = 0.0  # everybody else stops until it has caught up
        had.append(best * share)
        limit = float(law.limit([(reserved, got)], best * share, holds))
    return had


@pytest.mark.parametrize("machine", [500 * MB, 1000 * MB, 5000 * MB])
def test_others_come_near_to_what_is_left_of_a_machine_that_nobody_knows(machine: float) -> None:
    had = _play(Law(0), machine, 300 * MB, 300 * MB, 1e12, 1200)
    left = machine - 300 * MB
    late = had[600:]
    assert 0.8 * left < sum(late) / len(late) <= 1.05 * left


def test_an_idle_reservation_is_lent_within_two_ticks() -> None:
    law = Law(0)
    _play(law, 1000 * MB, 900 * MB, 900 * MB, 1e12, 100)
    assert law.limit([(900.0 * MB, 0.0)], 50.0 * MB, 0) < 1000 * MB
    assert law.limit([(900.0 * MB, 0.0)], 50.0 * MB, 0) == UNLIMITED


def test_with_a_ceiling_the_others_have_what_reserved_lanes_leave() -> None:
    law = Law(1000 * MB)
    assert law.limit([(600.0 * MB, 0.0)], 0.0, 0) == 1000 * MB
    assert law.limit([(600.0 * MB, 100.0 * MB)], 0.0, 0) == 875 * MB
    # Held back once: the lane is there, all of it is taken back.
    assert law.limit([(600.0 * MB, 100.0 * MB)], 0.0, 1) == 400 * MB
    assert law.limit([(600.0 * MB, 600.0 * MB)], 0.0, 0) == 400 * MB
    assert law.limit([(1000.0 * MB, 1000.0 * MB)], 0.0, 0) == 20 * MB


# -- the rebalancer


def _reservation(first_hour: float, last_hour: float, capacity: int = 0, rate: int = 0, node: int = 0) -> Reservation:
    return Reservation(
        secrets.token_hex(4),
        "scan",
        "root",
        capacity,
        rate,
        NOW_NS + int(first_hour * HOUR_NS),
        NOW_NS + int(last_hour * HOUR_NS),
        shares=(Share(node, capacity, rate),),
    )


class Node:
    """A rebalancer over what a catalogue would say."""

    def __init__(self, *uses: ReservationUse, ceiling: int = 0) -> None:
        self.table = ShareTable(None)
        self.uses = list(uses)
        self.generation = 1
        self.asked = 0
        """Rows that the catalogue was asked for."""
        self.rebalancer = Rebalancer(
            self.table,
            node=lambda: 0,
            ceiling=ceiling,
            generation=lambda: self.generation,
            read=self._read,
            used=self._used,
            counters=Counters(None, CONTROL),
        )

    def _read(self) -> list[Reservation]:
        self.asked += len(self.uses)
        return [use.reservation for use in self.uses]

    def _used(self, reservation_id: str, node: int) -> int:
        self.asked += 1
        (used,) = (use.used_bytes for use in self.uses if use.reservation.reservation_id == reservation_id)
        return used.get(node, 0)

    def step(self, hours: float = 0.0) -> None:
        self.rebalancer.step(NOW_NS + int(hours * HOUR_NS), time.monotonic_ns())

    def lane(self, reservation: Reservation) -> int | None:
        return self.table.lanes().get(name_of(reservation.reservation_id))


def test_lanes_follow_the_reservations() -> None:
    now, later, elsewhere = _reservation(0, 1, 100, 10), _reservation(2, 3, 50, 20), _reservation(0, 9, 7, 7, node=3)
    node = Node(ReservationUse(now, {0: 30}), ReservationUse(later), ReservationUse(elsewhere))
    node.step()
    assert node.table.words[ACTIVE] == 1
    lane = node.lane(now)
    assert lane is not None
    assert (node.table.rate(lane), node.table.capacity(lane)) == (10, 100)
    assert (node.lane(later), node.lane(elsewhere)) == (None, None)
    assert node.table.words[HELD_BYTES] == 70
    assert node.table.words[MAKE_ROOM_BYTES] == 70
    # What is let in is on its way: nobody else needs to leave room for it twice.
    node.table.admit(3, lane, 20)
    node.step()
    assert node.table.words[HELD_BYTES] == 50
    # In the grace its rate stays where nobody else has it, its unused capacity is free; an hour before the next there is room.
    node.step(1.01)
    assert node.table.rate(lane) == 10
    assert (node.table.words[HELD_BYTES], node.table.words[MAKE_ROOM_BYTES]) == (0, 50)
    version = node.table.words[VERSION]
    node.step(2.5)
    assert node.table.words[VERSION] != version
    assert (node.lane(now), node.table.words[ACTIVE]) == (None, 1)
    node.step(5)
    assert node.table.words[ACTIVE] == 0


def test_a_tick_asks_for_what_is_in_force_however_much_is_planned() -> None:
    now, planned = _reservation(0, 1, 100, 10), [_reservation(hour, hour + 1, 50, 20) for hour in range(2, 500)]
    node = Node(ReservationUse(now, {0: 30}), *map(ReservationUse, planned))
    node.step()
    node.asked = 0
    for tick in range(10):
        node.step(0.01 * tick)
    assert node.asked == 10
    node.uses[0] = ReservationUse(now, {0: 90})
    node.step(0.2)
    assert node.table.words[HELD_BYTES] == 10
    # The next slot begins without a word from the catalogue, and one that is released ends with it.
    node.step(2.5)
    assert node.lane(planned[0]) is not None
    node.uses[1] = ReservationUse(msgspec.structs.replace(planned[0], released_ns=NOW_NS + 2 * HOUR_NS))
    node.generation += 1
    node.step(2.6)
    assert (node.lane(planned[0]), node.table.words[ACTIVE]) == (None, 0)


def test_grace_yields_to_who_comes_after() -> None:
    before, after = _reservation(-1, 0, rate=800), _reservation(0, 1, rate=700)
    node = Node(ReservationUse(before), ReservationUse(after), ceiling=1000)
    node.step(0.01)
    lanes = [node.lane(before), node.lane(after)]
    assert [node.table.rate(lane) for lane in lanes if lane is not None] == [300, 700]


def test_a_new_worker_has_let_nothing_in() -> None:
    table = ShareTable(None)
    table.admit(4, 0, 1000)
    table.receive(4, 0, 500)
    Shaper(table, 4, lambda _: BEST)
    assert (table.admitted(0), table.received(0)) == (0, 500)


# -- a worker


@dataclasses.dataclass(eq=False)
class Stream:
    """A body whose socket always has ``waits`` bytes."""

    waits: int = 0
    lane: int = BEST
    lane_version: int = -1
    counted: int = 0
    turn_bytes: int = 0
    ended: bool = False
    failure: None = None
    received_total: int = 0
    woken: int = 0

    window: int = 0

    def backlog(self) -> int:
        return self.waits

    def set_window(self, size_bytes: int) -> None:
        self.window = size_bytes

    def wake(self) -> None:
        self.woken += 1


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        met = condition()
        while not met:
            await asyncio.sleep(0.001)
            met = condition()


@pytest.fixture
def table() -> ShareTable:
    """One lane is in force: 100 MB/s."""
    table = ShareTable(None)
    table.set_lane(0, name_of("r"), 100 * MB, 0)
    table.words[ACTIVE] = 1
    table.words[VERSION] += 1
    return table


def _shaper(table: ShareTable, reserved: Stream | None = None) -> Shaper:
    return Shaper(table, 1, lambda body: 0 if cast(Any, body) is reserved else BEST)


def _allowed(shaper: Shaper, stream: Stream) -> int:
    return shaper.allowed(cast(Any, stream))


async def test_others_hold_while_a_reserved_stream_is_short(table: ShareTable) -> None:
    reserved, other = Stream(waits=1 << 20), Stream()
    shaper = _shaper(table, reserved)
    assert _allowed(shaper, reserved) == ANY
    assert _allowed(shaper, other) == TURN_BYTES
    # It reads nothing of what waits: something keeps it from its rate.
    await _until(lambda: table.holds() > 0)
    assert _allowed(shaper, other) == 0
    shaper.queue(cast(Any, other))
    assert _allowed(shaper, reserved) == ANY
    # It has caught up, and nothing waits: the others go on.
    reserved.received_total += 1000 * MB
    reserved.waits = 0
    _allowed(shaper, reserved)
    await _until(lambda: other.woken > 0)
    assert _allowed(shaper, other) == TURN_BYTES
    table.words[ACTIVE] = 0


async def test_an_idle_reserved_stream_holds_nobody(table: ShareTable) -> None:
    reserved, other = Stream(), Stream()
    shaper = _shaper(table, reserved)
    _allowed(shaper, reserved)
    ticks = 0
    while ticks < 20:
        assert _allowed(shaper, other) > 0
        await asyncio.sleep(0.005)
        ticks += 1
    assert table.holds() == 0
    table.words[ACTIVE] = 0


async def test_who_is_beyond_its_rate_is_one_of_many(table: ShareTable) -> None:
    reserved = Stream()
    shaper = _shaper(table, reserved)
    assert _allowed(shaper, reserved) == ANY
    reserved.received_total += 50 * MB
    assert _allowed(shaper, reserved) == TURN_BYTES
    table.words[HOLD_UNTIL_NS] = time.monotonic_ns() + 60 * SECOND_NS
    assert _allowed(shaper, reserved) == 0
    shaper.queue(cast(Any, reserved))
    # In half a second it has earned what it took, within what a lane may owe.
    await _until(lambda: reserved.woken > 0)
    assert _allowed(shaper, reserved) == ANY
    table.words[ACTIVE] = 0


async def test_turns_go_round(table: ShareTable) -> None:
    shaper = _shaper(table)
    streams = [Stream() for _ in range(5)]
    rng = random.Random(7)
    for _ in range(200):
        for stream in rng.sample(streams, len(streams)):
            if count := _allowed(shaper, stream):
                stream.received_total += min(count, TURN_BYTES)
            if not _allowed(shaper, stream) and cast(Any, stream) not in shaper._queue:
                shaper.queue(cast(Any, stream))
        await asyncio.sleep(0)
    totals = [stream.received_total for stream in streams]
    assert min(totals) > 0
    assert max(totals) - min(totals) <= 2 * TURN_BYTES
    table.words[ACTIVE] = 0


async def test_a_grant_is_kept(table: ShareTable) -> None:
    shaper = _shaper(table)
    stream = Stream()
    table.set_grant(1, 20 * MB)
    table.words[TICKED_NS] = time.monotonic_ns()
    assert _allowed(shaper, stream) > 0
    await _until(lambda: shaper._tokens < 20 * MB)  # the first tick has come
    started = time.monotonic()
    while time.monotonic() - started < 0.5:
        table.words[TICKED_NS] = time.monotonic_ns()  # somebody rebalances
        if count := _allowed(shaper, stream):
            stream.received_total += min(count, 64 << 10)
        elif cast(Any, stream) not in shaper._queue:
            shaper.queue(cast(Any, stream))
        await asyncio.sleep(0)
    rate = stream.received_total / (time.monotonic() - started)
    assert rate < 1.5 * 20 * MB
    assert stream.received_total > 0
    table.words[ACTIVE] = 0


async def test_the_end_of_all_reservations_wakes_everybody(table: ShareTable) -> None:
    shaper = _shaper(table)
    stream = Stream()
    table.words[HOLD_UNTIL_NS] = time.monotonic_ns() + 60 * SECOND_NS
    assert _allowed(shaper, stream) == 0
    shaper.queue(cast(Any, stream))
    table.words[ACTIVE] = 0
    await _until(lambda: stream.woken > 0)


# -- capacity


class Index:
    """What an admission asks of the catalogue."""

    def __init__(self, *reserved: Reservation) -> None:
        self._reserved = reserved
        self.used = 0

    def generation(self) -> int:
        return 1

    def reserved(self) -> tuple[Reservation, ...]:
        return self._reserved

    def used_bytes(self, _: str, node: int) -> int:
        return self.used if node == 0 else 0

    def now_ns(self) -> int:
        return NOW_NS


def _spec(length: int | None, bucket: str = "scan") -> StreamSpec:
    return StreamSpec(BucketRecord(bucket, "root", 0), BucketSettings(), b"k", length)


def test_bodies_count_from_their_admission_to_their_end() -> None:
    reservation = _reservation(-1, 1, capacity=10 * MB)
    index, table = Index(reservation), ShareTable(None)
    workers = [Admissions(cast(Any, index), table, 0, worker) for worker in (0, 1)]
    # A slot that has just begun has no lane yet.
    first = workers[0].admit(_spec(4 * MB))
    table.set_lane(5, name_of(reservation.reservation_id), 0, 10 * MB)
    second = workers[1].admit(_spec(4 * MB))
    with pytest.raises(NotAdmitted, match="left of 10 MB"):
        workers[0].admit(_spec(4 * MB))
    with pytest.raises(NotAdmitted):
        workers[0].grow(_spec(None), first, 4 * MB)
    workers[0].grow(_spec(None), first, 1 * MB)
    assert table.admitted(5) > 9 * MB
    # One is committed, the other is gone.
    index.used = 4 * MB
    workers[1].let_go(second)
    workers[0].let_go(first)
    assert (table.admitted(5), table.admitted(BEST)) == (0, 0)
    workers[0].admit(_spec(5 * MB))
    assert workers[0].admit(_spec(10**12, "other")).lane is None


def test_a_second_copy_is_one_of_many_unless_its_bucket_is_in_a_slot() -> None:
    reservation, table = _reservation(-1, 1, rate=MB), ShareTable(None)
    table.set_lane(5, name_of(reservation.reservation_id), MB, 0)
    admissions = Admissions(cast(Any, Index(reservation)), table, 0, 0)

    def lane(bucket: str, *, is_copy: bool) -> int:
        return admissions.lane_of(cast(Any, SimpleNamespace(spec=_spec(1, bucket), is_copy=is_copy, began_ns=NOW_NS)))

    assert [lane("scan", is_copy=False), lane("other", is_copy=False)] == [5, BEST]
    assert [lane("scan", is_copy=True), lane("other", is_copy=True)] == [EXEMPT, BEST]


async def test_windows_of_others_are_narrow_while_something_is_reserved(table: ShareTable) -> None:
    reserved, other, gone = Stream(), Stream(), Stream()
    shaper = _shaper(table, reserved)
    table.words[WINDOW_BYTES] = 300_000
    for stream in (reserved, other, gone):
        _allowed(shaper, stream)
    assert [reserved.window, other.window, gone.window] == [0, 300_000, 300_000]
    shaper.ended(cast(Any, gone))
    assert gone.window == 0
    table.words[WINDOW_BYTES] = 100_000
    await _until(lambda: other.window == 100_000)
    table.words[ACTIVE] = 0
    await _until(lambda: other.window == 0)
    assert [reserved.window, gone.window] == [0, 0]


def test_what_is_on_its_way_to_others_is_a_few_milliseconds_of_the_ceiling() -> None:
    node = Node(ReservationUse(_reservation(0, 1, rate=MB)), ceiling=100 * MB)
    for bodies, window in ((0, 500_000), (2, 250_000), (1000, 64 << 10)):
        node.table.set_bodies(3, BEST, bodies, 0)
        node.step()
        assert node.table.words[WINDOW_BYTES] == window
    node = Node(ReservationUse(_reservation(0, 1, rate=MB)))
    node.step()
    assert node.table.words[WINDOW_BYTES] == 1 << 20


async def test_an_exempt_body_waits_for_nobody(table: ShareTable) -> None:
    copy = Stream()
    shaper = Shaper(table, 1, lambda _: EXEMPT)
    table.words[HOLD_UNTIL_NS] = time.monotonic_ns() + 60 * SECOND_NS
    assert _allowed(shaper, copy) == ANY
    assert table.received(BEST) == 0
    table.words[ACTIVE] = 0


def test_where_a_slot_has_no_share_its_bucket_is_one_of_many() -> None:
    index = Index(_reservation(-1, 1, capacity=10, node=3))
    admission = Admissions(cast(Any, index), ShareTable(None), 0, 0).admit(_spec(10**9))
    assert admission.lane is None

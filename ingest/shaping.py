"""Who may read now: a worker's part of keeping what is reserved, while anything is reserved.

In: the node's ``ShareTable``, bodies that ask for memory to receive into. Out: yes, or a place in a queue. The reserved lane of a
bucket earns credit at its rate and spends it with every byte. One that has credit and leaves bytes waiting in its socket is
short: then it has everybody without credit hold (in all workers, by one word of shared memory) until it has caught up. So
it needs no guess at what the machine can do; what a reserved lane does not take, others have. Beyond that a worker's unreserved
bodies share the rate it was granted (ingest/rebalance.py) turn by turn, a turn in each round of the loop: so a reserved socket
is looked at again after a millisecond, however many others there are and however much waits in theirs.
Always holds: nobody with credit waits; where nothing is reserved the price is one look at a word for each read.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from ingest.share_table import (
    ACTIVE,
    BEST,
    EXEMPT,
    HOLD_UNTIL_NS,
    TICKED_NS,
    UNLIMITED,
    VERSION,
    WINDOW_BYTES,
    ShareTable,
)

if TYPE_CHECKING:
    from ingest.body import Body

TICK_S = 0.004
LATE_S = 0.004
"""A lane with credit for so long, and bytes waiting, is short."""
AHEAD_S = 0.02
"""A lane may be so much ahead of its rate before it is one of many: who sends at its rate is a little ahead half of the time."""
ANY = 1 << 40
HOLD_NS = 10_000_000
"""A hold that is not renewed ends after this: a worker that dies holds nobody for long."""
CREDIT_S = 0.25
"""Most that a lane saves up; a lane that was held up catches up with it."""
DEBT_S = 0.07
"""Most that a lane owes: who took more than its rate while nobody else wanted it does not pay for it afterwards."""
BACKLOG_BYTES = 64 << 10
"""So little in a socket is on its way, not waiting."""
BURST_S = 0.02
TURN_BYTES = 1 << 20
"""What a body reads in its turn: below a millisecond's work."""
_STALE_NS = 2_000_000_000
"""Grants that nobody has renewed for so long are void: the process that makes them is gone."""


class Shaper:
    """One for a worker; ``lane_of`` says which lane of the table a body belongs to."""

    def __init__(self, table: ShareTable, worker: int, lane_of: Callable[[Body], int]) -> None:
        self.table = table
        self.words = table.words
        self.worker = worker
        self._lane_of = lane_of
        self._bodies: dict[int, set[Body]] = {}
        """Of reserved lanes."""
        self._credit: dict[int, float] = {}
        self._seen: dict[int, int] = {}
        self._own: dict[int, int] = {}
        """Bytes of this worker since ``_seen``: they are deducted already."""
        self._backlogged: set[int] = set()
        self._tokens = float("inf")
        self._queue: deque[Body] = deque()
        self._ticking = False
        self._ticked_ns = 0
        self._others: set[Body] = set()
        """Bodies without a lane; the window of each is narrow."""
        self._window = 0
        self._holding = False
        self._dealing = False
        table.clear_worker(worker)

    # -- for bodies

    def allowed(self, body: Body) -> int:
        """How many bytes the body may receive now; 0: it has to wait. Only to be asked while ``words[ACTIVE]``."""
        words = self.words
        if not self._ticking:
            self._start()
        if body.lane_version != words[VERSION]:
            self._assign(body)
        self._count(body)
        lane = body.lane
        if lane != BEST and self._has_credit(lane):
            return ANY
        if body.turn_bytes > 0 and self._may_deal(time.monotonic_ns()):
            return body.turn_bytes
        return 0

    def queue(self, body: Body) -> None:
        """``body.wake`` is called when it is its turn."""
        self._queue.append(body)
        if not self._dealing:
            self._dealing = True
            asyncio.get_running_loop().call_soon(self._deal)

    def ended(self, body: Body) -> None:
        """The body receives no more."""
        if body.lane_version >= 0:
            self._count(body)
            self._leave(body)
            body.set_window(0)
            body.lane_version = -1

    def share_of(self, body: Body) -> int:
        """Reserved bytes per second that the body may count on; 0: none."""
        if not self.words[ACTIVE] or body.lane_version != self.words[VERSION] or body.lane in (BEST, EXEMPT):
            return 0
        return self.table.rate(body.lane) // max(1, len(self._bodies.get(body.lane, ())))

    # -- lanes

    def _assign(self, body: Body) -> None:
        self._leave(body)
        body.lane_version = self.words[VERSION]
        body.counted = body.received_total  # what came before is nobody's
        body.turn_bytes = TURN_BYTES
        body.lane = self._lane_of(body)
        if body.lane == BEST:
            self._others.add(body)
            body.set_window(self.words[WINDOW_BYTES])
            return
        body.set_window(0)
        if body.lane != EXEMPT:
            self._bodies.setdefault(body.lane, set()).add(body)
            if body.lane not in self._credit:
                self._credit[body.lane] = 0.0
                self._seen[body.lane] = self.table.received(body.lane)
                self._own[body.lane] = 0

    def _leave(self, body: Body) -> None:
        if body.lane_version < 0 or body.lane == EXEMPT:
            return
        if body.lane == BEST:
            self._others.discard(body)
            return
        of_lane = self._bodies.get(body.lane)
        if of_lane is not None:
            of_lane.discard(body)

    def _count(self, body: Body) -> None:
        total = body.received_total
        count = total - body.counted
        if not count:
            return
        body.counted = total
        lane = body.lane
        if lane == EXEMPT:
            return
        self.table.receive(self.worker, lane, count)
        if lane != BEST:
            self._own[lane] += count
            in_credit = self._has_credit(lane)
            self._credit[lane] -= count
            if in_credit:
                return
        body.turn_bytes -= count
        self._tokens -= count

    # -- the tick

    def _start(self) -> None:
        self._ticking = True
        self._ticked_ns = time.monotonic_ns()
        asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        words = self.words
        now_ns = time.monotonic_ns()
        elapsed_s = (now_ns - self._ticked_ns) / 1e9
        self._ticked_ns = now_ns
        if not words[ACTIVE]:
            self._ticking = False
            self._stop()
            return
        # First of all: whatever goes wrong below, those who wait are looked at again.
        asyncio.get_running_loop().call_later(TICK_S, self._tick)
        short = [self._is_short(lane, elapsed_s) for lane in list(self._bodies)]
        if any(short):
            words[HOLD_UNTIL_NS] = now_ns + HOLD_NS
            self._holding = True
            self.table.count_hold(self.worker)
        elif self._holding:
            self._holding = False
            words[HOLD_UNTIL_NS] = 0  # if somebody else holds, too, they will say so again
        self._refill(now_ns, elapsed_s)
        if self._queue:
            self._let_free()
            if not self._dealing:
                self._deal()
        self.table.set_bodies(self.worker, BEST, len(self._others), len(self._queue))
        self._narrow()

    def _is_short(self, lane: int, elapsed_s: float) -> bool:
        """Update the lane's credit; whether it is kept from spending it: by much, or at this tick and at the one before."""
        bodies = self._bodies[lane]
        if not bodies:
            del self._bodies[lane]
            for known in (self._credit, self._seen, self._own):
                del known[lane]
            self._backlogged.discard(lane)
            self.table.set_bodies(self.worker, lane, 0, 0)
            return False
        for body in bodies:
            if body.lane_version == self.words[VERSION]:
                self._count(body)
        rate = self.table.rate(lane)
        received = self.table.received(lane)
        elsewhere = received - self._seen[lane] - self._own[lane]
        self._seen[lane], self._own[lane] = received, 0
        credit = self._credit[lane] + rate * elapsed_s - elsewhere
        credit = self._credit[lane] = min(max(credit, -rate * DEBT_S), rate * CREDIT_S)
        self.table.set_bodies(self.worker, lane, len(bodies), 0)
        waits = credit > rate * LATE_S and any(body.backlog() > BACKLOG_BYTES for body in bodies)
        before = lane in self._backlogged
        (self._backlogged.add if waits else self._backlogged.discard)(lane)
        if credit > 0 and not waits:
            # Nothing came to spend it on: an idle lane does not save up.
            self._credit[lane] = min(credit, rate * LATE_S)
        return waits and (before or credit > rate * 3 * LATE_S)

    def _refill(self, now_ns: int, elapsed_s: float) -> None:
        grant = self.table.grant(self.worker)
        if grant >= UNLIMITED or now_ns - self.words[TICKED_NS] > _STALE_NS:
            self._tokens = float("inf")
            return
        if self._tokens == float("inf"):
            self._tokens = 0.0
        self._tokens = min(self._tokens + grant * elapsed_s, grant * BURST_S)

    def _narrow(self) -> None:
        """What is on its way to others is in the way of a reserved stream: the network's queues hold it up, where we see nothing
        wait."""
        if self.words[WINDOW_BYTES] != self._window:
            self._window = self.words[WINDOW_BYTES]
            for body in self._others:
                body.set_window(self._window)

    def _may_deal(self, now_ns: int) -> bool:
        return self._tokens > 0 and self.words[HOLD_UNTIL_NS] <= now_ns

    def _deal(self) -> None:
        """Give the next one in the queue its turn, once in a round of the loop; while nobody may have one, the tick looks."""
        self._dealing = False
        for _ in range(len(self._queue)):
            body = self._queue.popleft()
            if self._is_free(body):
                body.wake()
            elif self._may_deal(time.monotonic_ns()):
                body.turn_bytes = TURN_BYTES
                body.wake()
                break
            else:
                self._queue.append(body)
        else:
            return
        if self._queue:
            self._dealing = True
            asyncio.get_running_loop().call_soon(self._deal)

    def _let_free(self) -> None:
        """Those that have credit by now wait for nobody's turn."""
        free = [body for body in self._queue if self._is_free(body)]
        if free:
            self._queue = deque(body for body in self._queue if body not in free)
            for body in free:
                body.wake()

    def _is_free(self, body: Body) -> bool:
        """Whether it need not wait for a turn: it has credit, or nothing to wait for."""
        if body.ended or body.failure is not None or body.lane_version != self.words[VERSION]:
            return True
        return body.lane != BEST and self._has_credit(body.lane)

    def _has_credit(self, lane: int) -> bool:
        return lane == EXEMPT or self._credit.get(lane, 0.0) > -AHEAD_S * self.table.rate(lane)

    def _stop(self) -> None:
        """Nothing is reserved any more."""
        self._window = 0
        for body in self._others:
            body.set_window(0)
        self._tokens = float("inf")
        while self._queue:
            self._queue.popleft().wake()

"""What the drain does next. Pure: events and ``now`` (monotonic seconds) in, instructions out; archive/drain.py carries
them out and brings back what happened as the next events.

Always true: no version is copied twice at the same time; at most ``parallel_objects`` are copied and at most
``CLAIM_AHEAD`` times as many are held; while the target fails whatever it is given, the drain pauses, each time longer,
instead of running through the queue marking every version failed.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

from archive.pace import DrainLimits
from ingest.records import ObjectRecord

CLAIM_AHEAD = 4
FAILURES_BEFORE_PAUSE = 4
_PAUSE_FIRST_S = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """Ask the catalogue for up to ``limit`` versions; answer with ``claimed`` or ``claim_failed``."""

    limit: int


@dataclasses.dataclass(frozen=True, slots=True)
class Start:
    """Copy this version; answer with ``finished`` or ``failed``."""

    record: ObjectRecord


Instruction = Claim | Start


class Scheduler:
    def __init__(self, limits: DrainLimits) -> None:
        self._limits = limits
        self._waiting: deque[ObjectRecord] = deque()
        """Leased, not started; oldest deadline first. Never overlaps ``_running``."""
        self._running: set[bytes] = set()
        self._claiming = False
        self._claim_at = 0.0
        self._paused_until = 0.0
        self._pauses = 0
        self._failures_in_row = 0

    def step(self, now: float) -> list[Instruction]:
        """Everything that can be done now. Instructions count as carried out: asking again gives only new ones."""
        if now < self._paused_until:
            return []
        steps: list[Instruction] = []
        while self._waiting and len(self._running) < self._parallel():
            record = self._waiting.popleft()
            self._running.add(record.object_id)
            steps.append(Start(record))
        if not self._claiming and not self._waiting and now >= self._claim_at:
            self._claiming = True
            # Room for what is running: a lease that ran out is given to us again, which renews it.
            steps.append(Claim(self._limits.parallel_objects * CLAIM_AHEAD))
        return steps

    def wake_at(self) -> float | None:
        """When ``step`` may have something to say although nothing happened; None: only after an event."""
        if self._claiming or self._waiting:
            return self._paused_until if self._waiting and len(self._running) < self._parallel() else None
        return max(self._claim_at, self._paused_until)

    def claimed(self, records: Sequence[ObjectRecord], now: float) -> None:
        self._claiming = False
        known = self._running | {record.object_id for record in self._waiting}
        fresh = [record for record in records if record.object_id not in known]
        self._waiting.extend(fresh)
        # Only our own leases came back, or nothing: look again later. Otherwise as soon as these are under way.
        self._claim_at = now if fresh else now + self._limits.poll_s

    def claim_failed(self, now: float) -> None:
        self._claiming = False
        self._claim_at = now + max(1.0, self._limits.poll_s)

    def finished(self, object_id: bytes) -> None:
        """Archived, or gone meanwhile."""
        self._running.discard(object_id)
        self._failures_in_row = 0
        self._pauses = 0
        self._paused_until = 0.0

    def failed(self, object_id: bytes, now: float, *, whole_target: bool) -> None:
        self._running.discard(object_id)
        self._failures_in_row += 1
        if now < self._paused_until:
            return
        if whole_target or self._failures_in_row >= FAILURES_BEFORE_PAUSE:
            self._paused_until = now + min(self._limits.pause_cap_s, _PAUSE_FIRST_S * 2.0 ** min(self._pauses, 20))
            self._pauses += 1

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def paused_until(self) -> float:
        return self._paused_until

    def validate(self) -> None:
        """The invariants, for tests."""
        waiting = [record.object_id for record in self._waiting]
        assert len(set(waiting)) == len(waiting)
        assert self._running.isdisjoint(waiting)
        assert len(self._running) <= self._limits.parallel_objects
        assert len(waiting) <= self._limits.parallel_objects * CLAIM_AHEAD

    def _parallel(self) -> int:
        # After a pause one version tries the target; the others follow once it got through.
        return 1 if self._pauses else self._limits.parallel_objects

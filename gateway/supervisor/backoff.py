"""When to start a dead process again. Pure: takes ``now``, returns delays."""

from __future__ import annotations

import collections

FIRST_S = 0.1
CAP_S = 10.0
HEALTHY_S = 30.0
FAILING_DEATHS_PER_MINUTE = 5


class Backoff:
    """Doubles from ``first_s`` to ``cap_s``; a run of at least ``healthy_s`` seconds starts it over. Never gives up."""

    def __init__(self, first_s: float = FIRST_S, cap_s: float = CAP_S, healthy_s: float = HEALTHY_S) -> None:
        assert 0 < first_s <= cap_s
        self._first_s = first_s
        self._cap_s = cap_s
        self._healthy_s = healthy_s
        self._next_s = first_s
        self._started = 0.0
        self._deaths: collections.deque[float] = collections.deque(maxlen=FAILING_DEATHS_PER_MINUTE)

    def started(self, now: float) -> None:
        """The process was started at ``now`` (seconds of a monotonic clock)."""
        self._started = now

    def died(self, now: float) -> float:
        """The process ended at ``now``; returns the seconds to wait before the next start."""
        self._deaths.append(now)
        if now - self._started >= self._healthy_s:
            self._next_s = self._first_s
        delay_s = self._next_s
        self._next_s = min(self._next_s * 2, self._cap_s)
        return delay_s

    def failing(self, now: float) -> bool:
        """Whether the last minute saw ``FAILING_DEATHS_PER_MINUTE`` deaths: an operator should look."""
        full = len(self._deaths) == FAILING_DEATHS_PER_MINUTE
        return full and now - self._deaths[0] < 60.0

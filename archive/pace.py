"""How fast and how often: the limits of the drain process, its retries and its byte rate. Pure: ``now`` is passed in.

Always true: every wait has an upper bound, and a rate limit never adds up more than one second of arrears.
"""

from __future__ import annotations

import dataclasses
import random


@dataclasses.dataclass(frozen=True, slots=True)
class DrainLimits:
    """Every limit of the drain process; ValueError when they contradict each other."""

    parallel_objects: int = 2
    chunk_bytes: int = 8 << 20
    """Bytes in flight are at most two chunks an object: one from the source, one read back."""
    rate_bytes_per_s: float | None = None
    """Bytes written to the target; None is as fast as it goes."""
    lease_s: float = 15.0
    """A dead drain's objects are claimed again after this long. Longer work is safe: claiming again renews it."""
    poll_s: float = 0.25
    """Between two looks at an empty queue."""
    retry_first_s: float = 1.0
    retry_cap_s: float = 300.0
    pause_cap_s: float = 30.0
    """Longest pause of the whole drain while the target fails object after object."""
    evict_high: float = 0.80
    evict_low: float = 0.70
    """Fractions of the buffer: eviction starts above ``high`` and stops at ``low``."""
    evict_batch_objects: int = 256
    recall_parallel_objects: int = 2
    recall_room_s: float = 8.0
    """How long a recall waits for room in a full buffer, for evictions are on their way then, before it fails."""
    sweep_interval_s: float = 3600.0
    sweep_objects_per_s: float = 500.0
    tombstone_batch_objects: int = 256
    tombstones_at_once: int = 32
    """Deleted versions whose copies are removed at the same time."""
    snapshots_kept: int = 2
    stop_grace_s: float = 10.0
    """At a stop, objects in flight may finish within this time; then they are given back."""

    def __post_init__(self) -> None:
        checks = {
            "parallel_objects from 1 to 64": 1 <= self.parallel_objects <= 64,
            "recall_parallel_objects from 1 to 64": 1 <= self.recall_parallel_objects <= 64,
            "chunk_bytes a multiple of 1 MiB up to 64 MiB": 0 < self.chunk_bytes <= 64 << 20
            and self.chunk_bytes % (1 << 20) == 0,
            "rate_bytes_per_s above 0": self.rate_bytes_per_s is None or self.rate_bytes_per_s > 0,
            "0 <= evict_low < evict_high <= 1": 0 <= self.evict_low < self.evict_high <= 1,
            "0 < retry_first_s <= retry_cap_s": 0 < self.retry_first_s <= self.retry_cap_s,
            "tombstones_at_once from 1": self.tombstones_at_once >= 1,
            "snapshots_kept from 1": self.snapshots_kept >= 1,
            "recall_room_s from 0": self.recall_room_s >= 0,
            "times above 0": min(self.lease_s, self.poll_s, self.sweep_objects_per_s) > 0,
        }
        for rule, holds in checks.items():
            if not holds:
                raise ValueError(f"drain limits: {rule}")


def retry_after_s(attempts: int, first_s: float, cap_s: float, rng: random.Random) -> float:
    """Exponential with a cap; the last half is jitter, so that objects that failed together do not return together."""
    full_s = min(cap_s, first_s * 2.0 ** min(attempts, 60))
    return full_s * (0.5 + 0.5 * rng.random())


class RateLimit:
    """A token bucket of one second. ``take`` says how long to wait before the bytes just taken may move."""

    def __init__(self, rate_bytes_per_s: float | None, now: float) -> None:
        self._rate = rate_bytes_per_s
        self._tokens = rate_bytes_per_s or 0.0
        self._then = now

    def take(self, size_bytes: int, now: float) -> float:
        if self._rate is None:
            return 0.0
        self._tokens = min(self._rate, self._tokens + max(0.0, now - self._then) * self._rate)
        self._then = max(self._then, now)
        self._tokens -= size_bytes
        return max(0.0, -self._tokens / self._rate)

"""Sets of frame numbers, kept as sorted, disjoint, non-touching half-open ranges.

In: ranges as (first frame, count). Out: the same, merged. A stream of a million frames in order is one range, so every
operation costs what the number of *gaps* costs, not the number of frames.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator


class Ranges:
    """A set of whole numbers. Adding what is there already, or removing what is not, changes nothing."""

    __slots__ = ("_starts", "_stops", "total")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self.total = 0
        """Numbers in the set."""

    def __bool__(self) -> bool:
        return self.total > 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(first, count) in rising order."""
        for start, stop in zip(self._starts, self._stops, strict=True):
            yield start, stop - start

    @property
    def stop(self) -> int:
        """Behind the last number; 0 for none."""
        return self._stops[-1] if self._stops else 0

    def add(self, first: int, count: int) -> None:
        if count <= 0:
            return
        start, stop = first, first + count
        low = bisect.bisect_left(self._stops, start)
        high = bisect.bisect_right(self._starts, stop)
        if low < high:
            start = min(start, self._starts[low])
            stop = max(stop, self._stops[high - 1])
            self.total -= sum(self._stops[low:high]) - sum(self._starts[low:high])
        self._starts[low:high] = [start]
        self._stops[low:high] = [stop]
        self.total += stop - start

    def remove(self, first: int, count: int) -> None:
        if count <= 0:
            return
        start, stop = first, first + count
        low = bisect.bisect_right(self._stops, start)
        high = bisect.bisect_left(self._starts, stop)
        if low >= high:
            return
        left, right = self._starts[low], self._stops[high - 1]
        self.total -= sum(self._stops[low:high]) - sum(self._starts[low:high])
        kept = [(a, b) for a, b in ((left, start), (stop, right)) if a < b]
        self._starts[low:high] = [a for a, _ in kept]
        self._stops[low:high] = [b for _, b in kept]
        self.total += sum(b - a for a, b in kept)

    def update(self, other: Ranges) -> None:
        for first, count in other:
            self.add(first, count)

    def covers(self, first: int, count: int) -> bool:
        """Whether every one of ``count`` numbers from ``first`` is in the set."""
        if count <= 0:
            return True
        at = bisect.bisect_right(self._starts, first) - 1
        return at >= 0 and first + count <= self._stops[at]

    def head(self, count_max: int) -> tuple[int, int] | None:
        """The lowest range, cut to ``count_max``; None when the set is empty."""
        if not self._starts:
            return None
        return self._starts[0], min(count_max, self._stops[0] - self._starts[0])

    def clear(self) -> None:
        self._starts.clear()
        self._stops.clear()
        self.total = 0

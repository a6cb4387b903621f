"""Which images of a detector series arrived, by the numbers the detector gave them.

In: start and image messages in the order they came. Out: the gaps. Numbers of a second series in the same body count on
from the end of the first.
"""

from __future__ import annotations

from kernels.ranges import Ranges

NUMBER_MAX = 1 << 40
GAPS_MAX = 1000
"""Gaps that are named; a stream with more is told by its counts."""


class Series:
    def __init__(self) -> None:
        self._seen = Ranges()
        self._base = 0
        self._end = 0
        self._begin: int | None = None
        """First number expected: 0 once a start message came, else the first that arrived."""

    def start(self, images: int | None) -> None:
        self._base = self._end
        if self._begin is None:
            self._begin = self._base
        if images is not None and images < NUMBER_MAX:
            self._end = max(self._end, self._base + images)

    def image(self, number: int | None) -> None:
        """An image without a number is the next one."""
        place = self._base + (number if number is not None and number < NUMBER_MAX else self._seen.total)
        if self._begin is None or (place < self._begin and self._base == 0):
            self._begin = place
        self._seen.add(place, 1)
        self._end = max(self._end, place + 1)

    def gaps(self) -> tuple[tuple[int, int], ...]:
        """(first missing number, how many)."""
        missing = Ranges()
        if self._begin is not None:
            missing.add(self._begin, self._end - self._begin)
            for first, count in self._seen:
                missing.remove(first, count)
        return tuple(missing)[:GAPS_MAX]

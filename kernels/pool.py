"""The lanes of a worker: one for each kernel, parameter set and frame layout; a bounded number with a process.

In: streams that ask for a lane, lanes that ask for a process, the passage of time. Out: lanes; idle ones are closed after
``idle_s``, or at once where another lane wants a process or another bucket wants memory regions.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine

from ingest.counters import Cell
from kernels.lane import Lane, LaneKey

log = logging.getLogger("hiss.kernels")


class LanePool:
    """``spawn`` runs a background task that the host ends on close."""

    def __init__(
        self,
        processes_max: int,
        idle_s: float,
        gauge: Cell,
        spawn: Callable[[Coroutine[object, object, None], str], None],
    ) -> None:
        self._processes_max = processes_max
        self._idle_s = idle_s
        self._gauge = gauge
        self._spawn = spawn
        self._lanes: dict[LaneKey, Lane] = {}
        self._admitted: set[Lane] = set()
        self._closing: set[Lane] = set()
        self._turn = asyncio.Condition()

    @property
    def lanes(self) -> tuple[Lane, ...]:
        return tuple(self._lanes.values())

    def get(self, key: LaneKey, make: Callable[[], Lane]) -> Lane:
        """The lane of ``key``, made if there is none. The caller joins it before it awaits anything."""
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = make()
        return lane

    def has(self, key: LaneKey) -> bool:
        return key in self._lanes

    async def admit(self, lane: Lane) -> int:
        """Returns once ``lane`` may have a process: how many lanes have one then."""
        async with self._turn:
            while len(self._admitted) >= self._processes_max:
                self.close_idle(lambda other: other in self._admitted, at_most=1)
                await self._turn.wait()
            self._admitted.add(lane)
            self._gauge.set(len(self._admitted))
            return len(self._admitted)

    def dismissed(self, lane: Lane) -> None:
        """The lane is closed and its process gone."""
        self._admitted.discard(lane)
        self._closing.discard(lane)
        self._gauge.set(len(self._admitted))
        # A lane that can serve nobody stays until it has idled: whoever asks next is told why at once.
        if self._lanes.get(lane.key) is lane and not lane.refused:
            del self._lanes[lane.key]
        self._spawn(self._notify(), "lane turn")

    def became_idle(self) -> None:
        """Some lane lost its last stream: whoever waits for a process may take its place."""
        if len(self._admitted) >= self._processes_max:
            self._spawn(self._notify(), "lane turn")

    def close_idle(self, wanted: Callable[[Lane], bool], *, at_most: int = 1 << 30) -> int:
        """Begin to close lanes without streams, longest idle first; how many."""
        idle = [lane for lane in self._lanes.values() if lane.idle_since_s is not None and wanted(lane)]
        idle.sort(key=lambda lane: lane.idle_since_s or 0.0)
        for lane in idle[:at_most]:
            # From here on a new stream gets a new lane.
            del self._lanes[lane.key]
            if not lane.refused:
                self._closing.add(lane)
                self._spawn(lane.close(), "close lane")
        return len(idle[:at_most])

    def sweep(self) -> None:
        """Close what has idled too long."""
        before_s = time.monotonic() - self._idle_s
        self.close_idle(lambda lane: (lane.idle_since_s or 0.0) < before_s)

    async def close(self) -> None:
        lanes = [*self._lanes.values(), *self._closing]
        self._lanes.clear()
        await asyncio.gather(*(lane.close() for lane in lanes))

    async def _notify(self) -> None:
        async with self._turn:
            self._turn.notify_all()

"""Shared memory in which a node's processes agree who may take in how much: one look tells a worker that nothing is reserved.

In: the lanes of active reservations and the grants, written by the one process that rebalances (ingest/rebalance.py); what came
in, what was admitted and how many bodies wait, written by each worker in cells of its own. Out: the same to everybody.
Always holds: every word has one writer, but for HOLD_UNTIL_NS, which any worker may move forward (a lost race costs a few
milliseconds of holding), and admission, which is done under a lock that dies with its process.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
from collections.abc import Iterator

WORKERS = 32
LANES = 32
"""Reservations in force on one node at a time that are shaped; capacity is counted for these alone, too."""
BEST = LANES
"""The lane of everybody else."""
EXEMPT = -1
"""The lane of second copies of bodies in a slot: who sends them has its rate where they come from."""

ACTIVE = 0
"""How many lanes are in force. 0: nothing else here means anything."""
HOLD_UNTIL_NS = 1
"""CLOCK_MONOTONIC until which only lanes that have credit may read."""
VERSION = 2
"""Changes whenever the lanes do."""
HELD_BYTES = 3
"""Reserved capacity of this node that is not used yet: others leave it alone."""
MAKE_ROOM_BYTES = 4
"""As HELD_BYTES, and of slots that begin soon: eviction makes room for it."""
TICKED_NS = 5
"""CLOCK_MONOTONIC of the last rebalancing."""
WINDOW_BYTES = 6
"""What may be on its way to each body without a lane, beyond what was read of it."""
_HEADER = 16

_LANE_WORDS = 4
_NAME, _RATE, _CAPACITY = range(3)

_CELL_WORDS = 4
_RECEIVED, _ADMITTED, _BODIES, _WAITING = range(_CELL_WORDS)
_WORKER_WORDS = 8 + (LANES + 1) * _CELL_WORDS
_GRANT, _HOLDS = 0, 1

UNLIMITED = 1 << 62
_WORDS = _HEADER + LANES * _LANE_WORDS + WORKERS * _WORKER_WORDS


def name_of(reservation_id: str) -> int:
    """By what a lane is recognised: 63 bits, never 0."""
    digest = hashlib.blake2b(reservation_id.encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 1) | 1


class ShareTable:
    """``fd``: the node's memfd (``create``); None makes a private table, for tests and tools."""

    def __init__(self, fd: int | None) -> None:
        self._fd = os.memfd_create("hiss-shares", os.MFD_CLOEXEC) if fd is None else fd
        if fd is None:
            os.ftruncate(self._fd, _WORDS * 8)
        # The lock is of an open description: each process needs its own.
        self._lock_fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_CLOEXEC)
        self._map = mmap.mmap(self._fd, _WORDS * 8)
        self.words: memoryview[int] = memoryview(self._map).cast("q")

    @staticmethod
    def create() -> int:
        """A memfd of zeros: nothing is reserved. The supervisor keeps it."""
        fd = os.memfd_create("hiss-shares", os.MFD_CLOEXEC)
        os.ftruncate(fd, _WORDS * 8)
        return fd

    @contextlib.contextmanager
    def admission(self) -> Iterator[None]:
        """One at a time of all processes: look at what is admitted, decide, add to it."""
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock_fd, fcntl.LOCK_UN)

    # -- lanes

    def lanes(self) -> dict[int, int]:
        """Name -> lane of those in force."""
        return {name: lane for lane in range(LANES) if (name := self.words[_lane(lane) + _NAME])}

    def rate(self, lane: int) -> int:
        return self.words[_lane(lane) + _RATE]

    def capacity(self, lane: int) -> int:
        return self.words[_lane(lane) + _CAPACITY]

    def set_lane(self, lane: int, name: int, rate: int, capacity: int) -> None:
        """Name 0: the lane is free."""
        at = _lane(lane)
        self.words[at + _NAME] = 0
        self.words[at + _RATE] = rate
        self.words[at + _CAPACITY] = capacity
        self.words[at + _NAME] = name

    # -- cells of the workers

    def receive(self, worker: int, lane: int, count: int) -> None:
        self.words[_cell(worker, lane) + _RECEIVED] += count

    def received(self, lane: int) -> int:
        """By all workers, ever."""
        return self._sum(lane, _RECEIVED)

    def received_by(self, worker: int, lane: int) -> int:
        return self.words[_cell(worker, lane) + _RECEIVED]

    def admit(self, worker: int, lane: int, count: int) -> None:
        self.words[_cell(worker, lane) + _ADMITTED] += count

    def admitted(self, lane: int) -> int:
        """Bytes of bodies that were let in and are not committed yet."""
        return self._sum(lane, _ADMITTED)

    def set_bodies(self, worker: int, lane: int, bodies: int, waiting: int) -> None:
        at = _cell(worker, lane)
        self.words[at + _BODIES] = bodies
        self.words[at + _WAITING] = waiting

    def bodies(self, worker: int, lane: int) -> tuple[int, int]:
        """(bodies that arrive, those of them that wait for their turn)."""
        at = _cell(worker, lane)
        return self.words[at + _BODIES], self.words[at + _WAITING]

    def grant(self, worker: int) -> int:
        """Bytes per second that the worker's unreserved bodies may take in."""
        return self.words[_worker(worker) + _GRANT]

    def set_grant(self, worker: int, rate: int) -> None:
        self.words[_worker(worker) + _GRANT] = rate

    def count_hold(self, worker: int) -> None:
        self.words[_worker(worker) + _HOLDS] += 1

    def holds(self) -> int:
        """How often any worker has held others back."""
        return sum(self.words[_worker(worker) + _HOLDS] for worker in range(WORKERS))

    def clear_worker(self, worker: int) -> None:
        """A new process of the slot: what its predecessor had admitted is gone with it."""
        at = _worker(worker)
        for lane in range(LANES + 1):
            cell = _cell(worker, lane)
            for word in (_ADMITTED, _BODIES, _WAITING):
                self.words[cell + word] = 0
        self.words[at + _GRANT] = UNLIMITED

    def _sum(self, lane: int, word: int) -> int:
        words, at = self.words, _cell(0, lane) + word
        return sum(words[at + worker * _WORKER_WORDS] for worker in range(WORKERS))


def _lane(lane: int) -> int:
    return _HEADER + lane * _LANE_WORDS


def _worker(worker: int) -> int:
    return _HEADER + LANES * _LANE_WORDS + worker * _WORKER_WORDS


def _cell(worker: int, lane: int) -> int:
    return _worker(worker) + 8 + lane * _CELL_WORDS

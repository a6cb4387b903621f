"""The node's clock: what commits, lifecycle rules, retention periods and restores go by. Signatures and leases of connections
go by the machine's own.

It is the machine's clock, except where the operator of a test node set ``virtual_clock``: then DATA/run/clock holds a number of
nanoseconds (signed, little-endian, 8 bytes) by which this node is ahead, every process maps it, and whoever may write that
file moves the time of the whole node at once. So what takes thirty days is tested in a second, and nobody sleeps.

Always holds: without the file, which only ``create`` makes, time is the machine's.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable

from ingest.paths import NodePaths

Clock = Callable[[], int]
"""Nanoseconds since the epoch (UTC)."""
_OFFSET = struct.Struct("<q")


def of(paths: NodePaths) -> Clock:
    """The clock of a node; the same one in every process that asks."""
    try:
        fd = os.open(paths.clock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return time.time_ns
    try:
        shared = mmap.mmap(fd, _OFFSET.size, mmap.MAP_SHARED, mmap.PROT_READ)
    finally:
        os.close(fd)
    offset = memoryview(shared).cast("q")  # one aligned load: never half of a change
    return lambda: time.time_ns() + offset[0]


def create(paths: NodePaths) -> None:
    """Make this node's clock one that ``advance`` moves; a clock that was moved before keeps its place."""
    if not paths.clock.exists():
        paths.clock.write_bytes(_OFFSET.pack(0))


def discard(paths: NodePaths) -> None:
    """Back to the machine's clock, for processes that start from now on."""
    paths.clock.unlink(missing_ok=True)


def advance(paths: NodePaths, seconds: float) -> None:
    """Let that much time pass on a node with ``virtual_clock``, in all its processes. FileNotFoundError on any other."""
    fd = os.open(paths.clock, os.O_RDWR | os.O_CLOEXEC)
    try:
        (ahead_ns,) = _OFFSET.unpack(os.pread(fd, _OFFSET.size, 0))
        os.pwrite(fd, _OFFSET.pack(ahead_ns + round(seconds * 1e9)), 0)
    finally:
        os.close(fd)

"""Named places where a test may kill the process: the steps of a commit, a drain, an eviction, a recycling.

``HISS_CRASHPOINT=name`` (or ``name:n`` for the n-th passage) sends SIGKILL to the process that reaches it, just as a power
switch would between two lines. Unset, a crash point costs two comparisons.

``HISS_CRASHPOINT_ONCE=path`` is for a whole node whose processes are started again: the file at ``path`` holds the name, may be
written at any time, and is removed by the one process that dies. ``name stop`` freezes that process there (SIGSTOP) instead.
"""

from __future__ import annotations

import os
import signal

POINTS = (
    "migrate-recovered", "migrate-published", "migrate-verified", "migrate-claimed", "migrate-made", "migrate-joined",
    "migrate-aside",
    "data-written", "data-flushed", "journal-before", "journal-written", "journal-flushed", "index-before",
    "index-committed", "answer-before", "settle-written", "drain-claimed", "drain-written", "drain-verified",
    "drain-published", "drain-recorded", "evict-before", "evict-recorded", "recycle-locked", "recycle-marked",
    "recall-written", "relocate-written", "product-before", "snapshot-written", "snapshot-renamed", "journal-rotated",
    "partial-before", "run-product-before", "filter-before", "lifecycle-before", "aside-named", "cut-mended",
    "join-claimed", "join-placed", "log-before", "log-appended",
)  # fmt: skip

VARIABLE = "HISS_CRASHPOINT"

_name, _, _count = os.environ.get(VARIABLE, "").partition(":")
_left = int(_count or 1)
_once = os.environ.get("HISS_CRASHPOINT_ONCE", "")


def crashpoint(name: str) -> None:
    """Die here if the environment asks for it. ``name`` is one of POINTS."""
    global _left
    if _once and (found := _armed(name)):
        os.kill(os.getpid(), found)
    if name != _name:
        return
    _left -= 1
    if _left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)


def disarm() -> None:
    """For a fork of a process that read the variable, and is not to die by it."""
    global _name
    _name = ""


def _armed(name: str) -> int:
    """The signal to send oneself, or 0."""
    try:
        with open(_once, encoding="ascii") as file:
            wanted, _, how = file.read().partition(" ")
        if wanted != name:
            return 0
        os.unlink(_once)
    except FileNotFoundError:
        return 0  # nothing is armed, or another process was quicker
    return signal.SIGSTOP if how == "stop" else signal.SIGKILL

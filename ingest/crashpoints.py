"""Named places where a test may kill the process: the steps of a commit, a drain, an eviction, a recycling.

``HISS_CRASHPOINT=name`` (or ``name:n`` for the n-th passage) sends SIGKILL to the process that reaches it, just as a power
switch would between two lines. Unset, a crash point costs one comparison.
"""

from __future__ import annotations

import os
import signal

POINTS = (
    "data-written", "data-flushed", "journal-before", "journal-written", "journal-flushed", "index-before",
    "index-committed", "answer-before", "settle-written", "drain-claimed", "drain-written", "drain-verified",
    "drain-published", "drain-recorded", "evict-before", "evict-recorded", "recycle-locked", "recycle-marked",
    "recall-written", "relocate-written", "product-before", "snapshot-written", "snapshot-renamed", "journal-rotated",
)  # fmt: skip

_name, _, _count = os.environ.get("HISS_CRASHPOINT", "").partition(":")
_left = int(_count or 1)


def crashpoint(name: str) -> None:
    """Die here if the environment asks for it. ``name`` is one of POINTS."""
    global _left
    if name != _name:
        return
    _left -= 1
    if _left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)

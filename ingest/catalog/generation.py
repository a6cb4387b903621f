"""What every process of the node maps of the catalogue: one look instead of a question to the catalogue process.

DIR/run/generation holds little-endian 64-bit words with one writer, the catalogue process: ``generation`` (buckets, users or
kernels changed: caches are stale), ``incarnation`` (the database file was replaced: connections must be opened anew), and for
a node of a cluster since when the engine does not answer, by how much its clock is ahead, and since when it answers and takes no
commit. An aligned 8-byte store is atomic on every machine this runs on.
"""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

_BYTES = 4096


class GenerationFile:
    """``writable`` is for the catalogue process; it makes the file. Raises OSError."""

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        fd = os.open(path, (os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY) | os.O_CLOEXEC, 0o600)
        try:
            if writable and os.fstat(fd).st_size < _BYTES:
                os.ftruncate(fd, _BYTES)
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            self._map = mmap.mmap(fd, _BYTES, mmap.MAP_SHARED, protection)
        finally:
            os.close(fd)
        self._bytes = memoryview(self._map)
        self._words: memoryview[int] = self._bytes.cast("Q")

    def generation(self) -> int:
        return self._words[0]

    def incarnation(self) -> int:
        return self._words[1]

    def bump_generation(self) -> None:
        self._words[0] += 1

    def bump_incarnation(self) -> None:
        self._words[1] += 1

    @property
    def engine_away_s(self) -> float:
        """How long a cluster's engine has not answered; 0 while it does, and on a node alone."""
        return self._since_s(2)

    def engine_away(self, since_s: float) -> None:
        """``since_s``: of the machine's monotonic clock."""
        self._words[2] = int(since_s * 1e9)

    def engine_back(self) -> None:
        self._words[2] = 0

    @property
    def commits_stuck_s(self) -> float:
        """How long a cluster's engine has answered and taken no commit; 0 while it takes them, and on a node alone."""
        return self._since_s(4)

    def commits_stuck(self, since_s: float) -> None:
        """``since_s``: of the machine's monotonic clock."""
        self._words[4] = int(since_s * 1e9)

    def commits_taken(self) -> None:
        self._words[4] = 0

    def _since_s(self, word: int) -> float:
        since_ns = self._words[word]
        return (time.monotonic_ns() - since_ns) / 1e9 if since_ns else 0.0

    @property
    def ahead_ns(self) -> int:
        """By how much the engine's clock is ahead of this machine's."""
        ahead = self._words[3]
        return ahead - (1 << 64) if ahead >> 63 else ahead

    def set_ahead(self, ahead_ns: int) -> None:
        self._words[3] = ahead_ns & (1 << 64) - 1

    def close(self) -> None:
        self._words.release()
        self._bytes.release()
        self._map.close()

"""Two counters every process of the node maps: one look instead of a question to the catalogue process.

DIR/run/generation holds two little-endian 64-bit words with one writer, the catalogue process:
``generation`` (buckets, users or kernels changed: caches are stale) and ``incarnation`` (the database file was replaced:
connections must be opened anew). An aligned 8-byte store is atomic on every machine this runs on.
"""

from __future__ import annotations

import mmap
import os
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

    def close(self) -> None:
        self._words.release()
        self._bytes.release()
        self._map.close()

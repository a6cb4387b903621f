"""The rows that a kernel appended over one object version: peak lists, events.

In: rows of contiguous frames as the sandbox's replies bring them, in any order of frames; frames whose judgement is void.
Out: one table ordered by frame, then by order of append. What always holds: at most ``bytes_max`` are in memory; where more
came, the last rows of that order are left out and counted, whatever the order in which they came.
"""

from __future__ import annotations

import bisect

import numpy as np
import numpy.typing as npt

from kernels.contract import FRAME_COLUMN

ROWS_BYTES_MAX = 256 << 20
"""Rows of one object version."""

Table = npt.NDArray[np.void]


class Rows:
    """``dtype``: of a row; its first column is the frame."""

    def __init__(self, dtype: np.dtype[np.void], bytes_max: int = ROWS_BYTES_MAX) -> None:
        self._dtype = dtype
        self._bytes_max = bytes_max
        self._firsts: list[int] = []
        self._chunks: list[Table] = []
        self._bytes = 0
        self._left_out: dict[int, int] = {}
        """Rows cut off, by the first frame of their chunk."""

    def add(self, first: int, rows: Table) -> None:
        """Rows of frames from ``first`` on, ordered by frame, none of which has any yet."""
        if not len(rows):
            return
        at = bisect.bisect_left(self._firsts, first)
        self._firsts.insert(at, first)
        self._chunks.insert(at, rows)
        self._bytes += rows.nbytes
        while self._bytes > self._bytes_max:
            self._leave_out()

    def _leave_out(self) -> None:
        """Cut the last chunk to what has room, so that it does not matter how frames came in batches."""
        last, chunk = self._firsts.pop(), self._chunks.pop()
        self._bytes -= chunk.nbytes
        room = max(0, self._bytes_max - self._bytes) // chunk.itemsize
        self._left_out[last] = self._left_out.get(last, 0) + len(chunk) - room
        if room:
            self._firsts.append(last)
            self._chunks.append(chunk[:room].copy())
            self._bytes += self._chunks[-1].nbytes

    def void(self, first: int, count: int) -> None:
        """Forget the rows of these frames."""
        at = max(0, bisect.bisect_right(self._firsts, first) - 1)
        while at < len(self._firsts) and self._firsts[at] < first + count:
            chunk = self._chunks[at]
            frames = chunk[FRAME_COLUMN]
            kept = chunk[(frames < first) | (frames >= first + count)]
            self._bytes += kept.nbytes - chunk.nbytes
            if len(kept):
                self._chunks[at] = kept
                self._firsts[at] = int(kept[FRAME_COLUMN][0])
                at += 1
            else:
                del self._chunks[at], self._firsts[at]
        for start in [start for start in self._left_out if first <= start < first + count]:
            del self._left_out[start]

    def table(self) -> Table:
        return np.concatenate(self._chunks) if self._chunks else np.zeros(0, self._dtype)

    @property
    def left_out(self) -> int:
        """Rows that found no room."""
        return sum(self._left_out.values())

"""What the kernels of one object version said about each of its frames.

In: verdicts of contiguous frames, by kernel. Out: counts for the frame ledger at any moment, and one array a kernel for
its product. With several kernels a frame is kept if any keeps it, dropped if all drop it, unreduced otherwise; the counts
are kept up to date slice by slice, so asking costs nothing however many frames there are.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kernels.contract import DROP, KEEP

UNREDUCED = 255
_GROWTH_MIN = 1024


class Verdicts:
    """A row of one byte a frame for each kernel, grown as frames come."""

    def __init__(self, kernels: int) -> None:
        self._rows = np.full((kernels, 0), UNREDUCED, np.uint8)
        self.kept = 0
        self.dropped = 0

    def record(self, kernel: int, first: int, values: npt.NDArray[np.uint8]) -> None:
        """``values`` are DROP or KEEP, or UNREDUCED where the frame could not be decoded."""
        self._write(kernel, first, len(values), values)

    def void(self, kernel: int, first: int, count: int) -> None:
        """These frames must be judged again."""
        self._write(kernel, first, count, UNREDUCED)

    def row(self, kernel: int, frames: int) -> npt.NDArray[np.uint8]:
        """A copy of the first ``frames`` verdicts of a kernel; UNREDUCED where there is none."""
        self._grow(frames)
        return self._rows[kernel, :frames].copy()

    def _write(self, kernel: int, first: int, count: int, values: npt.NDArray[np.uint8] | int) -> None:
        self._grow(first + count)
        part = self._rows[:, first : first + count]
        self._count(part, -1)
        part[kernel] = values
        self._count(part, +1)

    def _count(self, part: npt.NDArray[np.uint8], sign: int) -> None:
        kept = int(np.count_nonzero((part == KEEP).any(axis=0)))
        dropped = int(np.count_nonzero((part == DROP).all(axis=0)))
        self.kept += sign * kept
        self.dropped += sign * dropped

    def _grow(self, frames: int) -> None:
        have = self._rows.shape[1]
        if frames <= have:
            return
        grown = np.full((len(self._rows), max(frames, 2 * have, _GROWTH_MIN)), UNREDUCED, np.uint8)
        grown[:, :have] = self._rows
        self._rows = grown

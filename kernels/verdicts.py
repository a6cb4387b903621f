"""What the kernels of one object version said about each of its frames.

In: verdicts of contiguous frames, by kernel. Out: counts for the frame ledger at any moment, and one array a kernel for
its product. The counts are kept up to date slice by slice, so asking costs nothing however many frames there are.

With several kernels a frame is kept if any keeps it; else replaced if any replaces it; else unreduced if any has not judged
it; else it lies behind a STOP of some kernel; else all dropped it. Kernels that filter raw data (``ruling``) decide alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kernels.contract import DROP, KEEP, REPLACE, STOP

AFTER_STOP = 252
"""The kernel said STOP for an earlier frame, so it never judged this one."""
UNREDUCED = 255
_GROWTH_MIN = 1024


class Verdicts:
    """A row of one byte a frame for each kernel, grown as frames come. ``ruling``: rows that decide; None for all."""

    def __init__(self, kernels: int, ruling: Sequence[int] | None = None) -> None:
        self._rows = np.full((kernels, 0), UNREDUCED, np.uint8)
        self._ruling = list(range(kernels) if ruling is None else ruling)
        self.kept = 0
        self.dropped = 0
        self.replaced = 0
        self.after_stop = 0

    def record(self, kernel: int, first: int, values: npt.NDArray[np.uint8]) -> None:
        """``values`` are verdicts, or UNREDUCED where the frame could not be decoded."""
        self._write(kernel, first, len(values), values)

    def void(self, kernel: int, first: int, count: int) -> None:
        """These frames must be judged again."""
        self._write(kernel, first, count, UNREDUCED)

    def stop(self, kernel: int, first: int, count: int) -> None:
        """These frames lie behind the kernel's STOP."""
        self._write(kernel, first, count, AFTER_STOP)

    def row(self, kernel: int, frames: int) -> npt.NDArray[np.uint8]:
        """A copy of the first ``frames`` verdicts of a kernel; UNREDUCED where there is none."""
        self._grow(frames)
        return self._rows[kernel, :frames].copy()

    def _write(self, kernel: int, first: int, count: int, values: npt.NDArray[np.uint8] | int) -> None:
        if count <= 0:
            return
        self._grow(first + count)
        part = self._rows[:, first : first + count]
        self._count(part, -1)
        part[kernel] = values
        self._count(part, +1)

    def _count(self, part: npt.NDArray[np.uint8], sign: int) -> None:
        if len(self._ruling) == 1:
            counts = np.bincount(part[self._ruling[0]], minlength=256)
            self.kept += sign * int(counts[KEEP] + counts[STOP])
            self.replaced += sign * int(counts[REPLACE])
            self.after_stop += sign * int(counts[AFTER_STOP])
            self.dropped += sign * int(counts[DROP])
            return
        self._count_several(part[self._ruling], sign)

    def _count_several(self, rows: npt.NDArray[np.uint8], sign: int) -> None:
        kept = ((rows == KEEP) | (rows == STOP)).any(axis=0)
        replaced = (rows == REPLACE).any(axis=0) & ~kept
        open_ = (rows == UNREDUCED).any(axis=0) & ~(kept | replaced)
        behind = (rows == AFTER_STOP).any(axis=0) & ~(kept | replaced | open_)
        counts = [int(np.count_nonzero(mask)) for mask in (kept, replaced, open_, behind)]
        self.kept += sign * counts[0]
        self.replaced += sign * counts[1]
        self.after_stop += sign * counts[3]
        self.dropped += sign * (rows.shape[1] - sum(counts))

    def _grow(self, frames: int) -> None:
        have = self._rows.shape[1]
        if frames <= have:
            return
        grown = np.full((len(self._rows), max(frames, 2 * have, _GROWTH_MIN)), UNREDUCED, np.uint8)
        grown[:, :have] = self._rows
        self._rows = grown

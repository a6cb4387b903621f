"""What a raw filter leaves: which frames stay and which give way to ``out``.

In: the verdicts of the kernels that filter, what each asked for (``raw``), the version's geometry. Out: a ``Plan``, or
``CannotFilter`` with the reason. What always holds: a frame that any of these kernels kept, or that one of them has not
judged, stays. How the body lies that holds the frames is the business of ``bodies`` and ``hdf5``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

import msgspec
import numpy as np
import numpy.typing as npt

from ingest.records import FrameGeometry, FrameLedger
from kernels.contract import DROP, REPLACE
from kernels.verdicts import UNREDUCED

DROPPED = 0
KEPT = 1
REPLACED = 2


class CannotFilter(Exception):
    """The raw data stay as they are; ``str()`` is fit for the scientist."""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """``fates``: DROPPED, KEPT or REPLACED for each frame. ``dtype``, ``shape``: of the frames that remain."""

    fates: npt.NDArray[np.uint8]
    replaces: str
    """The kernel whose ``out`` stands for the REPLACED frames; empty when there are none."""
    dtype: str
    shape: tuple[int, ...]

    @property
    def frames(self) -> int:
        return int(np.count_nonzero(self.fates))

    @property
    def frame_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def runs(self, first: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, int]]:
        """(first frame, frames, fate) of each run of frames that remain, in order, from ``first`` up to ``stop``."""
        fates = self.fates[first:stop]
        edges = np.flatnonzero(np.diff(fates)) + 1
        bounds = [0, *(int(edge) for edge in edges), len(fates)]
        for begin, end in itertools.pairwise(bounds):
            fate = int(fates[begin]) if end > begin else DROPPED
            if fate != DROPPED:
                yield first + begin, end - begin, fate

    def ledger(self, received: FrameLedger) -> FrameLedger:
        """The new version's: what was received is what was received, ``stored`` is what is left of it."""
        return msgspec.structs.replace(received, stored=self.frames, trailing_bytes=0)


def fates(
    verdicts: Mapping[str, npt.NDArray[np.uint8]], raw: Mapping[str, str], frames: int
) -> tuple[npt.NDArray[np.uint8], str]:
    """(fate of each frame, kernel that replaces). ``raw``: ``kept`` or ``none`` for each kernel."""
    kept = np.zeros(frames, bool)
    replaced = np.zeros(frames, bool)
    by = ""
    for kernel in sorted(raw):
        row = verdicts.get(kernel)
        if row is None or len(row) != frames:
            raise CannotFilter(f"the verdicts of kernel {kernel} are not those of the {frames} frames stored")
        if raw[kernel] == "none":
            kept |= row == UNREDUCED
            continue
        out = row == REPLACE
        kept |= (row != DROP) & ~out
        if out.any():
            if by:
                raise CannotFilter(f"both {by} and {kernel} replace frames: one kernel may")
            replaced, by = out, kernel
    replaced &= ~kept
    return np.where(kept, KEPT, np.where(replaced, REPLACED, DROPPED)).astype(np.uint8), by if replaced.any() else ""


def plan(
    verdicts: Mapping[str, npt.NDArray[np.uint8]],
    raw: Mapping[str, str],
    geometry: FrameGeometry,
    frames: int,
    out: tuple[str, tuple[int, ...]] | None,
) -> Plan | None:
    """None: every frame stays as it is. ``out``: dtype and shape of what replaces, if a kernel may replace."""
    decided, by = fates(verdicts, raw, frames)
    if np.all(decided == KEPT):
        return None
    dtype, shape = geometry.dtype, geometry.shape
    if by:
        assert out is not None
        replacing = (np.dtype(out[0]).str, out[1])
        if replacing != (dtype, shape) and np.any(decided == KEPT):
            raise CannotFilter(
                f"{by} replaces some frames by {replacing[0]}{replacing[1]} and others are kept as {dtype}{shape}: "
                "one object holds frames of one kind"
            )
        dtype, shape = replacing
    return Plan(decided, by, dtype, shape)

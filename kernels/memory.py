"""Where results lie in the output memory that gateway and sandbox share.

In: the kernels of a chain, the geometry of frames, the number of slots. Out: offsets, and numpy views of a memory at them.
In order: verdicts, counters, feedback, rows, the frames of ``out``, the scratch frames of the earlier kernels, the state
that ``finish`` works on, then each slot's state arrays. Parts begin on pages of their own, so that what a kernel does not
use costs address space only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kernels.contract import Geometry, Kernel, StateSpec, chain_geometries, out_geometry
from kernels.wire import COUNTERS, FEEDBACK_DTYPE, MAX_BATCH, MAX_FEEDBACK

PAGE_BYTES = 4096
_LINE_BYTES = 64

NO_ROWS = np.dtype([("frame", "<i8")])
"""Rows of a kernel that declares none."""


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def frame_bytes(frame: Geometry) -> int:
    dtype, shape = frame
    return math.prod(shape) * np.dtype(dtype).itemsize


class _States:
    """Offsets of some state arrays within a block."""

    def __init__(self, specs: Sequence[StateSpec]) -> None:
        self.specs = tuple(specs)
        self._offsets: list[int] = []
        offset = 0
        for spec in self.specs:
            self._offsets.append(offset)
            offset = _aligned(offset + spec.size_bytes, _LINE_BYTES)
        self.size_bytes = offset

    def views(self, memory: memoryview, base: int) -> list[npt.NDArray[np.generic]]:
        return [
            np.ndarray(spec.shape, spec.dtype, memory, base + offset)
            for spec, offset in zip(self.specs, self._offsets, strict=True)
        ]


class OutputLayout:
    """``kernels``: the chain, the one reported on last. ``out_frames``: how many frames of ``out`` a batch may ask for."""

    def __init__(self, kernels: Sequence[Kernel], frame: Geometry, slots: int, out_frames: int = 0) -> None:
        self.slots = slots
        self.out_frames = out_frames
        last = kernels[-1]
        inputs = chain_geometries(kernels, frame)
        self.state = last.state
        self.out = out_geometry(last, inputs[-1])
        self.rows_dtype = last.rows.dtype if last.rows else NO_ROWS
        self.rows_max = last.rows.most * MAX_BATCH if last.rows else 0
        self._scratch = [
            out_geometry(kernel, geometry) for kernel, geometry in zip(kernels[:-1], inputs[:-1], strict=True)
        ]
        self._states = [_States(kernel.state) for kernel in kernels]

        self._end = 0
        self._verdicts = self._place(MAX_BATCH, _LINE_BYTES)
        self._counters = self._place(COUNTERS * 8, _LINE_BYTES)
        self._feedback = self._place(MAX_FEEDBACK * FEEDBACK_DTYPE.itemsize, _LINE_BYTES)
        self._rows = self._place(self.rows_max * self.rows_dtype.itemsize)
        self._outs = self._place(max(1, out_frames) * frame_bytes(self.out) if self.out else 0)
        self._scratches = [self._place(frame_bytes(scratch) if scratch else 0) for scratch in self._scratch]
        self._finish = self._place(self._states[-1].size_bytes if last.has_finish else 0)
        self._slots = [[self._place(max(states.size_bytes, 1)) for states in self._states] for _ in range(slots)]
        self.size_bytes = _aligned(self._end, PAGE_BYTES)

    def _place(self, size_bytes: int, alignment: int = PAGE_BYTES) -> int:
        offset = _aligned(self._end, alignment)
        self._end = offset + size_bytes
        return offset

    def verdicts(self, memory: memoryview) -> npt.NDArray[np.uint8]:
        return np.frombuffer(memory, np.uint8, MAX_BATCH, self._verdicts)

    def counters(self, memory: memoryview) -> npt.NDArray[np.int64]:
        """The driver's own, as numbered in wire."""
        return np.frombuffer(memory, np.int64, COUNTERS, self._counters)

    def feedback(self, memory: memoryview) -> npt.NDArray[np.void]:
        return np.frombuffer(memory, FEEDBACK_DTYPE, MAX_FEEDBACK, self._feedback)

    def rows(self, memory: memoryview) -> npt.NDArray[np.void]:
        return np.ndarray((self.rows_max,), self.rows_dtype, memory, self._rows)

    def outs(self, memory: memoryview) -> npt.NDArray[np.generic] | None:
        """Frames of the last kernel's ``out``, at least one; None where it has none."""
        if self.out is None:
            return None
        dtype, shape = self.out
        return np.ndarray((max(1, self.out_frames), *shape), dtype, memory, self._outs)

    def scratch(self, memory: memoryview, stage: int) -> npt.NDArray[np.generic] | None:
        """The one frame of an earlier kernel's ``out``."""
        geometry = self._scratch[stage]
        if geometry is None:
            return None
        dtype, shape = geometry
        return np.ndarray((1, *shape), dtype, memory, self._scratches[stage])

    def finish_state(self, memory: memoryview) -> list[npt.NDArray[np.generic]]:
        """What ``finish`` of the last kernel works on; only where it has one."""
        return self._states[-1].views(memory, self._finish)

    def slot_state(self, memory: memoryview, slot: int, stage: int = -1) -> list[npt.NDArray[np.generic]]:
        """Views of one slot's arrays of a kernel, in the order of its ``state``."""
        return self._states[stage].views(memory, self._slots[slot][stage])

    def slot_specs(self, stage: int) -> tuple[StateSpec, ...]:
        return self._states[stage].specs

    @property
    def stages(self) -> int:
        return len(self._states)

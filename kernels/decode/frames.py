"""The frames of a batch, decoded. Runs inside the sandbox, in memory of its own.

In: a table (``table.py``) over the read-only regions. Out: runs of frames as the compiled kernel wants them: C-ordered,
aligned, the machine's byte order, read-only; or word that a frame cannot be decoded, which is no failure of the kernel.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.decode import table
from kernels.decode.chunk import Undecodable, decode
from kernels.decode.encoding import Encoding

GROUP_BYTES = 256 << 10
"""Smaller frames are gathered up to this much, so that the compiled loop is entered less often."""

KEPT_BYTES = 64 << 20
"""Freed memory that the process keeps for the next frame."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

Frames = npt.NDArray[Any]


def _keep_freed_memory() -> None:
    """Every decoded frame is a new array. Memory that goes back to the system each time is touched anew each time, and
    that costs more than decoding."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES // 2)
    libc.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)


class FrameDecoder:
    """Belongs to one process; frames have one dtype and shape for its life."""

    def __init__(self, regions: Sequence[Any], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self._regions = [np.frombuffer(region, np.uint8) for region in regions]
        self._dtype = dtype
        self._shape = shape
        self._frame_bytes = int(np.prod(shape)) * dtype.itemsize
        self._slab_at: tuple[int, int] | None = None
        self._slab: Frames | None = None
        _keep_freed_memory()

    def runs(self, first: int, count: int, message: bytes) -> Iterator[tuple[int, int, Frames | None]]:
        """(first of the run, counted from the batch's first; how many; the frames, or None: not decodable)."""
        stack, encoding, entries = table.unpack(message)
        if encoding.depth > 1:
            yield from self._of_slabs(stack, encoding, entries, first, count)
            return
        together = max(1, GROUP_BYTES // self._frame_bytes)
        for start in range(0, count, together):
            yield from self._group(encoding, entries, first, start, min(together, count - start))

    def _group(
        self, encoding: Encoding, entries: npt.NDArray[np.void], first: int, start: int, count: int
    ) -> Iterator[tuple[int, int, Frames | None]]:
        found = [self._decoded(encoding, entries, first + start + i) for i in range(count)]
        at = start
        for good, run in itertools.groupby(found, lambda slab: slab is not None):
            slabs = list(run)
            frames = None
            if good:
                frames = slabs[0] if len(slabs) == 1 else np.concatenate(slabs)  # type: ignore[arg-type]
                frames.flags.writeable = False  # type: ignore[union-attr]
            yield at, len(slabs), frames
            at += len(slabs)

    def _of_slabs(
        self, stack: int, encoding: Encoding, entries: npt.NDArray[np.void], first: int, count: int
    ) -> Iterator[tuple[int, int, Frames | None]]:
        at = first
        while at < first + count:
            number = at // encoding.depth
            begin = number * encoding.depth
            end = min(begin + encoding.depth, first + count)
            if self._slab_at != (stack, number):
                self._slab_at, self._slab = None, None  # the old one's memory serves the new one
                self._slab = self._decoded(encoding, entries, number)
                self._slab_at = (stack, number)
            frames = None if self._slab is None else self._slab[at - begin : end - begin]
            yield at - first, end - at, frames
            at = end

    def _decoded(self, encoding: Encoding, entries: npt.NDArray[np.void], number: int) -> Frames | None:
        per_slab = encoding.chunks_of_slab(self._shape)
        low, high = np.searchsorted(entries["number"], (number * per_slab, (number + 1) * per_slab))
        try:
            return self._assembled(encoding, entries[low:high], number * per_slab, per_slab)
        except Exception:
            # Whatever a library makes of broken bytes: this frame cannot be read, others can.
            return None

    def _assembled(self, encoding: Encoding, entries: npt.NDArray[np.void], base: int, per_slab: int) -> Frames:
        stored_dtype = np.dtype(encoding.dtype)
        if per_slab == 1 and len(entries) == 1 and encoding.chunk[1:] == self._shape and stored_dtype == self._dtype:
            whole = self._elements(encoding, entries[0]).reshape(encoding.chunk)
            if not whole.flags.aligned:
                whole = whole.copy()
            whole.flags.writeable = False
            return whole
        slab = np.empty((encoding.depth, *self._shape), self._dtype)
        if len(entries) < per_slab:
            slab[...] = np.frombuffer(encoding.fill, stored_dtype)[0] if encoding.fill else 0
        grid = encoding.grid(self._shape)
        for entry in entries:
            place = np.unravel_index(int(entry["number"]) - base, grid)
            corner = [int(index) * part for index, part in zip(place, encoding.chunk[1:], strict=True)]
            cut = [
                slice(start, min(start + part, size))
                for start, part, size in zip(corner, encoding.chunk[1:], self._shape, strict=True)
            ]
            elements = self._elements(encoding, entry)
            rows = elements.size // (encoding.depth * int(np.prod(encoding.chunk[2:])))
            if encoding.depth > 1 and rows != encoding.chunk[1]:
                raise Undecodable("a chunk is cut short")
            chunk = elements.reshape(encoding.depth, rows, *encoding.chunk[2:])
            inside = tuple(slice(0, part.stop - part.start) for part in cut)
            slab[(slice(None), *cut)] = chunk[(slice(None), *inside)]
        slab.flags.writeable = False
        return slab

    def _elements(self, encoding: Encoding, entry: np.void) -> Frames:
        region = self._regions[int(entry["region"])]
        offset, length = int(entry["offset"]), int(entry["length"])
        if offset + length > region.size:
            raise Undecodable("the chunk lies outside its region")
        data = decode(region[offset : offset + length], encoding, int(entry["skipped"]))
        elements = data.view(encoding.dtype)
        if any(step.codec == "predictor" for step in encoding.filters):
            # TIFF 6.0 section 14: each row holds differences to the pixel before, modulo the element's width.
            rows = elements.reshape(-1, encoding.chunk[-1])
            native = rows.astype(elements.dtype.newbyteorder("="), copy=False)
            elements = np.cumsum(native, axis=1, dtype=native.dtype).reshape(-1)
        return elements

"""Where each stored chunk of a stack of frames lies in a body.

In: chunks, all at once (a file's structure) or one behind the other (a stream that still arrives). Out: table entries for
any run of frames. What always holds: every chunk lies inside the body; a chunk that was never written has length 0.
"""

from __future__ import annotations

import array
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ingest.records import FrameGeometry
from kernels.decode.encoding import Encoding
from kernels.decode.table import ENTRY

CHUNKS_MAX = 1 << 22
"""Chunks of one object: 14 bytes each in memory."""
CHUNK_STORED_BYTES_MAX = (1 << 32) - 1


class FrameIndex:
    """``source`` says for the product where the frames were found; ``dtype`` is the machine's form of the stored one."""

    def __init__(self, encoding: Encoding, shape: tuple[int, ...], source: str, count: int = 0) -> None:
        self.encoding = encoding
        self.shape = shape
        self.source = source
        self.dtype = np.dtype(encoding.dtype).newbyteorder("<").str
        self.frame_bytes = math.prod(shape) * np.dtype(encoding.dtype).itemsize
        self.count = count
        self._per_slab = encoding.chunks_of_slab(shape)
        chunks = -(-count // encoding.depth) * self._per_slab
        self._offsets = array.array("Q", bytes(8 * chunks))
        self._lengths = array.array("I", bytes(4 * chunks))
        self._skipped = array.array("H", bytes(2 * chunks))

    @property
    def description(self) -> str:
        """For the product."""
        return (
            f"{self.source}, {self.encoding.dtype} in chunks of {self.encoding.chunk}, encoding: {self.encoding.name}"
        )

    @property
    def geometry(self) -> FrameGeometry:
        """What a kernel sees: plain frames, wherever they come from."""
        return FrameGeometry(self.dtype, self.shape, 0, self.frame_bytes, None)

    def append(self, offset: int, length: int) -> None:
        """One more frame that is one chunk."""
        self._offsets.append(offset)
        self._lengths.append(length)
        self._skipped.append(0)
        self.count += 1

    def append_chunks(self, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        """One more frame in as many chunks as the grid has."""
        self._offsets.extend(offsets)
        self._lengths.extend(lengths)
        self._skipped.extend(bytes(len(offsets)))
        self.count += 1

    def extend(self, offset: int, length: int, count: int) -> None:
        """``count`` more frames of one size, one behind the other."""
        if count > 0:
            self._offsets.extend(range(offset, offset + length * count, length))
            self._lengths.extend([length] * count)
            self._skipped.extend(bytes(count))
            self.count += count

    @property
    def offsets(self) -> Sequence[int]:
        """Body offset of every chunk, in the order of their numbers."""
        return self._offsets

    def fill(self, entries: npt.NDArray[np.void], body_bytes: int) -> None:
        """Chunks of a finished file, from a sandbox: ValueError for what cannot be."""
        numbers, offsets, lengths = entries["number"], entries["offset"], entries["length"]
        if not len(entries):
            return
        if int(numbers.max()) >= len(self._offsets):
            raise ValueError("a chunk lies outside the dataset")
        if int(offsets.max()) >= body_bytes or bool((lengths > body_bytes - offsets).any()):
            raise ValueError("the file is cut short: a chunk lies beyond its end")
        np.frombuffer(self._offsets, np.uint64)[numbers] = offsets
        np.frombuffer(self._lengths, np.uint32)[numbers] = lengths
        np.frombuffer(self._skipped, np.uint16)[numbers] = entries["skipped"]

    def entries(self, first: int, count: int) -> npt.NDArray[np.void]:
        """Entries for these frames; ``offset`` is bytes into the body, ``region`` is unset."""
        depth = self.encoding.depth
        low = first // depth * self._per_slab
        high = -(-(first + count) // depth) * self._per_slab
        found = np.zeros(high - low, ENTRY)
        found["number"] = np.arange(low, high)
        found["offset"] = self._offsets[low:high]
        found["length"] = self._lengths[low:high]
        found["skipped"] = self._skipped[low:high]
        written: npt.NDArray[np.void] = found[found["length"] > 0]
        return written

    def entries_of(self, frames: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
        """Entries of frames that share chunks with no other, numbered as if these were the whole stack."""
        assert self.encoding.depth == 1
        per_slab = self._per_slab
        numbers = (frames[:, None] * per_slab + np.arange(per_slab)).ravel()
        found = np.zeros(len(numbers), ENTRY)
        found["number"] = np.arange(len(numbers))
        found["offset"] = np.frombuffer(self._offsets, np.uint64)[numbers]
        found["length"] = np.frombuffer(self._lengths, np.uint32)[numbers]
        found["skipped"] = np.frombuffer(self._skipped, np.uint16)[numbers]
        written: npt.NDArray[np.void] = found[found["length"] > 0]
        return written

    @property
    def is_single(self) -> bool:
        """One frame that shares its chunks with no other."""
        return self.count == 1 and self.encoding.depth == 1

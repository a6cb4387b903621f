"""Several ``.npy`` one behind the other in one body: ``numpy.save`` called again and again on one file.

In: the body. Out: an index of frames: each array is a frame, or a stack of frames along its first dimension, all of one
dtype and frame shape. What follows the last whole array and is none is left over, not an error.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

from ingest.ports import BodyChange
from ingest.records import FrameGeometry
from kernels.decode.encoding import Encoding
from kernels.formats import NPY_MAGIC, npy_cut, npy_geometry
from kernels.layout.index import FrameIndex
from kernels.layout.scanner import FOUND_MAX, Broken, Scanner, Steps


class NpyStream(Scanner):
    """``declared``: dtype and frame shape from the metadata, which every array must fit."""

    def __init__(self, on_index: Callable[[FrameIndex], None], declared: FrameGeometry | None = None) -> None:
        super().__init__(on_index)
        self._declared = declared
        self._stack_first = 0
        self._stack_count = 0
        self._head = b""
        """Header of the array under way."""

    def cut_short(self) -> BodyChange | None:
        frames = self.frames - self._stack_first
        if not self._head or self.position >= self._stack_end or self._stack_count < 2:
            return None
        after = npy_cut(self._head, frames)
        return None if after is None else BodyChange(self._stack_start - len(self._head), self._head, after)

    def _parse(self) -> Steps:
        while True:
            found = yield from self._header()
            if self.index is None:
                encoding = Encoding(found.dtype, (1, *found.shape))
                self._settle(FrameIndex(encoding, found.shape, "several .npy"))
            index = self.index
            assert index is not None
            if (found.dtype, found.shape) != (index.dtype, index.shape):
                raise Broken(
                    f"array at byte {self.settled}: frames of {found.dtype} {found.shape}, those before are "
                    f"{index.dtype} {index.shape}"
                )
            count = found.count or 0
            if index.count + count > FOUND_MAX:
                raise Broken(f"more than {FOUND_MAX} frames in one object")
            self._stack_first, self._stack_count = index.count, count
            yield from self._payload(found.frame_bytes, count)
            self._item_over()
            self.settled = self.position

    def _header(self) -> Generator[None, None, FrameGeometry]:
        self._head = b""
        head = yield from self._bytes(len(NPY_MAGIC))
        if head != NPY_MAGIC:
            if self.index is not None:
                # Not an array: the rest is left over.
                yield from self._rest()
            raise Broken("not a .npy")
        while True:
            try:
                found = npy_geometry(memoryview(head), self._declared)
            except ValueError as error:
                raise Broken(f"array at byte {self.settled}: {error}") from None
            if isinstance(found, FrameGeometry):
                self._head = head
                return found
            head += yield from self._bytes(found - len(head))

    def _rest(self) -> Steps:
        while True:
            yield from self._skip(1 << 40)

    def _advance(self, count: int) -> None:
        super()._advance(count)
        if self.index is not None and self._stack_start < self.position <= self._stack_end:
            done = self._stack_first + (self.position - self._stack_start) // self._stack_unit
            before = self.index.count
            start = self._stack_start + (before - self._stack_first) * self._stack_unit
            self.index.extend(start, self._stack_unit, done - before)

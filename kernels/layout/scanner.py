"""Finding frames in a body that is read once, forward: the part that all stream formats share.

In: the body's bytes in order, in pieces of any size (``feed``); a stored body may ``jump`` over what nobody looks at. Out:
an index that grows with every whole frame, and where the stored bytes of the frame under way begin and end. Pure: no
clock, no socket; payload is stepped over, never copied. Subclasses write ``_parse`` as a generator that yields whenever
it needs more bytes and raises ``Broken`` where the body is not what it should be.
"""

from __future__ import annotations

import abc
import array
import bisect
from collections.abc import Callable, Generator

from ingest.ports import BodyChange
from kernels.layout.index import FrameIndex

Steps = Generator[None, None, None]
FOUND_MAX = 1 << 26
"""Frames of one object (see reduction.FRAMES_MAX)."""


class Broken(Exception):
    """The body is not what its format says; fit for the scientist."""


class Scanner(abc.ABC):
    """``on_index`` is called once, when the frames' dtype, shape and compression are known, before the first frame."""

    def __init__(self, on_index: Callable[[FrameIndex], None]) -> None:
        self.position = 0
        """Body bytes seen or jumped over."""
        self.settled = 0
        """Body bytes up to the end of the last whole item: what follows is the beginning of another one, or rubbish."""
        self.index: FrameIndex | None = None
        self.items: array.array[int] | None = None
        """Where each whole item that holds frames begins and ends, one number after the other; None: not asked for."""
        self._on_index = on_index
        self._data = memoryview(b"")
        self._at = 0
        self._left = 0
        self._stack_start = self._stack_unit = self._stack_end = 0
        self._stack_done = 0
        self._steps = self._parse()

    # -- what the stream asks

    def feed(self, data: memoryview) -> None:
        """The next bytes. Raises Broken; nothing may be fed after that."""
        self._data, self._at = data, 0
        try:
            next(self._steps)
        finally:
            self._data = memoryview(b"")

    @property
    def wanted(self) -> int:
        """The next body byte that must be looked at."""
        return self.position + self._left

    def jump(self, body_bytes: int) -> None:
        """Go on at ``wanted``, or at the body's end, without seeing what lies before it."""
        self._advance(min(self._left, body_bytes - self.position))
        self.feed(memoryview(b""))

    @property
    def frames(self) -> int:
        """Whole frames found."""
        return self.index.count if self.index is not None else 0

    @property
    def horizon(self) -> int:
        """Up to which body offset the structure is known."""
        return max(self.position, self._stack_end)

    @property
    def unit_bytes(self) -> int:
        """Stored bytes of the frame under way, or of the last one."""
        return self._stack_unit

    def boundary(self, limit: int) -> int:
        """The largest body offset up to ``limit`` that does not lie inside the stored bytes of a known frame."""
        if self._stack_start < limit < self._stack_end:
            return limit - (limit - self._stack_start) % self._stack_unit
        return limit

    def first_from(self, offset: int) -> int:
        """Number of the first frame whose stored bytes begin at or behind a body offset."""
        return bisect.bisect_left(self.index.offsets, offset) if self.index is not None else 0

    def gaps(self) -> tuple[tuple[int, int], ...]:
        """Frames that are known to be missing: (number of the first, how many)."""
        return ()

    def cut_short(self) -> BodyChange | None:
        """No byte follows: what must be changed in those fed so that a reader of the format takes them; None: nothing."""
        return None

    # -- for subclasses

    def _item_over(self) -> None:
        """What began at ``settled`` is whole, and holds frames."""
        if self.items is not None:
            self.items.append(self.settled)
            self.items.append(self.position)

    @abc.abstractmethod
    def _parse(self) -> Steps:
        """Runs until the body is broken; never returns."""

    def _bytes(self, count: int) -> Generator[None, None, bytes]:
        """The next ``count`` bytes: only for what is short."""
        got = b""
        while len(got) < count:
            while self._at == len(self._data):
                yield
            part = bytes(self._data[self._at : self._at + count - len(got)])
            self._at += len(part)
            self.position += len(part)
            got += part
        return got

    def _skip(self, count: int) -> Steps:
        self._left = count
        while self._left:
            if self._at == len(self._data):
                yield
            step = min(self._left, len(self._data) - self._at)
            self._at += step
            self._advance(step)

    def _advance(self, count: int) -> None:
        self.position += count
        self._left -= count

    def _payload(self, unit: int, count: int) -> Steps:
        """``count`` times ``unit`` stored bytes follow: step over them."""
        self._stack_start, self._stack_unit = self.position, max(1, unit)
        self._stack_end = self.position + unit * count
        yield from self._skip(unit * count)

    def _settle(self, index: FrameIndex) -> None:
        """The first frame's form is known."""
        trouble = index.encoding.trouble(index.shape)
        if trouble:
            raise Broken(trouble)
        self.index = index
        self._on_index(index)

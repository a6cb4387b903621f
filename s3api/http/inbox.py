"""The receive buffer of a connection: bytes the peer sent and nobody has used yet. Pure: no socket.

Always holds: ``0 <= start <= end <= size``; bytes ``[start, end)`` are unused, in order; views handed out by ``room``
stay valid until the next call of any method here.
"""

from __future__ import annotations


class BufferPool:
    """Large receive buffers, kept for the next chunked body so that their pages stay touched."""

    __slots__ = ("_free", "_keep", "_size")

    def __init__(self, size_bytes: int, keep: int = 8) -> None:
        self._size = size_bytes
        self._keep = keep
        self._free: list[bytearray] = []

    def borrow(self) -> bytearray:
        return self._free.pop() if self._free else bytearray(self._size)

    def give_back(self, data: bytearray) -> None:
        if len(data) == self._size and len(self._free) < self._keep:
            self._free.append(data)


class Inbox:
    """``data`` may be empty: then it is ``full``, too, and wants ``move_to`` before ``room``."""

    __slots__ = ("data", "end", "start", "view")

    def __init__(self, data: bytearray) -> None:
        self.data = data
        self.view = memoryview(data)
        self.start = 0
        self.end = 0

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def full(self) -> bool:
        return self.end - self.start == len(self.data)

    def room(self) -> memoryview:
        """Memory for the next bytes; empty only when the inbox is full."""
        if self.start == self.end:
            self.start = self.end = 0
        elif self.start and len(self.data) - self.end < len(self.data) // 4:
            count = self.end - self.start
            self.view[:count] = self.view[self.start : self.end]
            self.start, self.end = 0, count
        return self.view[self.end :]

    def move_to(self, data: bytearray) -> bytearray:
        """Go on in another buffer, which must hold what is unused; returns the old one."""
        old, count = self.data, self.end - self.start
        view = memoryview(data)
        view[:count] = self.view[self.start : self.end]
        self.data, self.view = data, view
        self.start, self.end = 0, count
        return old

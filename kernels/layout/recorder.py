"""A file that HDF5 writes and that is never there: what is copied from elsewhere is only noted.

Runs inside the sandbox. In: HDF5's writes, and word which of them stand for bytes that lie elsewhere. Out: the new file as
pieces in order: bytes that HDF5 wrote, and ranges of the sources. What always holds: memory is bounded by
``WRITTEN_BYTES_MAX``, however large the file is.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

PAGE_BYTES = 4096
WRITTEN_BYTES_MAX = 64 << 20
"""Bytes that HDF5 writes itself: structure, attributes and small datasets."""
LITERAL_BYTES_MAX = 64 << 10

Placed = tuple[int, int, int, int]
"""(place in the new file, kind of source, offset there, length)."""


class TooLarge(Exception):
    """More than WRITTEN_BYTES_MAX were written."""


class Recorder(io.RawIOBase):
    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.placed: list[Placed] = []
        self._at = 0
        self._pages: dict[int, bytearray] = {}
        self._expected: tuple[int, int, int] | None = None

    def __repr__(self) -> str:
        # See reader.RemoteFile: an absolute name.
        return "/filtered"

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def truncate(self, size: int | None = None) -> int:
        self.length = self._at if size is None else size
        return self.length

    def flush(self) -> None:
        """Nothing is held back."""

    def expect(self, kind: int, offset: int, length: int) -> None:
        """The next write of ``length`` bytes stands for those at ``offset`` of a source."""
        self._expected = (kind, offset, length)

    @property
    def met(self) -> bool:
        """What was expected has been written."""
        return self._expected is None

    def place(self, at: int, kind: int, offset: int, length: int) -> None:
        """Bytes [at, at + length) of the new file, which HDF5 does not write, are those of a source."""
        self.placed.append((at, kind, offset, length))
        self.length = max(self.length, at + length)

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        expected = self._expected
        if expected is not None and expected[2] == len(view):
            self._expected = None
            self.place(self._at, *expected)
        else:
            self._keep(view)
        self._at += len(view)
        self.length = max(self.length, self._at)
        return len(view)

    def _keep(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            number, skip = divmod(self._at + done, PAGE_BYTES)
            page = self._pages.get(number)
            if page is None:
                if len(self._pages) * PAGE_BYTES >= WRITTEN_BYTES_MAX:
                    raise TooLarge
                page = self._pages[number] = bytearray(PAGE_BYTES)
            step = min(PAGE_BYTES - skip, len(view) - done)
            page[skip : skip + step] = view[done : done + step]
            done += step

    def readinto(self, buffer: object) -> int:
        target = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        target[:] = self._written(self._at, len(target))
        self._at += len(target)
        return len(target)

    def _written(self, start: int, length: int) -> bytes:
        """What HDF5 wrote there, zeros where it wrote nothing."""
        parts = []
        while length:
            number, skip = divmod(start, PAGE_BYTES)
            step = min(PAGE_BYTES - skip, length)
            page = self._pages.get(number)
            parts.append(bytes(step) if page is None else bytes(page[skip : skip + step]))
            start += step
            length -= step
        return b"".join(parts)

    def pieces(self) -> Iterator[bytes | tuple[int, int, int]]:
        """The file from its first byte to its last: bytes, or (kind, offset, length). ValueError where places overlap."""
        at = 0
        for place, kind, offset, length in sorted(self.placed):
            if place < at:
                raise ValueError("two pieces of the new file overlap")
            yield from self._literals(at, place)
            yield kind, offset, length
            at = place + length
        if at > self.length:
            raise ValueError("the new file ends before its last piece")
        yield from self._literals(at, self.length)

    def _literals(self, start: int, stop: int) -> Iterator[bytes]:
        while start < stop:
            step = min(LITERAL_BYTES_MAX, stop - start)
            yield self._written(start, step)
            start += step

"""Reading stored bytes: segment files opened under a shared lock, so that nobody recycles them under the reader.

In: a version's extents and a byte range. Out: file pieces for sendfile, or chunks read past the page cache.
Always holds: every piece's segment had the extent's generation when the lock was taken; the lock is held until the reader
closes, and bytes of a generation are never overwritten, so a reader never sees another object's bytes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import os
from collections.abc import AsyncGenerator, Iterable, Sequence
from concurrent.futures import Executor
from pathlib import Path

from ingest.blockio import AlignedBuffer, open_direct, read_fully
from ingest.errors import DataLost, Unreadable
from ingest.paths import NodePaths
from ingest.ports import FilePiece
from ingest.records import BLOCK_BYTES, LABEL_BYTES, Extent
from ingest.segments import SegmentHeader

LOCK_TRIES = 50
LOCK_WAIT_S = 0.01


class StaleExtent(Exception):
    """The extent's segment was recycled or removed: the version was moved, evicted or deleted meanwhile."""


@dataclasses.dataclass(frozen=True, slots=True)
class SegmentPiece:
    """Bytes [offset, offset + length) of an open segment file (implements ``ingest.ports.FilePiece``)."""

    fd: int
    offset: int
    length: int
    path: str


def pieces_of(extents: Iterable[Extent], start: int, stop: int) -> Iterable[tuple[Extent, int, int]]:
    """(extent, first byte within its payload, count) for the body range [start, stop)."""
    position = 0
    for extent in extents:
        low, high = max(start, position), min(stop, position + extent.length)
        if low < high:
            yield extent, low - position, high - low
        position += extent.length


def lies_on(node: int, copy: Sequence[Extent], start: int, stop: int) -> bool:
    """Do body bytes [start, stop) of a copy lie on ``node``, all of them?"""
    found = list(pieces_of(copy, start, stop))
    return sum(count for _, _, count in found) == stop - start and all(extent.node == node for extent, _, _ in found)


class SegmentReader:
    """An opened range (implements ``ingest.ports.ObjectReader``)."""

    def __init__(self, executor: Executor) -> None:
        self.pieces: Sequence[FilePiece] = ()
        self._executor = executor
        self._fds: dict[tuple[int, int], int] = {}

    @classmethod
    async def open(
        cls, paths: NodePaths, executor: Executor, extents: Sequence[Extent], start: int, stop: int
    ) -> SegmentReader:
        """Lock and check every segment of the range. Raises StaleExtent, Unreadable, or DataLost when the extents do not
        cover it."""
        reader = cls(executor)
        try:
            pieces = []
            for extent, first, count in pieces_of(extents, start, stop):
                fd, path = await reader._lock(paths, extent)
                pieces.append(SegmentPiece(fd, extent.offset + LABEL_BYTES + first, count, path))
            if sum(piece.length for piece in pieces) != stop - start:
                raise DataLost(f"the catalogue knows no place for all of bytes {start} to {stop}")
            reader.pieces = pieces
        except BaseException:
            reader.close()
            raise
        return reader

    @classmethod
    def of_file(cls, executor: Executor, path: Path, start: int, stop: int) -> SegmentReader:
        """Bytes [start, stop) of a file that nobody writes to, which stays open until the reader closes. Raises OSError."""
        reader = cls(executor)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        reader._fds[-1, -1] = fd
        reader.pieces = (SegmentPiece(fd, start, stop - start, os.fspath(path)),)
        return reader

    async def _lock(self, paths: NodePaths, extent: Extent) -> tuple[int, str]:
        key = (extent.slot, extent.segment)
        path = paths.segment_name(extent.slot, extent.segment)
        if key in self._fds:
            return self._fds[key], path
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise StaleExtent(path) from None
        except OSError as error:
            raise Unreadable(f"segment {path}: {error.strerror}") from error
        self._fds[key] = fd
        for _ in range(LOCK_TRIES):
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # being recycled at this moment: a few milliseconds
                await asyncio.sleep(LOCK_WAIT_S)
        else:
            raise StaleExtent(path)
        try:
            header = SegmentHeader.read(fd)
        except OSError as error:
            raise Unreadable(f"segment {path}: {error.strerror}") from error
        if header is None or header.generation != extent.generation:
            raise StaleExtent(path)
        return fd, path

    async def __aenter__(self) -> SegmentReader:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Unlock; idempotent."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    async def chunks(self, size_bytes: int) -> AsyncGenerator[memoryview, None]:
        """The range read past the page cache, one read ahead; each view is valid until the next is asked for."""
        size_bytes = -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
        loop = asyncio.get_running_loop()
        buffers = (AlignedBuffer(size_bytes), AlignedBuffer(size_bytes))
        direct: dict[int, int] = {}
        ahead: asyncio.Future[memoryview] | None = None
        try:
            reads = list(self._reads(size_bytes, direct))
            for number in range(len(reads) + 1):
                ready = ahead
                ahead = None
                view = await ready if ready is not None else None
                if number < len(reads):
                    ahead = loop.run_in_executor(self._executor, _read_direct, buffers[number % 2].view, *reads[number])
                if view is not None:
                    yield view
        finally:
            if ahead is not None:
                await asyncio.wait([ahead])
            for fd in direct.values():
                os.close(fd)
            for buffer in buffers:
                buffer.close()

    def _reads(self, size_bytes: int, direct: dict[int, int]) -> Iterable[tuple[int, int, int, int]]:
        """(descriptor, aligned file offset, bytes to skip, bytes wanted) of each read."""
        for piece in self.pieces:
            if piece.fd not in direct:
                # The same file, reached through our locked descriptor, with a mode of its own.
                direct[piece.fd] = open_direct(f"/proc/self/fd/{piece.fd}", os.O_RDONLY)
            offset, end = piece.offset, piece.offset + piece.length
            while offset < end:
                aligned = offset - offset % BLOCK_BYTES
                count = min(end, aligned + size_bytes) - offset
                yield direct[piece.fd], aligned, offset - aligned, count
                offset += count


def _read_direct(view: memoryview, fd: int, offset: int, skip: int, count: int) -> memoryview:
    whole = -(-(skip + count) // BLOCK_BYTES) * BLOCK_BYTES
    got = read_fully(fd, view[:whole], offset)
    if got < skip + count:
        raise DataLost(f"a segment ends at byte {offset + got}, inside an extent")
    return view[skip : skip + count]

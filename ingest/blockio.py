"""Block I/O of segment files: whole writes, group flushes, reads past the page cache.

Everything here blocks and runs in the executor's threads, except ``Flusher``, which lives on the event loop and makes sure
that one ``fdatasync`` serves all who asked before it began. An error is reported once and never retried on the same file:
after a failed fsync the page cache lies.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mmap
import os
import time
from collections.abc import Sequence
from concurrent.futures import Executor

from ingest.counters import Counters
from ingest.records import BLOCK_BYTES

DIRECT_READ_BYTES = 4 << 20


class GivenUp(OSError):
    """The file has failed before: nothing was tried."""

    def __init__(self) -> None:
        super().__init__(errno.EIO, "an earlier write or flush of this file failed")


def write_fully(fd: int, views: Sequence[memoryview], offset: int) -> None:
    """Write all of ``views`` at ``offset``; memory, offset and lengths are block-aligned (O_DIRECT). OSError on failure.

    A short write (a nearly full device, a signal) is continued from the last whole block.
    """
    pending = [view for view in views if len(view)]
    while pending:
        written = os.pwritev(fd, pending, offset)
        written -= written % BLOCK_BYTES
        if written <= 0:
            raise OSError(5, "the device accepts no more bytes")
        offset += written
        while pending and written >= len(pending[0]):
            written -= len(pending[0])
            pending.pop(0)
        if written:
            pending[0] = pending[0][written:]


def read_fully(fd: int, view: memoryview, offset: int) -> int:
    """Fill ``view`` (block-aligned) from ``offset``; returns the bytes read, fewer only at the end of the file."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count <= 0:
            break
        done += count
        if count % BLOCK_BYTES:
            break
    return done


class AlignedBuffer:
    """Page-aligned private memory for reads and writes past the page cache. ``close`` gives it back, or leaves it to the
    last who holds a view of it."""

    def __init__(self, size_bytes: int = DIRECT_READ_BYTES) -> None:
        self._map = mmap.mmap(-1, size_bytes)
        self.view = memoryview(self._map)

    def close(self) -> None:
        self.view.release()
        with contextlib.suppress(BufferError):
            self._map.close()


def open_direct(path: str | os.PathLike[str], flags: int) -> int:
    """Open with O_DIRECT, or without it on a file system that has none (tmpfs before Linux 6.5)."""
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    except OSError:
        return os.open(path, flags | os.O_CLOEXEC, 0o600)


class Flusher:
    """Group commit of one file: ``flush`` returns when everything written before the call is on stable storage."""

    def __init__(self, fd: int, executor: Executor, counters: Counters) -> None:
        self._fd = fd
        self._executor = executor
        self._seconds = counters.histogram("hiss_flush_seconds")
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None
        self.failed = False

    async def flush(self) -> None:
        """Raises OSError when the flush failed; the file must then be given up."""
        if self._running is None:
            self._running = asyncio.create_task(self._run(None))
            task = self._running
        else:
            # The flush under way may have begun before our write: wait for one that starts after it.
            if self._next is None:
                self._next = asyncio.create_task(self._run(self._running))
            task = self._next
        await asyncio.shield(task)

    async def _run(self, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
            self._running, self._next = self._next, None
        try:
            if self.failed:
                raise GivenUp
            started = time.perf_counter()
            try:
                await asyncio.get_running_loop().run_in_executor(self._executor, os.fdatasync, self._fd)
            except OSError:
                self.failed = True
                raise
            self._seconds.observe(time.perf_counter() - started)
        finally:
            if self._next is None:
                self._running = None

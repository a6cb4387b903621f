"""Frames that have to be encoded anew, on disk until they are stored: their size is known only then.

In: frames out of a sandbox, C-ordered. Out: one shuffled and deflated chunk each (HDF5 filters 2 and 1), and later their
bytes. What always holds: the file has no name, so nothing of it survives the process; it never grows beyond ``bytes_max``;
encoding and I/O happen in a thread.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

import numpy as np
from isal import isal_zlib

from kernels.rawfilter.plan import CannotFilter

DEFLATE_LEVEL = 1
READ_BYTES = 1 << 20


class Spool:
    """``folder``: of the node's data; None: the system's for temporary files. Use it as a context."""

    def __init__(self, folder: Path | None, bytes_max: int) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # closed by __exit__
        self._bytes_max = bytes_max
        self.length = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    async def add(self, frames: memoryview, frame_bytes: int, element_bytes: int) -> list[tuple[int, int]]:
        """(offset, length) of each frame's chunk. Raises CannotFilter beyond ``bytes_max``, OSError."""
        return await asyncio.to_thread(self._add, frames, frame_bytes, element_bytes)

    def _add(self, frames: memoryview, frame_bytes: int, element_bytes: int) -> list[tuple[int, int]]:
        places = []
        for start in range(0, len(frames), frame_bytes):
            plain = np.frombuffer(frames[start : start + frame_bytes], np.uint8)
            shuffled = np.ascontiguousarray(plain.reshape(-1, element_bytes).T)
            chunk = isal_zlib.compress(shuffled.data.cast("B"), DEFLATE_LEVEL)
            if self.length + len(chunk) > self._bytes_max:
                raise CannotFilter(f"what remains would be more than {self._bytes_max} bytes: raw data stay")
            os.pwrite(self._file.fileno(), chunk, self.length)
            places.append((self.length, len(chunk)))
            self.length += len(chunk)
        return places

    async def read(self, start: int, stop: int) -> AsyncIterator[memoryview]:
        """Bytes [start, stop) in pieces. OSError where they cannot be read."""
        while start < stop:
            piece = await asyncio.to_thread(os.pread, self._file.fileno(), min(READ_BYTES, stop - start), start)
            if not piece:
                raise OSError("the spool of a raw filter is cut short")
            yield memoryview(piece)
            start += len(piece)

"""Memory that sandboxes read frames from, as a node's arena would give it: sealed in size, writable only here.

In: a body and a run of its frames. Out: batches that lie in the memory, as long as ``Window.load`` is not called again for the
same bay: with two of them one is read while the other is loaded.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator

from ingest.records import BLOCK_BYTES, FrameGeometry
from kernels.decode import table
from kernels.layout.index import FrameIndex
from kernels.layout.placing import batch_frames_max
from kernels.offline.body import Frames
from kernels.sandbox import Batch
from kernels.wire import MAX_BATCH

WINDOW_BYTES = 64 << 20
BATCH_BYTES_MAX = 16 << 20
"""As a lane's (kernels/lane.py): what a node would send at once."""
_F_SEAL_FUTURE_WRITE = 0x0010
_SEALS = _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Window:
    """One region. Belongs to whoever made it, who closes it after the sandboxes that map it."""

    def __init__(self, size_bytes: int, bays: int = 1) -> None:
        """``size_bytes``: of each of the ``bays``."""
        self.size_bytes = -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
        self.region_bytes = bays * self.size_bytes
        self.fd = os.memfd_create("hiss-frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, self.region_bytes)
            self._mapping = mmap.mmap(self.fd, self.region_bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(self.fd)
            raise
        self._view = memoryview(self._mapping)

    def close(self) -> None:
        self._view.release()
        self._mapping.close()
        os.close(self.fd)

    def view(self, length: int) -> memoryview:
        """The first ``length`` bytes, to write to; the caller releases it."""
        return self._view[:length]

    def load(self, body: Frames, first: int, stop: int, *, slot: int = 0, bay: int = 0) -> tuple[list[Batch], int]:
        """Bring frames ``first``, … below ``stop`` in, as many as fit: (batches over them, number of the first left out).

        At least one frame; ValueError when not even that fits. OSError for a body that cannot be read.
        """
        layout, base = body.layout, bay * self.size_bytes
        if isinstance(layout, FrameGeometry):
            return self._plain(body, layout, first, stop, slot, base)
        return self._stored(body, layout, first, stop, slot, base)

    def _plain(
        self, body: Frames, layout: FrameGeometry, first: int, stop: int, slot: int, base: int
    ) -> tuple[list[Batch], int]:
        count = min(stop - first, self.size_bytes // layout.frame_bytes)
        if count < 1:
            raise ValueError(f"a frame of {layout.frame_bytes} bytes does not fit {self.size_bytes} bytes")
        self._read(body, layout.origin + first * layout.frame_bytes, count * layout.frame_bytes, base)
        together = _together(layout.frame_bytes)
        batches = [
            Batch(
                0, base + done * layout.frame_bytes, layout.frame_bytes, first + done, min(together, count - done), slot
            )
            for done in range(0, count, together)
        ]
        return batches, first + count

    def _stored(
        self, body: Frames, layout: FrameIndex, first: int, stop: int, slot: int, base: int
    ) -> tuple[list[Batch], int]:
        """One batch of stored chunks after the other, until the window is full. A slab is read again for the next batch
        where it is split."""
        batches: list[Batch] = []
        at, used, room = first, base, base + self.size_bytes
        for start, count in _runs(layout, first, stop):
            entries = layout.entries(start, count)
            if used + int(entries["length"].sum()) + 8 * len(entries) > room:
                break
            for entry in entries:
                offset, length = int(entry["offset"]), int(entry["length"])
                self._read(body, offset, length, used)
                entry["offset"] = used
                used += -(-length // 8) * 8
            message = table.pack(0, layout.encoding, entries)
            batches.append(Batch(0, 0, layout.frame_bytes, start, count, slot, table=message))
            at = start + count
        if not batches:
            raise ValueError(f"the stored chunks of one frame do not fit {self.size_bytes} bytes")
        return batches, at

    def _read(self, body: Frames, offset: int, length: int, at: int) -> None:
        if length:
            with self._view[at : at + length] as view:
                body.read_into(view, offset)


def _runs(layout: FrameIndex, first: int, stop: int) -> Iterator[tuple[int, int]]:
    """Frames that may share a batch: (first, count)."""
    most = min(_together(layout.frame_bytes), batch_frames_max(layout))
    depth = layout.encoding.depth
    at = first
    while at < stop:
        end = min(at + most, stop)
        if end < stop and end // depth * depth > at:
            end = end // depth * depth
        yield at, end - at
        at = end


def _together(frame_bytes: int) -> int:
    return max(1, min(MAX_BATCH, BATCH_BYTES_MAX // frame_bytes))


def window_bytes(body: Frames, frames: int) -> int:
    """Enough for so many frames, within reason: at least one frame, at most WINDOW_BYTES or that one frame."""
    layout = body.layout
    if isinstance(layout, FrameGeometry):
        return max(layout.frame_bytes, min(WINDOW_BYTES, frames * layout.frame_bytes))
    largest = max((int(layout.entries(start, 1)["length"].sum()) for start in _slab_starts(layout, frames)), default=0)
    return max(WINDOW_BYTES, layout.frame_bytes, largest + 8 * table.ENTRIES_MAX)


def _slab_starts(layout: FrameIndex, frames: int) -> range:
    return range(0, frames, layout.encoding.depth)

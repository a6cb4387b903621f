"""Stored chunks of a run of frames: which bytes of the body to load for them, and the table that brings them to a sandbox.

Pure. In: an index, the batches in whose memory the bytes are. Out: body ranges and tables (kernels/decode/table.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from ingest.ports import FrameBatch
from kernels.decode import table
from kernels.layout.index import FrameIndex


def batch_frames_max(index: FrameIndex) -> int:
    """Most frames of one batch: the table of their chunks fits one message, wherever in a chunk they begin."""
    slabs = max(1, table.ENTRIES_MAX // index.encoding.chunks_of_slab(index.shape))
    return (slabs - 1) * index.encoding.depth + 1


def stored_range(index: FrameIndex, first: int, count: int) -> tuple[int, int]:
    """The body bytes that hold every chunk of these frames: (start, stop); empty where none was ever written."""
    entries = index.entries(first, count)
    if not len(entries):
        return 0, 0
    starts = entries["offset"].astype(np.int64)
    return int(starts.min()), int((starts + entries["length"]).max())


def loadable(index: FrameIndex, first: int, count: int, bytes_max: int) -> int:
    """How many of these frames to load together, at least the ones that share chunks with the first: chunks of
    neighbours usually lie close by, but nothing forces a file to keep them so."""
    depth = index.encoding.depth
    together = min(count, depth - first % depth)
    size = count
    while size > together:
        start, stop = stored_range(index, first, size)
        if stop - start <= bytes_max:
            # End with a chunk, so that none is loaded twice.
            whole = (first + size) // depth * depth - first
            return size if size == count or whole <= 0 else whole
        size = max(together, size // 2)
    return together


def table_of(stack: int, index: FrameIndex, first: int, count: int, batches: Iterable[FrameBatch]) -> bytes:
    """``batches`` hold these frames between them, in order."""
    parts = []
    for batch in batches:
        start = max(first, batch.first_frame)
        stop = min(first + count, batch.first_frame + batch.count)
        parts.append(_placed(index.entries(start, stop - start), batch))
    entries = np.concatenate(parts)
    if len(parts) > 1:
        # Two batches may share a chunk.
        entries = entries[np.unique(entries["number"], return_index=True)[1]]
    return table.pack(stack, index.encoding, entries)


def batch_members_max(index: FrameIndex) -> int:
    """Most objects of one frame each, stored like this one, that are judged at once."""
    return max(1, table.ENTRIES_MAX // index.encoding.chunks_of_slab(index.shape))


def table_of_members(members: Sequence[tuple[int, FrameIndex, FrameBatch]]) -> bytes:
    """Frames that are objects of their own, all encoded alike: (number in the batch's sequence, index, where it lies)."""
    parts = []
    for number, index, batch in members:
        part = _placed(index.entries(0, 1), batch)
        # Chunks are numbered through the stack: as if the objects were one.
        part["number"] += number // index.encoding.depth * index.encoding.chunks_of_slab(index.shape)
        parts.append(part)
    return table.pack(0, members[0][1].encoding, np.concatenate(parts))


def _placed(entries: npt.NDArray[np.void], batch: FrameBatch) -> npt.NDArray[np.void]:
    # A batch's memory may begin before the body does.
    entries["offset"] = (entries["offset"].astype(np.int64) + (batch.offset - batch.position)).astype(np.uint64)
    entries["region"] = batch.region
    return entries

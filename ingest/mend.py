"""Bytes of a body that is stored and not yet committed, written anew in their place: the header of what a STOP cut short.

In: where the body's extents lie, a ``BodyChange``. Out: the blocks around it, changed, written and flushed; and the CRCs of the
body as it is then. What always holds: the body is not committed, so whoever dies meanwhile has acknowledged nothing; only
blocks that the body alone occupies are written; a failure retires the segment as any failed write does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from awscrt import checksums

from ingest.blockio import AlignedBuffer, read_fully
from ingest.digests import CRC_FUNCTIONS
from ingest.errors import StorageFailed
from ingest.ports import BodyChange
from ingest.records import BLOCK_BYTES, LABEL_BYTES
from ingest.segments import Reservation, Segment

_COMBINE = {
    "crc32": checksums.combine_crc32,
    "crc32c": checksums.combine_crc32c,
    "crc64nvme": checksums.combine_crc64nvme,
}


class Submits(Protocol):
    """The writer, as far as it is needed here."""

    def submit(self, item: Patch) -> None: ...


class Patch:
    """One change in one extent (a ``WriteItem``): its blocks are read back, changed and written."""

    awaited = True

    def __init__(self, segment: Segment, offset: int, data: bytes) -> None:
        """``offset``: in the segment's file."""
        self.segment = segment
        self._data = data
        self._inset = offset % BLOCK_BYTES
        self._start = offset - self._inset
        self.size_bytes = -(-(self._inset + len(data)) // BLOCK_BYTES) * BLOCK_BYTES
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def begin(self) -> Callable[[], None]:
        return self._work

    def _work(self) -> None:
        blocks = AlignedBuffer(self.size_bytes)
        try:
            if read_fully(self.segment.fd, blocks.view, self._start) != self.size_bytes:
                raise OSError(5, "the segment ends before its extent does")
            blocks.view[self._inset : self._inset + len(self._data)] = self._data
            self.segment.write([blocks.view], self._start)
        finally:
            blocks.close()

    def on_written(self, segment: Segment) -> bool:
        return True

    def on_durable(self, segment: Segment) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def on_storage_failed(self, segment: Segment, error: OSError) -> None:
        if not self.done.done():
            self.done.set_exception(StorageFailed(f"the header of what was cut short: {error.strerror}"))


async def mend(writer: Submits, layout: Sequence[tuple[Reservation, int]], change: BodyChange) -> None:
    """``layout``: reservations in body order with the payload bytes used of each, all of them durable. Raises StorageFailed."""
    patches = []
    position = 0
    for reservation, used in layout:
        low, high = max(change.offset, position), min(change.offset + len(change.after), position + used)
        if low < high:
            data = change.after[low - change.offset : high - change.offset]
            patches.append(Patch(reservation.segment, reservation.offset + LABEL_BYTES + low - position, data))
        position += used
    for patch in patches:
        writer.submit(patch)
    for result in await asyncio.gather(*(patch.done for patch in patches), return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def mended_crcs(crcs: Mapping[str, int], length: int, change: BodyChange) -> dict[str, int]:
    """The CRCs of a body of ``length`` bytes after the change. They are affine: what differs is the difference of the two
    pieces' CRCs, carried over the bytes behind them."""
    behind = length - change.offset - len(change.after)
    assert len(change.before) == len(change.after)
    changed = {}
    for name, value in crcs.items():
        function, combine = CRC_FUNCTIONS[name], _COMBINE[name]
        before, after = (function(memoryview(piece), 0) for piece in (change.before, change.after))
        changed[name] = value ^ combine(before, 0, behind) ^ combine(after, 0, behind)
    return changed

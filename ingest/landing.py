"""Memory of an isolation domain that is lent to the kernel room, and how bytes come into it or go from it to a stream.

In: spans of the arena, an open reader, a stream that takes a body. Out: ``Lent``, filled memory, a stream that has received.
What always holds: a span is given back exactly once.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable

from ingest.arena import Span
from ingest.blockio import open_direct, read_fully
from ingest.errors import DataLost
from ingest.ports import BodySink
from ingest.reader import SegmentReader
from ingest.records import BLOCK_BYTES


class Lent:
    """A piece of a domain's memory (implements ``ingest.ports.LoadedBytes`` and ``Room``)."""

    def __init__(self, span: Span, region: int, skip: int, length: int, give: Callable[[Span], None]) -> None:
        """``skip``: bytes of the span in front of the piece."""
        self.region = region
        self.offset = span.offset + skip
        self.length = length
        self.view = span.view[skip : skip + length]
        self._span = span
        self._give = give

    def release(self) -> None:
        if not self._span.freed:
            self._give(self._span)


async def fill(stream: BodySink, piece: memoryview) -> None:
    """Put bytes into a stream the way a connection would."""
    done = 0
    while done < len(piece):
        view = stream.get_buffer()
        if view is None:
            await stream.writable()
            continue
        count = min(len(view), len(piece) - done)
        view[:count] = piece[done : done + count]
        stream.received(count)
        done += count


async def gather(pieces: AsyncIterator[memoryview], view: memoryview) -> None:
    """Copy pieces one behind the other into ``view``, which they fill."""
    done = 0
    async for piece in pieces:
        view[done : done + len(piece)] = piece
        done += len(piece)
    if done != len(view):
        raise DataLost(f"{len(view)} bytes were opened and {done} read")


def read_into(reader: SegmentReader, view: memoryview, span: memoryview) -> None:
    """In a thread. One piece: straight into the span, block-aligned. Several: buffered, each behind the other."""
    if len(reader.pieces) == 1:
        piece = reader.pieces[0]
        skip = piece.offset % BLOCK_BYTES
        whole = -(-(skip + piece.length) // BLOCK_BYTES) * BLOCK_BYTES
        fd = open_direct(f"/proc/self/fd/{piece.fd}", os.O_RDONLY)
        try:
            if read_fully(fd, span[:whole], piece.offset - skip) < skip + piece.length:
                raise DataLost("a segment ends inside an extent")
        finally:
            os.close(fd)
        return
    done = 0
    for piece in reader.pieces:
        end = done + piece.length
        offset = piece.offset
        while done < end:
            count = os.preadv(piece.fd, [view[done:end]], offset)
            if count <= 0:
                raise DataLost("a segment ends inside an extent")
            done += count
            offset += count

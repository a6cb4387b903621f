"""Pieces of a body: one span each, and the frame batches that are read from it.

A ``Piece`` is a ``WriteItem``: its memory is the image of its place in a segment. A ``SpanBatch`` is what the kernel room
holds of a piece; until it is dispatched to a sandbox the arena may revoke it, so that a slow kernel never stops a stream.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from ingest.arena import Span
from ingest.blockio import AlignedBuffer
from ingest.records import LABEL_BYTES
from ingest.segments import Reservation, Segment

if TYPE_CHECKING:
    from ingest.stream import SpanStream


class Piece:
    """One span of a stream: where its bytes lie in memory, in the body and in the segment. A ``WriteItem``."""

    __slots__ = (
        "batches", "carried", "durable", "file_offset", "fill", "hashed", "in_work", "label", "limit",
        "position", "reservation", "span", "start", "stream", "write_bytes", "written",
    )  # fmt: skip

    def __init__(
        self, stream: SpanStream, span: Span, reservation: Reservation, file_offset: int, start: int, position: int
    ) -> None:
        self.stream = stream
        self.span = span
        self.reservation = reservation
        self.file_offset = file_offset
        self.start = start
        self.position = position
        self.fill = start
        self.carried = 0
        """Body bytes in front of ``start``, which the piece before holds, too."""
        self.limit = span.size_bytes
        self.write_bytes = 0
        self.label: AlignedBuffer | None = None
        self.hashed = False
        self.written = False
        self.durable = False
        self.in_work = 0
        self.batches: set[SpanBatch] = set()

    @property
    def segment(self) -> Segment:
        return self.reservation.segment

    @property
    def size_bytes(self) -> int:
        return self.write_bytes

    @property
    def awaited(self) -> bool:
        return self.stream.awaited

    @property
    def stop(self) -> int:
        """Body offset behind its last byte."""
        return self.position + self.fill - self.start

    @property
    def payload(self) -> memoryview:
        return self.span.view[self.start : self.fill]

    def begin(self) -> Callable[[], None]:
        self.in_work += 1
        # The place as it is now: the piece may be moved while its write still waits for a thread.
        return functools.partial(self._work, self.segment, self.file_offset, self.label)

    def _work(self, segment: Segment, file_offset: int, label: AlignedBuffer | None) -> None:
        image = self.span.view[: self.write_bytes]
        if label is not None:
            segment.write([label.view, image], file_offset - LABEL_BYTES)
        else:
            segment.write([image], file_offset)

    def on_written(self, segment: Segment) -> bool:
        self.in_work -= 1
        return self.stream.piece_written(self, segment)

    def on_durable(self, segment: Segment) -> None:
        self.stream.piece_durable(self, segment)

    def on_storage_failed(self, segment: Segment, error: OSError) -> None:
        self.stream.storage_failed(segment, error)


class SpanBatch:
    """Whole frames in one span, offered to the kernel room (implements ``ingest.ports.FrameBatch``)."""

    __slots__ = ("_piece", "_state", "count", "first_frame", "offset", "position", "region")

    def __init__(self, piece: Piece, region: int, offset: int, first_frame: int, count: int, position: int = 0) -> None:
        self._piece = piece
        self._state = "offered"
        self.region = region
        self.offset = offset
        self.first_frame = first_frame
        self.count = count
        self.position = position
        piece.batches.add(self)

    @property
    def revoked(self) -> bool:
        return self._state == "revoked"

    @property
    def revocable(self) -> bool:
        return self._state == "offered"

    def dispatched(self) -> bool:
        if self._state == "offered":
            self._state = "dispatched"
        return self._state == "dispatched"

    def revoke(self) -> None:
        self._state = "revoked"
        self._piece.batches.discard(self)

    def release(self) -> None:
        if self._state != "revoked":
            self._state = "released"
            self._piece.batches.discard(self)
            self._piece.stream.release_pieces()

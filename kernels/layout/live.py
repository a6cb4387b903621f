"""Frames of a body that still arrives, where only the body itself tells where they are.

``LiveScan`` is a scanner as the stream sees it (``ingest.ports.FrameScanner``): it never raises; what is wrong with the
body is told once to ``on_trouble``, and from then on no frame is found.
"""

from __future__ import annotations

from collections.abc import Callable

from ingest.ports import BodyChange, StreamInfo
from ingest.records import FrameGeometry
from kernels.formats import NotFrames, declared_geometry, sniff
from kernels.layout.cbor import CborStream
from kernels.layout.detect import STORED_ONLY, Kind, kind_of
from kernels.layout.index import FrameIndex
from kernels.layout.npy_stream import NpyStream
from kernels.layout.scanner import Broken, Scanner


class Later:
    """The structure is found once the body is stored."""


class LiveScan:
    """Implements ``ingest.ports.FrameScanner``."""

    def __init__(self, scanner: Scanner, on_trouble: Callable[[str], None]) -> None:
        self._scanner = scanner
        self._on_trouble = on_trouble
        self._broken = False

    def feed(self, data: memoryview) -> None:
        if self._broken:
            return
        try:
            self._scanner.feed(data)
        except Broken as error:
            self._broken = True
            self._on_trouble(str(error))

    @property
    def frames(self) -> int:
        return self._scanner.frames

    @property
    def position(self) -> int:
        """Body bytes seen."""
        return self._scanner.position

    @property
    def settled(self) -> int:
        return self._scanner.settled

    @property
    def unit_bytes(self) -> int:
        return 0 if self._broken else self._scanner.unit_bytes

    @property
    def horizon(self) -> int | None:
        return None if self._broken else self._scanner.horizon

    def boundary(self, limit: int) -> int:
        return limit if self._broken else self._scanner.boundary(limit)

    def first_from(self, offset: int) -> int:
        return self._scanner.first_from(offset)

    def cut_short(self) -> BodyChange | None:
        return None if self._broken else self._scanner.cut_short()

    def gaps(self) -> tuple[tuple[int, int], ...]:
        return self._scanner.gaps()


def sniff_live(
    head: memoryview,
    info: StreamInfo,
    on_index: Callable[[FrameIndex], None],
    on_trouble: Callable[[str], None],
    *,
    complete: bool,
) -> FrameGeometry | LiveScan | Later | NotFrames | int:
    """How to find the frames, or how many bytes are needed to say (never when ``complete``)."""
    try:
        kind = kind_of(head, info.key, info.content_type, info.metadata, complete=complete)
    except ValueError as error:
        return NotFrames(str(error))
    if isinstance(kind, int):
        return kind
    if kind in STORED_ONLY:
        return Later()
    if kind is Kind.CBOR:
        return LiveScan(CborStream(on_index, info.metadata.get("frame-channel", "")), on_trouble)
    found = sniff(head, b"" if kind is Kind.RAW else info.key, info.metadata, complete=complete)
    if kind is Kind.NPY and isinstance(found, FrameGeometry) and _more_follows(found, info.length):
        return LiveScan(NpyStream(on_index, declared_geometry(info.metadata)), on_trouble)
    return found


def _more_follows(first: FrameGeometry, length: int | None) -> bool:
    """Whether the body goes on behind its first array; where its length is unknown, it may."""
    return length is None or length > first.origin + (first.count or 0) * first.frame_bytes

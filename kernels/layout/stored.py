"""How the frames of a stored version lie: whatever the format, from the bytes it asks for and no others.

In: the version, and a way to read ranges of it. Out: ``FrameGeometry``, ``FrameIndex`` or ``NotFrames``, and for a stream of
messages which frames are missing.
"""

from __future__ import annotations

import array
import dataclasses
from collections.abc import Awaitable, Callable, Generator, Sequence

from ingest.ports import StreamInfo
from ingest.records import FrameGeometry
from kernels.formats import HEADER_BYTES_MAX, NotFrames, declared_geometry, sniff
from kernels.layout.cbf import read_cbf
from kernels.layout.cbor import CborStream
from kernels.layout.detect import PROBE_BYTES, Kind, kind_of
from kernels.layout.index import FrameIndex
from kernels.layout.npy_stream import NpyStream
from kernels.layout.scanner import Broken, Scanner
from kernels.layout.tiff import read_tiff

WINDOW_BYTES = 64 << 10
NO_IMAGE = "there is no image in it"
Fetch = Callable[[int, int], Awaitable[bytes]]
"""Bytes [offset, offset + length) of the body."""


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """``trailing_bytes`` lie behind the last whole frame or message; ``gaps`` as (first missing, how many)."""

    layout: FrameGeometry | FrameIndex | NotFrames
    trailing_bytes: int = 0
    gaps: tuple[tuple[int, int], ...] = ()
    kind: Kind = Kind.RAW
    items: Sequence[int] = ()
    """Of a stream: body offsets where each message or array that holds frames begins and ends, in turn."""

    def frames(self, body_bytes: int) -> int:
        """Whole frames in a body of that length."""
        layout = self.layout
        if isinstance(layout, FrameIndex):
            return layout.count
        if isinstance(layout, NotFrames):
            return 0
        frames = max(0, body_bytes - layout.origin) // layout.frame_bytes
        return frames if layout.count is None else min(frames, layout.count)

    @classmethod
    def plain(cls, geometry: FrameGeometry, body_bytes: int) -> Found:
        frames = cls(geometry).frames(body_bytes)
        return cls(geometry, max(0, body_bytes - geometry.origin) - frames * geometry.frame_bytes)


async def find_layout(
    info: StreamInfo,
    length: int,
    fetch: Fetch,
    read_structure: Callable[[], Awaitable[FrameGeometry | FrameIndex | NotFrames]],
) -> Found:
    """``read_structure`` has a sandbox read an HDF5 file."""
    try:
        head = await fetch(0, min(length, PROBE_BYTES)) if length else b""
        kind = kind_of(memoryview(head), info.key, info.content_type, info.metadata, complete=True)
        assert not isinstance(kind, int)
        match kind:
            case Kind.HDF5:
                return Found(await read_structure(), kind=kind)
            case Kind.CBF:
                return Found(await _driven(read_cbf(length), fetch), kind=kind)
            case Kind.TIFF:
                return Found(await _driven(read_tiff(length), fetch), kind=kind)
            case Kind.CBOR:
                return await _scanned(CborStream(_ignore, info.metadata.get("frame-channel", "")), kind, length, fetch)
            case _:
                return await _plain(kind, info, length, fetch)
    except (Broken, ValueError) as error:
        return Found(NotFrames(str(error)))


async def _plain(kind: Kind, info: StreamInfo, length: int, fetch: Fetch) -> Found:
    head = b""
    if kind is Kind.NPY and length:
        head = await fetch(0, min(length, HEADER_BYTES_MAX))
    found = sniff(memoryview(head), b"" if kind is Kind.RAW else info.key, info.metadata, complete=True)
    assert not isinstance(found, int)
    if isinstance(found, NotFrames):
        return Found(found)
    payload = max(0, length - found.origin)
    frames = payload // found.frame_bytes
    if found.count is not None and frames > found.count and kind is Kind.NPY:
        return await _scanned(NpyStream(_ignore, declared_geometry(info.metadata)), kind, length, fetch)
    return Found.plain(found, length)


async def _scanned(scanner: Scanner, kind: Kind, length: int, fetch: Fetch) -> Found:
    scanner.items = array.array("Q")
    while scanner.position < length:
        window = await fetch(scanner.position, min(WINDOW_BYTES, length - scanner.position))
        scanner.feed(memoryview(window))
        scanner.jump(length)
    if scanner.index is None:
        return Found(NotFrames(NO_IMAGE))
    return Found(scanner.index, length - scanner.settled, scanner.gaps(), kind, scanner.items)


async def _driven(steps: Generator[tuple[int, int], bytes, FrameIndex], fetch: Fetch) -> FrameIndex:
    wanted = next(steps)
    while True:
        data = await fetch(*wanted)
        try:
            wanted = steps.send(data)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def _ignore(_: FrameIndex) -> None:
    """Nobody waits for the index."""

"""A stored version that lies somewhere else: how its frames lie, and their bytes, by ranges of it.

In: what is known of the version, and a way to read ranges (kernels/offline knows no network; whoever calls has one). Out:
``FarBody``, or the reason why there are no frames in it, in a node's words. What always holds: a structure is read by a
sandbox, as on a node; of a body only what is asked for is in memory.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Protocol

from ingest.ports import Domain
from ingest.records import FrameGeometry, ObjectRecord
from kernels.formats import NotFrames
from kernels.layout.dialogue import WANT_BYTES_MAX
from kernels.layout.index import FrameIndex
from kernels.layout.indexer import read_stored_structure
from kernels.layout.stored import Found, find_layout
from kernels.offline.body import Layout
from kernels.offline.memory import Window
from kernels.runs.gather import is_single
from kernels.sandbox import SandboxLimits
from kernels.stored import info_of


class Ranges(Protocol):
    """Reads one version. Blocks; may be called from several threads. Raises OSError."""

    def read_into(self, view: memoryview, offset: int) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class FarBody:
    """Implements ``Frames``."""

    record: ObjectRecord
    found: Found
    layout: Layout
    ranges: Ranges

    @property
    def frames(self) -> int:
        return self.found.frames(self.record.length)

    @property
    def geometry(self) -> FrameGeometry:
        return self.layout.geometry if isinstance(self.layout, FrameIndex) else self.layout

    @property
    def index(self) -> FrameIndex | None:
        return self.layout if isinstance(self.layout, FrameIndex) else None

    @property
    def frame_bytes(self) -> int:
        return self.layout.frame_bytes

    @property
    def is_single(self) -> bool:
        """Whether it is exactly one frame, which counts in its run and has no product of its own."""
        if isinstance(self.layout, FrameIndex):
            return self.layout.is_single
        return is_single(self.layout, self.record.length)

    def read_into(self, view: memoryview, offset: int) -> None:
        self.ranges.read_into(view, offset)


async def open_far(
    zygote_socket: str, record: ObjectRecord, ranges: Ranges, limits: SandboxLimits
) -> FarBody | NotFrames:
    """Raises OSError where it cannot be read, SandboxFailed("unavailable") where no sandbox can be had."""

    async def fetch(offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        await asyncio.to_thread(ranges.read_into, memoryview(buffer), offset)
        return bytes(buffer)

    async def structure() -> FrameGeometry | FrameIndex | NotFrames:
        room = _Room(record.bucket)
        try:
            return await read_stored_structure(zygote_socket, _Loader(room, ranges), record, room, limits)
        finally:
            room.window.close()

    found = await find_layout(info_of(record), record.length, fetch, structure)
    if isinstance(found.layout, NotFrames):
        return found.layout
    return FarBody(record, found, found.layout, ranges)


class _Room:
    """Implements ``Domain``: a little memory that the reader of a structure maps."""

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self.window = Window(WANT_BYTES_MAX)
        self.region_fds: Sequence[int] = [self.window.fd]
        self.region_bytes = self.window.region_bytes

    def hold(self) -> None: ...
    def drop(self) -> None: ...


class _Loaded:
    """Implements ``LoadedBytes``: the room is the reader's own, for one piece at a time."""

    region = 0
    offset = 0

    def __init__(self, length: int) -> None:
        self.length = length

    def release(self) -> None: ...


class _Loader:
    """Implements ``kernels.passes.Loads``."""

    def __init__(self, room: _Room, ranges: Ranges) -> None:
        self._room = room
        self._ranges = ranges

    async def load(self, record: ObjectRecord, start: int, length: int, domain: Domain) -> _Loaded:
        with self._room.window.view(length) as view:
            await asyncio.to_thread(self._ranges.read_into, view, start)
        return _Loaded(length)

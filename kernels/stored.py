"""How the frames of a stored version lie: asked of its record, else of its bytes, else of a sandbox that reads its structure.

In: a stored version and its bucket's memory domain. Out: ``Found``. Raises Gone, Postponed or Hopeless.
What always holds: at most READERS_MAX processes read structures at once.
"""

from __future__ import annotations

import asyncio
import os

from ingest.ports import Domain, LandingPad, StreamInfo
from ingest.records import BLOCK_BYTES, FrameGeometry, ObjectRecord
from kernels.clearance import Clearance
from kernels.layout.index import FrameIndex
from kernels.layout.indexer import Layout, read_stored_structure
from kernels.layout.stored import Found, find_layout
from kernels.passes import Postponed, load
from kernels.runs.gather import is_single
from kernels.sandbox import SandboxFailed, SandboxLimits

READERS_MAX = 2
"""Processes that read the structure of stored files at once."""


class StoredLayouts:
    def __init__(self, pad: LandingPad, zygote_socket: str, limits: SandboxLimits, clearance: Clearance) -> None:
        self._pad = pad
        self._zygote_socket = zygote_socket
        self._limits = limits
        self._clearance = clearance
        self._readers = asyncio.Semaphore(READERS_MAX)

    async def single(self, record: ObjectRecord, domain: Domain) -> tuple[FrameGeometry | None, FrameIndex | None]:
        """What a version that is exactly one frame is like, and where it is stored if it is not plain."""
        return single((await self.of(record, domain)).layout, record, domain)

    async def of(self, record: ObjectRecord, domain: Domain) -> Found:
        if record.geometry is not None:
            return Found.plain(record.geometry, record.length)

        async def fetch(offset: int, length: int) -> bytes:
            loaded = await load(self._pad, record, offset, length, domain)
            try:
                return os.pread(domain.region_fds[loaded.region], length, loaded.offset)
            finally:
                loaded.release()

        async def read_structure() -> Layout:
            limits = self._limits
            async with self._readers:
                return await read_stored_structure(self._zygote_socket, self._pad, record, domain, limits)

        try:
            await self._clearance.granted()
            return await find_layout(info_of(record), record.length, fetch, read_structure)
        except SandboxFailed as failure:
            raise Postponed(f"its structure cannot be read at the moment: {failure.message}") from None


def info_of(record: ObjectRecord) -> StreamInfo:
    content_type = record.headers.get("content-type", "")
    return StreamInfo(record.bucket, record.key, record.object_id, record.length, content_type, record.metadata)


def single(layout: Layout, record: ObjectRecord, domain: Domain) -> tuple[FrameGeometry | None, FrameIndex | None]:
    """The geometry of a version that is exactly one frame, and where it is stored if it is not plain."""
    if isinstance(layout, FrameIndex) and layout.is_single:
        return layout.geometry, layout
    if isinstance(layout, FrameGeometry) and is_single(layout, record.length):
        readable = layout.frame_bytes + BLOCK_BYTES <= domain.region_bytes
        return (layout, None) if readable else (None, None)
    return None, None

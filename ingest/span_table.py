"""The span table: what lies in a slot's arena and is promised to a place on disk, in memory that outlives the worker.

A ``memory`` object is acknowledged before its bytes are on disk. Each of its spans has an entry here, in shared memory owned by
the supervisor, so that the slot's next worker can write what its predecessor still owed. One entry a slab; the state word is
written last, so a process that dies between two stores leaves either a whole entry or none.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import struct
from collections.abc import Iterator

_ENTRY = struct.Struct("<QIIQQ")  # file offset, segment, generation, region offset, length
_STATE = struct.Struct("<I")
_OWED = 0x4F574544
ENTRY_BYTES = 64


@dataclasses.dataclass(frozen=True, slots=True)
class OwedSpan:
    """``length`` bytes at ``offset`` of region ``region`` belong at ``file_offset`` of a segment generation."""

    region: int
    offset: int
    length: int
    segment: int
    generation: int
    file_offset: int


class SpanTable:
    """Entries indexed by (region, first slab)."""

    def __init__(self, fd: int, slabs_per_region: int) -> None:
        self._map = mmap.mmap(fd, os.fstat(fd).st_size)
        self._slabs = slabs_per_region
        self._entries = os.fstat(fd).st_size // ENTRY_BYTES

    @staticmethod
    def create(regions: int, slabs_per_region: int) -> int:
        """A memfd with room for every slab of a slot's regions; the supervisor keeps it."""
        fd = os.memfd_create("hiss-spans", os.MFD_CLOEXEC)
        os.ftruncate(fd, max(1, regions * slabs_per_region) * ENTRY_BYTES)
        return fd

    def owe(self, slab: int, owed: OwedSpan) -> None:
        start = (owed.region * self._slabs + slab) * ENTRY_BYTES
        _STATE.pack_into(self._map, start, 0)
        _ENTRY.pack_into(
            self._map, start + 8, owed.file_offset, owed.segment, owed.generation, owed.offset, owed.length
        )
        _STATE.pack_into(self._map, start, _OWED)

    def paid(self, region: int, slab: int) -> None:
        _STATE.pack_into(self._map, (region * self._slabs + slab) * ENTRY_BYTES, 0)

    def owed(self) -> Iterator[OwedSpan]:
        """What an earlier worker of this slot left unwritten."""
        for index in range(self._entries):
            start = index * ENTRY_BYTES
            if _STATE.unpack_from(self._map, start)[0] != _OWED:
                continue
            file_offset, segment, generation, offset, length = _ENTRY.unpack_from(self._map, start + 8)
            yield OwedSpan(index // self._slabs, offset, length, segment, generation, file_offset)

    def clear(self) -> None:
        for index in range(self._entries):
            _STATE.pack_into(self._map, index * ENTRY_BYTES, 0)

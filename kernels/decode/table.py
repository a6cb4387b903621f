"""The message that tells a sandbox where the stored chunks of a batch lie in its regions.

It follows the ``Run`` struct in the same datagram: a head, the encoding (msgpack), then one entry for each chunk, in the
order of chunk numbers. A chunk without an entry was never written and holds the fill value. Written by the gateway only.
"""

from __future__ import annotations

import struct

import msgspec
import numpy as np
import numpy.typing as npt

from kernels.decode.encoding import CHUNKS_OF_SLAB_MAX, Encoding

ENTRY = np.dtype(
    [("number", "<u8"), ("offset", "<u8"), ("length", "<u4"), ("region", "<u2"), ("skipped", "<u2")],
)
"""``number``: of the chunk in the grid of the whole stack. ``offset``: bytes into the region. ``skipped``: filters that were
not applied to this chunk, by bit."""

_HEAD = struct.Struct("<QII")
ENTRIES_MAX = CHUNKS_OF_SLAB_MAX
TABLE_BYTES_MAX = _HEAD.size + 4096 + ENTRIES_MAX * ENTRY.itemsize
_decoder = msgspec.msgpack.Decoder(Encoding)


def pack(stack: int, encoding: Encoding, entries: npt.NDArray[np.void]) -> bytes:
    """``stack`` tells the stacks apart that one sandbox sees: frames that share a chunk are decoded once."""
    assert entries.dtype == ENTRY
    assert len(entries) <= ENTRIES_MAX
    text = msgspec.msgpack.encode(encoding)
    return _HEAD.pack(stack, len(text), len(entries)) + text + entries.tobytes()


def stored_bytes(table: bytes) -> int:
    """What the chunks that it names take as they are stored."""
    _, length, count = _HEAD.unpack_from(table)
    return int(np.frombuffer(table, ENTRY, count, _HEAD.size + length)["length"].sum())


def unpack(table: bytes) -> tuple[int, Encoding, npt.NDArray[np.void]]:
    stack, length, count = _HEAD.unpack_from(table)
    start = _HEAD.size + length
    encoding = _decoder.decode(table[_HEAD.size : start])
    return stack, encoding, np.frombuffer(table, ENTRY, count, start)

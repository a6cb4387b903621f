"""What the control process and a bridge say to each other: a 4-byte little-endian length, then msgpack.

Control to bridge: ``Write``; back, once for each in any order: ``Written``. A target has one write under way at a time; the
sender sees to that.
"""

from __future__ import annotations

import asyncio

import msgspec

MESSAGE_BYTES_MAX = 1 << 16
ERROR_CHARS_MAX = 300


class Write(msgspec.Struct, frozen=True):
    number: int
    target: str
    """Without its scheme: a PV's name, or DEVICE/ATTRIBUTE."""
    value: float
    timeout_s: float
    before_s: float
    """On CLOCK_MONOTONIC, which both ends share: not begun by then, it is not to be done at all."""


class Written(msgspec.Struct, frozen=True):
    number: int
    error: str = ""
    """Empty: the target has taken the value."""


_ENCODER = msgspec.msgpack.Encoder()
WRITE = msgspec.msgpack.Decoder(Write)
WRITTEN = msgspec.msgpack.Decoder(Written)


def encode(message: Write | Written) -> bytes:
    body = _ENCODER.encode(message)
    return len(body).to_bytes(4, "little") + body


async def read(reader: asyncio.StreamReader) -> bytes:
    """The next message's body. Raises IncompleteReadError at the end, ValueError for one that is too long."""
    length = int.from_bytes(await reader.readexactly(4), "little")
    if length > MESSAGE_BYTES_MAX:
        raise ValueError(f"a bridge message of {length} bytes")
    return await reader.readexactly(length)

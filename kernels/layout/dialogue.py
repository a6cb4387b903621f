"""What gateway and sandbox say to each other while the sandbox reads the structure of a stored file, or rewrites it.

One datagram each (SOCK_SEQPACKET). The gateway sends an ``Ask``; the sandbox answers with any number of ``Want``s, each of
which is met by a ``Place`` in a region, and then with a ``Refusal`` or a ``Structure``; behind a structure follow its
chunks, ``CHUNKS_A_DATAGRAM`` entries (decode/table.py) at a time. Whatever the sandbox says is checked by the gateway.

Or the gateway sends a ``Rewrite``, behind it which frames remain (one bit each, as numpy.packbits) and the chunks that hold
them; the sandbox reads as above and answers with a ``Refusal`` or ``Rewritten``, and behind that the new file from its first
byte to its last: datagrams of ``LITERAL`` and bytes as they are, or of ``RANGES`` and records (RANGE) that say from where.
"""

from __future__ import annotations

import msgspec
import numpy as np

from kernels.layout.hdf5_types import Structure

CHUNKS_A_DATAGRAM = 4096
DATAGRAM_BYTES_MAX = 100 << 10
WANT_BYTES_MAX = 256 << 10
REASON_CHARS_MAX = 500
BITS_A_DATAGRAM = 96 << 10
"""Bytes of bits."""

LITERAL, RANGES = b"L", b"R"
RANGE = np.dtype([("kind", "<u8"), ("offset", "<u8"), ("length", "<u8")])
OF_FRAME, OF_SPOOL, OF_REST = 0, 1, 2
"""Where a piece of the new file comes from: a frame's chunk in the old one; one that the gateway encoded, in its spool;
something else in the old one. Also ``region`` of the chunks that the gateway sends."""


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """``dataset``: the one the metadata name, or empty. ``frame_shape``: declared in the metadata."""

    length: int
    dataset: str = ""
    frame_shape: tuple[int, ...] | None = None


class Rewrite(msgspec.Struct, frozen=True, tag="rewrite"):
    """The same file with other frames in its dataset. ``frames``: those received, a bit each follows; ``remain`` of them
    stay."""

    ask: Ask
    frames: int
    remain: int
    dtype: str
    """Empty: the dataset's own type, filters and fill value; else this numpy dtype, shuffled and deflated."""
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    chunks: int
    """Entries that follow: ``number`` is of the new dataset, ``region`` OF_FRAME or OF_SPOOL, ``offset`` is there."""
    note: str


class Want(msgspec.Struct, frozen=True, tag="want"):
    """Bytes [offset, offset + length) of the file."""

    offset: int
    length: int


class Place(msgspec.Struct, frozen=True, tag="place"):
    """They lie here until the sandbox says the next word."""

    region: int
    offset: int
    length: int


class Refusal(msgspec.Struct, frozen=True, tag="refusal"):
    reason: str


class Rewritten(msgspec.Struct, frozen=True, tag="rewritten"):
    length: int
    dataset: str


Task = Ask | Rewrite
"""Of the gateway, to begin with."""
Word = Want | Refusal | Structure | Rewritten
"""Of the sandbox."""

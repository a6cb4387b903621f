"""What gateway and sandbox say to each other while the sandbox reads the structure of a stored file.

One datagram each (SOCK_SEQPACKET). The gateway sends an ``Ask``; the sandbox answers with any number of ``Want``s, each of
which is met by a ``Place`` in a region, and then with a ``Refusal`` or a ``Structure``; behind a structure follow its
chunks, ``CHUNKS_A_DATAGRAM`` entries (decode/table.py) at a time. Whatever the sandbox says is checked by the gateway.
"""

from __future__ import annotations

import msgspec

from kernels.layout.hdf5_types import Structure

CHUNKS_A_DATAGRAM = 4096
DATAGRAM_BYTES_MAX = 100 << 10
WANT_BYTES_MAX = 256 << 10
REASON_CHARS_MAX = 500


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """``dataset``: the one the metadata name, or empty. ``frame_shape``: declared in the metadata."""

    length: int
    dataset: str = ""
    frame_shape: tuple[int, ...] | None = None


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


Word = Want | Refusal | Structure
"""Of the sandbox."""

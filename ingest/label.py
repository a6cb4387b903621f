"""The label of an extent: 4 KiB in front of its payload that say whose bytes these are.

A label serves repair tools and start-up checks; it is not a commit (only the journal is). In: what the stream knows when it
reserves the extent. Out: one block, checked by a CRC32C over its content.
"""

from __future__ import annotations

import os
import struct

import msgspec
from awscrt import checksums

from ingest.records import LABEL_BYTES

MAGIC = b"HISSEXT1"
FORMAT_VERSION = 1
_HEAD = struct.Struct("<8sII")  # magic, content bytes, CRC32C of the content


class Label(msgspec.Struct, frozen=True):
    object_id: bytes
    bucket: str
    key: bytes
    node: int
    slot: int
    segment: int
    generation: int
    offset: int
    """File offset of this label."""
    position: int
    """Body offset of the extent's first payload byte."""
    length: int
    """Payload bytes reserved; the catalogue knows how many were used."""
    created_ns: int
    part: int = 0
    """Part number of a multipart upload, 0 for a whole object."""
    format_version: int = FORMAT_VERSION


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Label)


def write_label(label: Label, into: memoryview) -> None:
    """Fill the first LABEL_BYTES of ``into``."""
    content = _encoder.encode(label)
    end = _HEAD.size + len(content)
    _HEAD.pack_into(into, 0, MAGIC, len(content), checksums.crc32c(content))
    into[_HEAD.size : end] = content
    into[end:LABEL_BYTES] = bytes(LABEL_BYTES - end)


def parse_label(block: bytes | memoryview) -> Label | None:
    """The label in a block, or None where there is none (never written, overwritten, damaged)."""
    magic, length, crc = _HEAD.unpack_from(block)
    content = bytes(block[_HEAD.size : _HEAD.size + length])
    if magic != MAGIC or len(content) != length or checksums.crc32c(content) != crc:
        return None
    try:
        return _decoder.decode(content)
    except msgspec.DecodeError:
        return None


def read_label(fd: int, offset: int) -> Label | None:
    """Read and parse the label at ``offset`` of an open segment file (buffered descriptor)."""
    block = os.pread(fd, LABEL_BYTES, offset)
    return parse_label(block) if len(block) == LABEL_BYTES else None

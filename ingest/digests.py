"""Checksums over memory, computed where the bytes lie.

CRC64NVME is computed of every body, right behind each read while the bytes are still in the cache: there it runs at 80 GB/s,
from memory at 20. CRCs a client asks for beside it combine, so pieces are hashed in parallel and joined at the end. MD5 and SHA
need the bytes in order: one lane a stream. Everything releases the GIL for large views.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Protocol

from awscrt import checksums

CRC_FUNCTIONS = {"crc32": checksums.crc32, "crc32c": checksums.crc32c, "crc64nvme": checksums.crc64nvme}
CRC_COMBINE = {
    "crc32": checksums.combine_crc32,
    "crc32c": checksums.combine_crc32c,
    "crc64nvme": checksums.combine_crc64nvme,
}
CRC_BYTES = {"crc32": 4, "crc32c": 4, "crc64nvme": 8}
ORDERED = frozenset({"md5", "sha1", "sha256"})


class Hash(Protocol):
    def update(self, data: memoryview, /) -> None: ...
    def digest(self) -> bytes: ...


crc64nvme = CRC_FUNCTIONS["crc64nvme"]
"""``crc64nvme(view, previous) -> int``."""


def asked_crcs(algorithms: frozenset[str]) -> tuple[str, ...]:
    """The CRCs of ``algorithms`` beside CRC64NVME, which every body gets."""
    return tuple(sorted((algorithms & CRC_FUNCTIONS.keys()) - {"crc64nvme"}))


def crcs_of(view: memoryview, names: tuple[str, ...]) -> dict[str, int]:
    """The named CRCs of one piece."""
    return {name: CRC_FUNCTIONS[name](view) for name in names}


class CrcChain:
    """Joins the CRCs of consecutive pieces."""

    __slots__ = ("length", "values")

    def __init__(self) -> None:
        self.values: dict[str, int] = {}
        self.length = 0

    def append(self, values: Mapping[str, int], length: int) -> None:
        if not self.length:
            self.values = dict(values)
        elif length:
            for name, value in values.items():
                self.values[name] = CRC_COMBINE[name](self.values[name], value, length)
        self.length += length


def new_hashes(algorithms: frozenset[str]) -> dict[str, Hash]:
    return {name: hashlib.new(name, usedforsecurity=False) for name in algorithms & ORDERED}


def digests(crcs: Mapping[str, int], hashes: Mapping[str, Hash]) -> dict[str, bytes]:
    """Raw digests by algorithm, CRCs big-endian as AWS encodes them."""
    values = {name: value.to_bytes(CRC_BYTES[name], "big") for name, value in crcs.items()}
    return values | {name: state.digest() for name, state in hashes.items()}

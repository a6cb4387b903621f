"""Checksums over memory, computed where the bytes lie.

CRCs are computed right behind each read while the bytes are still in the cache: there they run at 80 GB/s, from memory at 20 to
30. The others follow in a thread, one lane a stream: they need the bytes in order, and MD5 and SHA are slower than the network.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Protocol

import xxhash
from awscrt import checksums
from isal import isal_zlib


class Hash(Protocol):
    def update(self, data: memoryview, /) -> None: ...
    def digest(self) -> bytes: ...
    def copy(self) -> Hash: ...


CRC_FUNCTIONS = {"crc32": isal_zlib.crc32, "crc32c": checksums.crc32c, "crc64nvme": checksums.crc64nvme}
"""Algorithm -> ``crc(view, previous) -> int``."""
CRC_BYTES = {"crc32": 4, "crc32c": 4, "crc64nvme": 8}
ORDERED: dict[str, Callable[[], Hash]] = {
    "md5": functools.partial(hashlib.md5, usedforsecurity=False),
    "sha1": functools.partial(hashlib.sha1, usedforsecurity=False),
    "sha256": hashlib.sha256,
    "sha512": hashlib.sha512,
    "xxhash64": xxhash.xxh64,
    "xxhash3": xxhash.xxh3_64,
    "xxhash128": xxhash.xxh3_128,
}
"""Algorithm -> a new state. xxHash digests are in its canonical form, big-endian."""


class RunningCrcs:
    """CRC64NVME, and the CRCs among ``algorithms``, of bytes as they arrive."""

    __slots__ = ("_functions", "values")

    def __init__(self, algorithms: frozenset[str] = frozenset()) -> None:
        names = (algorithms & CRC_FUNCTIONS.keys()) | {"crc64nvme"}
        self.values = dict.fromkeys(names, 0)
        self._functions = [(name, CRC_FUNCTIONS[name]) for name in names]

    def update(self, view: memoryview) -> None:
        for name, function in self._functions:
            self.values[name] = function(view, self.values[name])


def new_hashes(algorithms: frozenset[str]) -> dict[str, Hash]:
    return {name: ORDERED[name]() for name in algorithms & ORDERED.keys()}


def digests(crcs: Mapping[str, int], hashes: Mapping[str, Hash]) -> dict[str, bytes]:
    """Raw digests by algorithm, CRCs big-endian as AWS encodes them."""
    values = {name: value.to_bytes(CRC_BYTES[name], "big") for name, value in crcs.items()}
    return values | {name: state.digest() for name, state in hashes.items()}

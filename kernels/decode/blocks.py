"""Compiled decoders of single compressed streams. Run inside the sandbox; the zygote compiles them before it forks.

In: the stored bytes (read-only, untrusted) and an output array of exactly the size that was declared. Out: how many
bytes were written, or -1 where the stream is broken. No loop reads or writes outside the two arrays, whatever is in them.

References: LZ4_Block_format.md (lz4/lz4), LZ4_HDF5_format.md (HDFGroup/hdf5_plugins), bshuf_h5filter.c
(kiyo-masui/bitshuffle), TIFF 6.0 sections 9 (PackBits) and 13 (LZW), International Tables G 2.3.2 (CBF byte offsets).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba.core import types

Bytes = npt.NDArray[np.uint8]

_READ = types.Array(types.uint8, 1, "C", readonly=True)
_WRITE = types.Array(types.uint8, 1, "C")
_COUNT = types.int64


def _compiled(*signature: object) -> Callable[[Callable[..., Any]], Any]:
    return numba.njit(_COUNT(*signature), boundscheck=False, error_model="numpy")


@_compiled(_READ, _COUNT, _COUNT)
def _number(stored, at, size):  # type: ignore[no-untyped-def]  # compiled: numba infers
    """Big-endian unsigned number; -1 beyond the end, or beyond 62 bits."""
    if at < 0 or at + size > stored.size:
        return -1
    value = np.int64(0)
    for i in range(size):
        if value >= np.int64(1) << 54:
            return -1
        value = value << 8 | np.int64(stored[at + i])
    return value


@_compiled(_READ, _COUNT, _COUNT, _WRITE, _COUNT, _COUNT)
def _lz4_block(stored, start, stop, out, base, limit):  # type: ignore[no-untyped-def]  # noqa: C901  # one state machine
    """One LZ4 block from ``stored[start:stop]`` to ``out[base:limit]``; where the output ends, or -1."""
    at = start
    to = base
    while at < stop:
        token = np.int64(stored[at])
        at += 1
        length = token >> 4
        if length == 15:
            more = np.int64(255)
            while more == 255:
                if at >= stop:
                    return -1
                more = np.int64(stored[at])
                at += 1
                length += more
        if length > stop - at or length > limit - to:
            return -1
        for i in range(length):
            out[to + i] = stored[at + i]
        at += length
        to += length
        if at == stop:
            return to
        if at + 2 > stop:
            return -1
        distance = np.int64(stored[at]) | np.int64(stored[at + 1]) << 8
        at += 2
        length = token & 15
        if length == 15:
            more = np.int64(255)
            while more == 255:
                if at >= stop:
                    return -1
                more = np.int64(stored[at])
                at += 1
                length += more
        length += 4
        if distance == 0 or distance > to - base or length > limit - to:
            return -1
        # A match may overlap what it writes: byte by byte is its meaning.
        for i in range(length):
            out[to + i] = out[to + i - distance]
        to += length
    return to


@_compiled(_READ, _WRITE)
def lz4(stored, out):  # type: ignore[no-untyped-def]
    """HDF5 filter 32004: u64 total, u32 block size, then blocks of a u32 length each; all big-endian."""
    total = _number(stored, 0, 8)
    block = _number(stored, 8, 4)
    if total != out.size or block <= 0:
        return -1
    at = np.int64(12)
    to = np.int64(0)
    while to < total:
        size = min(block, total - to)
        length = _number(stored, at, 4)
        at += 4
        if length < 0 or length > stored.size - at:
            return -1
        if length == size:
            # Incompressible: stored as it is.
            for i in range(size):
                out[to + i] = stored[at + i]
        elif _lz4_block(stored, at, at + length, out, to, to + size) != to + size:
            return -1
        at += length
        to += size
    return to


@_compiled(_READ, _COUNT, _COUNT)
def bslz4_block_elements(stored, out_bytes, element_bytes):  # type: ignore[no-untyped-def]
    """Check the framing of HDF5 filter 32008 with LZ4: elements of one block, or -1.

    The C library trusts the lengths in front of the blocks; this makes sure that they stay inside ``stored``.
    """
    total = _number(stored, 0, 8)
    block_bytes = _number(stored, 8, 4)
    if total != out_bytes or element_bytes <= 0 or total % element_bytes:
        return -1
    if block_bytes == 0:
        block_bytes = 8192 // element_bytes // 8 * 8
        block_bytes = max(block_bytes, 128) * element_bytes
    if block_bytes < 0 or block_bytes % (8 * element_bytes):
        return -1
    left = total // element_bytes
    block = block_bytes // element_bytes
    at = np.int64(12)
    while left >= 8:
        left -= block if left >= block else left // 8 * 8
        length = _number(stored, at, 4)
        if length < 0 or length > stored.size - at - 4:
            return -1
        at += 4 + length
    if stored.size - at < left * element_bytes:
        return -1
    return block


@_compiled(_READ, _COUNT, _COUNT)
def _signed(stored, at, size):  # type: ignore[no-untyped-def]
    """Little-endian two's complement."""
    value = np.uint64(0)
    for i in range(size):
        value |= np.uint64(stored[at + i]) << np.uint64(8 * i)
    if size < 8 and stored[at + size - 1] >= 128:
        value |= ~np.uint64(0) << np.uint64(8 * size)
    return np.int64(value)


@_compiled(_READ, _WRITE)
def byte_offset(stored, out):  # type: ignore[no-untyped-def]
    """x-CBF_BYTE_OFFSET: differences of one byte, or two, four, eight behind the smallest value of the size before;
    to 32-bit little-endian integers."""
    at = np.int64(0)
    value = np.int64(0)
    pixels = out.size // 4
    for pixel in range(pixels):
        size = np.int64(1)
        while True:
            if at + size > stored.size:
                return -1
            delta = _signed(stored, at, size)
            at += size
            if size == 8 or delta != -(np.int64(1) << (8 * size - 1)):
                break
            size *= 2
        value += delta
        for i in range(4):
            out[4 * pixel + i] = np.uint8((value >> (8 * i)) & 255)
    return 4 * pixels


@_compiled(_READ, _WRITE)
def packbits(stored, out):  # type: ignore[no-untyped-def]
    at = np.int64(0)
    to = np.int64(0)
    while at < stored.size and to < out.size:
        head = np.int64(stored[at])
        at += 1
        if head < 128:
            count = min(head + 1, out.size - to)
            if at + count > stored.size:
                return -1
            for i in range(count):
                out[to + i] = stored[at + i]
            at += head + 1
            to += count
        elif head > 128:
            if at >= stored.size:
                return -1
            count = min(257 - head, out.size - to)
            for i in range(count):
                out[to + i] = stored[at]
            at += 1
            to += count
    return to


@_compiled(_READ, _WRITE)
def lzw(stored, out):  # type: ignore[no-untyped-def]  # noqa: C901  # one state machine
    """TIFF's variant: codes from the most significant bit, one early change of width, 256 clears, 257 ends."""
    # An entry is what was written at ``start`` for ``length`` bytes: the output is its own dictionary.
    starts = np.zeros(4096, np.int64)
    lengths = np.zeros(4096, np.int64)
    at = np.int64(0)
    bits = np.int64(0)
    held = np.int64(0)
    width = np.int64(9)
    following = np.int64(258)
    previous_start = np.int64(-1)
    previous_length = np.int64(0)
    to = np.int64(0)
    while to < out.size:
        while bits < width:
            if at >= stored.size:
                return to
            held = (held << 8 | np.int64(stored[at])) & 0xFFFFFF
            at += 1
            bits += 8
        code = held >> (bits - width) & ((1 << width) - 1)
        bits -= width
        if code == 257:
            return to
        if code == 256:
            width = np.int64(9)
            following = np.int64(258)
            previous_start = np.int64(-1)
            continue
        start = to
        if code < 256:
            out[to] = np.uint8(code)
            length = np.int64(1)
        elif previous_start < 0:
            return -1
        elif code < following:
            length = min(lengths[code], out.size - to)
            for i in range(length):
                out[to + i] = out[starts[code] + i]
        elif code == following:
            length = min(previous_length + 1, out.size - to)
            for i in range(length):
                out[to + i] = out[previous_start + i]
        else:
            return -1
        to += length
        if previous_start >= 0 and following < 4096:
            # The entry before plus the first byte of this one: they lie back to back in the output.
            starts[following] = previous_start
            lengths[following] = previous_length + 1
            following += 1
        previous_start = start
        previous_length = length
        if following + 1 >= 1 << width and width < 12:
            width += 1
    return to

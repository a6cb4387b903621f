"""One stored chunk back to its elements. Runs inside the sandbox.

In: the stored bytes, the encoding, which filters were left out. Out: an array of the chunk's bytes, or ``Undecodable``. No
output is larger than the encoding says, whatever the bytes claim.
"""

from __future__ import annotations

import bitshuffle
import numpy as np
import numpy.typing as npt
from isal import isal_zlib

from kernels.decode import blocks
from kernels.decode.encoding import Encoding, Filter

Bytes = npt.NDArray[np.uint8]

FRAMING_BYTES = 12
"""u64 length and u32 block size in front of LZ4 and bitshuffle-LZ4."""
STORED_SLACK_BYTES = 1 << 20


class Undecodable(Exception):
    """The stored bytes are not what their encoding says."""


def decode(stored: Bytes, encoding: Encoding, skipped: int) -> Bytes:
    """The chunk's bytes in C order; fewer than a whole chunk where the writer cut the last one (TIFF strips do).

    ``skipped``: bit n is set where filter n was not applied to this chunk (HDF5's filter mask). Raises Undecodable.
    """
    size_bytes = encoding.chunk_bytes
    applied = [step for number, step in enumerate(encoding.filters) if not skipped >> number & 1]
    data = stored
    for left in range(len(applied) - 1, -1, -1):
        data = _undo(applied[left], data, size_bytes + 4 * sum(s.codec == "fletcher32" for s in applied[:left]))
    if data.size > size_bytes:
        raise Undecodable("the chunk is longer than its shape")
    return data


def _undo(step: Filter, data: Bytes, size_bytes: int) -> Bytes:
    codec = step.codec
    if codec == "bslz4":
        return _bslz4(data, size_bytes, step.element_bytes)
    if codec == "deflate":
        return _inflate(data, size_bytes)
    if codec == "shuffle":
        return _unshuffle(data, step.element_bytes)
    if codec == "bitshuffle":
        return _bitunshuffle(data, step)
    if codec == "fletcher32":
        if data.size < 4:
            raise Undecodable("no room for a checksum")
        return data[:-4]
    if codec == "predictor":
        return data  # undone once the rows are known: see frames.py
    out = np.empty(size_bytes, np.uint8)
    written = {"lz4": blocks.lz4, "byte-offset": blocks.byte_offset, "packbits": blocks.packbits, "lzw": blocks.lzw}[
        codec
    ](data, out)
    if written < 0:
        raise Undecodable(f"broken {codec} stream")
    return out[:written]


def _bslz4(data: Bytes, size_bytes: int, element_bytes: int) -> Bytes:
    elements = blocks.bslz4_block_elements(data, size_bytes, element_bytes)
    if elements <= 0:
        raise Undecodable("broken bitshuffle-LZ4 framing")
    try:
        return bitshuffle.decompress_lz4(  # type: ignore[no-any-return]
            data[FRAMING_BYTES:], (size_bytes // element_bytes,), np.dtype(f"V{element_bytes}"), elements
        ).view(np.uint8)
    except Exception as error:
        raise Undecodable(f"bitshuffle: {error}") from None


def _bitunshuffle(data: Bytes, step: Filter) -> Bytes:
    if data.size % step.element_bytes:
        raise Undecodable("the chunk is no whole number of elements")
    try:
        # The library wants whole elements of that width; what they mean does not matter.
        shuffled = data.view(np.dtype(f"V{step.element_bytes}"))
        return bitshuffle.bitunshuffle(shuffled, step.block).view(np.uint8)  # type: ignore[no-any-return]
    except Exception as error:
        raise Undecodable(f"bitshuffle: {error}") from None


def _inflate(data: Bytes, size_bytes: int) -> Bytes:
    inflater = isal_zlib.decompressobj()
    try:
        # One byte more than allowed tells a bomb from a chunk.
        plain = inflater.decompress(data.data, size_bytes + 1)
    except Exception as error:
        raise Undecodable(f"deflate: {error}") from None
    return np.frombuffer(plain, np.uint8)


def _unshuffle(data: Bytes, element_bytes: int) -> Bytes:
    elements = data.size // element_bytes
    whole = elements * element_bytes
    out = np.empty(data.size, np.uint8)
    out[:whole].reshape(elements, element_bytes)[...] = data[:whole].reshape(element_bytes, elements).T
    out[whole:] = data[whole:]
    return out

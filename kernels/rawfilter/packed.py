"""Verdicts as the catalogue keeps them between a kernel's product and the filter: one byte a frame, compressed.

In and out: arrays of uint8. What always holds: nothing unpacks to more than ``FRAMES_MAX`` frames.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import zstandard

FRAMES_MAX = 1 << 26
PACKED_BYTES_MAX = 8 << 20
"""64 million frames of random verdicts would need twice that; such a version is not filtered."""


def pack(verdicts: npt.NDArray[np.uint8]) -> bytes:
    """Empty where there is too much to keep."""
    packed = zstandard.ZstdCompressor(level=1).compress(np.ascontiguousarray(verdicts).data)
    return packed if len(packed) <= PACKED_BYTES_MAX else b""


def unpack(packed: bytes) -> npt.NDArray[np.uint8]:
    """ValueError for anything but the result of ``pack``."""
    try:
        verdicts = zstandard.ZstdDecompressor().decompress(packed, max_output_size=FRAMES_MAX)
    except zstandard.ZstdError as error:
        raise ValueError(f"packed verdicts are damaged: {error}") from None
    return np.frombuffer(verdicts, np.uint8)

"""How the frames of a body are stored when they do not lie there plainly: chunks, filters, byte order.

``Encoding`` is what the gateway found out and tells the sandbox with every batch. A stack of frames is cut into a grid of
equal chunks, ``chunk[0]`` frames deep; chunks are numbered in C order over the grid, and each is stored somewhere in the
body, or nowhere: then it holds the fill value. All limits of what a chunk may declare are here.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

CODECS = (
    "shuffle",
    "deflate",
    "lz4",
    "bslz4",
    "bitshuffle",
    "fletcher32",
    "byte-offset",
    "packbits",
    "lzw",
    "predictor",
)
FILTERS_MAX = 8
SLAB_BYTES_MAX = 128 << 20
"""Decoded bytes of the frames that share chunks: they are decoded together."""
CHUNKS_OF_SLAB_MAX = 4096
"""Chunks such frames are cut into; more do not fit one message to the sandbox."""


class Filter(msgspec.Struct, frozen=True):
    """One step of encoding. ``element_bytes``: width of what (bit)shuffle transposes, or a predictor subtracts."""

    codec: str
    element_bytes: int = 1
    block: int = 0
    """Elements of a block, where the codec has blocks and does not store their size; 0: its default."""


class Encoding(msgspec.Struct, frozen=True):
    """``filters`` in the order they were applied on writing; reading undoes them from the last to the first."""

    dtype: str
    """Stored numpy dtype, e.g. ``>u2``; frames come out in the machine's byte order."""
    chunk: tuple[int, ...]
    """(frames, and one size for each dimension of a frame)."""
    filters: tuple[Filter, ...] = ()
    fill: bytes = b""
    """One element as stored; empty for zero."""

    @property
    def depth(self) -> int:
        """Frames that share chunks: a slab."""
        return self.chunk[0]

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk) * np.dtype(self.dtype).itemsize

    @property
    def name(self) -> str:
        """For the product: what a scientist calls it."""
        return " + ".join(step.codec for step in self.filters) or "none"

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Chunks along each dimension of a frame."""
        return tuple(-(-size // part) for size, part in zip(shape, self.chunk[1:], strict=True))

    def chunks_of_slab(self, shape: tuple[int, ...]) -> int:
        return math.prod(self.grid(shape))

    def trouble(self, shape: tuple[int, ...]) -> str:
        """Why frames of ``shape`` cannot be decoded; empty when they can."""
        if len(self.filters) > FILTERS_MAX:
            return f"{len(self.filters)} filters on one dataset"
        for step in self.filters:
            if step.codec not in CODECS:
                return f"compression {step.codec!r} is not supported"
            if not 1 <= step.element_bytes <= 8 or not 0 <= step.block <= 1 << 24:
                return f"the parameters of {step.codec} are out of range"
        if len(self.chunk) != len(shape) + 1 or min(self.chunk) < 1:
            return f"chunks of {self.chunk} do not fit frames of {shape}"
        if self.chunks_of_slab(shape) > CHUNKS_OF_SLAB_MAX:
            return f"a frame is cut into {self.chunks_of_slab(shape)} chunks, more than {CHUNKS_OF_SLAB_MAX}"
        cover = [part * count for part, count in zip(self.chunk[1:], self.grid(shape), strict=True)]
        slab_bytes = self.depth * math.prod(cover) * np.dtype(self.dtype).itemsize
        if slab_bytes > SLAB_BYTES_MAX:
            return (
                f"{self.depth} frames share chunks and are {slab_bytes} bytes together, more than the {SLAB_BYTES_MAX} "
                "that are decoded at once"
            )
        return ""

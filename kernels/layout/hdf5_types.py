"""The structure of a file as it travels from the sandbox that read it."""

from __future__ import annotations

import msgspec

from kernels.decode.encoding import Encoding


class Structure(msgspec.Struct, frozen=True, tag="structure"):
    """A stack of frames. ``origin``: where a contiguous dataset begins in the file; -1: it is chunked."""

    dataset: str
    shape: tuple[int, ...]
    frames: int
    encoding: Encoding
    origin: int
    chunks: int
    """Stored chunks whose entries follow."""

"""A body in a file, and where its frames lie in it: found by the code that a node finds them with.

In: a file, the key and the metadata it has, or is to have, as an object. Out: ``Body`` with a layout (plain frames, or stored
chunks) and a sentence about it, or ``NoFrames``. The file is the caller's own or came from a node with its checksum, so its
structure is read in this process; pixels are decoded in the sandbox only.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ingest.records import FrameGeometry
from kernels.formats import HEADER_BYTES_MAX, NotFrames, declared_geometry, sniff
from kernels.layout.hdf5 import NotReadable, read_structure
from kernels.layout.index import FrameIndex

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"

Layout = FrameGeometry | FrameIndex


class NoFrames(Exception):
    """The node would not find frames in such an object either; ``str()`` says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Body:
    """``fd`` is open for reading; ``close`` it. ``reading``: what the node takes it for, in words."""

    fd: int
    length: int
    layout: Layout
    frames: int
    reading: str

    @property
    def dtype(self) -> str:
        """numpy's name of what a kernel sees."""
        return np.dtype(self.layout.dtype).name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def frame_bytes(self) -> int:
        return self.layout.frame_bytes

    def close(self) -> None:
        os.close(self.fd)


def open_body(file: Path, key: bytes, metadata: Mapping[str, str]) -> Body:
    """``metadata``: of the object, lower-case, without ``x-amz-meta-``. Raises NoFrames, OSError."""
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        length = os.fstat(fd).st_size
        layout, frames, reading = _layout(fd, file, length, key, metadata)
        return Body(fd, length, layout, frames, reading)
    except BaseException:
        os.close(fd)
        raise


def _layout(fd: int, file: Path, length: int, key: bytes, metadata: Mapping[str, str]) -> tuple[Layout, int, str]:
    head = os.pread(fd, min(length, HEADER_BYTES_MAX), 0)
    if head.startswith(HDF5_MAGIC):
        return _hdf5(file, length, metadata)
    found = sniff(memoryview(head), key, metadata, complete=True)
    assert not isinstance(found, int)
    if isinstance(found, NotFrames):
        raise NoFrames(found.reason)
    payload = max(0, length - found.origin)
    frames = payload // found.frame_bytes
    if found.count is not None:
        frames = min(frames, found.count)
    kind = ".npy" if found.origin else "raw"
    return found, frames, f"{kind}: {_words(frames, found.dtype, found.shape)}"


def _hdf5(file: Path, length: int, metadata: Mapping[str, str]) -> tuple[Layout, int, str]:
    try:
        declared = declared_geometry(metadata)
        with file.open("rb") as opened:
            structure, entries = read_structure(
                opened, metadata.get("frame-dataset", ""), declared.shape if declared is not None else None
            )
        index = FrameIndex(structure.encoding, structure.shape, f"HDF5 {structure.dataset}", structure.frames)
        if structure.origin >= 0:
            bytes_of_frame = math.prod(structure.shape) * np.dtype(structure.encoding.dtype).itemsize
            index = FrameIndex(structure.encoding, structure.shape, f"HDF5 {structure.dataset}")
            for number in range(structure.frames):
                index.append(structure.origin + number * bytes_of_frame, bytes_of_frame)
        else:
            index.fill(entries, length)
    except (NotReadable, ValueError, OSError) as error:
        raise NoFrames(str(error)) from None
    stored = "+".join(step.codec for step in structure.encoding.filters) or "not compressed"
    words = _words(structure.frames, index.dtype, structure.shape)
    return index, structure.frames, f"HDF5, dataset {structure.dataset} ({stored}): {words}"


def _words(frames: int, dtype: str, shape: tuple[int, ...]) -> str:
    return f"{frames} frames of {'×'.join(map(str, shape))} {np.dtype(dtype).name}"

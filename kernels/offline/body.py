"""A body in a file, and where its frames lie in it: found by the code that a node finds them with.

In: a file, the key and the metadata it has, or is to have, as an object. Out: ``Body`` with a layout (plain frames, or stored
chunks) and a sentence about it, or ``NoFrames``. The file is the caller's own or came from a node with its checksum, so the
structure of HDF5 is read in this process, where a node has a sandbox do it; pixels are decoded in the sandbox only.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from ingest.ports import StreamInfo
from ingest.records import FrameGeometry
from kernels.formats import NotFrames, declared_geometry
from kernels.layout.hdf5 import NotReadable, read_structure
from kernels.layout.index import FrameIndex
from kernels.layout.stored import Found, find_layout

Layout = FrameGeometry | FrameIndex
_Result = TypeVar("_Result")


class Frames(Protocol):
    """A body as its frames are read: in a file (``Body``), or far away (kernels/offline/remote.py)."""

    @property
    def layout(self) -> Layout: ...
    @property
    def frame_bytes(self) -> int: ...
    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from body offset ``offset`` on. Blocks. Raises OSError."""
        ...


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

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from body offset ``offset`` on. Raises OSError where the file is shorter than it was."""
        done = 0
        while done < len(view):
            got = os.preadv(self.fd, [view[done:]], offset + done)
            if not got:
                raise OSError("the file became shorter")
            done += got

    def close(self) -> None:
        os.close(self.fd)


def open_body(file: Path, key: bytes, metadata: Mapping[str, str], content_type: str = "") -> Body:
    """``metadata``: of the object, lower-case, without ``x-amz-meta-``. Raises NoFrames, OSError."""
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        length = os.fstat(fd).st_size

        async def fetch(offset: int, count: int) -> bytes:
            return os.pread(fd, count, offset)

        async def structure() -> FrameIndex | NotFrames:
            return _hdf5(file, length, metadata)

        info = StreamInfo("", key, b"", length, content_type, metadata)
        found = _at_once(find_layout(info, length, fetch, structure))
        if isinstance(found.layout, NotFrames):
            raise NoFrames(found.layout.reason)
        return Body(fd, length, found.layout, _frames(found.layout, length), _words(found, length))
    except BaseException:
        os.close(fd)
        raise


def _at_once(work: Coroutine[object, None, _Result]) -> _Result:
    """The result of a coroutine that waits for nothing: every read here answers before it returns."""
    try:
        work.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    raise AssertionError("it waits for something")


def _frames(layout: Layout, length: int) -> int:
    if isinstance(layout, FrameIndex):
        return layout.count
    frames = max(0, length - layout.origin) // layout.frame_bytes
    return frames if layout.count is None else min(frames, layout.count)


def _hdf5(file: Path, length: int, metadata: Mapping[str, str]) -> FrameIndex | NotFrames:
    """As kernels/layout/indexer.py, with the structure read here."""
    try:
        declared = declared_geometry(metadata)
        with file.open("rb") as opened:
            found, entries = read_structure(
                opened, metadata.get("frame-dataset", ""), declared.shape if declared is not None else None
            )
        if found.origin < 0:
            index = FrameIndex(found.encoding, found.shape, f"HDF5 {found.dataset}", found.frames)
            index.fill(entries, length)
            return index
        index = FrameIndex(found.encoding, found.shape, f"HDF5 {found.dataset}")
        if found.origin + found.frames * index.frame_bytes > length:
            return NotFrames("the file is cut short: the dataset goes beyond its end")
        index.extend(found.origin, index.frame_bytes, found.frames)
    except (NotReadable, ValueError, OSError, RuntimeError, KeyError) as error:
        return NotFrames(str(error))
    return index


def _words(found: Found, length: int) -> str:
    layout = found.layout
    assert not isinstance(layout, NotFrames)
    if isinstance(layout, FrameIndex):
        stored = "+".join(step.codec for step in layout.encoding.filters) or "not compressed"
        kind = f"{layout.source} ({stored})"
    else:
        kind = ".npy" if layout.origin else "raw"
    frames = _frames(layout, length)
    words = f"{kind}: {frames} frames of {'×'.join(map(str, layout.shape))} {np.dtype(layout.dtype).name}"
    if found.gaps:
        words += f"; {sum(count for _, count in found.gaps)} missing"
    if found.trailing_bytes:
        words += f"; {found.trailing_bytes} bytes behind the last one"
    return words

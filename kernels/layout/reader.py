"""The sandbox's side of reading a file's structure: a file object whose bytes come from the gateway on request.

Runs in a locked-down process of its own, one file in its life. In: an ``Ask``, or a ``Rewrite``. Out: a ``Structure`` with
its chunks, or the new file, or why there is none. Whatever a C library does to this process with a hostile file, it can only
say a wrong structure, and that is checked.
"""

from __future__ import annotations

import collections
import io
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import msgspec
import numpy as np

from kernels.decode.table import ENTRY
from kernels.layout.dialogue import (
    BITS_A_DATAGRAM,
    CHUNKS_A_DATAGRAM,
    DATAGRAM_BYTES_MAX,
    LITERAL,
    OF_FRAME,
    RANGE,
    RANGES,
    REASON_CHARS_MAX,
    WANT_BYTES_MAX,
    Ask,
    Place,
    Refusal,
    Rewrite,
    Rewritten,
    Task,
    Want,
    Word,
)
from kernels.layout.hdf5 import NotReadable, read_structure
from kernels.layout.recorder import Recorder
from kernels.layout.rewriter import rewrite

BLOCKS_KEPT = 32
CHANNEL_FD = 3

Fetch = Callable[[int, int], bytes]
"""Bytes [offset, offset + length) of the file."""


class RemoteFile(io.RawIOBase):
    """Read-only, seekable; ``fetch(offset, length)`` brings bytes. Recently read blocks are kept."""

    def __init__(self, length: int, fetch: Fetch) -> None:
        super().__init__()
        self._length = length
        self._fetch = fetch
        self._at = 0
        self._blocks: collections.OrderedDict[int, bytes] = collections.OrderedDict()

    def __repr__(self) -> str:
        # What h5py tells HDF5 for a file name: only for an absolute one HDF5 does not ask for the working folder.
        return "/object"

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: object) -> int:
        target = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        done = 0
        while done < len(target) and self._at < self._length:
            number, skip = divmod(self._at, WANT_BYTES_MAX)
            part = self._block(number)[skip : skip + len(target) - done]
            target[done : done + len(part)] = part
            done += len(part)
            self._at += len(part)
        # Beyond the end there is nothing: a file that claims more reads zeros, and is refused for what they say.
        target[done:] = bytes(len(target) - done)
        return done

    def _block(self, number: int) -> bytes:
        found = self._blocks.get(number)
        if found is None:
            start = number * WANT_BYTES_MAX
            found = self._fetch(start, min(WANT_BYTES_MAX, self._length - start))
            self._blocks[number] = found
            while len(self._blocks) > BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        else:
            self._blocks.move_to_end(number)
        return found


def serve(regions: Sequence[mmap.mmap]) -> NoReturn:
    """Do one ``Task`` that comes on the channel and end."""
    task: Task = msgspec.msgpack.decode(os.read(CHANNEL_FD, 1 << 16), type=Task)

    def fetch(offset: int, length: int) -> bytes:
        _say(Want(offset, length))
        place = msgspec.msgpack.decode(os.read(CHANNEL_FD, 4096), type=Place)
        return regions[place.region][place.offset : place.offset + place.length]

    try:
        if isinstance(task, Rewrite):
            _rewrite(task, fetch)
        else:
            _read(task, fetch)
    except NotReadable as refusal:
        _say(Refusal(str(refusal)[:REASON_CHARS_MAX]))
    except Exception as error:
        _say(Refusal(f"HDF5 cannot read it: {error}"[:REASON_CHARS_MAX]))
    os._exit(0)


def _read(ask: Ask, fetch: Fetch) -> None:
    structure, chunks = read_structure(RemoteFile(ask.length, fetch), ask.dataset, ask.frame_shape)
    _say(structure)
    for start in range(0, len(chunks), CHUNKS_A_DATAGRAM):
        os.write(CHANNEL_FD, chunks[start : start + CHUNKS_A_DATAGRAM].tobytes())


def _rewrite(task: Rewrite, fetch: Fetch) -> None:
    bits = _received((task.frames + 7) // 8, BITS_A_DATAGRAM)
    entries = _received(task.chunks * ENTRY.itemsize, CHUNKS_A_DATAGRAM * ENTRY.itemsize)
    remains = np.unpackbits(np.frombuffer(bits, np.uint8), count=task.frames).astype(bool)
    recorder, path = rewrite(RemoteFile(task.ask.length, fetch), task, remains, np.frombuffer(entries, ENTRY))
    _say(Rewritten(recorder.length, path))
    for datagram in _told(recorder):
        os.write(CHANNEL_FD, datagram)


def _received(length: int, part: int) -> bytes:
    """Datagrams of ``part`` bytes, the last one shorter."""
    return b"".join(os.read(CHANNEL_FD, DATAGRAM_BYTES_MAX) for _ in range(0, length, part))


def _told(recorder: Recorder) -> Iterator[bytes]:
    """The new file as datagrams."""
    ranges: list[tuple[int, int, int]] = []
    for piece in recorder.pieces():
        if isinstance(piece, bytes):
            if ranges:
                yield RANGES + np.array(ranges, RANGE).tobytes()
                ranges = []
            yield LITERAL + piece
            continue
        ranges.append(piece)
        if len(ranges) == CHUNKS_A_DATAGRAM:
            yield RANGES + np.array(ranges, RANGE).tobytes()
            ranges = []
    if ranges:
        yield RANGES + np.array(ranges, RANGE).tobytes()


def _say(word: Word) -> None:
    os.write(CHANNEL_FD, msgspec.msgpack.encode(word))


def warm_reader() -> None:
    """Take HDF5 through a small file, so that a locked-down child loads and opens nothing."""
    import h5py

    target = io.BytesIO()
    with h5py.File(target, "w") as file:
        folder = file.create_group("entry/data")
        folder.create_dataset(
            "data", data=np.zeros((2, 4, 4), "<u2"), chunks=(1, 4, 4), compression="gzip", shuffle=True
        )
        file["link"] = h5py.SoftLink("/entry/data/data")
        file.attrs["default"] = "entry"
    whole = target.getvalue()
    for name in ("", "link"):
        read_structure(RemoteFile(len(whole), lambda start, length: whole[start : start + length]), name, None)
    entries = np.array([(0, 0, 100, OF_FRAME, 0)], ENTRY)
    for dtype in ("", "<u2"):
        task = Rewrite(Ask(len(whole)), 2, 1, dtype, (4, 4), (1, 4, 4), 1, "warm")
        recorder, _ = rewrite(io.BytesIO(whole), task, np.array([True, False]), entries)
        assert b"".join(_told(recorder))
    for broken in (b"", whole[:600], whole[:-400]):
        try:
            read_structure(RemoteFile(len(broken), lambda start, length: broken[start : start + length]), "", None)  # noqa: B023
        except Exception:
            continue

"""The gateway's side of reading a stored file's structure: a sandbox reads, the gateway brings the bytes and checks.

In: a stored version, the domain its bytes may be loaded into. Out: ``FrameGeometry``, ``FrameIndex`` or ``NotFrames``. What
always holds: the process is gone when this returns; the bytes and the time it may ask for are bounded, however large the
file; no offset and no count it says is believed unchecked.
"""

from __future__ import annotations

import numpy as np

from ingest.ports import Domain
from ingest.records import FrameGeometry, ObjectRecord
from kernels.decode.table import ENTRY
from kernels.formats import DTYPES, NDIM_MAX, SHAPE_MAX, NotFrames, parse_shape
from kernels.layout.conversation import Conversation, Lie, TooSpread, conversation
from kernels.layout.dialogue import CHUNKS_A_DATAGRAM, Ask, Refusal
from kernels.layout.hdf5_types import Structure
from kernels.layout.index import CHUNKS_MAX, FrameIndex
from kernels.passes import Loads
from kernels.process import SandboxFailed
from kernels.sandbox import SandboxLimits

FRAMES_MAX = 1 << 26

Layout = FrameGeometry | FrameIndex | NotFrames


async def read_stored_structure(
    zygote_socket: str, pad: Loads, record: ObjectRecord, domain: Domain, limits: SandboxLimits
) -> Layout:
    """Raises Gone, Postponed or Hopeless where the bytes cannot be read, SandboxFailed("unavailable") where no process
    can be had."""
    shape = record.metadata.get("frame-shape")
    try:
        ask = Ask(
            record.length, record.metadata.get("frame-dataset", ""), None if shape is None else parse_shape(shape)
        )
    except ValueError as error:
        return NotFrames(str(error))
    try:
        async with conversation(zygote_socket, pad, record, domain, limits) as talk:
            await talk.begin(ask)
            found = await talk.answer()
            if isinstance(found, Refusal):
                return NotFrames(printable(found.reason))
            if not isinstance(found, Structure):
                raise Lie("an answer to another question")
            return await _layout(talk, found, record)
    except TooSpread as spread:
        return NotFrames(str(spread))
    except Lie as lie:
        return NotFrames(f"the structure of the file makes no sense: {lie}")
    except SandboxFailed as failure:
        if failure.kind == "unavailable":
            raise
        return NotFrames(f"the structure of the file could not be read: {failure.message}")


def printable(text: str) -> str:
    return "".join(c for c in text if c.isprintable())


async def _layout(talk: Conversation, found: Structure, record: ObjectRecord) -> Layout:
    _check(found)
    if found.origin >= 0:
        return _contiguous(found, record)
    index = FrameIndex(found.encoding, found.shape, f"HDF5 {found.dataset}", found.frames)
    left = found.chunks
    while left > 0:
        datagram = await talk.hear()
        count = min(left, CHUNKS_A_DATAGRAM)
        if len(datagram) != count * ENTRY.itemsize:
            raise Lie("chunks are missing")
        try:
            index.fill(np.frombuffer(datagram, ENTRY), record.length)
        except ValueError as error:
            return NotFrames(str(error))
        left -= count
    return index


def _check(found: Structure) -> None:
    dtype, shape = found.encoding.dtype, found.shape
    if dtype.lstrip("<>|") not in DTYPES or dtype[:1] not in "<>|" or not 1 <= len(shape) <= NDIM_MAX:
        raise Lie(f"frames of {dtype} in {len(shape)} dimensions")
    if not all(0 < size <= SHAPE_MAX for size in (*shape, *found.encoding.chunk)):
        raise Lie("sizes out of range")
    trouble = found.encoding.trouble(shape)
    if trouble or len(found.encoding.fill) not in (0, np.dtype(dtype).itemsize):
        raise Lie(trouble or "a fill value of another type")
    if not 0 < found.frames <= FRAMES_MAX:
        raise Lie(f"{found.frames} frames")
    slabs = -(-found.frames // found.encoding.depth)
    if not 0 <= found.chunks <= slabs * found.encoding.chunks_of_slab(shape) <= CHUNKS_MAX:
        raise Lie(f"{found.chunks} chunks")


def _contiguous(found: Structure, record: ObjectRecord) -> Layout:
    index = FrameIndex(found.encoding, found.shape, f"HDF5 {found.dataset}")
    if found.origin + found.frames * index.frame_bytes > record.length:
        return NotFrames("the file is cut short: the dataset goes beyond its end")
    index.extend(found.origin, index.frame_bytes, found.frames)
    return index

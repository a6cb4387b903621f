"""The gateway's side of reading a stored file's structure: a sandbox reads, the gateway brings the bytes and checks.

In: a stored version, the domain its bytes may be loaded into. Out: ``FrameGeometry``, ``FrameIndex`` or ``NotFrames``. What
always holds: the process is gone when this returns; the bytes and the time it may ask for are bounded, however large the
file; no offset and no count it says is believed unchecked.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator

import msgspec
import numpy as np

from ingest.ports import Domain, LandingPad, LoadedBytes
from ingest.records import FrameGeometry, ObjectRecord
from kernels.decode.table import ENTRY
from kernels.formats import DTYPES, NDIM_MAX, SHAPE_MAX, NotFrames, parse_shape
from kernels.layout.dialogue import (
    CHUNKS_A_DATAGRAM,
    DATAGRAM_BYTES_MAX,
    WANT_BYTES_MAX,
    Ask,
    Place,
    Refusal,
    Want,
    Word,
)
from kernels.layout.hdf5_types import Structure
from kernels.layout.index import CHUNKS_MAX, FrameIndex
from kernels.passes import load
from kernels.process import SandboxFailed, SandboxProcess
from kernels.sandbox import SandboxLimits
from kernels.wire import KIND_FAILED, KIND_READY, SandboxSpec

WANTS_MAX = 20_000
"""Requests of one file: 5 GB of structure."""
THINKING_S = 30.0
"""Longest silence between two words."""
FRAMES_MAX = 1 << 26

Layout = FrameGeometry | FrameIndex | NotFrames


class _Lie(Exception):
    """The sandbox said what cannot be."""


async def read_stored_structure(
    zygote_socket: str, pad: LandingPad, record: ObjectRecord, domain: Domain, limits: SandboxLimits
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
    domain.hold()
    try:
        process = await _start(zygote_socket, domain, limits)
        try:
            return await _Conversation(process, pad, record, domain).run(ask)
        finally:
            await process.kill()
    except _Lie as lie:
        return NotFrames(f"the structure of the file makes no sense: {lie}")
    except SandboxFailed as failure:
        if failure.kind == "unavailable":
            raise
        return NotFrames(f"the structure of the file could not be read: {failure.message}")
    finally:
        domain.drop()


async def _start(zygote_socket: str, domain: Domain, limits: SandboxLimits) -> SandboxProcess:
    spec = SandboxSpec(
        stages=(),
        layouts=(),
        compile_only=True,
        region_count=len(domain.region_fds),
        region_bytes=domain.region_bytes,
        arrays_bytes=0,
        slots=1,
        out_frames=0,
        memory_bytes=limits.memory_bytes,
        nice=limits.nice,
        batch_scheduling=limits.batch_scheduling,
        populate=False,
        reader=True,
    )
    # Every sandbox has an output memory; this one has nothing to write there.
    output_fd = os.memfd_create("hiss-reader-output", os.MFD_CLOEXEC)
    try:
        os.ftruncate(output_fd, mmap.PAGESIZE)
        process = await SandboxProcess.fork(zygote_socket, spec, output_fd, domain.region_fds)
    finally:
        os.close(output_fd)
    try:
        with _in_time():
            reply = await process.receive(THINKING_S)
        if reply is None or reply.kind != KIND_READY:
            failed = reply is not None and reply.kind == KIND_FAILED
            raise SandboxFailed("unavailable" if failed else "crash", reply.text if reply is not None else "it ended")
    except BaseException:
        await process.kill()
        raise
    return process


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise SandboxFailed("timeout", f"no word within {THINKING_S:g} s") from None


class _Conversation:
    def __init__(self, process: SandboxProcess, pad: LandingPad, record: ObjectRecord, domain: Domain) -> None:
        self._process = process
        self._pad = pad
        self._record = record
        self._domain = domain
        self._loaded: LoadedBytes | None = None

    async def run(self, ask: Ask) -> Layout:
        self._send(msgspec.msgpack.encode(ask))
        try:
            for _ in range(WANTS_MAX):
                word = self._understood(await self._hear())
                if isinstance(word, Refusal):
                    return NotFrames("".join(c for c in word.reason if c.isprintable()))
                if isinstance(word, Structure):
                    return await self._layout(word)
                await self._bring(word)
            return NotFrames(f"its structure is spread over more than {WANTS_MAX * WANT_BYTES_MAX} bytes")
        finally:
            self._release()

    def _send(self, datagram: bytes) -> None:
        if not self._process.send(datagram):
            raise SandboxFailed("crash", "it ended")

    async def _hear(self) -> bytes:
        with _in_time():
            datagram = await self._process.receive_datagram(DATAGRAM_BYTES_MAX, THINKING_S)
        if datagram is None:
            raise SandboxFailed("crash", await self._process.ending())
        return datagram

    def _understood(self, datagram: bytes) -> Word:
        try:
            return msgspec.msgpack.decode(datagram, type=Word)  # type: ignore[no-any-return]
        except msgspec.MsgspecError:
            raise _Lie("a word that nobody knows") from None

    async def _bring(self, want: Want) -> None:
        self._release()
        if want.offset < 0 or not 0 < want.length <= WANT_BYTES_MAX or want.offset + want.length > self._record.length:
            raise _Lie("it asks for bytes outside the file")
        self._loaded = loaded = await load(self._pad, self._record, want.offset, want.length, self._domain)
        self._send(msgspec.msgpack.encode(Place(loaded.region, loaded.offset, loaded.length)))

    def _release(self) -> None:
        """The sandbox has copied what was brought last, or is about to end."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded.release()

    # -- the structure, checked

    async def _layout(self, found: Structure) -> Layout:
        self._check(found)
        if found.origin >= 0:
            return self._contiguous(found)
        index = FrameIndex(found.encoding, found.shape, f"HDF5 {found.dataset}", found.frames)
        left = found.chunks
        while left > 0:
            datagram = await self._hear()
            count = min(left, CHUNKS_A_DATAGRAM)
            if len(datagram) != count * ENTRY.itemsize:
                raise _Lie("chunks are missing")
            try:
                index.fill(np.frombuffer(datagram, ENTRY), self._record.length)
            except ValueError as error:
                return NotFrames(str(error))
            left -= count
        return index

    def _check(self, found: Structure) -> None:
        dtype, shape = found.encoding.dtype, found.shape
        if dtype.lstrip("<>|") not in DTYPES or dtype[:1] not in "<>|" or not 1 <= len(shape) <= NDIM_MAX:
            raise _Lie(f"frames of {dtype} in {len(shape)} dimensions")
        if not all(0 < size <= SHAPE_MAX for size in (*shape, *found.encoding.chunk)):
            raise _Lie("sizes out of range")
        trouble = found.encoding.trouble(shape)
        if trouble or len(found.encoding.fill) not in (0, np.dtype(dtype).itemsize):
            raise _Lie(trouble or "a fill value of another type")
        if not 0 < found.frames <= FRAMES_MAX:
            raise _Lie(f"{found.frames} frames")
        slabs = -(-found.frames // found.encoding.depth)
        if not 0 <= found.chunks <= slabs * found.encoding.chunks_of_slab(shape) <= CHUNKS_MAX:
            raise _Lie(f"{found.chunks} chunks")

    def _contiguous(self, found: Structure) -> Layout:
        index = FrameIndex(found.encoding, found.shape, f"HDF5 {found.dataset}")
        if found.origin + found.frames * index.frame_bytes > self._record.length:
            return NotFrames("the file is cut short: the dataset goes beyond its end")
        index.extend(found.origin, index.frame_bytes, found.frames)
        return index

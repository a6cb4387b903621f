"""The gateway's side of every talk with a sandbox that reads a stored file: it starts one and brings the bytes it asks for.

In: a stored version, the domain its bytes may be loaded into. Out: the sandbox's answer, not yet checked. What always holds:
the bytes and the time it may ask for are bounded, however large the file; it gets no byte from outside the file.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import AsyncIterator, Iterator

import msgspec

from ingest.ports import Domain, LoadedBytes
from ingest.records import ObjectRecord
from kernels.layout.dialogue import DATAGRAM_BYTES_MAX, WANT_BYTES_MAX, Place, Refusal, Rewritten, Task, Want, Word
from kernels.layout.hdf5_types import Structure
from kernels.passes import Loads, load
from kernels.process import SandboxFailed, SandboxProcess
from kernels.sandbox import SandboxLimits
from kernels.wire import KIND_FAILED, KIND_READY, SandboxSpec

WANTS_MAX = 20_000
"""Requests of one file: 5 GB of structure."""
THINKING_S = 30.0
"""Longest silence between two words."""


class Lie(Exception):
    """The sandbox said what cannot be."""


class TooSpread(Exception):
    """It asked for more than WANTS_MAX times; ``str()`` is fit for the scientist."""


@contextlib.asynccontextmanager
async def conversation(
    zygote_socket: str,
    pad: Loads,
    record: ObjectRecord,
    domain: Domain,
    limits: SandboxLimits,
    thinking_s: float = THINKING_S,
) -> AsyncIterator[Conversation]:
    """The process is gone behind it. Raises SandboxFailed("unavailable") where none can be had."""
    domain.hold()
    try:
        process = await _start(zygote_socket, domain, limits)
        talk = Conversation(process, pad, record, domain, thinking_s)
        try:
            yield talk
        finally:
            talk.release()
            await process.kill()
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
        policy=limits.policy,
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
        with _in_time(THINKING_S):
            reply = await process.receive(THINKING_S)
        if reply is None or reply.kind != KIND_READY:
            failed = reply is not None and reply.kind == KIND_FAILED
            raise SandboxFailed("unavailable" if failed else "crash", reply.text if reply is not None else "it ended")
    except BaseException:
        await process.kill()
        raise
    return process


@contextlib.contextmanager
def _in_time(limit_s: float) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise SandboxFailed("timeout", f"no word within {limit_s:g} s") from None


class Conversation:
    """With one process, about one version. All raise SandboxFailed when it is gone or says nothing in time, Lie, and what
    loading raises."""

    def __init__(
        self, process: SandboxProcess, pad: Loads, record: ObjectRecord, domain: Domain, thinking_s: float
    ) -> None:
        self._process = process
        self._pad = pad
        self._record = record
        self._domain = domain
        self._thinking_s = thinking_s
        self._loaded: LoadedBytes | None = None

    async def begin(self, task: Task) -> None:
        await self.send(msgspec.msgpack.encode(task))

    async def answer(self) -> Refusal | Structure | Rewritten:
        """What it says when it has read what it wanted. Raises TooSpread too."""
        for _ in range(WANTS_MAX):
            word = self._understood(await self.hear())
            if not isinstance(word, Want):
                self.release()
                return word
            await self._bring(word)
        raise TooSpread(f"its structure is spread over more than {WANTS_MAX * WANT_BYTES_MAX} bytes")

    async def send(self, datagram: bytes) -> None:
        with _in_time(self._thinking_s):
            sent = await self._process.send_in_time(datagram, self._thinking_s)
        if not sent:
            raise SandboxFailed("crash", "it ended")

    async def hear(self) -> bytes:
        with _in_time(self._thinking_s):
            datagram = await self._process.receive_datagram(DATAGRAM_BYTES_MAX, self._thinking_s)
        if datagram is None:
            raise SandboxFailed("crash", await self._process.ending())
        return datagram

    def _understood(self, datagram: bytes) -> Word:
        try:
            return msgspec.msgpack.decode(datagram, type=Word)  # type: ignore[no-any-return]
        except msgspec.MsgspecError:
            raise Lie("a word that nobody knows") from None

    async def _bring(self, want: Want) -> None:
        self.release()
        if want.offset < 0 or not 0 < want.length <= WANT_BYTES_MAX or want.offset + want.length > self._record.length:
            raise Lie("it asks for bytes outside the file")
        self._loaded = loaded = await load(self._pad, self._record, want.offset, want.length, self._domain)
        await self.send(msgspec.msgpack.encode(Place(loaded.region, loaded.offset, loaded.length)))

    def release(self) -> None:
        """The sandbox has copied what was brought last, or is about to end."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded.release()

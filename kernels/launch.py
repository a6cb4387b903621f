"""How a sandbox begins: what it is asked to run, checked beforehand; its compilation; what it says before its first batch.

In: admitted kernels, layouts of frames, limits. Out: a process that has compiled, or KernelRefused with the user's line, or
SandboxFailed with the process gone. ``check`` compiles in a throwaway process, for a kernel that is only submitted.
"""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import os
from collections.abc import Sequence

import numpy as np

from ingest.ports import KernelRefused
from kernels import wire
from kernels.contract import DTYPES, MAX_FRAME_NDIM, MAX_OUT_BYTES, Geometry, Kernel, out_geometry, resolve_params
from kernels.memory import OutputLayout, frame_bytes
from kernels.output import Output
from kernels.process import SandboxFailed, SandboxProcess

_F_SEAL_FUTURE_WRITE = 0x0010

NOT_LOCKED_DOWN = "lock-down: "
"""How SandboxFailed("unavailable") begins where the machine, not the fork server, is the reason."""
DEFAULT_LAYOUTS = (("<u2", 2), ("<u4", 2), ("<i4", 2), ("<f4", 2))
"""(dtype, dimensions) of frames that a kernel is tried with when it does not say what it is for."""


@dataclasses.dataclass(frozen=True, slots=True)
class SandboxLimits:
    """Times are wall clock: a process's CPU clock counts its whole life."""

    memory_bytes: int = 512 << 20
    """Address space beyond what the process has mapped when it is locked down."""
    compile_timeout_s: float = 60.0
    batch_timeout_s: float = 2.0
    frame_timeout_s: float = 0.1
    """A batch may take ``batch_timeout_s + count * frame_timeout_s`` of CPU time."""
    finish_timeout_s: float = 10.0
    nice: int = 5
    """Of a worker's first sandbox; see ``among``."""
    on_probation: bool = False
    """Compile and judge the first batch only when nobody else wants the core: for a kernel that has just failed."""
    populate: bool = True
    """Map regions with MAP_POPULATE: costs about 80 ms per GiB at start, saves a third on the first pass."""

    @property
    def policy(self) -> int:
        """With SCHED_BATCH the scheduler never lets a kernel pre-empt the receivers on wake-up."""
        return os.SCHED_IDLE if self.on_probation else os.SCHED_BATCH

    def among(self, processes: int) -> SandboxLimits:
        """The limits of the last of ``processes`` sandboxes of a worker: each doubling yields three steps more (half the
        share of a core), so that all of them together weigh less than one process that receives."""
        return dataclasses.replace(self, nice=min(self.nice + 3 * (processes - 1).bit_length(), _NICE_MAX))


_NICE_MAX = 19
DEFAULT_LIMITS = SandboxLimits()


@dataclasses.dataclass(frozen=True, slots=True)
class Checked:
    """A kernel that compiles for some frames at least."""

    refused: dict[str, str]
    """Why it does not, for each dtype it does not compile for."""
    cautions: tuple[str, ...]
    """What compiled and is probably not meant."""


async def check(
    zygote_socket: str,
    kernel: Kernel,
    dtypes: Sequence[tuple[str, int]] = DEFAULT_LAYOUTS,
    limits: SandboxLimits = DEFAULT_LIMITS,
) -> Checked:
    """Compile in a throwaway sandbox for each (dtype, dimensions); raises KernelRefused if it compiles for none.

    A histogram indexed by pixel values is right to compile for integers only. Raises SandboxFailed when it could not be tried.
    """
    layouts = tuple((dtype, (2,) * ndim) for dtype, ndim in dtypes)
    for dtype, shape in layouts:
        check_geometry(dtype, shape)
        check_out(kernel, (dtype, shape))
    spec = make_spec([wire.StageSpec(kernel, resolve_params(kernel, {}), ())], layouts, limits, compile_only=True)
    process, output, answers = await launch(zygote_socket, spec, (), limits)
    await process.kill()
    output.close()
    refusals = {answer.index: answer for answer in answers if answer.kind == wire.KIND_REFUSED}
    if len(refusals) >= len(layouts):
        raise refusal_of([kernel], next(iter(refusals.values())))
    refused = {layouts[n][0]: str(refusal_of([kernel], refusal)) for n, refusal in refusals.items() if n < len(layouts)}
    return Checked(refused, cautions_of([kernel], answers))


async def launch(
    zygote_socket: str, spec: wire.SandboxSpec, fds: Sequence[int], limits: SandboxLimits
) -> tuple[SandboxProcess, Output, list[wire.RawReply]]:
    """A process that has compiled, or refused every layout, and what it said; raises SandboxFailed with it gone."""
    kernels = [stage.kernel for stage in spec.stages]
    output = Output(OutputLayout(kernels, spec.layouts[0], spec.slots, spec.out_frames))
    try:
        try:
            process = await SandboxProcess.fork(zygote_socket, spec, output.fd, fds)
        finally:
            output.close_fd()
        return process, output, await _compile_or_kill(process, len(spec.layouts), limits.compile_timeout_s)
    except BaseException:
        output.close()
        raise


async def _compile_or_kill(process: SandboxProcess, layouts: int, timeout_s: float) -> list[wire.RawReply]:
    try:
        return await _compiled(process, layouts, timeout_s)
    except TimeoutError:
        await process.kill()
        raise SandboxFailed("timeout", f"not compiled within {timeout_s:g} s") from None
    except SandboxFailed as failure:
        ending = await process.kill()
        if failure.kind == "crash" and not failure.message:
            kind = "unavailable" if process.orphaned else "crash"
            raise SandboxFailed(kind, f"while compiling, {ending}") from None
        raise
    except BaseException:
        await process.kill()
        raise


async def _compiled(process: SandboxProcess, layouts: int, timeout_s: float) -> list[wire.RawReply]:
    """What is heard before READY or the end: refusals, one for each layout at most, and cautions."""
    answers: list[wire.RawReply] = []
    deadline = asyncio.get_running_loop().time() + timeout_s
    while True:
        reply = await process.receive(max(0.0, deadline - asyncio.get_running_loop().time()))
        if reply is None:
            refusals = [answer for answer in answers if answer.kind == wire.KIND_REFUSED]
            if refusals:
                # It ended without READY: it compiled for none, or its module did not load at all.
                return [dataclasses.replace(refusals[0], index=index) for index in range(layouts)]
            raise SandboxFailed("crash", "")
        if reply.kind == wire.KIND_READY:
            return answers
        if reply.kind == wire.KIND_FAILED:
            raise SandboxFailed("unavailable", f"{NOT_LOCKED_DOWN}{reply.text}")
        most = layouts if reply.kind == wire.KIND_REFUSED else layouts * wire.MAX_CAUTIONS
        if reply.kind not in (wire.KIND_REFUSED, wire.KIND_CAUTION) or most <= sum(
            a.kind == reply.kind for a in answers
        ):
            raise SandboxFailed("lie", "an answer that nothing asked for, before the first batch")
        answers.append(reply)


def cautions_of(kernels: Sequence[Kernel], answers: Sequence[wire.RawReply]) -> tuple[str, ...]:
    """Each once, however many layouts it was said of."""
    found = [str(refusal_of(kernels, answer)) for answer in answers if answer.kind == wire.KIND_CAUTION]
    return tuple(dict.fromkeys(found))


def make_spec(
    stages: Sequence[wire.StageSpec],
    layouts: tuple[Geometry, ...],
    limits: SandboxLimits,
    *,
    compile_only: bool = False,
    region_count: int = 0,
    region_bytes: int = 0,
    arrays_bytes: int = 0,
    slots: int = 1,
    out_frames: int = 0,
) -> wire.SandboxSpec:
    return wire.SandboxSpec(
        stages=tuple(stages),
        layouts=layouts,
        compile_only=compile_only,
        region_count=region_count,
        region_bytes=region_bytes,
        arrays_bytes=arrays_bytes,
        slots=slots,
        out_frames=out_frames,
        memory_bytes=limits.memory_bytes,
        nice=limits.nice,
        policy=limits.policy,
        populate=limits.populate,
    )


def refusal_of(kernels: Sequence[Kernel], refusal: wire.RawReply) -> KernelRefused:
    kernel = kernels[min(refusal.stage, len(kernels) - 1)]
    lines = kernel.source.count("\n") + 1
    return KernelRefused(kernel.file, min(max(refusal.line, 1), lines), refusal.text or "does not compile")


def checked_chain(kernels: Sequence[Kernel]) -> Sequence[Kernel]:
    """Raises ValueError for a chain that no sandbox takes, KernelRefused for one whose sources are too large."""
    if not 1 <= len(kernels) <= wire.MAX_STAGES:
        raise ValueError(f"a chain of {len(kernels)} kernels: 1 to {wire.MAX_STAGES} are possible")
    total = sum(len(kernel.source.encode()) for kernel in kernels)
    if total > wire.MAX_CHAIN_SOURCE_BYTES:
        raise KernelRefused(
            kernels[-1].file,
            1,
            f"the chain's sources have {total} bytes, at most {wire.MAX_CHAIN_SOURCE_BYTES} are allowed",
        )
    return kernels


def check_out(kernel: Kernel, frame: Geometry) -> None:
    out = out_geometry(kernel, frame)
    if out is not None and frame_bytes(out) > MAX_OUT_BYTES:
        raise KernelRefused(
            kernel.file, 1, f"OUT has more than {MAX_OUT_BYTES >> 20} MiB for frames of shape {frame[1]}"
        )


def check_geometry(dtype: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError for frames no kernel can be compiled for."""
    try:
        parsed = np.dtype(dtype)
    except TypeError:
        raise ValueError(f"frames of {dtype!r}: not a dtype") from None
    if parsed.name not in DTYPES or not parsed.isnative:
        raise ValueError(f"frames of {dtype!r} are not supported: little-endian {', '.join(DTYPES)} are")
    if not 1 <= len(shape) <= MAX_FRAME_NDIM or min(shape) < 1:
        raise ValueError(f"frames of shape {shape} are not supported: 1 to {MAX_FRAME_NDIM} dimensions, none empty")


def check_seals(fd: int) -> None:
    """A region that a sandbox maps must not be writable through its descriptor, nor shrink under the mapping.

    Either the memory is sealed against future writable mappings, or the descriptor was opened for reading only: a shared
    mapping of it can then never be made writable (mmap(2): EACCES), and a sandbox has no way to open it again. The arena
    hands out the latter, because a worker that takes over from a dead one must map the same memory for writing.
    """
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    read_only = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    if not (read_only or seals & (_F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_WRITE)) or not seals & fcntl.F_SEAL_SHRINK:
        raise ValueError(f"region descriptor {fd} is not sealed against writing and shrinking")

"""The gateway's side of one sandboxed kernel, or chain: start it, give it batches, take its results, be sure that it is gone.

In: admitted kernels, the layout of frames, descriptors of the regions the frames lie in. Out: verdicts, feedback, rows and
transformed frames for each batch, and copies of the state arrays. What always holds: nothing the process writes is trusted
(values are copied out once, then validated); a process that hangs, dies or lies is killed and costs one ``SandboxFailed``;
after ``close`` has returned, or ``SandboxFailed`` was raised, the process has ended and maps no region any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ingest.ports import KernelRefused
from kernels import arrays as array_memory
from kernels import wire
from kernels.contract import (
    DTYPES,
    MAX_FRAME_NDIM,
    MAX_OUT_BYTES,
    Geometry,
    Kernel,
    Stage,
    chain_geometries,
    out_geometry,
    resolve_arrays,
    resolve_params,
)
from kernels.memory import OutputLayout, frame_bytes
from kernels.output import Output, Reply, finished, validated
from kernels.process import SandboxFailed, SandboxProcess

__all__ = ["Batch", "Reply", "Sandbox", "SandboxFailed", "SandboxLimits", "check"]

_F_SEAL_FUTURE_WRITE = 0x0010

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
    """A batch may take ``batch_timeout_s + count * frame_timeout_s``."""
    finish_timeout_s: float = 10.0
    nice: int = 5
    """Of a worker's first sandbox; see ``among``."""
    batch_scheduling: bool = True
    """SCHED_BATCH: the scheduler then never lets a kernel pre-empt the receivers on wake-up."""
    populate: bool = True
    """Map regions with MAP_POPULATE: costs about 80 ms per GiB at start, saves a third on the first pass."""

    def among(self, processes: int) -> SandboxLimits:
        """The limits of the last of ``processes`` sandboxes of a worker: each doubling yields three steps more (half the
        share of a core), so that all of them together weigh less than one process that receives."""
        return dataclasses.replace(self, nice=min(self.nice + 3 * (processes - 1).bit_length(), _NICE_MAX))


_NICE_MAX = 19
STEP_BACK_S = 0.5
"""A batch that takes longer goes on in idle time only: it must not cost the streams of others."""
_CLOSED = "the sandbox is closed"
_ARRAYS_ON_LOOP_BYTES_MAX = 1 << 20
_DEFAULT_LIMITS = SandboxLimits()
_Result = TypeVar("_Result")


def _nothing(_: object) -> None:
    pass


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """``count`` frames (at most wire.MAX_BATCH) that lie contiguous at byte ``offset`` of a region, or, where there is a
    ``table`` (kernels/decode/table.py), encoded where it says."""

    region: int
    offset: int
    frame_bytes: int
    first_frame: int
    count: int
    slot: int
    alone: bool = False
    """See wire.Run."""
    table: bytes = b""
    collect_out: bool = False
    """Answer with the ``out`` of every frame; ``count`` is then at most the sandbox's ``out_frames``."""


class Sandbox:
    """One sandboxed process. Belongs to one event loop; ``run`` calls queue up."""

    def __init__(
        self,
        process: SandboxProcess,
        output: Output,
        spec: wire.SandboxSpec,
        limits: SandboxLimits,
        cautions: tuple[str, ...] = (),
    ) -> None:
        self.cautions = cautions
        """What compiled and is probably not meant, each with its file and line."""
        self._process = process
        self._output: Output | None = output
        self._spec = spec
        self._files = [stage.kernel.file for stage in spec.stages]
        self._frame_bytes = frame_bytes(spec.layouts[0])
        self._limits = limits
        self._sequence = 0
        self._turn = asyncio.Lock()
        self._closing = False

    @classmethod
    async def start(
        cls,
        zygote_socket: str,
        stages: Sequence[Stage],
        *,
        dtype: str,
        shape: tuple[int, ...],
        region_fds: Sequence[int],
        region_bytes: int,
        slots: int = 8,
        limits: SandboxLimits = _DEFAULT_LIMITS,
        out_frames: int = 0,
    ) -> Sandbox:
        """Fork, lock down and compile for C-ordered frames of ``dtype`` and ``shape``.

        ``stages``: the chain, first kernel first; verdicts, state, feedback, rows and out are those of the last.
        ``region_fds``: memfds sealed against future writing and shrinking, ``region_bytes`` each. ``out_frames``: how many
        frames of ``out`` one batch may ask for. Raises KernelRefused (a parameter or array does not fit, or it does not
        compile: the line is the user's), SandboxFailed, or ValueError for arguments out of their limits.
        """
        _check_geometry(dtype, shape)
        if not 1 <= slots <= wire.MAX_SLOTS or len(region_fds) > wire.MAX_REGIONS:
            raise ValueError(f"at most {wire.MAX_SLOTS} slots and {wire.MAX_REGIONS} regions")
        if not 0 <= out_frames <= wire.MAX_BATCH:
            raise ValueError(f"{out_frames} frames of out: a batch has at most {wire.MAX_BATCH}")
        for fd in region_fds:
            _check_seals(fd)
        kernels = _checked_chain([stage.kernel for stage in stages])
        inputs = chain_geometries(kernels, (dtype, shape))
        for kernel, geometry in zip(kernels, inputs, strict=True):
            _check_out(kernel, geometry)
        arrays = [
            resolve_arrays(stage.kernel, stage.arrays, geometry[1])
            for stage, geometry in zip(stages, inputs, strict=True)
        ]
        places, arrays_bytes = array_memory.place(arrays)
        spec = _spec(
            [
                wire.StageSpec(stage.kernel, resolve_params(stage.kernel, stage.params), placed)
                for stage, placed in zip(stages, places, strict=True)
            ],
            ((dtype, shape),),
            limits,
            region_count=len(region_fds),
            region_bytes=region_bytes,
            arrays_bytes=arrays_bytes,
            slots=slots,
            out_frames=out_frames,
        )
        with contextlib.ExitStack() as stack:
            fds = list(region_fds)
            if arrays_bytes:
                fds.insert(0, await _written(arrays, places, arrays_bytes))
                stack.callback(os.close, fds[0])
            process, output, answers = await _launch(zygote_socket, spec, fds, limits)
        refusal = next((answer for answer in answers if answer.kind == wire.KIND_REFUSED), None)
        if refusal is not None:
            await process.kill()
            output.close()
            raise _refusal(kernels, refusal)
        return cls(process, output, spec, limits, _cautions(kernels, answers))

    @property
    def alive(self) -> bool:
        return self._output is not None and not self._closing and not self._process.ended

    @property
    def pid(self) -> int:
        return self._process.pid

    async def run(self, batch: Batch) -> Reply:
        """Judge one batch. Raises SandboxFailed (the process is gone then), or ValueError for a batch out of range.

        A cancelled call still waits, no longer than the batch's deadline: until then the process reads the frames and
        writes the slot's state.
        """
        self._check_batch(batch)
        async with self._turn:
            return await _to_its_end(self._judge(batch))

    async def finish(self, state: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, npt.NDArray[np.generic]]:
        """The state arrays after the kernel's ``finish(state, params)`` worked on a copy of ``state``.

        Raises SandboxFailed as ``run`` does, and ValueError for a kernel without finish() or a state that is not its own.
        """
        if not self._spec.stages[-1].kernel.has_finish:
            raise ValueError("the kernel has no finish()")
        async with self._turn:
            return await _to_its_end(self._conclude(state))

    def reset(self, slot: int) -> None:
        """Set the slot's state arrays to the identities of their merges."""
        self._opened().reset(self._check_slot(slot))

    def collect(self, slot: int) -> dict[str, npt.NDArray[np.generic]]:
        """Copies of the slot's state arrays, by name."""
        return self._opened().collect(self._check_slot(slot))

    async def close(self) -> None:
        """Kill the process and wait for its end; may be called again. Runs under way fail as unavailable."""
        self._closing = True
        self._process.signal_kill()
        async with self._turn:
            await self._end()

    async def _end(self) -> None:
        output, self._output = self._output, None
        await self._process.kill()
        if output is not None:
            output.close()

    # -- one request

    async def _judge(self, batch: Batch) -> Reply:
        output = self._opened()
        self._sequence += 1
        run = wire.Run(
            self._sequence,
            batch.region,
            batch.slot,
            batch.offset,
            batch.frame_bytes,
            batch.first_frame,
            batch.count,
            alone=batch.alone,
            collect_out=batch.collect_out,
        )
        output.verdicts.fill(wire.NO_VERDICT)
        timeout_s = self._limits.batch_timeout_s + batch.count * self._limits.frame_timeout_s
        return await self._exchange(
            run.pack() + batch.table,
            timeout_s,
            lambda reply: validated(reply, run, output, self._files, encoded=bool(batch.table)),
            lambda: self._where(output, batch, timeout_s),
        )

    async def _conclude(self, state: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, npt.NDArray[np.generic]]:
        output = self._opened()
        output.place_finish(state)
        self._sequence += 1
        run = wire.Run(self._sequence, 0, 0, 0, 0, 0, 0, operation=wire.OP_FINISH)
        timeout_s = self._limits.finish_timeout_s
        return await self._exchange(
            run.pack(),
            timeout_s,
            lambda reply: finished(reply, run, output, self._files),
            lambda: f"finish() did not end within {timeout_s:g} s",
        )

    async def _gone(self) -> SandboxFailed:
        """What to say of a process that does not speak any more."""
        ending = await self._process.kill()
        return SandboxFailed("unavailable" if self._process.orphaned else "crash", ending)

    async def _exchange(
        self, request: bytes, timeout_s: float, taken: Callable[[wire.RawReply], _Result], late: Callable[[], str]
    ) -> _Result:
        """One request, one answer; ``taken`` copies and checks. Whatever goes wrong ends the process."""
        backing = asyncio.get_running_loop().call_later(STEP_BACK_S, self._process.step_back)
        try:
            if not self._process.send(request):
                raise await self._gone()
            try:
                reply = await self._process.receive(timeout_s)
            except TimeoutError:
                raise SandboxFailed("timeout", late()) from None
            if reply is None:
                raise await self._gone()
            return taken(reply)
        except SandboxFailed:
            await self._end()
            if self._closing:
                raise SandboxFailed("unavailable", _CLOSED) from None
            raise
        except asyncio.CancelledError:
            # Only the end of the event loop cancels an exchange; nobody will read its reply.
            self._process.signal_kill()
            raise
        finally:
            if backing.when() <= asyncio.get_running_loop().time():
                self._process.step_forward()
            backing.cancel()

    @staticmethod
    def _where(output: Output, batch: Batch, timeout_s: float) -> str:
        frame = int(output.counters[0])
        last = batch.first_frame + batch.count - 1
        place = f"frame {frame}" if batch.first_frame <= frame <= last else f"frames {batch.first_frame} to {last}"
        return f"{place}: {batch.count} frames were not judged within {timeout_s:g} s"

    # -- arguments

    def _opened(self) -> Output:
        if self._output is None or self._closing:
            raise SandboxFailed("unavailable", _CLOSED)
        return self._output

    def _check_slot(self, slot: int) -> int:
        if not 0 <= slot < self._spec.slots:
            raise ValueError(f"slot {slot} of {self._spec.slots}")
        return slot

    def _check_batch(self, batch: Batch) -> None:
        self._check_slot(batch.slot)
        if not 1 <= batch.count <= wire.MAX_BATCH:
            raise ValueError(f"{batch.count} frames: a batch has 1 to {wire.MAX_BATCH}")
        if batch.collect_out and batch.count > self._spec.out_frames:
            raise ValueError(f"{batch.count} frames of out: the sandbox was started for {self._spec.out_frames}")
        if batch.frame_bytes != self._frame_bytes:
            raise ValueError(f"frames of {batch.frame_bytes} bytes, compiled for {self._frame_bytes}")
        if not 0 <= batch.region < self._spec.region_count:
            raise ValueError(f"region {batch.region} of {self._spec.region_count}")
        # Where a table says where the frames are, the child checks every place against its regions.
        frames_bytes = 0 if batch.table else batch.count * batch.frame_bytes
        if batch.offset < 0 or batch.offset + frames_bytes > self._spec.region_bytes:
            raise ValueError("the batch does not lie within its region")
        if not 0 <= batch.first_frame < 1 << 62:
            raise ValueError(f"first frame {batch.first_frame}")


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
    limits: SandboxLimits = _DEFAULT_LIMITS,
) -> Checked:
    """Compile in a throwaway sandbox for each (dtype, dimensions); raises KernelRefused if it compiles for none.

    A histogram indexed by pixel values is right to compile for integers only. Raises SandboxFailed when it could not be tried.
    """
    layouts = tuple((dtype, (2,) * ndim) for dtype, ndim in dtypes)
    for dtype, shape in layouts:
        _check_geometry(dtype, shape)
        _check_out(kernel, (dtype, shape))
    spec = _spec([wire.StageSpec(kernel, resolve_params(kernel, {}), ())], layouts, limits, compile_only=True)
    process, output, answers = await _launch(zygote_socket, spec, (), limits)
    await process.kill()
    output.close()
    refusals = {answer.index: answer for answer in answers if answer.kind == wire.KIND_REFUSED}
    if len(refusals) >= len(layouts):
        raise _refusal([kernel], next(iter(refusals.values())))
    refused = {layouts[n][0]: str(_refusal([kernel], refusal)) for n, refusal in refusals.items() if n < len(layouts)}
    return Checked(refused, _cautions([kernel], answers))


async def _launch(
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
            raise SandboxFailed("unavailable", f"lock-down: {reply.text}")
        most = layouts if reply.kind == wire.KIND_REFUSED else layouts * wire.MAX_CAUTIONS
        if reply.kind not in (wire.KIND_REFUSED, wire.KIND_CAUTION) or most <= sum(
            a.kind == reply.kind for a in answers
        ):
            raise SandboxFailed("lie", "an answer that nothing asked for, before the first batch")
        answers.append(reply)


def _cautions(kernels: Sequence[Kernel], answers: Sequence[wire.RawReply]) -> tuple[str, ...]:
    """Each once, however many layouts it was said of."""
    found = [str(_refusal(kernels, answer)) for answer in answers if answer.kind == wire.KIND_CAUTION]
    return tuple(dict.fromkeys(found))


async def _written(
    arrays: Sequence[array_memory.Arrays], places: Sequence[Sequence[wire.ArrayPlace]], size_bytes: int
) -> int:
    """Descriptor of the memory of arrays."""
    if size_bytes <= _ARRAYS_ON_LOOP_BYTES_MAX:
        return array_memory.write(arrays, places, size_bytes)
    return await _to_its_end(asyncio.to_thread(array_memory.write, arrays, places, size_bytes), os.close)


async def _to_its_end(work: Coroutine[Any, Any, _Result], undo: Callable[[_Result], object] = _nothing) -> _Result:
    """Await, also when cancelled: then the work still ends first, and ``undo`` gets its result."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait((task,))
        if not task.cancelled() and task.exception() is None:
            undo(task.result())
        raise


def _spec(
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
        batch_scheduling=limits.batch_scheduling,
        populate=limits.populate,
    )


def _refusal(kernels: Sequence[Kernel], refusal: wire.RawReply) -> KernelRefused:
    kernel = kernels[min(refusal.stage, len(kernels) - 1)]
    lines = kernel.source.count("\n") + 1
    return KernelRefused(kernel.file, min(max(refusal.line, 1), lines), refusal.text or "does not compile")


def _checked_chain(kernels: Sequence[Kernel]) -> Sequence[Kernel]:
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


def _check_out(kernel: Kernel, frame: Geometry) -> None:
    out = out_geometry(kernel, frame)
    if out is not None and frame_bytes(out) > MAX_OUT_BYTES:
        raise KernelRefused(
            kernel.file, 1, f"OUT has more than {MAX_OUT_BYTES >> 20} MiB for frames of shape {frame[1]}"
        )


def _check_geometry(dtype: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError for frames no kernel can be compiled for."""
    try:
        parsed = np.dtype(dtype)
    except TypeError:
        raise ValueError(f"frames of {dtype!r}: not a dtype") from None
    if parsed.name not in DTYPES or not parsed.isnative:
        raise ValueError(f"frames of {dtype!r} are not supported: little-endian {', '.join(DTYPES)} are")
    if not 1 <= len(shape) <= MAX_FRAME_NDIM or min(shape) < 1:
        raise ValueError(f"frames of shape {shape} are not supported: 1 to {MAX_FRAME_NDIM} dimensions, none empty")


def _check_seals(fd: int) -> None:
    """A region that a sandbox maps must not be writable through its descriptor, nor shrink under the mapping.

    Either the memory is sealed against future writable mappings, or the descriptor was opened for reading only: a shared
    mapping of it can then never be made writable (mmap(2): EACCES), and a sandbox has no way to open it again. The arena
    hands out the latter, because a worker that takes over from a dead one must map the same memory for writing.
    """
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    read_only = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    if not (read_only or seals & (_F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_WRITE)) or not seals & fcntl.F_SEAL_SHRINK:
        raise ValueError(f"region descriptor {fd} is not sealed against writing and shrinking")

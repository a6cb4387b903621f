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
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kernels import arrays as array_memory
from kernels import wire
from kernels.contract import (
    Stage,
    chain_geometries,
    resolve_arrays,
    resolve_params,
)
from kernels.launch import (
    DEFAULT_LAYOUTS,
    DEFAULT_LIMITS,
    Checked,
    SandboxLimits,
    cautions_of,
    check,
    check_geometry,
    check_out,
    check_seals,
    checked_chain,
    launch,
    make_spec,
    refusal_of,
)
from kernels.memory import frame_bytes
from kernels.output import Output, Reply, finished, validated
from kernels.process import SandboxFailed, SandboxProcess

__all__ = ["DEFAULT_LAYOUTS", "Batch", "Checked", "Reply", "Sandbox", "SandboxFailed", "SandboxLimits", "check"]

STEP_BACK_S = 0.5
"""A batch that takes more CPU time goes on in idle time only: it must not cost the streams of others."""
STARVED_MAX = 10
"""Limits are CPU time, so that nobody blames a kernel for a busy machine; by the clock it may be so many times as much."""
_LOOK_S = 0.01
_CLOSED = "the sandbox is closed"
_ARRAYS_ON_LOOP_BYTES_MAX = 1 << 20
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
        self._on_probation = limits.on_probation

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
        limits: SandboxLimits = DEFAULT_LIMITS,
        out_frames: int = 0,
    ) -> Sandbox:
        """Fork, lock down and compile for C-ordered frames of ``dtype`` and ``shape``.

        ``stages``: the chain, first kernel first; verdicts, state, feedback, rows and out are those of the last.
        ``region_fds``: memfds sealed against future writing and shrinking, ``region_bytes`` each. ``out_frames``: how many
        frames of ``out`` one batch may ask for. Raises KernelRefused (a parameter or array does not fit, or it does not
        compile: the line is the user's), SandboxFailed, or ValueError for arguments out of their limits.
        """
        check_geometry(dtype, shape)
        if not 1 <= slots <= wire.MAX_SLOTS or len(region_fds) > wire.MAX_REGIONS:
            raise ValueError(f"at most {wire.MAX_SLOTS} slots and {wire.MAX_REGIONS} regions")
        if not 0 <= out_frames <= wire.MAX_BATCH:
            raise ValueError(f"{out_frames} frames of out: a batch has at most {wire.MAX_BATCH}")
        for fd in region_fds:
            check_seals(fd)
        kernels = checked_chain([stage.kernel for stage in stages])
        inputs = chain_geometries(kernels, (dtype, shape))
        for kernel, geometry in zip(kernels, inputs, strict=True):
            check_out(kernel, geometry)
        arrays = [
            resolve_arrays(stage.kernel, stage.arrays, geometry[1])
            for stage, geometry in zip(stages, inputs, strict=True)
        ]
        places, arrays_bytes = array_memory.place(arrays)
        spec = make_spec(
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
            process, output, answers = await launch(zygote_socket, spec, fds, limits)
        refusal = next((answer for answer in answers if answer.kind == wire.KIND_REFUSED), None)
        if refusal is not None:
            await process.kill()
            output.close()
            raise refusal_of(kernels, refusal)
        return cls(process, output, spec, limits, cautions_of(kernels, answers))

    @property
    def alive(self) -> bool:
        return self._output is not None and not self._closing and not self._process.ended

    @property
    def pid(self) -> int:
        return self._process.pid

    def cpu_s(self) -> float:
        """As of SandboxProcess."""
        return self._process.cpu_s()

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
            lambda: f"finish() did not end within {timeout_s:g} s of CPU time",
        )

    async def _gone(self) -> SandboxFailed:
        """What to say of a process that does not speak any more."""
        ending = await self._process.kill()
        return SandboxFailed("unavailable" if self._process.orphaned else "crash", ending)

    async def _exchange(
        self, request: bytes, timeout_s: float, taken: Callable[[wire.RawReply], _Result], late: Callable[[], str]
    ) -> _Result:
        """One request, one answer; ``taken`` copies and checks. Whatever goes wrong ends the process."""
        try:
            if not self._process.send(request):
                raise await self._gone()
            try:
                reply = await self._reply(timeout_s)
            except TimeoutError:
                raise SandboxFailed("timeout", late()) from None
            if reply is None:
                raise await self._gone()
            result = taken(reply)
            if self._on_probation:
                self._on_probation = False
                self._process.step_forward()
            return result
        except SandboxFailed:
            await self._end()
            if self._closing:
                raise SandboxFailed("unavailable", _CLOSED) from None
            raise
        except asyncio.CancelledError:
            # Only the end of the event loop cancels an exchange; nobody will read its reply.
            self._process.signal_kill()
            raise

    async def _reply(self, timeout_s: float) -> wire.RawReply | None:
        """As ``SandboxProcess.receive``, within so much CPU time."""
        process, clock = self._process, asyncio.get_running_loop().time
        ends_s, began_cpu_s = clock() + STARVED_MAX * timeout_s, process.cpu_s()
        used_s, stepped_back = 0.0, self._on_probation
        try:
            while used_s < timeout_s and clock() < ends_s:
                if used_s >= STEP_BACK_S and not stepped_back:
                    process.step_back()
                    stepped_back = True
                wait_s = (timeout_s if stepped_back else min(timeout_s, STEP_BACK_S)) - used_s
                with contextlib.suppress(TimeoutError):
                    return await process.receive(min(max(wait_s, _LOOK_S), ends_s - clock()))
                used_s = process.cpu_s() - began_cpu_s
            raise TimeoutError
        finally:
            if stepped_back and not self._on_probation:
                process.step_forward()

    @staticmethod
    def _where(output: Output, batch: Batch, timeout_s: float) -> str:
        frame = int(output.counters[0])
        last = batch.first_frame + batch.count - 1
        place = f"frame {frame}" if batch.first_frame <= frame <= last else f"frames {batch.first_frame} to {last}"
        return f"{place}: {batch.count} frames were not judged within {timeout_s:g} s of CPU time"

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

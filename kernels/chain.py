"""Joins the kernels of a chain into one compiled loop over the frames of a batch. Runs inside the sandbox only.

In: programs and, for each, its parameters, state, feedback and ``out``. Out: ``drive``, which Python enters once for each
batch. Each kernel sees the ``out`` of the one before it (its frame where that has no OUT); what an earlier kernel drops is
dropped, and where one says STOP the chain stops with that frame. Verdicts are those of the last kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numba.core import types as numba_types

from kernels.calls import Feedback, jit, nowhere
from kernels.contract import DROP, REPLACE, STOP, Geometry, chain_geometries, out_geometry
from kernels.memory import NO_ROWS
from kernels.program import Program, type_of
from kernels.wire import AT_FRAME, BAD_VERDICT, COUNTERS, ROWS_OF_FRAME

Drive = Callable[..., int]
"""(frames, verdicts, number of the first frame, alone (see wire.Run), first place in ``outs`` or -1 to use one for all,
*arguments_of(memories)) → frames judged: all, unless one was STOP. The verdicts of the others are not touched."""


@dataclasses.dataclass(frozen=True, slots=True)
class StageMemory:
    """What one kernel works on. ``outs``: one frame or more, C-contiguous."""

    params: Any
    state: Any
    feedback: Feedback
    outs: npt.NDArray[np.generic] | None


def arguments_of(memories: Sequence[StageMemory]) -> tuple[Any, ...]:
    """The arguments of ``drive`` for each kernel; its ``out`` also flat, to blank it, and read-only, for the next one."""
    arguments: list[Any] = []
    for memory in memories:
        arguments += [memory.params, memory.state, memory.feedback]
        if memory.outs is not None:
            seen = memory.outs.view()
            seen.flags.writeable = False
            arguments += [memory.outs, memory.outs.reshape((len(memory.outs), -1)), seen]
    return tuple(arguments)


class Chain:
    """The programs of a sandbox, compiled together for one geometry of frames after another."""

    def __init__(self, programs: Sequence[Program]) -> None:
        self.programs = tuple(programs)

    def compile(self, frame: Geometry, memories: Sequence[StageMemory]) -> Drive:
        """``memories``: of any slot. Raises NotCompiled."""
        dtype, shape = frame
        frames = np.ndarray((0, *shape), dtype, b"")
        seen: Any = type_of(frames).copy(ndim=len(shape))
        for program, memory in zip(self.programs, memories, strict=True):
            out_type: Any = numba_types.none
            if memory.outs is not None:
                out_type = type_of(memory.outs).copy(ndim=memory.outs.ndim - 1)
            program.compile(seen, memory.params, memory.state, out_type, memory.feedback)
            if memory.outs is not None:
                seen = out_type.copy(readonly=True)
        drive = _driver(self.programs)
        self.programs[-1].guarded(lambda: drive(frames, np.zeros(0, np.uint8), 0, False, -1, *arguments_of(memories)))
        return drive


def blank_memories(chain: Chain, frame: Geometry) -> list[StageMemory]:
    """Memory of the right types and one element each: to compile with."""
    kernels = [program.kernel for program in chain.programs]
    memories = []
    for program, geometry in zip(chain.programs, chain_geometries(kernels, frame), strict=True):
        kernel = program.kernel
        arrays = []
        for spec in kernel.arrays:
            ndim = len(geometry[1]) if spec.shape is None else len(spec.shape)
            array = np.zeros((1,) * ndim, spec.dtype)
            array.flags.writeable = False
            arrays.append(array)
        out = out_geometry(kernel, geometry)
        memories.append(
            StageMemory(
                program.params({spec.name: spec.default for spec in kernel.params}, arrays),
                program.state([np.zeros((1,) * len(spec.shape), spec.dtype) for spec in kernel.state]),
                nowhere(np.zeros(COUNTERS, np.int64), kernel.rows.dtype if kernel.rows else NO_ROWS),
                np.zeros((1,) * (1 + len(out[1])), out[0]) if out else None,
            )
        )
    return memories


# The loop is made as source, one function for the whole chain: each function more costs a tenth of a second to compile.
_LOOP = """
def drive(frames, verdicts, first_frame, alone, first_place, {arguments}):
    for i in range(frames.shape[0]):
        feedback_{last}.counters[{at_frame}] = first_frame + i
        feedback_{last}.counters[{rows_of_frame}] = 0
        index = 0 if alone else first_frame + i
        place = first_place + i if first_place >= 0 else 0
        stopped = False
        seen_0 = frames[i]
{judging}
        if stopped and verdict != {bad}:
            verdict = np.int64({stop})
        verdicts[i] = verdict
        if verdict == {stop} and not alone:
            return i + 1
    return frames.shape[0]
"""
_BLANK = """
blank = flat_{n}[{place}]
for j in range(blank.size):
    blank[j] = 0
"""
_JUDGE = """
verdict = np.int64(frame_{n}(seen_{n}, params_{n}, state_{n}, index, {out}, feedback_{n}))
if verdict < {drop} or verdict > {stop} or verdict == {refused}:
    verdict = np.int64({bad})
"""
_GO_ON = """
if verdict == {stop}:
    stopped = True
if verdict != {drop} and verdict != {bad}:
    seen_{following} = {seen}
"""


def _driver(programs: Sequence[Program]) -> Drive:
    """The compiled loop: the only thing that differs between chains is which kernels have an ``out``."""
    last = len(programs) - 1
    verdicts = {"drop": DROP, "stop": STOP, "bad": BAD_VERDICT}
    arguments: list[str] = []
    lines: list[str] = []
    for n, program in enumerate(programs):
        has_out = program.kernel.out is not None
        place = "place" if n == last else "0"
        arguments += [f"params_{n}", f"state_{n}", f"feedback_{n}"]
        block = ""
        if has_out:
            arguments += [f"out_{n}", f"flat_{n}", f"view_{n}"]
            block += _BLANK.format(n=n, place=place)
        out = f"out_{n}[{place}]" if has_out else "None"
        block += _JUDGE.format(n=n, out=out, refused=BAD_VERDICT if has_out else REPLACE, **verdicts)
        if n < last:
            block += _GO_ON.format(following=n + 1, seen=f"view_{n}[0]" if has_out else f"seen_{n}", **verdicts)
        # Every kernel is judged inside the block of the one before, if that lets the frame through.
        lines += [" " * (8 + 4 * n) + line for line in block.splitlines() if line]
    source = _LOOP.format(
        arguments=", ".join(arguments),
        judging="\n".join(lines),
        last=last,
        at_frame=AT_FRAME,
        rows_of_frame=ROWS_OF_FRAME,
        **verdicts,
    )
    namespace: dict[str, Any] = {"np": np, **{f"frame_{n}": program.frame for n, program in enumerate(programs)}}
    exec(source, namespace)
    return jit(namespace["drive"], entry=True)  # type: ignore[no-any-return]

"""A compiled kernel, or chain, with its memory: answers one request after another until the gateway hangs up.

Runs inside the sandbox only, entered after the first filter holds. In: ``Run`` datagrams on the channel. Out: one reply for
each; what it counts lies in the output memory.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from kernels import explain, wire
from kernels.calls import Feedback, nowhere
from kernels.chain import Chain, Drive, StageMemory, arguments_of, blank_memories
from kernels.contract import STOP, Geometry
from kernels.decode.frames import FrameDecoder
from kernels.decode.table import TABLE_BYTES_MAX
from kernels.memory import NO_ROWS, OutputLayout
from kernels.program import NotCompiled, Program
from kernels.wire import RawReply, Run, SandboxSpec

CHANNEL_FD = 3

EXIT_HUNG_UP = 0
EXIT_REFUSED = 64
EXIT_BAD_REQUEST = 65
EXIT_FAILED = 70


def say(reply: RawReply) -> None:
    os.write(CHANNEL_FD, reply.pack())


class Session:
    """``output``, ``arrays``, ``regions``: the mapped memories."""

    def __init__(
        self, spec: SandboxSpec, output: memoryview, arrays: mmap.mmap | None, regions: Sequence[mmap.mmap]
    ) -> None:
        dtype, self._shape = spec.layouts[0]
        self._dtype = np.dtype(dtype)
        self._regions = regions
        self._decoder = FrameDecoder(regions, self._dtype, self._shape)
        self._files = [stage.kernel.file for stage in spec.stages]
        layout = OutputLayout([stage.kernel for stage in spec.stages], spec.layouts[0], spec.slots, spec.out_frames)
        self._verdicts = layout.verdicts(output)
        self._counters = layout.counters(output)
        chain = _loaded(spec)
        if spec.compile_only:
            self._try(chain, spec)
            return
        memories = _Memories(spec, chain, layout, output, arrays)
        self._arguments = [arguments_of(memories.of_slot(slot)) for slot in range(spec.slots)]
        drive = _compiled(chain, 0, spec.layouts[0], memories.of_slot(0))
        if drive is None:
            os._exit(EXIT_REFUSED)
        self._drive = drive
        self._finish = chain.programs[-1].finish
        self._finish_arguments = memories.of_finish() if self._finish is not None else ()

    def _try(self, chain: Chain, spec: SandboxSpec) -> None:
        """Compile for every layout, tell of each that fails; ends the process if all do."""
        drives = [_compiled(chain, n, layout, blank_memories(chain, layout)) for n, layout in enumerate(spec.layouts)]
        if not any(drives):
            os._exit(EXIT_REFUSED)

    def serve(self) -> NoReturn:
        while True:
            try:
                datagram = os.read(CHANNEL_FD, wire.RUN_BYTES + TABLE_BYTES_MAX)
            except ConnectionError:
                os._exit(EXIT_HUNG_UP)
            if not datagram:
                os._exit(EXIT_HUNG_UP)
            if len(datagram) < wire.RUN_BYTES:
                os._exit(EXIT_BAD_REQUEST)
            self._answer(Run.unpack(datagram[: wire.RUN_BYTES]), datagram[wire.RUN_BYTES :])

    def _answer(self, run: Run, table: bytes) -> None:
        self._counters[:] = 0
        try:
            judged = self._run_finish() if run.operation == wire.OP_FINISH else self._run_batch(run, table)
        except Exception as error:
            say(self._raised(error, run))
            os._exit(EXIT_FAILED)
        counts = self._counters.tolist()
        say(
            RawReply(
                wire.KIND_DONE,
                index=judged,
                sequence=run.sequence,
                feedback_count=counts[wire.FEEDBACK_KEPT],
                row_count=counts[wire.ROWS_KEPT],
                dropped_feedback=counts[wire.FEEDBACK_DROPPED],
                dropped_rows=counts[wire.ROWS_DROPPED],
            )
        )

    def _raised(self, error: Exception, run: Run) -> RawReply:
        index = int(self._counters[wire.AT_FRAME]) - run.first_frame
        file, line, reason = explain.raised(error)
        known = file in self._files
        return RawReply(
            wire.KIND_RAISED,
            index=index if 0 <= index < run.count else 0,
            sequence=run.sequence,
            stage=self._files.index(file) if known else 0,
            line=line if known else 0,
            text=reason,
        )

    def _run_finish(self) -> int:
        self._finish(*self._finish_arguments)
        return 0

    def _run_batch(self, run: Run, table: bytes) -> int:
        """Frames judged: fewer than there are where one was STOP."""
        judged = 0
        for start, count, frames in self._frames_of(run, table):
            if frames is None:
                self._verdicts[start : start + count] = wire.UNREADABLE
                judged = start + count
                continue
            judged = start + self._judge(frames, run, start)
            if self._verdicts[judged - 1] == STOP and not run.alone:
                break
        return judged

    def _frames_of(self, run: Run, table: bytes) -> Iterable[tuple[int, int, npt.NDArray[Any] | None]]:
        """(first, counted from the batch's first; how many; the frames, or None: they cannot be decoded)."""
        if table:
            return self._decoder.runs(run.first_frame, run.count, table)
        if run.offset % self._dtype.alignment:
            return self._unaligned(run)
        frames = np.ndarray((run.count, *self._shape), self._dtype, self._regions[run.region], run.offset)
        return ((0, run.count, frames),)

    def _unaligned(self, run: Run) -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
        """numba's loads assume aligned elements: copy such frames, one at a time."""
        region = np.frombuffer(self._regions[run.region], np.uint8)
        for i in range(run.count):
            start = run.offset + i * run.frame_bytes
            frame = region[start : start + run.frame_bytes].copy().view(self._dtype).reshape((1, *self._shape))
            frame.flags.writeable = False
            yield i, 1, frame

    def _judge(self, frames: npt.NDArray[Any], run: Run, start: int) -> int:
        place = start if run.collect_out else -1
        arguments = self._arguments[run.slot]
        return self._drive(frames, self._verdicts[start:], run.first_frame + start, run.alone, place, *arguments)


class _Memories:
    """Where each kernel of the chain finds its parameters, state, feedback and ``out``."""

    def __init__(
        self, spec: SandboxSpec, chain: Chain, layout: OutputLayout, output: memoryview, arrays: mmap.mmap | None
    ) -> None:
        self._chain = chain
        self._layout = layout
        self._output = output
        self._params = [
            program.params(stage.params, _arrays_of(stage, arrays))
            for program, stage in zip(chain.programs, spec.stages, strict=True)
        ]
        last = len(spec.stages) - 1
        scratch_counters = np.zeros(wire.COUNTERS, np.int64)
        self._feedbacks = [
            Feedback(layout.counters(output), layout.feedback(output), layout.rows(output))
            if stage == last
            else nowhere(scratch_counters, kernel.rows.dtype if kernel.rows else NO_ROWS)
            for stage, kernel in enumerate(program.kernel for program in chain.programs)
        ]
        self._outs = [layout.scratch(output, stage) for stage in range(last)] + [layout.outs(output)]

    def of_slot(self, slot: int) -> list[StageMemory]:
        states = [
            program.state(self._layout.slot_state(self._output, slot, stage))
            for stage, program in enumerate(self._chain.programs)
        ]
        return [StageMemory(*parts) for parts in zip(self._params, states, self._feedbacks, self._outs, strict=True)]

    def of_finish(self) -> tuple[Any, Any]:
        return self._chain.programs[-1].state(self._layout.finish_state(self._output)), self._params[-1]


def _arrays_of(stage: wire.StageSpec, memory: mmap.mmap | None) -> list[npt.NDArray[np.generic]]:
    """Read-only views: the memory is mapped so."""
    return [
        np.ndarray(place.shape, array.dtype, memory, place.offset)
        for array, place in zip(stage.kernel.arrays, stage.arrays, strict=True)
    ]


def _loaded(spec: SandboxSpec) -> Chain:
    try:
        return Chain([Program(stage.kernel, n) for n, stage in enumerate(spec.stages)])
    except NotCompiled as refusal:
        _refuse(0, refusal)
        os._exit(EXIT_REFUSED)


def _compiled(chain: Chain, layout: int, frame: Geometry, memories: Sequence[StageMemory]) -> Drive | None:
    try:
        drive = chain.compile(frame, memories)
    except NotCompiled as refusal:
        _refuse(layout, refusal)
        return None
    last = len(chain.programs) - 1
    for line, text in chain.programs[last].cautions()[: wire.MAX_CAUTIONS]:
        say(RawReply(wire.KIND_CAUTION, index=layout, stage=last, line=line, text=text))
    return drive


def _refuse(layout: int, refusal: NotCompiled) -> None:
    say(RawReply(wire.KIND_REFUSED, index=layout, stage=refusal.stage, line=refusal.line, text=refusal.reason))

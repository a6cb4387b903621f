"""The memory a sandboxed process writes its results into, and the check of every value that is read from it.

In: a reply that passed ``wire.parse_reply``. Out: a ``Reply`` whose values were copied once and then checked, or
``SandboxFailed("lie")``. What always holds: the memory's size is sealed, so that no access here can fault; its content may
change under our hands at any time, so nothing is read twice.
"""

from __future__ import annotations

import dataclasses
import fcntl
import mmap
import os
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from kernels import wire
from kernels.contract import FRAME_COLUMN, REPLACE, STOP, StateSpec
from kernels.memory import OutputLayout
from kernels.process import SandboxFailed

_MAX_DROPPED = 1 << 40
_MAX_LINE = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """What came of one batch. ``verdicts``: one for each frame; wire.UNREADABLE where it could not be decoded, wire.NO_VERDICT
    behind a STOP. ``feedback``: (frame, code,
    value), in the order emitted; a value may be NaN or infinite if the kernel emitted one."""

    verdicts: npt.NDArray[np.uint8]
    feedback: list[tuple[int, int, float]]
    dropped_feedback: int
    rows: npt.NDArray[np.void] | None = None
    """What was appended, of ``RowsSpec.dtype``, ordered by frame and then by call; None where the kernel has no ROWS."""
    dropped_rows: int = 0
    stopped_at: int | None = None
    """Number of the frame whose verdict was STOP: it is judged, later ones of the batch are not. None also for frames that
    are alone, whose verdicts say it."""
    out: npt.NDArray[np.generic] | None = None
    """A copy of the ``out`` of every judged frame, where the batch asked for it."""


class Output:
    """The output memory, shared read-write with the process: its size is sealed, its content is never trusted."""

    def __init__(self, layout: OutputLayout) -> None:
        self._layout = layout
        self.fd = os.memfd_create("hiss-kernel-output", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, layout.size_bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._mapping = mmap.mmap(self.fd, layout.size_bytes)
        except BaseException:
            os.close(self.fd)
            raise
        self._memory = memoryview(self._mapping)
        self.verdicts = layout.verdicts(self._memory)
        self.counters = layout.counters(self._memory)
        self.feedback = layout.feedback(self._memory)
        self.rows = layout.rows(self._memory)
        # Fresh memory is zero already; touching it would cost a page each for nothing.
        for slot in range(layout.slots):
            self.reset(slot, fresh=True)

    def reset(self, slot: int, *, fresh: bool = False) -> None:
        for stage in range(self._layout.stages):
            arrays = self._layout.slot_state(self._memory, slot, stage)
            for spec, array in zip(self._layout.slot_specs(stage), arrays, strict=True):
                if spec.identity != 0 or not fresh:
                    array.fill(spec.identity)

    def collect(self, slot: int) -> dict[str, npt.NDArray[np.generic]]:
        return _copied(self._layout.state, self._layout.slot_state(self._memory, slot))

    def place_finish(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Lay out the state that finish() works on. Raises ValueError where it is not the kernel's."""
        specs = self._layout.state
        if state.keys() != {spec.name for spec in specs}:
            raise ValueError(f"state of {sorted(state)}, the kernel has {sorted(spec.name for spec in specs)}")
        for spec, place in zip(specs, self._layout.finish_state(self._memory), strict=True):
            given = state[spec.name]
            if given.shape != spec.shape or given.dtype != np.dtype(spec.dtype):
                raise ValueError(f"state {spec.name!r} is {spec.dtype}{spec.shape}, not {given.dtype}{given.shape}")
            place[...] = given

    def collect_finish(self) -> dict[str, npt.NDArray[np.generic]]:
        return _copied(self._layout.state, self._layout.finish_state(self._memory))

    def outs(self, count: int) -> npt.NDArray[np.generic] | None:
        """A copy of the first ``count`` frames of ``out``; None where the kernel has none."""
        outs = self._layout.outs(self._memory)
        return None if outs is None else outs[:count].copy()

    @property
    def has_out(self) -> bool:
        return self._layout.out is not None

    @property
    def row_limit(self) -> int:
        return self._layout.rows_max

    def close_fd(self) -> None:
        os.close(self.fd)

    def close(self) -> None:
        """Unmap, once nobody uses the arrays any more."""
        del self.verdicts, self.counters, self.feedback, self.rows
        self._memory.release()
        self._mapping.close()


def _copied(
    specs: Sequence[StateSpec], arrays: Sequence[npt.NDArray[np.generic]]
) -> dict[str, npt.NDArray[np.generic]]:
    return {spec.name: array.copy() for spec, array in zip(specs, arrays, strict=True)}


def validated(
    reply: wire.RawReply, run: wire.Run, output: Output, files: Sequence[str], *, encoded: bool = False
) -> Reply:
    """The reply's values, copied once and checked; ``files``: of the chain; ``encoded``: frames may be UNREADABLE. Raises
    SandboxFailed."""
    _check_answer(reply, run, files)
    if reply.kind != wire.KIND_DONE or not 1 <= reply.index <= run.count:
        raise SandboxFailed("lie", "the answer does not fit the batch")
    if reply.feedback_count > wire.MAX_FEEDBACK or reply.dropped_feedback > _MAX_DROPPED:
        raise SandboxFailed("lie", "feedback beyond its limits")
    if reply.row_count > output.row_limit or reply.dropped_rows > _MAX_DROPPED:
        raise SandboxFailed("lie", "rows beyond their limits")
    verdicts, stopped_at = _verdicts(reply.index, run, output, encoded)
    return Reply(
        verdicts=verdicts,
        feedback=_feedback(reply, run, output),
        dropped_feedback=reply.dropped_feedback,
        rows=_rows(reply, run, output),
        dropped_rows=reply.dropped_rows,
        stopped_at=stopped_at,
        out=output.outs(reply.index) if run.collect_out else None,
    )


def finished(
    reply: wire.RawReply, run: wire.Run, output: Output, files: Sequence[str]
) -> dict[str, npt.NDArray[np.generic]]:
    """The state after finish(). Any bits are numbers, so that there is nothing to check in them."""
    _check_answer(reply, run, files)
    if reply.kind != wire.KIND_DONE or reply.index or reply.feedback_count or reply.row_count:
        raise SandboxFailed("lie", "the answer does not fit finish()")
    return output.collect_finish()


def _check_answer(reply: wire.RawReply, run: wire.Run, files: Sequence[str]) -> None:
    if reply.sequence != run.sequence:
        raise SandboxFailed("lie", f"an answer to request {reply.sequence} instead of {run.sequence}")
    if reply.kind != wire.KIND_RAISED:
        return
    if reply.index >= max(run.count, 1) or reply.stage >= len(files):
        raise SandboxFailed("lie", "the answer does not fit the batch")
    what = "finish()" if run.operation == wire.OP_FINISH else f"frame {run.first_frame + reply.index}"
    where = f" {files[reply.stage]}:{reply.line}:" if 0 < reply.line <= _MAX_LINE else ""
    raise SandboxFailed("crash", f"{what}:{where} {reply.text}")


def _verdicts(judged: int, run: wire.Run, output: Output, encoded: bool) -> tuple[npt.NDArray[np.uint8], int | None]:
    verdicts = output.verdicts[: run.count].copy()
    # Of frames behind a STOP nothing is believed.
    verdicts[judged:] = wire.NO_VERDICT
    known = verdicts[:judged] <= STOP
    wrong = np.flatnonzero(~(known | (encoded & (verdicts[:judged] == wire.UNREADABLE))))
    if wrong.size:
        frame = run.first_frame + int(wrong[0])
        if verdicts[wrong[0]] == wire.BAD_VERDICT:
            allowed = "KEEP, DROP, REPLACE or STOP" if output.has_out else "KEEP, DROP or STOP"
            raise SandboxFailed("lie", f"frame {frame}: frame() returned something else than {allowed}")
        raise SandboxFailed("lie", f"frame {frame}: no valid verdict")
    if not output.has_out and (verdicts[:judged] == REPLACE).any():
        raise SandboxFailed("lie", "a frame is replaced by an out that the kernel does not have")
    if run.alone:
        if judged < run.count:
            raise SandboxFailed("lie", "frames that are alone were not judged")
        return verdicts, None
    stops = np.flatnonzero(verdicts[:judged] == STOP)
    if stops.size and int(stops[0]) != judged - 1:
        raise SandboxFailed("lie", "frames were judged after a STOP")
    if not stops.size and judged < run.count:
        raise SandboxFailed("lie", "frames were not judged, and none was STOP")
    return verdicts, run.first_frame + judged - 1 if stops.size else None


def _feedback(reply: wire.RawReply, run: wire.Run, output: Output) -> list[tuple[int, int, float]]:
    if not reply.feedback_count:
        return []
    entries = output.feedback[: reply.feedback_count].copy()
    frames = entries["frame"]
    if frames.min() < run.first_frame or frames.max() >= run.first_frame + reply.index:
        raise SandboxFailed("lie", "feedback about frames that are not in the batch")
    feedback: list[tuple[int, int, float]] = entries.tolist()
    return feedback


def _rows(reply: wire.RawReply, run: wire.Run, output: Output) -> npt.NDArray[np.void] | None:
    if not output.row_limit:
        return None
    rows = output.rows[: reply.row_count].copy()
    frames = rows[FRAME_COLUMN]
    if rows.size and (frames[0] < run.first_frame or frames[-1] >= run.first_frame + reply.index):
        raise SandboxFailed("lie", "rows of frames that are not in the batch")
    if (frames[1:] < frames[:-1]).any():
        raise SandboxFailed("lie", "rows that are not in the order of frames")
    most = output.row_limit // wire.MAX_BATCH
    if rows.size > most and (np.unique(frames, return_counts=True)[1] > most).any():
        raise SandboxFailed("lie", f"more than {most} rows of one frame")
    return rows

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

import numpy as np
import numpy.typing as npt

from kernels import wire
from kernels.process import SandboxFailed

_MAX_DROPPED_FEEDBACK = 1 << 40


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """``verdicts``: DROP or KEEP of each frame, or wire.UNREADABLE where it could not be decoded. ``feedback``: (frame,
    code, value), in the order emitted; a value may be NaN or infinite if the kernel emitted one."""

    verdicts: npt.NDArray[np.uint8]
    feedback: list[tuple[int, int, float]]
    dropped_feedback: int


class Output:
    """The output memory, shared read-write with the process: its size is sealed, its content is never trusted."""

    def __init__(self, layout: wire.OutputLayout) -> None:
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
        # Fresh memory is zero already; touching it would cost a page each for nothing.
        for slot in range(layout.slots):
            self.reset(slot, fresh=True)

    def reset(self, slot: int, *, fresh: bool = False) -> None:
        for spec, array in zip(self._layout.state, self._layout.slot_state(self._memory, slot), strict=True):
            if spec.identity != 0 or not fresh:
                array.fill(spec.identity)

    def collect(self, slot: int) -> dict[str, npt.NDArray[np.generic]]:
        arrays = self._layout.slot_state(self._memory, slot)
        return {spec.name: array.copy() for spec, array in zip(self._layout.state, arrays, strict=True)}

    def close_fd(self) -> None:
        os.close(self.fd)

    def close(self) -> None:
        """Unmap, once nobody uses the arrays any more."""
        del self.verdicts, self.counters, self.feedback
        self._memory.release()
        self._mapping.close()


def validated(reply: wire.RawReply, run: wire.Run, output: Output, *, encoded: bool = False) -> Reply:
    """The reply's values, copied once and checked. Raises SandboxFailed."""
    if reply.sequence != run.sequence:
        raise SandboxFailed("lie", f"an answer to batch {reply.sequence} instead of {run.sequence}")
    if reply.kind == wire.KIND_RAISED and reply.index < run.count:
        raise SandboxFailed("crash", f"frame {run.first_frame + reply.index}: {reply.text}")
    if reply.kind != wire.KIND_DONE or reply.index != run.count:
        raise SandboxFailed("lie", "the answer does not fit the batch")
    if reply.feedback_count > wire.MAX_FEEDBACK or reply.dropped_feedback > _MAX_DROPPED_FEEDBACK:
        raise SandboxFailed("lie", "feedback beyond its limits")
    verdicts = output.verdicts[: run.count].copy()
    wrong = np.flatnonzero((verdicts > 1) & ~(encoded & (verdicts == wire.UNREADABLE)))
    if wrong.size:
        frame = run.first_frame + int(wrong[0])
        if verdicts[wrong[0]] == wire.BAD_VERDICT:
            raise SandboxFailed("lie", f"frame {frame}: frame() returned neither KEEP nor DROP")
        raise SandboxFailed("lie", f"frame {frame}: no valid verdict")
    feedback: list[tuple[int, int, float]] = []
    if reply.feedback_count:
        entries = output.feedback[: reply.feedback_count].copy()
        frames = entries["frame"]
        if frames.min() < run.first_frame or frames.max() >= run.first_frame + run.count:
            raise SandboxFailed("lie", "feedback about frames that are not in the batch")
        feedback = entries.tolist()
    return Reply(verdicts, feedback, reply.dropped_feedback)

"""One chain of kernels over frames of one geometry, in one sandbox, outside of a node.

In: stages, a window, bodies with runs of their frames. Out: ``Found``: what a node's product would hold of them, and how long
it took. What always holds: frames are judged in order, in one state; a sandbox that fails is gone and ends the runner.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from kernels.contract import STOP, Stage
from kernels.offline.body import Body
from kernels.offline.memory import Window
from kernels.sandbox import Batch, Reply, Sandbox, SandboxLimits
from kernels.verdicts import AFTER_STOP, UNREDUCED

FEEDBACK_KEPT_MAX = 1_000_000
STATE_SLOT, TIMING_SLOT = 0, 1
PASSES_MIN, PASSES_MAX = 3, 10_000
LIMITS = SandboxLimits(nice=0)
"""Nobody receives here: nothing to give way to."""

Arrays = dict[str, npt.NDArray[np.generic]]


@dataclasses.dataclass(slots=True)
class Found:
    """``verdicts``: one byte a frame as in a product, AFTER_STOP behind a STOP, UNREDUCED where a frame could not be decoded.
    ``feedback``: (frame, code, value), as emitted, at most FEEDBACK_KEPT_MAX of ``feedback_events``. ``rows`` None: the
    kernel has none."""

    verdicts: npt.NDArray[np.uint8]
    state: Arrays
    rows: npt.NDArray[np.void] | None
    dropped_rows: int
    feedback: list[tuple[int, int, float]]
    feedback_events: int
    dropped_feedback: int
    stopped_at: int | None


class Runner:
    """Made by ``start``; ``close`` it. ``compile_s``: from the fork to the first batch; ``cautions``: lines of the kernel that
    are probably not meant so, as ``file:line: text``."""

    def __init__(self, sandbox: Sandbox, window: Window, compile_s: float) -> None:
        self.compile_s = compile_s
        self.cautions = sandbox.cautions
        self._sandbox = sandbox
        self._window = window

    @classmethod
    async def start(
        cls,
        zygote_socket: str,
        stages: Sequence[Stage],
        dtype: str,
        shape: tuple[int, ...],
        window: Window,
        limits: SandboxLimits = LIMITS,
    ) -> Runner:
        """Raises KernelRefused, SandboxFailed, or ValueError for frames that no kernel can be compiled for."""
        began_s = time.perf_counter()
        sandbox = await Sandbox.start(
            zygote_socket,
            stages,
            dtype=dtype,
            shape=shape,
            region_fds=[window.fd],
            region_bytes=window.size_bytes,
            slots=2,
            limits=limits,
        )
        return cls(sandbox, window, time.perf_counter() - began_s)

    async def close(self) -> None:
        await self._sandbox.close()

    async def judge(self, body: Body, first: int, stop: int, *, alone: bool = False, fresh: bool = True) -> Found:
        """Frames ``first``, … below ``stop``. ``alone``: they are objects of their own (wire.Run). ``fresh``: in a new state,
        else in that of the call before. Raises SandboxFailed; ValueError, OSError as ``Window.load``."""
        if fresh:
            self._sandbox.reset(STATE_SLOT)
        verdicts = np.full(max(0, stop - first), UNREDUCED, np.uint8)
        replies: list[Reply] = []
        stopped_at: int | None = None
        at = first
        while at < stop and stopped_at is None:
            batches, at = self._window.load(body, at, stop, slot=STATE_SLOT)
            for batch in batches:
                reply = await self._sandbox.run(dataclasses.replace(batch, alone=alone))
                replies.append(reply)
                start = batch.first_frame - first
                verdicts[start : start + batch.count] = np.where(reply.verdicts <= STOP, reply.verdicts, UNREDUCED)
                stopped_at = reply.stopped_at
                if stopped_at is not None:
                    verdicts[stopped_at + 1 - first :] = AFTER_STOP
                    break
        rows = [reply.rows for reply in replies if reply.rows is not None]
        feedback = [event for reply in replies for event in reply.feedback]
        return Found(
            verdicts=verdicts,
            state=self._sandbox.collect(STATE_SLOT),
            rows=np.concatenate(rows) if rows else None,
            dropped_rows=sum(reply.dropped_rows for reply in replies),
            feedback=feedback[:FEEDBACK_KEPT_MAX],
            feedback_events=len(feedback),
            dropped_feedback=sum(reply.dropped_feedback for reply in replies),
            stopped_at=stopped_at,
        )

    async def finish(self, state: Mapping[str, npt.NDArray[np.generic]]) -> Arrays:
        """See Sandbox.finish."""
        return await self._sandbox.finish(state)

    async def rate(self, body: Body, stop: int, seconds: float) -> tuple[float, int, int]:
        """Judge the first frames again and again: (bytes of frames a second, frames of one pass, passes).

        The median pass counts, with everything a batch costs on a node: request, decoding, kernel, check of the answer.
        """
        batches, frames = self._window.load(body, 0, stop, slot=TIMING_SLOT)
        passes: list[float] = []
        end_s = time.perf_counter() + seconds
        while len(passes) < PASSES_MIN or (time.perf_counter() < end_s and len(passes) < PASSES_MAX):
            passes.append(await self._pass(batches))
        return frames * body.frame_bytes / float(np.median(passes)), frames, len(passes)

    async def _pass(self, batches: Sequence[Batch]) -> float:
        self._sandbox.reset(TIMING_SLOT)
        began_s = time.perf_counter()
        for batch in batches:
            await self._sandbox.run(batch)
        return time.perf_counter() - began_s

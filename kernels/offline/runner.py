"""One chain of kernels over frames of one geometry, in one sandbox, outside of a node.

In: stages, a window, bodies with runs of their frames. Out: ``Found``: what a node's product would hold of them, and how long
it took. What always holds: frames are judged in order, in one state; a sandbox that fails is gone and ends the runner.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from kernels.contract import STOP, Stage
from kernels.offline.body import Frames
from kernels.offline.memory import Window
from kernels.rows import Rows
from kernels.sandbox import Batch, Sandbox, SandboxLimits
from kernels.verdicts import AFTER_STOP, UNREDUCED

FEEDBACK_KEPT_MAX = 1_000_000
STATE_SLOT, TIMING_SLOT = 0, 1
SHARED_SLOT = TIMING_SLOT
"""State of many objects of one frame: whoever uses it measures no rate."""
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
            region_bytes=window.region_bytes,
            slots=2,
            limits=limits,
        )
        return cls(sandbox, window, time.perf_counter() - began_s)

    async def close(self) -> None:
        await self._sandbox.close()

    async def judge(self, body: Frames, first: int, stop: int, *, alone: bool = False, fresh: bool = True) -> Found:
        """Frames ``first``, … below ``stop``. ``alone``: they are objects of their own (wire.Run). ``fresh``: in a new state,
        else in that of the call before. Raises SandboxFailed; ValueError, OSError as ``Window.load``."""
        if fresh:
            self._sandbox.reset(STATE_SLOT)
        found = _Findings(self._sandbox, first, stop)
        at = first
        while at < stop and found.stopped_at is None:
            batches, at = self._window.load(body, at, stop, slot=STATE_SLOT)
            await found.judge(batches, alone=alone)
        return found.all(self.collect())

    async def judge_far(
        self, body: Frames, first: int, stop: int, *, alone: bool = False, fresh: bool = True, shared: bool = False
    ) -> Found:
        """As ``judge`` for a body whose bytes come over a network, read in a thread, the next while these are judged: the
        window needs two bays. ``shared``: in the other state, and without taking it out: ``collect`` it in the end."""
        slot = SHARED_SLOT if shared else STATE_SLOT
        if fresh:
            self._sandbox.reset(slot)
        found = _Findings(self._sandbox, first, stop)
        at, bay = first, 0
        load = self._window.load
        ahead = (
            asyncio.ensure_future(asyncio.to_thread(load, body, at, stop, slot=slot, bay=bay)) if at < stop else None
        )
        try:
            while ahead is not None and found.stopped_at is None:
                batches, at = await ahead
                bay = 1 - bay
                ahead = None
                if at < stop:
                    ahead = asyncio.ensure_future(asyncio.to_thread(load, body, at, stop, slot=slot, bay=bay))
                await found.judge(batches, alone=alone)
        finally:
            if ahead is not None:
                # A thread that writes into the window cannot be called back.
                with contextlib.suppress(Exception):
                    await ahead
        return found.all({} if shared else self.collect())

    def collect(self, *, shared: bool = False) -> Arrays:
        """Copies of the state arrays."""
        return self._sandbox.collect(SHARED_SLOT if shared else STATE_SLOT)

    async def finish(self, state: Mapping[str, npt.NDArray[np.generic]]) -> Arrays:
        """See Sandbox.finish."""
        return await self._sandbox.finish(state)

    async def rate(self, body: Frames, stop: int, seconds: float) -> tuple[float, int, int]:
        """Judge the first frames again and again: (bytes of frames a second of a core, frames of one pass, passes).

        The median pass counts, by the sandbox's CPU time, as a node counts it: other work on the machine costs nothing.
        Raises ValueError where the machine does not count it.
        """
        batches, frames = await asyncio.to_thread(self._window.load, body, 0, stop, slot=TIMING_SLOT)
        passes: list[float] = []
        end_s = time.perf_counter() + seconds
        while len(passes) < PASSES_MIN or (time.perf_counter() < end_s and len(passes) < PASSES_MAX):
            passes.append(await self._pass(batches))
        took_s = float(np.median(passes))
        if took_s <= 0.0:
            raise ValueError("the machine does not count the CPU time of a sandbox")
        return frames * body.frame_bytes / took_s, frames, len(passes)

    async def _pass(self, batches: Sequence[Batch]) -> float:
        self._sandbox.reset(TIMING_SLOT)
        began_s = self._sandbox.cpu_s()
        for batch in batches:
            await self._sandbox.run(batch)
        return self._sandbox.cpu_s() - began_s


class _Findings:
    """What replies say, one after the other. What is kept of them is bounded as in a node's product."""

    def __init__(self, sandbox: Sandbox, first: int, stop: int) -> None:
        self.stopped_at: int | None = None
        self._sandbox = sandbox
        self._first = first
        self._verdicts = np.full(max(0, stop - first), UNREDUCED, np.uint8)
        self._rows: Rows | None = None
        self._dropped_rows = 0
        self._feedback: list[tuple[int, int, float]] = []
        self._events = 0
        self._dropped_feedback = 0

    async def judge(self, batches: Sequence[Batch], *, alone: bool) -> None:
        for batch in batches:
            reply = await self._sandbox.run(dataclasses.replace(batch, alone=alone))
            start = batch.first_frame - self._first
            verdicts = reply.verdicts
            self._verdicts[start : start + batch.count] = np.where(verdicts <= STOP, verdicts, UNREDUCED)
            if reply.rows is not None:
                self._rows = self._rows or Rows(reply.rows.dtype)
                self._rows.add(batch.first_frame, reply.rows)
            self._dropped_rows += reply.dropped_rows
            self._events += len(reply.feedback)
            self._feedback += reply.feedback[: FEEDBACK_KEPT_MAX - len(self._feedback)]
            self._dropped_feedback += reply.dropped_feedback
            self.stopped_at = reply.stopped_at
            if self.stopped_at is not None:
                self._verdicts[self.stopped_at + 1 - self._first :] = AFTER_STOP
                return

    def all(self, state: Arrays) -> Found:
        return Found(
            verdicts=self._verdicts,
            state=state,
            rows=None if self._rows is None else self._rows.table(),
            dropped_rows=self._dropped_rows + (0 if self._rows is None else self._rows.left_out),
            feedback=self._feedback,
            feedback_events=self._events,
            dropped_feedback=self._dropped_feedback,
            stopped_at=self.stopped_at,
        )

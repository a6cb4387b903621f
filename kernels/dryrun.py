"""A kernel's pace before it has seen a frame: judge noise in a sandbox of its own, and look at the CPU time.

In: an attachment, layouts of frames to try. Out: the pace, told to ``Paces``; or why there is none. Counts are Poisson with a
mean of MEAN_COUNT, as of a weak diffraction pattern: branches on a threshold go both ways. What always holds: one dry run at a
time in a worker, at the lowest priority; its process is gone when this returns; its failure is no strike, and it is not tried
again until the kernel is submitted again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import math
from collections.abc import Sequence

import numpy as np

from ingest.ports import KernelRefused
from ingest.records import FrameGeometry
from kernels.attach import Attachment, misfit, stages_of
from kernels.offline.memory import Window
from kernels.offline.runner import Runner
from kernels.pace import Paces, frames_text, sources_of
from kernels.sandbox import DEFAULT_LAYOUTS, SandboxFailed, SandboxLimits
from kernels.wire import MAX_BATCH

log = logging.getLogger("hiss.kernels")

DRY_S = 0.3
BATCH_BYTES = 4 << 20
FRAME_BYTES_MAX = 64 << 20
"""Of a frame that is made up; larger ones are measured when they come."""
BLOCK_PIXELS = 1 << 20
"""Noise that is made; it is repeated."""
MEAN_COUNT = 1.0
STOCK_SHAPE = (512, 1024)
"""Of frames where nobody has said what they will be like."""
FAILURES_KEPT_MAX = 4096
_LOWEST = 19


class DryRuns:
    """Of one worker."""

    def __init__(self, zygote_socket: str, paces: Paces, limits: SandboxLimits) -> None:
        self._zygote_socket = zygote_socket
        self._paces = paces
        self._limits = dataclasses.replace(limits, nice=_LOWEST)
        self._turn = asyncio.Lock()
        self._failed: dict[tuple[str, str], str] = {}
        """(bucket, sources) -> why there was no pace."""

    def forget(self, bucket: str, attachment: Attachment) -> None:
        """The kernel is submitted: what its last dry run said is over."""
        self._failed.pop((bucket, sources_of(attachment)), None)

    def failure(self, bucket: str, attachment: Attachment) -> str:
        """Why its dry run gave no pace; empty where it did, or where none was made."""
        return self._failed.get((bucket, sources_of(attachment)), "")

    async def measure(self, bucket: str, attachment: Attachment, seen: Sequence[FrameGeometry] = ()) -> None:
        """Know the kernel's pace, if it can be known before frames come: on the layout that it declares, else on the first of
        ``seen`` that its arrays fit, else on frames of STOCK_SHAPE."""
        async with self._turn:
            if attachment.owed or self.failure(bucket, attachment) or self._paces.attached(bucket, attachment):
                return
            try:
                await self._try(bucket, attachment, seen)
            except (SandboxFailed, ValueError, MemoryError) as failure:
                log.info("kernel %s in bucket %s: no dry run: %s", attachment.name, bucket, failure)
                if isinstance(failure, SandboxFailed) and failure.kind != "unavailable":
                    self._failed[bucket, sources_of(attachment)] = str(failure)
                    while len(self._failed) > FAILURES_KEPT_MAX:
                        del self._failed[next(iter(self._failed))]

    async def _try(self, bucket: str, attachment: Attachment, seen: Sequence[FrameGeometry]) -> None:
        for layout in _layouts(attachment, seen):
            try:
                bytes_per_s = await self._run(attachment, layout)
            except KernelRefused:
                continue  # compiles for other frames
            self._paces.tried(bucket, attachment, frames_text(layout.dtype, layout.shape), bytes_per_s)
            return

    async def _run(self, attachment: Attachment, layout: FrameGeometry) -> float:
        """Bytes a second of one core."""
        if layout.frame_bytes > FRAME_BYTES_MAX:
            raise ValueError(f"a frame of {layout.frame_bytes} bytes is too large to be made up")
        noise = _Noise(layout, await asyncio.to_thread(_block, layout.dtype))
        count = max(1, min(MAX_BATCH, BATCH_BYTES // layout.frame_bytes))
        window = Window(count * layout.frame_bytes)
        try:
            runner = await Runner.start(
                self._zygote_socket, stages_of(attachment), layout.dtype, layout.shape, window, self._limits
            )
            try:
                bytes_per_s, _, _ = await runner.rate(noise, count, DRY_S)
            finally:
                await runner.close()
        finally:
            window.close()
        return bytes_per_s


@dataclasses.dataclass(frozen=True, slots=True)
class _Noise:
    """Frames of noise without end: the same block again and again."""

    layout: FrameGeometry
    block: bytes

    @property
    def frame_bytes(self) -> int:
        return self.layout.frame_bytes

    def read_into(self, view: memoryview, offset: int) -> None:
        for start in range(0, len(view), len(self.block)):
            part = view[start : start + len(self.block)]
            part[:] = self.block[: len(part)]


@functools.lru_cache
def _block(dtype: str) -> bytes:
    return np.random.default_rng(1).poisson(MEAN_COUNT, BLOCK_PIXELS).astype(dtype).tobytes()


def _layouts(attachment: Attachment, seen: Sequence[FrameGeometry]) -> list[FrameGeometry]:
    if attachment.frames is not None:
        return [_packed(*attachment.frames)]
    fitting = [one for one in seen if not misfit(attachment, one)]
    if fitting:
        return [_packed(fitting[0].dtype, fitting[0].shape)]
    stock = [_packed(dtype, STOCK_SHAPE) for dtype, ndim in DEFAULT_LAYOUTS if ndim == len(STOCK_SHAPE)]
    return [one for one in stock if not misfit(attachment, one)]


def _packed(dtype: str, shape: tuple[int, ...]) -> FrameGeometry:
    """Frames that lie back to back from the first byte on."""
    return FrameGeometry(np.dtype(dtype).name, shape, 0, np.dtype(dtype).itemsize * math.prod(shape))

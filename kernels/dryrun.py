"""A kernel's pace before it has seen a frame: judge noise in a sandbox of its own, and look at the CPU time.

In: an attachment, layouts of frames to try. Out: the pace, told to ``Paces``. Counts are Poisson with a mean of MEAN_COUNT, as
of a weak diffraction pattern: branches on a threshold go both ways. What always holds: one dry run at a time in a worker, at the
lowest priority, for about DRY_S of a core; its process is gone when this returns, and its failure is no strike.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
from collections.abc import Sequence

import numpy as np

from ingest.ports import KernelRefused
from ingest.records import FrameGeometry
from kernels.attach import Attachment, misfit, stages_of
from kernels.offline.memory import Window
from kernels.pace import Paces, frames_text, sources_of
from kernels.sandbox import DEFAULT_LAYOUTS, Batch, Sandbox, SandboxFailed, SandboxLimits
from kernels.wire import MAX_BATCH

log = logging.getLogger("hiss.kernels")

DRY_S = 0.3
BATCHES_MAX = 10_000
BATCH_BYTES = 8 << 20
FRAME_BYTES_MAX = 64 << 20
"""Of a frame that is made up; larger ones are measured when they come."""
BLOCK_PIXELS = 1 << 20
"""Noise that is made; it is repeated."""
FAILURES_KEPT_MAX = 4096
STOCK_SHAPE = (512, 1024)
"""Of frames where nobody has said what they will be like."""
MEAN_COUNT = 1.0


_LOWEST = 19


class DryRuns:
    """Of one worker."""

    def __init__(self, zygote_socket: str, paces: Paces, limits: SandboxLimits) -> None:
        self._zygote_socket = zygote_socket
        self._paces = paces
        self._limits = dataclasses.replace(limits, nice=_LOWEST)
        self._turn = asyncio.Lock()
        self._failed: dict[tuple[str, str], str] = {}
        """(bucket, sources) -> why there was no pace: not tried again until the kernel is submitted again."""

    def forget(self, bucket: str, attachment: Attachment) -> None:
        """The kernel is submitted: what its last dry run said is over."""
        self._failed.pop((bucket, sources_of(attachment)), None)

    def failure(self, bucket: str, attachment: Attachment) -> str:
        """Why its dry run gave no pace; empty where it did, or where none was made."""
        return self._failed.get((bucket, sources_of(attachment)), "")

    async def measure(self, bucket: str, attachment: Attachment, seen: Sequence[FrameGeometry] = ()) -> None:
        """Know the kernel's pace, if it can be known before frames come: on the layout that it declares, else on the first of
        ``seen`` that its arrays fit, else on frames of STOCK_SHAPE."""
        if attachment.owed or self.failure(bucket, attachment):
            return
        async with self._turn:
            for dtype, shape in _layouts(attachment, seen):
                if self._paces.attached(bucket, attachment):
                    return
                try:
                    bytes_per_s = await self._run(attachment, dtype, shape)
                except KernelRefused:
                    continue  # compiles for other frames
                except SandboxFailed as failure:
                    log.info("kernel %s in bucket %s: no dry run: %s", attachment.name, bucket, failure)
                    if failure.kind != "unavailable":
                        self._fail(bucket, attachment, str(failure))
                    return
                except (ValueError, MemoryError) as failure:
                    log.info("kernel %s in bucket %s: no dry run: %s", attachment.name, bucket, failure)
                    return
                self._paces.tried(bucket, attachment, frames_text(dtype, shape), bytes_per_s)

    def _fail(self, bucket: str, attachment: Attachment, reason: str) -> None:
        self._failed[bucket, sources_of(attachment)] = reason
        while len(self._failed) > FAILURES_KEPT_MAX:
            del self._failed[next(iter(self._failed))]

    async def _run(self, attachment: Attachment, dtype: str, shape: tuple[int, ...]) -> float:
        """Bytes a second of one core."""
        frame_bytes = np.dtype(dtype).itemsize * math.prod(shape)
        if frame_bytes > FRAME_BYTES_MAX:
            raise ValueError(f"a frame of {frame_bytes} bytes is too large to be made up")
        count = max(1, min(MAX_BATCH, BATCH_BYTES // frame_bytes))
        window = await asyncio.to_thread(_noise, dtype, count * math.prod(shape))
        try:
            sandbox = await Sandbox.start(
                self._zygote_socket,
                stages_of(attachment),
                dtype=dtype,
                shape=shape,
                region_fds=[window.fd],
                region_bytes=window.region_bytes,
                slots=1,
                limits=self._limits,
            )
            try:
                return await _paced(sandbox, frame_bytes, count)
            finally:
                await sandbox.close()
        finally:
            window.close()


def _layouts(attachment: Attachment, seen: Sequence[FrameGeometry]) -> list[tuple[str, tuple[int, ...]]]:
    if attachment.frames is not None:
        return [attachment.frames]
    found = [(np.dtype(one.dtype).name, one.shape) for one in seen if not misfit(attachment, one)]
    if found:
        return found[:1]
    stock = [FrameGeometry(np.dtype(dtype).name, STOCK_SHAPE, 0, 0) for dtype, ndim in DEFAULT_LAYOUTS if ndim == 2]
    return [(one.dtype, one.shape) for one in stock if not misfit(attachment, one)]


def _noise(dtype: str, pixels: int) -> Window:
    window = Window(pixels * np.dtype(dtype).itemsize)
    with window.view(pixels * np.dtype(dtype).itemsize) as view:
        target = np.frombuffer(view, dtype)
        block = np.random.default_rng(1).poisson(MEAN_COUNT, min(pixels, BLOCK_PIXELS)).astype(dtype)
        for start in range(0, pixels, BLOCK_PIXELS):
            target[start : start + BLOCK_PIXELS] = block[: pixels - start]
    return window


async def _paced(sandbox: Sandbox, frame_bytes: int, count: int) -> float:
    """The first batch faults memory in, and is not counted."""
    began_s = took_s = judged = 0.0
    for number in range(BATCHES_MAX):
        await sandbox.run(Batch(0, 0, frame_bytes, number * count, count, 0))
        if not number:
            began_s = sandbox.cpu_s()
            continue
        judged += frame_bytes * count
        took_s = sandbox.cpu_s() - began_s
        if took_s >= DRY_S:
            break
    if took_s <= 0.0:
        raise ValueError("the machine does not count the CPU time of a sandbox")
    return judged / took_s

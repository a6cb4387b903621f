"""A kernel tried on frames of a file: what ``hiss kernel check`` does between reading its arguments and printing.

In: the chain with its parameters and arrays, a file of frames. Out: ``Trial``. The kernel runs in the sandbox of a node, from
a fork server that lives as long as the command; the frames are read and decoded as a node would.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kernels.contract import Stage
from kernels.offline.body import Body
from kernels.offline.memory import Window, window_bytes
from kernels.offline.runner import Found, Runner

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

LINE_BYTES_PER_S = 5e9
"""40 Gbps."""


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """``result``: the arrays after finish(); None where the kernel has none."""

    frames: int
    found: Found
    result: dict[str, npt.NDArray[np.generic]] | None
    compile_s: float
    cautions: tuple[str, ...]
    bytes_per_s: float
    timed_frames: int
    passes: int


async def run(zygote_socket: str, stages: Sequence[Stage], body: Body, frames: int, seconds: float) -> Trial:
    """Over the first ``frames``. Raises KernelRefused, SandboxFailed, ValueError, OSError."""
    window = Window(window_bytes(body, frames))
    try:
        runner = await Runner.start(zygote_socket, stages, body.dtype, body.shape, window)
        try:
            found = await runner.judge(body, 0, frames)
            result = await runner.finish(found.state) if stages[-1].kernel.has_finish else None
            rate, timed, passes = await runner.rate(body, _timed(found, frames), seconds)
        finally:
            await runner.close()
    finally:
        window.close()
    return Trial(frames, found, result, runner.compile_s, runner.cautions, rate, timed, passes)


def _timed(found: Found, frames: int) -> int:
    """Frames behind a STOP cost nothing: they do not count."""
    return frames if found.stopped_at is None else found.stopped_at + 1

"""A kernel tried on frames of a file: what ``hiss kernel check`` does between reading its arguments and printing.

In: the chain with its parameters and arrays, a file of frames. Out: ``Trial``. The kernel runs in the sandbox of a node, from
a fork server that lives as long as the command; the frames are read and decoded as a node would.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kernels.contract import Stage
from kernels.gate import admit
from kernels.layout.index import FrameIndex
from kernels.offline.body import Body
from kernels.offline.memory import Window, window_bytes
from kernels.offline.runner import Found, Runner

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

LINE_BYTES_PER_S = 5e9
"""40 Gbps."""
_SHARE_MIN = 0.02
_LOOKS_AT_NOTHING = b"""
def frame(frame, params, state, index, out, feedback):
    return KEEP
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """``result``: the arrays after finish(); None where the kernel has none."""

    frames: int
    found: Found
    result: dict[str, npt.NDArray[np.generic]] | None
    compile_s: float
    cautions: tuple[str, ...]
    bytes_per_s: float
    """Of frames as the kernel sees them, by everything it takes: decoding, kernel, the round trip to the sandbox."""
    timed_frames: int
    passes: int
    decoding_bytes_per_s: float | None = None
    """The same with a kernel that looks at nothing; None for frames that are not encoded."""

    @property
    def kernel_bytes_per_s(self) -> float | None:
        """What is left of the time is the kernel's. None where that is too little to tell."""
        if self.decoding_bytes_per_s is None:
            return self.bytes_per_s
        seconds = 1 / self.bytes_per_s - 1 / self.decoding_bytes_per_s
        return 1 / seconds if seconds > _SHARE_MIN / self.bytes_per_s else None


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
        decoding = await _decoding(zygote_socket, body, window, timed, seconds) if _is_encoded(body) else None
    finally:
        window.close()
    return Trial(frames, found, result, runner.compile_s, runner.cautions, rate, timed, passes, decoding)


def _is_encoded(body: Body) -> bool:
    return isinstance(body.layout, FrameIndex) and bool(body.layout.encoding.filters)


async def _decoding(zygote_socket: str, body: Body, window: Window, frames: int, seconds: float) -> float:
    """Bytes of decoded frames a second."""
    stages = [Stage(admit("decoding", _LOOKS_AT_NOTHING))]
    runner = await Runner.start(zygote_socket, stages, body.dtype, body.shape, window)
    try:
        rate, _, _ = await runner.rate(body, frames, seconds)
    finally:
        await runner.close()
    return rate


def _timed(found: Found, frames: int) -> int:
    """Frames behind a STOP cost nothing: they do not count."""
    return frames if found.stopped_at is None else found.stopped_at + 1

"""The gateway's side of one sandboxed kernel process: start it, give it batches, take results, be sure that it is gone.

In: an admitted kernel, the layout of frames, descriptors of the regions the frames lie in. Out: verdicts and feedback for
each batch, and copies of the state arrays. What always holds: nothing the process writes is trusted (values are copied
out once, then validated); a process that hangs, dies or lies is killed and costs one ``SandboxFailed``; after ``close``
has returned, or ``SandboxFailed`` was raised, the process has ended and maps no region any more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from kernels.contract import Kernel


@dataclasses.dataclass(frozen=True, slots=True)
class SandboxLimits:
    """Times are wall clock: a process's CPU clock counts its whole life."""

    memory_bytes: int = 512 << 20
    """Address space beyond what the process has mapped when it is locked down."""
    compile_timeout_s: float = 60.0
    batch_timeout_s: float = 2.0
    frame_timeout_s: float = 0.1
    """A batch may take ``batch_timeout_s + count * frame_timeout_s``."""
    nice: int = 5
    batch_scheduling: bool = True
    """SCHED_BATCH: the scheduler then never lets a kernel pre-empt the receivers on wake-up."""
    populate: bool = True
    """Map regions with MAP_POPULATE: costs about 80 ms per GiB at start, saves a third on the first pass."""


class SandboxFailed(Exception):
    """``kind``: crash | timeout | lie (the process was killed and is gone), or unavailable (it never started)."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """``count`` frames (at most wire.MAX_BATCH) that lie contiguous at byte ``offset`` of a region."""

    region: int
    offset: int
    frame_bytes: int
    first_frame: int
    count: int
    slot: int


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """``verdicts``: DROP or KEEP of each frame. ``feedback``: (frame, code, value), in the order emitted; a value may be
    NaN or infinite if the kernel emitted one."""

    verdicts: npt.NDArray[np.uint8]
    feedback: list[tuple[int, int, float]]
    dropped_feedback: int


class Sandbox:
    """One sandboxed process. Belongs to one event loop; ``run`` calls queue up."""

    @classmethod
    async def start(
        cls,
        zygote_socket: str,
        kernel: Kernel,
        params: Mapping[str, int | float],
        *,
        dtype: str,
        shape: tuple[int, ...],
        region_fds: Sequence[int],
        region_bytes: int,
        slots: int = 8,
        limits: SandboxLimits = SandboxLimits(),
    ) -> Sandbox: ...

    @property
    def alive(self) -> bool: ...

    @property
    def pid(self) -> int: ...

    async def run(self, batch: Batch) -> Reply: ...

    def reset(self, slot: int) -> None: ...

    def collect(self, slot: int) -> dict[str, npt.NDArray[np.generic]]: ...

    async def close(self) -> None: ...

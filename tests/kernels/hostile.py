"""Starting sandboxes on sources that no gate has seen, so that arbitrary Python and machine code run in them.

In: a source. Out: a sandbox, judged by hand. Always holds afterwards: the input is untouched, no process or descriptor is
left, and the zygote still serves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from kernels.contract import ArraySpec, Kernel, OutSpec, RowsSpec, Stage, StateSpec
from kernels.sandbox import Batch, Sandbox, SandboxLimits
from tests.kernels.sandboxes import children_of, zygote_pid

HEAD = "def frame(frame, params, state, index, out, feedback):\n"
HARMLESS = HEAD + "    return 1\n"
LIMITS = SandboxLimits(compile_timeout_s=20.0, batch_timeout_s=5.0, frame_timeout_s=0.0, populate=False)
SHORT = SandboxLimits(compile_timeout_s=0.5, batch_timeout_s=0.1, frame_timeout_s=0.0, populate=False)
FRAME = np.full((8, 8), 3, "<u2")

WHOLE: dict[str, Any] = {
    "arrays": (ArraySpec("mask", "uint8", (8,)),),
    "out": OutSpec("uint8", (4,)),
    "rows": RowsSpec((("x", "int64"),), 2),
    "has_finish": True,
}
"""Declares everything that a kernel may have."""
FINISH = "\n\ndef finish(state, params):\n    state.a[1] = 5\n"

Launch = Callable[..., Awaitable[Sandbox]]


@contextlib.asynccontextmanager
async def launching(zygote_socket: str, region: Any, until: Callable[..., Any]) -> AsyncIterator[Launch]:
    before = len(os.listdir("/proc/self/fd"))
    region.maps[0][: FRAME.nbytes * 8] = np.broadcast_to(FRAME, (8, 8, 8)).tobytes()

    async def begin(
        source: str,
        limits: SandboxLimits = LIMITS,
        path: str = zygote_socket,
        region_fds: Sequence[int] = (),
        *,
        whole: bool = False,
    ) -> Sandbox:
        kernel = Kernel(
            name="hostile",
            source=source,
            sha256=hashlib.sha256(source.encode()).hexdigest(),
            params=(),
            state=(StateSpec("a", "int64", (4,), "sum"),),
        )
        if whole:
            kernel = dataclasses.replace(kernel, **WHOLE)
        return await Sandbox.start(
            path,
            [Stage(kernel, arrays={"mask": np.ones(8, np.uint8)} if whole else {})],
            dtype="<u2",
            shape=(8, 8),
            region_fds=region_fds or region.region_fds,
            region_bytes=region.region_bytes,
            slots=2,
            limits=limits,
        )

    yield begin
    assert bytes(region.maps[0][: FRAME.nbytes * 8]) == np.broadcast_to(FRAME, (8, 8, 8)).tobytes()
    await until(lambda: not children_of(zygote_pid(zygote_socket)))
    assert len(os.listdir("/proc/self/fd")) <= before


async def judge(sandbox: Sandbox, count: int = 2) -> Any:
    return await sandbox.run(Batch(0, 0, FRAME.nbytes, 0, count, 0))

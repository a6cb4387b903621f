"""Starting real sandboxes in tests: a kernel's source in, a sandbox on one sealed region out; nothing is left afterwards."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from kernels.contract import Stage
from kernels.gate import admit
from kernels.sandbox import Batch, Sandbox, SandboxLimits

HEAD = "def frame(frame, params, state, index, out, feedback):\n"
LIMITS = SandboxLimits(batch_timeout_s=10.0, populate=False)


def stage(source: str, params: Any = (), arrays: Any = (), name: str = "k") -> Stage:
    return Stage(admit(name, source.encode()), dict(params), dict(arrays))


Start = Callable[..., Awaitable[Sandbox]]


def zygote_pid(path: str) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.connect(path)
        return int(struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextlib.asynccontextmanager
async def starting(zygote_socket: str, region: Any, until: Callable[..., Any]) -> AsyncIterator[Start]:
    """Start sandboxes; afterwards no process and no descriptor of theirs is left, here or in the zygote."""
    before = len(os.listdir("/proc/self/fd"))
    sandboxes: list[Sandbox] = []

    async def begin(source: str, dtype: str = "<u2", shape: tuple[int, ...] = (8, 8), **options: Any) -> Sandbox:
        sandbox = await Sandbox.start(
            options.pop("zygote", zygote_socket),
            [*options.pop("before", ()), stage(source, options.pop("params", {}), options.pop("arrays", {}))],
            dtype=dtype,
            shape=shape,
            region_fds=region.region_fds,
            region_bytes=region.region_bytes,
            slots=options.pop("slots", 2),
            limits=options.pop("limits", LIMITS),
            out_frames=options.pop("out_frames", 0),
        )
        assert not options
        sandboxes.append(sandbox)
        return sandbox

    yield begin
    for sandbox in sandboxes:
        await sandbox.close()
        assert not sandbox.alive
    await until(lambda: not children_of(zygote_pid(zygote_socket)))
    assert len(os.listdir("/proc/self/fd")) <= before


def place(region: Any, frames: np.ndarray, offset: int = 0) -> None:
    region.maps[0][offset : offset + frames.nbytes] = frames.tobytes()


def batch(frames: np.ndarray, slot: int = 0, first_frame: int = 0, offset: int = 0) -> Batch:
    return Batch(0, offset, frames[0].nbytes, first_frame, len(frames), slot)

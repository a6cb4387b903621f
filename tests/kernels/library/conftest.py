"""Runs kernels of the library as a node does: through the gate, in a sandbox, in batches shared by two partial states.

``judge`` gives a kernel frames and what it declares; back comes all that it made, merged. Kernels that are not ORDERED are
always judged in two slots by turns, so that every test is also one of merging.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernels import library
from kernels.contract import Stage, merge
from kernels.gate import admit
from kernels.sandbox import Batch, Sandbox, SandboxLimits
from kernels.wire import MAX_BATCH

LIMITS = SandboxLimits(batch_timeout_s=30.0, finish_timeout_s=30.0, compile_timeout_s=100.0, populate=False)
OUT_FRAMES = 4


@dataclasses.dataclass
class Judged:
    verdicts: np.ndarray
    state: dict[str, np.ndarray]
    """Merged, as finish() left it where the kernel has one."""
    feedback: list[tuple[int, int, float]]
    rows: np.ndarray | None
    out: np.ndarray | None
    dropped_rows: int
    stopped_at: int | None


Judge = Callable[..., Awaitable[Judged]]


def stage(
    name: str,
    params: Mapping[str, int | float] | None = None,
    arrays: Mapping[str, np.ndarray] | None = None,
    constants: Mapping[str, int | float] | None = None,
) -> Stage:
    return Stage(admit(name, library.source(name, **(constants or {}))), params or {}, arrays or {})


@pytest.fixture
def make_stage() -> Callable[..., Stage]:
    return stage


@pytest.fixture
async def judge(zygote_socket: str, region: Any) -> AsyncIterator[Judge]:
    sandboxes: list[Sandbox] = []

    async def run(name: str, frames: np.ndarray, *, before: tuple[Stage, ...] = (), **given: Any) -> Judged:
        frames = np.ascontiguousarray(frames)
        last = stage(name, **given)
        kernel = last.kernel
        sandbox = await Sandbox.start(
            zygote_socket,
            (*before, last),
            dtype=frames.dtype.str,
            shape=frames.shape[1:],
            region_fds=region.region_fds,
            region_bytes=region.region_bytes,
            slots=2,
            limits=LIMITS,
            out_frames=OUT_FRAMES if kernel.out else 0,
        )
        sandboxes.append(sandbox)
        size = min(
            MAX_BATCH, region.region_bytes // frames[0].nbytes, OUT_FRAMES if kernel.out else max(1, len(frames) // 3)
        )
        replies = []
        for number, start in enumerate(range(0, len(frames), size)):
            part = frames[start : start + size]
            region.maps[0][: part.nbytes] = part.tobytes()
            slot = 0 if kernel.ordered else number % 2
            replies.append(
                await sandbox.run(
                    Batch(0, 0, part[0].nbytes, start, len(part), slot, collect_out=kernel.out is not None)
                )
            )
            if replies[-1].stopped_at is not None:
                break
        state, other = sandbox.collect(0), sandbox.collect(1)
        for spec in kernel.state:
            merge(spec, state[spec.name], other[spec.name])
        if kernel.has_finish:
            state = await sandbox.finish(state)
        return Judged(
            np.concatenate([reply.verdicts for reply in replies]),
            state,
            [event for reply in replies for event in reply.feedback],
            np.concatenate([reply.rows for reply in replies]) if kernel.rows else None,
            np.concatenate([reply.out for reply in replies]) if kernel.out else None,
            sum(reply.dropped_rows for reply in replies),
            replies[-1].stopped_at,
        )

    yield run
    for sandbox in sandboxes:
        await sandbox.close()


def _data(name: str) -> Path:
    path = Path(os.environ.get("HISS_DATA", Path(__file__).parents[4] / "shared" / "data")) / name
    if not path.exists():
        pytest.skip("real detector data is not here")
    return path


@pytest.fixture(scope="session")
def eiger_frames() -> np.ndarray:
    """Two real EIGER 1M frames, (2, 1065, 1030) uint16; gaps are 65535."""
    import h5py
    import hdf5plugin  # noqa: F401  # registers the filter

    with h5py.File(_data("eiger1_bslz4_data_000001.h5")) as file:
        return np.ascontiguousarray(file["entry/data/data"][:])


@pytest.fixture(scope="session")
def cbf_frame() -> np.ndarray:
    """A real Pilatus 300K frame of Bragg peaks, (619, 487) int32; gaps are -1, dead pixels -2."""
    import fabio

    return np.ascontiguousarray(fabio.open(_data("phi_scan_001.cbf")).data.astype(np.int32))

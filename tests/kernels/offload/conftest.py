"""Kernels on three machines: as the scientist wrote them, as the model, and as VHDL in GHDL.

The plain kernel and the model are compiled by the code that runs in the sandbox (kernels/chain.py), here in this process.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from kernels.calls import Feedback
from kernels.chain import Chain, StageMemory, arguments_of
from kernels.contract import Kernel, resolve_params
from kernels.gate import admit
from kernels.memory import NO_ROWS
from kernels.offload.emit_numba import emit_numba
from kernels.offload.ir import Offload
from kernels.program import Program
from kernels.wire import COUNTERS, FEEDBACK_DROPPED, FEEDBACK_DTYPE, FEEDBACK_KEPT


@dataclasses.dataclass
class Found:
    """What a device found in frames."""

    verdicts: list[int]
    state: dict[str, np.ndarray]
    feedback: list[tuple[int, int, float]]


def same(one: Found, other: Found) -> None:
    assert one.verdicts == other.verdicts
    assert one.feedback == other.feedback
    for name, array in one.state.items():
        np.testing.assert_array_equal(array, other.state[name], err_msg=name)
        assert array.dtype == other.state[name].dtype


def run_numba(kernel: Kernel, frames: np.ndarray, params: Mapping[str, int] | None = None, first: int = 0) -> Found:
    program = Program(kernel)
    arrays = [np.full(spec.shape, spec.identity, spec.dtype) for spec in kernel.state]
    feedback = Feedback(np.zeros(COUNTERS, np.int64), np.zeros(1 << 16, FEEDBACK_DTYPE), np.zeros(0, NO_ROWS))
    values = resolve_params(kernel, params or {})
    memory = [StageMemory(program.params(values, []), program.state(arrays), feedback, None)]
    seen = np.ascontiguousarray(frames)
    seen.flags.writeable = False
    drive = Chain([program]).compile((frames.dtype.name, frames.shape[1:]), memory)
    verdicts = np.zeros(len(frames), np.uint8)
    # One by one: after STOP the loop would end, and a core has no such notion.
    for i in range(len(frames)):
        assert drive(seen[i : i + 1], verdicts[i : i + 1], first + i, False, -1, *arguments_of(memory)) == 1
    assert feedback.counters[FEEDBACK_DROPPED] == 0
    entries = feedback.entries[: feedback.counters[FEEDBACK_KEPT]]
    return Found(
        verdicts.tolist(),
        {spec.name: array for spec, array in zip(kernel.state, arrays, strict=True)},
        [(int(entry["frame"]), int(entry["code"]), float(entry["value"])) for entry in entries],
    )


def kernel_of(source: str, name: str = "kernel") -> Kernel:
    return admit(name, source.encode())


def model_of(offload: Offload) -> Kernel:
    """The model as a kernel of its own: it passes the gate like any other."""
    source = emit_numba(offload)
    model = admit(offload.kernel.name, source.encode())
    assert (model.params, model.state) == (offload.kernel.params, offload.kernel.state)
    return dataclasses.replace(model, sha256=hashlib.sha256(source.encode()).hexdigest())


def run_ghdl(offload: Offload, frames: np.ndarray, params: Mapping[str, int] | None = None, **how: int) -> Found:
    from kernels.offload import ghdl

    judged = ghdl.judge(offload, frames, resolve_params(offload.kernel, params or {}), **how)
    feedback = [(frame, code, float(value)) for frame, code, value in judged.feedback]
    # Arrays that frame() does not name are not in the core: they stay as they were.
    untouched = {spec.name: np.full(spec.shape, spec.identity, spec.dtype) for spec in offload.kernel.state}
    return Found(judged.verdicts, untouched | judged.state, feedback)


def random_frames(dtype: str, shape: tuple[int, ...], count: int, seed: int = 1) -> np.ndarray:
    """Full range, small values, and constant frames: each finds other mistakes."""
    rng = np.random.default_rng(seed)
    bounds = np.iinfo(dtype)
    frames = rng.integers(bounds.min, bounds.max, (count, *shape), dtype=dtype, endpoint=True)
    frames[1::3] = rng.integers(0, 20, frames[1::3].shape)
    frames[2::6] = bounds.max
    return frames


@pytest.fixture
def golden() -> Path:
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def ghdl(peer: Callable[[str], str]) -> str:
    return peer("ghdl")


@pytest.fixture(scope="session")
def yosys(peer: Callable[[str], str]) -> str:
    return peer("yosys")

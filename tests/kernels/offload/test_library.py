"""Kernels of the shipped library as cores: what their docstrings promise."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from kernels import library
from kernels.gate import admit
from kernels.offload import ghdl as simulator
from kernels.offload.build import build
from tests.kernels.offload.conftest import model_of, random_frames, run_ghdl, run_numba, same

FOLDER = Path(library.__file__).parent
OFFLOADED = {
    "threshold": {"low": 9},
    "total": {},
    "histogram": {"low": 2, "shift": 1},
    "roi": {"top": 2, "bottom": 9, "left": 1, "right": 8, "high": 300},
    "saturation_guard": {"saturated": 60000, "max_pixels": 3, "action": 1},
    "window3x3": {},
}


@pytest.mark.parametrize(("name", "dtype"), list(zip(OFFLOADED, itertools.cycle(("uint16", "int32")))))
def test_plain_model_and_core_agree(ghdl: str, name: str, dtype: str) -> None:
    kernel = admit(name, (FOLDER / f"{name}.py").read_bytes())
    offload = build(kernel, dtype, (12, 17))
    frames = random_frames(dtype, (12, 17), 5)
    plain = run_numba(kernel, frames, OFFLOADED[name])
    same(plain, run_numba(model_of(offload), frames, OFFLOADED[name]))
    if sum(np.prod(spec.shape) for spec in offload.state) < 5000:
        same(plain, run_ghdl(offload, frames, OFFLOADED[name], stall_in=30, stall_out=30))


@pytest.mark.parametrize("name", OFFLOADED)
def test_a_detectors_frames_are_synthesizable(ghdl: str, name: str) -> None:
    kernel = admit(name, (FOLDER / f"{name}.py").read_bytes())
    simulator.synthesize(build(kernel, "uint16", (512, 1030)))

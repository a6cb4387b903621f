"""Random kernels: what numba makes of the plain file, of the model, and what GHDL simulates, is the same, bit by bit.

Nothing is shrunk: an example costs two compilations. The failing kernel is printed, and short enough.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kernels.offload.build import build
from tests.kernels.offload.conftest import kernel_of, model_of, random_frames, run_ghdl, run_numba, same
from tests.kernels.offload.generator import Sample, kernels

ONCE = settings(
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
FRAMES = 4


def compared(sample: Sample, seed: int) -> None:
    offload = build(kernel_of(sample.source), sample.dtype, sample.shape)
    frames = random_frames(sample.dtype, sample.shape, FRAMES, seed)
    params = {"a": seed % 100, "b": seed * 7919 - 300_000}
    plain = run_numba(offload.kernel, frames, params, first=seed)
    same(plain, run_numba(model_of(offload), frames, params, first=seed))
    how = {"first_frame": seed, "seed": seed + 1, "stall_in": seed % 90, "stall_out": seed}
    same(plain, run_ghdl(offload, frames, params, **how))


@given(sample=kernels(), seed=st.integers(0, 200))
@settings(ONCE, max_examples=10, derandomize=True)
def test_random_kernels_give_the_same_bits_everywhere(ghdl: str, sample: Sample, seed: int) -> None:
    compared(sample, seed)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@given(sample=kernels(), seed=st.integers(0, 200))
@settings(ONCE, max_examples=400)
def test_many_random_kernels(ghdl: str, sample: Sample, seed: int) -> None:
    compared(sample, seed)

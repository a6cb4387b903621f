"""Azimuthal integration against pyFAI, with the geometry of the real file; correction first, integration after it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kernels import prepare

PIXEL_M = 172e-6
BEAM = (99.95, -5.65)  # rows, columns, from the file
DISTANCE_M = 0.5408
WAVELENGTH_M = 0.59040224e-10
SHAPE = (195, 487)


@pytest.fixture(scope="module")
def integrator() -> Any:
    from pyFAI.integrator.azimuthal import AzimuthalIntegrator

    return AzimuthalIntegrator(
        dist=DISTANCE_M,
        poni1=BEAM[0] * PIXEL_M,
        poni2=BEAM[1] * PIXEL_M,
        pixel1=PIXEL_M,
        pixel2=PIXEL_M,
        wavelength=WAVELENGTH_M,
    )


@pytest.fixture(scope="module")
def mask() -> np.ndarray:
    mask = np.random.default_rng(8).random(SHAPE) < 0.01
    mask[60:64] = True
    return mask


def same(mine: np.ndarray, theirs: np.ndarray, used: np.ndarray) -> None:
    assert used.sum() > 100
    assert np.abs(mine[used] / theirs[used].astype(float) - 1).max() < 1e-6


@pytest.mark.parametrize("unit", ["q_nm^-1", "2th_deg"])
async def test_equals_pyfai_without_splitting(
    judge: Any, aps_frames: np.ndarray, integrator: Any, mask: np.ndarray, unit: str
) -> None:
    bins = 600
    arrays = prepare.from_pyfai(integrator, SHAPE, bins, unit=unit, mask=mask, polarization=0.95)
    found = await judge("azimuthal", aps_frames, arrays=arrays, constants={"BINS": bins})
    results = [
        integrator.integrate1d(
            frame,
            bins,
            unit=unit,
            mask=mask,
            polarization_factor=0.95,
            method=("no", "histogram", "cython"),
            error_model="poisson",
        )
        for frame in aps_frames
    ]
    used = results[0].sum_normalization > 0
    same(found.state["intensity"], np.mean([r.intensity for r in results], axis=0, dtype=float), used)
    errors = np.sqrt(np.sum([r.sigma.astype(float) ** 2 for r in results], axis=0)) / len(results)
    same(found.state["sigma"], errors, used)
    curves = np.array([r.intensity for r in results], float)
    assert np.allclose(found.state["spread"][used], curves.std(axis=0, ddof=1)[used], rtol=1e-4)
    assert np.allclose(found.state["axis"], results[0].radial, rtol=1e-6)
    assert np.isnan(found.state["intensity"][~used]).all()
    # Sums of integers are exact: the same as numpy's, in whatever order frames were judged and merged.
    sums = np.bincount(arrays["bin"][~mask], aps_frames.sum(axis=0)[~mask].astype(float), minlength=bins)
    assert (found.state["total"] == sums).all()


@pytest.mark.parametrize("split", ["bbox", "full"])
async def test_equals_pyfai_with_splitting(
    judge: Any, aps_frames: np.ndarray, integrator: Any, mask: np.ndarray, split: str
) -> None:
    bins = 500
    arrays = prepare.from_pyfai(integrator, SHAPE, bins, mask=mask, split=split)
    found = await judge("azimuthal_split", aps_frames[:3], arrays=arrays, constants={"BINS": bins})
    results = [
        integrator.integrate1d(
            frame, bins, unit="q_nm^-1", mask=mask, method=(split, "csr", "cython"), error_model="poisson"
        )
        for frame in aps_frames[:3]
    ]
    used = results[0].sum_normalization > 0
    same(found.state["intensity"], np.mean([r.intensity for r in results], axis=0, dtype=float), used)
    errors = np.sqrt(np.sum([r.sigma.astype(float) ** 2 for r in results], axis=0)) / 3
    same(found.state["sigma"], errors, used)


async def test_a_flat_detector_needs_no_pyfai(
    judge: Any, aps_frames: np.ndarray, integrator: Any, mask: np.ndarray
) -> None:
    bins = 300
    arrays = prepare.from_geometry(
        SHAPE,
        bins,
        distance_m=DISTANCE_M,
        pixel_m=(PIXEL_M, PIXEL_M),
        beam=BEAM,
        wavelength_m=WAVELENGTH_M,
        mask=mask,
    )
    # Pixels that lie on an edge between two bins may fall to either side of it by rounding.
    theirs = prepare.from_pyfai(integrator, SHAPE, bins, mask=mask)
    assert (arrays["bin"] != theirs["bin"]).sum() <= 3
    assert np.allclose(arrays["axis"], theirs["axis"], rtol=1e-6)
    found = await judge("azimuthal", aps_frames, arrays=arrays, constants={"BINS": bins})
    result = integrator.integrate1d(
        aps_frames.mean(axis=0), bins, unit="q_nm^-1", mask=mask, method=("no", "csr", "cython")
    )
    agreeing = np.isclose(arrays["norm"], theirs["norm"], rtol=1e-5)
    assert agreeing.sum() > bins - 7
    same(found.state["intensity"], result.intensity, agreeing & (arrays["norm"] > 0))


async def test_after_dark_and_flat_correction(
    judge: Any, aps_frames: np.ndarray, integrator: Any, mask: np.ndarray, make_stage: Any
) -> None:
    rng = np.random.default_rng(4)
    dark = rng.normal(20, 2, SHAPE).astype(np.float32)
    flat = rng.normal(1, 0.05, SHAPE).astype(np.float32)
    correction = make_stage("dark_flat", arrays={"dark": dark, "flat": flat, "mask": mask.astype(np.uint8)})
    arrays = prepare.from_pyfai(integrator, SHAPE, 400, mask=mask)
    found = await judge("azimuthal", aps_frames, before=(correction,), arrays=arrays, constants={"BINS": 400})
    corrected = ((aps_frames.astype(float) - dark) / flat).mean(axis=0)
    result = integrator.integrate1d(corrected, 400, unit="q_nm^-1", mask=mask, method=("no", "csr", "cython"))
    same(found.state["intensity"], result.intensity, result.sum_normalization > 0)


def test_a_mask_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves no pixel"):
        prepare.from_geometry(
            (4, 4), 3, distance_m=1, pixel_m=(1e-4, 1e-4), beam=(0, 0), wavelength_m=1e-10, mask=np.ones((4, 4))
        )

"""Multi-tau correlation against a direct one, against the same scheme written with numpy, and against a known decay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kernels import prepare

LEVELS, CHANNELS, HALF = 8, 16, 8


def direct(series: np.ndarray, lag: int) -> float:
    """g2 at one lag of (frames, pixels): every pair of frames, each factor averaged over its own frames."""
    first, second = series[:-lag].astype(float), series[lag:].astype(float)
    return (first * second).mean() / (first.mean() * second.mean())


def multi_tau(series: np.ndarray) -> tuple[list[int], list[float]]:
    lags, values = [], []
    for level in range(LEVELS):
        for lag in range(1 if level == 0 else HALF, CHANNELS):
            lags.append(lag << level)
            values.append(direct(series, lag) if len(series) > lag else np.nan)
        series = series[: len(series) // 2 * 2].reshape(-1, 2, series.shape[1]).sum(axis=1)
    return lags, values


def speckle(frames: int, shape: tuple[int, int], decay_frames: float, seed: int = 3) -> np.ndarray:
    """Counts of speckle whose field decays exponentially: g2 - 1 = exp(-2 lag / decay_frames), but for the mean of counts."""
    rng = np.random.default_rng(seed)
    keep = np.exp(-1 / decay_frames)
    field = rng.normal(size=(2, *shape))
    images = np.empty((frames, *shape))
    for i in range(frames):
        images[i] = (field**2).sum(axis=0) / 2
        field = keep * field + np.sqrt(1 - keep**2) * rng.normal(size=(2, *shape))
    return rng.poisson(20 * images)


async def test_equals_direct_and_multi_tau_correlation(judge: Any) -> None:
    frames = speckle(333, (24, 30), 12.0).astype(np.uint16)
    arrays = prepare.rings((24, 30), (11.5, 14.5), [(2, 6), (6, 8), (9, 11)])
    found = await judge("xpcs", frames, params={"frame_s": 0.5}, arrays=arrays)
    flat = frames.reshape(len(frames), -1)
    for ring in range(3):
        series = flat[:, arrays["pixel"][arrays["first"][ring] : arrays["first"][ring + 1]]]
        lags, values = multi_tau(series)
        assert found.state["lag"].tolist() == lags
        assert np.allclose(found.state["g2"][ring], values, rtol=1e-12, equal_nan=True)
        assert np.isfinite(found.state["g2"][ring]).sum() > 45
        assert np.allclose(found.state["g2"][ring, :15], [direct(series, lag) for lag in range(1, 16)], rtol=1e-12)
        assert found.state["intensity"][ring] == pytest.approx(series.mean(), rel=1e-12)
    assert np.isnan(found.state["g2"][3:]).all()
    assert np.allclose(found.state["lag_s"], found.state["lag"] * 0.5)


async def test_finds_a_known_decay(judge: Any) -> None:
    frames = speckle(1500, (40, 40), 30.0).astype(np.uint16)
    arrays = prepare.rings((40, 40), (19.5, 19.5), [(0, 25)])
    found = await judge("xpcs", frames, arrays=arrays)
    lag, g2 = found.state["lag"], found.state["g2"][0]
    known = lag <= 100
    assert np.abs(g2[known] - 1 - np.exp(-2 * lag[known] / 30.0)).max() < 0.03


async def test_symmetric_normalisation_takes_out_a_drift_of_the_beam(judge: Any) -> None:
    drift = np.linspace(1, 3, 400)[:, None, None]
    frames = np.rint(speckle(400, (30, 30), 1.0) * drift).astype(np.uint16)
    arrays = prepare.rings((30, 30), (15, 15), [(0, 20)])
    found = await judge("xpcs", frames, arrays=arrays)
    late = found.state["lag"] == 240  # the speckle is forgotten by then, the drift is not
    mean = frames.reshape(400, -1)[:, arrays["pixel"]].mean()
    pairs = found.state["products"][0, late] / (found.state["pairs"][late] * arrays["pixel"].size)
    assert found.state["g2"][0, late] == pytest.approx(1.0, abs=0.02)
    assert (
        pairs / (16 * mean) ** 2 < 0.95
    )  # what one mean for all would have given; frames are summed by 16 at this lag


def test_rings_name_their_pixels() -> None:
    mask = np.zeros((9, 9))
    mask[4, 4] = 1
    arrays = prepare.rings((9, 9), (4, 4), [(0, 1.2), (1, 3)], mask=mask)
    assert arrays["pixel"].tolist()[:5] == [3 * 9 + 4, 4 * 9 + 3, 4 * 9 + 5, 5 * 9 + 4, 2 * 9 + 2]
    assert arrays["first"].tolist() == [0, 4, 24, *[24] * 6]
    with pytest.raises(ValueError, match=r"no pixels in ring 1"):
        prepare.rings((9, 9), (4, 4), [(0, 2), (20, 30)])
    with pytest.raises(ValueError, match=r"3 rings, at most 2"):
        prepare.rings((9, 9), (4, 4), [(0, 1), (1, 2), (2, 3)], rings_max=2)

"""The peak finder against the same definition written with scipy.ndimage, on synthetic and on real frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from kernels.contract import DROP, KEEP

RADIUS = 4
PARAMS = {"low": 20.0, "saturated": 60000.0, "snr": 6.0, "min_pixels": 2, "max_pixels": 30, "min_peaks": 3}


def reference(frame: np.ndarray, mask: np.ndarray, params: dict[str, float]) -> list[tuple[float, ...]]:
    """(y, x, counts, background, snr, pixels) of each peak, in reading order of their brightest pixels."""
    data = frame.astype(float)
    usable = (mask == 0) & (data < params["saturated"])
    known = np.where(usable, data, -np.inf)
    earlier = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
    lowest = {"mode": "constant", "cval": -np.inf}
    candidates = usable & (data >= params["low"])
    candidates &= data > ndimage.maximum_filter(known, footprint=earlier, **lowest)
    candidates &= data >= ndimage.maximum_filter(known, footprint=earlier[::-1, ::-1], **lowest)
    padded = np.pad(np.where(usable, data, np.nan), RADIUS, constant_values=np.nan)
    peaks = []
    for y, x in np.argwhere(candidates):
        square = padded[y : y + 2 * RADIUS + 1, x : x + 2 * RADIUS + 1]
        border = square.copy()
        border[1:-1, 1:-1] = np.nan
        border = border[np.isfinite(border)]
        if border.size < 4 * RADIUS:
            continue
        noise = max(border.std(), 1.0)
        height = data[y, x] - border.mean()
        if height < params["snr"] * noise:
            continue
        inner = square[1:-1, 1:-1]
        labels, _ = ndimage.label(inner > border.mean() + 0.5 * params["snr"] * noise, np.ones((3, 3)))
        member = labels == labels[RADIUS - 1, RADIUS - 1]
        if not params["min_pixels"] <= member.sum() <= params["max_pixels"]:
            continue
        above = np.where(member, inner - border.mean(), 0)
        v, u = ndimage.center_of_mass(above)
        peaks.append((y + v - RADIUS + 1, x + u - RADIUS + 1, above.sum(), border.mean(), height / noise, member.sum()))
    return peaks


def bragg(count: int, seed: int, shape: tuple[int, int] = (120, 150)) -> np.ndarray:
    """A frame of background with ``count`` spots, some near an edge, some beside each other."""
    rng = np.random.default_rng(seed)
    y, x = np.indices(shape)
    light = 8.0 + 6 * np.exp(-((np.hypot(y - 60, x - 75) - 40) ** 2) / 50)
    for _ in range(count):
        v, u, height = rng.uniform(0, shape[0]), rng.uniform(0, shape[1]), rng.uniform(40, 2000)
        light = light + height * np.exp(-((y - v) ** 2 + (x - u) ** 2) / (2 * rng.uniform(0.5, 1.4) ** 2))
    return rng.poisson(light)


def assert_same(found: Any, frames: np.ndarray, mask: np.ndarray, params: dict[str, float]) -> int:
    expected = [reference(frame, mask, params) for frame in frames]
    peaks = [len(found.rows[found.rows["frame"] == i]) for i in range(len(frames))]
    assert peaks == [len(of_frame) for of_frame in expected]
    flat = np.array([peak for of_frame in expected for peak in of_frame]).reshape(-1, 6)
    for column, name in enumerate(("y", "x", "counts", "background", "snr", "pixels")):
        assert np.allclose(found.rows[name], flat[:, column], rtol=1e-5), name
    assert found.verdicts.tolist() == [KEEP if n >= params["min_peaks"] else DROP for n in peaks]
    assert found.state["peaks"][0] == sum(peaks)
    assert found.state["hits"][0] == sum(n >= params["min_peaks"] for n in peaks)
    assert found.state["peaks_a_frame"].tolist() == np.bincount(peaks, minlength=256).tolist()
    assert found.feedback == [(i, 1, n) for i, n in enumerate(peaks) if n >= params["min_peaks"]]
    return sum(peaks)


async def test_synthetic_frames(judge: Any) -> None:
    frames = np.array([bragg(n, seed) for seed, n in enumerate((0, 1, 25, 2, 60, 0, 15))]).astype(np.uint16)
    frames[2, 30:34] = 65535  # a gap
    frames[4, 80:86, 20:26] = 500  # a plateau: its first pixel stands for it, and it is too large for a peak
    frames[0, 50, 50] = 5000  # a single pixel: a cosmic
    mask = np.zeros(frames.shape[1:], np.uint8)
    mask[:, 70:73] = 1
    found = await judge("hits", frames, params=PARAMS, arrays={"mask": mask})
    assert assert_same(found, frames, mask, PARAMS) > 50
    assert found.verdicts[0] == DROP
    assert found.verdicts[4] == KEEP


async def test_real_spots_on_scattering(judge: Any, aps_frames: np.ndarray) -> None:
    mask = np.zeros(aps_frames.shape[1:], np.uint8)
    params = {**PARAMS, "low": 100.0, "saturated": 1e6, "snr": 4.0, "max_pixels": 49, "min_peaks": 10}
    found = await judge("hits", aps_frames, params=params, arrays={"mask": mask})
    assert assert_same(found, aps_frames, mask, params) > 50
    assert len(set(found.verdicts.tolist())) == 2


async def test_real_cosmic_tracks_in_an_empty_frame(judge: Any, cbf_frame: np.ndarray) -> None:
    mask = (cbf_frame < 0).astype(np.uint8)
    params = {**PARAMS, "low": 1.0, "snr": 0.5}
    found = await judge("hits", cbf_frame[None], params=params, arrays={"mask": mask})
    assert assert_same(found, cbf_frame[None], mask, params) == 4


async def test_real_frames_with_gaps(judge: Any, eiger_frames: np.ndarray) -> None:
    mask = np.zeros(eiger_frames.shape[1:], np.uint8)
    params = {**PARAMS, "low": 4.0, "snr": 4.0}
    found = await judge("hits", eiger_frames, params=params, arrays={"mask": mask})
    assert_same(found, eiger_frames, mask, params)


@pytest.mark.parametrize("dtype", ["float32"])
async def test_corrected_frames_with_nothing_in_masked_pixels(judge: Any, dtype: str) -> None:
    frames = bragg(20, 3)[None].astype(dtype)
    mask = np.zeros(frames.shape[1:], np.uint8)
    mask[40:50, 40:50] = 1
    without = np.where(mask != 0, np.nan, frames).astype(dtype)
    found = await judge("hits", without, params=PARAMS, arrays={"mask": mask})
    assert assert_same(found, np.nan_to_num(without), mask, PARAMS) > 5

"""Kernels that count: each number equals what numpy says about the same frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kernels.contract import DROP, KEEP, STOP


def some(dtype: str, shape: tuple[int, ...] = (9, 20, 31), low: int = 0, high: int = 200, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
async def test_threshold(judge: Any, dtype: str) -> None:
    frames = some(dtype)
    bright = (frames >= 150).sum((1, 2))
    least = int(np.median(bright))
    found = await judge("threshold", frames, params={"low": 150, "min_pixels": least})
    assert found.verdicts.tolist() == [KEEP if n >= least else DROP for n in bright]
    assert found.state["bright"][0] == bright.sum()
    assert found.state["hits"][0] == (bright >= least).sum()
    assert found.feedback == [(i, 1, n) for i, n in enumerate(bright) if n >= least]


async def test_total_reports_frames_out_of_range(judge: Any, aps_frames: np.ndarray) -> None:
    frames = np.concatenate([aps_frames, np.zeros_like(aps_frames[:1])])
    totals = frames.sum((1, 2), dtype=np.int64)
    low, high = int(np.sort(totals)[2]), int(np.sort(totals)[-2])
    found = await judge("total", frames, params={"low": low, "high": high})
    assert found.state["counts"][0] == totals.sum() == 4_809_206_181
    assert found.state["brightest_pixel"][0] == 78_939
    assert (found.state["dimmest"][0], found.state["brightest"][0]) == (0, totals.max())
    assert found.verdicts.tolist() == [KEEP if low <= n <= high else DROP for n in totals]
    assert found.feedback == [(i, 1 if n < low else 2, n) for i, n in enumerate(totals) if not low <= n <= high]


@pytest.mark.parametrize(("dtype", "low", "shift"), [("uint16", 0, 0), ("int16", -40, 3), ("uint8", 100, 1)])
async def test_histogram(judge: Any, dtype: str, low: int, shift: int) -> None:
    span = 128 << shift
    frames = some(dtype, low=-100 if dtype == "int16" else 0, high=250)
    found = await judge("histogram", frames, params={"low": low, "shift": shift}, constants={"BINS": 128})
    values = frames.astype(np.int64).ravel()
    expected, edges = np.histogram(values, bins=128, range=(low, low + span))
    at_the_end = (values == low + span).sum()  # numpy's last bin is closed
    expected[-1] -= at_the_end
    assert found.state["histogram"].tolist() == expected.tolist()
    assert found.state["edges"].tolist() == edges[:-1].tolist()
    assert found.state["underflow"][0] == (values < low).sum()
    assert found.state["overflow"][0] == (values >= low + span).sum()


async def test_histogram_of_a_real_frame_finds_its_gaps(judge: Any, eiger_frames: np.ndarray) -> None:
    found = await judge("histogram", eiger_frames)
    assert found.state["histogram"].tolist() == np.bincount(eiger_frames.ravel(), minlength=65536)[:4096].tolist()
    assert found.state["overflow"][0] == (eiger_frames >= 4096).sum() > 0


async def test_histogram_of_floats(judge: Any) -> None:
    frames = np.random.default_rng(5).normal(10, 20, (5, 30, 40)).astype(np.float32)
    frames[1, 2:4] = np.nan
    frames[2, 0, 0], frames[2, 0, 1], frames[2, 0, 2] = 5.0, np.inf, -np.inf
    found = await judge("histogram_float", frames, params={"low": -20.0, "high": 30.0}, constants={"BINS": 200})
    places = (frames.astype(np.float64).ravel() + 20.0) * 4.0
    inside = places[(places >= 0) & (places < 200)]
    assert found.state["histogram"].tolist() == np.bincount(inside.astype(int), minlength=200).tolist()
    assert found.state["not_numbers"][0] == np.isnan(frames).sum() == 80
    assert found.state["underflow"][0] == (places < 0).sum()
    assert found.state["overflow"][0] == (places >= 200).sum()
    assert np.allclose(found.state["edges"], np.linspace(-20, 30, 201)[:-1])


async def test_roi(judge: Any, aps_frames: np.ndarray) -> None:
    region = aps_frames[:, 40:90, 100:260]
    sums = region.sum((1, 2))
    low, high = int(np.sort(sums)[2]), int(np.sort(sums)[-3])
    window = {"top": 40, "bottom": 90, "left": 100, "right": 260}
    found = await judge("roi", aps_frames, params={**window, "low": low, "high": high})
    assert found.state["counts"][0] == sums.sum()
    assert found.state["brightest_pixel"][0] == region.max()
    y, x = np.indices(aps_frames.shape[1:])
    weights = region.astype(float)
    centre = [(weights * axis[40:90, 100:260]).sum() / weights.sum() for axis in (y, x)]
    assert found.state["centre_milli"].tolist() == np.floor(1000 * np.array(centre)).tolist()
    moments = np.array([found.state["moment_y"][0], found.state["moment_x"][0]])
    assert np.allclose(moments / found.state["counts"][0], centre, rtol=1e-12)
    assert found.feedback == [(i, 1 if n < low else 2, n) for i, n in enumerate(sums) if not low <= n <= high]
    assert found.state["dim"][0] == found.state["bright"][0] == 2


async def test_roi_of_nothing_has_no_centre(judge: Any) -> None:
    found = await judge("roi", some("uint16"), params={"top": 5, "bottom": 5})
    assert found.state["counts"][0] == 0
    assert found.state["centre_milli"].tolist() == [-1, -1]


async def test_beam_position_follows_a_moving_beam(judge: Any) -> None:
    y, x = np.indices((60, 80))
    path = [(30.0, 40.0), (30.3, 40.2), (33.0, 40.0), (30.0, 36.5)]
    spots = [10000 * np.exp(-((y - v) ** 2 + (x - u) ** 2) / 18) for v, u in path]
    frames = np.rint(np.array([*spots, np.zeros_like(spots[0])]) + 50).astype(np.uint16)
    limits = {"top": 10, "bottom": 50, "left": 20, "right": 70}
    found = await judge("beam_position", frames, params={**limits, "background": 50, "y": 30.0, "x": 40.0})
    assert np.allclose([(row["y"], row["x"]) for row in found.rows], path, atol=0.02)
    assert found.rows["frame"].tolist() == [0, 1, 2, 3]
    part = np.maximum(frames[2, 10:50, 20:70].astype(float) - 50, 0)
    assert found.rows["x"][2] == pytest.approx((part * x[10:50, 20:70]).sum() / part.sum(), rel=1e-12)
    assert found.rows["counts"][2] == part.sum()
    moved = [(i, code) for i, code, _ in found.feedback]
    assert moved == [(2, 2), (2, 3), (3, 2), (3, 3), (4, 1)]
    assert (found.state["moved"][0], found.state["off"][0]) == (2, 1)
    assert np.allclose(found.state["lowest"], (30.0, 36.5), atol=0.02)
    assert np.allclose(found.state["highest"], (33.0, 40.2), atol=0.02)


@pytest.mark.parametrize("action", [0, 1, 2])
async def test_saturation_guard(judge: Any, action: int) -> None:
    frames = some("uint16")
    frames[:, 0] = 65535  # a gap
    frames[4, 3, 3:6] = 60000
    frames[5, 7, 7] = 65534
    found = await judge("saturation_guard", frames, params={"max_pixels": 1, "action": action})
    assert found.state["worst"][0] == 3
    assert found.feedback == [(4, 1, 3.0)]
    assert found.verdicts[4] == (KEEP, DROP, STOP)[action]
    assert (found.verdicts[:4] == KEEP).all()
    if action == 2:
        assert found.stopped_at == 4
        assert found.state["frames"][0] == 5
    else:
        assert found.state["saturated"][0] == 4
        assert found.state["frames"][0] == 9


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
async def test_window3x3(judge: Any, dtype: str) -> None:
    from scipy import ndimage

    frames = some(dtype, shape=(6, 40, 50), high=30)  # small numbers: many equal neighbours
    earlier = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
    counts = []
    for frame in frames.astype(np.int64):
        before = ndimage.maximum_filter(frame, footprint=earlier)
        after = ndimage.maximum_filter(frame, footprint=earlier[::-1, ::-1])
        light = ndimage.convolve(frame, np.ones((3, 3), np.int64))
        spots = (frame >= 20) & (frame > before) & (frame >= after) & (light >= 120)
        counts.append(int(spots[1:-1, 1:-1].sum()))
    least = sorted(counts)[2]
    found = await judge("window3x3", frames, params={"low": 20, "window": 120, "min_spots": least})
    assert found.state["spots"][0] == sum(counts) > 0
    assert found.verdicts.tolist() == [KEEP if n >= least else DROP for n in counts]
    assert found.state["hits"][0] == 4

"""Kernels that make images: corrections, photon counting, statistics of pixels, smaller frames; each against numpy."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from kernels.contract import DROP, KEEP, REPLACE


async def test_dark_and_flat(judge: Any, aps_frames: np.ndarray) -> None:
    rng = np.random.default_rng(2)
    shape = aps_frames.shape[1:]
    dark = rng.normal(30, 3, shape).astype(np.float32)
    flat = rng.normal(1, 0.1, shape).astype(np.float32)
    mask = (rng.random(shape) < 0.02).astype(np.uint8)
    flat[mask != 0] = 0
    found = await judge("dark_flat", aps_frames, arrays={"dark": dark, "flat": flat, "mask": mask})
    assert (found.verdicts == REPLACE).all()
    assert found.out.dtype == np.float32
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = (aps_frames.astype(np.float32) - dark) / flat
    expected[:, mask != 0] = np.nan
    assert np.array_equal(found.out, expected, equal_nan=True)


def photons(frame: np.ndarray, pedestal: np.ndarray, mask: np.ndarray, adu: float, strip: int) -> np.ndarray:
    """The definition in numpy; residuals in 1/16 ADU as the kernel has them."""
    steps = np.trunc((frame.astype(np.float32) - pedestal) * np.float32(16)).astype(np.int64)
    counts = np.zeros(frame.shape, np.int64)
    for start in range(0, frame.shape[1], strip):
        part = slice(start, start + strip)
        quiet = (np.abs(steps[:, part]) <= 30 * 16) & (mask[:, part] == 0)
        n = quiet.sum(axis=1)
        total = np.where(quiet, steps[:, part], 0).sum(axis=1)
        common = np.where(n >= 16, total / np.maximum(n, 1), 0.0)
        charge = (steps[:, part] - common[:, None]) / (16 * adu)
        counts[:, part] = np.where(charge >= 0.7, np.maximum(np.floor(charge + 0.5), 1), 0)
    counts[mask != 0] = 0
    return counts


async def test_photon_counting(judge: Any) -> None:
    rng = np.random.default_rng(6)
    shape = (6, 40, 200)
    truth = rng.poisson(0.1, shape)
    truth[:, :, 120:125] = 0
    pedestal = rng.normal(1000, 50, shape[1:]).astype(np.float32)
    common = np.repeat(rng.normal(0, 10, (6, 40, 3)), 96, axis=2)[:, :, :200]
    frames = np.clip(np.rint(pedestal + common + rng.normal(0, 5, shape) + 100 * truth), 0, 65535).astype(np.uint16)
    frames[3, 4, :96] += 200  # no pixel of this strip is quiet: nothing is subtracted there
    mask = np.zeros(shape[1:], np.uint8)
    mask[:, 120:125] = 1
    found = await judge("photon_count", frames, arrays={"pedestal": pedestal, "mask": mask})
    expected = np.array([photons(frame, pedestal, mask, 100.0, 96) for frame in frames])
    assert found.out.dtype == np.uint16
    assert np.array_equal(found.out, expected)
    assert (found.verdicts == REPLACE).all()
    assert found.state["photons"][0] == expected.sum()
    # At 5 % noise and with the common mode taken out, the count is what was put in, but for a few of 48,000 pixels.
    ordinary = np.ones(shape, bool)
    ordinary[3, 4, :96] = False
    assert (found.out != truth)[ordinary].sum() < 10


async def test_photon_counting_reports_overflow(judge: Any) -> None:
    frames = np.zeros((2, 8, 64), np.int32)
    frames[1, 2, 3] = 70_000
    zeros = np.zeros((8, 64), np.float32)
    found = await judge(
        "photon_count",
        frames,
        params={"adu": 1.0, "quiet": 0.25},
        arrays={"pedestal": zeros, "mask": zeros.astype(np.uint8)},
    )
    assert found.out[1, 2, 3] == 65535
    assert found.state["overflow"][0] == 1
    assert found.feedback == [(1, 1, 1.0)]


def exact(values: list[int]) -> tuple[float, float]:
    mean = Fraction(sum(values), len(values))
    return float(mean), float(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
async def test_pixel_statistics(judge: Any, dtype: str) -> None:
    rng = np.random.default_rng(1)
    frames = rng.poisson(40, (40, 12, 17)).astype(dtype)
    frames[:, 0, :4] = 60000  # bright and constant: nothing may cancel
    frames[7, 0, 1] = 60001
    frames[:, 1] = rng.integers(59000, 60000, (40, 17))
    frames[3:6, 5, 5] = 65535 if dtype == "uint16" else -2
    frames[:, 6, 6] = 65535
    frames[1:, 7, 7] = 65535
    found = await judge("pixel_statistics", frames, params={"highest": 65534}, constants={"HEIGHT": 12, "WIDTH": 17})
    used = (frames.astype(np.int64) >= 0) & (frames.astype(np.int64) <= 65534)
    assert np.array_equal(found.state["unused"], (~used).sum(axis=0))
    for y, x in np.ndindex(12, 17):
        values = frames[used[:, y, x], y, x].tolist()
        if len(values) < 2:
            assert np.isnan(found.state["variance"][y, x])
            assert np.isnan(found.state["mean"][y, x]) == (not values)
            continue
        mean, variance = exact(values)
        assert found.state["mean"][y, x] == pytest.approx(mean, rel=4e-16)
        assert found.state["variance"][y, x] == pytest.approx(variance, rel=1e-14, abs=0)
    assert found.state["variance"][0, 0] == 0
    assert found.state["mean"][7, 7] == frames[0, 7, 7]


async def test_pixel_statistics_of_real_frames(judge: Any, aps_frames: np.ndarray) -> None:
    found = await judge("pixel_statistics", aps_frames)
    assert np.array_equal(found.state["total"], aps_frames.sum(axis=0))
    assert np.array_equal(found.state["squares"], (aps_frames.astype(np.int64) ** 2).sum(axis=0))
    assert np.allclose(found.state["mean"], aps_frames.mean(axis=0), rtol=1e-14)
    assert np.allclose(found.state["variance"], aps_frames.var(axis=0, ddof=1), rtol=1e-12)


async def test_pixel_statistics_beyond_its_bound_says_so(judge: Any) -> None:
    frames = np.full((3, 2, 2), 2**31 - 1, np.int32)
    found = await judge("pixel_statistics", frames, params={"highest": 2**31 - 1}, constants={"HEIGHT": 2, "WIDTH": 2})
    assert np.isnan(found.state["mean"]).all()
    assert np.isnan(found.state["variance"]).all()


@pytest.mark.parametrize(("n", "dtype"), [(2, "uint16"), (3, "int32")])
async def test_rebin(judge: Any, n: int, dtype: str) -> None:
    rng = np.random.default_rng(9)
    frames = rng.integers(0, 9000, (5, 31, 44)).astype(dtype)
    frames[1, 4:8, 4:8] = 60000
    if dtype == "int32":
        frames[2, :, :3] = -100000
    found = await judge("rebin", frames, constants={"HEIGHT": 31, "WIDTH": 44, "N": n})
    height, width = 31 // n, 44 // n
    cut = frames[:, : height * n, : width * n].astype(np.int64)
    sums = cut.reshape(5, height, n, width, n).sum(axis=(2, 4))
    assert np.array_equal(found.out, np.clip(sums, 0, 65535))
    assert found.out.dtype == np.uint16
    wrong = ((sums > 65535) | (sums < 0)).sum(axis=(1, 2))
    assert found.state["overflow"][0] == (sums > 65535).sum() > 0
    assert found.state["underflow"][0] == (sums < 0).sum()
    assert found.state["largest"][0] == sums.max()
    assert found.feedback == [(i, 1, count) for i, count in enumerate(wrong) if count]
    assert (found.verdicts == REPLACE).all()


async def test_narrow(judge: Any, aps_frames: np.ndarray) -> None:
    found = await judge("narrow", aps_frames, params={"max_pixels": 1})
    wrong = (aps_frames > 65535).sum(axis=(1, 2))
    assert wrong.tolist() == [1, 1, 1, 1, 0, 1, 1, 2, 1, 1]
    assert np.array_equal(found.out, np.minimum(aps_frames, 65535))
    assert found.verdicts.tolist() == [KEEP if count > 1 else REPLACE for count in wrong]
    assert found.state["overflow"][0] == wrong.sum()
    assert found.state["largest"][0] == 78_939


def restored(out: np.ndarray, like: np.ndarray, capacity: int) -> np.ndarray:
    """As the kernel's docstring says."""
    frame = np.zeros(like.shape, like.dtype)
    n = out[0]
    frame.flat[out[1 : n + 1]] = out[capacity + 1 : capacity + 1 + n].astype(like.dtype)
    return frame


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int8"])
async def test_zero_suppression_is_lossless(judge: Any, dtype: str) -> None:
    rng = np.random.default_rng(7)
    frames = (rng.poisson(0.05, (6, 50, 60)) * rng.integers(-100, 120, (6, 50, 60))).astype(dtype)
    frames[1] = 0
    frames[2].flat[:300] = np.arange(300) % 100 + 1  # with what is there, more than fits
    frames[3] = 0
    frames[3].flat[-250:] = 7  # exactly as much as fits
    found = await judge("zero_suppress", frames, constants={"CAPACITY": 250})
    pixels = (frames != 0).sum(axis=(1, 2))
    assert found.verdicts.tolist() == [KEEP if n > 250 else REPLACE for n in pixels]
    assert found.verdicts[2] == KEEP
    assert found.verdicts[3] == REPLACE
    for i in np.flatnonzero(found.verdicts == REPLACE):
        assert restored(found.out[i], frames[i], 250).tobytes() == frames[i].tobytes()
    assert found.state["pixels"][0] == pixels.sum()
    assert found.state["fullest"][0] == pixels.max()
    assert found.feedback == [(i, 1, n) for i, n in enumerate(pixels) if n > 250]


async def test_zero_suppression_of_a_real_frame_with_negative_markers(judge: Any, cbf_frame: np.ndarray) -> None:
    found = await judge("zero_suppress", cbf_frame[None], constants={"CAPACITY": 20_000})
    assert found.verdicts.tolist() == [REPLACE]
    assert restored(found.out[0], cbf_frame, 20_000).tobytes() == cbf_frame.tobytes()
    assert found.out.nbytes < cbf_frame.nbytes / 7


async def test_events_are_lossless(judge: Any) -> None:
    rng = np.random.default_rng(12)
    frames = (rng.poisson(0.02, (8, 90, 100)) * rng.integers(-50, 300, (8, 90, 100))).astype(np.int32)
    frames[5] = 3  # 9000 pixels: more than the rows of a frame
    frames[6] = 0
    found = await judge("photon_events", frames)
    assert found.verdicts.tolist() == [KEEP if i == 5 else DROP for i in range(8)]
    assert found.dropped_rows == 0
    assert not (found.rows["frame"] == 5).any()
    for i in np.flatnonzero(found.verdicts == DROP):
        mine = found.rows[found.rows["frame"] == i]
        back = np.zeros(frames.shape[1:], frames.dtype)
        back[mine["y"], mine["x"]] = mine["value"]
        assert back.tobytes() == frames[i].tobytes()
    assert found.feedback == [(5, 1, 9000.0)]

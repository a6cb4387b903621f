"""Reading and drawing what the demonstration's kernel found.

In: the NeXus products of gateway/demo/kernel/saxs.py. Out: ``Reduction``, the sum over several products, its curve of
intensity against momentum transfer, and the same numbers computed by numpy from the frames, to compare with.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterable

import h5py
import numpy as np
import numpy.typing as npt

from gateway.demo.frames import CENTRE_COLUMN, CENTRE_ROW, DISTANCE_MM, PIXEL_MM, SHAPE, WAVELENGTH_NM, Frames

BINS = 512
RING_PIXELS_MIN = 20
PLOT_COLUMNS, PLOT_ROWS = 68, 12
Integers = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True)
class Reduction:
    """``counts`` by distance from the beam (512 bins of one pixel); ``image`` and ``distance`` are (195, 487)."""

    counts: Integers
    image: Integers
    distance: Integers
    received: int
    kept: int
    dropped: int
    unreduced: int

    def same_state(self, other: Reduction) -> bool:
        return all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in ("counts", "image", "distance")
        )


def read(product: bytes) -> Reduction:
    """One product. Raises KeyError when it has no state (a kernel that failed)."""
    with h5py.File(io.BytesIO(product)) as file:
        state, frames = file["entry/state"], file["entry/frames"]
        counts, image, distance = (np.asarray(state[name][()], np.int64) for name in ("counts", "image", "distance"))
        received, kept, dropped, unreduced = (
            int(frames[name][()]) for name in ("received", "kept", "dropped", "unreduced")
        )
        return Reduction(counts, image, distance, received, kept, dropped, unreduced)


def merged(parts: Iterable[Reduction]) -> Reduction:
    """All as one: sums, but for the distances, which are the same everywhere."""
    total, *rest = parts
    names = [field.name for field in dataclasses.fields(Reduction) if field.name != "distance"]
    for part in rest:
        sums = {name: getattr(total, name) + getattr(part, name) for name in names}
        total = Reduction(**sums, distance=np.maximum(total.distance, part.distance))
    return total


def by_numpy(frames: Frames, dim: int) -> Reduction:
    """What the kernel must find in these frames."""
    rows, columns = np.mgrid[0 : SHAPE[0], 0 : SHAPE[1]]
    distance = np.sqrt((rows - CENTRE_ROW) ** 2 + (columns - CENTRE_COLUMN) ** 2).astype(np.int64)
    image = frames.sum(axis=0, dtype=np.int64)
    # bincount adds up in float64, which is exact up to 2**53.
    counts = np.bincount(distance.ravel(), image.ravel(), BINS).astype(np.int64)
    dropped = int(np.count_nonzero(frames.sum(axis=(1, 2), dtype=np.int64) < dim))
    return Reduction(counts, image, distance, len(frames), len(frames) - dropped, dropped, 0)


def curve(reduction: Reduction) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(momentum transfer in 1/nm, mean counts a pixel) of the rings with enough pixels to be smooth."""
    pixels = np.bincount(reduction.distance.ravel(), minlength=BINS)
    ring = np.flatnonzero(pixels >= RING_PIXELS_MIN)
    half_angle = np.arctan((ring + 0.5) * PIXEL_MM / DISTANCE_MM) / 2
    transfer = 4 * math.pi * np.sin(half_angle) / WAVELENGTH_NM
    return transfer, reduction.counts[ring] / pixels[ring] / max(reduction.kept + reduction.dropped, 1)


def plot(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], x_label: str, y_label: str) -> str:
    """A line of dots as text, both axes linear."""
    low, high = float(y.min()), float(y.max())
    column = np.minimum((x - x[0]) / (x[-1] - x[0]) * PLOT_COLUMNS, PLOT_COLUMNS - 1).astype(int)
    grid = [[" "] * PLOT_COLUMNS for _ in range(PLOT_ROWS)]
    for number in np.unique(column):
        height = (float(y[column == number].mean()) - low) / max(high - low, 1e-9)
        grid[PLOT_ROWS - 1 - round(height * (PLOT_ROWS - 1))][number] = "●"
    lines = [f"  {y_label}"]
    for row, cells in enumerate(grid):
        label = {0: f"{high:,.0f}", PLOT_ROWS - 1: f"{low:,.0f}"}.get(row, "")
        lines.append(f"{label:>9} ┤{''.join(cells)}".rstrip())
    lines.append(" " * 10 + "└" + "─" * PLOT_COLUMNS)
    end = f"{x[-1]:.1f}"
    lines.append(" " * 11 + f"{x[0]:.1f}" + f"{x_label:^{PLOT_COLUMNS - 3 - len(end)}}" + end)
    return "\n".join(lines)

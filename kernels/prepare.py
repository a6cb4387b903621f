"""Arrays for the kernels of the library: pixel-to-bin tables, sparse matrices of split pixels, regions of rings.

In: a geometry, as a pyFAI integrator or as plain numbers. Out: a dict of arrays by the names that a kernel's ``PARAMS`` declare,
with the dtypes it declares; ``save`` writes them as the ``.npy`` files to upload beside the kernel. pyFAI is not imported here:
whoever has an integrator has it. Runs on a scientist's machine, never in the gateway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]
Mask = npt.NDArray[Any] | None
"""Of the shape of a frame; not 0 where a pixel is to be ignored."""

SPLITS = ("no", "bbox", "full")


def from_pyfai(
    integrator: Any,
    shape: tuple[int, int],
    bins: int,
    *,
    unit: str = "q_nm^-1",
    mask: Mask = None,
    polarization: float | None = None,
    split: str = "no",
) -> Arrays:
    """What ``azimuthal`` (``split="no"``) or ``azimuthal_split`` ("bbox", "full") needs to do what this integrator does.

    ``integrator``: a ``pyFAI`` AzimuthalIntegrator. ``unit``: pyFAI's name of the axis. ``polarization``: factor from -1 to 1.
    Solid angles are corrected for, as pyFAI does by default. Raises ValueError.
    """
    if split not in SPLITS:
        raise ValueError(f"split is one of {', '.join(SPLITS)}, not {split!r}")
    result = integrator.integrate1d(
        np.zeros(shape, np.float32), bins, unit=unit, mask=mask, method=(split, "csr", "cython")
    )
    matrix = integrator.engines[result.method].engine
    share = np.asarray(matrix.data, np.float32)
    pixel = np.asarray(matrix.indices, np.int32)
    first = np.asarray(matrix.indptr, np.int32)
    weight = np.asarray(integrator.solidAngleArray(shape), np.float64)
    if polarization is not None:
        weight = weight * np.asarray(integrator.polarization(shape, factor=polarization), np.float64)
    owner = np.repeat(np.arange(bins), np.diff(first))
    norm = np.bincount(owner, weight.ravel()[pixel] * share, minlength=bins)
    axis = np.asarray(result.radial, np.float64)
    if split == "no":
        table = np.full(shape, -1, np.int32)
        table.flat[pixel] = owner
        return {"bin": table, "norm": norm, "axis": axis}
    return {"first": first, "pixel": pixel, "share": share, "norm": norm, "axis": axis}


def from_geometry(
    shape: tuple[int, int],
    bins: int,
    *,
    distance_m: float,
    pixel_m: tuple[float, float],
    beam: tuple[float, float],
    wavelength_m: float,
    mask: Mask = None,
) -> Arrays:
    """The same for ``azimuthal``, for a flat detector at right angles to the beam; axis in q, nm⁻¹.

    ``pixel_m``: height and width. ``beam``: row and column that it hits, in pixels from the outer corner of the first one (its
    centre is 0.5). Bins divide the range from the smallest to the largest q evenly, q being that of a pixel's centre.
    """
    rows = (np.arange(shape[0]) + 0.5 - beam[0]) * pixel_m[0]
    columns = (np.arange(shape[1]) + 0.5 - beam[1]) * pixel_m[1]
    radius_m = np.hypot(rows[:, None], columns[None, :])
    angle = np.arctan2(radius_m, distance_m)
    q = 4e-9 * np.pi / wavelength_m * np.sin(angle / 2)
    used = np.ones(shape, bool) if mask is None else np.asarray(mask) == 0
    if not used.any():
        raise ValueError("the mask leaves no pixel")
    low, high = q[used].min(), q[used].max()
    table = np.minimum(((q - low) * (bins / max(high - low, np.finfo(float).tiny))).astype(np.int32), bins - 1)
    table[~used] = -1
    # The solid angle of a pixel relative to one on the axis: farther away, and seen at a slant.
    weight = np.cos(angle) ** 3
    norm = np.bincount(table[used], weight[used], minlength=bins)
    axis = low + (np.arange(bins) + 0.5) * (high - low) / bins
    return {"bin": table.astype(np.int32), "norm": norm, "axis": axis}


def rings(
    shape: tuple[int, int],
    centre: tuple[float, float],
    radii: Sequence[tuple[float, float]],
    *,
    mask: Mask = None,
    rings_max: int = 8,
) -> Arrays:
    """What ``xpcs`` needs: the pixels whose distance from ``centre`` (row, column of a pixel's centre) is in ``[inner, outer)``
    of one of ``radii``, in pixels; of rings that overlap the first counts. ``rings_max``: the kernel's constant ``RINGS``.
    Raises ValueError for rings without pixels, or too many."""
    y, x = np.indices(shape)
    distance = np.hypot(y - centre[0], x - centre[1])
    number = np.full(shape, -1, np.int32)
    for ring, (inner, outer) in reversed(list(enumerate(radii))):
        number[(distance >= inner) & (distance < outer)] = ring
    if mask is not None:
        number[np.asarray(mask) != 0] = -1
    of_ring = [np.flatnonzero(number == ring) for ring in range(rings_max)]
    if len(radii) > rings_max:
        raise ValueError(f"{len(radii)} rings, at most {rings_max}")
    for ring, bounds in enumerate(radii):
        if not of_ring[ring].size:
            raise ValueError(f"no pixels in ring {ring}: {bounds}")
    first = np.cumsum([0, *(pixels.size for pixels in of_ring)])
    return {"pixel": np.concatenate(of_ring).astype(np.int32), "first": first.astype(np.int32)}


def save(arrays: Mapping[str, npt.NDArray[Any]], folder: Path) -> list[Path]:
    """Write ``NAME.npy`` for each, to be uploaded to ``_kernels/KERNEL/``."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.npy" for name in arrays]
    for path, array in zip(paths, arrays.values(), strict=True):
        np.save(path, array)
    return paths

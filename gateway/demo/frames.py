"""The frames that the demonstration sends: ten measured ones, and a pool resampled from them.

In: the folder of example data, if it is there. Out: ``Measured`` (ten frames of a Pilatus 100K) and ``Pool``, shared
memory with frames drawn from a Poisson distribution around the measured ones: a stream of gigabytes in which no
frame is a copy of a measured one, made beforehand so that making frames does not limit the sending.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt

FILE = "aps_nxsas.h5"
DTYPE = np.dtype("<i4")
SHAPE = (195, 487)
FRAME_BYTES = math.prod(SHAPE) * DTYPE.itemsize
CENTRE_ROW, CENTRE_COLUMN = 99.95, -5.65
PIXEL_MM, DISTANCE_MM, WAVELENGTH_NM = 0.172, 540.8, 0.059040

Frames = npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """``frames`` has the shape (10, 195, 487); ``origin`` says in words what they are."""

    frames: Frames
    origin: str
    synthetic: bool


def data_folder() -> Path:
    """HISS_DATA, or ../shared/data beside the project's root."""
    given = os.environ.get("HISS_DATA")
    return Path(given) if given else Path(__file__).parents[2].parent / "shared" / "data"


def load(folder: Path) -> Measured:
    """The real frames where they are, else synthetic ones."""
    file = folder / FILE
    if not file.is_file():
        return Measured(_synthetic(), f"synthetic scattering frames (no {FILE} in {folder})", True)
    with h5py.File(file) as opened:
        frames = np.ascontiguousarray(opened["entry/data/frames"][:], np.int32)
    if frames.shape != (10, *SHAPE):
        return Measured(_synthetic(), f"synthetic scattering frames ({file} holds others than expected)", True)
    return Measured(frames, f"real frames of a nickel alloy at 775 °C, APS 9-ID-C ({file})", False)


def _synthetic() -> Frames:
    """Ten frames that look like small-angle scattering with one peak; the beam dips at the fifth."""
    rows, columns = np.mgrid[0 : SHAPE[0], 0 : SHAPE[1]]
    distance = np.hypot(rows - CENTRE_ROW, columns - CENTRE_COLUMN)
    mean = 2500.0 + 9000 * np.exp(-(((distance - 400) / 90) ** 2))
    flux = np.array([1, 1, 0.98, 1.01, 0.93, 0.98, 0.97, 1, 0.99, 1.01])
    mean *= 487e6 / mean.sum()
    drawn: Frames = np.random.default_rng(9).poisson(mean * flux[:, None, None]).astype(np.int32)
    return drawn


@dataclasses.dataclass(frozen=True, slots=True)
class Pool:
    """``fd``: memfd with ``count`` frames back to back; ``view``: the same bytes. An object of the stream is a run of
    frames that starts somewhere in the pool and goes round."""

    fd: int
    view: memoryview
    count: int

    @property
    def size_bytes(self) -> int:
        return self.count * FRAME_BYTES

    @property
    def frames(self) -> Frames:
        return np.frombuffer(self.view, np.int32).reshape(self.count, *SHAPE)

    def close(self) -> None:
        os.close(self.fd)


def pieces(start_byte: int, length_bytes: int, pool_bytes: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of the runs of pool memory that a body is made of."""
    offset, left = start_byte % pool_bytes, length_bytes
    while left:
        count = min(left, pool_bytes - offset)
        yield offset, count
        left -= count
        offset = 0


def resample(measured: Frames, count: int, progress: Callable[[int], None]) -> Pool:
    """A pool of ``count`` frames, in turn from each measured one; ``progress`` is told each frame."""
    fd = os.memfd_create("hiss-demo-frames", os.MFD_CLOEXEC)
    os.ftruncate(fd, count * FRAME_BYTES)
    memory = mmap.mmap(fd, count * FRAME_BYTES)
    pool = Pool(fd, memoryview(memory), count)
    random = np.random.default_rng(2016)
    frames = pool.frames
    for index in range(count):
        frames[index] = random.poisson(measured[index % len(measured)])
        progress(1)
    return pool

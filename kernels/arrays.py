"""The memory of array parameters: one sealed memfd that a sandbox maps read-only.

In: resolved arrays (contract.resolve_arrays) of each kernel of a chain. Out: a descriptor and the place of every array. What
always holds: the memory is sealed against writing before any process gets it, so that neither side can change what a kernel
was given; only shapes and offsets travel in the request.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from kernels.wire import ArrayPlace

_ALIGNMENT_BYTES = 64
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

Arrays = Mapping[str, npt.NDArray[np.generic]]


def place(stages: Sequence[Arrays]) -> tuple[list[tuple[ArrayPlace, ...]], int]:
    """Where each array of each kernel lies, and the size of the memory: 0 where there are none."""
    end = 0
    places: list[tuple[ArrayPlace, ...]] = []
    for arrays in stages:
        placed = []
        for array in arrays.values():
            placed.append(ArrayPlace(array.shape, end))
            end += -(-array.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        places.append(tuple(placed))
    return places, end


def write(stages: Sequence[Arrays], places: Sequence[Sequence[ArrayPlace]], size_bytes: int) -> int:
    """The sealed memory; the caller closes the descriptor. Copies every byte: use a thread for large arrays."""
    fd = os.memfd_create("hiss-kernel-arrays", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        with mmap.mmap(fd, size_bytes) as memory:
            for arrays, placed in zip(stages, places, strict=True):
                for array, where in zip(arrays.values(), placed, strict=True):
                    view = np.ndarray(array.shape, array.dtype, memory, where.offset)
                    view[...] = array
                    del view
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd

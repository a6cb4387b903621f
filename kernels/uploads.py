"""Parameter arrays: ``_kernels/KERNEL/NAME.npy``, checked against what the kernel declares.

In: a stored .npy file (format of NEP 1), one array. Out: an ``ArrayUse`` with its values, C order, read-only; or
``BadArray`` with the reason, fit for the scientist. Only the header is interpreted, as literals; nothing is ever unpickled.
"""

from __future__ import annotations

import asyncio
import io
import math
import os
import re

import numpy as np
import numpy.typing as npt

from ingest.ports import Domain, LandingPad
from ingest.records import ObjectRecord
from kernels.contract import MAX_ARRAY_BYTES, ArraySpec
from kernels.lineage import ArrayUse

HEADER_BYTES_MAX = 1 << 16
FILE_BYTES_MAX = MAX_ARRAY_BYTES + HEADER_BYTES_MAX
_NDIM_MAX = 8
_PIECE_BYTES = (4 << 20) - 8192
"""Read back at once; fits a slab of the arena however it is aligned."""
_KEY = re.compile(rb"_kernels/([A-Za-z_][A-Za-z0-9_-]{0,63})/([A-Za-z][A-Za-z0-9_]{0,63})\.npy\Z")


class BadArray(ValueError):
    """``str()`` says why."""


def array_name(key: bytes) -> tuple[str, str] | None:
    """(kernel, array) of a parameter array's key; None for any other."""
    found = _KEY.match(key)
    return (found[1].decode("ascii"), found[2].decode("ascii")) if found else None


class Header:
    """How the array lies in its file. ``length``: of the whole file. Raises BadArray."""

    def __init__(self, head: bytes, length: int) -> None:
        file = io.BytesIO(head[:HEADER_BYTES_MAX])
        try:
            major, _ = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
            self.shape, self.fortran, self.dtype = read(file, max_header_size=HEADER_BYTES_MAX)
        except Exception as error:
            # numpy says what is wrong with a header in several types of exception.
            raise BadArray(f"not a .npy file, or its header is broken ({error})"[:300]) from None
        self.origin = file.tell()
        if self.dtype.hasobject or self.dtype.names is not None or self.dtype.kind not in "buif":
            raise BadArray(f"its dtype is {self.dtype.name[:80]}: an array of plain numbers is needed")
        if len(self.shape) > _NDIM_MAX or any(size < 0 for size in self.shape):
            raise BadArray(f"its shape is {self.shape}")
        self.values_bytes = math.prod(self.shape) * self.dtype.itemsize
        if self.values_bytes > MAX_ARRAY_BYTES:
            raise BadArray(f"it holds {self.values_bytes} bytes; at most {MAX_ARRAY_BYTES} are allowed")
        if not self.values_bytes:
            raise BadArray("it is empty")
        if self.origin + self.values_bytes != length:
            raise BadArray(
                f"its header announces {self.values_bytes} bytes of values, {length - self.origin} are there"
            )


def misfit(spec: ArraySpec, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> str:
    """Why an array cannot be what the kernel declares; empty when it can. The shape of a frame is not known here."""
    if not np.can_cast(dtype, np.dtype(spec.dtype), "safe"):
        return f"its dtype is {dtype.name}, which does not become the declared {spec.dtype} without loss"
    if spec.shape is None:
        return ""
    declared = "(" + ", ".join("any" if size < 0 else str(size) for size in spec.shape) + ")"
    if len(shape) != len(spec.shape) or any(
        want not in (-1, have) for want, have in zip(spec.shape, shape, strict=True)
    ):
        return f"its shape is {shape}, declared is {declared}"
    return ""


async def read(pad: LandingPad, record: ObjectRecord, domain: Domain) -> ArrayUse:
    """The stored array. Raises BadArray, or IngestError where it could not be read now."""
    if record.length > FILE_BYTES_MAX:
        raise BadArray(f"the file has {record.length} bytes; at most {FILE_BYTES_MAX} are allowed")
    file = np.empty(record.length, np.uint8)
    for start in range(0, record.length, _PIECE_BYTES):
        length = min(_PIECE_BYTES, record.length - start)
        loaded = await pad.load(record, start, length, domain)
        try:
            view = file.data[start : start + length]
            fd = domain.region_fds[loaded.region]
            if await asyncio.to_thread(os.preadv, fd, [view], loaded.offset) != length:
                raise BadArray("it could not be read whole")
        finally:
            loaded.release()
    header = Header(file[:HEADER_BYTES_MAX].tobytes(), record.length)
    values = await asyncio.to_thread(values_of, file, header)
    return ArrayUse(record.key, record.object_id, record.crc64nvme, values)


def values_of(file: npt.NDArray[np.uint8], header: Header) -> npt.NDArray[np.generic]:
    """The values of a whole .npy file, C order, read-only; ``file`` is theirs from now on."""
    flat = np.frombuffer(file, header.dtype, offset=header.origin)
    shaped = flat.reshape(header.shape[::-1]).T if header.fortran else flat.reshape(header.shape)
    values = np.require(shaped, None, ["C", "A"])
    values.flags.writeable = False
    return values

"""Writing NeXus groups with h5py so that equal inputs give equal bytes.

In: an h5py group and plain values. Out: NeXus groups, notes, texts, arrays and plots below it. What always holds: no HDF5
times are written; a text is UTF-8 without NULs, whatever it came from; large arrays are compressed losslessly.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import h5py
import numpy as np
import numpy.typing as npt

COMPRESS_FROM_BYTES = 64 * 1024
"""Smaller arrays gain nothing from chunks and gzip."""
_CHUNK_BYTES = 1 << 20


def group(parent: h5py.Group, name: str, nx_class: str) -> h5py.Group:
    made = parent.create_group(name)
    made.attrs["NX_class"] = nx_class
    return made


def note(parent: h5py.Group, name: str, content_type: str, data: str) -> h5py.Group:
    made = group(parent, name, "NXnote")
    text(made, "type", content_type)
    text(made, "data", data)
    return made


def text(parent: h5py.Group, name: str, value: str) -> None:
    parent.create_dataset(name, data=clean(value), dtype=h5py.string_dtype(), track_times=False)


def texts(parent: h5py.Group, name: str, values: Sequence[str]) -> None:
    """A column of texts of any length."""
    cleaned = np.array([clean(value) for value in values], object)
    parent.create_dataset(name, data=cleaned, shape=(len(values),), dtype=h5py.string_dtype(), track_times=False)


def words(parent: h5py.Group, name: str, values: Sequence[str]) -> None:
    """A column of ASCII texts of about one length, such as hexadecimal numbers: many thousand are written at once."""
    array(parent, name, np.array([value.encode("ascii") for value in values] or [b""], "S")[: len(values)])


def number(parent: h5py.Group, name: str, value: int, *, units: str = "") -> None:
    dataset = parent.create_dataset(name, data=np.int64(value), track_times=False)
    if units:
        dataset.attrs["units"] = units


def clean(value: str) -> str:
    """HDF5 strings end at the first NUL and must be UTF-8."""
    return value.replace("\0", "\N{SYMBOL FOR NULL}").encode("utf-8", "replace").decode()


def array(parent: h5py.Group, name: str, values: npt.NDArray[np.generic]) -> h5py.Dataset:
    if values.nbytes < COMPRESS_FROM_BYTES or values.ndim == 0:
        return parent.create_dataset(name, data=values, track_times=False)
    row_bytes = max(1, values.nbytes // values.shape[0])
    chunks = (max(1, min(values.shape[0], _CHUNK_BYTES // row_bytes)), *values.shape[1:])
    return parent.create_dataset(
        name, data=values, chunks=chunks, compression="gzip", compression_opts=1, shuffle=True, track_times=False
    )


def plot(entry: h5py.Group, name: str, signal: str, dataset: h5py.Dataset, ndim: int) -> str:
    """An NXdata over ``dataset``: an image from two dimensions on, else a line."""
    made = group(entry, name, "NXdata")
    made[signal] = dataset
    made.attrs["signal"] = signal
    made.attrs["interpretation"] = "image" if ndim >= 2 else "spectrum"
    return name


def key_text(key: bytes) -> str:
    """A key to be read by people; ``location`` keeps it exactly."""
    return key.decode("utf-8", "backslashreplace")


def time_text(time_ns: int) -> str:
    """ISO 8601, UTC, microseconds."""
    return datetime.fromtimestamp(time_ns // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%S") + (
        f".{time_ns % 1_000_000_000 // 1000:06d}Z"
    )

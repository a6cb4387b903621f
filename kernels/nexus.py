"""Writing NeXus files so that equal inputs give equal bytes, and so that a product costs its worker little.

In: h5py groups and plain values. Out: NeXus groups, notes, texts, arrays and plots below them, and the bytes of the file. What
always holds: no HDF5 times are written; a text is UTF-8 without NULs, whatever it came from; large arrays are compressed
losslessly.

A product is some sixty tiny datasets. They are made with h5py's low-level interface, which takes a quarter of the time of
``create_dataset``, and lie in their object's header (compact layout), so that nothing is allocated for them.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import h5py
import numpy as np
import numpy.typing as npt
from h5py import h5a, h5d, h5f, h5g, h5o, h5p, h5s, h5t

COMPRESS_FROM_BYTES = 64 * 1024
"""Smaller arrays gain nothing from chunks and gzip."""
COMPACT_BYTES_MAX = 4096
"""HDF5 allows 64 KiB; readers fetch the headers of everything they list."""
IN_MEMORY_BYTES_MAX = 16 << 20
"""Larger files are not held twice, which their fastest way needs."""
_CHUNK_BYTES = 1 << 20
_TEXT = h5py.string_dtype()


def build(fill: Callable[[h5py.Group], None], size_bytes_max: int) -> memoryview:
    """A file whose root ``fill`` has filled. Blocks for as long as gzip takes."""
    if size_bytes_max > IN_MEMORY_BYTES_MAX:
        target = io.BytesIO()
        with h5py.File(target, "w", libver=("v110", "v110"), track_order=False) as file:
            fill(file)
        return target.getbuffer()
    made = h5f.create(b"product", h5f.ACC_TRUNC, fapl=_memory())
    try:
        fill(h5py.Group(h5g.open(made, b"/")))
        h5f.flush(made)
        return memoryview(made.get_file_image())
    finally:
        made.close()


@functools.cache
def _memory() -> h5p.PropFAID:
    access = h5p.create(h5p.FILE_ACCESS)
    access.set_fapl_core(COMPRESS_FROM_BYTES, False)
    access.set_libver_bounds(h5f.LIBVER_V110, h5f.LIBVER_V110)
    # An exception may leave a group open in its traceback.
    access.set_fclose_degree(h5f.CLOSE_STRONG)
    return access


@functools.cache
def _creation(compact: bool) -> h5p.PropDCID:
    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_obj_track_times(False)
    if compact:
        creation.set_layout(h5d.COMPACT)
    return creation


@functools.cache
def _linking() -> h5p.PropLCID:
    linking = h5p.create(h5p.LINK_CREATE)
    linking.set_char_encoding(h5t.CSET_UTF8)
    return linking


@functools.cache
def _type(dtype: np.dtype[np.generic]) -> h5t.TypeID:
    # A text's dtype is equal to any other of objects.
    return h5t.py_create(dtype, logical=True)


@functools.cache
def _text_type() -> h5t.TypeID:
    return h5t.py_create(_TEXT, logical=True)


@functools.cache
def _scalar() -> h5s.SpaceID:
    return h5s.create(h5s.SCALAR)


def _create(parent: h5py.Group, name: str, values: npt.NDArray[np.generic], kind: h5t.TypeID) -> h5d.DatasetID:
    space = h5s.create_simple(values.shape) if values.ndim else _scalar()
    creation = _creation(0 < values.nbytes <= COMPACT_BYTES_MAX)
    made = h5d.create(parent.id, name.encode(), kind, space, creation, lcpl=_linking())
    if values.size:
        made.write(h5s.ALL, h5s.ALL, values)
    return made


def group(parent: h5py.Group, name: str, nx_class: str) -> h5py.Group:
    made = h5py.Group(h5g.create(parent.id, name.encode(), lcpl=_linking()))
    attribute(made, "NX_class", nx_class)
    return made


def attribute(of: h5py.Group | h5py.Dataset, name: str, value: str) -> None:
    """A new one."""
    h5a.create(of.id, name.encode(), _text_type(), _scalar()).write(np.array(value, _TEXT))


def note(parent: h5py.Group, name: str, content_type: str, data: str) -> h5py.Group:
    made = group(parent, name, "NXnote")
    text(made, "type", content_type)
    text(made, "data", data)
    return made


def text(parent: h5py.Group, name: str, value: str) -> None:
    _create(parent, name, np.array(clean(value), _TEXT), _text_type())


def texts(parent: h5py.Group, name: str, values: Sequence[str]) -> None:
    """A column of texts of any length."""
    _create(parent, name, np.array([clean(value) for value in values], _TEXT), _text_type())


def words(parent: h5py.Group, name: str, values: Sequence[str]) -> None:
    """A column of ASCII texts of about one length, such as hexadecimal numbers: many thousand are written at once."""
    array(parent, name, np.array([value.encode("ascii") for value in values] or [b""], "S")[: len(values)])


def number(parent: h5py.Group, name: str, value: int) -> None:
    _create(parent, name, np.array(value, np.int64), _type(np.dtype(np.int64)))


def clean(value: str) -> str:
    """HDF5 strings end at the first NUL and must be UTF-8."""
    return value.replace("\0", "\N{SYMBOL FOR NULL}").encode("utf-8", "replace").decode()


def array(parent: h5py.Group, name: str, values: npt.NDArray[np.generic]) -> h5py.Dataset:
    if values.nbytes < COMPRESS_FROM_BYTES or values.ndim == 0:
        return h5py.Dataset(_create(parent, name, np.ascontiguousarray(values), _type(values.dtype)))
    row_bytes = max(1, values.nbytes // values.shape[0])
    chunks = (max(1, min(values.shape[0], _CHUNK_BYTES // row_bytes)), *values.shape[1:])
    return parent.create_dataset(
        name, data=values, chunks=chunks, compression="gzip", compression_opts=1, shuffle=True, track_times=False
    )


def plot(entry: h5py.Group, name: str, signal: str, dataset: h5py.Dataset, ndim: int) -> str:
    """An NXdata over ``dataset``: an image from two dimensions on, else a line."""
    made = group(entry, name, "NXdata")
    h5o.link(dataset.id, made.id, signal.encode(), lcpl=_linking())
    attribute(made, "signal", signal)
    attribute(made, "interpretation", "image" if ndim >= 2 else "spectrum")
    return name


def key_text(key: bytes) -> str:
    """A key to be read by people; ``location`` keeps it exactly."""
    return key.decode("utf-8", "backslashreplace")


def time_text(time_ns: int) -> str:
    """ISO 8601, UTC, microseconds."""
    return datetime.fromtimestamp(time_ns // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%S") + (
        f".{time_ns % 1_000_000_000 // 1000:06d}Z"
    )

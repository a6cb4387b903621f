"""Which dataset of an HDF5/NeXus file holds the frames, and where its chunks lie. Runs inside the sandbox only.

In: a file object over untrusted bytes, the dataset that the metadata name (or none), the declared shape of a frame (or
none). Out: ``Structure`` and the chunks as table entries (offsets into the file), or ``NotReadable`` with the reason. No
pixel is read: chunks are decoded later, by address. Nothing outside the file is ever opened.

Which dataset, if none is named: NeXus' default plot if it is a stack; ``entry/data/data*``; the largest numeric stack; the
default plot; the largest numeric image; the largest numeric line. Three dimensions or more are frames along the first.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from kernels.decode.encoding import Encoding, Filter
from kernels.decode.table import ENTRY
from kernels.layout.hdf5_types import Structure
from kernels.layout.index import CHUNK_STORED_BYTES_MAX, CHUNKS_MAX

OBJECTS_MAX = 20_000
"""Groups and datasets looked at in one file."""
DEPTH_MAX = 32
HOPS_MAX = 16
"""Soft links in a row."""
DTYPES = frozenset("u1 u2 u4 u8 i1 i2 i4 i8 f4 f8".split())
_BITSHUFFLE_NONE, _BITSHUFFLE_LZ4 = 0, 2


class NotReadable(Exception):
    """Why the file has no frames for kernels; fit for the scientist."""


def read_structure(
    file: io.IOBase, dataset: str, frame_shape: tuple[int, ...] | None
) -> tuple[Structure, npt.NDArray[np.void]]:
    """Raises NotReadable, or whatever HDF5 makes of a broken file."""
    with h5py.File(file, "r") as opened:
        return _structure(find_dataset(opened, dataset), frame_shape)


def find_dataset(file: h5py.File, path: str) -> h5py.Dataset:
    """The one of that path; without one, the one that holds the frames. Raises NotReadable."""
    return _named(file, path) if path else _chosen(file)


# -- which dataset


def _named(file: h5py.File, path: str) -> h5py.Dataset:
    found = _resolve(file, path)
    if not isinstance(found, h5py.Dataset):
        raise NotReadable(f"{path!r:.200} is not a dataset")
    return found


def _chosen(file: h5py.File) -> h5py.Dataset:
    default = _default_plot(file)
    if default is not None and default.ndim >= 3:
        return default
    usual = _usual(file)
    if usual is not None:
        return usual
    by_rank: dict[int, h5py.Dataset] = {}
    for candidate in _datasets(file):
        rank = min(candidate.ndim, 3)
        if rank and (rank not in by_rank or candidate.size > by_rank[rank].size):
            by_rank[rank] = candidate
    best = by_rank.get(3) or default or by_rank.get(2) or by_rank.get(1)
    if best is None:
        raise NotReadable("no numeric dataset in the file" + _links_hint(file))
    return best


def _default_plot(file: h5py.File) -> h5py.Dataset | None:
    """NeXus: follow ``default`` from the root to an NXdata, whose ``signal`` names the dataset."""
    group: Any = file
    for _ in range(HOPS_MAX):
        name = _attribute(group, "default") or _attribute(group, "signal")
        if not name:
            return None
        try:
            group = _resolve(group, name)
        except NotReadable:
            return None
        if isinstance(group, h5py.Dataset):
            return group if _numeric(group) else None
    return None


def _usual(file: h5py.File) -> h5py.Dataset | None:
    """``entry/data/data``, or the first ``entry/data/data_…``, as the DECTRIS filewriter names them."""
    try:
        folder = _resolve(file, "entry/data")
    except NotReadable:
        return None
    if not isinstance(folder, h5py.Group):
        return None
    outside = ""
    for name in sorted(name for name in _names(folder) if name.startswith("data")):
        try:
            found = _resolve(folder, name)
        except NotReadable as refusal:
            outside = outside or str(refusal)
            continue
        if isinstance(found, h5py.Dataset) and _numeric(found) and found.ndim >= 2:
            return found
    if outside:
        raise NotReadable(outside)
    return None


def _names(group: h5py.Group) -> list[str]:
    names = []
    for name in group:
        names.append(name)
        if len(names) >= OBJECTS_MAX:
            break
    return names


def _attribute(thing: Any, name: str) -> str:
    try:
        value = thing.attrs.get(name, "")
    except Exception:
        return ""  # an attribute nobody can read names nothing
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return value if isinstance(value, str) else ""


def _resolve(start: Any, path: str) -> Any:
    """The object at ``path``, link by link, so that none leads out of the file unseen."""
    here = start.file if path.startswith("/") else start
    parts = [part for part in path.split("/") if part and part != "."]
    hops = 0
    while parts:
        name = parts.pop(0)
        if not isinstance(here, h5py.Group):
            raise NotReadable(f"{path!r:.200} is not in the file")
        link = here.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            raise NotReadable(
                f"{here.name}/{name} is an external link to {link.filename!r:.100}: only what is in the object is read"
            )
        if isinstance(link, h5py.SoftLink):
            hops += 1
            if hops > HOPS_MAX:
                raise NotReadable(f"{path!r:.200} goes through more than {HOPS_MAX} links")
            parts = [part for part in link.path.split("/") if part and part != "."] + parts
            here = here.file if link.path.startswith("/") else here
            continue
        if not isinstance(link, h5py.HardLink):
            raise NotReadable(f"{path!r:.200} is not in the file")
        here = here[name]
    return here


def _datasets(file: h5py.File) -> Iterator[h5py.Dataset]:
    """Every numeric dataset once; hard links may form circles."""
    seen: set[Any] = set()
    waiting: list[tuple[h5py.Group, int]] = [(file["/"], 0)]
    looked_at = 0
    while waiting:
        group, depth = waiting.pop()
        for name in _names(group):
            looked_at += 1
            if looked_at > OBJECTS_MAX:
                raise NotReadable(
                    f"more than {OBJECTS_MAX} objects in the file: name one with x-amz-meta-frame-dataset"
                )
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                continue
            thing = group[name]
            address = h5py.h5o.get_info(thing.id).addr
            if address in seen:
                continue
            seen.add(address)
            if isinstance(thing, h5py.Group) and depth < DEPTH_MAX:
                waiting.append((thing, depth + 1))
            elif isinstance(thing, h5py.Dataset) and _numeric(thing):
                yield thing


def _links_hint(file: h5py.File) -> str:
    """EIGER's master files hold nothing but links to their data files."""
    folder = file.get("entry/data", getlink=True)
    return " (external links are not followed)" if isinstance(folder, h5py.ExternalLink) else ""


def _numeric(dataset: h5py.Dataset) -> bool:
    try:
        dtype = dataset.dtype
    except Exception:
        return False  # a type that numpy has no word for
    return f"{dtype.kind}{dtype.itemsize}" in DTYPES and h5py.check_enum_dtype(dtype) is None


# -- what it is made of


def _structure(dataset: h5py.Dataset, frame_shape: tuple[int, ...] | None) -> tuple[Structure, npt.NDArray[np.void]]:
    name = str(dataset.name or "")
    if not _numeric(dataset):
        raise NotReadable(f"{name} is of type {dataset.dtype}, not a plain number")
    creation = dataset.id.get_create_plist()
    if dataset.is_virtual:
        raise NotReadable(f"{name} is a virtual dataset: its frames are elsewhere")
    if creation.get_external_count():
        raise NotReadable(f"{name} is stored in external files")
    frames, shape = _frames(name, dataset.shape, frame_shape)
    dtype = dataset.dtype
    layout = creation.get_layout()
    fill = _fill(creation, dtype)
    no_chunks = np.zeros(0, ENTRY)
    if layout == h5py.h5d.CHUNKED:
        encoding = _encoding(dataset, creation, shape, fill)
        chunks = _chunks(dataset, encoding, shape, frames)
        return Structure(name, shape, frames, encoding, -1, len(chunks)), chunks
    if layout != h5py.h5d.CONTIGUOUS:
        raise NotReadable(f"{name} is stored inside its header; write it contiguous or chunked")
    encoding = Encoding(dtype.str, (1, *shape), (), fill)
    offset = dataset.id.get_offset()
    if offset is None:  # never written
        return Structure(name, shape, frames, encoding, -1, 0), no_chunks
    return Structure(name, shape, frames, encoding, int(offset), 0), no_chunks


def _frames(
    name: str, whole: tuple[int, ...] | None, frame_shape: tuple[int, ...] | None
) -> tuple[int, tuple[int, ...]]:
    if not whole or math.prod(whole) == 0:
        raise NotReadable(f"{name} is empty")
    if frame_shape is None:
        return (whole[0], whole[1:]) if len(whole) >= 3 else (1, whole)
    if whole == frame_shape:
        return 1, whole
    if whole[1:] == frame_shape:
        return whole[0], whole[1:]
    raise NotReadable(f"x-amz-meta-frame-shape says {frame_shape}, {name} is {whole}")


def _fill(creation: Any, dtype: np.dtype[Any]) -> bytes:
    if creation.fill_value_defined() == h5py.h5d.FILL_VALUE_UNDEFINED:
        return b""
    value = np.zeros(1, dtype)
    creation.get_fill_value(value)
    return value.tobytes() if value.any() else b""


def _encoding(dataset: h5py.Dataset, creation: Any, shape: tuple[int, ...], fill: bytes) -> Encoding:
    chunk = tuple(int(size) for size in dataset.chunks)
    if len(chunk) == len(shape):  # a single frame: the stack has no axis of its own
        chunk = (1, *chunk)
    filters = []
    for number in range(creation.get_nfilters()):
        code, _, values, title = creation.get_filter(number)
        try:
            filters.append(filter_of(code, values, dataset.dtype.itemsize))
        except ValueError as error:
            words = title.decode("ascii", "replace") if isinstance(title, bytes) else str(title)
            raise NotReadable(f"{dataset.name} is compressed with {error} ({words:.60})") from None
    encoding = Encoding(dataset.dtype.str, chunk, tuple(filters), fill)
    trouble = encoding.trouble(shape)
    if trouble:
        raise NotReadable(f"{dataset.name}: {trouble}")
    return encoding


def filter_of(code: int, values: tuple[int, ...], itemsize: int) -> Filter:
    """An HDF5 filter and its client data. ValueError names what is not supported."""
    if code == h5py.h5z.FILTER_DEFLATE:
        return Filter("deflate")
    if code == h5py.h5z.FILTER_SHUFFLE:
        return Filter("shuffle", values[0] if values else itemsize)
    if code == h5py.h5z.FILTER_FLETCHER32:
        return Filter("fletcher32")
    if code == 32004:
        return Filter("lz4")
    if code == 32008:  # client data: version, version, element size, block size, compression
        kind = values[4] if len(values) > 4 else _BITSHUFFLE_NONE
        element_bytes = values[2] if len(values) > 2 else itemsize
        if kind == _BITSHUFFLE_LZ4:
            return Filter("bslz4", element_bytes)
        if kind == _BITSHUFFLE_NONE:
            return Filter("bitshuffle", element_bytes, values[3] if len(values) > 3 else 0)
        raise ValueError(f"bitshuffle and compression {kind}, which is not supported")
    raise ValueError(f"filter {code}, which is not supported")


def _chunks(dataset: h5py.Dataset, encoding: Encoding, shape: tuple[int, ...], frames: int) -> npt.NDArray[np.void]:
    grid = (-(-frames // encoding.depth), *encoding.grid(shape))
    if math.prod(grid) > CHUNKS_MAX:
        raise NotReadable(f"{dataset.name} has {math.prod(grid)} chunks, more than {CHUNKS_MAX}")
    rank = len(dataset.shape)
    parts = encoding.chunk[-rank:]
    steps = [math.prod(grid[len(grid) - rank + axis + 1 :]) for axis in range(rank)]
    found: list[tuple[int, int, int, int, int]] = []

    def note(chunk: Any) -> None:
        if chunk.byte_offset is None or chunk.size > CHUNK_STORED_BYTES_MAX:
            raise NotReadable(f"{dataset.name} has a chunk of {chunk.size} bytes")
        places = zip(chunk.chunk_offset, parts, steps, strict=True)
        number = sum(offset // part * step for offset, part, step in places)
        found.append((number, chunk.byte_offset, chunk.size, 0, chunk.filter_mask & 0xFFFF))

    dataset.id.chunk_iter(note)
    found.sort()
    return np.array(found, ENTRY)

"""One HDF5 file into another, object by object, less one dataset. Runs inside the sandbox.

In: an open file over untrusted bytes, an open one over a ``Recorder``. Out: every group, link, attribute and dataset of the
first in the second; of large datasets the stored bytes are not copied but noted. What always holds: nothing is left out
unsaid: what cannot be copied raises ``NotReadable``, and the one thing that changes meaning, attributes with references
(they name objects by address), is listed in ``left_out``. Links out of the file are copied as links.
"""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np

from kernels.layout.dialogue import OF_REST
from kernels.layout.hdf5 import DEPTH_MAX, OBJECTS_MAX, NotReadable
from kernels.layout.recorder import Recorder

SMALL_BYTES = 64 << 10
"""Stored bytes of datasets that HDF5 copies itself."""
ODD_BYTES_MAX = 16 << 20
"""The same, of datasets whose bytes cannot be noted: they go through memory."""


class Copy:
    """``left``: the dataset that stays behind; ``here`` and ``name`` say where it is missing."""

    def __init__(self, source: h5py.File, made: h5py.File, recorder: Recorder, left: h5py.Dataset) -> None:
        self.left_out: list[str] = []
        self.here: h5py.Group | None = None
        self.name = ""
        self._path = left.name
        self._source = source
        self._made = made
        self._recorder = recorder
        self._address = h5py.h5o.get_info(left.id).addr
        self._seen: dict[Any, h5py.Group | h5py.Dataset | h5py.Datatype] = {}
        self._again: list[tuple[h5py.Group, str]] = []
        self._looked_at = 0

    def run(self) -> None:
        """All but the dataset, to which ``link_again`` makes the further links once it is there."""
        root, made = self._source["/"], self._made["/"]
        self._seen[h5py.h5o.get_info(root.id).addr] = made
        copy_attributes(root, made, self.left_out)
        waiting = [(root, made, 0)]
        while waiting:
            group, target, depth = waiting.pop()
            if depth > DEPTH_MAX:
                raise NotReadable(f"groups more than {DEPTH_MAX} levels deep")
            for name in group:
                inner = self._member(group, name, target)
                if inner is not None:
                    waiting.append((group[name], inner, depth + 1))

    def link_again(self, dataset: h5py.Dataset) -> None:
        for group, name in self._again:
            if (group, name) != (self.here, self.name):
                group[name] = dataset

    def _member(self, group: h5py.Group, name: str, target: h5py.Group) -> h5py.Group | None:
        """Copy one link and what it leads to; the new group, if its members are still to be copied."""
        self._looked_at += 1
        if self._looked_at > OBJECTS_MAX:
            raise NotReadable(f"more than {OBJECTS_MAX} objects in the file")
        link = group.get(name, getlink=True)
        if isinstance(link, h5py.SoftLink | h5py.ExternalLink):
            target[name] = link
            return None
        if not isinstance(link, h5py.HardLink):
            raise NotReadable(f"{group.name}/{name} is a link of a kind that cannot be copied")
        thing = group[name]
        address = h5py.h5o.get_info(thing.id).addr
        if address == self._address:
            if self.here is None or f"{group.name.rstrip('/')}/{name}" == self._path:
                self.here, self.name = target, name
            self._again.append((target, name))
            return None
        if address in self._seen:
            target[name] = self._seen[address]
            return None
        if isinstance(thing, h5py.Group):
            made = h5py.Group(h5py.h5g.create(target.id, _encoded(name), gcpl=thing.id.get_create_plist()))
            copy_attributes(thing, made, self.left_out)
            self._seen[address] = made
            return made
        if isinstance(thing, h5py.Dataset):
            self._dataset(group, thing, target, name)
        else:
            h5py.h5o.copy(group.id, _encoded(name), target.id, _encoded(name))
        self._seen[address] = target[name]
        return None

    def _dataset(self, group: h5py.Group, dataset: h5py.Dataset, target: h5py.Group, name: str) -> None:
        stored_bytes = dataset.id.get_storage_size()
        creation = dataset.id.get_create_plist()
        kind = dataset.id.get_type()
        if kind.detect_class(h5py.h5t.REFERENCE):
            raise NotReadable(f"{dataset.name} holds references, which mean nothing in another file")
        layout = creation.get_layout()
        odd = kind.detect_class(h5py.h5t.VLEN) or layout not in (h5py.h5d.CHUNKED, h5py.h5d.CONTIGUOUS)
        if stored_bytes <= SMALL_BYTES or odd or creation.get_external_count():
            if stored_bytes > ODD_BYTES_MAX:
                raise NotReadable(f"{dataset.name} is {stored_bytes} bytes of a kind that cannot be copied unread")
            h5py.h5o.copy(group.id, _encoded(name), target.id, _encoded(name))
            return
        if layout == h5py.h5d.CHUNKED:
            self._chunked(dataset, target, name)
        else:
            self._contiguous(dataset, target, name)

    def _chunked(self, dataset: h5py.Dataset, target: h5py.Group, name: str) -> None:
        creation = creation_like(dataset)
        made = _created(dataset, target, name, creation)
        chunks: list[Any] = []
        dataset.id.chunk_iter(chunks.append)
        zeros = memoryview(bytes(max((chunk.size for chunk in chunks), default=0)))
        for chunk in chunks:
            direct(
                made,
                self._recorder,
                chunk.chunk_offset,
                chunk.filter_mask,
                zeros[: chunk.size],
                OF_REST,
                chunk.byte_offset,
            )

    def _contiguous(self, dataset: h5py.Dataset, target: h5py.Group, name: str) -> None:
        creation = dataset.id.get_create_plist()
        creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        made = _created(dataset, target, name, creation)
        place, offset = made.id.get_offset(), dataset.id.get_offset()
        if place is None or offset is None:
            raise NotReadable(f"{dataset.name} has no place in the file")
        self._recorder.place(place, OF_REST, offset, dataset.id.get_storage_size())


def _created(dataset: h5py.Dataset, target: h5py.Group, name: str, creation: Any) -> h5py.Dataset:
    kind = own_type(dataset)
    made = h5py.Dataset(h5py.h5d.create(target.id, _encoded(name), kind, dataset.id.get_space(), creation))
    copy_attributes(dataset, made, [])
    return made


def _encoded(name: str) -> bytes:
    """As h5py decoded it."""
    return name.encode("utf-8", "surrogateescape")


def own_type(dataset: h5py.Dataset) -> Any:
    """The stored type; a named one without its name."""
    kind = dataset.id.get_type()
    return kind.copy() if kind.committed() else kind


def creation_like(dataset: h5py.Dataset) -> Any:
    """The creation properties of a chunked dataset, good for writing stored chunks without the filters at hand."""
    creation = dataset.id.get_create_plist()
    filters = [creation.get_filter(number) for number in range(creation.get_nfilters())]
    for code, *_ in filters:
        creation.remove_filter(code)
    for code, flags, values, _ in filters:
        # HDF5 makes a dataset with a filter that it does not have only if it may leave it out.
        creation.set_filter(code, flags | h5py.h5z.FLAG_OPTIONAL, tuple(values))
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_INCR)
    return creation


def direct(
    dataset: h5py.Dataset,
    recorder: Recorder,
    corner: tuple[int, ...],
    skipped: int,
    zeros: memoryview,
    kind: int,
    offset: int,
) -> None:
    """Give a chunk of ``len(zeros)`` stored bytes its place; they come from ``offset`` of a source."""
    recorder.expect(kind, offset, len(zeros))
    dataset.id.write_direct_chunk(corner, zeros, skipped)
    if not recorder.met:
        raise NotReadable("HDF5 did not write a chunk in one piece")


def copy_attributes(source: Any, target: Any, left_out: list[str]) -> None:
    for name in source.attrs:
        attribute = h5py.h5a.open(source.id, _encoded(name))
        kind = attribute.get_type()
        if kind.detect_class(h5py.h5t.REFERENCE):
            left_out.append(f"{source.name}@{name}")
            continue
        made = h5py.h5a.create(target.id, _encoded(name), kind.copy(), attribute.get_space())
        if attribute.get_space().get_simple_extent_type() == h5py.h5s.NULL:
            continue
        values = np.zeros(attribute.shape, attribute.dtype)
        if values.size:
            attribute.read(values)
            made.write(values)

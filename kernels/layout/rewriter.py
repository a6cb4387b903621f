"""An HDF5/NeXus file once more, with the frames that remain. Runs inside the sandbox only.

In: a file object over untrusted bytes, a ``Rewrite``, which frames remain, where their chunks lie. Out: the new file in a
``Recorder``. The dataset keeps its path, type, filters and attributes; beside it ``frame_index`` says which frame each was,
and a note what was done. No pixel is read or decoded: stored chunks get their places, the gateway copies them.
"""

from __future__ import annotations

import io
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from kernels import nexus
from kernels.layout.dialogue import Rewrite
from kernels.layout.hdf5 import NotReadable, find_dataset
from kernels.layout.hdf5_copy import Copy, copy_attributes, creation_like, direct, own_type
from kernels.layout.recorder import WRITTEN_BYTES_MAX, Recorder, TooLarge

DEFLATE_LEVEL = 1
META_BLOCK_BYTES = 64 << 10
"""Structure lies together in blocks of this size, in files of many chunks."""
MANY_CHUNKS = 1000


def rewrite(
    file: io.IOBase, task: Rewrite, remains: npt.NDArray[np.bool_], chunks: npt.NDArray[np.void]
) -> tuple[Recorder, str]:
    """The new file, and the dataset's path in it. Raises NotReadable, or whatever HDF5 makes of a broken file."""
    recorder = Recorder()
    block_bytes = META_BLOCK_BYTES if task.chunks > MANY_CHUNKS else None
    try:
        with (
            h5py.File(file, "r") as source,
            h5py.File(recorder, "w", libver=("v110", "v110"), meta_block_size=block_bytes) as made,
        ):
            if source.userblock_size:
                raise NotReadable("the file begins with a user block")
            path = _filled(source, made, recorder, task, remains, chunks)
    except TooLarge:
        raise NotReadable(f"more than {WRITTEN_BYTES_MAX} bytes of structure would have to be written anew") from None
    return recorder, path


def _filled(
    source: h5py.File,
    made: h5py.File,
    recorder: Recorder,
    task: Rewrite,
    remains: npt.NDArray[np.bool_],
    chunks: npt.NDArray[np.void],
) -> str:
    found = find_dataset(source, task.ask.dataset)
    copy = Copy(source, made, recorder, found)
    copy.run()
    if copy.here is None:
        raise NotReadable("the frames' dataset is not where it was")
    dataset = _dataset(found, copy.here, copy.name, task)
    _place(dataset, recorder, task, chunks)
    copy_attributes(found, dataset, copy.left_out)
    copy.link_again(dataset)
    index = nexus.array(copy.here, _free(copy.here, "frame_index"), np.flatnonzero(remains).astype(np.int64))
    index.attrs["description"] = f"number, in the file as received, of each frame of {copy.name}"
    lost = f"\nLeft out (they hold references): {', '.join(copy.left_out)[:2000]}" if copy.left_out else ""
    nexus.note(copy.here, _free(copy.here, "raw_filter"), "text/plain", task.note + lost)
    return str(dataset.name)


def _free(group: h5py.Group, name: str) -> str:
    """A name that nothing in the group has."""
    number, free = 1, name
    while group.get(free, getlink=True) is not None:
        number += 1
        free = f"{name}_{number}"
    return free


def _dataset(found: h5py.Dataset, group: h5py.Group, name: str, task: Rewrite) -> h5py.Dataset:
    kind: Any
    if not task.dtype:
        creation, kind = creation_like(found), own_type(found)
        creation.set_chunk(task.chunk)
    else:
        kind = h5py.h5t.py_create(np.dtype(task.dtype))
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_chunk(task.chunk)
        creation.set_shuffle()
        creation.set_deflate(DEFLATE_LEVEL)
    creation.set_obj_track_times(False)
    # HDF5 wants chunks no larger than a dimension that cannot grow.
    sizes = zip(task.shape, task.chunk[1:], strict=True)
    most = (h5py.h5s.UNLIMITED, *(h5py.h5s.UNLIMITED if part > size else size for size, part in sizes))
    space = h5py.h5s.create_simple((task.remain, *task.shape), most)
    return h5py.Dataset(h5py.h5d.create(group.id, name.encode(), kind, space, creation))


def _place(dataset: h5py.Dataset, recorder: Recorder, task: Rewrite, chunks: npt.NDArray[np.void]) -> None:
    if not len(chunks):
        return
    whole = (task.remain, *task.shape)
    grid = tuple(-(-size // part) for size, part in zip(whole, task.chunk, strict=True))
    corners = np.stack(np.unravel_index(chunks["number"].astype(np.int64), grid), axis=1) * np.array(task.chunk)
    zeros = memoryview(bytes(int(chunks["length"].max())))
    lengths, offsets = chunks["length"].tolist(), chunks["offset"].tolist()
    regions, skipped = chunks["region"].tolist(), chunks["skipped"].tolist()
    for number, corner in enumerate(corners.tolist()):
        length = lengths[number]
        direct(dataset, recorder, tuple(corner), skipped[number], zeros[:length], regions[number], offsets[number])

"""Reading a product back: what was found, and everything that decided it (written by kernels/product.py and provenance.py).

In: the bytes of a product, of one version or of a run. Out: ``Recorded``, plain values and arrays; ``NotAProduct`` for a file
that is none. Whoever asks trusts the file as far as HDF5 is trusted with it: it is meant for products of one's own node.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

import h5py
import msgspec
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Params = Mapping[str, int | float]


class NotAProduct(Exception):
    """``str()`` says what is missing."""


@dataclasses.dataclass(frozen=True, slots=True)
class RecordedArray:
    """``values`` None: it was too large to be kept in the product."""

    bucket: str
    key: bytes
    object_id: str
    crc64nvme: int
    values: Array | None


@dataclasses.dataclass(frozen=True, slots=True)
class RecordedStage:
    """``params`` and ``arrays`` by settings: item i held during settings i."""

    name: str
    source: str
    sha256: str
    params: tuple[Params, ...]
    arrays: tuple[Mapping[str, RecordedArray], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class RecordedInput:
    """``epochs``: (first frame, number of the settings), in order; ``metadata``: x-amz-meta-frame-*, without the prefix."""

    bucket: str
    key: bytes
    object_id: str
    crc64nvme: int
    length: int
    frames: int
    metadata: Mapping[str, str]
    epochs: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Recorded:
    """``state`` None: the product says why there is none (``error``). ``rows``: columns by name, None without ROWS."""

    title: str
    run: str
    """Location of the run; empty for the product of one version."""
    stages: tuple[RecordedStage, ...]
    inputs: tuple[RecordedInput, ...]
    environment: Mapping[str, str]
    error: str
    state: Mapping[str, Array] | None
    result: Mapping[str, Array] | None
    rows: Mapping[str, Array] | None
    verdicts: npt.NDArray[np.uint8] | None
    counts: Mapping[str, int]
    about_run: Mapping[str, str | int]
    """What /entry/run says, for a run."""
    plot: tuple[str, Array] | None
    """Name and values of the default plot."""

    @property
    def settings(self) -> int:
        return len(self.stages[-1].params)


def read(product: bytes) -> Recorded:
    """Raises NotAProduct."""
    try:
        with h5py.File(io.BytesIO(product), "r") as file:
            return _entry(file["entry"])
    except (KeyError, OSError, ValueError, TypeError, IndexError, msgspec.MsgspecError) as error:
        raise NotAProduct(f"it is no product of a kernel: {error}") from None


def _entry(entry: h5py.Group) -> Recorded:
    run = entry["source/run"].asstr()[()] if "source/run" in entry else ""
    about = entry["run"] if "run" in entry else {}
    return Recorded(
        title=entry["title"].asstr()[()],
        run=run,
        stages=_stages(entry),
        inputs=_inputs(entry["source"]),
        environment={name: value.asstr()[()] for name, value in entry["process/environment"].items()},
        error=entry["error"].asstr()[()] if "error" in entry else "",
        state=_arrays(entry, "state"),
        result=_arrays(entry, "result"),
        rows=_arrays(entry, "rows"),
        verdicts=np.asarray(entry["verdicts"][()], np.uint8) if "verdicts" in entry else None,
        counts=_counts(entry),
        about_run={name: _scalar(about[name]) for name in about if isinstance(about[name], h5py.Dataset)},
        plot=_plot(entry),
    )


def _plot(entry: h5py.Group) -> tuple[str, Array] | None:
    """NeXus: ``default`` names an NXdata, its ``signal`` the dataset."""
    default = str(entry.attrs.get("default", ""))
    group = entry.get(default) if default else None
    if not isinstance(group, h5py.Group) or "signal" not in group.attrs:
        return None
    signal = str(group.attrs["signal"])
    return signal, np.asarray(group[signal][()])


def _stages(entry: h5py.Group) -> tuple[RecordedStage, ...]:
    earlier: list[h5py.Group] = []
    while f"process_{len(earlier) + 1}" in entry:
        earlier.append(entry[f"process_{len(earlier) + 1}"])
    return tuple(_stage(group) for group in (*earlier, entry["process"]))


def _stage(group: h5py.Group) -> RecordedStage:
    note = group["kernel"]
    columns = {name: np.atleast_1d(dataset[()]) for name, dataset in group["parameters"].items()}
    arrays = {name: _uses(of) for name, of in group["arrays"].items()}
    settings = max((*map(len, columns.values()), *map(len, arrays.values())), default=1)
    return RecordedStage(
        name=note["file_name"].asstr()[()].removesuffix(".py"),
        source=note["data"].asstr()[()],
        sha256=note["sha256"].asstr()[()],
        params=tuple({name: column[i].item() for name, column in columns.items()} for i in range(settings)),
        arrays=tuple({name: uses[i] for name, uses in arrays.items() if i < len(uses)} for i in range(settings)),
    )


def _uses(group: h5py.Group) -> list[RecordedArray]:
    found = []
    for place, object_id, crc in zip(
        *(_texts(group[name]) for name in ("location", "object_id", "crc64nvme")), strict=True
    ):
        values = group["values"]
        bucket, key = _place(place)
        found.append(
            RecordedArray(bucket, key, object_id, int(crc, 16), np.asarray(values[crc][()]) if crc in values else None)
        )
    return found


def _inputs(group: h5py.Group) -> tuple[RecordedInput, ...]:
    names = ("location", "object_id", "crc64nvme", "frame_metadata")
    locations, object_ids, crcs, metadata = (_texts(group[name]) for name in names)
    lengths, frames = group["length"][:].tolist(), group["frames"][:].tolist()
    epochs: list[list[tuple[int, int]]] = [[] for _ in locations]
    for number, first_frame, settings in group["epochs"][:].tolist():
        epochs[number].append((first_frame, settings))
    return tuple(
        RecordedInput(
            *_place(locations[i]),
            object_ids[i],
            int(crcs[i], 16),
            lengths[i],
            frames[i],
            msgspec.json.decode(metadata[i], type=dict[str, str]),
            tuple(sorted(epochs[i])) or ((0, 0),),
        )
        for i in range(len(locations))
    )


def _counts(entry: h5py.Group) -> dict[str, int]:
    if "frames" not in entry:
        return {}
    return {name: int(value[()]) for name, value in entry["frames"].items() if value.shape == ()}


def _arrays(entry: h5py.Group, name: str) -> dict[str, Array] | None:
    """A group of arrays, in the order in which they were written where the file knows it."""
    if name not in entry:
        return None
    return {each: np.asarray(value[()]) for each, value in entry[name].items() if isinstance(value, h5py.Dataset)}


def _texts(dataset: h5py.Dataset) -> list[str]:
    return [str(value) for value in dataset.asstr()[:]]


def _scalar(dataset: h5py.Dataset) -> Any:
    return dataset.asstr()[()] if h5py.check_string_dtype(dataset.dtype) else dataset[()].item()


def _place(location: str) -> tuple[str, bytes]:
    bucket, _, key = location.removeprefix("s3://").partition("/")
    return bucket, unquote_to_bytes(key)

"""The product of a reduction: a NeXus/HDF5 file in memory, with everything needed to know where it came from.

In: ``Findings`` (state arrays, verdicts, counts) or the reason why there are none, and the ``Lineage``. Out: the bytes
of a file whose default plot is the obvious one. Layout:

    /entry                    NXentry; title, end_time; default names the NXdata below
    /entry/state/<name>       each STATE array, with its merge operation
    /entry/<name>_plot        NXdata over it: an image for two dimensions, a line for one
    /entry/verdicts           one byte a frame: 0 drop, 1 keep, 255 not reduced
    /entry/frames             NXcollection of counts, and gaps as (first frame, frames missing)
    /entry/error              why there is no state (instead of the four above)
    /entry/process            NXprocess: program, version, date; kernel source (NXnote), parameters, environment
    /entry/provenance         NXnote: the same as PROV-JSON (W3C PROV-DM terms)

Equal inputs give equal bytes: HDF5 times are off and names are written in one order.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import io
import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime

import h5py
import msgspec
import numpy as np
import numpy.typing as npt

from ingest.records import FrameGeometry, FrameLedger, ObjectRecord
from kernels.contract import DROP, KEEP, Kernel, StateSpec
from kernels.verdicts import UNREDUCED

CONTENT_TYPE = "application/x-hdf5"
COMPRESS_FROM_BYTES = 64 * 1024
"""Smaller arrays gain nothing from chunks and gzip."""
_CHUNK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Lineage:
    """Where a product comes from. Times are nanoseconds since the epoch."""

    kernel: Kernel
    params: Mapping[str, int | float]
    match: str
    source: ObjectRecord
    geometry: FrameGeometry | None
    started_ns: int
    ended_ns: int


@dataclasses.dataclass(frozen=True, slots=True)
class Findings:
    """What the kernel found. ``verdicts`` has one byte a frame; ``feedback_events`` counts what it emitted."""

    state: Mapping[str, npt.NDArray[np.generic]]
    verdicts: npt.NDArray[np.uint8]
    ledger: FrameLedger
    feedback_events: int


@dataclasses.dataclass(frozen=True, slots=True)
class Environment:
    """What the reduction ran on."""

    hiss: str
    python: str
    numpy: str
    numba: str
    cpu: str


@functools.cache
def environment() -> Environment:
    return Environment(
        hiss=_version("hiss-gateway"),
        python=platform.python_version(),
        numpy=_version("numpy"),
        numba=_version("numba"),
        cpu=_cpu_model(),
    )


def estimated_bytes(state: tuple[StateSpec, ...], frames: int) -> int:
    """An upper bound of the file's size before compression."""
    return sum(spec.size_bytes for spec in state) + frames + (1 << 20)


def build(lineage: Lineage, outcome: Findings | str) -> memoryview:
    """The file. ``outcome`` is what was found, or the reason why nothing was. Blocks for as long as gzip takes."""
    target = io.BytesIO()
    with h5py.File(target, "w", libver=("v110", "v110"), track_order=False) as file:
        file.attrs["NX_class"] = "NXroot"
        file.attrs["default"] = "entry"
        file.attrs["creator"] = f"hiss {environment().hiss}"
        entry = _group(file, "entry", "NXentry")
        _text(entry, "title", f"{lineage.kernel.name} over {lineage.source.bucket}/{_key_text(lineage.source.key)}")
        _text(entry, "start_time", _time(lineage.started_ns))
        _text(entry, "end_time", _time(lineage.ended_ns))
        if isinstance(outcome, str):
            _text(entry, "error", outcome)
        else:
            _findings(entry, lineage.kernel, outcome)
        _process(entry, lineage)
        _source(entry, lineage)
        _note(entry, "provenance", "application/json", msgspec.json.encode(_prov(lineage), order="sorted").decode())
    return target.getbuffer()


def _findings(entry: h5py.Group, kernel: Kernel, findings: Findings) -> None:
    states = _group(entry, "state", "NXcollection")
    plots = []
    for spec in kernel.state:
        array = findings.state[spec.name]
        dataset = _array(states, spec.name, array)
        dataset.attrs["merge"] = spec.merge
        if array.size > 1:
            plots.append(_plot(entry, f"{spec.name}_plot", spec.name, dataset, array.ndim))
    verdicts = _array(entry, "verdicts", findings.verdicts)
    verdicts.attrs["meaning"] = f"{DROP} drop, {KEEP} keep, {UNREDUCED} not reduced"
    plots.append(_plot(entry, "verdicts_plot", "verdicts", verdicts, 1))
    entry.attrs["default"] = plots[0]
    ledger = findings.ledger
    frames = _group(entry, "frames", "NXcollection")
    for name in ("received", "kept", "dropped", "replaced", "stored", "unreduced", "trailing_bytes"):
        frames.create_dataset(name, data=np.int64(getattr(ledger, name)), track_times=False)
    frames.create_dataset("gaps", data=np.array(ledger.gaps, np.int64).reshape(-1, 2), track_times=False)
    frames.create_dataset("feedback_events", data=np.int64(findings.feedback_events), track_times=False)


def _process(entry: h5py.Group, lineage: Lineage) -> None:
    process = _group(entry, "process", "NXprocess")
    _text(process, "program", "hiss")
    _text(process, "version", environment().hiss)
    _text(process, "date", _time(lineage.ended_ns))
    process.create_dataset("sequence_index", data=np.int64(1), track_times=False)
    kernel = _note(process, "kernel", "text/x-python", lineage.kernel.source)
    _text(kernel, "file_name", lineage.kernel.file)
    _text(kernel, "sha256", lineage.kernel.sha256)
    _text(kernel, "match", lineage.match)
    params = _group(process, "parameters", "NXcollection")
    for spec in lineage.kernel.params:
        value = np.dtype(spec.dtype).type(lineage.params[spec.name])
        params.create_dataset(spec.name, data=value, track_times=False)
    software = _group(process, "environment", "NXcollection")
    for name, version in dataclasses.asdict(environment()).items():
        _text(software, name, version)
    _text(software, "device", "cpu")


def _source(entry: h5py.Group, lineage: Lineage) -> None:
    source = lineage.source
    group = _group(entry, "source", "NXcollection")
    _text(group, "bucket", source.bucket)
    _text(group, "key", _key_text(source.key))
    _text(group, "version_id", source.version_id)
    _text(group, "object_id", source.object_id.hex())
    _text(group, "etag", source.etag)
    _text(group, "crc64nvme", f"{source.crc64nvme:016x}")
    _text(group, "stored", _time(source.modified_ns))
    group.create_dataset("length", data=np.int64(source.length), track_times=False)
    group["length"].attrs["units"] = "bytes"
    if lineage.geometry is not None:
        geometry = _group(group, "geometry", "NXcollection")
        _text(geometry, "dtype", lineage.geometry.dtype)
        geometry.create_dataset("shape", data=np.array(lineage.geometry.shape, np.int64), track_times=False)
        for name in ("origin", "frame_bytes"):
            geometry.create_dataset(name, data=np.int64(getattr(lineage.geometry, name)), track_times=False)


def _prov(lineage: Lineage) -> dict[str, object]:
    """PROV-JSON (W3C member submission): the product was generated by a reduction that used source and kernel."""
    source, kernel = lineage.source, lineage.kernel
    used = f"hiss:object/{source.object_id.hex()}"
    plan = f"hiss:kernel/{kernel.sha256}"
    activity = f"hiss:reduction/{source.object_id.hex()}/{kernel.name}"
    product = f"hiss:product/{source.object_id.hex()}/{kernel.name}"
    agent = f"hiss:software/{environment().hiss}"
    return {
        "prefix": {"hiss": "urn:hiss:", "prov": "http://www.w3.org/ns/prov#"},
        "entity": {
            used: {
                "prov:location": f"s3://{source.bucket}/{_key_text(source.key)}",
                "hiss:version_id": source.version_id,
                "hiss:crc64nvme": f"{source.crc64nvme:016x}",
                "hiss:length_bytes": source.length,
            },
            plan: {"prov:type": "prov:Plan", "hiss:file": kernel.file, "hiss:params": dict(lineage.params)},
            product: {},
        },
        "activity": {activity: {"prov:startTime": _time(lineage.started_ns), "prov:endTime": _time(lineage.ended_ns)}},
        "agent": {agent: {"prov:type": "prov:SoftwareAgent"}},
        "used": {"_:u1": {"prov:activity": activity, "prov:entity": used}},
        "wasGeneratedBy": {"_:g1": {"prov:entity": product, "prov:activity": activity}},
        "wasDerivedFrom": {"_:d1": {"prov:generatedEntity": product, "prov:usedEntity": used}},
        "wasAssociatedWith": {"_:a1": {"prov:activity": activity, "prov:agent": agent, "prov:plan": plan}},
    }


def _group(parent: h5py.Group, name: str, nx_class: str) -> h5py.Group:
    group = parent.create_group(name)
    group.attrs["NX_class"] = nx_class
    return group


def _note(parent: h5py.Group, name: str, content_type: str, data: str) -> h5py.Group:
    note = _group(parent, name, "NXnote")
    _text(note, "type", content_type)
    _text(note, "data", data)
    return note


def _text(parent: h5py.Group, name: str, value: str) -> None:
    # HDF5 strings end at the first NUL and must be UTF-8.
    clean = value.replace("\0", "\N{SYMBOL FOR NULL}").encode("utf-8", "replace").decode()
    parent.create_dataset(name, data=clean, dtype=h5py.string_dtype(), track_times=False)


def _array(parent: h5py.Group, name: str, array: npt.NDArray[np.generic]) -> h5py.Dataset:
    if array.nbytes < COMPRESS_FROM_BYTES:
        return parent.create_dataset(name, data=array, track_times=False)
    row_bytes = max(1, array.nbytes // array.shape[0])
    chunks = (max(1, min(array.shape[0], _CHUNK_BYTES // row_bytes)), *array.shape[1:])
    return parent.create_dataset(
        name, data=array, chunks=chunks, compression="gzip", compression_opts=1, shuffle=True, track_times=False
    )


def _plot(entry: h5py.Group, name: str, signal: str, dataset: h5py.Dataset, ndim: int) -> str:
    plot = _group(entry, name, "NXdata")
    plot[signal] = dataset
    plot.attrs["signal"] = signal
    plot.attrs["interpretation"] = "image" if ndim >= 2 else "spectrum"
    return name


def _key_text(key: bytes) -> str:
    return key.decode("utf-8", "backslashreplace")


def _time(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%S") + (
        f".{time_ns % 1_000_000_000 // 1000:06d}Z"
    )


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            found = re.search(r"^model name\s*:\s*(.+)$", file.read(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()

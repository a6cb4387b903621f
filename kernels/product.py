"""The product of a reduction: a NeXus/HDF5 file in memory, with everything needed to know where it came from.

In: ``Findings`` (state arrays, verdicts, counts) or the reason why there are none, and the ``Lineage``. Out: the bytes
of a file whose default plot is the obvious one. Layout:

    /entry                    NXentry; title, end_time; default names the NXdata below
    /entry/state/<name>       each STATE array, with its merge operation
    /entry/<name>_plot        NXdata over it: an image for two dimensions, a line for one
    /entry/result/<name>      the same arrays as finish() left them, each with an NXdata /entry/<name>.result_plot; the
                              first that finish() changed is the default plot
    /entry/rows               NXdata, one dataset a column, ordered by frame: what append() appended
    /entry/verdicts           one byte a frame: 0 drop, 1 keep, 2 replace, 3 stop, 252 behind a stop, 255 not reduced
    /entry/frames             NXcollection of counts, and gaps as (first frame, frames missing)
    /entry/error              why there is no state (instead of the four above)
    /entry/process, source, provenance: the lineage; see kernels/provenance.py

Equal inputs give equal bytes: HDF5 times are off and names are written in one order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import h5py
import numpy as np
import numpy.typing as npt

from ingest.records import FrameLedger
from kernels import nexus, provenance
from kernels.contract import DROP, FRAME_COLUMN, KEEP, REPLACE, STOP, Kernel, RowsSpec
from kernels.lineage import Lineage, environment
from kernels.verdicts import AFTER_STOP, UNREDUCED

CONTENT_TYPE = "application/x-hdf5"
_UNREADABLE_MAX = 10_000
"""Runs of frames named as unreadable."""
_COUNTS = (
    "received", "kept", "dropped", "replaced", "stored", "unreduced", "after_stop", "truncated", "discarded_bytes",
    "trailing_bytes",
)  # fmt: skip
_VERDICTS = {
    DROP: "drop", KEEP: "keep", REPLACE: "replace", STOP: "stop", AFTER_STOP: "behind a stop", UNREDUCED: "not reduced",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Findings:
    """What the kernel found. ``verdicts`` has one byte a frame; ``feedback_events`` counts what it emitted."""

    state: Mapping[str, npt.NDArray[np.generic]]
    verdicts: npt.NDArray[np.uint8]
    ledger: FrameLedger
    feedback_events: int
    unreadable: tuple[tuple[int, int], ...] = ()
    """(first frame, frames) whose stored bytes could not be decoded."""
    result: Mapping[str, npt.NDArray[np.generic]] | None = None
    """The state arrays as finish() left them."""
    rows: npt.NDArray[np.void] | None = None
    """What was appended, ordered by frame."""
    rows_left_out: int = 0


def estimated_bytes(findings: Findings) -> int:
    """An upper bound of the file's size before compression."""
    arrays = [*findings.state.values(), *(findings.result or {}).values(), findings.verdicts]
    arrays += [findings.rows] if findings.rows is not None else []
    return sum(array.nbytes for array in arrays) + (1 << 20)


def build(lineage: Lineage, outcome: Findings | str) -> memoryview:
    """The file. ``outcome`` is what was found, or the reason why nothing was. Blocks for as long as gzip takes."""

    def fill(root: h5py.Group) -> None:
        entry = write_entry(root, f"{lineage.kernel.name} over {lineage.subject.removeprefix('s3://')}")
        nexus.text(entry, "start_time", nexus.time_text(lineage.started_ns))
        nexus.text(entry, "end_time", nexus.time_text(lineage.ended_ns))
        if isinstance(outcome, str):
            nexus.text(entry, "error", outcome)
        else:
            _findings(entry, lineage.kernel, outcome)
        provenance.write(entry, lineage)

    return nexus.build(fill, 0 if isinstance(outcome, str) else estimated_bytes(outcome))


def write_entry(root: h5py.Group, title: str) -> h5py.Group:
    nexus.attribute(root, "NX_class", "NXroot")
    nexus.attribute(root, "default", "entry")
    nexus.attribute(root, "creator", f"hiss {environment().hiss}")
    entry = nexus.group(root, "entry", "NXentry")
    nexus.text(entry, "title", title)
    return entry


def _findings(entry: h5py.Group, kernel: Kernel, findings: Findings) -> None:
    plots = write_state(entry, kernel, findings.state, findings.result)
    if findings.rows is not None and kernel.rows is not None:
        write_rows(entry, kernel.rows, findings.rows)
    verdicts = nexus.array(entry, "verdicts", findings.verdicts)
    nexus.attribute(verdicts, "meaning", ", ".join(f"{value} {name}" for value, name in _VERDICTS.items()))
    # A dot: no state array has such a name.
    plots.append(nexus.plot(entry, "verdicts.plot", "verdicts", verdicts, 1))
    nexus.attribute(entry, "default", plots[0])
    _frames(entry, findings)


def write_state(
    entry: h5py.Group,
    kernel: Kernel,
    state: Mapping[str, npt.NDArray[np.generic]],
    result: Mapping[str, npt.NDArray[np.generic]] | None,
) -> list[str]:
    """State and result arrays with their plots; the names of the plots, best first."""
    states = nexus.group(entry, "state", "NXcollection")
    plots = []
    for spec in kernel.state:
        values = state[spec.name]
        dataset = nexus.array(states, spec.name, values)
        nexus.attribute(dataset, "merge", spec.merge)
        if values.size > 1:
            plots.append(nexus.plot(entry, f"{spec.name}_plot", spec.name, dataset, values.ndim))
    return plots if result is None else [*_result(entry, kernel, state, result), *plots]


def _result(
    entry: h5py.Group,
    kernel: Kernel,
    state: Mapping[str, npt.NDArray[np.generic]],
    result: Mapping[str, npt.NDArray[np.generic]],
) -> list[str]:
    """Returns the plots, of arrays that finish() changed first."""
    results = nexus.group(entry, "result", "NXcollection")
    changed: list[str] = []
    same: list[str] = []
    for spec in kernel.state:
        values = result[spec.name]
        dataset = nexus.array(results, spec.name, values)
        if values.size > 1:
            plot = nexus.plot(entry, f"{spec.name}.result_plot", spec.name, dataset, values.ndim)
            (same if values.tobytes() == state[spec.name].tobytes() else changed).append(plot)
    return changed + same


def write_rows(
    entry: h5py.Group, spec: RowsSpec, rows: npt.NDArray[np.void], objects: npt.NDArray[np.int64] | None = None
) -> None:
    """Columns of one length; ``objects``: which member of a run each row is of. A viewer scatters the first column that is
    no coordinate over x and y, or over the frame."""
    group = nexus.group(entry, "rows", "NXdata")
    if objects is not None:
        nexus.array(group, "object", objects)
    names = [FRAME_COLUMN, *(name for name, _ in spec.fields)]
    for name in names:
        nexus.array(group, name, np.ascontiguousarray(rows[name]))
    axes = ["x", "y"] if {"x", "y"} <= set(names) else [FRAME_COLUMN]
    nexus.attribute(group, "signal", next((name for name in names[1:] if name not in axes), FRAME_COLUMN))
    group.attrs["axes"] = axes
    nexus.attribute(group, "interpretation", "scatter")


def _frames(entry: h5py.Group, findings: Findings) -> None:
    ledger = findings.ledger
    frames = nexus.group(entry, "frames", "NXcollection")
    for name in _COUNTS:
        nexus.number(frames, name, getattr(ledger, name))
    nexus.array(frames, "gaps", np.array(ledger.gaps, np.int64).reshape(-1, 2))
    nexus.number(frames, "feedback_events", findings.feedback_events)
    nexus.number(frames, "rows_left_out", findings.rows_left_out)
    if ledger.stopped_at is not None:
        nexus.number(frames, "stopped_at", ledger.stopped_at)
    if findings.unreadable:
        unreadable = np.array(findings.unreadable[:_UNREADABLE_MAX], np.int64).reshape(-1, 2)
        meaning = "(first frame, frames) whose stored bytes are broken: not reduced, stored as received"
        nexus.attribute(nexus.array(frames, "unreadable", unreadable), "meaning", meaning)

"""The product of a reduction: a NeXus/HDF5 file in memory, with everything needed to know where it came from.

In: ``Findings`` (state arrays, verdicts, counts) or the reason why there are none, and the ``Lineage``. Out: the bytes
of a file whose default plot is the obvious one. Layout:

    /entry                    NXentry; title, end_time; default names the NXdata below
    /entry/state/<name>       each STATE array, with its merge operation
    /entry/<name>_plot        NXdata over it: an image for two dimensions, a line for one
    /entry/verdicts           one byte a frame: 0 drop, 1 keep, 2 replace, 3 stop, 255 not reduced
    /entry/frames             NXcollection of counts, and gaps as (first frame, frames missing)
    /entry/error              why there is no state (instead of the four above)
    /entry/process, source, provenance: the lineage; see kernels/provenance.py

Equal inputs give equal bytes: HDF5 times are off and names are written in one order.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping

import h5py
import numpy as np
import numpy.typing as npt

from ingest.records import FrameLedger
from kernels import nexus, provenance
from kernels.contract import DROP, KEEP, REPLACE, STOP, Kernel, StateSpec
from kernels.lineage import Lineage, environment
from kernels.verdicts import UNREDUCED

CONTENT_TYPE = "application/x-hdf5"
_UNREADABLE_MAX = 10_000
"""Runs of frames named as unreadable."""
_COUNTS = ("received", "kept", "dropped", "replaced", "stored", "unreduced", "trailing_bytes")


@dataclasses.dataclass(frozen=True, slots=True)
class Findings:
    """What the kernel found. ``verdicts`` has one byte a frame; ``feedback_events`` counts what it emitted."""

    state: Mapping[str, npt.NDArray[np.generic]]
    verdicts: npt.NDArray[np.uint8]
    ledger: FrameLedger
    feedback_events: int
    unreadable: tuple[tuple[int, int], ...] = ()
    """(first frame, frames) whose stored bytes could not be decoded."""


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
        entry = nexus.group(file, "entry", "NXentry")
        nexus.text(entry, "title", f"{lineage.kernel.name} over {lineage.subject.removeprefix('s3://')}")
        nexus.text(entry, "start_time", nexus.time_text(lineage.started_ns))
        nexus.text(entry, "end_time", nexus.time_text(lineage.ended_ns))
        if isinstance(outcome, str):
            nexus.text(entry, "error", outcome)
        else:
            _findings(entry, lineage.kernel, outcome)
        provenance.write(entry, lineage)
    return target.getbuffer()


def _findings(entry: h5py.Group, kernel: Kernel, findings: Findings) -> None:
    states = nexus.group(entry, "state", "NXcollection")
    plots = []
    for spec in kernel.state:
        values = findings.state[spec.name]
        dataset = nexus.array(states, spec.name, values)
        dataset.attrs["merge"] = spec.merge
        if values.size > 1:
            plots.append(nexus.plot(entry, f"{spec.name}_plot", spec.name, dataset, values.ndim))
    verdicts = nexus.array(entry, "verdicts", findings.verdicts)
    names = {DROP: "drop", KEEP: "keep", REPLACE: "replace", STOP: "stop", UNREDUCED: "not reduced"}
    verdicts.attrs["meaning"] = ", ".join(f"{value} {name}" for value, name in names.items())
    plots.append(nexus.plot(entry, "verdicts_plot", "verdicts", verdicts, 1))
    entry.attrs["default"] = plots[0]
    ledger = findings.ledger
    frames = nexus.group(entry, "frames", "NXcollection")
    for name in _COUNTS:
        nexus.number(frames, name, getattr(ledger, name))
    frames.create_dataset("gaps", data=np.array(ledger.gaps, np.int64).reshape(-1, 2), track_times=False)
    nexus.number(frames, "feedback_events", findings.feedback_events)
    if findings.unreadable:
        unreadable = np.array(findings.unreadable[:_UNREADABLE_MAX], np.int64).reshape(-1, 2)
        dataset = frames.create_dataset("unreadable", data=unreadable, track_times=False)
        dataset.attrs["meaning"] = (
            "(first frame, frames) whose stored bytes are broken: not reduced, stored as received"
        )

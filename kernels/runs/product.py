"""The product of a run: a NeXus/HDF5 file, laid out like the product of one object (kernels/product.py).

In: a ``RunFindings``. Out: its bytes. What is different from an object's product:

    /entry/run                NXcollection: bucket, prefix, status (open, closing, closed), closed_by, closed_at, group, members,
                              members_in_other_groups, pending (owed and not judged yet), failed, as_of (catalogue sequence)
    /entry/run/failures       (key, reason) of members that the kernel failed on; the first few
    /entry/members            one row a member, ordered by key: key, object_id, crc64nvme, frames, kept, dropped, replaced,
                              unreduced
    /entry/rows               as in an object's product, with a column ``object``: the row of /entry/members
    /entry/frames             sums over the members; gaps as (member, first frame, frames missing)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import h5py
import numpy as np
import numpy.typing as npt

from ingest.records import OwedInRun, RunRecord
from kernels import nexus, product, provenance
from kernels.contract import Kernel
from kernels.lineage import Environment, Epoch, Input, Lineage, location
from kernels.runs.partial import Member, Origin

CONTENT_TYPE = "application/x-hdf5"
MEMBER_BYTES = 2000
"""What a member takes in the file, about: its rows of /entry/members and /entry/source, and in the provenance."""
_COUNTS = ("frames", "kept", "dropped", "replaced", "unreduced", "after_stop")


@dataclasses.dataclass(frozen=True, slots=True)
class RunFindings:
    """``members`` in key order; all of them, or the first ``listed`` of ``count``."""

    run: RunRecord
    kernels: tuple[Kernel, ...]
    origin: Origin
    group: str
    state: Mapping[str, npt.NDArray[np.generic]]
    members: Sequence[Member]
    count: int
    elsewhere: int
    """Members of the run in other groups."""
    owed: OwedInRun
    as_of: int
    started_ns: int
    ended_ns: int
    feedback_events: int
    sums: Mapping[str, int]
    rows: npt.NDArray[np.void] | None = None
    """Ordered by key, then frame."""
    rows_left_out: int = 0
    result: Mapping[str, npt.NDArray[np.generic]] | None = None
    software: Environment | None = None
    """What it was computed with, where that was not here."""

    @property
    def kernel(self) -> Kernel:
        return self.kernels[-1]

    @property
    def status(self) -> str:
        if not self.run.closed_ns:
            return "open"
        return "closing" if self.owed.pending else "closed"


def sums_of(members: Sequence[Member]) -> dict[str, int]:
    return {name: sum(getattr(member, name) for member in members) for name in _COUNTS}


def build(findings: RunFindings) -> memoryview:
    """The file. Blocks for as long as gzip takes."""

    def fill(root: h5py.Group) -> None:
        title = f"{findings.kernel.name} over {location(findings.run.bucket, findings.run.run)[5:]}"
        entry = product.write_entry(root, title)
        nexus.text(entry, "start_time", nexus.time_text(findings.started_ns))
        nexus.text(entry, "end_time", nexus.time_text(findings.ended_ns))
        _state(entry, findings)
        _run(entry, findings)
        _frames(entry, findings)
        _members(entry, findings.members)
        provenance.write(entry, _lineage(findings))

    arrays = [*findings.state.values(), *(findings.result or {}).values()]
    arrays += [findings.rows] if findings.rows is not None else []
    return nexus.build(fill, sum(array.nbytes for array in arrays) + MEMBER_BYTES * len(findings.members))


def build_failure(run: RunRecord, kernel: str, owed: OwedInRun, as_of: int) -> memoryview:
    """A run whose members all failed: the product says why there is no state."""

    def fill(root: h5py.Group) -> None:
        entry = product.write_entry(root, f"{kernel} over {location(run.bucket, run.run)[5:]}")
        reasons = sorted({reason for _, reason in owed.failures})
        nexus.text(entry, "error", "; ".join(reasons) or "no member was reduced")
        group = nexus.group(entry, "run", "NXcollection")
        _about(group, run, "closed" if run.closed_ns else "open", owed, as_of)

    return nexus.build(fill, 0)


def _state(entry: h5py.Group, findings: RunFindings) -> None:
    plots = product.write_state(entry, findings.kernel, findings.state, findings.result)
    if findings.rows is not None and findings.kernel.rows is not None:
        objects = np.repeat(np.arange(len(findings.members)), [member.rows for member in findings.members])
        rows = findings.rows[: len(objects)]
        product.write_rows(entry, findings.kernel.rows, rows, objects)
    if plots:
        nexus.attribute(entry, "default", plots[0])


def _run(entry: h5py.Group, findings: RunFindings) -> None:
    group = nexus.group(entry, "run", "NXcollection")
    _about(group, findings.run, findings.status, findings.owed, findings.as_of)
    nexus.text(group, "group", findings.group)
    nexus.number(group, "members", findings.count)
    nexus.number(group, "members_listed", len(findings.members))
    nexus.number(group, "members_in_other_groups", findings.elsewhere)


def _about(group: h5py.Group, run: RunRecord, status: str, owed: OwedInRun, as_of: int) -> None:
    nexus.text(group, "bucket", run.bucket)
    nexus.text(group, "prefix", nexus.key_text(run.run))
    nexus.text(group, "status", status)
    if run.closed_ns:
        nexus.text(group, "closed_by", run.closed_by)
        nexus.text(group, "closed_at", nexus.time_text(run.closed_ns))
    nexus.number(group, "pending", owed.pending)
    nexus.number(group, "failed", owed.failed)
    failures = nexus.group(group, "failures", "NXcollection")
    nexus.texts(failures, "key", [nexus.key_text(key) for key, _ in owed.failures])
    nexus.texts(failures, "reason", [reason for _, reason in owed.failures])
    nexus.number(group, "as_of", as_of)


def _frames(entry: h5py.Group, findings: RunFindings) -> None:
    group = nexus.group(entry, "frames", "NXcollection")
    for name in _COUNTS:
        nexus.number(group, "received" if name == "frames" else name, findings.sums[name])
    gaps = [(number, first, count) for number, member in enumerate(findings.members) for first, count in member.gaps]
    dataset = nexus.array(group, "gaps", np.array(gaps, np.int64).reshape(-1, 3))
    nexus.attribute(dataset, "columns", "member, first frame, frames missing")
    nexus.number(group, "feedback_events", findings.feedback_events)
    nexus.number(group, "rows_left_out", findings.rows_left_out)


def _members(entry: h5py.Group, members: Sequence[Member]) -> None:
    group = nexus.group(entry, "members", "NXcollection")
    nexus.texts(group, "key", [nexus.key_text(member.key) for member in members])
    nexus.words(group, "object_id", [member.object_id.hex() for member in members])
    nexus.words(group, "crc64nvme", [f"{member.crc64nvme:016x}" for member in members])
    for name in _COUNTS:
        nexus.array(group, name, np.array([getattr(member, name) for member in members], np.int64))


def _lineage(findings: RunFindings) -> Lineage:
    bucket = findings.run.bucket
    return Lineage(
        kernel=findings.kernel,
        match=findings.origin.match,
        settings=findings.origin.lineage(),
        before=findings.kernels[:-1],
        inputs=tuple(
            Input(
                member.record(bucket),
                member.geometry,
                member.frames,
                tuple(Epoch(first, number) for first, number in member.epochs),
            )
            for member in findings.members
        ),
        started_ns=findings.started_ns,
        ended_ns=findings.ended_ns,
        run=findings.run.run,
        software=findings.software,
        device="cpu" if findings.origin.device == "cpu" else f"{findings.origin.device} as asked for, or cpu",
    )

"""Ordered kernels over objects of one frame: judged once the run is closed, in the order of the keys (bytewise), in one state.

In: a closed run with members that wait. Out: one partial with all of them, in the place of an earlier one where late members
opened the run again: an order cannot be continued in its middle, so that they are judged from the beginning. What always
holds: the members are exactly those that were owed or were in the earlier partial; a member that goes meanwhile fails the
commit, and the run is judged again.
"""

from __future__ import annotations

import logging

from ingest.errors import IngestError
from ingest.records import FrameGeometry, ObjectRecord, PartialRecord, RunProductRecord
from kernels.attach import Attachment
from kernels.layout.index import FrameIndex
from kernels.layout.placing import batch_members_max
from kernels.runs.batch import Batch
from kernels.runs.cell import Entry
from kernels.runs.gather import RunHost
from kernels.runs.groups import read_members
from kernels.runs.ledger import OneFrame, prior_of
from kernels.runs.names import group_of

log = logging.getLogger("hiss.kernels")

PAGE_OBJECTS = 1000


async def judge(
    host: RunHost, due: RunProductRecord, attachment: Attachment, owed: tuple[bytes, ...], listed: list[PartialRecord]
) -> None:
    """Raises IngestError, Gone, Postponed."""
    run = due.run
    group = group_of(attachment)
    batches = [one for one in listed if one.batch and one.group == group]
    wanted = set(owed)
    for one in batches:
        wanted.update(await read_members(host, one))
    records = await _members(host, due, wanted)
    domain = host.pad.domain(run.bucket)
    if domain is None:
        return
    layouts = [(record, *await host.single(record, domain)) for record in records]
    first, index = next(((geometry, index) for _, geometry, index in layouts if geometry is not None), (None, None))
    if first is None:
        return
    wanted_form = _form(first, index)
    lane = host.lane(run.bucket, attachment, first, domain)
    replaces = tuple(one.object_id for one in batches)
    batch = Batch(host, run.run, group, attachment, lane, domain, lambda _, __: None, replaces, _encoded(index))
    try:
        for record, geometry, index in layouts:
            if geometry is None or _form(geometry, index) != wanted_form:
                await _refuse(
                    host, record, due.kernel, "the frames of an ordered run have one dtype, shape and encoding"
                )
                continue
            trailing = record.length - geometry.frame_bytes - geometry.origin if index is None else 0
            batch.add(Entry(record, geometry, OneFrame([due.kernel], trailing, prior_of(record, False)), index), None)
        batch.close()
        if await batch.end():
            log.info("ordered run %r changed while it was judged: once more", run.run)
    finally:
        batch.abandon()


async def _members(host: RunHost, due: RunProductRecord, wanted: set[bytes]) -> list[ObjectRecord]:
    """The stored versions in key order."""
    found: list[ObjectRecord] = []
    after, more = b"", True
    run = due.run
    while more:
        rows, more = await host.catalog.list_objects(
            run.bucket, prefix=run.run, after=after, delimiter=b"/", limit=PAGE_OBJECTS
        )
        found += [row.record for row in rows if row.record is not None and row.record.object_id in wanted]
        after = rows[-1].key if rows else after
        more = more and bool(rows)
    return found


def _form(geometry: FrameGeometry, index: FrameIndex | None) -> tuple[object, ...]:
    """What the frames of one sequence have in common."""
    return geometry.dtype, geometry.shape, None if index is None else index.encoding


def _encoded(index: FrameIndex | None) -> int:
    return 0 if index is None else batch_members_max(index)


async def _refuse(host: RunHost, record: ObjectRecord, kernel: str, reason: str) -> None:
    try:
        await host.catalog.reduction_failed(record.object_id, kernel, f"format: {reason}", give_up=True)
    except IngestError as error:
        log.warning("kernel %s: the failure over %r was not recorded: %s", kernel, record.key, error)

"""A group of a run in memory: its kernel, and the total of its partials as the catalogue lists them.

In: what the catalogue lists, and what was known before. Out: the group as listed: partials that came are read and added; one
that went makes everything anew, because nothing can be taken out of a minimum. Raises NoSuchKey when a listed partial is
gone meanwhile (the caller looks again) and BadPartial.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
from collections.abc import Sequence

import h5py

from ingest.errors import NoSuchKey
from ingest.ports import KernelRefused
from ingest.records import PartialRecord
from kernels.contract import Kernel
from kernels.gate import admit
from kernels.runs import partial as partials
from kernels.runs.gather import RunHost
from kernels.runs.merge import Total
from kernels.runs.partial import BadPartial, Origin, Partial


@dataclasses.dataclass(slots=True)
class Group:
    kernel: Kernel
    origin: Origin
    total: Total


async def load_group(
    host: RunHost, bucket: str, name: str, listed: Sequence[PartialRecord], known: Group | None
) -> Group:
    wanted = {one.object_id for one in listed}
    group = known
    if group is None or not group.total.members.keys() <= wanted:
        group = None
    for one in sorted(listed, key=lambda each: each.since):
        if group is not None and one.object_id in group.total.members:
            continue
        body = await _body(host, bucket, one)
        if group is None:
            origin = await asyncio.to_thread(_origin, one, body)
            kernel = await asyncio.to_thread(_admitted, origin)
            group = Group(kernel, origin, Total(kernel))
        part = await _partial(host, bucket, one, body, group.kernel, group.origin)
        await asyncio.to_thread(group.total.add, one.object_id, part)
    assert group is not None, name
    return group


async def read_partial(host: RunHost, bucket: str, one: PartialRecord, kernel: Kernel, origin: Origin) -> Partial:
    return await _partial(host, bucket, one, await _body(host, bucket, one), kernel, origin)


async def _body(host: RunHost, bucket: str, one: PartialRecord) -> bytearray:
    record = await host.catalog.by_id(one.object_id)
    return await host.pad.read(record)


async def _partial(
    host: RunHost, bucket: str, one: PartialRecord, body: bytearray, kernel: Kernel, origin: Origin
) -> Partial:
    if one.batch:
        return await asyncio.to_thread(partials.decode, body)
    record = await host.catalog.by_id(one.object_id)
    try:
        source = await host.catalog.by_id(bytes.fromhex(record.metadata["hiss-source-object-id"]))
    except (KeyError, ValueError):
        raise NoSuchKey(one.object_id.hex()) from None
    return await asyncio.to_thread(partials.from_product, body, source, kernel, origin)


def _origin(one: PartialRecord, body: bytearray) -> Origin:
    if one.batch:
        return partials.decode(body).origin
    try:
        with h5py.File(io.BytesIO(body), "r") as file:
            process = file["entry/process"]
            params = {name: values[()].flat[0].item() for name, values in process["parameters"].items()}
            note = process["kernel"]
            name = note["file_name"].asstr()[()].removesuffix(".py")
            return Origin(name, note["data"].asstr()[()], note["match"].asstr()[()], params)
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise BadPartial(str(error)) from None


def _admitted(origin: Origin) -> Kernel:
    try:
        return admit(origin.name, origin.source.encode())
    except KernelRefused as refusal:
        raise BadPartial(f"its kernel is refused now: {refusal}") from None

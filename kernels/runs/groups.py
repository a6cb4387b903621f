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
from urllib.parse import unquote_to_bytes

import h5py
import msgspec

from ingest.errors import NoSuchKey
from ingest.ports import KernelRefused
from ingest.records import ObjectRecord, PartialRecord
from kernels.contract import Kernel
from kernels.gate import admit
from kernels.runs import partial as partials
from kernels.runs.gather import RunHost
from kernels.runs.merge import Total
from kernels.runs.partial import ArrayOrigin, BadPartial, Origin, Partial, Stage, StageValues


@dataclasses.dataclass(slots=True)
class Group:
    kernels: tuple[Kernel, ...]
    """The chain; the kernel itself comes last."""
    origin: Origin
    total: Total

    @property
    def kernel(self) -> Kernel:
        return self.kernels[-1]


async def load_group(
    host: RunHost, bucket: str, name: str, listed: Sequence[PartialRecord], known: Group | None
) -> Group:
    wanted = {one.object_id for one in listed}
    group = known
    if group is None or not group.total.members.keys() <= wanted or any(_lost(one, group) for one in listed):
        group = None
    for one in sorted(listed, key=lambda each: each.since):
        if group is not None and one.object_id in group.total.members:
            continue
        handed = host.handover.take(one.object_id)
        if group is not None and handed is not None:
            # The states of a group have one origin.
            part = msgspec.structs.replace(handed, origin=group.origin)
            if one.apart and len(part.members) != one.members:
                part = part.only(group.kernel, await host.catalog.member_keys(one.object_id))
            await asyncio.to_thread(group.total.add, one.object_id, part)
            continue
        body = await _body(host, bucket, one)
        if group is None:
            origin = await asyncio.to_thread(_origin, one, body)
            kernels = await asyncio.to_thread(_admitted, origin)
            group = Group(kernels, origin, Total(kernels[-1]))
        part = await _partial(host, bucket, one, body, group.kernel, group.origin)
        await asyncio.to_thread(group.total.add, one.object_id, part)
    assert group is not None, name
    return group


def _lost(one: PartialRecord, group: Group) -> bool:
    """Whether a partial with a state a member is not what it was when it was read."""
    known = group.total.members.get(one.object_id)
    return one.apart and known is not None and len(known) != one.members


async def read_partial(host: RunHost, bucket: str, one: PartialRecord, kernel: Kernel, origin: Origin) -> Partial:
    return await _partial(host, bucket, one, await _body(host, bucket, one), kernel, origin)


async def read_members(host: RunHost, one: PartialRecord) -> list[bytes]:
    """object_ids of a batch's members."""
    partial = await asyncio.to_thread(partials.decode, await _body(host, "", one))
    return [member.object_id for member in partial.members]


async def _body(host: RunHost, bucket: str, one: PartialRecord) -> bytearray:
    record = await host.catalog.by_id(one.object_id)
    return await host.pad.read(record)


async def _partial(
    host: RunHost, bucket: str, one: PartialRecord, body: bytearray, kernel: Kernel, origin: Origin
) -> Partial:
    if one.batch:
        found = await asyncio.to_thread(partials.decode, body)
        if not one.apart or len(found.members) == one.members:
            return found
        return found.only(kernel, await host.catalog.member_keys(one.object_id))
    record = await host.catalog.by_id(one.object_id)
    try:
        object_id = bytes.fromhex(record.metadata["hiss-source-object-id"])
    except (KeyError, ValueError):
        raise NoSuchKey(one.object_id.hex()) from None
    try:
        source = await host.catalog.by_id(object_id)
    except NoSuchKey:
        source = await _as_received(host, bucket, object_id, body)
    return await asyncio.to_thread(partials.from_product, body, source, kernel, origin)


async def _as_received(host: RunHost, bucket: str, object_id: bytes, body: bytearray) -> ObjectRecord:
    """The version that the product is of, where a raw filter left another one. Raises NoSuchKey where it is gone."""
    key, geometry = await asyncio.to_thread(partials.source_of, body)
    left = await host.catalog.head(bucket, key)
    if left.raw is None or left.raw.object_id != object_id:
        raise NoSuchKey(object_id.hex())
    return msgspec.structs.replace(
        left,
        object_id=object_id,
        length=left.raw.length,
        etag=left.raw.etag,
        crc64nvme=left.raw.crc64nvme,
        modified_ns=left.raw.received_ns,
        geometry=geometry,
        raw=None,
    )


def _origin(one: PartialRecord, body: bytearray) -> Origin:
    if one.batch:
        return partials.decode(body).origin
    try:
        with h5py.File(io.BytesIO(body), "r") as file:
            entry = file["entry"]
            before = sorted((name for name in entry if name.startswith("process_")), key=lambda name: int(name[8:]))
            processes = [entry[name] for name in (*before, "process")]
            epochs = 1 + int(entry["source/epochs"][()][:, 2].max())
            return Origin(
                match=entry["process/kernel/match"].asstr()[()],
                stages=tuple(_stage(process["kernel"]) for process in processes),
                settings=tuple(tuple(_values(process, epoch) for process in processes) for epoch in range(epochs)),
                device="cpu" if entry["process/environment/device"].asstr()[()] == "cpu" else "fpga",
            )
    except (OSError, KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise BadPartial(str(error)) from None


def _stage(note: h5py.Group) -> Stage:
    return Stage(note["file_name"].asstr()[()].removesuffix(".py"), note["data"].asstr()[()])


def _values(process: h5py.Group, epoch: int) -> StageValues:
    arrays = {}
    for name, uses in process["arrays"].items():
        place = uses["location"].asstr()[epoch]
        key = unquote_to_bytes(place.removeprefix("s3://").partition("/")[2])
        object_id, crc = (uses[column][epoch].decode() for column in ("object_id", "crc64nvme"))
        arrays[name] = ArrayOrigin(key, bytes.fromhex(object_id), int(crc, 16))
    params = {name: values[()].flat[epoch].item() for name, values in process["parameters"].items()}
    return StageValues(params, arrays)


def _admitted(origin: Origin) -> tuple[Kernel, ...]:
    try:
        return tuple(admit(stage.name, stage.source.encode()) for stage in origin.stages)
    except KernelRefused as refusal:
        raise BadPartial(f"its kernel is refused now: {refusal}") from None

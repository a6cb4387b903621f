"""A kernel host between peers of its own, and how a stream runs through it: shared by the tests of the host."""

from __future__ import annotations

import dataclasses
import io
import secrets

import h5py
import numpy as np

from ingest.counters import Counters
from ingest.ports import FrameReduction, StreamInfo
from ingest.records import CommitObject, FrameLedger, ObjectRecord
from kernels.host import HostLimits, KernelHost
from kernels.sandbox import SandboxLimits

BUCKET = "scan42"

COUNT = """
PARAMS = {"low": ("int64", 5), "pixels": ("int64", 1)}
STATE = {"hits": ("int64", (1,), "sum"), "total": ("int64", (4, 6), "sum"), "most": ("int64", (1,), "max")}

def frame(frame, params, state, index, out, feedback):
    n = 0
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            value = np.int64(frame[y, x])
            state.total[y % 4, x % 6] += value
            state.most[0] = max(state.most[0], value)
            n += value >= params.low
    state.hits[0] += n
    emit(feedback, 1, n)
    return KEEP if n >= params.pixels else DROP
"""


@dataclasses.dataclass
class Node:
    """A host and its peers, and how a stream runs through them."""

    host: KernelHost
    store: object
    feedback: object
    counters: Counters

    def attach(self, name: str, source: str, bucket: str = BUCKET, **metadata: str) -> None:
        self.store.put(bucket, f"_kernels/{name}.py".encode(), source.encode(), **metadata)

    def put_array(self, kernel: str, name: str, values: np.ndarray, bucket: str = BUCKET) -> None:
        target = io.BytesIO()
        np.save(target, values)
        self.store.put(bucket, f"_kernels/{kernel}/{name}.npy".encode(), target.getvalue())

    async def open(self, key: bytes, frames: np.ndarray, bucket: str = BUCKET, **metadata: str) -> Stream:
        await self.host.prepare(bucket)
        metadata = {
            "frame-dtype": frames.dtype.str,
            "frame-shape": ",".join(map(str, frames.shape[1:])),
            **{name.replace("_", "-"): value for name, value in metadata.items()},
        }
        object_id = secrets.token_bytes(16)
        info = StreamInfo(bucket, key, object_id, frames.nbytes, "application/octet-stream", metadata)
        return Stream(self, info, frames, self.host.open(info))

    def product(self, kernel: str, key: bytes, bucket: str = BUCKET) -> h5py.File:
        record = self.store.objects[bucket, f"_products/{kernel}/".encode() + key + b".nxs"]
        return h5py.File(io.BytesIO(self.store.bodies[record.object_id]))

    def has_product(self, kernel: str, key: bytes, bucket: str = BUCKET) -> bool:
        return (bucket, f"_products/{kernel}/".encode() + key + b".nxs") in self.store.objects

    def count(self, name: str, *labels: str) -> float:
        return self.counters.cell(name, *labels).value()

    def pids(self) -> list[int]:
        return [lane.sandbox_pid for lane in self.host._pool.lanes if lane.sandbox_pid]


@dataclasses.dataclass
class Stream:
    node: Node
    info: StreamInfo
    frames: np.ndarray
    reduction: FrameReduction | None
    batches: list = dataclasses.field(default_factory=list)

    def sniff(self) -> object:
        return self.reduction.sniff(memoryview(self.frames.tobytes())[:100], complete=False)

    def offer(self, first: int, count: int) -> object:
        regions = self.reduction.domain
        region, offset = regions.place(self.frames[first : first + count].tobytes())
        batch = self.node.store.batch_type(regions, region, offset, first, count)
        self.batches.append(batch)
        self.reduction.offer(batch)
        return batch

    def commit(self, discarded_bytes: int | None = None) -> ObjectRecord:
        ledger = self.reduction.ledger(len(self.frames), 0, discarded_bytes)
        record = self.node.store.commit_now(self.request(ledger), self.frames.tobytes())
        self.reduction.committed(record)
        return record

    def request(self, ledger: FrameLedger | None) -> CommitObject:
        kernels = (
            self.reduction.kernels if self.reduction is not None else self.node.host.kernels_for(BUCKET, self.info.key)
        )
        return CommitObject(
            bucket=self.info.bucket,
            key=self.info.key,
            object_id=self.info.object_id,
            length=self.frames.nbytes,
            etag="",
            crc64nvme=0,
            owner="tester",
            extents=(),
            metadata=dict(self.info.metadata),
            ledger=ledger,
            reductions=kernels,
            epochs=self.reduction.epochs if self.reduction is not None else (),
        )


def limits(**changes: object) -> HostLimits:
    sandbox = SandboxLimits(batch_timeout_s=1.0, frame_timeout_s=0.2, populate=False)
    return dataclasses.replace(HostLimits(sweep_s=0.2, grace_s=0.0, sandbox=sandbox), **changes)

"""Objects of one frame go into the state of a batch, and a batch becomes one partial of its run.

In: committed versions of one frame, with the frame still in the arena if it is there (revocably), else read back from disk.
Out: about once a second, for each run, kernel and layout, one stored partial that pays the reductions of all its members
in one commit; feedback as soon as a frame is judged. What always holds: a frame is offered only once its object exists;
every batch of frames is released exactly once; a member that is not in a stored partial stays owed in the catalogue, so
whatever ends this process costs time and no frame.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Coroutine
from typing import Protocol, TypeVar

from ingest.errors import IngestError
from ingest.ports import Catalog, Domain, FrameBatch, LandingPad
from ingest.records import FrameGeometry, ObjectRecord
from ingest.runs import run_of
from kernels.attach import Attachment, device_for
from kernels.decode.encoding import Encoding
from kernels.lane import Lane, LaneKey
from kernels.layout.index import FrameIndex
from kernels.layout.placing import batch_members_max
from kernels.passes import PassContext, Postponed
from kernels.runs.batch import Batch
from kernels.runs.cell import Entry
from kernels.runs.handover import Handover
from kernels.runs.ledger import OneFrame
from kernels.runs.names import group_of

log = logging.getLogger("hiss.kernels")

T = TypeVar("T")

ENTRIES_MAX = 1 << 16
"""Members of all batches at once; further ones stay owed until the sweep comes back to them."""

DEFER_S = 0.1
"""How long members of ordered kernels are collected for one mutation."""


class RunHost(Protocol):
    """The kernel host, as the rooms of runs see it."""

    catalog: Catalog
    pad: LandingPad
    context: PassContext
    handover: Handover

    def lane(self, bucket: str, attachment: Attachment, geometry: FrameGeometry, domain: Domain) -> Lane: ...
    def spawn(self, work: Coroutine[object, object, None], name: str) -> None: ...
    async def in_thread(self, work: Callable[[], T]) -> T: ...
    async def postpone(self, record: ObjectRecord, kernel: str, reason: Postponed) -> None: ...
    def succeeded(self, bucket: str, attachment: Attachment) -> None: ...
    async def single(self, record: ObjectRecord, domain: Domain) -> tuple[FrameGeometry | None, FrameIndex | None]:
        """What a stored version that is exactly one frame is like, and where it is stored if it is not plain. Raises Gone,
        Postponed or Hopeless."""
        ...

    async def attachment(self, bucket: str, kernel: str) -> Attachment | None:
        """As the bucket has it now; None when it is not there or is disabled."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class BatchKey:
    """What members of one batch have in common."""

    lane: LaneKey
    run: bytes
    group: str
    encoding: Encoding | None


def is_single(geometry: FrameGeometry, length: int) -> bool:
    """Whether a body of ``length`` bytes is exactly one frame (bytes after it are trailing)."""
    return geometry.count in (None, 1) and (length - geometry.origin) // geometry.frame_bytes == 1


class Gatherer:
    """All batches of one worker. Belongs to its event loop."""

    def __init__(self, host: RunHost) -> None:
        self._host = host
        self._open: dict[BatchKey, Batch] = {}
        self._batches: dict[Batch, BatchKey] = {}
        self._held: set[tuple[bytes, str]] = set()
        self._deferred: dict[tuple[str, bytes, str], list[bytes]] = {}
        self._closed = False

    def holds(self, object_id: bytes, kernel: str) -> bool:
        """Whether the member is in a batch that is not stored yet."""
        return (object_id, kernel) in self._held

    @property
    def full(self) -> bool:
        return self._closed or len(self._held) >= ENTRIES_MAX

    def add(
        self,
        record: ObjectRecord,
        attachment: Attachment,
        geometry: FrameGeometry,
        domain: Domain,
        ledger: OneFrame,
        frame: FrameBatch | None,
        index: FrameIndex | None = None,
    ) -> None:
        """Take a member; ``frame`` is its frame in the arena, which is released in any case. ``index``: where it is stored,
        if it is not plain."""
        identity = (record.object_id, attachment.kernel.name)
        if attachment.kernel.ordered:
            if frame is not None:
                frame.release()
            self._defer(record, attachment.kernel.name)
            return
        if self.full or identity in self._held:
            if frame is not None:
                frame.release()
            return
        settled = device_for(attachment, encoded=index is not None)
        lane = self._host.lane(record.bucket, settled, geometry, domain)
        key = BatchKey(lane.key, run_of(record.key), group_of(attachment), None if index is None else index.encoding)
        batch = self._open.get(key)
        if batch is None:
            encoded = 0 if index is None else batch_members_max(index)
            batch = Batch(self._host, key.run, key.group, attachment, lane, domain, self.done, encoded=encoded)
            self._open[key] = batch
            self._batches[batch] = key
            self._host.spawn(self._live(key, batch), f"batch {record.bucket}/{attachment.kernel.name}")
        self._held.add(identity)
        batch.add(Entry(record, geometry, ledger, index), frame)
        if batch.full:
            del self._open[key]
            batch.close()

    def _defer(self, record: ObjectRecord, kernel: str) -> None:
        """A kernel that must see the run's frames in order of their keys is run by the keeper, once the run is closed."""
        place = (record.bucket, run_of(record.key), kernel)
        if self._closed or (record.object_id, kernel) in self._held:
            return
        self._held.add((record.object_id, kernel))
        if place not in self._deferred:
            self._deferred[place] = []
            self._host.spawn(self._tell_deferred(place), "defer")
        self._deferred[place].append(record.object_id)

    async def _tell_deferred(self, place: tuple[str, bytes, str]) -> None:
        await asyncio.sleep(DEFER_S)
        object_ids = self._deferred.pop(place)
        try:
            await self._host.catalog.defer_reductions(*place, object_ids)
        except IngestError as error:
            log.warning("%d members of ordered kernel %s were not put off: %s", len(object_ids), place[2], error)
        finally:
            for object_id in object_ids:
                self.done(object_id, place[2])

    def done(self, object_id: bytes, kernel: str) -> None:
        """The member was stored, is gone, or is left to the sweep."""
        self._held.discard((object_id, kernel))

    async def close(self, timeout_s: float) -> None:
        """Store what is judged, for so long; the rest stays owed."""
        self._closed = True
        self._open.clear()
        for batch in self._batches:
            batch.close()
        if self._batches:
            await asyncio.wait([asyncio.ensure_future(batch.over.wait()) for batch in self._batches], timeout=timeout_s)

    async def _live(self, key: BatchKey, batch: Batch) -> None:
        try:
            await batch.filled(lambda: self._finishing(key))
            if self._open.get(key) is batch:
                del self._open[key]
            again = await batch.end()
        finally:
            if self._open.get(key) is batch:
                del self._open[key]
            self._batches.pop(batch, None)
            batch.abandon()
        for entry in again:
            self.add(entry.record, batch.attachment, entry.geometry, batch.domain, entry.ledger, None, entry.index)

    def _finishing(self, key: BatchKey) -> bool:
        """Whether an earlier batch of the same key is not stored yet: a kernel that lags gets fewer, larger batches."""
        open_batch = self._open.get(key)
        return any(other == key and batch is not open_batch for batch, other in self._batches.items())

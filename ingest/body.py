"""What every body has in common once its bytes are stored: the commit, an unknown outcome, the abort, settling.

A body ends exactly once: accepted (its commit is in the journal), refused (it never will be), or, while the catalogue does not
answer, in limbo: then nothing of it is freed until ``Buffer.resolve`` has learnt the outcome by committing again.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

import msgspec

from ingest.admission import Admission
from ingest.errors import CatalogUnavailable, IngestError, StreamAborted
from ingest.reader import SegmentReader
from ingest.records import CommitObject, CommitPart, Durability, Extent, FrameGeometry, ObjectRecord, PartRecord
from ingest.share_table import ACTIVE, BEST
from ingest.stream_types import StreamSpec

if TYPE_CHECKING:
    from ingest.buffer import Buffer
    from ingest.cluster.mirror import Lease, Mirroring
    from ingest.ports import FrameReduction
    from ingest.stream_types import Sender


READ_BACK_BYTES = 1 << 20
TRUNCATED_METADATA = "hiss-truncated"
"""User metadata of an object that a STOP cut short."""


class Body(abc.ABC):
    """Base of SpanStream and PackedStream."""

    reduction: FrameReduction | None = None
    kernels: tuple[str, ...] = ()
    """Kernels that match although no live reduction could be opened: they reduce the version from disk."""
    geometry: FrameGeometry | None = None
    discarded_bytes: int | None = None
    """Bytes of the body that are not stored, once a STOP has cut it short."""
    cut: asyncio.Event | None = None
    lane = BEST
    lane_version = -1
    counted = 0
    turn_bytes = 0
    """For ingest/shaping.py: the lane, as of which version of the table, the bytes that it counted, what is left of a turn."""
    is_copy = False
    """It is the second copy of a body that another node receives."""
    mirror: Mirroring | None = None
    """The second copy that is made on another node while the body arrives."""

    def __init__(self, plane: Buffer, spec: StreamSpec, object_id: bytes) -> None:
        self.plane = plane
        self.spec = spec
        self.object_id = object_id
        self.began_ns = 0
        self.admission = Admission()
        self.sender: Sender | None = None
        self.length = 0
        self.memory = spec.settings.durability is Durability.MEMORY and not spec.part
        self.ended = False
        self.accepted = False
        self.limbo = False
        self.record: ObjectRecord | None = None
        self.failure: IngestError | None = None
        self.committed_extents: tuple[Extent, ...] = ()
        self._waiter: asyncio.Future[None] | None = None

    # -- what the two kinds do differently

    @abc.abstractmethod
    def extents(self) -> tuple[Extent, ...]:
        """Where the bytes are (to be) on disk."""

    @property
    @abc.abstractmethod
    def is_settled(self) -> bool:
        """A flush covers every byte."""

    @abc.abstractmethod
    def hasten(self) -> None:
        """A reader waits for this object: write what is still only in memory."""

    @abc.abstractmethod
    def let_go(self) -> None:
        """The body has ended: free what nobody needs any more."""

    @abc.abstractmethod
    def cancel(self) -> None:
        """The body was refused: take back what has not been started."""

    def whole(self) -> memoryview | None:
        """All bytes of the body, where they lie in one piece of memory still."""
        return None

    # -- the second copy (MirrorSource)

    @abc.abstractmethod
    def lend(self, position: int) -> Lease | None:
        """Bytes of the body from ``position`` on that are in memory."""

    @abc.abstractmethod
    def mirrored(self) -> None:
        """The copy has come further: free what was kept for it alone."""

    def stored_until(self, position: int) -> int:
        return position

    async def read_back(self, start: int, stop: int) -> AsyncGenerator[memoryview, None]:
        """Bytes of the body that are on the disk already."""
        plane = self.plane
        reader = await SegmentReader.open(plane.paths, plane.executor, self.extents(), start, stop)
        try:
            async with contextlib.aclosing(reader.chunks(READ_BACK_BYTES)) as views:
                async for view in views:
                    yield view
        finally:
            reader.close()

    async def ready(self) -> None:
        """The body may come: where it needs a second copy, another node has said that it takes it. Raises MirrorUnavailable."""
        if self.mirror is not None:
            await self.mirror.ready()

    def _without_copy(self) -> bool:
        """The bucket asks for a second copy, and its settings let the body do without."""
        return self.mirror is not None and self.mirror.degraded

    # -- waiting for memory

    async def wait_for_memory(self) -> None:
        self.plane.backpressure.add()
        self._waiter = asyncio.get_running_loop().create_future()
        self.plane.wait_for_memory(self.wake)
        await self._waiter

    async def wait_for_turn(self) -> None:
        """Until whoever has a reservation leaves something."""
        shaper = self.plane.shaper
        while shaper.words[ACTIVE] and self.failure is None and not shaper.allowed(self):
            self._waiter = asyncio.get_running_loop().create_future()
            shaper.queue(self)
            await self._waiter

    @property
    def received_total(self) -> int:
        """Bytes that have come, stored or not."""
        return self.length + (self.discarded_bytes or 0)

    def backlog(self) -> int:
        """Bytes that have come and wait in the socket."""
        return 0 if self.sender is None else self.sender.backlog()

    def set_window(self, size_bytes: int) -> None:
        """As ``Sender.set_window``; a body that is no longer than that needs none."""
        if self.sender is not None and (self.spec.length is None or self.spec.length > size_bytes):
            self.sender.set_window(size_bytes)

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, error: IngestError) -> None:
        if self.failure is None:
            self.failure = error
            self.wake()

    # -- the end

    async def commit(self, request: CommitObject) -> ObjectRecord:
        """Make the body the current version of its key; kernels get to know. Raises CatalogError.

        When the catalogue does not answer, the outcome is unknown: the extents stay reserved until it is known.
        """
        request = msgspec.structs.replace(
            request,
            extents=self.extents(),
            settled=self.is_settled,
            mirror_later=request.mirror_later or self._without_copy(),
        )
        if self.reduction is not None:
            request = msgspec.structs.replace(
                request,
                ledger=self.reduction.ledger(*self.frame_counts(), self.discarded_bytes),
                geometry=self.geometry,
                reductions=self.reduction.kernels,
                epochs=self.reduction.epochs,
                filters=self.reduction.filters,
            )
            if self.discarded_bytes is not None:
                assert request.ledger is not None
                cut = f"frames={request.ledger.received}; bytes={request.length}"
                request = msgspec.structs.replace(request, metadata=request.metadata | {TRUNCATED_METADATA: cut})
        elif self.kernels:
            assert self.plane.host is not None
            filters = self.plane.host.filters(request.bucket, request.key)
            request = msgspec.structs.replace(request, reductions=self.kernels, filters=filters)
        try:
            record = await self.plane.catalog.commit(request)
        except (CatalogUnavailable, asyncio.CancelledError):
            self._to_limbo(request)
            raise
        self.adopt(record, request.extents)
        return record

    async def commit_part(self, request: CommitPart) -> PartRecord:
        """Make the body a part of its upload. Raises CatalogError."""
        part = msgspec.structs.replace(request.part, extents=self.extents(), settled=True)
        level = Durability.MIRROR if self.mirror is not None and not self._without_copy() else Durability.DISK
        request = msgspec.structs.replace(request, part=part, durability=level)
        try:
            committed = await self.plane.catalog.commit_part(request)
        except (CatalogUnavailable, asyncio.CancelledError):
            self._to_limbo(request)
            raise
        self.adopt(None, part.extents)
        return committed

    async def hold(self) -> None:
        """Have the catalogue hold the body as the second copy of one that another node receives. Raises CatalogError:
        StaleVersion where that one has gone already."""
        extents = self.extents()
        try:
            await self.plane.catalog.hold_mirror(self.object_id, extents)
        except (CatalogUnavailable, asyncio.CancelledError):
            self._to_limbo(extents)
            raise
        self.held(extents)

    def held(self, extents: tuple[Extent, ...]) -> None:
        """The catalogue knows the body's extents, although no version of ours has them."""
        if not self.ended:
            self.plane.ended(self)
        self.limbo = False
        self.ended = self.accepted = True
        self.plane.segments.adopt(extents)
        self.let_go()

    def _to_limbo(self, request: CommitObject | CommitPart | tuple[Extent, ...]) -> None:
        self.limbo = self.ended = True
        self.plane.ended(self)
        self.plane.resolve(self, request)

    def frame_counts(self) -> tuple[int, int]:
        """(whole frames received, bytes after the last)."""
        geometry = self.geometry
        if geometry is None:
            return 0, 0
        frames, trailing = divmod(max(0, self.length - geometry.origin), geometry.frame_bytes)
        if geometry.count is not None and frames > geometry.count:
            trailing += (frames - geometry.count) * geometry.frame_bytes
            frames = geometry.count
        return frames, trailing

    def adopt(self, record: ObjectRecord | None, extents: tuple[Extent, ...]) -> None:
        """The commit is in the journal (``record`` is None for a part)."""
        if not self.ended:
            self.plane.ended(self)
        self.limbo = False
        self.ended = self.accepted = True
        self.record = record
        self.committed_extents = extents
        self.plane.segments.adopt(extents)
        self.plane.committed_objects.add()
        self.plane.committed_bytes.add(self.length)
        if record is not None and self.reduction is not None:
            self.reduction.committed(record)
        elif record is not None and self.kernels and self.plane.host is not None:
            self.plane.host.landed(record, self.kernels, self.whole())
        if self.memory and record is not None:
            self.plane.unsettled(self)
        self.let_go()
        self.check_settled()

    def check_settled(self) -> None:
        """Tell the catalogue once a ``memory`` object has reached the disk."""
        if self.memory and self.record is not None and self.is_settled:
            self.memory = False
            self.plane.settled(self, self.record, self.committed_extents, self.extents())

    @abc.abstractmethod
    def relocated(self) -> None:
        """The catalogue names the place where a body that moved after its digest was given out is now."""

    async def abort(self) -> None:
        """Forget the body: its memory and its extents are free again. Does nothing after a commit, or twice."""
        if not self.ended:
            self.refuse()

    def refuse(self) -> None:
        """The body will not be committed."""
        if not self.ended:
            self.plane.ended(self)
        self.limbo = False
        self.ended = True
        if self.mirror is not None:
            self.mirror.abort()
            if self.mirror.may_be_held:
                self.plane.drop_mirror(self.object_id)
        self.plane.aborted_streams.add()
        self.fail(StreamAborted("the stream was aborted"))
        if self.reduction is not None:
            self.reduction.aborted()
        self.cancel()
        self.let_go()

    @property
    def is_refused(self) -> bool:
        return self.ended and not self.accepted and not self.limbo

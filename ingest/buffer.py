"""The buffer of one worker: where the other rooms meet arena, segments and catalogue.

Upstream: s3api and WebDAV open streams and readers; the kernel room loads and stores through it (``LandingPad``).
Downstream: arena, packer, writer, segments, catalogue. One event loop owns it.
Always holds: every admitted stream can count on its guaranteed spans; memory handed out beyond that never eats into what is
owed to others; an extent is free only when the catalogue has said that no committed version has it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor

import msgspec

from ingest import bucket_settings
from ingest.admission import Admission, Admissions
from ingest.arena import SLAB_BYTES, SPANS_GUARANTEED, Arena, ArenaDomain, Span
from ingest.body import Body
from ingest.cluster.copies import Copies
from ingest.cluster.members import Members
from ingest.cluster.mirror import Mirroring, MirrorMeter
from ingest.cluster.neighbours import Neighbours
from ingest.cluster.peer import MirrorOf
from ingest.cluster.relay import RelayReader, open_copies
from ingest.counters import Counters
from ingest.errors import (
    BufferFull,
    CatalogError,
    CatalogUnavailable,
    DataLost,
    IngestError,
    MirrorUnavailable,
    NodeAway,
    NodeDraining,
    NotAdmitted,
    ObjectOffline,
    StaleVersion,
    StorageFailed,
)
from ingest.label import Label
from ingest.landing import Lent, fill, gather, read_into
from ingest.packing import PACKED_BYTES_MAX, PackedStream, Packer
from ingest.paths import NodePaths
from ingest.ports import Catalog, Domain, FrameHost, FrameReduction, StreamInfo
from ingest.reader import SegmentReader, StaleExtent, lies_on
from ingest.records import (
    BLOCK_BYTES,
    CommitObject,
    CommitPart,
    Durability,
    Extent,
    FreedExtents,
    LifetimeClass,
    ObjectRecord,
    ObjectState,
    SettleRequest,
)
from ingest.segments import OPEN_EXTENT_BYTES, Reservation, SegmentStore
from ingest.shaping import Shaper
from ingest.share_table import ShareTable
from ingest.span_table import OwedSpan, SpanTable
from ingest.storage_class import needs_restore
from ingest.stream import SpanStream
from ingest.stream_types import StreamSpec
from ingest.writer import Writer

logger = logging.getLogger(__name__)

GUARANTEED_SHARE = 0.75
"""Admitted streams may be promised this share of the arena; the rest keeps packing slabs and bursts going."""
RESERVED_MEMORY_S = 0.25
"""A reserved stream can count on memory for so much of its rate,"""
RESERVED_ARENA_SHARE = 0.5
"""and on so much of the arena at most."""
SETTLE_TIMEOUT_S = 30.0
ENGINE_AWAY_S = 1.0
"""A shorter absence of a cluster's engine is waited out by whoever has a body already."""
OPEN_TRIES = 5
REOPEN_WAIT_S = 0.05
PRODUCT_MIRRORED_BYTES_MAX = 16 << 20
"""Products of kernels, and what runs are made of, get a second copy on another node up to this size."""
READ_BYTES = 1 << 20
"""One piece of a range that is read to be stored anew."""
RESOLVE_RETRY_S = 0.5
SETTLE_BATCH_S = 0.02


class Buffer:
    """Implements ``ingest.stream_types.DataPlane`` and ``ingest.ports.LandingPad``."""

    def __init__(
        self,
        *,
        paths: NodePaths,
        arena: Arena,
        spans: SpanTable,
        segments: SegmentStore,
        catalog: Catalog,
        executor: Executor,
        counters: Counters,
        recall_timeout_s: float = 30.0,
        shares: ShareTable | None = None,
    ) -> None:
        self.paths = paths
        self.arena = arena
        self.segments = segments
        self.catalog = catalog
        self.executor = executor
        self.recall_timeout_s = recall_timeout_s
        self.writer = Writer(segments, executor, lambda: arena.used_bytes / max(1, arena.size_bytes))
        shares = shares or ShareTable(None)
        self.admissions = Admissions(catalog, shares, segments.node, segments.slot)
        self.shaper = Shaper(shares, segments.slot, self.admissions.lane_of)
        self.packer = Packer(self)
        self.host: FrameHost | None = None
        self.neighbours: Neighbours | None = None
        """The other nodes, where this one is of a cluster."""
        self._members = Members(paths)
        self.copies: Copies | None = None
        """Of what all nodes must be able to read, where this one is of a cluster."""
        self._spans = spans
        self._streams: set[SpanStream] = set()
        """Streams that have not ended, and ended ones whose frames a kernel still reads."""
        self._active: set[Body] = set()
        self._unsettled: dict[bytes, Body] = {}
        self._settling: list[bytes] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._starving = False
        self.received_bytes = counters.cell("hiss_ingest_received_bytes_total")
        self.committed_objects = counters.cell("hiss_ingest_committed_objects_total")
        self.committed_bytes = counters.cell("hiss_ingest_committed_bytes_total")
        self.aborted_streams = counters.cell("hiss_ingest_aborted_streams_total")
        self.backpressure = counters.cell("hiss_ingest_backpressure_total")
        self.discarded_bytes = counters.cell("hiss_ingest_discarded_bytes_total")
        self._not_admitted = counters.cell("hiss_reservation_refused_total")
        self._slow_down = counters.cell("hiss_ingest_slow_down_total")
        self._mirror_meter = MirrorMeter(counters)
        self._active_gauge = counters.cell("hiss_ingest_active_streams")
        self._active_gauge.set(0)
        catalog.subscribe(self._pushed)

    # -- bodies in

    def open_stream(self, spec: StreamSpec) -> SpanStream | PackedStream:
        """Admit a body; raises BufferFull. No memory is held before its first byte."""
        admission = self._let_in(spec)
        try:
            return self._opened(spec, admission)
        except BaseException:
            self.admissions.let_go(admission)
            raise

    def _let_in(self, spec: StreamSpec) -> Admission:
        """What is reserved lets the body in, and leaves it room. Raises BufferFull."""
        self.admit()
        try:
            admission = self.admissions.admit(spec)
        except NotAdmitted:
            self._slow_down.add()
            self._not_admitted.add()
            raise
        try:
            self._check_room(spec, self.admissions.held_bytes(admission))
        except BufferFull:
            self.admissions.let_go(admission)
            raise
        return admission

    def _opened(self, spec: StreamSpec, admission: Admission) -> SpanStream | PackedStream:
        object_id = os.urandom(16)
        reduction = None
        kernels: tuple[str, ...] = ()
        if self.host is not None and not spec.part and spec.length != 0:
            info = StreamInfo(
                bucket=spec.bucket.name,
                key=spec.key,
                object_id=object_id,
                length=spec.length,
                content_type=spec.content_type,
                metadata=spec.metadata,
            )
            reduction = self.host.open(info)
            if reduction is None:
                kernels = self.host.kernels_for(spec.bucket.name, spec.key)
        stream = self._admitted(spec, object_id, reduction)
        stream.kernels = kernels
        stream.admission = admission
        stream.began_ns = self.catalog.now_ns()
        return stream

    def open_copy(self, spec: StreamSpec, object_id: bytes) -> SpanStream | PackedStream:
        """Admit the second copy of a body that another node receives under this id; raises BufferFull. No kernel sees it."""
        self.admit()
        self._check_room(spec, self.admissions.held_bytes(Admission()))
        stream = self._admitted(spec, object_id, None)
        stream.is_copy = True
        return stream

    def admit(self) -> None:
        """Whether a body may come now. Raises NodeDraining, CatalogUnavailable."""
        if self._members.leaving:
            self._slow_down.add()
            raise NodeDraining("this node is being emptied: send to another one")
        if self.catalog.engine_away_s > ENGINE_AWAY_S:
            raise CatalogUnavailable("the cluster's engine does not answer: nothing can be committed now")
        if self.catalog.commits_stuck_s:
            raise CatalogUnavailable("the cluster's engine takes no commits now")

    def _check_room(self, spec: StreamSpec, held_bytes: int = 0) -> None:
        """``held_bytes``: room that must be left."""
        if not self.segments.can_hold((spec.length or 0) + held_bytes):
            self._slow_down.add()
            raise BufferFull("the buffer has no room for this body until older data has drained")

    def _admitted(
        self, spec: StreamSpec, object_id: bytes, reduction: FrameReduction | None
    ) -> SpanStream | PackedStream:
        stream: SpanStream | PackedStream
        if reduction is None and spec.length is not None and spec.length <= PACKED_BYTES_MAX:
            stream = PackedStream(self, spec, object_id)
        else:
            domain = reduction.domain if reduction is not None else None
            assert domain is None or isinstance(domain, ArenaDomain)
            if domain is not None and not self._admissible(domain):
                domain = None  # its kernels catch up from disk; ingest does not wait for them
            if domain is None and not self._admissible(None):
                if reduction is not None:
                    reduction.aborted()
                self._slow_down.add()
                raise BufferFull("too many bodies are arriving for the memory of this worker")
            stream = SpanStream(self, spec, reduction, domain, object_id)
            self._streams.add(stream)
            if domain is not None:
                domain.users += 1
        self._active.add(stream)
        self._active_gauge.set(len(self._active))
        if spec.settings.durability is Durability.MIRROR and spec.length != 0:
            try:
                self._begin_copy(stream)
            except IngestError:
                stream.refuse()
                raise
        return stream

    def _begin_copy(self, stream: SpanStream | PackedStream, loss: str = "") -> None:
        """Have another node store the body, too. ``loss``: as of ``hiss.mirror-loss``; empty: as the bucket says. Raises
        MirrorUnavailable."""
        spec = stream.spec
        if self.neighbours is None:
            raise MirrorUnavailable("the bucket asks for a second copy on another node, and this node is alone")
        # A STOP may end it early, and small bodies are sent whole: asking first would cost them a turn.
        length = None if stream.reduction is not None and spec.stoppable else spec.length
        packed = isinstance(stream, PackedStream)
        stream.mirror = Mirroring(
            self.neighbours,
            stream,
            MirrorOf(stream.object_id, spec.bucket.name, spec.key, length, spec.lifetime),
            me=self.segments.node,
            loss=loss or spec.settings.mirror_loss,
            meter=self._mirror_meter,
            ask=not packed,
        )
        if not packed:
            stream.mirror.start()

    def drop_mirror(self, object_id: bytes) -> None:
        """The body will not be committed: what another node holds of it is free."""
        self._keep(self._drop_mirror(object_id))

    async def _drop_mirror(self, object_id: bytes) -> None:
        try:
            await self.catalog.drop_mirror([object_id])
        except IngestError as error:
            # Its node drops it by itself, later.
            logger.warning("the copy of %s is still held: %s", object_id.hex(), error)

    def _admissible(self, domain: ArenaDomain | None) -> bool:
        promised = sum(self._guarantee(stream) for stream in self._streams_of(domain))
        return promised + SPANS_GUARANTEED <= GUARANTEED_SHARE * self.arena.total_slabs(domain)

    def _streams_of(self, domain: ArenaDomain | None) -> list[SpanStream]:
        return [stream for stream in self._streams if stream.domain is domain and not stream.ended]

    def _guarantee(self, stream: SpanStream) -> int:
        """Slabs that the stream can count on: what is reserved must not wait for a disk that others keep busy."""
        least = SPANS_GUARANTEED * stream.span_slabs
        share = self.shaper.share_of(stream)
        if not share:
            return least
        most = int(RESERVED_ARENA_SHARE * self.arena.total_slabs(stream.domain))
        return max(least, min(most, -(-int(share * RESERVED_MEMORY_S) // SLAB_BYTES)))

    def before_extent(self, stream: SpanStream, left_bytes: int | None) -> None:
        """The stream is about to take more room on disk. Raises BufferFull where that is reserved for others, or where a body
        of unknown length has come to the end of what its own bucket has reserved."""
        if left_bytes is None:
            self.admissions.grow(stream.spec, stream.admission, OPEN_EXTENT_BYTES)
        held_bytes = self.admissions.held_bytes(stream.admission)
        if held_bytes and (stream.began_ns or stream.is_copy) and not self.segments.can_hold(held_bytes + 1):
            raise BufferFull("what room there is has been reserved")

    def ended(self, body: Body) -> None:
        """The body has been committed, refused, or is in limbo."""
        self.shaper.ended(body)
        self.admissions.let_go(body.admission)
        self._active.discard(body)
        self._active_gauge.set(len(self._active))

    def closed_out(self, stream: SpanStream) -> None:
        """The stream holds no memory any more."""
        if stream in self._streams:
            self._streams.discard(stream)
            if stream.domain is not None:
                stream.domain.users -= 1
                self.arena.retire_idle_domains()

    def busy(self) -> bool:
        """Bodies are arriving."""
        return bool(self._active)

    # -- memory

    def take_span(self, stream: SpanStream, size_bytes: int) -> Span | None:
        """Memory for a stream: within its guarantee, or beyond it where that takes nothing from what others are owed."""
        slabs = size_bytes // SLAB_BYTES
        if stream.held_slabs + slabs > self._guarantee(stream) and not self._spare(stream.domain, slabs, stream):
            return None
        span = self.arena.take(size_bytes, stream.domain)
        if span is not None:
            stream.held_slabs += span.slabs
        return span

    def _spare(self, domain: ArenaDomain | None, slabs: int, asking: SpanStream | None) -> bool:
        owed = sum(
            max(0, self._guarantee(stream) - stream.held_slabs)
            for stream in self._streams_of(domain)
            if stream is not asking
        )
        return self.arena.free_slabs(domain) - slabs >= owed

    def give_span(self, span: Span) -> None:
        self.paid(span)
        span.free()

    def take_pack_span(self, size_bytes: int) -> Span | None:
        if not self._spare(None, size_bytes // SLAB_BYTES, None):
            return None
        return self.arena.take(size_bytes, None)

    def wait_for_memory(self, waiter: Callable[[], None]) -> None:
        """Call ``waiter`` when memory may be free, and do what can be done to make it so."""
        self.arena.notify(waiter)
        self._starving = True
        self.relieve()
        self.writer.pump_lazy(pressed=True)

    def relieve(self) -> None:
        """Take frames back that no sandbox has begun: a slow kernel costs its product, never the stream."""
        if not self._starving:
            return
        self._starving = False
        for stream in list(self._streams):
            batches = stream.revocable()
            for batch in batches:
                batch.revoke()
            if batches:
                stream.release_pieces()

    def owe(self, span: Span, owed: OwedSpan) -> None:
        self._spans.owe(span.offset // SLAB_BYTES, owed)

    def paid(self, span: Span) -> None:
        self._spans.paid(span.region.index, span.offset // SLAB_BYTES)

    def label(
        self,
        object_id: bytes,
        spec: StreamSpec,
        reservation: Reservation,
        position: int,
        offset: int | None = None,
        length: int | None = None,
    ) -> Label:
        """The label of a body's extent; ``offset`` and ``length`` where the extent is only part of the reservation."""
        return Label(
            object_id=object_id,
            bucket=spec.bucket.name,
            key=spec.key,
            node=self.segments.node,
            slot=self.segments.slot,
            segment=reservation.segment.number,
            generation=reservation.segment.generation,
            offset=reservation.offset if offset is None else offset,
            position=position,
            length=reservation.capacity if length is None else length,
            created_ns=time.time_ns(),
        )

    # -- after the commit

    def unsettled(self, body: Body) -> None:
        self._unsettled[body.object_id] = body

    def settled(self, body: Body, record: ObjectRecord, committed: Sequence[Extent], extents: Sequence[Extent]) -> None:
        """A ``memory`` object is on disk, perhaps not where its commit said (a segment failed meanwhile)."""
        moved = _moved(committed, extents)
        if moved:
            # The catalogue has yet to hear where the bytes are now.
            self.segments.hold([extent for _, new in moved for extent in new])
            self._keep(self._relocate(body, record.object_id, moved))
            return
        self._tell_settled(record.object_id)

    def _tell_settled(self, object_id: bytes) -> None:
        """One mutation for all that settle within SETTLE_BATCH_S: it costs the catalogue as much as a commit."""
        if not self._settling:
            asyncio.get_running_loop().call_later(SETTLE_BATCH_S, lambda: self._keep(self._settle()))
        self._settling.append(object_id)

    async def _settle(self) -> None:
        object_ids, self._settling = self._settling, []
        told = False
        while object_ids:
            try:
                await self.catalog.settled(object_ids)
                break
            except IngestError as error:
                if not told:
                    logger.warning(
                        "%d objects are on disk but the catalogue does not know yet: %s", len(object_ids), error
                    )
                told = True
                await asyncio.sleep(RESOLVE_RETRY_S)
        for object_id in object_ids:
            self._unsettled.pop(object_id, None)

    async def _relocate(self, body: Body, object_id: bytes, moved: Sequence[tuple[Extent, Sequence[Extent]]]) -> None:
        told = False
        for old, new in moved:
            while True:
                try:
                    await self.catalog.relocate(object_id, old, new)
                    break
                except StaleVersion:
                    break  # deleted or replaced meanwhile: nobody waits for it, and recycling counts anew
                except IngestError as error:
                    if not told:
                        logger.warning(
                            "object %s moved but the catalogue does not know yet: %s", object_id.hex(), error
                        )
                    told = True
                    await asyncio.sleep(RESOLVE_RETRY_S)
        self.segments.let_go([extent for _, new in moved for extent in new])
        body.relocated()
        self._tell_settled(object_id)

    def resolve(self, body: Body, request: CommitObject | CommitPart | tuple[Extent, ...]) -> None:
        """The outcome of a commit is unknown: ask until the catalogue says. Never commit again: the client may have been
        told that it failed, and have put something else since."""
        self._keep(self._resolve(body, request))

    async def _resolve(self, body: Body, request: CommitObject | CommitPart | tuple[Extent, ...]) -> None:
        while True:
            try:
                if isinstance(request, tuple):
                    # Held once more: who sent it waits no longer, and what nobody commits is dropped in time.
                    await self.catalog.hold_mirror(body.object_id, request)
                    body.held(request)
                elif isinstance(request, CommitPart):
                    await self.catalog.commit_part(request, only_if_known=True)
                    body.adopt(None, request.part.extents)
                else:
                    body.adopt(await self.catalog.commit(request, only_if_known=True), request.extents)
                return
            except (CatalogUnavailable, StorageFailed):
                await asyncio.sleep(RESOLVE_RETRY_S)
            except CatalogError:
                body.refuse()
                return

    async def _pushed(self, push: FreedExtents | SettleRequest) -> None:
        if isinstance(push, FreedExtents):
            self.segments.freed(push.extents)
        elif body := self._unsettled.get(push.object_id):
            body.hasten()

    def _keep(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- bytes out

    async def open_reader(self, record: ObjectRecord, start: int, stop: int) -> SegmentReader | RelayReader:
        """Open bytes [start, stop) of a version, settled and recalled if need be, from this node or another.

        Raises ObjectOffline (on the archive tier only), NoSuchKey (deleted meanwhile), DataLost, Unreadable, NodeAway,
        CatalogUnavailable.
        """
        copy = await self.copies.open(record, start, stop) if self.copies is not None and start < stop else None
        return copy if copy is not None else await self.open_stored(record, start, stop)

    async def open_stored(self, record: ObjectRecord, start: int, stop: int) -> SegmentReader | RelayReader:
        """As ``open_reader``, from where the version is stored."""
        me = self.segments.node
        for _ in range(OPEN_TRIES):
            if start >= stop:
                return SegmentReader(self.executor)
            if not record.settled and (self.neighbours is None or record.extents[0].node == me):
                record = await self.catalog.settle(record.object_id, SETTLE_TIMEOUT_S)
            if record.state in (ObjectState.EVICTED, ObjectState.RECALLING):
                record = await self._recall(record)
            try:
                return await open_copies(self.paths, self.executor, self.neighbours, me, record, start, stop)
            except StaleExtent as stale:
                fresh = await self.catalog.by_id(record.object_id)
                if fresh.extents == record.extents and fresh.state == record.state:
                    if lies_on(me, record.extents, start, stop):
                        raise DataLost(f"segment {stale} no longer holds {record.bucket}/{record.key!r}") from None
                    await asyncio.sleep(REOPEN_WAIT_S)  # its node knows of a change that has not reached us
                record = fresh
            except NodeAway as error:
                record = await self._from_archive(record, error)
        raise CatalogUnavailable("the object moves faster than it can be opened")

    async def _from_archive(self, record: ObjectRecord, error: NodeAway) -> ObjectRecord:
        """A buffered copy on a node that is gone is given up where the archive has one, which can be recalled. Raises ``error``
        where that is not so: a node that is only slow to answer keeps its copies."""
        gone = self._members.away() & {extent.node for extent in record.extents}
        if not gone or record.state is not ObjectState.ARCHIVED or needs_restore(record, self.catalog.now_ns()):
            raise error
        bucket = await self.catalog.bucket(record.bucket)
        if bucket_settings.parse(bucket.tags).recall == "never":
            raise error
        try:
            await self.catalog.evicted(record.object_id)
        except (StaleVersion, CatalogUnavailable):
            raise error from None
        return await self.catalog.by_id(record.object_id)

    async def _recall(self, record: ObjectRecord) -> ObjectRecord:
        bucket = await self.catalog.bucket(record.bucket)
        if bucket_settings.parse(bucket.tags).recall == "never":
            raise ObjectOffline("the object is on the archive tier and its bucket does not recall on read")
        if needs_restore(record, self.catalog.now_ns()):
            raise ObjectOffline(f"the object's storage class is {record.attributes.storage_class}: restore it first")
        deadline = time.monotonic() + self.recall_timeout_s
        record = await self.catalog.request_recall(record.object_id)
        while record.state is not ObjectState.ARCHIVED:
            if time.monotonic() > deadline:
                raise ObjectOffline("the object is being recalled from the archive tier; try again")
            await asyncio.sleep(0.02)
            record = await self.catalog.by_id(record.object_id)
        return record

    # -- LandingPad: what the kernel room needs

    async def store(self, request: CommitObject, body: memoryview | bytes, lifetime: str = "product") -> ObjectRecord:
        """Store a small object of our own; see ``ingest.ports.LandingPad``."""
        whole = memoryview(body)

        async def pieces() -> AsyncIterator[memoryview]:
            yield whole

        return await self._store(request, pieces(), len(whole), LifetimeClass(lifetime))

    async def compose(self, request: CommitObject, pieces: AsyncIterator[memoryview], length: int) -> ObjectRecord:
        """See ``ingest.ports.LandingPad``."""
        return await self._store(request, pieces, length, LifetimeClass.STREAM)

    async def _store(
        self, request: CommitObject, pieces: AsyncIterator[memoryview], length: int, lifetime: LifetimeClass
    ) -> ObjectRecord:
        bucket = await self.catalog.bucket(request.bucket)
        if not self.segments.can_hold(length):
            raise BufferFull("the buffer has no room for this object until older data has drained")
        spec = StreamSpec(
            bucket=bucket,
            settings=bucket_settings.parse(bucket.tags),
            key=request.key,
            length=length,
            lifetime=lifetime,
        )
        stream: SpanStream | PackedStream
        if length <= PACKED_BYTES_MAX:
            stream = PackedStream(self, spec, request.object_id)
        else:
            stream = SpanStream(self, spec, None, None, request.object_id)
            self._streams.add(stream)
        self._active.add(stream)
        level = self._durability_of(request, spec, length)
        try:
            if level is Durability.MIRROR and self.neighbours is not None:
                self._begin_copy(stream, loss="degrade")
                await stream.ready()
            async for piece in pieces:
                await fill(stream, piece)
            digest = await stream.finish()
            crc = digest.crc64nvme
            request = msgspec.structs.replace(
                request,
                length=digest.length,
                crc64nvme=crc,
                etag=f"{crc:016x}{digest.length:016x}-1",
                durability=level,
                mirror_later=stream.mirror is None,
                checksums={"crc64nvme": base64.b64encode(crc.to_bytes(8, "big")).decode()},
            )
            return await stream.commit(request)
        finally:
            await stream.abort()

    def _durability_of(self, request: CommitObject, spec: StreamSpec, length: int) -> Durability:
        """What kernels made is to outlive the node that made it, whatever the bucket says of the frames: the run that it is a
        part of may have frames from all nodes."""
        level = spec.settings.durability
        made = request.reduces is not None or request.partial is not None or request.run_product is not None
        if level is not Durability.DISK or not made or length > PRODUCT_MIRRORED_BYTES_MAX or self.neighbours is None:
            return level
        return Durability.MIRROR if any(one.takes_bodies for one in self.neighbours.members.others()) else level

    async def read_range(self, record: ObjectRecord, start: int, stop: int) -> AsyncIterator[memoryview]:
        """See ``ingest.ports.LandingPad``."""
        async with await self.open_reader(record, start, stop) as reader:
            async for chunk in reader.chunks(READ_BYTES):
                yield chunk

    async def read(self, record: ObjectRecord) -> bytearray:
        """See ``ingest.ports.LandingPad``."""
        body = bytearray()
        async for piece in self.read_range(record, 0, record.length):
            body += piece
        return body

    async def load(self, record: ObjectRecord, start: int, length: int, domain: Domain) -> Lent:
        """Read stored bytes into one contiguous piece of the domain's memory, past the page cache where alignment allows."""
        assert isinstance(domain, ArenaDomain)
        room = length + BLOCK_BYTES
        if room > domain.region_bytes:
            raise BufferFull(f"{length} bytes do not fit an arena region of {domain.region_bytes}")
        async with await self.open_reader(record, start, start + length) as reader:
            while (span := self.arena.take(room, domain)) is None:
                freed = asyncio.Event()
                self.wait_for_memory(freed.set)
                await freed.wait()
            try:
                skip = 0
                if isinstance(reader, RelayReader):
                    await gather(reader.chunks(READ_BYTES), span.view[:length])
                else:
                    skip = reader.pieces[0].offset % BLOCK_BYTES
                    await asyncio.get_running_loop().run_in_executor(
                        self.executor, read_into, reader, span.view[skip : skip + length], span.view
                    )
            except BaseException:
                self.give_span(span)
                raise
        return Lent(span, domain.region_number(span.region), skip, length, self.give_span)

    def room(self, length: int, domain: Domain) -> Lent | None:
        """See ``ingest.ports.LandingPad``."""
        assert isinstance(domain, ArenaDomain)
        slabs = -(-length // SLAB_BYTES)
        span = self.arena.take(slabs * SLAB_BYTES, domain) if self._spare(domain, slabs, None) else None
        if span is None:
            return None
        return Lent(span, domain.region_number(span.region), 0, length, self.give_span)

    def domain(self, bucket: str) -> Domain | None:
        return self.arena.domain(bucket)

    # -- the end

    async def close(self, timeout_s: float) -> None:
        """Settle what is only in memory and stop."""
        await self.writer.close(timeout_s)
        if self._settling:
            self._keep(self._settle())
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in list(self._tasks):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _moved(committed: Sequence[Extent], extents: Sequence[Extent]) -> list[tuple[Extent, list[Extent]]]:
    """Which committed extents were replaced, each with the extents that now hold its bytes (same body range)."""
    kept = set(extents)
    moved = []
    rest = list(extents)
    for old in committed:
        new: list[Extent] = []
        while sum(extent.length for extent in new) < old.length:
            new.append(rest.pop(0))
        if old not in kept:
            moved.append((old, new))
    return moved

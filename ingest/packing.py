"""Small bodies share packing slabs, so that many objects share one write and one flush.

A packing slab is a span whose memory is the image of one reserved run of a segment: each object is its label, its payload and
padding, one after the other. In: bodies of known length up to ``PACKED_BYTES_MAX``. Out: extents, each with its own label.
Always holds: a slab's memory is freed only when every object placed in it is durable or refused.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from ingest.arena import SLAB_BYTES, Span
from ingest.body import Body
from ingest.cluster.mirror import Lease
from ingest.crashpoints import crashpoint
from ingest.digests import RunningCrcs, digests, new_hashes
from ingest.errors import IngestError, StorageFailed, StreamAborted
from ingest.label import Label, write_label
from ingest.records import BLOCK_BYTES, LABEL_BYTES, Extent, LifetimeClass
from ingest.segments import Reservation, Segment
from ingest.share_table import ACTIVE
from ingest.span_table import OwedSpan
from ingest.stream_types import StreamDigest, StreamSpec
from ingest.writer import MOVE_RETRY_S, REHOMES_MAX

if TYPE_CHECKING:
    from ingest.buffer import Buffer

logger = logging.getLogger(__name__)

PACKED_BYTES_MAX = 1 << 20
SLABS_WANTED = (4, 1)
"""Packing spans are 16 MiB where the arena has room, else 4 MiB."""


def _stored(length: int) -> int:
    return LABEL_BYTES + -(-length // BLOCK_BYTES) * BLOCK_BYTES


class PackSlab:
    """One packing span and its run of a segment."""

    def __init__(self, packer: Packer, span: Span, reservation: Reservation, *, memory: bool) -> None:
        self.packer = packer
        self.span = span
        self.reservation = reservation
        self.memory = memory
        self.tail = 0
        self.size_bytes = LABEL_BYTES + reservation.capacity
        self.members: set[PackedStream] = set()
        """Placed here and neither durable nor refused."""
        self.uncommitted: set[PackedStream] = set()
        """Placed here and neither committed nor refused: the catalogue does not know yet that their bytes live."""
        self.writes = 0
        self.lent = 0
        """Times its memory is on its way to another node."""
        self.pending: list[PackedStream] = []
        """Received whole, not yet in a write."""
        self.run: PackRun | None = None
        self.closed = False
        self.finished = False

    def place(self, stream: PackedStream, length: int) -> int | None:
        """Offset of the object's label in the slab; None when the slab is full."""
        if self.closed or self.tail + _stored(length) > self.size_bytes:
            return None
        offset = self.tail
        self.tail += _stored(length)
        self.members.add(stream)
        self.uncommitted.add(stream)
        return offset

    def ready(self, stream: PackedStream) -> None:
        """The object's bytes are complete: write them with whatever else is."""
        if self.reservation.segment.retired:
            stream.move(self, OSError(errno.EIO, "the segment was retired"))
            return
        self.pending.append(stream)
        if self.memory:
            self.owe()
        self.pump()

    def pump(self) -> None:
        if self.run is None and self.pending:
            self.run = PackRun(self)
            if self.memory:
                self.packer.plane.writer.defer(self.run)
            else:
                self.packer.plane.writer.submit(self.run)

    def owe(self) -> None:
        segment = self.reservation.segment
        owed = OwedSpan(
            region=self.span.region.index,
            offset=self.span.offset,
            length=self.tail,
            segment=segment.number,
            generation=segment.generation,
            file_offset=self.reservation.offset,
        )
        self.packer.plane.owe(self.span, owed)

    def leave(self, stream: PackedStream) -> None:
        self.members.discard(stream)
        self.uncommitted.discard(stream)
        if stream in self.pending:
            self.pending.remove(stream)
        self.check_done()

    def strand(self, stream: PackedStream) -> None:
        """The slab's segment failed: the object stays in its memory, and has nothing in the file."""
        self.uncommitted.discard(stream)
        self.check_done()

    def committed(self, stream: PackedStream) -> None:
        self.uncommitted.discard(stream)
        self.check_done()

    def close(self) -> None:
        self.closed = True
        self.check_done()

    def check_done(self) -> None:
        if not self.closed or self.run is not None:
            return
        in_use = self.members or self.writes or self.lent
        if not in_use and not self.span.freed:
            self.packer.plane.give_span(self.span)
        # A failed file takes no late write: its room need not wait for those whose bytes are in memory only.
        if not self.uncommitted and not self.finished and (not in_use or self.reservation.segment.retired):
            self.finished = True
            self.packer.plane.segments.finish(self.reservation, self.tail)


class PackRun:
    """One write of a slab: every object that is complete when the write starts. A ``WriteItem``."""

    def __init__(self, slab: PackSlab) -> None:
        self.slab = slab
        self.members: list[PackedStream] = []

    @property
    def segment(self) -> Segment:
        return self.slab.reservation.segment

    @property
    def size_bytes(self) -> int:
        return sum(_stored(member.length) for member in self.members)

    @property
    def awaited(self) -> bool:
        return not self.slab.memory or any(member.hastened for member in self.members)

    def begin(self) -> Callable[[], None]:
        slab = self.slab
        self.members, slab.pending = slab.pending, []
        slab.writes += 1
        # Memory and place as they are now: members may be moved while the write still waits for a thread.
        images = [(slab.span.view[start:end], slab.reservation.offset + start) for start, end in self._ranges()]
        segment = self.segment

        def work() -> None:
            for image, offset in images:
                segment.write([image], offset)

        return work

    def _ranges(self) -> list[list[int]]:
        """Slab ranges of the members, neighbours joined."""
        ranges: list[list[int]] = []
        for member in sorted(self.members, key=lambda member: member.offset):
            end = member.offset + _stored(member.length)
            if ranges and ranges[-1][1] == member.offset:
                ranges[-1][1] = end
            else:
                ranges.append([member.offset, end])
        return ranges

    def on_written(self, segment: Segment) -> bool:
        self.slab.writes -= 1
        if self.slab.run is not self:
            self.slab.check_done()
            return False
        crashpoint("settle-written" if self.slab.memory else "data-written")
        return True

    def on_durable(self, segment: Segment) -> None:
        slab = self.slab
        slab.run = None
        for member in self.members:
            if not member.copying:
                slab.members.discard(member)
            member.made_durable()
            if member.accepted:
                slab.uncommitted.discard(member)
        if slab.memory and not slab.pending and slab.run is None:
            slab.packer.plane.paid(slab.span)
        slab.pump()
        slab.check_done()

    def on_storage_failed(self, segment: Segment, error: OSError) -> None:
        slab = self.slab
        if slab.run is not self:
            return
        slab.run = None
        slab.packer.abandon(slab)
        slab.packer.plane.writer.cancel(self)
        members = [*self.members, *slab.pending]
        slab.pending = []
        for member in members:
            member.move(slab, error)
        slab.check_done()


class Packer:
    """The open packing slabs of a worker: one for each lifetime class and durability."""

    def __init__(self, plane: Buffer) -> None:
        self.plane = plane
        self._open: dict[tuple[LifetimeClass, bool], PackSlab] = {}

    def place(self, stream: PackedStream) -> tuple[PackSlab, int] | None:
        """A slab with room for the stream and its offset there; None while the arena is full. Raises BufferFull."""
        length = stream.spec.length
        assert length is not None
        kind = (stream.spec.lifetime, stream.memory)
        slab = self._open.get(kind)
        if slab is not None and slab.reservation.segment.retired:
            del self._open[kind]
            slab.close()
            slab = None
        if slab is not None:
            offset = slab.place(stream, length)
            if offset is not None:
                return slab, offset
            slab.close()
            del self._open[kind]
        span = next(filter(None, (self.plane.take_pack_span(n * SLAB_BYTES) for n in SLABS_WANTED)), None)
        if span is None:
            return None
        try:
            least = _stored(length) - LABEL_BYTES
            reservation = self.plane.segments.reserve_whole(kind[0], span.size_bytes - LABEL_BYTES, least)
        except IngestError:
            self.plane.give_span(span)
            raise
        slab = self._open[kind] = PackSlab(self, span, reservation, memory=stream.memory)
        offset = slab.place(stream, length)
        assert offset is not None
        return slab, offset

    def close_idle(self) -> None:
        """Give back open slabs that nobody is in: they hold memory, and their segments could not be recycled."""
        for kind, slab in list(self._open.items()):
            if not slab.members and slab.run is None:
                del self._open[kind]
                slab.close()

    def abandon(self, slab: PackSlab) -> None:
        """The slab's segment failed: place nothing there any more."""
        slab.closed = True
        self._open = {kind: open_slab for kind, open_slab in self._open.items() if open_slab is not slab}


class PackedStream(Body):
    """A small body of known length (``SpanStream``'s smaller sibling; same promises)."""

    def __init__(self, plane: Buffer, spec: StreamSpec, object_id: bytes) -> None:
        super().__init__(plane, spec, object_id)
        self._shares = plane.shaper.words
        self.offset = 0
        self.hastened = False
        self._crcs = RunningCrcs(spec.algorithms)
        self._slab: PackSlab | None = None
        self._reservation: Reservation | None = None
        self._durable: asyncio.Future[None] | None = None
        self._is_durable = False
        self._promised = False
        """A ``memory`` body that was, or is about to be, acknowledged: it must reach the disk, however long it takes."""
        self._moves = 0
        self._stranded = False
        self._home: PackSlab | None = None
        """The failed slab whose place was given out: until the catalogue knows where the object is now, its memory and its
        entry in the span table stay, so that a worker that dies owes the bytes there."""
        self._copied = False
        """The second copy is held, or done without."""

    # -- receiving (BodySink)

    def get_buffer(self) -> memoryview | None:
        if self.failure is not None:
            raise self.failure
        if self._shares[ACTIVE] and not self.plane.shaper.allowed(self):
            return None
        if self._slab is None and not self._place_first():
            return None
        assert self._slab is not None
        start = self.offset + LABEL_BYTES
        return self._slab.span.view[start + self.length : start + (self.spec.length or 0)]

    def received(self, count: int) -> None:
        if self._slab is None:
            raise StreamAborted("the stream was aborted")
        start = self.offset + LABEL_BYTES + self.length
        self._crcs.update(self._slab.span.view[start : start + count])
        self.length += count
        self.plane.received_bytes.add(count)
        if self.length > (self.spec.length or 0):
            raise StreamAborted("the body is longer than it said")

    async def writable(self) -> None:
        while True:
            if self._shares[ACTIVE]:
                await self.wait_for_turn()
            if self.failure is not None:
                raise self.failure
            if self._slab is not None or self._place_first():
                return
            await self.wait_for_memory()

    def _place_first(self) -> bool:
        try:
            return self._place()
        except IngestError as error:
            self.fail(error)
            raise

    def _place(self) -> bool:
        place = self.plane.packer.place(self)
        if place is None:
            return False
        self._slab, self.offset = place
        self._reservation = self._slab.reservation
        write_label(self._label(), self._slab.span.view[self.offset :])
        return True

    def _label(self) -> Label:
        assert self._reservation is not None
        return self.plane.label(
            self.object_id, self.spec, self._reservation, 0, self._reservation.offset + self.offset, self.spec.length
        )

    # -- the end

    async def finish(self) -> StreamDigest:
        """Wait until the bytes are stored at the bucket's durability level. Raises IngestError."""
        if self.failure is not None:
            raise self.failure
        if self._slab is None:
            payload = memoryview(b"")
        else:
            start = self.offset + LABEL_BYTES
            payload = self._slab.span.view[start : start + self.length]
            end = self.offset + _stored(self.length)
            self._slab.span.view[start + self.length : end] = bytes(end - start - self.length)
        hashes = new_hashes(self.spec.algorithms)
        for state in hashes.values():
            await asyncio.get_running_loop().run_in_executor(self.plane.executor, state.update, payload)
        if self._slab is not None:
            self._durable = asyncio.get_running_loop().create_future()
            self._slab.ready(self)
            if self.mirror is not None:
                self.mirror.start()
                self.mirror.end(self.length, self._crcs.values["crc64nvme"])
            if not self.memory:
                await asyncio.shield(self._durable)
        if self.failure is not None:
            raise self.failure
        if self.mirror is not None:
            await self.mirror.done()
            self._copied = True
            if self._slab is not None and self._is_durable:
                self._slab.members.discard(self)
                self._slab.check_done()
        self._promised = True
        crashpoint("data-flushed")
        return StreamDigest(
            object_id=self.object_id,
            length=self.length,
            extents=self.extents(),
            crc64nvme=self._crcs.values["crc64nvme"],
            digests=digests(self._crcs.values, hashes),
            settled=self.is_settled,
        )

    def extents(self) -> tuple[Extent, ...]:
        if self._reservation is None or not self.length:
            return ()
        store, segment = self.plane.segments, self._reservation.segment
        offset = self._reservation.offset + self.offset
        return (Extent(store.node, store.slot, segment.number, segment.generation, offset, self.length),)

    @property
    def is_settled(self) -> bool:
        return self._slab is None or self._is_durable

    def whole(self) -> memoryview | None:
        if self._slab is None:
            return None
        start = self.offset + LABEL_BYTES
        return self._slab.span.view[start : start + self.length]

    def made_durable(self) -> None:
        self._is_durable = True
        if self._durable is not None and not self._durable.done():
            self._durable.set_result(None)
        self.check_settled()

    def fail(self, error: IngestError) -> None:
        super().fail(error)
        if self._durable is not None and not self._durable.done():
            self._durable.set_result(None)

    def hasten(self) -> None:
        self.hastened = True
        if self._slab is not None and self._slab.run is not None:
            self.plane.writer.hasten(self._slab.run)

    def let_go(self) -> None:
        for slab in (self._slab, self._home):
            if slab is not None:
                slab.committed(self)

    def relocated(self) -> None:
        if self._home is not None:
            home, self._home = self._home, None
            home.leave(self)

    def cancel(self) -> None:
        self.relocated()
        if self._slab is not None and (not self._is_durable or self in self._slab.members):
            self._slab.leave(self)

    # -- the second copy (MirrorSource)

    @property
    def copying(self) -> bool:
        """Another node is still to take bytes of it: its memory stays."""
        return self.mirror is not None and not (self._copied or self.is_refused)

    def lend(self, position: int) -> Lease | None:
        slab, whole = self._slab, self.whole()
        if slab is None or whole is None or position >= self.length:
            return None
        slab.lent += 1

        def give() -> None:
            slab.lent -= 1
            slab.check_done()

        return Lease(whole[position:], give)

    def mirrored(self) -> None:
        """It stays in its slab until the copy is held: a node that is lost is replaced by one that is sent it again."""

    def move(self, failed: PackSlab, error: OSError) -> None:
        """The slab's segment failed: copy the object to another slab; its bytes are still here."""
        if self.is_refused or self._slab is not failed:
            failed.leave(self)
            return
        start = self.offset
        self._moves += 1
        try:
            if self._moves > REHOMES_MAX:
                raise StorageFailed(f"{REHOMES_MAX} segments failed in a row: {error.strerror}")
            if not self._place():
                raise StorageFailed("no memory to move the object to another segment")
        except IngestError as failure:
            if self._promised:
                # It stays in the failed slab's memory meanwhile.
                if not self._stranded:
                    logger.critical(
                        "object %s is only in memory and cannot be written: %s", self.object_id.hex(), failure
                    )
                self._stranded = True
                if self.accepted:
                    failed.strand(self)
                asyncio.get_running_loop().call_later(MOVE_RETRY_S, self._move_again, failed, error)
                return
            failed.leave(self)
            self.fail(StorageFailed(str(failure)))
            return
        assert self._slab is not None
        size = _stored(self.length)
        source = failed.span.view[start + LABEL_BYTES : start + size]
        self._slab.span.view[self.offset + LABEL_BYTES : self.offset + size] = source
        if self._promised and self._home is None:
            self._home = failed
        else:
            failed.leave(self)
        self._slab.ready(self)

    def _move_again(self, failed: PackSlab, error: OSError) -> None:
        self._moves = 0
        self.move(failed, error)

"""A body on its way from the socket to the arena, its kernels and its segments.

In: ``get_buffer``/``received`` from the HTTP room (bytes land in a span, nowhere else), then ``finish`` and ``commit``.
Out: a ``StreamDigest`` at the bucket's durability level, whole frames to the kernel room, extents in segments.
Always holds: a span is freed only when a flush covers it and everything before it, its bytes are hashed, and no kernel
still reads it; bytes never leave the arena for a segment that failed without being written elsewhere first.

A span's memory is the image of its place in the segment file: address and file offset agree modulo 4096. The first span
of an extent starts with the label, a later one with the last partial block of its predecessor (the carry).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from ingest.arena import SLAB_BYTES, ArenaDomain, Span
from ingest.blockio import AlignedBuffer
from ingest.body import Body
from ingest.cluster.mirror import Lease
from ingest.crashpoints import crashpoint
from ingest.digests import Hash, RunningCrcs, digests, new_hashes
from ingest.errors import IngestError, StorageFailed, StreamAborted
from ingest.label import Label, write_label
from ingest.mend import mend, mended_crcs
from ingest.piece import Piece, SpanBatch
from ingest.ports import BodyChange, FrameReduction, FrameScanner
from ingest.records import BLOCK_BYTES, LABEL_BYTES, Extent, FrameGeometry
from ingest.rest import Rest
from ingest.segments import Reservation, Segment
from ingest.shaping import ANY
from ingest.share_table import ACTIVE
from ingest.span_table import OwedSpan
from ingest.stream_types import BodyDigest, StreamDigest, StreamSpec
from ingest.writer import MOVE_RETRY_S, REHOMES_MAX

if TYPE_CHECKING:
    from ingest.buffer import Buffer

logger = logging.getLogger(__name__)

SNIFF_BYTES = 64 << 10
"""Most bytes handed out at a time until the frames' geometry is known."""
CARRY_BYTES_MAX = 2 * SNIFF_BYTES
"""Most bytes of a frame that are moved to the next span with it, where it does not fit the one it began in."""
SNIFF_BYTES_MAX = SLAB_BYTES // 2
"""A header that is still not complete after this much is no header."""


class SpanStream(Body):
    """A body received through spans of its own. Made by ``Buffer.open_stream``; one event loop."""

    def __init__(
        self,
        plane: Buffer,
        spec: StreamSpec,
        reduction: FrameReduction | None,
        domain: ArenaDomain | None,
        object_id: bytes,
    ) -> None:
        super().__init__(plane, spec, object_id)
        self.domain = domain
        self._shares = plane.shaper.words
        self.held_slabs = 0
        self.span_slabs = 1
        self.reduction = reduction
        self._sniffing = reduction is not None
        self._sniff_needed = 0
        self._scan: FrameScanner | None = None
        self._next_frame = 0
        self._pieces: list[Piece] = []
        self._open: Piece | None = None
        self._layout: list[tuple[Reservation, int]] = []
        """Reservations in body order with the payload bytes used of each."""
        self._reservations: list[Reservation] = []
        self._reserved: Reservation | None = None
        self._reserved_used = 0
        self._carry = memoryview(bytearray(BLOCK_BYTES))
        self._carry_bytes = 0
        self._crcs = RunningCrcs(spec.algorithms)
        self._hashes: dict[str, Hash] = new_hashes(spec.algorithms)
        self._hashing = False
        self._idle: asyncio.Future[None] | None = None
        self._rehomes = 0
        self._stranded = False
        self._displaced = False
        """It moved after its digest was given out: until the catalogue knows, memory and the span table stay as they were for
        the place that it names, so that a worker that dies owes the bytes there."""
        self._move_timer: asyncio.TimerHandle | None = None
        self._ending = False
        self._copy_from_disk = False
        """The second copy is made of what is on the disk: memory has other bytes, or none."""
        self._rest: Rest | None = None
        self._change: BodyChange | None = None
        if reduction is not None:
            if spec.stoppable and spec.settings.stop != "ignore":
                self.cut = asyncio.Event() if spec.settings.stop == "answer" else None
                reduction.when_stopped(self._stop)
            self._sniff(memoryview(b""), complete=False)

    # -- receiving (BodySink)

    def get_buffer(self) -> memoryview | None:
        if self.failure is not None:
            raise self.failure
        allowed = self.plane.shaper.allowed(self) if self._shares[ACTIVE] else ANY
        if not allowed:
            return None
        if self._rest is not None:
            return self._rest.get_buffer()
        piece = self._open or self._next_piece()
        if piece is None:
            return None
        return piece.span.view[piece.fill : min(piece.limit, piece.fill + self._window(), piece.fill + allowed)]

    def _window(self) -> int:
        """Bytes to hand out at most: not far beyond what is known of the frames, so that little of a frame is received
        before it is known whether it fits the span."""
        if self._sniffing:
            return SNIFF_BYTES
        horizon = self._scan.horizon if self._scan is not None else None
        return SLAB_BYTES << 16 if horizon is None else max(0, horizon - self.length) + SNIFF_BYTES

    def received(self, count: int) -> None:
        if self._rest is not None:
            self._discarded(self._rest, count)
            return
        piece = self._open
        if piece is None:
            raise StreamAborted("the stream was aborted")
        self._crcs.update(piece.span.view[piece.fill : piece.fill + count])
        piece.fill += count
        self.length += count
        self.plane.received_bytes.add(count)
        if self.spec.length is not None and self.length > self.spec.length:
            raise StreamAborted("the body is longer than it said")
        if self._sniffing and self.length >= self._sniff_needed:
            self._sniff(piece.payload, complete=False)
        elif self._scan is not None:
            self._scan.feed(piece.span.view[piece.fill - count : piece.fill])
            self._offer_found(self._scan, piece)
        if self.geometry is not None:
            self._offer_frames(piece)
        if piece.fill == piece.limit and self._open is piece:
            self._close_piece(last=self.length == self.spec.length)
        if self.mirror is not None:
            self.mirror.more()

    async def writable(self) -> None:
        while True:
            if self._shares[ACTIVE]:
                await self.wait_for_turn()
            if self.failure is not None:
                raise self.failure
            if self._rest is not None and not self._ending:
                await self._rest.writable()
                return
            if self._open is not None or self._next_piece() is not None:
                return
            await self.wait_for_memory()

    # -- the rest that a STOP makes useless

    def _stop(self, frame: int) -> None:
        """What was received is stored; from here on the body is read, hashed and dropped."""
        if self.ended or self._ending or self.failure is not None or self.length == self.spec.length:
            return
        self._rest = Rest(self._crcs, self._hashes, self.plane.executor)
        self.discarded_bytes = 0
        if self._open is not None:
            self._close_piece(last=True)
        if not self._hashing:
            self._rest.begin()
        if self.cut is not None:
            self.cut.set()
        logger.info(
            "%s/%r: STOP at frame %d, %d bytes are stored", self.spec.bucket.name, self.spec.key, frame, self.length
        )
        self.wake()

    def _discarded(self, rest: Rest, count: int) -> None:
        rest.received(count)
        self.discarded_bytes = rest.length
        self.plane.discarded_bytes.add(count)
        if self.spec.length is not None and self.length + rest.length > self.spec.length:
            raise StreamAborted("the body is longer than it said")

    def fail(self, error: IngestError) -> None:
        super().fail(error)
        self._check_idle()

    # -- spans and extents

    def _next_piece(self) -> Piece | None:
        """Open a span for the bytes to come; None while there is no memory."""
        span = self.plane.take_span(self, self.span_slabs * SLAB_BYTES)
        if span is None:
            return None
        reservation = self._reserved
        if reservation is None or self._reserved_used == reservation.capacity:
            try:
                reservation = self._reserve()
            except IngestError as error:
                self._give_span(span)
                self.fail(error)
                raise
            start = LABEL_BYTES
            file_offset = reservation.offset
            write_label(self._label(reservation, self.length), span.view)
        else:
            start = self._carry_bytes
            file_offset = reservation.offset + LABEL_BYTES + self._reserved_used - start
            span.view[:start] = self._carry[:start]
        piece = self._open = Piece(self, span, reservation, file_offset, start, self.length)
        piece.carried = 0 if start == LABEL_BYTES and file_offset == reservation.offset else start
        piece.limit = self._room(piece)
        self._limit_to_frames(piece)
        self._pieces.append(piece)
        if self._scan is not None:
            self._limit_to_found(self._scan, piece)
        return piece

    def _reserve(self) -> Reservation:
        left = None if self.spec.length is None else self.spec.length - self.length
        self.plane.before_extent(self, left)
        unit = self.geometry.frame_bytes if self.geometry else 1
        reservation = self.plane.segments.reserve(self.spec.lifetime, left, unit)
        self._reserved = reservation
        self._reserved_used = 0
        self._layout.append((reservation, 0))
        self._reservations.append(reservation)
        return reservation

    def _label(self, reservation: Reservation, position: int) -> Label:
        return self.plane.label(self.object_id, self.spec, reservation, position)

    def _room(self, piece: Piece) -> int:
        """Where in its span a piece must end."""
        return min(piece.span.size_bytes, piece.start + piece.reservation.capacity - self._reserved_used)

    def _close_piece(self, *, last: bool, cut: int | None = None) -> None:
        """The open span is full, or the body has ended: hand it to the hashes and to the disk. What lies behind offset
        ``cut`` of the span, if given, goes to the next span, and is written from there."""
        piece = self._open
        assert piece is not None
        self._open = None
        self._reserved_used += piece.fill - piece.start
        self._layout[-1] = (piece.reservation, self._reserved_used)
        if last or self._reserved_used == piece.reservation.capacity:
            end = -(-piece.fill // BLOCK_BYTES) * BLOCK_BYTES
            piece.span.view[piece.fill : end] = bytes(end - piece.fill)
            piece.write_bytes = end
            self._carry_bytes = 0
        else:
            end = piece.fill if cut is None else cut
            piece.write_bytes = end - end % BLOCK_BYTES
            self._carry_bytes = piece.fill - piece.write_bytes
            if self._carry_bytes > len(self._carry):
                self._carry = memoryview(bytearray(CARRY_BYTES_MAX + BLOCK_BYTES))
            self._carry[: self._carry_bytes] = piece.span.view[piece.write_bytes : piece.fill]
        piece.hashed = not self._hashes
        if self.memory:
            self._owe(piece)
            self.plane.writer.defer(piece)
        else:
            self.plane.writer.submit(piece)
        if self._hashes and not self._hashing:
            self._hash_next()

    def piece_written(self, piece: Piece, segment: Segment) -> bool:
        """A thread is done with the piece. True: its bytes are in ``segment`` now and need a flush."""
        counts = not self.is_refused and piece.segment is segment
        if counts:
            crashpoint("settle-written" if self.memory else "data-written")
        self._check_idle()
        self.release_pieces()
        return counts

    @property
    def awaited(self) -> bool:
        """Somebody waits for this stream's bytes to be durable: do not wait for the flush timer."""
        return self._idle is not None and not self._idle.done()

    def piece_durable(self, piece: Piece, segment: Segment) -> None:
        if piece.segment is not segment:
            return
        piece.durable = True
        self.release_pieces()
        self.plane.relieve()
        self._check_idle()
        self.check_settled()

    def release_pieces(self) -> None:
        """Free what is durable together with everything before it, hashed, and read by nobody."""
        kept = []
        prefix = True
        for piece in self._pieces:
            prefix = prefix and piece.durable
            done = self.is_refused or (
                prefix and piece.hashed and not self._displaced and not self._mirror_keeps(piece)
            )
            if done and not piece.batches and not piece.in_work and piece is not self._open:
                self._give_span(piece.span)
                if piece.label is not None:
                    piece.label.close()
                    piece.label = None
            else:
                kept.append(piece)
        self._pieces = kept
        if not kept and self.ended and not self.limbo:
            self._close_out()

    # -- the second copy (MirrorSource)

    def _mirror_keeps(self, piece: Piece) -> bool:
        return self.mirror is not None and not self._copy_from_disk and self.mirror.keeps(piece.stop)

    def lend(self, position: int) -> Lease | None:
        if self._sniffing or self._copy_from_disk:
            return None  # the span may still be changed for a larger one; or memory is not what the disk has
        for piece in self._pieces:
            if piece.position <= position < piece.stop:
                piece.in_work += 1

                def give(piece: Piece = piece) -> None:
                    piece.in_work -= 1
                    self.release_pieces()

                return Lease(piece.payload[position - piece.position :], give)
        return None

    def stored_until(self, position: int) -> int:
        if self._copy_from_disk:
            return self.length
        return min((piece.position for piece in self._pieces if piece.stop > position), default=self.length)

    def mirrored(self) -> None:
        self.release_pieces()
        self.plane.relieve()

    def _give_span(self, span: Span) -> None:
        self.held_slabs -= span.slabs
        self.plane.give_span(span)

    def revocable(self) -> list[SpanBatch]:
        """Batches that keep an otherwise free span and have not been dispatched: the arena may take them back."""
        ready = [piece for piece in self._pieces if piece.durable and piece.hashed and not self._mirror_keeps(piece)]
        return [batch for piece in ready for batch in piece.batches if batch.revocable]

    # -- ordered hashes

    def _hash_next(self) -> None:
        """Feed the next closed piece to MD5/SHA in a thread; one at a time keeps the order."""
        piece = next((piece for piece in self._pieces if not piece.hashed and piece is not self._open), None)
        if piece is None:
            self._hashing = False
            if self._rest is not None:
                self._rest.begin()
            self._check_idle()
            return
        self._hashing = True
        piece.in_work += 1

        def work() -> None:
            for state in self._hashes.values():
                state.update(piece.payload)

        def done(_: asyncio.Future[None]) -> None:
            piece.in_work -= 1
            piece.hashed = True
            self.release_pieces()
            self._hash_next()

        asyncio.get_running_loop().run_in_executor(self.plane.executor, work).add_done_callback(done)

    # -- frames

    def _sniff(self, head: memoryview, *, complete: bool) -> None:
        assert self.reduction is not None
        answer = self.reduction.sniff(head, complete=complete)
        if isinstance(answer, int):
            self._sniff_needed = max(answer, self.length + 1)
            self._sniffing = self._sniff_needed <= SNIFF_BYTES_MAX and not complete
            return
        self._sniffing = False
        if answer is None:
            return
        if not isinstance(answer, FrameGeometry):
            self._scan = answer
            answer.feed(head)
            if self._open is not None:
                self._offer_found(answer, self._open)
            return
        self.geometry = answer
        largest = self.domain.region_bytes if self.domain is not None else 0
        if answer.frame_bytes + 2 * LABEL_BYTES <= largest:
            while self.span_slabs * SLAB_BYTES < answer.frame_bytes + 2 * LABEL_BYTES:
                self.span_slabs *= 2
        if self._open is not None:
            self._fit_open_piece(self._open)

    def _sniff_last(self) -> None:
        self._sniff(self._open.payload if self._open is not None else memoryview(b""), complete=True)
        if self.geometry is not None and self._open is not None:
            self._offer_frames(self._open)

    def _fit_open_piece(self, piece: Piece) -> None:
        """The geometry became known while the first span fills: end it on a frame, in a larger span if need be."""
        if self.span_slabs * SLAB_BYTES > piece.span.size_bytes:
            larger = self.plane.take_span(self, self.span_slabs * SLAB_BYTES)
            if larger is not None:
                larger.view[: piece.fill] = piece.span.view[: piece.fill]
                self._give_span(piece.span)
                piece.span = larger
                piece.limit = min(larger.size_bytes, piece.start + piece.reservation.capacity - self._reserved_used)
        self._limit_to_frames(piece)

    def _limit_to_frames(self, piece: Piece) -> None:
        geometry = self.geometry
        if geometry is None:
            return
        body_end = piece.position + piece.limit - piece.start
        whole = (body_end - geometry.origin) // geometry.frame_bytes
        limit = piece.start + geometry.origin + whole * geometry.frame_bytes - piece.position
        if whole > 0 and limit > piece.fill:
            piece.limit = limit

    def _offer_frames(self, piece: Piece) -> None:
        """Offer every frame that has become whole; frames split over two spans are read from disk later."""
        geometry = self.geometry
        assert geometry is not None
        assert self.reduction is not None
        complete = max(0, self.length - geometry.origin) // geometry.frame_bytes
        if geometry.count is not None:
            complete = min(complete, geometry.count)
        if complete <= self._next_frame:
            return
        first_here = -(-max(0, piece.position - geometry.origin) // geometry.frame_bytes)
        if self.domain is None:
            first_here = complete
        if first_here > self._next_frame:
            end = min(first_here, complete)
            self.reduction.lagging(self._next_frame, end - self._next_frame)
            self._next_frame = end
        if complete > self._next_frame and self.domain is not None:
            offset = piece.start + geometry.origin + self._next_frame * geometry.frame_bytes - piece.position
            region = self.domain.region_number(piece.span.region)
            count = complete - self._next_frame
            self.reduction.offer(SpanBatch(piece, region, piece.span.offset + offset, self._next_frame, count))
            self._next_frame = complete

    def _offer_found(self, scan: FrameScanner, piece: Piece) -> None:
        """Offer the frames that have become whole since; those that began before this span are read from disk later."""
        assert self.reduction is not None
        complete = scan.frames
        if complete > self._next_frame:
            low = piece.position - piece.carried
            here = complete if self.domain is None else min(complete, max(scan.first_from(low), self._next_frame))
            if here > self._next_frame:
                self.reduction.lagging(self._next_frame, here - self._next_frame)
            if complete > here and self.domain is not None:
                region = self.domain.region_number(piece.span.region)
                position = piece.position - piece.start
                self.reduction.offer(SpanBatch(piece, region, piece.span.offset, here, complete - here, position))
            self._next_frame = complete
        self._limit_to_found(scan, piece)

    def _limit_to_found(self, scan: FrameScanner, piece: Piece) -> None:
        """End the span where the next frame begins that does not fit it. Where that frame has begun already, end it now:
        the little that is there of the frame moves on with it."""
        largest = self.domain.region_bytes if self.domain is not None else 0
        while self.span_slabs * SLAB_BYTES < 2 * (scan.unit_bytes + LABEL_BYTES) <= largest:
            self.span_slabs *= 2
        room = self._room(piece)
        shift = piece.start - piece.position
        cut = scan.boundary(room - shift) + shift
        piece.limit = room
        if piece.fill < cut < room:
            piece.limit = cut
        elif (
            room == piece.span.size_bytes
            and piece.start + BLOCK_BYTES < cut <= piece.fill
            and piece.fill - cut <= CARRY_BYTES_MAX
            and cut < room
            and self.length != self.spec.length
        ):
            self._close_piece(last=False, cut=cut)

    # -- the end

    def frame_counts(self) -> tuple[int, int]:
        if self._scan is None:
            return super().frame_counts()
        return self._scan.frames, self.length - self._scan.settled

    async def finish(self) -> StreamDigest:
        """Wait until every byte is stored at the bucket's durability level. Raises IngestError."""
        self._ending = True
        if self._sniffing:
            self._sniff_last()
        while self._open is None and self._carry_bytes:
            await self.writable()
        if self._open is not None:
            self._close_piece(last=True)
        if self._rest is not None and self.reduction is not None:
            self._change = self.reduction.cut_short(self.length)
            self.hasten()
        await self._end_copy()
        self._idle = asyncio.get_running_loop().create_future()
        for segment in {piece.segment for piece in self._pieces}:
            self.plane.writer.flush(segment)
        self._check_idle()
        await self._idle
        if self.failure is not None:
            raise self.failure
        crashpoint("data-flushed")
        if self._rest is None:
            await self._copied()
            return self._digest(self._crcs.values, self._hashes)
        digest = await self._finish_cut(self._rest)
        if self.mirror is not None:
            self.mirror.start()
            self.mirror.end(self.length, digest.crc64nvme)
        await self._copied()
        return digest

    async def _end_copy(self) -> None:
        """Tell the second copy that this is all. Of a body that a STOP has cut it is made anew, once it is what it will be."""
        if self.mirror is None:
            return
        if self._rest is None:
            self.mirror.end(self.length, self._crcs.values["crc64nvme"])
        else:
            self._copy_from_disk = True
            await self.mirror.begin_anew()

    async def _copied(self) -> None:
        if self.mirror is not None:
            await self.mirror.done()

    async def _finish_cut(self, rest: Rest) -> StreamDigest:
        """What a STOP has left of the body, put right."""
        await rest.finish()
        crcs = self._crcs.values
        whole = BodyDigest(self.length + rest.length, crcs["crc64nvme"], digests(crcs, self._hashes))
        if self._change is None:
            return self._digest(rest.stored_crcs, rest.stored_hashes, whole)
        await mend(self.plane.writer, self._layout, self._change)
        crashpoint("cut-mended")
        if self.geometry is not None:
            self.geometry = msgspec.structs.replace(self.geometry, count=self.frame_counts()[0])
        # A hash over other bytes cannot be had without reading them all again.
        return self._digest(mended_crcs(rest.stored_crcs, self.length, self._change), {}, whole)

    def _digest(
        self, crcs: Mapping[str, int], hashes: Mapping[str, Hash], whole: BodyDigest | None = None
    ) -> StreamDigest:
        return StreamDigest(
            object_id=self.object_id,
            length=self.length,
            extents=self.extents(),
            crc64nvme=crcs["crc64nvme"],
            digests=digests(crcs, hashes),
            settled=self.is_settled,
            whole=whole,
        )

    def _check_idle(self) -> None:
        if self._idle is None or self._idle.done():
            return
        stored = not self._hashing and ((self.memory and self._change is None) or self.is_settled)
        if stored or self.failure is not None:
            self._idle.set_result(None)

    @property
    def is_settled(self) -> bool:
        return self._open is None and all(piece.durable for piece in self._pieces)

    def extents(self) -> tuple[Extent, ...]:
        store = self.plane.segments
        return tuple(reservation.extent(store.node, store.slot, used) for reservation, used in self._layout if used)

    def let_go(self) -> None:
        self._leave_failed()
        self.release_pieces()

    def relocated(self) -> None:
        self._displaced = False
        self.release_pieces()

    def _leave_failed(self) -> None:
        """Give back what lies in failed files and holds nothing of the body: they take no late write. Not while a commit that
        names the place is under way."""
        if self._promised and not self.ended:
            return
        if self.limbo:
            return
        needed = {reservation for reservation, _ in self._layout}
        for reservation in [one for one in self._reservations if one.segment.retired and one not in needed]:
            self._reservations.remove(reservation)
            self.plane.segments.finish(reservation, 0)

    def cancel(self) -> None:
        self._open = None
        for piece in self._pieces:
            self.plane.writer.cancel(piece)
            for batch in list(piece.batches):
                if batch.revocable:
                    batch.revoke()

    def _close_out(self) -> None:
        """No memory is held any more: nobody will write to the reservations again."""
        used = dict(self._layout) if self.accepted else {}
        for reservation in self._reservations:
            length = used.get(reservation, 0)
            self.plane.segments.finish(reservation, LABEL_BYTES + length if length else 0)
        self._reservations.clear()
        self.plane.closed_out(self)

    # -- ``memory`` durability: written back later

    def _owe(self, piece: Piece) -> None:
        owed = OwedSpan(
            region=piece.span.region.index,
            offset=piece.span.offset,
            length=piece.write_bytes,
            segment=piece.segment.number,
            generation=piece.segment.generation,
            file_offset=piece.file_offset,
        )
        self.plane.owe(piece.span, owed)

    def hasten(self) -> None:
        for piece in list(self._pieces):
            self.plane.writer.hasten(piece)

    # -- when a segment fails

    def storage_failed(self, segment: Segment, error: OSError) -> None:
        """Move everything that no flush covers yet from the failed segment to another: it is still in the arena."""
        if self.failure is not None or self.is_refused:
            return
        try:
            for reservation in [entry for entry, _ in self._layout if entry.segment is segment]:
                moving = [piece for piece in self._pieces if piece.reservation is reservation]
                while moving and moving[0].durable:
                    moving.pop(0)
                if moving:
                    self._rehomes += 1
                    if self._rehomes > REHOMES_MAX:
                        raise StorageFailed(f"{REHOMES_MAX} segments failed in a row: {error.strerror}")
                    self._move(reservation, moving)
        except IngestError as failure:
            if not self._promised:
                self.fail(StorageFailed(str(failure)))
            elif self._move_timer is None:
                if not self._stranded:
                    logger.critical(
                        "object %s is only in memory and cannot be written: %s", self.object_id.hex(), failure
                    )
                self._stranded = True
                loop = asyncio.get_running_loop()
                self._move_timer = loop.call_later(MOVE_RETRY_S, self._move_again, segment, error)

    @property
    def _promised(self) -> bool:
        """A ``memory`` body that was, or is about to be, acknowledged: it must reach the disk, however long it takes."""
        return self._idle is not None and self._idle.done()

    def _move_again(self, segment: Segment, error: OSError) -> None:
        self._move_timer = None
        self._rehomes = 0
        self.storage_failed(segment, error)

    def _move(self, old: Reservation, pieces: list[Piece]) -> None:
        self._displaced = self._promised
        head, last = pieces[0], pieces[-1]
        own_label = head.file_offset == old.offset
        kept = 0 if own_label else head.file_offset - old.offset - LABEL_BYTES
        cut = old.offset + LABEL_BYTES + kept
        needed = last.file_offset + last.limit - cut
        new = self.plane.segments.reserve_whole(self.spec.lifetime, max(needed, old.capacity - kept), needed)
        self._reservations.append(new)
        if own_label:
            write_label(self._label(new, head.position), head.span.view)
        else:
            head.label = AlignedBuffer(LABEL_BYTES)
            write_label(self._label(new, head.position - head.start), head.label.view)
        index, used = next((i, used) for i, (entry, used) in enumerate(self._layout) if entry is old)
        self._layout[index : index + 1] = [(old, kept), (new, used - kept)] if kept else [(new, used)]
        if self._reserved is old:
            self._reserved = new
            self._reserved_used -= kept
        self._leave_failed()
        for piece in pieces:
            piece.file_offset += new.offset + LABEL_BYTES - cut
            piece.reservation = new
            piece.durable = False
            if piece is self._open:
                continue
            if self.memory and not self._promised:
                self._owe(piece)
            if not self.plane.writer.waiting(piece):
                self.plane.writer.submit(piece)

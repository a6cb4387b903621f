"""Segment files of one slot: where buffered bytes lie on disk.

In: requests for room (``reserve``) and news of extents that died. Out: ``Reservation``s in preallocated, recycled files.
Always holds: a file is appended to only by the process that opened it in this life (what an earlier process left is sealed);
a file is reused only under its exclusive ``flock`` and under a new generation; a file that failed once is never written again.
Files: block 0 is the header (``SegmentHeader``), then extents, each a label and its payload padded to whole blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import logging
import os
import struct
import time
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path

from awscrt import checksums

from ingest.blockio import AlignedBuffer, Flusher, GivenUp, open_direct, write_fully
from ingest.counters import Counters
from ingest.crashpoints import crashpoint
from ingest.errors import BufferFull, CatalogError, StorageFailed
from ingest.label import Label
from ingest.paths import NodePaths, make_folder
from ingest.records import BLOCK_BYTES, LABEL_BYTES, Extent, LifetimeClass, ObjectRecord, SegmentUse

logger = logging.getLogger(__name__)

OPEN_EXTENT_BYTES = 64 << 20
"""Payload reserved at a time for a body of unknown length."""
SMALL_TAIL_BYTES = 4 << 20
"""A segment whose free tail is smaller is sealed rather than split further for a large body."""
PREWRITE_BYTES = 8 << 20
RETIRED_SHARE = 0.1
"""Of a slot's files, those that are kept only because their place on the device failed once; one always is."""
REMOVE_EVERY_S = 1.0
"""Retired files go at this pace: while the disk is still away, each new one fails again."""
SPARE_PAUSE_MAX_S = 60.0

_HEADER = struct.Struct("<8sIIIIQQ")  # magic, format, node, slot, segment, generation, size; then a CRC32C
_MAGIC = b"HISSSEG1"
_FORMAT = 1


@dataclasses.dataclass(frozen=True, slots=True)
class SegmentHeader:
    node: int
    slot: int
    segment: int
    generation: int
    size_bytes: int

    def encode(self) -> bytes:
        packed = _HEADER.pack(_MAGIC, _FORMAT, self.node, self.slot, self.segment, self.generation, self.size_bytes)
        packed += struct.pack("<I", checksums.crc32c(packed))
        return packed + bytes(BLOCK_BYTES - len(packed))

    @classmethod
    def read(cls, fd: int) -> SegmentHeader | None:
        """The header of an open segment file (buffered descriptor); None where it is missing or damaged."""
        block = os.pread(fd, _HEADER.size + 4, 0)
        if len(block) < _HEADER.size + 4:
            return None
        magic, version, node, slot, segment, generation, size = _HEADER.unpack_from(block)
        (crc,) = struct.unpack_from("<I", block, _HEADER.size)
        if magic != _MAGIC or version != _FORMAT or crc != checksums.crc32c(block[: _HEADER.size]):
            return None
        return cls(node, slot, segment, generation, size)


class Segment:
    """One file. ``tail`` is the first free byte; extents in flight are counted in ``open_extents``, and in ``in_flight`` what a
    thread may be at: a late write or flush must not meet what comes after."""

    def __init__(self, header: SegmentHeader, path: Path, executor: Executor, counters: Counters) -> None:
        self.number = header.segment
        self.generation = header.generation
        self.size_bytes = header.size_bytes
        self.path = path
        self.fd = open_direct(path, os.O_RDWR)
        self.flusher = Flusher(self.fd, executor, counters)
        self.tail = BLOCK_BYTES
        self.live_bytes = 0
        self.open_extents = 0
        self.in_flight = 0
        self.sealed = False
        self.retired = False

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        """In a thread: write block-aligned memory. Raises OSError; always for a retired file, also when a thread comes
        to it only after another one failed there."""
        if self.retired:
            raise GivenUp
        write_fully(self.fd, views, offset)

    def close(self) -> None:
        os.close(self.fd)


@dataclasses.dataclass(slots=True, eq=False)
class Reservation:
    """Room for one extent: label at ``offset``, then ``capacity`` payload bytes."""

    segment: Segment
    offset: int
    capacity: int

    @property
    def end(self) -> int:
        return self.offset + LABEL_BYTES + -(-self.capacity // BLOCK_BYTES) * BLOCK_BYTES

    def extent(self, node: int, slot: int, length: int) -> Extent:
        return Extent(node, slot, self.segment.number, self.segment.generation, self.offset, length)


class SegmentStore:
    """All segments of one slot. One event loop owns it; blocking work goes to ``executor``.

    ``files_elsewhere()``: segment files of the node's other slots, for the node-wide limit ``files_max``.
    ``use()``: the catalogue's durable count of live bytes. What is kept here follows it by pushes, which may be lost
    or late; so nothing is overwritten before the catalogue itself has said that nothing in it lives.
    """

    def __init__(
        self,
        paths: NodePaths,
        *,
        node: int,
        slot: int,
        segment_bytes: int,
        files_max: int,
        files_elsewhere: Callable[[], int],
        use: Callable[[], Awaitable[Iterable[SegmentUse]]],
        durable: Callable[[], Awaitable[None]],
        executor: Executor,
        counters: Counters,
    ) -> None:
        self.paths = paths
        self.node = node
        self.slot = slot
        self.segment_bytes = segment_bytes
        self.segments: dict[int, Segment] = {}
        self._files_max = files_max
        self._files_elsewhere = files_elsewhere
        self._use = use
        self._durable = durable
        self._recycling = False
        self._recycle_again = False
        self._refused = ""
        self.executor = executor
        self._counters = counters
        self._current: dict[LifetimeClass, Segment] = {}
        self._free: list[Segment] = []
        self._next_number = 1
        self._recycled = counters.cell("hiss_segment_recycled_total")
        self._retired = counters.cell("hiss_segment_retired_total")
        self._short = counters.cell("hiss_segment_short_total")
        self._errors = {
            kind: counters.cell("hiss_storage_errors_total", kind) for kind in ("read", "write", "flush", "segment")
        }
        self._files = counters.cell("hiss_segment_files")
        self._used = counters.cell("hiss_buffer_used_bytes")
        self._disk_full = False
        self._removed_at = -REMOVE_EVERY_S
        self._being_made = 0
        self._spare_pause_s = 0.0
        self._spare_not_before = 0.0
        self._all_heard = False
        """What an earlier process of this slot has asked to commit is decided, and seen by ``use``."""

    # -- start-up

    def open(self, use: Iterable[SegmentUse]) -> None:
        """Adopt the files of an earlier life: those with live extents are sealed, the others may be recycled.

        ``use`` is the catalogue's count of live bytes. Runs before the slot serves anything (blocking).
        """
        live = {(item.segment, item.generation): item.live_bytes for item in use}
        folder = self.paths.segment_file(self.slot, 0).parent
        make_folder(folder)
        for path in sorted(folder.iterdir()):
            try:
                self._adopt_file(path, live)
            except OSError as error:
                # It may hold what lives. What cannot be read now is asked for again by whoever wants it.
                self.note_error("read", path, error)
        self._publish()

    def _adopt_file(self, path: Path, live: Mapping[tuple[int, int], int]) -> None:
        """``live``: bytes by (number, generation). Raises OSError."""
        if path.suffix != ".seg":
            path.unlink()
            return
        number = int(path.stem)
        self._next_number = max(self._next_number, number + 1)
        with open(path, "rb") as file:
            header = SegmentHeader.read(file.fileno())
        if header is None or header.segment != number or header.slot != self.slot:
            if any(segment == number for segment, _ in live):
                logger.error("segment %s: its header is damaged but the catalogue has live extents in it", path)
            else:
                path.unlink()
            return
        segment = Segment(header, path, self.executor, self._counters)
        segment.live_bytes = live.get((number, header.generation), 0)
        segment.sealed = True
        segment.tail = segment.size_bytes
        self.segments[number] = segment

    async def recycle_idle(self) -> None:
        """Try to make every dead segment free again; called at start, when extents die and when room is short.

        Raises CatalogError when the catalogue cannot say what lives, or whether that is durable.
        """
        if self._recycling:
            self._recycle_again = True
            return
        self._recycling = True
        try:
            for segment in await self._empty():
                if segment.retired:
                    self._discard(segment)
                else:
                    await self._recycle(segment)
        finally:
            self._recycling = False
            self._publish()
        if self._recycle_again:
            self._recycle_again = False
            self._recycle_soon()

    async def hear(self) -> None:
        """Wait until what an earlier process of this slot has asked to commit is decided. Raises CatalogError, StorageFailed."""
        await self._durable()
        self._all_heard = True

    async def _empty(self) -> list[Segment]:
        """Segments in which nothing is on its way and nothing lives, as the catalogue counts; others get its count. Of
        retired ones, those that are too many to be kept out of use.

        That is final: what is there is committed or never will be, and what nobody refers to nobody can refer to again, once
        what freed it is durable: it must survive a power cut, or a failover, before anything is overwritten.
        Our own count is no reason to overwrite anything: news of freed extents may come twice, or after this count.
        """
        if not self._all_heard:
            await self.hear()
        closed = [(segment, segment.generation) for segment in self.segments.values() if self._closed(segment)]
        live = {(item.segment, item.generation): item.live_bytes for item in await self._use()}
        empty: list[tuple[Segment, int]] = []
        broken: list[tuple[Segment, int]] = []
        for segment, generation in closed:
            if segment.generation == generation and self._closed(segment):
                segment.live_bytes = live.get((segment.number, generation), 0)
                if not segment.live_bytes:
                    (broken if segment.retired else empty).append((segment, generation))
        too_many = max(0, len(broken) - max(1, int(RETIRED_SHARE * len(self.segments))))
        now = time.monotonic()
        if too_many and now - self._removed_at >= REMOVE_EVERY_S:
            self._removed_at = now
            empty += [found for found in broken[:too_many] if not self._is_last(found[0])]
        if empty:
            await self._durable()
        return [segment for segment, generation in empty if segment.generation == generation and self._closed(segment)]

    # -- room

    def reserve(self, lifetime: LifetimeClass, payload_bytes: int | None, unit_bytes: int = 1) -> Reservation:
        """Room for the next extent of a body with ``payload_bytes`` still to come (None: unknown).

        The capacity may be less than asked for: reserve again for the rest. Where it ends before the body does, it is a
        multiple of ``unit_bytes`` (whole frames). Raises BufferFull.
        """
        wanted = OPEN_EXTENT_BYTES if payload_bytes is None else payload_bytes
        segment = self._current.get(lifetime)
        if segment is not None:
            room = segment.size_bytes - segment.tail - LABEL_BYTES
            if room >= wanted or (room >= SMALL_TAIL_BYTES and room >= unit_bytes and wanted > SMALL_TAIL_BYTES):
                return self._cut(segment, wanted, unit_bytes)
            self._seal(segment)
            del self._current[lifetime]
        segment = self._current[lifetime] = self._fresh()
        return self._cut(segment, wanted, unit_bytes)

    def reserve_whole(self, lifetime: LifetimeClass, payload_bytes: int, least_bytes: int) -> Reservation:
        """Room for one extent of at least ``least_bytes``: bytes that have to move and cannot be split again."""
        reservation = self.reserve(lifetime, payload_bytes)
        if reservation.capacity < least_bytes:
            self.finish(reservation, 0)
            self._seal(self._current.pop(lifetime))
            reservation = self.reserve(lifetime, payload_bytes)
        return reservation

    def _cut(self, segment: Segment, wanted: int, unit_bytes: int) -> Reservation:
        room = segment.size_bytes - segment.tail - LABEL_BYTES
        capacity = wanted
        if wanted > room:
            capacity = room - room % unit_bytes if room >= unit_bytes else room
        offset = segment.tail
        segment.tail += LABEL_BYTES + -(-capacity // BLOCK_BYTES) * BLOCK_BYTES
        segment.open_extents += 1
        return Reservation(segment, offset, capacity)

    def finish(self, reservation: Reservation, used_bytes: int) -> None:
        """Nobody writes to the reservation any more; ``used_bytes`` of the file from its label on hold something."""
        segment = reservation.segment
        segment.open_extents -= 1
        if reservation.end == segment.tail and not segment.sealed:
            segment.tail = reservation.offset + -(-used_bytes // BLOCK_BYTES) * BLOCK_BYTES
        if self._dead(segment):
            self._recycle_soon()

    def label(self, record: ObjectRecord, reservation: Reservation, position: int, length: int) -> Label:
        """Of payload of a stored version, ``length`` bytes from body offset ``position`` on, in a new place."""
        return Label(
            object_id=record.object_id,
            bucket=record.bucket,
            key=record.key,
            node=self.node,
            slot=self.slot,
            segment=reservation.segment.number,
            generation=reservation.segment.generation,
            offset=reservation.offset,
            position=position,
            length=length,
            created_ns=time.time_ns(),
        )

    def adopt(self, extents: Iterable[Extent]) -> None:
        """These extents are committed: their segments live until the catalogue frees them."""
        for extent in extents:
            segment = self.segments.get(extent.segment)
            if segment is not None and segment.generation == extent.generation:
                segment.live_bytes += extent.stored_bytes
        self._publish()

    def hold(self, extents: Iterable[Extent]) -> None:
        """These extents are written and will be made known to the catalogue: nothing recycles them until ``let_go``."""
        for extent in extents:
            segment = self.segments[extent.segment]
            assert segment.generation == extent.generation
            segment.open_extents += 1
        self.adopt(extents)

    def let_go(self, extents: Iterable[Extent]) -> None:
        for extent in extents:
            self.segments[extent.segment].open_extents -= 1
        self._recycle_soon()

    def can_hold(self, payload_bytes: int) -> bool:
        """Whether a body of this length would find room now (its admission; not a promise)."""
        if payload_bytes == 0:
            return True
        per_file = self.segment_bytes - BLOCK_BYTES
        wanted = payload_bytes + LABEL_BYTES * (2 + payload_bytes // per_file)
        room = sum(segment.size_bytes - segment.tail for segment in self._current.values())
        room += sum(segment.size_bytes for segment in self._free)
        if room > wanted:
            return True
        room += max(0, self._files_max - self._file_count) * self.segment_bytes
        if room <= wanted <= self._files_max * self.segment_bytes:
            self._short.add()  # what could never fit says nothing about the room there is
        return room > wanted

    def freed(self, extents: Sequence[Extent]) -> None:
        """The catalogue dropped these extents."""
        for extent in extents:
            segment = self.segments.get(extent.segment)
            if segment is None or segment.generation != extent.generation:
                continue
            segment.live_bytes -= extent.stored_bytes
        self._publish()
        if any(self._dead(segment) for segment in self.segments.values()):
            self._recycle_soon()

    def failed(self, kind: str, segment: Segment, error: OSError) -> None:
        """A write or a flush (``kind``) of the file failed: it is counted, and nobody writes there again."""
        if not isinstance(error, GivenUp):
            self.note_error(kind, segment.path, error)
        self.retire(segment)

    def note_error(self, kind: str, path: Path, error: OSError) -> None:
        self._errors[kind].add()
        logger.error("%s of segment %s: %s", kind, path, error)

    def retire(self, segment: Segment) -> None:
        """Never write this file again: something of it could not be written or flushed.

        It keeps its place on the device, which may be what is broken, out of use. Of empty ones only a few are kept for
        that: a disk that was away for a minute must not cost the buffer for good.
        """
        if segment.retired:
            return
        segment.retired = segment.sealed = True
        self._retired.add()
        logger.error("segment %s is not written any more; its live extents stay readable", segment.path)
        self._current = {lifetime: current for lifetime, current in self._current.items() if current is not segment}
        self._free = [free for free in self._free if free is not segment]

    def sparse(self, below: float, but: Container[tuple[int, int]] = ()) -> Segment | None:
        """The emptiest sealed segment with less than this share live, for compaction; ``but``: none of these (number,
        generation)."""
        candidates = [
            segment
            for segment in self.segments.values()
            if segment.sealed
            and not segment.retired
            and not segment.open_extents
            and 0 < segment.live_bytes < below * segment.size_bytes
            and (segment.number, segment.generation) not in but
        ]
        return min(candidates, key=lambda segment: segment.live_bytes, default=None)

    def seal_all(self) -> None:
        for segment in list(self._current.values()):
            self._seal(segment)
        self._current.clear()

    @property
    def live_bytes(self) -> int:
        return sum(segment.live_bytes for segment in self.segments.values())

    # -- files

    def _closed(self, segment: Segment) -> bool:
        """Nothing is being written there, and nothing will be in this generation."""
        return segment.sealed and not segment.open_extents and not segment.in_flight and segment not in self._free

    @property
    def _file_count(self) -> int:
        """Of the whole node."""
        return len(self.segments) + self._being_made + self._files_elsewhere()

    def _is_last(self, segment: Segment) -> bool:
        """The last file stays: its number would be given out again after a restart, with its generations."""
        return segment.number == max(self.segments)

    def _dead(self, segment: Segment) -> bool:
        """It may be empty, as far as we know: a reason to ask the catalogue."""
        return self._closed(segment) and not segment.retired and segment.live_bytes <= 0

    def _seal(self, segment: Segment) -> None:
        segment.sealed = True
        if self._dead(segment):
            self._recycle_soon()

    def _fresh(self) -> Segment:
        if self._free:
            segment = self._free.pop(0)
            segment.sealed = False
            segment.tail = BLOCK_BYTES
            segment.live_bytes = 0
            return segment
        if self._file_count >= self._files_max:
            self._recycle_soon()
            self._short.add()
            raise BufferFull("every segment of the buffer holds live data")
        try:
            return self._create()
        except BufferFull:
            self._short.add()
            raise

    def _create(self) -> Segment:
        """Raises BufferFull."""
        header, path = self._next_header()
        try:
            return self._created(self._make(header, path))
        except OSError as error:
            raise self._not_created(path, error) from error

    async def _create_aside(self) -> Segment:
        """As ``_create``, in a thread: an ill disk may take its time."""
        header, path = self._next_header()
        self._being_made += 1
        try:
            made = await asyncio.get_running_loop().run_in_executor(self.executor, self._make, header, path)
        except OSError as error:
            raise self._not_created(path, error) from error
        finally:
            self._being_made -= 1
        return self._created(made)

    def _next_header(self) -> tuple[SegmentHeader, Path]:
        number, self._next_number = self._next_number, self._next_number + 1
        header = SegmentHeader(self.node, self.slot, number, 1, self.segment_bytes)
        return header, self.paths.segment_file(self.slot, number)

    def _make(self, header: SegmentHeader, path: Path) -> Segment:
        """Blocks. Raises OSError; then there is no file, unless that cannot be removed either."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, self.segment_bytes)
                os.pwrite(fd, header.encode(), 0)
                os.fsync(fd)
                _fsync_folder(path.parent)
            finally:
                os.close(fd)
            return Segment(header, path, self.executor, self._counters)
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()
            raise

    def _created(self, segment: Segment) -> Segment:
        self._disk_full = False
        self.segments[segment.number] = segment
        self._publish()
        return segment

    def _not_created(self, path: Path, error: OSError) -> BufferFull:
        self._errors["segment"].add()
        if not self._disk_full:
            logger.error("cannot create segment %s: %s", path, error)
            self._disk_full = True
        return BufferFull(f"no space for another segment: {error.strerror}")

    def _recycle_soon(self) -> None:
        with contextlib.suppress(RuntimeError):  # no loop: start-up recycles by itself
            asyncio.get_running_loop().call_soon(lambda: self._keep(asyncio.create_task(self.recycle_quietly())))

    async def recycle_quietly(self) -> None:
        """Later, where the catalogue cannot say now what lives."""
        try:
            await self.recycle_idle()
            self._refused = ""
        except (CatalogError, StorageFailed) as error:
            if str(error) != self._refused:
                logger.warning("slot %d: nothing is recycled for now: %s", self.slot, error)
            self._refused = str(error)

    _tasks: frozenset[asyncio.Task[None]] = frozenset()

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks |= {task}
        task.add_done_callback(lambda done: setattr(self, "_tasks", self._tasks - {done}))

    async def _recycle(self, segment: Segment) -> None:
        segment.open_extents += 1  # nobody else may start on it meanwhile
        loop = asyncio.get_running_loop()
        try:
            done = await loop.run_in_executor(self.executor, self._mark_recycled, segment)
        except OSError as error:
            logger.error("segment %s cannot be recycled: %s", segment.path, error)
            self._errors["segment"].add()
            self.retire(segment)
            done = False
        finally:
            segment.open_extents -= 1
        if done:
            segment.generation += 1
            self._recycled.add()
            segment.tail = BLOCK_BYTES
            segment.live_bytes = 0
            if segment.retired:
                return
            crowded = self._file_count >= 0.9 * self._files_max
            if crowded and len(self._free) >= 2 and not self._is_last(segment):
                self._discard(segment)
            else:
                self._free.append(segment)

    def _mark_recycled(self, segment: Segment) -> bool:
        """Write the next generation into the header; False while a reader still holds the file."""
        lock = os.open(segment.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            crashpoint("recycle-locked")
            header = SegmentHeader(self.node, self.slot, segment.number, segment.generation + 1, segment.size_bytes)
            os.pwrite(lock, header.encode(), 0)
            os.fdatasync(lock)
            # Cached pages of the old generation must never be served for the new one.
            os.posix_fadvise(lock, 0, 0, os.POSIX_FADV_DONTNEED)
            crashpoint("recycle-marked")
            return True
        finally:
            os.close(lock)

    def _discard(self, segment: Segment) -> None:
        """Give an empty file back to the file system, so that another may take its space."""
        try:
            segment.path.unlink()
        except OSError as error:
            self._errors["segment"].add()
            if not segment.retired:
                logger.error("segment %s cannot be removed: %s", segment.path, error)
            self.retire(segment)
            return
        del self.segments[segment.number]
        segment.close()
        self._publish()

    async def prepare_spare(self, busy: Callable[[], bool]) -> None:
        """Keep one free, fully written file ahead: flushes into it cost a third less than into unwritten extents.

        Works in small steps and stops as soon as the slot is ``busy``. Where the disk refuses it tries again ever later.
        """
        if self._free or self._file_count >= self._files_max or busy():
            return
        if time.monotonic() < self._spare_not_before:
            return
        try:
            segment = await self._create_aside()
            await self._write_ahead(segment, busy)
        except (OSError, BufferFull):
            self._spare_pause_s = min(max(1.0, 2 * self._spare_pause_s), SPARE_PAUSE_MAX_S)
            self._spare_not_before = time.monotonic() + self._spare_pause_s
        else:
            self._spare_pause_s = 0.0
            self._free.append(segment)

    async def _write_ahead(self, segment: Segment, busy: Callable[[], bool]) -> None:
        """Raises OSError; the file is retired then."""
        segment.open_extents += 1
        zeros = AlignedBuffer(PREWRITE_BYTES)
        loop = asyncio.get_running_loop()
        writing: asyncio.Future[None] | None = None
        try:
            offset = BLOCK_BYTES
            while offset < segment.size_bytes and not busy():
                step = min(PREWRITE_BYTES, segment.size_bytes - offset)
                writing = loop.run_in_executor(self.executor, write_fully, segment.fd, [zeros.view[:step]], offset)
                await asyncio.shield(writing)
                offset += step
        except OSError as error:
            logger.error("segment %s cannot be written ahead: %s", segment.path, error)
            self._errors["segment"].add()
            self.retire(segment)
            raise
        finally:
            if writing is not None and not writing.done():
                # Cancelled: the thread still reads from what is about to be closed.
                await asyncio.wait([writing])
            zeros.close()
            segment.open_extents -= 1

    def _publish(self) -> None:
        self._files.set(len(self.segments))
        self._used.set(self.live_bytes)

    def close(self) -> None:
        for segment in self.segments.values():
            segment.close()


def _fsync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

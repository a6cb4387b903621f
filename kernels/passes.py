"""One kernel's pass over the frames of one object version that lie in one parameter epoch.

In: frames from the kernel's pass over the whole version (kernels/epochs.py), verdicts and state from the lane, the
committed record. Out: verdicts, rows and feedback events to the pass's ``Report``, and at the end the state, or why there
is none. Frames that lag are read back from disk once the version exists. What always holds: a frame is judged exactly
once in the state that comes out, and the instrument hears of each frame at most once, however often sandboxes died in
between.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ingest.errors import DataLost, IngestError, NoSuchBucket, NoSuchKey, ObjectOffline, StaleVersion
from ingest.ports import Domain, FeedbackEvent, FeedbackSink, FrameBatch, LandingPad, LoadedBytes
from ingest.records import BLOCK_BYTES, FrameGeometry, ObjectRecord
from kernels.attach import Attachment
from kernels.contract import Kernel, merge
from kernels.lane import Lane, LaneRefused, StateArrays
from kernels.layout.index import FrameIndex
from kernels.layout.placing import batch_frames_max, loadable, stored_range, table_of
from kernels.ranges import Ranges
from kernels.rows import Rows
from kernels.sandbox import Reply
from kernels.scheduler import Run
from kernels.tally import Tally
from kernels.verdicts import UNREDUCED, Verdicts
from kernels.wire import UNREADABLE

log = logging.getLogger("hiss.kernels")

CATCHUP_BYTES = (4 << 20) - 2 * BLOCK_BYTES
"""One piece read from disk; at least one frame. With room for alignment it still fits a slab of 4 MiB."""
CATCHUP_FRAMES = 1024
"""Most frames of one piece, so that a slow kernel does not sit on a full piece for long."""
CATCHUP_PIECES = 2
"""Pieces of one pass in memory at once: one is reduced while the next is read."""
LOAD_BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0, 1.0, 2.0, 2.0)
"""Waits after a failed read; then the pass is postponed to the next sweep."""


class Gone(Exception):
    """The version was deleted or replaced: the pass is of no use."""


class Postponed(Exception):
    """The pass cannot go on now; the sweep will begin it anew. ``str()`` says why."""

    def __init__(self, reason: str, *, recall: bool = False, waits: bool = False) -> None:
        """``recall``: the bytes must come back from the archive first. ``waits``: for something that somebody has to put."""
        super().__init__(reason)
        self.recall = recall
        self.waits = waits


class Hopeless(Exception):
    """The pass will never succeed. ``kind`` as in hiss_kernel_errors_total; ``str()`` is fit for the scientist."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class LoadedBatch:
    """Frames read back from disk, offered like live ones."""

    revoked = False

    def __init__(
        self,
        loaded: LoadedBytes | None,
        first_frame: int,
        count: int,
        limits: tuple[asyncio.Semaphore, ...],
        position: int = 0,
    ) -> None:
        """``limits`` were acquired for this piece and are given back with it. ``loaded`` None: nothing of these frames was
        ever written to the file. ``position``: body offset of what was loaded."""
        self.region = loaded.region if loaded is not None else 0
        self.offset = loaded.offset if loaded is not None else 0
        self.position = position
        self.first_frame = first_frame
        self.count = count
        self._loaded = loaded
        self._limits = limits

    def dispatched(self) -> bool:
        return True

    def release(self) -> None:
        if self._loaded is not None:
            self._loaded.release()
        for limit in self._limits:
            limit.release()


@dataclasses.dataclass(frozen=True, slots=True)
class PassContext:
    """What every pass of a host shares."""

    pad: LandingPad
    feedback: FeedbackSink
    tally: Tally
    pieces: asyncio.Semaphore
    """How many pieces read back from disk may be in memory at once; first come, first served, so passes take turns."""


class Report:
    """What one kernel says about the frames of one version, over all its epochs. ``row``: its row in the verdicts."""

    def __init__(
        self, context: PassContext, kernel: Kernel, verdicts: Verdicts, row: int, bucket: str, key: bytes
    ) -> None:
        self.feedback_events = 0
        self.dropped_rows = 0
        """Rows beyond what one frame may append."""
        self.unreadable = Ranges()
        """Frames that could not be decoded."""
        self.rows = Rows(kernel.rows.dtype) if kernel.rows is not None else None
        self._context = context
        self._kernel = kernel
        self._verdicts = verdicts
        self._row = row
        self._bucket = bucket
        self._key = key
        self._answered = Ranges()

    def judged(self, run: Run, reply: Reply) -> None:
        if reply.feedback or reply.dropped_feedback:
            self._publish(run, reply)
        count = run.count if reply.stopped_at is None else reply.stopped_at + 1 - run.first_frame
        verdicts = reply.verdicts[:count]
        if not self._answered.covers(run.first_frame, count):
            self.dropped_rows += reply.dropped_rows
        self._answered.add(run.first_frame, count)
        self._note_unreadable(run, verdicts)
        self._verdicts.record(self._row, run.first_frame, verdicts)
        if self.rows is not None and reply.rows is not None:
            self.rows.add(run.first_frame, reply.rows)
        self._context.tally.judged(verdicts, live=run.live)

    def _note_unreadable(self, run: Run, verdicts: npt.NDArray[np.uint8]) -> None:
        """Frames whose stored bytes are broken: known once, reported in the product, never judged."""
        for frame in np.flatnonzero(verdicts == UNREADABLE):
            self.unreadable.add(run.first_frame + int(frame), 1)
        verdicts[verdicts == UNREADABLE] = UNREDUCED

    def voided(self, first: int, count: int) -> None:
        """These frames will be judged again."""
        self._verdicts.void(self._row, first, count)
        if self.rows is not None:
            self.rows.void(first, count)

    def behind_stop(self, first: int, count: int) -> None:
        """These frames will not be judged."""
        if count > 0:
            self._verdicts.stop(self._row, first, count)
            if self.rows is not None:
                self.rows.void(first, count)

    def _publish(self, run: Run, reply: Reply) -> None:
        now_ns = time.time_ns()
        # A frame that is judged again (its state was lost) has told the instrument already.
        again = self._answered if self._answered.total else None
        events = [
            FeedbackEvent(self._bucket, self._key, self._kernel.name, frame, code, value, now_ns, run.live)
            for frame, code, value in reply.feedback
            if again is None or not again.covers(frame, 1)
        ]
        self.feedback_events += len(events)
        self._context.feedback.publish(events)
        if reply.dropped_feedback:
            self._context.tally.feedback_dropped(reply.dropped_feedback)


class EpochPass:
    """Implements ``LaneClient``. ``stopped(frame)`` is called when a frame says STOP; ``changed`` is set when there is
    something to do. ``first_frame``: where the epoch begins."""

    def __init__(
        self,
        context: PassContext,
        attachment: Attachment,
        lane: Lane,
        geometry: FrameGeometry,
        report: Report,
        first_frame: int,
        changed: asyncio.Event,
        stopped: Callable[[EpochPass, int], None],
        index: FrameIndex | None = None,
    ) -> None:
        """``index``: where the frames are, if they do not lie back to back as ``geometry`` says."""
        self.attachment = attachment
        self.first_frame = first_frame
        self.final = False
        """Every frame is judged, and ``state`` is complete."""
        self.state: StateArrays | None = None
        self.refusal: Hopeless | None = None
        self._context = context
        self._lane = lane
        self._geometry = geometry
        self._report = report
        self._changed = changed
        self._tell_stopped = stopped
        self._left = False
        self._index = index
        self._stream = lane.join(self, encoded=batch_frames_max(index) if index is not None else 0)

    # -- frames

    @property
    def closed(self) -> bool:
        """No frame will be judged here any more."""
        return self._left or self.refusal is not None

    def offer(self, batch: FrameBatch) -> None:
        if self.closed:
            batch.release()
        else:
            self._lane.offer(self._stream, batch, live=True)

    def lag(self, first: int, count: int) -> None:
        if not self.closed:
            self._lane.lag(self._stream, first, count)
            self._changed.set()

    def end(self) -> None:
        """Every frame is announced."""
        if not self.closed:
            self._lane.finish(self._stream)

    def leave(self) -> None:
        """The stream was aborted, or the pass is over. Idempotent."""
        self._left = True
        self._lane.leave(self._stream)

    async def finished(self, state: StateArrays) -> StateArrays:
        """What the kernel's finish() makes of a state. Raises Hopeless."""
        try:
            return await self._lane.conclude(self._stream, state)
        except LaneRefused as refusal:
            raise Hopeless(refusal.kind, str(refusal)) from None

    # -- outcomes, from the lane

    def table(self, run: Run) -> bytes:
        if self._index is None:
            return b""
        return table_of(run.stream, self._index, run.first_frame, run.count, run.batches)

    def judged(self, run: Run, reply: Reply) -> None:
        self._report.judged(run, reply)

    def stopped(self, frame: int) -> None:
        self._tell_stopped(self, frame)

    def voided(self, first: int, count: int) -> None:
        self._report.voided(first, count)

    def restarted(self) -> None:
        self.state = None
        self._changed.set()

    def merge(self, state: StateArrays) -> None:
        if self.state is None:
            self.state = state
        else:
            merge_states(self.attachment.kernel, self.state, state)

    def banked(self, final: bool) -> None:
        if final:
            self.final = True
            self._changed.set()

    def lagged(self) -> None:
        self._changed.set()

    def refused(self, kind: str, reason: str) -> None:
        if self.refusal is None:
            self.refusal = Hopeless(kind, reason)
            self._changed.set()
            # Not now: the lane is going through its clients.
            asyncio.get_running_loop().call_soon(self.leave)

    # -- frames from disk

    async def catch_up(self, record: ObjectRecord, domain: Domain, window: asyncio.Semaphore) -> bool:
        """Read back every frame that lags now; False when none did. Raises Gone, Postponed or Hopeless."""
        size = CATCHUP_FRAMES
        if self._index is None:
            size = max(1, min(size, CATCHUP_BYTES // self._geometry.frame_bytes))
        head = self._take(size)
        if head is None:
            return False
        # A lane that has no process yet must not hold pieces: those that have one may need them to finish.
        await self._lane.admitted()
        while head is not None:
            await self._bring_back(record, *head, domain, window)
            head = self._take(size)
        return True

    async def _bring_back(
        self, record: ObjectRecord, first: int, count: int, domain: Domain, window: asyncio.Semaphore
    ) -> None:
        """Read one piece and offer it to the lane; on failure its frames lag again."""
        held: list[asyncio.Semaphore] = []
        try:
            for limit in (window, self._context.pieces):
                await limit.acquire()
                held.append(limit)
            loaded, position = await self._load(record, first, count, domain)
        except BaseException:
            for limit in held:
                limit.release()
            if not self.closed:
                self._lane.lag(self._stream, first, count)
            raise
        batch = LoadedBatch(loaded, first, count, tuple(held), position)
        if self.closed:
            batch.release()
        else:
            self._lane.offer(self._stream, batch, live=False)

    def _take(self, count_max: int) -> tuple[int, int] | None:
        head = None if self.closed else self._lane.load(self._stream, count_max)
        if head is None or self._index is None:
            return head
        first, count = head
        size = loadable(self._index, first, count, CATCHUP_BYTES)
        if size < count:
            self._lane.lag(self._stream, first + size, count - size)
        return first, size

    async def _load(
        self, record: ObjectRecord, first: int, count: int, domain: Domain
    ) -> tuple[LoadedBytes | None, int]:
        """The frames' stored bytes, and which body offset they begin at."""
        if self._index is not None:
            return await load_stored(self._context.pad, record, self._index, first, count, domain)
        start = self._geometry.origin + first * self._geometry.frame_bytes
        return await load(self._context.pad, record, start, count * self._geometry.frame_bytes, domain), start


async def load_stored(
    pad: LandingPad, record: ObjectRecord, index: FrameIndex, first: int, count: int, domain: Domain
) -> tuple[LoadedBytes | None, int]:
    """The bytes that hold every chunk of these frames, and their body offset; None where no chunk was ever written."""
    start, stop = stored_range(index, first, count)
    if start == stop:
        return None, 0
    room = domain.region_bytes - BLOCK_BYTES
    if stop - start > room:
        raise Hopeless(
            "format",
            f"the chunks of frame {first} lie over {stop - start} bytes of the object, more than the {room} bytes kernels "
            "can read at once",
        )
    return await load(pad, record, start, stop - start, domain), start


def merge_states(kernel: Kernel, into: StateArrays, other: StateArrays) -> None:
    """Fold a state into another, in place."""
    for spec in kernel.state:
        merge(spec, into[spec.name], other[spec.name])


class Loads(Protocol):
    """The one thing of a LandingPad that reading stored bytes needs."""

    async def load(self, record: ObjectRecord, start: int, length: int, domain: Domain) -> LoadedBytes: ...


async def load(pad: Loads, record: ObjectRecord, start: int, length: int, domain: Domain) -> LoadedBytes:
    """Read body bytes back, waiting out shortages. Raises Gone, Postponed or Hopeless."""
    error: IngestError | None = None
    for wait_s in LOAD_BACKOFF_S:
        try:
            return await pad.load(record, start, length, domain)
        except (StaleVersion, NoSuchKey, NoSuchBucket):
            raise Gone from None
        except ObjectOffline:
            raise Postponed("its bytes are on the archive tier", recall=True) from None
        except DataLost as lost:
            raise Hopeless("crash", f"the stored bytes cannot be read back: {lost}") from None
        except IngestError as shortage:
            error = shortage
        await asyncio.sleep(wait_s)
    raise Postponed(f"reading it back failed: {type(error).__name__} {error}")

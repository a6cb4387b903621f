"""One kernel's pass over one object version: from its first frame to the stored product.

In: frames from the reduction (kernels/reduction.py), verdicts and state from the lane, the committed record. Out:
verdicts, feedback events, and at the end the state, or why there is none. Frames that lag are read back from disk once
the version exists. What always holds: a frame is judged exactly once in the state that comes out, and the instrument
hears of each frame at most once, however often sandboxes died in between.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time

import numpy as np
import numpy.typing as npt

from ingest.errors import DataLost, IngestError, NoSuchBucket, NoSuchKey, ObjectOffline, StaleVersion
from ingest.ports import Domain, FeedbackEvent, FeedbackSink, FrameBatch, LandingPad, LoadedBytes
from ingest.records import BLOCK_BYTES, FrameGeometry, ObjectRecord
from kernels.attach import Attachment
from kernels.contract import merge
from kernels.lane import Lane, StateArrays
from kernels.ranges import Ranges
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

    def __init__(self, reason: str, *, recall: bool = False) -> None:
        """``recall``: the bytes must come back from the archive first."""
        super().__init__(reason)
        self.recall = recall


class Hopeless(Exception):
    """The pass will never succeed. ``kind`` as in hiss_kernel_errors_total; ``str()`` is fit for the scientist."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class LoadedBatch:
    """Frames read back from disk, offered like live ones."""

    revoked = False

    def __init__(
        self, loaded: LoadedBytes, first_frame: int, count: int, limits: tuple[asyncio.Semaphore, ...]
    ) -> None:
        """``limits`` were acquired for this piece and are given back with it."""
        self.region = loaded.region
        self.offset = loaded.offset
        self.first_frame = first_frame
        self.count = count
        self._loaded = loaded
        self._limits = limits

    def dispatched(self) -> bool:
        return True

    def release(self) -> None:
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


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """A finished pass."""

    state: StateArrays
    verdicts: npt.NDArray[np.uint8]
    feedback_events: int
    unreadable: tuple[tuple[int, int], ...]
    """(first frame, frames) that could not be decoded."""


class KernelPass:
    """Implements ``LaneClient``. ``row`` is this kernel's row in the reduction's verdicts."""

    def __init__(
        self,
        context: PassContext,
        attachment: Attachment,
        lane: Lane,
        geometry: FrameGeometry,
        verdicts: Verdicts,
        row: int,
        bucket: str,
        key: bytes,
    ) -> None:
        self.attachment = attachment
        self.feedback_events = 0
        self.unreadable = Ranges()
        """Frames that could not be decoded."""
        self._context = context
        self._lane = lane
        self._geometry = geometry
        self._verdicts = verdicts
        self._row = row
        self._bucket = bucket
        self._key = key
        self._state: StateArrays | None = None
        self._answered = Ranges()
        self._final = False
        self._refusal: Hopeless | None = None
        self._changed = asyncio.Event()
        self._stream = lane.join(self)

    # -- frames, from the reduction

    def offer(self, batch: FrameBatch) -> None:
        if self._refusal is not None:
            batch.release()
        else:
            self._lane.offer(self._stream, batch, live=True)

    def lag(self, first: int, count: int) -> None:
        if self._refusal is None:
            self._lane.lag(self._stream, first, count)
            self._changed.set()

    def leave(self) -> None:
        """The stream was aborted, or the pass is over. Idempotent."""
        self._lane.leave(self._stream)

    # -- outcomes, from the lane

    def judged(self, run: Run, reply: Reply) -> None:
        if reply.feedback or reply.dropped_feedback:
            self._publish(run, reply)
        self._answered.add(run.first_frame, run.count)
        self._note_unreadable(run, reply)
        self._verdicts.record(self._row, run.first_frame, reply.verdicts)
        self._context.tally.judged(reply.verdicts, live=run.live)

    def _note_unreadable(self, run: Run, reply: Reply) -> None:
        """Frames whose stored bytes are broken: known once, reported in the product, never judged."""
        for frame in np.flatnonzero(reply.verdicts == UNREADABLE):
            self.unreadable.add(run.first_frame + int(frame), 1)
        reply.verdicts[reply.verdicts == UNREADABLE] = UNREDUCED

    def voided(self, first: int, count: int) -> None:
        self._verdicts.void(self._row, first, count)

    def merge(self, state: StateArrays) -> None:
        if self._state is None:
            self._state = state
            return
        for spec in self.attachment.kernel.state:
            merge(spec, self._state[spec.name], state[spec.name])

    def banked(self, final: bool) -> None:
        if final:
            self._final = True
            self._changed.set()

    def lagged(self) -> None:
        self._changed.set()

    def refused(self, kind: str, reason: str) -> None:
        if self._refusal is None:
            self._refusal = Hopeless(kind, reason)
            self._changed.set()
            # Not now: the lane is going through its clients.
            asyncio.get_running_loop().call_soon(self.leave)

    def _publish(self, run: Run, reply: Reply) -> None:
        now_ns = time.time_ns()
        # A frame that is judged again (its state was lost) has told the instrument already.
        again = self._answered if self._answered.total else None
        events = [
            FeedbackEvent(self._bucket, self._key, self.attachment.kernel.name, frame, code, value, now_ns, run.live)
            for frame, code, value in reply.feedback
            if again is None or not again.covers(frame, 1)
        ]
        self.feedback_events += len(events)
        self._context.feedback.publish(events)
        if reply.dropped_feedback:
            self._context.tally.feedback_dropped(reply.dropped_feedback)

    # -- the end

    async def finish(self, record: ObjectRecord, frames: int, domain: Domain) -> Outcome:
        """Wait for, or read back, every frame; then the state. Raises Gone, Postponed or Hopeless."""
        if self._refusal is None:
            self._lane.finish(self._stream)
        window = asyncio.Semaphore(CATCHUP_PIECES)
        try:
            while not self._final:
                self._changed.clear()
                if self._refusal is not None:
                    raise self._refusal
                if not await self._catch_up(record, domain, window) and not self._final and self._refusal is None:
                    await self._changed.wait()
        finally:
            self.leave()
        assert self._state is not None
        return Outcome(self._state, self._verdicts.row(self._row, frames), self.feedback_events, tuple(self.unreadable))

    async def _catch_up(self, record: ObjectRecord, domain: Domain, window: asyncio.Semaphore) -> bool:
        """Read back every frame that lags now; False when none did."""
        frame_bytes = self._geometry.frame_bytes
        size = max(1, min(CATCHUP_FRAMES, CATCHUP_BYTES // frame_bytes))
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
            loaded = await self._load(record, first, count, domain)
        except BaseException:
            for limit in held:
                limit.release()
            if self._refusal is None:
                self._lane.lag(self._stream, first, count)
            raise
        batch = LoadedBatch(loaded, first, count, tuple(held))
        if self._refusal is not None:
            batch.release()
        else:
            self._lane.offer(self._stream, batch, live=False)

    def _take(self, count_max: int) -> tuple[int, int] | None:
        return None if self._refusal is not None else self._lane.load(self._stream, count_max)

    async def _load(self, record: ObjectRecord, first: int, count: int, domain: Domain) -> LoadedBytes:
        start = self._geometry.origin + first * self._geometry.frame_bytes
        return await load(self._context.pad, record, start, count * self._geometry.frame_bytes, domain)


async def load(pad: LandingPad, record: ObjectRecord, start: int, length: int, domain: Domain) -> LoadedBytes:
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

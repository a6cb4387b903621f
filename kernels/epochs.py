"""One kernel's pass over one object version, through all its parameter epochs.

In: frames from the reduction (kernels/reduction.py), in the order in which they are announced; new settings of the kernel
while the stream runs; the committed record. Out: an ``Outcome``, or why there is none. Each epoch is a pass of its own
(kernels/passes.py), in the lane of its settings; their states merge in the order of the epochs. What always holds: a frame
is judged with the settings of its own epoch, also when it is read back from disk; nothing behind a STOP is judged, whichever
epoch said it.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ingest.ports import Domain, FrameBatch
from ingest.records import FrameGeometry, KernelEpoch, ObjectRecord
from kernels.attach import Attachment
from kernels.lane import STATE_ON_LOOP_BYTES_MAX, Lane, StateArrays
from kernels.layout.index import FrameIndex
from kernels.passes import CATCHUP_PIECES, EpochPass, PassContext, Report, merge_states
from kernels.rows import Table
from kernels.scheduler import NO_LIMIT
from kernels.verdicts import Verdicts

EPOCHS_MAX = 256
"""Of one version; further changes take effect for streams that open later."""


def begins(last: Attachment, now: Attachment, epochs: int) -> bool:
    """Whether a stream's frames are judged with other settings from here on, of which it has had so many.

    Only if the sources are those that it began with; and an ORDERED kernel keeps its settings to the end of the stream: its state
    is one, and would begin anew."""
    changed = now.sources == last.sources and now.uses != last.uses
    return changed and not now.kernel.ordered and epochs < EPOCHS_MAX


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """A finished pass. ``epochs``: (first frame, settings), in order."""

    state: StateArrays
    result: StateArrays | None
    """What finish() made of the state, where the kernel has one."""
    rows: Table | None
    rows_left_out: int
    """Rows beyond what a frame, or a product, may have."""
    verdicts: npt.NDArray[np.uint8]
    feedback_events: int
    unreadable: tuple[tuple[int, int], ...]
    """(first frame, frames) that could not be decoded."""
    epochs: tuple[tuple[int, Attachment], ...]


class KernelPass:
    """``row``: this kernel's row in the reduction's verdicts. ``lane`` finds or makes the lane of some settings.
    ``stopped`` is called when a frame says STOP."""

    def __init__(
        self,
        context: PassContext,
        epochs: Sequence[tuple[int, Attachment]],
        lane: Callable[[Attachment], Lane],
        geometry: FrameGeometry,
        verdicts: Verdicts,
        row: int,
        bucket: str,
        key: bytes,
        stopped: Callable[[int], None],
        index: FrameIndex | None = None,
    ) -> None:
        """``index``: where the frames are, if they do not lie back to back as ``geometry`` says."""
        self.attachment = epochs[0][1]
        self.stopped_at: int | None = None
        self._context = context
        self._lane = lane
        self._geometry = geometry
        self._index = index
        self._verdicts = verdicts
        self._row = row
        self._report = Report(context, self.attachment.kernel, verdicts, row, bucket, key)
        self._tell_stopped = stopped
        self._announced = 0
        """First frame that was not announced yet."""
        self._changed = asyncio.Event()
        self._epochs: list[EpochPass] = []
        for first_frame, attachment in epochs:
            self._begin(first_frame, attachment)

    def _begin(self, first_frame: int, attachment: Attachment) -> None:
        lane = self._lane(attachment)
        self._epochs.append(
            EpochPass(
                self._context,
                attachment,
                lane,
                self._geometry,
                self._report,
                first_frame,
                self._changed,
                self._stopped,
                self._index,
            )
        )

    # -- frames, from the reduction

    @property
    def _limit(self) -> int:
        return NO_LIMIT if self.stopped_at is None else self.stopped_at + 1

    def change(self, attachment: Attachment) -> None:
        """From the next frame on these settings hold, where they may (``begins``)."""
        last = self._epochs[-1]
        if self.stopped_at is not None or not begins(last.attachment, attachment, len(self._epochs)):
            return
        if last.first_frame == self._announced:
            # Not one frame was judged with the last settings.
            self._epochs.pop().leave()
        self._begin(self._announced, attachment)

    def offer(self, batch: FrameBatch) -> None:
        self._announce(batch.first_frame, batch.count)
        self._epochs[-1].offer(batch)

    def lag(self, first: int, count: int) -> None:
        """Frames of any epoch, announced now or not at all yet."""
        self._announce(first, count)
        stop = min(first + count, self._limit)
        for epoch, end in zip(
            self._epochs, (*(later.first_frame for later in self._epochs[1:]), NO_LIMIT), strict=True
        ):
            start = max(first, epoch.first_frame)
            if start < min(stop, end):
                epoch.lag(start, min(stop, end) - start)

    def _announce(self, first: int, count: int) -> None:
        self._announced = max(self._announced, first + count)
        start = max(first, self._limit)
        self._report.behind_stop(start, first + count - start)

    def leave(self) -> None:
        """The stream was aborted, or the pass is over. Idempotent."""
        for epoch in self._epochs:
            epoch.leave()

    def refused(self, kind: str, reason: str) -> None:
        """No frame of the version will be judged any more."""
        for epoch in self._epochs:
            epoch.refused(kind, reason)

    @property
    def epochs(self) -> tuple[KernelEpoch, ...]:
        return tuple(
            KernelEpoch(self.attachment.name, epoch.first_frame, epoch.attachment.uses) for epoch in self._epochs
        )

    # -- outcomes, from the epochs

    def _stopped(self, epoch: EpochPass, frame: int) -> None:
        if frame >= self._limit:
            return
        self.stopped_at = frame
        at = self._epochs.index(epoch)
        for later in self._epochs[at + 1 :]:
            later.leave()
        del self._epochs[at + 1 :]
        self._report.behind_stop(frame + 1, self._announced - frame - 1)
        self._changed.set()
        self._tell_stopped(frame)

    # -- the end

    async def finish(self, record: ObjectRecord, frames: int, domain: Domain) -> Outcome:
        """Wait for, or read back, every frame; then the state. Raises Gone, Postponed or Hopeless."""
        for epoch in self._epochs:
            epoch.end()
        window = asyncio.Semaphore(CATCHUP_PIECES)
        try:
            while not all(epoch.final for epoch in self._epochs):
                self._changed.clear()
                for epoch in self._epochs:
                    if epoch.refusal is not None:
                        raise epoch.refusal
                if not await self._catch_up(record, domain, window) and not self._changed.is_set():
                    await self._changed.wait()
            state = await self._merged()
            result = None
            if self.attachment.kernel.has_finish:
                result = await self._epochs[-1].finished(state)
        finally:
            self.leave()
        rows = self._report.rows
        return Outcome(
            state=state,
            result=result,
            rows=None if rows is None else rows.table(),
            rows_left_out=self._report.dropped_rows + (0 if rows is None else rows.left_out),
            verdicts=self._verdicts.row(self._row, frames),
            feedback_events=self._report.feedback_events,
            unreadable=tuple(self._report.unreadable),
            epochs=tuple((epoch.first_frame, epoch.attachment) for epoch in self._epochs),
        )

    async def _catch_up(self, record: ObjectRecord, domain: Domain, window: asyncio.Semaphore) -> bool:
        found = False
        for epoch in list(self._epochs):
            found = await epoch.catch_up(record, domain, window) or found
        return found

    async def _merged(self) -> StateArrays:
        """The states of all epochs in one, in their order: float sums depend on it."""
        kernel = self.attachment.kernel
        states = [epoch.state for epoch in self._epochs if epoch.state is not None]
        merged, *others = states

        def merge_all() -> None:
            for other in others:
                merge_states(kernel, merged, other)

        if others and sum(spec.size_bytes for spec in kernel.state) > STATE_ON_LOOP_BYTES_MAX:
            await asyncio.to_thread(merge_all)
        else:
            merge_all()
        return merged

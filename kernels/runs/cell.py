"""One state of a batch, and the members that are judged in it.

In: members with their frames, replies of the lane. Out: verdicts and rows of each member, the state once the lane has banked it.
What always holds: a frame that is offered here is released by the lane; feedback of a member is published once, however
often it is judged.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ingest.ports import FeedbackEvent, FrameBatch
from ingest.records import FrameGeometry, ObjectRecord
from kernels.contract import FRAME_COLUMN, merge
from kernels.lane import StateArrays
from kernels.layout.index import FrameIndex
from kernels.layout.placing import table_of_members
from kernels.passes import LoadedBatch
from kernels.runs.ledger import OneFrame
from kernels.sandbox import Reply
from kernels.scheduler import Run
from kernels.wire import UNREADABLE

if TYPE_CHECKING:
    from kernels.runs.batch import Batch


@dataclasses.dataclass(slots=True, eq=False)
class Entry:
    """A member on its way. ``verdict`` None: not judged in the state at hand."""

    record: ObjectRecord
    geometry: FrameGeometry
    ledger: OneFrame
    index: FrameIndex | None = None
    """Where its frame is stored, if it is not plain."""
    verdict: int | None = None
    told: bool = False
    rows: npt.NDArray[np.void] | None = None
    gone: bool = False
    """It is in no state here; who is to care for it knows."""


class _Numbered:
    """A frame under its number in a cell (``FrameBatch``)."""

    __slots__ = ("_frame", "count", "first_frame", "offset", "position", "region")

    def __init__(self, frame: FrameBatch, number: int) -> None:
        self.region = frame.region
        self.offset = frame.offset
        self.first_frame = number
        self.count = 1
        self.position = frame.position
        self._frame = frame

    @property
    def revoked(self) -> bool:
        return self._frame.revoked

    def dispatched(self) -> bool:
        return self._frame.dispatched()

    def release(self) -> None:
        self._frame.release()


class Cell:
    """One stream of a lane, one state (``LaneClient``)."""

    def __init__(self, batch: Batch) -> None:
        self.entries: list[Entry] = []
        self.state: StateArrays | None = None
        self.final = False
        self._batch = batch
        self._stream = batch.lane.join(self, alone=True, encoded=batch.encoded)

    def add(self, entry: Entry, frame: FrameBatch | None) -> None:
        number = len(self.entries)
        self.entries.append(entry)
        if frame is not None:
            self._batch.lane.offer(self._stream, _Numbered(frame, number), live=True)
        else:
            self._batch.lane.lag(self._stream, number, 1)
            self._batch.changed.set()

    def finish(self) -> None:
        self._batch.lane.finish(self._stream)

    def leave(self) -> None:
        self._batch.lane.leave(self._stream)

    def take(self) -> int | None:
        """The number of a member whose frame must be read back; it is being loaded from now on."""
        head = self._batch.lane.load(self._stream, 1)
        return None if head is None else head[0]

    def loaded(self, frame: LoadedBatch) -> None:
        self._batch.lane.offer(self._stream, frame, live=False)

    def without(self, number: int) -> None:
        self.entries[number].gone = True
        self._batch.lane.forget(self._stream, number, 1)

    # -- LaneClient

    def table(self, run: Run) -> bytes:
        if not self._batch.encoded:
            return b""
        members = []
        for number, frame in enumerate(run.batches, run.first_frame):
            index = self.entries[number].index
            assert index is not None
            members.append((number, index, frame))
        return table_of_members(members)

    def judged(self, run: Run, reply: Reply) -> None:
        batch = self._batch
        entries = self.entries[run.first_frame : run.first_frame + run.count]
        if reply.feedback:
            now_ns = time.time_ns()
            events = [
                FeedbackEvent(
                    entry.record.bucket, entry.record.key, batch.kernel.name, 0, code, value, now_ns, run.live
                )
                for number, code, value in reply.feedback
                if not (entry := self.entries[number]).told
            ]
            batch.feedback_events += len(events)
            batch.host.context.feedback.publish(events)
        if not all(entry.told for entry in entries):
            batch.dropped_rows += reply.dropped_rows
        for entry, verdict in zip(entries, reply.verdicts.tolist(), strict=True):
            entry.told = True
            # Stored bytes that cannot be decoded: known once, never judged.
            entry.verdict = None if verdict == UNREADABLE else verdict
        if reply.rows is not None:
            self._take_rows(reply.rows)
        if reply.dropped_feedback:
            batch.host.context.tally.feedback_dropped(reply.dropped_feedback)
        batch.host.context.tally.judged(reply.verdicts, live=run.live)

    def _take_rows(self, rows: npt.NDArray[np.void]) -> None:
        numbers, starts = np.unique(rows[FRAME_COLUMN], return_index=True)
        for number, table in zip(numbers.tolist(), np.split(rows, starts[1:]), strict=True):
            table = table.copy()
            table[FRAME_COLUMN] = 0
            self.entries[number].rows = table

    def stopped(self, frame: int) -> None:
        """Never called: each member is a stream of its own."""

    def restarted(self) -> None:
        """Of an ordered kernel: its members were announced again by ``voided``."""
        self.state = None

    def voided(self, first: int, count: int) -> None:
        for entry in self.entries[first : first + count]:
            entry.verdict = None
            entry.rows = None

    def merge(self, state: StateArrays) -> None:
        if self.state is None:
            self.state = state
            return
        for spec in self._batch.kernel.state:
            merge(spec, self.state[spec.name], state[spec.name])

    def banked(self, final: bool) -> None:
        if final:
            self.final = True
            self._batch.changed.set()

    def lagged(self) -> None:
        self._batch.changed.set()

    def refused(self, kind: str, reason: str) -> None:
        self._batch.refuse(kind, reason)

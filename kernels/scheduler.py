"""Which frames of which stream a sandbox judges next: a pure core, no clock, no process, no task.

One ``Schedule`` belongs to one sandbox. In: events (a stream joined, frames were offered or lag, a step succeeded, the
sandbox died). Out: one ``Step`` at a time for the shell (kernels/lane.py) to carry out: reset a state slot, run a
batch, collect a slot's state. The shell reports the step's outcome before it asks for the next.

What always holds (``validate``):
- every frame a stream ever announced is in exactly one place: queued, running, judged, banked, lagging or loading;
- an offered batch is released exactly once, never while the sandbox may still read it;
- live frames of one stream are dispatched in the order they were offered.

A STOP bounds a stream: frames behind it leave at once. If some of them were judged before (the stopping frame came late,
from disk), the state is of no use and everything before the STOP is judged anew, so that the result never depends on timing.

An *ordered* schedule keeps each stream's frames in sequence in one state: a stream keeps its slot until it is collected for
good, and where a frame lags, every later one lags behind it. So whatever is queued directly follows what was judged.

State lives in a *slot* of the sandbox. ``judged`` frames are those whose effect sits in the slot and dies with the
sandbox; ``banked`` ones were collected and merged outside. A stream that idles while others wait for a slot is parked
(collected and banked early), so the number of streams is not bounded by the number of slots.
"""

from __future__ import annotations

import dataclasses
from collections import deque

from ingest.ports import FrameBatch
from kernels.ranges import Ranges

LIVE_BURST = 8
"""Live batches in a row before frames from disk get one: catch-up never starves, ingest always leads."""
NO_LIMIT = 1 << 62
QUANTUM = 16
"""Batches run while somebody waits for a slot before the least recently served holder is parked."""


@dataclasses.dataclass(slots=True)
class _Piece:
    """What is left of an offered batch. ``committed``: dispatched() was asked and said yes."""

    batch: FrameBatch
    first: int
    count: int
    offset: int
    committed: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Reset:
    """Give the slot its initial state for ``stream``."""

    stream: int
    slot: int


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """Judge ``count`` frames that lie back to back at ``offset`` of ``region``."""

    stream: int
    slot: int
    region: int
    offset: int
    first_frame: int
    count: int
    live: bool
    finished: tuple[FrameBatch, ...]
    """Batches whose last frame is in this run: released once it is over."""
    unfinished: FrameBatch | None
    """A batch this run takes only the first part of; the rest is still queued."""
    alone: bool = False
    """See wire.Run."""

    @property
    def batches(self) -> tuple[FrameBatch, ...]:
        """All that hold frames of this run, in order."""
        return self.finished if self.unfinished is None else (*self.finished, self.unfinished)


@dataclasses.dataclass(frozen=True, slots=True)
class Collect:
    """Take the slot's state out, for good (``final``) or because somebody else needs the slot.

    ``slot`` is None when everything was banked before: nothing to take, the stream is simply over.
    """

    stream: int
    slot: int | None
    final: bool


Step = Reset | Run | Collect


class _Stream:
    __slots__ = (
        "alone", "banked", "closed", "collected", "disk", "encoded", "frame_bytes", "gone", "judged", "lagging", "limit",
        "live", "loading", "served", "slot", "slot_ready",
    )  # fmt: skip

    def __init__(self, frame_bytes: int, alone: bool, encoded: int) -> None:
        self.alone = alone
        self.encoded = encoded
        self.frame_bytes = frame_bytes
        self.live: deque[_Piece] = deque()
        self.disk: deque[_Piece] = deque()
        self.judged = Ranges()
        self.banked = Ranges()
        self.lagging = Ranges()
        self.loading = Ranges()
        self.limit = NO_LIMIT
        """First frame that is of no use, behind a STOP."""
        self.slot: int | None = None
        self.slot_ready = False
        self.served = 0
        self.closed = False
        self.gone = False
        self.collected = False

    @property
    def waiting(self) -> bool:
        return bool(self.live or self.disk)

    def behind(self, frame: int) -> bool:
        """Some frame before this one is still to be read from disk."""
        heads = [found[0] for found in (self.lagging.head(1), self.loading.head(1)) if found is not None]
        return bool(heads) and min(heads) < frame

    def demote(self) -> None:
        """Everything queued is released, and lags."""
        for piece in (*self.live, *self.disk):
            piece.batch.release()
            self.lagging.add(piece.first, piece.count)
        self.live.clear()
        self.disk.clear()

    @property
    def settled(self) -> bool:
        """Every frame is judged and no more come: the state may be collected for good."""
        return self.closed and not (self.waiting or self.lagging or self.loading or self.collected)


class Schedule:
    """The work of one sandbox. Stream numbers are the caller's; every method returns at once."""

    def __init__(self, slots: int, *, batch_bytes_max: int, batch_frames_max: int, ordered: bool = False) -> None:
        self._streams: dict[int, _Stream] = {}
        self._turns: deque[int] = deque()
        self._free = list(range(slots - 1, -1, -1))
        self._batch_bytes_max = batch_bytes_max
        self._batch_frames_max = batch_frames_max
        self._ordered = ordered
        self._step: Step | None = None
        self._live_in_a_row = 0
        self._runs_while_waiting = 0
        self._clock = 0
        self._orphan: FrameBatch | None = None

    # -- events from the streams

    def join(self, stream: int, frame_bytes: int, *, alone: bool = False, encoded: int = 0) -> None:
        """``encoded``: the frames do not lie back to back in memory, and at most so many go into one batch; 0: they do."""
        self._streams[stream] = _Stream(frame_bytes, alone, encoded)
        self._turns.append(stream)

    def offer(self, stream: int, batch: FrameBatch, *, live: bool) -> None:
        """Frames that lie in memory now. From disk (``live=False``) they were ``loading`` before."""
        state = self._streams[stream]
        if not live:
            state.loading.remove(batch.first_frame, batch.count)
        piece = _Piece(batch, batch.first_frame, min(batch.count, state.limit - batch.first_frame), batch.offset)
        if piece.count <= 0:
            batch.release()
        elif self._ordered and state.behind(piece.first):
            batch.release()
            state.lagging.add(piece.first, piece.count)
        else:
            (state.live if live else state.disk).append(piece)

    def lag(self, stream: int, first: int, count: int) -> None:
        """These frames must be read from disk (never lay in memory, or loading them failed)."""
        state = self._streams[stream]
        state.loading.remove(first, count)
        state.lagging.add(first, min(count, state.limit - first))

    def load(self, stream: int, count_max: int) -> tuple[int, int] | None:
        """The next lagging frames to read from disk, now ``loading`` until offered or ``lag`` again."""
        state = self._streams[stream]
        if self._ordered and state.lagging and state.slot is None:
            # Without a slot its frames could not be judged, only fill the memory that the others need to end.
            if not self._free:
                return None
            state.slot = self._free.pop()
        head = state.lagging.head(count_max)
        if head is not None:
            state.lagging.remove(*head)
            state.loading.add(*head)
        return head

    def forget(self, stream: int, first: int, count: int) -> None:
        """``loading`` frames that there is no reason to judge any more."""
        self._streams[stream].loading.remove(first, count)

    def close(self, stream: int) -> None:
        """No frames beyond those announced will come."""
        self._streams[stream].closed = True

    def leave(self, stream: int) -> None:
        """Forget the stream (collected, aborted or given up): queued batches are released now, a running one later."""
        state = self._streams[stream]
        state.gone = True
        under_way = self._step is not None and self._step.stream == stream
        unfinished = self._step.unfinished if under_way and isinstance(self._step, Run) else None
        for piece in (*state.live, *state.disk):
            if piece.batch is unfinished:
                self._orphan = unfinished
            else:
                piece.batch.release()
        state.live.clear()
        state.disk.clear()
        if not under_way:
            self._forget(stream)

    # -- what the shell asks

    def next(self) -> Step | None:
        """The next step, or None when there is nothing to do. Not to be asked while a step is under way."""
        assert self._step is None
        self._step = self._choose()
        return self._step

    @property
    def streams(self) -> int:
        return len(self._streams)

    def lagging(self, stream: int) -> int:
        return self._streams[stream].lagging.total

    def banked(self, stream: int) -> int:
        """Frames whose effect is in the state collected so far."""
        return self._streams[stream].banked.total

    def collected(self, stream: int) -> bool:
        """The final state was taken out; nothing of the stream is left here."""
        return self._streams[stream].collected

    def unjudged(self) -> int:
        """Frames announced and not yet judged, over all streams."""
        running = self._step.count if isinstance(self._step, Run) else 0
        return running + sum(
            s.lagging.total + s.loading.total + sum(piece.count for piece in (*s.live, *s.disk))
            for s in self._streams.values()
        )

    # -- outcome of the step under way

    def done(self) -> None:
        """The step succeeded."""
        step, self._step = self._step, None
        assert step is not None
        self._bury()
        state = self._streams[step.stream]
        match step:
            case Reset():
                state.slot_ready = True
            case Run():
                state.judged.add(step.first_frame, step.count)
                for batch in step.finished:
                    batch.release()
            case Collect():
                state.banked.update(state.judged)
                state.judged.clear()
                self._vacate(state)
                state.collected = step.final
        if state.gone:
            self._forget(step.stream)

    def stopped(self, frame: int) -> list[tuple[int, int]]:
        """The run under way succeeded up to ``frame``, which said STOP: nothing behind it is judged any more.

        Returns the frames, as (first, count), whose verdicts and state are void: all of them where some lay behind.
        """
        step, self._step = self._step, None
        assert isinstance(step, Run)
        self._bury()
        state = self._streams[step.stream]
        state.judged.add(step.first_frame, frame + 1 - step.first_frame)
        for batch in step.finished:
            batch.release()
        if state.gone:
            self._forget(step.stream)
            return []
        state.limit = min(state.limit, frame + 1)
        for queue in (state.live, state.disk):
            self._cut(queue, state.limit)
        for place in (state.lagging, state.loading):
            place.remove(state.limit, NO_LIMIT)
        seen = [*state.judged, *state.banked]
        if all(first + count <= state.limit for first, count in seen):
            return []
        for place in (state.judged, state.banked):
            place.remove(state.limit, NO_LIMIT)
            state.lagging.update(place)
            place.clear()
        if self._ordered:
            state.demote()
        self._vacate(state)
        return seen

    @staticmethod
    def _cut(queue: deque[_Piece], limit: int) -> None:
        """Let go of the frames from ``limit`` on."""
        pieces = list(queue)
        queue.clear()
        for piece in pieces:
            piece.count = min(piece.count, limit - piece.first)
            if piece.count > 0:
                queue.append(piece)
            else:
                piece.batch.release()

    def failed(self) -> list[tuple[int, int, int]]:
        """The sandbox is dead and reaped: every slot's state is lost, its frames lag, the step under way is undone.

        Returns the frames whose verdicts are void: (stream, first frame, count).
        """
        step, self._step = self._step, None
        self._bury()
        if isinstance(step, Run):
            self._streams[step.stream].lagging.add(step.first_frame, step.count)
            for batch in step.finished:
                batch.release()
        void = []
        for number, state in list(self._streams.items()):
            void += [(number, first, count) for first, count in state.judged]
            state.lagging.update(state.judged)
            state.judged.clear()
            self._vacate(state)
            if self._ordered:
                state.demote()
            if state.gone:
                self._forget(number)
        return void

    # -- choosing

    def _choose(self) -> Step | None:
        # First what frees a slot: a finished stream must not wait until the others fall silent.
        settled = self._settle()
        if settled is not None:
            return settled
        stream = self._pick()
        if stream is None:
            self._runs_while_waiting = 0
            return None
        state = self._streams[stream]
        if state.slot is None:
            self._runs_while_waiting += 1
            if self._free:
                return self._seat(stream)
            parked = None if self._ordered else self._park(force=self._runs_while_waiting > QUANTUM)
            if parked is not None:
                self._runs_while_waiting = 0
                return parked
            stream = self._pick(seated=True)
            if stream is None:
                # Ordered: every holder waits for frames. (Else holders that wait for none are parked without force.)
                assert self._ordered
                return None
            state = self._streams[stream]
        if not state.slot_ready:
            return self._seat(stream)
        run = self._assemble(stream)
        # None: every queued frame of the stream turned out to be revoked. Look again, the queues are shorter now.
        return run if run is not None else self._choose()

    def _pick(self, *, seated: bool = False) -> int | None:
        """Whose turn it is: live frames before frames from disk, round robin within each."""
        live = disk = None
        for stream in self._turns:
            state = self._streams[stream]
            if seated and state.slot is None:
                continue
            if state.live and live is None:
                live = stream
            elif state.disk and disk is None:
                disk = stream
        if live is not None and (disk is None or self._live_in_a_row < LIVE_BURST):
            return live
        return disk

    def _seat(self, stream: int) -> Step:
        state = self._streams[stream]
        if state.slot is None:
            state.slot = self._free.pop()
        state.slot_ready = False
        return Reset(stream, state.slot)

    def _park(self, *, force: bool) -> Step | None:
        """Free a slot: of a stream that idles, or (``force``) of the one served longest ago."""
        holders = [
            (state.waiting, state.served, number)
            for number, state in self._streams.items()
            if state.slot is not None and (force or not state.waiting)
        ]
        if not holders:
            return None
        _, _, number = min(holders)
        state = self._streams[number]
        assert state.slot is not None
        return Collect(number, state.slot, final=state.settled)

    def _settle(self) -> Step | None:
        """Collect a stream that has seen all its frames; a stream that saw none still owes its initial state."""
        for number in self._turns:
            state = self._streams[number]
            if not state.settled:
                continue
            if state.slot_ready or state.banked:
                return Collect(number, state.slot, final=True)
            if state.slot is not None or self._free:
                return self._seat(number)
            if not self._ordered:
                return self._park(force=True)
        return None

    def _assemble(self, stream: int) -> Run | None:
        """Take as many frames that lie back to back as one batch may hold."""
        state = self._streams[stream]
        live = bool(state.live) and not (state.disk and self._live_in_a_row >= LIVE_BURST)
        if self._ordered and state.live and state.disk:
            live = state.live[0].first < state.disk[0].first
        queue = state.live if live else state.disk
        limit = max(1, min(self._batch_frames_max, self._batch_bytes_max // max(1, state.frame_bytes)))
        if state.encoded:
            limit = min(limit, state.encoded)
        taken: list[tuple[int, int, int]] = []
        finished: list[FrameBatch] = []
        unfinished: FrameBatch | None = None
        count = 0
        while queue and count < limit:
            piece = queue[0]
            if taken and not self._follows(taken[0], count, piece, state):
                break
            if not piece.committed and not piece.batch.dispatched():
                queue.popleft()
                state.lagging.add(piece.first, piece.count)
                piece.batch.release()
                if self._ordered:
                    state.demote()
                continue
            piece.committed = True
            size = min(piece.count, limit - count)
            taken.append((piece.batch.region, piece.offset, piece.first))
            count += size
            if size == piece.count:
                queue.popleft()
                finished.append(piece.batch)
            else:
                unfinished = piece.batch
                piece.first += size
                piece.count -= size
                piece.offset += size * state.frame_bytes
        if not taken:
            return None
        assert state.slot is not None
        self._clock += 1
        state.served = self._clock
        self._turns.remove(stream)
        self._turns.append(stream)
        self._live_in_a_row = self._live_in_a_row + 1 if live else 0
        region, offset, first = taken[0]
        return Run(stream, state.slot, region, offset, first, count, live, tuple(finished), unfinished, state.alone)

    @staticmethod
    def _follows(head: tuple[int, int, int], count: int, piece: _Piece, state: _Stream) -> bool:
        region, offset, first = head
        if state.encoded:
            return piece.first == first + count
        frame_bytes = state.frame_bytes
        return (piece.batch.region, piece.offset, piece.first) == (region, offset + count * frame_bytes, first + count)

    # -- bookkeeping

    def _bury(self) -> None:
        """Release the batch whose stream left while the sandbox read a part of it."""
        orphan, self._orphan = self._orphan, None
        if orphan is not None:
            orphan.release()

    def _vacate(self, state: _Stream) -> None:
        if state.slot is not None:
            self._free.append(state.slot)
        state.slot = None
        state.slot_ready = False

    def _forget(self, stream: int) -> None:
        self._vacate(self._streams.pop(stream))
        self._turns.remove(stream)

    def validate(self) -> None:
        """Raise AssertionError if the invariants of the module docstring do not hold (for tests)."""
        slots = [*self._free, *(s.slot for s in self._streams.values() if s.slot is not None)]
        assert len(slots) == len(set(slots))
        assert set(self._turns) == set(self._streams)
        assert len(self._turns) == len(self._streams)
        for number, state in self._streams.items():
            places = [state.judged, state.banked, state.lagging, state.loading]
            seen = Ranges()
            for first, count in [
                *(item for place in places for item in place),
                *((piece.first, piece.count) for piece in (*state.live, *state.disk)),
            ]:
                before = seen.total
                seen.add(first, count)
                assert seen.total == before + count, f"stream {number}: frames {first}+{count} are in two places"
            assert state.slot is not None or not state.judged

"""One task of a replay, on the machine where it runs: objects are read by ranges and judged in sandboxes.

In: a ``Task``; a way to open stored versions. Out: an ``Answer`` that says of each object what a node's product would hold. What
always holds: frames of an object are judged in order, in one state for each parameter epoch, as a node judges a stream
that does not lag; what fails costs its own object; what may succeed elsewhere or later is raised, and nothing of the task
counts then.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

import numpy as np
import numpy.typing as npt

from ingest.ports import KernelRefused
from ingest.records import FrameGeometry, ObjectRecord
from kernels.contract import FRAME_COLUMN, Kernel
from kernels.formats import NotFrames
from kernels.layout.index import FrameIndex
from kernels.lineage import environment
from kernels.offline.pieces import Answer, Judged, Part, Task, Wanted
from kernels.offline.remote import FarBody, Ranges, open_far
from kernels.offline.runner import LIMITS, Found, Runner
from kernels.offline.seats import Known, Seat, Seats, Unfit
from kernels.passes import merge_states
from kernels.rows import Rows
from kernels.runs.merge import initial
from kernels.runs.names import exact
from kernels.runs.partial import state_bytes
from kernels.sandbox import SandboxFailed
from kernels.verdicts import AFTER_STOP, UNREDUCED

AHEAD = 4
"""Objects opened before their turn."""
STRIKES = 3
"""Sandboxes that may fail over one object: as on a node before a kernel is disabled."""

Arrays = dict[str, npt.NDArray[np.generic]]


class Lost(Exception):
    """The version cannot be read, now or later; ``str()`` says why."""


class Again(Exception):
    """The task did not fail for what it is: it may be tried again, also elsewhere. ``str()`` says what happened."""


Open = Callable[[str, Wanted], tuple[ObjectRecord, Ranges]]
"""Of a bucket. Blocks. Raises Lost, OSError."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Opened:
    wanted: Wanted
    body: FarBody | NotFrames | None
    record: ObjectRecord | None
    failure: str = ""


class _Broken(Exception):
    """The state that several objects share is lost with its sandbox."""


class Judging:
    """Of one process. Belongs to its event loop; several tasks may run at once."""

    def __init__(self, zygote_socket: str, seats: Seats, opener: Open) -> None:
        self._zygote_socket = zygote_socket
        self._seats = seats
        self._open = opener

    async def run(self, task: Task) -> Answer:
        """Raises Again."""
        started_ns = time.time_ns()
        try:
            known = await asyncio.to_thread(self._seats.known, task.recipe)
            answer = await self._answer(task, known)
        except (Unfit, Lost, KernelRefused) as trouble:
            # Of the kernel or its arrays: every object of the task has it.
            answer = Answer(tuple(Judged(one.key, failure=str(trouble)) for one in task.objects))
            if task.conclude is not None:
                raise Again(str(trouble)) from None
        except OSError as error:
            raise Again(f"{type(error).__name__}: {error}") from None
        software = dataclasses.asdict(await asyncio.to_thread(environment))
        return Answer(
            answer.objects, answer.shared, answer.result, software, started_ns, time.time_ns(), answer.bytes_read
        )

    async def _answer(self, task: Task, known: Known) -> Answer:
        if task.conclude is not None:
            return Answer(result=await self._concluded(task, known))
        if task.part is not None:
            return await self._part(task, known, task.part)
        for strike in range(1, STRIKES + 1):
            work = _Work(self, known, task, apart=strike > 1 and not task.sequence)
            try:
                return await work.done()
            except _Broken as broken:
                if task.sequence and strike == STRIKES:
                    return Answer(tuple(Judged(one.key, failure=str(broken)) for one in task.objects))
        raise Again("the sandboxes of objects that are apart share a state")  # never: nothing is shared then

    async def _concluded(self, task: Task, known: Known) -> dict[str, bytes]:
        given, geometry = task.conclude, task.geometry
        assert given is not None
        assert geometry is not None
        state = {
            spec.name: np.frombuffer(given[spec.name], spec.dtype).reshape(spec.shape) for spec in known.kernel.state
        }
        async with self.seated(known, task.epoch, geometry, None) as runner:
            return state_bytes(await runner.finish(state))

    async def _part(self, task: Task, known: Known, part: Part) -> Answer:
        (wanted,) = task.objects
        opened = await self.opened(task.recipe.bucket, wanted)
        body = opened.body
        if not isinstance(body, FarBody):
            return Answer((self.unopened(opened),))
        epochs = ((part.first, part.settings),)
        found = await self.whole(known, body, epochs, part.first, part.stop, conclude=False)
        return Answer((found,), bytes_read=(part.stop - part.first) * body.frame_bytes)

    # -- objects

    async def opened(self, bucket: str, wanted: Wanted) -> _Opened:
        try:
            record, ranges = await asyncio.to_thread(self._open, bucket, wanted)
            return _Opened(wanted, await open_far(self._zygote_socket, record, ranges, LIMITS), record)
        except Lost as lost:
            return _Opened(wanted, None, None, str(lost))
        except SandboxFailed as failure:
            raise Again(str(failure)) from None

    async def in_turn(self, bucket: str, objects: Sequence[Wanted]) -> AsyncGenerator[_Opened, None]:
        """In order, some of them opened ahead."""
        ahead: collections.deque[asyncio.Task[_Opened]] = collections.deque()
        rest = iter(objects)
        try:
            while True:
                while len(ahead) < AHEAD and (wanted := next(rest, None)) is not None:
                    ahead.append(asyncio.ensure_future(self.opened(bucket, wanted)))
                if not ahead:
                    return
                yield await ahead.popleft()
        finally:
            for task in ahead:
                task.cancel()
            await asyncio.gather(*ahead, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def seated(
        self, known: Known, settings: int, geometry: FrameGeometry, body: FarBody | None
    ) -> AsyncIterator[Runner]:
        """A runner for these frames; ended if the user fails. Raises as ``Seats.take``; Again where no sandbox can be had."""
        seat = await self.take(known, settings, geometry, body)
        try:
            yield seat.runner
        except BaseException as error:
            await seat.end()
            if isinstance(error, SandboxFailed) and error.kind == "unavailable":
                raise Again(str(error)) from None
            raise
        await self._seats.give(seat)

    async def take(self, known: Known, settings: int, geometry: FrameGeometry, body: FarBody | None) -> Seat:
        try:
            return await self._seats.take(known, settings, geometry, body)
        except SandboxFailed as failure:
            if failure.kind == "unavailable":
                raise Again(str(failure)) from None
            raise

    async def give(self, seat: Seat) -> None:
        await self._seats.give(seat)

    @staticmethod
    def unopened(opened: _Opened) -> Judged:
        """What there is to say of a version whose frames are not there."""
        if isinstance(opened.body, NotFrames) and opened.record is not None:
            return judged(opened.record, opened.wanted.epochs[:1], error=opened.body.reason)
        return Judged(opened.wanted.key, failure=opened.failure)

    async def whole(
        self, known: Known, body: FarBody, epochs: Sequence[tuple[int, int]], first: int, stop: int, *, conclude: bool
    ) -> Judged:
        """Frames [first, stop) of a body, through its epochs, in a state of its own."""
        for strike in range(1, STRIKES + 1):
            try:
                return await self._whole(known, body, epochs, first, stop, conclude=conclude)
            except KernelRefused as refusal:
                return judged(body.record, epochs, body, error=str(refusal))
            except (Unfit, ValueError) as trouble:
                return Judged(body.record.key, failure=str(trouble))
            except SandboxFailed as failure:
                if strike == STRIKES:
                    return Judged(body.record.key, failure=str(failure))
        raise AssertionError("unreachable")

    async def _whole(
        self, known: Known, body: FarBody, epochs: Sequence[tuple[int, int]], first: int, stop: int, *, conclude: bool
    ) -> Judged:
        kernel = known.kernel
        verdicts = np.full(stop - first, AFTER_STOP, np.uint8)
        rows = None if kernel.rows is None else Rows(kernel.rows.dtype)
        states: list[Arrays] = []
        left_out = events = 0
        stopped_at: int | None = None
        ends = [start for start, _ in epochs[1:]] + [stop]
        last = epochs[0][1]
        for (start, settings), end in zip(epochs, ends, strict=True):
            start, end = max(start, first), min(end, stop)
            if stopped_at is not None or (start >= end and states):
                continue
            async with self.seated(known, settings, body.geometry, body) as runner:
                found = await runner.judge_far(body, start, end)
            states.append(found.state)
            verdicts[start - first : end - first] = found.verdicts
            if rows is not None and found.rows is not None:
                rows.add(start, found.rows)
            left_out += found.dropped_rows
            events += found.feedback_events
            stopped_at, last = found.stopped_at, settings
        state, *others = states
        for other in others:
            merge_states(kernel, state, other)
        result = None
        if conclude and kernel.has_finish:
            async with self.seated(known, last, body.geometry, body) as runner:
                result = state_bytes(await runner.finish(state))
        return judged(
            body.record,
            epochs,
            body,
            verdicts=verdicts,
            state=state,
            result=result,
            rows=None if rows is None else rows.table(),
            rows_left_out=left_out + (0 if rows is None else rows.left_out),
            feedback_events=events,
            stopped_at=stopped_at,
            first=first,
        )


class _Work:
    """The objects of one task, judged one after the other. ``apart``: those of one frame do not share a sandbox's state."""

    def __init__(self, judging: Judging, known: Known, task: Task, *, apart: bool) -> None:
        self._judging = judging
        self._known = known
        self._task = task
        self._apart = apart
        self._shares = task.sequence or exact(known.kernel)
        self._shared: dict[int, Arrays] = {}
        self._seats: dict[tuple[int, str, tuple[int, ...]], Seat] = {}
        """Where a state is shared now."""
        self._form: tuple[object, ...] | None = None
        self._bytes = 0

    async def done(self) -> Answer:
        """Raises Again, _Broken, OSError."""
        try:
            async with contextlib.aclosing(self._judging.in_turn(self._task.recipe.bucket, self._task.objects)) as turn:
                found = [await self._object(opened) async for opened in turn]
            for (settings, _, _), seat in self._seats.items():
                self._share(settings, seat.runner.collect(shared=True))
        except BaseException:
            for seat in self._seats.values():
                await seat.end()
            raise
        for seat in self._seats.values():
            await self._judging.give(seat)
        shared = {settings: state_bytes(state) for settings, state in self._shared.items()}
        return Answer(tuple(found), shared, bytes_read=self._bytes)

    async def _object(self, opened: _Opened) -> Judged:
        body = opened.body
        if not isinstance(body, FarBody):
            return self._judging.unopened(opened)
        epochs = opened.wanted.epochs
        if opened.wanted.of_crc not in (None, body.record.crc64nvme):
            epochs = ((0, 0),)
        if not body.is_single:
            if self._task.sequence:
                return Judged(body.record.key, failure="it is not one frame any more")
            self._bytes += body.record.length
            return await self._judging.whole(self._known, body, epochs, 0, body.frames, conclude=True)
        if self._known.kernel.ordered and not self._task.sequence:
            return judged(body.record, epochs[:1], body, deferred=True)
        self._bytes += body.record.length
        return await self._single(body, epochs[:1])

    async def _single(self, body: FarBody, epochs: Sequence[tuple[int, int]]) -> Judged:
        if self._task.sequence and not self._fits(body):
            return Judged(
                body.record.key, failure="format: the frames of an ordered run have one dtype, shape and encoding"
            )
        settings = epochs[0][1]
        sharing = self._shares and not self._apart
        for strike in range(1, STRIKES + 1):
            try:
                if sharing:
                    return self._counted(body, epochs, await self._together(settings, body), None)
                async with self._judging.seated(self._known, settings, body.geometry, body) as runner:
                    found = await runner.judge_far(body, 0, 1, alone=True)
                if self._shares:
                    self._share(settings, found.state)
                    return self._counted(body, epochs, found, None)
                return self._counted(body, epochs, found, found.state)
            except KernelRefused as refusal:
                return Judged(body.record.key, failure=f"compile: {refusal}")
            except (Unfit, ValueError) as trouble:
                return Judged(body.record.key, failure=str(trouble))
            except SandboxFailed as failure:
                if sharing:
                    raise _Broken(str(failure)) from None
                if strike == STRIKES:
                    return Judged(body.record.key, failure=str(failure))
        raise AssertionError("unreachable")

    def _fits(self, body: FarBody) -> bool:
        """Whether the frame is like the first one of the sequence (kernels/runs/ordered.py)."""
        index = body.layout if isinstance(body.layout, FrameIndex) else None
        form = (body.geometry.dtype, body.geometry.shape, None if index is None else index.encoding)
        self._form = self._form or form
        return form == self._form

    async def _together(self, settings: int, body: FarBody) -> Found:
        """In the state of the frames before it that are like it."""
        geometry = body.geometry
        key = (settings, geometry.dtype, geometry.shape)
        seat, fresh = self._seats.get(key), False
        if seat is None:
            seat, fresh = await self._judging.take(self._known, settings, geometry, body), True
            self._seats[key] = seat
        try:
            return await seat.runner.judge_far(body, 0, 1, alone=True, fresh=fresh, shared=True)
        except SandboxFailed as failure:
            if failure.kind == "unavailable":
                raise Again(str(failure)) from None
            raise

    def _share(self, settings: int, state: Arrays) -> None:
        kernel = self._known.kernel
        merge_states(kernel, self._shared.setdefault(settings, initial(kernel)), state)

    def _counted(self, body: FarBody, epochs: Sequence[tuple[int, int]], found: Found, state: Arrays | None) -> Judged:
        rows = found.rows
        if rows is not None:
            rows = rows.copy()
            rows[FRAME_COLUMN] = 0
        return judged(
            body.record,
            epochs,
            body,
            verdicts=found.verdicts,
            state=state,
            rows=_table(self._known.kernel, rows),
            rows_left_out=found.dropped_rows,
            feedback_events=found.feedback_events,
            single=True,
        )


def _table(kernel: Kernel, rows: npt.NDArray[np.void] | None) -> npt.NDArray[np.void] | None:
    return np.zeros(0, kernel.rows.dtype) if rows is None and kernel.rows is not None else rows


def judged(
    record: ObjectRecord,
    epochs: Sequence[tuple[int, int]],
    body: FarBody | None = None,
    *,
    error: str = "",
    deferred: bool = False,
    single: bool = False,
    verdicts: npt.NDArray[np.uint8] | None = None,
    state: Arrays | None = None,
    result: dict[str, bytes] | None = None,
    rows: npt.NDArray[np.void] | None = None,
    rows_left_out: int = 0,
    feedback_events: int = 0,
    stopped_at: int | None = None,
    first: int = 0,
) -> Judged:
    """``first``: number of the frame whose verdict comes first."""
    index = None if body is None else body.index
    unreadable = () if verdicts is None else _runs(np.flatnonzero(verdicts == UNREDUCED) + first)
    return Judged(
        key=record.key,
        error=error,
        deferred=deferred,
        single=single or deferred,
        crc64nvme=record.crc64nvme,
        etag=record.etag,
        length=record.length,
        modified_ns=record.modified_ns,
        version_id=record.version_id,
        metadata=record.metadata,
        geometry=None if body is None else body.geometry,
        layout="" if index is None else index.description,
        frames=0 if body is None else body.frames,
        gaps=() if body is None else tuple(body.found.gaps),
        trailing_bytes=0 if body is None else body.found.trailing_bytes,
        epochs=tuple(epochs),
        verdicts=b"" if verdicts is None else verdicts.tobytes(),
        unreadable=unreadable,
        stopped_at=stopped_at,
        rows=None if rows is None else rows.tobytes(),
        rows_left_out=rows_left_out,
        feedback_events=feedback_events,
        state=None if state is None else state_bytes(state),
        result=result,
    )


def _runs(frames: npt.NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """(first, count) of neighbours."""
    if not frames.size:
        return ()
    parts = np.split(frames, np.flatnonzero(np.diff(frames) != 1) + 1)
    return tuple((int(part[0]), len(part)) for part in parts)

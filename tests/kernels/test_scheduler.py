"""The pure core: frames in, steps out, under every order of events hypothesis can think of."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kernels.scheduler import LIVE_BURST, Collect, Reset, Run, Schedule

FRAME_BYTES = 10


@dataclasses.dataclass
class Batch:
    region: int
    offset: int
    first_frame: int
    count: int
    revoked: bool = False
    sent: bool = False
    releases: int = 0

    def dispatched(self) -> bool:
        self.sent = not self.revoked
        return self.sent

    def release(self) -> None:
        self.releases += 1


def schedule(slots: int = 2, frames_max: int = 8, *, ordered: bool = False) -> Schedule:
    return Schedule(slots, batch_bytes_max=1 << 20, batch_frames_max=frames_max, ordered=ordered)


def offer(
    target: Schedule, stream: int, first: int, count: int, *, offset: int | None = None, live: bool = True
) -> Batch:
    batch = Batch(0, first * FRAME_BYTES if offset is None else offset, first, count)
    target.offer(stream, batch, live=live)
    return batch


def runs(target: Schedule, limit: int = 1000) -> list[Run]:
    """Carry out every step; the runs in order."""
    found = []
    for _ in range(limit):
        step = target.next()
        if step is None:
            return found
        if isinstance(step, Run):
            found.append(step)
        target.done()
        target.validate()
    raise AssertionError("the schedule does not come to rest")


def test_a_batch_takes_whatever_lies_ready_back_to_back() -> None:
    target = schedule()
    target.join(1, FRAME_BYTES)
    batches = [offer(target, 1, 0, 3), offer(target, 1, 3, 2), offer(target, 1, 5, 1, offset=4096)]
    assert [(run.first_frame, run.count, run.offset) for run in runs(target)] == [(0, 5, 0), (5, 1, 4096)]
    assert [batch.releases for batch in batches] == [1, 1, 1]


def test_a_long_batch_is_split_and_released_after_its_last_frame() -> None:
    target = schedule(frames_max=4)
    target.join(1, FRAME_BYTES)
    batch = offer(target, 1, 0, 10)
    assert isinstance(target.next(), Reset)
    target.done()
    for expected in ((0, 4), (4, 4), (8, 2)):
        step = target.next()
        assert isinstance(step, Run)
        assert (step.first_frame, step.count) == expected
        assert batch.releases == 0
        target.done()
    assert batch.releases == 1


def test_streams_take_turns() -> None:
    target = schedule(frames_max=1)
    for stream in (1, 2):
        target.join(stream, FRAME_BYTES)
        for first in range(5):
            offer(target, stream, first, 1)
    order = [run.stream for run in runs(target)]
    assert order == [1, 2] * 5


def test_revoked_frames_lag_and_the_rest_goes_on() -> None:
    target = schedule()
    target.join(1, FRAME_BYTES)
    lost, kept = offer(target, 1, 0, 3), offer(target, 1, 3, 2)
    lost.revoked = True
    assert [(run.first_frame, run.count) for run in runs(target)] == [(3, 2)]
    assert target.lagging(1) == 3
    assert target.load(1, 2) == (0, 2)
    assert target.load(1, 2) == (2, 1)
    assert (lost.releases, kept.releases) == (1, 1)


def test_catch_up_waits_for_live_frames_and_is_not_starved() -> None:
    target = schedule(frames_max=1)
    target.join(1, FRAME_BYTES)
    target.join(2, FRAME_BYTES)
    target.lag(1, 0, 2)
    target.load(1, 2)
    offer(target, 1, 0, 2, live=False)
    for first in range(3 * LIVE_BURST):
        offer(target, 2, first, 1)
    order = [run.live for run in runs(target)]
    assert order[:LIVE_BURST] == [True] * LIVE_BURST
    assert order[LIVE_BURST] is False
    assert order.count(False) == 2


def test_more_streams_than_slots_share_them_by_parking() -> None:
    target = schedule(slots=1, frames_max=1)
    for stream in range(3):
        target.join(stream, FRAME_BYTES)
        for first in range(40):
            offer(target, stream, first, 1)
    assert sorted((run.stream, run.first_frame) for run in runs(target)) == [
        (stream, first) for stream in range(3) for first in range(40)
    ]


def test_a_finished_stream_is_collected_while_others_are_busy() -> None:
    target = schedule()
    target.join(1, FRAME_BYTES)
    target.join(2, FRAME_BYTES)
    offer(target, 1, 0, 1)
    target.close(1)
    for first in range(100):
        offer(target, 2, first, 1, offset=first * 4096)
    steps = []
    while not (steps and isinstance(steps[-1], Collect)):
        steps.append(target.next())
        target.done()
    assert steps[-1].stream == 1
    assert len(steps) < 10


def test_a_stream_without_frames_owes_its_initial_state() -> None:
    target = schedule()
    target.join(1, FRAME_BYTES)
    target.close(1)
    first = target.next()
    assert isinstance(first, Reset)
    target.done()
    second = target.next()
    assert second == Collect(1, first.slot, final=True)
    target.done()
    assert target.collected(1)
    assert target.next() is None


def test_the_death_of_the_sandbox_voids_what_sat_in_its_slots() -> None:
    target = schedule(frames_max=2)
    target.join(1, FRAME_BYTES)
    batch = offer(target, 1, 0, 5)
    for _ in range(2):
        target.next()
        target.done()
    assert isinstance(target.next(), Run)
    target.failed()
    target.validate()
    assert target.lagging(1) == 4
    assert batch.releases == 0
    assert [(run.first_frame, run.count) for run in runs(target)] == [(4, 1)]
    assert batch.releases == 1


def test_leaving_while_the_sandbox_reads_releases_afterwards() -> None:
    target = schedule(frames_max=2)
    target.join(1, FRAME_BYTES)
    batch, queued = offer(target, 1, 0, 5), offer(target, 1, 5, 1, offset=4096)
    target.next()
    target.done()
    assert isinstance(target.next(), Run)
    target.leave(1)
    assert (batch.releases, queued.releases) == (0, 1)
    target.done()
    assert (batch.releases, queued.releases) == (1, 1)
    assert target.streams == 0
    target.validate()


@pytest.mark.parametrize("slots", [1, 2])
def test_leaving_returns_the_slot(slots: int) -> None:
    target = schedule(slots=slots)
    for stream in range(5):
        target.join(stream, FRAME_BYTES)
        offer(target, stream, 0, 1)
        runs(target)
        target.leave(stream)
    assert target.streams == 0


def test_nothing_behind_a_stop_is_judged() -> None:
    target = schedule(frames_max=4)
    target.join(1, FRAME_BYTES)
    target.join(2, FRAME_BYTES)
    batches = [offer(target, 1, 0, 6), offer(target, 1, 6, 2), offer(target, 2, 0, 1)]
    target.lag(1, 8, 4)
    assert isinstance(target.next(), Reset)
    target.done()
    assert isinstance(target.next(), Run)
    assert target.stopped(2) == []
    assert [batch.releases for batch in batches] == [1, 1, 0]
    assert target.lagging(1) == 0
    late = offer(target, 1, 12, 3)
    assert late.releases == 1
    target.close(1)
    assert [run.stream for run in runs(target)] == [2]
    assert (target.collected(1), target.banked(1)) == (True, 3)


def test_a_stop_that_comes_late_makes_all_before_it_anew() -> None:
    target = schedule()
    target.join(1, FRAME_BYTES)
    target.lag(1, 0, 5)
    offer(target, 1, 5, 5)
    assert [(run.first_frame, run.count) for run in runs(target)] == [(5, 5)]
    offer(target, 1, *target.load(1, 100), live=False)
    assert isinstance(target.next(), Run)
    assert target.stopped(3) == [(0, 4), (5, 5)]
    target.validate()
    assert target.load(1, 100) == (0, 4)


def test_ordered_frames_wait_for_those_before_them() -> None:
    target = schedule(ordered=True)
    target.join(1, FRAME_BYTES)
    first, lost, after = offer(target, 1, 0, 2), offer(target, 1, 2, 2), offer(target, 1, 4, 2)
    lost.revoked = True
    assert [(run.first_frame, run.count) for run in runs(target)] == [(0, 2)]
    assert [batch.releases for batch in (first, lost, after)] == [1, 1, 1]
    assert offer(target, 1, 6, 2).releases == 1, "it lags, too"
    assert target.load(1, 3) == (2, 3)
    offer(target, 1, 2, 3, live=False)
    offer(target, 1, *target.load(1, 3), live=False)
    assert [(run.first_frame, run.count) for run in runs(target)] == [(2, 6)]


def test_an_ordered_stream_keeps_its_slot_to_the_end() -> None:
    target = schedule(slots=1, ordered=True)
    target.join(1, FRAME_BYTES)
    target.join(2, FRAME_BYTES)
    offer(target, 1, 0, 1)
    assert [run.stream for run in runs(target)] == [1]
    offer(target, 2, 0, 1)
    target.lag(2, 1, 1)
    assert runs(target) == []
    assert target.load(2, 1) is None, "no memory for frames that cannot be judged yet"
    target.close(1)
    assert [run.stream for run in runs(target)] == [2]
    assert target.load(2, 1) == (1, 1)


class Machine(RuleBasedStateMachine):
    """Any order of events; at the end everything is judged exactly once and every batch released exactly once.

    Each stream has a frame that says STOP, which may lie beyond its end."""

    ordered = False

    def __init__(self) -> None:
        super().__init__()
        self.target = schedule(slots=2, frames_max=3, ordered=self.ordered)
        self.stop: dict[int, int] = {}
        self.batches: list[Batch] = []
        self.running: list[tuple[Batch, ...]] = []
        self.next_stream = 0
        self.announced: dict[int, int] = {}
        self.order: dict[int, int] = {}
        self.closed: set[int] = set()
        self.step: object = None

    def _open(self, data: st.DataObject, pool: list[int]) -> int:
        return data.draw(st.sampled_from(sorted(pool)))

    @property
    def receiving(self) -> list[int]:
        return [stream for stream in self.announced if stream not in self.closed]

    @precondition(lambda self: len(self.announced) < 4)
    @rule(stop=st.integers(0, 60))
    def join(self, stop: int) -> None:
        self.target.join(self.next_stream, FRAME_BYTES)
        self.stop[self.next_stream] = stop
        self.announced[self.next_stream] = 0
        self.order[self.next_stream] = -1
        self.next_stream += 1

    @precondition(lambda self: self.receiving)
    @rule(data=st.data(), count=st.integers(1, 7), gap=st.booleans())
    def offer(self, data: st.DataObject, count: int, gap: bool) -> None:
        stream = self._open(data, self.receiving)
        first = self.announced[stream]
        batch = Batch(stream, first * FRAME_BYTES + 4096 * gap, first, count)
        self.target.offer(stream, batch, live=True)
        self.batches.append(batch)
        self.announced[stream] += count

    @precondition(lambda self: self.receiving)
    @rule(data=st.data(), count=st.integers(1, 7))
    def lag(self, data: st.DataObject, count: int) -> None:
        stream = self._open(data, self.receiving)
        self.target.lag(stream, self.announced[stream], count)
        self.announced[stream] += count

    @precondition(lambda self: self.receiving)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        stream = self._open(data, self.receiving)
        self.target.close(stream)
        self.closed.add(stream)

    @precondition(lambda self: self.announced)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        stream = self._open(data, list(self.announced))
        self.target.leave(stream)
        del self.announced[stream]
        self.closed.discard(stream)

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        batch = data.draw(st.sampled_from(self.batches))
        if not batch.sent:
            batch.revoked = True

    @precondition(lambda self: self.announced)
    @rule(data=st.data(), size=st.integers(1, 5), fails=st.booleans())
    def load(self, data: st.DataObject, size: int, fails: bool) -> None:
        stream = self._open(data, list(self.announced))
        head = self.target.load(stream, size)
        if head is None:
            return
        if fails:
            self.target.lag(stream, *head)
            return
        batch = Batch(9, head[0] * FRAME_BYTES, *head)
        self.target.offer(stream, batch, live=False)
        self.batches.append(batch)

    @precondition(lambda self: self.step is None)
    @rule()
    def begin(self) -> None:
        self.step = self.target.next()
        if isinstance(self.step, Run):
            assert 1 <= self.step.count <= 3
            stream, last = self.step.stream, self.step.first_frame + self.step.count - 1
            if self.ordered:
                # Or from the beginning, where the state was lost.
                assert self.step.first_frame in (0, self.order[stream] + 1)
                self.order[stream] = last
            elif self.step.live:
                assert self.step.first_frame > self.order[stream]
                self.order[stream] = last

    @precondition(lambda self: self.step is not None)
    @rule(dies=st.integers(0, 5))
    def end(self, dies: int) -> None:
        if isinstance(self.step, Run):
            assert all(batch.releases == 0 for batch in self.step.finished)
        if dies == 0:
            self.target.failed()
            if self.ordered:
                self.order = dict.fromkeys(self.order, -1)
        else:
            self.done(self.step)
        self.step = None

    def done(self, step: object) -> None:
        stop = self.stop[step.stream] if isinstance(step, Run) else -1
        if isinstance(step, Run) and step.first_frame <= stop < step.first_frame + step.count:
            self.target.stopped(stop)
        else:
            self.target.done()

    @invariant()
    def holds(self) -> None:
        if self.step is None:
            self.target.validate()
        assert all(batch.releases <= 1 for batch in self.batches)
        assert not any(batch.sent and batch.revoked for batch in self.batches)

    def teardown(self) -> None:
        if self.step is not None:
            self.done(self.step)
            self.step = None
        for stream in self.announced:
            self.target.close(stream)
        for _ in range(2000):
            step = self.target.next()
            if step is not None:
                self.done(step)
                continue
            loads = [(stream, head) for stream in self.announced if (head := self.target.load(stream, 5))]
            if not loads:
                break
            for stream, head in loads:
                batch = Batch(9, head[0] * FRAME_BYTES, *head)
                self.batches.append(batch)
                self.target.offer(stream, batch, live=False)
        self.target.validate()
        for stream, count in self.announced.items():
            assert self.target.collected(stream)
            assert self.target.banked(stream) == min(count, self.stop[stream] + 1)
        assert all(batch.releases == 1 for batch in self.batches)


Machine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase


class OrderedMachine(Machine):
    """The same in sequence: no frame is judged before those in front of it."""

    ordered = True


OrderedMachine.TestCase.settings = Machine.TestCase.settings
TestOrderedMachine = OrderedMachine.TestCase

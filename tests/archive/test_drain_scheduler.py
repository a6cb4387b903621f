"""The drain's decisions: events in, instructions out, no clock and no archive."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archive.pace import DrainLimits, RateLimit, retry_after_s
from archive.scheduler import CLAIM_AHEAD, FAILURES_BEFORE_PAUSE, Claim, Scheduler, Start
from ingest.records import ObjectRecord, ObjectState


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    scheduler = Scheduler(DrainLimits(parallel_objects=2, poll_s=0.25, pause_cap_s=8.0))
    yield scheduler
    scheduler.validate()


def started(steps) -> list[bytes]:
    return [step.record.object_id for step in steps if isinstance(step, Start)]


def test_claims_first_and_starts_what_fits_oldest_first(scheduler, version) -> None:
    assert scheduler.step(0.0) == [Claim(2 * CLAIM_AHEAD)]
    assert scheduler.step(0.0) == []
    records = [version(b"%d" % number, 0).record for number in range(3)]
    scheduler.claimed(records, 0.0)
    assert scheduler.step(0.0) == [Start(records[0]), Start(records[1])]
    scheduler.finished(records[1].object_id)
    assert scheduler.step(0.1) == [Start(records[2]), Claim(2 * CLAIM_AHEAD)]


def test_an_empty_queue_is_looked_at_again_after_the_poll_interval(scheduler) -> None:
    scheduler.step(0.0)
    scheduler.claimed([], 10.0)
    assert scheduler.step(10.2) == []
    assert scheduler.wake_at() == 10.25
    assert scheduler.step(10.25) == [Claim(2 * CLAIM_AHEAD)]


def test_a_version_claimed_again_while_it_is_copied_is_not_started_twice(scheduler, version) -> None:
    record = version(b"long", 0).record
    scheduler.step(0.0)
    scheduler.claimed([record], 0.0)
    assert started(scheduler.step(0.0)) == [record.object_id]
    scheduler.claimed([record], 60.0)
    assert started(scheduler.step(61.0)) == []


def test_pauses_double_up_to_the_cap_and_success_ends_them(scheduler, version) -> None:
    now, pauses = 0.0, []
    for _ in range(7):
        record = version(b"x", 0).record
        scheduler.step(now)
        scheduler.claimed([record], now)
        assert started(scheduler.step(now)) == [record.object_id]
        scheduler.failed(record.object_id, now, whole_target=True)
        assert scheduler.step(now) == []
        pauses.append(scheduler.paused_until - now)
        now = scheduler.paused_until
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    records = [version(b"%d" % number, 0).record for number in range(3)]
    scheduler.step(now)
    scheduler.claimed(records, now)
    assert started(scheduler.step(now)) == [records[0].object_id]
    scheduler.finished(records[0].object_id)
    assert started(scheduler.step(now)) == [record.object_id for record in records[1:]]


def test_one_bad_version_does_not_pause_the_others(scheduler, version) -> None:
    for _ in range(3 * FAILURES_BEFORE_PAUSE):
        bad, good = version(b"bad", 0).record, version(b"good", 0).record
        scheduler.step(0.0)
        scheduler.claimed([bad, good], 0.0)
        assert len(started(scheduler.step(0.0))) == 2
        scheduler.failed(bad.object_id, 0.0, whole_target=False)
        scheduler.finished(good.object_id)
    assert scheduler.paused_until == 0.0


def test_many_failures_in_a_row_pause_even_if_each_looks_like_its_own(scheduler, version) -> None:
    for _ in range(FAILURES_BEFORE_PAUSE):
        record = version(b"x", 0).record
        scheduler.step(0.0)
        scheduler.claimed([record], 0.0)
        scheduler.step(0.0)
        scheduler.failed(record.object_id, 0.0, whole_target=False)
    assert scheduler.paused_until == 0.5


def test_a_catalogue_that_does_not_answer_is_asked_again_later(scheduler) -> None:
    scheduler.step(0.0)
    scheduler.claim_failed(5.0)
    assert scheduler.step(5.5) == []
    assert scheduler.step(scheduler.wake_at()) == [Claim(2 * CLAIM_AHEAD)]


@given(st.lists(st.tuples(st.sampled_from(("claimed", "finished", "failed", "target", "wait")), st.integers(0, 7))))
@settings(max_examples=60)
def test_whatever_happens_work_goes_on(events) -> None:
    """No run of events leaves the scheduler without either something running, a claim under way, or a time to wake."""

    def record(number: int) -> ObjectRecord:
        return ObjectRecord(
            "b", b"k", "null", bytes([number]) * 16, number, ObjectState.DRAINING, 0, 0, "", 0, 0, "root"
        )

    limits = DrainLimits(parallel_objects=2)
    scheduler, now, claiming, running = Scheduler(limits), 0.0, False, set()
    for event, number in events:
        for step in scheduler.step(now):
            if isinstance(step, Claim):
                claiming = True
            else:
                assert step.record.object_id not in running
                running.add(step.record.object_id)
        scheduler.validate()
        assert claiming or running or scheduler.wake_at() is not None
        if event == "claimed" and claiming:
            claiming = False
            scheduler.claimed([record(number), record(number + 1)], now)
        elif event in ("finished", "failed", "target") and running:
            object_id = running.pop()
            if event == "finished":
                scheduler.finished(object_id)
            else:
                scheduler.failed(object_id, now, whole_target=event == "target")
        now += number / 4


def test_retries_back_off_to_the_cap_with_jitter() -> None:
    rng = random.Random(7)
    waits = [retry_after_s(attempts, 1.0, 300.0, rng) for attempts in (0, 1, 5, 50, 10_000)]
    for wait_s, full_s in zip(waits, (1.0, 2.0, 32.0, 300.0, 300.0), strict=True):
        assert full_s / 2 <= wait_s <= full_s


def test_the_rate_limit_lets_a_second_through_and_then_the_rate() -> None:
    rate = RateLimit(100.0, 0.0)
    assert rate.take(100, 0.0) == 0.0
    assert rate.take(50, 0.0) == 0.5
    assert rate.take(0, 0.5) == 0.0
    assert rate.take(100, 100.0) == 0.0
    assert rate.take(100, 99.0) == 1.0
    assert RateLimit(None, 0.0).take(1 << 40, 0.0) == 0.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"parallel_objects": 0},
        {"chunk_bytes": 4097},
        {"evict_low": 0.9, "evict_high": 0.8},
        {"retry_first_s": 10.0, "retry_cap_s": 1.0},
        {"rate_bytes_per_s": 0.0},
        {"snapshots_kept": 0},
        {"poll_s": 0.0},
    ],
)
def test_limits_that_contradict_themselves_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="drain limits: "):
        DrainLimits(**wrong)

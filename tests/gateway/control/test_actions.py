"""Named actions, decided: ranges, rates, old news and silence, with a clock of our own."""

from __future__ import annotations

import math

import pytest

from gateway.control.feedback.actions import AGE_MAX_S, Action, BucketActions, Expired, Order
from ingest.action_settings import parse


def action(text: str = "code=1 target=epics:X min=0 max=10 rate=10/s", *, permitted: bool = True) -> Action:
    return Action("scan", parse("shutter", text), permitted=permitted)


def take(
    one: Action, value: float, now_s: float, *, fresh: bool = True, age_s: float = 0.0
) -> tuple[str, float | None]:
    outcome, order = one.take(value, fresh=fresh, born_s=now_s - age_s, now_s=now_s)
    return outcome, order.value if order is not None else None


def test_a_value_goes_to_its_target_as_it_is() -> None:
    one = action()
    outcome, order = one.take(3.5, fresh=True, born_s=99.9, now_s=100.0)
    assert outcome == "taken"
    assert order == Order("scan", "shutter", "epics:X", 3.5, 99.9)


@pytest.mark.parametrize("value", [-0.001, 10.001, math.nan, math.inf, -math.inf])
def test_a_value_out_of_range_is_refused_and_counted_never_clamped(value: float) -> None:
    one = action()
    assert take(one, value, 1.0) == ("range", None)
    assert one.counts["range"] == 1
    assert take(one, 10.0, 1.0) == ("taken", 10.0), "a refused value uses up no rate"


def test_old_news_moves_nothing() -> None:
    one = action()
    assert take(one, 1.0, 10.0, fresh=False) == ("late", None)
    assert take(one, 1.0, 10.0, age_s=AGE_MAX_S + 0.01) == ("late", None)
    assert take(one, 1.0, 10.0, age_s=AGE_MAX_S - 0.01) == ("taken", 1.0)
    assert one.counts["late"] == 2


def test_a_target_the_operator_does_not_allow_gets_nothing() -> None:
    one = action("code=1 target=epics:X min=0 max=10 deadman=1s safe=0", permitted=False)
    assert take(one, 1.0, 1.0) == ("target", None)
    one.arm(True, 1.0)
    assert one.due_s() == math.inf, "nor its safe value"


def test_of_values_that_come_too_fast_the_newest_follows() -> None:
    one = action()
    assert take(one, 1.0, 0.0) == ("taken", 1.0)
    assert [take(one, value, 0.01 * value)[0] for value in (2.0, 3.0, 4.0)] == ["deferred"] * 3
    assert one.due_s() == pytest.approx(0.1)
    assert one.due(0.09) is None
    order = one.due(0.1)
    assert isinstance(order, Order)
    assert order.value == 4.0
    assert one.counts["rate"] == 2
    assert one.due_s() == math.inf
    assert take(one, 5.0, 0.15) == ("deferred", None), "the one that followed counts for the rate, too"


def test_a_value_that_grew_old_while_it_waited_is_not_written() -> None:
    one = action("code=1 target=epics:X min=0 max=10 rate=0.1/s")
    take(one, 1.0, 0.0)
    assert take(one, 2.0, 5.0) == ("deferred", None)
    assert one.due(10.0) is None
    assert (one.counts["rate"], one.due_s()) == (1, math.inf)


DEADMAN = "code=1 target=epics:X min=0 max=10 rate=1/s deadman=2s safe=0"


def test_silence_while_a_stream_runs_orders_the_safe_value_once() -> None:
    one = action(DEADMAN)
    assert one.due_s() == math.inf, "no stream, no silence"
    one.arm(True, 10.0)
    assert one.due_s() == 12.0
    assert take(one, 5.0, 11.0) == ("taken", 5.0)
    assert one.due_s() == 13.0
    found = one.due(13.0)
    assert found == Expired(Order("scan", "shutter", "epics:X", 0.0, 13.0, safe=True))
    assert (one.due(14.0), one.due_s(), one.counts["expired"]) == (None, math.inf, 1)
    assert take(one, 5.0, 20.0) == ("taken", 5.0), "the kernel is back"
    assert one.due_s() == 22.0


def test_a_kernel_that_never_says_a_word_expires_too() -> None:
    one = action(DEADMAN)
    one.arm(True, 0.0)
    assert isinstance(one.due(2.0), Expired)
    one.arm(True, 3.0)
    assert one.due_s() == math.inf, "another stream beside it does not arm it again"
    one.arm(False, 4.0)
    one.arm(True, 5.0)
    assert one.due_s() == 7.0, "a new one does"


def test_the_end_of_the_stream_ends_the_watch() -> None:
    one = action(DEADMAN)
    one.arm(True, 0.0)
    one.arm(False, 1.9)
    assert one.due(5.0) is None


def test_values_out_of_range_are_not_a_sign_of_life() -> None:
    one = action(DEADMAN)
    one.arm(True, 0.0)
    take(one, 99.0, 1.9)
    take(one, 5.0, 1.95, fresh=False)
    assert isinstance(one.due(2.0), Expired)


def test_the_safe_value_overtakes_the_rate_and_what_waits_for_it() -> None:
    one = action("code=1 target=epics:X min=0 max=10 rate=0.4/s deadman=1s safe=0")
    one.arm(True, 0.0)
    take(one, 1.0, 0.0)
    assert take(one, 2.0, 0.5) == ("deferred", None)
    found = one.due(1.5)
    assert isinstance(found, Expired)
    assert found.order is not None
    assert found.order.value == 0.0
    assert one.due(9.0) is None, "what waited is not written after it"
    assert one.counts["rate"] == 1


def test_without_a_target_an_action_is_a_name() -> None:
    one = action("code=1 deadman=1s")
    assert take(one, 1e9, 0.0) == ("taken", None)
    assert one.counts["sent"] == 1
    one.arm(True, 1.0)
    assert one.due(2.0) == Expired(None)


def test_codes_and_kernels_choose_and_changed_settings_begin_anew() -> None:
    settings = [parse("a", "code=1"), parse("b", "code=1 kernel=hits"), parse("c", "code=2")]
    bucket = BucketActions("scan", settings, permitted=lambda _: True)
    assert [one.settings.name for one in bucket.of("hits", 1)] == ["a", "b"]
    assert [one.settings.name for one in bucket.of("rings", 1)] == ["a"]
    assert bucket.of("hits", 3) == []
    for one in bucket.actions.values():
        take(one, 1.0, 0.0)
    changed = BucketActions("scan", [settings[0], parse("c", "code=2 max=5")], permitted=lambda _: True)
    changed.keep(bucket)
    assert {name: one.counts["sent"] for name, one in changed.actions.items()} == {"a": 1, "c": 0}


def test_arming_follows_the_kernels_that_run() -> None:
    bucket = BucketActions(
        "scan", [parse("a", "code=1 deadman=1s"), parse("b", "code=1 kernel=hits deadman=1s")], permitted=lambda _: True
    )
    bucket.arm(lambda _: ["rings"], 0.0)
    assert [one.armed for one in bucket.actions.values()] == [True, False]
    bucket.arm(lambda _: [], 0.5)
    assert bucket.due_s() == math.inf

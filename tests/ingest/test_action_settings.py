"""Named actions in a bucket's tags: what they may say, and how a wrong one is answered."""

from __future__ import annotations

import math

import pytest

from ingest import bucket_settings
from ingest.action_settings import ACTIONS_MAX, allowed, parse
from ingest.bucket_settings import BadSetting

SHUTTER = "code=1 target=epics:BL1:SHUTTER min=0 max=1 rate=10/s deadman=2s safe=0"


def test_an_action_says_everything_in_one_line() -> None:
    (action,) = bucket_settings.parse({"hiss.action.shutter": SHUTTER, "hiss.etag": "md5"}).actions
    assert (action.name, action.code, action.kernel, action.target) == ("shutter", 1, "", "epics:BL1:SHUTTER")
    assert (action.low, action.high, action.rate_per_s, action.deadman_s, action.safe) == (0, 1, 10, 2, 0)
    assert action.text() == SHUTTER
    assert parse("shutter", action.text()) == action


def test_what_is_left_out_has_a_default() -> None:
    action = parse("dipped", "code=-7 kernel=saxs-1")
    assert (action.code, action.kernel, action.target, action.low, action.high) == (
        -7,
        "saxs-1",
        "",
        -math.inf,
        math.inf,
    )
    assert (action.rate_per_s, action.deadman_s, action.safe) == (10.0, None, None)
    assert parse("dipped", action.text()) == action
    assert parse("a", "code=1 deadman=500ms").deadman_s == 0.5


def test_the_range_takes_numbers_only() -> None:
    action = parse("a", "code=1 target=epics:X min=-1.5 max=2e3")
    assert all(map(action.contains, (-1.5, 0.0, 2000.0)))
    assert not any(map(action.contains, (-1.6, 2000.1, math.nan, math.inf, -math.inf)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "code is missing"),
        ("code=x", "not a whole number"),
        ("code=99999999999", "not a whole number"),
        ("code=1 code=2", "code is given twice"),
        ("code=1 pv=BL1:X", "'pv=BL1:X' is none of code, kernel, target"),
        ("code=1 go", "'go' is none of"),
        ("code=1 kernel=a/b", "not the name of a kernel"),
        ("code=1 target=BL1:X min=0 max=1", "is not epics:PV or tango:DEVICE/ATTRIBUTE"),
        ("code=1 target=http://x min=0 max=1", "is not epics:PV"),
        ("code=1 target=tango:a/b/c min=0 max=1", "is not tango:DOMAIN/FAMILY/MEMBER/ATTRIBUTE"),
        ("code=1 target=epics:X", "needs min and max"),
        ("code=1 target=epics:X min=0", "needs min and max"),
        ("code=1 min=2 max=1", "min must not be above max"),
        ("code=1 min=nan", "is not a number"),
        ("code=1 min=inf", "is not a number"),
        ("code=1 min=1_0", "is not a number"),
        ("code=1 max=1e999", "is not a number"),
        ("code=1 rate=10", "is not a rate like 10/s"),
        ("code=1 rate=0/s", "is not a rate"),
        ("code=1 rate=2000/s", "at most 1000/s"),
        ("code=1 deadman=2", "is not a time like 2s"),
        ("code=1 deadman=1ms", "from 200ms to 3600s"),
        ("code=1 target=epics:X min=0 max=1 safe=0", "safe needs a deadman time"),
        ("code=1 target=epics:X min=0 max=1 deadman=1s safe=2", "safe must lie within min and max"),
        ("code=1 deadman=1s safe=2", "safe needs a target"),
    ],
)
def test_a_wrong_action_is_refused_with_its_reason_and_the_form(text: str, message: str) -> None:
    with pytest.raises(BadSetting) as caught:
        bucket_settings.parse({"hiss.action.shutter": text})
    assert str(caught.value).startswith(f"hiss.action.shutter = {text!r}: ")
    assert message in str(caught.value)
    assert "the form is code=NUMBER [kernel=NAME] [target=" in str(caught.value)


@pytest.mark.parametrize("name", ["", "Shutter", "1st", "a_b", "a.b", "x" * 33])
def test_a_wrong_name_is_refused(name: str) -> None:
    with pytest.raises(BadSetting, match="an action's name is"):
        bucket_settings.parse({f"hiss.action.{name}": SHUTTER})


def test_there_is_a_most_of_actions() -> None:
    tags = {f"hiss.action.a{number}": "code=1" for number in range(ACTIONS_MAX)}
    assert len(bucket_settings.parse(tags).actions) == ACTIONS_MAX
    with pytest.raises(BadSetting, match="at most 32"):
        bucket_settings.parse({**tags, "hiss.action.more": "code=1"})


def test_an_edit_keeps_actions_and_default_removes_one() -> None:
    tags = {"hiss.action.shutter": SHUTTER, "hiss.action.other": "code=2"}
    assert bucket_settings.edited(tags, {"owner": "p11"}) == {**tags, "owner": "p11"}
    assert bucket_settings.edited(tags, {"hiss.action.other": "default"}) == {"hiss.action.shutter": SHUTTER}


def test_the_operator_s_globs_decide() -> None:
    globs = ("epics:BL1:SHUTTER*", "tango:p11/shutter/*")
    assert allowed("epics:BL1:SHUTTER:CMD", globs)
    assert allowed("tango:p11/shutter/1/position", globs)
    assert not allowed("epics:BL2:SHUTTER", globs)
    assert not allowed("tango:p11/shutter/1/position", ("epics:*",))
    assert not allowed("epics:BL1:SHUTTER", ())

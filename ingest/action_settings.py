"""Named actions: what a feedback code of a bucket means, as a ``hiss.action.NAME`` tag says it in one line.

In: the tag's value, e.g. ``code=1 target=epics:BL1:SHUTTER min=0 max=1 rate=10/s deadman=2s safe=0``. Out: ``ActionSettings``,
or ValueError that says what is wrong. What always holds: an action that writes somewhere has a range, and its safe
value lies within it; the kernel only ever says a code and a value, never where it goes.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable, Iterator, Sequence

ACTIONS_MAX = 32
"""Actions of one bucket."""
TARGET_SCHEMES = ("epics", "tango")
FORM = (
    "code=NUMBER [kernel=NAME] [target=epics:PV or target=tango:DEVICE/ATTRIBUTE] [min=X] [max=X] [rate=N/s] "
    "[deadman=2s] [safe=X]"
)
_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
_KERNEL = re.compile(r"[A-Za-z0-9._-]{1,128}")
_NUMBER = re.compile(r"[+-]?(\d{1,20}(\.\d{0,20})?|\.\d{1,20})([eE][+-]?\d{1,3})?", re.ASCII)
_CODE = re.compile(r"-?\d{1,10}", re.ASCII)
_RATE = re.compile(r"(\d{1,6}(\.\d{1,6})?)/s", re.ASCII)
_TIME = re.compile(r"(\d{1,6}(\.\d{1,6})?)(ms|s)", re.ASCII)
_TARGET = re.compile(r"(epics|tango):[!-~]{1,200}", re.ASCII)
_TANGO = re.compile(r"(//[^/]+/)?[^/]+/[^/]+/[^/]+/[^/#]+(#dbase=(yes|no))?")

RATE_MAX_PER_S = 1000.0
DEADMAN_MIN_S, DEADMAN_MAX_S = 0.2, 3600.0


@dataclasses.dataclass(frozen=True, slots=True)
class ActionSettings:
    name: str
    code: int
    kernel: str = ""
    """Only codes that this kernel emits; empty: any kernel of the bucket."""
    target: str = ""
    """``epics:PV`` or ``tango:DEVICE/ATTRIBUTE``; empty: the event is named and published, nothing is written."""
    low: float = -math.inf
    high: float = math.inf
    rate_per_s: float = 10.0
    """Values come at least 1/``rate_per_s`` apart; of those in between the newest follows."""
    deadman_s: float | None = None
    """Silence of this long while a stream runs makes the action expire."""
    safe: float | None = None
    """What is written then."""

    def contains(self, value: float) -> bool:
        """Whether the value is within the range; NaN never is."""
        return self.low <= value <= self.high

    def text(self) -> str:
        """The tag's value that parses to this."""
        words = [f"code={self.code}"]
        for word, value, absent in (
            ("kernel", self.kernel, ""), ("target", self.target, ""), ("min", self.low, -math.inf),
            ("max", self.high, math.inf), ("rate", self.rate_per_s, None), ("deadman", self.deadman_s, None),
            ("safe", self.safe, None),
        ):  # fmt: skip
            if value != absent:
                unit = {"rate": "/s", "deadman": "s"}.get(word, "")
                words.append(f"{word}={value:.15g}{unit}" if isinstance(value, float) else f"{word}={value}")
        return " ".join(words)


def parse(name: str, text: str) -> ActionSettings:
    """ValueError says what is wrong with the name or the text."""
    if not _NAME.fullmatch(name):
        raise ValueError("an action's name is 1 to 32 small letters, digits and '-', and begins with a letter")
    values: dict[str, object] = {}
    for word in text.split():
        key, equals, value = word.partition("=")
        if not equals or key not in _WORDS:
            raise ValueError(f"{word!r} is none of {', '.join(_WORDS)}")
        field, parser = _WORDS[key]
        if field in values:
            raise ValueError(f"{key} is given twice")
        values[field] = parser(value)
    if "code" not in values:
        raise ValueError("code is missing")
    action = ActionSettings(name, **values)  # type: ignore[arg-type]
    if wrong := next(_contradictions(action), None):
        raise ValueError(wrong)
    return action


def allowed(target: str, globs: Sequence[str]) -> bool:
    """Whether the node's operator lets actions write there (setting ``feedback_targets``)."""
    return any(fnmatch.fnmatchcase(target, glob) for glob in globs)


def _contradictions(action: ActionSettings) -> Iterator[str]:
    if not action.low <= action.high:
        yield "min must not be above max"
    if action.target and not (math.isfinite(action.low) and math.isfinite(action.high)):
        yield "an action with a target needs min and max"
    if action.safe is not None and not action.target:
        yield "safe needs a target to be written to"
    if action.safe is not None and action.deadman_s is None:
        yield "safe needs a deadman time after which it is written"
    if action.safe is not None and not action.contains(action.safe):
        yield "safe must lie within min and max"


def _number(value: str) -> float:
    if not _NUMBER.fullmatch(value) or not math.isfinite(float(value)):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def _code(value: str) -> int:
    if not _CODE.fullmatch(value) or not -(2**31) <= int(value) < 2**31:
        raise ValueError(f"code={value!r} is not a whole number of 32 bits")
    return int(value)


def _kernel(value: str) -> str:
    if not _KERNEL.fullmatch(value):
        raise ValueError(f"{value!r} is not the name of a kernel")
    return value


def _target(value: str) -> str:
    if not _TARGET.fullmatch(value):
        raise ValueError(f"target={value!r} is not epics:PV or tango:DEVICE/ATTRIBUTE")
    if value.startswith("tango:") and not _TANGO.fullmatch(value.removeprefix("tango:")):
        raise ValueError(f"target={value!r} is not tango:DOMAIN/FAMILY/MEMBER/ATTRIBUTE")
    return value


def _rate(value: str) -> float:
    found = _RATE.fullmatch(value)
    if found is None or not 0 < float(found[1]) <= RATE_MAX_PER_S:
        raise ValueError(f"rate={value!r} is not a rate like 10/s, at most {RATE_MAX_PER_S:.0f}/s")
    return float(found[1])


def _seconds(value: str) -> float:
    found = _TIME.fullmatch(value)
    seconds = float(found[1]) * (0.001 if found[3] == "ms" else 1.0) if found else 0.0
    if not DEADMAN_MIN_S <= seconds <= DEADMAN_MAX_S:
        raise ValueError(f"deadman={value!r} is not a time like 2s or 500ms, from 200ms to 3600s")
    return seconds


_WORDS: dict[str, tuple[str, Callable[[str], object]]] = {
    "code": ("code", _code),
    "kernel": ("kernel", _kernel),
    "target": ("target", _target),
    "min": ("low", _number),
    "max": ("high", _number),
    "rate": ("rate_per_s", _rate),
    "deadman": ("deadman_s", _seconds),
    "safe": ("safe", _number),
}

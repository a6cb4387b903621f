"""Named actions decided: which values go to a target, which are refused, and when silence makes an action expire.

In: an action's settings, values with their age, whether its streams run, the time. Out: an outcome for each value, and
``Order``s to write. Pure: no clock, no socket. What always holds:

- a value outside the range, not a number, read back from disk or older than AGE_MAX_S is refused, never adjusted;
- orders of one action are at least 1/rate apart; of the values in between the newest follows (the last word of a kernel is not
  lost), the others are counted;
- while a stream of the action's kernel runs and no value in range was heard for the dead-man time, the action expires once: its
  safe value is ordered, whatever the rate. It is armed again by the next value in range.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

from ingest.action_settings import ActionSettings
from ingest.counters import ACTION_OUTCOMES

AGE_MAX_S = 2.0
"""A value this old no longer says what the instrument should do now."""

TAKEN = "taken"
DEFERRED = "deferred"
"""Follows when the rate allows it, unless a newer one comes."""
FORWARDED = "forwarded"
"""Another node decides: the one that writes to the target."""


@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    """To write ``value``. ``born_s``: when the event was read, on the deciding clock."""

    bucket: str
    action: str
    target: str
    value: float
    born_s: float
    safe: bool = False

    def is_late(self, now_s: float) -> bool:
        """Safe values never are."""
        return not self.safe and now_s - self.born_s > AGE_MAX_S


@dataclasses.dataclass(frozen=True, slots=True)
class Expired:
    """Silence: ``order`` is what to write, if there is a safe value."""

    order: Order | None


class Action:
    """One action of one bucket. ``permitted``: the node's operator allows its target."""

    def __init__(
        self, bucket: str, settings: ActionSettings, *, permitted: bool, counted: Callable[[str], None] = lambda _: None
    ) -> None:
        self.settings = settings
        self.permitted = permitted
        self.counts = dict.fromkeys(ACTION_OUTCOMES, 0)
        self.last: Order | None = None
        self.last_outcome = ""
        self.last_error = ""
        self.expired = False
        self.armed = False
        self._bucket = bucket
        self._counted = counted
        self._heard_s = 0.0
        self._free_s = -math.inf
        self._deferred: Order | None = None

    def concerns(self, kernel: str, code: int) -> bool:
        return code == self.settings.code and self.of(kernel)

    def of(self, kernel: str) -> bool:
        return self.settings.kernel in ("", kernel)

    def take(self, value: float, *, fresh: bool, born_s: float, now_s: float) -> tuple[str, Order | None]:
        """A kernel emitted the code: (outcome, what to write now)."""
        refusal = self._refusal(value, fresh=fresh, born_s=born_s, now_s=now_s)
        if refusal:
            self.count(refusal)
            return refusal, None
        self._heard_s, self.expired = now_s, False
        order = Order(self._bucket, self.settings.name, self.settings.target, value, born_s)
        if now_s < self._free_s:
            if self._deferred is not None:
                self.count("rate")
            self._deferred = order
            return DEFERRED, None
        return TAKEN, self._release(order, now_s)

    def _refusal(self, value: float, *, fresh: bool, born_s: float, now_s: float) -> str:
        if not self.permitted:
            return "target"
        if not self.settings.contains(value):
            return "range"
        return "" if fresh and now_s - born_s <= AGE_MAX_S else "late"

    def _release(self, order: Order, now_s: float) -> Order | None:
        self._free_s = now_s + 1.0 / self.settings.rate_per_s
        self._deferred = None
        self.last = order
        if order.target:
            return order
        self.count("sent")  # published by its name, which is all there is to do
        return None

    def arm(self, running: bool, now_s: float) -> None:
        """Whether a stream of the action's kernel arrives now."""
        if running and not self.armed:
            self._heard_s, self.expired = now_s, False
        self.armed = running

    def leave(self) -> None:
        """Another node decides from now on."""
        self.armed = False
        self._deferred = None

    def due_s(self) -> float:
        """When ``due`` has something to say; infinity for never."""
        times = [math.inf]
        if self._deferred is not None:
            times.append(self._free_s)
        if self._listening:
            assert self.settings.deadman_s is not None
            times.append(self._heard_s + self.settings.deadman_s)
        return min(times)

    @property
    def _listening(self) -> bool:
        return self.armed and not self.expired and self.permitted and self.settings.deadman_s is not None

    def due(self, now_s: float) -> Order | Expired | None:
        """What time alone brings about."""
        deadman_s = self.settings.deadman_s
        if self._listening and deadman_s is not None and now_s >= self._heard_s + deadman_s:
            return self._expire(now_s)
        if self._deferred is not None and now_s >= self._free_s:
            order, self._deferred = self._deferred, None
            if order.is_late(now_s):
                self.count("rate")
                return None
            return self._release(order, now_s)
        return None

    def _expire(self, now_s: float) -> Expired:
        self.expired = True
        self.count("expired")
        if self._deferred is not None:
            self.count("rate")
            self._deferred = None
        safe = self.settings.safe
        if safe is None:
            return Expired(None)
        self.last = Order(self._bucket, self.settings.name, self.settings.target, safe, now_s, safe=True)
        self._free_s = now_s
        return Expired(self.last)

    def count(self, outcome: str, error: str = "") -> None:
        self.counts[outcome] += 1
        self._counted(outcome)
        self.last_outcome = outcome
        if error:
            self.last_error = error


class BucketActions:
    """The actions of one bucket, by name."""

    def __init__(
        self,
        bucket: str,
        settings: Iterable[ActionSettings],
        *,
        permitted: Callable[[str], bool],
        counted: Callable[[str], None] = lambda _: None,
    ) -> None:
        """``permitted``: whether the operator allows a target. ``counted``: told of every outcome."""
        self.bucket = bucket
        self.actions = {
            one.name: Action(bucket, one, permitted=not one.target or permitted(one.target), counted=counted)
            for one in settings
        }

    def keep(self, old: BucketActions) -> None:
        """Settings were read anew: what did not change keeps its state."""
        for name, action in self.actions.items():
            known = old.actions.get(name)
            if known is not None and (known.settings, known.permitted) == (action.settings, action.permitted):
                self.actions[name] = known

    def of(self, kernel: str, code: int) -> list[Action]:
        return [action for action in self.actions.values() if action.concerns(kernel, code)]

    def arm(self, running: Callable[[Action], Iterable[str]], now_s: float) -> None:
        """``running``: the kernels of streams whose silence counts for an action."""
        for action in self.actions.values():
            action.arm(any(action.of(kernel) for kernel in running(action)), now_s)

    def due_s(self) -> float:
        return min((action.due_s() for action in self.actions.values()), default=math.inf)

"""What holds at the head of a loop whose number of turns is bounded: types as numba joins them, bounds of what is counted.

A variable that every turn changes by a bounded amount (``n += pixel >= low``) is bounded by the number of turns; any other
grows until it settles, or has the bounds of its type. In: a function that carries out one turn on an ``Env``. Out: an
``Env`` that holds before every turn, and after the last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

from kernels.offload import types
from kernels.offload.domain import Broken, Env, Known, Origin

_SAFE = 1 << 62
"""A sum bounded by this cannot have wrapped on the way, in int64 nor uint64."""
_ROUNDS_MAX = 24
_PATIENCE = 3
"""Turns after which a variable that still grows gets the bounds of its type."""

Turn = Callable[[Env], Env]


def settled(entry: Env, changed: Collection[str], loop: int, turns_max: int, turn: Turn) -> Env:
    """``changed``: slots that a turn may assign. ``turn`` may be called any number of times."""
    header = _typed(entry, changed, loop, turn)
    counted = _counted(entry, header, turn(header), changed, loop, turns_max)
    header = _grown(entry, header, changed, counted, turn)
    # Once more under the tighter bounds: what is counted may depend on what is bounded by now.
    better = _counted(entry, header, turn(header), changed, loop, turns_max)
    return Env(
        {name: better.get(name, known) if name in counted else known for name, known in header.slots.items()},
        header.facts,
    )


def after(entry: Env, header: Env, end: Env, changed: Collection[str], loop: int, turns_max: int) -> Env:
    """What holds after the loop; how a variable follows from an outer loop's is carried on where it was counted here."""
    slots = dict(header.slots)
    for name in changed:
        before, now, last = entry.slots.get(name), header.slots.get(name), end.slots.get(name)
        if not isinstance(before, Known) or not isinstance(now, Known):
            slots[name] = (
                now
                if isinstance(now, Broken)
                else Broken(f"{name.split('.')[0]!r} has no value here if the loop had no turn: set it before the loop")
            )
            continue
        change = _change(name, last, loop)
        origin = None
        if before.origin is not None and change is not None:
            origin = dataclasses.replace(
                before.origin,
                lo=before.origin.lo + turns_max * min(0, change[0]),
                hi=before.origin.hi + turns_max * max(0, change[1]),
            )
        slots[name] = dataclasses.replace(now, origin=origin)
    return Env(slots, entry.facts)


def _typed(entry: Env, changed: Collection[str], loop: int, turn: Turn) -> Env:
    """Types at the head, as numba joins what comes in with what comes round; bounds are those of the types."""
    slots: dict[str, Known | Broken] = dict(entry.slots)
    for name in changed:
        known = slots.get(name)
        if isinstance(known, Known):
            slots[name] = Known(known.type, *types.bounds(known.type), Origin(loop, name, 0, 0))
    while True:
        header = Env(slots, entry.facts)
        end = turn(header)
        grown = dict(slots)
        for name in changed:
            before, last = slots.get(name), end.slots.get(name)
            if not isinstance(before, Known) or last is None:
                continue
            unified = types.unified(before.type, last.type) if isinstance(last, Known) else None
            if unified is None:
                reason = (
                    last.reason
                    if isinstance(last, Broken)
                    else f"{name.split('.')[0]!r} starts as {before.type} and becomes {last.type} in the loop, which numba "
                    f"makes float64: start it as np.{last.type}(…), or convert what is assigned"
                )
                grown[name] = Broken(reason)
            elif unified != before.type:
                grown[name] = Known(unified, *types.bounds(unified), Origin(loop, name, 0, 0))
        if grown == slots:
            return header
        slots = grown


def _change(name: str, last: Known | Broken | None, loop: int) -> tuple[int, int] | None:
    """By how much a turn changes the variable, if that is bounded."""
    if isinstance(last, Known) and last.origin is not None and (last.origin.loop, last.origin.slot) == (loop, name):
        return last.origin.lo, last.origin.hi
    return None


def _counted(
    entry: Env, header: Env, end: Env, changed: Collection[str], loop: int, turns_max: int
) -> dict[str, Known]:
    found = {}
    for name in changed:
        before, now = entry.slots.get(name), header.slots.get(name)
        change = _change(name, end.slots.get(name), loop)
        if change is None or not isinstance(before, Known) or not isinstance(now, Known):
            continue
        lo = before.lo + turns_max * min(0, change[0])
        hi = before.hi + turns_max * max(0, change[1])
        smallest, largest = types.bounds(now.type)
        if max(smallest, -_SAFE) <= lo and hi <= min(largest, _SAFE):
            found[name] = Known(now.type, lo, hi, Origin(loop, name, 0, 0))
    return found


def _grown(entry: Env, header: Env, changed: Collection[str], counted: dict[str, Known], turn: Turn) -> Env:
    """The others start from what comes in and grow until a turn adds nothing."""
    slots = dict(header.slots)
    for name in changed:
        before, now = entry.slots.get(name), slots.get(name)
        if name in counted:
            slots[name] = counted[name]
        elif isinstance(before, Known) and isinstance(now, Known):
            slots[name] = dataclasses.replace(now, lo=before.lo, hi=before.hi)
    for round_number in range(_ROUNDS_MAX):
        end = turn(Env(slots, entry.facts))
        grown = dict(slots)
        for name in changed:
            now, last = slots.get(name), end.slots.get(name)
            if name in counted or not isinstance(now, Known) or not isinstance(last, Known):
                continue
            lo, hi = min(now.lo, last.lo), max(now.hi, last.hi)
            if (lo, hi) != (now.lo, now.hi):
                if round_number >= _PATIENCE:
                    lo, hi = types.bounds(now.type)
                grown[name] = dataclasses.replace(now, lo=lo, hi=hi)
        if grown == slots:
            return Env(slots, entry.facts)
        slots = grown
    raise AssertionError("bounds of a loop do not settle")

"""What is known of the local variables at one point of a kernel: numba's type, bounds, and how they follow from others.

Pure values: ``Env`` is replaced, never changed, so that a branch keeps its own. ``joined`` is what holds after either of two
ways, as numba unifies the versions of a variable there; ``assume`` narrows bounds by a condition that holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from kernels.offload import types
from kernels.offload.arithmetic import MIRRORED, OPPOSITE
from kernels.offload.ir import Compare, Const, Expr, Local, Logic, Not, Param, Pixel, Position


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """The value is what ``slot`` held when the loop numbered ``loop`` began its present turn, plus ``lo`` to ``hi``."""

    loop: int
    slot: str
    lo: int
    hi: int


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """The value is a position of the pixel loops plus a constant."""

    axis: int
    offset: int


@dataclasses.dataclass(frozen=True, slots=True)
class Known:
    type: str
    lo: int
    hi: int
    origin: Origin | None = None
    place: Place | None = None
    fixed: bool = False
    """The variable of an unrolled loop: lo == hi, a constant in this turn."""


@dataclasses.dataclass(frozen=True, slots=True)
class Broken:
    """Has no integer value here; using it is refused for ``reason``."""

    reason: str


Key = tuple[str, object]
"""Names a value that cannot change while a fact about it is in force; see ``key_of``."""


@dataclasses.dataclass(frozen=True, slots=True)
class Env:
    slots: Mapping[str, Known | Broken]
    facts: Mapping[Key, tuple[int, int]] = dataclasses.field(default_factory=dict)
    """Bounds of pixels, positions and parameters."""

    def bind(self, slot: str, value: Known | Broken) -> Env:
        return Env({**self.slots, slot: value}, self.facts)


def joined(left: Env | None, right: Env | None) -> Env | None:
    """None stands for a way that ends before: the other holds."""
    if left is None or right is None:
        return left if right is None else right
    slots = {name: _join(name, left.slots.get(name), right.slots.get(name)) for name in {**left.slots, **right.slots}}
    facts = {
        key: (min(lo, right.facts[key][0]), max(hi, right.facts[key][1]))
        for key, (lo, hi) in left.facts.items()
        if key in right.facts
    }
    return Env(slots, facts)


def _join(name: str, left: Known | Broken | None, right: Known | Broken | None) -> Known | Broken:
    shown = name.split(".")[0]
    if left is None or right is None:
        return Broken(f"{shown!r} may have no value here: give it one on every path")
    if left == right:
        return left
    if isinstance(left, Broken) or isinstance(right, Broken):
        return left if isinstance(left, Broken) else right
    unified = types.unified(left.type, right.type)
    if unified is None:
        return Broken(
            f"{shown!r} is {left.type} on one path and {right.type} on another, which numba makes float64: "
            f"convert one of them, e.g. np.int64(…)"
        )
    origin = None
    a, b = left.origin, right.origin
    if a is not None and b is not None and (a.loop, a.slot) == (b.loop, b.slot):
        origin = Origin(a.loop, a.slot, min(a.lo, b.lo), max(a.hi, b.hi))
    return Known(
        unified,
        min(left.lo, right.lo),
        max(left.hi, right.hi),
        origin,
        left.place if left.place == right.place else None,
        left.fixed and right.fixed and left.lo == right.lo,
    )


def as_typed(env: Env, never: Env) -> Env:
    """``env``, with types as if the way to ``never`` could be taken: numba does not know that it cannot."""
    slots = dict(env.slots)
    for name, known in env.slots.items():
        other = never.slots.get(name)
        if isinstance(known, Known) and isinstance(other, Known) and known.type != other.type:
            unified = types.unified(known.type, other.type)
            slots[name] = (
                dataclasses.replace(known, type=unified)
                if unified is not None
                else Broken(
                    f"{name.split('.')[0]!r} is {known.type} here and {other.type} on a path that is never taken"
                )
            )
    return Env(slots, env.facts)


def assume(env: Env, test: Expr, holds: bool) -> Env | None:
    """``env`` where ``test`` is ``holds``; None where it cannot be."""
    match test:
        case Const(lo=value):
            return env if bool(value) == holds else None
        case Not(value=value):
            return assume(env, value, not holds)
        case Logic(op="and" | "or" as op, left=left, right=right):
            if (op == "and") == holds:
                first = assume(env, left, holds)
                return None if first is None else assume(first, right, holds)
            return joined(assume(env, left, holds), assume(env, right, holds))
        case Compare(op=op, left=left, right=right):
            op = op if holds else OPPOSITE[op]
            narrowed = _narrow(env, left, op, bounds_now(env, right))
            return None if narrowed is None else _narrow(narrowed, right, MIRRORED[op], bounds_now(env, left))
        case _:
            return env


def key_of(node: Expr) -> Key | None:
    match node:
        case Pixel(dy=dy, dx=dx):
            return "pixel", (dy, dx)
        case Param(name=name):
            return "param", name
        case Position(axis=axis):
            return "position", axis
        case _:
            return None


def known_now(env: Env, node: Expr) -> Expr:
    """The node with the bounds that are known here."""
    lo, hi = bounds_now(env, node)
    return node if (lo, hi) == (node.lo, node.hi) else dataclasses.replace(node, lo=lo, hi=hi)


def bounds_now(env: Env, node: Expr) -> tuple[int, int]:
    """Bounds of a value under everything that is assumed."""
    if isinstance(node, Local):
        slot = env.slots.get(node.slot)
        known = (slot.lo, slot.hi) if isinstance(slot, Known) else None
    else:
        key = key_of(node)
        known = env.facts.get(key) if key is not None else None
    if known is None:
        return node.lo, node.hi
    return max(node.lo, known[0]), min(node.hi, known[1])


def _narrow(env: Env, node: Expr, op: str, other: tuple[int, int]) -> Env | None:
    """``node op other`` holds."""
    lo, hi = bounds_now(env, node)
    low, high = other
    match op:
        case "<":
            hi = min(hi, high - 1)
        case "<=":
            hi = min(hi, high)
        case ">":
            lo = max(lo, low + 1)
        case ">=":
            lo = max(lo, low)
        case "==":
            lo, hi = max(lo, low), min(hi, high)
        case _ if low == high:
            lo, hi = lo + (lo == low), hi - (hi == low)
    if lo > hi:
        return None
    if isinstance(node, Local):
        known = env.slots.get(node.slot)
        return env.bind(node.slot, dataclasses.replace(known, lo=lo, hi=hi)) if isinstance(known, Known) else env
    key = key_of(node)
    return env if key is None else Env(env.slots, {**env.facts, key: (lo, hi)})

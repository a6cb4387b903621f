"""Makes integer nodes: exact bounds of each operation, a wrap only where they leave the type.

In: nodes whose bounds are proven. Out: a node whose bounds follow from theirs. Constants are folded.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable

from kernels.offload import types
from kernels.offload.ir import AsInteger, Binary, Compare, Const, Expr, Logic, Not, Select, Wrap


def const(value: int, name: str = types.INT64) -> Const:
    return Const(name, value, value)


def truth(value: bool) -> Const:
    return Const(types.BOOL, int(value), int(value))


def number(node: Expr) -> Expr:
    """A bool as the integer it counts for."""
    if node.type != types.BOOL:
        return node
    if isinstance(node, Const):
        return const(node.lo)
    return AsInteger(types.INT64, node.lo, node.hi, node)


def condition(node: Expr) -> Expr:
    """An integer as the bool that ``if`` takes it for."""
    return node if node.type == types.BOOL else compare("!=", node, const(0))


def wrapped(node: Expr, name: str, *, within: str | None = None) -> Expr:
    """``node`` reduced to the range of ``within`` (default ``name``), of type ``name``."""
    node = number(node)
    lo, hi = types.bounds(within or name)
    if lo <= node.lo and node.hi <= hi:
        return dataclasses.replace(node, type=name)
    if isinstance(node, Const):
        size = hi - lo + 1
        value = (node.lo - lo) % size + lo
        return const(value, name)
    return Wrap(name, lo, hi, within or name, node)


def _extremes(function: Callable[[int, int], int], left: Expr, right: Expr) -> tuple[int, int]:
    results = [function(a, b) for a in (left.lo, left.hi) for b in (right.lo, right.hi)]
    return min(results), max(results)


def _bitwise(op: str, left: Expr, right: Expr) -> tuple[int, int]:
    if op == "and" and (left.lo >= 0 or right.lo >= 0):
        # A non-negative side bounds the result.
        return 0, min(side.hi for side in (left, right) if side.lo >= 0)
    width = max(value.bit_length() for value in (left.lo, left.hi, right.lo, right.hi))
    if left.lo >= 0 and right.lo >= 0:
        return 0, (1 << width) - 1
    return -(1 << width), (1 << width) - 1


_MONOTONE: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "shl": operator.lshift,
    "shr": operator.rshift,
    "min": min,
    "max": max,
}
_FOLDED: dict[str, Callable[[int, int], int]] = _MONOTONE | {
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}


def exact(op: str, left: Expr, right: Expr, name: str) -> Expr:
    """The exact result; ``name`` is the type it will have once wrapped."""
    left, right = number(left), number(right)
    if isinstance(left, Const) and isinstance(right, Const):
        return const(_FOLDED[op](left.lo, right.lo), name)
    lo, hi = _extremes(_MONOTONE[op], left, right) if op in _MONOTONE else _bitwise(op, left, right)
    return Binary(name, lo, hi, op, left, right)


_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
OPPOSITE = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
MIRRORED = {"==": "==", "!=": "!=", "<": ">", ">=": "<=", ">": "<", "<=": ">="}


def compare(op: str, left: Expr, right: Expr) -> Expr:
    left, right = number(left), number(right)
    if isinstance(left, Const) and isinstance(right, Const):
        return truth(_COMPARISONS[op](left.lo, right.lo))
    return Compare(types.BOOL, 0, 1, op, left, right)


def logic(op: str, left: Expr, right: Expr) -> Expr:
    if isinstance(left, Const) and isinstance(right, Const):
        return truth(bool(_FOLDED[op](left.lo, right.lo)))
    return Logic(types.BOOL, 0, 1, op, left, right)


def negated(node: Expr) -> Expr:
    if isinstance(node, Const):
        return truth(not node.lo)
    return node.value if isinstance(node, Not) else Not(types.BOOL, 0, 1, node)


def select(test: Expr, then: Expr, other: Expr, name: str) -> Expr:
    if isinstance(test, Const):
        return then if test.lo else other
    return Select(name, min(then.lo, other.lo), max(then.hi, other.hi), test, then, other)

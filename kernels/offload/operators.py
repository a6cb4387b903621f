"""Operators between two values, typed and wrapped as numba does it; refuses what has no integer form, or is not exact.

In: values and the line. Out: a ``Value`` or a node. A sum still follows from what one of its sides follows from.
"""

from __future__ import annotations

import ast
import dataclasses

from kernels.offload import arithmetic, types
from kernels.offload.context import FLOAT, Context, Value
from kernels.offload.domain import Origin, Place
from kernels.offload.ir import Const, Expr, Refusal

_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.BitAnd: "and",
    ast.BitOr: "or",
    ast.BitXor: "xor",
    ast.LShift: "shl",
    ast.RShift: "shr",
}
_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}


def binary(context: Context, op: ast.operator, left: Value, right: Value, line: int) -> Value:
    if isinstance(op, ast.FloorDiv | ast.Mod):
        return Value(_divided(op, left.node, right.node, line))
    if isinstance(op, ast.Div):
        raise Refusal(line, FLOAT.format(what="/ gives a float; // and % by a power of two are shifts and masks"))
    if isinstance(op, ast.Pow):
        raise Refusal(line, "** is not available on an FPGA: multiply, v * v")
    name = _OPERATORS[type(op)]
    a, b = left.node, right.node
    if name in ("and", "or", "xor") and a.type == b.type == types.BOOL:
        return Value(arithmetic.logic(name, a, b))
    if name in ("shl", "shr"):
        return Value(_shifted(context, name, a, b, line))
    result = types.arithmetic(a.type, b.type)
    a, b = arithmetic.wrapped(a, result), arithmetic.wrapped(b, result)
    node = arithmetic.wrapped(arithmetic.exact(name, a, b, result), result)
    return _followed(name, left, right, node)


def _followed(op: str, left: Value, right: Value, node: Expr) -> Value:
    """A sum still follows from what one side follows from."""
    if op == "add" and left.origin is None and left.place is None:
        left, right = right, left
    if op not in ("add", "sub"):
        return Value(node)
    sign = 1 if op == "add" else -1
    change = arithmetic.number(right.node)
    low, high = sorted((sign * change.lo, sign * change.hi))
    origin = left.origin
    if origin is not None:
        origin = Origin(origin.loop, origin.slot, origin.lo + low, origin.hi + high)
    place = Place(left.place.axis, left.place.offset + low) if left.place is not None and low == high else None
    return Value(node, origin, place)


def _shifted(context: Context, op: str, left: Expr, right: Expr, line: int) -> Expr:
    result = types.shifted(left.type)
    left, right = arithmetic.wrapped(left, result), arithmetic.number(right)
    lo, hi = right.lo, right.hi
    context.prove(0 <= lo and hi <= 63, line, f"a shift goes by 0 to 63 bits, here it may be {lo if lo < 0 else hi}")
    if not (0 <= lo and hi <= 63):
        return arithmetic.const(0, result) if isinstance(left, Const) else _anything(left, result)
    return arithmetic.wrapped(arithmetic.exact(op, left, right, result), result)


def _anything(like: Expr, name: str) -> Expr:
    """Stands in while bounds are not final."""
    return dataclasses.replace(like, type=name, lo=types.bounds(name)[0], hi=types.bounds(name)[1])


def _divided(op: ast.operator, left: Expr, right: Expr, line: int) -> Expr:
    divisor = right.lo if isinstance(right, Const) else 0
    if divisor <= 0 or divisor & (divisor - 1):
        raise Refusal(
            line,
            "division needs many clock cycles for each pixel: only // and % by a constant power of two are offloaded",
        )
    result = types.arithmetic(left.type, right.type)
    left = arithmetic.wrapped(left, result)
    if isinstance(op, ast.Mod):
        return arithmetic.exact("and", left, arithmetic.const(divisor - 1, result), result)
    return arithmetic.exact("shr", left, arithmetic.const(divisor.bit_length() - 1), result)


def compared(context: Context, comparison: ast.cmpop, left: Expr, right: Expr, line: int) -> Expr:
    if types.unified(left.type, right.type) is None:
        largest = max(abs(value) for side in (left, right) for value in (side.lo, side.hi))
        context.prove(
            largest <= types.EXACT_IN_FLOAT64,
            line,
            f"numba compares {left.type} with {right.type} as float64, which is not exact here: convert one, e.g. np.int64(…)",
        )
    return arithmetic.compare(_COMPARISONS[type(comparison)], left, right)

"""A small calculator over the constants of a kernel: numbers, tuples of numbers, and tables of two dimensions.

In: an expression of the module body and the constants defined above it. Out: its value, or ``Violation`` with the line.
Results are bounded, because Python's own evaluation of ``9**9**9`` is not.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping

from kernels.violation import Violation

Number = int | float
Row = tuple[Number, ...]
Literal = Number | Row | tuple[Row, ...]

MAX_TABLE_ENTRIES = 4096
MAX_SHIFT = 64

_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_BITWISE: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
}


def evaluate(node: ast.expr, constants: Mapping[str, Literal]) -> Literal:
    value = _compute(node, constants)
    entries = flat(value)
    if len(entries) > MAX_TABLE_ENTRIES:
        raise Violation(node.lineno, f"a constant table has at most {MAX_TABLE_ENTRIES} entries")
    if any(isinstance(entry, int) and not -(1 << 63) <= entry < 1 << 64 for entry in entries):
        raise Violation(node.lineno, "an integer constant has at most 64 bits")
    return value


def flat(value: Literal) -> Row:
    """Every number of it."""
    if not isinstance(value, tuple):
        return (value,)
    return tuple(entry for row in value for entry in (row if isinstance(row, tuple) else (row,)))


def _compute(node: ast.expr, constants: Mapping[str, Literal]) -> Literal:
    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            return value
        case ast.Name(id=name) if name in constants:
            return constants[name]
        case ast.Attribute(value=ast.Name(id="math" | "np"), attr="pi" | "e" | "inf" | "nan" as constant):
            return float(getattr(math, constant))
        case ast.Tuple(elts=elements) if elements:
            return _table(node, [evaluate(element, constants) for element in elements])
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand, constants)
        case ast.BinOp(left=left, op=op, right=right):
            return _combine(node, type(op), _number(left, constants), _number(right, constants))
        case _:
            raise Violation(node.lineno, "a constant is a number, a tuple of numbers, or a tuple of equally long rows")


def _table(node: ast.Tuple, parts: list[Literal]) -> Literal:
    numbers = tuple(part for part in parts if not isinstance(part, tuple))
    if len(numbers) == len(parts):
        return numbers
    rows: list[Row] = []
    for part, element in zip(parts, node.elts, strict=True):
        row = part if isinstance(part, tuple) else ()
        cells = tuple(cell for cell in row if not isinstance(cell, tuple))
        if not cells or len(cells) != len(row) or (rows and len(cells) != len(rows[0])):
            raise Violation(element.lineno, "a table is a tuple of rows, each a tuple of as many numbers")
        rows.append(cells)
    return tuple(rows)


def _number(node: ast.expr, constants: Mapping[str, Literal]) -> Number:
    value = evaluate(node, constants)
    if isinstance(value, tuple):
        raise Violation(node.lineno, "a number is expected here")
    return value


def _combine(node: ast.expr, op: type[ast.operator], left: Number, right: Number) -> Number:
    try:
        if op in _BINARY:
            return _BINARY[op](left, right)
        if op in _BITWISE and isinstance(left, int) and isinstance(right, int):
            if op is ast.LShift and right > MAX_SHIFT:
                raise Violation(node.lineno, "an integer constant has at most 64 bits")
            return _BITWISE[op](left, right)
        if op is ast.Pow and abs(left) <= 1 << 16 and 0 <= right <= MAX_SHIFT:
            return float(left**right) if isinstance(right, float) else left**right
    except (ArithmeticError, ValueError, TypeError) as error:
        raise Violation(node.lineno, f"this constant cannot be computed: {error}") from None
    raise Violation(node.lineno, "this operation is not allowed in a constant")

"""Expressions of a kernel → IR nodes, typed as numba types them; refuses what has no integer form.

In: an expression of the syntax tree, and what is known at that point (``Context``). Out: a ``Value``: the node, and how it
follows from a loop's head or from the position of the pixel. Calls of the file's own functions are carried out in place by
the context. Raises ``Refusal`` with the line.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Callable
from typing import Any

from kernels.contract import VERDICTS, StateSpec
from kernels.offload import arithmetic, types
from kernels.offload.context import FLOAT, Context, Value, refuse
from kernels.offload.domain import Broken, Place, assume, known_now
from kernels.offload.ir import Cell, Const, Dim, Expr, FrameNumber, Local, Param, Position, Refusal
from kernels.offload.operators import binary, compared

INDEX_BITS = 62


def evaluate(context: Context, node: ast.expr) -> Value:
    handler = _HANDLERS.get(type(node))
    if handler is None:
        refuse(node, "this expression has no integer form: write it with + - * shifts, & | ^, comparisons, min, max")
    return handler(context, node)


def evaluate_condition(context: Context, node: ast.expr) -> Expr:
    """What ``if`` asks: numbers count as true unless zero, also within ``and`` and ``or``."""
    if isinstance(node, ast.BoolOp):
        return _logic(context, node, evaluate_condition)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return arithmetic.negated(evaluate_condition(context, node.operand))
    return arithmetic.condition(evaluate(context, node).node)


def _constant(context: Context, node: ast.Constant) -> Value:
    if isinstance(node.value, bool):
        return Value(arithmetic.truth(node.value))
    if not isinstance(node.value, int | float):
        refuse(node, "only numbers have an integer form")
    return Value(_literal(node.value, node.lineno))


def _literal(value: int | float, line: int) -> Expr:
    if isinstance(value, float):
        raise Refusal(line, FLOAT.format(what=f"{value!r} is a float"))
    return arithmetic.const(value, types.INT64 if value < 1 << 63 else types.UINT64)


def _name(context: Context, node: ast.Name) -> Value:
    slot = context.scope.slots.get(node.id)
    return _global(context, node.id, node.lineno) if slot is None else _local(context, slot, node)


def _local(context: Context, slot: str, node: ast.Name) -> Value:
    known = context.env.slots.get(slot)
    if known is None:
        refuse(node, f"{node.id!r} may have no value here: give it one on every path, before the loop")
    if isinstance(known, Broken):
        refuse(node, known.reason)
    if known.fixed:
        return Value(arithmetic.const(known.lo, known.type))
    axis = context.positions.get(slot)
    if axis is not None:
        position = known_now(context.env, Position(known.type, known.lo, known.hi, axis))
        return Value(position, place=Place(axis, 0))
    return Value(Local(known.type, known.lo, known.hi, slot), known.origin, known.place)


def _global(context: Context, name: str, line: int) -> Value:
    if name in VERDICTS:
        return Value(arithmetic.const(VERDICTS[name]))
    if name in context.literals:
        literal = context.literals[name]
        if isinstance(literal, tuple):
            raise Refusal(line, f"{name!r} is a table: use one of its entries, {name}[0]")
        return Value(arithmetic.truth(literal) if isinstance(literal, bool) else _literal(literal, line))
    if name == "index":
        return Value(FrameNumber(types.INT64, 0, (1 << INDEX_BITS) - 1))
    if name == "frame":
        raise Refusal(
            line, "the frame streams past pixel by pixel: use frame[y, x] in a loop, not the frame as a whole"
        )
    if name == "out":
        raise Refusal(line, "transformed frames (out) are not offloaded")
    raise Refusal(line, f"{name!r} may have no value here")


def _attribute(context: Context, node: ast.Attribute) -> Value:
    match node:
        case ast.Attribute(value=ast.Name(id="params"), attr=name):
            if name in context.arrays:
                refuse(node, f"params.{name} is an array: an FPGA core has scalar parameters only")
            dtype = context.params[name]
            if dtype not in types.INTEGERS:
                refuse(node, FLOAT.format(what=f"params.{name} is {dtype}"))
            return Value(known_now(context.env, Param(dtype, *types.bounds(dtype), name)))
        case ast.Attribute(value=ast.Name(id="frame"), attr="size"):
            return Value(arithmetic.const(math.prod(context.shape)))
        case ast.Attribute(value=ast.Name(id="frame"), attr="ndim"):
            return Value(arithmetic.const(len(context.shape)))
        case ast.Attribute(value=ast.Name(id="frame"), attr="shape"):
            refuse(node, "use frame.shape[0] and frame.shape[1]")
        case ast.Attribute(value=ast.Name(id="math" | "np")):
            refuse(node, FLOAT.format(what=f"{ast.unparse(node)} is a float"))
        case ast.Attribute(value=ast.Name(id="state"), attr=name):
            refuse(node, f"use single elements, state.{name}[…]")
        case _:
            refuse(node, f"{ast.unparse(node)} is not available on an FPGA")


def dimension(context: Context, node: ast.expr) -> Value | None:
    """``frame.shape[i]`` or ``len(frame)``."""
    axis: object = None
    match node:
        case ast.Subscript(
            value=ast.Attribute(value=ast.Name(id="frame"), attr="shape"), slice=ast.Constant(value=axis)
        ):
            pass
        case ast.Call(func=ast.Name(id="len"), args=[ast.Name(id="frame")]):
            axis = 0
        case _:
            return None
    if not isinstance(axis, int) or isinstance(axis, bool) or not -len(context.shape) <= axis < len(context.shape):
        refuse(node, f"frames have {len(context.shape)} dimension(s) here: frame.shape[{axis!r}] is none of them")
    axis %= len(context.shape)
    size = context.shape[axis]
    # Axis 1 is always that of the pixels in a row.
    return Value(Dim(types.INT64, size, size, axis + 2 - len(context.shape)))


def _subscript(context: Context, node: ast.Subscript) -> Value:
    size = dimension(context, node)
    if size is not None:
        return size
    match node.value:
        case ast.Name(id="frame"):
            return context.pixel(node, [evaluate(context, index) for index in indices_of(node)])
        case ast.Attribute(value=ast.Name(id="state"), attr=name):
            if name not in context.registers:
                refuse(
                    node,
                    f"state.{name} is a memory: it can be updated (state.{name}[i] += value, or = min/max of itself and a "
                    f"value), not read; arrays of up to {REGISTERS_MAX} elements are registers and can",
                )
            spec = context.state[name]
            return Value(Cell(spec.dtype, *types.bounds(spec.dtype), name, element(context, node, spec)))
        case ast.Attribute(value=ast.Name(id="params")) as params:
            return _attribute(context, params)
        case ast.Name(id=name) if isinstance(context.literals.get(name), tuple):
            table = context.literals[name]
            assert isinstance(table, tuple)
            index = evaluate(context, node.slice).node
            if not isinstance(index, Const) or not -len(table) <= index.lo < len(table):
                refuse(node, f"an entry of the table {name!r} is chosen by a constant within it")
            entry = table[index.lo]
            if isinstance(entry, tuple):
                refuse(node, f"{name!r} is a table of rows: an entry of a table of numbers is one")
            return Value(_literal(entry, node.lineno))
        case _:
            refuse(node, f"{ast.unparse(node)} is not available on an FPGA")


REGISTERS_MAX = 16
"""Elements up to which a state array is registers; larger ones are block RAM."""


def indices_of(node: ast.Subscript) -> list[ast.expr]:
    entries = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    for entry in entries:
        if isinstance(entry, ast.Slice):
            refuse(node, "slices are whole-array operations: the frame streams past once, write the loop")
    return entries


def element(context: Context, node: ast.Subscript, spec: StateSpec) -> Expr:
    """Number of the element in C order, proven to lie within the array."""
    entries = indices_of(node)
    if len(entries) != len(spec.shape):
        refuse(node, f"state.{spec.name} has {len(spec.shape)} dimension(s): give an index for each")
    position: Expr = arithmetic.const(0)
    for entry, size in zip(entries, spec.shape, strict=True):
        index = arithmetic.number(evaluate(context, entry).node)
        text = ast.unparse(entry)
        lo, hi = index.lo, index.hi
        context.prove(
            lo >= 0 and hi < size,
            node.lineno,
            f"state.{spec.name} has {size} elements here, but {text} may be {lo if lo < 0 else hi}: guard the line with "
            f"`if {text} < {size}` (and `{text} >= 0`), or clamp it with min and max",
        )
        if isinstance(index, Const) and index.lo < 0:
            index = arithmetic.const(0)
        scaled = arithmetic.exact("mul", position, arithmetic.const(size), types.INT64)
        position = arithmetic.exact("add", scaled, index, types.INT64) if len(entries) > 1 else index
    return position


def _unary(context: Context, node: ast.UnaryOp) -> Value:
    if isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        # A negative literal: Python has folded it before numba sees it.
        literal = node.operand.value
        if isinstance(literal, int | float) and not isinstance(literal, bool):
            return Value(_literal(-literal, node.lineno))
    if isinstance(node.op, ast.Not):
        return Value(evaluate_condition(context, node))
    value = evaluate(context, node.operand).node
    result = types.widened(value.type)
    if isinstance(node.op, ast.UAdd):
        return Value(arithmetic.wrapped(value, result))
    if isinstance(node.op, ast.Invert) and value.type == types.BOOL:
        refuse(node, "~ of a truth value: write `not`")
    own = types.INT64 if value.type == types.BOOL else value.type
    start = arithmetic.const(0 if isinstance(node.op, ast.USub) else -1, result)
    return Value(arithmetic.wrapped(arithmetic.exact("sub", start, value, result), result, within=own))


def _joined(context: Context, node: ast.BoolOp) -> Value:
    return Value(_logic(context, node, _truth))


def _truth(context: Context, node: ast.expr) -> Expr:
    value = evaluate(context, node).node
    if value.type != types.BOOL:
        refuse(node, "`and` and `or` give one of their sides: as a number, write a comparison, e.g. n > 0")
    return value


def _logic(context: Context, node: ast.BoolOp, side: Callable[[Context, ast.expr], Expr]) -> Expr:
    op = "and" if isinstance(node.op, ast.And) else "or"
    result = side(context, node.values[0])
    for operand in node.values[1:]:
        env = assume(context.env, result, op == "and")
        value = context.conditionally(env, lambda operand=operand: Value(side(context, operand))).node  # type: ignore[misc]
        result = arithmetic.logic(op, result, value)
    return result


def _comparisons(context: Context, node: ast.Compare) -> Value:
    result: Expr | None = None
    left = evaluate(context, node.left).node
    for op, operand in zip(node.ops, node.comparators, strict=True):
        right = evaluate(context, operand).node
        part = compared(context, op, left, right, node.lineno)
        result = part if result is None else arithmetic.logic("and", result, part)
        left = right
    assert result is not None
    return Value(result)


def _choice(context: Context, node: ast.IfExp) -> Value:
    test = evaluate_condition(context, node.test)
    then = context.conditionally(assume(context.env, test, True), lambda: evaluate(context, node.body)).node
    other = context.conditionally(assume(context.env, test, False), lambda: evaluate(context, node.orelse)).node
    if isinstance(test, Const) and then.type == other.type:
        return Value(then if test.lo else other)
    result = types.unified(then.type, other.type)
    if result is None:
        refuse(node, f"this is {then.type} or {other.type}, which numba makes float64: convert one, e.g. np.int64(…)")
    if result != types.BOOL:
        then, other = arithmetic.wrapped(then, result), arithmetic.wrapped(other, result)
    return Value(arithmetic.select(test, then, other, result))


# -- calls


def _call(context: Context, node: ast.Call) -> Value:
    size = dimension(context, node)
    if size is not None:
        return size
    match node.func:
        case ast.Name(id="min" | "max" as name) if len(node.args) >= 2:
            return Value(_extreme(context, name, node))
        case ast.Name(id="abs" | "int" | "bool" as name) if len(node.args) == 1:
            return Value(_builtin(name, evaluate(context, node.args[0]).node))
        case ast.Name(id="float" | "pow" | "divmod" | "round" as name):
            refuse(node, FLOAT.format(what=f"{name}() is not available there"))
        case ast.Name(id=name):
            result = context.call(node, name)
            if result is None:
                refuse(node, f"{name}() returns nothing that could be used here")
            return result
        case ast.Attribute(value=ast.Name(id="np" | "math" as module), attr=name):
            return _converted(context, node, module, name)
        case _:
            refuse(
                node,
                f"{ast.unparse(node.func)}() is a whole-array operation: the frame streams past once, write the loop",
            )


def _builtin(name: str, value: Expr) -> Expr:
    if name == "bool":
        return arithmetic.condition(value)
    value = arithmetic.number(value)
    if name == "int" or value.lo >= 0:
        return value
    # The smallest value of a type is its own magnitude: numba wraps it, and so does this.
    smallest, largest = types.bounds(value.type)
    turned = arithmetic.wrapped(arithmetic.exact("sub", arithmetic.const(0), value, value.type), value.type)
    node = arithmetic.select(arithmetic.compare("<", value, arithmetic.const(0)), turned, value, value.type)
    if isinstance(node, Const):
        return node
    return dataclasses.replace(
        node, lo=smallest if value.lo == smallest else 0, hi=min(largest, max(-value.lo, value.hi))
    )


def _converted(context: Context, node: ast.Call, module: str, name: str) -> Value:
    if module == "np" and len(node.args) == 1 and name == "bool_":
        return Value(arithmetic.condition(evaluate(context, node.args[0]).node))
    if module == "np" and len(node.args) == 1 and name in types.INTEGERS:
        value = evaluate(context, node.args[0])
        lo, hi = types.bounds(name)
        cast = arithmetic.wrapped(value.node, name)
        # A conversion that changes nothing keeps what the value follows from.
        return Value(cast, value.origin, value.place) if lo <= value.node.lo and value.node.hi <= hi else Value(cast)
    refuse(
        node,
        f"{module}.{name}() is not available on an FPGA: it works on single pixels with + - * shifts, & | ^, "
        f"comparisons, min, max, abs and np.int64(…) and the like",
    )


def _extreme(context: Context, op: str, node: ast.Call) -> Expr:
    values = [arithmetic.number(evaluate(context, argument).node) for argument in node.args]
    result: str | None = values[0].type
    for value in values[1:]:
        result = None if result is None else types.unified(result, value.type)
    if result is None:
        kinds = " and ".join(sorted({value.type for value in values}))
        refuse(node, f"{op}() of {kinds} is float64 in numba: convert them to one type, e.g. np.int64(…)")
    first, *others = [arithmetic.wrapped(value, result) for value in values]
    for other in others:
        first = arithmetic.exact(op, first, other, result)
    return first


def _binary_expression(context: Context, node: ast.BinOp) -> Value:
    return binary(context, node.op, evaluate(context, node.left), evaluate(context, node.right), node.lineno)


_HANDLERS: dict[type[ast.expr], Callable[[Context, Any], Value]] = {
    ast.Constant: _constant,
    ast.Name: _name,
    ast.Attribute: _attribute,
    ast.Subscript: _subscript,
    ast.BinOp: _binary_expression,
    ast.UnaryOp: _unary,
    ast.BoolOp: _joined,
    ast.Compare: _comparisons,
    ast.IfExp: _choice,
    ast.Call: _call,
}

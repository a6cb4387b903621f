"""IR → numba source: the file as the scientist wrote it, with ``frame()`` written anew from the integer form.

This is the *model* of the core: it goes through the same sandbox as any kernel and runs at the same rate, and what it
computes is what the IR says, with every conversion explicit. Integers are held in int64, or in uint64 where a value may
exceed it. In: ``Offload``. Out: source text.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from kernels.contract import StateSpec
from kernels.offload import types
from kernels.offload.ir import (
    AsInteger,
    Assign,
    Binary,
    Cell,
    Compare,
    Const,
    Dim,
    Emit,
    Expr,
    FrameNumber,
    If,
    Local,
    Logic,
    Not,
    Offload,
    Param,
    Pixel,
    Position,
    Select,
    Span,
    Statement,
    Store,
    Update,
    Verdict,
    Wrap,
)

_SIGNS = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>"}
_MODULAR = ("add", "sub", "mul", "and", "or", "xor", "shl")
"""Their low 64 bits follow from the low 64 bits of their operands."""


def emit_numba(offload: Offload) -> str:
    """Source that passes the gate, declares what the kernel declares and computes the same bits."""
    module = ast.parse(offload.kernel.source)
    frame = ast.parse("\n".join(_Writer(offload).frame())).body[0]
    module.body = [
        frame if isinstance(node, ast.FunctionDef) and node.name == "frame" else node
        for node in module.body
        if not isinstance(
            node, ast.Import | ast.ImportFrom | ast.Expr
        )  # imports are below, and a docstring says nothing
    ]
    return "import numpy as np\n" + ast.unparse(module) + "\n"


def names_of(offload: Offload) -> dict[str, str]:
    """A plain identifier for each local variable, in the order in which they are assigned."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for slot in offload.slots:
        base = slot.name.split(".")[0]
        name, number = base, 1
        while name in taken:
            number += 1
            name = f"{base}_{number}"
        taken.add(name)
        names[slot.name] = name
    return names


class _Writer:
    def __init__(self, offload: Offload) -> None:
        self._offload = offload
        # "v_": no variable hides an argument, a function or a constant of the file.
        self._names = {slot: f"v_{name}" for slot, name in names_of(offload).items()}
        self._slots = {slot.name: slot for slot in offload.slots}
        self._state = {spec.name: spec for spec in offload.kernel.state}

    def frame(self) -> Iterator[str]:
        offload = self._offload
        yield "def frame(frame, params, state, index, out, feedback):"
        yield from self._block(offload.prologue, 1, empty=False)
        depth = 1
        if offload.rows is not None:
            yield f"    for at_y in {self._range(offload.rows)}:"
            yield from self._block(offload.row_prologue, 2, empty=False)
            depth = 2
        yield f"{'    ' * depth}for at_x in {self._range(offload.columns)}:"
        yield from self._block(offload.body, depth + 1)
        yield from self._block(offload.row_epilogue, 2, empty=False)
        yield from self._block(offload.epilogue, 1)

    def _range(self, span: Span) -> str:
        start, stop = self._exact(span.start), self._exact(span.stop)
        return f"range({stop})" if start == "0" else f"range({start}, {stop})"

    # -- statements

    def _block(self, block: tuple[Statement, ...], depth: int, *, empty: bool = True) -> Iterator[str]:
        indent = "    " * depth
        if not block and empty:
            yield f"{indent}pass"
        for statement in block:
            if isinstance(statement, If):
                yield f"{indent}if {self._truth(statement.test)}:"
                yield from self._block(statement.then, depth + 1)
                if statement.other:
                    yield f"{indent}else:"
                    yield from self._block(statement.other, depth + 1)
            else:
                yield indent + self._statement(statement)

    def _statement(self, statement: Assign | Store | Update | Emit | Verdict) -> str:
        match statement:
            case Assign(slot=slot, value=value):
                return f"{self._names[slot]} = {self._held(slot, value)}"
            case Store(array=array, index=index, value=value):
                return f"{self._cell(array, index)} = {self._exact(value)}"
            case Update():
                return self._update(statement)
            case Emit(code=code, value=value):
                return f"emit(feedback, {self._exact(code)}, {self._exact(value)})"
            case Verdict(value=value):
                return f"return {self._exact(value)}"

    def _held(self, slot: str, value: Expr) -> str:
        stored = self._stored(slot)
        if stored == types.BOOL:
            return self._truth(value)
        text, given = self._native(value)
        return text if given == stored else f"np.{stored}({text})"

    def _stored(self, slot: str) -> str:
        """The narrowest type that holds whatever the variable gets: the optimiser does more of them at once."""
        known = self._slots[slot]
        return types.BOOL if known.is_bool else _narrowest(known.lo, known.hi)

    def _update(self, update: Update) -> str:
        cell = self._cell(update.array, update.index)
        dtype = self._state[update.array].dtype
        if update.op == "set":
            return f"{cell} = {self._exact(update.value)}"
        if update.op in ("min", "max"):
            carrier = self._carrier(max(types.bounds(dtype)[1], update.value.hi))
            return f"{cell} = {update.op}(np.{carrier}({cell}), {self._as(carrier, update.value)})"
        # The low bits are the same in either type, and only those are stored.
        return f"{cell} = np.int64({cell}) {_SIGNS[update.op]} {self._modular('int64', update.value)}"

    def _cell(self, array: str, index: Expr) -> str:
        return f"state.{array}[{', '.join(self._exact(entry) for entry in _unravelled(self._state[array], index))}]"

    # -- expressions

    @staticmethod
    def _carrier(hi: int) -> str:
        return types.INT64 if hi < 1 << 63 else types.UINT64

    def _as(self, carrier: str, node: Expr) -> str:
        text = self._exact(node)
        return text if self._carrier(node.hi) == carrier else f"np.{carrier}({text})"

    def _exact(self, node: Expr) -> str:
        """The value, in int64 or uint64 by ``_carrier``."""
        carrier = self._carrier(node.hi)
        match node:
            case Const(type=types.BOOL) | Compare() | Logic() | Not():
                return f"np.int64({self._truth(node)})"
            case Const(lo=value):
                return str(value)
            case Local(slot=slot):
                name = self._names[slot]
                return name if self._stored(slot) == carrier else f"np.{carrier}({name})"
            case AsInteger(value=value):
                return f"np.int64({self._truth(value)})"
            case Select(test=test, then=then, other=other):
                return f"({self._as(carrier, then)} if {self._truth(test)} else {self._as(carrier, other)})"
            case Wrap(wrapped=wrapped, value=value):
                inner = self._modular(wrapped if wrapped in (types.INT64, types.UINT64) else types.INT64, value)
                kept = inner if wrapped == carrier else f"np.{wrapped}({inner})"
                return kept if wrapped == carrier else f"np.{carrier}({kept})"
            case Binary():
                return self._binary(node, carrier)
            case _:
                return self._leaf(node, carrier)

    def _leaf(self, node: Expr, carrier: str) -> str:
        match node:
            case Position(axis=axis):
                return f"np.{carrier}({'at_y' if axis == 0 else 'at_x'})"
            case Dim(axis=axis):
                return f"frame.shape[{axis + len(self._offload.shape) - 2}]"
            case FrameNumber():
                return "index"
            case Pixel():
                return f"np.{carrier}({self._pixel(node)})"
            case Param(name=name):
                return f"np.{carrier}(params.{name})"
            case Cell(array=array, index=index):
                return f"np.{carrier}({self._cell(array, index)})"
            case _:
                raise AssertionError(f"no value: {node}")

    def _binary(self, node: Binary, carrier: str) -> str:
        if node.op in _MODULAR:
            # Exact, because the exact result fits the carrier.
            return self._modular(carrier, node)
        if node.op in ("min", "max"):
            text, given = self._native(node)
            return text if given == carrier else f"np.{carrier}({text})"
        own = self._carrier(node.left.hi)
        text = (
            f"({self._exact(node.left)} >> {self._as(own, node.right) if own == carrier else self._exact(node.right)})"
        )
        return text if own == carrier else f"np.{carrier}({text})"

    def _modular(self, carrier: str, node: Expr) -> str:
        """The low 64 bits of the value as ``carrier``, whatever the value."""
        if isinstance(node, Binary) and node.op in _MODULAR:
            left = self._modular(carrier, node.left)
            right = self._modular(carrier, node.right) if node.op != "shl" else self._exact(node.right)
            return f"({left} {_SIGNS[node.op]} {right})"
        if isinstance(node, Const):
            lo, hi = types.bounds(carrier)
            value = (node.lo - lo) % (hi - lo + 1) + lo
            return str(value) if carrier == types.INT64 else f"np.uint64({value})"
        if isinstance(node, Wrap) and node.wrapped in (types.INT64, types.UINT64):
            return self._modular(carrier, node.value)
        text = self._exact(node)
        return text if self._carrier(node.hi) == carrier else f"np.{carrier}({text})"

    # -- in the narrowest types, for what is only compared

    def _native(self, node: Expr) -> tuple[str, str]:
        """The value as it comes, and its type."""
        match node:
            case Local(slot=slot) if not self._slots[slot].is_bool:
                return self._names[slot], self._stored(slot)
            case Pixel():
                return self._pixel(node), self._offload.dtype
            case Param(name=name):
                return f"params.{name}", next(spec.dtype for spec in self._offload.kernel.params if spec.name == name)
            case Binary(op="min" | "max" as op, left=left, right=right):
                a, b, common = self._common(left, right)
                return f"{op}({a}, {b})", common
            case _:
                return self._exact(node), self._carrier(node.hi)

    def _common(self, left: Expr, right: Expr) -> tuple[str, str, str]:
        """Both values in one type that holds both: (left, right, type)."""
        (a, a_type), (b, b_type) = self._native(left), self._native(right)
        for side, other in ((left, b_type), (right, a_type)):
            lo, hi = types.bounds(other)
            if isinstance(side, Const) and lo <= side.lo <= hi:
                text = f"np.{other}({side.lo})"
                return (text, b, other) if side is left else (a, text, other)
        common = types.unified(a_type, b_type)
        if common is None:
            # Refused before, unless both fit: numba would go on in float64.
            common = self._carrier(max(left.hi, right.hi))
            assert common == types.INT64 or min(left.lo, right.lo) >= 0
            return f"np.{common}({a})", f"np.{common}({b})", common
        return a, b, common

    def _pixel(self, node: Pixel) -> str:
        row = [] if self._offload.rows is None else [_moved("at_y", node.dy)]
        return f"frame[{', '.join([*row, _moved('at_x', node.dx)])}]"

    def _truth(self, node: Expr) -> str:
        match node:
            case Const(lo=value):
                return "True" if value else "False"
            case Compare(op=op, left=left, right=right):
                a, b, _ = self._common(left, right)
                return f"({a} {op} {b})"
            case Logic(op=op, left=left, right=right):
                sign = {"xor": "!=", "and": "and", "or": "or"}[op]
                return f"({self._truth(left)} {sign} {self._truth(right)})"
            case Not(value=value):
                return f"(not {self._truth(value)})"
            case Select(test=test, then=then, other=other):
                return f"({self._truth(then)} if {self._truth(test)} else {self._truth(other)})"
            case Local(slot=slot) if self._slots[slot].is_bool:
                return self._names[slot]
            case _:
                return f"({self._exact(node)} != 0)"


def _narrowest(lo: int, hi: int) -> str:
    for name in ("uint8", "uint16", "int32", "uint32", "int64"):
        smallest, largest = types.bounds(name)
        if smallest <= lo and hi <= largest:
            return name
    return types.UINT64


def _moved(name: str, offset: int) -> str:
    return name if offset == 0 else f"{name} {'+' if offset > 0 else '-'} {abs(offset)}"


def _unravelled(spec: StateSpec, index: Expr) -> list[Expr]:
    """An index for each dimension, from the number of the element (values.element built it in this form)."""
    entries: list[Expr] = []
    for size in reversed(spec.shape[1:]):
        if isinstance(index, Const):
            entries.append(Const(index.type, index.lo % size, index.lo % size))
            index = Const(index.type, index.lo // size, index.lo // size)
        else:
            assert isinstance(index, Binary)
            entries.append(index.right)
            scaled = index.left
            if isinstance(scaled, Const):
                value = scaled.lo // size
                index = Const(scaled.type, value, value)
            else:
                assert isinstance(scaled, Binary)
                index = scaled.left
    return [index, *reversed(entries)]

"""IR expressions and statements → VHDL text. Data is ``signed``, exactly as wide as its bounds ask; never ``integer``.

``Names`` gives every local variable an identifier. ``Values.number`` returns text and the width it has; a value that is
never negative carries a leading zero. Only addresses and shift counts, proven in range, become ``natural``.
"""

from __future__ import annotations

import re
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
    Statement,
    Store,
    Update,
    Verdict,
    Wrap,
    statements,
)

_SIGNS = {"add": "+", "sub": "-", "mul": "*", "and": "and", "or": "or", "xor": "xor"}
_COMPARISONS = {"==": "=", "!=": "/=", "<": "<", "<=": "<=", ">": ">", ">=": ">="}
OPERATIONS = ("add", "sub", "and", "or", "xor", "min", "max", "set")
"""Of memories; the position is the code."""


def width_of(lo: int, hi: int) -> int:
    """Bits of a two's complement number that holds both."""
    return max((~lo if lo < 0 else lo).bit_length(), (~hi if hi < 0 else hi).bit_length()) + 1


def literal(value: int, width: int) -> str:
    return f'signed\'("{value % (1 << width):0{width}b}")'


def identifier(text: str) -> str:
    """A legal VHDL identifier: lower case, no doubled or trailing underscore."""
    return re.sub(r"_+", "_", re.sub(r"[^a-z0-9]", "_", text.lower())).strip("_") or "x"


class Names:
    """Distinct identifiers; VHDL does not tell upper from lower case."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def take(self, prefix: str, text: str) -> str:
        base = f"{prefix}_{identifier(text)}"
        name, number = base, 1
        while name in self._taken:
            number += 1
            name = f"{base}_{number}"
        self._taken.add(name)
        return name


class Values:
    def __init__(self, offload: Offload) -> None:
        self.offload = offload
        names = Names()
        self.locals = {slot.name: names.take("v", slot.name.split(".")[0]) for slot in offload.slots}
        self.params = {spec.name: names.take("p", spec.name) for spec in offload.kernel.params}
        self.states = {spec.name: names.take("s", spec.name) for spec in offload.state}
        self.state = {spec.name: spec for spec in offload.state}
        self._slots = {slot.name: slot for slot in offload.slots}
        self._registers = {spec.name for spec in offload.registers}

    def slot_width(self, slot: str) -> int:
        return width_of(self._slots[slot].lo, self._slots[slot].hi)

    # -- numbers

    def fitted(self, node: Expr, width: int) -> str:
        """The value in ``width`` bits; a shorter one is meant modulo 2**width, or proven to fit."""
        return self._modular(node, width)

    def number(self, node: Expr) -> tuple[str, int]:
        if node.type == types.BOOL and not (isinstance(node, Local) and not self._slots[node.slot].is_bool):
            return f"b2s({self.truth(node)})", 2
        width = width_of(node.lo, node.hi)
        match node:
            case Const(lo=value) | Dim(lo=value):
                return literal(value, width), width
            case AsInteger(value=value):
                return f"b2s({self.truth(value)})", 2
            case Select(test=test, then=then, other=other):
                return f"pick({self.truth(test)}, {self.fitted(then, width)}, {self.fitted(other, width)})", width
            case Wrap(wrapped=wrapped, value=value):
                bits = types.bits(wrapped)
                inner = self._modular(value, bits)
                return (inner, bits) if types.is_signed(wrapped) else (f"('0' & {inner})", bits + 1)
            case Binary():
                return self._binary(node, width)
            case _:
                return self._leaf(node)

    def _leaf(self, node: Expr) -> tuple[str, int]:
        match node:
            case Local(slot=slot):
                return self.locals[slot], self.slot_width(slot)
            case Position(axis=axis):
                size = self.offload.height if axis == 0 else self.offload.width
                return ("at_y" if axis == 0 else "at_x"), width_of(0, size)
            case FrameNumber():
                return "frame_number", 64
            case Pixel(dy=dy, dx=dx):
                window = self.offload.window
                return _signed(f"window({dy - window.top})({dx - window.left})", self.offload.dtype)
            case Param(name=name):
                dtype = next(spec.dtype for spec in self.offload.kernel.params if spec.name == name)
                return _signed(self.params[name], dtype)
            case Cell(array=array, index=index):
                spec = self.state[array]
                if isinstance(index, Const):
                    return _signed(f"{self.states[array]}({index.lo})", spec.dtype)
                return _signed(f"at_{self.states[array]}({self.states[array]}, {self.number(index)[0]})", spec.dtype)
            case _:
                raise AssertionError(f"no value: {node}")

    def _binary(self, node: Binary, width: int) -> tuple[str, int]:
        if node.op in ("min", "max"):
            common = max(width_of(node.left.lo, node.left.hi), width_of(node.right.lo, node.right.hi))
            text = f"s{node.op}({self.fitted(node.left, common)}, {self.fitted(node.right, common)})"
            return (text, common) if common == width else (f"fit({text}, {width})", width)
        if node.op == "shr":
            text, own = self.number(node.left)
            shifted = f"shift_right({text}, {self._count(node.right)})"
            return (shifted, own) if own == width else (f"fit({shifted}, {width})", width)
        return self._modular(node, width), width

    def _count(self, node: Expr) -> str:
        if isinstance(node, Const):
            return str(node.lo)
        return f"to_integer(unsigned({self.fitted(node, 6)}))"

    def _modular(self, node: Expr, width: int) -> str:
        """The low ``width`` bits of the exact value."""
        match node:
            case Const(lo=value) if node.type != types.BOOL:
                return literal(value, width)
            case Binary(op="shl", left=left, right=right):
                return f"shift_left({self._modular(left, width)}, {self._count(right)})"
            case Binary(op="mul", left=left, right=right):
                a, b = (self._modular(side, min(width, width_of(side.lo, side.hi))) for side in (left, right))
                return f"fit({a} * {b}, {width})"
            case Binary(op=op, left=left, right=right) if op in _SIGNS:
                return f"({self._modular(left, width)} {_SIGNS[op]} {self._modular(right, width)})"
            case Wrap(wrapped=wrapped, value=value) if types.bits(wrapped) >= width:
                return self._modular(value, width)
            case _:
                text, own = self.number(node)
                return text if own == width else f"fit({text}, {width})"

    # -- truth values

    def truth(self, node: Expr) -> str:
        match node:
            case Const(lo=value):
                return "true" if value else "false"
            case Compare(op=op, left=left, right=right):
                return f"({self.number(left)[0]} {_COMPARISONS[op]} {self.number(right)[0]})"
            case Logic(op=op, left=left, right=right):
                return f"({self.truth(left)} {op} {self.truth(right)})"
            case Not(value=value):
                return f"(not {self.truth(value)})"
            case Select(test=test, then=then, other=other):
                chosen, then_text, other_text = self.truth(test), self.truth(then), self.truth(other)
                return f"(({chosen} and {then_text}) or ((not {chosen}) and {other_text}))"
            case Local(slot=slot) if self._slots[slot].is_bool:
                return self.locals[slot]
            case _:
                text, width = self.number(node)
                return f"({text} /= {literal(0, width)})"

    # -- statements

    def block(self, block: tuple[Statement, ...], depth: int, emits: Iterator[int]) -> Iterator[str]:
        """``emits`` numbers the calls of emit() that one cycle may carry out."""
        indent = "  " * depth
        for statement in block:
            if isinstance(statement, If):
                yield f"{indent}if {self.truth(statement.test)} then  -- line {statement.line}"
                yield from self.block(statement.then, depth + 1, emits)
                if statement.other:
                    yield f"{indent}else"
                    yield from self.block(statement.other, depth + 1, emits)
                yield f"{indent}end if;"
            else:
                for line in self._statement(statement, emits):
                    yield f"{indent}{line}"

    def _statement(self, statement: Assign | Store | Update | Emit | Verdict, emits: Iterator[int]) -> Iterator[str]:
        match statement:
            case Assign(line=line, slot=slot, value=value):
                target = self.locals[slot]
                text = self.truth(value) if self._slots[slot].is_bool else self.fitted(value, self.slot_width(slot))
                yield f"{target} := {text};  -- line {line}"
            case Store(line=line, array=array, index=index, value=value):
                yield from self._store(line, array, index, value)
            case Update(line=line, array=array, index=index, op=op, value=value):
                name = self.states[array]
                spec = self.state[array]
                yield f"{name}_on := true;  -- line {line}"
                yield f"{name}_at := unsigned({self.fitted(index, address_width(spec))});"
                yield f'{name}_op := "{OPERATIONS.index(op):03b}";  -- {op}'
                yield f"{name}_by := {self.fitted(value, operand_width(self.offload, array))};"
            case Emit(line=line, code=code, value=value):
                number = next(emits)
                yield f"emit_on({number}) := '1';  -- line {line}"
                yield f"emit_code({number}) := {self.fitted(code, 64)};"
                yield f"emit_value({number}) := {self.fitted(value, 64)};"
                yield f"emit_unsigned({number}) := '{int(value.hi >= 1 << 63)}';"
            case Verdict(line=line, value=value):
                yield f"verdict := std_logic_vector({self.fitted(value, 2)});  -- line {line}"

    def _store(self, line: int, array: str, index: Expr, value: Expr) -> Iterator[str]:
        name, spec = self.states[array], self.state[array]
        text = f"std_logic_vector({self.fitted(value, types.bits(spec.dtype))})"
        if isinstance(index, Const):
            yield f"{name}({index.lo}) := {text};  -- line {line}"
            return
        yield f"for i in {name}'range loop  -- line {line}"
        yield f"  if {self.number(index)[0]} = i then {name}(i) := {text}; end if;"
        yield "end loop;"


def _signed(text: str, dtype: str) -> tuple[str, int]:
    bits = types.bits(dtype)
    return (f"signed({text})", bits) if types.is_signed(dtype) else (f"signed('0' & {text})", bits + 1)


def address_width(spec: StateSpec) -> int:
    elements = 1
    for size in spec.shape:
        elements *= size
    return max(1, (elements - 1).bit_length())


def operand_width(offload: Offload, array: str) -> int:
    """Bits of what a memory is updated with: those of its dtype, or what a comparison needs."""
    spec = next(spec for spec in offload.memories if spec.name == array)
    width = types.bits(spec.dtype)
    for statement in updates(offload, array):
        if statement.op in ("min", "max"):
            width = max(width, width_of(statement.value.lo, statement.value.hi))
    return width


def updates(offload: Offload, array: str) -> list[Update]:
    blocks = (offload.prologue, offload.step, offload.epilogue)
    return [
        statement
        for block in blocks
        for statement in statements(block)
        if isinstance(statement, Update) and statement.array == array
    ]

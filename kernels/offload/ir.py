"""The typed integer form of a kernel: expressions that are exact integers, statements, and the sections of one frame.

An expression's ``type`` is what numba infers for it, ``lo`` and ``hi`` are proven bounds of its value. Arithmetic is exact:
where the exact result could leave the type, a ``Wrap`` stands around it. Everything is frozen; equal nodes mean equal
values at one point of the program.

A frame streams past once, pixel by pixel. ``prologue`` runs before the first pixel, ``body`` for each pixel (y, x) inside
``rows`` × ``columns``, ``row_prologue`` and ``row_epilogue`` around the pixels of a row, ``epilogue`` at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from kernels.contract import Kernel, StateSpec


class Refusal(Exception):
    """The kernel cannot be offloaded. ``line``: 1-based line of its file; ``reason`` is fit for the scientist."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"{line}: {reason}")
        self.line = line
        self.reason = reason


@dataclasses.dataclass(frozen=True, slots=True)
class Expr:
    type: str
    lo: int
    hi: int


@dataclasses.dataclass(frozen=True, slots=True)
class Const(Expr):
    """``lo`` is the value."""


@dataclasses.dataclass(frozen=True, slots=True)
class Local(Expr):
    slot: str


@dataclasses.dataclass(frozen=True, slots=True)
class Pixel(Expr):
    """A pixel of the window around the one at hand."""

    dy: int
    dx: int


@dataclasses.dataclass(frozen=True, slots=True)
class Param(Expr):
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Cell(Expr):
    """An element of a state array that is small enough for registers; ``index`` counts elements in C order."""

    array: str
    index: Expr


@dataclasses.dataclass(frozen=True, slots=True)
class Position(Expr):
    """Where the pixel at hand lies: axis 0 is the row, 1 the column."""

    axis: int


@dataclasses.dataclass(frozen=True, slots=True)
class Dim(Expr):
    """A dimension of the frame: a constant here, kept symbolic because numba's loops are faster so."""

    axis: int


@dataclasses.dataclass(frozen=True, slots=True)
class FrameNumber(Expr):
    """The argument ``index``."""


@dataclasses.dataclass(frozen=True, slots=True)
class Binary(Expr):
    """``op``: add sub mul and or xor shl shr min max; exact. shr rounds down; the right side of a shift is 0 to 63."""

    op: str
    left: Expr
    right: Expr


@dataclasses.dataclass(frozen=True, slots=True)
class Wrap(Expr):
    """``value`` modulo 2**bits, in the range of ``wrapped`` (which is ``type``, or narrower for what numba computes so)."""

    wrapped: str
    value: Expr


@dataclasses.dataclass(frozen=True, slots=True)
class Compare(Expr):
    """``op``: == != < <= > >=; of exact integers."""

    op: str
    left: Expr
    right: Expr


@dataclasses.dataclass(frozen=True, slots=True)
class Logic(Expr):
    """``op``: and or xor, of bools."""

    op: str
    left: Expr
    right: Expr


@dataclasses.dataclass(frozen=True, slots=True)
class Not(Expr):
    value: Expr


@dataclasses.dataclass(frozen=True, slots=True)
class AsInteger(Expr):
    """A bool as 0 or 1."""

    value: Expr


@dataclasses.dataclass(frozen=True, slots=True)
class Select(Expr):
    test: Expr
    then: Expr
    other: Expr


# -- statements


@dataclasses.dataclass(frozen=True, slots=True)
class Assign:
    line: int
    slot: str
    value: Expr


@dataclasses.dataclass(frozen=True, slots=True)
class Store:
    """Write an element of a register array; ``value`` is within its dtype."""

    line: int
    array: str
    index: Expr
    value: Expr


@dataclasses.dataclass(frozen=True, slots=True)
class Update:
    """Read, modify and write one element of a memory: ``old op value`` in its dtype. ``op``: add sub and or xor min max set."""

    line: int
    array: str
    index: Expr
    op: str
    value: Expr


@dataclasses.dataclass(frozen=True, slots=True)
class If:
    line: int
    test: Expr
    then: tuple[Statement, ...]
    other: tuple[Statement, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Emit:
    line: int
    code: Expr
    value: Expr


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    line: int
    value: Expr


Statement = Assign | Store | Update | If | Emit | Verdict


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """A local variable: bounds of all that is ever assigned to it. ``is_bool``: only truth values."""

    name: str
    is_bool: bool
    lo: int
    hi: int


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Positions ``start`` ≤ position < ``stop`` of one axis; both lie within the frame."""

    start: Expr
    stop: Expr


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """How far around the pixel at hand the body looks."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    @property
    def rows(self) -> int:
        return self.bottom - self.top + 1

    @property
    def columns(self) -> int:
        return self.right - self.left + 1


@dataclasses.dataclass(frozen=True, slots=True)
class Offload:
    """A kernel in integer form, for frames of one dtype and shape."""

    kernel: Kernel
    dtype: str
    shape: tuple[int, ...]
    """As the kernel sees it: one or two dimensions."""
    slots: tuple[Slot, ...]
    rows: Span | None
    """None for one-dimensional frames."""
    columns: Span
    window: Window
    prologue: tuple[Statement, ...]
    row_prologue: tuple[Statement, ...]
    body: tuple[Statement, ...]
    row_epilogue: tuple[Statement, ...]
    epilogue: tuple[Statement, ...]
    registers: tuple[StateSpec, ...]
    """State arrays of few elements."""
    memories: tuple[StateSpec, ...]

    @property
    def state(self) -> tuple[StateSpec, ...]:
        """The arrays that the core holds, in the kernel's order; others are for finish() only."""
        return tuple(spec for spec in self.kernel.state if spec in self.registers or spec in self.memories)

    @property
    def height(self) -> int:
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def width(self) -> int:
        return self.shape[-1]

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def step(self) -> tuple[Statement, ...]:
        """What may run in one clock cycle of the pixel stream."""
        return (*self.row_prologue, *self.body, *self.row_epilogue)


def statements(block: tuple[Statement, ...]) -> Iterator[Statement]:
    """All of them, in order, also inside branches."""
    for statement in block:
        yield statement
        if isinstance(statement, If):
            yield from statements(statement.then)
            yield from statements(statement.other)


def operands(node: Expr) -> tuple[Expr, ...]:
    match node:
        case Binary(left=left, right=right) | Compare(left=left, right=right) | Logic(left=left, right=right):
            return (left, right)
        case Wrap(value=value) | Not(value=value) | AsInteger(value=value) | Cell(index=value):
            return (value,)
        case Select(test=test, then=then, other=other):
            return (test, then, other)
        case _:
            return ()


def values(statement: Statement) -> tuple[Expr, ...]:
    """The expressions of one statement, without those of its branches."""
    match statement:
        case Assign(value=value) | Verdict(value=value):
            return (value,)
        case Store(index=index, value=value) | Update(index=index, value=value):
            return (index, value)
        case If(test=test):
            return (test,)
        case Emit(code=code, value=value):
            return (code, value)


def within(node: Expr) -> Iterator[Expr]:
    """The node and everything below it."""
    yield node
    for operand in operands(node):
        yield from within(operand)

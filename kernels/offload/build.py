"""From an admitted kernel and the layout of its frames to the integer form, or the line and the reason why there is none.

In: ``Kernel``, dtype and shape of one frame. Out: ``Offload``. The kernel must have the shape of a stream: something before
the pixels, one loop over rows with one loop over the pixels of a row in it (one loop for one-dimensional frames),
something after, and a verdict. Raises ``Refusal``. Pure; takes milliseconds, for the largest kernels about a second.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

from kernels import declarations
from kernels.contract import Kernel, StateSpec
from kernels.offload import loops, types
from kernels.offload.context import Value, refuse
from kernels.offload.domain import Known, known_now
from kernels.offload.ir import (
    Const,
    Emit,
    Expr,
    If,
    Offload,
    Pixel,
    Refusal,
    Span,
    Statement,
    Update,
    Window,
    statements,
)
from kernels.offload.statements import Walk
from kernels.offload.values import REGISTERS_MAX

PIXELS = ("uint8", "uint16", "uint32", "int16", "int32")
FRAME_PIXELS_MAX = 1 << 26
WIDTH_MAX = 1 << 16
WINDOW_MAX = 15
"""Rows and columns of a window."""
MEMORY_BITS_MAX = 64 << 20
"""All state memories of one core: beyond that no single chip has the block RAM."""
EMITS_MAX = 16
"""Calls of emit() that one pixel, or the end of a frame, may carry out."""


def build(kernel: Kernel, dtype: str, shape: tuple[int, ...]) -> Offload:
    declared = declarations.read(ast.parse(kernel.source))
    used = _state_used(declared)
    _check_declarations(kernel, [spec for spec in kernel.state if spec.name in used], declared.lines)
    _check_layout(dtype, shape)
    return _Builder(kernel, dtype, shape, declared).build()


def _state_used(declared: declarations.Declared) -> set[str]:
    """State arrays that frame() and its helpers name. The others are for finish(), which runs on the processor."""
    return {
        node.attr
        for name, function in declared.functions.items()
        if name != "finish"
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "state"
    }


def _check_declarations(kernel: Kernel, state: Sequence[StateSpec], lines: Mapping[str, int]) -> None:
    if kernel.out is not None:
        raise Refusal(
            lines["OUT"], "transformed frames (OUT) are not offloaded: a core gives verdicts, state and feedback"
        )
    if kernel.rows is not None:
        raise Refusal(lines["ROWS"], "rows (ROWS) are not offloaded: emit single values, or count in state arrays")
    for spec in state:
        if spec.dtype not in types.INTEGERS:
            raise Refusal(lines["STATE"], f"an FPGA core works in integers: state.{spec.name} is {spec.dtype}")
    bits = sum(spec.size_bytes * 8 for spec in state if spec.size_bytes // _itemsize(spec) > REGISTERS_MAX)
    if bits > MEMORY_BITS_MAX:
        raise Refusal(
            lines["STATE"],
            f"the state memories need {bits >> 20} Mbit; a core has at most {MEMORY_BITS_MAX >> 20} Mbit of block RAM",
        )


def _itemsize(spec: StateSpec) -> int:
    return types.bits(spec.dtype) // 8


def _check_layout(dtype: str, shape: tuple[int, ...]) -> None:
    if dtype not in PIXELS:
        raise Refusal(1, f"frames of {dtype} are not offloaded: pixels are {', '.join(PIXELS)}")
    if len(shape) not in (1, 2):
        raise Refusal(1, f"frames of {len(shape)} dimensions are not offloaded: one or two are")
    pixels = shape[0] * shape[-1] if len(shape) == 2 else shape[0]
    if pixels > FRAME_PIXELS_MAX or shape[-1] > (WIDTH_MAX if len(shape) == 2 else FRAME_PIXELS_MAX) or pixels < 1:
        raise Refusal(1, f"frames of shape {shape} are too large for a core")


def _reads_frame(node: ast.AST) -> int | None:
    """A line where a pixel is read."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Subscript) and isinstance(inner.value, ast.Name) and inner.value.id == "frame":
            return inner.lineno
    return None


@dataclasses.dataclass(slots=True)
class _Sections:
    prologue: tuple[Statement, ...] = ()
    row_prologue: tuple[Statement, ...] = ()
    body: tuple[Statement, ...] = ()
    row_epilogue: tuple[Statement, ...] = ()
    epilogue: tuple[Statement, ...] = ()


class _Builder(Walk):
    def __init__(self, kernel: Kernel, dtype: str, shape: tuple[int, ...], declared: declarations.Declared) -> None:
        used = _state_used(declared)
        state = [spec for spec in kernel.state if spec.name in used]
        registers = [spec for spec in state if spec.size_bytes // _itemsize(spec) <= REGISTERS_MAX]
        super().__init__(
            declared.functions,
            declared.constants,
            {spec.name: spec.dtype for spec in kernel.params},
            frozenset(spec.name for spec in kernel.arrays),
            {spec.name: spec for spec in state},
            frozenset(spec.name for spec in registers),
            shape,
        )
        self._kernel = kernel
        self._dtype = dtype
        self._registers = tuple(registers)
        self._memories = tuple(spec for spec in state if spec not in registers)
        self._sections = _Sections()
        self._loops = itertools.count(1)
        self._rows: Span | None = None
        self._columns: Span | None = None
        self._window = [0, 0, 0, 0]

    # -- the shape of a stream

    def build(self) -> Offload:
        frame = self.scope.function
        body = frame.body
        position = self._pixel_loop(body)
        outer = body[position]
        assert isinstance(outer, ast.For)
        self.block(body[:position])
        self._sections.prologue = self._taken()
        if len(self.shape) == 2:
            self._row_loop(outer)
        else:
            self._column_loop(outer)
            self._sections.body = self._taken()
        self.may_return = True
        self.block(body[position + 1 :])
        if not self.ended:
            raise Refusal(body[-1].lineno, "frame() must end with a verdict on every path")
        self._sections.epilogue = self._taken()
        self._check_effects()
        assert self._columns is not None
        top, bottom, left, right = self._window
        return Offload(
            self._kernel,
            self._dtype,
            self.shape,
            tuple(self.slots.values()),
            self._rows,
            self._columns,
            Window(top, bottom, left, right),
            **{field.name: getattr(self._sections, field.name) for field in dataclasses.fields(self._sections)},
            registers=self._registers,
            memories=self._memories,
        )

    def _taken(self) -> tuple[Statement, ...]:
        out, self.out = self.out, []
        return tuple(out)

    def _pixel_loop(self, body: Sequence[ast.stmt]) -> int:
        """Which statement of frame() is the loop over the pixels."""
        found: int | None = None
        for position, statement in enumerate(body):
            line = _reads_frame(statement)
            if line is None:
                continue
            if found is not None:
                raise Refusal(
                    line, "a second pass over the frame: its pixels stream past once, do everything in one loop"
                )
            if not isinstance(statement, ast.For):
                kind = "inside `if`" if isinstance(statement, ast.If) else "outside the loop over the pixels"
                raise Refusal(
                    line, f"a pixel is read {kind}: pixels are read in one loop over the frame, at the top of frame()"
                )
            found = position
        if found is None:
            raise Refusal(
                self.scope.function.lineno,
                "no pixel is read in a loop: write the loop over the pixels, with frame[y, x] (whole-array operations such "
                "as frame.sum() are not offloaded)",
            )
        return found

    def _row_loop(self, outer: ast.For) -> None:
        position = self._pixel_loop_in_row(outer)
        inner = outer.body[position]
        assert isinstance(inner, ast.For)
        self._rows, slot, trips = self._span(outer, 0)

        def turn(final: bool = False) -> None:
            self.block(outer.body[:position])
            if final:
                self._sections.row_prologue = self._taken()
            self._column_loop(inner)
            if final:
                self._sections.body = self._taken()
            self.block(outer.body[position + 1 :])
            if final:
                self._sections.row_epilogue = self._taken()

        self._settle(outer, slot, trips, turn)

    def _pixel_loop_in_row(self, outer: ast.For) -> int:
        found: int | None = None
        for position, statement in enumerate(outer.body):
            line = _reads_frame(statement)
            if line is None:
                continue
            if found is not None:
                raise Refusal(line, "a second pass over a row: its pixels stream past once, do everything in one loop")
            if not isinstance(statement, ast.For):
                raise Refusal(
                    line, "two-dimensional frames take two loops: the one over x stands directly in the one over y"
                )
            found = position
        assert found is not None
        return found

    def _column_loop(self, inner: ast.For) -> None:
        self._columns, slot, trips = self._span(inner, 1)
        self._settle(inner, slot, trips, lambda final=False: self.turn(inner.body))

    def _span(self, node: ast.For, axis: int) -> tuple[Span, str, int]:
        """The positions that the loop goes over, proven to lie within the frame."""
        name = "y" if axis == 0 else "x"
        size = self.shape[axis if len(self.shape) == 2 else 0]
        bounds = self.range_of(node)
        if len(bounds) == 3:
            if not isinstance(bounds[2].node, Const) or bounds[2].node.lo != 1:
                refuse(
                    node, "pixels come one after the other: the step of a loop over pixels is 1 (use `if x % 2 == 0`)"
                )
            bounds = bounds[:2]
        if node.orelse or not isinstance(node.target, ast.Name):
            refuse(node, "the loop is `for NAME in range(…)`, without else")
        start, stop = (bound.node for bound in bounds)
        self.prove(
            start.lo >= 0 and stop.hi <= size,
            node.lineno,
            f"the loop over {name} may leave the frame ({name} from {start.lo} to {stop.hi - 1}, of {size}): clamp its bounds, "
            f"range(max(0, …), min(frame.shape[{axis}], …))",
        )
        counter = types.counter((start.type, stop.type))
        if counter is None:
            refuse(node, f"range() of {start.type} and {stop.type}: convert both, np.int64(…)")
        last = max(min(stop.hi, size) - 1, 0)
        first = min(max(start.lo, 0), last)
        slot = self.slot_of(node.target.id)
        self.positions[slot] = axis
        self.env = self.env.bind(slot, Known(counter, first, last))
        return Span(start, stop), slot, max(0, stop.hi - start.lo)

    def _settle(self, node: ast.For, slot: str, trips: int, turn: Callable[..., None]) -> None:
        """Bounds at the head of the loop, then its one turn for good."""
        entry = self.env
        loop = next(self._loops)
        changed = self.assigned(node.body) - {slot}
        header = loops.settled(entry, changed, loop, trips, lambda env: self.trial(env, turn))
        self.env = header
        turn(True)
        end = self.env
        self.env = loops.after(entry, header, end, changed, loop, trips)
        del self.positions[slot]
        slots = dict(self.env.slots)
        del slots[slot]
        self.env = dataclasses.replace(self.env, slots=slots)

    # -- pixels

    def pixel(self, node: ast.Subscript, indices: list[Value]) -> Value:
        if len(indices) != len(self.shape):
            refuse(
                node,
                f"frames have {len(self.shape)} dimension(s) here: frame[{'y, x' if len(self.shape) == 2 else 'x'}]",
            )
        axes = (0, 1) if len(self.shape) == 2 else (1,)
        offsets = [0, 0]
        for axis, index, size in zip(axes, indices, self.shape, strict=True):
            place = index.place
            if place is None or place.axis != axis:
                refuse(
                    node,
                    "a pixel is read at the position of the loops, or at a constant distance from it: frame[y, x], "
                    "frame[y - 1, x + 1]; rows are the outer loop",
                )
            lo, hi = index.node.lo, index.node.hi
            self.prove(
                lo >= 0 and hi < size,
                node.lineno,
                f"{ast.unparse(node)} may lie outside the frame (index {lo if lo < 0 else hi} of {size}): let the loop go over "
                f"range({max(0, -place.offset)}, frame.shape[{axis if len(self.shape) == 2 else 0}] - {max(0, place.offset)})",
            )
            offsets[axis] = place.offset
        window = self._window
        window[0], window[1] = min(window[0], offsets[0]), max(window[1], offsets[0])
        window[2], window[3] = min(window[2], offsets[1]), max(window[3], offsets[1])
        if window[1] - window[0] >= WINDOW_MAX or window[3] - window[2] >= WINDOW_MAX:
            refuse(node, f"a window has at most {WINDOW_MAX} × {WINDOW_MAX} pixels")
        pixel: Expr = Pixel(self._dtype, *types.bounds(self._dtype), *offsets)
        return Value(known_now(self.env, pixel))

    # -- what one cycle can do

    def _check_effects(self) -> None:
        sections = self._sections
        step = (*sections.row_prologue, *sections.body, *sections.row_epilogue)
        for block in (sections.prologue, step, sections.epilogue):
            _updates_once(block)
            emits = [statement for statement in statements(block) if isinstance(statement, Emit)]
            if len(emits) > EMITS_MAX:
                raise Refusal(emits[EMITS_MAX].line, f"more than {EMITS_MAX} calls of emit() in one place of the frame")


def _updates_once(block: tuple[Statement, ...]) -> set[str]:
    """Memories that may be updated on some path; raises where one may be updated twice in one cycle."""
    seen: set[str] = set()
    for statement in block:
        if isinstance(statement, Update):
            now = {statement.array}
        elif isinstance(statement, If):
            now = _updates_once(statement.then) | _updates_once(statement.other)
        else:
            continue
        again = now & seen
        if again:
            raise Refusal(
                statement.line,
                f"state.{min(again)} is updated twice for one pixel: a memory has one port, use a second array, or if/else",
            )
        seen |= now
    return seen

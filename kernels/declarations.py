"""Reads what a kernel declares in its module body: PARAMS, STATE, constants, imports and functions, without running it.

In: a syntax tree. Out: ``Declared``. Constants are evaluated by a small calculator over numbers, whose results are bounded,
because Python's own evaluation of ``9**9**9`` is not. Raises ``Violation`` with the line.
"""

from __future__ import annotations

import ast
import dataclasses
import keyword
import math
import operator
from collections.abc import Callable

import numpy as np

from kernels.contract import (
    DTYPES,
    INTEGER_DTYPES,
    MAX_PARAMS,
    MAX_STATE_ARRAYS,
    MAX_STATE_BYTES,
    MAX_STATE_NDIM,
    MERGES,
    ParamSpec,
    StateSpec,
    fits,
)
from kernels.violation import Violation, quoted

Number = int | float
Literal = Number | tuple[Number, ...]

_DTYPE_NAMES = {
    spelling: name for name in DTYPES for spelling in (name, np.dtype(name).str, np.dtype(name).str.lstrip("<|"))
}
_IMPORTS = "imports allowed: `import numpy as np`, `import math`, `from hiss import KEEP, DROP, emit`"
_LATER = {
    "OUT": "transformed frames (OUT) are not supported yet: leave it None",
    "ROWS": "appended rows (ROWS) are not supported yet: leave it None",
    "ORDERED": "ORDERED is not supported yet",
}
MAX_TABLE_ENTRIES = 256
MAX_SHIFT = 64


@dataclasses.dataclass(slots=True)
class Declared:
    """What the module body holds. ``functions`` includes frame()."""

    params: tuple[ParamSpec, ...] = ()
    state: tuple[StateSpec, ...] = ()
    constants: dict[str, Literal] = dataclasses.field(default_factory=dict)
    functions: dict[str, ast.FunctionDef] = dataclasses.field(default_factory=dict)
    seen: set[str] = dataclasses.field(default_factory=set)


def read(module: ast.Module) -> Declared:
    declared = Declared()
    for position, node in enumerate(module.body):
        if position == 0 and _is_docstring(node):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            _check_import(node)
        elif isinstance(node, ast.FunctionDef):
            _add_function(node, declared)
        elif isinstance(node, ast.Assign):
            _add_assignment(node, declared)
        else:
            raise Violation(node.lineno, f"{quoted(node)} is not allowed outside functions")
    return declared


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _check_import(node: ast.Import | ast.ImportFrom) -> None:
    names = [(alias.name, alias.asname) for alias in node.names]
    if isinstance(node, ast.Import):
        if all(name in (("numpy", "np"), ("math", None)) for name in names):
            return
    elif node.module == "hiss" and node.level == 0:
        for name, renamed in names:
            if name in ("REPLACE", "STOP"):
                raise Violation(node.lineno, f"the verdict {name} is not supported yet: KEEP and DROP are")
            if name not in ("KEEP", "DROP", "emit") or renamed is not None:
                raise Violation(node.lineno, _IMPORTS)
        return
    raise Violation(node.lineno, _IMPORTS)


def _add_function(node: ast.FunctionDef, declared: Declared) -> None:
    if node.name == "finish":
        raise Violation(node.lineno, "finish() is not supported yet")
    _claim(node.name, node, declared)
    declared.functions[node.name] = node


def _claim(name: str, node: ast.stmt, declared: Declared) -> None:
    if name.startswith("__"):
        raise Violation(node.lineno, f"the name {name!r} is not allowed")
    if name in declared.seen:
        raise Violation(node.lineno, f"{name!r} is defined twice")
    declared.seen.add(name)


def _add_assignment(node: ast.Assign, declared: Declared) -> None:
    target = node.targets[0]
    if len(node.targets) != 1 or not isinstance(target, ast.Name):
        raise Violation(node.lineno, "outside functions only `NAME = constant` is allowed")
    name = target.id
    _claim(name, node, declared)
    if name == "PARAMS":
        declared.params = _read_params(node, declared)
    elif name == "STATE":
        declared.state = _read_state(node, declared)
    elif name in _LATER:
        if name == "ORDERED" or not (isinstance(node.value, ast.Constant) and node.value.value is None):
            raise Violation(node.lineno, _LATER[name])
    else:
        declared.constants[name] = _evaluate(node.value, declared)


def _entries(node: ast.Assign, what: str) -> list[tuple[str, ast.expr]]:
    if not isinstance(node.value, ast.Dict):
        raise Violation(node.lineno, f"{what} is a dict with a name for each entry")
    entries: dict[str, ast.expr] = {}
    for key, value in zip(node.value.keys, node.value.values, strict=True):
        line = value.lineno if key is None else key.lineno
        if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
            raise Violation(line, f"a name in {what} is a string")
        name = key.value
        if not (name.isidentifier() and name.isascii()) or keyword.iskeyword(name) or name.startswith("_"):
            raise Violation(line, f"{name!r} in {what} is not a plain name")
        if len(name) > 64:
            raise Violation(line, f"a name in {what} has more than 64 characters")
        if name in entries:
            raise Violation(line, f"{name!r} is in {what} twice")
        entries[name] = value
    return list(entries.items())


def _read_params(node: ast.Assign, declared: Declared) -> tuple[ParamSpec, ...]:
    specs = []
    for name, value in _entries(node, "PARAMS"):
        if not isinstance(value, ast.Tuple) or len(value.elts) != 2:
            raise Violation(value.lineno, f'parameter {name!r} is (dtype, default), for example ("uint16", 12)')
        dtype = _dtype(value.elts[0])
        default = _number(value.elts[1], declared)
        if not fits(dtype, default):
            raise Violation(value.lineno, f"parameter {name!r}: {default!r} is not a value of {dtype}")
        specs.append(ParamSpec(name, dtype, default))
    if len(specs) > MAX_PARAMS:
        raise Violation(node.lineno, f"more than {MAX_PARAMS} parameters")
    return tuple(specs)


def _read_state(node: ast.Assign, declared: Declared) -> tuple[StateSpec, ...]:
    specs = []
    for name, value in _entries(node, "STATE"):
        if not isinstance(value, ast.Tuple) or len(value.elts) != 3:
            raise Violation(
                value.lineno, f'state {name!r} is (dtype, shape, merge), for example ("int64", (4096,), "sum")'
            )
        dtype = _dtype(value.elts[0])
        shape = _shape(name, value.elts[1], declared)
        merge = _merge(name, dtype, value.elts[2])
        specs.append(StateSpec(name, dtype, shape, merge))
    if len(specs) > MAX_STATE_ARRAYS:
        raise Violation(node.lineno, f"more than {MAX_STATE_ARRAYS} state arrays")
    if sum(spec.size_bytes for spec in specs) > MAX_STATE_BYTES:
        raise Violation(node.lineno, f"the state arrays need more than {MAX_STATE_BYTES >> 20} MiB")
    return tuple(specs)


def _shape(name: str, node: ast.expr, declared: Declared) -> tuple[int, ...]:
    if not isinstance(node, ast.Tuple):
        raise Violation(node.lineno, f"state {name!r}: the shape is a tuple, for example (4096,)")
    shape: list[int] = []
    for element in node.elts:
        size = _number(element, declared)
        if not isinstance(size, int) or not 1 <= size <= MAX_STATE_BYTES:
            raise Violation(element.lineno, f"state {name!r}: {size!r} is not a size")
        shape.append(size)
    if not 1 <= len(shape) <= MAX_STATE_NDIM:
        raise Violation(node.lineno, f"state {name!r} has 1 to {MAX_STATE_NDIM} dimensions")
    return tuple(shape)


def _merge(name: str, dtype: str, node: ast.expr) -> str:
    merge = node.value if isinstance(node, ast.Constant) else None
    if not isinstance(merge, str) or merge not in MERGES:
        raise Violation(node.lineno, f"state {name!r} merges by one of {', '.join(MERGES)}")
    if merge == "or" and dtype not in INTEGER_DTYPES:
        raise Violation(node.lineno, f"state {name!r}: 'or' merges integers, not {dtype}")
    return merge


def _dtype(node: ast.expr) -> str:
    written = node.value if isinstance(node, ast.Constant) else None
    if isinstance(written, str) and written in _DTYPE_NAMES:
        return _DTYPE_NAMES[written]
    raise Violation(node.lineno, f"a dtype is one of {', '.join(DTYPES)}, as a string")


# -- constants


def _number(node: ast.expr, declared: Declared) -> Number:
    value = _evaluate(node, declared)
    if isinstance(value, tuple):
        raise Violation(node.lineno, "a number is expected here")
    return value


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


def _evaluate(node: ast.expr, declared: Declared) -> Literal:
    value = _compute(node, declared)
    entries = value if isinstance(value, tuple) else (value,)
    if len(entries) > MAX_TABLE_ENTRIES:
        raise Violation(node.lineno, f"a constant table has at most {MAX_TABLE_ENTRIES} entries")
    if any(isinstance(entry, int) and not -(1 << 63) <= entry < 1 << 64 for entry in entries):
        raise Violation(node.lineno, "an integer constant has at most 64 bits")
    return value


def _compute(node: ast.expr, declared: Declared) -> Literal:
    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            return value
        case ast.Name(id=name) if name in declared.constants:
            return declared.constants[name]
        case ast.Attribute(value=ast.Name(id="math" | "np"), attr="pi" | "e" | "inf" | "nan" as constant):
            return float(getattr(math, constant))
        case ast.Tuple(elts=elements) if elements:
            return tuple(_number(element, declared) for element in elements)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand, declared)
        case ast.BinOp(left=left, op=op, right=right):
            return _combine(node, type(op), _number(left, declared), _number(right, declared))
        case _:
            raise Violation(node.lineno, "a constant is a number, or a tuple of numbers")


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

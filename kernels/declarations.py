"""Reads what a kernel declares in its module body, without running it: PARAMS, STATE, OUT, ROWS, ORDERED, constants, imports
and functions.

In: a syntax tree. Out: ``Declared``. Raises ``Violation`` with the line. Nothing is executed: dtypes are looked up by their
spelling, and every number goes through kernels/literals.py.
"""

from __future__ import annotations

import ast
import dataclasses
import keyword
import math

import numpy as np

from kernels import literals
from kernels.contract import (
    DEFAULT_ROWS,
    DTYPES,
    FRAME,
    FRAME_COLUMN,
    INTEGER_DTYPES,
    MAX_ARRAY_BYTES,
    MAX_FRAME_NDIM,
    MAX_OUT_BYTES,
    MAX_PARAMS,
    MAX_ROW_FIELDS,
    MAX_ROWS,
    MAX_STATE_ARRAYS,
    MAX_STATE_BYTES,
    MAX_STATE_NDIM,
    MERGES,
    SAME,
    VERDICTS,
    ArraySpec,
    OutSpec,
    ParamSpec,
    RowsSpec,
    StateSpec,
    fits,
)
from kernels.literals import Literal
from kernels.violation import Violation, quoted

IMPORTABLE = frozenset((*VERDICTS, "emit", "append"))
"""Names of the module ``hiss``: they are there without an import, the line is for the editor."""
ANY_SIZE = -1

_DTYPE_NAMES = {
    spelling: name for name in DTYPES for spelling in (name, np.dtype(name).str, np.dtype(name).str.lstrip("<|"))
}
_IMPORTS = (
    "imports allowed: `import numpy as np`, `import math`, `from hiss import KEEP, DROP, REPLACE, STOP, emit, append`"
)
_OUT_FORMS = '("same", "same"), (dtype, "same") or (dtype, shape), for example ("float32", (256, 256))'


@dataclasses.dataclass(slots=True)
class Declared:
    """What the module body holds. ``functions`` includes frame() and finish()."""

    params: tuple[ParamSpec, ...] = ()
    arrays: tuple[ArraySpec, ...] = ()
    state: tuple[StateSpec, ...] = ()
    out: OutSpec | None = None
    rows: RowsSpec | None = None
    ordered: bool = False
    constants: dict[str, Literal] = dataclasses.field(default_factory=dict)
    functions: dict[str, ast.FunctionDef] = dataclasses.field(default_factory=dict)
    lines: dict[str, int] = dataclasses.field(default_factory=dict)
    """Where each name is defined."""


def read(module: ast.Module) -> Declared:
    declared = Declared()
    for position, node in enumerate(module.body):
        if position == 0 and _is_docstring(node):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            _check_import(node)
        elif isinstance(node, ast.FunctionDef):
            _claim(node.name, node, declared)
            declared.functions[node.name] = node
        elif isinstance(node, ast.Assign):
            _add_assignment(node, declared)
        else:
            raise Violation(node.lineno, f"{quoted(node)} is not allowed outside functions")
    _add_rows_limit(declared)
    return declared


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _check_import(node: ast.Import | ast.ImportFrom) -> None:
    names = [(alias.name, alias.asname) for alias in node.names]
    if isinstance(node, ast.Import):
        allowed = all(name in (("numpy", "np"), ("math", None)) for name in names)
    else:
        known = all(name in IMPORTABLE and renamed is None for name, renamed in names)
        allowed = node.module == "hiss" and node.level == 0 and known
    if not allowed:
        raise Violation(node.lineno, _IMPORTS)


def _claim(name: str, node: ast.stmt, declared: Declared) -> None:
    if name.startswith("__"):
        raise Violation(node.lineno, f"the name {name!r} is not allowed")
    if name in declared.lines:
        raise Violation(node.lineno, f"{name!r} is defined twice")
    declared.lines[name] = node.lineno


def _add_assignment(node: ast.Assign, declared: Declared) -> None:
    target = node.targets[0]
    if len(node.targets) != 1 or not isinstance(target, ast.Name):
        raise Violation(node.lineno, "outside functions only `NAME = constant` is allowed")
    name = target.id
    _claim(name, node, declared)
    match name:
        case "PARAMS":
            _read_params(node, declared)
        case "STATE":
            declared.state = _read_state(node, declared)
        case "OUT":
            declared.out = None if _is_none(node.value) else _read_out(node, declared)
        case "ROWS":
            declared.rows = None if _is_none(node.value) else _read_rows(node)
        case "ORDERED":
            declared.ordered = _flag(node)
        case _:
            # ROWS_MAX is an ordinary constant that _add_rows_limit reads once ROWS is known.
            declared.constants[name] = literals.evaluate(node.value, declared.constants)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _flag(node: ast.Assign) -> bool:
    value = node.value.value if isinstance(node.value, ast.Constant) else None
    if not isinstance(value, bool):
        raise Violation(node.lineno, "ORDERED is True or False")
    return value


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


def _read_params(node: ast.Assign, declared: Declared) -> None:
    scalars: list[ParamSpec] = []
    arrays: list[ArraySpec] = []
    for name, value in _entries(node, "PARAMS"):
        if not isinstance(value, ast.Tuple) or len(value.elts) != 2:
            raise Violation(
                value.lineno,
                f'parameter {name!r} is (dtype, default) or (dtype, shape), for example ("uint16", 12), '
                '("uint8", "frame") or ("float32", (195, 487))',
            )
        dtype = _dtype(value.elts[0])
        given = value.elts[1]
        if isinstance(given, ast.Constant) and isinstance(given.value, str):
            if given.value != FRAME:
                raise Violation(given.lineno, f'parameter {name!r}: the shape is a tuple, or "{FRAME}" for a frame\'s')
            arrays.append(ArraySpec(name, dtype, None))
            continue
        default = literals.evaluate(given, declared.constants)
        if isinstance(default, tuple):
            arrays.append(ArraySpec(name, dtype, _shape(f"parameter {name!r}", given, declared, any_size=True)))
            continue
        if not fits(dtype, default):
            raise Violation(value.lineno, f"parameter {name!r}: {default!r} is not a value of {dtype}")
        scalars.append(ParamSpec(name, dtype, default))
    if len(scalars) + len(arrays) > MAX_PARAMS:
        raise Violation(node.lineno, f"more than {MAX_PARAMS} parameters")
    if sum(_known_bytes(spec) for spec in arrays) > MAX_ARRAY_BYTES:
        raise Violation(node.lineno, f"the arrays of PARAMS need more than {MAX_ARRAY_BYTES >> 20} MiB")
    declared.params, declared.arrays = tuple(scalars), tuple(arrays)


def _known_bytes(spec: ArraySpec) -> int:
    """At least this many; what depends on the frame or on the upload is checked when the array is there."""
    return math.prod(max(size, 1) for size in spec.shape or ()) * np.dtype(spec.dtype).itemsize


def _read_state(node: ast.Assign, declared: Declared) -> tuple[StateSpec, ...]:
    specs = []
    for name, value in _entries(node, "STATE"):
        if not isinstance(value, ast.Tuple) or len(value.elts) != 3:
            raise Violation(
                value.lineno, f'state {name!r} is (dtype, shape, merge), for example ("int64", (4096,), "sum")'
            )
        dtype = _dtype(value.elts[0])
        shape = _shape(f"state {name!r}", value.elts[1], declared)
        merge = _merge(name, dtype, value.elts[2])
        specs.append(StateSpec(name, dtype, shape, merge))
    if len(specs) > MAX_STATE_ARRAYS:
        raise Violation(node.lineno, f"more than {MAX_STATE_ARRAYS} state arrays")
    if sum(spec.size_bytes for spec in specs) > MAX_STATE_BYTES:
        raise Violation(node.lineno, f"the state arrays need more than {MAX_STATE_BYTES >> 20} MiB")
    return tuple(specs)


def _read_out(node: ast.Assign, declared: Declared) -> OutSpec:
    if not isinstance(node.value, ast.Tuple) or len(node.value.elts) != 2:
        raise Violation(node.lineno, f"OUT is None, {_OUT_FORMS}")
    written_dtype, written_shape = node.value.elts
    dtype = None if _is_same(written_dtype) else _dtype(written_dtype, f'"{SAME}"')
    if _is_same(written_shape):
        return OutSpec(dtype, None)
    if dtype is None:
        raise Violation(node.lineno, f"OUT with a shape of its own names its dtype: {_OUT_FORMS}")
    if isinstance(written_shape, ast.Constant) and isinstance(written_shape.value, str):
        raise Violation(written_shape.lineno, f"OUT is None, {_OUT_FORMS}")
    shape = _shape("OUT", written_shape, declared)
    if len(shape) > MAX_FRAME_NDIM or math.prod(shape) * np.dtype(dtype).itemsize > MAX_OUT_BYTES:
        raise Violation(node.lineno, f"OUT has more than {MAX_OUT_BYTES >> 20} MiB")
    return OutSpec(dtype, shape)


def _is_same(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value == SAME


def _read_rows(node: ast.Assign) -> RowsSpec:
    fields = []
    for name, value in _entries(node, "ROWS"):
        if name == FRAME_COLUMN:
            raise Violation(value.lineno, f"every table of rows has a column {FRAME_COLUMN!r} already")
        fields.append((name, _dtype(value)))
    if not 1 <= len(fields) <= MAX_ROW_FIELDS:
        raise Violation(node.lineno, f"ROWS has 1 to {MAX_ROW_FIELDS} fields")
    return RowsSpec(tuple(fields), DEFAULT_ROWS)


def _add_rows_limit(declared: Declared) -> None:
    most = declared.constants.get("ROWS_MAX")
    if most is None:
        return
    line = declared.lines["ROWS_MAX"]
    if declared.rows is None:
        raise Violation(line, 'ROWS_MAX needs ROWS, for example ROWS = {"x": "float32", "y": "float32"}')
    if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= MAX_ROWS:
        raise Violation(line, f"ROWS_MAX, the most rows a frame appends, is a whole number from 1 to {MAX_ROWS}")
    declared.rows = dataclasses.replace(declared.rows, most=most)


def _shape(what: str, node: ast.expr, declared: Declared, *, any_size: bool = False) -> tuple[int, ...]:
    """``any_size``: a size may be -1."""
    written = literals.evaluate(node, declared.constants) if isinstance(node, ast.Tuple | ast.Name) else None
    if not isinstance(written, tuple):
        raise Violation(node.lineno, f"{what}: the shape is a tuple, for example (4096,)")
    elements = node.elts if isinstance(node, ast.Tuple) else [node] * len(written)
    shape: list[int] = []
    for size, element in zip(written, elements, strict=True):
        in_range = isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= MAX_ARRAY_BYTES
        if not in_range and not (any_size and size == ANY_SIZE):
            raise Violation(element.lineno, f"{what}: {size!r} is not a size")
        assert isinstance(size, int)
        shape.append(size)
    if not 1 <= len(shape) <= MAX_STATE_NDIM:
        raise Violation(node.lineno, f"{what} has 1 to {MAX_STATE_NDIM} dimensions")
    return tuple(shape)


def _merge(name: str, dtype: str, node: ast.expr) -> str:
    merge = node.value if isinstance(node, ast.Constant) else None
    if not isinstance(merge, str) or merge not in MERGES:
        raise Violation(node.lineno, f"state {name!r} merges by one of {', '.join(MERGES)}")
    if merge == "or" and dtype not in INTEGER_DTYPES:
        raise Violation(node.lineno, f"state {name!r}: 'or' merges integers, not {dtype}")
    return merge


def _dtype(node: ast.expr, other: str = "") -> str:
    written = node.value if isinstance(node, ast.Constant) else None
    if isinstance(written, str) and written in _DTYPE_NAMES:
        return _DTYPE_NAMES[written]
    alternative = f", or {other}" if other else ""
    raise Violation(node.lineno, f"a dtype is one of {', '.join(DTYPES)}, as a string{alternative}")

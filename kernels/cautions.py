"""What compiles and is probably not meant: integers that silently become float64. Runs inside the sandbox only.

In: functions that numba has compiled, with the types it found. Out: (line, text) for each place where uint64 meets a signed
integer and the result is float64, which is exact up to 2**53 only: ``min(value, 5)`` and ``value if good else 0`` with a
uint64 value do so, in numba as in numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from numba.core import ir
from numba.core import types as numba_types

from kernels.explain import FOLDER

_TEXT = "uint64 and a signed integer make float64 here, exact up to 2**53 only: convert with np.int64(…) first"


def of(function: Any) -> list[tuple[int, str]]:
    """``function``: a dispatcher, compiled at least once."""
    lines = {line for overload in function.overloads.values() for line in _mixtures(overload.type_annotation)}
    return [(line, _TEXT) for line in sorted(lines)]


def _mixtures(annotation: Any) -> Iterator[int]:
    types = annotation.typemap
    assigned: dict[str, list[tuple[Any, int]]] = {}
    for block in annotation.blocks.values():
        for statement in block.body:
            if not isinstance(statement, ir.Assign) or FOLDER not in str(statement.loc.filename):
                continue
            if types.get(statement.target.name) != numba_types.float64:
                continue
            value = statement.value
            if isinstance(value, ir.Var):
                assigned.setdefault(statement.target.name, []).append((types.get(value.name), statement.loc.line))
            elif isinstance(value, ir.Expr) and value.op == "call":
                if _mixed([types.get(argument.name) for argument in value.args]):
                    yield statement.loc.line
    for sources in assigned.values():
        if _mixed([source for source, _ in sources]):
            yield next(line for source, line in sources if _is_uint64(source))


def _mixed(types: list[Any]) -> bool:
    integers = [kind for kind in types if isinstance(kind, numba_types.Integer | numba_types.IntegerLiteral)]
    return (
        len(integers) == len(types)
        and any(_is_uint64(kind) for kind in integers)
        and any(_is_signed(kind) for kind in integers)
    )


def _is_uint64(kind: Any) -> bool:
    return bool(kind == numba_types.uint64)


def _is_signed(kind: Any) -> bool:
    return bool(getattr(kind, "literal_type", kind).signed)

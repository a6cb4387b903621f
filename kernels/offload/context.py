"""What expressions see of the walk over a kernel: what is known, where names live, and how to refuse.

``Value`` is what an expression becomes. ``refuse`` ends the walk with the line.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Mapping
from typing import NoReturn, Protocol

from kernels.contract import StateSpec
from kernels.literals import Literal
from kernels.offload.domain import Env, Origin, Place
from kernels.offload.ir import Expr, Refusal

FLOAT = "an FPGA core works in integers: {what}. Scale to integers (e.g. fixed point by a shift)"


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    node: Expr
    origin: Origin | None = None
    place: Place | None = None


@dataclasses.dataclass(slots=True)
class Scope:
    """One function that is being carried out. ``slots``: where its names live; a frame's own live under their own name."""

    function: ast.FunctionDef
    slots: dict[str, str]


class Context(Protocol):
    """The builder, as expressions see it."""

    env: Env
    scope: Scope
    literals: Mapping[str, Literal]
    params: Mapping[str, str]
    """Scalar parameters and their dtypes."""
    arrays: frozenset[str]
    """Parameters that are arrays."""
    state: Mapping[str, StateSpec]
    registers: frozenset[str]
    shape: tuple[int, ...]
    positions: dict[str, int]
    """The variables of the pixel loops that are open, and their axes."""

    def prove(self, holds: bool, line: int, reason: str) -> None:
        """Refuse unless it holds under the bounds that will stand in the end."""
        ...

    def pixel(self, node: ast.Subscript, indices: list[Value]) -> Value: ...
    def call(self, node: ast.Call, name: str) -> Value | None: ...
    def conditionally(self, env: Env | None, work: Callable[[], Value]) -> Value:
        """Under ``env``; functions with effects are refused there."""
        ...


def refuse(node: ast.expr | ast.stmt, reason: str) -> NoReturn:
    raise Refusal(node.lineno, reason)

"""What a walk over a kernel carries along: what is known, the IR so far, and trials that leave nothing behind.

``Walker.env`` is what holds at the point reached; it is gone where every path has ended. A trial carries something out to see
what would hold afterwards: bounds are not final then, so nothing is refused for them.
"""

from __future__ import annotations

import abc
import ast
from collections.abc import Callable, Mapping

from kernels.contract import StateSpec
from kernels.literals import Literal
from kernels.offload import types
from kernels.offload.context import Scope, Value
from kernels.offload.domain import Env, Known
from kernels.offload.ir import Assign, Refusal, Slot, Statement

STATEMENTS_MAX = 4000
"""Statements carried out in all, unrolled and repeated ones too: bounds the time to decide and the size of the core."""


class Walker(abc.ABC):
    """Implements ``Context`` but for calls and pixels."""

    def __init__(
        self,
        functions: Mapping[str, ast.FunctionDef],
        literals: Mapping[str, Literal],
        params: Mapping[str, str],
        arrays: frozenset[str],
        state: Mapping[str, StateSpec],
        registers: frozenset[str],
        shape: tuple[int, ...],
    ) -> None:
        self.literals = literals
        self.params = params
        self.arrays = arrays
        self.state = state
        self.registers = registers
        self.shape = shape
        self.positions: dict[str, int] = {}
        self.out: list[Statement] = []
        self.slots: dict[str, Slot] = {}
        self.scope = Scope(functions["frame"], {})
        self._functions = functions
        self._env: Env | None = Env({})
        self._trials = 0
        self._conditional = 0
        self._serial = 0
        self._budget = STATEMENTS_MAX
        self._depth = 0
        self._ends: list[Env] | None = None
        """Where paths of the helper at hand have returned; None in frame()."""
        self._skips: list[Env] | None = None
        """Where paths of the loop at hand have continued."""
        self.may_return = False
        self._result = ""
        self.turning = 0
        """Loops that are open."""

    # -- what is known

    @property
    def env(self) -> Env:
        assert self._env is not None, "nothing is carried out after the end of a path"
        return self._env

    @env.setter
    def env(self, env: Env) -> None:
        self._env = env

    @property
    def ended(self) -> bool:
        return self._env is None

    def prove(self, holds: bool, line: int, reason: str) -> None:
        if not holds and not self._trials:
            raise Refusal(line, reason)

    def conditionally(self, env: Env | None, work: Callable[[], Value]) -> Value:
        before = self._env
        self._env = env if env is not None else before
        self._conditional += 1
        self._trials += env is None
        try:
            return work()
        finally:
            self._trials -= env is None
            self._conditional -= 1
            self._env = before

    def trial(self, env: Env, work: Callable[[], None]) -> Env:
        """What holds after ``work`` under ``env``; nothing of it stays."""
        kept = (self._env, self.out, self._budget, self._ends, self._skips, self.turning)
        self._env, self.out = env, []
        self._ends = None if self._ends is None else []
        self._skips = None if self._skips is None else []
        self._trials += 1
        try:
            work()
            # Every path ended (continue is none): the loop has no second turn that adds anything.
            return self._env if self._env is not None else env
        finally:
            self._trials -= 1
            self._env, self.out, self._budget, self._ends, self._skips, self.turning = kept

    def fresh(self, name: str) -> str:
        self._serial += 1
        return f"{name}.{self._serial}"

    def slot_of(self, name: str) -> str:
        slots = self.scope.slots
        if name not in slots:
            slots[name] = name if self._ends is None else self.fresh(name)
        return slots[name]

    def assign(self, line: int, slot: str, value: Value) -> None:
        node = value.node
        if slot in self.positions:
            raise Refusal(line, f"{slot!r} is the position of the pixel and cannot be assigned to in its loop")
        self.env = self.env.bind(slot, Known(node.type, node.lo, node.hi, value.origin, value.place))
        self.out.append(Assign(line, slot, node))
        if not self._trials:
            before = self.slots.get(slot)
            now = Slot(slot, node.type == types.BOOL, node.lo, node.hi)
            if before is not None:
                now = Slot(slot, before.is_bool and now.is_bool, min(before.lo, now.lo), max(before.hi, now.hi))
            self.slots[slot] = now

    @abc.abstractmethod
    def call(self, node: ast.Call, name: str) -> Value | None:
        """A call by name; None where it has no value."""

    @abc.abstractmethod
    def pixel(self, node: ast.Subscript, indices: list[Value]) -> Value:
        """An element of the frame."""

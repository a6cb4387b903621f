"""Statements of a kernel → IR, in one walk over the syntax tree that carries what is known along.

In: blocks of the syntax tree. Out: IR statements in ``Walk.out``; ``Walk.env`` holds afterwards, or is None where every path
has ended (a verdict, ``continue``, the return of a helper). What follows an ``if`` in which some path ends is carried out
once in each branch that goes on, so that the IR needs no jumps. Loops of constant range are unrolled, the file's own
functions carried out in place. Raises ``Refusal`` with the line.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from kernels.contract import DROP, KEEP, STOP, StateSpec
from kernels.literals import Literal
from kernels.offload import arithmetic, types
from kernels.offload.context import Scope, Value, refuse
from kernels.offload.domain import Broken, Env, Known, as_typed, assume, joined
from kernels.offload.ir import Const, Emit, Expr, If, Refusal, Statement, Store, Update, Verdict
from kernels.offload.operators import binary
from kernels.offload.values import dimension, element, evaluate, evaluate_condition
from kernels.offload.walk import STATEMENTS_MAX, Walker

UNROLLED_MAX = 64
"""Turns of a constant loop."""
HELPERS_DEEP_MAX = 8

_UPDATES: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.BitAnd: "and",
    ast.BitOr: "or",
    ast.BitXor: "xor",
}


class Walk(Walker):
    """Carries out statements, loops of constant range and the file's functions."""

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
        super().__init__(functions, literals, params, arrays, state, registers, shape)
        self._handlers: dict[type[ast.stmt], Callable[[Any], None]] = {
            ast.Pass: self._pass,
            ast.Expr: self._expression,
            ast.Assign: self._assign_statement,
            ast.AugAssign: self._augmented,
            ast.If: lambda node: self._branch(node, ()),
            ast.For: self._for,
            ast.Return: self._return,
            ast.Continue: self._continue,
            ast.Break: self._leave,
            ast.While: self._while,
        }

    # -- blocks

    def block(self, body: Sequence[ast.stmt]) -> None:
        for position, statement in enumerate(body):
            if self.ended:
                return
            if isinstance(statement, ast.If) and _leaves(statement):
                rest = body[position + 1 :]
                self._branch(statement, rest)
                return
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        self._budget -= 1
        if self._budget < 0:
            raise Refusal(
                node.lineno, f"too large for a core: more than {STATEMENTS_MAX} statements once loops are unrolled"
            )
        handler = self._handlers.get(type(node))
        if handler is None:
            refuse(node, "this statement is not available on an FPGA")
        handler(node)

    def _pass(self, node: ast.Pass) -> None:
        """Nothing to do."""

    def _expression(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self._call_statement(node.value)

    def _assign_statement(self, node: ast.Assign) -> None:
        if len(node.targets) != 1:
            refuse(node, "assign to one name at a time")
        self._assignment(node, node.targets[0], node.value)

    def _continue(self, node: ast.Continue) -> None:
        if self._skips is None:
            self._leave(node)
        self._skips.append(self.env)
        self._env = None

    def _leave(self, node: ast.Break | ast.Continue) -> NoReturn:
        refuse(node, "every pixel streams past: a loop cannot be left early (use if)")

    def _while(self, node: ast.While) -> NoReturn:
        refuse(node, "a loop whose end depends on data cannot keep pace with the stream: only `for … in range(…)`")

    def _branch(self, node: ast.If, rest: Sequence[ast.stmt]) -> None:
        test = evaluate_condition(self, node.test)
        before, outer = self.env, self.out
        ways: list[tuple[list[Statement], Env | None]] = []
        never: list[Env] = []
        for holds, body in ((True, node.body), (False, node.orelse)):
            self._env, self.out = assume(before, test, holds), []
            if self._env is not None or _leaves(node):
                self._env = self._env or before
                self.block([*body, *rest])
            else:
                never.append(self.trial(before, lambda body=body: self.block(body)))  # type: ignore[misc]
            ways.append((self.out, self._env))
        self.out = outer
        (then, after_then), (other, after_other) = ways
        self._env = joined(after_then, after_other)
        for env in never:
            self._env = as_typed(self.env, env)
        if isinstance(test, Const):
            self.out.extend(then if test.lo else other)
        elif then or other:
            self.out.append(If(node.lineno, test, tuple(then), tuple(other)))

    # -- assignments

    def _assignment(self, node: ast.Assign, target: ast.expr, value: ast.expr) -> None:
        match target, value:
            case ast.Name(id=name), _:
                self.assign(node.lineno, self.slot_of(name), evaluate(self, value))
            case ast.Tuple(elts=targets), ast.Attribute(value=ast.Name(id="frame"), attr="shape"):
                if len(targets) != len(self.shape):
                    refuse(node, f"frames have {len(self.shape)} dimension(s) here")
                for axis, entry_target in enumerate(targets):
                    entry = ast.copy_location(ast.Subscript(value, ast.Constant(axis), ast.Load()), node)
                    size = dimension(self, ast.fix_missing_locations(entry))
                    assert size is not None
                    self._to_name(node, entry_target, size)
            case ast.Tuple(elts=targets), ast.Tuple(elts=entries) if len(targets) == len(entries):
                values = [evaluate(self, entry) for entry in entries]
                aside = [self.fresh("aside") for _ in values]
                for slot, entry_value in zip(aside, values, strict=True):
                    self.assign(node.lineno, slot, entry_value)
                for entry_target, slot in zip(targets, aside, strict=True):
                    self._to_name(node, entry_target, self._held(slot))
            case ast.Subscript(), _:
                self._store(node, target, value)
            case _:
                refuse(node, "assign to a name or to an element of a state array")

    def _held(self, slot: str) -> Value:
        name = self.fresh("held")
        self.scope.slots[name] = slot
        return evaluate(self, ast.Name(name, ast.Load(), lineno=1, col_offset=0))

    def _to_name(self, node: ast.stmt, target: ast.expr, value: Value) -> None:
        if not isinstance(target, ast.Name):
            refuse(node, "assign to names here")
        self.assign(node.lineno, self.slot_of(target.id), value)

    def _augmented(self, node: ast.AugAssign) -> None:
        load = ast.copy_location(
            ast.Name(node.target.id, ast.Load()) if isinstance(node.target, ast.Name) else node.target, node
        )
        if isinstance(node.target, ast.Name):
            value = binary(self, node.op, evaluate(self, load), evaluate(self, node.value), node.lineno)
            self.assign(node.lineno, self.slot_of(node.target.id), value)
            return
        array = self._array(node.target, node)
        if array.name in self.registers:
            assert isinstance(node.target, ast.Subscript)
            value = binary(self, node.op, evaluate(self, load), evaluate(self, node.value), node.lineno)
            self._write(node, array, node.target, value.node)
        else:
            assert isinstance(node.target, ast.Subscript)
            op = _UPDATES.get(type(node.op))
            if op is None:
                refuse(
                    node,
                    f"a memory is updated by += -= &= |= ^= or by min and max of itself, not by {ast.unparse(node)}",
                )
            self._update(node, array, node.target, op, evaluate(self, node.value).node)

    def _array(self, target: ast.expr, node: ast.stmt) -> StateSpec:
        match target:
            case ast.Subscript(value=ast.Attribute(value=ast.Name(id="state"), attr=name)):
                spec = self.state[name]
                if spec.dtype not in types.INTEGERS:
                    refuse(node, f"an FPGA core works in integers: state.{name} is {spec.dtype}")
                return spec
            case ast.Subscript(value=ast.Name(id="out")):
                refuse(node, "transformed frames (out) are not offloaded")
            case _:
                refuse(node, "assign to a name or to an element of a state array")

    def _store(self, node: ast.Assign, target: ast.Subscript, value: ast.expr) -> None:
        array = self._array(target, node)
        if array.name in self.registers:
            self._write(node, array, target, evaluate(self, value).node)
            return
        op, operand = _pattern(target, value)
        self._update(node, array, target, op, evaluate(self, operand).node)

    def _write(self, node: ast.stmt, array: StateSpec, target: ast.Subscript, value: Expr) -> None:
        self._effect(node)
        self.out.append(
            Store(node.lineno, array.name, element(self, target, array), arithmetic.wrapped(value, array.dtype))
        )

    def _update(self, node: ast.stmt, array: StateSpec, target: ast.Subscript, op: str, value: Expr) -> None:
        self._effect(node)
        value = arithmetic.number(value)
        if op in ("min", "max"):
            unified = types.unified(array.dtype, value.type)
            if unified is None:
                refuse(node, f"{op}() of {array.dtype} and {value.type} is float64 in numba: convert, e.g. np.int64(…)")
            value = arithmetic.wrapped(value, unified)
        else:
            value = arithmetic.wrapped(value, array.dtype)
        self.out.append(Update(node.lineno, array.name, element(self, target, array), op, value))

    def _effect(self, node: ast.stmt | ast.expr) -> None:
        if self._conditional:
            refuse(
                node,
                "a function that changes state or emits is called in a statement of its own, not inside a condition",
            )

    # -- loops of constant range

    def _for(self, node: ast.For) -> None:
        """Unrolled: the same statements again and again, with the variable as a constant."""
        bounds = [value.node for value in self.range_of(node)]
        if not all(isinstance(bound, Const) or bound.lo == bound.hi for bound in bounds):
            refuse(
                node,
                "the number of turns depends on data: only the loops over the frame's pixels, and short loops between "
                "constants, can be offloaded",
            )
        turns = range(*(bound.lo for bound in bounds))
        if len(turns) > UNROLLED_MAX:
            refuse(
                node,
                f"{len(turns)} turns: a loop inside a frame has at most {UNROLLED_MAX}, because each becomes hardware",
            )
        name = types.counter(tuple(bound.type for bound in bounds))
        if name is None or not isinstance(node.target, ast.Name) or node.orelse:
            refuse(node, "the loop is `for NAME in range(…)`, without else, with bounds of one type")
        slot = self.slot_of(node.target.id)
        changed = self.assigned(node.body)
        if turns:
            self._retype(changed, slot, Known(name, turns[0], turns[0], fixed=True), node)
        for turn in turns:
            self.env = self.env.bind(slot, Known(name, turn, turn, fixed=True))
            self.turn(node.body)
        self.env = self.env.bind(slot, Broken(f"{node.target.id!r} is used after its loop"))

    def turn(self, body: Sequence[ast.stmt]) -> None:
        outer, self._skips = self._skips, []
        self.turning += 1
        self.block(body)
        self.turning -= 1
        for env in self._skips:
            self._env = joined(self._env, env)
        self._skips = outer
        if self._env is None:
            raise Refusal(body[0].lineno, "a loop cannot be left from inside: use if")

    def _retype(self, changed: set[str], slot: str, known: Known, node: ast.For) -> None:
        """numba joins a variable's types over all turns: give them the joined type before the first."""
        while True:
            end = self.trial(self.env.bind(slot, known), lambda: self.turn(node.body))
            slots = dict(self.env.slots)
            for name in changed:
                before, last = slots.get(name), end.slots.get(name)
                if not isinstance(before, Known) or not isinstance(last, Known):
                    continue
                unified = types.unified(before.type, last.type)
                if unified is None:
                    slots[name] = Broken(
                        f"{name.split('.')[0]!r} starts as {before.type} and becomes {last.type} in the loop, which numba makes "
                        f"float64: start it as np.{last.type}(…), or convert what is assigned"
                    )
                elif unified != before.type:
                    slots[name] = dataclasses.replace(before, type=unified)
            if slots == self.env.slots:
                return
            self.env = Env(slots, self.env.facts)

    def range_of(self, node: ast.For) -> list[Value]:
        match node.iter:
            case ast.Call(func=ast.Name(id="range"), args=arguments) if 1 <= len(arguments) <= 3:
                values = [evaluate(self, argument) for argument in arguments]
            case _:
                refuse(node, "a loop goes over range(…)")
        zero = Value(arithmetic.const(0))
        return [zero, *values] if len(values) == 1 else values

    def assigned(self, body: Sequence[ast.stmt]) -> set[str]:
        """Slots that the block may assign, in this scope."""
        names = {
            node.id
            for statement in body
            for node in ast.walk(statement)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        return {self.slot_of(name) for name in names}

    # -- functions, verdicts, feedback

    def call(self, node: ast.Call, name: str) -> Value | None:
        """Carry out a function of the file in place."""
        function = self._functions.get(name)
        if function is None:
            refuse(node, f"{name}() is not available on an FPGA")
        if self._depth == HELPERS_DEEP_MAX:
            refuse(node, "functions call each other too deeply")
        slots: dict[str, str] = {}
        for argument, parameter in zip(node.args, (a.arg for a in function.args.args), strict=True):
            if isinstance(argument, ast.Name) and argument.id in ("params", "state", "feedback", "frame", "out"):
                if argument.id in ("frame", "out") or argument.id != parameter:
                    refuse(node, f"{argument.id} cannot be handed to a function here: hand over the pixel's value")
                continue
            slots[parameter] = self.fresh(parameter)
            self.assign(node.lineno, slots[parameter], evaluate(self, argument))
        caller = (self.scope, self._ends, self._skips, self._result, self.turning)
        self.scope, self._ends, self._skips, self.turning = Scope(function, slots), [], None, 0
        self._result = self.fresh(name)
        result = self._result
        self._depth += 1
        try:
            body = function.body
            self.block(body)
            for env in self._ends:
                self._env = joined(self._env, env)
        finally:
            self._depth -= 1
            self.scope, self._ends, self._skips, self._result, self.turning = caller
        return self._held(result) if result in self.env.slots else None

    def _call_statement(self, node: ast.Call) -> None:
        match node.func:
            case ast.Name(id="emit"):
                self._effect(node)
                code, value = (evaluate(self, argument).node for argument in node.args[1:])
                number = arithmetic.number(value)
                self.out.append(Emit(node.lineno, arithmetic.wrapped(code, types.INT64), number))
            case ast.Name(id="append"):
                refuse(node, "rows (append) are not offloaded: emit single values, or count in state arrays")
            case ast.Name(id=name) if name in self._functions:
                self.call(node, name)
            case _:
                refuse(node, "this call has no effect on an FPGA")

    def _return(self, node: ast.Return) -> None:
        value = node.value
        if self.turning:
            refuse(node, "every pixel streams past: a loop cannot be left early, decide after it")
        if self._ends is not None:
            if value is not None:
                self.assign(node.lineno, self._result, evaluate(self, value))
            self._ends.append(self.env)
            self._env = None
            return
        if not self.may_return or value is None:
            refuse(
                node,
                "the verdict is given after the frame has streamed past: return once, after the loop over the pixels",
            )
        verdict = arithmetic.number(evaluate(self, value).node)
        allowed = (DROP <= verdict.lo and verdict.hi <= KEEP) or verdict.lo == verdict.hi == STOP
        self.prove(allowed, node.lineno, "the verdict must be KEEP, DROP or STOP (or a comparison), whatever the data")
        self.out.append(Verdict(node.lineno, verdict))
        self._env = None


def _leaves(node: ast.If) -> bool:
    """Whether some path in it ends (not counting loops inside, which have their own ``continue``)."""

    def inside(body: Sequence[ast.stmt], *, in_loop: bool) -> bool:
        for statement in body:
            if isinstance(statement, ast.Return) or (isinstance(statement, ast.Continue) and not in_loop):
                return True
            if isinstance(statement, ast.If) and (
                inside(statement.body, in_loop=in_loop) or inside(statement.orelse, in_loop=in_loop)
            ):
                return True
            if isinstance(statement, ast.For) and inside(statement.body, in_loop=True):
                return True
        return False

    return inside(node.body, in_loop=False) or inside(node.orelse, in_loop=False)


def _pattern(target: ast.Subscript, value: ast.expr) -> tuple[str, ast.expr]:
    """``m[i] = min(m[i], v)``, ``m[i] = m[i] + v`` and so on as an update; anything else replaces the element."""
    same = ast.dump(ast.Subscript(target.value, target.slice, ast.Load()))
    match value:
        case ast.Call(func=ast.Name(id="min" | "max" as op), args=[left, right]):
            if ast.dump(left) == same:
                return op, right
            if ast.dump(right) == same:
                return op, left
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _UPDATES:
            if ast.dump(left) == same:
                return _UPDATES[type(operator)], right
            if ast.dump(right) == same and not isinstance(operator, ast.Sub):
                return _UPDATES[type(operator)], left
    return "set", value

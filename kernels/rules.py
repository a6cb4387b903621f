"""What the functions of a kernel may say: an allow-list over statements, expressions, names, calls and attributes.

In: the functions and declarations of one module. Out: nothing, or ``Violation`` with the line. The lists are the language
that a scientist may use; each entry is something that numba compiles under the lock-down (no lazy imports, no BLAS) and
that the sandbox's driver can pass along.
"""

from __future__ import annotations

import ast
from typing import NoReturn

from kernels.contract import ARGUMENTS, DTYPES, FINISH_ARGUMENTS, VERDICTS
from kernels.declarations import IMPORTABLE, Declared
from kernels.violation import Violation, quoted

BUILTINS = frozenset("abs bool divmod enumerate float int len max min pow range round sum zip".split())

_NP_TYPES = frozenset((*DTYPES, "bool_"))
_NP_CALLS = _NP_TYPES | frozenset(
    """
    abs absolute all any arange arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort bincount
    bitwise_and bitwise_or bitwise_xor ceil clip copy cos cosh count_nonzero cumsum deg2rad diff empty empty_like exp
    expm1 fabs floor floor_divide fmod full full_like histogram hypot invert isfinite isinf isnan left_shift linspace log
    log10 log1p log2 logical_and logical_not logical_or max maximum mean median min minimum mod nanmax nanmean nanmin
    nansum nonzero ones ones_like percentile power prod rad2deg ravel remainder right_shift rint round searchsorted sign
    sin sinh sort sqrt square std sum tan tanh trunc unique var where zeros zeros_like
    """.split()
)
_NP_VALUES = _NP_TYPES | frozenset(("pi", "e", "inf", "nan"))
_MATH_CALLS = frozenset(
    """
    acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh degrees erf erfc exp expm1 fabs floor fmod hypot isfinite
    isinf isnan log log10 log1p log2 pow radians sin sinh sqrt tan tanh trunc
    """.split()
)
_MATH_VALUES = frozenset(("pi", "e", "inf", "nan"))
_ARRAY_CALLS = frozenset("all any argmax argmin astype copy fill flatten max mean min ravel reshape sum".split())
_ARRAY_VALUES = frozenset(("shape", "size", "ndim", "dtype", "T"))
_KEYWORDS = frozenset(("dtype", "axis"))

_MODULES = {"np": (_NP_CALLS, _NP_VALUES), "math": (_MATH_CALLS, _MATH_VALUES)}
_CARRIERS = ("params", "state", "feedback")
"""Arguments that are not values: they have members, or are handed on under their own name."""
_CALLED_BY_THE_SANDBOX = ("frame", "finish")
_MAX_INTEGER_BITS = 64
_VERDICTS = "`return KEEP`, DROP, REPLACE or STOP"
_OUT_UNDECLARED = 'OUT is not declared: add OUT = ("same", "same"), or (dtype, shape) of what `out` shall be'
_ROWS_UNDECLARED = 'ROWS is not declared: add for example ROWS = {"x": "float32", "y": "float32"}'


def check(declared: Declared) -> None:
    """Every function, then that none calls itself in a circle. Raises Violation."""
    frame = declared.functions.get("frame")
    if frame is None:
        raise Violation(1, f"there is no function frame({', '.join(ARGUMENTS)})")
    calls = {name: _FunctionRules(function, declared).check() for name, function in declared.functions.items()}
    _check_signature(frame, ARGUMENTS)
    if not _returns(frame.body):
        raise Violation(frame.body[-1].lineno, f"frame() must end with a verdict on every path: {_VERDICTS}")
    if finish := declared.functions.get("finish"):
        _check_signature(finish, FINISH_ARGUMENTS)
    _check_circles(calls)


def _check_signature(function: ast.FunctionDef, arguments: tuple[str, ...]) -> None:
    if tuple(argument.arg for argument in function.args.args) != arguments:
        raise Violation(function.lineno, f"the signature is {function.name}({', '.join(arguments)})")


def _returns(body: list[ast.stmt]) -> bool:
    last = body[-1]
    if isinstance(last, ast.If):
        return bool(last.orelse) and _returns(last.body) and _returns(last.orelse)
    return isinstance(last, ast.Return)


def _check_circles(calls: dict[str, dict[str, int]]) -> None:
    """numba would compile recursion, and the stack would end it."""
    settled: set[str] = set()

    def follow(name: str, path: tuple[str, ...]) -> None:
        for callee, line in calls[name].items():
            if callee in (*path, name):
                raise Violation(line, f"{callee}() calls itself, which is not allowed")
            if callee not in settled:
                follow(callee, (*path, name))
        settled.add(name)

    for name in calls:
        follow(name, ())


class _FunctionRules:
    """One function. ``check`` returns the helpers it calls, each with a line where it does."""

    def __init__(self, function: ast.FunctionDef, declared: Declared) -> None:
        self._function = function
        self._declared = declared
        self._arguments = {argument.arg for argument in function.args.args}
        self._locals = {
            node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        self._arrays = {spec.name for spec in declared.arrays}
        self._params = self._arrays | {spec.name for spec in declared.params}
        self._state = {spec.name for spec in declared.state}
        self._calls: dict[str, int] = {}

    def check(self) -> dict[str, int]:
        self._head()
        body = self._function.body
        self._body(body[1:] if _is_docstring(body[0]) else body)
        return self._calls

    def _head(self) -> None:
        function, arguments = self._function, self._function.args
        if function.decorator_list:
            raise Violation(function.decorator_list[0].lineno, "decorators are not allowed")
        if arguments.posonlyargs or arguments.kwonlyargs or arguments.vararg or arguments.kwarg or arguments.defaults:
            raise Violation(function.lineno, f"{function.name}() may have plain arguments only, without defaults")
        if function.returns is not None or any(argument.annotation for argument in arguments.args):
            raise Violation(function.lineno, "type annotations are not allowed")
        for argument in arguments.args:
            self._bindable(argument.arg, argument.lineno, argument=True)

    def _bindable(self, name: str, line: int, *, argument: bool = False) -> None:
        if name.startswith("__"):
            raise Violation(line, f"the name {name!r} is not allowed")
        taken = name in BUILTINS or name in _MODULES or name in IMPORTABLE
        if taken or (name in self._declared.functions and name != "frame"):
            raise Violation(line, f"{name!r} would hide what already has this name")
        if name in _CARRIERS and not argument:
            raise Violation(line, f"{name!r} cannot be assigned to")
        if name == "out" and not argument and self._function.name == "frame":
            raise Violation(line, "'out' cannot be replaced: assign to its elements, out[...] = …")

    # -- statements

    def _body(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Pass() | ast.Break() | ast.Continue():
                return
            case ast.Return():
                self._return(node)
            case ast.Assign(targets=targets, value=value):
                self._value(value)
                self._targets(targets)
            case ast.AugAssign(target=target, op=op, value=value):
                self._operator(op, node)
                self._value(value)
                self._target(target)
            case ast.For(target=target, iter=iterated, body=body, orelse=orelse):
                self._value(iterated)
                self._target(target)
                self._body(body + orelse)
            case ast.While(test=test, body=body, orelse=orelse) | ast.If(test=test, body=body, orelse=orelse):
                self._value(test)
                self._body(body + orelse)
            case ast.Expr(value=ast.Call() as call):
                self._value(call)
            case ast.Expr():
                raise Violation(node.lineno, "this expression has no effect")
            case _:
                _refuse(node)

    def _return(self, node: ast.Return) -> None:
        if self._function.name == "finish" and node.value is not None:
            raise Violation(node.lineno, "finish() returns nothing: it writes its results into state arrays")
        if node.value is not None:
            self._value(node.value)
        elif self._function.name == "frame":
            raise Violation(node.lineno, f"frame() returns a verdict: {_VERDICTS}")

    def _targets(self, nodes: list[ast.expr]) -> None:
        for node in nodes:
            self._target(node)

    def _target(self, node: ast.expr) -> None:
        match node:
            case ast.Name(id=name):
                self._bindable(name, node.lineno)
            case ast.Tuple(elts=elements):
                self._targets(elements)
            case ast.Subscript(value=ast.Attribute(value=ast.Name(id="params"), attr=name)) if name in self._arrays:
                raise Violation(node.lineno, f"params.{name} is read-only: write to a state array")
            case ast.Subscript():
                self._value(node)
            case ast.Attribute(value=ast.Name(id=base), attr=attribute) if base in _CARRIERS:
                raise Violation(
                    node.lineno, f"{base}.{attribute} cannot be replaced: assign to its elements, [...] = …"
                )
            case _:
                raise Violation(node.lineno, "assign to names and elements only")

    # -- expressions

    def _value(self, node: ast.expr) -> None:
        match node:
            case ast.Constant(value=value):
                self._constant(value, node.lineno)
            case ast.Name(id=name):
                self._name(name, node.lineno)
            case ast.Attribute():
                self._attribute(node)
            case ast.Call():
                self._call(node)
            case ast.BinOp(op=op):
                self._operator(op, node)
                self._operands(node)
            case ast.Compare(ops=operators):
                self._comparison(operators, node.lineno)
                self._operands(node)
            case ast.UnaryOp() | ast.BoolOp() | ast.IfExp() | ast.Tuple() | ast.Subscript() | ast.Slice():
                self._operands(node)
            case _:
                _refuse(node)

    def _operands(self, node: ast.expr) -> None:
        self._values(*(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)))

    def _values(self, *nodes: ast.expr) -> None:
        for node in nodes:
            self._value(node)

    def _operator(self, op: ast.operator, node: ast.stmt | ast.expr) -> None:
        if isinstance(op, ast.MatMult):
            raise Violation(node.lineno, f"{quoted(op)} is not allowed: write the loop")

    def _comparison(self, operators: list[ast.cmpop], line: int) -> None:
        for op in operators:
            if isinstance(op, ast.Is | ast.IsNot | ast.In | ast.NotIn):
                raise Violation(line, "compare by ==, !=, <, <=, > and >= only")

    def _constant(self, value: object, line: int) -> None:
        if value is None or isinstance(value, bool | float):
            return
        if not isinstance(value, int):
            raise Violation(line, f"{type(value).__name__} constants are not allowed")
        if value.bit_length() > _MAX_INTEGER_BITS:
            raise Violation(line, f"an integer has at most {_MAX_INTEGER_BITS} bits")

    def _name(self, name: str, line: int) -> None:
        if name == "out" and self._function.name == "frame" and self._declared.out is None:
            raise Violation(line, _OUT_UNDECLARED)
        if name == "REPLACE" and self._declared.out is None:
            raise Violation(line, f"REPLACE keeps `out` in the frame's place, and {_OUT_UNDECLARED}")
        if name in _CARRIERS and name in self._arguments:
            usage = "emit(feedback, code, value) or append(feedback, …)" if name == "feedback" else f"{name}.NAME"
            raise Violation(line, f"{name!r} alone is not a value: use {usage}, or hand it to a function")
        if name in self._arguments or name in self._locals or name in self._declared.constants or name in VERDICTS:
            return
        if name in ("PARAMS", "STATE"):
            raise Violation(line, f"use {name.lower()}.NAME")
        if name in _MODULES or name in BUILTINS or name in self._declared.functions or name in IMPORTABLE:
            raise Violation(line, f"{name!r} is not a value")
        raise Violation(line, f"unknown name {name!r}")

    def _attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name):
            base = node.value.id
            if base in _MODULES:
                if node.attr not in _MODULES[base][1]:
                    raise Violation(node.lineno, f"{base}.{node.attr} is not available")
                return
            if base in _CARRIERS and base in self._arguments:
                self._member(base, node)
                return
        if node.attr not in _ARRAY_VALUES:
            raise Violation(node.lineno, f"the attribute .{node.attr} is not available")
        self._value(node.value)

    def _member(self, base: str, node: ast.Attribute) -> None:
        members = {"params": self._params, "state": self._state}.get(base, set())
        if node.attr not in members:
            declared = ", ".join(sorted(members)) or "none"
            where = base.upper() if base != "feedback" else "feedback"
            raise Violation(node.lineno, f"{base}.{node.attr} is not in {where} (declared: {declared})")

    # -- calls

    def _call(self, node: ast.Call) -> None:
        self._keywords(node)
        match node.func:
            case ast.Name(id=name):
                self._named_call(name, node)
            case ast.Attribute(value=ast.Name(id=base), attr=attribute) if base in _MODULES:
                if attribute not in _MODULES[base][0]:
                    raise Violation(node.lineno, f"{base}.{attribute}() is not available")
                self._values(*node.args)
            case ast.Attribute(value=array, attr=attribute):
                if attribute not in _ARRAY_CALLS:
                    raise Violation(node.lineno, f"the method .{attribute}() is not available")
                self._values(array, *node.args)
            case _:
                raise Violation(node.lineno, "only functions can be called")

    def _named_call(self, name: str, node: ast.Call) -> None:
        if name == "emit":
            self._emit(node)
        elif name == "append":
            self._append(node)
        elif name in BUILTINS:
            self._values(*node.args)
        elif name in _CALLED_BY_THE_SANDBOX:
            raise Violation(node.lineno, f"{name}() is called by the sandbox only")
        elif name in self._declared.functions:
            self._helper(name, node)
        else:
            raise Violation(node.lineno, f"{name}() is not a function of this file, nor one that is available")

    def _keywords(self, node: ast.Call) -> None:
        for keyword in node.keywords:
            if keyword.arg not in _KEYWORDS or isinstance(node.func, ast.Name):
                raise Violation(node.lineno, "of keyword arguments only dtype and axis of arrays are allowed")
            self._value(keyword.value)

    def _emit(self, node: ast.Call) -> None:
        match node.args:
            case [ast.Name(id="feedback"), code, value] if "feedback" in self._arguments:
                self._values(code, value)
            case _:
                raise Violation(node.lineno, "the call is emit(feedback, code, value)")

    def _append(self, node: ast.Call) -> None:
        rows = self._declared.rows
        if rows is None:
            raise Violation(node.lineno, _ROWS_UNDECLARED)
        match node.args:
            case [ast.Name(id="feedback"), *values] if "feedback" in self._arguments and len(values) == len(
                rows.fields
            ):
                self._values(*values)
            case _:
                fields = ", ".join(name for name, _ in rows.fields)
                raise Violation(node.lineno, f"the call is append(feedback, {fields}), the fields of ROWS in order")

    def _helper(self, name: str, node: ast.Call) -> None:
        wanted = [argument.arg for argument in self._declared.functions[name].args.args]
        if len(wanted) != len(node.args):
            raise Violation(node.lineno, f"{name}() takes {len(wanted)} arguments, not {len(node.args)}")
        for argument, parameter in zip(node.args, wanted, strict=True):
            if isinstance(argument, ast.Name) and argument.id in _CARRIERS and argument.id in self._arguments:
                if argument.id != parameter:
                    raise Violation(argument.lineno, f"hand {argument.id} on as an argument named {argument.id!r}")
            else:
                self._value(argument)
        self._calls.setdefault(name, node.lineno)


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _refuse(node: ast.stmt | ast.expr) -> NoReturn:
    raise Violation(node.lineno, f"{quoted(node)} is not allowed")

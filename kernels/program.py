"""From a kernel's source to its compiled functions. Runs inside the sandbox only.

In: an admitted kernel. Out: ``Program``, whose functions are numba's and are compiled for the types of what they are given.
A kernel that does not load or compile raises ``NotCompiled`` with the line of the user's file. How the functions of a chain
are joined to one loop over a batch is kernels/chain.py.
"""

from __future__ import annotations

import ast
import linecache
import math
import sys
import types
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba.core import errors
from numba.core import types as numba_types

from kernels import cautions, explain
from kernels.calls import Feedback, append_of, emit, jit
from kernels.contract import VERDICTS, Kernel
from kernels.explain import FOLDER, MAX_REASON_CHARS
from kernels.hoist import hoisted

_ALLOCATES = frozenset(
    """
    arange argsort astype bincount clip copy count_nonzero cumsum diff empty empty_like flatten full full_like histogram
    linspace median nonzero ones ones_like percentile ravel sort unique where zeros zeros_like
    """.split()
)
"""Calls that make a new array, for certain or for some arguments."""
_NUMBERS = (numba_types.Number, numba_types.Boolean, numba_types.NoneType)
TABLE_ENTRIES = 16
"""Longer constant tables become arrays: numba spells tuples out entry by entry."""


class NotCompiled(Exception):
    """``line`` is the user's, 1-based; ``reason`` is fit for the scientist; ``stage`` counts kernels of a chain."""

    def __init__(self, line: int, reason: str, stage: int = 0) -> None:
        super().__init__(f"line {line}: {reason}")
        self.line = line
        self.reason = reason
        self.stage = stage


def type_of(value: object) -> Any:
    return numba.typeof(value)  # type: ignore[no-untyped-call]


class Program:
    """A kernel's functions. ``stage``: its place in the chain."""

    def __init__(self, kernel: Kernel, stage: int = 0) -> None:
        self.kernel = kernel
        self._stage = stage
        # numba keys its dispatch on class names: two kernels must never share one.
        tag = f"{kernel.sha256[:12] or 'none'}_{stage}"
        fields = [spec.name for spec in kernel.params] + [spec.name for spec in kernel.arrays]
        self._params_type = namedtuple(f"Params_{tag}", fields or ["none_declared"])  # type: ignore[misc]
        self._state_type = namedtuple(f"State_{tag}", [spec.name for spec in kernel.state] or ["none_declared"])  # type: ignore[misc]
        try:
            self._namespace = _load(kernel)
            self._functions = _functions_of(kernel, self._namespace)
        except NotCompiled as refusal:
            refusal.stage = stage
            raise
        self._allocating = _allocating(ast.parse(kernel.source)).intersection(self._functions)
        self._tried: dict[str, int] = {}
        self._cautions: set[tuple[int, str]] = set()
        self.frame: Any = None
        self.finish: Any = None

    def params(self, values: Mapping[str, int | float], arrays: Sequence[npt.NDArray[np.generic]]) -> Any:
        scalars = [np.dtype(spec.dtype).type(values[spec.name]) for spec in self.kernel.params]
        return self._params_type(*([*scalars, *arrays] or [np.int64(0)]))

    def state(self, arrays: Sequence[npt.NDArray[np.generic]]) -> Any:
        return self._state_type(*(arrays or [np.zeros(1, np.int64)]))

    def compile(self, frame_type: Any, params: Any, state: Any, out_type: Any, feedback: Feedback) -> None:
        """Compile ``frame``, and ``finish`` if there is one, for these types; raises NotCompiled."""
        state_type, params_type = type_of(state), type_of(params)
        signature = (frame_type, params_type, state_type, numba_types.int64, out_type, type_of(feedback))
        self.frame = self._compiled("frame", signature)
        returned = self.frame.overloads[signature].signature.return_type
        if not isinstance(returned, numba_types.Integer | numba_types.Boolean):
            reason = f"frame() must return KEEP, DROP, REPLACE or STOP on every path, here it returns {returned}"
            raise NotCompiled(self._first_line("frame"), reason, self._stage)
        if self.kernel.has_finish:
            self.finish = self._compiled("finish", (state_type, params_type))

    def _compiled(self, entry: str, signature: tuple[Any, ...]) -> Any:
        """The function, compiled with as few reference counts (calls.jit) as it can do with: those functions have them that
        are seen to make arrays, then it too (an array expression makes one), then all. What failed once is not tried again
        for other frames."""
        choices = list(dict.fromkeys((self._allocating, self._allocating | {entry}, frozenset(self._functions))))
        for n in range(self._tried.get(entry, 0), len(choices)):
            self._tried[entry] = n
            counted = choices[n]
            for name, function in self._functions.items():
                self._namespace[name] = jit(function, counted=name in counted, entry=name == "finish")
            compiled = self._namespace[entry]
            try:
                self.guarded(lambda: compiled.compile(signature), entry)  # noqa: B023  # called at once
            except NotCompiled:
                if n == len(choices) - 1:
                    raise
                continue
            if entry not in counted or self._returns_numbers(self._functions.keys() - counted):
                break
        for name in self._functions:
            self._cautions.update(cautions.of(self._namespace[name]))
        return compiled

    def _returns_numbers(self, functions: Iterable[str]) -> bool:
        """A function with reference counts would release an array that one without them returns."""
        overloads = (overload for name in functions for overload in self._namespace[name].overloads.values())
        return all(isinstance(overload.signature.return_type, _NUMBERS) for overload in overloads)

    def cautions(self) -> list[tuple[int, str]]:
        """What compiles and is probably not meant, by line."""
        return sorted(self._cautions)

    def guarded(self, compiling: Callable[[], object], function: str = "frame") -> None:
        """Call, and translate what the compiler raises."""
        try:
            compiling()
        except errors.NumbaError as error:
            line, reason = explain.refused(error, self.kernel.file)
        except (MemoryError, RecursionError) as error:
            line, reason = 0, f"too large to compile ({type(error).__name__})"
        except NotCompiled:
            raise
        except Exception as error:
            line, reason = 0, f"the compiler failed: {type(error).__name__}: {error}"[:MAX_REASON_CHARS]
        else:
            return
        raise NotCompiled(line or self._first_line(function), reason, self._stage)

    def _first_line(self, function: str) -> int:
        return self._functions[function].__code__.co_firstlineno


def _load(kernel: Kernel) -> dict[str, Any]:
    """Execute the module: definitions and literals, if it passed the gate."""
    offered = {**VERDICTS, "emit": emit, "append": append_of(kernel)}
    _offer_imports(offered)
    source, name = kernel.source, FOLDER + kernel.file
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"__name__": "kernel", "np": np, "math": math, **offered}
    try:
        module = hoisted(ast.parse(source), kernel)
        exec(compile(module, name, "exec", dont_inherit=True), namespace)
    except SyntaxError as error:
        raise NotCompiled(error.lineno or 1, f"syntax error: {error.msg}") from None
    except Exception as error:
        _, line, reason = explain.raised(error)
        raise NotCompiled(line or 1, reason) from None
    for constant, value in list(namespace.items()):
        if isinstance(value, tuple):
            namespace[constant] = _table(value)
    return namespace


def _functions_of(kernel: Kernel, namespace: Mapping[str, Any]) -> dict[str, types.FunctionType]:
    functions = {
        name: value
        for name, value in namespace.items()
        if isinstance(value, types.FunctionType) and value.__code__.co_filename == FOLDER + kernel.file
    }
    for name in ("frame", "finish") if kernel.has_finish else ("frame",):
        if name not in functions:
            raise NotCompiled(1, f"there is no function {name}()")
    return functions


def _allocating(module: ast.Module) -> frozenset[str]:
    """Functions that are seen to make arrays, and those that call them."""
    calls: dict[str, set[str]] = {}
    found: set[str] = set()
    for function in module.body:
        if not isinstance(function, ast.FunctionDef):
            continue
        called = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
        calls[function.name] = {name.id for name in called if isinstance(name, ast.Name)}
        if any(isinstance(name, ast.Attribute) and name.attr in _ALLOCATES for name in called):
            found.add(function.name)
    while more := {name for name, called in calls.items() if called & found} - found:
        found |= more
    return frozenset(found)


def _table(value: tuple[Any, ...]) -> Any:
    """A constant table as an array where it is long, or has rows of more than a few numbers."""
    entries = sum(len(row) if isinstance(row, tuple) else 1 for row in value)
    if entries <= TABLE_ENTRIES:
        return value
    array = np.array(value)
    return array if array.dtype.kind in "iuf" else value


def _offer_imports(offered: Mapping[str, Any]) -> None:
    """What ``from hiss import KEEP, DROP, emit, …`` finds: the lines that an editor wants to see."""
    module = types.ModuleType("hiss")
    module.__dict__.update(offered)
    sys.modules["hiss"] = module

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
from collections.abc import Callable, Mapping, Sequence
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

_ALLOCATES = frozenset(
    """
    arange argsort astype bincount clip copy count_nonzero cumsum diff empty empty_like flatten full full_like histogram
    linspace median nonzero ones ones_like percentile ravel sort unique where zeros zeros_like
    """.split()
)
"""Calls that make a new array, for certain or for some arguments."""
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
        self.frame: Any = None
        self.finish: Any = None
        self.use(counted=False)

    @property
    def allocates(self) -> bool:
        """Whether it makes new arrays, as far as names tell: an array expression does so too."""
        calls = (node.func for node in ast.walk(ast.parse(self.kernel.source)) if isinstance(node, ast.Call))
        return any(isinstance(called, ast.Attribute) and called.attr in _ALLOCATES for called in calls)

    def use(self, *, counted: bool) -> None:
        """Forget what was compiled; from now on with or without reference counts (calls.jit)."""
        for name, function in self._functions.items():
            self._namespace[name] = jit(function, counted=counted)
        self.frame = self._namespace["frame"]
        self.finish = self._namespace.get("finish") if self.kernel.has_finish else None

    def params(self, values: Mapping[str, int | float], arrays: Sequence[npt.NDArray[np.generic]]) -> Any:
        scalars = [np.dtype(spec.dtype).type(values[spec.name]) for spec in self.kernel.params]
        return self._params_type(*([*scalars, *arrays] or [np.int64(0)]))

    def state(self, arrays: Sequence[npt.NDArray[np.generic]]) -> Any:
        return self._state_type(*(arrays or [np.zeros(1, np.int64)]))

    def compile(self, frame_type: Any, params: Any, state: Any, out_type: Any, feedback: Feedback) -> None:
        """Compile ``frame``, and ``finish`` if there is one, for these types; raises NotCompiled."""
        state_type, params_type = type_of(state), type_of(params)
        signature = (frame_type, params_type, state_type, numba_types.int64, out_type, type_of(feedback))
        self.guarded(lambda: self.frame.compile(signature), "frame")
        returned = self.frame.overloads[signature].signature.return_type
        if not isinstance(returned, numba_types.Integer | numba_types.Boolean):
            reason = f"frame() must return KEEP, DROP, REPLACE or STOP on every path, here it returns {returned}"
            raise NotCompiled(self._first_line("frame"), reason, self._stage)
        if self.finish is not None:
            self.guarded(lambda: self.finish.compile((state_type, params_type)), "finish")

    def cautions(self) -> list[tuple[int, str]]:
        """What compiles and is probably not meant, by line."""
        found = (cautions.of(self._namespace[name]) for name in self._functions)
        return sorted(caution for some in found for caution in some)

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
        exec(compile(source, name, "exec", dont_inherit=True), namespace)
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

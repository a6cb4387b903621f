"""From a kernel's source to one compiled function that judges a batch of frames. Runs inside the sandbox only.

In: an admitted kernel and the (dtype, shape) of its frames. Out: ``Program.drive``, which loops over the frames of a batch
in compiled code, so that Python is entered once for each batch. A kernel that does not compile raises ``NotCompiled``
with the line of the user's file. numba is told: bounds checks on, no fastmath, numpy's error model (division by zero gives
inf or nan, as on arrays), no cache on disk (it unpickles) and never parallel (processes are how this scales).
"""

from __future__ import annotations

import linecache
import math
import re
import sys
import types
from collections import namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from numba.core import errors
from numba.core import types as numba_types

from kernels.contract import DROP, KEEP, VERDICTS, Kernel
from kernels.wire import BAD_VERDICT

MAX_REASON_CHARS = 400
_FOLDER = "<kernel>/"


class NotCompiled(Exception):
    """``line`` is the user's, 1-based; ``reason`` is fit for the scientist."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")
        self.line = line
        self.reason = reason


class Feedback(NamedTuple):
    """The user's ``feedback``: ``counters`` as in wire.OutputLayout.counters."""

    counters: npt.NDArray[np.int64]
    entries: npt.NDArray[np.void]


def _jit(function: Callable[..., Any]) -> Any:
    return numba.njit(function, boundscheck=True, error_model="numpy")


def _type_of(value: object) -> Any:
    return numba.typeof(value)  # type: ignore[no-untyped-call]


def _emit(feedback, code, value):  # type: ignore[no-untyped-def]  # compiled: numba infers
    n = feedback.counters[1]
    if n < feedback.entries.size:
        feedback.entries[n].frame = feedback.counters[0]
        feedback.entries[n].code = code
        feedback.entries[n].value = value
        feedback.counters[1] = n + 1
    else:
        feedback.counters[2] += 1


emit = _jit(_emit)


def _driver(judge: Any) -> Any:
    """The loop over a batch, around the user's compiled ``frame()``."""
    bad_verdict = BAD_VERDICT
    drop, keep = DROP, KEEP

    def drive(frames, params, state, feedback, verdicts, first_frame, step):  # type: ignore[no-untyped-def]  # as above
        for i in range(frames.shape[0]):
            feedback.counters[0] = first_frame + i
            verdict = judge(frames[i], params, state, (first_frame + i) * step, None, feedback)
            verdicts[i] = verdict if verdict in (drop, keep) else bad_verdict

    return _jit(drive)


class Program:
    """A kernel's functions, made from its source; ``compile`` once for each (dtype, ndim) of frames."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._functions = _load(kernel)
        # numba keys its dispatch on class names: two kernels must never share one.
        tag = kernel.sha256[:12] or "none"
        self._params_type = namedtuple(f"Params_{tag}", [spec.name for spec in kernel.params] or ["none_declared"])  # type: ignore[misc]
        self._state_type = namedtuple(f"State_{tag}", [spec.name for spec in kernel.state] or ["none_declared"])  # type: ignore[misc]
        self._drive = _driver(self._functions["frame"])

    def params(self, values: dict[str, int | float]) -> Any:
        scalars = [np.dtype(spec.dtype).type(values[spec.name]) for spec in self._kernel.params]
        return self._params_type(*(scalars or [np.int64(0)]))

    def state(self, arrays: list[npt.NDArray[np.generic]]) -> Any:
        return self._state_type(*(arrays or [np.zeros(1, np.int64)]))

    def compile(
        self, dtype: str, shape: tuple[int, ...], params: Any, state: Any, feedback: Feedback
    ) -> Callable[..., None]:
        """Compile for read-only C-contiguous frames and return ``drive``; raises NotCompiled."""
        frame = self._functions["frame"]
        frames = np.ndarray((0, *shape), dtype, b"")
        one = _type_of(frames).copy(ndim=len(shape))
        signature = (
            one,
            _type_of(params),
            _type_of(state),
            numba_types.int64,
            numba_types.none,
            _type_of(feedback),
        )
        first_line = frame.py_func.__code__.co_firstlineno
        try:
            frame.compile(signature)
            returned = frame.overloads[signature].signature.return_type
            if not isinstance(returned, numba_types.Integer | numba_types.Boolean):
                raise NotCompiled(
                    first_line, f"frame() must return KEEP or DROP on every path, here it returns {returned}"
                )
            self._drive(frames, params, state, feedback, np.zeros(0, np.uint8), np.int64(0), np.int64(1))
        except errors.NumbaError as error:
            raise _explained(error, self._kernel, first_line) from None
        except (MemoryError, RecursionError) as error:
            raise NotCompiled(first_line, f"too large to compile ({type(error).__name__})") from None
        except NotCompiled:
            raise
        except Exception as error:
            raise NotCompiled(
                first_line, f"the compiler failed: {type(error).__name__}: {error}"[:MAX_REASON_CHARS]
            ) from None
        return self._drive  # type: ignore[no-any-return]


def _load(kernel: Kernel) -> dict[str, Any]:
    """Execute the module: definitions and literals, if it passed the gate. Its functions become numba's."""
    _offer_imports()
    source = kernel.source
    linecache.cache[_code_name(kernel)] = (len(source), None, source.splitlines(keepends=True), _code_name(kernel))
    namespace: dict[str, Any] = {"__name__": "kernel", "np": np, "math": math, "emit": emit, **VERDICTS}
    try:
        exec(compile(source, _code_name(kernel), "exec", dont_inherit=True), namespace)
    except SyntaxError as error:
        raise NotCompiled(error.lineno or 1, f"syntax error: {error.msg}") from None
    except Exception as error:
        raise NotCompiled(
            _line_of(error, _code_name(kernel)), f"{type(error).__name__}: {error}"[:MAX_REASON_CHARS]
        ) from None
    for name, value in list(namespace.items()):
        if isinstance(value, types.FunctionType) and value.__code__.co_filename == _code_name(kernel):
            namespace[name] = _jit(value)
    if not hasattr(namespace.get("frame"), "py_func"):
        raise NotCompiled(1, "there is no function frame()")
    return namespace


def _code_name(kernel: Kernel) -> str:
    """The file name of the compiled code: none of numba's own files may be taken for the user's."""
    return f"{_FOLDER}{kernel.file}"


def _offer_imports() -> None:
    """What ``from hiss import KEEP, DROP, emit`` finds: the lines that an editor wants to see."""
    module = types.ModuleType("hiss")
    module.__dict__.update(VERDICTS, emit=emit)
    sys.modules["hiss"] = module


def _line_of(error: BaseException, file: str) -> int:
    line = 1
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


# -- what numba says, for a scientist

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_SPECIFIC = re.compile(r"^\s*(?:\w+Error): (.+)$", re.MULTILINE)
_NO_MATCH = re.compile(
    r"No implementation of function Function\((?P<function>.+?)\) found for signature:\s*>>> (?P<call>.+)"
)
_OPENING = re.compile(r"^Failed in nopython mode pipeline \(step: [^)]*\)\n?")


def _explained(error: errors.NumbaError, kernel: Kernel, first_line: int) -> NotCompiled:
    text = _OPENING.sub("", _ESCAPES.sub("", str(error))).strip()
    return NotCompiled(_compile_line(error, text, kernel, first_line), _compile_reason(text.replace(_FOLDER, "")))


def _compile_line(error: errors.NumbaError, text: str, kernel: Kernel, first_line: int) -> int:
    """The innermost place in the user's file: numba names a helper's line before the line of its caller."""
    named = re.search(rf'File "[^"\n]*{re.escape(_code_name(kernel))}", line (\d+):', text)
    if named:
        return int(named[1])
    location = getattr(error, "loc", None)
    if location is not None and str(location.filename).endswith(_code_name(kernel)):
        return int(location.line)
    return first_line


def _compile_reason(text: str) -> str:
    if "Cannot modify readonly array" in text:
        return "frame is read-only: write to a state array or a copy instead"
    specific = _SPECIFIC.search(text)
    no_match = _NO_MATCH.search(text)
    if specific:
        reason = specific[1]
    elif no_match:
        reason = f"not possible with these types: {no_match['call']}"
    else:
        reason = next((line.strip() for line in text.splitlines() if line.strip()), "does not compile")
    return reason[:MAX_REASON_CHARS]

"""Says what went wrong in a kernel at the user's line: what numba refuses to compile, and what raises while it runs.

In: exceptions of numba, of the compiled code and of Python. Out: (line, reason) for a scientist; line 0 where none is known.
``remember_lines`` makes numba store the line with the errors that it raises by itself (an index out of bounds), which by
default carry none; the code that runs when nothing is wrong stays the same.
"""

from __future__ import annotations

import ast
import functools
import linecache
import re
from typing import Any

from numba.core import callconv, lowering

MAX_REASON_CHARS = 400
INDEXED_MAX = 6
FOLDER = "<kernel>/"
"""Where the code of kernels seems to lie: none of numba's own files may be taken for the user's."""

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_SPECIFIC = re.compile(r"^\s*(?:\w+Error): (.+)$", re.MULTILINE)
_NO_MATCH = re.compile(
    r"No implementation of function Function\((?P<function>.+?)\) found for signature:\s*>>> (?P<call>.+)"
)
_OPENING = re.compile(r"^Failed in nopython mode pipeline \(step: [^)]*\)\n?")


def refused(error: Exception, file: str) -> tuple[int, str]:
    """Why numba did not compile ``file`` (a kernel's, without folder)."""
    text = _OPENING.sub("", _ESCAPES.sub("", str(error))).strip()
    return _compile_line(error, text, FOLDER + file), _compile_reason(text.replace(FOLDER, ""))


def _compile_line(error: Exception, text: str, file: str) -> int:
    """The innermost place in the user's file: numba names a helper's line before the line of its caller."""
    named = re.search(rf'File "[^"\n]*{re.escape(file)}", line (\d+):', text)
    if named:
        return int(named[1])
    location = getattr(error, "loc", None)
    if location is not None and str(location.filename).endswith(file):
        return int(location.line)
    return 0


def _compile_reason(text: str) -> str:
    if "Cannot modify readonly array" in text:
        return "frames and parameter arrays are read-only: write to a state array, to out, or to a copy instead"
    specific = _SPECIFIC.search(text)
    no_match = _NO_MATCH.search(text)
    if specific:
        reason = specific[1]
    elif no_match:
        reason = f"not possible with these types: {no_match['call']}"
    else:
        reason = next((line.strip() for line in text.splitlines() if line.strip()), "does not compile")
    return reason[:MAX_REASON_CHARS]


def raised(error: BaseException) -> tuple[str, int, str]:
    """File (without folder; "" where none is known), line and reason of an exception, the innermost of the user's."""
    file, line = "", 0
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if FOLDER in name:
            file, line = name.rpartition(FOLDER)[2], trace.tb_lineno
        trace = trace.tb_next
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, IndexError) and line:
        reason += _indexed(FOLDER + file, line)
    return file, line, reason[:MAX_REASON_CHARS]


def _indexed(name: str, line: int) -> str:
    """What is indexed at the line: compiled code does not say which index it was."""
    try:
        module = ast.parse("".join(linecache.getlines(name)))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return ""
    at_line = [node for node in ast.walk(module) if isinstance(node, ast.Subscript) and node.lineno == line]
    found = list(dict.fromkeys(ast.unparse(node) for node in sorted(at_line, key=lambda node: node.col_offset)))
    return f" in {' or '.join(found[:INDEXED_MAX])}" if found else ""


def remember_lines() -> None:
    """Patch numba, once in a process: while a function is lowered, the builder knows the line; an exception that is given
    no place gets that one. Where numba changes inside, lines are missing from messages and nothing else is."""
    if getattr(remember_lines, "done", False):
        return
    remember_lines.done = True  # type: ignore[attr-defined]
    lower_inst: Any = lowering.Lower.lower_inst
    set_user_exc: Any = callconv.CPUCallConv.set_static_user_exc

    @functools.wraps(lower_inst)
    def lower_at(self: Any, inst: Any) -> Any:
        self.builder.hiss_loc = self.loc
        return lower_inst(self, inst)

    @functools.wraps(set_user_exc)
    def set_at(
        self: Any, builder: Any, exc: Any, exc_args: Any = None, loc: Any = None, func_name: str | None = None
    ) -> Any:
        known = getattr(builder, "hiss_loc", None)
        if loc is None and known is not None and FOLDER in str(known.filename):
            loc, func_name = known, func_name or "kernel"
        return set_user_exc(self, builder, exc, exc_args=exc_args, loc=loc, func_name=func_name)

    setattr(lowering.Lower, "lower_inst", lower_at)  # noqa: B010
    setattr(callconv.CPUCallConv, "set_static_user_exc", set_at)  # noqa: B010

"""The gate: reads a submitted kernel without running it, and admits it or says which line it does not like.

In: the bytes of ``NAME.py``. Out: a ``Kernel`` with its declared parameters and state, or ``KernelRefused`` with the line. It
is an allow-list over the syntax tree: what is not named here is refused. That keeps mistakes and most attacks out of the
compiler and gives a scientist good messages; **it is not the security boundary**, the process is (kernels/lockdown.py).

What always holds for an admitted kernel: its module body is imports that do nothing, literal constants, declarations and
plain functions; no function calls itself in a circle; every name is known; frame() ends with a verdict; what the functions
use (``out``, rows, arrays, members of state) is declared. Bounds are checked
on tokens before Python's own parser sees the text, so that it cannot be driven into deep recursion. ``admit`` takes tens
of milliseconds for the largest file allowed: a caller with an event loop uses a thread.
"""

from __future__ import annotations

import ast
import hashlib
import io
import re
import tokenize

from ingest.ports import KernelRefused
from kernels import declarations, rules
from kernels.contract import Kernel
from kernels.violation import Violation

MAX_SOURCE_BYTES = 64 * 1024
MAX_STATEMENTS = 300
MAX_LOGICAL_LINES = 600
MAX_LINE_TOKENS = 600
"""Tokens other than numbers and commas in one logical line (a statement, however many lines it covers)."""
MAX_BRACKETS = 16
MAX_INDENTS = 12

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


def admit(name: str, source: bytes) -> Kernel:
    """Check a kernel and read its declarations. ``name``: without suffix. Raises KernelRefused(file, line, reason)."""
    file = f"{name}.py"
    if not _NAME.fullmatch(name):
        raise KernelRefused(file[:80], 1, "a kernel's name is a letter, then at most 63 letters, digits, _ and -")
    try:
        text = _text(source)
        _bound(text)
        module = _parse(text)
        declared = declarations.read(module)
        rules.check(declared)
    except Violation as violation:
        raise KernelRefused(file, violation.line, violation.reason) from None
    except RecursionError:
        raise KernelRefused(file, 1, "too complicated: an expression is nested too deeply") from None
    return Kernel(
        name=name,
        source=text,
        sha256=hashlib.sha256(source).hexdigest(),
        params=declared.params,
        state=declared.state,
        arrays=declared.arrays,
        out=declared.out,
        rows=declared.rows,
        ordered=declared.ordered,
        has_finish="finish" in declared.functions,
    )


def _text(source: bytes) -> str:
    if len(source) > MAX_SOURCE_BYTES:
        raise Violation(1, f"the file has {len(source)} bytes, at most {MAX_SOURCE_BYTES} are allowed")
    try:
        text = source.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Violation(source[: error.start].count(b"\n") + 1, "not UTF-8 text") from None
    for number, line in enumerate(text.split("\n"), 1):
        if any(ord(c) < 32 and c not in "\t\r" for c in line):
            raise Violation(number, "control characters are not allowed")
    return text.replace("\r\n", "\n").replace("\r", "\n")


_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}
_INDENTS = {tokenize.INDENT: 1, tokenize.DEDENT: -1}
_LIGHT = (tokenize.NL, tokenize.COMMENT, tokenize.NUMBER)
"""Tokens that cannot nest: a flat table of numbers may be long."""


def _bound(text: str) -> None:
    """Bound size and nesting on the tokens alone."""
    logical_lines = weight = brackets = indents = 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            line = token.start[0]
            if token.type == tokenize.NEWLINE:
                logical_lines, weight = logical_lines + 1, 0
            weight += token.type not in _LIGHT and token.string != ","
            brackets += _BRACKETS.get(token.string, 0)
            indents += _INDENTS.get(token.type, 0)
            if logical_lines > MAX_LOGICAL_LINES:
                raise Violation(line, f"more than {MAX_LOGICAL_LINES} lines of code")
            if weight > MAX_LINE_TOKENS:
                raise Violation(line, "this statement is too long")
            if brackets > MAX_BRACKETS or indents > MAX_INDENTS:
                raise Violation(line, "nested too deeply")
    except tokenize.TokenError:
        return  # only at the end of the text: all of it is bounded, and the parser names the line better
    except SyntaxError as error:
        raise Violation(error.lineno or 1, f"syntax error: {error.msg}") from None


def _parse(text: str) -> ast.Module:
    try:
        module = ast.parse(text)
    except SyntaxError as error:
        raise Violation(error.lineno or 1, f"syntax error: {error.msg}") from None
    except (RecursionError, MemoryError, ValueError):
        raise Violation(1, "too complicated to parse") from None
    statements = 0
    for node in ast.walk(module):
        statements += isinstance(node, ast.stmt)
        if statements > MAX_STATEMENTS:
            assert isinstance(node, ast.stmt)
            raise Violation(node.lineno, f"more than {MAX_STATEMENTS} statements")
    return module

"""What the gate finds wrong, and how it names the construct to a scientist."""

from __future__ import annotations

import ast


class Violation(Exception):
    """``line``: 1-based line of the kernel's file."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"{line}: {reason}")
        self.line = line
        self.reason = reason


_CONSTRUCTS = {
    "AnnAssign": "a type annotation",
    "Assert": "`assert`",
    "AsyncFor": "`async`",
    "AsyncFunctionDef": "`async`",
    "AsyncWith": "`async`",
    "AugAssign": "an assignment",
    "Await": "`await`",
    "ClassDef": "a class",
    "Delete": "`del`",
    "Dict": "a dict",
    "DictComp": "a comprehension",
    "Expr": "an expression",
    "For": "`for`",
    "FormattedValue": "an f-string",
    "FunctionDef": "a function inside a function",
    "GeneratorExp": "a comprehension",
    "Global": "`global`",
    "If": "`if`",
    "Import": "`import`",
    "ImportFrom": "`import`",
    "JoinedStr": "an f-string",
    "Lambda": "`lambda`",
    "List": "a list (use a tuple or np.zeros)",
    "ListComp": "a comprehension",
    "MatMult": "`@`",
    "Match": "`match`",
    "NamedExpr": "`:=`",
    "Nonlocal": "`nonlocal`",
    "Raise": "`raise`",
    "Set": "a set",
    "SetComp": "a comprehension",
    "Slice": "a slice",
    "Starred": "`*`",
    "Try": "`try`",
    "TryStar": "`try`",
    "While": "`while`",
    "With": "`with`",
    "Yield": "`yield`",
    "YieldFrom": "`yield`",
}


def quoted(node: ast.AST) -> str:
    """The construct in a scientist's words."""
    kind = type(node).__name__
    return _CONSTRUCTS.get(kind, kind)

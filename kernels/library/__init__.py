"""The shipped library of kernels: files a scientist submits as they are, or copies and changes.

In: the name of a kernel, and new values for the constants at its top. Out: source, exactly what would be put into a bucket.
Every other ``.py`` file of this folder is a kernel: nothing imports it, and it passes the gate unchanged. Its docstring says
what it computes, its source, and the unit of every parameter and result; docs/KERNELS.md is the guide.
"""

from __future__ import annotations

import ast
from pathlib import Path

_FOLDER = Path(__file__).parent
_DECLARATIONS = frozenset(("PARAMS", "STATE", "OUT", "ROWS", "ROWS_MAX", "ORDERED"))


def names() -> tuple[str, ...]:
    """All kernels, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.py") if path.stem != "__init__"))


def path(name: str) -> Path:
    """The file of a kernel. Raises KeyError."""
    if name not in names():
        raise KeyError(f"no kernel {name!r} in the library: there are {', '.join(names())}")
    return _FOLDER / f"{name}.py"


def source(name: str, **constants: int | float) -> bytes:
    """The bytes to submit, with numbers at its top changed: ``source("azimuthal", BINS=500)``.

    Raises KeyError for an unknown kernel, or a constant it does not have.
    """
    text = path(name).read_text()
    if not constants:
        return text.encode()
    lines = text.splitlines(keepends=True)
    known = _constants(text)
    for constant, value in constants.items():
        if constant not in known:
            raise KeyError(f"{name} has no constant {constant}: there are {', '.join(known) or 'none'}")
        place = known[constant]
        line = lines[place.lineno - 1]
        lines[place.lineno - 1] = f"{line[: place.col_offset]}{value!r}{line[place.end_col_offset :]}"
    return "".join(lines).encode()


def constants(name: str) -> dict[str, int | float]:
    """The numbers at the top of a kernel that a scientist may have to set, with their values."""
    return {constant: node.value for constant, node in _constants(path(name).read_text()).items()}  # type: ignore[misc]


def _constants(text: str) -> dict[str, ast.Constant]:
    """Of ASCII lines, so that a column is a character."""
    found = {}
    for node in ast.parse(text).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=constant)], value=ast.Constant(value=int() | float()) as value):
                if constant not in _DECLARATIONS:
                    found[constant] = value
    return found


def describe(name: str) -> str:
    """The whole docstring of a kernel; its first line is a summary."""
    return ast.get_docstring(ast.parse(path(name).read_text())) or ""


def summary(name: str) -> str:
    """One line for a list."""
    return describe(name).partition("\n\n")[0].replace("\n", " ")

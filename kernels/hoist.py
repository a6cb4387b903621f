"""Takes arrays of ``state`` and ``params`` out of the loops of a kernel. Runs inside the sandbox only.

In: the syntax tree of a kernel. Out: the same, changed so that each function reads ``state.NAME`` once, when it is entered;
lines stay as they are, so that messages do too. Where a kernel makes arrays and so needs reference counts, reading an
array's name anew for every pixel costs more than everything else.
"""

from __future__ import annotations

import ast

from kernels.contract import Kernel


def hoisted(module: ast.Module, kernel: Kernel) -> ast.Module:
    arrays = {
        "state": frozenset(spec.name for spec in kernel.state),
        "params": frozenset(spec.name for spec in kernel.arrays),
    }
    for node in module.body:
        if isinstance(node, ast.FunctionDef):
            _hoist(node, arrays)
    return module


def _hoist(function: ast.FunctionDef, arrays: dict[str, frozenset[str]]) -> None:
    arguments = {argument.arg for argument in function.args.args}
    names = _Names({base: members for base, members in arrays.items() if base in arguments})
    function.body = [names.visit(statement) for statement in function.body]
    first = function.body[0]
    reads: list[ast.stmt] = []
    for base, member in sorted(names.found):
        attribute = ast.Attribute(ast.Name(base, ast.Load()), member, ast.Load())
        read = ast.Assign([ast.Name(_local(base, member), ast.Store())], attribute)
        reads.append(ast.fix_missing_locations(ast.copy_location(read, first)))
    function.body[:0] = reads


def _local(base: str, member: str) -> str:
    """No kernel's own: the gate refuses names that begin with two underscores."""
    return f"__{base}_{member}"


class _Names(ast.NodeTransformer):
    def __init__(self, arrays: dict[str, frozenset[str]]) -> None:
        self._arrays = arrays
        self.found: set[tuple[str, str]] = set()

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if isinstance(node.value, ast.Name) and node.attr in self._arrays.get(node.value.id, ()):
            self.found.add((node.value.id, node.attr))
            return ast.copy_location(ast.Name(_local(node.value.id, node.attr), node.ctx), node)
        return self.generic_visit(node)

"""The integer types of the IR are those that numba infers: asked from numba itself, for every pair."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import numba
import numpy as np
import pytest
from numba.core import types as nb
from numba.core.registry import cpu_target

from kernels.offload import types

ALL = (types.BOOL, *types.INTEGERS)
PAIRS = list(itertools.product(ALL, ALL))


@pytest.fixture(scope="module")
def typing() -> Any:
    context = cpu_target.typing_context
    context.refresh()
    return context


def of(name: str) -> Any:
    return nb.boolean if name == types.BOOL else getattr(nb, name)


def inferred(typing: Any, function: object, *names: str) -> str:
    arguments = tuple(of(name) for name in names)
    signature = typing.resolve_function_type(typing.resolve_value_type(function), arguments, {})
    return str(signature.return_type)


@pytest.mark.parametrize("function", [operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod])
def test_arithmetic(typing: Any, function: object) -> None:
    for left, right in PAIRS:
        assert inferred(typing, function, left, right) == types.arithmetic(left, right), (left, right)


@pytest.mark.parametrize("function", [operator.and_, operator.or_, operator.xor])
def test_bitwise(typing: Any, function: object) -> None:
    for left, right in PAIRS:
        expected = types.BOOL if left == right == types.BOOL else types.arithmetic(left, right)
        assert inferred(typing, function, left, right) == expected, (left, right)


@pytest.mark.parametrize("function", [operator.lshift, operator.rshift])
def test_shifts(typing: Any, function: object) -> None:
    for left, right in PAIRS:
        assert inferred(typing, function, left, right) == types.shifted(left), (left, right)


def test_joined_variables_minimum_and_maximum(typing: Any) -> None:
    for left, right in PAIRS:
        expected = types.unified(left, right) or "float64"
        assert str(typing.unify_types(of(left), of(right))) == expected, (left, right)
        if {left, right} != {types.BOOL}:
            assert inferred(typing, min, left, right) == expected, (left, right)


def test_the_variable_of_a_loop(typing: Any) -> None:
    for names in [(name,) for name in types.INTEGERS] + list(itertools.product(types.INTEGERS, repeat=2)):
        counter = types.counter(names)
        if counter is not None:
            assert inferred(typing, range, *names) == f"range_state_{counter}", names


@pytest.mark.parametrize("name", ALL)
def test_signs_are_changed_in_the_own_type(name: str) -> None:
    value = (np.bool_ if name == types.BOOL else getattr(np, name))(1)
    compiled = numba.njit(lambda a: (-a, a))
    negative = int(compiled(value)[0])
    returned = compiled.overloads[compiled.signatures[0]].signature.return_type
    assert str(returned[0]) == types.widened(name)
    own = types.INT64 if name == types.BOOL else name
    assert negative == (-1 if types.is_signed(own) else (1 << types.bits(own)) - 1)

"""Integer types as numba infers them: what ``+`` of a uint16 and an int32 is, what joining two variables gives.

In: names of dtypes, ``bool`` among them. Out: names, or None where numba would go on in float64. The tests compare every
entry with what numba itself infers.
"""

from __future__ import annotations

BOOL = "bool"
INT64 = "int64"
UINT64 = "uint64"
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

EXACT_IN_FLOAT64 = 1 << 53
"""Integers up to this magnitude are the same in float64, in which numba compares uint64 with signed integers."""


def bits(name: str) -> int:
    return 1 if name == BOOL else int(name.removeprefix("u").removeprefix("int"))


def is_signed(name: str) -> bool:
    return name.startswith("int")


def bounds(name: str) -> tuple[int, int]:
    """Smallest and largest value."""
    width = bits(name)
    return (-(1 << (width - 1)), (1 << (width - 1)) - 1) if is_signed(name) else (0, (1 << width) - 1)


def arithmetic(left: str, right: str) -> str:
    """The type of + − * // % & | ^ (of two bools, & | ^ stay bool: the caller's case)."""
    return UINT64 if left.startswith("uint") and right.startswith("uint") else INT64


def shifted(left: str) -> str:
    """The type of a shift: the left side decides."""
    return UINT64 if left.startswith("uint") else INT64


def widened(name: str) -> str:
    """The type of −a and ~a. They are computed in the type of ``a`` itself, then extended."""
    return UINT64 if name.startswith("uint") else INT64


def unified(left: str, right: str) -> str | None:
    """The type of a variable that got either, of min and max, and the one in which both are compared. None: float64."""
    if left == right or right == BOOL:
        return left
    if left == BOOL:
        return right
    if is_signed(left) == is_signed(right):
        return left if bits(left) >= bits(right) else right
    signed, unsigned = (left, right) if is_signed(left) else (right, left)
    width = max(bits(signed), 2 * bits(unsigned))
    return f"int{width}" if width <= 64 else None


def counter(arguments: tuple[str, ...]) -> str | None:
    """The type of the variable of ``for … in range(…)``. None: numba's choice depends on more than this."""
    if INT64 in arguments:
        return INT64
    if all(name.startswith("uint") for name in arguments):
        return UINT64
    if all(name in ("int8", "int16", "int32") for name in arguments):
        return "int32"
    return None

"""What a kernel may call besides its own helpers: ``emit`` and ``append``, compiled into it. Runs inside the sandbox only.

In: the user's ``feedback``, which stands for the memory that both write to. Out: entries and rows with the number of the
frame under way, and counts of what found no room. Nothing here is trusted by the gateway, which checks what it copies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from kernels.contract import Kernel
from kernels.wire import (
    AT_FRAME,
    FEEDBACK_DROPPED,
    FEEDBACK_DTYPE,
    FEEDBACK_KEPT,
    ROWS_DROPPED,
    ROWS_KEPT,
    ROWS_OF_FRAME,
)


class Feedback(NamedTuple):
    """The user's ``feedback``. ``counters``: as numbered in wire."""

    counters: npt.NDArray[np.int64]
    entries: npt.NDArray[np.void]
    rows: npt.NDArray[np.void]


def nowhere(counters: npt.NDArray[np.int64], rows_dtype: np.dtype[np.void]) -> Feedback:
    """A feedback without room: everything is counted as dropped."""
    return Feedback(counters, np.zeros(0, FEEDBACK_DTYPE), np.zeros(0, rows_dtype))


def jit(function: Callable[..., Any], *, counted: bool = False, entry: bool = False) -> Any:
    """numba, as everything in a sandbox is compiled: bounds checks on, no fastmath, numpy's error model (division by zero
    gives inf or nan, as on arrays), no cache on disk (it unpickles), never parallel (processes are how this scales).

    ``counted``: with reference counts of arrays. Without, a function cannot make new arrays, and is up to twenty times as
    fast where it touches state or parameter arrays pixel by pixel: each touch costs two atomic operations, and hinders
    everything the optimiser could do.

    ``entry``: Python calls it. Others are called by compiled code only; the wrappers they do without are a quarter of the time it
    takes to compile a small kernel.
    """
    compiler: Any = numba.njit  # _nrt is not in its published signature
    return compiler(
        function,
        boundscheck=True,
        error_model="numpy",
        no_cpython_wrapper=not entry,
        no_cfunc_wrapper=True,
        _nrt=counted,
    )


def _emit(feedback, code, value):  # type: ignore[no-untyped-def]  # compiled: numba infers
    n = feedback.counters[FEEDBACK_KEPT]
    if n < feedback.entries.size:
        feedback.entries[n].frame = feedback.counters[AT_FRAME]
        feedback.entries[n].code = code
        feedback.entries[n].value = value
        feedback.counters[FEEDBACK_KEPT] = n + 1
    else:
        feedback.counters[FEEDBACK_DROPPED] += 1


emit = jit(_emit)


def no_append(*_: object) -> None:
    """In place of ``append`` where ROWS is not declared: the gate does not let it be called."""
    raise TypeError("ROWS is not declared")


_APPEND = """
def append(feedback, {arguments}):
    n = feedback.counters[{kept}]
    if n < feedback.rows.size and feedback.counters[{of_frame}] < {most}:
        row = feedback.rows[n]
        row["frame"] = feedback.counters[{at_frame}]
{stores}
        feedback.counters[{kept}] = n + 1
        feedback.counters[{of_frame}] += 1
    else:
        feedback.counters[{dropped}] += 1
"""


def append_of(kernel: Kernel) -> Any:
    """``append(feedback, value, …)`` for the fields of the kernel's ROWS. numba stores to fields by names it can see in
    the source, so the source is made; names of fields are plain names (kernels/declarations.py)."""
    if kernel.rows is None:
        return no_append
    names = [name for name, _ in kernel.rows.fields]
    source = _APPEND.format(
        arguments=", ".join(f"value_{n}" for n in range(len(names))),
        stores="\n".join(f"        row[{name!r}] = value_{n}" for n, name in enumerate(names)),
        most=kernel.rows.most,
        kept=ROWS_KEPT,
        of_frame=ROWS_OF_FRAME,
        at_frame=AT_FRAME,
        dropped=ROWS_DROPPED,
    )
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    return jit(namespace["append"])

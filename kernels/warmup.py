"""Takes numba through everything a child will need, so that no child opens a file or fills a cache of its own.

Children are locked down before they compile: what numpy and numba import lazily must be in memory by then, and every
cache filled here is shared by all of them, copy on write.
"""

from __future__ import annotations

import dataclasses
import encodings.idna  # noqa: F401  # loaded lazily by the socket module
import hashlib

import numpy as np
import numpy.fft  # loaded lazily by numba's registry

from kernels import explain
from kernels.chain import Chain, arguments_of, blank_memories
from kernels.contract import ArraySpec, Kernel, OutSpec, ParamSpec, RowsSpec, StateSpec
from kernels.decode.warmup import warm_decoders
from kernels.layout.reader import warm_reader
from kernels.program import NotCompiled, Program

_USUAL = """
import numpy as np
from hiss import DROP, KEEP, REPLACE, STOP, append, emit

LIMIT = 4
TABLE = (1, 2, 3)
LONG = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18)


def weight(value, low):
    return value - low if value >= low else 0


def frame(frame, params, state, index, out, feedback):
    n = 0
    total = 0.0
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            n += frame[y, x] >= params.low
            total += weight(frame[y, x], params.low) * params.scale * params.mask[y, x]
            out[y, x] = total
    state.counts[min(n, 0)] += TABLE[0] + LONG[n]
    state.peak[0] = max(state.peak[0], np.sqrt(total))
    emit(feedback, 1, n)
    append(feedback, 1, n)
    if n == 3:
        return STOP
    return REPLACE if n > LIMIT else DROP


def finish(state, params):
    state.peak[0] = state.peak[0] / state.counts[0]
"""
_ALLOCATES = """
def frame(frame, params, state, index, out, feedback):
    emit(feedback, 1, index)
    return np.zeros(3)[1] > 0
"""
_WRONG = (
    "def frame(frame, params, state, index, out, feedback):\n    return frame + state\n",
    "def frame(frame, params, state, index, out, feedback):\n    frame[0, 0] = 1\n    return 1\n",
    "def frame(frame, params, state, index, out, feedback):\n    return 1.5\n",
    "def frame(frame:\n",
)
_OUT_OF_BOUNDS = "def frame(frame, params, state, index, out, feedback):\n    return frame[index + 100, 0]\n"


def _kernel(name: str, source: str, *, declared: bool = False) -> Kernel:
    plain = Kernel(name, source, hashlib.sha256(f"warm-up {name}".encode()).hexdigest(), (), ())
    if not declared:
        return plain
    return dataclasses.replace(
        plain,
        params=(ParamSpec("low", "uint16", 1), ParamSpec("scale", "float64", 1.0)),
        arrays=(ArraySpec("mask", "uint8", None),),
        state=(StateSpec("counts", "int64", (4,), "sum"), StateSpec("peak", "float64", (1,), "max")),
        out=OutSpec("float32", None),
        rows=RowsSpec((("x", "float32"), ("n", "int64")), 2),
        has_finish=True,
    )


def _run(*kernels: Kernel, dtype: str = "<u2") -> None:
    chain = Chain([Program(kernel, stage) for stage, kernel in enumerate(kernels)])
    memories = blank_memories(chain, (dtype, (2, 2)))
    drive = chain.compile((dtype, (2, 2)), memories)
    # Memory of the compiler's own making has one element in each dimension: so has the frame.
    frames = np.ones((1, 1, 1), dtype)
    frames.flags.writeable = False
    drive(frames, np.zeros(1, np.uint8), 0, False, -1, *arguments_of(memories))
    for program, memory in zip(chain.programs, memories, strict=True):
        if program.finish is not None:
            program.finish(memory.state, memory.params)


def warm() -> None:
    """Compile and run, and fail in every way a user's kernel can fail; decode once with every codec."""
    warm_decoders()
    warm_reader()
    explain.remember_lines()
    _run(_kernel("usual", _USUAL, declared=True))
    _run(_kernel("allocates", _ALLOCATES))
    for source in _WRONG:
        try:
            _run(_kernel("wrong", source))
        except NotCompiled:
            continue
        raise RuntimeError("a kernel that cannot compile was compiled")
    try:
        _run(_kernel("raises", _OUT_OF_BOUNDS))
    except IndexError as error:
        explain.raised(error)
        return
    raise RuntimeError("an access out of bounds was not caught")

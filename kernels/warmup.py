"""Takes numba through everything a child will need, so that no child opens a file or fills a cache of its own.

Children are locked down before they compile: what numpy and numba import lazily must be in memory by then, and every
cache filled here is shared by all of them, copy on write.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401  # loaded lazily by the socket module
import hashlib

import numpy as np
import numpy.fft  # loaded lazily by numba's registry

from kernels.contract import Kernel, ParamSpec, StateSpec
from kernels.decode.warmup import warm_decoders
from kernels.program import Feedback, NotCompiled, Program
from kernels.wire import FEEDBACK_DTYPE

_USUAL = """
import numpy as np
from hiss import DROP, KEEP, emit

LIMIT = 4
TABLE = (1, 2, 3)


def weight(value, low):
    return value - low if value >= low else 0


def frame(frame, params, state, index, out, feedback):
    n = 0
    total = 0.0
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            n += frame[y, x] >= params.low
            total += weight(frame[y, x], params.low) * params.scale
    state.counts[min(n, LIMIT - 1)] += TABLE[0]
    state.peak[0] = max(state.peak[0], np.sqrt(total))
    emit(feedback, 1, n)
    return KEEP if n > LIMIT else DROP
"""
_WRONG = (
    "def frame(frame, params, state, index, out, feedback):\n    return frame + state\n",
    "def frame(frame, params, state, index, out, feedback):\n    frame[0, 0] = 1\n    return 1\n",
    "def frame(frame, params, state, index, out, feedback):\n    return 1.5\n",
    "def frame(frame:\n",
)
_OUT_OF_BOUNDS = "def frame(frame, params, state, index, out, feedback):\n    return frame[index + 100, 0]\n"


def _kernel(name: str, source: str, *, declared: bool) -> Kernel:
    return Kernel(
        name=name,
        source=source,
        sha256=hashlib.sha256(f"warm-up {name}".encode()).hexdigest(),
        params=(ParamSpec("low", "uint16", 1), ParamSpec("scale", "float64", 1.0)) if declared else (),
        state=(StateSpec("counts", "int64", (4,), "sum"), StateSpec("peak", "float64", (1,), "max"))
        if declared
        else (),
    )


def _run(kernel: Kernel, dtype: str) -> None:
    program = Program(kernel)
    params = program.params({spec.name: spec.default for spec in kernel.params})
    state = program.state([np.zeros(spec.shape, spec.dtype) for spec in kernel.state])
    feedback = Feedback(np.zeros(3, np.int64), np.zeros(8, FEEDBACK_DTYPE))
    drive = program.compile(dtype, (2, 2), params, state, feedback)
    frames = np.ones((1, 2, 2), dtype)
    frames.flags.writeable = False
    drive(frames, params, state, feedback, np.zeros(1, np.uint8), 0, 1)


def warm() -> None:
    """Compile and run, and fail in every way a user's kernel can fail; decode once with every codec."""
    warm_decoders()
    _run(_kernel("usual", _USUAL, declared=True), "<u2")
    for source in _WRONG:
        try:
            _run(_kernel("wrong", source, declared=False), "<u2")
        except NotCompiled:
            continue
        raise RuntimeError("a kernel that cannot compile was compiled")
    try:
        _run(_kernel("raises", _OUT_OF_BOUNDS, declared=False), "<u2")
    except IndexError:
        return
    raise RuntimeError("an access out of bounds was not caught")

"""A kernel called directly on frames in memory, with nothing around it: the ceiling of a gateway that runs it.

``python -m bench.alone FRAMES`` reads a kernel's source from stdin, compiles its ``frame()`` as the gateway does (bounds
checks, numpy's error model), and prints the frames/s that one core judges. Several such processes give the figure of several
cores.
"""

from __future__ import annotations

import collections
import math
import subprocess
import sys
import time
from typing import Any

import numba
import numpy as np

SIDE = 1024
"""Frames are SIDE × SIDE uint16."""


def frames_per_s(source: bytes, frames: int, processes: int) -> float:
    """All processes together, each over ``frames`` frames."""
    command = [sys.executable, "-m", "bench.alone", str(frames)]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    for process in running:
        assert process.stdin is not None
        process.stdin.write(source.decode())
        process.stdin.close()
    rates = []
    for process in running:
        assert process.stdout is not None
        rates.append(float(process.stdout.read()))
        process.wait()
    return sum(rates)


def _alone(source: str, frames: int) -> float:
    namespace: dict[str, object] = {"np": np, "math": math, "KEEP": 1, "DROP": 0}
    exec(source, namespace)
    state = namespace["STATE"]
    assert isinstance(state, dict)
    arrays = collections.namedtuple("arrays", list(state))(
        *(np.zeros(shape, dtype) for dtype, shape, _ in state.values())
    )
    judge: Any = numba.njit(namespace["frame"], boundscheck=True, error_model="numpy")
    noise = np.random.default_rng(1).integers(0, 1 << 16, (16, SIDE, SIDE), np.uint16)
    noise.flags.writeable = False
    judge(noise[0], None, arrays, 0, None, None)
    started = time.perf_counter()
    for index in range(frames):
        judge(noise[index % len(noise)], None, arrays, index, None, None)
    return frames / (time.perf_counter() - started)


if __name__ == "__main__":
    print(_alone(sys.stdin.read(), int(sys.argv[1])))

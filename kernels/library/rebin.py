"""Bins pixels 2 by 2 (or N by N) into a smaller frame of a smaller dtype, and reports what does not fit.

Computes: each pixel of ``out`` is the sum of ``N`` by ``N`` pixels; rows and columns that are left over at the end
are cut off. A sum above ``MOST`` is stored as ``MOST``, one below zero as 0, and counted. Source: plain counting.

Set ``HEIGHT`` and ``WIDTH`` to the shape of your frames, ``N``, and ``MOST`` to the largest value of the dtype in
``OUT``.

State: ``frames``; ``overflow``, ``underflow`` (pixels of ``out`` that did not fit, all frames); ``largest`` (largest
sum, counts).
Feedback: code 1 for a frame in which a sum did not fit, value: number of such pixels.
OUT: uint16, (HEIGHT // N, WIDTH // N), counts. Verdict: REPLACE. Frames: two-dimensional integers of at most 32 bits.
"""

import numpy as np
from hiss import REPLACE, emit

HEIGHT = 195
WIDTH = 487
N = 2
MOST = 65535

STATE = {
    "frames": ("int64", (1,), "sum"),
    "overflow": ("int64", (1,), "sum"),
    "underflow": ("int64", (1,), "sum"),
    "largest": ("int64", (1,), "max"),
}
OUT = ("uint16", (HEIGHT // N, WIDTH // N))


def frame(frame, params, state, index, out, feedback):
    above = 0
    below = 0
    largest = np.int64(frame[0, 0])
    for y in range(HEIGHT // N):
        for x in range(WIDTH // N):
            total = 0
            for j in range(N):
                for i in range(N):
                    total += frame[N * y + j, N * x + i]
            largest = max(largest, total)
            above += total > MOST
            below += total < 0
            out[y, x] = min(max(total, 0), MOST)
    state.frames[0] += 1
    state.overflow[0] += above
    state.underflow[0] += below
    state.largest[0] = max(state.largest[0], largest)
    if above + below > 0:
        emit(feedback, 1, above + below)
    return REPLACE

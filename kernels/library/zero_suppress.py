"""Lossless sparsification: a frame that is mostly zeros becomes the list of its other pixels.

Computes: ``out[0]`` is the number n of pixels that are not zero, ``out[1]`` to ``out[n]`` their numbers, counted
along the frame's rows, and ``out[1 + CAPACITY]`` and on their values, in the same order; the rest is zero. A frame of
more than ``CAPACITY`` such pixels is kept as it is, and reported: nothing is ever lost. Source: plain zero
suppression.

Back again, in numpy: ``frame = np.zeros(shape, dtype); n = out[0]; frame.flat[out[1 : n + 1]] = out[CAPACITY + 1 :
CAPACITY + 1 + n].astype(dtype)``, which is bit for bit what the detector sent; negative values come back by the cast,
because they are stored modulo 2^32.

Set ``CAPACITY`` to the most pixels you expect; the stored frame has 8 ``CAPACITY`` + 4 bytes, whatever it holds, so
that of a 2 MB frame an eighth is left at 32768.

State: ``frames``, ``dense`` (frames of more than CAPACITY pixels, kept whole), ``pixels`` (not zero, over all
frames), ``fullest`` (most such pixels of one frame).
Feedback: code 1 for a dense frame, value: number of its pixels that are not zero.
OUT: uint32, 2 CAPACITY + 1. Verdict: REPLACE, KEEP for dense frames. Frames: two-dimensional integers of at most 32
bits.
"""

import numpy as np
from hiss import KEEP, REPLACE, emit

CAPACITY = 32768

STATE = {
    "frames": ("int64", (1,), "sum"),
    "dense": ("int64", (1,), "sum"),
    "pixels": ("int64", (1,), "sum"),
    "fullest": ("int64", (1,), "max"),
}
OUT = ("uint32", (2 * CAPACITY + 1,))


def count_row(row):
    n = 0
    for x in range(row.size):
        n += row[x] != 0
    return n


def frame(frame, params, state, index, out, feedback):
    width = frame.shape[1]
    n = 0
    for y in range(frame.shape[0]):
        in_row = count_row(frame[y])
        if in_row > 0 and n + in_row <= CAPACITY:
            last = n + in_row
            x = 0
            while n < last:
                if frame[y, x] != 0:
                    out[1 + n] = y * width + x
                    out[1 + CAPACITY + n] = np.uint32(frame[y, x])
                    n += 1
                x += 1
        else:
            n += in_row
    out[0] = n
    state.frames[0] += 1
    state.pixels[0] += n
    state.fullest[0] = max(state.fullest[0], n)
    if n > CAPACITY:
        state.dense[0] += 1
        emit(feedback, 1, n)
        return KEEP
    return REPLACE

"""Stores frames in a smaller dtype, as 32-bit counts in 16 bits, and reports what does not fit.

Computes: ``out`` is the frame, with values above ``MOST`` stored as ``MOST`` and negative ones as 0, both counted. A
frame in which more than ``max_pixels`` did not fit is kept as it is. Source: plain counting.

Set ``MOST`` to the largest value of the dtype in ``OUT``.

Parameters: ``max_pixels`` that may be cut in a frame (dead pixels and gaps carry the largest or negative values and
are always cut, so count them first).
State: ``frames``; ``whole`` (frames kept as they are); ``overflow``, ``underflow`` (pixels, all frames); ``largest``
(counts).
Feedback: code 1 for a frame kept as it is, value: number of pixels that did not fit.
OUT: uint16, same shape, counts. Verdict: REPLACE, or KEEP. Frames: two-dimensional integers of at most 32 bits.
"""

import numpy as np
from hiss import KEEP, REPLACE, emit

MOST = 65535

PARAMS = {"max_pixels": ("int64", 0)}
STATE = {
    "frames": ("int64", (1,), "sum"),
    "whole": ("int64", (1,), "sum"),
    "overflow": ("int64", (1,), "sum"),
    "underflow": ("int64", (1,), "sum"),
    "largest": ("int64", (1,), "max"),
}
OUT = ("uint16", "same")


def frame(frame, params, state, index, out, feedback):
    above = 0
    below = 0
    largest = np.int64(frame[0, 0])
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            value = np.int64(frame[y, x])
            largest = max(largest, value)
            above += value > MOST
            below += value < 0
            out[y, x] = min(max(value, 0), MOST)
    state.frames[0] += 1
    state.overflow[0] += above
    state.underflow[0] += below
    state.largest[0] = max(state.largest[0], largest)
    if above + below > params.max_pixels:
        state.whole[0] += 1
        emit(feedback, 1, above + below)
        return KEEP
    return REPLACE

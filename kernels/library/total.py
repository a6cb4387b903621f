"""Sums every frame, and says at once when one is too dim or too bright: the beam dipped, a shutter stuck.

Computes: the sum of all pixels of a frame, exact. Source: plain counting. Runs on an FPGA as well (one pass, integers
only).

Parameters: ``low``, ``high`` in counts a frame: a frame outside is reported, and dropped.
State: ``frames`` (frames), ``counts`` (all frames together), ``brightest_pixel`` (counts), ``dimmest`` and
``brightest`` (the smallest and the largest sum of a frame, counts).
Feedback: code 1 too dim, code 2 too bright; value: the frame's sum in counts.
Verdict: DROP for frames out of range, KEEP else. Frames: two-dimensional integers of at most 32 bits (a sum of 64-bit
pixels may wrap). Negative markers of gaps (-1, -2 in CBF files) are summed as they are.
"""

from hiss import DROP, KEEP, emit

LOWEST = -(2**31)

PARAMS = {"low": ("int64", 0), "high": ("int64", 2**62)}
STATE = {
    "frames": ("int64", (1,), "sum"),
    "counts": ("int64", (1,), "sum"),
    "brightest_pixel": ("int64", (1,), "max"),
    "dimmest": ("int64", (1,), "min"),
    "brightest": ("int64", (1,), "max"),
}


def frame(frame, params, state, index, out, feedback):
    counts = 0
    highest = LOWEST
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            counts += frame[y, x]
            highest = max(highest, frame[y, x])
    state.frames[0] += 1
    state.counts[0] += counts
    state.brightest_pixel[0] = max(state.brightest_pixel[0], highest)
    state.dimmest[0] = min(state.dimmest[0], counts)
    state.brightest[0] = max(state.brightest[0], counts)
    if counts < params.low:
        emit(feedback, 1, counts)
        return DROP
    if counts > params.high:
        emit(feedback, 2, counts)
        return DROP
    return KEEP

"""Watches a region: sum, brightest pixel, centre of mass; tells the instrument when the sum leaves its range.

Computes: over the rectangle ``top <= y < bottom``, ``left <= x < right``: sum, largest value, and the moments that
finish() turns into the centre of mass over all frames. All sums are exact.
Source: plain counting. Runs on an FPGA as well (one pass, integers only, no division in frame()).

Parameters: ``top``, ``bottom``, ``left``, ``right`` in pixels; ``low``, ``high`` in counts: the range in which a
frame's sum over the region is in order.
State: ``frames`` (frames), ``counts`` (sum over the region and all frames), ``brightest_pixel`` (counts),
``moment_y``, ``moment_x`` (counts times pixels, from the frame's corner), ``dim``, ``bright`` (frames out of range).
Result: ``centre_milli`` (y and x of the centre of mass over all frames, in thousandths of a pixel, the centre of the
first pixel being 0; -1 where there were no counts). It is an integer because a core of an FPGA has integers only; the
moments divided by ``counts`` are the centre to any precision.
Feedback: code 1 below the range, code 2 above it; value: the frame's sum over the region in counts.
Verdict: KEEP. Frames: two-dimensional integers of at most 32 bits.
"""

from hiss import KEEP, emit

PARAMS = {
    "top": ("int64", 0),
    "bottom": ("int64", 64),
    "left": ("int64", 0),
    "right": ("int64", 64),
    "low": ("int64", 0),
    "high": ("int64", 2**62),
}
STATE = {
    "frames": ("int64", (1,), "sum"),
    "counts": ("int64", (1,), "sum"),
    "moment_y": ("int64", (1,), "sum"),
    "moment_x": ("int64", (1,), "sum"),
    "brightest_pixel": ("int64", (1,), "max"),
    "dim": ("int64", (1,), "sum"),
    "bright": ("int64", (1,), "sum"),
    "centre_milli": ("int64", (2,), "sum"),
}


def frame(frame, params, state, index, out, feedback):
    counts = 0
    moment_y = 0
    moment_x = 0
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            if y >= params.top and y < params.bottom and x >= params.left and x < params.right:
                counts += frame[y, x]
                moment_y += frame[y, x] * y
                moment_x += frame[y, x] * x
                state.brightest_pixel[0] = max(state.brightest_pixel[0], frame[y, x])
    state.frames[0] += 1
    state.counts[0] += counts
    state.moment_y[0] += moment_y
    state.moment_x[0] += moment_x
    if counts < params.low:
        state.dim[0] += 1
        emit(feedback, 1, counts)
    if counts > params.high:
        state.bright[0] += 1
        emit(feedback, 2, counts)
    return KEEP


def finish(state, params):
    state.centre_milli[0] = thousandths(state.moment_y[0], state.counts[0])
    state.centre_milli[1] = thousandths(state.moment_x[0], state.counts[0])


def thousandths(moment, counts):
    """``1000 * moment // counts``, which might not fit if it were computed in this order; -1 where there is nothing."""
    if counts <= 0:
        return -1
    return 1000 * (moment // counts) + 1000 * (moment % counts) // counts

"""Keeps frames with enough bright pixels: the simplest hit finder, and the fastest.

Computes: the number of pixels of at least ``low`` in a frame; the frame is a hit when there are ``min_pixels`` of
them.
Source: plain counting. Runs on an FPGA as well (one pass, integers only).

Parameters: ``low`` in the detector's unit (counts or ADU); ``min_pixels`` in pixels.
State: ``hits`` and ``frames`` (frames), ``bright`` (pixels of at least ``low``, over all frames).
Feedback: code 1 for each hit, value: number of bright pixels.
Verdict: KEEP for hits, DROP else. Frames: two-dimensional integers.
"""

from hiss import DROP, KEEP, emit

PARAMS = {"low": ("uint32", 12), "min_pixels": ("int64", 40)}
STATE = {
    "frames": ("int64", (1,), "sum"),
    "hits": ("int64", (1,), "sum"),
    "bright": ("int64", (1,), "sum"),
}


def frame(frame, params, state, index, out, feedback):
    n = 0
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            if frame[y, x] >= params.low:
                n += 1
    state.frames[0] += 1
    state.bright[0] += n
    if n >= params.min_pixels:
        state.hits[0] += 1
        emit(feedback, 1, n)
        return KEEP
    return DROP

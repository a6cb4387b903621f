"""Finds spots in 3 by 3 windows: bright pixels among dimmer ones, with enough light around; keeps frames of many.

Computes: the number of pixels (not at the frame's edge) that are above ``low``, larger than the four neighbours that
come before in reading order and not smaller than the four that come after (so one pixel of a plateau counts), and
whose 3 by 3 sum is at least ``window``. Source: plain local maxima. Runs on an FPGA as well (one pass over a window
of three rows, integers only).

Parameters: ``low`` (a pixel) and ``window`` (the sum of nine), in counts or ADU; ``min_spots``: spots of a frame
worth keeping.
State: ``frames``, ``hits`` (frames kept), ``spots`` (all frames).
Feedback: code 1 for each hit, value: number of spots.
Verdict: KEEP for hits, DROP else. Frames: two-dimensional integers of at most 32 bits.
"""

from hiss import DROP, KEEP, emit

PARAMS = {"low": ("uint32", 20), "window": ("uint32", 50), "min_spots": ("int64", 10)}
STATE = {
    "frames": ("int64", (1,), "sum"),
    "hits": ("int64", (1,), "sum"),
    "spots": ("int64", (1,), "sum"),
}


def frame(frame, params, state, index, out, feedback):
    spots = 0
    for y in range(1, frame.shape[0] - 1):
        for x in range(1, frame.shape[1] - 1):
            centre = frame[y, x]
            if centre >= params.low:
                before = max(max(frame[y - 1, x - 1], frame[y - 1, x]), max(frame[y - 1, x + 1], frame[y, x - 1]))
                after = max(max(frame[y, x + 1], frame[y + 1, x - 1]), max(frame[y + 1, x], frame[y + 1, x + 1]))
                light = centre + frame[y - 1, x - 1] + frame[y - 1, x] + frame[y - 1, x + 1]
                light += frame[y, x - 1] + frame[y, x + 1]
                light += frame[y + 1, x - 1] + frame[y + 1, x] + frame[y + 1, x + 1]
                if centre > before and centre >= after and light >= params.window:
                    spots += 1
    state.frames[0] += 1
    state.spots[0] += spots
    if spots >= params.min_spots:
        state.hits[0] += 1
        emit(feedback, 1, spots)
        return KEEP
    return DROP

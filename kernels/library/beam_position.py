"""Follows the beam: centre of mass of the light above a background; tells the instrument when it has moved.

Computes, for each frame, over the rectangle ``top <= y < bottom``, ``left <= x < right``: the centre of mass of
(value - ``background``) of the pixels above ``background``. Source: first moments, as ISO 11146-1:2021 defines the
position of a beam, with a fixed background and a fixed region.

Parameters: ``top``, ``bottom``, ``left``, ``right`` in pixels; ``background`` in counts; ``y``, ``x``: where the beam
should be, and ``tolerance``: how far it may be from there, in pixels; ``min_counts`` above background: with fewer,
the beam is off.
State: ``frames``, ``off``, ``moved`` (frames), ``lowest``, ``highest`` (extremes of y and x while the beam was on, in
pixels).
Rows: ``y``, ``x`` (pixels), ``counts`` (above background), for each frame with beam.
Feedback: code 1 beam off (value: counts), code 2 (value: y) and code 3 (value: x) when it is farther away than the
tolerance.
Verdict: KEEP. Frames: two-dimensional, any dtype.
"""

from hiss import KEEP, append, emit

PARAMS = {
    "top": ("int64", 0),
    "bottom": ("int64", 64),
    "left": ("int64", 0),
    "right": ("int64", 64),
    "background": ("int64", 0),
    "y": ("float64", 32.0),
    "x": ("float64", 32.0),
    "tolerance": ("float64", 1.0),
    "min_counts": ("int64", 1000),
}
STATE = {
    "frames": ("int64", (1,), "sum"),
    "off": ("int64", (1,), "sum"),
    "moved": ("int64", (1,), "sum"),
    "lowest": ("float64", (2,), "min"),
    "highest": ("float64", (2,), "max"),
}
ROWS = {"y": "float64", "x": "float64", "counts": "float64"}
ROWS_MAX = 1


def frame(frame, params, state, index, out, feedback):
    counts = 0
    moment_y = 0
    moment_x = 0
    for y in range(max(params.top, 0), min(params.bottom, frame.shape[0])):
        along_x = 0
        for x in range(max(params.left, 0), min(params.right, frame.shape[1])):
            above = max(frame[y, x] - params.background, 0)
            along_x += above
            moment_x += above * x
        counts += along_x
        moment_y += along_x * y
    state.frames[0] += 1
    if counts < params.min_counts:
        state.off[0] += 1
        emit(feedback, 1, counts)
        return KEEP
    centre_y = moment_y / counts
    centre_x = moment_x / counts
    append(feedback, centre_y, centre_x, counts)
    state.lowest[0] = min(state.lowest[0], centre_y)
    state.lowest[1] = min(state.lowest[1], centre_x)
    state.highest[0] = max(state.highest[0], centre_y)
    state.highest[1] = max(state.highest[1], centre_x)
    if (centre_y - params.y) ** 2 + (centre_x - params.x) ** 2 > params.tolerance**2:
        state.moved[0] += 1
        emit(feedback, 2, centre_y)
        emit(feedback, 3, centre_x)
    return KEEP

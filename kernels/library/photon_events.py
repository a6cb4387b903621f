"""Lossless sparsification to a table: pixels that are not zero become rows; what became rows entirely is dropped.

Computes: a row for every pixel that is not zero. A frame of more than ``ROWS_MAX`` such pixels gets no rows: it is
kept, and reported. So with ``raw=kept`` the product's table and the frames that are left hold everything the detector
sent.
Source: plain zero suppression. For fuller frames use zero_suppress.py.

Back again, in numpy: ``frame = np.zeros(shape, dtype); mine = rows[rows["frame"] == number]; frame[mine["y"],
mine["x"]] = mine["value"]``.

State: ``frames``, ``dense`` (frames kept because they have too many), ``pixels`` (not zero, over all frames).
Rows: ``y``, ``x`` (pixels), ``value`` (counts).
Feedback: code 1 for a dense frame, value: number of its pixels that are not zero.
Verdict: DROP (all of it is in the rows), KEEP for dense frames. Frames: two-dimensional integers of at most 32 bits.
"""

from hiss import DROP, KEEP, append, emit

STATE = {
    "frames": ("int64", (1,), "sum"),
    "dense": ("int64", (1,), "sum"),
    "pixels": ("int64", (1,), "sum"),
}
ROWS = {"y": "int32", "x": "int32", "value": "int64"}
ROWS_MAX = 4096


def count_row(row):
    n = 0
    for x in range(row.size):
        n += row[x] != 0
    return n


def frame(frame, params, state, index, out, feedback):
    n = 0
    for y in range(frame.shape[0]):
        n += count_row(frame[y])
    state.frames[0] += 1
    state.pixels[0] += n
    if n > ROWS_MAX:
        state.dense[0] += 1
        emit(feedback, 1, n)
        return KEEP
    for y in range(frame.shape[0]):
        if count_row(frame[y]) > 0:
            for x in range(frame.shape[1]):
                if frame[y, x] != 0:
                    append(feedback, y, x, frame[y, x])
    return DROP

"""Mean and variance of every pixel over all frames, from exact integer sums.

Computes: for each pixel, over the frames in which its value lay within ``lowest`` to ``highest``: the mean, and the
unbiased sample variance (division by n - 1). Sums and sums of squares are integers, so they do not depend on the
order of frames, nor on how the work was shared. finish() takes squared deviations from the integer nearest to the
mean, in integers, where nothing cancels: the results are as good as float64 can hold. Source: the shifted sums of T.
F. Chan, G. H. Golub, R. J. LeVeque, Am. Stat. 37 (1983) 242, doi:10.1080/00031305.1983.10483115, here in exact
arithmetic.

Set ``HEIGHT`` and ``WIDTH`` to the shape of your frames; 36 bytes a pixel, so at most 1.8 megapixels.

Parameters: ``lowest``, ``highest`` in counts or ADU: values outside are not used (gaps and dead pixels are marked by
-1 or by the largest value of the dtype). Bound: frames times the larger of lowest² and highest² must stay below 2^63,
which is 8 million frames for the default of 20-bit counters and 2 thousand million for ``highest`` 65535; beyond it
finish() says NaN.
State: ``frames``; ``total`` (counts), ``squares`` (counts²), ``unused`` (frames in which the pixel was out of range),
by pixel.
Result: ``mean`` (counts; NaN where no frame was used), ``variance`` (counts²; NaN below two frames).
Verdict: KEEP. Frames: two-dimensional integers of shape (HEIGHT, WIDTH).
"""

import numpy as np
from hiss import KEEP

HEIGHT = 195
WIDTH = 487

PARAMS = {"lowest": ("int64", 0), "highest": ("int64", 2**20 - 1)}
STATE = {
    "frames": ("int64", (1,), "sum"),
    "total": ("int64", (HEIGHT, WIDTH), "sum"),
    "squares": ("int64", (HEIGHT, WIDTH), "sum"),
    "unused": ("int32", (HEIGHT, WIDTH), "sum"),
    "mean": ("float64", (HEIGHT, WIDTH), "sum"),
    "variance": ("float64", (HEIGHT, WIDTH), "sum"),
}


def frame(frame, params, state, index, out, feedback):
    total = state.total
    squares = state.squares
    unused = state.unused
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            value = np.int64(frame[y, x])
            # A choice of values instead of a branch: all of it in vector registers, however many pixels are out of range.
            fits = (params.lowest <= value) & (value <= params.highest)
            value = value if fits else 0
            unused[y, x] += not fits
            total[y, x] += value
            squares[y, x] += value * value
    state.frames[0] += 1
    return KEEP


def finish(state, params):
    largest = max(abs(params.lowest), abs(params.highest))
    exact = largest < 2**31 and state.frames[0] <= (2**63 - 1) // max(largest * largest, 1)
    for y in range(HEIGHT):
        for x in range(WIDTH):
            n = state.frames[0] - state.unused[y, x]
            state.mean[y, x] = np.nan
            state.variance[y, x] = np.nan
            if exact and n > 0:
                total = state.total[y, x]
                middle = (2 * total + n) // (2 * n)  # the integer nearest to the mean
                rest = total - n * middle  # at most n / 2 in size
                state.mean[y, x] = middle + rest / n
                # Sum of (value - middle)²: terms may wrap around 2^64, and wrap back, because the sum itself is small.
                deviations = state.squares[y, x] - 2 * middle * total + n * middle * middle
                if n > 1:
                    state.variance[y, x] = (deviations - rest / n * rest) / (n - 1)

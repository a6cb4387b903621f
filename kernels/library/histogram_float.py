"""Histogram of pixel values over all frames, for float frames and for any width of bins.

Computes: how many pixels had a value in each of ``BINS`` bins of equal width between ``low`` and ``high``. Bin ``i``
holds the values v with ``i <= (v - low) * (BINS / (high - low)) < i + 1``, computed in float64; ``high`` itself and
what is above counts as overflow, NaN apart.
Source: plain counting.

Parameters: ``low``, ``high``, the edges of the range in the unit of the pixels.
State: ``histogram`` (pixels by bin), ``underflow``, ``overflow`` and ``not_numbers`` (pixels).
Result: ``edges`` (lower edge of each bin, in the unit of the pixels).
Verdict: KEEP. Frames: two-dimensional, any dtype.
"""

from hiss import KEEP

BINS = 1000

PARAMS = {"low": ("float64", -10.0), "high": ("float64", 90.0)}
STATE = {
    "histogram": ("int64", (BINS,), "sum"),
    "underflow": ("int64", (1,), "sum"),
    "overflow": ("int64", (1,), "sum"),
    "not_numbers": ("int64", (1,), "sum"),
    "edges": ("float64", (BINS,), "sum"),
}


def frame(frame, params, state, index, out, feedback):
    histogram = state.histogram
    below = 0
    above = 0
    not_numbers = 0
    bins_per_unit = BINS / (params.high - params.low)
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            place = (frame[y, x] - params.low) * bins_per_unit
            if 0.0 <= place < BINS:
                histogram[int(place)] += 1
            elif place < 0.0:
                below += 1
            elif place >= BINS:
                above += 1
            else:
                not_numbers += 1
    state.underflow[0] += below
    state.overflow[0] += above
    state.not_numbers[0] += not_numbers
    return KEEP


def finish(state, params):
    for i in range(BINS):
        state.edges[i] = params.low + i * (params.high - params.low) / BINS

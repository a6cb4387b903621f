"""Histogram of pixel values over all frames, for integer frames.

Computes: how many pixels had a value in each bin. Bin ``i`` holds the values from ``low + i * 2**shift`` up to, and
without, ``low + (i + 1) * 2**shift``; what lies below or above all bins is counted apart. For float frames use
histogram_float.py.
Source: plain counting. Runs on an FPGA as well (one pass, integers only). Neighbouring pixels count into different
quarters of the memory, because frames are mostly background, and counting twice in one place has to wait for itself.

Parameters: ``low``, the lower edge of the first bin, in the detector's unit (counts or ADU); ``shift``, the binary
logarithm of the width of a bin (0: one bin a value; for 16-bit frames 4 covers the whole range with 4096 bins).
State: ``quarters`` (pixels, four times ``BINS``), ``underflow`` and ``overflow`` (pixels).
Result: ``histogram`` (pixels by bin), ``edges`` (lower edge of each bin, in the detector's unit).
Verdict: KEEP. Frames: two-dimensional integers of at most 32 bits.
"""

from hiss import KEEP

BINS = 4096

PARAMS = {"low": ("int64", 0), "shift": ("uint8", 0)}
STATE = {
    "quarters": ("int64", (4 * BINS,), "sum"),
    "underflow": ("int64", (1,), "sum"),
    "overflow": ("int64", (1,), "sum"),
    "histogram": ("int64", (BINS,), "sum"),
    "edges": ("int64", (BINS,), "sum"),
}


def frame(frame, params, state, index, out, feedback):
    below = 0
    above = 0
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            place = (frame[y, x] - params.low) >> (params.shift & 31)
            if place < 0:
                below += 1
            elif place >= BINS:
                above += 1
            else:
                state.quarters[(x & 3) * BINS + place] += 1
    state.underflow[0] += below
    state.overflow[0] += above
    return KEEP


def finish(state, params):
    for i in range(BINS):
        state.histogram[i] = 0
        for quarter in range(4):
            state.histogram[i] += state.quarters[quarter * BINS + i]
        state.edges[i] = params.low + (i << params.shift)

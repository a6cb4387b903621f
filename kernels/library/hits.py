"""Finds Bragg peaks against their local background, lists them, and drops the frames that have too few.

Computes: a peak is a pixel of at least ``low`` that is larger than its neighbours (of equal neighbours the first in
reading order counts) and stands out of the ring around it. The ring is the border of a square of side 2 ``RADIUS`` +
1 around the pixel: its mean and standard deviation are the local background. The pixel must exceed the mean by
``snr`` standard deviations; then the pixels within ``RADIUS`` - 1 that exceed it by half of that and are connected to
it over edges or corners are the peak. A peak has ``min_pixels`` to ``max_pixels`` pixels; one that is smaller is a
cosmic or a hot pixel, one that is larger a ring of ice or powder. Masked pixels, and those of at least ``saturated``
(in which many detectors mark gaps), belong to no ring and no peak.
Source: the local form of peakfinder8, A. Barty et al., J. Appl. Cryst. 47 (2014) 1118, doi:10.1107/S1600576714007626.

Arrays: ``mask`` uint8, shape of a frame: not 0 for pixels to be ignored.
Parameters: ``low`` and ``saturated`` in counts or ADU; ``snr`` without unit; ``min_pixels``, ``max_pixels`` in
pixels; ``min_peaks``: a frame with fewer is no hit.
State: ``frames``, ``hits`` (frames), ``peaks`` (all frames, hits or not), ``peaks_a_frame`` (frames by number of
peaks; the last entry: that many or more).
Rows: ``y``, ``x``: centre of mass of the counts above background, in pixels, the centre of the first pixel being 0;
``counts``: sum above background; ``background``: mean of the ring, a pixel; ``snr``; ``pixels``.
Feedback: code 1 for each hit, value: number of peaks.
Verdict: KEEP for hits, DROP else. Frames: two-dimensional, any dtype.
"""

import numpy as np
from hiss import DROP, KEEP, append, emit

RADIUS = 4
SIDE = 2 * RADIUS - 1  # of the square in which a peak may lie

PARAMS = {
    "mask": ("uint8", "frame"),
    "low": ("float64", 20.0),
    "saturated": ("float64", 65535.0),
    "snr": ("float64", 6.0),
    "min_pixels": ("int64", 2),
    "max_pixels": ("int64", 30),
    "min_peaks": ("int64", 10),
}
STATE = {
    "frames": ("int64", (1,), "sum"),
    "hits": ("int64", (1,), "sum"),
    "peaks": ("int64", (1,), "sum"),
    "peaks_a_frame": ("int64", (256,), "sum"),
}
ROWS = {
    "y": "float32",
    "x": "float32",
    "counts": "float32",
    "background": "float32",
    "snr": "float32",
    "pixels": "int32",
}
ROWS_MAX = 1024


def usable(frame, params, y, x):
    return params.mask[y, x] == 0 and frame[y, x] < params.saturated


def is_local_maximum(frame, params, y, x):
    for j in range(max(y - 1, 0), min(y + 2, frame.shape[0])):
        for i in range(max(x - 1, 0), min(x + 2, frame.shape[1])):
            if usable(frame, params, j, i):
                before = j < y or (j == y and i < x)
                if frame[j, i] > frame[y, x] or (before and frame[j, i] == frame[y, x]):
                    return False
    return True


def ring(frame, params, y, x):
    """Mean and standard deviation of the usable pixels of the ring, and how many there are."""
    n = 0
    total = 0.0
    squares = 0.0
    for j in range(max(y - RADIUS, 0), min(y + RADIUS + 1, frame.shape[0])):
        for i in range(max(x - RADIUS, 0), min(x + RADIUS + 1, frame.shape[1])):
            if max(abs(j - y), abs(i - x)) == RADIUS and usable(frame, params, j, i):
                value = np.float64(frame[j, i])
                n += 1
                total += value
                squares += value * value
    if n == 0:
        return 0.0, 0.0, 0
    mean = total / n
    return mean, np.sqrt(max(squares / n - mean * mean, 0.0)), n


def grow(frame, params, y, x, least, member):
    """Marks in ``member`` the pixels above ``least`` that are connected to the centre; their number."""
    for v in range(SIDE):
        for u in range(SIDE):
            member[v, u] = 0
    member[RADIUS - 1, RADIUS - 1] = 1
    n = 1
    grown = True
    while grown:
        grown = False
        for v in range(SIDE):
            for u in range(SIDE):
                j = y + v - (RADIUS - 1)
                i = x + u - (RADIUS - 1)
                inside = 0 <= j < frame.shape[0] and 0 <= i < frame.shape[1]
                if inside and member[v, u] == 0 and touches(member, v, u):
                    if usable(frame, params, j, i) and frame[j, i] > least:
                        member[v, u] = 1
                        n += 1
                        grown = True
    return n


def touches(member, v, u):
    for b in range(max(v - 1, 0), min(v + 2, SIDE)):
        for a in range(max(u - 1, 0), min(u + 2, SIDE)):
            if member[b, a] != 0:
                return True
    return False


def measure(frame, y, x, background, member):
    """Counts above background, and their centre of mass."""
    counts = 0.0
    moment_y = 0.0
    moment_x = 0.0
    for v in range(SIDE):
        for u in range(SIDE):
            if member[v, u] != 0:
                above = frame[y + v - (RADIUS - 1), x + u - (RADIUS - 1)] - background
                counts += above
                moment_y += above * (v - (RADIUS - 1))
                moment_x += above * (u - (RADIUS - 1))
    return counts, y + moment_y / counts, x + moment_x / counts


def find_in_row(frame, params, feedback, y, member):
    peaks = 0
    for x in range(frame.shape[1]):
        if frame[y, x] >= params.low and usable(frame, params, y, x) and is_local_maximum(frame, params, y, x):
            background, noise, n = ring(frame, params, y, x)
            height = frame[y, x] - background
            # A ring without any spread is one of few counts; a whole count is then the least that can be told apart.
            noise = max(noise, 1.0)
            if n >= 4 * RADIUS and height >= params.snr * noise:
                pixels = grow(frame, params, y, x, background + 0.5 * params.snr * noise, member)
                if params.min_pixels <= pixels <= params.max_pixels:
                    counts, centre_y, centre_x = measure(frame, y, x, background, member)
                    append(feedback, centre_y, centre_x, counts, background, height / noise, pixels)
                    peaks += 1
    return peaks


def frame(frame, params, state, index, out, feedback):
    member = np.zeros((SIDE, SIDE), np.uint8)
    peaks = 0
    for y in range(frame.shape[0]):
        # Most rows hold nothing: a count without a branch costs next to nothing, the careful look is for the others.
        candidates = 0
        for x in range(frame.shape[1]):
            candidates += frame[y, x] >= params.low
        if candidates > 0:
            peaks += find_in_row(frame, params, feedback, y, member)
    state.frames[0] += 1
    state.peaks[0] += peaks
    state.peaks_a_frame[min(peaks, 255)] += 1
    if peaks >= params.min_peaks:
        state.hits[0] += 1
        emit(feedback, 1, peaks)
        return KEEP
    return DROP

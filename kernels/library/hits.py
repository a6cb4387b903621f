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
peaks; the last entry: that many or more); ``patch`` and ``member`` (room to work in: zero between frames).
Rows: ``y``, ``x``: centre of mass of the counts above background, in pixels, the centre of the first pixel being 0;
``counts``: sum above background; ``background``: mean of the ring, a pixel; ``snr``; ``pixels``.
Feedback: code 1 for each hit, value: number of peaks.
Verdict: KEEP for hits, DROP else. Frames: two-dimensional, any dtype.
"""

import numpy as np
from hiss import DROP, KEEP, append, emit

RADIUS = 4
SIDE = 2 * RADIUS + 1

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
    "patch": ("float64", (SIDE, SIDE), "sum"),
    "member": ("uint8", (SIDE, SIDE), "or"),
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
            if frame[j, i] >= frame[y, x] and usable(frame, params, j, i):
                before = j < y or (j == y and i < x)
                if before or frame[j, i] > frame[y, x]:
                    return False
    return True


def cut_out(frame, params, y, x, patch):
    """The square around a pixel; NaN, which is not above or below anything, where nothing is to be had."""
    for v in range(patch.shape[0]):
        for u in range(patch.shape[1]):
            j = y + v - RADIUS
            i = x + u - RADIUS
            patch[v, u] = np.nan
            if j >= 0 and j < frame.shape[0] and i >= 0 and i < frame.shape[1] and usable(frame, params, j, i):
                patch[v, u] = frame[j, i]


def ring(patch):
    """Mean and standard deviation of the border of the square, and how many pixels it has."""
    n = 0
    total = 0.0
    squares = 0.0
    for v in range(patch.shape[0]):
        step = 1 if v == 0 or v == 2 * RADIUS else 2 * RADIUS
        for u in range(0, patch.shape[1], step):
            if patch[v, u] == patch[v, u]:
                n += 1
                total += patch[v, u]
                squares += patch[v, u] * patch[v, u]
    if n == 0:
        return 0.0, 0.0, 0
    mean = total / n
    return mean, np.sqrt(max(squares / n - mean * mean, 0.0)), n


def grow(patch, least, member):
    """Marks in ``member`` the pixels above ``least`` that are connected to the centre; their number."""
    for v in range(member.shape[0]):
        for u in range(member.shape[1]):
            member[v, u] = 0
    member[RADIUS, RADIUS] = 1
    n = 1
    last = 0
    while n > last:
        last = n
        for v in range(1, member.shape[0] - 1):
            for u in range(1, member.shape[1] - 1):
                if member[v, u] == 0 and patch[v, u] > least and touches(member, v, u):
                    member[v, u] = 1
                    n += 1
    return n


def touches(member, v, u):
    n = 0
    for b in range(v - 1, v + 2):
        for a in range(u - 1, u + 2):
            n += member[b, a]
    return n > 0


def measure(patch, background, member):
    """Counts above background, and how far their centre of mass is from the centre of the square."""
    counts = 0.0
    moment_y = 0.0
    moment_x = 0.0
    for v in range(member.shape[0]):
        for u in range(member.shape[1]):
            if member[v, u] != 0:
                above = patch[v, u] - background
                counts += above
                moment_y += above * (v - RADIUS)
                moment_x += above * (u - RADIUS)
    return counts, moment_y / counts, moment_x / counts


def judge_peak(params, state, feedback, y, x):
    """Appends what lies in the middle of ``state.patch`` if it is a peak; how many it appended."""
    background, noise, n = ring(state.patch)
    height = state.patch[RADIUS, RADIUS] - background
    # A ring without any spread is one of few counts; a whole count is then the least that can be told apart.
    noise = max(noise, 1.0)
    if n < 4 * RADIUS or height < params.snr * noise:
        return 0
    pixels = grow(state.patch, background + 0.5 * params.snr * noise, state.member)
    if pixels < params.min_pixels or pixels > params.max_pixels:
        return 0
    counts, off_y, off_x = measure(state.patch, background, state.member)
    append(feedback, y + off_y, x + off_x, counts, background, height / noise, pixels)
    return 1


def frame(frame, params, state, index, out, feedback):
    peaks = 0
    for y in range(frame.shape[0]):
        # Most rows hold nothing: a count without a branch costs next to nothing, the careful look is for the others.
        candidates = 0
        for x in range(frame.shape[1]):
            candidates += frame[y, x] >= params.low
        x = 0
        while candidates > 0:
            if frame[y, x] >= params.low:
                candidates -= 1
                if usable(frame, params, y, x) and is_local_maximum(frame, params, y, x):
                    cut_out(frame, params, y, x, state.patch)
                    peaks += judge_peak(params, state, feedback, y, x)
            x += 1
    for v in range(state.patch.shape[0]):
        for u in range(state.patch.shape[1]):
            state.patch[v, u] = 0.0
            state.member[v, u] = 0
    state.frames[0] += 1
    state.peaks[0] += peaks
    state.peaks_a_frame[min(peaks, 255)] += 1
    if peaks >= params.min_peaks:
        state.hits[0] += 1
        emit(feedback, 1, peaks)
        return KEEP
    return DROP

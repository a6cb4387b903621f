"""X-ray photon correlation: intensity autocorrelation g2 of speckle over the lag, multi-tau, ring by ring.

Computes, for each ring q and lag τ: ``g2 = ⟨I(t) I(t + τ)⟩ / (⟨I(t)⟩ ⟨I(t + τ)⟩)``. The product is averaged over the
pixels of the ring and all pairs of frames; each factor below is averaged over the pixels and over exactly the frames
that are the first, or the second, of those pairs (symmetric normalisation, which takes out slow drifts of the beam).
Scheme: level 0 has the lags 1 to ``CHANNELS`` - 1 in frames; level k sums 2^k frames and has the lags ``CHANNELS`` /
2 to ``CHANNELS`` - 1 in steps of 2^k frames. A level takes in a pair as soon as two values of the level below are
complete, so nothing waits for the end of the series. All sums over pixels are integers.
Source: K. Schätzel, Quantum Opt. 2 (1990) 287, doi:10.1088/0954-8998/2/4/002 (scheme, symmetric normalisation); D.
Lumma, L. B. Lurio, S. G. J. Mochrie, M. Sutton, Rev. Sci. Instrum. 71 (2000) 3274, doi:10.1063/1.1287637 (area
detectors: averages over the pixels of a ring before the division).

Arrays: ``pixel`` int32, at most ``PIXELS`` long: numbers of the pixels of the region, counted along the frame's rows,
ring by ring; ``first`` int32, ``RINGS + 1``: where each ring begins among them, and the end. prepare.rings makes
both.
Parameters: ``frame_s``: time from frame to frame in seconds.
State: the correlator (``history``, ``history_rings``, ``seen``) and its sums (``products``, ``left``, ``right``,
``pairs``); ``frames``; ``counts`` (of each ring, over all frames).
Result: ``g2`` (rings by lags, without unit; NaN where there is no pair yet), ``lag`` (frames), ``lag_s`` (seconds),
``intensity`` (mean of each ring, counts a pixel and frame).
Verdict: KEEP. Frames: two-dimensional integers of at most 32 bits; the region's values below 2^20. ORDERED: one
process sees the frames in sequence; a lost frame shifts what follows by one lag, so look at the ledger.
"""

import numpy as np
from hiss import KEEP

LEVELS = 8
CHANNELS = 16  # even
HALF = CHANNELS // 2
LAGS = CHANNELS - 1 + (LEVELS - 1) * HALF
PIXELS = 8192
RINGS = 8

PARAMS = {"pixel": ("int32", (-1,)), "first": ("int32", (RINGS + 1,)), "frame_s": ("float64", 1.0)}
STATE = {
    "frames": ("int64", (1,), "sum"),
    "counts": ("int64", (RINGS,), "sum"),
    "history": ("int32", (LEVELS, CHANNELS, PIXELS), "sum"),
    "history_rings": ("int64", (LEVELS, CHANNELS, RINGS), "sum"),
    "seen": ("int64", (LEVELS,), "sum"),
    "products": ("float64", (RINGS, LAGS), "sum"),
    "left": ("float64", (RINGS, LAGS), "sum"),
    "right": ("float64", (RINGS, LAGS), "sum"),
    "pairs": ("int64", (LAGS,), "sum"),
    "g2": ("float64", (RINGS, LAGS), "sum"),
    "lag": ("int64", (LAGS,), "sum"),
    "lag_s": ("float64", (LAGS,), "sum"),
    "intensity": ("float64", (RINGS,), "sum"),
}
ORDERED = True


def first_lag(level):
    return 1 if level == 0 else HALF


def place(level, lag):
    """Where a level's lag stands among all."""
    return lag - 1 if level == 0 else CHANNELS - 1 + (level - 1) * HALF + lag - HALF


def correlate(state, params, level):
    """Take a level's newest values, which are in its history, into its sums with the values before them."""
    slot = state.seen[level] % CHANNELS
    state.seen[level] += 1
    lags = min(CHANNELS, state.seen[level])
    for ring in range(state.counts.size):
        now = state.history[level, slot, params.first[ring] : params.first[ring + 1]]
        state.history_rings[level, slot, ring] = added(now)
        for lag in range(first_lag(level), lags):
            earlier = (slot - lag) % CHANNELS
            before = state.history[level, earlier, params.first[ring] : params.first[ring + 1]]
            at = place(level, lag)
            state.products[ring, at] += multiplied(now, before)
            state.left[ring, at] += state.history_rings[level, earlier, ring]
            state.right[ring, at] += state.history_rings[level, slot, ring]
    for lag in range(first_lag(level), lags):
        state.pairs[place(level, lag)] += 1


def added(now):
    total = 0
    for p in range(now.size):
        total += now[p]
    return total


def multiplied(now, before):
    total = 0
    for p in range(now.size):
        total += np.int64(now[p]) * np.int64(before[p])
    return total


def frame(frame, params, state, index, out, feedback):
    pixels = frame.reshape(frame.size)
    n = min(params.pixel.size, PIXELS)
    level = 0
    # A level above the first has a new value when two of the level below are complete.
    while level < LEVELS and (level == 0 or state.seen[level - 1] % 2 == 0):
        newest = state.history[level, state.seen[level] % CHANNELS]
        if level == 0:
            for p in range(n):
                newest[p] = pixels[params.pixel[p]]
        else:
            first = state.history[level - 1, (state.seen[level - 1] - 2) % CHANNELS]
            second = state.history[level - 1, (state.seen[level - 1] - 1) % CHANNELS]
            for p in range(n):
                newest[p] = first[p] + second[p]
        correlate(state, params, level)
        level += 1
    state.frames[0] += 1
    for ring in range(state.counts.size):
        state.counts[ring] += state.history_rings[0, (state.seen[0] - 1) % CHANNELS, ring]
    return KEEP


def ring_pixels(params, ring):
    return params.first[ring + 1] - params.first[ring]


def finish(state, params):
    for ring in range(state.counts.size):
        seen = state.frames[0] * np.float64(ring_pixels(params, ring))
        state.intensity[ring] = state.counts[ring] / seen if seen > 0.0 else np.nan
    for level in range(state.seen.size):
        for lag in range(first_lag(level), CHANNELS):
            at = place(level, lag)
            state.lag[at] = lag << level
            state.lag_s[at] = state.lag[at] * params.frame_s
            for ring in range(state.counts.size):
                pairs = state.pairs[at] * np.float64(ring_pixels(params, ring))
                below = state.left[ring, at] * state.right[ring, at]
                state.g2[ring, at] = state.products[ring, at] * pairs / below if below > 0.0 else np.nan

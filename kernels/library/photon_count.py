"""Photon counting from charge: pedestal, common mode, threshold; whole photons of each pixel.

Computes, for every row of every readout strip: residual = frame - pedestal; the common mode, which is the mean
residual of the pixels within ±``quiet`` (none is subtracted where fewer than ``min_quiet`` pixels are); charge =
residual - common mode; photons = 0 below ``threshold`` photons, else charge / ``adu`` rounded to the nearest whole
number, at least 1. Residuals are taken in steps of 1/16 ADU, so that their sums are integers and the result is the
same everywhere.
Source: G. Blaj et al., J. Synchrotron Rad. 22 (2015) 577, doi:10.1107/S1600577515005317 (ePix and its corrections);
M. Sikorski et al., J. Synchrotron Rad. 23 (2016) 1171, doi:10.1107/S1600577516010869. Charge shared among pixels is
not put together again (their droplet algorithm): a threshold above one half counts such a photon once or not at all.

Arrays: ``pedestal`` float32, shape of a frame, in ADU: mean of dark frames. ``mask`` uint8, shape of a frame: not 0
for pixels that are neither used nor counted.
Parameters: ``adu``: charge of one photon, in ADU; ``threshold``: least charge that counts, in photons (0.5 to 0.9);
``quiet``: in ADU, about three times the noise and well below the threshold; ``strip``: columns that are read out
together; ``min_quiet``: pixels.
State: ``frames``; ``photons`` (all frames); ``overflow``: pixels of more than 65535 photons, stored as 65535.
Feedback: code 1 where a frame had overflow, value: number of such pixels.
OUT: uint16, same shape, photons. Verdict: REPLACE. Frames: two-dimensional, values below 2^26 ADU.
"""

import numpy as np
from hiss import REPLACE, emit

STEPS = 16  # of an ADU
MOST = 65535

PARAMS = {
    "pedestal": ("float32", "frame"),
    "mask": ("uint8", "frame"),
    "adu": ("float32", 100.0),
    "threshold": ("float32", 0.7),
    "quiet": ("float32", 30.0),
    "strip": ("int64", 96),
    "min_quiet": ("int64", 16),
}
STATE = {
    "frames": ("int64", (1,), "sum"),
    "photons": ("int64", (1,), "sum"),
    "overflow": ("int64", (1,), "sum"),
}
OUT = ("uint16", "same")


def steps_of(value, pedestal):
    return np.int32((np.float32(value) - pedestal) * np.float32(STEPS))


def common_mode(values, pedestal, mask, quiet, min_quiet):
    n = 0
    total = 0
    for x in range(values.size):
        residual = steps_of(values[x], pedestal[x])
        # `&`, not `and`: both sides are computed for many pixels at once, instead of a branch for each pixel.
        if (mask[x] == 0) & (abs(residual) <= quiet):
            n += 1
            total += residual
    return np.float32(total / n) if n >= max(min_quiet, 1) else np.float32(0.0)


def count(values, pedestal, mask, common, photons_a_step, threshold, out):
    photons = 0
    overflow = 0
    for x in range(values.size):
        charge = (np.float32(steps_of(values[x], pedestal[x])) - common) * photons_a_step
        n = max(np.int32(charge + np.float32(0.5)), np.int32(1))
        n = n if (charge >= threshold) & (mask[x] == 0) else np.int32(0)
        overflow += n > MOST
        n = min(n, np.int32(MOST))
        photons += n
        out[x] = n
    return photons, overflow


def frame(frame, params, state, index, out, feedback):
    width = frame.shape[1]
    strip = max(params.strip, 1)
    quiet = np.int32(params.quiet * STEPS)
    photons_a_step = np.float32(1.0 / (params.adu * STEPS))
    photons = 0
    overflow = 0
    for y in range(frame.shape[0]):
        for start in range(0, width, strip):
            # Slices count from 0: an index that might be negative would keep the compiler from using the whole width of
            # the processor's registers.
            stop = min(start + strip, width)
            values = frame[y, start:stop]
            pedestal = params.pedestal[y, start:stop]
            mask = params.mask[y, start:stop]
            common = common_mode(values, pedestal, mask, quiet, params.min_quiet)
            n, over = count(values, pedestal, mask, common, photons_a_step, params.threshold, out[y, start:stop])
            photons += n
            overflow += over
    state.frames[0] += 1
    state.photons[0] += photons
    state.overflow[0] += overflow
    if overflow > 0:
        emit(feedback, 1, overflow)
    return REPLACE

"""Dark and flat correction with a mask: what the detector said, turned into intensity. The first of a chain.

Computes: ``out = (frame - dark) / flat`` in float32, NaN where the mask is set. Integration, statistics and hit
finding follow as kernels with ``after: dark_flat``. Source: the two-point (offset and gain) correction; EMVA Standard
1288, release 4.0 (2021), for how dark and flat images are taken.

Arrays: ``dark`` float32, shape of a frame, in ADU: the mean of frames without beam at the same exposure time
(pixel_statistics.py gives it). ``flat`` float32, shape of a frame, without unit, around 1: the mean of evenly lit
frames, less the dark, divided by its own mean. ``mask`` uint8, shape of a frame: not 0 where a pixel is to be
ignored; a flat of 0 must be masked.

State: ``frames``. OUT: float32, same shape, ADU.
Verdict: REPLACE (what is stored is the corrected frame, where the bucket allows filtering; else the raw frame stays).
Frames: two-dimensional, any dtype; integers above 2^24 are rounded by float32.
"""

import numpy as np
from hiss import REPLACE

PARAMS = {"dark": ("float32", "frame"), "flat": ("float32", "frame"), "mask": ("uint8", "frame")}
STATE = {"frames": ("int64", (1,), "sum")}
OUT = ("float32", "same")


def frame(frame, params, state, index, out, feedback):
    dark = params.dark
    flat = params.flat
    mask = params.mask
    nothing = np.float32(np.nan)
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            value = (np.float32(frame[y, x]) - dark[y, x]) / flat[y, x]
            out[y, x] = nothing if mask[y, x] != 0 else value
    state.frames[0] += 1
    return REPLACE

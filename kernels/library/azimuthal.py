"""Azimuthal integration: intensity over the scattering angle, each pixel in one bin (no pixel splitting).

Computes: for every bin, over all frames, the sum of the pixels divided by the sum of their normalisation (solid
angle, polarisation, flat field). With the table of prepare.from_pyfai this is pyFAI's ``integrate1d`` with method
("no", "csr" or "histogram", …).
Source: J. Kieffer, J. P. Wright, Powder Diffraction 28 (2013) S339, doi:10.1017/S0885715613000924; error propagation
as there for Poisson statistics.

Arrays (kernels/prepare.py makes all three, from pyFAI or from plain geometry):
``bin`` int32, shape of a frame: the bin of each pixel, -1 for masked ones.
``norm`` float64, ``BINS``: the sum of the normalisation of the pixels of each bin (1 for each where there is none to
apply).
``axis`` float64, ``BINS``: the centre of each bin, in the unit it was prepared for (nm⁻¹, Å⁻¹, degrees); it is passed
through.
Set ``BINS`` to the number of bins of your table.

State: ``frames``; ``one_frame`` (room to work in: zero between frames); ``total`` (counts by bin, over all frames);
``squares`` (squares of each frame's counts by bin, summed). They are float64 so that float frames work too; for
integer frames ``total`` is exact up to 2^53 counts a bin.
Result: ``intensity`` (counts a pixel and frame, normalised), ``sigma`` (its standard error if pixels are counts with
Poisson noise), ``spread`` (standard deviation of a single frame's intensity over the frames; NaN for less than two),
``axis``. NaN in empty bins.
Verdict: KEEP. Frames: two-dimensional, any dtype. A NaN pixel is NaN for its bin: mask it in the table.
"""

import numpy as np
from hiss import KEEP

BINS = 1000

PARAMS = {"bin": ("int32", "frame"), "norm": ("float64", (BINS,)), "axis": ("float64", (BINS,))}
STATE = {
    "frames": ("int64", (1,), "sum"),
    "total": ("float64", (BINS,), "sum"),
    "squares": ("float64", (BINS,), "sum"),
    "one_frame": ("float64", (BINS,), "sum"),
    "intensity": ("float64", (BINS,), "sum"),
    "sigma": ("float64", (BINS,), "sum"),
    "spread": ("float64", (BINS,), "sum"),
    "axis": ("float64", (BINS,), "sum"),
}


def frame(frame, params, state, index, out, feedback):
    bins = params.bin
    counts = state.one_frame
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            if bins[y, x] >= 0:
                counts[bins[y, x]] += frame[y, x]
    for i in range(BINS):
        state.total[i] += counts[i]
        state.squares[i] += counts[i] * counts[i]
        counts[i] = 0.0
    state.frames[0] += 1
    return KEEP


def finish(state, params):
    n = state.frames[0]
    for i in range(BINS):
        norm = params.norm[i]
        state.axis[i] = params.axis[i]
        state.intensity[i] = np.nan
        state.sigma[i] = np.nan
        state.spread[i] = np.nan
        if n > 0 and norm > 0.0:
            mean = state.total[i] / n
            state.intensity[i] = mean / norm
            state.sigma[i] = np.sqrt(max(state.total[i], 0.0)) / (n * norm)
            if n > 1:
                state.spread[i] = np.sqrt(max(state.squares[i] - n * mean * mean, 0.0) / (n - 1)) / norm

"""Azimuthal integration with pixel splitting: each pixel shared among the bins it covers.

Computes: for every bin, over all frames, the sum of the pixels times their shares, divided by the sum of their
normalisation times their shares: a sparse matrix times the frame. With the matrix of prepare.from_pyfai this is
pyFAI's ``integrate1d`` with method ("bbox" or "full", "csr", …). Where pixels are small against the bins use
azimuthal.py, which is several times as fast.
Source: J. Kieffer, J. P. Wright, Powder Diffraction 28 (2013) S339, doi:10.1017/S0885715613000924; error propagation
as there for Poisson statistics.

Arrays (kernels/prepare.py makes all of them), the matrix in compressed rows, one row a bin:
``first`` int32, ``BINS + 1``: where each bin's entries begin; ``pixel`` int32, any length: number of the pixel,
counted along the frame's rows; ``share`` float32, as long: the part of the pixel that is in the bin. Masked pixels
have no entries.
``norm`` float64, ``BINS``: sum of normalisation times share; ``axis`` float64, ``BINS``: centre of each bin, passed
through.
Set ``BINS`` to the number of bins of your matrix.

State: ``frames``; ``total`` (counts by bin); ``variance`` (Poisson variance of ``total``, counts²), all float64.
Result: ``intensity`` (counts a pixel and frame, normalised), ``sigma`` (its standard error for Poisson counts),
``axis``.
Verdict: KEEP. Frames: two-dimensional, any dtype.
"""

import numpy as np
from hiss import KEEP

BINS = 1000

PARAMS = {
    "first": ("int32", (BINS + 1,)),
    "pixel": ("int32", (-1,)),
    "share": ("float32", (-1,)),
    "norm": ("float64", (BINS,)),
    "axis": ("float64", (BINS,)),
}
STATE = {
    "frames": ("int64", (1,), "sum"),
    "total": ("float64", (BINS,), "sum"),
    "variance": ("float64", (BINS,), "sum"),
    "intensity": ("float64", (BINS,), "sum"),
    "sigma": ("float64", (BINS,), "sum"),
    "axis": ("float64", (BINS,), "sum"),
}


def frame(frame, params, state, index, out, feedback):
    pixels = frame.reshape(frame.size)
    pixel = params.pixel
    share = params.share
    for i in range(BINS):
        total = 0.0
        variance = 0.0
        for entry in range(params.first[i], params.first[i + 1]):
            part = pixels[pixel[entry]] * np.float64(share[entry])
            total += part
            variance += part * share[entry]
        state.total[i] += total
        state.variance[i] += variance
    state.frames[0] += 1
    return KEEP


def finish(state, params):
    n = state.frames[0]
    for i in range(BINS):
        norm = params.norm[i]
        state.axis[i] = params.axis[i]
        state.intensity[i] = np.nan
        state.sigma[i] = np.nan
        if n > 0 and norm > 0.0:
            state.intensity[i] = state.total[i] / (n * norm)
            state.sigma[i] = np.sqrt(max(state.variance[i], 0.0)) / (n * norm)

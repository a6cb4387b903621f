"""Small-angle scattering on a Pilatus 100K: intensity over the distance from the beam, summed image, dips of the beam.

Sent with any S3 tool: aws s3 cp saxs.py s3://BUCKET/_kernels/saxs.py. Every frame that arrives after that runs through
frame(); the product of an object is at _products/saxs/KEY.nxs, and what is emitted reaches the instrument at once.
"""

import numpy as np
from hiss import DROP, KEEP, emit

PARAMS = {
    "centre_row": ("float64", 99.95),  # where the direct beam would hit, in pixels
    "centre_column": ("float64", -5.65),
    "dim": ("int64", 460_000_000),  # counts of a frame below which the beam had dipped
}
STATE = {
    "counts": ("int64", (512,), "sum"),  # by distance from the beam, one bin a pixel
    "pixels": ("int64", (512,), "sum"),
    "image": ("int64", (195, 487), "sum"),
    "dimmest": ("int64", (1,), "min"),
    "brightest_pixel": ("int64", (1,), "max"),
}


def frame(frame, params, state, index, out, feedback):
    total = 0
    brightest = 0
    for row in range(frame.shape[0]):
        square = (row - params.centre_row) ** 2
        for column in range(frame.shape[1]):
            value = frame[row, column]
            distance = int(np.sqrt(square + (column - params.centre_column) ** 2))
            state.counts[distance] += value
            state.pixels[distance] += 1
            state.image[row, column] += value
            total += value
            brightest = max(brightest, value)
    state.dimmest[0] = min(state.dimmest[0], total)
    state.brightest_pixel[0] = max(state.brightest_pixel[0], brightest)
    if total < params.dim:
        emit(feedback, 1, total)  # the beam dipped: expose again, while the sample is still there
        return DROP
    return KEEP

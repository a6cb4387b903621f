"""Small-angle scattering on a Pilatus 100K: intensity over the distance from the beam, summed image, dips of the beam.

Sent with any S3 tool: aws s3 cp saxs.py s3://BUCKET/_kernels/saxs.py. Every frame that arrives after that goes through
frame(); the product of an object is at _products/saxs/KEY.nxs, and what is emitted reaches the instrument at once.
"""

import numpy as np
from hiss import DROP, KEEP, emit

PARAMS = {
    "centre_row": ("float64", 99.95),  # where the direct beam would hit, in pixels
    "centre_column": ("float64", -5.65),
    "dim": ("int64", 460_000_000),  # a frame of fewer counts: the beam had dipped
}
STATE = {
    "counts": ("int64", (512,), "sum"),  # by distance from the beam, one bin a pixel
    "image": ("int64", (195, 487), "sum"),
    "distance": ("int16", (195, 487), "max"),  # of each pixel from the beam; below zero until it was computed
    "brightest_pixel": ("int64", (1,), "max"),
}


def measure_distances(params, distance):
    for row in range(distance.shape[0]):
        for column in range(distance.shape[1]):
            squares = (row - params.centre_row) ** 2 + (column - params.centre_column) ** 2
            distance[row, column] = int(np.sqrt(squares))


def frame(frame, params, state, index, out, feedback):
    distance = state.distance
    if distance[0, 0] < 0:
        measure_distances(params, distance)
    counts = state.counts
    image = state.image
    for row in range(frame.shape[0]):
        for column in range(frame.shape[1]):
            value = frame[row, column]
            counts[distance[row, column]] += value
            image[row, column] += value
    state.brightest_pixel[0] = max(state.brightest_pixel[0], frame.max())
    total = frame.sum()
    if total < params.dim:
        emit(feedback, 1, total)  # the beam dipped: expose again, while the sample is still there
        return DROP
    return KEEP

"""Guards the detector: counts saturated pixels, tells the instrument; drops the frame or stops the stream if asked.

Computes: the number of pixels of at least ``saturated`` and below ``marker``. Source: plain counting. Runs on an FPGA
as well (one pass, integers only).

Parameters: ``saturated``, the smallest value that counts as saturated, in counts or ADU (below 65535 for 16-bit
detectors, often the count cutoff of the file's header); ``marker``: values from here on are dead pixels and gaps,
which some detectors fill with the largest value of the dtype; ``max_pixels``: that many saturated pixels are
tolerated; ``action``: what happens to a frame with more: 0 nothing, 1 DROP, 2 STOP (no later frame of this stream is
judged).
State: ``frames``, ``bad`` (frames with more than tolerated), ``saturated`` (pixels, over all frames), ``worst`` (most
saturated pixels of one frame).
Feedback: code 1 for each bad frame, value: number of saturated pixels.
Verdict: KEEP, or by ``action``. Frames: two-dimensional integers.
"""

from hiss import DROP, KEEP, STOP, emit

PARAMS = {
    "saturated": ("uint32", 60000),
    "marker": ("uint32", 65535),
    "max_pixels": ("int64", 0),
    "action": ("uint8", 0),
}
STATE = {
    "frames": ("int64", (1,), "sum"),
    "bad": ("int64", (1,), "sum"),
    "saturated": ("int64", (1,), "sum"),
    "worst": ("int64", (1,), "max"),
}


def frame(frame, params, state, index, out, feedback):
    n = 0
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            if frame[y, x] >= params.saturated and frame[y, x] < params.marker:
                n += 1
    state.frames[0] += 1
    state.saturated[0] += n
    state.worst[0] = max(state.worst[0], n)
    if n > params.max_pixels:
        state.bad[0] += 1
        emit(feedback, 1, n)
        if params.action == 1:
            return DROP
        if params.action == 2:
            return STOP
    return KEEP

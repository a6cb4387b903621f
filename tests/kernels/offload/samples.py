"""Small kernels that the tests of the offload share, one for each thing a core can do."""

THRESHOLD = """
PARAMS = {"low": ("uint16", 12), "min_pixels": ("int64", 40)}
STATE = {"hits": ("int64", (1,), "sum"), "histogram": ("int64", (64,), "sum")}

def frame(frame, params, state, index, out, feedback):
    n = 0
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            v = frame[y, x]
            n += v >= params.low
            state.histogram[min(v, 63)] += 1
    state.hits[0] += n >= params.min_pixels
    emit(feedback, 1, n)
    return KEEP if n >= params.min_pixels else DROP
"""

WINDOW = """
STATE = {"strongest": ("int64", (2,), "max"), "edges": ("uint32", (9, 11), "sum")}

def distance(a, b):
    if a > b:
        return a - b
    return b - a

def frame(frame, params, state, index, out, feedback):
    best = 0
    for y in range(1, frame.shape[0] - 1):
        row = 0
        for x in range(1, frame.shape[1] - 1):
            around = 0
            for dy in range(-1, 2):
                for dx in range(-1, 2):
                    if dy == 0 and dx == 0:
                        continue
                    around += frame[y + dy, x + dx]
            d = distance(np.int64(frame[y, x]) * 8, around)
            row += d
            best = max(best, d)
            state.edges[y, x] += d
        if row > 500000:
            emit(feedback, y, row)
    state.strongest[0] = max(state.strongest[0], best)
    return best > 100000
"""

LINE = """
PARAMS = {"low": ("int32", -5)}
STATE = {"rising": ("uint8", (3,), "sum"), "highest": ("int32", (40,), "max")}

def frame(frame, params, state, index, out, feedback):
    c = 0
    for i in range(1, len(frame) - 2):
        a = frame[i]
        if a > params.low and frame[i - 1] < a and frame[i + 2] <= a:
            c += 1
            state.highest[i & 31] = max(state.highest[i & 31], a)
            if c < 3:
                emit(feedback, i, a)
    state.rising[c & 1] += c
    if index % 4 == 3 and c:
        return STOP
    return c > 2
"""

REGION = """
PARAMS = {"top": ("uint16", 1), "bottom": ("uint16", 4), "left": ("uint16", 2), "right": ("uint16", 6)}
STATE = {"sum": ("int64", (1,), "sum"), "pixels": ("int64", (1,), "sum"), "least": ("int32", (1,), "min")}

def frame(frame, params, state, index, out, feedback):
    height, width = frame.shape
    total = 0
    least = state.least[0]
    for y in range(min(np.int64(params.top), height), min(np.int64(params.bottom), height)):
        for x in range(min(np.int64(params.left), width), min(np.int64(params.right), width)):
            total += frame[y, x]
            least = min(least, np.int32(frame[y, x]))
            state.pixels[0] += 1
    state.sum[0] += total
    state.least[0] = least
    emit(feedback, 7, total)
    emit(feedback, 8, -total)
    return KEEP
"""

COUNTER = """
PARAMS = {"step": ("int64", 1)}
STATE = {"sum": ("int64", (1,), "sum"), "seen": ("int64", (20,), "sum")}

def frame(frame, params, state, index, out, feedback):
    for x in range(frame.shape[0]):
        state.sum[0] += frame[x] * params.step
        state.seen[np.int64(frame[x]) % 16] += params.step
    emit(feedback, index, params.step)
    return KEEP
"""

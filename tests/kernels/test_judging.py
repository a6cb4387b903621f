"""Tasks of a replay, judged in real sandboxes: cut anywhere, together or apart, they come to what numpy finds."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest
from awscrt import checksums

from ingest.records import ObjectRecord, ObjectState
from kernels.gate import admit
from kernels.offline.assembly import arrays_of, joined
from kernels.offline.judging import Again, Judging, Lost
from kernels.offline.pieces import Answer, ArrayPlace, Part, Recipe, Stage, Task, Wanted, answer, encode, task
from kernels.offline.seats import Seats
from kernels.verdicts import AFTER_STOP

SCALE = """
PARAMS = {"gain": ("int32", "frame")}
OUT = ("int32", "same")


def frame(frame, params, state, index, out, feedback):
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            out[y, x] = frame[y, x] * params.gain[y, x]
    return REPLACE
"""
PEAKS = """
PARAMS = {"low": ("int32", 1), "last": ("int64", -1)}
STATE = {"sum": ("int64", (3, 5), "sum"), "hits": ("int64", (1,), "sum")}
ROWS = {"value": "int32"}


def finish(state, params):
    state.hits[0] = state.hits[0] * 1000 + params.low


def frame(frame, params, state, index, out, feedback):
    n = 0
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            state.sum[y, x] += frame[y, x]
            if frame[y, x] >= params.low:
                n += 1
                append(feedback, frame[y, x])
    state.hits[0] += n
    if index == params.last:
        return STOP
    return KEEP if n > 3 else DROP
"""
MEAN = """
STATE = {"mean": ("float64", (3, 5), "sum")}


def frame(frame, params, state, index, out, feedback):
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            state.mean[y, x] += frame[y, x] / 3.0
    return KEEP
"""
PICKY = """
STATE = {"count": ("int64", (2,), "sum")}


def frame(frame, params, state, index, out, feedback):
    state.count[frame[0, 0]] += 1
    return KEEP
"""
ORDERED = """
ORDERED = True
STATE = {"trace": ("float64", (1,), "sum")}


def frame(frame, params, state, index, out, feedback):
    state.trace[0] = state.trace[0] * 0.75 + frame[0, 0] / 3.0
    return KEEP
"""
SHAPE = (3, 5)
METADATA = {"frame-dtype": "uint16", "frame-shape": "3,5"}
GAIN = np.arange(1, 16, dtype=np.int32).reshape(SHAPE)
LOWS = (30, 100)


def frames(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 16, (count, *SHAPE)).astype(np.uint16)


class Stored:
    """Objects in memory, read as over a network."""

    def __init__(self) -> None:
        self.bodies: dict[bytes, bytes] = {}
        self.largest = 0
        self.broken = 0
        """So many reads fail."""

    def put(self, key: bytes, data: np.ndarray, *epochs: tuple[int, int]) -> Wanted:
        self.bodies[key] = data.tobytes()
        return Wanted(key, "e", data.nbytes, epochs or ((0, 0),))

    def open(self, bucket: str, wanted: Wanted) -> tuple[ObjectRecord, _Ranges]:
        body = self.bodies.get(wanted.key)
        if body is None:
            raise Lost("is gone")
        record = ObjectRecord(
            bucket, wanted.key, "null", b"", 0, ObjectState.BUFFERED, len(body), len(body), "e",
            checksums.crc64nvme(body), 1, "", metadata=METADATA,
        )  # fmt: skip
        return record, _Ranges(self, body)

    def array(self, bucket: str, place: ArrayPlace) -> bytearray:
        return bytearray(GAIN_FILE)


class _Ranges:
    def __init__(self, stored: Stored, body: bytes) -> None:
        self._stored = stored
        self._body = body

    def read_into(self, view: memoryview, offset: int) -> None:
        self._stored.largest = max(self._stored.largest, len(view))
        if self._stored.broken:
            self._stored.broken -= 1
            raise OSError("the network is not there")
        view[:] = self._body[offset : offset + len(view)]


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


GAIN_FILE = _npy(GAIN)
PLACE = ArrayPlace("gain", b"_kernels/scale/gain.npy", "e", len(GAIN_FILE), checksums.crc64nvme(GAIN_FILE))


def chain(last: int = -1) -> Recipe:
    settings = tuple(({}, {"low": low, "last": last}) for low in LOWS)
    return Recipe("scan42", (Stage("scale", SCALE, (PLACE,)), Stage("peaks", PEAKS)), settings)


def alone(name: str, source: str) -> Recipe:
    return Recipe("scan42", (Stage(name, source),), (({},),))


@pytest.fixture
def stored() -> Stored:
    return Stored()


@pytest.fixture
async def judging(zygote_socket: str, stored: Stored) -> AsyncIterator[Judging]:
    seats = Seats(zygote_socket, 2, stored.array)
    yield Judging(zygote_socket, seats, stored.open)
    await seats.close()


async def ask(judging: Judging, asked: Task) -> Answer:
    """As over the graph: bytes there and back."""
    return answer(encode(await judging.run(task(encode(asked)))))


def truth(
    data: np.ndarray, epochs: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, int, list[int], list[tuple[int, int]]]:
    """(sum, hits, verdicts, rows) of the chain."""
    seen = data.astype(np.int64) * GAIN
    lows = np.empty(len(data), np.int64)
    for first, number in epochs:
        lows[first:] = LOWS[number]
    above = seen >= lows[:, None, None]
    rows = [(int(index), int(value)) for index in range(len(data)) for value in seen[index][above[index]]]
    return seen.sum(axis=0), int(above.sum()), (above.sum(axis=(1, 2)) > 3).astype(int).tolist(), rows


async def test_a_chain_through_its_epochs_whole_or_in_parts(judging: Judging, stored: Stored) -> None:
    data, epochs = frames(200, 1), ((0, 0), (77, 1))
    wanted = stored.put(b"run/a.raw", data, *epochs)
    found = await ask(judging, Task(chain(), (wanted,)))
    (whole,) = found.objects
    kernel = admit("peaks", PEAKS.encode())
    total, hits, verdicts, rows = truth(data, epochs)
    assert whole.state is not None
    assert whole.result is not None
    state = arrays_of(kernel, whole.state)
    assert (state["sum"].tolist(), state["hits"].tolist()) == (total.tolist(), [hits])
    assert arrays_of(kernel, whole.result)["hits"].tolist() == [hits * 1000 + LOWS[1]]
    assert list(whole.verdicts) == verdicts
    assert kernel.rows is not None
    assert np.frombuffer(whole.rows or b"", kernel.rows.dtype).tolist() == rows
    assert found.software["numba"]

    cuts = [(0, 50, 0), (50, 77, 0), (77, 150, 1), (150, 200, 1)]
    parts = [
        (await ask(judging, Task(chain(), (wanted,), part=Part(*cut)))).objects[0] for cut in cuts
    ]  # fmt: skip
    one = joined(kernel, parts, epochs)
    assert (one.state, one.verdicts, one.rows, one.epochs) == (whole.state, whole.verdicts, whole.rows, epochs)
    concluded = await ask(judging, Task(chain(), conclude=dict(whole.state), geometry=whole.geometry, epoch=1))
    assert concluded.result == whole.result


async def test_parts_behind_a_stop_do_not_count(judging: Judging, stored: Stored) -> None:
    wanted = stored.put(b"run/a.raw", frames(150, 2))
    (whole,) = (await ask(judging, Task(chain(last=60), (wanted,)))).objects
    parts = [
        (await ask(judging, Task(chain(last=60), (wanted,), part=Part(*cut)))).objects[0]
        for cut in [(0, 40, 0), (40, 90, 0), (90, 150, 0)]
    ]
    one = joined(admit("peaks", PEAKS.encode()), parts, ((0, 0),))
    assert whole.stopped_at == one.stopped_at == 60
    assert set(whole.verdicts[61:]) == {AFTER_STOP}
    assert (one.state, one.verdicts, one.rows) == (whole.state, whole.verdicts, whole.rows)


async def test_objects_of_one_frame_share_a_state_where_that_is_exact(judging: Judging, stored: Stored) -> None:
    data = frames(20, 3)
    wanted = tuple(stored.put(b"run/%02d.raw" % number, data[number : number + 1]) for number in range(20))
    many = stored.put(b"run/05b.raw", frames(30, 4))
    found = await ask(judging, Task(chain(), (*wanted[:6], many, *wanted[6:])))
    total, hits, verdicts, _ = truth(data, ((0, 0),))
    state = arrays_of(admit("peaks", PEAKS.encode()), found.shared[0])
    assert (state["sum"].tolist(), state["hits"].tolist()) == (total.tolist(), [hits])
    singles = [one for one in found.objects if one.single]
    assert [one.verdicts[0] for one in singles] == verdicts
    assert all(one.state is None for one in singles)

    # Of floating-point sums each has its own, for they are merged in the order of the keys.
    found = await ask(judging, Task(alone("mean", MEAN), wanted))
    assert not found.shared
    kernel = admit("mean", MEAN.encode())
    for one, frame in zip(found.objects, data, strict=True):
        assert one.state is not None
        assert arrays_of(kernel, one.state)["mean"].tobytes() == (frame / 3.0).tobytes()


async def test_what_fails_costs_its_own_object(judging: Judging, stored: Stored) -> None:
    values = [0, 1, 7, 1, 0, 0]
    wanted = [stored.put(b"run/%d.raw" % n, np.full((1, *SHAPE), value, np.uint16)) for n, value in enumerate(values)]
    wanted += [stored.put(b"run/bad.raw", np.full((40, *SHAPE), 9, np.uint16)), Wanted(b"run/gone.raw", "e", 30)]
    stored.bodies[b"run/none.raw"] = b"x" * 7
    wanted.append(Wanted(b"run/none.raw", "e", 7))
    found = await ask(judging, Task(alone("picky", PICKY), tuple(wanted)))
    assert [one.key for one in found.objects if one.failure] == [b"run/2.raw", b"run/bad.raw", b"run/gone.raw"]
    assert "picky.py:6" in found.objects[2].failure
    state = arrays_of(admit("picky", PICKY.encode()), found.shared[0])
    assert state["count"].tolist() == [3, 2], "each of the others once"
    none = found.objects[-1]
    assert (none.failure, none.frames) == ("", 0)


async def test_an_ordered_kernel_defers_objects_of_one_frame_to_a_sequence(judging: Judging, stored: Stored) -> None:
    data = frames(12, 5)
    wanted = tuple(stored.put(b"run/%02d.raw" % number, data[number : number + 1]) for number in range(12))
    recipe = alone("ordered", ORDERED)
    found = await ask(judging, Task(recipe, wanted))
    assert all(one.deferred and not one.verdicts for one in found.objects)
    found = await ask(judging, Task(recipe, wanted, sequence=True))
    trace = 0.0
    for frame in data:
        trace = trace * 0.75 + frame[0, 0] / 3.0
    assert arrays_of(admit("ordered", ORDERED.encode()), found.shared[0])["trace"].tolist() == [trace]


async def test_a_network_that_fails_is_no_fault_of_the_object(judging: Judging, stored: Stored) -> None:
    wanted = stored.put(b"run/a.raw", frames(10, 6))
    stored.broken = 1
    with pytest.raises(Again, match="the network is not there"):
        await ask(judging, Task(alone("mean", MEAN), (wanted,)))
    (one,) = (await ask(judging, Task(alone("mean", MEAN), (wanted,)))).objects
    assert one.state is not None


async def test_a_large_body_is_never_in_memory_as_a_whole(judging: Judging, stored: Stored) -> None:
    data = frames(1_300_000, 7)
    wanted = stored.put(b"run/large.raw", data)
    (one,) = (await ask(judging, Task(alone("mean", MEAN), (wanted,)))).objects
    assert one.frames == 1_300_000
    assert stored.largest <= 32 << 20 < data.nbytes
    # A running sum is added up in the order of the frames.
    expected = np.cumsum(data.reshape(len(data), -1) / 3.0, axis=0)[-1].reshape(SHAPE)
    assert one.state is not None
    assert arrays_of(admit("mean", MEAN.encode()), one.state)["mean"].tobytes() == expected.tobytes()

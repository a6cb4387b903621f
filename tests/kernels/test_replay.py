"""Products computed again: numpy says what a product holds, the sandbox must come to the same bits, or name what differs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ingest.records import FrameGeometry, FrameLedger, ObjectRecord, ObjectState
from kernels.contract import STOP, Kernel
from kernels.gate import admit
from kernels.lineage import ArrayUse, Epoch, Input, Lineage, StageSettings
from kernels.offline.body import Body, open_body
from kernels.offline.replay import Impossible, Replay, Replayed, differences, kernels_of
from kernels.product import Findings, build
from kernels.recorded import Recorded, RecordedArray, read
from kernels.verdicts import AFTER_STOP

SCALE = """
PARAMS = {"gain": ("float32", "frame")}
OUT = ("float32", "same")


def frame(frame, params, state, index, out, feedback):
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            out[y, x] = frame[y, x] * params.gain[y, x]
    return REPLACE
"""
PEAKS = """
PARAMS = {"low": ("float32", 1.0), "last": ("int64", -1)}
STATE = {"sum": ("float64", (3, 5), "sum"), "hits": ("int64", (1,), "sum"), "mean": ("float64", (3, 5), "sum")}
ROWS = {"x": "float32", "value": "float32"}


def finish(state, params):
    for y in range(3):
        for x in range(5):
            state.mean[y, x] = state.sum[y, x] / state.hits[0]


def frame(frame, params, state, index, out, feedback):
    n = 0
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            state.sum[y, x] += frame[y, x] / 3.0
            if frame[y, x] >= params.low:
                n += 1
                append(feedback, x, frame[y, x])
    state.hits[0] += n
    if index == params.last:
        return STOP
    return KEEP if n > 3 else DROP
"""
SHAPE = (3, 5)
GEOMETRY = FrameGeometry("<u2", SHAPE, 0, 30, None)
METADATA = {"frame-dtype": "uint16", "frame-shape": "3,5"}
LOWS = (np.float32(4.0), np.float32(9.5))


def frames(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 16, (count, *SHAPE)).astype(np.uint16)


@dataclasses.dataclass
class Truth:
    """What numpy finds, with the kernel's own order of operations."""

    sum: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(SHAPE))
    hits: int = 0
    verdicts: list[int] = dataclasses.field(default_factory=list)
    rows: list[tuple[int, float, float]] = dataclasses.field(default_factory=list)

    def judge(self, data: np.ndarray, gain: np.ndarray, epochs: tuple[tuple[int, int], ...], last: int) -> None:
        """One input in a state of its own for each epoch; states merge in order."""
        ends = [first for first, _ in epochs[1:]] + [len(data)]
        for (first, settings), end in zip(epochs, ends, strict=True):
            part = np.zeros(SHAPE)
            for index in range(first, end):
                if self.verdicts and STOP in self.verdicts:
                    self.verdicts.append(AFTER_STOP)
                    continue
                seen = data[index].astype(np.float32) * gain
                part += seen.astype(np.float64) / 3.0
                bright = seen >= LOWS[settings]
                self.hits += int(bright.sum())
                self.rows += [(index, float(x), float(seen[y, x])) for y, x in np.argwhere(bright)]
                self.verdicts.append(STOP if index == last else int(bright.sum() > 3))
            self.sum += part

    def findings(self) -> Findings:
        kernel = admit("peaks", PEAKS.encode())
        assert kernel.rows is not None
        count = len(self.verdicts)
        state = {"sum": self.sum, "hits": np.array([self.hits]), "mean": np.zeros(SHAPE)}
        return Findings(
            state=state,
            verdicts=np.array(self.verdicts, np.uint8),
            ledger=FrameLedger(received=count, stored=count),
            feedback_events=0,
            result={**state, "mean": self.sum / self.hits},
            rows=np.array(self.rows, kernel.rows.dtype),
        )


def record(number: int, length: int) -> ObjectRecord:
    return ObjectRecord(
        bucket="scan42",
        key=b"run/%d.raw" % number,
        version_id="null",
        object_id=number.to_bytes(16, "big"),
        sequence=1,
        state=ObjectState.BUFFERED,
        length=length,
        stored_length=length,
        etag="e",
        crc64nvme=number,
        modified_ns=10**18,
        owner="o",
        metadata=METADATA,
    )


def product(inputs: list[tuple[np.ndarray, tuple[tuple[int, int], ...]]], last: int = -1) -> Recorded:
    gain = np.linspace(0.3, 1.7, 15, dtype=np.float32).reshape(SHAPE)
    use = ArrayUse(b"_kernels/scale/gain.npy", b"g" * 16, 77, gain)
    truth = Truth()
    for data, epochs in inputs:
        truth.judge(data, gain, epochs, last)
    settings = tuple(
        (StageSettings({}, {"gain": use}), StageSettings({"low": float(low), "last": last})) for low in LOWS
    )
    lineage = Lineage(
        kernel=admit("peaks", PEAKS.encode()),
        match="*",
        settings=settings,
        inputs=tuple(
            Input(record(number, data.nbytes), GEOMETRY, len(data), tuple(Epoch(*epoch) for epoch in epochs))
            for number, (data, epochs) in enumerate(inputs)
        ),
        started_ns=10**18,
        ended_ns=10**18,
        before=(admit("scale", SCALE.encode()),),
        run=b"run/" if len(inputs) > 1 else None,
    )
    return read(bytes(build(lineage, truth.findings())))


@pytest.fixture
def bodies(tmp_path: Path) -> Iterator[list[Body]]:
    made: list[Body] = []
    yield made
    for body in made:
        body.close()


async def again(socket: str, recorded: Recorded, data: list[np.ndarray], bodies: list[Body], folder: Path) -> Replayed:
    kernels, notes = kernels_of(recorded)
    assert notes == []

    def fetch(use: RecordedArray) -> np.ndarray:
        raise AssertionError(f"a small array is in the product: {use}")

    replay = Replay(socket, recorded, kernels, fetch)
    try:
        for number, (one, values) in enumerate(zip(recorded.inputs, data, strict=True)):
            file = folder / f"{number}.raw"
            file.write_bytes(values.tobytes())
            bodies.append(open_body(file, one.key, one.metadata))
            await replay.add(one, bodies[-1])
        return await replay.end()
    finally:
        await replay.close()


async def test_chain_array_epochs_rows_and_finish_come_to_the_same_bits(
    zygote_socket: str, bodies: list[Body], tmp_path: Path
) -> None:
    data = frames(200, 1)
    recorded = product([(data, ((0, 0), (77, 1)))])
    assert recorded.verdicts is not None
    assert set(recorded.verdicts.tolist()) == {0, 1}
    assert differences(recorded, await again(zygote_socket, recorded, [data], bodies, tmp_path)) == []


async def test_the_members_of_a_run_merge_in_their_order(
    zygote_socket: str, bodies: list[Body], tmp_path: Path
) -> None:
    data = [frames(1, 2), frames(40, 3), frames(1, 4)]
    recorded = product([(data[0], ((0, 0),)), (data[1], ((0, 0), (11, 1))), (data[2], ((0, 1),))])
    replayed = await again(zygote_socket, recorded, data, bodies, tmp_path)
    assert replayed.frames == 42
    # A run's own product says for each row of which object it is; this one was built as an object's.
    assert [one.what for one in differences(recorded, replayed)] == ["rows/object"]
    assert replayed.rows is not None
    assert set(replayed.rows["object"].tolist()) == {0, 1, 2}


async def test_a_stop_is_a_stop_again(zygote_socket: str, bodies: list[Body], tmp_path: Path) -> None:
    data = frames(150, 5)
    recorded = product([(data, ((0, 0), (140, 1)))], last=99)
    replayed = await again(zygote_socket, recorded, [data], bodies, tmp_path)
    assert replayed.verdicts[98:101].tolist()[1:] == [STOP, AFTER_STOP]
    assert differences(recorded, replayed) == []


async def test_every_kind_of_difference_is_named(zygote_socket: str, bodies: list[Body], tmp_path: Path) -> None:
    data = frames(30, 6)
    recorded = product([(data, ((0, 0),))])
    other = data.copy()
    other[29, 2, 4] += 40
    found = differences(recorded, await again(zygote_socket, recorded, [other], bodies, tmp_path))
    named = {one.what: one.how for one in found}
    assert set(named) >= {"state/sum", "result/mean", "rows/value"}
    assert named["state/sum"].startswith("1 of 15 values; first at [2, 4]: ")


async def test_too_few_frames_cannot_be_reproduced(zygote_socket: str, bodies: list[Body], tmp_path: Path) -> None:
    data = frames(30, 7)
    recorded = product([(data, ((0, 0),))])
    with pytest.raises(Impossible, match="29 frames are found in it, the product was made of 30"):
        await again(zygote_socket, recorded, [data[:29]], bodies, tmp_path)


def test_a_source_that_is_no_longer_admitted() -> None:
    recorded = product([(frames(1, 8), ((0, 0),))])
    stage = dataclasses.replace(recorded.stages[1], source="import os\n")
    with pytest.raises(Impossible, match=r"does not admit the kernel: peaks\.py:1:"):
        kernels_of(dataclasses.replace(recorded, stages=(recorded.stages[0], stage)))
    changed = dataclasses.replace(recorded.stages[1], source=PEAKS + "# more\n")
    kernels, notes = kernels_of(dataclasses.replace(recorded, stages=(recorded.stages[0], changed)))
    assert isinstance(kernels[1], Kernel)
    assert "another SHA-256" in notes[0]

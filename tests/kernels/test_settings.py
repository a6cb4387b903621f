"""Arrays, chains and parameters that change while a stream runs: which settings judged which frame."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ingest.errors import BufferFull
from ingest.ports import KernelRefused
from ingest.records import FrameLedger
from kernels import notices, registry
from kernels.published import beside
from kernels.sandbox import SandboxLimits
from tests.kernels.hosting import BUCKET, Node

Until = Callable[..., object]
MakeNode = Callable[..., contextlib.AbstractAsyncContextManager[Node]]

MASKED = """
PARAMS = {"mask": ("uint8", "frame"), "scale": ("int64", 1)}
STATE = {"sum": ("int64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            if params.mask[y, x]:
                state.sum[0] += np.int64(frame[y, x]) * params.scale
    return KEEP
"""

DOUBLE = """
PARAMS = {"factor": ("float32", 2)}
OUT = ("float32", "same")

def frame(frame, params, state, index, out, feedback):
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            out[y, x] = frame[y, x] * params.factor
    return DROP if index == 3 else REPLACE
"""

TOTAL = """
STATE = {"sum": ("float64", (1,), "sum"), "frames": ("int64", (1,), "sum"), "mean": ("float64", (1,), "sum")}
ROWS = {"y": "int32", "x": "int32", "value": "float32"}

def frame(frame, params, state, index, out, feedback):
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            state.sum[0] += frame[y, x]
    state.frames[0] += 1
    append(feedback, index, 1, frame[index % 8, 1])
    emit(feedback, 5, index)
    return KEEP

def finish(state, params):
    state.mean[0] = state.sum[0] / state.frames[0]
"""

LEVEL = """
PARAMS = {"low": ("int64", 100)}
STATE = {"hits": ("int64", (16,), "sum")}

def frame(frame, params, state, index, out, feedback):
    state.hits[params.low] += 1
    emit(feedback, 1, params.low)
    return KEEP if index < params.low else DROP
"""


def ledger_of(node: Node, key: bytes) -> FrameLedger:
    record = node.store.objects[BUCKET, key]
    return node.store.ledgers.get(record.object_id, record.ledger)


def adds_up(ledger: FrameLedger) -> bool:
    parts = ledger.kept + ledger.dropped + ledger.replaced + ledger.unreduced + ledger.after_stop
    return ledger.received == ledger.stored == parts


# -- arrays


async def test_an_array_is_given_to_the_kernel(node: Node, frames: np.ndarray, until: Until) -> None:
    mask = np.random.default_rng(3).integers(0, 2, frames.shape[1:]).astype(bool)
    node.put_array("masked", "mask", np.asfortranarray(mask))
    node.attach("masked", MASKED, params='{"scale": 3}')
    stream = await node.open(b"a.raw", frames)
    stream.sniff()
    stream.offer(0, 40)
    stream.commit()
    await until(lambda: node.has_product("masked", b"a.raw"))
    with node.product("masked", b"a.raw") as file:
        assert file["entry/state/sum"][0] == 3 * frames[:, mask].sum(dtype=np.int64)
        assert len(file["entry/process/arrays/mask/object_id"]) == 1


@pytest.mark.parametrize("bad", ["missing", "shape", "no npy"])
async def test_what_waits_for_its_array_is_reduced_once_it_is_there(
    node: Node, frames: np.ndarray, until: Until, bad: str
) -> None:
    node.attach("masked", MASKED)
    if bad == "shape":
        node.put_array("masked", "mask", np.ones((8, 13), np.uint8))
    elif bad == "no npy":
        node.store.put(BUCKET, b"_kernels/masked/mask.npy", b"this is no array")
    stream = await node.open(b"a.raw", frames)
    assert stream.reduction is not None
    stream.sniff()
    stream.offer(0, 40)
    record = stream.commit()
    identity = (record.object_id, "masked")
    await until(lambda: identity in node.store.waits)
    assert "mask" in node.store.waits[identity]
    assert ledger_of(node, b"a.raw").unreduced == 40
    assert identity in node.store.owed
    assert not node.store.failures
    node.put_array("masked", "mask", np.ones((8, 12), np.uint8))
    await until(lambda: node.has_product("masked", b"a.raw"))
    with node.product("masked", b"a.raw") as file:
        assert file["entry/state/sum"][0] == frames.sum(dtype=np.int64)
    assert ledger_of(node, b"a.raw").kept == 40


@pytest.mark.parametrize(
    ("values", "length", "reason"),
    [
        (np.zeros((8, 12), np.int64), 0, "int64"),
        (np.zeros((8, 12), object), 0, "plain numbers"),
        (np.zeros((8, 12), "S3"), 0, "plain numbers"),
        (np.zeros((8, 12), np.uint8), -1, "96 bytes"),
        (np.zeros((8, 12), np.uint8), 1, "96 bytes"),
        (np.zeros((0, 12), np.uint8), 0, "empty"),
    ],
)
async def test_arrays_that_no_kernel_can_take_are_refused(
    node: Node, values: np.ndarray, length: int, reason: str
) -> None:
    node.attach("masked", MASKED)
    stored = _npy(values)
    with pytest.raises(KernelRefused) as refusal:
        await node.host.check_array(BUCKET, "masked", "mask", stored[:1000], len(stored) + length)
    assert reason in refusal.value.reason


async def test_the_arrays_of_a_bucket_are_bounded_together(
    node: Node, frames: np.ndarray, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "ARRAYS_BYTES_MAX", 300)
    for name in ("masked", "other"):
        node.attach(name, MASKED)
        node.put_array(name, "mask", np.ones((8, 12), np.uint8))
    stream = await node.open(b"a.raw", frames)
    stream.sniff()
    stream.offer(0, 40)
    record = stream.commit()
    await until(lambda: node.has_product("masked", b"a.raw") and (record.object_id, "other") in node.store.waits)
    assert "hold more than" in node.store.waits[record.object_id, "other"]


async def test_an_array_that_the_kernel_does_not_declare_is_refused(node: Node) -> None:
    stored = _npy(np.zeros((8, 12), np.uint8))
    await node.host.check_array(BUCKET, "masked", "maks", stored, len(stored))
    node.attach("masked", MASKED)
    with pytest.raises(KernelRefused, match="declared: mask"):
        await node.host.check_array(BUCKET, "masked", "maks", stored, len(stored))
    await node.host.check_array(BUCKET, "masked", "mask", stored, len(stored))


def _npy(values: np.ndarray) -> bytes:
    target = io.BytesIO()
    np.save(target, values, allow_pickle=values.dtype == object)
    return target.getvalue()


# -- chains


async def test_a_chain_judges_what_the_kernel_before_makes(node: Node, frames: np.ndarray, until: Until) -> None:
    node.attach("total", TOTAL, after="double")
    stream = await node.open(b"early.raw", frames)
    stream.sniff()
    stream.offer(0, 40)
    early = stream.commit()
    await until(lambda: (early.object_id, "total") in node.store.waits)
    assert "double.py" in node.store.waits[early.object_id, "total"]
    node.attach("double", DOUBLE, params='{"factor": 4}', match="none")
    await until(lambda: node.has_product("total", b"early.raw"))
    kept = np.delete(frames, 3, axis=0)
    with node.product("total", b"early.raw") as file:
        assert file["entry/state/sum"][0] == 4 * kept.sum(dtype=np.int64)
        assert file["entry/verdicts"][:].tolist() == [1, 1, 1, 0] + [1] * 36
        assert file["entry/result/mean"][0] == 4 * kept.sum(dtype=np.int64) / 39
        assert file["entry/state/mean"][0] == 0
        rows = file["entry/rows"]
        others = [index for index in range(40) if index != 3]
        assert rows["frame"][:].tolist() == others
        assert rows["value"][:].tolist() == [4.0 * frames[index, index % 8, 1] for index in others]
        assert rows.attrs["axes"].tolist() == ["x", "y"]
        assert rows.attrs["signal"] == "value"
        assert file["entry/process_1/kernel/file_name"].asstr()[()] == "double.py"
        assert file["entry/process_1/parameters/factor"][0] == 4
    assert sorted(event.frame for event in node.feedback.events) == others


async def test_circles_are_refused_and_never_run(node: Node, frames: np.ndarray, until: Until) -> None:
    node.attach("a", DOUBLE, after="b")
    with pytest.raises(KernelRefused, match="circle"):
        await node.host.check(BUCKET, "b", DOUBLE.encode(), {"after": "a"})
    for name, after in (("c", "a"), ("d", "c"), ("e", "d")):
        node.attach(name, DOUBLE, after=after)
    node.attach("b", DOUBLE)
    with pytest.raises(KernelRefused, match="at most 4"):
        await node.host.check(BUCKET, "e", DOUBLE.encode(), {"after": "d"})
    await node.host.check(BUCKET, "d", DOUBLE.encode(), {"after": "c"})
    # Put in an order that no check could see through.
    node.attach("b", DOUBLE, after="a")
    stream = await node.open(b"x.raw", frames)
    stream.sniff()
    record = stream.commit()
    await until(lambda: len(node.store.waits) == 5)
    assert "circle" in node.store.waits[record.object_id, "a"]


# -- several kernels on one stream


async def test_three_kernels_one_fails_one_is_slow(make_node: MakeNode, frames: np.ndarray, until: Until) -> None:
    broken = MASKED.replace("return KEEP", "return state.sum[frame.shape[0] * 1000]")
    slow = TOTAL.replace("    state.frames[0] += 1\n", SPIN)
    async with make_node(sandbox=SandboxLimits(batch_timeout_s=5, frame_timeout_s=1, populate=False)) as node:
        node.put_array("broken", "mask", np.ones((8, 12), np.uint8))
        node.attach("broken", broken)
        node.attach("slow", slow)
        node.attach("level", LEVEL, params='{"low": 10}')
        stream = await node.open(b"a.raw", frames)
        assert stream.reduction.kernels == ("broken", "level", "slow")
        stream.sniff()
        for first in range(0, 40, 5):
            stream.offer(first, 5)
        record = stream.commit()
        await until(lambda: node.has_product("level", b"a.raw"))
        # In whatever order: frames that the others had done with before it was ready came from disk.
        assert sorted(event.frame for event in node.feedback.events if event.kernel == "level") == list(range(40))
        await until(lambda: node.has_product("slow", b"a.raw") and node.store.failures, 60)
        assert [failure[1] for failure in node.store.failures] == ["broken"]
        with node.product("slow", b"a.raw") as file:
            assert file["entry/state/frames"][0] == 40
        ledger = ledger_of(node, b"a.raw")
        assert adds_up(ledger)
        assert ledger.kept == 40, "slow keeps them all"
        assert {owed for owed in node.store.owed if owed[0] == record.object_id} == set()


SPIN = """
    n = np.int64(frame[0, 0])
    for turn in range(20000000):
        n = (n * 1103515245 + 12345) % 2147483648
    state.frames[0] += 1 + (n < 0)
"""


async def test_the_kernel_that_filters_raw_data_decides_alone(node: Node, frames: np.ndarray, until: Until) -> None:
    node.attach("level", LEVEL, params='{"low": 10}', raw="kept")
    node.attach("all", TOTAL)
    stream = await node.open(b"a.raw", frames)
    stream.sniff()
    stream.offer(0, 40)
    stream.commit()
    await until(lambda: node.has_product("level", b"a.raw") and node.has_product("all", b"a.raw"))
    ledger = ledger_of(node, b"a.raw")
    assert (ledger.kept, ledger.dropped) == (10, 30)


async def test_replaced_frames_are_counted(node: Node, frames: np.ndarray, until: Until) -> None:
    node.attach("double", DOUBLE)
    stream = await node.open(b"a.raw", frames)
    stream.sniff()
    stream.offer(0, 40)
    stream.commit()
    await until(lambda: node.has_product("double", b"a.raw"))
    ledger = ledger_of(node, b"a.raw")
    assert (ledger.kept, ledger.dropped, ledger.replaced) == (0, 1, 39)
    assert [node.count("hiss_kernel_frames_total", verdict) for verdict in ("replace", "unreduced")] == [39, 0]
    assert adds_up(ledger)
    with node.product("double", b"a.raw") as file:
        assert file["entry/verdicts"][:5].tolist() == [2, 2, 2, 0, 2]


# -- epochs


async def change(node: Node, until: Until, low: int) -> None:
    before = node.host.revision(BUCKET)
    node.attach("level", LEVEL, params=f'{{"low": {low}}}')
    await until(lambda: node.host.revision(BUCKET) != before)


async def test_new_parameters_hold_from_a_frame_on(node: Node, frames: np.ndarray, until: Until) -> None:
    node.attach("level", LEVEL, params='{"low": 3}')
    stream = await node.open(b"a.raw", frames)
    stream.sniff()
    stream.offer(0, 10)
    await until(lambda: len(node.feedback.events) == 10)
    await change(node, until, 7)
    stream.offer(10, 5)
    stream.reduction.lagging(15, 5)
    await change(node, until, 8)
    await change(node, until, 9)
    stream.offer(20, 10)
    # Another source is for streams that open later.
    before = node.host.revision(BUCKET)
    node.attach("level", LEVEL + "\n# other\n", params='{"low": 15}')
    await until(lambda: node.host.revision(BUCKET) != before)
    stream.offer(30, 10)
    record = stream.commit()
    assert [(epoch.first_frame, epoch.stages[-1].params) for epoch in record.epochs] == [
        (0, {"low": 3}),
        (10, {"low": 7}),
        (20, {"low": 9}),
    ]
    await until(lambda: node.has_product("level", b"a.raw"))
    with node.product("level", b"a.raw") as file:
        hits = np.zeros(16, np.int64)
        hits[[3, 7, 9]] = 10, 10, 20
        np.testing.assert_array_equal(file["entry/state/hits"], hits)
        assert file["entry/process/parameters/low"][:].tolist() == [3, 7, 9]
        assert file["entry/source/epochs"][:].tolist() == [[0, 0, 0], [0, 10, 1], [0, 20, 2]]
    said = {event.frame: event.value for event in node.feedback.events}
    assert [said[frame] for frame in (0, 9, 10, 19, 20, 39)] == [3, 3, 7, 7, 9, 9]


@pytest.mark.parametrize("bad", ["shape", "no npy"])
async def test_an_array_that_does_not_fit_a_running_stream_is_an_error_that_shows(
    make_node: MakeNode, frames: np.ndarray, until: Until, tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: str
) -> None:
    """The stream goes on with the array of before; a good one, put later, ends the trouble."""
    strikes = tmp_path / "kernels-00.json"

    def shown() -> list[tuple[str, str, str]]:
        found = notices.read([beside(strikes, notices.FILE_PATTERN) or strikes])
        return [(one.kernel, one.kind, one.key) for one in found]

    async with make_node(strikes_file=strikes) as node:
        node.put_array("masked", "mask", np.ones((8, 12), np.uint8))
        node.attach("masked", MASKED)
        stream = await node.open(b"a.raw", frames)
        stream.sniff()
        stream.offer(0, 10)
        before = node.host.revision(BUCKET)
        if bad == "shape":
            node.put_array("masked", "mask", np.ones((8, 13), np.uint8))
        else:
            node.store.put(BUCKET, b"_kernels/masked/mask.npy", b"this is no array")
        await until(lambda: node.host.revision(BUCKET) != before)
        stream.offer(10, 10)
        await until(lambda: shown() == [("masked", "misfit", "a.raw")])
        assert node.count("hiss_kernel_errors_total", "misfit") == 1
        assert "what arrives in b'a.raw' is judged with what was there before" in caplog.text
        before = node.host.revision(BUCKET)
        node.put_array("masked", "mask", np.ones((8, 12), np.uint8))
        await until(lambda: node.host.revision(BUCKET) != before)
        stream.offer(20, 20)
        await until(lambda: shown() == [])
        stream.commit()
        await until(lambda: node.has_product("masked", b"a.raw"))
        with node.product("masked", b"a.raw") as file:
            assert file["entry/state/sum"][0] == frames.sum(dtype=np.int64)


async def test_epochs_survive_a_dead_worker(make_node: MakeNode, frames: np.ndarray, until: Until) -> None:
    async with make_node() as node:
        node.attach("level", LEVEL, params='{"low": 3}')
        stream = await node.open(b"a.raw", frames)
        stream.sniff()
        stream.reduction.lagging(0, 12)
        await change(node, until, 5)
        stream.reduction.lagging(12, 28)
        # Nothing of it is read back: the worker dies right after the commit.
        node.store.before_load = _never
        record = stream.commit()
        await node.host.close(timeout_s=0.01)
    node.store.before_load = lambda record: None
    assert (record.object_id, "level") in node.store.owed
    async with make_node() as node:
        node.attach("level", LEVEL, params='{"low": 11}')
        await until(lambda: node.has_product("level", b"a.raw"))
        with node.product("level", b"a.raw") as file:
            assert file["entry/state/hits"][:].nonzero()[0].tolist() == [3, 5]
            assert file["entry/state/hits"][:][[3, 5]].tolist() == [12, 28]
    # Another source by then: the whole version is reduced with what is there now.
    node.store.owed[record.object_id, "level"] = 0
    async with make_node() as node:
        node.attach("level", LEVEL + "\n# other\n", params='{"low": 11}')
        await until(lambda: not node.store.owed)
        with node.product("level", b"a.raw") as file:
            assert file["entry/state/hits"][11] == 40
            assert file["entry/source/epochs"][:].tolist() == [[0, 0, 0]]
    assert adds_up(ledger_of(node, b"a.raw"))


def _never(record: object) -> None:
    raise BufferFull("not now")


# -- ordered


ORDERED = """
ORDERED = True
STATE = {"last": ("int64", (1,), "sum"), "wrong": ("int64", (1,), "sum"), "n": ("int64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    state.wrong[0] += index != state.last[0]
    state.last[0] = index + 1
    state.n[0] += 1
    return KEEP
"""


async def test_an_ordered_kernel_sees_every_frame_in_sequence(node: Node, frames: np.ndarray, until: Until) -> None:
    node.attach("inorder", ORDERED)
    stream = await node.open(b"a.raw", frames)
    stream.sniff()
    stream.offer(0, 8)
    await until(lambda: node.count("hiss_kernel_frames_total", "keep") == 8)
    stream.reduction.lagging(8, 2)
    stream.offer(10, 10)
    await until(lambda: stream.batches[-1].releases == 1)
    victims = node.pids()
    node.store.before_load = lambda record: os.kill(victims.pop(), signal.SIGKILL) if victims else None
    stream.offer(20, 20)
    stream.commit()
    await until(lambda: node.has_product("inorder", b"a.raw"))
    with node.product("inorder", b"a.raw") as file:
        assert file["entry/state/wrong"][0] == 0
        assert file["entry/state/n"][0] == 40
    assert adds_up(ledger_of(node, b"a.raw"))


# -- before the first frame


async def test_a_new_kernel_is_compiled_before_its_first_frame(node: Node, frames: np.ndarray, until: Until) -> None:
    node.attach("level", LEVEL, params='{"low": 3}')
    first = await node.open(b"a.raw", frames)
    first.sniff()
    first.offer(0, 40)
    first.commit()
    await until(lambda: node.has_product("level", b"a.raw"))
    compiled = set(node.pids())
    await node.host.check(BUCKET, "total", TOTAL.encode(), {})
    node.attach("total", TOTAL)
    # Nobody asked for it yet.
    await until(lambda: set(node.pids()) - compiled)
    warm = set(node.pids()) - compiled
    second = await node.open(b"b.raw", frames)
    second.sniff()
    second.offer(0, 40)
    second.commit()
    await until(lambda: node.has_product("total", b"b.raw"))
    assert warm <= set(node.pids()), "the stream was judged by the process that was there"
    assert node.count("hiss_kernel_catchup_frames_total") == 0

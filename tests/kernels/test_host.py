"""The kernel host with real sandboxes: what a stream of frames leaves behind, whatever happens in between."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Callable

import numpy as np
import pytest

from ingest.errors import BufferFull, ObjectOffline
from ingest.ports import KernelRefused
from ingest.records import CommitObject, ObjectRecord
from kernels.sandbox import Sandbox, SandboxLimits
from tests.kernels.hosting import BUCKET, COUNT, Node, limits

LOOP = """
STATE = {"n": ("int64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    n = 1
    while n > 0:
        n = n ^ 1 | 2
    state.n[0] += n
    return KEEP
"""

SLOW = """
PARAMS = {"turns": ("int64", 60000000)}
STATE = {"n": ("int64", (1,), "sum"), "sum": ("int64", (1,), "sum"), "spin": ("int64", (1,), "max")}

def frame(frame, params, state, index, out, feedback):
    n = np.int64(frame[0, 0])
    for turn in range(params.turns):
        n = (n * 1103515245 + 12345) % 2147483648
    state.n[0] += 1
    state.sum[0] += np.int64(frame[0, 0])
    state.spin[0] = max(state.spin[0], n)
    emit(feedback, 7, index)
    return KEEP
"""


Until = Callable[..., object]


def folded(frames: np.ndarray) -> np.ndarray:
    """What COUNT leaves in ``total``."""
    expected = np.zeros((4, 6), np.int64)
    _, rows, columns = frames.shape
    for y in range(rows):
        for x in range(columns):
            expected[y % 4, x % 6] += frames[:, y, x].sum(dtype=np.int64)
    return expected


def check_count(node: Node, key: bytes, frames: np.ndarray, low: int = 5, kernel: str = "count") -> None:
    hits = (frames.astype(np.int64) >= low).sum(axis=(1, 2))
    with node.product(kernel, key) as file:
        assert file["entry/state/hits"][0] == hits.sum()
        assert file["entry/state/most"][0] == frames.max()
        np.testing.assert_array_equal(file["entry/state/total"], folded(frames))
        np.testing.assert_array_equal(file["entry/verdicts"], (hits >= 1).astype(np.uint8))
        assert file["entry/frames/unreduced"][()] == 0


async def test_frames_in_product_and_feedback_out(node: Node, frames: np.ndarray, until: Until) -> None:
    node.attach("count", COUNT, params='{"low": 9, "pixels": 10}')
    stream = await node.open(b"run/a.raw", frames)
    assert stream.reduction.kernels == ("count",)
    assert stream.sniff().shape == (8, 12)
    assert node.feedback.streams == [("opened", BUCKET, ("count",))]
    for first in range(0, 40, 10):
        stream.offer(first, 10)
    await until(lambda: len(node.feedback.events) == 40)
    record = stream.commit()
    assert node.feedback.streams[1:] == [("closed", BUCKET, ("count",))]
    await until(lambda: node.has_product("count", b"run/a.raw"))
    hits = (frames >= 9).sum(axis=(1, 2))
    kept = int((hits >= 10).sum())
    with node.product("count", b"run/a.raw") as file:
        assert file["entry/state/hits"][0] == hits.sum()
        np.testing.assert_array_equal(file["entry/verdicts"], (hits >= 10).astype(np.uint8))
        assert file["entry/process/parameters/low"][()] == 9
        assert file["entry/source/object_id"].asstr()[()] == record.object_id.hex()
    assert [event.value for event in node.feedback.events] == hits.tolist()
    assert [event.frame for event in node.feedback.events] == list(range(40))
    assert all(event.live for event in node.feedback.events)
    # Amended only where it differs from what was known at the commit.
    ledger = node.store.ledgers.get(record.object_id, record.ledger)
    assert (ledger.received, ledger.kept, ledger.dropped, ledger.unreduced) == (40, kept, 40 - kept, 0)
    assert node.count("hiss_kernel_frames_total", "keep") == kept
    assert node.count("hiss_kernel_products_total") == 1
    assert not node.store.owed


async def test_real_frames(node: Node, aps_frames: np.ndarray, until: Until) -> None:
    node.attach("count", COUNT, params='{"low": 1000}')
    stream = await node.open(b"aps.raw", aps_frames)
    stream.sniff()
    for first in range(0, 10, 2):
        stream.offer(first, 2)
    stream.commit()
    await until(lambda: node.has_product("count", b"aps.raw"))
    check_count(node, b"aps.raw", aps_frames, low=1000)
    with node.product("count", b"aps.raw") as file:
        assert file["entry/state/total"][:].sum() == 4_809_206_181
        assert file["entry/state/most"][0] == 78_939


async def test_streams_that_are_not_for_kernels(node: Node, frames: np.ndarray) -> None:
    assert (await node.open(b"a.raw", frames)).reduction is None
    node.attach("count", COUNT, match="run*/*.raw")
    for key in (b"a.raw", b"run1/a.cbf", b"_kernels/x.py", b"_products/run1/a.raw"):
        assert (await node.open(key, frames)).reduction is None
        assert node.host.kernels_for(BUCKET, key) == ()
    stream = await node.open(b"run1/deep/a.raw", frames)
    assert node.host.kernels_for(BUCKET, b"run1/a.raw") == ("count",)
    stream.reduction.aborted()


@pytest.mark.parametrize("after_commit", [False, True])
async def test_a_killed_sandbox_costs_nothing(node: Node, frames: np.ndarray, until: Until, after_commit: bool) -> None:
    node.attach("count", COUNT)
    stream = await node.open(b"a.raw", frames)
    stream.sniff()
    stream.offer(0, 20)
    await until(lambda: len(node.feedback.events) == 20)
    if after_commit:
        stream.reduction.lagging(20, 20)
        victims = node.pids()
        node.store.before_load = lambda record: os.kill(victims.pop(), signal.SIGKILL) if victims else None
    else:
        os.kill(node.pids()[0], signal.SIGKILL)
        stream.offer(20, 20)
    stream.commit()
    await until(lambda: node.has_product("count", b"a.raw"))
    check_count(node, b"a.raw", frames)
    assert node.count("hiss_kernel_errors_total", "crash") == 1
    assert sorted(event.frame for event in node.feedback.events) == list(range(40)), "each frame is told of once"
    assert all(event.live == (event.frame < 20) for event in node.feedback.events) or not after_commit


async def test_an_endless_loop_costs_its_product_only(
    make_node: Callable[..., contextlib.AbstractAsyncContextManager[Node]], frames: np.ndarray, until: Until
) -> None:
    sandbox = SandboxLimits(batch_timeout_s=0.1, frame_timeout_s=0.0, populate=False)
    async with make_node(sandbox=sandbox) as node:
        node.attach("count", COUNT)
        node.attach("loop", LOOP)
        stream = await node.open(b"a.raw", frames)
        assert stream.reduction.kernels == ("count", "loop")
        stream.sniff()
        stream.offer(0, 40)
        record = stream.commit()
        await until(lambda: node.has_product("count", b"a.raw") and node.store.failures)
        check_count(node, b"a.raw", frames)
        (failure,) = node.store.failures
        assert failure[:2] == (record.object_id, "loop")
        assert "timeout" in failure[2]
        assert failure[3] is True
        assert node.count("hiss_kernel_errors_total", "timeout") == 3
        assert node.host.kernels_for(BUCKET, b"b.raw") == ("count",), "the loop is disabled"
        node.attach("loop", COUNT + "\n# mended\n")
        await node.host.prepare(BUCKET)
        assert node.host.kernels_for(BUCKET, b"b.raw") == ("count", "loop")


async def test_a_kernel_that_failed_starts_again_on_probation(node: Node, frames: np.ndarray, until: Until) -> None:
    """The second process of what may be a loop takes no time from the streams of others."""
    node.attach("slow", SLOW, params='{"turns": 30000000}')
    stream = await node.open(b"a.raw", frames)
    stream.sniff()
    stream.offer(0, 4)
    await until(node.pids)
    first = node.pids()
    assert os.sched_getscheduler(first[0]) == os.SCHED_BATCH
    os.kill(first[0], signal.SIGKILL)
    await until(lambda: set(node.pids()) - set(first))
    assert [os.sched_getscheduler(pid) for pid in node.pids()] == [os.SCHED_IDLE]
    stream.commit()


async def test_a_lane_that_is_closed_before_it_began_holds_nothing(node: Node, frames: np.ndarray) -> None:
    """Its domain's memory could never be given to another bucket again."""
    node.attach("count", COUNT)
    stream = await node.open(b"a.raw", frames)
    stream.sniff()
    (lane,) = node.host._pool.lanes
    assert not lane._begun
    stream.reduction.aborted()
    await lane.close()
    await lane.close()
    assert [regions.holds for regions in node.store.domains.values()] == [0]


async def test_revoked_frames_are_reduced_from_disk(node: Node, frames: np.ndarray, until: Until) -> None:
    node.attach("slow", SLOW, params='{"turns": 3000000}')
    stream = await node.open(b"a.raw", frames)
    stream.sniff()
    batches = [stream.offer(first, 4) for first in range(0, 36, 4)]
    stream.reduction.lagging(36, 4)
    await until(lambda: node.feedback.events)
    for batch in batches:
        if not batch.sent:
            batch.revoked = True
    assert any(batch.revoked for batch in batches)
    stream.commit()
    await until(lambda: node.has_product("slow", b"a.raw"))
    with node.product("slow", b"a.raw") as file:
        assert file["entry/state/n"][0] == 40
        assert file["entry/state/sum"][0] == frames[:, 0, 0].sum()
        assert file["entry/verdicts"][:].all()
    caught_up = 4 + sum(batch.count for batch in batches if batch.revoked)
    assert node.count("hiss_kernel_catchup_frames_total") == caught_up
    assert sorted(event.frame for event in node.feedback.events) == list(range(40))


async def test_an_aborted_stream_leaves_nothing(node: Node, frames: np.ndarray, until: Until) -> None:
    node.attach("slow", SLOW, params='{"turns": 3000000}')
    stream = await node.open(b"a.raw", frames)
    stream.sniff()
    for first in range(0, 40, 4):
        stream.offer(first, 4)
    await until(lambda: node.feedback.events)
    stream.reduction.aborted()
    stream.reduction.aborted()
    await until(lambda: all(batch.releases == 1 for batch in stream.batches))
    assert not any(key.startswith(b"_products/") for _, key in node.store.objects)
    again = await node.open(b"a.raw", frames[:2])
    again.sniff()
    again.offer(0, 2)
    again.commit()
    await until(lambda: node.has_product("slow", b"a.raw"))
    with node.product("slow", b"a.raw") as file:
        assert file["entry/state/n"][0] == 2, "the aborted stream's state is gone"


@pytest.mark.parametrize("moment", ["load", "store"])
async def test_an_overwritten_version_gets_no_product(
    node: Node, frames: np.ndarray, until: Until, moment: str
) -> None:
    node.attach("count", COUNT)
    stream = await node.open(b"a.raw", frames)
    stream.sniff()
    stream.reduction.lagging(0, 40)

    def overwrite(_: object) -> None:
        if node.store.objects[BUCKET, b"a.raw"].object_id == stream.info.object_id:
            node.store.put(BUCKET, b"a.raw", b"")

    setattr(node.store, f"before_{moment}", overwrite)
    stream.commit()
    await until(lambda: stream.reduction.finished.is_set())
    assert not node.has_product("count", b"a.raw")
    assert not node.store.failures


async def test_many_streams_share_one_sandbox(node: Node, frames: np.ndarray, until: Until) -> None:
    node.attach("count", COUNT)
    streams = [await node.open(b"%d.raw" % n, frames[n : n + 3]) for n in range(30)]
    for stream in streams:
        stream.sniff()
    for first in range(3):
        for stream in streams:
            stream.offer(first, 1)
    for stream in streams:
        stream.commit()
    await until(lambda: node.count("hiss_kernel_products_total") == 30)
    for n in range(30):
        check_count(node, b"%d.raw" % n, frames[n : n + 3])
    assert node.count("hiss_kernel_sandboxes") == 1


async def test_a_stream_without_frames_has_a_product_with_the_initial_state(
    node: Node, frames: np.ndarray, until: Until
) -> None:
    node.attach("count", COUNT)
    stream = await node.open(b"a.raw", frames[:0])
    assert stream.reduction.sniff(memoryview(b""), complete=True) is not None
    stream.commit()
    await until(lambda: node.has_product("count", b"a.raw"))
    with node.product("count", b"a.raw") as file:
        assert file["entry/state/hits"][0] == 0
        assert file["entry/verdicts"].shape == (0,)


async def test_bodies_without_frames_get_a_product_that_says_why(node: Node, frames: np.ndarray, until: Until) -> None:
    node.attach("count", COUNT)
    stream = await node.open(b"notes.txt", frames, frame_dtype="O")
    assert stream.sniff() is None
    stream.commit()
    await until(lambda: node.has_product("count", b"notes.txt"))
    with node.product("count", b"notes.txt") as file:
        assert "object arrays" in file["entry/error"].asstr()[()]
    assert node.count("hiss_kernel_errors_total", "format") == 1
    assert not node.store.owed


async def test_a_kernel_that_does_not_compile_for_these_frames_says_so(
    node: Node, frames: np.ndarray, until: Until
) -> None:
    node.attach("count", COUNT)
    for key in (b"a.raw", b"b.raw"):
        stream = await node.open(key, frames.reshape(40, 96))
        stream.sniff()
        stream.offer(0, 40)
        stream.commit()
        await until(lambda key=key: node.has_product("count", key))
        with node.product("count", key) as file:
            assert "count.py:" in file["entry/error"].asstr()[()]
    assert node.count("hiss_kernel_errors_total", "compile") == 1


async def test_what_a_dead_worker_owed_is_paid(node: Node, frames: np.ndarray, until: Until) -> None:
    node.attach("count", COUNT)
    await node.host.prepare(BUCKET)
    metadata = {"frame_dtype": "uint16", "frame_shape": "8,12"}
    record = node.store.put(BUCKET, b"a.raw", frames.tobytes() + b"tail", **metadata)
    node.store.owed[record.object_id, "count"] = 0
    gone = node.store.put(BUCKET, b"b.raw", frames.tobytes(), **metadata)
    node.store.owed[gone.object_id, "deleted"] = 0
    await until(lambda: node.has_product("count", b"a.raw") and node.store.failures)
    check_count(node, b"a.raw", frames)
    ledger = node.store.ledgers[record.object_id]
    assert (ledger.received, ledger.trailing_bytes, ledger.unreduced) == (40, 4, 0)
    assert node.store.failures[0][1] == "deleted"


async def test_without_free_regions_a_stream_is_reduced_later(node: Node, frames: np.ndarray, until: Until) -> None:
    node.attach("count", COUNT)
    node.attach("count", COUNT, bucket="other")
    node.store.domains_max = 1
    warm = await node.open(b"a.raw", frames, bucket="other")
    warm.sniff()
    warm.offer(0, 40)
    warm.commit()
    await until(lambda: node.has_product("count", b"a.raw", "other"))
    stream = await node.open(b"a.raw", frames)
    assert stream.reduction is None
    assert node.host.kernels_for(BUCKET, b"a.raw") == ("count",), "known by name, though its source cannot be read"
    record = node.store.commit_now(stream.request(None), frames.tobytes())
    node.host.catch_up(record, node.host.kernels_for(BUCKET, b"a.raw"))
    # The other bucket's idle sandbox is closed to make room.
    await until(lambda: node.has_product("count", b"a.raw"))
    check_count(node, b"a.raw", frames)


async def test_reading_many_kernels_takes_one_set_of_regions(
    node: Node, frames: np.ndarray, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Regions that were given back are scrubbed before they serve again: none of these comes back during the test.
    names = [f"count{number}" for number in range(6)]
    for name in names:
        node.attach(name, COUNT)
    given = node.store.domain
    seen: list[object] = []

    def domain(bucket: str) -> object:
        if seen and seen[-1].holds == 0:
            return None
        seen.append(given(bucket))
        return seen[-1]

    monkeypatch.setattr(node.store, "domain", domain)
    await node.host.prepare(BUCKET)
    monkeypatch.undo()
    assert node.store.loads == len(names)
    assert node.host.kernels_for(BUCKET, b"run/1") == tuple(names)
    stream = await node.open(b"run/1", frames)
    stream.sniff()
    stream.offer(0, 40)
    stream.commit()
    await until(lambda: all(node.has_product(name, b"run/1") for name in names))


async def test_each_further_sandbox_yields_more(node: Node, frames: np.ndarray, until: Until) -> None:
    for name in ("a", "b", "c"):
        node.attach(name, COUNT)
    stream = await node.open(b"run/1", frames)
    stream.sniff()
    stream.offer(0, 40)
    stream.commit()
    await until(lambda: all(node.has_product(name, b"run/1") for name in "abc"))
    first = limits().sandbox.nice
    assert sorted(os.getpriority(os.PRIO_PROCESS, pid) for pid in node.pids()) == [first, first + 3, first + 6]


async def test_one_process_for_two_kernels_in_turn(
    make_node: Callable[..., contextlib.AbstractAsyncContextManager[Node]], frames: np.ndarray, until: Until
) -> None:
    async with make_node(processes_max=1) as node:
        node.attach("count", COUNT)
        node.attach("other", COUNT + "\n# other\n")
        stream = await node.open(b"a.raw", frames)
        stream.sniff()
        stream.offer(0, 40)
        stream.commit()
        await until(lambda: node.has_product("count", b"a.raw") and node.has_product("other", b"a.raw"))
        check_count(node, b"a.raw", frames)
        check_count(node, b"a.raw", frames, kernel="other")


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"raw": "some"}, "raw"),
        ({"after": "count"}, "circle"),
        ({"after": "hits.py"}, "after"),
        ({"device": "fpga"}, "device"),
        ({"params": '{"low": "x"}'}, "params"),
        ({"params": "[]"}, "params"),
        ({"params": '{"nothing": 1}'}, "nothing"),
        ({"params": '{"low": 1.5}'}, "low"),
        ({"match": ""}, "match"),
        ({"frame-dtype": "O", "frame-shape": "2,2"}, "object"),
        ({"frame-dtype": "uint16", "frame-shape": "96"}, ""),
    ],
)
async def test_submissions_that_cannot_be(node: Node, metadata: dict[str, str], reason: str) -> None:
    with pytest.raises(KernelRefused) as refusal:
        await node.host.check(BUCKET, "count", COUNT.encode(), metadata)
    assert reason in refusal.value.reason
    assert node.count("hiss_kernel_errors_total", "refused") == 1


async def test_a_submission_that_passes(node: Node) -> None:
    await node.host.check(BUCKET, "count", COUNT.encode(), {"params": '{"low": 3}', "match": "*.npy"})
    with pytest.raises(KernelRefused) as refusal:
        await node.host.check(BUCKET, "../count", COUNT.encode(), {})
    assert "name" in refusal.value.reason


async def test_a_product_that_cannot_be_stored_now_stays_owed(
    node: Node, frames: np.ndarray, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.conclusion.STORE_BACKOFF_S", (0.0, 0.0))
    full = [BufferFull("full")] * 3

    def before_store(_: CommitObject) -> None:
        if full:
            raise full.pop()

    node.store.before_store = before_store
    node.attach("count", COUNT)
    stream = await node.open(b"a.raw", frames)
    stream.sniff()
    stream.offer(0, 40)
    stream.commit()
    await until(lambda: node.has_product("count", b"a.raw"))
    check_count(node, b"a.raw", frames)
    assert not full
    assert not node.store.failures, "a shortage is not the kernel's failure"


async def test_bytes_on_the_archive_tier_are_recalled(node: Node, frames: np.ndarray, until: Until) -> None:
    node.attach("count", COUNT)
    await node.host.prepare(BUCKET)
    record = node.store.put(BUCKET, b"a.raw", frames.tobytes(), frame_dtype="uint16", frame_shape="8,12")
    node.store.owed[record.object_id, "count"] = 0

    def before_load(loaded: ObjectRecord) -> None:
        if loaded.object_id not in node.store.recalled and not loaded.key.startswith(b"_kernels/"):
            raise ObjectOffline

    node.store.before_load = before_load
    await until(lambda: node.has_product("count", b"a.raw"))
    assert node.store.recalled == {record.object_id}


async def test_an_npy_stack_with_fewer_frames_than_it_declares(node: Node, frames: np.ndarray, until: Until) -> None:
    node.attach("count", COUNT)
    await node.host.prepare(BUCKET)
    target = io.BytesIO()
    np.save(target, frames)
    record = node.store.put(BUCKET, b"a.npy", target.getvalue()[: -frames[0].nbytes - 5])
    node.host.catch_up(record, ("count",))
    await until(lambda: node.has_product("count", b"a.npy"))
    check_count(node, b"a.npy", frames[:38])
    ledger = node.store.ledgers[record.object_id]
    assert (ledger.received, ledger.gaps) == (38, ((38, 2),))


async def test_a_closing_host_leaves_what_is_unfinished_owed(
    make_node: Callable[..., contextlib.AbstractAsyncContextManager[Node]], frames: np.ndarray, until: Until
) -> None:
    async with make_node() as node:
        node.attach("slow", SLOW)
        stream = await node.open(b"a.raw", frames)
        stream.sniff()
        stream.offer(0, 40)
        await until(node.pids)
        stream.commit()
        pids = node.pids()
        await node.host.close(timeout_s=0.05)
    assert node.store.owed == {(stream.info.object_id, "slow"): 0}
    assert not node.store.failures
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_trouble_of_our_own_is_not_the_kernels(
    node: Node, frames: np.ndarray, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An arena whose regions a sandbox will not take: the frames stay owed, and are reduced once that is mended."""
    start = Sandbox.start
    refusals = [ValueError("region descriptor is not sealed")] * 2

    async def unwilling(*arguments: object, **options: object) -> Sandbox:
        if refusals:
            raise refusals.pop()
        return await start(*arguments, **options)

    monkeypatch.setattr(Sandbox, "start", unwilling)
    node.attach("count", COUNT)
    stream = await node.open(b"a.raw", frames)
    stream.sniff()
    stream.offer(0, 40)
    stream.commit()
    await until(lambda: node.has_product("count", b"a.raw"))
    check_count(node, b"a.raw", frames)
    assert node.host.kernels_for(BUCKET, b"a.raw") == ("count",)
    assert [failure[3] for failure in node.store.failures] == [False, False]

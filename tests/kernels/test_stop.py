"""STOP in the kernel room: nothing behind it is judged, and the ledger accounts for every frame all the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import numpy as np
import pytest

from ingest.records import FrameLedger
from tests.kernels.hosting import BUCKET, Node

Until = Callable[..., object]

UNTIL = """
PARAMS = {"last": ("int64", 17)}
STATE = {"seen": ("int64", (1,), "sum"), "most": ("int64", (1,), "max")}
ROWS = {"value": "int64"}

def frame(frame, params, state, index, out, feedback):
    state.seen[0] += 1
    state.most[0] = max(state.most[0], index)
    append(feedback, index)
    emit(feedback, 1, index)
    return STOP if index == params.last else index % 2 == 0
"""

ALL = """
STATE = {"seen": ("int64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    state.seen[0] += 1
    return DROP
"""


def ledger_of(node: Node, key: bytes = b"a.raw") -> FrameLedger:
    record = node.store.objects[BUCKET, key]
    ledger = node.store.ledgers.get(record.object_id, record.ledger)
    parts = ledger.kept + ledger.dropped + ledger.replaced + ledger.unreduced + ledger.after_stop
    assert ledger.received == ledger.stored == parts
    return ledger


def check(node: Node, last: int, frames: int = 40, key: bytes = b"a.raw") -> None:
    with node.product("until", key) as file:
        assert file["entry/state/seen"][0] == last + 1
        assert file["entry/state/most"][0] == last
        assert file["entry/rows/frame"][:].tolist() == list(range(last + 1))
        verdicts = [1 - index % 2 for index in range(last)] + [3] + [252] * (frames - last - 1)
        assert file["entry/verdicts"][:].tolist() == verdicts
        assert file["entry/frames/stopped_at"][()] == last
        assert file["entry/frames/after_stop"][()] == frames - last - 1


@pytest.mark.parametrize("late", [False, True], ids=["live", "from disk"])
async def test_no_frame_behind_a_stop_is_judged(node: Node, frames: np.ndarray, until: Until, late: bool) -> None:
    node.attach("until", UNTIL)
    stream = await node.open(b"a.raw", frames)
    heard: list[int] = []
    stream.reduction.when_stopped(heard.append)
    stream.sniff()
    if late:
        # The frames behind are judged first: what they left in the state must not stay.
        stream.reduction.lagging(0, 20)
        stream.offer(20, 20)
        await until(lambda: len(node.feedback.events) == 20)
    else:
        for first in range(0, 40, 8):
            stream.offer(first, 8)
        await until(lambda: heard)
    stream.commit()
    await until(lambda: node.has_product("until", b"a.raw"))
    check(node, 17)
    assert heard == ([] if late else [17]), "only a stream that still arrives can be ended"
    ledger = ledger_of(node)
    assert (ledger.kept, ledger.dropped, ledger.after_stop, ledger.stopped_at) == (10, 8, 22, 17)
    assert all(batch.releases == 1 for batch in stream.batches)


async def test_a_stop_survives_the_sandbox(node: Node, frames: np.ndarray, until: Until) -> None:
    node.attach("until", UNTIL)
    stream = await node.open(b"a.raw", frames)
    stream.sniff()
    stream.offer(0, 30)
    await until(lambda: len(node.feedback.events) == 18)
    os.kill(node.pids()[0], signal.SIGKILL)
    stream.offer(30, 10)
    stream.commit()
    await until(lambda: node.has_product("until", b"a.raw"))
    check(node, 17)
    assert sorted(event.frame for event in node.feedback.events) == list(range(18))
    ledger_of(node)


async def test_other_kernels_judge_what_is_stored(node: Node, frames: np.ndarray, until: Until) -> None:
    node.attach("until", UNTIL)
    node.attach("all", ALL)
    stream = await node.open(b"a.raw", frames)
    stream.sniff()
    stream.offer(0, 40)
    stream.commit()
    await until(lambda: node.has_product("until", b"a.raw") and node.has_product("all", b"a.raw"))
    with node.product("all", b"a.raw") as file:
        assert file["entry/state/seen"][0] == 40
    ledger = ledger_of(node)
    assert (ledger.kept, ledger.dropped, ledger.after_stop, ledger.unreduced) == (10, 8, 22, 0)


async def test_a_stop_in_an_earlier_epoch_takes_the_later_ones_away(
    node: Node, frames: np.ndarray, until: Until
) -> None:
    node.attach("until", UNTIL, params='{"last": 5}')
    stream = await node.open(b"a.raw", frames)
    stream.sniff()
    stream.reduction.lagging(0, 10)
    before = node.host.revision(BUCKET)
    node.attach("until", UNTIL, params='{"last": 35}')
    await until(lambda: node.host.revision(BUCKET) != before)
    stream.offer(10, 30)
    await until(lambda: len(node.feedback.events) == 26)
    stream.commit()
    await until(lambda: node.has_product("until", b"a.raw"))
    check(node, 5)
    assert ledger_of(node).stopped_at == 5


async def test_a_truncated_version_says_so_and_has_no_gap(node: Node, frames: np.ndarray, until: Until) -> None:
    node.attach("until", UNTIL)
    stream = await node.open(b"a.npy", frames[:24], frame_shape="8,12")
    stream.sniff()
    stream.offer(0, 24)
    await until(lambda: len(node.feedback.events) == 18)
    record = stream.commit(discarded_bytes=16 * 192)
    assert record.ledger.truncated
    assert record.ledger.discarded_bytes == 16 * 192
    await until(lambda: node.has_product("until", b"a.npy"))
    check(node, 17, 24, b"a.npy")
    ledger = ledger_of(node, b"a.npy")
    assert (ledger.truncated, ledger.gaps, ledger.after_stop) == (True, (), 6)

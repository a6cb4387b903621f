"""Which kernels are disabled: known to every worker of a node, and to whoever takes a worker's place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kernels.sandbox import SandboxLimits
from kernels.strikes import Strikes
from tests.kernels.hosting import BUCKET, Node

Until = Callable[..., object]
MakeNode = Callable[..., contextlib.AbstractAsyncContextManager[Node]]

BROKEN = """
STATE = {"n": ("int64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    state.n[frame.shape[0] * 1000] += 1
    return KEEP
"""


async def test_what_one_worker_disables_is_disabled_in_all(tmp_path: Path, until: Until) -> None:
    first, second = (Strikes(2, tmp_path / f"kernels-{slot:02d}.json") for slot in (0, 1))
    first.failed("scan", "hits", "ab", "crash: frame 3")
    await until(lambda: (tmp_path / "kernels-00.json").exists())
    await second.look_around()
    assert not second.disabled("scan", "ab")
    first.failed("scan", "hits", "ab", "crash: frame 4")

    async def told() -> bool:
        await second.look_around()
        return second.disabled("scan", "ab")

    while not await told():
        assert first.disabled("scan", "ab")
    assert (second.disabled_count, second.disabled("scan", "cd"), second.disabled("other", "ab")) == (1, False, False)
    again = Strikes(2, tmp_path / "kernels-00.json")
    assert again.disabled("scan", "ab")
    assert (await again.look_around(), again.disabled_count) == (None, 1)


async def test_a_restarted_worker_does_not_try_again(
    make_node: MakeNode, tmp_path: Path, frames: np.ndarray, until: Until
) -> None:
    strikes = tmp_path / "kernels-00.json"
    limits = SandboxLimits(batch_timeout_s=1, frame_timeout_s=0.2, populate=False)
    async with make_node(strikes_file=strikes, sandbox=limits) as node:
        node.attach("broken", BROKEN)
        stream = await node.open(b"a.raw", frames)
        stream.sniff()
        stream.offer(0, 40)
        stream.commit()
        await until(lambda: node.store.failures)
        await until(lambda: node.count("hiss_kernels_disabled") == 1)
        await until(strikes.exists)
    async with make_node(strikes_file=strikes) as node:
        await node.host.prepare(BUCKET)
        assert node.host.kernels_for(BUCKET, b"b.raw") == ()
        node.attach("broken", BROKEN.replace(" * 1000", " * 0"))
        await node.host.prepare(BUCKET)
        assert node.host.kernels_for(BUCKET, b"b.raw") == ("broken",)

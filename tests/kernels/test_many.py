"""Many kernels in one bucket, and many submitted and removed: what is refused, and that nothing stays behind."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingest.ports import KernelRefused
from kernels.registry import KERNELS_MAX
from tests.kernels.hosting import BUCKET, COUNT, Node
from tests.kernels.sandboxes import children_of, zygote_pid

MASKED = """
PARAMS = {{"mask": ("uint8", "frame")}}
STATE = {{"n": ("int64", (1,), "sum")}}

def frame(frame, params, state, index, out, feedback):
    state.n[0] += {} + np.int64(frame[0, 0]) + params.mask[0, 0]
    return KEEP
"""
BROKEN = "def frame(frame, params, state, index, out, feedback):\n    return frame + missing\n"
ENDLESS = "def frame(frame, params, state, index, out, feedback):\n    while index >= 0:\n        index = 1\n    return KEEP\n"

Until = Callable[..., Any]


async def test_one_more_kernel_than_run_is_refused(node: Node) -> None:
    for number in range(KERNELS_MAX):
        node.attach(f"k{number}", COUNT)
    with pytest.raises(KernelRefused, match="the bucket has 64 kernels, which is the most that run: remove one first"):
        await node.host.check(BUCKET, "more", COUNT.encode(), {})
    await node.host.check(BUCKET, "k7", COUNT.encode(), {"params": '{"low": 3}'})
    node.store.delete(BUCKET, b"_kernels/k8.py")
    node.store._generation += 1
    await node.host.check(BUCKET, "more", COUNT.encode(), {})


def belongings() -> tuple[int, int]:
    """(descriptors, mappings of shared memory) of this process, which is the gateway here."""
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), len(re.findall(r"/memfd:|/dev/shm/", maps))


@pytest.mark.parametrize("count", [6, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])])
async def test_submissions_and_removals_leave_nothing_behind(
    make_node: Callable[..., AbstractAsyncContextManager[Node]],
    zygote_socket: str,
    frames: np.ndarray,
    until: Until,
    count: int,
) -> None:
    zygote = zygote_pid(zygote_socket)
    assert not children_of(zygote)

    async def submit(node: Node, number: int) -> None:
        name, source = f"k{number % 5}", MASKED.format(number)
        await node.host.check(BUCKET, name, source.encode(), {})
        node.attach(name, source)
        node.put_array(name, "mask", np.ones((8, 12), np.uint8))
        with pytest.raises(KernelRefused):
            await node.host.check(BUCKET, "broken", BROKEN.encode(), {})
        if number % 5 == 4:
            node.attach("endless", ENDLESS)
        key = f"run{number}/a.raw".encode()
        stream = await node.open(key, frames)
        stream.sniff()
        stream.offer(0, 40)
        stream.commit()
        await until(lambda: node.has_product(name, key), 60)
        await until(lambda: not node.store.owed, 60)
        for stored in [b"_kernels/endless.py", f"_kernels/{name}.py".encode(), f"_kernels/{name}/mask.npy".encode()]:
            node.store.objects.pop((BUCKET, stored), None)
        node.store._generation += 1

    async with make_node(idle_s=0.2) as node:
        await submit(node, 0)
        await until(lambda: not node.pids() and not children_of(zygote))
        before = belongings()
        there = len(os.listdir(f"/proc/{zygote}/fd"))
        for number in range(1, count):
            await submit(node, number)
        await until(lambda: not node.pids() and not children_of(zygote))
        await until(lambda: all(now <= then for now, then in zip(belongings(), before, strict=True)))
        await until(lambda: len(os.listdir(f"/proc/{zygote}/fd")) <= there)

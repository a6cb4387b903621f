"""``device: fpga`` on a kernel: who gets it, what runs, and what happens when the core is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path

import h5py
import msgspec
import numpy as np
import pytest

from ingest.ports import KernelRefused
from kernels import notices
from kernels.offload import device
from kernels.offload import ghdl as simulator
from kernels.offload.emit_numba import emit_numba
from kernels.offload.vhdl_core import emit_vhdl
from tests.kernels.hosting import BUCKET, Node
from tests.kernels.offload import samples

Until = Callable[..., object]
MakeNode = Callable[..., contextlib.AbstractAsyncContextManager[Node]]

FLOATS = """
STATE = {"n": ("int64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    n = 0
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            n += frame[y, x] * 2 > 1
    state.n[0] += n * 0.5 > 1
    return KEEP
"""


def frames_of(dtype: str = "uint16", count: int = 30) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 40, (count, 64, 90)).astype(dtype)


def check_product(file: h5py.File, frames: np.ndarray) -> str:
    """That the threshold kernel's product is right; what it ran on."""
    counts = (frames >= 12).sum(axis=(1, 2))
    np.testing.assert_array_equal(file["entry/state/hits"][:], [(counts >= 40).sum()])
    expected = np.bincount(np.minimum(frames, 63).reshape(-1).astype(np.int64), minlength=64)
    np.testing.assert_array_equal(file["entry/state/histogram"][:], expected)
    np.testing.assert_array_equal(file["entry/verdicts"][:], (counts >= 40).astype(np.uint8))
    return file["entry/process/environment/device"][()].decode()


async def reduced(node: Node, key: bytes, frames: np.ndarray, until: Until) -> h5py.File:
    stream = await node.open(key, frames)
    stream.sniff()
    for first in range(0, len(frames), 10):
        stream.offer(first, min(10, len(frames) - first))
    stream.commit()
    await until(lambda: node.has_product("threshold", key))
    return node.product("threshold", key)


async def test_the_model_runs_and_is_compared_with_the_plain_kernel(node: Node, until: Until) -> None:
    node.attach("threshold", samples.THRESHOLD, device="fpga")
    frames = frames_of()
    with await reduced(node, b"run/a.raw", frames, until) as file:
        ran_on = check_product(file, frames)
    assert ran_on == "fpga model (sampled frames equal to cpu)"
    assert node.count("hiss_kernel_offload_compared_total") >= 1
    assert [event.value for event in node.feedback.events] == (frames >= 12).sum(axis=(1, 2)).tolist()


async def test_a_crop_goes_through_the_simulated_core(
    ghdl: str, node: Node, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hiss.kernels")
    node.attach("threshold", samples.THRESHOLD, device="fpga")
    (await reduced(node, b"run/a.raw", frames_of(), until)).close()
    await until(lambda: "the simulated core agrees on a crop of frame" in caplog.text, timeout_s=60.0)
    assert node.count("hiss_kernel_errors_total", "offload") == 0


async def test_a_simulated_core_that_is_wrong_ends_the_offload(
    ghdl: str, node: Node, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        simulator,
        "emit_vhdl",
        lambda offload: emit_vhdl(offload).replace("fit(now, 64) + by_low", "fit(now, 64) - by_low"),
    )
    node.attach("threshold", samples.THRESHOLD, device="fpga")
    frames = frames_of(count=10)
    deadline_s = asyncio.get_running_loop().time() + 60
    for number in itertools.count():
        with await reduced(node, b"run/%d.raw" % number, frames, until) as file:
            ran_on = check_product(file, frames)
        if "the simulated core and the cpu differ in state.histogram" in ran_on:
            break
        assert asyncio.get_running_loop().time() < deadline_s
    assert node.count("hiss_kernel_errors_total", "offload") == 1


async def test_a_core_that_is_wrong_is_noticed_and_costs_nothing_but_time(
    node: Node, until: Until, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        device, "emit_numba", lambda offload: emit_numba(offload).replace("np.uint16(63)", "np.uint16(30)")
    )
    node.attach("threshold", samples.THRESHOLD, device="fpga")
    for key in (b"run/a.raw", b"run/b.raw"):
        frames = frames_of()
        with await reduced(node, key, frames, until) as file:
            ran_on = check_product(file, frames)
        assert ran_on == "cpu (fpga: frame 0: the model of the core and the cpu differ in state.histogram)"
    assert node.count("hiss_kernel_errors_total", "offload") == 1
    assert node.count("hiss_kernel_offload_compared_total") == 0
    assert "the offload failed, it runs on the cpu from now on" in caplog.text
    assert len(node.feedback.events) == 2 * len(frames), "the instrument hears of each frame once"


async def test_a_wrong_core_is_remembered_by_the_next_worker_until_the_kernel_is_submitted_again(
    make_node: MakeNode, tmp_path: Path, until: Until, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    strikes = tmp_path / "kernels-00.json"
    with monkeypatch.context() as wrong:
        wrong.setattr(
            device, "emit_numba", lambda offload: emit_numba(offload).replace("np.uint16(63)", "np.uint16(30)")
        )
        async with make_node(strikes_file=strikes) as node:
            node.attach("threshold", samples.THRESHOLD, device="fpga")
            (await reduced(node, b"run/a.raw", frames_of(), until)).close()
            await until(lambda: notices.read([tmp_path / "notices-00.json"]))
            await until(lambda: node.count("hiss_kernel_offload_fallbacks") == 1)
    caplog.clear()
    async with make_node(strikes_file=strikes) as node:
        assert "kernel threshold in bucket scan42 stays on the cpu: frame 0" in caplog.text
        node.attach("threshold", samples.THRESHOLD, device="fpga")
        place = (BUCKET, b"_kernels/threshold.py")
        node.store.objects[place] = msgspec.structs.replace(node.store.objects[place], modified_ns=1)
        with await reduced(node, b"run/b.raw", frames_of(), until) as file:
            assert check_product(file, frames_of()).startswith("cpu (fpga: frame 0")
        await until(lambda: node.count("hiss_kernel_offload_fallbacks") == 1)
        node.attach("threshold", samples.THRESHOLD, device="fpga")
        with await reduced(node, b"run/c.raw", frames_of(), until) as file:
            assert check_product(file, frames_of()) == "fpga model (sampled frames equal to cpu)"
        await until(lambda: node.count("hiss_kernel_offload_fallbacks") == 0)
        await until(lambda: not notices.read([tmp_path / "notices-00.json"]))


async def test_frames_that_no_core_takes_run_on_the_cpu_and_the_product_says_why(node: Node, until: Until) -> None:
    source = samples.THRESHOLD.replace("min(v, 63)", "min(np.int64(v), 63)")
    node.attach("threshold", source, device="fpga")
    frames = frames_of("float32")
    with await reduced(node, b"run/a.raw", frames, until) as file:
        ran_on = check_product(file, frames)
    assert ran_on.startswith("cpu (fpga: not offloaded for float32 frames of (64, 90): line 1: frames of float32")


async def test_a_kernel_that_cannot_be_offloaded_is_refused_when_it_is_put(node: Node) -> None:
    with pytest.raises(KernelRefused) as caught:
        await node.host.check(BUCKET, "floats", FLOATS.encode(), {"device": "fpga"})
    assert (caught.value.file, caught.value.line) == ("floats.py", 9)
    assert "device fpga: an FPGA core works in integers: 0.5 is a float" in caught.value.reason
    await node.host.check(BUCKET, "floats", FLOATS.encode(), {})
    await node.host.check(BUCKET, "threshold", samples.THRESHOLD.encode(), {"device": "fpga"})


async def test_a_layout_that_is_declared_decides(node: Node) -> None:
    declared = {"device": "fpga", "frame-dtype": "uint16", "frame-shape": "8,8"}
    source = samples.WINDOW.replace("state.edges[y, x] += d", "state.edges[y + 5, x] += d").encode()
    with pytest.raises(KernelRefused, match="9 elements here"):
        await node.host.check(BUCKET, "window", source, declared)


@pytest.mark.parametrize(
    ("metadata", "reason"), [({"device": "gpu"}, "cpu, fpga"), ({"device": "fpga", "after": "a"}, "after another")]
)
async def test_devices_that_are_not_there(node: Node, metadata: dict[str, str], reason: str) -> None:
    with pytest.raises(KernelRefused, match=reason):
        await node.host.check(BUCKET, "threshold", samples.THRESHOLD.encode(), metadata)

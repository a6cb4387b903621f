"""Sandboxes do what kernels ask: results, verdicts, feedback, state, messages at the user's line; and they end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingest.ports import KernelRefused
from kernels.contract import DROP, KEEP, StateSpec, merge
from kernels.decode import table
from kernels.decode.encoding import Encoding, Filter
from kernels.gate import admit
from kernels.sandbox import Batch, Checked, Sandbox, SandboxFailed, SandboxLimits, check
from kernels.selftest import self_test
from kernels.wire import MAX_BATCH, MAX_FEEDBACK, UNREADABLE
from tests.kernels.sandboxes import HEAD, LIMITS, Start, batch, children_of, place, stage, zygote_pid

COUNT = """
PARAMS = {"low": ("uint16", 12), "min_pixels": ("int64", 40)}
STATE = {
    "hits": ("int64", (1,), "sum"),
    "histogram": ("int64", (64,), "sum"),
    "lowest": ("int64", (1,), "min"),
    "highest": ("float32", (1,), "max"),
    "seen": ("uint8", (1,), "or"),
}


def bin_of(value):
    return min(max(np.int64(value), 0), 63)


def frame(frame, params, state, index, out, feedback):
    n = 0
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            value = frame[y, x]
            n += value >= params.low
            state.histogram[bin_of(value)] += 1
            state.lowest[0] = min(state.lowest[0], np.int64(value))
            state.highest[0] = max(state.highest[0], np.float32(value))
    state.hits[0] += n >= params.min_pixels
    state.seen[0] |= 1 << (index % 8)
    emit(feedback, 7, n)
    return KEEP if n >= params.min_pixels else DROP
"""

ENDLESS = (
    'STATE = {"n": ("int64", (1,), "sum")}\n'
    + HEAD
    + "    while state.n[0] >= 0:\n        state.n[0] = (state.n[0] + 1) % 1024\n    return KEEP\n"
)


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def spawn(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, *arguments], cwd=Path(__file__).parents[2], **options)


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<u8", "<f4"])
async def test_results_equal_numpy(start: Start, region: Any, dtype: str) -> None:
    frames = np.random.default_rng(1).integers(0, 64, (5, 6, 9)).astype(dtype)
    frames[2] = 0
    place(region, frames)
    sandbox = await start(COUNT, dtype, (6, 9), params={"min_pixels": 30})
    reply = await sandbox.run(batch(frames, first_frame=100))
    counts = (frames >= 12).sum(axis=(1, 2))
    assert reply.verdicts.tolist() == [KEEP if n >= 30 else DROP for n in counts]
    assert DROP in reply.verdicts
    assert KEEP in reply.verdicts
    assert reply.feedback == [(100 + i, 7, float(n)) for i, n in enumerate(counts)]
    assert reply.dropped_feedback == 0
    state = sandbox.collect(0)
    assert state["hits"].tolist() == [(counts >= 30).sum()]
    assert (state["histogram"] == np.bincount(frames.astype(int).ravel(), minlength=64)).all()
    assert state["lowest"].tolist() == [0]
    assert state["highest"].tolist() == [frames.max()]
    assert state["seen"].tolist() == [0b11110000 | 1]
    assert {name: str(array.dtype) for name, array in state.items()} == {
        "hits": "int64",
        "histogram": "int64",
        "lowest": "int64",
        "highest": "float32",
        "seen": "uint8",
    }


async def test_slots_are_apart_and_reset_to_identities(start: Start, region: Any) -> None:
    frames = np.full((3, 8, 8), 20, "<u2")
    place(region, frames)
    sandbox = await start(COUNT, slots=3)
    empty = sandbox.collect(0)
    assert empty["lowest"].tolist() == [np.iinfo(np.int64).max]
    assert empty["highest"].tolist() == [-np.inf]
    await sandbox.run(batch(frames, slot=0))
    await sandbox.run(batch(frames[:1], slot=2))
    hits = [int(sandbox.collect(slot)["hits"][0]) for slot in range(3)]
    assert hits == [3, 0, 1]
    sandbox.reset(0)
    for name, array in sandbox.collect(0).items():
        assert (array == empty[name]).all()
    assert sandbox.collect(2)["hits"][0] == 1
    first = sandbox.collect(2)
    await sandbox.run(batch(frames[:1], slot=2))
    assert first["hits"][0] == 1, "collected arrays are copies"
    for spec in admit("k", COUNT.encode()).state:
        merged = first[spec.name].copy()
        merge(spec, merged, empty[spec.name])
        assert (merged == first[spec.name]).all(), "an untouched slot merges as nothing"


def test_merge() -> None:
    for operation, expected in (("sum", 7), ("min", 2), ("max", 5), ("or", 7)):
        into, other = np.array([2], np.uint8), np.array([5], np.uint8)
        merge(StateSpec("a", "uint8", (1,), operation), into, other)
        assert into.tolist() == [expected]
    with pytest.raises(ValueError, match="state 'a'"):
        merge(StateSpec("a", "uint8", (1,), "sum"), np.zeros(1, np.uint8), np.zeros(2, np.uint8))


async def test_the_kernel_sees_frames_written_after_it_started(start: Start, region: Any) -> None:
    sandbox = await start(HEAD + "    return KEEP if frame[0, 0] == 9 else DROP\n")
    frames = np.zeros((1, 8, 8), "<u2")
    for value, verdict in ((9, KEEP), (8, DROP)):
        frames[:] = value
        place(region, frames, 4096)
        assert (await sandbox.run(batch(frames, offset=4096))).verdicts.tolist() == [verdict]


@pytest.mark.parametrize("offset", [1, 6])
async def test_unaligned_frames(start: Start, region: Any, offset: int) -> None:
    frames = np.arange(3 * 12, dtype="<u4").reshape(3, 3, 4)
    place(region, frames, offset)
    source = (
        'STATE = {"total": ("int64", (1,), "sum")}\n' + HEAD + "    state.total[0] += frame.sum()\n    return KEEP\n"
    )
    sandbox = await start(source, "<u4", (3, 4))
    assert (await sandbox.run(batch(frames, offset=offset))).verdicts.tolist() == [KEEP] * 3
    assert sandbox.collect(0)["total"][0] == frames.sum()


@pytest.mark.parametrize("shape", [(5,), (2, 2, 2, 2)])
async def test_other_dimensions(start: Start, region: Any, shape: tuple[int, ...]) -> None:
    frames = np.ones((2, *shape), "<f4")
    place(region, frames)
    sandbox = await start(HEAD + "    return KEEP if frame.sum() == frame.size else DROP\n", "<f4", shape)
    assert (await sandbox.run(batch(frames))).verdicts.tolist() == [KEEP, KEEP]


async def test_feedback_beyond_the_cap_is_counted(start: Start, region: Any) -> None:
    source = HEAD + "    for i in range(200):\n        emit(feedback, i, index / 0.0)\n    return KEEP\n"
    sandbox = await start(source)
    frames = np.zeros((4, 8, 8), "<u2")
    reply = await sandbox.run(batch(frames))
    assert len(reply.feedback) == MAX_FEEDBACK
    assert reply.dropped_feedback == 4 * 200 - MAX_FEEDBACK
    assert reply.feedback[255][:2] == (1, 55)
    assert np.isnan(reply.feedback[0][2])
    assert np.isinf(reply.feedback[255][2])
    assert (await sandbox.run(batch(frames[:1]))).dropped_feedback == 0


async def test_queued_batches_are_answered_in_order(start: Start, region: Any) -> None:
    source = HEAD + "    emit(feedback, 0, index)\n    return KEEP\n"
    sandbox = await start(source)
    frames = np.zeros((1, 8, 8), "<u2")
    replies = await asyncio.gather(*(sandbox.run(batch(frames, first_frame=n)) for n in range(40)))
    assert [reply.feedback for reply in replies] == [[(n, 0, float(n))] for n in range(40)]


async def test_a_full_batch(start: Start, region: Any) -> None:
    sandbox = await start(HEAD + "    return KEEP if index % 3 else DROP\n")
    frames = np.zeros((MAX_BATCH, 8, 8), "<u2")
    assert (await sandbox.run(batch(frames))).verdicts.tolist() == [int(n % 3 > 0) for n in range(MAX_BATCH)]


OUT_OF_RANGE: list[tuple[dict[str, int], str]] = [
    ({"count": 0}, "a batch has 1 to"),
    ({"count": MAX_BATCH + 1}, "a batch has 1 to"),
    ({"frame_bytes": 64}, "compiled for 128"),
    ({"region": 1}, "region 1 of 1"),
    ({"region": -1}, "region -1 of 1"),
    ({"offset": -128}, "within its region"),
    ({"offset": (8 << 20) - 127}, "within its region"),
    ({"slot": 2}, "slot 2 of 2"),
    ({"first_frame": -1}, "first frame -1"),
]


async def test_batches_out_of_range_are_not_sent(start: Start) -> None:
    sandbox = await start(HEAD + "    return KEEP\n")
    fields = {"region": 0, "offset": 0, "frame_bytes": 128, "first_frame": 0, "count": 1, "slot": 0}
    for changes, reason in OUT_OF_RANGE:
        with pytest.raises(ValueError, match=reason):
            await sandbox.run(Batch(**(fields | changes)))
    assert (await sandbox.run(Batch(**fields))).verdicts.tolist() == [KEEP]


WRONG_TYPES = {
    "read-only": (["n = 1", "frame[0, 0] = n  # <-", "return KEEP"], "frames and parameter arrays are read-only"),
    "float index": (
        ["n = 1.5", "return KEEP if frame[n, 0] > 1 else DROP  # <-"],
        "Unsupported array index type float64",
    ),
    "tuple arithmetic": (["n = (1, 2)", "n = n + index  # <-", "return KEEP"], "not possible with these types"),
    "too many indices": (["n = frame[0, 0, 0]  # <-", "return KEEP"], "cannot index"),
    "changing type": (["n = (1, 2)", "if index > 2:", "    n = 5", "return KEEP if n == 5 else DROP  # <-"], "unify"),
    "float verdict": (["n = 1.5", "return n"], "must return KEEP, DROP, REPLACE or STOP"),
    "no verdict": (
        ["if index > 2:", "    n = None", "else:", "    n = 1", "return n"],
        "must return KEEP, DROP, REPLACE or STOP",
    ),
    "in a helper": (["return helper(frame)"], "not possible with these types"),
}
HELPER = "def helper(values):\n    total = 0\n    total += (1, 2)  # <-\n    return total\n\n\n"


@pytest.mark.parametrize(("lines", "reason"), WRONG_TYPES.values(), ids=WRONG_TYPES)
async def test_compile_errors_name_the_line(start: Start, lines: list[str], reason: str) -> None:
    source = (HELPER if "helper" in lines[0] else "") + HEAD + "".join(f"    {line}\n" for line in lines)
    with pytest.raises(KernelRefused) as caught:
        await start(source)
    marked = [number for number, line in enumerate(source.splitlines(), 1) if "# <-" in line]
    assert reason in caught.value.reason
    assert caught.value.line == (marked[0] if marked else 1), caught.value.reason
    assert caught.value.file == "k.py"
    assert "\x1b" not in caught.value.reason
    assert len(caught.value.reason) < 500


async def test_a_kernel_that_raises_names_the_frame(start: Start) -> None:
    sandbox = await start(HEAD + "    return KEEP if frame[index, 0] == 0 else DROP\n")
    frames = np.zeros((12, 8, 8), "<u2")
    with pytest.raises(
        SandboxFailed, match=r"frame 8: k\.py:2: IndexError: index is out of bounds in frame\[index, 0\]"
    ) as caught:
        await sandbox.run(batch(frames))
    assert caught.value.kind == "crash"
    assert not sandbox.alive
    with pytest.raises(SandboxFailed, match="closed"):
        await sandbox.run(batch(frames))
    with pytest.raises(SandboxFailed, match="closed"):
        sandbox.collect(0)


async def test_wrong_arguments(start: Start, zygote_socket: str) -> None:
    with pytest.raises(ValueError, match="are not supported"):
        await start(HEAD + "    return KEEP\n", ">u2")
    with pytest.raises(ValueError, match="not a dtype"):
        await start(HEAD + "    return KEEP\n", "pixels")
    with pytest.raises(ValueError, match="1 to 4 dimensions"):
        await start(HEAD + "    return KEEP\n", "<u2", (1, 1, 1, 1, 1))
    unsealed = os.memfd_create("unsealed", os.MFD_CLOEXEC)
    try:
        with pytest.raises(ValueError, match="not sealed"):
            await Sandbox.start(
                zygote_socket,
                [stage(HEAD + "    return KEEP\n")],
                dtype="<u2",
                shape=(2, 2),
                region_fds=[unsealed],
                region_bytes=4096,
            )
    finally:
        os.close(unsealed)


async def test_check_accepts_and_refuses(start: Start, zygote_socket: str) -> None:
    assert await check(zygote_socket, admit("k", (HEAD + "    return KEEP\n").encode())) == Checked({}, ())
    binned = HEAD + "    return KEEP if (1, 0)[frame[0, 0] % 2] else DROP\n"
    refused = (await check(zygote_socket, admit("k", binned.encode()))).refused
    assert list(refused) == ["<f4"]
    assert refused["<f4"].startswith("k.py:2: ")
    with pytest.raises(KernelRefused, match=r"k\.py:2: ") as caught:
        await check(zygote_socket, admit("k", binned.encode()), [("<f4", 2)])
    assert caught.value.line == 2


async def test_a_killed_process_is_noticed_and_can_be_replaced(
    start: Start, region: Any, until: Callable[..., Any]
) -> None:
    source = HEAD + "    return KEEP\n"
    frames = np.zeros((1, 8, 8), "<u2")
    first = await start(source)
    os.kill(first.pid, signal.SIGKILL)
    await until(lambda: not first.alive)
    with pytest.raises(SandboxFailed, match="killed") as caught:
        await first.run(batch(frames))
    assert caught.value.kind == "crash"
    second = await start(source)
    assert (await second.run(batch(frames))).verdicts.tolist() == [KEEP]


async def test_a_cancelled_run_waits_for_its_batch(start: Start, region: Any) -> None:
    source = (
        'STATE = {"n": ("int64", (1,), "sum")}\n'
        + HEAD
        + ("    for i in range(40_000_000):\n        state.n[0] += frame[0, i % 8]\n    return KEEP\n")
    )
    frames = np.ones((1, 8, 8), "<u2")
    place(region, frames)
    sandbox = await start(source)
    cancelled = asyncio.ensure_future(sandbox.run(batch(frames)))
    for _ in range(3):
        await asyncio.sleep(0)
        cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert sandbox.alive
    assert sandbox.collect(0)["n"].tolist() == [40_000_000]
    assert (await sandbox.run(batch(frames))).verdicts.tolist() == [KEEP]


async def test_closing_ends_what_runs_and_what_waits(start: Start) -> None:
    sandbox = await start(ENDLESS)
    frames = np.zeros((1, 8, 8), "<u2")
    runs = [asyncio.ensure_future(sandbox.run(batch(frames))) for _ in range(3)]
    await asyncio.sleep(0)
    await asyncio.gather(sandbox.close(), sandbox.close())
    outcomes = await asyncio.gather(*runs, return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["unavailable: the sandbox is closed"] * 3
    assert not sandbox.alive


async def test_a_timeout_kills_soon(start: Start) -> None:
    sandbox = await start(
        ENDLESS,
        limits=SandboxLimits(batch_timeout_s=0.1, frame_timeout_s=0.0, populate=False),
    )
    frames = np.zeros((3, 8, 8), "<u2")
    began = time.monotonic()
    with pytest.raises(SandboxFailed, match=r"frame 5: 3 frames were not judged within 0\.1 s of CPU time") as caught:
        await sandbox.run(batch(frames, first_frame=5))
    assert caught.value.kind == "timeout"
    assert time.monotonic() - began < 15.0
    assert not sandbox.alive


async def test_no_zygote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Start) -> None:
    monkeypatch.setattr("kernels.process.FORK_TIMEOUT_S", 0.1)
    with pytest.raises(SandboxFailed, match="zygote is not running") as caught:
        await start(HEAD + "    return KEEP\n", zygote=str(tmp_path / "none.sock"))
    assert caught.value.kind == "unavailable"


async def test_nonsense_costs_only_its_connection(zygote_socket: str, start: Start) -> None:
    for nonsense in (b"\x00", b"\x93" * 1000, b"x" * 100_000):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(zygote_socket)
            client.settimeout(5)
            client.send(nonsense)
            assert b"malformed request" in client.recv(4096)
            assert client.recv(4096) == b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(zygote_socket)
    await start(HEAD + "    return KEEP\n")


@pytest.mark.parametrize("privilege", ["own", "nobody"])
async def test_self_test_holds(privilege: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue("zygote_socket" if privilege == "own" else "unprivileged_zygote_socket")
    report = await self_test(path)
    assert report.failures == ()
    assert report.holds
    assert report.outcomes["socket"] == "killed"
    assert report.outcomes["kernel"] == "computed"


async def test_what_takes_long_computes_in_idle_time_only(start: Start, until: Callable[..., Any]) -> None:
    """An endless loop must not cost the streams of others."""
    sandbox = await start(ENDLESS, limits=SandboxLimits(batch_timeout_s=300, populate=False))

    running = asyncio.ensure_future(sandbox.run(batch(np.zeros((1, 8, 8), "<u2"))))
    await until(lambda: os.sched_getscheduler(sandbox.pid) == os.SCHED_IDLE)
    assert not running.done()
    await sandbox.close()
    with pytest.raises(SandboxFailed):
        await running


async def test_a_sandbox_on_probation_yields_until_it_has_judged(start: Start) -> None:
    limits = SandboxLimits(on_probation=True, populate=False)
    sandbox = await start(HEAD + "    return KEEP\n", limits=limits)
    assert os.sched_getscheduler(sandbox.pid) == os.SCHED_IDLE
    await sandbox.run(batch(np.zeros((1, 8, 8), "<u2")))
    if os.geteuid() == 0:  # nobody else may undo it
        assert os.sched_getscheduler(sandbox.pid) == os.SCHED_BATCH


async def test_sandboxes_hold_no_privilege(start: Start) -> None:
    sandbox = await start(HEAD + "    return KEEP\n")
    other = await start(HEAD + "    return KEEP\n")
    status = status_of(sandbox.pid)
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    assert status["Threads"] == "1"
    if os.geteuid() == 0:
        uids = {status_of(pid)["Uid"].split()[0] for pid in (sandbox.pid, other.pid)}
        assert len(uids) == 2
        assert "0" not in uids
        assert int(status["CapBnd"], 16) == 0
        assert sorted(os.listdir(f"/proc/{sandbox.pid}/fd"), key=int) == ["0", "1", "2", "3"]
    assert os.getsid(sandbox.pid) == sandbox.pid
    assert os.getpriority(os.PRIO_PROCESS, sandbox.pid) == LIMITS.nice
    assert os.sched_getscheduler(sandbox.pid) == os.SCHED_BATCH


_GATEWAY = """
import asyncio, fcntl, os, sys
from kernels.contract import Stage
from kernels.gate import admit
from kernels.sandbox import Batch, Sandbox, SandboxLimits

async def main():
    fd = os.memfd_create("region", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0x10 | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    source = sys.argv[2].encode()
    sandbox = await Sandbox.start(sys.argv[1], [Stage(admit("k", source))], dtype="<u2", shape=(8, 8), region_fds=[fd],
                                  region_bytes=4096, limits=SandboxLimits(batch_timeout_s=300))
    print(sandbox.pid, flush=True)
    await sandbox.run(Batch(0, 0, 128, 0, 1, 0))

asyncio.run(main())
"""


async def test_a_busy_child_dies_with_its_gateway(zygote_socket: str, until: Callable[..., Any]) -> None:
    gateway = spawn("-c", _GATEWAY, zygote_socket, ENDLESS, stdout=subprocess.PIPE)
    assert gateway.stdout is not None
    with gateway.stdout:
        line = await asyncio.to_thread(gateway.stdout.readline)
        child = int(line)
        assert child in children_of(zygote_pid(zygote_socket))
        gateway.kill()
        gateway.wait()
    await until(lambda: child not in children_of(zygote_pid(zygote_socket)))


async def test_limit_of_children_and_death_of_the_zygote(
    tmp_path: Path, start: Start, region: Any, until: Callable[..., Any]
) -> None:
    path = str(tmp_path / ("long" * 30) / "z.sock")
    Path(path).parent.mkdir()
    ready, report = os.pipe()
    arguments = ["-m", "kernels.zygote", "--socket", path, "--max-children", "2", "--ready-fd", str(report)]
    zygote = spawn(*arguments, pass_fds=[report], stderr=subprocess.DEVNULL)
    os.close(report)
    try:
        assert await asyncio.to_thread(os.read, ready, 1) == b"R"
        source = HEAD + "    return KEEP\n"
        sandboxes = [await start(source, zygote=path) for _ in range(2)]
        with pytest.raises(SandboxFailed, match="too many sandboxes are running") as caught:
            await start(source, zygote=path)
        assert caught.value.kind == "unavailable"
        await sandboxes.pop().close()
        sandboxes.append(await start(source, zygote=path))
        zygote.kill()
        zygote.wait()
        await until(lambda: not any(sandbox.alive for sandbox in sandboxes))
        with pytest.raises(SandboxFailed) as caught:
            await sandboxes[0].run(batch(np.zeros((1, 8, 8), "<u2")))
        assert caught.value.kind == "unavailable"  # nothing that the kernel did
    finally:
        os.close(ready)
        zygote.kill()
        zygote.wait()


async def test_encoded_frames_are_decoded_inside(start: Start, region: Any) -> None:
    frames = np.random.default_rng(2).integers(0, 64, (6, 16, 16)).astype("<u2")
    encoding = Encoding("<u2", (1, 16, 16), (Filter("deflate"),))
    entries, memory = [], region.maps[0]
    for number, frame in enumerate(frames):
        stored = zlib.compress(frame.tobytes()) if number != 3 else b"no deflate stream"
        offset = 5 + 1000 * number
        memory[offset : offset + len(stored)] = stored
        entries.append((number, offset, len(stored), 0, 0))
    message = table.pack(7, encoding, np.array(entries, table.ENTRY))
    sandbox = await start(COUNT, "<u2", (16, 16), params={"min_pixels": 1})
    reply = await sandbox.run(Batch(0, 0, frames[0].nbytes, 0, 6, 0, table=message))
    assert reply.verdicts.tolist() == [KEEP, KEEP, KEEP, UNREADABLE, KEEP, KEEP]
    assert [frame for frame, _, _ in reply.feedback] == [0, 1, 2, 4, 5]
    seen = np.delete(frames, 3, axis=0)
    assert (sandbox.collect(0)["histogram"] == np.bincount(seen.ravel(), minlength=64)).all()

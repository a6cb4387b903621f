"""What a kernel may say beyond a sum: arrays, transformed frames, rows, STOP, finish and chains, in real sandboxes."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import numpy as np
import pytest

from ingest.ports import KernelRefused
from kernels.contract import DROP, KEEP, REPLACE, STOP, resolve_arrays
from kernels.gate import admit
from kernels.sandbox import SandboxFailed, SandboxLimits, check
from kernels.wire import MAX_BATCH, NO_VERDICT
from tests.kernels.sandboxes import HEAD, LIMITS, Start, batch, place, stage

CORRECT = (
    'PARAMS = {"dark": ("float32", "frame"), "bins": ("int32", (-1, 2)), "low": ("uint16", 3)}\n'
    'STATE = {"sums": ("int64", (4,), "sum"), "mean": ("float64", (4,), "sum"), "n": ("int64", (1,), "sum")}\n'
    'OUT = ("float32", "same")\n'
    'ROWS = {"x": "uint16", "y": "uint16", "value": "float32"}\n'
    "ROWS_MAX = 5\n\n\n"
    "def correct(value, y, x, params):\n    return value - params.dark[y, x]\n\n\n"
    + HEAD
    + """
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            if frame[y, x] < params.low:
                continue
            out[y, x] = correct(frame[y, x], y, x, params)
            append(feedback, x, y, out[y, x])
    for n in range(params.bins.shape[0]):
        state.sums[n] += frame[params.bins[n, 0], params.bins[n, 1]]
    state.n[0] += 1
    return REPLACE


def finish(state, params):
    for n in range(params.bins.shape[0]):
        state.mean[n] = state.sums[n] / state.n[0] + params.low
"""
)


def frames_of(count: int, shape: tuple[int, ...] = (8, 8), dtype: str = "<u2") -> np.ndarray:
    return np.random.default_rng(count).integers(0, 9, (count, *shape)).astype(dtype)


async def test_arrays_out_rows_and_finish(start: Start, region: Any) -> None:
    frames = frames_of(3)
    place(region, frames)
    dark = np.random.default_rng(7).random((8, 8)).astype(np.float32)
    bins = np.array([[0, 1], [7, 7], [3, 2]], ">i2")  # converts to int32 without loss
    sandbox = await start(CORRECT, arrays={"dark": dark, "bins": bins}, out_frames=4)
    reply = await sandbox.run(dataclasses.replace(batch(frames, first_frame=20), collect_out=True))
    assert reply.verdicts.tolist() == [REPLACE] * 3
    expected = np.where(frames < 3, 0, frames - dark).astype(np.float32)
    assert reply.out is not None
    assert reply.out.dtype == np.float32
    assert (reply.out == expected).all()
    assert reply.rows is not None
    wanted = []
    dropped = 0
    for number, frame in enumerate(frames):
        places = np.argwhere(frame >= 3)
        dropped += len(places) - 5
        wanted += [(20 + number, x, y, expected[number, y, x]) for y, x in places[:5]]
    assert reply.rows.tolist() == wanted
    assert reply.rows.dtype.names == ("frame", "x", "y", "value")
    assert reply.dropped_rows == dropped > 0
    assert reply.stopped_at is None
    state = sandbox.collect(0)
    assert state["sums"].tolist() == [*(int(frames[:, y, x].sum()) for y, x in bins), 0]
    merged = {name: array * 10 for name, array in state.items()}
    given = {name: array.copy() for name, array in merged.items()}
    result = await sandbox.finish(merged)
    assert result["mean"].tolist() == [*(state["sums"][:3] / 3 + 3), 0]
    assert result["sums"].tolist() == merged["sums"].tolist()
    assert all((merged[name] == given[name]).all() for name in given), "what was given stays as it was"
    assert (sandbox.collect(0)["mean"] == 0).all(), "the state of streams is not touched"
    again = await sandbox.run(batch(frames[:1]))
    assert (again.out, again.verdicts.tolist()) == (None, [REPLACE])


async def test_out_is_blank_for_every_frame(start: Start, region: Any) -> None:
    frames = np.zeros((4, 8, 8), "<u2")
    frames[1] = 5
    place(region, frames)
    source = 'OUT = ("uint8", (2, 3))\n' + HEAD + "    if frame[0, 0] > 0:\n        out[1, 2] = 9\n    return REPLACE\n"
    sandbox = await start(source, out_frames=4)
    for _ in range(2):
        reply = await sandbox.run(dataclasses.replace(batch(frames), collect_out=True))
        assert reply.out is not None
        assert reply.out.shape == (4, 2, 3)
        assert reply.out.sum(axis=(1, 2)).tolist() == [0, 9, 0, 0]
    with pytest.raises(ValueError, match="started for 4"):
        await sandbox.run(dataclasses.replace(batch(np.zeros((5, 8, 8), "<u2")), collect_out=True))


@pytest.mark.parametrize("shape", [(11,), (3, 4, 5)])
async def test_any_number_of_dimensions(start: Start, region: Any, shape: tuple[int, ...]) -> None:
    frames = frames_of(4, shape, "<i4")
    place(region, frames, offset=2)  # unaligned too
    source = (
        'PARAMS = {"mask": ("uint8", "frame")}\nSTATE = {"total": ("int64", (1,), "sum")}\nOUT = ("same", "same")\n'
        + HEAD
        + "    out[:] = frame\n    state.total[0] += frame.sum() + params.mask.sum()\n    return REPLACE\n"
    )
    sandbox = await start(source, "<i4", shape, arrays={"mask": np.ones(shape, bool)}, out_frames=4)
    reply = await sandbox.run(dataclasses.replace(batch(frames, offset=2), collect_out=True))
    assert (reply.out == frames).all()
    assert sandbox.collect(0)["total"][0] == frames.sum() + 4 * frames[0].size


async def test_stop_ends_the_batch(start: Start, region: Any) -> None:
    frames = np.zeros((6, 8, 8), "<u2")
    frames[3] = 1
    place(region, frames)
    source = (
        'STATE = {"n": ("int64", (1,), "sum")}\n'
        + HEAD
        + "    state.n[0] += 1\n    emit(feedback, 1, index)\n    return STOP if frame[0, 0] > 0 else KEEP\n"
    )
    sandbox = await start(source)
    reply = await sandbox.run(batch(frames, first_frame=10))
    assert reply.verdicts.tolist() == [KEEP, KEEP, KEEP, STOP, NO_VERDICT, NO_VERDICT]
    assert reply.stopped_at == 13
    assert sandbox.collect(0)["n"][0] == 4
    assert [frame for frame, _, _ in reply.feedback] == [10, 11, 12, 13]
    alone = await sandbox.run(dataclasses.replace(batch(frames, slot=1), alone=True))
    assert alone.verdicts.tolist() == [KEEP, KEEP, KEEP, STOP, KEEP, KEEP], (
        "objects of their own do not stop each other"
    )
    assert alone.stopped_at is None
    place(region, frames, offset=3)
    unaligned = await sandbox.run(batch(frames, offset=3))
    assert (unaligned.verdicts.tolist(), unaligned.stopped_at) == (reply.verdicts.tolist(), 3)


async def test_replacing_without_out_is_no_verdict(start: Start) -> None:
    sandbox = await start(HEAD + "    return 2\n")
    with pytest.raises(SandboxFailed, match=r"frame 0: frame\(\) returned something else than KEEP, DROP or STOP"):
        await sandbox.run(batch(np.zeros((2, 8, 8), "<u2")))


FIRST = (
    'PARAMS = {"low": ("int64", 0), "gain": ("uint8", (2,))}\nSTATE = {"n": ("int64", (1,), "sum")}\n'
    'OUT = ("int32", (4, 2))\nROWS = {"a": "int8"}\n'
    + HEAD
    + """    state.n[0] += 1
    emit(feedback, 99, index)
    append(feedback, 1)
    total = 0
    for y in range(8):
        for x in range(8):
            total += frame[y, x]
    if total < params.low:
        return DROP
    out[0, 0] = total * params.gain[1]
    out[3, 1] = state.n[0]
    return STOP if total > 200 else KEEP
"""
)
SECOND = (
    'STATE = {"seen": ("int64", (2,), "sum")}\nROWS = {"total": "float64"}\n'
    + HEAD
    + "    state.seen[0] += frame[0, 0]\n    state.seen[1] += frame.shape[0] * 10 + frame.shape[1]\n"
    "    emit(feedback, 1, frame[3, 1])\n    append(feedback, frame[0, 0])\n"
    "    return KEEP if frame[0, 0] < 300 else DROP\n"
)


async def test_a_chain_passes_out_on(start: Start, region: Any) -> None:
    frames = np.zeros((5, 8, 8), "<u2")
    frames[:, 0, 0] = [100, 10, 60, 201, 100]
    place(region, frames)
    first = stage(FIRST, {"low": 50}, {"gain": np.array([1, 3], np.uint8)}, name="first")
    sandbox = await start(SECOND, before=[first])
    reply = await sandbox.run(batch(frames))
    assert reply.verdicts.tolist() == [DROP, DROP, KEEP, STOP, NO_VERDICT]
    assert reply.stopped_at == 3
    assert sandbox.collect(0)["seen"].tolist() == [300 + 180 + 603, 3 * 42]
    assert reply.feedback == [(0, 1, 1.0), (2, 1, 3.0), (3, 1, 4.0)], "of the last kernel only"
    assert reply.rows is not None
    assert reply.rows.tolist() == [(0, 300.0), (2, 180.0), (3, 603.0)]
    other = await sandbox.run(batch(frames[:1], slot=1))
    assert other.feedback == [(0, 1, 1.0)], "the first kernel's state is each stream's own"
    sandbox.reset(0)
    assert (await sandbox.run(batch(frames[:1]))).feedback == [(0, 1, 1.0)]


async def test_a_chain_of_four_with_frames_passed_through(start: Start, region: Any) -> None:
    frames = frames_of(3)
    place(region, frames)
    plus = (
        'OUT = ("same", "same")\n'
        + HEAD
        + "    for y in range(8):\n        for x in range(8):\n            out[y, x] = frame[y, x] + 1\n    return REPLACE\n"
    )
    keep = HEAD + "    return KEEP if index != 1 else DROP\n"
    chain = [stage(plus, name="a"), stage(keep, name="b"), stage(plus, name="c")]
    sandbox = await start(plus, before=chain, out_frames=3)
    reply = await sandbox.run(dataclasses.replace(batch(frames), collect_out=True))
    assert reply.verdicts.tolist() == [REPLACE, DROP, REPLACE]
    assert reply.out is not None
    assert (reply.out[[0, 2]] == frames[[0, 2]] + 3).all()
    with pytest.raises(ValueError, match="a chain of 5"):
        await start(plus, before=[*chain, stage(keep, name="d")])


async def test_a_chain_names_the_kernel_that_fails(start: Start, region: Any) -> None:
    fails = stage("\n" + HEAD + "    n = frame[0, 0]\n    return KEEP if frame[n, 0] == 0 else DROP\n", name="early")
    sandbox = await start(HEAD + "    return KEEP\n", before=[fails])
    frames = np.zeros((2, 8, 8), "<u2")
    frames[1, 0, 0] = 8
    place(region, frames)
    with pytest.raises(SandboxFailed, match=r"crash: frame 1: early\.py:4: IndexError"):
        await sandbox.run(batch(frames))
    wrong = stage(HEAD + "    n = frame[0]\n    return n\n", name="wrong")
    with pytest.raises(KernelRefused, match=r"wrong\.py:1: frame\(\) must return"):
        await start(HEAD + "    return KEEP\n", before=[wrong])
    flat = stage('OUT = ("uint8", (4,))\n' + HEAD + "    return KEEP\n", name="flat")
    with pytest.raises(KernelRefused, match=r"k\.py:2: .*index"):
        await start(HEAD + "    return KEEP if frame[0, 0] else DROP\n", before=[flat])


ARRAYS = 'PARAMS = {"mask": ("uint8", "frame"), "flat": ("float32", (2, -1))}\n' + HEAD + "    return KEEP\n"
GOOD = {"mask": np.ones((8, 8), np.uint8), "flat": np.ones((2, 5), np.float16)}
UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"mask": None}, "array 'mask' is missing: upload it as _kernels/k/mask.npy"),
    "unknown": ({"dark": np.ones(3)}, "array 'dark' is not in PARAMS (arrays declared: mask, flat)"),
    "shape of the frame": ({"mask": np.ones((8, 9), np.uint8)}, "(8, 9), PARAMS declares 'frame', here (8, 8)"),
    "shape": ({"flat": np.ones((3, 5), np.float32)}, "shape (3, 5), PARAMS declares (2, -1) (-1: any size)"),
    "dimensions": ({"flat": np.ones(2, np.float32)}, "shape (2,), PARAMS declares (2, -1)"),
    "empty": ({"flat": np.ones((2, 0), np.float32)}, "shape (2, 0)"),
    "lossy": ({"flat": np.ones((2, 5), np.float64)}, "is float64, PARAMS declares float32: upload it as float32"),
    "signed": ({"mask": np.ones((8, 8), np.int8)}, "is int8, PARAMS declares uint8"),
    "objects": ({"mask": np.full((8, 8), None)}, "is object, PARAMS declares uint8"),
}


@pytest.mark.parametrize(("changes", "reason"), UNFIT.values(), ids=UNFIT)
async def test_arrays_that_do_not_fit(start: Start, changes: dict[str, Any], reason: str) -> None:
    arrays = {name: array for name, array in (GOOD | changes).items() if array is not None}
    with pytest.raises(KernelRefused) as caught:
        await start(ARRAYS, arrays=arrays)
    assert reason in str(caught.value)


async def test_large_arrays_and_many(start: Start, region: Any) -> None:
    names = [f"a{n}" for n in range(20)]
    declared = ", ".join(f'"{name}": ("uint32", (-1,))' for name in names)
    total = " + ".join(f"params.{name}[{n}]" for n, name in enumerate(names))
    source = f'PARAMS = {{{declared}}}\nSTATE = {{"n": ("int64", (1,), "sum")}}\n' + HEAD
    arrays = {name: np.arange(n, 100_000 + n, dtype=np.uint32) for n, name in enumerate(names)}
    sandbox = await start(source + f"    state.n[0] += {total}\n    return KEEP\n", arrays=arrays)
    await sandbox.run(batch(np.zeros((1, 8, 8), "<u2")))
    assert sandbox.collect(0)["n"][0] == sum(2 * n for n in range(20))


def test_resolved_arrays_are_as_declared() -> None:
    kernel = admit("k", ARRAYS.encode())
    turned = np.asfortranarray(np.arange(10).reshape(2, 5).astype(">f2"))
    arrays = resolve_arrays(kernel, {"mask": np.ones((8, 8), bool), "flat": turned}, (8, 8))
    assert [(array.dtype.str, array.flags.c_contiguous) for array in arrays.values()] == [("|u1", True), ("<f4", True)]
    assert arrays["flat"].tolist() == turned.tolist()


async def test_a_kernel_is_checked_before_its_arrays_are_there(zygote_socket: str) -> None:
    assert (await check(zygote_socket, admit("k", CORRECT.encode()))).refused == {}
    wrong = CORRECT.replace("state.mean[n] =", "state.mean[n, 0] =")
    with pytest.raises(KernelRefused) as caught:
        await check(zygote_socket, admit("k", wrong.encode()))
    assert "mean" in wrong.splitlines()[caught.value.line - 1]


FINISHES = {
    "raises": ("    state.n[index_of(state)] = 1\n", r"crash: finish\(\): k\.py:\d+: IndexError"),
    "loops": ("    while state.n[0] >= 0:\n        state.n[0] = 0\n", r"timeout: finish\(\) did not end within 0\.3 s"),
}


@pytest.mark.parametrize(("body", "ending"), FINISHES.values(), ids=FINISHES)
async def test_a_finish_that_fails(start: Start, body: str, ending: str) -> None:
    source = (
        'STATE = {"n": ("int64", (1,), "sum")}\n\n\ndef index_of(state):\n    return state.n[0] + 5\n\n\n'
        + HEAD
        + "    return KEEP\n\n\ndef finish(state, params):\n"
        + body
    )
    sandbox = await start(source, limits=dataclasses.replace(LIMITS, finish_timeout_s=0.3))
    with pytest.raises(ValueError, match="the kernel has"):
        await sandbox.finish({})
    assert sandbox.alive
    with pytest.raises(SandboxFailed, match=ending):
        await sandbox.finish({"n": np.zeros(1, np.int64)})
    assert not sandbox.alive


async def test_only_a_kernel_with_finish_finishes(start: Start) -> None:
    sandbox = await start(HEAD + "    return KEEP\n")
    with pytest.raises(ValueError, match=r"no finish\(\)"):
        await sandbox.finish({})
    assert (await sandbox.run(batch(np.zeros((1, 8, 8), "<u2")))).verdicts.tolist() == [KEEP]


async def test_frames_and_finish_take_turns(start: Start, region: Any) -> None:
    frames = frames_of(2)
    place(region, frames)
    source = (
        'STATE = {"n": ("int64", (1,), "sum")}\n'
        + HEAD
        + "    state.n[0] += 1\n    return KEEP\n\n\ndef finish(state, params):\n    state.n[0] = -state.n[0]\n"
    )
    sandbox = await start(source)
    given = {"n": np.array([7], np.int64)}
    results = await asyncio.gather(
        *(job for _ in range(5) for job in (sandbox.run(batch(frames)), sandbox.finish(given)))
    )
    assert [int(result["n"][0]) for result in results if isinstance(result, dict)] == [-7] * 5
    assert sandbox.collect(0)["n"][0] == 10


ALLOCATES = {
    "zeros": "    a = np.zeros(4096)\n    a[1] = 2\n    return KEEP if a[1] == 2 else DROP\n",
    "array expression": "    return KEEP if (frame >= 0).sum() == frame.size else DROP\n",
    "in a helper": "    return KEEP if scratch(frame)[0] == 1 else DROP\n",
    "a view from a helper": "    v = part(frame)\n    a = v * 2\n    return KEEP if a.size == v.size else DROP\n",
    "copy": "    return KEEP if frame.astype(np.float64)[0, 0] >= 0 else DROP\n",
}


@pytest.mark.parametrize("body", ALLOCATES.values(), ids=ALLOCATES)
async def test_kernels_may_make_arrays_without_end(start: Start, region: Any, body: str) -> None:
    """They are freed: far more of them than the process has memory for."""
    frames = frames_of(64, (64, 64))
    place(region, frames)
    helpers = "def scratch(frame):\n    return np.ones(frame.size)\n\n\ndef part(frame):\n    return frame[1:3]\n\n\n"
    source = helpers + HEAD + body
    limits = SandboxLimits(memory_bytes=256 << 20, batch_timeout_s=20.0, populate=False)
    sandbox = await start(source, shape=(64, 64), limits=limits)
    for _ in range(150):
        reply = await sandbox.run(batch(frames))
    assert reply.verdicts.tolist() == [KEEP] * 64


async def test_finish_may_make_arrays_where_frame_does_not(start: Start, region: Any) -> None:
    source = (
        'STATE = {"total": ("int64", (8, 8), "sum"), "mean": ("float64", (8, 8), "sum")}\n\n\n'
        "def add(y, x, value, state):\n    state.total[y, x] += value\n    return state.total[y, x]\n\n\n"
        + HEAD
        + "    for y in range(8):\n        for x in range(8):\n            add(y, x, frame[y, x], state)\n    return KEEP\n\n\n"
        "def finish(state, params):\n    add(0, 0, 1, state)\n    state.mean[:] = state.total / 2 + np.ones((8, 8))\n"
    )
    frames = frames_of(3)
    place(region, frames)
    sandbox = await start(source)
    await sandbox.run(batch(frames))
    total = frames.sum(axis=0, dtype=np.int64)
    state = sandbox.collect(0)
    assert (state["total"] == total).all()
    total[0, 0] += 1
    assert ((await sandbox.finish(state))["mean"] == total / 2 + 1).all()


async def test_long_tables_and_rows_of_tables(start: Start, region: Any) -> None:
    long = ", ".join(str(n * n) for n in range(300))
    source = (
        f"LONG = ({long})\nSOBEL = ((1, 0, -1), (2, 0, -2), (1, 0, -1))\nLUT = ((0.5, 1), (2, 3))\n"
        'STATE = {"n": ("int64", (3,), "sum")}\n' + HEAD + "    for i in range(300):\n        state.n[0] += LONG[i]\n"
        "    for y in range(3):\n        for x in range(3):\n            state.n[1] += SOBEL[y][x] * (y + 1)\n"
        "    state.n[2] = LONG[-1]\n    return KEEP\n"
    )
    sandbox = await start(source)
    await sandbox.run(batch(np.zeros((1, 8, 8), "<u2")))
    assert sandbox.collect(0)["n"].tolist() == [sum(n * n for n in range(300)), 0, 299 * 299]


async def test_rows_of_every_dtype(start: Start) -> None:
    dtypes = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64")
    declared = ", ".join(f'"{dtype}": "{dtype}"' for dtype in dtypes)
    values = ", ".join(["index + 1"] * len(dtypes))
    source = f"ROWS = {{{declared}}}\nROWS_MAX = 3\n" + HEAD
    sandbox = await start(source + f"    for n in range(4):\n        append(feedback, {values})\n    return KEEP\n")
    reply = await sandbox.run(batch(np.zeros((MAX_BATCH, 8, 8), "<u2")))
    assert reply.rows is not None
    assert reply.rows.tolist() == [(n, *[n + 1] * len(dtypes)) for n in range(MAX_BATCH) for _ in range(3)]
    assert reply.dropped_rows == MAX_BATCH


LINES = {
    "in a helper": (
        "def h(a, n):\n    n += 3\n    return a[n]  # <-\n\n\n" + HEAD + "    return h(frame[0], index + 9) > 0\n"
    ),
    "in a state array": (
        'STATE = {"n": ("int64", (4,), "sum")}\n'
        + HEAD
        + "    n = index + 4\n    state.n[n] += 1  # <-\n    return KEEP\n"
    ),
    "in an array parameter": (
        'PARAMS = {"a": ("uint8", (-1,))}\n' + HEAD + "    return KEEP if params.a[index + 3] else DROP  # <-\n"
    ),
    "in out": ('OUT = ("same", "same")\n' + HEAD + "    out[8 + index, 0] = 1  # <-\n    return REPLACE\n"),
    "beside an allocation": (HEAD + "    a = np.zeros(4)\n    n = index + 4\n    a[n] = 1  # <-\n    return KEEP\n"),
    "unpacking": (HEAD + "    a, b = frame[0]  # <-\n    return KEEP if a == b else DROP\n"),
}


@pytest.mark.parametrize("source", LINES.values(), ids=LINES)
async def test_what_raises_names_the_line(start: Start, source: str) -> None:
    arrays = {"a": np.zeros(3, np.uint8)} if "PARAMS" in source else {}
    sandbox = await start(source, arrays=arrays)
    line = next(number for number, line in enumerate(source.splitlines(), 1) if "# <-" in line)
    with pytest.raises(SandboxFailed, match=rf"crash: frame 0: k\.py:{line}: \w+Error"):
        await sandbox.run(batch(np.zeros((1, 8, 8), "<u2")))


MIXED = {
    "min": "    n = min(frame[0, 0], 5)  # <-\n    return KEEP if n > 3 else DROP\n",
    "one or the other": "    n = frame[0, 0] if index > 3 else 0  # <-\n    return KEEP if n > 3 else DROP\n",
    "in a branch": "    n = index\n    if n > 3:\n        n = frame[0, 0]  # <-\n    return KEEP if n > 3 else DROP\n",
    "in a helper": "    return KEEP if h(frame[0, 0]) > 3 else DROP\n\n\ndef h(a):\n    return max(a, 0)  # <-\n",
    "not": "    n = 0\n    n += frame[0, 0]\n    n = max(n, 3) * np.int64(frame[0, 1])\n    return KEEP if n / 2 > 0 else DROP\n",
}


@pytest.mark.parametrize("body", MIXED.values(), ids=MIXED)
async def test_integers_that_become_floats_are_pointed_out(start: Start, zygote_socket: str, body: str) -> None:
    source = HEAD + body
    lines = [number for number, line in enumerate(source.splitlines(), 1) if "# <-" in line]
    sandbox = await start(source, "<u8")
    assert [caution.partition(" ")[0] for caution in sandbox.cautions] == [f"k.py:{line}:" for line in lines]
    assert all("float64" in caution for caution in sandbox.cautions)
    checked = await check(zygote_socket, admit("k", source.encode()), [("<u8", 2), ("<u8", 3), ("<u2", 2)])
    assert checked.cautions == sandbox.cautions

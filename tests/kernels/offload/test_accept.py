"""What is refused, with which line and which words; and what is proven, so that it is not."""

from __future__ import annotations

import pytest

from kernels.offload.build import build
from kernels.offload.ir import Refusal
from tests.kernels.offload.conftest import kernel_of, model_of, random_frames, run_numba, same

HEAD = """import numpy as np
PARAMS = {"low": ("uint16", 12), "scale": ("float32", 1.5), "mask": ("uint8", "frame")}
STATE = {"n": ("int64", (1,), "sum"), "h": ("int64", (100,), "sum"), "u": ("uint64", (1,), "sum")}
LEVEL = 0.5
def frame(frame, params, state, index, out, feedback):
"""
FIRST_LINE = HEAD.count("\n") + 1


def in_pixels(*body: str, before: str = "    n = 0", after: str = "    return n > 3") -> str:
    lines = [before, "    for y in range(frame.shape[0]):", "        for x in range(frame.shape[1]):"]
    return HEAD + "\n".join([*lines, *(f"            {line}" for line in body), after]) + "\n"


def at(text: str, line: str) -> int:
    """The line of the file that begins so."""
    return next(number for number, found in enumerate(text.splitlines(), 1) if found.strip().startswith(line))


REFUSED = [
    (in_pixels("n += frame[y, x] * 0.5"), "n +=", "0.5 is a float"),
    (in_pixels("n += frame[y, x] * LEVEL"), "n +=", "0.5 is a float"),
    (in_pixels("n += frame[y, x] / 2"), "n +=", "// and % by a power of two"),
    (in_pixels("n += np.int64(frame[y, x]) // 3"), "n +=", "division needs many clock cycles"),
    (in_pixels("n += frame[y, x] % params.low"), "n +=", "division needs many clock cycles"),
    (in_pixels("n += frame[y, x] * params.scale"), "n +=", "params.scale is float32"),
    (in_pixels("n += params.mask[y, x] * frame[y, x]"), "n +=", "an FPGA core has scalar parameters only"),
    (in_pixels("n += np.sqrt(frame[y, x])"), "n +=", "np.sqrt() is not available on an FPGA"),
    (in_pixels("n += frame[y, x]", after="    return frame.sum() > n"), "return", "whole-array operation"),
    (in_pixels("n += frame[y, x] ** 2"), "n +=", "multiply, v * v"),
    (in_pixels("while n < 3:", "    n += frame[y, x]"), "while", "cannot keep pace with the stream"),
    (in_pixels("n += frame[y, x]", "if n > 9:", "    break"), "break", "a loop cannot be left early"),
    (in_pixels("if frame[y, x] > 5:", "    return KEEP"), "return KEEP", "decide after it"),
    (in_pixels("for k in range(n):", "    n += frame[y, x]"), "for k", "the number of turns depends on data"),
    (in_pixels("for k in range(100):", "    n += frame[y, x]"), "for k", "at most 64"),
    (in_pixels("n += frame[0, x]"), "n +=", "read at the position of the loops"),
    (in_pixels("n += frame[x, y]"), "n +=", "rows are the outer loop"),
    (in_pixels("n += frame[y + n, x]"), "n +=", "read at the position of the loops"),
    (in_pixels("n += frame[y - 1, x]"), "n +=", "may lie outside the frame (index -1 of 8)"),
    (in_pixels("n += frame[y, x]", "state.h[frame[y, x]] += 1"), "state.h", "may be 65535"),
    (in_pixels("n += frame[y, x]", "state.h[n & 63] += 1", "state.h[1] += 1"), "state.h[1]", "updated twice"),
    (in_pixels("n += frame[y, x]", "if state.h[3] > 2:", "    n += 1"), "if state", "is a memory"),
    (in_pixels("n += frame[y, x]", "state.h[n & 63] *= 2"), "state.h", "a memory is updated by"),
    (in_pixels("n += frame[y, x]", after="    return np.uint64(index) > n"), "return", "float64"),
    (in_pixels("if frame[y, x] > 3:", "    n = np.uint64(5)"), "for", "float64"),
    (in_pixels("n += 1 << frame[y, x]"), "n +=", "a shift goes by 0 to 63 bits"),
    (in_pixels("n += frame[y, x]", after="    return n"), "return n", "must be KEEP, DROP or STOP"),
    (in_pixels("m = frame[y, x]", after="    return m > 3"), "return m", "no value here if the loop had no turn"),
    (in_pixels("if frame[y, x] > 3:", "    m = 1", "n += m"), "n += m", "may have no value here"),
    (
        in_pixels("n += frame[y, x]", after="    for y in range(8):\n        n += frame[y, y]\n    return n > 3"),
        "n += frame[y, y]",
        "second pass",
    ),
    (HEAD + "    return KEEP\n", "def frame", "no pixel is read in a loop"),
    (HEAD + "    n = 0\n    for y in range(8):\n        n += frame[y, 0]\n    return n > 3\n", "n +=", "two loops"),
    (
        HEAD
        + "    n = 0\n    for y in range(9):\n        for x in range(8):\n            n += frame[y, x]\n    return KEEP\n",
        "for y",
        "may leave the frame",
    ),
    (
        HEAD
        + "    n = 0\n    for y in range(0, 8, 2):\n        for x in range(8):\n            n += frame[y, x]\n    return KEEP\n",
        "for y",
        "the step",
    ),
]


@pytest.mark.parametrize(("source", "line", "reason"), REFUSED)
def test_refused_with_line_and_reason(source: str, line: str, reason: str) -> None:
    with pytest.raises(Refusal) as caught:
        build(kernel_of(source), "uint16", (8, 8))
    assert reason in caught.value.reason
    if line != "for":
        assert caught.value.line == at(source, line), caught.value


@pytest.mark.parametrize(
    ("declared", "used", "reason"),
    [
        ('OUT = ("same", "same")', "out[0, 0] = 1", "transformed frames"),
        ('ROWS = {"x": "float32"}', "append(feedback, 1.0)", "rows"),
        ('STATE = {"mean": ("float64", (1,), "sum")}', "state.mean[0] += 1", "state.mean is float64"),
        ('STATE = {"a": ("int64", (2000000,), "sum")}', "state.a[5] += 1", "Mbit"),
    ],
)
def test_declarations_that_no_core_can_carry_out(declared: str, used: str, reason: str) -> None:
    source = f"\n{declared}\ndef frame(frame, params, state, index, out, feedback):\n    {used}\n    return KEEP\n"
    with pytest.raises(Refusal) as caught:
        build(kernel_of(source), "uint16", (8, 8))
    assert reason in caught.value.reason
    assert caught.value.line == 2


@pytest.mark.parametrize(("dtype", "shape"), [("float32", (8, 8)), ("uint64", (8, 8)), ("uint16", (2, 8, 8))])
def test_layouts_that_no_core_takes(dtype: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(Refusal, match="not offloaded"):
        build(kernel_of(in_pixels("n += frame[y, x]")), dtype, shape)


ACCEPTED = [
    in_pixels("v = frame[y, x]", "if v < 100:", "    state.h[v] += 1", "    n += 1"),
    in_pixels("if frame[y, x] < 100:", "    state.h[frame[y, x]] += 1", "    n += 1"),
    in_pixels("if y > 0 and frame[y - 1, x] > frame[y, x]:", "    n += 1"),
    in_pixels("if y == 0 or x == 0:", "    continue", "n += frame[y - 1, x - 1]"),
    in_pixels("if not (frame[y, x] >= 100):", "    state.h[frame[y, x]] += 1", "    n += 1"),
    in_pixels("state.h[min(frame[y, x], 99)] += frame[y, x]", "n -= 1"),
    in_pixels("if n < 90:", "    state.h[n] += frame[y, x]", "    n += 1"),
    in_pixels("n += frame[y, x] >> (frame[y, x] & 15)"),
    in_pixels("state.u[0] += frame[y, x]", "n ^= np.int64(state.u[0])"),
    in_pixels("a, b = np.int64(frame[y, x]), n", "n, b = b, a", "n += b"),
    in_pixels(
        "n += frame[y, x]",
        after="    if n > 5:\n        if n > 50:\n            return STOP\n        n -= 1\n    return n > 4",
    ),
]


@pytest.mark.parametrize("source", ACCEPTED)
def test_accepted_by_proof_and_the_same_as_the_plain_kernel(source: str) -> None:
    source = source.replace(', "mask": ("uint8", "frame")', "")
    offload = build(kernel_of(source), "uint16", (8, 8))
    frames = random_frames("uint16", (8, 8), 3)
    same(run_numba(offload.kernel, frames), run_numba(model_of(offload), frames))


def test_what_is_counted_is_as_wide_as_its_pixels_ask() -> None:
    offload = build(kernel_of(in_pixels("n += frame[y, x] > params.low")), "uint16", (512, 1030))
    slot = next(slot for slot in offload.slots if slot.name == "n")
    assert (slot.lo, slot.hi.bit_length()) == (0, 20)

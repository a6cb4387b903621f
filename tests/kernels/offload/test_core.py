"""The core in GHDL, seen through its ports: the samples on every pixel type, protocol errors, parameters, the register file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kernels.offload import ghdl as simulator
from kernels.offload import registers as regs
from kernels.offload.build import build
from kernels.offload.folder import timing_of
from kernels.offload.ir import Offload
from kernels.offload.testbench import Script, state_of
from kernels.offload.vhdl_core import emit_vhdl
from tests.kernels.offload import samples
from tests.kernels.offload.conftest import kernel_of, model_of, random_frames, run_ghdl, run_numba, same

SAMPLES = {
    "threshold": (samples.THRESHOLD, "uint16", (9, 11)),
    "window": (samples.WINDOW, "uint16", (9, 11)),
    "line": (samples.LINE, "int16", (37,)),
    "region": (samples.REGION, "int32", (6, 7)),
    "counter": (samples.COUNTER, "uint8", (8,)),
}
STALLS = [(0, 0), (120, 0), (0, 160), (90, 140)]

pytestmark = pytest.mark.usefixtures("ghdl")


def offload_of(name: str, dtype: str | None = None) -> Offload:
    source, given, shape = SAMPLES[name]
    return build(kernel_of(source, name), dtype or given, shape)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("threshold", "uint16"),
        ("threshold", "uint32"),
        ("window", "uint16"),
        ("window", "int32"),
        ("line", "int16"),
        ("line", "int32"),
        ("region", "int32"),
        ("region", "uint8"),
    ],
)
def test_the_same_bits_as_the_plain_kernel_whatever_stalls(name: str, dtype: str) -> None:
    offload = offload_of(name, dtype)
    frames = random_frames(dtype, offload.shape, 6)
    plain = run_numba(offload.kernel, frames, first=2)
    same(plain, run_numba(model_of(offload), frames, first=2))
    for number, (stall_in, stall_out) in enumerate(STALLS):
        same(plain, run_ghdl(offload, frames, first_frame=2, seed=number + 1, stall_in=stall_in, stall_out=stall_out))


@pytest.mark.parametrize("name", SAMPLES)
def test_cores_are_synthesizable(name: str) -> None:
    simulator.synthesize(offload_of(name))


@pytest.mark.parametrize("name", ["threshold", "window", "line"])
def test_emitted_vhdl_is_the_golden_file(name: str, golden: Path, request: pytest.FixtureRequest) -> None:
    """``pytest --golden`` writes the files anew; read the difference before you commit it."""
    text, file = emit_vhdl(offload_of(name)), golden / f"{name}.vhd"
    if request.config.getoption("--golden"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()


# -- the stream


def counted(*parts: int) -> tuple[Offload, Script]:
    """A held core of eight pixels a frame, with NEXT_FRAME 0."""
    offload = offload_of("counter")
    return offload, Script(offload)


def finished(script: Script, frames: int, broken: int = 0) -> Script:
    return (
        script.poll(regs.FRAMES, 0xFFFFFFFF, frames)
        .poll(regs.BROKEN, 0xFFFFFFFF, broken)
        .hold()
        .read(regs.STATUS)
        .read_state()
    )


ONES = np.ones(8, np.uint8)


@pytest.mark.parametrize("name", ["threshold", "counter", "window"])
def test_the_clocks_of_a_frame_are_those_of_the_readme(name: str) -> None:
    offload = offload_of(name)
    script = Script(offload)
    for value in range(4):
        script.frame(np.full(offload.shape, value, offload.dtype))
    results = simulator.simulate(offload, finished(script, 4)).results
    ends = [result.cycle for result in results if result.is_verdict]
    assert np.diff(ends).tolist() == [timing_of(offload).frame] * 3


@pytest.mark.parametrize("stalls", STALLS)
@pytest.mark.parametrize(
    ("beats", "error"),
    [([1] * 5, regs.EARLY), ([1] * 11, regs.LATE)],
    ids=["tlast early", "tlast late"],
)
def test_a_frame_of_the_wrong_length_gets_no_verdict_and_the_next_one_does(
    beats: list[int], error: int, stalls: tuple[int, int]
) -> None:
    offload, script = counted()
    for number, pixel in enumerate(beats):
        script.beat(pixel, first=number == 0, last=number == len(beats) - 1)
    script.frame(ONES)
    simulated = simulator.simulate(offload, finished(script, 1, 1), stall_in=stalls[0], stall_out=stalls[1])
    verdicts = [(r.frame, r.broken) for r in simulated.results if r.is_verdict]
    assert verdicts == [(0, True), (1, False)]
    status = simulated.reads[0][0]
    assert status & error
    assert status & regs.TAINTED, "the state has counted pixels of the broken frame"


def test_a_frame_that_begins_within_another_is_not_lost() -> None:
    offload, script = counted()
    script.beat(9, first=True).beat(9).frame(ONES)
    simulated = simulator.simulate(offload, finished(script, 1, 1), stall_in=100, stall_out=100)
    assert [(r.frame, r.broken) for r in simulated.results if r.is_verdict] == [(0, True), (1, False)]
    assert simulated.reads[0][0] & regs.EARLY


def test_beats_without_a_start_are_dropped_up_to_the_next_frame() -> None:
    offload, script = counted()
    script.beat(1).beat(1).beat(1, last=True).beat(5).frame(ONES)
    simulated = simulator.simulate(offload, finished(script, 1, 2))
    assert [(r.frame, r.broken) for r in simulated.results if r.is_verdict] == [(0, True), (1, True), (2, False)]
    assert simulated.reads[0][0] & regs.UNSTARTED
    assert state_of(offload, simulated.reads[1:])["sum"].tolist() == [8]


def test_clearing_forgets_state_and_errors_between_frames() -> None:
    offload, script = counted()
    script.beat(1, first=True).beat(1, last=True).frame(ONES).poll(regs.FRAMES, 0xFFFFFFFF, 1)
    script.write(regs.CONTROL, regs.CLEAR_STATE | regs.CLEAR_ERRORS).poll(regs.STATUS, regs.CLEARING, 0)
    simulated = simulator.simulate(offload, finished(script.frame(ONES), 2, 1))
    status, _ = simulated.reads[0]
    assert status & (regs.EARLY | regs.TAINTED) == 0
    state = state_of(offload, simulated.reads[1:])
    assert (state["sum"].tolist(), int(state["seen"].sum())) == ([8], 8)


def test_a_reset_in_the_middle_of_a_frame_starts_anew() -> None:
    offload, script = counted()
    script.params({"step": 5}).beat(1, first=True).beat(1).reset().frame(ONES)
    simulated = simulator.simulate(offload, finished(script, 1))
    assert [(r.frame, r.broken) for r in simulated.results if r.is_verdict] == [(0, False)]
    assert state_of(offload, simulated.reads[1:])["sum"].tolist() == [8], "parameters are as declared after a reset"


# -- parameters and registers


def test_parameters_change_between_frames_only() -> None:
    offload, script = counted()
    script.frame(ONES)
    for number in range(8):
        script.beat(1, first=number == 0, last=number == 7)
        if number == 3:
            script.params({"step": -100})
    script.frame(ONES)
    simulated = simulator.simulate(offload, finished(script, 3), stall_in=60)
    assert [r.value for r in simulated.results if not r.is_verdict] == [1, 1, -100]
    assert [r.code for r in simulated.results if not r.is_verdict] == [0, 1, 2]
    assert state_of(offload, simulated.reads[1:])["sum"].tolist() == [8 + 8 - 800]


def test_parameters_that_are_not_applied_do_not_count() -> None:
    offload, script = counted()
    address = regs.param_address(offload, "step")
    script.frame(ONES).poll(regs.FRAMES, 0xFFFFFFFF, 1).write_long(address, 7).frame(ONES).read_long(address)
    simulated = simulator.simulate(offload, finished(script, 2))
    assert [r.value for r in simulated.results if not r.is_verdict] == [1, 1]
    assert simulated.reads[0][0] == 7


def test_the_register_file_says_what_it_is_and_refuses_what_is_not_there() -> None:
    offload, script = counted()
    memory = regs.state_addresses(offload)["seen"]
    for address in (regs.ID, regs.CORE, regs.HEIGHT, regs.WIDTH, regs.PIXEL, 0x0C0, memory):
        script.read(address)
    script.frame(ONES).poll(regs.FRAMES, 0xFFFFFFFF, 1).hold().read(memory + 8).read(memory + 8 * 20).read(
        regs.LAST_VALUE
    )
    script.read_long(regs.NEXT_FRAME)
    reads = simulator.simulate(offload, script).reads
    assert reads[:5] == [(regs.MAGIC, 0), (regs.CORE_VERSION, 0), (1, 0), (8, 0), (8, 0)]
    assert reads[5:7] == [(0, 2), (0, 2)], "no such register; a memory is read while held only"
    assert reads[7:] == [(8, 0), (0, 2), (1, 0), (1, 0), (0, 0)]


def test_a_simulation_that_takes_too_long_is_ended() -> None:
    offload, script = counted()
    script.poll(regs.FRAMES, 0xFFFFFFFF, 1)
    with pytest.raises(simulator.GhdlFailed, match="too many cycles"):
        simulator.simulate(offload, script, cycles_max=500)
    with pytest.raises(simulator.GhdlFailed, match="did not finish"):
        simulator.simulate(offload, script, timeout_s=1.0)

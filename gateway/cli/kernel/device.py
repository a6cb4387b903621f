"""``hiss kernel check --device model|ghdl``: the core that a kernel would be, on the same frames, against the kernel itself.

In: the kernel with its parameters, a file of frames, what the plain kernel found in them. Out: a sentence each about the model
(numba made from the typed integer form, in the sandbox) and the VHDL (simulated). What always holds: any difference in a
verdict, in the feedback or in the state is an error; nothing is left out of the comparison but what the sentence says.
"""

from __future__ import annotations

import asyncio
import math
import os

import numpy as np
import numpy.typing as npt

from gateway.cli.kernel.source import Given, Refused
from gateway.cli.options import Core
from gateway.cli.output import CliError, ExitCode
from ingest.records import FrameGeometry
from kernels.contract import Stage
from kernels.offline.body import Body
from kernels.offline.memory import Window, window_bytes
from kernels.offline.runner import Found, Runner
from kernels.offload import ghdl
from kernels.offload.device import GhdlDevice, Plan, make_plan
from kernels.offload.ir import Refusal

SIMULATED_PIXELS_MAX = 1 << 18
"""A simulation takes about a second for each 100,000 pixels."""
SIMULATED_FRAMES_MAX = 8
SIMULATION_S = 300.0


def planned(given: Given, body: Body) -> Plan:
    """Raises Refused with the line."""
    try:
        return make_plan(given.kernel, body.dtype, body.shape)
    except Refusal as refusal:
        reason = f"device fpga: {refusal.reason}"
        raise Refused(given.kernel.file, refusal.line, reason, given.text) from None


async def compared(
    zygote_socket: str, plan: Plan, stage: Stage, body: Body, plain: Found, core: Core
) -> dict[str, str]:
    """Raises CliError where something differs; SandboxFailed, ValueError, OSError."""
    frames = len(plain.verdicts)
    window = Window(window_bytes(body, frames))
    try:
        runner = await Runner.start(
            zygote_socket, [Stage(plan.model, stage.params, stage.arrays)], body.dtype, body.shape, window
        )
        try:
            _equal(plain, await runner.judge(body, 0, frames), "the model of the core")
        finally:
            await runner.close()
        said = {"model": f"equal to the cpu on {frames} frames"}
        if core is Core.GHDL:
            said["ghdl"] = await _simulated(zygote_socket, plan, stage, body, window)
    finally:
        window.close()
    return said


async def _simulated(zygote_socket: str, plan: Plan, stage: Stage, body: Body, window: Window) -> str:
    if not isinstance(body.layout, FrameGeometry):
        return "not simulated: these frames are decoded in a sandbox, which gives nothing out; try it on raw ones or an .npy"
    if not ghdl.installed():
        raise CliError("--device ghdl: GHDL is not installed (Debian: ghdl-mcode)", ExitCode.NOT_STARTED)
    if not GhdlDevice.can(plan.offload):
        return "not simulated: its state is too large to be read out"
    pixels = math.prod(body.shape)
    if pixels > SIMULATED_PIXELS_MAX:
        return f"not simulated: a frame of more than {SIMULATED_PIXELS_MAX} pixels takes too long; give a crop"
    count = min(body.frames, SIMULATED_FRAMES_MAX, SIMULATED_PIXELS_MAX // pixels)
    frames = _read(body, body.layout, count)
    runner = await Runner.start(zygote_socket, [stage], body.dtype, body.shape, window)
    try:
        # One by one: a core goes on after STOP.
        found = [await runner.judge(body, number, number + 1, fresh=number == 0) for number in range(count)]
    finally:
        await runner.close()
    try:
        simulated = await asyncio.to_thread(
            ghdl.judge, plan.offload, frames, dict(stage.params), stall_in=30, stall_out=30, timeout_s=SIMULATION_S
        )
    except ghdl.GhdlFailed as failure:
        raise CliError(f"GHDL: {failure}", ExitCode.NO) from None
    feedback = [event for one in found for event in one.feedback]
    if simulated.verdicts != [int(one.verdicts[0]) for one in found]:
        raise _differs("the simulated core", "the verdicts")
    if [(frame, code, float(value)) for frame, code, value in simulated.feedback] != feedback:
        raise _differs("the simulated core", "the feedback")
    for name, values in simulated.state.items():
        if not np.array_equal(values, found[-1].state[name]):
            raise _differs("the simulated core", f"state.{name}")
    return f"the simulated VHDL is equal to the cpu on {count} frames"


def _read(body: Body, layout: FrameGeometry, count: int) -> npt.NDArray[np.generic]:
    data = os.pread(body.fd, count * layout.frame_bytes, layout.origin)
    return np.frombuffer(data, layout.dtype).reshape(count, *layout.shape)


def _equal(plain: Found, other: Found, name: str) -> None:
    if not np.array_equal(plain.verdicts, other.verdicts):
        frame = int(np.flatnonzero(plain.verdicts != other.verdicts)[0])
        raise _differs(name, f"the verdict of frame {frame}")
    if plain.feedback != other.feedback:
        raise _differs(name, "the feedback")
    for array, values in other.state.items():
        if not np.array_equal(plain.state[array], values):
            raise _differs(name, f"state.{array}")


def _differs(name: str, what: str) -> CliError:
    return CliError(f"{name} and the cpu differ in {what}: report it, with the kernel and these frames", ExitCode.NO)

"""Runs GHDL: synthesis as a gate, simulation of a core against vectors. Under rlimits, lowest priority, in a temporary folder.

In: ``Offload``, frames, parameter values. Out: what the core answered. Raises ``GhdlMissing`` where the program is not
installed and ``GhdlFailed`` with its words. Calls block: use a thread. Every process has ended when a call returns.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kernels.offload import registers as regs
from kernels.offload.ir import Offload
from kernels.offload.testbench import (
    Result,
    Script,
    emit_testbench,
    parse_reads,
    parse_results,
    state_of,
)
from kernels.offload.vhdl_core import emit_vhdl, entity_name

MEMORY_BYTES = 2 << 30
OUTPUT_BYTES = 256 << 20
TIMEOUT_S = 120.0
SAID_CHARS_MAX = 2000
STOP_S = 0.2
"""How soon a run ends that nobody waits for any more."""

_LAUNCHER = """
import ctypes, os, resource, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: ends with whoever asked
memory, cpu, output = (int(word) for word in sys.argv[1:4])
for what, limit in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, cpu), (resource.RLIMIT_FSIZE, output),
                    (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 64)):
    resource.setrlimit(what, (limit, limit))
os.nice(19)
try:
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
except OSError:
    pass
os.execv(sys.argv[4], sys.argv[4:])
"""


class GhdlMissing(Exception):
    """The program is not installed."""


class GhdlFailed(Exception):
    """``str()`` is what it said, shortened."""


@dataclasses.dataclass(frozen=True, slots=True)
class Simulated:
    """``reads``: (data, response) of each read of the script."""

    results: list[Result]
    reads: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True, slots=True)
class Judged:
    """What the core found in frames, in the terms of the kernel."""

    verdicts: list[int]
    state: dict[str, npt.NDArray[np.generic]]
    feedback: list[tuple[int, int, int]]
    """(frame, code, value)"""


@functools.cache
def program(name: str) -> str:
    """Path of the program; raises GhdlMissing."""
    found = shutil.which(name)
    if found is None:
        raise GhdlMissing(
            f"{name} is not installed (Debian and Ubuntu: apt-get install {name}{'-mcode' * (name == 'ghdl')})"
        )
    return found


def installed(name: str = "ghdl") -> bool:
    return shutil.which(name) is not None


def confined(
    arguments: Sequence[str],
    folder: Path,
    timeout_s: float,
    *,
    memory_bytes: int = MEMORY_BYTES,
    stop: threading.Event | None = None,
) -> str:
    """Run a tool of the trade under limits; what it wrote to stdout. ``stop``: set by whoever does not want to wait any more.
    Raises GhdlFailed."""
    limits = (str(memory_bytes), str(int(timeout_s) + 1), str(OUTPUT_BYTES))
    command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, *limits, program(arguments[0]), *arguments[1:]]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "TMPDIR": str(folder), "LC_ALL": "C"}
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
        errors="replace",
    ) as process:
        try:
            out, err = _awaited(process, arguments[0], timeout_s, stop)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
    if process.returncode:
        said = (err.strip() or out.strip() or f"exit code {process.returncode}").replace(str(folder), "")
        raise GhdlFailed(said[-SAID_CHARS_MAX:])
    return out


def _awaited(
    process: subprocess.Popen[str], name: str, timeout_s: float, stop: threading.Event | None
) -> tuple[str, str]:
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            return process.communicate(timeout=max(0.0, min(STOP_S, deadline_s - time.monotonic())))
        except subprocess.TimeoutExpired:
            if stop is not None and stop.is_set():
                raise GhdlFailed(f"{name} was stopped") from None
            if time.monotonic() >= deadline_s:
                raise GhdlFailed(f"{name} did not finish within {timeout_s:g} s") from None


def synthesize(offload: Offload, *, verilog: bool = False, timeout_s: float = TIMEOUT_S) -> str:
    """The gate: the core is synthesizable. The netlist, as VHDL or Verilog. Raises GhdlFailed."""
    with tempfile.TemporaryDirectory(prefix="hiss-synth-") as name:
        folder = Path(name)
        (folder / "core.vhd").write_text(emit_vhdl(offload))
        kind = ["--out=verilog"] if verilog else []
        return confined(
            ["ghdl", "--synth", "--std=08", *kind, "core.vhd", "-e", entity_name(offload)], folder, timeout_s
        )


def simulate(
    offload: Offload,
    script: Script,
    *,
    seed: int = 1,
    stall_in: int = 0,
    stall_out: int = 0,
    cycles_max: int = 100_000_000,
    timeout_s: float = TIMEOUT_S,
    stop: threading.Event | None = None,
) -> Simulated:
    """Play a script. ``stall_in``, ``stall_out``: 0 (never) to 255 (nearly always). Raises GhdlFailed."""
    with tempfile.TemporaryDirectory(prefix="hiss-ghdl-") as name:
        folder = Path(name)
        (folder / "core.vhd").write_text(emit_vhdl(offload))
        (folder / "testbench.vhd").write_text(emit_testbench(offload))
        (folder / "script.bin").write_bytes(script.data())
        confined(["ghdl", "-a", "--std=08", "core.vhd", "testbench.vhd"], folder, timeout_s, stop=stop)
        generics = {"SEED": seed, "STALL_IN": stall_in, "STALL_OUT": stall_out, "CYCLES_MAX": cycles_max}
        confined(
            [
                "ghdl",
                "-r",
                "--std=08",
                "testbench",
                *(f"-g{generic}={value}" for generic, value in generics.items()),
                "--ieee-asserts=disable",
            ],
            folder,
            timeout_s,
            stop=stop,
        )
        return Simulated(
            parse_results((folder / "results.bin").read_bytes()), parse_reads((folder / "reads.bin").read_bytes())
        )


def judge(
    offload: Offload,
    frames: npt.NDArray[np.generic],
    params: Mapping[str, int | float],
    *,
    first_frame: int = 0,
    seed: int = 1,
    stall_in: int = 0,
    stall_out: int = 0,
    timeout_s: float = TIMEOUT_S,
    stop: threading.Event | None = None,
) -> Judged:
    """The frames through the core, from a clear state. Raises GhdlFailed."""
    script = Script(offload).hold()
    script.write_long(regs.NEXT_FRAME, first_frame).params({name: int(value) for name, value in params.items()})
    for frame in frames:
        script.frame(frame)
    script.poll(regs.FRAMES, 0xFFFFFFFF, len(frames)).hold().read_state()
    simulated = simulate(
        offload, script, seed=seed, stall_in=stall_in, stall_out=stall_out, timeout_s=timeout_s, stop=stop
    )
    verdicts = [result.verdict for result in simulated.results if result.is_verdict]
    feedback = [
        (first_frame + ((result.frame - first_frame) & 0xFFFFFFFF), result.code, result.value)
        for result in simulated.results
        if not result.is_verdict
    ]
    if len(verdicts) != len(frames) or any(result.broken for result in simulated.results):
        raise GhdlFailed(f"{len(verdicts)} verdicts for {len(frames)} frames")
    return Judged(verdicts, state_of(offload, simulated.reads), feedback)

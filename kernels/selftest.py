"""Does the sandbox hold on this machine? Asked at start; where it does not, kernels are refused and ingest runs on.

In: the zygote's socket. Out: a ``SelfTestReport`` with the outcome of every probe. Trusting that a filter was installed is
not enough (old systems, containers with a filter of their own, other architectures): each thing a kernel must not be able
to do is attempted by a process locked down like a kernel's, and then one small kernel must compile and compute right.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import mmap
import os
import signal

import numpy as np

from ingest.ports import KernelRefused
from kernels import lockdown, probes, wire
from kernels.contract import DROP, KEEP, Kernel, Stage, StateSpec
from kernels.launch import NOT_LOCKED_DOWN
from kernels.memory import OutputLayout
from kernels.process import SandboxFailed, SandboxProcess
from kernels.sandbox import Batch, Sandbox, SandboxLimits

_PROBE_TIMEOUT_S = 10.0
_F_SEAL_FUTURE_WRITE = 0x0010
_REGION_BYTES = 64 * 1024

_SOURCE = """
def frame(frame, params, state, index, out, feedback):
    total = 0
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            total += frame[y, x]
    state.total[0] += total
    return KEEP if total == 51 else DROP
"""
_KERNEL = Kernel(
    "self-test", _SOURCE, hashlib.sha256(_SOURCE.encode()).hexdigest(), (), (StateSpec("total", "int64", (1,), "sum"),)
)


@dataclasses.dataclass(frozen=True, slots=True)
class SelfTestReport:
    """``outcomes``: what came of each probe, by name. ``failures``: why kernels must not run here; empty if they may."""

    landlock_abi: int
    outcomes: dict[str, str]
    failures: tuple[str, ...]
    answered: bool = True
    """False: the fork server could not be asked, which says nothing about the machine."""

    @property
    def computes(self) -> bool:
        """Whether a kernel ran and its results were right, confined or not."""
        return self.outcomes.get("kernel") == _COMPUTED

    @property
    def holds(self) -> bool:
        return not self.failures


async def self_test(zygote_socket: str) -> SelfTestReport:
    """Attempt every probe and run one kernel. Never raises for what it finds; takes half a second."""
    region_fd = _sealed_region()
    try:
        outcomes = {name: await _attempt(zygote_socket, name, region_fd) for name in probes.ALL}
        outcomes["kernel"] = await _compute(zygote_socket, region_fd)
    finally:
        os.close(region_fd)
    expected = {name: probes.KILLED_OUTCOME if name in probes.KILLED else probes.DENIED for name in probes.ALL}
    expected["kernel"] = _COMPUTED
    unsupported = lockdown.supported()
    failures = (unsupported,) if unsupported else _failures(outcomes, expected)
    answered = not any(outcome.startswith(_UNASKED) for outcome in outcomes.values())
    return SelfTestReport(lockdown.landlock_abi(), outcomes, failures, answered)


def _failures(outcomes: dict[str, str], expected: dict[str, str]) -> tuple[str, ...]:
    """One line for each outcome that was not expected, naming the probes that had it."""
    names: dict[str, list[str]] = {}
    for name, outcome in outcomes.items():
        if outcome != expected[name]:
            names.setdefault(outcome, []).append(name)
    return tuple(f"{outcome} ({', '.join(probes)})" for outcome, probes in names.items())


_COMPUTED = "computed"
_UNASKED = "not asked: "


def _sealed_region() -> int:
    fd = os.memfd_create("hiss-self-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, _REGION_BYTES)
    with mmap.mmap(fd, _REGION_BYTES) as memory:
        memory.write(np.arange(_REGION_BYTES // 2, dtype=np.uint16).tobytes())
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | _F_SEAL_FUTURE_WRITE
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


async def _attempt(zygote_socket: str, probe: str, region_fd: int) -> str:
    """The probe's own account if its process survived, else how that ended."""
    limits = SandboxLimits()
    spec = wire.SandboxSpec(
        stages=(wire.StageSpec(_KERNEL, {}, ()),),
        layouts=(("<u2", (2, 2)),),
        compile_only=False,
        region_count=1,
        region_bytes=_REGION_BYTES,
        arrays_bytes=0,
        slots=1,
        out_frames=0,
        memory_bytes=limits.memory_bytes,
        nice=limits.nice,
        policy=limits.policy,
        populate=False,
        probe=probe,
    )
    output_fd = os.memfd_create("hiss-self-test", os.MFD_CLOEXEC)
    try:
        os.ftruncate(output_fd, OutputLayout([_KERNEL], spec.layouts[0], 1).size_bytes)
        process = await SandboxProcess.fork(zygote_socket, spec, output_fd, [region_fd])
    except SandboxFailed as failure:
        return _UNASKED + failure.message
    finally:
        os.close(output_fd)
    try:
        reply = await process.receive(_PROBE_TIMEOUT_S)
        if reply is not None:
            return reply.text
        status = await process.exit_status()
        if process.orphaned:
            return f"{_UNASKED}the zygote died"
        return probes.KILLED_OUTCOME if status == -signal.SIGSYS else f"ended with status {status}"
    except (TimeoutError, SandboxFailed) as error:
        return f"no answer: {error}"
    finally:
        await process.kill()


async def _compute(zygote_socket: str, region_fd: int) -> str:
    try:
        sandbox = await Sandbox.start(
            zygote_socket,
            [Stage(_KERNEL)],
            dtype="<u2",
            shape=(2, 3),
            region_fds=[region_fd],
            region_bytes=_REGION_BYTES,
            slots=1,
        )
        try:
            reply = await sandbox.run(Batch(region=0, offset=0, frame_bytes=12, first_frame=0, count=3, slot=0))
            total = int(sandbox.collect(0)["total"][0])
        finally:
            await sandbox.close()
    except (SandboxFailed, KernelRefused) as failure:
        unasked = (
            isinstance(failure, SandboxFailed)
            and failure.kind == "unavailable"
            and not failure.message.startswith(NOT_LOCKED_DOWN)
        )
        return f"{_UNASKED if unasked else ''}{failure}"
    # Frames 0..5, 6..11, 12..17 sum to 15, 51 and 87.
    right = total == 153 and reply.verdicts.tolist() == [DROP, KEEP, DROP]
    return _COMPUTED if right else "computed wrong results"

"""What an offloaded kernel runs on, as the host sees it.

``Device`` is a port: one frame in, from a clear state, and what was found in it out. ``SandboxDevice`` runs a kernel in a
sandbox of its own: the plain one, or the *model* (numba made from the IR). ``GhdlDevice`` simulates the VHDL. A board's
driver would be a further one. ``Plans`` knows for each kernel and layout whether it is offloaded, and remembers what was
found to differ. In: attachments, layouts. Out: ``Plan``s, and ``check_offload``, the verdict for a kernel that is submitted.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ingest.ports import KernelRefused
from kernels.attach import Attachment, stages_of
from kernels.contract import INTEGER_DTYPES, Kernel, Stage
from kernels.notices import Notices
from kernels.offload import ghdl
from kernels.offload.build import build
from kernels.offload.emit_numba import emit_numba
from kernels.offload.ir import Offload, Refusal
from kernels.offload.registers import elements
from kernels.sandbox import Batch, Sandbox, SandboxLimits

log = logging.getLogger("hiss.kernels")

Layout = tuple[str, tuple[int, ...]]
TRIED: tuple[Layout, ...] = (
    ("uint16", (512, 512)),
    ("uint32", (512, 512)),
    ("int32", (512, 512)),
    ("uint8", (512, 512)),
    ("int16", (512, 512)),
    ("uint16", (4096,)),
    ("int32", (4096,)),
)
"""Layouts that a kernel is tried with where its metadata name none."""
PLANS_MAX = 256
GHDL_TIMEOUT_S = 120.0
GHDL_STATE_MAX = 70_000
"""State elements up to which a simulation reads them all out."""


class Differs(Exception):
    """An offloaded kernel was not what the plain one is, or could not be compared. ``str()`` says where."""


@dataclasses.dataclass(frozen=True, slots=True)
class Judged:
    verdict: int
    state: Mapping[str, npt.NDArray[np.generic]]
    feedback: tuple[tuple[int, int, float], ...]
    """(frame, code, value)"""


class Device(Protocol):
    async def judge(self, index: int) -> Judged:
        """Judge the frame that device and caller share, as number ``index``, from a clear state."""
        ...

    async def close(self) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """An offloaded kernel for one layout. ``model``: the kernel as the sandbox runs it."""

    offload: Offload
    model: Kernel

    def stages(self, attachment: Attachment) -> list[Stage]:
        """What a sandbox is started with: the model in place of the kernel."""
        *before, last = stages_of(attachment)
        return [*before, dataclasses.replace(last, kernel=self.model)]


def make_plan(kernel: Kernel, dtype: str, shape: tuple[int, ...]) -> Plan:
    """Raises Refusal. Takes milliseconds, seldom a second."""
    offload = build(kernel, dtype, shape)
    source = emit_numba(offload)
    digest = hashlib.sha256(source.encode()).hexdigest()
    return Plan(offload, dataclasses.replace(kernel, source=source, sha256=digest))


def check_offload(kernel: Kernel, layout: Layout | None) -> None:
    """Raise KernelRefused with the line unless the kernel can be offloaded for the layout, or for any of ``TRIED``."""
    first: Refusal | None = None
    for dtype, shape in (layout,) if layout is not None else TRIED:
        try:
            build(kernel, dtype, shape)
        except Refusal as refusal:
            first = first or refusal
        else:
            return
    assert first is not None
    raise KernelRefused(kernel.file, first.line, f"device fpga: {first.reason}")


class Plans:
    """Of one worker. What differed stays on the cpu until the kernel is submitted again."""

    def __init__(self, notices: Notices) -> None:
        self._plans: dict[tuple[str, str, tuple[int, ...]], Plan | str] = {}
        self._notices = notices

    def _failure(self, bucket: str, attachment: Attachment) -> str:
        return self._notices.core_failure(bucket, attachment.kernel.sha256, attachment.submitted_ns)

    async def plan(self, bucket: str, attachment: Attachment, dtype: str, shape: tuple[int, ...]) -> Plan | None:
        """None: it runs as it is; ``text`` then says why."""
        if attachment.device != "fpga" or self._failure(bucket, attachment):
            return None
        key = (attachment.kernel.sha256, dtype, shape)
        found = self._plans.get(key)
        if found is None:
            found = await self._made(bucket, attachment, dtype, shape)
            self._plans[key] = found
            while len(self._plans) > PLANS_MAX:
                del self._plans[next(iter(self._plans))]
        return found if isinstance(found, Plan) else None

    async def _made(self, bucket: str, attachment: Attachment, dtype: str, shape: tuple[int, ...]) -> Plan | str:
        try:
            return await asyncio.to_thread(make_plan, attachment.kernel, dtype, shape)
        except Refusal as refusal:
            reason = f"not offloaded for {dtype} frames of {shape}: line {refusal.line}: {refusal.reason}"
            log.warning("kernel %s in bucket %s: %s", attachment.name, bucket, reason)
            return reason
        except Exception:
            log.exception("kernel %s in bucket %s could not be made into a core", attachment.name, bucket)
            return "not offloaded: internal error"

    def failed(self, bucket: str, attachment: Attachment, reason: str) -> None:
        """From now on the kernel runs on the cpu."""
        self._notices.core_failed(bucket, attachment.name, attachment.kernel.sha256, reason)

    def text(self, bucket: str, attachment: Attachment, dtype: str, shape: tuple[int, ...]) -> str:
        """What the kernel runs on, for the lineage."""
        if attachment.device == "cpu":
            return "cpu"
        if failure := self._failure(bucket, attachment):
            return f"cpu (fpga: {failure})"
        found = self._plans.get((attachment.kernel.sha256, dtype, shape))
        if isinstance(found, str):
            return f"cpu (fpga: {found})"
        return "fpga model (sampled frames equal to cpu)"


class SandboxDevice:
    """A kernel in a sandbox of its own, over a memory that the caller fills."""

    def __init__(self, sandbox: Sandbox, frame_bytes: int) -> None:
        self._sandbox = sandbox
        self._frame_bytes = frame_bytes

    @classmethod
    async def start(
        cls,
        zygote_socket: str,
        stages: Sequence[Stage],
        layout: Layout,
        memory_fd: int,
        memory_bytes: int,
        limits: SandboxLimits,
    ) -> SandboxDevice:
        """Raises SandboxFailed or KernelRefused."""
        dtype, shape = layout
        sandbox = await Sandbox.start(
            zygote_socket,
            stages,
            dtype=dtype,
            shape=shape,
            region_fds=[memory_fd],
            region_bytes=memory_bytes,
            slots=1,
            limits=limits,
        )
        return cls(sandbox, math.prod(shape) * np.dtype(dtype).itemsize)

    async def judge(self, index: int) -> Judged:
        """Raises SandboxFailed."""
        self._sandbox.reset(0)
        reply = await self._sandbox.run(Batch(0, 0, self._frame_bytes, index, 1, 0))
        return Judged(int(reply.verdicts[0]), self._sandbox.collect(0), tuple(reply.feedback))

    async def close(self) -> None:
        await self._sandbox.close()


class GhdlDevice:
    """The VHDL in a simulator. Slow: for crops."""

    def __init__(self, offload: Offload, params: Mapping[str, int | float], frame: npt.NDArray[np.generic]) -> None:
        self._offload = offload
        self._params = {spec.name: params[spec.name] for spec in offload.kernel.params if spec.dtype in INTEGER_DTYPES}
        self._frame = frame

    @staticmethod
    def can(offload: Offload) -> bool:
        return ghdl.installed() and sum(elements(spec) for spec in offload.state) <= GHDL_STATE_MAX

    async def judge(self, index: int) -> Judged:
        """Raises GhdlFailed. A cancelled call ends the simulator."""
        stop = threading.Event()
        try:
            judged = await asyncio.to_thread(
                ghdl.judge,
                self._offload,
                self._frame[np.newaxis],
                self._params,
                first_frame=index,
                seed=index % 1000 + 1,
                stall_in=40,
                stall_out=40,
                timeout_s=GHDL_TIMEOUT_S,
                stop=stop,
            )
        finally:
            stop.set()
        feedback = tuple((frame, code, float(value)) for frame, code, value in judged.feedback)
        return Judged(judged.verdicts[0], judged.state, feedback)

    async def close(self) -> None:
        """Nothing is kept."""


def compare(index: int, plain: Judged, other: Judged, name: str) -> None:
    """Raises Differs. Arrays that the other device does not hold are not compared."""
    where = f"frame {index}: {name} and the cpu differ in"
    if plain.verdict != other.verdict:
        raise Differs(f"{where} the verdict, {other.verdict} instead of {plain.verdict}")
    if plain.feedback != other.feedback:
        raise Differs(f"{where} the feedback")
    for array, values in other.state.items():
        if not np.array_equal(plain.state[array], values):
            raise Differs(f"{where} state.{array}")

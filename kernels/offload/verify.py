"""Compares an offloaded kernel with the plain one on frames of the real stream, while it runs.

In: frames that the lane has in a memory region just now. Out: ``settled``: nothing, or ``Differs``; the lane hands over no
state before it has asked. A sample is copied to a memory of the verifier's own and judged by both kernels, in two sandboxes
that see nothing else, each from a clear state; verdict, feedback and every element of the state must be the same. Now
and then a crop goes through the VHDL in GHDL as well, at the lowest priority. What cannot be compared counts as different.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import math
import mmap
import os
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ingest.ports import KernelRefused
from kernels.attach import Attachment, stages_of
from kernels.offload.build import build
from kernels.offload.device import Device, Differs, GhdlDevice, Judged, Plan, SandboxDevice, compare
from kernels.offload.ghdl import GhdlFailed, GhdlMissing
from kernels.offload.ir import Refusal
from kernels.process import SandboxFailed
from kernels.sandbox import SandboxLimits

log = logging.getLogger("hiss.kernels")

SAMPLE_S = 1.0
"""Between two samples of a lane; the first frames of a stream are sampled sooner."""
STREAM_SAMPLE_S = 0.1
GHDL_S = 600.0
"""Between two simulations of a lane."""
CROP = (24, 64)
CROP_1D = 1024
ATTEMPTS_S = (0.2, 1.0, 3.0)
"""Waits for a fork server that restarts."""
_SEALS = 0x0010 | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""F_SEAL_FUTURE_WRITE and the rest: sandboxes map it read-only, for good."""


class _Memory:
    """One frame, writable here only."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.fd = os.memfd_create("hiss-sample", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, self.size_bytes)
        self.mapping = mmap.mmap(self.fd, self.size_bytes)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)

    def frame(self, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
        return np.ndarray(shape, dtype, self.mapping)

    def close(self) -> None:
        os.close(self.fd)
        # A view that still stands keeps the mapping until it goes.
        with contextlib.suppress(BufferError):
            self.mapping.close()


class Verifier:
    """Of one lane. ``equal`` is called for each frame on which both agreed."""

    def __init__(
        self,
        plan: Plan,
        attachment: Attachment,
        zygote_socket: str,
        limits: SandboxLimits,
        equal: Callable[[], None],
    ) -> None:
        self._plan = plan
        self._attachment = attachment
        self._zygote_socket = zygote_socket
        self._limits = limits.among(8)
        self._equal = equal
        self._dtype, self._shape = plan.offload.dtype, plan.offload.shape
        self._frame_bytes = math.prod(self._shape) * np.dtype(self._dtype).itemsize
        self._memory = _Memory(self._frame_bytes)
        self._devices: tuple[Device, Device] | None = None
        self._differs: Differs | None = None
        self._task: asyncio.Task[None] | None = None
        self._simulation: asyncio.Task[None] | None = None
        self._streams: set[int] = set()
        self._sampled_s = -math.inf
        self._simulated_s = -math.inf

    def wants(self, stream: int) -> bool:
        """Whether a frame of the stream is to be sampled now."""
        if self._differs is not None or (self._task is not None and not self._task.done()):
            return False
        pause_s = SAMPLE_S if stream in self._streams else STREAM_SAMPLE_S
        return time.monotonic() - self._sampled_s >= pause_s

    def copy(self, region_fd: int, offset: int) -> None:
        """Take the frame from its region; only after ``wants``. Blocks for as long as copying takes."""
        with memoryview(self._memory.mapping) as target, target[: self._frame_bytes] as frame:
            if os.preadv(region_fd, [frame], offset) != self._frame_bytes:
                self._differs = Differs("a frame could not be read for a comparison")

    def compare(self, stream: int, index: int) -> None:
        """Compare what was copied, in the background."""
        self._streams.add(stream)
        self._sampled_s = time.monotonic()
        self._task = asyncio.create_task(self._compare(index), name=f"compare {self._attachment.name}")

    def forget(self, stream: int) -> None:
        self._streams.discard(stream)

    async def settled(self) -> None:
        """Wait for the comparison under way (not for a simulation). Raises Differs, now and for ever after."""
        if self._task is not None and not self._task.done():
            await asyncio.wait((self._task,))
        if self._differs is not None:
            raise self._differs

    async def close(self) -> None:
        for task in (self._task, self._simulation):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        devices, self._devices = self._devices, None
        for device in devices or ():
            with contextlib.suppress(SandboxFailed):
                await device.close()
        self._memory.close()

    async def _compare(self, index: int) -> None:
        try:
            plain, model = await self._started()
            compare(index, await plain.judge(index), await model.judge(index), "the model of the core")
            self._equal()
        except Differs as found:
            self._differs = found
        except (SandboxFailed, KernelRefused) as failure:
            self._differs = Differs(f"frame {index} could not be compared: {failure}")
        except Exception as error:
            log.exception("a comparison of kernel %s failed", self._attachment.name)
            self._differs = Differs(f"frame {index} could not be compared: {type(error).__name__}")
        else:
            self._begin_simulation(index)

    async def _started(self) -> tuple[Device, Device]:
        if self._devices is None:
            plain = await self._start(model=False, shape=self._shape, memory=self._memory)
            try:
                model = await self._start(model=True, shape=self._shape, memory=self._memory)
            except BaseException:
                await plain.close()
                raise
            self._devices = (plain, model)
        return self._devices

    async def _start(self, *, model: bool, shape: tuple[int, ...], memory: _Memory) -> SandboxDevice:
        stages = self._plan.stages(self._attachment) if model else stages_of(self._attachment)
        for wait_s in (*ATTEMPTS_S, None):
            try:
                return await SandboxDevice.start(
                    self._zygote_socket, stages, (self._dtype, shape), memory.fd, memory.size_bytes, self._limits
                )
            except SandboxFailed as failure:
                if failure.kind != "unavailable" or wait_s is None:
                    raise
                await asyncio.sleep(wait_s)
        raise AssertionError("unreachable")

    # -- the VHDL

    def _begin_simulation(self, index: int) -> None:
        """A crop of the sample through GHDL, if that is due. It takes seconds: nobody waits for it."""
        if time.monotonic() - self._simulated_s < GHDL_S or not GhdlDevice.can(self._plan.offload):
            return
        self._simulated_s = time.monotonic()
        frame = self._memory.frame(self._dtype, self._shape)
        crop = frame[_window(self._shape, index)].copy()
        self._simulation = asyncio.create_task(self._simulate(crop, index), name=f"simulate {self._attachment.name}")

    async def _simulate(self, crop: npt.NDArray[np.generic], index: int) -> None:
        name = self._attachment.name
        try:
            offload = await asyncio.to_thread(build, self._attachment.kernel, self._dtype, crop.shape)
            simulated = await GhdlDevice(offload, self._attachment.params, crop).judge(index)
            compare(index, await self._plain_crop(crop, index), simulated, "the simulated core")
            log.info("kernel %s: the simulated core agrees on a crop of frame %d", name, index)
        except Differs as found:
            self._differs = found
        except (Refusal, GhdlMissing, GhdlFailed, SandboxFailed, KernelRefused) as reason:
            # No proof either way: the comparison with the model stands.
            log.info("kernel %s: no simulation of a crop of frame %d: %s", name, index, reason)
        except Exception:
            log.exception("a simulation of kernel %s failed", name)

    async def _plain_crop(self, crop: npt.NDArray[np.generic], index: int) -> Judged:
        memory = _Memory(crop.nbytes)
        try:
            memory.frame(self._dtype, crop.shape)[...] = crop
            device = await self._start(model=False, shape=crop.shape, memory=memory)
            try:
                return await device.judge(index)
            finally:
                await device.close()
        finally:
            memory.close()


def _window(shape: tuple[int, ...], index: int) -> tuple[slice, ...]:
    """A crop that wanders over the frame."""
    sizes = CROP if len(shape) == 2 else (CROP_1D,)
    slices = []
    for axis, (size, most) in enumerate(zip(shape, sizes, strict=True)):
        kept = min(size, most)
        start = (index * (37 + 54 * axis)) % (size - kept + 1)
        slices.append(slice(start, start + kept))
    return tuple(slices)

"""A kernel over a stored version once more, for the ``out`` of its frames: what a filter writes where the verdict was REPLACE.

In: a version, the settings its frames were judged with, a memory domain. Out: the ``out`` of the frames asked for. What
always holds: every frame is judged, in order, from the first of its settings on, so that a kernel with state sees what it
saw; a frame that does not get the verdict it got before ends the replay, for then nobody knows which is right.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import numpy as np
import numpy.typing as npt

from ingest.ports import Domain, KernelRefused, LandingPad
from ingest.records import FrameGeometry, ObjectRecord
from kernels.attach import Attachment, stages_of
from kernels.contract import REPLACE
from kernels.passes import CATCHUP_BYTES, load
from kernels.rawfilter.plan import REPLACED, CannotFilter
from kernels.sandbox import Batch, Sandbox, SandboxLimits
from kernels.wire import MAX_BATCH

OUT_BYTES_MAX = 32 << 20
"""``out`` of one batch, at least one frame."""


class Replay:
    """One version's frames, first to last. ``epochs``: (first frame, settings). Close it in any case."""

    def __init__(
        self,
        pad: LandingPad,
        zygote_socket: str,
        limits: SandboxLimits,
        record: ObjectRecord,
        geometry: FrameGeometry,
        domain: Domain,
        epochs: Sequence[tuple[int, Attachment]],
        fates: npt.NDArray[np.uint8],
        out_bytes: int,
    ) -> None:
        self._pad = pad
        self._zygote_socket = zygote_socket
        self._limits = limits
        self._record = record
        self._geometry = geometry
        self._domain = domain
        self._epochs = list(epochs)
        self._fates = fates
        batch = min(CATCHUP_BYTES // geometry.frame_bytes, OUT_BYTES_MAX // out_bytes, MAX_BATCH)
        self._batch_frames = max(1, batch)
        self._next = 0
        self._epoch = -1
        self._sandbox: Sandbox | None = None
        self._outs: npt.NDArray[np.generic] | None = None
        self._outs_first = 0
        domain.hold()

    async def close(self) -> None:
        await self._end()
        self._domain.drop()

    async def outs(self, first: int, count: int) -> AsyncIterator[memoryview]:
        """``out`` of these frames, which must lie behind those asked for before. Raises CannotFilter, SandboxFailed, and
        what loading raises."""
        frame, stop = first, first + count
        while frame < stop:
            while self._next <= frame:
                await self._advance()
            assert self._outs is not None
            end = min(stop, self._next)
            yield self._outs[frame - self._outs_first : end - self._outs_first].data.cast("B")
            frame = end

    async def _advance(self) -> None:
        """Judge the next batch of frames."""
        last = self._epoch + 1 == len(self._epochs)
        if not last and self._epochs[self._epoch + 1][0] <= self._next:
            self._epoch += 1
            await self._start(self._epochs[self._epoch][1])
        assert self._sandbox is not None
        end = len(self._fates) if self._epoch + 1 == len(self._epochs) else self._epochs[self._epoch + 1][0]
        count = min(self._batch_frames, end - self._next)
        start = self._geometry.origin + self._next * self._geometry.frame_bytes
        loaded = await load(self._pad, self._record, start, count * self._geometry.frame_bytes, self._domain)
        try:
            reply = await self._sandbox.run(
                Batch(loaded.region, loaded.offset, self._geometry.frame_bytes, self._next, count, 0, collect_out=True)
            )
        finally:
            loaded.release()
        wanted = self._fates[self._next : self._next + count] == REPLACED
        differing = np.flatnonzero(wanted & (reply.verdicts != REPLACE))
        if len(differing):
            raise CannotFilter(
                f"frame {self._next + int(differing[0])} was to be replaced, and is not when its kernel sees it again"
            )
        self._outs, self._outs_first = reply.out, self._next
        self._next += count

    async def _start(self, attachment: Attachment) -> None:
        await self._end()
        try:
            self._sandbox = await Sandbox.start(
                self._zygote_socket,
                stages_of(attachment),
                dtype=np.dtype(self._geometry.dtype).name,
                shape=self._geometry.shape,
                region_fds=self._domain.region_fds,
                region_bytes=self._domain.region_bytes,
                slots=1,
                limits=self._limits,
                out_frames=self._batch_frames,
            )
        except KernelRefused as refusal:
            raise CannotFilter(str(refusal)) from None
        self._sandbox.reset(0)

    async def _end(self) -> None:
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            await sandbox.close()

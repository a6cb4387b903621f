"""A kernel over a stored version once more, for the ``out`` of its frames: what a filter writes where the verdict was REPLACE.

In: a version, the settings its frames were judged with, a memory domain. Out: the ``out`` of the frames asked for. What
always holds: every frame is judged, in order, from the first of its settings on, so that a kernel with state sees what it
saw; a frame that does not get the verdict it got before ends the replay, for then nobody knows which is right.

``decoding`` is a kernel of our own whose ``out`` is the frame: it brings encoded frames out of a sandbox, where alone they are
decoded.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Sequence

import numpy as np
import numpy.typing as npt

from ingest.ports import Domain, KernelRefused, LandingPad, LoadedBytes
from ingest.records import FrameGeometry, ObjectRecord
from kernels.attach import Attachment, attach, stages_of
from kernels.contract import REPLACE
from kernels.gate import admit
from kernels.layout.index import FrameIndex
from kernels.layout.placing import batch_frames_max, loadable, table_of
from kernels.passes import CATCHUP_BYTES, LoadedBatch, load, load_stored
from kernels.rawfilter.plan import CannotFilter
from kernels.sandbox import Batch, Sandbox, SandboxLimits
from kernels.wire import MAX_BATCH, UNREADABLE

OUT_BYTES_MAX = 32 << 20
"""``out`` of one batch, at least one frame."""
_AS_IT_IS = b"""
OUT = ("same", "same")

def frame(frame, params, state, index, out, feedback):
    pixels = frame.reshape(frame.size)
    copied = out.reshape(out.size)
    for i in range(pixels.size):
        copied[i] = pixels[i]
    return REPLACE
"""


@functools.cache
def decoding() -> Attachment:
    """Whose ``out`` is the frame as it is."""
    return attach(admit("decoding", _AS_IT_IS), {})


class Replay:
    """One version's frames, first to last. ``epochs``: (first frame, settings). Close it in any case."""

    def __init__(
        self,
        pad: LandingPad,
        zygote_socket: str,
        limits: SandboxLimits,
        record: ObjectRecord,
        layout: FrameGeometry | FrameIndex,
        domain: Domain,
        epochs: Sequence[tuple[int, Attachment]],
        wanted: npt.NDArray[np.bool_],
        out_bytes: int,
        *,
        skips: bool = False,
    ) -> None:
        """``wanted``: the frames that will be asked for. ``skips``: the kernel has no state, others need not be judged."""
        self._pad = pad
        self._zygote_socket = zygote_socket
        self._limits = limits
        self._record = record
        self._index = layout if isinstance(layout, FrameIndex) else None
        self._geometry = geometry = layout.geometry if isinstance(layout, FrameIndex) else layout
        self._domain = domain
        self._epochs = list(epochs)
        self._wanted = wanted
        self._skips = skips
        batch = min(CATCHUP_BYTES // geometry.frame_bytes, OUT_BYTES_MAX // out_bytes, MAX_BATCH)
        if self._index is not None:
            batch = min(batch, batch_frames_max(self._index))
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
            if self._skips and self._next < frame:
                self._next = frame
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
        end = len(self._wanted) if self._epoch + 1 == len(self._epochs) else self._epochs[self._epoch + 1][0]
        batch, loaded = await self._loaded(self._next, min(self._batch_frames, end - self._next))
        try:
            reply = await self._sandbox.run(batch)
        finally:
            if loaded is not None:
                loaded.release()
        wanted = self._wanted[self._next : self._next + batch.count]
        differing = np.flatnonzero(wanted & (reply.verdicts != REPLACE))
        if len(differing):
            frame, verdict = self._next + int(differing[0]), int(reply.verdicts[differing[0]])
            if verdict == UNREADABLE:
                raise CannotFilter(f"frame {frame} cannot be decoded")
            raise CannotFilter(f"frame {frame} was to be replaced, and is not when its kernel sees it again")
        self._outs, self._outs_first = reply.out, self._next
        self._next += batch.count

    async def _loaded(self, first: int, count: int) -> tuple[Batch, LoadedBytes | None]:
        """The frames' bytes in memory; fewer frames where theirs lie far apart."""
        index, frame_bytes = self._index, self._geometry.frame_bytes
        if index is None:
            start = self._geometry.origin + first * frame_bytes
            plain = await load(self._pad, self._record, start, count * frame_bytes, self._domain)
            return Batch(plain.region, plain.offset, frame_bytes, first, count, 0, collect_out=True), plain
        count = min(count, loadable(index, first, count, CATCHUP_BYTES))
        loaded, position = await load_stored(self._pad, self._record, index, first, count, self._domain)
        placed = LoadedBatch(loaded, first, count, (), position)
        table = table_of(0, index, first, count, (placed,))
        return Batch(0, 0, frame_bytes, first, count, 0, table=table, collect_out=True), loaded

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

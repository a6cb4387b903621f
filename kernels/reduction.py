"""All kernels of one object version: geometry, fan-out of frames, frame ledger, products.

In: the body's first bytes and whole frames from the stream while it arrives (``FrameReduction``), or a stored version
that is owed a reduction. Out: for each kernel exactly one of a product, a product that says why there is none, a failure
recorded in the catalogue, or nothing because the version is gone. What always holds: every batch is released exactly
once; nothing raises into the stream, whatever happens here; after ``done`` nothing of the version is left in the room.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from ingest.ports import BodyChange, Domain, FrameBatch, FrameScanner, StreamInfo
from ingest.records import (
    BLOCK_BYTES,
    FrameGeometry,
    FrameLedger,
    KernelEpoch,
    ObjectRecord,
)
from kernels.account import Account
from kernels.attach import Attachment, device_for, misfit
from kernels.conclusion import Conclusion, ConclusionHost
from kernels.epochs import KernelPass, Outcome, begins
from kernels.formats import NotFrames, npy_cut
from kernels.lane import Lane
from kernels.layout.index import FrameIndex
from kernels.layout.live import Later, LiveScan, sniff_live
from kernels.layout.stored import NO_IMAGE, Found
from kernels.passes import Hopeless, Postponed
from kernels.ranges import Ranges
from kernels.runs.gather import is_single
from kernels.sharing import SharedBatch
from kernels.verdicts import Verdicts

log = logging.getLogger("hiss.kernels")

FRAMES_MAX = 1 << 26
"""Frames of one version (a verdict of each is kept in memory)."""

P = ParamSpec("P")
R = TypeVar("R")


class ReductionHost(ConclusionHost, Protocol):
    """The host, as its reductions see it."""

    def lane(self, bucket: str, attachment: Attachment, geometry: FrameGeometry, domain: Domain) -> Lane: ...
    def spawn(self, work: Coroutine[object, object, None], name: str) -> None: ...
    def revision(self, bucket: str) -> int:
        """Changes when the bucket's kernels, their metadata or their arrays do."""
        ...

    def current(self, bucket: str, name: str) -> Attachment | None:
        """The kernel as it is attached now, also if it waits for something."""
        ...

    def unfit(self, info: StreamInfo, attachment: Attachment, reason: str) -> None:
        """What was put for the kernel does not fit a stream that runs, and is not used for it."""
        ...

    def seen(self, bucket: str, geometry: FrameGeometry) -> None:
        """Frames of this layout came to the bucket."""
        ...

    def catch_up(self, record: ObjectRecord, kernels: tuple[str, ...]) -> None: ...
    def gather(
        self,
        record: ObjectRecord,
        attachments: Sequence[Attachment],
        geometry: FrameGeometry,
        domain: Domain,
        frame: FrameBatch | None,
        index: FrameIndex | None = None,
    ) -> None:
        """The version is one frame: it goes into its run's state (kernels/runs). ``frame`` is released in any case."""
        ...

    def done(self, reduction: Reduction) -> None: ...


def _contained(
    method: Callable[Concatenate[Reduction, P], R],
) -> Callable[Concatenate[Reduction, P], R | None]:
    """Whatever goes wrong in the kernel room costs this version's products, never its stream."""

    def guarded(self: Reduction, /, *args: P.args, **kwargs: P.kwargs) -> R | None:
        try:
            return method(self, *args, **kwargs)
        except Exception:
            log.exception("the reduction of %s/%r failed", self.info.bucket, self.info.key)
            self.break_off("internal", "internal error of the kernel host")
            return None

    return guarded


class Single:
    """The one frame of a version, held until the version exists (the arena may take it back)."""

    def __init__(self) -> None:
        self._frame: FrameBatch | None = None

    def hold(self, frame: FrameBatch, over: bool) -> None:
        if over or self._frame is not None:
            frame.release()
        else:
            self._frame = frame

    def give(self) -> FrameBatch | None:
        frame, self._frame = self._frame, None
        return frame


class Reduction:
    """Implements ``ingest.ports.FrameReduction``."""

    def __init__(
        self,
        host: ReductionHost,
        info: StreamInfo,
        attachments: Sequence[Attachment],
        domain: Domain,
        late: Collection[str] = (),
    ) -> None:
        """``late``: kernels that do not judge the frames as they arrive, but once the version is stored."""
        self.info = info
        self.domain = domain
        self.attachments = tuple(attachments)
        self._host = host
        self._geometry: FrameGeometry | None = None
        self._index: FrameIndex | None = None
        self._scan: LiveScan | None = None
        self._head = b""
        self._later = False
        self._trouble: Hopeless | None = None
        # Kernels that filter the raw data decide alone what becomes of a frame.
        ruling = [row for row, attachment in enumerate(self.attachments) if attachment.raw != "all"]
        self._account = Account(Verdicts(len(self.attachments), ruling or None))
        self._passes: dict[int, KernelPass] = {}
        """By row; not of kernels that wait for something."""
        self._waiting: dict[int, str] = {}
        """Row -> what the kernel waits for."""
        self._late = {row: [(0, one)] for row, one in enumerate(self.attachments) if one.name in late}
        """Row -> (first frame, settings) with which its frames will be judged."""
        self._settings: dict[str, Sequence[tuple[int, Attachment]]] = {}
        self._revision = host.revision(info.bucket)
        self._when_stopped: Callable[[int], None] | None = None
        self._announced = Ranges()
        self._started_ns = time.time_ns()
        self._unfinished = len(self.attachments)
        self._single: Single | None = None
        self._over = False
        self._arriving = False
        self.is_committed = False
        self.finished = asyncio.Event()
        domain.hold()

    @property
    def kernels(self) -> tuple[str, ...]:
        return tuple(attachment.kernel.name for attachment in self.attachments)

    # -- the stream

    def sniff(self, head: memoryview, *, complete: bool) -> FrameGeometry | FrameScanner | int | None:
        """See ``FrameReduction``. Asks for at most HEADER_BYTES_MAX bytes."""
        return self._sniff(head, complete=complete)

    @_contained
    def _sniff(self, head: memoryview, *, complete: bool) -> FrameGeometry | FrameScanner | int | None:
        found = sniff_live(head, self.info, self._indexed, self._broken, complete=complete)
        if isinstance(found, int):
            return found
        if isinstance(found, Later):
            self._later = True
            return None
        if isinstance(found, LiveScan):
            self._scan = found
            return found
        if self.settle(found) is None:
            return None
        assert self._geometry is not None
        # Of an .npy: its header.
        self._head = bytes(head[: self._geometry.origin])
        self._opened()
        return self._geometry

    def _opened(self) -> None:
        self._arriving = True
        self._host.context.feedback.stream_opened(self.info.bucket, self.kernels)

    def _indexed(self, index: FrameIndex) -> None:
        """The scanner has seen what the frames are like."""
        if not self._over and self.settle(index) is not None:
            self._opened()

    def _broken(self, reason: str) -> None:
        self.break_off("format", reason)

    def _arrived(self) -> None:
        """No further frame is to come: whoever listens to the feedback must not take silence for a failure."""
        if self._arriving:
            self._arriving = False
            self._host.context.feedback.stream_closed(self.info.bucket, self.kernels)

    def settle(self, found: FrameGeometry | FrameIndex | NotFrames) -> FrameGeometry | None:
        """It is known how the frames lie (or that there are none): open a pass for each kernel."""
        if isinstance(found, FrameIndex):
            self._index = found
            found = found.geometry
        elif isinstance(found, FrameGeometry):
            found = self._within_limits(found)
        if isinstance(found, NotFrames):
            self._trouble = Hopeless("format", found.reason)
            return None
        self._geometry = found
        self._host.seen(self.info.bucket, found)
        reasons = {row: one.owed or misfit(one, found) for row, one in enumerate(self.attachments)}
        self._waiting = {row: reason for row, reason in reasons.items() if reason}
        if self._is_single(found):
            self._single = Single()
            return found
        for row, attachment in enumerate(self.attachments):
            if row in self._waiting or row in self._late:
                continue
            self._passes[row] = KernelPass(
                self._host.context,
                self._settings.get(attachment.name) or ((0, attachment),),
                functools.partial(self._lane, found),
                found,
                self._account.verdicts,
                row,
                self.info.bucket,
                self.info.key,
                self._stopped,
                self._index,
            )
        return found

    def _lane(self, geometry: FrameGeometry, attachment: Attachment) -> Lane:
        settled = device_for(attachment, encoded=self._index is not None)
        return self._host.lane(self.info.bucket, settled, geometry, self.domain)

    def when_stopped(self, stopped: Callable[[int], None]) -> None:
        self._when_stopped = stopped

    def _stopped(self, frame: int) -> None:
        """A kernel said STOP: while the stream arrives, that is the stream's end."""
        tell, self._when_stopped = self._when_stopped, None
        if tell is not None and not self.is_committed:
            tell(frame)

    def _notice_changes(self) -> None:
        """Parameters or arrays that were put since: they hold from the next frame on."""
        revision = self._host.revision(self.info.bucket)
        if revision == self._revision:
            return
        self._revision = revision
        for row in (*self._passes, *self._late):
            now = self._host.current(self.info.bucket, self.attachments[row].name)
            if now is None or self._geometry is None:
                continue
            if reason := now.owed or misfit(now, self._geometry):
                self._host.unfit(self.info, now, reason)
            elif row in self._passes:
                self._passes[row].change(now)
            elif begins(self._late[row][-1][1], now, len(self._late[row])):
                self._late[row].append((self._announced.stop, now))

    @property
    def filters(self) -> dict[str, str]:
        return {one.name: one.raw for one in self.attachments if one.raw != "all"}

    @property
    def epochs(self) -> tuple[KernelEpoch, ...]:
        judged = [epoch for kernel_pass in self._passes.values() for epoch in kernel_pass.epochs]
        late = [KernelEpoch(one.name, first, one.uses) for epochs in self._late.values() for first, one in epochs]
        return (*judged, *late)

    def _is_single(self, geometry: FrameGeometry) -> bool:
        if self.info.length is None:
            return False
        if self._index is None:
            return is_single(geometry, self.info.length)
        # A body that ends with the message that holds its first frame.
        return self._scan is not None and self._scan.position >= self.info.length

    def _within_limits(self, found: FrameGeometry) -> FrameGeometry | NotFrames:
        # Reading back takes up to a block more, for alignment.
        room = self.domain.region_bytes - BLOCK_BYTES
        if found.frame_bytes > room:
            return NotFrames(
                f"a frame of {found.frame_bytes} bytes is larger than the {room} bytes kernels can read at once"
            )
        frames = found.count
        if self.info.length is not None:
            most = max(0, self.info.length - found.origin) // found.frame_bytes
            frames = most if frames is None else min(frames, most)
        if frames is not None and frames > FRAMES_MAX:
            return NotFrames(f"{frames} frames are more than the {FRAMES_MAX} of one object")
        return found

    def offer(self, batch: FrameBatch) -> None:
        if self._single is not None:
            self._single.hold(batch, self._over)
            return
        shared = SharedBatch(batch, max(1, len(self._passes)))
        idle = self._over or not (self._passes or self._late)
        if idle or not self._fits(batch.first_frame + batch.count) or self._trouble:
            shared.expire()
            return
        try:
            self._notice_changes()
            self._announced.add(batch.first_frame, batch.count)
            if not self._passes:
                shared.expire()  # all its kernels are late
                return
            for kernel_pass, share in zip(self._passes.values(), shared.shares, strict=True):
                kernel_pass.offer(share)
        except Exception:
            log.exception("the reduction of %s/%r failed", self.info.bucket, self.info.key)
            self.break_off("internal", "internal error of the kernel host")
            shared.expire()

    def _fits(self, frames: int) -> bool:
        if frames <= FRAMES_MAX:
            return True
        self.break_off("format", f"more than {FRAMES_MAX} frames in one object")
        return False

    def lagging(self, first_frame: int, count: int) -> None:
        self._lagging(first_frame, count)

    @_contained
    def _lagging(self, first_frame: int, count: int) -> None:
        if not self._fits(first_frame + count):
            return
        if not self.is_committed:
            self._notice_changes()
        for first, size in self._unannounced(first_frame, count):
            self._announced.add(first, size)
            for kernel_pass in self._passes.values():
                kernel_pass.lag(first, size)

    def _unannounced(self, first_frame: int, count: int) -> list[tuple[int, int]]:
        missing = Ranges()
        missing.add(first_frame, count)
        for first, size in self._announced:
            missing.remove(first, size)
        return list(missing)

    def cut_short(self, length: int) -> BodyChange | None:
        return self._cut_short(length)

    @_contained
    def _cut_short(self, length: int) -> BodyChange | None:
        if self._scan is not None:
            return self._scan.cut_short()
        geometry = self._geometry
        if geometry is None or geometry.count is None or not self._head:
            return None
        frames = max(0, length - geometry.origin) // geometry.frame_bytes
        after = npy_cut(self._head, frames) if 1 < geometry.count > frames else None
        return None if after is None else BodyChange(0, self._head, after)

    def ledger(self, received: int, trailing_bytes: int, discarded_bytes: int | None = None) -> FrameLedger:
        self._account.received = received
        self._account.trailing_bytes = trailing_bytes
        self._account.discarded_bytes = discarded_bytes
        if self._scan is not None:
            self._account.gaps = self._scan.gaps()
        return self._counts()

    def _counts(self) -> FrameLedger:
        """The ledger as of now."""
        stops = [one.stopped_at for one in self._passes.values() if one.stopped_at is not None]
        return self._account.ledger(None if self._geometry is None else self._geometry.count, stops)

    def committed(self, record: ObjectRecord) -> None:
        if self._over:
            return
        self.is_committed = True
        self._arrived()
        if self._scan is not None and self._index is None and self._trouble is None:
            self._trouble = Hopeless("format", NO_IMAGE)
        if self._later:
            # Its structure is read now that it can be looked at anywhere.
            self._end()
            self._host.catch_up(record, self.kernels)
            return
        if self._single is not None:
            assert self._geometry is not None
            frame = self._single.give()
            out = self._waiting.keys() | self._late.keys()
            ready = [one for row, one in enumerate(self.attachments) if row not in out]
            self._host.gather(record, ready, self._geometry, self.domain, frame, self._index)
            for row, reason in self._waiting.items():
                late = self._host.postpone(record, self.attachments[row].name, Postponed(reason, waits=True))
                self._host.spawn(late, "postpone")
            self._end()
            self._reduce_late(record)
            return
        # Whatever the stream did not announce is read back, too.
        self._lagging(0, self._account.received)
        frames = self._account.received
        conclusion = Conclusion(self._host, self._geometry, frames, self._index, self._started_ns, self._counts)
        for row, attachment in enumerate(self.attachments):
            name = f"reduce {record.bucket}/{attachment.kernel.name}"
            self._host.spawn(self._finish(conclusion, row, record), name)

    def aborted(self) -> None:
        """Also right after the end: then it changes nothing."""
        self._end()

    def break_off(self, kind: str, reason: str) -> None:
        """No frame is judged from here on. ``kind``: format, or internal. Idempotent."""
        if self._trouble is None:
            self._trouble = Hopeless(kind, reason)
        for kernel_pass in self._passes.values():
            kernel_pass.refused(kind, reason)

    def _end(self) -> None:
        if self._over:
            return
        self._over = True
        self._arrived()
        if self._single is not None and (frame := self._single.give()) is not None:
            frame.release()
        for kernel_pass in self._passes.values():
            kernel_pass.leave()
        self.domain.drop()
        self.finished.set()
        self._host.done(self)

    # -- a version that is stored already

    def begin_stored(
        self,
        record: ObjectRecord,
        found: Found,
        settings: Mapping[str, Sequence[tuple[int, Attachment]]],
        *,
        partial: bool,
    ) -> None:
        """Reduce a stored version: every frame lags. ``settings``: (first frame, settings) of each kernel's epochs.
        ``partial``: other kernels' verdicts are in the ledger already."""
        self._settings = dict(settings)
        if record.ledger is not None and record.ledger.truncated:
            self._account.discarded_bytes = record.ledger.discarded_bytes
        if self.settle(found.layout) is not None:
            self._account.received = found.frames(record.length)
            self._account.trailing_bytes = found.trailing_bytes
            self._account.gaps = found.gaps
            ledger = record.ledger
            if partial and ledger is not None and ledger.kept + ledger.dropped + ledger.replaced > 0:
                self._account.prior = ledger
        self.committed(record)

    # -- the end of one kernel

    async def _finish(self, conclusion: Conclusion, row: int, record: ObjectRecord) -> None:
        async def judged() -> Outcome:
            if self._trouble is not None:
                raise self._trouble
            if row in self._waiting:
                raise Postponed(self._waiting[row], waits=True)
            return await self._passes[row].finish(record, self._account.received, self.domain)

        try:
            if row not in self._late or row in self._waiting or self._trouble is not None:
                await conclusion.conclude(self.attachments[row], record, judged)
        finally:
            self._unfinished -= 1
            if self._unfinished == 0:
                self._end()
                self._reduce_late(record)

    def _reduce_late(self, record: ObjectRecord) -> None:
        if self._late and self._trouble is None:
            self._host.catch_up(
                record, tuple(self.attachments[row].name for row in self._late if row not in self._waiting)
            )

"""All kernels of one object version: geometry, fan-out of frames, frame ledger, products.

In: the body's first bytes and whole frames from the stream while it arrives (``FrameReduction``), or a stored version
that is owed a reduction. Out: for each kernel exactly one of a product, a product that says why there is none, a failure
recorded in the catalogue, or nothing because the version is gone. What always holds: every batch is released exactly
once; nothing raises into the stream, whatever happens here; after ``done`` nothing of the version is left in the room.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from ingest.crashpoints import crashpoint
from ingest.errors import IngestError, NoSuchBucket, NoSuchKey, StaleVersion
from ingest.ports import BodyChange, Catalog, Domain, FrameBatch, FrameScanner, LandingPad, StreamInfo
from ingest.records import (
    BLOCK_BYTES,
    CommitObject,
    FrameGeometry,
    FrameLedger,
    KernelEpoch,
    ObjectRecord,
    PartialMember,
    PartialOf,
)
from ingest.runs import run_of
from kernels import product
from kernels.attach import PRODUCT_PREFIX, Attachment, device_for, misfit
from kernels.epochs import KernelPass, Outcome
from kernels.formats import NotFrames, npy_cut
from kernels.lane import TRANSIENT, Lane
from kernels.layout.index import FrameIndex
from kernels.layout.live import Later, LiveScan, sniff_live
from kernels.layout.stored import NO_IMAGE, Found
from kernels.lineage import Epoch, Input, Lineage
from kernels.passes import Gone, Hopeless, PassContext, Postponed
from kernels.ranges import Ranges
from kernels.rawfilter.packed import pack
from kernels.runs.gather import is_single
from kernels.runs.handover import Handover
from kernels.runs.names import KEY_BYTES_MAX, clashes, group_of
from kernels.runs.partial import Partial, of_version, origin_of
from kernels.sharing import SharedBatch
from kernels.verdicts import Verdicts

log = logging.getLogger("hiss.kernels")

FRAMES_MAX = 1 << 26
"""Frames of one version (a verdict of each is kept in memory)."""
PRODUCT_BYTES_MAX = 512 << 20
STORE_BACKOFF_S = (0.1, 0.5, 1.0, 2.0, 5.0)
"""Waits between attempts to store a product; then the sweep tries again later."""

P = ParamSpec("P")
R = TypeVar("R")


class ReductionHost(Protocol):
    """The host, as its reductions see it."""

    catalog: Catalog
    pad: LandingPad
    context: PassContext
    handover: Handover

    def lane(self, bucket: str, attachment: Attachment, geometry: FrameGeometry, domain: Domain) -> Lane: ...
    def spawn(self, work: Coroutine[object, object, None], name: str) -> None: ...
    async def in_thread(self, work: Callable[[], R]) -> R: ...
    async def postpone(self, record: ObjectRecord, kernel: str, reason: Postponed) -> None:
        """The product stays owed; the sweep comes back to it."""
        ...

    def revision(self, bucket: str) -> int:
        """Changes when the bucket's kernels, their metadata or their arrays do."""
        ...

    def attached(self, bucket: str, name: str) -> Attachment | None:
        """The kernel as it is attached now, if it can run."""
        ...

    def seen(self, bucket: str, geometry: FrameGeometry) -> None:
        """Frames of this layout came to the bucket."""
        ...

    def succeeded(self, bucket: str, attachment: Attachment) -> None: ...
    def catch_up(self, record: ObjectRecord, kernels: tuple[str, ...]) -> None: ...
    def device(self, bucket: str, attachment: Attachment, geometry: FrameGeometry | None) -> str:
        """What the kernel runs on, as lineage says it."""
        ...

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
        self, host: ReductionHost, info: StreamInfo, attachments: Sequence[Attachment], domain: Domain
    ) -> None:
        self.info = info
        self.domain = domain
        self.attachments = tuple(attachments)
        self._host = host
        self._geometry: FrameGeometry | None = None
        self._index: FrameIndex | None = None
        self._scan: LiveScan | None = None
        self._head = b""
        self._later = False
        self._gaps: tuple[tuple[int, int], ...] = ()
        self._trouble: Hopeless | None = None
        # Kernels that filter the raw data decide alone what becomes of a frame.
        ruling = [row for row, attachment in enumerate(self.attachments) if attachment.raw != "all"]
        self._verdicts = Verdicts(len(self.attachments), ruling or None)
        self._passes: dict[int, KernelPass] = {}
        """By row; not of kernels that wait for something."""
        self._waiting: dict[int, str] = {}
        """Row -> what the kernel waits for."""
        self._settings: dict[str, Sequence[tuple[int, Attachment]]] = {}
        self._revision = host.revision(info.bucket)
        self._when_stopped: Callable[[int], None] | None = None
        self._truncated_bytes: int | None = None
        self._announced = Ranges()
        self._received = 0
        self._trailing_bytes = 0
        self._prior: FrameLedger | None = None
        self._started_ns = time.time_ns()
        self._amending = asyncio.Lock()
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
            if row in self._waiting:
                continue
            self._passes[row] = KernelPass(
                self._host.context,
                self._settings.get(attachment.name) or ((0, attachment),),
                functools.partial(self._lane, found),
                found,
                self._verdicts,
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
        for kernel_pass in self._passes.values():
            now = self._host.attached(self.info.bucket, kernel_pass.attachment.name)
            if now is not None and self._geometry is not None and not misfit(now, self._geometry):
                kernel_pass.change(now)

    @property
    def filters(self) -> dict[str, str]:
        return {one.name: one.raw for one in self.attachments if one.raw != "all"}

    @property
    def epochs(self) -> tuple[KernelEpoch, ...]:
        return tuple(epoch for kernel_pass in self._passes.values() for epoch in kernel_pass.epochs)

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
        if self._over or not self._passes or not self._fits(batch.first_frame + batch.count) or self._trouble:
            shared.expire()
            return
        try:
            self._notice_changes()
            self._announced.add(batch.first_frame, batch.count)
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
        self._received = received
        self._trailing_bytes = trailing_bytes
        self._truncated_bytes = discarded_bytes
        if self._scan is not None:
            self._gaps = self._scan.gaps()
        return self._counts()

    def _counts(self) -> FrameLedger:
        """The ledger as of now; its parts always add up to what was received."""
        received, verdicts, prior = self._received, self._verdicts, self._prior
        stops = [one.stopped_at for one in self._passes.values() if one.stopped_at is not None]
        kept, dropped, replaced, after_stop = verdicts.kept, verdicts.dropped, verdicts.replaced, verdicts.after_stop
        if prior is not None:
            # Other kernels judged these frames before; what any of them kept stays kept.
            kept, dropped = max(kept, prior.kept), min(dropped, prior.dropped)
            replaced = min(max(replaced, prior.replaced), received - kept - dropped)
            after_stop = min(max(after_stop, prior.after_stop), received - kept - dropped - replaced)
            stops += [prior.stopped_at] if prior.stopped_at is not None else []
        truncated = self._truncated_bytes is not None
        declared = self._geometry.count if self._geometry is not None else None
        # What was cut off behind a STOP is no gap: it was sent, and was not wanted.
        missing = declared - received if declared is not None and not truncated else 0
        return FrameLedger(
            received=received,
            kept=kept,
            dropped=dropped,
            replaced=replaced,
            stored=received,
            unreduced=max(0, received - kept - dropped - replaced - after_stop),
            gaps=((received, missing),) if missing > 0 else self._gaps,
            trailing_bytes=self._trailing_bytes,
            stopped_at=min(stops, default=None),
            after_stop=after_stop,
            truncated=truncated,
            discarded_bytes=self._truncated_bytes or 0,
        )

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
            ready = [one for row, one in enumerate(self.attachments) if row not in self._waiting]
            self._host.gather(record, ready, self._geometry, self.domain, frame, self._index)
            for row, reason in self._waiting.items():
                late = self._host.postpone(record, self.attachments[row].name, Postponed(reason, waits=True))
                self._host.spawn(late, "postpone")
            self._end()
            return
        # Whatever the stream did not announce is read back, too.
        self._lagging(0, self._received)
        for row, attachment in enumerate(self.attachments):
            name = f"reduce {record.bucket}/{attachment.kernel.name}"
            self._host.spawn(self._finish(row, record), name)

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
            self._truncated_bytes = record.ledger.discarded_bytes
        if self.settle(found.layout) is not None:
            self._received = found.frames(record.length)
            self._trailing_bytes = found.trailing_bytes
            self._gaps = found.gaps
            ledger = record.ledger
            if partial and ledger is not None and ledger.kept + ledger.dropped + ledger.replaced > 0:
                self._prior = ledger
        self.committed(record)

    # -- the end of one kernel

    async def _finish(self, row: int, record: ObjectRecord) -> None:
        attachment = self.attachments[row]
        name = attachment.kernel.name
        try:
            if self._trouble is not None:
                raise self._trouble
            if row in self._waiting:
                raise Postponed(self._waiting[row], waits=True)
            outcome = await self._passes[row].finish(record, self._received, self.domain)
            await self._store(attachment, record, outcome)
            self._host.succeeded(record.bucket, attachment)
        except Gone:
            log.info("kernel %s: %s/%r was deleted or replaced before its product", name, record.bucket, record.key)
        except Hopeless as trouble:
            await self._give_up(attachment, record, trouble)
        except Postponed as reason:
            await self._host.postpone(record, name, reason)
        except IngestError as error:
            await self._host.postpone(record, name, Postponed(f"{type(error).__name__}: {error}"))
        except Exception as error:
            log.exception("kernel %s over %s/%r failed", name, record.bucket, record.key)
            await self._begin_anew(record, name, f"internal error: {type(error).__name__}", counted=True)
        finally:
            self._unfinished -= 1
            if self._unfinished == 0:
                self._end()

    async def _give_up(self, attachment: Attachment, record: ObjectRecord, trouble: Hopeless) -> None:
        """Format and compile errors are the answer to this version: the product says so. Others are failures."""
        name = attachment.kernel.name
        tally = self._host.context.tally
        log.warning("kernel %s cannot reduce %s/%r: %s", name, record.bucket, record.key, trouble)
        if trouble.kind in TRANSIENT:
            await self._begin_anew(record, name, str(trouble), counted=trouble.kind == "internal")
            return
        tally.given_up(self._counts().unreduced)
        if trouble.kind not in ("format", "compile"):
            await self._say_failed(record, name, f"{trouble.kind}: {trouble}", give_up=True)
            return
        if trouble.kind == "format":
            tally.error("format")
        try:
            await self._store(attachment, record, str(trouble))
        except Gone:
            return
        except IngestError as error:
            await self._host.postpone(record, name, Postponed(f"{type(error).__name__}: {error}"))
        except Postponed as reason:
            await self._host.postpone(record, name, reason)

    async def _begin_anew(self, record: ObjectRecord, kernel: str, reason: str, *, counted: bool) -> None:
        """Leave the product to the sweep; ``counted``: only so often, for it may be this version that breaks us."""
        if counted:
            self._host.context.tally.error("crash")
            await self._say_failed(record, kernel, reason, give_up=False)
        await self._host.postpone(record, kernel, Postponed(reason))

    async def _say_failed(self, record: ObjectRecord, kernel: str, error: str, *, give_up: bool) -> None:
        try:
            if give_up:
                await self._amend(record)
            await self._host.catalog.reduction_failed(record.object_id, kernel, error[:1000], give_up=give_up)
        except (Gone, StaleVersion, NoSuchKey, NoSuchBucket):
            return
        except IngestError as refusal:
            # The reduction stays owed; the sweep comes back to it.
            log.warning("kernel %s: the failure over %r was not recorded: %s", kernel, record.key, refusal)

    async def _amend(self, record: ObjectRecord) -> FrameLedger:
        async with self._amending:
            ledger = self._counts()
            try:
                if ledger != record.ledger:
                    await self._host.catalog.amend_ledger(record.object_id, ledger)
            except (StaleVersion, NoSuchKey, NoSuchBucket):
                raise Gone from None
            return ledger

    async def _store(self, attachment: Attachment, record: ObjectRecord, outcome: Outcome | str) -> None:
        """The ledger first: a crash between the two leaves the product owed, and doing both again is harmless."""
        ledger = await self._amend(record)
        kernel = attachment.kernel
        epochs = ((0, attachment),) if isinstance(outcome, str) else outcome.epochs
        source = Input(
            record,
            self._geometry,
            self._received,
            tuple(Epoch(first_frame, number) for number, (first_frame, _) in enumerate(epochs)),
            "" if self._index is None else self._index.description,
        )
        lineage = Lineage(
            kernel=kernel,
            match=attachment.match,
            settings=tuple(settings.settings for _, settings in epochs),
            inputs=(source,),
            started_ns=self._started_ns,
            ended_ns=time.time_ns(),
            before=tuple(stage.kernel for stage in attachment.before),
            device=self._host.device(
                record.bucket, device_for(attachment, encoded=self._index is not None), self._geometry
            ),
        )
        found: product.Findings | str
        if isinstance(outcome, str):
            found = outcome
        else:
            found = product.Findings(
                state=outcome.state,
                verdicts=outcome.verdicts,
                ledger=ledger,
                feedback_events=outcome.feedback_events,
                unreadable=outcome.unreadable,
                result=outcome.result,
                rows=outcome.rows,
                rows_left_out=outcome.rows_left_out,
            )
            if product.estimated_bytes(found) > PRODUCT_BYTES_MAX:
                found = f"the product would be larger than {PRODUCT_BYTES_MAX} bytes"
        body = await self._host.in_thread(lambda: product.build(lineage, found))
        request = CommitObject(
            bucket=record.bucket,
            key=product_key(kernel.name, record.key),
            object_id=secrets.token_bytes(16),
            length=len(body),
            etag="",
            crc64nvme=0,
            owner=record.owner,
            extents=(),
            headers={"content-type": product.CONTENT_TYPE},
            metadata={
                "hiss-kernel": kernel.name,
                "hiss-kernel-sha256": kernel.sha256,
                "hiss-source-object-id": record.object_id.hex(),
            },
            reduces=(record.object_id, kernel.name),
            verdicts=b"" if isinstance(outcome, str) or attachment.raw == "all" else pack(outcome.verdicts),
            partial=None if isinstance(found, str) else self._partial_of(record, [one for _, one in epochs]),
        )
        crashpoint("product-before")
        if request.partial is not None and self._host.handover.keeps(record.bucket, request.partial.run, kernel.name):
            assert not isinstance(found, str)
            self._host.handover.give(request.object_id, self._as_partial(record, epochs, found))
        try:
            await self._commit(request, body)
        except BaseException:
            self._host.handover.take(request.object_id)
            raise
        self._host.context.tally.product()

    def _as_partial(
        self, record: ObjectRecord, epochs: Sequence[tuple[int, Attachment]], found: product.Findings
    ) -> Partial:
        return of_version(
            record,
            epochs[0][1].kernel,
            origin_of(*(attachment for _, attachment in epochs)),
            state=dict(found.state),
            verdicts=found.verdicts,
            frames=found.ledger.received,
            gaps=found.ledger.gaps,
            epochs=tuple((first_frame, number) for number, (first_frame, _) in enumerate(epochs)),
            rows=found.rows,
            feedback_events=found.feedback_events,
            rows_left_out=found.rows_left_out,
        )

    @staticmethod
    def _partial_of(record: ObjectRecord, epochs: Sequence[Attachment]) -> PartialOf:
        member = PartialMember(record.object_id)
        return PartialOf(epochs[0].name, run_of(record.key), group_of(*epochs), (member,))

    async def _commit(self, request: CommitObject, body: memoryview) -> None:
        for wait_s in STORE_BACKOFF_S:
            try:
                await self._host.pad.store(request, body)
                return
            except (StaleVersion, NoSuchKey, NoSuchBucket):
                raise Gone from None
            except IngestError as error:
                log.warning("a product was not stored (%s: %s); trying again", type(error).__name__, error)
            await asyncio.sleep(wait_s)
        raise Postponed("the product could not be stored")


def product_key(kernel: str, key: bytes) -> bytes:
    """``_products/<kernel>/<key>.nxs``; one too long, or like a run's product, is named by its SHA-256 under ``.long/``."""
    prefix = PRODUCT_PREFIX + kernel.encode() + b"/"
    plain = prefix + key + b".nxs"
    if len(plain) <= KEY_BYTES_MAX and not clashes(key):
        return plain
    return prefix + b".long/" + hashlib.sha256(key).hexdigest().encode() + b".nxs"

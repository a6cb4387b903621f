"""The kernel host of a worker: opens reductions for streams, owns the lanes, pays the reductions that are owed.

In: streams that open (``FrameHost``), stored versions that were not reduced yet, submitted kernels to check. Out:
reductions and, through them, products. What always holds: every call from ingest returns at once and never raises; a
kernel that fails three times in a row is disabled in its bucket until another source is put; what a dead worker left
unreduced is found by the sweep; after ``close`` no process and no hold on a memory region is left.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from ingest.cluster.members import Members
from ingest.counters import Counters
from ingest.errors import IngestError, NoSuchBucket
from ingest.ports import (
    Catalog,
    Domain,
    FeedbackSink,
    FrameBatch,
    FrameReduction,
    KernelRefused,
    LandingPad,
    StreamInfo,
)
from ingest.records import FrameGeometry, ObjectRecord
from kernels import notices, pace
from kernels.admission import Room, SlotAdmission
from kernels.attach import Attachment, epochs_of, is_internal, misfit
from kernels.clearance import Clearance
from kernels.dryrun import DryRuns
from kernels.formats import declared_geometry
from kernels.lane import Lane, LaneKey
from kernels.layout.detect import Kind, kind_of
from kernels.layout.index import FrameIndex
from kernels.notices import Notices
from kernels.offload.device import Plans
from kernels.owed import Owed, OwedLimits
from kernels.pace import Paces
from kernels.pacing import Pacing
from kernels.passes import PassContext, Postponed
from kernels.pool import LanePool
from kernels.published import beside
from kernels.rawfilter.work import RawFilter
from kernels.reduction import Reduction
from kernels.registry import Registry
from kernels.runs.gather import Gatherer, is_single
from kernels.runs.handover import Handover
from kernels.runs.keeper import RunKeeper
from kernels.runs.keeping import Keeping
from kernels.runs.ledger import OneFrame, prior_of
from kernels.runs.tray import FRAME_BYTES_MAX, Tray
from kernels.sandbox import SandboxFailed, SandboxLimits
from kernels.sharing import SharedBatch
from kernels.standing import Verdict
from kernels.stored import StoredLayouts, info_of, single
from kernels.strikes import Strikes
from kernels.submission import Submissions
from kernels.tally import Tally
from kernels.watch import Watch

T = TypeVar("T")

log = logging.getLogger("hiss.kernels")

WARM_MAX = 4
"""Sandboxes started before their first frame, each time the kernels of a bucket change."""
GAUGE_S = 1.0
"""How often the lag gauge is set."""


@dataclasses.dataclass(frozen=True, slots=True)
class HostLimits:
    """Bounds of one worker's kernel room."""

    workers: int = 1
    """Workers of the node, each with a host like this: they share out the runs."""
    cores: int = 1
    """Of the node, that kernels may count on beside a reserved stream."""
    processes_max: int = 8
    """Sandboxes at once; a further kernel waits for an idle one to be closed (its frames lag meanwhile)."""
    idle_s: float = 120.0
    """How long a sandbox without streams is kept warm."""
    strikes_max: int = 3
    """Failures in a row, without a product in between, that disable a kernel."""
    attempts_max: int = 5
    """Internal errors over one owed product before it is given up; shortages do not count."""
    catchups_max: int = 2
    """Versions that landed without their kernels, reduced at once."""
    pieces_max: int = 4
    """Pieces read back from disk in memory at once (passes.CATCHUP_BYTES or one frame each): catch-up must not take the
    memory that live streams need."""
    backlog_max: int = 4096
    """Owed versions remembered between sweeps."""
    grace_s: float = 60.0
    """How long an owed product that this worker did not begin is left to whoever did."""
    postpone_s_max: float = 600.0
    """Longest wait before a postponed product is tried again; the first is ``sweep_s``, then twice as long each time."""
    sweep_s: float = 15.0
    """Between two looks for owed reductions and idle sandboxes."""
    sandbox: SandboxLimits = dataclasses.field(default_factory=SandboxLimits)


class KernelHost:
    """Implements ``ingest.ports.FrameHost``. Belongs to one event loop."""

    def __init__(
        self,
        catalog: Catalog,
        pad: LandingPad,
        zygote_socket: str,
        feedback: FeedbackSink,
        counters: Counters,
        slot: int,
        limits: HostLimits,
        clearance: Clearance,
        strikes_file: Path | None = None,
        members: Members | None = None,
    ) -> None:
        """``strikes_file``: where to say which kernels fail; see kernels/strikes.py. ``members``: of a cluster, this node
        among them."""
        self.catalog = catalog
        self.pad = pad
        self.zygote_socket = zygote_socket
        self.counters = counters
        self.sandbox_limits = limits.sandbox
        self.scratch = None if strikes_file is None else strikes_file.parent
        self._slot = slot
        self._limits = limits
        self._clearance = clearance
        self.tally = self._tally = Tally(counters)
        self._notices = Notices(beside(strikes_file, notices.FILE_PATTERN))
        self.plans = Plans(self._notices)
        self._registry = Registry(catalog, pad)
        self._watch = Watch(catalog, self._registry, self._changed)
        paces = Paces(beside(strikes_file, pace.FILE_PATTERN))
        node = None if members is None else lambda: members.look().me
        self._pacing = Pacing(
            paces,
            DryRuns(zygote_socket, paces, limits.sandbox),
            SlotAdmission(catalog, paces, Room(limits.cores, limits.workers), node),
            self._watch.layouts,
        )
        self._submissions = Submissions(catalog, zygote_socket, self._registry, clearance, limits.sandbox, self._pacing)
        self._strikes = Strikes(limits.strikes_max, strikes_file)
        self._reductions: set[Reduction] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._sweep_now = asyncio.Event()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="product")
        self._pool = LanePool(limits.processes_max, limits.idle_s, self._tally.sandboxes, self.spawn)
        self.context = PassContext(pad, feedback, self._tally, asyncio.Semaphore(limits.pieces_max))
        self._members = members
        nodes = None if members is None else lambda: (members.look().me, members.reducing())
        self.handover = Handover(Keeping(slot, limits.workers, nodes))
        self._gatherer = Gatherer(self)
        self._stored = StoredLayouts(pad, zygote_socket, limits.sandbox, clearance)
        self.single = self._stored.single
        owed = OwedLimits(
            limits.attempts_max, limits.backlog_max, limits.grace_s, limits.sweep_s, limits.postpone_s_max
        )
        self._owed = Owed(self, slot, owed, self._gatherer.holds)
        self._tray = Tray(pad)
        self._keeper = RunKeeper(self)
        self._filter = RawFilter(self, slot, self._tally, self._stored.of)

    async def start(self) -> None:
        """Find out whether kernels may run here, and begin to pay what is owed. Returns at once."""
        self.spawn(self._clearance.obtain(), "self-test of the sandbox")
        self.spawn(self._sweep(), "kernel sweep")
        self.spawn(self._keeper.run(), "keeper of runs")
        self.spawn(self._filter.run(), "raw filter")
        self.spawn(self._watch.run(), "kernel watch")
        for _ in range(self._limits.catchups_max):
            self.spawn(self._pay(), "catch up")

    async def close(self, timeout_s: float = 2.0) -> None:
        """Let committed reductions finish for so long, then end every process; the rest stays owed in the catalogue."""
        self._closed = True
        self._owed.close()
        finishing: list[asyncio.Future[object]] = [
            asyncio.ensure_future(r.finished.wait()) for r in self._reductions if r.is_committed
        ]
        finishing.append(asyncio.ensure_future(self._gatherer.close(timeout_s)))
        if finishing:
            await asyncio.wait(finishing, timeout=timeout_s)
        for waiter in finishing:
            waiter.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for reduction in list(self._reductions):
            reduction.aborted()
        await self._pool.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._thread.shutdown(wait=True)

    # -- FrameHost

    async def prepare(self, bucket: str) -> None:
        """Know the bucket's kernels as of now, so that ``open`` and ``kernels_for`` see every kernel put before. Never
        raises; costs a comparison while nothing changed."""
        await self._pacing.prepare(bucket)
        if self._registry.fresh(bucket):
            return
        try:
            await self._registry.refresh(bucket)
        except NoSuchBucket:
            return
        except IngestError as error:
            log.warning("the kernels of bucket %s could not be read: %s", bucket, error)
        if self._registry.unread(bucket):
            # Warm processes of other buckets keep their regions; give those up for whoever comes next.
            self._pool.close_idle(lambda lane: lane.key.bucket != bucket)

    def open(self, info: StreamInfo) -> FrameReduction | None:
        """None: no kernel matches (``kernels_for`` tells), no memory region is free for the bucket, or the machine cannot
        confine kernels."""
        try:
            return self._open(info)
        except Exception:
            log.exception("no reduction for %s/%r", info.bucket, info.key)
            return None

    def _open(self, info: StreamInfo) -> Reduction | None:
        if self._clearance.standing.verdict is Verdict.REFUSED:
            return None
        if info.length is not None and _is_small_single(info.key, info.metadata, info.length) is not None:
            # Packed with others, and copied to where sandboxes can see it once it exists: ``landed``.
            return None
        attachments = self._matching(info.bucket, info.key)
        if not attachments or len(attachments) < len(self.kernels_for(info.bucket, info.key)):
            # Some source could not be read yet: the whole version is reduced from disk, by all its kernels.
            return None
        domain = self.pad.domain(info.bucket)
        if domain is None:
            self._pool.close_idle(lambda lane: lane.key.bucket != info.bucket)
            return None
        return self._begin(info, attachments, domain, self._late(info.bucket))

    def kernels_for(self, bucket: str, key: bytes) -> tuple[str, ...]:
        names = [attachment.kernel.name for attachment in self._matching(bucket, key)]
        if not is_internal(key) and not self._closed:
            names += [unread.name for unread in self._registry.unread(bucket) if unread.matches(key)]
        return tuple(names)

    def filters(self, bucket: str, key: bytes) -> dict[str, str]:
        return {one.name: one.raw for one in self._matching(bucket, key) if one.raw != "all"}

    def catch_up(self, record: ObjectRecord, kernels: tuple[str, ...]) -> None:
        """See ``FrameHost``."""
        self._owed.add(record, kernels)

    def landed(self, record: ObjectRecord, kernels: tuple[str, ...], payload: memoryview | None) -> None:
        """See ``FrameHost``."""
        try:
            late = self._late(record.bucket)
            live = tuple(name for name in kernels if name not in late)
            if payload is None or not live or not self._land(record, live, payload):
                self.catch_up(record, kernels)
            elif late:
                self.catch_up(record, tuple(name for name in kernels if name in late))
        except Exception:
            # It stays owed: the sweep comes back to it.
            log.exception("%s/%r was not given to its kernels", record.bucket, record.key)

    def _land(self, record: ObjectRecord, kernels: tuple[str, ...], payload: memoryview) -> bool:
        geometry = _is_small_single(record.key, record.metadata, record.length)
        attachments = [one for one in self._matching(record.bucket, record.key) if one.kernel.name in kernels]
        if geometry is None or len(attachments) < len(kernels) or self._gatherer.full:
            return False
        if any(one.owed or misfit(one, geometry) for one in attachments):
            return False
        domain = self.pad.domain(record.bucket)
        if domain is None:
            return False
        frame = self._tray.place(domain, payload[geometry.origin : geometry.origin + geometry.frame_bytes])
        self.gather(record, attachments, geometry, domain, frame)
        return True

    async def check(self, bucket: str, name: str, source: bytes, metadata: Mapping[str, str]) -> None:
        """See ``FrameHost``."""
        self._watch.use(bucket)
        self._pacing.submitting(bucket)
        with self._refusals():
            await self._submissions.kernel(bucket, name, source, metadata)

    async def check_array(self, bucket: str, kernel: str, name: str, head: bytes, length: int) -> None:
        """See ``FrameHost``."""
        self._watch.use(bucket)
        self._pacing.submitting(bucket)
        with self._refusals():
            await self._submissions.array(bucket, kernel, name, head, length)

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except KernelRefused:
            self._tally.error("refused")
            raise

    # -- what reductions and lanes ask (ReductionHost, LaneOwner)

    def lane(self, bucket: str, attachment: Attachment, geometry: FrameGeometry, domain: Domain) -> Lane:
        key = LaneKey.of(bucket, attachment, geometry, domain)
        return self._pool.get(key, lambda: Lane(key, attachment, geometry, domain, self))

    def revision(self, bucket: str) -> int:
        return self._registry.revision(bucket)

    def attached(self, bucket: str, name: str) -> Attachment | None:
        now = self.current(bucket, name)
        return now if now is not None and not now.owed else None

    def current(self, bucket: str, name: str) -> Attachment | None:
        for attachment in self._registry.known(bucket):
            if attachment.name == name and not self._disabled(bucket, attachment):
                return attachment
        return None

    def unfit(self, info: StreamInfo, attachment: Attachment, reason: str) -> None:
        said = f"{reason}; what arrives in {info.key!r} is judged with what was there before"
        log.error("kernel %s in bucket %s: %s", attachment.name, info.bucket, said)
        self._tally.error("misfit")
        revision = self._registry.revision(info.bucket)
        self._notices.misfit(info.bucket, attachment.name, attachment.kernel.sha256, said, info.key, revision)

    def seen(self, bucket: str, geometry: FrameGeometry) -> None:
        self._watch.use(bucket, geometry)

    async def admit(self, lane: Lane) -> int:
        await self._clearance.granted()
        return await self._pool.admit(lane)

    def paced(self, lane: Lane, bytes_per_s: float) -> None:
        self._pacing.live(lane.key.bucket, lane.attachment, lane.geometry, bytes_per_s)

    def idle(self, lane: Lane) -> None:
        self._pool.became_idle()

    def dismissed(self, lane: Lane) -> None:
        self._pool.dismissed(lane)

    def struck(self, lane: Lane, failure: SandboxFailed) -> bool:
        self._tally.error(failure.kind)
        strike = self._strikes.failed(lane.key.bucket, lane.key.kernel, lane.key.sha256, str(failure))
        log.warning(
            "kernel %s in bucket %s failed (%d of %d%s): %s",
            lane.key.kernel,
            lane.key.bucket,
            strike.count,
            self._limits.strikes_max,
            ", disabled until another source is put" if strike.disabled else "",
            failure,
        )
        return strike.disabled

    async def postpone(self, record: ObjectRecord, kernel: str, reason: Postponed) -> None:
        await self._owed.postpone(record, kernel, reason)

    def use(self, bucket: str) -> None:
        """See ``Reducer``."""
        self._watch.use(bucket)

    def gone(self) -> Collection[int]:
        """See ``Reducer``."""
        return () if self._members is None else self._members.gone()

    def succeeded(self, bucket: str, attachment: Attachment) -> None:
        self._strikes.succeeded(bucket, attachment.kernel.sha256)

    async def attachment(self, bucket: str, kernel: str) -> Attachment | None:
        """See ``RunHost``."""
        await self.prepare(bucket)
        found = [one for one in self._registry.known(bucket) if one.name == kernel]
        return found[0] if found and not self._disabled(bucket, found[0]) else None

    def refused(self, lane: Lane) -> None:
        """The kernel does not compile for this layout."""
        self._tally.error("compile")

    def device(self, bucket: str, attachment: Attachment, geometry: FrameGeometry | None) -> str:
        """See ``ReductionHost``."""
        if geometry is None:
            return "cpu"
        return self.plans.text(bucket, attachment, np.dtype(geometry.dtype).name, geometry.shape)

    def spawn(self, work: Coroutine[object, object, None], name: str) -> None:
        """Run in the background until it ends or the host closes; an exception is logged."""
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(self._logged(work, name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Products are built one at a time: they are large, and HDF5 has one lock anyway."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def gather(
        self,
        record: ObjectRecord,
        attachments: Sequence[Attachment],
        geometry: FrameGeometry,
        domain: Domain,
        frame: FrameBatch | None,
        index: FrameIndex | None = None,
    ) -> None:
        """See ``ReductionHost``."""
        if not attachments:
            if frame is not None:
                frame.release()
            return
        names = {attachment.kernel.name for attachment in attachments}
        every = {attachment.kernel.name for attachment in self._matching(record.bucket, record.key)}
        trailing = record.length - geometry.origin - geometry.frame_bytes if index is None else 0
        ruling = [attachment.name for attachment in attachments if attachment.raw != "all"]
        ledger = OneFrame(names, trailing, prior_of(record, complete=every <= names), ruling)
        shares: Sequence[FrameBatch | None] = [None] * len(attachments)
        if frame is not None:
            shares = SharedBatch(frame, len(attachments)).shares
        for attachment, share in zip(attachments, shares, strict=True):
            self._gatherer.add(record, attachment, geometry, domain, ledger, share, index)

    def done(self, reduction: Reduction) -> None:
        self._reductions.discard(reduction)
        self._owed.end(reduction.info.object_id, reduction.kernels)

    # -- inside

    async def _logged(self, work: Coroutine[object, object, None], name: str) -> None:
        try:
            await work
        except Exception:
            log.exception("background work of the kernel host failed: %s", name)

    def _matching(self, bucket: str, key: bytes) -> tuple[Attachment, ...]:
        if is_internal(key) or self._closed:
            return ()
        if not self._registry.fresh(bucket):
            self.spawn(self.prepare(bucket), "read kernels")
        return tuple(
            attachment
            for attachment in self._registry.known(bucket)
            if attachment.matches(key) and not self._disabled(bucket, attachment)
        )

    def _disabled(self, bucket: str, attachment: Attachment) -> bool:
        return self._strikes.disabled(bucket, attachment.kernel.sha256)

    def _changed(self, bucket: str) -> None:
        """The bucket's kernels, their metadata or their arrays are not what they were."""
        self._notices.changed(bucket, self._registry.revision(bucket))
        self._owed.changed(bucket)
        self._sweep_now.set()
        self._warm(bucket)
        if self._pacing.was_submitted(bucket):
            self.spawn(self._measure(bucket), "dry runs of kernels")

    async def _measure(self, bucket: str) -> None:
        await self._clearance.granted()
        await self._pacing.measure(bucket, lambda: self._enabled(bucket))

    def _enabled(self, bucket: str) -> Iterator[Attachment]:
        return (one for one in self._registry.known(bucket) if not self._disabled(bucket, one))

    def _late(self, bucket: str) -> frozenset[str]:
        return self._pacing.late(bucket, self._enabled(bucket))

    def _warm(self, bucket: str) -> None:
        """Start the sandboxes that the next frames will need: compiling takes longer than a short stream."""
        room = min(WARM_MAX, self._limits.processes_max - len(self._pool.lanes))
        layouts = self._watch.layouts(bucket)
        domain = self.pad.domain(bucket) if layouts and room > 0 else None
        if domain is None:
            return
        for attachment in self._registry.known(bucket):
            for geometry in layouts:
                if attachment.owed or self._disabled(bucket, attachment) or misfit(attachment, geometry):
                    continue
                if not self._pool.has(LaneKey.of(bucket, attachment, geometry, domain)) and room > 0:
                    self.lane(bucket, attachment, geometry, domain)
                    room -= 1

    def _begin(
        self, info: StreamInfo, attachments: tuple[Attachment, ...], domain: Domain, late: Collection[str] = ()
    ) -> Reduction:
        reduction = Reduction(self, info, attachments, domain, late)
        self._reductions.add(reduction)
        self._owed.begin(info.object_id, reduction.kernels)
        return reduction

    async def _sweep(self) -> None:
        """Forever: find owed reductions, close idle lanes."""
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        # What the slot's last process left behind is nobody else's: no grace the first time.
        grace_s = 0.0
        while True:
            self._tally.lag.set(sum(lane.frames_waiting for lane in self._pool.lanes))
            await self._strikes.look_around()
            self._tally.disabled.set(self._strikes.disabled_count)
            self._tally.cores_failed.set(self._notices.cores_failed)
            await self._pacing.look_around()
            self._tally.too_slow.set(
                sum(self._pacing.too_slow(bucket, self._enabled(bucket)) for bucket in self._watch.buckets)
            )
            if loop.time() >= due_s or await self._owed.released():
                due_s = loop.time() + self._limits.sweep_s
                try:
                    self._pool.sweep()
                    if self._owed.idle:
                        await self._owed.find(grace_s)
                        grace_s = self._limits.grace_s
                except IngestError as error:
                    log.warning("owed reductions could not be listed: %s", error)
                except Exception:
                    log.exception("a sweep of the kernel host failed")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(GAUGE_S, self._limits.sweep_s)):
                    await self._sweep_now.wait()
            if self._sweep_now.is_set():
                self._sweep_now.clear()
                due_s = 0.0

    async def _pay(self) -> None:
        await self._clearance.granted()
        await self._owed.pay()

    async def reduce_stored(self, record: ObjectRecord, names: tuple[str, ...]) -> None:
        """See ``Reducer``."""
        await self._registry.refresh(record.bucket)
        unread = {kernel.name for kernel in self._registry.unread(record.bucket)}
        if unread.intersection(names):
            self._pool.close_idle(lambda lane: lane.key.bucket != record.bucket)
            raise Postponed("its kernels cannot be read at the moment")
        attached = {attachment.kernel.name: attachment for attachment in self._registry.known(record.bucket)}
        attachments = []
        for name in names:
            attachment = attached.get(name)
            if attachment is None:
                await self._owed.give_up(record, name, "the kernel is no longer there")
            elif self._disabled(record.bucket, attachment):
                await self._owed.give_up(record, name, "the kernel is disabled: it failed too often")
            else:
                attachments.append(attachment)
        if not attachments:
            return
        domain = self.pad.domain(record.bucket)
        if domain is None:
            self._pool.close_idle(lambda lane: lane.key.bucket != record.bucket)
            raise Postponed("no memory region is free")
        domain.hold()
        try:
            found = await self._stored.of(record, domain)
            plain, index = single(found.layout, record, domain)
            if plain is not None:
                waiting = {one.name: one.owed or misfit(one, plain) for one in attachments}
                ready = [one for one in attachments if not waiting[one.name]]
                self.gather(record, ready, plain, domain, None, index)
                for name, reason in waiting.items():
                    if reason:
                        await self.postpone(record, name, Postponed(reason, waits=True))
                return
            reduction = self._begin(info_of(record), tuple(attachments), domain)
        finally:
            domain.drop()
        try:
            settings = {attachment.name: epochs_of(attachment, record.epochs) for attachment in attachments}
            matching = {attachment.kernel.name for attachment in self._matching(record.bucket, record.key)}
            reduction.begin_stored(record, found, settings, partial=not matching <= set(names))
            await reduction.finished.wait()
        finally:
            reduction.aborted()


def _is_small_single(key: bytes, metadata: Mapping[str, str], length: int) -> FrameGeometry | None:
    """The geometry of a body that is known from its head to be one small frame."""
    if length > FRAME_BYTES_MAX:
        return None
    try:
        if kind_of(memoryview(b""), key, "", metadata, complete=False) is not Kind.RAW:
            return None
        declared = declared_geometry(metadata)
    except ValueError:
        return None
    return declared if declared is not None and is_single(declared, length) else None

"""Filters what is due: reads the remaining frames back, stores them as a new version, lets the raw one go.

In: jobs of the catalogue (every kernel has judged the version), the attached kernels. Out: a new version of the same key
in the raw one's place, or the reason why the raw data stay, in the catalogue. What always holds: the raw version is only let
go by the very commit that makes the new one durable; a version that somebody else put meanwhile stays; whatever goes wrong
leaves the raw data as they are, and the drain takes them.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ingest import bucket_settings
from ingest.crashpoints import crashpoint
from ingest.errors import IngestError, NoSuchBucket, NoSuchKey, StaleVersion
from ingest.ports import Catalog, Domain, LandingPad
from ingest.records import CommitObject, FilterJob, FrameGeometry, FrameLedger, ObjectRecord, RawVersion
from kernels.attach import Attachment, epochs_of
from kernels.contract import DROP, KEEP, REPLACE, chain_geometries, out_geometry
from kernels.formats import NotFrames
from kernels.layout.index import FrameIndex
from kernels.layout.stored import Found
from kernels.passes import Gone, Hopeless, Postponed
from kernels.rawfilter import packed
from kernels.rawfilter.plan import REPLACED, CannotFilter, Plan, plan
from kernels.rawfilter.replay import Replay
from kernels.sandbox import SandboxFailed, SandboxLimits
from kernels.tally import Tally
from kernels.verdicts import UNREDUCED

log = logging.getLogger("hiss.kernels")

JOBS_AT_ONCE = 64
POLL_S = 1.0
ATTEMPTS_MAX = 5
FAILED_PAUSE_S = 2.0


class FilterHost(Protocol):
    """The host, as its filter sees it."""

    catalog: Catalog
    pad: LandingPad
    zygote_socket: str
    sandbox_limits: SandboxLimits

    def attached(self, bucket: str, name: str) -> Attachment | None: ...
    async def prepare(self, bucket: str) -> None: ...


LayoutOf = Callable[[ObjectRecord, Domain], Awaitable[Found]]


class RawFilter:
    """One for each worker: it filters the versions of its slot, one at a time."""

    def __init__(self, host: FilterHost, slot: int, tally: Tally, layout_of: LayoutOf) -> None:
        self._host = host
        self._slot = slot
        self._tally = tally
        self._layout_of = layout_of

    async def run(self) -> None:
        """For ever."""
        while True:
            try:
                jobs = await self._host.catalog.filters_due(self._slot, JOBS_AT_ONCE)
            except IngestError as error:
                log.warning("the raw filters that are due could not be listed: %s", error)
                jobs = ()
            failed = [job for job in jobs if not await self._settled(job)]
            if not jobs or failed:
                await asyncio.sleep(FAILED_PAUSE_S if failed else POLL_S)

    async def _settled(self, job: FilterJob) -> bool:
        """False: it is to be tried again."""
        record = job.record
        again = False
        try:
            left = await self._filter(job)
        except (StaleVersion, NoSuchKey, NoSuchBucket, Gone):
            return True
        except (CannotFilter, Hopeless) as error:
            reason = str(error)
        except SandboxFailed as error:
            reason, again = str(error), error.kind == "unavailable" and job.attempts + 1 < ATTEMPTS_MAX
        except (IngestError, Postponed) as error:
            reason, again = f"{type(error).__name__}: {error}", job.attempts + 1 < ATTEMPTS_MAX
        except Exception as error:
            log.exception("the raw filter over %s/%r failed", record.bucket, record.key)
            reason, again = f"internal error: {type(error).__name__}", job.attempts + 1 < ATTEMPTS_MAX
        else:
            self._tally.filtered(record.length, left)
            return True
        log.warning("%s/%r is not filtered%s: %s", record.bucket, record.key, " yet" if again else "", reason)
        try:
            await self._host.catalog.filter_ended(record.object_id, reason[:1000], again=again)
        except IngestError as error:
            log.warning("that a filter failed was not recorded: %s", error)
            again = True
        return not again

    async def _filter(self, job: FilterJob) -> int:
        """Bytes that are left of the version."""
        host, record = self._host, job.record
        bucket = await host.catalog.bucket(record.bucket)
        if bucket_settings.parse(bucket.tags).raw_filter != "allow":
            raise CannotFilter("the bucket does not allow it any more (hiss.raw-filter)")
        domain = host.pad.domain(record.bucket)
        if domain is None:
            raise Postponed("no memory region is free")
        domain.hold()
        try:
            found = (await self._layout_of(record, domain)).layout
            if isinstance(found, NotFrames):
                raise CannotFilter(found.reason)
            if isinstance(found, FrameIndex):
                raise CannotFilter(f"frames cannot be taken out of this format ({found.source}): its raw data stay")
            await host.prepare(record.bucket)
            decided = self._plan(job, found)
            if decided is None:
                await host.catalog.filter_ended(record.object_id)
                return record.length
            replay = self._replay(record, found, domain, decided) if decided.replaces else None
            try:
                request = _request(record, decided, job.filters)
                crashpoint("filter-before")
                await host.pad.compose(request, _body(host.pad, record, found, decided, replay), decided.length)
            finally:
                if replay is not None:
                    await replay.close()
        finally:
            domain.drop()
        return decided.length

    def _plan(self, job: FilterJob, geometry: FrameGeometry) -> Plan | None:
        record = job.record
        frames = _frames(record, geometry)
        out = None
        for name, raw in job.filters.items():
            attachment = self._host.attached(record.bucket, name)
            if raw == "kept" and attachment is not None and attachment.kernel.out is not None:
                inputs = chain_geometries(
                    [stage.kernel for stage in attachment.stages], (geometry.dtype, geometry.shape)
                )
                out = out_geometry(attachment.kernel, inputs[-1])
        if frames == 1 and not job.verdicts and record.ledger is not None:
            verdicts = _of_ledger(record.ledger, job)
        else:
            verdicts = {kernel: packed.unpack(row) for kernel, row in job.verdicts.items()}
        decided = plan(verdicts, job.filters, geometry, frames, out)
        if decided is not None and decided.replaces and out is None:
            raise CannotFilter(f"kernel {decided.replaces} is not there any more, and its frames cannot be made again")
        return decided

    def _replay(self, record: ObjectRecord, geometry: FrameGeometry, domain: Domain, decided: Plan) -> Replay:
        attachment = self._host.attached(record.bucket, decided.replaces)
        assert attachment is not None
        return Replay(
            self._host.pad,
            self._host.zygote_socket,
            self._host.sandbox_limits,
            record,
            geometry,
            domain,
            epochs_of(attachment, record.epochs),
            decided.fates,
            decided.geometry.frame_bytes,
        )


def _frames(record: ObjectRecord, geometry: FrameGeometry) -> int:
    frames = max(0, record.length - geometry.origin) // geometry.frame_bytes
    return frames if geometry.count is None else min(frames, geometry.count)


def _of_ledger(ledger: FrameLedger, job: FilterJob) -> dict[str, npt.NDArray[np.uint8]]:
    """The verdicts of a version of one frame, which its ledger counts (it has no product of its own). What the others said
    is no verdict of a kernel that was given up."""
    verdict = UNREDUCED
    if ledger.dropped:
        verdict = DROP
    elif ledger.replaced:
        verdict = REPLACE
    elif ledger.kept:
        verdict = KEEP
    return {kernel: np.array([UNREDUCED if kernel in job.unjudged else verdict], np.uint8) for kernel in job.filters}


async def _body(
    pad: LandingPad, record: ObjectRecord, geometry: FrameGeometry, decided: Plan, replay: Replay | None
) -> AsyncIterator[memoryview]:
    if decided.header:
        yield memoryview(decided.header)
    for first, count, fate in decided.runs():
        if fate == REPLACED:
            assert replay is not None
            async for piece in replay.outs(first, count):
                yield piece
            continue
        start = geometry.origin + first * geometry.frame_bytes
        async for piece in pad.read_range(record, start, start + count * geometry.frame_bytes):
            yield piece


def _request(record: ObjectRecord, decided: Plan, filters: Mapping[str, str]) -> CommitObject:
    metadata = dict(record.metadata)
    if "frame-dtype" in metadata:
        metadata["frame-dtype"] = decided.geometry.dtype
        metadata["frame-shape"] = ",".join(map(str, decided.geometry.shape))
    metadata["hiss-raw-filter"] = ",".join(f"{kernel}={raw}" for kernel, raw in sorted(filters.items()))
    metadata["hiss-raw-length"] = str(record.length)
    metadata["hiss-raw-crc64nvme"] = f"{record.crc64nvme:016x}"
    return CommitObject(
        bucket=record.bucket,
        key=record.key,
        object_id=secrets.token_bytes(16),
        length=decided.length,
        etag="",
        crc64nvme=0,
        owner=record.owner,
        extents=(),
        headers=record.headers,
        metadata=metadata,
        ledger=decided.ledger(record.ledger or FrameLedger()),
        geometry=decided.geometry,
        epochs=record.epochs,
        raw=RawVersion(record.object_id, record.length, record.etag, record.crc64nvme, record.modified_ns),
    )

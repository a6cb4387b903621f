"""Filters what is due: reads the remaining frames back, stores them as a new version, lets the raw one go.

In: jobs of the catalogue (every kernel has judged the version), the attached kernels. Out: a new version of the same key
in the raw one's place, or the reason why the raw data stay, in the catalogue. What always holds: the raw version is only let
go by the very commit that makes the new one durable; a version that somebody else put meanwhile stays; whatever goes wrong
leaves the raw data as they are, and the drain takes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ingest import bucket_settings
from ingest.crashpoints import crashpoint
from ingest.errors import IngestError, NoSuchBucket, NoSuchKey, ObjectOffline, StaleVersion
from ingest.ports import Catalog, Domain, LandingPad
from ingest.records import CommitObject, FilterJob, FrameGeometry, FrameLedger, ObjectRecord, RawVersion
from kernels.attach import Attachment, epochs_of
from kernels.contract import DROP, KEEP, REPLACE, chain_geometries, out_geometry
from kernels.formats import NotFrames
from kernels.layout.conversation import Lie, TooSpread, conversation
from kernels.layout.detect import Kind
from kernels.layout.index import FrameIndex
from kernels.layout.stored import Found
from kernels.passes import Gone, Hopeless, Postponed
from kernels.rawfilter import hdf5, packed
from kernels.rawfilter.bodies import Outs, Piece, body_of
from kernels.rawfilter.plan import KEPT, REPLACED, CannotFilter, Plan, plan
from kernels.rawfilter.replay import Replay, decoding
from kernels.rawfilter.spool import Spool
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
    scratch: Path | None
    """A folder of the node's for files without a name; None: the system's."""

    def gone(self) -> Collection[int]:
        """Nodes of the cluster that do not live."""
        ...

    def attached(self, bucket: str, name: str) -> Attachment | None: ...
    async def prepare(self, bucket: str) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Remains:
    """The new body. ``metadata``: what it needs to be understood, where the sender has not said so."""

    length: int
    pieces: AsyncIterator[memoryview]
    geometry: FrameGeometry | None
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


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
                jobs = await self._host.catalog.filters_due(self._slot, JOBS_AT_ONCE, self._host.gone())
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
        except ObjectOffline:
            return await self._recall(record)
        except (IngestError, Postponed) as error:
            if isinstance(error, Postponed) and error.recall:
                return await self._recall(record)
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

    async def _recall(self, record: ObjectRecord) -> bool:
        """It was drained and evicted before its filter's turn came: not the filter's failure, however long it takes."""
        try:
            await self._host.catalog.request_recall(record.object_id)
        except IngestError as error:
            log.warning("%s/%r was not recalled for its raw filter: %s", record.bucket, record.key, error)
        return False

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
            found = await self._layout_of(record, domain)
            if isinstance(found.layout, NotFrames):
                raise CannotFilter(found.layout.reason)
            await host.prepare(record.bucket)
            decided = self._plan(job, found, found.layout)
            if decided is None:
                await host.catalog.filter_ended(record.object_id)
                return record.length
            async with contextlib.AsyncExitStack() as undo:
                replay = self._replay(record, found.layout, domain, decided) if decided.replaces else None
                if replay is not None:
                    undo.push_async_callback(replay.close)
                if found.kind is Kind.HDF5:
                    remains = await self._hdf5(job, found.layout, domain, decided, replay, undo)
                else:
                    body = body_of(found, record.length, decided)
                    remains = Remains(body.length, _bytes(host.pad, record, body.pieces, replay), body.geometry)
                request = _request(record, decided, job.filters, remains)
                crashpoint("filter-before")
                await host.pad.compose(request, remains.pieces, remains.length)
        except Lie as lie:
            raise CannotFilter(f"writing its file anew made no sense: {lie}") from None
        except TooSpread as spread:
            raise CannotFilter(str(spread)) from None
        finally:
            domain.drop()
        return remains.length

    async def _hdf5(
        self,
        job: FilterJob,
        layout: FrameGeometry | FrameIndex,
        domain: Domain,
        decided: Plan,
        replay: Replay | None,
        undo: contextlib.AsyncExitStack,
    ) -> Remains:
        host, record = self._host, job.record
        assert isinstance(layout, FrameIndex)
        spool = None
        if hdf5.copies_chunks(layout, decided):
            chunks = hdf5.chunks_of(layout, decided)
        else:
            spool = undo.enter_context(Spool(host.scratch, hdf5.spool_bytes_max(record)))
            decode = functools.partial(self._decoding, record, layout, domain, decided)
            chunks = await hdf5.spooled(spool, decided, decode, replay)
        talk = await undo.enter_async_context(
            conversation(host.zygote_socket, host.pad, record, domain, host.sandbox_limits, hdf5.THINKING_S)
        )
        new = hdf5.Rewriting(talk, host.pad, record, layout, decided, chunks, spool)
        await new.begin(hdf5.note_of(record, decided, job.filters, encoded_anew=spool is not None))
        return Remains(new.length, new.bytes(), None, {"frame-dataset": layout.source.removeprefix(hdf5.SOURCE)})

    def _plan(self, job: FilterJob, found: Found, layout: FrameGeometry | FrameIndex) -> Plan | None:
        record = job.record
        frames = found.frames(record.length)
        geometry = layout.geometry if isinstance(layout, FrameIndex) else layout
        out = None
        for name, raw in job.filters.items():
            attachment = self._host.attached(record.bucket, name)
            if raw == "kept" and attachment is not None and attachment.kernel.out is not None:
                inputs = chain_geometries(
                    [stage.kernel for stage in attachment.stages], (geometry.dtype, geometry.shape)
                )
                out = out_geometry(attachment.kernel, inputs[-1])
        verdicts = {kernel: packed.unpack(row) for kernel, row in job.verdicts.items()}
        if frames == 1 and record.ledger is not None:
            verdicts = _of_ledger(record.ledger, job) | verdicts
        decided = plan(verdicts, job.filters, geometry, frames, out)
        if decided is not None and decided.replaces and out is None:
            raise CannotFilter(f"kernel {decided.replaces} is not there any more, and its frames cannot be made again")
        return decided

    def _replay(
        self, record: ObjectRecord, layout: FrameGeometry | FrameIndex, domain: Domain, decided: Plan
    ) -> Replay:
        """Of the kernel that replaces."""
        attachment = self._host.attached(record.bucket, decided.replaces)
        assert attachment is not None
        epochs = epochs_of(attachment, record.epochs)
        return self._replayed(record, layout, domain, decided, epochs, REPLACED)

    def _decoding(self, record: ObjectRecord, layout: FrameIndex, domain: Domain, decided: Plan) -> Replay:
        return self._replayed(record, layout, domain, decided, [(0, decoding())], KEPT, skips=True)

    def _replayed(
        self,
        record: ObjectRecord,
        layout: FrameGeometry | FrameIndex,
        domain: Domain,
        decided: Plan,
        epochs: Sequence[tuple[int, Attachment]],
        fate: int,
        *,
        skips: bool = False,
    ) -> Replay:
        host = self._host
        return Replay(
            host.pad,
            host.zygote_socket,
            host.sandbox_limits,
            record,
            layout,
            domain,
            epochs,
            decided.fates == fate,
            decided.frame_bytes,
            skips=skips,
        )


def _of_ledger(ledger: FrameLedger, job: FilterJob) -> dict[str, npt.NDArray[np.uint8]]:
    """The verdicts of a version of one frame as its ledger counts them, for kernels whose own are not known. What the others
    said is no verdict of a kernel that was given up."""
    verdict = UNREDUCED
    if ledger.dropped:
        verdict = DROP
    elif ledger.replaced:
        verdict = REPLACE
    elif ledger.kept:
        verdict = KEEP
    return {kernel: np.array([UNREDUCED if kernel in job.unjudged else verdict], np.uint8) for kernel in job.filters}


async def _bytes(
    pad: LandingPad, record: ObjectRecord, pieces: Sequence[Piece], replay: Replay | None
) -> AsyncIterator[memoryview]:
    for piece in pieces:
        if isinstance(piece, bytes):
            yield memoryview(piece)
        elif isinstance(piece, Outs):
            assert replay is not None
            async for out in replay.outs(piece.first, piece.count):
                yield out
        else:
            async for part in pad.read_range(record, piece.start, piece.stop):
                yield part


def _request(record: ObjectRecord, decided: Plan, filters: Mapping[str, str], remains: Remains) -> CommitObject:
    metadata = {**remains.metadata, **record.metadata}
    for name, value in (("frame-dtype", decided.dtype), ("frame-shape", ",".join(map(str, decided.shape)))):
        if name in metadata and decided.replaces:
            metadata[name] = value
    metadata["hiss-raw-filter"] = ",".join(f"{kernel}={raw}" for kernel, raw in sorted(filters.items()))
    metadata["hiss-raw-frames"] = f"{decided.frames} of {len(decided.fates)}"
    metadata["hiss-raw-length"] = str(record.length)
    metadata["hiss-raw-crc64nvme"] = f"{record.crc64nvme:016x}"
    return CommitObject(
        bucket=record.bucket,
        key=record.key,
        object_id=secrets.token_bytes(16),
        length=remains.length,
        etag="",
        crc64nvme=0,
        owner=record.owner,
        extents=(),
        headers=record.headers,
        metadata=metadata,
        ledger=decided.ledger(record.ledger or FrameLedger()),
        geometry=remains.geometry,
        epochs=record.epochs,
        raw=RawVersion(record.object_id, record.length, record.etag, record.crc64nvme, record.modified_ns),
    )

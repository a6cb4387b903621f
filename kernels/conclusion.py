"""The end of a kernel's work over one version: its product, or why there is none, is stored.

In: what the kernel found in a committed version, or what hindered it. Out: exactly one of a product, a product that says why
there is none, a failure recorded in the catalogue, or nothing because the version is gone or is tried again later. What always
holds: the ledger is amended before the product is committed, and the product pays the reduction in its own commit.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from ingest.crashpoints import crashpoint
from ingest.errors import IngestError, NoSuchBucket, NoSuchKey, StaleVersion
from ingest.ports import Catalog, LandingPad
from ingest.records import CommitObject, FrameGeometry, FrameLedger, ObjectRecord, PartialMember, PartialOf
from ingest.runs import run_of
from kernels import product
from kernels.attach import Attachment
from kernels.epochs import Outcome
from kernels.lane import TRANSIENT
from kernels.layout.index import FrameIndex
from kernels.lineage import Epoch, Input, Lineage
from kernels.passes import Gone, Hopeless, PassContext, Postponed
from kernels.rawfilter.packed import pack
from kernels.runs.handover import Handover
from kernels.runs.names import group_of, product_key
from kernels.runs.partial import Partial, of_version, origin_of

log = logging.getLogger("hiss.kernels")

PRODUCT_BYTES_MAX = 512 << 20
STORE_BACKOFF_S = (0.1, 0.5, 1.0, 2.0, 5.0)
"""Waits between attempts to store a product; then the sweep tries again later."""

R = TypeVar("R")


class ConclusionHost(Protocol):
    """The kernel host, as the end of a reduction sees it."""

    catalog: Catalog
    pad: LandingPad
    context: PassContext
    handover: Handover

    async def in_thread(self, work: Callable[[], R]) -> R: ...
    async def postpone(self, record: ObjectRecord, kernel: str, reason: Postponed) -> None:
        """The product stays owed; the sweep comes back to it."""
        ...

    def succeeded(self, bucket: str, attachment: Attachment) -> None: ...
    def device(self, bucket: str, attachment: Attachment, geometry: FrameGeometry | None) -> str:
        """What the kernel runs on, as lineage says it."""
        ...


class Conclusion:
    """Of all kernels of one version. ``frames``: how many it has for them; ``counts`` gives the ledger as of now."""

    def __init__(
        self,
        host: ConclusionHost,
        geometry: FrameGeometry | None,
        frames: int,
        index: FrameIndex | None,
        started_ns: int,
        counts: Callable[[], FrameLedger],
    ) -> None:
        self._host = host
        self._geometry = geometry
        self._frames = frames
        self._index = index
        self._started_ns = started_ns
        self._counts = counts
        self._amending = asyncio.Lock()

    async def conclude(
        self, attachment: Attachment, record: ObjectRecord, judged: Callable[[], Awaitable[Outcome]]
    ) -> None:
        """``judged`` raises Gone, Hopeless, Postponed, IngestError."""
        name = attachment.kernel.name
        try:
            await self._store(attachment, record, await judged())
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
            self._frames,
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
            device=self._ran_on(record.bucket, attachment),
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

    def _ran_on(self, bucket: str, attachment: Attachment) -> str:
        if self._index is not None and attachment.device != "cpu":
            return f"cpu ({attachment.device}: the frames lie encoded or scattered in their file)"
        return self._host.device(bucket, attachment, self._geometry)

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

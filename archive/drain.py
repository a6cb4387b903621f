"""The drain loop: claims versions whose drain is due, has them copied, records the copies, reports every failure.

In: the catalogue's drain queue. Out: versions in state archived, or a ``drain_error`` with a time for the next attempt.
The decisions are in archive/scheduler.py, the copying in archive/copier.py. Always true: a version is recorded as archived
only after its copy was verified and published; a version deleted meanwhile leaves no file; one that cannot be copied
never holds up the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections.abc import Coroutine

from archive.copier import Copier, SourceFailed, VerifyFailed
from archive.keylocks import KeyLocks
from archive.pace import DrainLimits, retry_after_s
from archive.reconcile import Reconciler, key_text
from archive.scheduler import Claim, Scheduler
from archive.targets.base import FileRights, TargetError, TargetLost
from ingest import bucket_settings
from ingest.counters import Counters
from ingest.crashpoints import crashpoint
from ingest.errors import CatalogUnavailable, IngestError, LeaseLost, NoSuchBucket, NoSuchKey, StaleEpoch, StaleVersion
from ingest.ports import Catalog
from ingest.records import ArchiveCopy, ObjectRecord

log = logging.getLogger(__name__)

_GONE = (StaleVersion, NoSuchKey, NoSuchBucket)
_RECORD_RETRY_CAP_S = 5.0


class Drain:
    def __init__(
        self,
        catalog: Catalog,
        copier: Copier,
        reconciler: Reconciler,
        keys: KeyLocks,
        counters: Counters,
        limits: DrainLimits,
    ) -> None:
        self._catalog = catalog
        self._copier = copier
        self._reconciler = reconciler
        self._keys = keys
        self._limits = limits
        self._scheduler = Scheduler(limits)
        self._rng = random.Random()
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._fatal: StaleEpoch | TargetLost | None = None
        self._objects = counters.cell("hiss_drain_objects_total")
        self._bytes = counters.cell("hiss_drain_bytes_total")
        self._failures = counters.cell("hiss_drain_failures_total")
        self._verify_failures = counters.cell("hiss_drain_verify_failures_total")
        self._read_errors = counters.cell("hiss_storage_errors_total", "read")

    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop``; then objects in flight get ``stop_grace_s`` to finish and the rest is given back. Raises
        StaleEpoch when a newer drain process took this one's place, TargetLost when the archive must be opened anew."""
        loop = asyncio.get_running_loop()
        stopping = loop.create_task(self._wake_at_stop(stop))
        try:
            while not stop.is_set():
                self._wake.clear()
                if self._fatal is not None:
                    raise self._fatal
                for step in self._scheduler.step(loop.time()):
                    self._spawn(self._claim(step.limit) if isinstance(step, Claim) else self._drain(step.record))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(self._scheduler.wake_at()):
                        await self._wake.wait()
        finally:
            stopping.cancel()
            await self._finish_up()

    async def _wake_at_stop(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._wake.set()

    async def _finish_up(self) -> None:
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=self._limits.stop_grace_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._wake.set()

    # -- instructions of the scheduler
    async def _claim(self, limit: int) -> None:
        now = asyncio.get_running_loop().time
        try:
            records = await self._catalog.claim_drain(limit, self._limits.lease_s)
        except StaleEpoch as error:
            self._fatal = error
            return
        except IngestError as error:
            log.warning("cannot ask for versions to drain: %s", error)
            self._scheduler.claim_failed(now())
            return
        if records:
            crashpoint("drain-claimed")
        self._scheduler.claimed(records, now())

    async def _drain(self, record: ObjectRecord) -> None:
        try:
            async with self._keys.hold(record.bucket, record.key):
                await self._archive(record)
        except _GONE:
            log.debug("%s was deleted or replaced before it was archived", key_text(record))
        except asyncio.CancelledError:
            await asyncio.shield(self._give_back(record))
            raise
        except LeaseLost as error:
            log.info("%s is left to whoever has it now: %s", key_text(record), error)
        except CatalogUnavailable as error:
            log.warning("%s stays in the queue: %s", key_text(record), error)
        except Exception as error:  # one version's trouble must never end the drain of all others
            await self._failed(record, error)
            return
        self._scheduler.finished(record.object_id)

    async def _archive(self, record: ObjectRecord) -> None:
        # What was claimed may have been deleted or moved by compaction while it waited here.
        record = await self._catalog.by_id(record.object_id)
        if record.archive is not None:
            return
        bucket = await self._catalog.bucket(record.bucket)
        rights = FileRights.of(bucket_settings.parse(bucket.tags))
        only_at = await self._reconciler.place_of(record)
        copy = await self._copier.copy(
            record,
            rights,
            only_at=only_at,
            # Reading and writing may have taken longer than the lease, or this process may have stood still.
            may_publish=lambda: self._catalog.confirm_drain(record.object_id),
        )
        await self._record(record, copy)
        crashpoint("drain-recorded")
        self._objects.add()
        self._bytes.add(record.stored_length)
        log.debug("archived %s at %s", key_text(record), copy.path)

    async def _record(self, record: ObjectRecord, copy: ArchiveCopy) -> None:
        """Tell the catalogue, however long it takes to come back: the copy is published, giving up would only make
        another. ``drained`` twice is harmless."""
        for attempt in itertools.count():
            try:
                recorded = await self._catalog.drained(record.object_id, copy)
            except CatalogUnavailable as error:
                log.warning("cannot record the archive copy of %s yet: %s", key_text(record), error)
                await asyncio.sleep(retry_after_s(attempt, 0.1, _RECORD_RETRY_CAP_S, self._rng))
            except _GONE:
                await self._reconciler.withdraw(record, copy.path)
                raise
            else:
                if recorded.archive != copy or not await self._reconciler.shows(recorded):
                    # Another node may have removed an older copy at this name since it was published.
                    await self._reconciler.settle(recorded)
                return

    # -- failures
    async def _failed(self, record: ObjectRecord, error: Exception) -> None:
        self._failures.add()
        if isinstance(error, VerifyFailed):
            self._verify_failures.add()
        elif isinstance(error, SourceFailed):
            self._read_errors.add()
        known = isinstance(error, TargetError | IngestError | bucket_settings.BadSetting)
        text = str(error) if known else f"unexpected {type(error).__name__}: {error}"
        limits = self._limits
        retry_s = retry_after_s(record.drain_attempts, limits.retry_first_s, limits.retry_cap_s, self._rng)
        log.error(
            "cannot archive %s, attempt %d, again in %.1f s: %s",
            key_text(record), record.drain_attempts + 1, retry_s, text, exc_info=None if known else error,
        )  # fmt: skip
        try:
            await self._catalog.drain_failed(record.object_id, text, retry_s)
        except IngestError as refused:
            # Gone meanwhile, or the lease runs out and the version is claimed again.
            log.info("the failure of %s was not recorded: %s", key_text(record), refused)
        if isinstance(error, TargetLost):
            self._fatal = error
        whole_target = isinstance(error, TargetError) and error.whole_target
        self._scheduler.failed(record.object_id, asyncio.get_running_loop().time(), whole_target=whole_target)

    async def _give_back(self, record: ObjectRecord) -> None:
        """The drain stops: somebody else may have the version at once, not only when the lease runs out."""
        with contextlib.suppress(IngestError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._catalog.drain_failed(record.object_id, "the drain process stopped", 0.0)

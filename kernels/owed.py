"""What a worker owes: reductions of stored versions that no live stream pays.

In: versions that landed without their kernels, products that were postponed, and what the catalogue says is owed when the
sweep asks, also what a node owed that has gone, where the second copy is here. Out: one version after the other to whoever
reduces it from disk, and failures to the catalogue. What always holds: what is not remembered here is still owed in the
catalogue; one version is never worked on twice at once; what was postponed is tried again, each time after twice the wait.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Collection
from typing import Protocol

from ingest.errors import IngestError, NoSuchBucket, NoSuchKey, StaleVersion
from ingest.ports import Catalog
from ingest.records import ObjectRecord
from kernels.passes import Gone, Hopeless, Postponed

log = logging.getLogger("hiss.kernels")


@dataclasses.dataclass(frozen=True, slots=True)
class OwedLimits:
    attempts_max: int
    """Internal errors over one owed product before it is given up; shortages do not count."""
    backlog_max: int
    """Owed versions remembered between sweeps."""
    grace_s: float
    """How long an owed product that this worker did not begin is left to whoever did."""
    postpone_s: float
    """First wait before a postponed product is tried again."""
    postpone_s_max: float


@dataclasses.dataclass(frozen=True, slots=True)
class _Due:
    """When an owed product may be tried, and how long the next postponement is."""

    time_s: float
    wait_s: float
    bucket: str
    released: bool = False


class Reducer(Protocol):
    """The kernel host, as owed work sees it."""

    catalog: Catalog

    async def reduce_stored(self, record: ObjectRecord, names: tuple[str, ...]) -> None:
        """Raises Gone, Hopeless, Postponed, IngestError."""
        ...

    def use(self, bucket: str) -> None:
        """Its kernels are to be watched: something waits for them."""
        ...

    def gone(self) -> Collection[int]:
        """Nodes of the cluster that do not live."""
        ...


class Owed:
    """Of one worker. Belongs to its event loop. ``gathered`` tells whether a member is in a batch of its run."""

    def __init__(self, host: Reducer, slot: int, limits: OwedLimits, gathered: Callable[[bytes, str], bool]) -> None:
        self._host = host
        self._slot = slot
        self._limits = limits
        self._gathered = gathered
        self._under_way: set[tuple[bytes, str]] = set()
        self._due: dict[tuple[bytes, str], _Due] = {}
        self._backlog: deque[tuple[ObjectRecord, tuple[str, ...]]] = deque()
        self._work = asyncio.Semaphore(0)
        self._closed = False

    def close(self) -> None:
        self._closed = True

    def begin(self, object_id: bytes, kernels: Collection[str]) -> None:
        """Somebody works on these products."""
        self._under_way.update((object_id, name) for name in kernels)

    def end(self, object_id: bytes, kernels: Collection[str]) -> None:
        self._under_way.difference_update((object_id, name) for name in kernels)

    def _is_at(self, object_id: bytes, kernel: str) -> bool:
        return (object_id, kernel) in self._under_way or self._gathered(object_id, kernel)

    @property
    def idle(self) -> bool:
        return not self._backlog

    def add(self, record: ObjectRecord, kernels: tuple[str, ...]) -> None:
        """Reduce a stored version in the background. Beyond ``backlog_max`` the sweep finds it later."""
        wanted = tuple(name for name in kernels if not self._is_at(record.object_id, name))
        if wanted and not self._closed and len(self._backlog) < self._limits.backlog_max:
            self.begin(record.object_id, wanted)
            self._backlog.append((record, wanted))
            self._work.release()

    async def postpone(self, record: ObjectRecord, kernel: str, reason: Postponed) -> None:
        log.warning("kernel %s over %s/%r is postponed: %s", kernel, record.bucket, record.key, reason)
        identity = (record.object_id, kernel)
        before = self._due.get(identity)
        wait_s = self._limits.postpone_s if before is None else min(self._limits.postpone_s_max, before.wait_s)
        released = before is not None and before.released
        self._due[identity] = _Due(asyncio.get_running_loop().time() + wait_s, 2 * wait_s, record.bucket, released)
        if reason.waits:
            self._host.use(record.bucket)
            await self._record_failure(record, kernel, str(reason), give_up=False, counted=False)
        if reason.recall:
            try:
                await self._host.catalog.request_recall(record.object_id)
            except IngestError as error:
                log.warning("%s/%r was not recalled for its kernel: %s", record.bucket, record.key, error)

    def changed(self, bucket: str) -> None:
        """What waited for the bucket's kernels may be tried at once."""
        now_s = asyncio.get_running_loop().time()
        for identity, due in self._due.items():
            if due.bucket == bucket:
                self._due[identity] = dataclasses.replace(due, time_s=now_s, wait_s=self._limits.postpone_s)

    async def released(self) -> bool:
        """Whether versions of this slot are owed again, because a member of their partial is gone."""
        try:
            return await self._host.catalog.released_reductions(self._slot)
        except IngestError:
            return False

    async def find(self, grace_s: float) -> None:
        owed: dict[bytes, tuple[ObjectRecord, list[str]]] = {}
        jobs = await self._host.catalog.pending_reductions(self._slot, self._limits.backlog_max, self._host.gone())
        now_s = asyncio.get_running_loop().time()
        due = {
            (job.record.object_id, job.kernel): _Due(
                now_s + (0.0 if job.released else grace_s), self._limits.postpone_s, job.record.bucket, job.released
            )
            for job in jobs
        }
        # What was paid and is owed again has no part in the grace of its first time.
        self._due = {
            identity: known if (known := self._due.get(identity)) and known.released >= fresh.released else fresh
            for identity, fresh in due.items()
        }
        for job in jobs:
            identity = (job.record.object_id, job.kernel)
            if self._is_at(*identity) or self._due[identity].time_s > now_s:
                continue
            if job.attempts >= self._limits.attempts_max:
                await self.give_up(job.record, job.kernel, f"given up after {job.attempts} attempts")
                continue
            owed.setdefault(job.record.object_id, (job.record, []))[1].append(job.kernel)
        for record, kernels in owed.values():
            self.add(record, tuple(kernels))

    async def pay(self) -> None:
        """Forever: reduce the next owed version from disk."""
        while True:
            await self._work.acquire()
            record, kernels = self._backlog.popleft()
            try:
                await self._host.reduce_stored(record, kernels)
            except Gone:
                log.info("%s/%r was deleted or replaced before it was reduced", record.bucket, record.key)
            except Hopeless as trouble:
                for name in kernels:
                    await self.give_up(record, name, str(trouble))
            except (Postponed, IngestError) as error:
                reason = error if isinstance(error, Postponed) else Postponed(f"{type(error).__name__}: {error}")
                for name in kernels:
                    await self.postpone(record, name, reason)
            except Exception:
                log.exception("the reduction of %s/%r failed", record.bucket, record.key)
                for name in kernels:
                    await self._record_failure(record, name, "internal error of the kernel host", give_up=False)
                    await self.postpone(record, name, Postponed("internal error"))
            finally:
                self.end(record.object_id, kernels)

    async def give_up(self, record: ObjectRecord, kernel: str, error: str) -> None:
        log.warning("kernel %s over %s/%r: %s", kernel, record.bucket, record.key, error)
        await self._record_failure(record, kernel, error, give_up=True)

    async def _record_failure(
        self, record: ObjectRecord, kernel: str, error: str, *, give_up: bool, counted: bool = True
    ) -> None:
        try:
            await self._host.catalog.reduction_failed(
                record.object_id, kernel, error[:1000], give_up=give_up, counted=counted
            )
        except (StaleVersion, NoSuchKey, NoSuchBucket):
            return
        except IngestError as refusal:
            log.warning("a failed reduction was not recorded: %s", refusal)

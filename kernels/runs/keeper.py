"""The keeper of a worker's runs: their products follow what is stored, at most once a second.

In: the catalogue's list of run products that do not reflect its state. Out: ``_run.nxs`` of the newest group, ``_run.<id>.nxs``
of older ones, compacted partials, runs closed after their timeout. What always holds: one worker of all nodes keeps a
product (``keeping``), and whatever it knows can be read again from the catalogue and the partials, so that its death costs
a second, and its node's a lease. A refresh never takes more than a tenth of the keeper's time: large products are refreshed
less often.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
import time
from collections.abc import Sequence

from ingest import bucket_settings
from ingest.crashpoints import crashpoint
from ingest.errors import IngestError, NoSuchBucket, NoSuchKey, StaleVersion
from ingest.records import (
    CommitObject,
    DeleteObject,
    ObjectRecord,
    OwedInRun,
    PartialOf,
    PartialRecord,
    RunProductOf,
    RunProductRecord,
)
from kernels.runs import merge, ordered, product
from kernels.runs import partial as partials
from kernels.runs.batch import EACH_BYTES_MAX
from kernels.runs.conclude import conclude
from kernels.runs.gather import RunHost
from kernels.runs.groups import Group, load_group, read_partial
from kernels.runs.names import folder, partial_key, run_key

log = logging.getLogger("hiss.kernels")

POLL_S = 0.25
REFRESH_S = 1.0
DUTY = 9.0
"""A product is left alone for so many times as long as its last refresh took."""
DUE_MAX = 1000
TIMEOUT_POLL_S = 2.0
IDLE_RUNS_MAX = 100
MEMBERS_LIVE_MAX = 1000
"""Members that an open run's product lists; a closed run's lists them all."""
OWED_COUNT_MAX = 100_000
COMPACT_FROM = 16
"""Small partials of a group before they are joined."""
COMPACT_MEMBERS = 1024
"""Members of a joined partial at most."""
CACHE_BYTES = 512 << 20
"""State of open runs kept in memory; what does not fit is read again."""


@dataclasses.dataclass(slots=True)
class _Kept:
    """What is known of one run product."""

    due_s: float = 0.0
    groups: dict[str, Group] = dataclasses.field(default_factory=dict)
    stored: dict[str, frozenset[bytes]] = dataclasses.field(default_factory=dict)
    """Partials in the stored products of older groups."""
    trouble: str = ""
    """Why the product is not as new as it should be, as it was logged."""

    @property
    def size_bytes(self) -> int:
        return sum(group.total.size_bytes for group in self.groups.values())


_Identity = tuple[str, bytes, str]


class RunKeeper:
    def __init__(self, host: RunHost) -> None:
        self._host = host
        self._kept: dict[_Identity, _Kept] = {}
        self._ordering: set[_Identity] = set()

    async def run(self) -> None:
        """Forever."""
        timeouts_s = 0.0
        loop = asyncio.get_running_loop()
        while True:
            try:
                for due in await self._host.catalog.run_products_due(DUE_MAX):
                    await self._keep(due)
                if loop.time() >= timeouts_s:
                    timeouts_s = loop.time() + TIMEOUT_POLL_S
                    await self._close_idle()
            except IngestError as error:
                log.warning("the runs could not be looked at: %s", error)
            except Exception:
                log.exception("the keeper of runs failed")
                await asyncio.sleep(REFRESH_S)
            await asyncio.sleep(POLL_S)

    # -- one product

    async def _keep(self, due: RunProductRecord) -> None:
        run = due.run
        identity = (run.bucket, run.run, due.kernel)
        if not self._host.handover.keeps(*identity):
            self._kept.pop(identity, None)
            return
        kept = self._kept.setdefault(identity, _Kept())
        began_s = time.monotonic()
        if began_s < kept.due_s:
            return
        try:
            final = await self._refresh(due, kept)
            kept.trouble = ""
        except (NoSuchKey, StaleVersion) as error:
            # The run changed while it was read: it is due again.
            log.info("run %r of %s changed while its product was made: %r", run.run, due.kernel, error)
            final = False
        except NoSuchBucket:
            log.info("run %r of %s went with its bucket", run.run, due.kernel)
            final = True
        except IngestError as error:
            if kept.trouble != str(error):
                kept.trouble = str(error)
                log.warning("the product of run %r was not stored: %s", run.run, error)
            final = False
        except partials.BadPartial as error:
            log.error("a partial of run %r cannot be read: %s", run.run, error)
            final = False
        took_s = time.monotonic() - began_s
        kept.due_s = time.monotonic() + max(REFRESH_S, DUTY * took_s)
        if final:
            self._kept.pop(identity, None)
        self._forget()

    async def _refresh(self, due: RunProductRecord, kept: _Kept) -> bool:
        """Make and store what the catalogue says now; True when the run is closed and complete."""
        run, kernel, catalog = due.run, due.kernel, self._host.catalog
        # Before anything is read, so that only a product is deleted that knew no more.
        stored = await self._stored(due)
        owed = await catalog.owed_in_run(run.bucket, run.run, kernel, OWED_COUNT_MAX)
        listed = await catalog.partials(run.bucket, run.run, kernel)
        by_group: dict[str, list[PartialRecord]] = {}
        for one in listed:
            by_group.setdefault(one.group, []).append(one)
        for name in kept.groups.keys() - by_group.keys():
            del kept.groups[name]
        newest = max(by_group, key=lambda name: max(one.since for one in by_group[name]), default=None)
        if await self._order(due, owed, listed):
            return False  # it stays due: what comes of it is stored then
        if newest is None:
            await self._empty(due, owed, stored)
            return not owed.pending
        for name, found in by_group.items():
            kept.groups[name] = await load_group(self._host, run.bucket, name, found, kept.groups.get(name))
        for name in sorted(by_group.keys() - {newest}):
            identities = frozenset(one.object_id for one in by_group[name])
            if kept.stored.get(name) != identities or run.closed_ns:
                await self._store(due, kept, name, newest, owed)
                kept.stored[name] = identities
        await self._store(due, kept, newest, newest, owed)
        wanted = {run_key(kernel, run.run, name) for name in (None, *(by_group.keys() - {newest}))}
        await self._delete(run.bucket, [one for one in stored if one.key not in wanted])
        final = bool(run.closed_ns) and not owed.pending
        for name, found in by_group.items():
            await self._compact(due, kept.groups[name], name, found, everything=final)
        return final

    async def _store(self, due: RunProductRecord, kept: _Kept, name: str, newest: str, owed: OwedInRun) -> None:
        run, group = due.run, kept.groups[name]
        result = None
        if group.kernel.has_finish and (geometry := group.total.geometry()) is not None:
            state = await asyncio.to_thread(group.total.state)
            result = await conclude(self._host, run.bucket, due.kernel, name, geometry, state)
        listing_all = run.closed_ns or sum(len(members) for members in group.total.members.values()) <= MEMBERS_LIVE_MAX

        def make() -> memoryview:
            members = group.total.all_members()
            return product.build(
                product.RunFindings(
                    run=run,
                    kernels=group.kernels,
                    origin=group.origin,
                    group=name,
                    state=group.total.state(),
                    members=members if listing_all else members[:MEMBERS_LIVE_MAX],
                    count=len(members),
                    elsewhere=sum(
                        len(found) for other, one in kept.groups.items() if other != name
                        for found in one.total.members.values()
                    ),
                    owed=owed,
                    as_of=due.changed,
                    started_ns=group.total.started_ns,
                    ended_ns=group.total.ended_ns,
                    feedback_events=group.total.feedback_events,
                    sums=product.sums_of(members),
                    result=result,
                    rows=group.total.rows(),
                    rows_left_out=group.total.rows_left_out,
                )
            )  # fmt: skip

        body = await self._host.in_thread(make)
        crashpoint("run-product-before")
        await self._put(due, run_key(due.kernel, run.run, None if name == newest else name), body, final=name == newest)

    async def _put(self, due: RunProductRecord, key: bytes, body: memoryview, *, final: bool) -> None:
        """``final``: the last of this refresh."""
        run = due.run
        bucket = await self._host.catalog.bucket(run.bucket)
        request = CommitObject(
            bucket=run.bucket,
            key=key,
            object_id=secrets.token_bytes(16),
            length=len(body),
            etag="",
            crc64nvme=0,
            owner=bucket.owner,
            extents=(),
            headers={"content-type": product.CONTENT_TYPE},
            metadata={"hiss-kernel": due.kernel, "hiss-run": "closed" if run.closed_ns else "open"},
            run_product=RunProductOf(due.kernel, run.run, due.changed, final),
        )
        await self._host.pad.store(request, body)
        self._host.context.tally.product()

    async def _order(self, due: RunProductRecord, owed: OwedInRun, listed: Sequence[PartialRecord]) -> bool:
        """Members of an ordered kernel wait for the run to close; then they are judged beside the keeper's work. True while
        they are."""
        identity = (due.run.bucket, due.run.run, due.kernel)
        if identity in self._ordering:
            return True
        if not due.run.closed_ns or not owed.waiting:
            return False
        attachment = await self._host.attachment(due.run.bucket, due.kernel)
        if attachment is None or not attachment.kernel.ordered:
            return False
        self._ordering.add(identity)

        async def judge() -> None:
            try:
                await ordered.judge(self._host, due, attachment, owed.waiting, list(listed))
            except IngestError as error:
                log.warning("ordered run %r was not judged: %s", due.run.run, error)
                await asyncio.sleep(REFRESH_S)
            finally:
                self._ordering.discard(identity)

        self._host.spawn(judge(), "ordered run")
        return True

    async def _empty(self, due: RunProductRecord, owed: OwedInRun, stored: Sequence[ObjectRecord]) -> None:
        """No member is left, or none could be reduced, or all of them wait for the end of the run."""
        run, catalog = due.run, self._host.catalog
        if owed.pending:
            await catalog.run_stored(run.bucket, run.run, due.kernel, due.changed, keep=True)
        elif owed.failed:
            body = await self._host.in_thread(lambda: product.build_failure(run, due.kernel, owed, due.changed))
            await self._put(due, run_key(due.kernel, run.run), body, final=True)
        else:
            await self._delete(run.bucket, [one for one in stored if one.key == run_key(due.kernel, run.run)])
            await catalog.run_stored(run.bucket, run.run, due.kernel, due.changed)
        await self._delete(run.bucket, [one for one in stored if one.key != run_key(due.kernel, run.run)])

    async def _stored(self, due: RunProductRecord) -> list[ObjectRecord]:
        """Products of the run's groups, whether or not these have members."""
        prefix = folder(due.kernel, due.run.run) + b"_run."
        rows, _ = await self._host.catalog.list_objects(due.run.bucket, prefix=prefix, limit=1000)
        return [row.record for row in rows if row.record is not None]

    async def _delete(self, bucket: str, found: Sequence[ObjectRecord]) -> None:
        """Just these versions: another keeper may have stored newer ones."""
        if not found:
            return
        requests = [DeleteObject(bucket, one.key, object_id=one.object_id) for one in found]
        for outcome in await self._host.catalog.delete(requests):
            if isinstance(outcome, Exception) and not isinstance(outcome, StaleVersion | NoSuchKey):
                raise outcome

    # -- compaction

    async def _compact(
        self, due: RunProductRecord, group: Group, name: str, listed: Sequence[PartialRecord], *, everything: bool
    ) -> None:
        """Join small partials of many; ``everything``: the run is closed, any two are enough."""
        small = sorted(
            (one for one in listed if one.batch and one.members <= COMPACT_MEMBERS // 2), key=lambda o: o.since
        )
        if group.kernel.ordered or len(small) < (2 if everything else COMPACT_FROM):
            return
        chosen: list[PartialRecord] = []
        members = size_bytes = 0
        for one in small:
            if one.apart is not small[0].apart:
                continue
            if members + one.members > COMPACT_MEMBERS or (one.apart and size_bytes + one.length > EACH_BYTES_MAX):
                break
            members += one.members
            size_bytes += one.length
            chosen.append(one)
        if len(chosen) < 2:
            return
        read = [await read_partial(self._host, due.run.bucket, one, group.kernel, group.origin) for one in chosen]

        def join() -> tuple[partials.Partial, memoryview]:
            joined = merge.join(group.kernel, read)
            return joined, memoryview(partials.encode(joined))

        joined, body = await asyncio.to_thread(join)
        object_id = secrets.token_bytes(16)
        bucket = await self._host.catalog.bucket(due.run.bucket)
        request = CommitObject(
            bucket=due.run.bucket,
            key=partial_key(due.kernel, due.run.run, object_id),
            object_id=object_id,
            length=len(body),
            etag="",
            crc64nvme=0,
            owner=bucket.owner,
            extents=(),
            headers={"content-type": partials.CONTENT_TYPE},
            partial=PartialOf(
                due.kernel,
                due.run.run,
                name,
                replaces=tuple(one.object_id for one in chosen),
                batch=True,
                apart=chosen[0].apart,
            ),
        )
        await self._host.pad.store(request, body)
        group.total.replace([one.object_id for one in chosen], object_id, joined)

    # -- runs that idle

    async def _close_idle(self) -> None:
        catalog = self._host.catalog
        for bucket in await catalog.buckets():
            timeout_s = bucket_settings.parse(bucket.tags).run_timeout_s
            if timeout_s == 0 or not self._host.handover.keeps(bucket.name, b"", ""):
                continue
            before_ns = catalog.now_ns() - timeout_s * 1_000_000_000
            for run in await catalog.idle_runs(bucket.name, before_ns, IDLE_RUNS_MAX):
                await catalog.close_run(bucket.name, run, "timeout", before_ns)

    def _forget(self) -> None:
        """Keep what fits in memory, most recently refreshed last."""
        size = sum(kept.size_bytes for kept in self._kept.values())
        for kept in sorted(self._kept.values(), key=lambda one: one.due_s):
            if size <= CACHE_BYTES:
                return
            size -= kept.size_bytes
            kept.groups.clear()
